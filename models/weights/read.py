"""Reads everyone's weights: this project's, the public MAE code's, the reference project's, timm's
and Hugging Face's.

Whatever the file, its tensors come out under the names of the published MAE weights, checked one by
one, with the specification of their model.

Shapes: `N` patches, `D` width, `P` patch side, `C` channels.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.build import VIT_SIZES, build_model
from models.spec import ClassifierSpec, MAESpec, ModelSpec, pair, spec_from_dict
from models.weights.files import RawWeights, read_files, weights_files
from models.weights.huggingface import from_huggingface, is_huggingface, read_config
from models.weights.info import WeightsInfo, spelled
from models.weights.reference_project import decoder_heads, from_reference, is_reference
from util.errors import InputError

CANONICAL = re.compile(
    r"cls_token|pos_embed|mask_token|decoder_pos_embed|"
    r"(patch_embed\.proj|norm|fc_norm|head|decoder_embed|decoder_norm|decoder_pred)\.(weight|bias)|"
    r"(decoder_)?blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
)
# The geometry is read from these.
ALWAYS = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
WITH_DECODER = ("decoder_embed.weight", "decoder_pos_embed")
UNSUPPORTED = {  # parts of other ViTs, by a piece of their names
    ".ls1.": "layer scale",
    ".ls2.": "layer scale",
    "gamma_": "layer scale",
    "layer_scale": "layer scale",
    "reg_token": "register tokens",
    "register_tokens": "register tokens",
    "storage_tokens": "register tokens",
    "dist_token": "a distillation token",
    "head_dist": "a distillation token",
    "q_norm": "normalised queries and keys",
    "norm_pre": "a norm before the blocks",
    "rel_pos": "relative positions",
    "relative_position": "relative positions",
    "running_mean": "BatchNorm, as a linear probe's head has",
}
MAX_NAMES = 5  # in one list of an error
PAPER_DECODER_HEADS = {512: 16}  # by the width of the decoder of every published MAE size
PAPER_MASK_RATIO = 0.75  # arXiv 2111.06377, section 4.1; plays no part in the weights


def read_weights(
    path: str | Path, img_size: tuple[int, int] | None = None
) -> tuple[dict[str, Tensor], WeightsInfo]:
    """The tensors of a file or Hugging Face folder, under canonical names, and what they are.

    The tensors are on the CPU, in the file's dtype, and are exactly those of the model of
    `WeightsInfo.spec`. `img_size` (H, W) is for foreign files whose images were not square; this
    project's files record it.

    Raises: InputError for anything else, naming the path and both sides. Nothing that a file says
    is ever run.
    """
    path = Path(path)
    files = weights_files(path)
    raw, sha256 = read_files(files)
    if raw.source in ("checkpoint", "weights"):
        tensors, info = raw.tensors, _own_info(raw, str(path), sha256)
    else:
        tensors, owner, stated = _renamed(raw, files[0].parent, str(path))
        _check_names(tensors, str(path))
        spec, unknown = _foreign_spec(tensors, stated, str(path), img_size)
        kind = f"{owner} ({_contents(spec)})"
        info = WeightsInfo(kind=kind, spec=spec, sha256=sha256, unknown=unknown)
    if img_size not in (None, pair(info.spec.img_size)):
        raise InputError(
            f"{path}: its img_size is {spelled(info.spec.img_size)}, {spelled(img_size)} was given"
        )
    _check_tensors(tensors, info, str(path))
    return tensors, info


def _own_info(raw: RawWeights, where: str, sha256: str) -> WeightsInfo:
    """From the specification that this project's files carry."""
    if "patch_embed.proj.weight" not in raw.tensors:
        raise InputError(
            f"{where}: holds only {_listed(raw.tensors)}, as the checkpoints of a linear "
            f"classification do: name the model.safetensors that its run wrote at the end"
        )
    try:
        spec = spec_from_dict(raw.header["model_args"])
        mean, std = (raw.header[n] and tuple(raw.header[n]) for n in ("mean", "std"))
    except Exception as error:  # noqa: BLE001 (a header may hold anything)
        raise InputError(f"{where}: its header describes no model: {error}") from error
    # Before a model of this depth is built.
    for name, stack in (("depth", "blocks."), ("decoder_depth", "decoder_blocks.")):
        stated, found = getattr(spec, name, 0), _depth(raw.tensors, stack)
        if stated != found:
            raise InputError(
                f"{where}: its header says {name} {stated}, but it holds {found} of the layers "
                f"{stack}*"
            )
    kind = f"this project's {raw.source} ({_contents(spec)})"
    return WeightsInfo(kind=kind, spec=spec, sha256=sha256, mean=mean, std=std)


