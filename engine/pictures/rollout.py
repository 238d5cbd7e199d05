"""Attention rollout (arXiv 2005.00928): how much each patch contributes to the class tokens,
over all layers.

Shapes: `B` batch, `N` patches, `T` tokens (class tokens and patches), `L` layers.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# over the heads
FUSIONS: dict[str, Callable[..., Tensor]] = {
    "mean": torch.mean,
    "max": torch.amax,
    "min": torch.amin,
}


def rollout(
    attentions: Iterable[Tensor],
    head_fusion: str,
    discard_ratio: float,
    class_tokens: int,
    reader: str = "token",
) -> Tensor:
    """Each patch's contribution to the class tokens, or without one to the mean patch, `(B, N)`.

    Args:
        attentions: `(B, heads, T, T)` of each of the L layers, first to last; rows are queries.
            They are read one at a time, so a large model need not hold all of them.
        head_fusion: mean, max or min over the heads (the paper takes the mean).
        discard_ratio: share of an image's matrix, its lowest entries, that is set to 0, in [0, 1);
            the class tokens' columns stay. 0 is the paper.
        class_tokens: how many of the tokens are class tokens, which come first.
        reader: see `read_patches`.

    With W the fused and thinned attention of layer l: A_l = (W + I) / 2 with rows normalised to sum
    to 1, and R_l = A_l R_(l-1).
    Source: arXiv 2005.00928, section 3, equation 1 and the paragraph before it.
    """
    result = None
    for attention in attentions:
        fused = FUSIONS[head_fusion](attention, dim=1)  # (B, T, T)
        if discard_ratio:
            fused = discard_lowest(fused, discard_ratio, class_tokens)
        mixed = (fused + torch.eye(fused.shape[-1], dtype=fused.dtype, device=fused.device)) / 2
        mixed = mixed / mixed.sum(dim=-1, keepdim=True)  # (B, T, T)
        result = mixed if result is None else mixed @ result
    assert result is not None, "a model has layers"
    return read_patches(result, class_tokens, reader)


def discard_lowest(fused: Tensor, discard_ratio: float, class_tokens: int) -> Tensor:
    """Sets the lowest floor(discard_ratio * T * T) entries of each image's matrix `(B, T, T)` to 0.

    Of equal entries the first in row-major order go. Entries in the class tokens' columns are
    counted among the lowest but keep their values.
    """
    flat = fused.flatten(1)  # (B, T * T)
    count = int(discard_ratio * flat.shape[1] + 1e-6)
    lowest = flat.sort(dim=1, stable=True).indices[:, :count]
    thinned = flat.scatter(1, lowest, 0.0).view_as(fused)  # (B, T, T)
    return torch.cat([fused[:, :, :class_tokens], thinned[:, :, class_tokens:]], dim=2)


def read_patches(matrices: Tensor, class_tokens: int, reader: str = "token") -> Tensor:
    """One row of matrices `(..., T, T)` over the patches, `(..., N)`.

    With `reader` "token" it is the mean of the class tokens' rows, or the mean row without a class
    token. With "avg" it is the mean of the patches' rows, whether or not there are class tokens: a
    classifier with `global_pool: avg` reads these.
    """
    of_patches = matrices[..., class_tokens:]  # (..., T, N)
    if reader == "token" and class_tokens:
        return of_patches[..., :class_tokens, :].mean(dim=-2)
    return of_patches[..., class_tokens:, :].mean(dim=-2)
