"""The loaders of a run: its training batches from any step on, and every image of a source once."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from data.labels import LabelledSource
from data.loader import (
    LabelledDataset,
    PretrainDataset,
    build_eval_loader,
    build_train_loader,
    loader_settings,
)
from data.sampler import StepSampler
from data.transforms import EvalTransform
from engine.run.folder import Run
from engine.schedule import Plan
from util.errors import LocalInputError
from util.watchdog import alive, watched

MAX_RESTARTS = 3  # of the loader processes without a batch in between
logger = logging.getLogger(__name__)


class Batches:
    """A loader's batches, also where the processes that load them are killed (by lack of memory, or
    by a scheduler whose signal goes to all processes): then all of these are started again at the
    same batch.

    Batches are pure functions of their place, so nothing changes by it. Raises: LocalInputError
    where it does not help.

    Args:
        begin: the number of batches done -> a loader, and how many of its first batches are to be
            passed over.
        watch: limits the time between two batches to so many minutes; None where the caller does.
    """

    def __init__(
        self, begin: Callable[[int], tuple[DataLoader[Any], int]], watch: float | None = None
    ):
        self.begin = begin
        self.watch = watch

    def __len__(self) -> int:
        loader, passed = self.begin(0)
        return len(loader) - passed

    def __iter__(self) -> Iterator[Any]:
        with nullcontext() if self.watch is None else watched(self.watch):
            yield from self.restarted()

    def restarted(self) -> Iterator[Any]:
        """All batches, whatever happens to the processes that load them."""
        done, restarts = 0, 0
        while True:
            loader, passed = self.begin(done)
            try:
                for batch in started(loader, passed):
                    alive()
                    done, restarts = done + 1, 0
                    yield batch
                return
            except (RuntimeError, OSError, EOFError) as error:
                if not loader.num_workers or not is_death(error):
                    raise
                restarts += 1
                if restarts > MAX_RESTARTS:
                    raise LocalInputError(
                        f"loader processes end again and again (by lack of memory?), try fewer --num_workers: {error}"
                    ) from error
                logger.warning("a loader process has ended, all are started again: %s", error)


def started(loader: DataLoader[Any], passed: int) -> Iterator[Any]:
    """The batches of a loader but the first `passed`; its processes run."""
    iterator = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # torch has set a handler that raises wherever the process is when a loader process ends,
        # also in the middle of an optimiser step; without it the next batch says so
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return islice(iterator, passed, None)


def is_death(error: Exception) -> bool:
    """Whether a loader's error says that one of its processes is gone, rather than what happened in
    it."""
    text = str(error)
    if isinstance(error, RuntimeError):
        return text.startswith("DataLoader worker (pid")
    return (
        isinstance(error, ConnectionError | FileNotFoundError | EOFError)
        and "in DataLoader worker" not in text
    )


def train_batches(
    cfg: Any, run: Run, plan: Plan, dataset: PretrainDataset | LabelledDataset, start_step: int
) -> Batches:
    """This process's micro-batches from optimiser step `start_step` to the plan's end,
    `plan.accum_iter` per step."""
    dataset.source.read_ahead()

    def begin(done: int) -> tuple[DataLoader[Any], int]:
        steps, micro = divmod(done, plan.accum_iter)
        sampler = StepSampler(
            num_images=len(dataset),
            batch_size=cfg.batch_size,
            accum_iter=plan.accum_iter,
            rank=run.processes.rank,
            world_size=run.processes.world_size,
            seed=cfg.seed,
            start_step=start_step + steps,
            stop_step=plan.stop_step,
            block_size=dataset.source.block_size,
            aug_repeats=dataset.aug_repeats,
        )
        return build_train_loader(dataset, sampler, loader_settings(cfg, run.processes)), micro

    return Batches(begin)


def eval_batches(cfg: Any, run: Run, source: LabelledSource, crop_pct: float | None) -> Batches:
    """This process's share of `source`, through the evaluation transform; `crop_pct` as
    `EvalTransform` takes it."""

    def begin(done: int) -> tuple[DataLoader[Any], int]:
        loader = build_eval_loader(
            source,
            EvalTransform(cfg.img_size, crop_pct),
            cfg.batch_size,
            run.processes.rank,
            run.processes.world_size,
            loader_settings(cfg, run.processes),
            done,
        )
        return loader, 0

    return Batches(begin, cfg.timeout)
