"""Fixed 2-D sine-cosine position table (MAE, section 3 "Simple implementation"; layout of the
published weights), and tables for grids of another size.

Shapes: `N` patches, row-major over a grid of `H` rows and `W` columns; `D` width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def sincos_pos_embed(embed_dim: int, grid_size: tuple[int, int], class_tokens: int) -> Tensor:
    """The position table, `(1, N + class_tokens, D)` float32; the rows of class tokens come first
    and are zeros.

    The first D/2 channels encode the patch's column, the last D/2 its row. In each half the first
    D/4 channels are sines, the last D/4 cosines, of position * 10000^(-i / (D/4)).

    Source: sine-cosine encoding of arXiv 1706.03762, section 3.5, per axis.
    """
    quarter = embed_dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)  # (D/4,)
    sides = [torch.arange(side, dtype=torch.float64) for side in grid_size]
    rows, columns = torch.cartesian_prod(*sides).T  # (N,) each
    angles = [torch.outer(positions, frequencies) for positions in (columns, rows)]  # 2 x (N, D/4)
    table = torch.cat(
        [f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1
    )  # (N, D)
    zeros = torch.zeros(class_tokens, embed_dim, dtype=torch.float64)
    return torch.cat([zeros, table]).float().unsqueeze(0)  # (1, N + class_tokens, D)


def resize_pos_embed(
    pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], class_tokens: int
) -> Tensor:
    """Position table `(1, N + class_tokens, D)` for another grid, float32: bicubic; the rows of
    class tokens stay as they are."""
    table = pos_embed.float()
    class_rows, patches = table[:, :class_tokens], table[:, class_tokens:]
    planes = patches.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)  # (1, D, H, W)
    planes = F.interpolate(
        planes, size=new_grid, mode="bicubic", align_corners=False, antialias=False
    )
    rows = planes.flatten(2).transpose(1, 2)  # (1, N, D)
    return torch.cat([class_rows, rows], dim=1)  # (1, N + class_tokens, D)
