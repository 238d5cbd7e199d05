"""Learning rate, steps and batches of a run: pure functions of the settings, the number of images
and the number of processes."""

import math
from dataclasses import dataclass

from engine.run.checkpoint import Checkpoint
from util.errors import InputError
from util.settings.base import ScheduleConfig


@dataclass(frozen=True)
class Plan:
    """The numbers that follow from settings, data set and processes; logged, never written back.

    total_batch: images per optimiser step over all processes. peak_lr, min_lr: absolute.
    """

    accum_iter: int
    total_batch: int
    steps_per_epoch: int
    total_steps: int
    stop_step: int
    warmup_steps: float
    peak_lr: float
    min_lr: float

    def lr(self, step: int) -> float:
        """Absolute learning rate of optimiser step `step`, counted from 0.

        It rises linearly from 0 to `peak_lr` over `warmup_steps`, then falls along half a cosine to
        `min_lr`.

        Source: MAE, table 8 ("cosine decay", "warmup"); half-cycle cosine of arXiv 1608.03983.
        """
        if step < self.warmup_steps:
            return self.peak_lr * step / self.warmup_steps
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return self.min_lr + (self.peak_lr - self.min_lr) * cosine


def plan_run(cfg: ScheduleConfig, num_images: int, world_size: int, accum_iter: int) -> Plan:
    """The plan of a run on `num_images`. Raises: InputError if an epoch has no whole step."""
    total = cfg.batch_size * world_size * accum_iter
    if num_images < total:
        raise InputError(
            f"the data set has {num_images} images and one optimiser step takes {total} "
            f"(batch_size {cfg.batch_size} x {world_size} processes x accum_iter {accum_iter}): "
            "lower batch_size and total_batch_size, or take more images",
            settings=("batch_size",),
        )
    steps_per_epoch = num_images // total
    stop_epoch = cfg.epochs if cfg.stop_epoch is None else cfg.stop_epoch
    return Plan(
        accum_iter=accum_iter,
        total_batch=total,
        steps_per_epoch=steps_per_epoch,
        total_steps=cfg.epochs * steps_per_epoch,
        stop_step=stop_epoch * steps_per_epoch,
        warmup_steps=cfg.warmup_epochs * steps_per_epoch,
        peak_lr=cfg.base_lr * total / 256,
        min_lr=cfg.min_lr * total / 256,
    )


def choose_accum_iter(cfg: ScheduleConfig, world_size: int, saved: Checkpoint | None = None) -> int:
    """Micro-batches per optimiser step.

    The number follows from `total_batch_size` if that is set. A run that goes on from the
    checkpoint `saved` keeps its total batch, so that fewer or more processes take the same steps.

    Raises: InputError if the total is not a multiple of what one pass takes, or differs from the
    total of the run so far.
    """
    total = cfg.total_batch_size if saved is None else saved.total_batch
    if total is None:
        return cfg.accum_iter
    if cfg.total_batch_size not in (None, total):
        raise InputError(
            f"total_batch_size is now {cfg.total_batch_size} and the run so far has {total}",
            settings=("total_batch_size",),
        )
    per_pass = cfg.batch_size * world_size
    asked = f"batch_size {cfg.batch_size} x {world_size} processes"
    if total % per_pass:
        raise InputError(
            f"total_batch_size {total} is not a multiple of {asked} = {per_pass}, so accum_iter is "
            f"not whole",
            settings=("total_batch_size", "batch_size"),
        )
    if cfg.accum_iter not in (1, total // per_pass, saved and saved.config["accum_iter"]):
        raise InputError(
            f"{asked} x accum_iter {cfg.accum_iter} is {per_pass * cfg.accum_iter} images per step"
            f", not total_batch_size {total}: leave accum_iter out, which makes it "
            f"{total // per_pass}",
            settings=("accum_iter",),
        )
    return total // per_pass
