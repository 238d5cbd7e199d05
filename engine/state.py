"""What a run's training consists of between two steps, and when it is saved."""

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.amp import GradScaler

from engine.checkpoint import save_checkpoint
from engine.run import Run
from util.dist import broadcast
from util.metrics import StepMeter
from util.schema import TrainRunConfig

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Exactly what a checkpoint restores: `step` counts finished optimiser steps of the whole run."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: GradScaler
    epoch_meter: StepMeter
    window_meter: StepMeter
    ema: ModelEmaV3 | None = None
    step: int = 0
    epoch_losses: list[float] = field(default_factory=list)

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
        }

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
        self.model.load_state_dict(saved["model"], strict=True)
        if self.ema is not None:
            self.ema.module.load_state_dict(saved["ema"], strict=True)
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # empty where the precision needs none, as after a move from fp16 to bf16 hardware
            self.scaler.load_state_dict(saved["scaler"])
        self.epoch_meter.load_state_dict(saved["epoch_meter"])
        self.window_meter.load_state_dict(saved["window_meter"])
        self.epoch_losses = list(saved["epoch_losses"])
        self.step = saved["step"]


@dataclass
class Saver:
    """When to save and what goes beside the state: `facts` are the checkpoint's constant entries."""

    run: Run
    cfg: TrainRunConfig
    facts: dict[str, Any]
    last_time: float = field(default_factory=time.monotonic)
    last_step: int = -1

    def due(self, epochs_done: int | None) -> bool:
        """Whether a save is due, after `epochs_done` epochs or (None) within one; processes must ask together."""
        if epochs_done is not None and self.cfg.save_epochs and epochs_done % self.cfg.save_epochs == 0:
            return True
        minutes = (time.monotonic() - self.last_time) / 60
        return bool(broadcast(self.cfg.save_minutes > 0 and minutes >= self.cfg.save_minutes))

    def save(self, state: TrainState, total_batch: int) -> None:
        """Writes a checkpoint of this step unless there is one."""
        if state.step == self.last_step:
            return
        state.epoch_meter.average()
        state.window_meter.average()
        content = {
            **state.content(),
            **self.facts,
            "total_batch": total_batch,
            "samples_seen": state.step * total_batch,
        }
        if self.run.processes.is_main:
            path = save_checkpoint(self.run.output_dir, state.step, content, self.cfg.keep_last)
            logger.info("saved %s", path)
        self.last_time, self.last_step = time.monotonic(), state.step
