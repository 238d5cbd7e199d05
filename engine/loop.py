"""The training loop: one flat pass over the optimiser steps that are left, the same for every
number of processes.

It yields at the end of each epoch, so that an entry script can evaluate between two epochs without
being called back.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.ema import update_ema
from engine.meters import Stopwatch
from engine.optim import StepFn, set_lr
from engine.parallel import asks_for_shards, blocks_of, is_sharded, to_device
from engine.prefetch import on_device
from engine.run.batches import Batches
from engine.run.faults import BadSamples, BadSteps
from engine.run.folder import Run, duration
from engine.run.saving import Saver
from engine.run.state import TrainState
from engine.schedule import Plan
from util.dist import autocast_dtype
from util.errors import InputError

SLOW_LOADING = 0.1  # share of the time
logger = logging.getLogger(__name__)
LossFn = Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]]


def train(
    run: Run,
    cfg: Any,
    plan: Plan,
    state: TrainState,
    batches: Batches,
    loss_fn: LossFn,
    step_fn: StepFn,
    saver: Saver,
    bad_samples: BadSamples,
) -> Iterator[int]:
    """Trains from `state.step` to `plan.stop_step`; yields the number of finished epochs after
    each.

    Args:
        batches: this process's micro-batches from `state.step` on, `plan.accum_iter` per step.
        loss_fn: (model, batch) -> (scalar loss, {} or {"loss": what to log in its place}).
        step_fn: (optimizer, scaler) -> what `optimizer_step` returns; takes the step, or skips it.
    """
    dtype = autocast_dtype(cfg.precision, run.device)
    model = wrap_model(state.model, run.device, plan.accum_iter, run.processes.world_size)
    model.train()
    stopwatch = Stopwatch()
    bad_steps = BadSteps(
        run.output_dir / "bad_steps.jsonl",
        cfg.max_bad_steps,
        cfg.log_interval,
        run.processes.is_main,
        batches.sampler,
    )
    iterator = on_device(batches, run.device)
    while True:
        if state.owes_look:
            # an evaluation forks loader processes, which is not safe while another thread writes
            saver.wait()
            yield state.step // plan.steps_per_epoch
            state.owes_look = False
            if saver.due(state.step // plan.steps_per_epoch):
                saver.save()
            stopwatch.open_window()  # an evaluation and a save are not training
        if state.step == plan.stop_step:
            return
        saver.check()
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
        bad_steps.add(state.step, lr, loss_sum, found_inf)
        stopwatch.step(waited)
        run.advance()

        ends_epoch = state.step % plan.steps_per_epoch == 0
        if state.step % cfg.log_interval == 0 or ends_epoch:
            bad_steps.check(log_window(run, plan, state, stopwatch, lr, bad_samples.exchange()))
            if not ends_epoch and saver.due(None):
                saver.save()
        if ends_epoch:
            log_epoch(run, plan, state)
            state.owes_look = True


def prepare_model(model: Any, cfg: Any, run: Run) -> Any:
    """Does what `checkpointing`, `compile` and `parallel` ask for, in place, and moves the model
    onto its device.

    Its state stays under the same names. Raises: InputError where compiling needs a compiler that
    this machine has not.
    """
    model.checkpointing = cfg.checkpointing
    if cfg.compile:
        compilers = [
            os.environ.get(variable, default)
            for variable, default in (("CXX", "g++"), ("CC", "gcc"))
        ]
        if cfg.compile_backend == "inductor" and not any(
            map(shutil.which, [*compilers, "clang++", "clang"])
        ):
            raise InputError("compile needs a C++ compiler: install g++, or leave compile out")
        for part in (
            blocks_of(model) if asks_for_shards(cfg, run) else [model]
        ):  # no graph can span a gathering
            part.compile(backend=cfg.compile_backend, fullgraph=True, dynamic=False)
    to_device(model, cfg, run)
    return model


def wrap_model(model: nn.Module, device: torch.device, accum_iter: int, world_size: int) -> Any:
    """DistributedDataParallel where there are several processes, else the model itself.

    Also a sharded one, which averages its gradient after each micro-batch: to keep it whole for the
    last, as `no_sync` does, would take the memory that sharding saves.
    """
    if world_size == 1 or is_sharded(model):
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=accum_iter == 1,  # with no_sync it dies in the reducer (torch 2.14.1)
        forward_sync_buffers=False,  # position tables never change
    )


def log_start(run: Run, plan: Plan, num_images: int, model: nn.Module, cfg: Any) -> None:
    """Says what is about to run."""
    dtype = autocast_dtype(cfg.precision, run.device)
    parameters = sum(p.numel() for p in model.parameters())
    logger.info(
        "%s: %d images, %.1f M parameters, %d processes on %s, %s",
        run.output_dir,
        num_images,
        parameters / 1e6,
        run.processes.world_size,
        run.device.type,
        dtype or "fp32",
    )
    logger.info(
        "total batch %d = %d x %d processes x %d accumulated; %d steps per epoch, %d in all; peak lr %.3g",
        plan.total_batch,
        cfg.batch_size,
        run.processes.world_size,
        plan.accum_iter,
        plan.steps_per_epoch,
        plan.stop_step,
        plan.peak_lr,
    )


def log_window(
    run: Run, plan: Plan, state: TrainState, stopwatch: Stopwatch, lr: float, num_bad: int
) -> int:
    """Writes the line of the steps since the last one; returns how many in a row were skipped, at
    most."""
    means = state.window_meter.read()
    state.window_meter.reset()
    bad_in_a_row = int(means.pop("most_bad_in_a_row"))
    times = stopwatch.read(plan.total_batch, plan.stop_step - state.step)
    epoch = state.step / plan.steps_per_epoch
    facts = {"step": state.step, "epoch": epoch, **means, "lr": lr, **times, "bad_files": num_bad}
    line = (
        f"step {state.step}/{plan.total_steps}  epoch {epoch:.2f}  loss {means['loss']:.4f}  lr {lr:.2e}  "
        f"grad_norm {means['grad_norm']:.3f}  {times['images_per_s']:.0f} images/s  "
        f"data_wait {100 * times['data_wait']:.0f}%  eta {duration(times['eta_s'])}"
    )
    run.record(facts, line + (f"  bad_files {num_bad}" if num_bad else ""), to_terminal=False)
    stopwatch.slow_windows += times["data_wait"] > SLOW_LOADING
    if (
        stopwatch.slow_windows == 2 and times["data_wait"] > SLOW_LOADING
    ):  # loaders start in the first
        logger.warning(
            "%.0f %% of the time since the last line went into waiting for images: loading is the "
            "bottleneck. Raise num_workers, or pack the images with tools/pack_dataset.py",
            100 * times["data_wait"],
        )
    if bad_in_a_row:
        logger.warning("%d steps in a row had a non-finite gradient and were skipped", bad_in_a_row)
    return bad_in_a_row


def log_epoch(run: Run, plan: Plan, state: TrainState) -> None:
    """Writes the line of an epoch and begins the next one's mean."""
    means = state.epoch_meter.read()
    state.epoch_meter.reset()
    epoch = state.step // plan.steps_per_epoch
    state.epoch_losses.append(means["loss"])
    facts = {"step": state.step, "epoch": float(epoch), "epoch_loss": means["loss"]}
    run.record(facts, f"epoch {epoch} done  mean loss {means['loss']:.4f}", to_terminal=True)
