"""The loaders of a run: its training batches from any step on, and every image of a source once."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from data.evaluation import build_eval_loader
from data.labelled import LabelledSource
from data.loaders import LabelledDataset, PretrainDataset, build_train_loader, loader_settings
from data.packed import PackedSource
from data.sampler import StepSampler
from data.transforms import EvalTransform
from engine.run import Run
from engine.schedule import Plan
from util.errors import LocalInputError

MAX_RESTARTS = 3  # of the loader processes without a batch in between
logger = logging.getLogger(__name__)


class TrainBatches:
    """This process's micro-batches from optimiser step `start_step` on, in the order that the sampler gives.

    Where a loader process is killed (by lack of memory, or by a scheduler whose signal goes to all processes) all of
    them are started again at the same place: batches are pure functions of their place. Raises: LocalInputError where
    that does not help.

    Args:
        make: the loader from an optimiser step on.
        accum_iter: micro-batches per optimiser step.
    """

    def __init__(self, make: Callable[[int], DataLoader[Any]], start_step: int, accum_iter: int):
        self.make = make
        self.start_step = start_step
        self.accum_iter = accum_iter
        self.has_workers = False

    def __iter__(self) -> Iterator[Any]:
        done, restarts = 0, 0
        iterator = self.begin(done)
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if not self.has_workers or not is_death(error):
                    raise
                restarts += 1
                if restarts > MAX_RESTARTS:
                    raise LocalInputError(
                        f"loader processes end again and again (by lack of memory?), try fewer --num_workers: {error}"
                    ) from error
                logger.warning("a loader process has ended, all are started again: %s", error)
                iterator = self.begin(done)
                continue
            done, restarts = done + 1, 0
            yield batch

    def begin(self, done: int) -> Iterator[Any]:
        """The batches after the first `done`."""
        steps, micro = divmod(done, self.accum_iter)
        loader = self.make(self.start_step + steps)
        self.has_workers = loader.num_workers > 0
        iterator = iter(loader)
        if threading.current_thread() is threading.main_thread():
            # torch has set a handler that raises wherever the training is when a loader process ends, also in the
            # middle of an optimiser step; without it the next batch says so
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return islice(iterator, micro, None)


def is_death(error: Exception) -> bool:
    """Whether a loader's error says that one of its processes is gone, rather than what happened in it."""
    text = str(error)
    if isinstance(error, RuntimeError):
        return text.startswith("DataLoader worker (pid")
    return isinstance(error, ConnectionError | FileNotFoundError | EOFError) and "in DataLoader worker" not in text


def train_batches(
    cfg: Any, run: Run, plan: Plan, dataset: PretrainDataset | LabelledDataset, start_step: int
) -> TrainBatches:
    """This process's micro-batches from optimiser step `start_step` to the plan's end."""
    source = dataset.source
    if isinstance(source, PackedSource):
        source.reads_ahead = True

    def make(step: int) -> DataLoader[Any]:
        sampler = StepSampler(
            len(dataset), cfg.batch_size, plan.accum_iter, run.processes.rank, run.processes.world_size, cfg.seed,
            step, plan.stop_step, getattr(source, "block_size", 1), getattr(dataset, "aug_repeats", 1),
        )  # fmt: skip
        return build_train_loader(dataset, sampler, loader_settings(cfg, run.processes))

    return TrainBatches(make, start_step, plan.accum_iter)


def eval_batches(cfg: Any, run: Run, source: LabelledSource, crop_pct: float | None) -> DataLoader[Any]:
    """This process's share of `source`, through the evaluation transform; `crop_pct` as `EvalTransform` takes it."""
    return build_eval_loader(
        source, EvalTransform(cfg.img_size, crop_pct), cfg.batch_size, run.processes.rank,
        run.processes.world_size, loader_settings(cfg, run.processes),
    )  # fmt: skip
