"""Sizes of images, patches and masks, and which of them cannot be.

Shapes: `N` patches, `K` kept patches, `M` predicted patches.
"""

import math

Size = int | tuple[int, int]
DECODERS = ("self", "cross")


def pair(size: Size) -> tuple[int, int]:
    """(H, W) of an int or a pair."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def vit_problems(
    img_size: Size, patch_size: Size, embed_dim: int, num_heads: int, part: str = ""
) -> list[str]:
    """What is wrong with a transformer's geometry, one line each; `part` is a prefix of the names,
    as `decoder_`."""
    found = []
    for side, image, patch in zip(
        ("height", "width"), pair(img_size), pair(patch_size), strict=True
    ):
        if image % patch:
            found.append(f"patch_size {patch} does not divide the image {side} {image}")
    if embed_dim % num_heads:
        found.append(f"{part}embed_dim {embed_dim} is not divisible by {part}num_heads {num_heads}")
    if embed_dim % 4:
        found.append(
            f"{part}embed_dim {embed_dim} is not divisible by 4, which the position table needs"
        )
    return found


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """K = floor(N * (1 - mask_ratio)), safe against float noise (N = 10, ratio 0.9 keeps 1)."""
    return math.floor(num_patches * (1 - mask_ratio) + 1e-6)


def num_predicted(num_patches: int, mask_ratio: float, pred_ratio: float | None) -> int:
    """M: all removed patches, or floor(N * pred_ratio) of them."""
    removed = num_patches - num_kept(num_patches, mask_ratio)
    return (
        removed if pred_ratio is None else min(removed, math.floor(num_patches * pred_ratio + 1e-6))
    )


def mae_problems(
    img_size: Size,
    patch_size: Size,
    embed_dim: int,
    num_heads: int,
    class_token: bool,
    decoder_embed_dim: int,
    decoder_num_heads: int,
    decoder_class_token: bool,
    mask_ratio: float,
    decoder: str = "self",
    pred_ratio: float | None = None,
) -> list[str]:
    """What is wrong with an autoencoder's geometry, one line each."""
    found = vit_problems(img_size, patch_size, embed_dim, num_heads)
    found += [
        p
        for p in vit_problems(
            img_size, patch_size, decoder_embed_dim, decoder_num_heads, "decoder_"
        )
        if p not in found
    ]
    if decoder_class_token and not class_token:
        found.append(
            "decoder_class_token true needs class_token true: there is no class token to pass on"
        )
    num_patches = math.prod(i // p for i, p in zip(pair(img_size), pair(patch_size), strict=True))
    kept = num_kept(num_patches, mask_ratio)
    if num_patches and not 0 < kept < num_patches:
        found.append(
            f"mask_ratio {mask_ratio:g} keeps {kept} of {num_patches} patches: at least one must stay and one must go"
        )
    if decoder not in DECODERS:
        found.append(f"decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
    if pred_ratio is not None and decoder != "cross":
        found.append(
            "pred_ratio belongs to decoder cross: the standard decoder sees all removed patches"
        )
    elif pred_ratio is not None and not 0 < pred_ratio <= mask_ratio:
        found.append(
            f"pred_ratio {pred_ratio:g} must be above 0 and at most mask_ratio {mask_ratio:g}"
        )
    elif (
        num_patches
        and 0 < kept < num_patches
        and not num_predicted(num_patches, mask_ratio, pred_ratio)
    ):
        found.append(f"pred_ratio {pred_ratio:g} predicts none of {num_patches} patches")
    return found
