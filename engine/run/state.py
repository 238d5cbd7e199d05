"""What a run's training consists of between two steps, its way into a checkpoint and back."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.amp import GradScaler

from engine.meters import StepMeter
from engine.parallel import full_tensor, own_part, shard_model_state, shard_optimizer_state
from engine.run.checkpoint import Checkpoint, RunIdentity
from util.dist import all_gather
from util.errors import InputError


@dataclass(kw_only=True)
class TrainState:
    """Exactly what a checkpoint restores: `step` counts finished optimiser steps of the whole run.

    epoch_end_pending: whether the evaluation after the epoch that ends here is still to come.
    may_diverge: whether some tensors may hold values that are not finite, as one of several probes
        may diverge.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: GradScaler
    epoch_meter: StepMeter
    window_meter: StepMeter
    ema: ModelEmaV3 | None = None
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
        """Takes over a checkpoint's state."""
        self.model.load_state_dict(shard_model_state(saved.model, self.model), strict=True)
        if self.ema is not None:
            self.ema.module.load_state_dict(saved.ema, strict=True)
        self.optimizer.load_state_dict(shard_optimizer_state(saved.optimizer, self.optimizer))
        if saved.scaler:  # empty if its precision needed none: then fp16 starts with a fresh scale
            self.scaler.load_state_dict(saved.scaler)
        self.epoch_meter.load_state_dict(saved.epoch_meter)
        self.window_meter.load_state_dict(saved.window_meter)
        self.epoch_losses = list(saved.epoch_losses)
        self.epoch_end_pending = saved.epoch_end_pending
        self.step = saved.step


def check_finite(saved: Checkpoint) -> None:
    """Waits for the device.

    Raises: InputError on all processes alike if a parameter, a moment or an average is not finite.
    """
    for name, values in (
        ("model", saved.model),
        ("optimizer", saved.optimizer["state"]),
        ("ema", saved.ema),
    ):
        tensors = [own_part(tensor) for tensor in _tensors(values) if tensor.is_floating_point()]
        is_finite = not tensors or bool(
            torch.stack([tensor.isfinite().all().cpu() for tensor in tensors]).all()
        )
        if not all(all_gather(is_finite)):  # a process sees only its part of a sharded tensor
            raise InputError(
                f"the {name} state is not finite after step {saved.step}, so it is not saved: "
                f"lower lr, set clip_grad, or use precision bf16 or fp32; the last checkpoint is "
                f"from before"
            )


def on_host(value: Any, keep: bool = True) -> Any:
    """A copy of nested plain values and tensors, with unsharded tensors in the host's memory.

    All processes must call if some tensors are sharded. Those without `keep` only help, and get
    None in place of tensors.
    """
    if isinstance(value, Tensor):
        tensor = full_tensor(value.detach())
        return tensor.to("cpu", copy=True) if keep else None
    if isinstance(value, dict):
        return {name: on_host(entry, keep) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_host(entry, keep) for entry in value)
    return value


def _tensors(values: Any) -> Iterator[Tensor]:
    """All tensors of nested dicts."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
