"""Running sums that stay on the device until they are read, so that a step which does not log never
waits for it."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist


class StepMeter(nn.Module):
    """Sums of loss and gradient norm over optimiser steps.

    A step whose loss or gradient is not finite is left out of the means. `bad_in_a_row` counts the
    steps with such a gradient since the last good one, `most_bad_in_a_row` is the highest that it
    has been since the sums were emptied. The sums are 64-bit where the device has that, so an
    epoch's mean is exact to print.
    """

    sums: Tensor  # (3,): loss, gradient norm, steps counted
    bad_in_a_row: Tensor  # scalar
    most_bad_in_a_row: Tensor  # scalar

    def __init__(self, device: torch.device):
        super().__init__()
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.register_buffer("sums", torch.zeros(3, dtype=dtype, device=device))
        self.register_buffer("bad_in_a_row", torch.zeros((), dtype=dtype, device=device))
        self.register_buffer("most_bad_in_a_row", torch.zeros((), dtype=dtype, device=device))

    def update(self, loss: Tensor, grad_norm: Tensor, found_inf: Tensor) -> None:
        """Adds a step: mean loss of this process's share, norm of the whole gradient, 1.0 where
        that is not finite."""
        good = (1 - found_inf.to(self.sums.dtype)) * loss.isfinite()
        values = torch.stack(
            [loss.to(self.sums.dtype), grad_norm.to(self.sums.dtype), torch.ones_like(self.sums[0])]
        )
        self.sums += torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0) * good
        self.bad_in_a_row = (self.bad_in_a_row + 1) * found_inf
        self.most_bad_in_a_row = torch.maximum(self.most_bad_in_a_row, self.bad_in_a_row)

    def read(self) -> dict[str, float]:
        """Means over all processes, as `loss` and `grad_norm` (NaN where no step counted), and
        `most_bad_in_a_row`."""
        sums = self.sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
        loss, grad_norm, steps = sums.tolist()
        means = (loss / steps, grad_norm / steps) if steps else (float("nan"),) * 2
        return {
            "loss": means[0],
            "grad_norm": means[1],
            "most_bad_in_a_row": self.most_bad_in_a_row.item(),
        }

    def average(self) -> None:
        """Gives every process the mean of all sums, so that one process's state stands for all in a
        checkpoint."""
        if dist.is_initialized():
            dist.all_reduce(self.sums)
            self.sums /= dist.get_world_size()

    def reset(self) -> None:
        """Empties the means and `most_bad_in_a_row`; `bad_in_a_row` goes on."""
        self.sums.zero_()
        self.most_bad_in_a_row.zero_()

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Takes over a checkpoint's content; one of an earlier version has no
        `most_bad_in_a_row`."""
        return super().load_state_dict(
            {"most_bad_in_a_row": state_dict["bad_in_a_row"], **state_dict}, strict, assign
        )


class Stopwatch:
    """Throughput and data wait between two log lines, and the time left."""

    def __init__(self) -> None:
        self.run_start = self.window_start = time.monotonic()
        self.run_steps = self.window_steps = 0
        self.slow_windows = 0  # those that waited long for their data
        self.waited = 0.0

    def step(self, waited: float) -> None:
        """Counts an optimiser step that waited so many seconds for its data.

        The host's seconds: on CUDA the device may have had work for part of them, so its own wait
        is at most that.
        """
        self.run_steps += 1
        self.window_steps += 1
        self.waited += waited

    def read(self, total_batch: int, steps_left: int) -> dict[str, Any]:
        """Images per second over all processes, share of time waiting for data, seconds left; opens
        a new window."""
        now = time.monotonic()
        elapsed = max(now - self.window_start, 1e-9)
        facts = {
            "images_per_s": self.window_steps * total_batch / elapsed,
            "data_wait": self.waited / elapsed,
            "eta_s": (now - self.run_start) / max(self.run_steps, 1) * steps_left,
        }
        self.open_window()
        return facts

    def open_window(self) -> None:
        """Begins the next window now."""
        self.window_start, self.window_steps, self.waited = time.monotonic(), 0, 0.0
