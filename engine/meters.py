"""Running sums that stay on the device until they are read, so that a step which does not log never
waits for it."""

import torch
from torch import Tensor, nn
from torch import distributed as dist


class StepMeter(nn.Module):
    """Sums of loss and gradient norm over optimiser steps.

    A step whose loss or gradient is not finite is left out of the means. `bad_in_a_row` counts the
    steps with such a gradient since the last good one, and `most_bad_in_a_row` is its maximum since
    the sums were read. The sums are 64-bit on devices that have it, so that the printed digits of
    an epoch's mean are exact.
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
        """Adds a step, all scalars: the mean loss of this process's share of the batch, the norm of
        the full gradient, and 1.0 if that is not finite."""
        good = (1 - found_inf.to(self.sums.dtype)) * loss.isfinite()
        values = torch.stack(
            [loss.to(self.sums.dtype), grad_norm.to(self.sums.dtype), torch.ones_like(self.sums[0])]
        )
        self.sums += torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0) * good
        self.bad_in_a_row = (self.bad_in_a_row + 1) * found_inf
        self.most_bad_in_a_row = torch.maximum(self.most_bad_in_a_row, self.bad_in_a_row)

    def read(self) -> tuple[float, float, int]:
        """Means over all processes of loss and gradient norm, NaN if no step counted, and
        `most_bad_in_a_row`; all three begin anew, and `bad_in_a_row` goes on."""
        self.average()
        loss, grad_norm, _ = (self.sums / self.sums[2]).tolist()
        most_bad_in_a_row = int(self.most_bad_in_a_row.item())
        self.sums.zero_()
        self.most_bad_in_a_row.zero_()
        return loss, grad_norm, most_bad_in_a_row

    def average(self) -> None:
        """Gives every process the mean of all processes' sums, so that a checkpoint of one process
        stands for all."""
        if dist.is_initialized():
            dist.all_reduce(self.sums)
            self.sums /= dist.get_world_size()
