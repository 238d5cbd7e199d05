"""What a run's training consists of between two steps."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.amp import GradScaler

from engine.meters import StepMeter
from engine.parallel import own_part, shard_model_state, shard_optimizer_state
from engine.run.folder import Run
from util.dist import all_gather
from util.errors import InputError

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Exactly what a checkpoint restores: `step` counts finished optimiser steps of the whole run.

    owes_look: whether the evaluation or look after the epoch that ends here is still to come, as a
    signal cut it short.
    may_diverge: whether some tensors may hold values that are not finite, as of several probes one
    may diverge.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: GradScaler
    epoch_meter: StepMeter
    window_meter: StepMeter
    ema: ModelEmaV3 | None = None
    step: int = 0
    epoch_losses: list[float] = field(default_factory=list)
    owes_look: bool = False
    may_diverge: bool = False

    @classmethod
    def begin(
        cls,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        dtype: torch.dtype | None = None,
        ema: ModelEmaV3 | None = None,
    ) -> "TrainState":
        """The state before the first step; `dtype` is what the model's loss is autocast to."""
        scaler = GradScaler(device.type, enabled=dtype == torch.float16)
        return cls(model, optimizer, scaler, StepMeter(device), StepMeter(device), ema)

    def content(self) -> dict[str, Any]:
        """The state as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "epoch_meter": self.epoch_meter.state_dict(),
            "window_meter": self.window_meter.state_dict(),
            "epoch_losses": self.epoch_losses,
            "owes_look": self.owes_look,
        }

    def check(self) -> None:
        """Waits for the device. Raises: InputError on all processes alike where a parameter or
        moment is not finite."""
        if self.may_diverge:
            return
        groups = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
        }
        if self.ema is not None:
            groups["ema"] = self.ema.module.state_dict()
        for name, values in groups.items():
            tensors = [
                own_part(tensor) for tensor in _tensors(values) if tensor.is_floating_point()
            ]
            is_finite = not tensors or bool(
                torch.stack([tensor.isfinite().all().cpu() for tensor in tensors]).all()
            )
            if not all(
                all_gather(is_finite)
            ):  # of sharded tensors each process sees its parts only
                raise InputError(
                    f"the {name} state is not finite after step {self.step}, so it is not saved: "
                    f"lower lr, set clip_grad, or use precision bf16 or fp32; the last checkpoint is from before"
                )

    def resume(self, saved: dict[str, Any] | None, run: Run, stop_step: int) -> bool:
        """Takes over a checkpoint where there is one; whether the run is at its end already."""
        if saved is None:
            return False
        self.restore(saved)
        is_finished = self.step >= stop_step
        words = "%s is already finished at step %d" if is_finished else "resuming %s at step %d"
        logger.info(words, run.output_dir, self.step)
        return is_finished

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes over a checkpoint's content."""
        self.model.load_state_dict(shard_model_state(saved["model"], self.model), strict=True)
        if self.ema is not None:
            self.ema.module.load_state_dict(saved["ema"], strict=True)
        self.optimizer.load_state_dict(shard_optimizer_state(saved["optimizer"], self.optimizer))
        if saved[
            "scaler"
        ]:  # empty where the precision needs none, as after a move from fp16 to bf16 hardware
            self.scaler.load_state_dict(saved["scaler"])
        self.epoch_meter.load_state_dict(saved["epoch_meter"])
        self.window_meter.load_state_dict(saved["window_meter"])
        self.epoch_losses = list(saved["epoch_losses"])
        self.owes_look = saved.get(
            "owes_look", False
        )  # a checkpoint of an earlier version has none
        self.step = saved["step"]


def _tensors(values: Any) -> Iterator[Tensor]:
    """All tensors of nested dicts."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
