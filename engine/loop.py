"""The training loop: one flat pass over the remaining optimiser steps, the same for every number of
processes.

It yields at the end of each epoch, so that an entry script can evaluate between two epochs without
being called back.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from functools import partial

import torch
from torch import Tensor, nn

from data.loader import Batch
from engine.optim import StepFn, optimizer_step, set_lr, update_ema
from engine.parallel import on_device, peak_memory, wrap_model
from engine.run.batches import Batches
from engine.run.faults import BadSamples, BadSteps
from engine.run.job import Job
from engine.run.saving import Saver
from util.dist import autocast_dtype

SLOW_LOADING = 0.1  # share of the time
logger = logging.getLogger(__name__)
LossFn = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]


class Stopwatch:
    """Times since the start and since the last log line, and what of the latter went into waiting
    for data.

    These are the host's seconds: a CUDA device may have had work while it waited.
    """

    def __init__(self, step: int):
        self.start, self.first_step = time.monotonic(), step
        self.slow_windows = 0  # those that waited long for their data
        self.open_window(step)

    def open_window(self, step: int) -> None:
        """Begins the time between two log lines at this step."""
        self.window_start, self.window_step, self.waited = time.monotonic(), step, 0.0


def train(
    job: Job, batches: Batches, loss_fn: LossFn, saver: Saver, step_fn: StepFn | None = None
) -> Iterator[int]:
    """Trains from `state.step` to `plan.stop_step`; yields the number of finished epochs after
    each.

    Args:
        batches: this process's micro-batches from `state.step` on, `plan.accum_iter` per step.
        loss_fn: (model, batch) -> (scalar loss, {} or {"loss": the scalar to log in its place}).
        saver: whose context surrounds this.
        step_fn: takes or skips a step: (optimizer, scaler) -> what `optimizer_step` returns, which
            is the default, with the settings' `clip_grad` if they have one.
    """
    run, cfg, plan, state = job.run, job.cfg, job.plan, job.state
    if step_fn is None:
        step_fn = partial(optimizer_step, clip_grad=getattr(cfg, "clip_grad", None))
    dtype = autocast_dtype(cfg.precision, run.device)
    model = wrap_model(state.model, run.device, plan.accum_iter, run.processes.world_size)
    model.train()
    stopwatch = Stopwatch(state.step)
    bad_samples = BadSamples(
        run.output_dir / "bad_samples.jsonl", job.num_images, run.processes.is_main
    )
    bad_steps = BadSteps(
        run.output_dir / "bad_steps.jsonl",
        cfg.max_bad_steps,
        cfg.log_interval,
        run.processes.is_main,
        batches.sampler,
    )
    iterator = on_device(batches, run.device)
    while True:
        if state.epoch_end_pending:
            # An evaluation forks loader processes, which is not safe while another thread writes.
            saver.wait()
            yield job.epochs_done
            state.epoch_end_pending = False
            if saver.due(job.epochs_done):
                saver.save()
            stopwatch.open_window(state.step)  # an evaluation and a save are not training
        if state.step == plan.stop_step:
            return
        saver.between_steps()
        lr = plan.lr(state.step)
        set_lr(state.optimizer, lr)
        loss_sum = torch.zeros((), device=run.device)
        for micro in range(plan.accum_iter):
            asked = time.monotonic()
            batch = next(iterator)
            stopwatch.waited += time.monotonic() - asked
            bad_samples.collect(batch)
            is_last = micro == plan.accum_iter - 1
            with nullcontext() if is_last or model is state.model else model.no_sync():
                with torch.autocast(run.device.type, dtype=dtype, enabled=dtype is not None):
                    loss, metrics = loss_fn(model, batch)
                state.scaler.scale(loss / plan.accum_iter).backward()
            loss_sum += metrics.get("loss", loss).detach() / plan.accum_iter
        grad_norm, found_inf = step_fn(state.optimizer, state.scaler)
        if state.ema is not None:
            update_ema(state.ema, state.model, found_inf)
        state.epoch_meter.update(loss_sum, grad_norm, found_inf)
        state.window_meter.update(loss_sum, grad_norm, found_inf)
        state.step += 1
        bad_steps.add(state.step, lr, loss_sum, found_inf)
        run.records.bar.update()

        ends_epoch = state.step % plan.steps_per_epoch == 0
        if state.step % cfg.log_interval == 0 or ends_epoch:
            bad_steps.check(log_window(job, stopwatch, lr, bad_samples.exchange()))
            if not ends_epoch and saver.due(None):
                saver.save()
        if ends_epoch:
            log_epoch(job)
            state.epoch_end_pending = True


def log_window(job: Job, stopwatch: Stopwatch, lr: float, num_bad_files: int) -> int:
    """Records the steps since the last such record; returns the largest number of bad steps in a
    row among them."""
    plan, state = job.plan, job.state
    loss, grad_norm, bad_in_a_row = state.window_meter.read()
    now = time.monotonic()
    elapsed = max(now - stopwatch.window_start, 1e-9)
    values = {
        "epoch": state.step / plan.steps_per_epoch,
        "loss": loss,
        "grad_norm": grad_norm,
        "lr": lr,
        "images_per_s": (state.step - stopwatch.window_step) * plan.total_batch / elapsed,
        "data_wait": stopwatch.waited / elapsed,
        "eta_s": (now - stopwatch.start)
        / (state.step - stopwatch.first_step)
        * (plan.stop_step - state.step),
        "bad_files": num_bad_files,
    }
    stopwatch.open_window(state.step)
    bad_files = f"  bad_files {num_bad_files}" if num_bad_files else ""
    eta = timedelta(seconds=round(values["eta_s"]))
    line = (
        f"step {state.step}/{plan.total_steps}  epoch {values['epoch']:.2f}  loss {loss:.4f}  "
        f"lr {lr:.2e}  grad_norm {grad_norm:.3f}  {values['images_per_s']:.0f} images/s  "
        f"data_wait {100 * values['data_wait']:.0f}%  eta {eta}{bad_files}"
    )
    job.run.records.write("train", state.step, values, line)
    # with data_on_device this is the host's time, in which a GPU goes on computing
    if values["data_wait"] > SLOW_LOADING and not job.cfg.data_on_device:
        stopwatch.slow_windows += 1
        if stopwatch.slow_windows == 2:  # in the first one the loaders start
            is_dense = getattr(job.cfg, "task", "classify") != "classify"
            logger.warning(
                "%.0f %% of the time since the last line went into waiting for images: loading is "
                "the bottleneck. Raise num_workers, or %s",
                100 * values["data_wait"],
                "reduce the images"
                if is_dense  # shards hold no masks
                else "pack the images with tools/pack_dataset.py",
            )
    if bad_in_a_row:
        logger.warning("%d steps in a row had a non-finite gradient and were skipped", bad_in_a_row)
    return bad_in_a_row


def log_epoch(job: Job) -> None:
    """Records the mean loss of an epoch and begins the next one's."""
    epoch, (loss, _, _) = job.epochs_done, job.state.epoch_meter.read()
    job.state.epoch_losses.append(loss)
    memory = peak_memory(job.run.device) / 1e9
    values = {"epoch": float(epoch), "epoch_loss": loss, "memory_gb": memory}
    line = f"epoch {epoch} done  mean loss {loss:.4f}"
    job.run.records.write("epoch", job.state.step, values, line)
