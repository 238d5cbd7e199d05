"""Heads that say the class of each pixel from the features of patches.

Shapes: `B` batch, `D` width, `C` classes, `h` and `w` rows and columns of patches.
"""

import torch
from torch import Tensor, nn


class LinearHead(nn.Module):
    """A linear layer on each patch: `(B, D, h, w)` -> `(B, C, h, w)`."""

    def __init__(self, embed_dim: int, num_classes: int):
        super().__init__()
        self.classify = nn.Conv2d(embed_dim, num_classes, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        """`(B, D, h, w)` -> `(B, C, h, w)`."""
        return self.classify(features)


def to_pixels(logits: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Logits `(B, C, h, w)` as those of each pixel, `(B, C, H, W)` float32, bilinear."""
    return nn.functional.interpolate(
        logits.float(), size=tuple(size), mode="bilinear", align_corners=False
    )
