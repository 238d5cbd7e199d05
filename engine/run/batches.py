"""The batches of a run: training batches from any step on, and every image of a source once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from torch.utils.data import DataLoader

from data.labels import LabelledSource
from data.loader import LabelledDataset, PretrainDataset, build_eval_loader, loader_maker
from data.sampler import StepSampler
from data.transforms import EvalTransform
from engine.run.folder import Run
from engine.run.interrupts import stop_with
from engine.schedule import Plan
from util.errors import LocalInputError
from util.settings.evaluation import FinetuneConfig, KnnConfig, LinclsConfig
from util.settings.pretrain import PretrainConfig
from util.watchdog import alive, watched

TrainConfig = PretrainConfig | FinetuneConfig | LinclsConfig


class Batches:
    """The batches of a loader, also if its processes fail: then the run stops with one line.

    A loader process may be killed (for lack of memory, say), or find no shared memory or socket to
    hand a batch over. All processes of a run stop after the same step, so until then this process
    loads its batches itself. They are pure functions of their number, so nothing else changes.

    Raises: LocalInputError at once, if no training is there to be stopped; what the data raises.

    Args:
        loader: with a batch sampler that can be indexed.
        timeout: minutes between two batches, see `watched`; None if the caller watches.
    """

    def __init__(self, loader: DataLoader[Any], timeout: float | None = None):
        self.loader = loader
        self.timeout = timeout

    @property
    def sampler(self) -> StepSampler:
        """Of training batches."""
        assert isinstance(self.loader.batch_sampler, StepSampler)
        return self.loader.batch_sampler

    def __iter__(self) -> Iterator[Any]:
        num_done = 0
        with nullcontext() if self.timeout is None else watched(self.timeout):
            try:
                iterator = iter(self.loader)
                if threading.current_thread() is threading.main_thread():
                    # torch's handler raises in the middle of a step when a loader process ends;
                    # without it the next batch does
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for batch in iterator:
                    alive()
                    num_done += 1
                    yield batch
                return
            except (RuntimeError, OSError, EOFError) as error:
                if not self.loader.num_workers:
                    raise
                cause = (str(error).strip() or type(error).__name__).splitlines()[-1]
            for batch in self._without_processes(num_done):
                stop_with(
                    LocalInputError(
                        f"the loader processes failed ({cause}): lower num_workers (0 needs none), "
                        "free memory, enlarge the shared memory /dev/shm, or shorten TMPDIR"
                    )
                )
                alive()
                yield batch

    def _without_processes(self, start: int) -> DataLoader[Any]:
        """A loader of the batches from number `start` on that has no processes."""
        sampler: Any = self.loader.batch_sampler
        return DataLoader(
            self.loader.dataset,
            batch_sampler=(sampler[number] for number in range(start, len(sampler))),
            collate_fn=self.loader.collate_fn,
            pin_memory=self.loader.pin_memory,
            generator=self.loader.generator,
        )


def train_batches(
    cfg: TrainConfig, run: Run, plan: Plan, dataset: PretrainDataset | LabelledDataset, step: int
) -> Batches:
    """This process's micro-batches from optimiser step `step` to the plan's end,
    `plan.accum_iter` per step."""
    dataset.source.read_ahead()
    sampler = StepSampler(
        num_images=len(dataset.source),
        batch_size=cfg.batch_size,
        accum_iter=plan.accum_iter,
        rank=run.processes.rank,
        world_size=run.processes.world_size,
        seed=cfg.seed,
        start_step=step,
        stop_step=plan.stop_step,
        block_size=dataset.source.block_size,
        aug_repeats=dataset.aug_repeats,
    )
    return Batches(loader_maker(cfg, run.processes)(dataset, batch_sampler=sampler))


def eval_batches(
    cfg: TrainConfig | KnnConfig, run: Run, source: LabelledSource, crop_pct: float | None
) -> Batches:
    """This process's share of `source`, through the evaluation transform; `crop_pct` as
    `EvalTransform` takes it."""
    loader = build_eval_loader(
        source,
        EvalTransform(cfg.img_size, crop_pct),
        cfg.batch_size,
        run.processes.rank,
        run.processes.world_size,
        loader_maker(cfg, run.processes),
    )
    return Batches(loader, cfg.timeout)
