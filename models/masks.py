"""Masks: which patches an image keeps and which are removed, in training and in pictures.

A mask is an order of the patches, a permutation whose first K are kept; K follows from `mask_ratio`
by `models.spec.num_kept`. Training draws one for each sample, by `draw_orders`, which
`main_pretrain.py` hands to the data set; pictures draw one for each image. Another kind is a
function in KINDS that gives each patch a score, and its name in the setting `mask`.

Shapes: `B` samples, `N` patches, `K` kept patches.
"""

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from models.spec import grid_stride, kind_problems, mask_problems, num_kept
from util.errors import InputError

# Of arXiv 2106.08254, algorithm 1: the smallest block as a share of all patches (16 of 14 x 14),
# and the smallest ratio of its sides (the largest is the inverse).
BLOCK_SHARE = 16 / 196
BLOCK_ASPECT = 0.3
# Standard deviations of green noise's two blurs, in patches: an octave around a period of five. The
# paper publishes its noise and not these.
WEAK_BLUR, STRONG_BLUR = 0.75, 1.5
RADIUS = math.ceil(3 * STRONG_BLUR)  # of both blurs


class Mask(NamedTuple):
    """One image's mask: `ids_shuffle` `(N,)` int64, a permutation of the patches whose first `kept`
    are kept."""

    ids_shuffle: Tensor
    kept: int

    @property
    def mask_ratio(self) -> float:
        """Share that is removed, in (0, 1)."""
        return 1 - self.kept / len(self.ids_shuffle)


class Kind(NamedTuple):
    """How masks of a kind are made: what is drawn for one from its random stream, and the scores
    `(B, rows, columns)` of the patches from what was drawn for `B` of them, `(B, ...)`. The patches
    with the lowest scores are kept; chance decides between equal ones."""

    draw: Callable[[torch.Generator], Tensor]
    scores: Callable[[Tensor], Tensor]


def draw_mask(
    kind: str,
    grid_size: tuple[int, int],
    mask_ratio: float,
    generator: torch.Generator,
    block: int = 2,
) -> Mask:
    """One mask of a kind in KINDS on a grid of (rows, columns) patches.

    Args:
        block: side in patches of the squares of kind "block".

    Raises: InputError where nothing or everything would be kept, or where the kind does not go with
    this grid or ratio.
    """
    total = math.prod(grid_size)
    problems = mask_problems(total, mask_ratio)
    if problems := problems + kind_problems(kind, grid_size, mask_ratio, block):
        raise InputError("; ".join(problems))
    (order,) = draw_orders(kind, grid_size, mask_ratio, block, [generator])
    return Mask(order, num_kept(total, mask_ratio))


def draw_orders(
    kind: str,
    grid_size: tuple[int, int],
    mask_ratio: float,
    block: int,
    streams: Iterable[torch.Generator],
) -> Tensor:
    """The patches of several samples in the order of their masks, `(B, N)` int64: one from each
    stream, which is read before the next is taken. Arguments as of `draw_mask`, already checked."""
    total = math.prod(grid_size)
    of_kind = KINDS[kind](grid_size, mask_ratio, block)
    drawn, shuffles = [], []
    for stream in streams:
        if of_kind is not None:
            drawn.append(of_kind.draw(stream))
        shuffles.append(torch.randperm(total, generator=stream))
    shuffled = torch.stack(shuffles)  # (B, N)
    if of_kind is None:
        return shuffled
    scores = of_kind.scores(torch.stack(drawn)).flatten(1)  # (B, N)
    ranked = shuffled.gather(1, scores.gather(1, shuffled).argsort(dim=1, stable=True))
    removed = torch.zeros_like(ranked).scatter_(1, ranked[:, num_kept(total, mask_ratio) :], 1)
    # Both parts are in random order: a decoder may predict only the first of the removed patches.
    return shuffled.gather(1, removed.gather(1, shuffled).argsort(dim=1, stable=True))


def _random(grid_size: tuple[int, int], mask_ratio: float, block: int) -> None:
    """Any patch is as likely to be kept as any other: a shuffle is all there is."""


