"""What a file of weights holds, as numbers: enough to build its model, or to say why it does not
fit another.

Files of other projects do not record the number of attention heads, nor the mask ratio or the
target; such facts are None here unless a published size settles them, and `complete` takes them
from the user.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from models.mae import MaskedAutoencoder
from models.vit import VisionTransformer
from util.errors import InputError

PAPER_MASK_RATIO = 0.75  # arXiv 2111.06377, section 4.1; plays no part in the weights


@dataclass(frozen=True)
class WeightsInfo:
    """Geometry and settings of a file's model; None is "the file cannot tell" unless said
    otherwise.

    `kind` names the format and what it holds. `num_classes` None is no head. `fc_norm` says that
    the file holds one (in place of `norm`). The decoder's entries are None without a decoder.
    `layer_norm_eps` is set by Hugging Face only.
    """

    kind: str
    embed_dim: int
    depth: int
    num_heads: int | None
    img_size: tuple[int, int]  # (H, W) pixels
    patch_size: tuple[int, int]  # (P, Q) pixels
    class_token: bool
    has_decoder: bool
    num_classes: int | None
    in_chans: int = 3
    mlp_ratio: float = 4.0
    fc_norm: bool = False
    global_pool: str | None = None
    decoder_embed_dim: int | None = None
    decoder_depth: int | None = None
    decoder_num_heads: int | None = None
    decoder_class_token: bool | None = None
    decoder: str | None = None
    pred_ratio: float | None = None
    mask_ratio: float | None = None
    norm_pix_loss: bool | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    layer_norm_eps: float | None = None

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]

    @property
    def readout(self) -> str:
        """The file's `global_pool`, or what its norm goes with: the mean for `fc_norm`, else a
        class token."""
        return self.global_pool or ("token" if self.class_token and not self.fc_norm else "avg")

    def __str__(self) -> str:
        facts = [
            f"{self.embed_dim} wide",
            f"{self.depth} deep",
            _heads(self.num_heads),
            f"image {by(self.img_size)}",
            f"patch {by(self.patch_size)}",
            f"{self.in_chans} channels",
            "class token" if self.class_token else "no class token",
        ]
        if self.fc_norm:
            facts.append("fc_norm")
        if self.num_classes is not None:
            facts.append(f"head of {self.num_classes} classes")
        if self.has_decoder:
            passed = "with" if self.decoder_class_token else "without"
            kind = "cross-attention decoder" if self.decoder == "cross" else "decoder"
            facts.append(
                f"{kind} {self.decoder_embed_dim} wide, {self.decoder_depth} deep, {_heads(self.decoder_num_heads)}, "
                f"{passed} class token"
            )
        return f"{self.kind}: {', '.join(facts)}"


def by(size: Sequence[int]) -> str:
    """(H, W) in a message."""
    return f"{size[0]}x{size[1]}"


def _heads(count: int | None) -> str:
    return "unknown number of heads" if count is None else f"{count} heads"


def mae_args(info: WeightsInfo) -> dict[str, Any]:
    """The keywords of `MaskedAutoencoder` for a file with a decoder; an unknown mask ratio is the
    paper's.

    Raises: InputError where there is no decoder or facts are missing (see `complete`).
    """
    if not info.has_decoder:
        raise InputError(f"{info.kind} holds no decoder: an autoencoder cannot be built from it")
    _require(info, "num_heads", "decoder_num_heads", "norm_pix_loss")
    return {
        "img_size": _plain_size(info.img_size),
        "patch_size": _plain_size(info.patch_size),
        "in_chans": info.in_chans,
        "embed_dim": info.embed_dim,
        "depth": info.depth,
        "num_heads": info.num_heads,
        "mlp_ratio": info.mlp_ratio,
        "class_token": info.class_token,
        "decoder_embed_dim": info.decoder_embed_dim,
        "decoder_depth": info.decoder_depth,
        "decoder_num_heads": info.decoder_num_heads,
        "decoder_class_token": info.decoder_class_token,
        "mask_ratio": PAPER_MASK_RATIO if info.mask_ratio is None else info.mask_ratio,
        "norm_pix_loss": info.norm_pix_loss,
        "decoder": info.decoder,
        "pred_ratio": info.pred_ratio,
    }


def classifier_args(info: WeightsInfo) -> dict[str, Any]:
    """The keywords of `VisionTransformer` for a file's encoder; `num_classes` is 0 where the file
    holds no head.

    Raises: InputError where the number of heads is missing (see `complete`).
    """
    _require(info, "num_heads")
    return {
        "img_size": _plain_size(info.img_size),
        "patch_size": _plain_size(info.patch_size),
        "in_chans": info.in_chans,
        "num_classes": info.num_classes or 0,
        "embed_dim": info.embed_dim,
        "depth": info.depth,
        "num_heads": info.num_heads,
        "mlp_ratio": info.mlp_ratio,
        "class_token": info.class_token,
        "global_pool": info.readout,
        "fc_norm": info.fc_norm,
        "drop_path_rate": 0.0,
    }


def complete(info: WeightsInfo, **facts: Any) -> WeightsInfo:
    """Fills in facts that the file cannot tell; those given as None stay unknown.

    Raises: InputError naming both sides where the file says otherwise, or for a number of heads
    that cannot be.
    """
    given = {name: value for name, value in facts.items() if value is not None}
    clashes = [
        f"{name} {getattr(info, name)} in the file, {value} given"
        for name, value in given.items()
        if getattr(info, name) not in (None, value)
    ]
    clashes += [
        f"{name} must be 1 or more, got {v}"
        for name, v in given.items()
        if name.endswith("heads") and v < 1
    ]
    if clashes:
        raise InputError("; ".join(clashes))
    return replace(info, **given)


def expected_shapes(info: WeightsInfo) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that such a file must hold. Raises: InputError for a geometry
    that cannot be."""
    known = replace(  # facts that no shape depends on
        info,
        num_heads=1 if info.num_heads is None else info.num_heads,
        decoder_num_heads=1 if info.decoder_num_heads is None else info.decoder_num_heads,
        norm_pix_loss=bool(info.norm_pix_loss),
    )
    with torch.device("meta"):
        if info.has_decoder:
            return {
                name: tuple(t.shape)
                for name, t in MaskedAutoencoder(**mae_args(known)).state_dict().items()
            }
        arguments = classifier_args(known) | {"num_classes": info.num_classes or 1}
        shapes = {
            name: tuple(t.shape) for name, t in VisionTransformer(**arguments).state_dict().items()
        }
    return (
        shapes
        if info.num_classes
        else {name: s for name, s in shapes.items() if not name.startswith("head.")}
    )


def ratio_of(hidden_dim: int, embed_dim: int) -> float:
    """The `mlp_ratio` that gives this MLP width in spite of float noise: int(embed_dim * ratio) =
    hidden_dim."""
    ratio = hidden_dim / embed_dim
    return ratio if int(embed_dim * ratio) == hidden_dim else math.nextafter(ratio, math.inf)


def _require(info: WeightsInfo, *names: str) -> None:
    missing = [name for name in names if getattr(info, name) is None]
    if missing:
        raise InputError(
            f"{info.kind}: the file does not say {', '.join(missing)}, which has to be given"
        )


def _plain_size(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)
