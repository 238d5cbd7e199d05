"""The batches of a run: training batches from any step on, and every image of a source once."""

import signal
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from math import prod
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from data.handover import check_handover
from data.labels import LabelledSource
from data.loader import SampleDataset, build_eval_loader, loader_maker
from data.sampler import StepSampler
from data.sources import value_bytes
from data.transforms import EvalTransform
from engine.run.folder import Run, TrainConfig
from engine.run.interrupts import stop_with
from engine.schedule import Plan
from models.spec import pair
from util.errors import LocalInputError
from util.settings.evaluation import KnnConfig
from util.watchdog import alive, watched

if TYPE_CHECKING:
    pass


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
        self.sampler: Any = loader.batch_sampler  # of training batches a StepSampler
        self.timeout = timeout

    def __iter__(self) -> Iterator[Any]:
        loader, num_done = self.loader, 0
        with nullcontext() if self.timeout is None else watched(self.timeout):
            try:
                iterator = iter(loader)
                with suppress(ValueError):  # in the main thread, others have no signals
                    # torch's handler raises in the middle of a step when a loader process ends;
                    # without it the next batch does
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for num_done, batch in enumerate(iterator, 1):  # noqa: B007 (counts on failure)
                    alive()
                    yield batch
                return
            except (RuntimeError, OSError, EOFError) as error:
                if not loader.num_workers:
                    raise
                cause = (str(error).strip() or type(error).__name__).splitlines()[-1]
            without_processes = DataLoader(
                loader.dataset,
                batch_sampler=(self.sampler[n] for n in range(num_done, len(self.sampler))),
                collate_fn=loader.collate_fn,
                pin_memory=loader.pin_memory,
                generator=loader.generator,
            )
            for batch in without_processes:
                stop_with(
                    LocalInputError(
                        f"the loader processes failed ({cause}): lower num_workers (0 needs none), "
                        "free memory, enlarge the shared memory /dev/shm, shorten TMPDIR, or raise "
                        "the limit of open files (ulimit -n)"
                    )
                )
                alive()
                yield batch


def train_batches(
    cfg: TrainConfig, run: Run, plan: Plan, dataset: SampleDataset, step: int
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
    loader = loader_maker(cfg, run.processes)(dataset, batch_sampler=sampler)
    image_values = cfg.in_chans * prod(pair(cfg.img_size))
    image_bytes = image_values * value_bytes(dataset.source) if loader.num_workers else 0
    check_handover(loader, cfg.batch_size, image_bytes, run.processes)
    return Batches(loader)


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
