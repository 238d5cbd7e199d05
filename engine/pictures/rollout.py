"""Attention rollout (arXiv 2005.00928): how much each patch contributes to the class token, over
all layers.

Shapes: `B` batch, `N` patches, `T` tokens (patches and class token), `L` layers.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from models.vit import VisionTransformer


def rollout(
    attentions: Iterable[Tensor],
    head_fusion: str,
    discard_ratio: float,
    class_token: bool,
    layer: int | None = None,
    reader: str = "token",
) -> Tensor:
    """What the class token (without one: the mean patch) takes from each patch, `(B, N)`.

    Args:
        attentions: of the L layers, first to last, `(B, heads, T, T)` each; rows are queries.
        head_fusion: mean, max or min over the heads (the paper takes the mean).
        discard_ratio: share of an image's matrix, its lowest entries, that is set to 0, in [0, 1);
            the class token's column stays. 0 is the paper.
        class_token: the first token is one.
        layer: only this one, in place of all.
        reader: see `read_patches`.

    With fused, thinned attention W of layer l: A_l = (W + I) / 2, rows normalised to sum to 1, R_l
    = A_l R_(l-1).
    Source: arXiv 2005.00928, section 3, equation 1 and the paragraph before it.
    """
    result = None
    for index, attention in enumerate(
        attentions
    ):  # one at a time: large models need not hold all of them
        if layer not in (None, index):
            continue
        fused = discard_lowest(fuse_heads(attention, head_fusion), discard_ratio, class_token)
        mixed = (fused + torch.eye(fused.shape[-1], dtype=fused.dtype, device=fused.device)) / 2
        mixed = mixed / mixed.sum(dim=-1, keepdim=True)  # (B, T, T)
        result = mixed if result is None else mixed @ result
    assert result is not None, "there is such a layer"
    return read_patches(result, class_token, reader)


def fuse_heads(attention: Tensor, head_fusion: str) -> Tensor:
    """`(B, heads, T, T)` -> `(B, T, T)`."""
    if head_fusion == "mean":
        return attention.mean(dim=1)
    return attention.amax(dim=1) if head_fusion == "max" else attention.amin(dim=1)


def discard_lowest(fused: Tensor, discard_ratio: float, class_token: bool) -> Tensor:
    """Sets the lowest floor(discard_ratio * T * T) entries of each image's matrix `(B, T, T)` to 0.

    Of equal entries the first in row-major order go. Entries of the class token's column are
    counted but stay.
    """
    flat = fused.flatten(1)  # (B, T * T)
    count = int(discard_ratio * flat.shape[1] + 1e-6)
    if not count:
        return fused
    lowest = flat.sort(dim=1, stable=True).indices[:, :count]
    thinned = flat.scatter(1, lowest, 0.0).view_as(fused)  # (B, T, T)
    return torch.cat([fused[:, :, :1], thinned[:, :, 1:]], dim=2) if class_token else thinned


def read_patches(matrices: Tensor, class_token: bool, reader: str = "token") -> Tensor:
    """What is read of matrices `(..., T, T)` over the patches, `(..., N)`.

    `reader` "token" is the class token's row, or the mean row where there is none; "avg" the mean
    of the patches' rows, which is what a classifier with `global_pool: avg` goes by, whether it has
    a class token or not.
    """
    if not class_token:
        return matrices.mean(dim=-2)
    return matrices[..., 0, 1:] if reader == "token" else matrices[..., 1:, 1:].mean(dim=-2)


def class_attentions(
    model: VisionTransformer, images: Tensor, category: int
) -> tuple[Tensor, list[Tensor]]:
    """Logits `(B, num_classes)`, and each layer's attention times its gradient for one class, where
    positive.

    These take the place of the attentions in `rollout`. Source: arXiv 2103.15679, equation 5.
    """
    with torch.enable_grad():
        logits, attentions = model.forward_with_attention(images.detach().requires_grad_())
        gradients = torch.autograd.grad(
            logits[:, category].sum(), attentions
        )  # in the order of the layers
    weighted = [(a * g).clamp(min=0).detach() for a, g in zip(attentions, gradients, strict=True)]
    return logits.detach(), weighted
