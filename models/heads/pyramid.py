"""The simple feature pyramid of ViTDet (arXiv 2203.16527, section 3): maps of four scales, made of
the last map of a plain ViT alone.

Shapes: `B` batch, `D` width of the encoder, `E` width of the pyramid, `h` and `w` rows and columns
of patches.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import LAYER_NORM_EPS


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each place of a map."""

    def __init__(self, width: int):
        super().__init__(width, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, E, h, w)` -> `(B, E, h, w)`."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, E, h, w)


class Pyramid(nn.Module):
    """Maps with steps of a quarter, a half, one and two patches: `(B, D, h, w)` -> four of `(B, E,
    ., .)`, the finest first.

    A grid of an odd number of rows or columns is rounded up where it is halved, so that the map
    covers it.
    """

    def __init__(self, embed_dim: int, width: int):
        super().__init__()
        half, quarter = embed_dim // 2, embed_dim // 4
        self.finest = nn.Sequential(
            _doubled(embed_dim, half), ChannelNorm(half), nn.GELU(), _doubled(half, quarter)
        )
        self.finer = _doubled(embed_dim, half)
        self.coarser = nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True)
        self.outputs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, width, kernel_size=1, bias=False),
                ChannelNorm(width),
                nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
                ChannelNorm(width),
            )
            for channels in (quarter, half, embed_dim, embed_dim)
        )

    def forward(self, features: Tensor) -> list[Tensor]:
        """`(B, D, h, w)` -> `(B, E, 4h, 4w)`, `(B, E, 2h, 2w)`, `(B, E, h, w)`, `(B, E, h/2,
        w/2)`."""
        maps = (self.finest(features), self.finer(features), features, self.coarser(features))
        return [output(x) for output, x in zip(self.outputs, maps, strict=True)]


def top_down(maps: list[Tensor]) -> Tensor:
    """Each coarser map, upsampled, is added to the next finer one: `(B, E, 4h, 4w)` of the
    pyramid's four."""
    total = maps[-1]
    for finer in reversed(maps[:-1]):
        total = finer + F.interpolate(total, size=finer.shape[-2:], mode="nearest")
    return total


def _doubled(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    """A convolution that doubles rows and columns."""
    return nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)
