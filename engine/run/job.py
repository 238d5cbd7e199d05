"""A training job: what the stages share between reading their settings and training.

A job begins a run or goes on with the one in its folder, if its settings, images and weights are
those of that run. Its state is all that a checkpoint restores.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from data.sources import ImageSource
from engine.meters import StepMeter
from engine.optim import build_ema
from engine.parallel import place_model, spread_optimizer_state, spread_tensors
from engine.run.checkpoint import Checkpoint, RunIdentity, checkpoint_seen, load_newest_checkpoint
from engine.run.folder import Run, TrainConfig, take_over_folder
from engine.run.records import Kind
from engine.schedule import Plan, choose_accum_iter, plan_run
from models.spec import ModelSpec, spec_from_dict
from util.dist import all_gather, autocast_dtype, broadcast, from_main
from util.errors import InputError
from util.settings.evaluation import FinetuneConfig, LinclsConfig
from util.settings.pretrain import PretrainConfig
from util.settings.read import changed_settings, differences

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TrainState:
    """Exactly what a checkpoint restores: `step` counts finished optimiser steps of the whole run.

    epoch_end_pending: whether the evaluation after the epoch that ends here is still to come.
    may_diverge: whether some tensors may hold values that are not finite, as one of several probes
        may diverge.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch_meter: StepMeter
    window_meter: StepMeter
    ema: "ModelEmaV3 | None" = None
    may_diverge: bool = False
    step: int = 0
    epoch_losses: list[float] = field(default_factory=list)
    epoch_end_pending: bool = False

    def checkpoint(self, identity: RunIdentity, total_batch: int) -> Checkpoint:
        """This state as it is, sharing its tensors; `total_batch` is in images per step."""
        return Checkpoint(
            **vars(identity),
            step=self.step,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            ema=None if self.ema is None else self.ema.module.state_dict(),
            epoch_meter=self.epoch_meter.state_dict(),
            window_meter=self.window_meter.state_dict(),
            epoch_losses=self.epoch_losses,
            epoch_end_pending=self.epoch_end_pending,
            total_batch=total_batch,
            samples_seen=self.step * total_batch,
        )

    def restore(self, saved: Checkpoint) -> None:
        """Takes over a checkpoint's state, but for the model's tensors, which `place_model` takes.

        All processes must call; the main one's checkpoint has the values.
        """
        if self.ema is not None and saved.ema is not None:
            spread_tensors(saved.ema, self.ema.module.state_dict())
        spread_optimizer_state(saved.optimizer, self.optimizer)
        if saved.scaler:  # empty if its precision needed none: then fp16 starts with a fresh scale
            self.scaler.load_state_dict(saved.scaler)
        spread_tensors(saved.epoch_meter, self.epoch_meter.state_dict())
        spread_tensors(saved.window_meter, self.window_meter.state_dict())
        self.epoch_losses = list(saved.epoch_losses)
        self.epoch_end_pending = saved.epoch_end_pending
        self.step = saved.step


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
    build: Callable[[], torch.nn.Module],
    build_optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer],
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
        build: returns the part that learns, on the CPU. The main process's values count; where
            none are needed, torch's default device is `meta` while it is called.
        build_optimizer: returns the optimiser of that part, which is on its device by then.
        result: the file that a finished run leaves last.
        weights: sha256 of the file that `finetune` or `init` names; pretraining that goes on keeps
            the one in its checkpoint.
        may_diverge: see `TrainState`.
        scale_loss: whether fp16 scales the loss against underflow of the gradient.

    Raises: InputError, before the folder is touched, if the data set is too small or the folder
    holds a run with other settings.
    """
    saved = from_main(partial(load_newest_checkpoint, run.output_dir))
    if saved is not None and isinstance(cfg, PretrainConfig):
        weights = saved.weights
    identity = RunIdentity(
        config=cfg.model_dump(mode="json"),
        model_args=spec.as_dict(),
        mean=list(cfg.mean),
        std=list(cfg.std),
        data={"num_images": len(source), "fingerprint": source.fingerprint()},
        weights=weights,
    )
    check_resumable(run.output_dir, cfg, saved, identity)
    world_size = run.processes.world_size
    # a fit by lbfgs takes all images at once, whatever the batch
    is_fit = isinstance(cfg, LinclsConfig) and cfg.optimizer == "lbfgs"
    accum_iter = choose_accum_iter(cfg, world_size, None if is_fit else saved)
    plan = plan_run(cfg, len(source), world_size, accum_iter)
    step = 0 if saved is None else saved.step
    is_finished = step >= plan.stop_step and broadcast(result.exists())
    if step > plan.stop_step and not is_finished:
        raise InputError(
            f"stop_epoch: the run is at step {step} already, past step {plan.stop_step}",
            settings=("stop_epoch",),
        )

    needs_values = saved is None and run.processes.is_main
    with nullcontext() if needs_values else torch.device("meta"):
        model = build()
    place_model(model, model.state_dict() if saved is None else saved.model, cfg, run.processes)
    dtype = autocast_dtype(cfg.precision, run.device)
    state = TrainState(
        model=model,
        optimizer=build_optimizer(model),
        scaler=torch.amp.GradScaler(run.device.type, enabled=scale_loss and dtype == torch.float16),
        epoch_meter=StepMeter(run.device),
        window_meter=StepMeter(run.device),
        ema=build_ema(model, cfg.ema_decay) if isinstance(cfg, FinetuneConfig) else None,
        may_diverge=may_diverge,
    )
    if saved is not None:
        state.restore(saved)
        logger.info(
            "%s is already finished at step %d" if is_finished else "resuming %s at step %d",
            run.output_dir,
            step,
        )
    if not is_finished:
        if run.processes.is_main:
            pending: set[Kind] = {"val", "monitor"} if state.epoch_end_pending else set()
            if step == plan.stop_step:
                pending.add("val")
            take_over_folder(run.output_dir, cfg, step, pending)
        run.records.open(cfg, step, plan.stop_step)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        logger.info(
            f"{run.output_dir}: {len(source)} images, {num_parameters / 1e6:.1f} M parameters, "
            f"{run.device.type}, {dtype or 'fp32'}; total batch {plan.total_batch} = "
            f"{cfg.batch_size} x {world_size} processes x {plan.accum_iter} accumulated; "
            f"{plan.steps_per_epoch} steps per epoch, {plan.stop_step} in all; "
            f"peak lr {plan.peak_lr:.3g}"
        )
    return Job(run, cfg, identity, plan, state, len(source), is_finished)


def check_resumable(
    folder: Path, cfg: TrainConfig, saved: Checkpoint | None, identity: RunIdentity
) -> None:
    """Refuses to go on with a run under settings, images or weights that change its result. All
    processes must call.

    Raises: InputError that lists every difference as `name: old -> new`, or says in what the
    processes differ from each other.
    """
    problems = (
        "newest checkpoints: output_dir must be a shared folder",
        "images: data_path must hold the same ones",
    )
    checkpoint = checkpoint_seen(folder, None if saved is None else saved.step)
    seen = all_gather((checkpoint, identity.data))
    for problem, found in zip(problems, zip(*seen, strict=True), strict=True):
        if any(of_one != found[0] for of_one in found):
            raise InputError(f"the processes see different {problem}. They see {[*found]}")
    if saved is not None:
        old = {"images": saved.data, "finetune": f"weights of sha256 {saved.weights}"}
        new = {"images": identity.data, "finetune": f"weights of sha256 {identity.weights}"}
        # an older checkpoint lacks fields, which had their defaults
        theirs = spec_from_dict(saved.model_args).as_dict()
        changes = differences(old | theirs, new | identity.model_args)
        changes += changed_settings(saved.config, cfg, skip={"size", *identity.model_args})
        if changes:
            raise InputError(
                f"{folder} holds a run with other settings (old -> new):\n  "
                + "\n  ".join(changes)
                + "\nPut them back, or start a new run with another --output_dir.",
                settings=tuple(change.split(":")[0] for change in changes),
            )
