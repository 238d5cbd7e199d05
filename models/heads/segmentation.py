"""Heads that say the class of each pixel from the features of patches.

Shapes: `B` batch, `D` width, `C` classes, `h` and `w` rows and columns of patches.
"""

import torch
from torch import Tensor, nn

from models.heads.pyramid import ChannelNorm, Pyramid, top_down


class LinearHead(nn.Module):
    """A linear layer on each patch: `(B, D, h, w)` -> `(B, C, h, w)`."""

    def __init__(self, embed_dim: int, num_classes: int):
        super().__init__()
        self.classify = nn.Conv2d(embed_dim, num_classes, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        """`(B, D, h, w)` -> `(B, C, h, w)`."""
        return self.classify(features)


class FpnHead(nn.Module):
    """A pyramid whose maps are summed from the top down (arXiv 1612.03144, without its lateral
    layers), a convolution and a linear layer: `(B, D, h, w)` -> `(B, C, 4h, 4w)`."""

    def __init__(self, embed_dim: int, num_classes: int, width: int):
        super().__init__()
        self.pyramid = Pyramid(embed_dim, width)
        self.mix = nn.Sequential(
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
            ChannelNorm(width),
            nn.GELU(),
        )
        self.classify = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        """`(B, D, h, w)` -> `(B, C, 4h, 4w)`."""
        return self.classify(self.mix(top_down(self.pyramid(features))))


def to_pixels(logits: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Logits `(B, C, h, w)` as those of each pixel, `(B, C, H, W)` float32, bilinear."""
    return nn.functional.interpolate(
        logits.float(), size=tuple(size), mode="bilinear", align_corners=False
    )
