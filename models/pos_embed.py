"""Fixed 2-D sine-cosine position table (MAE, section 3 "Simple implementation"; layout of the
published weights).

Shapes: `N` patches, row-major over a grid of `H` rows and `W` columns; `D` width.
"""

import torch
from torch import Tensor


def sincos_pos_embed(embed_dim: int, grid_size: tuple[int, int], class_token: bool) -> Tensor:
    """The position table, `(1, N + class_token, D)` float32; a class token's row comes first and is
    zeros.

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
    if class_token:
        table = torch.cat([torch.zeros(1, embed_dim, dtype=torch.float64), table])  # (1 + N, D)
    return table.float().unsqueeze(0)  # (1, N + class_token, D)