def _block(grid_size: tuple[int, int], mask_ratio: float, block: int) -> Kind:
    """Squares of `block` x `block` patches are kept or removed together, any as likely as any
    other. Of one square only a part is kept where K is not a multiple of its patches.

    Source: arXiv 2512.15715.
    """
    rows, columns = grid_size[0] // block, grid_size[1] // block

    def scores(drawn: Tensor) -> Tensor:
        squares = drawn.view(-1, rows, columns)
        return squares.repeat_interleave(block, 1).repeat_interleave(block, 2)

    return Kind(lambda stream: torch.randperm(rows * columns, generator=stream), scores)


def _grid(grid_size: tuple[int, int], mask_ratio: float, block: int) -> Kind:
    """One patch of each square of 2 x 2 (ratio 0.75), 3 x 3 or 4 x 4 is kept, the same of all
    squares; chance decides only which one.

    Source: arXiv 2111.06377, figure 6.
    """
    stride = grid_stride(mask_ratio) or 1
    rows, columns = torch.meshgrid(*map(torch.arange, grid_size), indexing="ij")
    places = rows % stride * stride + columns % stride  # (rows, columns), of each in its square

    return Kind(
        lambda stream: torch.randint(stride**2, (1, 1), generator=stream),
        lambda drawn: (places != drawn).to(torch.int64),
    )


def _green(grid_size: tuple[int, int], mask_ratio: float, block: int) -> Kind:
    """White noise less its highest and lowest frequencies, which is the difference of a weak and a
    strong Gaussian blur: kept patches form small clusters, evenly spread. Noise is drawn past the
    edges of the grid, so that places there are like all others.

    Source: arXiv 2407.13036, green noise; there the highest values are kept, which is as likely.
    """
    rows, columns = grid_size
    blurs = [(_blur(rows, sigma), _blur(columns, sigma).T) for sigma in (WEAK_BLUR, STRONG_BLUR)]

    def draw(stream: torch.Generator) -> Tensor:
        # float64: how a product is summed up must not decide which of two patches is kept
        size = (rows + 2 * RADIUS, columns + 2 * RADIUS)
        return torch.randn(size, generator=stream, dtype=torch.float64)

    def scores(noise: Tensor) -> Tensor:
        weak, strong = (down @ noise @ across for down, across in blurs)
        return weak - strong

    return Kind(draw, scores)


@lru_cache  # a loader draws one mask at a time
def _blur(size: int, sigma: float) -> Tensor:
    """A Gaussian blur along one axis, as a matrix `(size, size + 2 * RADIUS)` float64."""
    places = torch.arange(-RADIUS, size + RADIUS, dtype=torch.float64)
    distance = (places - torch.arange(size)[:, None]).abs()
    weights = torch.exp(-(distance**2) / (2 * sigma**2)) * (distance <= RADIUS)
    return weights / weights.sum(dim=1, keepdim=True)


def _blockwise(grid_size: tuple[int, int], mask_ratio: float, block: int) -> Kind:
    """Rectangles of random area, shape and place are removed (arXiv 2106.08254, algorithm 1); of
    the last one only as many patches as the ratio still needs."""
    rows, columns = grid_size
    num_patches = rows * columns
    wanted = num_patches - num_kept(num_patches, mask_ratio)
    smallest = BLOCK_SHARE * num_patches

    def draw(stream: torch.Generator) -> Tensor:
        removed = torch.zeros(rows, columns, dtype=torch.bool)
        while (missing := wanted - int(removed.sum())) > 0:
            area, aspect, top, left = torch.rand(4, generator=stream).tolist()
            area = smallest + area * max(missing - smallest, 0)
            aspect = math.exp((2 * aspect - 1) * math.log(1 / BLOCK_ASPECT))
            height = min(max(round(math.sqrt(area * aspect)), 1), rows)
            width = min(max(round(math.sqrt(area / aspect)), 1), columns)
            top, left = int(top * (rows - height + 1)), int(left * (columns - width + 1))
            rectangle = torch.zeros_like(removed)
            rectangle[top : top + height, left : left + width] = True
            fresh = (rectangle & ~removed).flatten().nonzero().flatten()[:missing]
            removed.view(-1)[fresh] = True
        return removed

    return Kind(draw, lambda removed: removed.to(torch.int64))


# By the names of the setting `mask`.
KINDS: dict[str, Callable[[tuple[int, int], float, int], Kind | None]] = {
    "random": _random,
    "block": _block,
    "grid": _grid,
    "green": _green,
    "blockwise": _blockwise,
}
