"""Masks: which patches an image keeps and which are removed, in training and in pictures.

A mask is an order of the patches, a permutation whose first K are kept; K follows from `mask_ratio`
by `models.spec.num_kept`. Training draws the order of each sample with `training_order`, which
`main_pretrain.py` hands to the data set; to train with other masks, change that function. Pictures
choose among the masks of arXiv 2111.06377, figure 6: random, large blocks, a regular grid.

Shapes: `N` patches, `K` kept patches.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.spec import mask_problems, num_kept
from util.errors import InputError

# Of arXiv 2106.08254, algorithm 1: the smallest block as a share of all patches (16 of 14 x 14),
# and the smallest ratio of its sides (the largest is the inverse).
BLOCK_SHARE = 16 / 196
BLOCK_ASPECT = 0.3
GRID_STRIDES = (2, 3, 4)


class Mask(NamedTuple):
    """One image's mask: `ids_shuffle` `(N,)` int64, a permutation of the patches whose first `kept`
    are kept."""

    ids_shuffle: Tensor
    kept: int

    @property
    def mask_ratio(self) -> float:
        """Share that is removed, in (0, 1)."""
        return 1 - self.kept / len(self.ids_shuffle)


def training_order(num_patches: int, generator: torch.Generator) -> Tensor:
    """The order `(N,)` int64 of one sample's patches in training, the paper's: any patch is as
    likely to be kept as any other."""
    return torch.randperm(num_patches, generator=generator)


def draw_mask(
    kind: str, grid_size: tuple[int, int], mask_ratio: float, generator: torch.Generator
) -> Mask:
    """One mask of a kind in MASKS on a grid of (rows, columns) patches.

    Raises: InputError where nothing or everything would be kept, or where kind "grid" cannot have
    this ratio.
    """
    if problems := mask_problems(math.prod(grid_size), mask_ratio):
        raise InputError("; ".join(problems))
    return MASKS[kind](grid_size, mask_ratio, generator)


def _random(grid_size: tuple[int, int], mask_ratio: float, generator: torch.Generator) -> Mask:
    """The mask of training."""
    num_patches = math.prod(grid_size)
    return Mask(training_order(num_patches, generator), num_kept(num_patches, mask_ratio))


def _block(grid_size: tuple[int, int], mask_ratio: float, generator: torch.Generator) -> Mask:
    """Rectangles of random area, shape and place (arXiv 2106.08254, algorithm 1); of the last one
    only as many patches as the ratio still needs."""
    rows, columns = grid_size
    num_patches = rows * columns
    wanted = num_patches - num_kept(num_patches, mask_ratio)
    smallest = BLOCK_SHARE * num_patches
    removed = torch.zeros(rows, columns, dtype=torch.bool)
    while (missing := wanted - int(removed.sum())) > 0:
        area, aspect, top, left = torch.rand(4, generator=generator).tolist()
        area = smallest + area * max(missing - smallest, 0)
        aspect = math.exp((2 * aspect - 1) * math.log(1 / BLOCK_ASPECT))
        height = min(max(round(math.sqrt(area * aspect)), 1), rows)
        width = min(max(round(math.sqrt(area / aspect)), 1), columns)
        top, left = int(top * (rows - height + 1)), int(left * (columns - width + 1))
        block = torch.zeros_like(removed)
        block[top : top + height, left : left + width] = True
        fresh = (block & ~removed).flatten().nonzero().flatten()[:missing]
        removed.view(-1)[fresh] = True
    return _from_removed(removed)


def _grid(grid_size: tuple[int, int], mask_ratio: float, generator: torch.Generator) -> Mask:
    """Keeps the first patch of each square of 2 x 2 (ratio 0.75), 3 x 3 or 4 x 4; nothing is
    random here."""
    stride = next((s for s in GRID_STRIDES if abs(1 - 1 / s**2 - mask_ratio) < 0.01), None)
    if stride is None:
        ratios = ", ".join(f"{1 - 1 / s**2:.2g}" for s in GRID_STRIDES)
        raise InputError(
            f"mask grid keeps one patch of every 4, 9 or 16: mask_ratio {ratios}, "
            f"got {mask_ratio:g}"
        )
    removed = torch.ones(grid_size, dtype=torch.bool)
    removed[::stride, ::stride] = False
    return _from_removed(removed)


def _from_removed(removed: Tensor) -> Mask:
    return Mask(removed.flatten().int().argsort(stable=True), int((~removed).sum()))


MASKS: dict[str, Callable[[tuple[int, int], float, torch.Generator], Mask]] = {
    "random": _random,
    "block": _block,
    "grid": _grid,
}