def _renamed(
    raw: RawWeights, folder: Path, where: str
) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """Canonical names, whose weights they are, and fields of the specification that do not show in
    the tensors' shapes."""
    names = raw.tensors
    if is_huggingface(names):
        return from_huggingface(names), "Hugging Face ViTMAE", read_config(folder, where)
    types = {"norm_pix_loss": bool, "mask_ratio": float}
    stated = {n: raw.header[n] for n, kind in types.items() if isinstance(raw.header.get(n), kind)}
    if is_reference(names):
        renamed = from_reference(names)
        return renamed, "reference project", stated | decoder_heads(renamed)
    is_mae = raw.source == "model" or "mask_token" in names
    return names, "MAE" if is_mae else "timm", stated


def _foreign_spec(
    tensors: dict[str, Tensor], stated: dict[str, Any], where: str, img_size: tuple[int, int] | None
) -> tuple[ModelSpec, frozenset[str]]:
    """The specification, from the tensors' shapes, the published sizes and what the file `stated`,
    and the fields of it that are unknown."""
    embed_dim, in_chans, *patch_size = _shape(tensors, "patch_embed.proj.weight", 4, where)
    hidden_dim = _shape(tensors, "blocks.0.mlp.fc1.weight", 2, where)[0]
    class_token, depth = "cls_token" in tensors, _depth(tensors, "blocks.")
    num_patches = _shape(tensors, "pos_embed", 3, where)[1] - class_token
    published = {(r["embed_dim"], r["depth"]): r["num_heads"] for r in VIT_SIZES.values()}
    found: dict[str, Any] = {
        "num_heads": published.get((embed_dim, depth)),
        **stated,
        "patch_size": tuple(patch_size),
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": depth,
        "mlp_ratio": _mlp_ratio(hidden_dim, embed_dim),
        "class_token": class_token,
    }
    found["img_size"] = _image_size(
        num_patches, (patch_size[0], patch_size[1]), img_size or stated.get("img_size"), where
    )
    kind: type[ModelSpec]
    stand_ins: dict[str, Any]
    if "decoder_embed.weight" in tensors:
        kind = MAESpec
        width = _shape(tensors, "decoder_embed.weight", 2, where)[0]
        rows = _shape(tensors, "decoder_pos_embed", 3, where)[1]
        found["decoder_embed_dim"] = width
        found["decoder_depth"] = _depth(tensors, "decoder_blocks.")
        found["decoder_class_token"] = rows == num_patches + 1
        found.setdefault("decoder_num_heads", PAPER_DECODER_HEADS.get(width))
        found.setdefault("mask_ratio", PAPER_MASK_RATIO)
        stand_ins = {"num_heads": 1, "decoder_num_heads": 1, "norm_pix_loss": False}
    else:
        kind = ClassifierSpec
        found["num_classes"] = len(tensors["head.weight"]) if "head.weight" in tensors else 0
        found["fc_norm"] = "fc_norm.weight" in tensors
        reads_token = class_token and not found["fc_norm"]
        stand_ins = {"num_heads": 1, "global_pool": "token" if reads_token else "avg"}
    unknown = frozenset(name for name in stand_ins if found.get(name) is None)
    found |= {name: stand_ins[name] for name in unknown}
    names = {f.name for f in fields(kind)}
    return kind(**{name: value for name, value in found.items() if name in names}), unknown


