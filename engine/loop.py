"""The training loop: one flat pass over the optimiser steps that are left, the same for every number of processes.

It yields at the end of each epoch, so that an entry script can evaluate between two epochs without being called back.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.bad_samples import BadSamples
from engine.ema import update_ema
from engine.optim import StepFn, set_lr
from engine.run import Run, duration
from engine.schedule import Plan
from engine.state import Saver, TrainState
from util.dist import autocast_dtype
from util.errors import InputError
from util.metrics import Stopwatch

logger = logging.getLogger(__name__)
LossFn = Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]]


def train(
    run: Run, cfg: Any, plan: Plan, state: TrainState, batches: Iterable[Any], loss_fn: LossFn,
    step_fn: StepFn, saver: Saver, bad_samples: BadSamples,
) -> Iterator[int]:  # fmt: skip
    """Trains from `state.step` to `plan.stop_step`; yields the number of finished epochs after each.

    Args:
        batches: this process's micro-batches from `state.step` on, `plan.accum_iter` per step.
        loss_fn: (model, batch) -> (scalar loss, {} or {"loss": what to log in its place}).
        step_fn: (optimizer, scaler) -> what `optimizer_step` returns; takes the step, or skips it.
    """
    dtype = autocast_dtype(cfg.precision, run.device)
    model = wrap_model(state.model, run.device, plan.accum_iter, run.processes.world_size)
    model.train()
    stopwatch = Stopwatch()
    iterator = iter(batches)
    while state.step < plan.stop_step:
        lr = plan.lr(state.step)
        set_lr(state.optimizer, lr)
        loss_sum = torch.zeros((), device=run.device)
        waited = 0.0
        for micro in range(plan.accum_iter):
            asked = time.monotonic()
            batch = next(iterator)
            waited += time.monotonic() - asked
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
        stopwatch.step(waited)
        run.advance()

        ends_epoch = state.step % plan.steps_per_epoch == 0
        if state.step % cfg.log_interval == 0 or ends_epoch:
            log_window(run, plan, state, stopwatch, lr, bad_samples.exchange(), cfg.max_bad_steps)
            if not ends_epoch and saver.due(None):
                saver.save(state, plan.total_batch)
        if ends_epoch:
            log_epoch(run, plan, state)
            epochs_done = state.step // plan.steps_per_epoch
            yield epochs_done
            if saver.due(epochs_done) or state.step == plan.stop_step:
                saver.save(state, plan.total_batch)
            stopwatch.open_window()  # an evaluation and a save are not training


def prepare_model(model: Any, cfg: Any) -> Any:
    """Sets what `checkpointing` and `compile` ask for on a model, in place; its state stays under the same names.

    Raises: InputError where compiling needs a compiler that this machine has not.
    """
    model.checkpointing = cfg.checkpointing
    if cfg.compile:
        compilers = [os.environ.get(variable, default) for variable, default in (("CXX", "g++"), ("CC", "gcc"))]
        if cfg.compile_backend == "inductor" and not any(map(shutil.which, [*compilers, "clang++", "clang"])):
            raise InputError("compile needs a C++ compiler: install g++, or leave compile out")
        model.compile(backend=cfg.compile_backend, fullgraph=True, dynamic=False)
    return model


def wrap_model(model: nn.Module, device: torch.device, accum_iter: int, world_size: int) -> Any:
    """DistributedDataParallel where there are several processes, else the model itself."""
    if world_size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=accum_iter == 1,  # with no_sync it dies in the reducer (torch 2.14.1)
        broadcast_buffers=False,  # position tables never change
    )


def log_start(run: Run, plan: Plan, num_images: int, model: nn.Module, cfg: Any) -> None:
    """Says what is about to run."""
    dtype = autocast_dtype(cfg.precision, run.device)
    parameters = sum(p.numel() for p in model.parameters())
    logger.info(
        "%s: %d images, %.1f M parameters, %d processes on %s, %s",
        run.output_dir, num_images, parameters / 1e6, run.processes.world_size, run.device.type, dtype or "fp32",
    )  # fmt: skip
    logger.info(
        "total batch %d = %d x %d processes x %d accumulated; %d steps per epoch, %d in all; peak lr %.3g",
        plan.total_batch, cfg.batch_size, run.processes.world_size, plan.accum_iter, plan.steps_per_epoch,
        plan.stop_step, plan.peak_lr,
    )  # fmt: skip


def log_window(
    run: Run, plan: Plan, state: TrainState, stopwatch: Stopwatch, lr: float, num_bad: int, max_bad_steps: int
) -> None:
    """Writes the line of the steps since the last one. Raises: InputError after too many bad steps in a row."""
    means = state.window_meter.read()
    state.window_meter.reset()
    bad_in_a_row = int(means.pop("bad_in_a_row"))
    times = stopwatch.read(plan.total_batch, plan.stop_step - state.step)
    epoch = state.step / plan.steps_per_epoch
    facts = {"step": state.step, "epoch": epoch, **means, "lr": lr, **times, "bad_files": num_bad}
    line = (
        f"step {state.step}/{plan.total_steps}  epoch {epoch:.2f}  loss {means['loss']:.4f}  lr {lr:.2e}  "
        f"grad_norm {means['grad_norm']:.3f}  {times['images_per_s']:.0f} images/s  "
        f"data_wait {100 * times['data_wait']:.0f}%  eta {duration(times['eta_s'])}"
    )
    run.record(facts, line + (f"  bad_files {num_bad}" if num_bad else ""), to_terminal=False)
    if bad_in_a_row:
        logger.warning("%d steps in a row had a non-finite gradient and were skipped", bad_in_a_row)
    if bad_in_a_row >= max_bad_steps:
        raise InputError(
            f"{bad_in_a_row} steps in a row up to step {state.step} had a non-finite gradient: "
            f"lower lr, set clip_grad, or use precision bf16 or fp32; the last checkpoint is from before"
        )


def log_epoch(run: Run, plan: Plan, state: TrainState) -> None:
    """Writes the line of an epoch and begins the next one's mean."""
    means = state.epoch_meter.read()
    state.epoch_meter.reset()
    epoch = state.step // plan.steps_per_epoch
    state.epoch_losses.append(means["loss"])
    facts = {"step": state.step, "epoch": float(epoch), "epoch_loss": means["loss"]}
    run.record(facts, f"epoch {epoch} done  mean loss {means['loss']:.4f}", to_terminal=True)
