"""Moving average of a model's weights, by timm's ModelEmaV3, that a skipped step leaves alone."""

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn


def build_ema(model: nn.Module, decay: float | None) -> ModelEmaV3 | None:
    """The average of `model`, or None where `decay` is None."""
    return (
        None if decay is None else ModelEmaV3(model, decay=decay, foreach=False)
    )  # see update_ema


@torch.no_grad()
def update_ema(ema: ModelEmaV3, model: nn.Module, found_inf: Tensor) -> None:
    """ema = decay * ema + (1 - decay) * model, or nothing where `found_inf` (scalar, on the device)
    is 1.

    The decay is a tensor, so that the decision never waits for the device; timm's foreach path
    takes numbers only.
    """
    ema.apply_update_(model, decay=torch.where(found_inf > 0, 1.0, ema.decay))  # type: ignore[arg-type]
