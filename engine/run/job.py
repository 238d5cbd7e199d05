"""A training job: everything that the stages share between reading their settings and training."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.amp import GradScaler

from data.sources import ImageSource
from engine.meters import StepMeter
from engine.optim import build_ema
from engine.parallel import place_model
from engine.run.checkpoint import RunIdentity, load_newest_checkpoint
from engine.run.folder import Run, TrainConfig, take_over_folder
from engine.run.records import Kind
from engine.run.resume import check_resumable, run_identity
from engine.run.state import TrainState
from engine.schedule import Plan, choose_accum_iter, plan_run
from models.spec import ModelSpec
from util.dist import autocast_dtype, broadcast
from util.errors import InputError
from util.settings.evaluation import FinetuneConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One training job: where it runs, what it was asked, what it plans and where it is.

    num_images: of the training set.
    is_finished: whether an earlier command has trained to the plan's end and left its result;
        then nothing in the folder has been touched, and there is nothing to do.
    """

    run: Run
    cfg: TrainConfig
    identity: RunIdentity
    plan: Plan
    state: TrainState
    num_images: int
    is_finished: bool

    @property
    def epochs_done(self) -> int:
        return self.state.step // self.plan.steps_per_epoch


def begin(
    run: Run,
    cfg: TrainConfig,
    source: ImageSource,
    spec: ModelSpec,
    build: Callable[[], nn.Module],
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    result: Path,
    *,
    weights: str | None = None,
    may_diverge: bool = False,
    scale_loss: bool = True,
) -> Job:
    """Begins a run, or goes on with the one in its folder. All processes must call.

    Args:
        source: the training images.
        spec: what the model is, of which only a part may learn.
        build: returns the part that learns, on the CPU, the same on all processes.
        build_optimizer: returns the optimiser of that part, which is on its device by then.
        result: the file that a finished run leaves last.
        weights: sha256 of the file that `finetune` names.
        may_diverge: see `TrainState`.
        scale_loss: whether fp16 scales the loss against underflow of the gradient.

    Raises: InputError, before the folder is touched, if the data set is too small or the folder
    holds a run with other settings.
    """
    saved = load_newest_checkpoint(run.output_dir)
    identity = run_identity(cfg, spec, source, weights)
    check_resumable(cfg, saved, identity)
    world_size = run.processes.world_size
    accum_iter = choose_accum_iter(cfg, world_size, saved)
    plan = plan_run(cfg, len(source), world_size, accum_iter)

    if saved is not None and saved.step > plan.stop_step and not broadcast(result.exists()):
        raise InputError(
            f"stop_epoch: the run is at step {saved.step} already, past step {plan.stop_step}",
            settings=("stop_epoch",),
        )

    model = build()
    place_model(model, cfg, run.processes)
    is_fp16 = autocast_dtype(cfg.precision, run.device) == torch.float16
    state = TrainState(
        model=model,
        optimizer=build_optimizer(model),
        scaler=GradScaler(run.device.type, enabled=scale_loss and is_fp16),
        epoch_meter=StepMeter(run.device),
        window_meter=StepMeter(run.device),
        ema=build_ema(model, cfg.ema_decay) if isinstance(cfg, FinetuneConfig) else None,
        may_diverge=may_diverge,
    )
    if saved is not None:
        state.restore(saved)
        is_at_end = state.step >= plan.stop_step
        words = "%s is already finished at step %d" if is_at_end else "resuming %s at step %d"
        logger.info(words, run.output_dir, state.step)
        if is_at_end and broadcast(result.exists()):
            return Job(run, cfg, identity, plan, state, len(source), is_finished=True)

    if run.processes.is_main:
        pending: set[Kind] = set()
        if state.epoch_end_pending:
            pending = {"val", "monitor"}
        elif state.step == plan.stop_step:
            pending = {"val"}
        take_over_folder(run.output_dir, cfg, state.step, pending)
    run.records.open(cfg, state.step, plan.stop_step)
    job = Job(run, cfg, identity, plan, state, len(source), is_finished=False)
    _log_start(job)
    return job


def _log_start(job: Job) -> None:
    """Says what is about to run."""
    run, cfg, plan = job.run, job.cfg, job.plan
    logger.info(
        "%s: %d images, %.1f M parameters, %d processes on %s, %s",
        run.output_dir,
        job.num_images,
        sum(parameter.numel() for parameter in job.state.model.parameters()) / 1e6,
        run.processes.world_size,
        run.device.type,
        autocast_dtype(cfg.precision, run.device) or "fp32",
    )
    logger.info(
        "total batch %d = %d x %d processes x %d accumulated; %d steps per epoch, %d in all; "
        "peak lr %.3g",
        plan.total_batch,
        cfg.batch_size,
        run.processes.world_size,
        plan.accum_iter,
        plan.steps_per_epoch,
        plan.stop_step,
        plan.peak_lr,
    )