def _image_size(
    num_patches: int, patch_size: tuple[int, int], img_size: tuple[int, int] | None, where: str
) -> tuple[int, int]:
    """(H, W) of the images: the stated size, after a check, or the square with this number of
    patches."""
    if img_size is None:
        side = math.isqrt(max(num_patches, 0))
        if side * side != num_patches:
            raise InputError(
                f"{where}: {num_patches} patches of {spelled(patch_size)} make no square image and "
                f"the file does not say which: tools/convert_checkpoint.py --img_size H W --format "
                f"safetensors writes a file that says it"
            )
        return side * patch_size[0], side * patch_size[1]
    (rows, no_height), (columns, no_width) = map(divmod, img_size, patch_size)
    if no_height or no_width or rows * columns != num_patches:
        raise InputError(
            f"{where}: images of {spelled(img_size)} do not have {num_patches} patches of "
            f"{spelled(patch_size)}"
        )
    return img_size


def _mlp_ratio(hidden_dim: int, embed_dim: int) -> float:
    """The ratio that gives this MLP width in spite of float noise: int(embed_dim * ratio) is
    hidden_dim."""
    ratio = hidden_dim / embed_dim
    return ratio if int(embed_dim * ratio) == hidden_dim else math.nextafter(ratio, math.inf)


def _contents(spec: ModelSpec) -> str:
    if isinstance(spec, MAESpec):
        return "autoencoder"
    return "classifier" if spec.num_classes else "encoder"


def _check_names(tensors: dict[str, Tensor], where: str) -> None:
    """That these are the weights of a ViT that this project has, before their shapes are read."""
    unexpected = [name for name in tensors if not CANONICAL.fullmatch(name)]
    has_decoder = any("decoder_" in name or name == "mask_token" for name in tensors)
    needed = ALWAYS + WITH_DECODER if has_decoder else ALWAYS
    _refuse(where, unexpected, [name for name in needed if name not in tensors], [])


def _check_tensors(tensors: dict[str, Tensor], info: WeightsInfo, where: str) -> None:
    """That every tensor of the model is there, as numbers in its shape, and no other."""
    try:
        with torch.device("meta"):
            expected = {n: tuple(t.shape) for n, t in build_model(info.spec).state_dict().items()}
    except Exception as error:  # noqa: BLE001 (a header may hold anything)
        raise InputError(f"{where}: {info.kind} has a geometry that cannot be: {error}") from error
    wrong = [
        f"{name} is {tuple(tensor.shape)}, expected {expected[name]}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name]
    ]
    wrong += [
        f"{name} is {tensor.dtype} on {tensor.device}, expected floating point"
        for name, tensor in tensors.items()
        if not tensor.is_floating_point() or tensor.device.type != "cpu"
    ]
    unexpected = [name for name in tensors if name not in expected]
    _refuse(where, unexpected, [name for name in expected if name not in tensors], wrong)


def _refuse(where: str, unexpected: list[str], missing: list[str], wrong: list[str]) -> None:
    """Raises: InputError that lists both sides, if there is anything to list."""
    sides = {"unexpected": unexpected, "missing": missing, "unfit": wrong}
    found = [f"{side} {_listed(names)}" for side, names in sides.items() if names]
    if not found:
        return
    parts = {word for name in unexpected for piece, word in UNSUPPORTED.items() if piece in name}
    because = f" (it has {', '.join(sorted(parts))})" if parts else ""
    raise InputError(
        f"{where}: not the weights of a ViT that this project has{because}: {'; '.join(found)}"
    )


def _listed(names: Iterable[str]) -> str:
    """The first few names and how many there are in all."""
    names = list(names)
    rest = f", ... ({len(names)} in all)" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + rest


def _shape(tensors: dict[str, Tensor], name: str, ndim: int, where: str) -> tuple[int, ...]:
    shape = tuple(tensors[name].shape)
    if len(shape) != ndim or 0 in shape:
        raise InputError(f"{where}: {name} is {shape}, expected {ndim} dimensions")
    return shape


def _depth(tensors: dict[str, Tensor], stack: str) -> int:
    """The number of blocks; a gap in their numbering shows as a missing tensor later."""
    return len({name.split(".")[1] for name in tensors if name.startswith(stack)})
