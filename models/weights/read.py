"""Reads everyone's weights: this project's, the public MAE code's, the reference project's, timm's
and Hugging Face's.

Whatever the file, its tensors come out under the names of the published MAE weights, checked one by
one, with the specification of their model; a head for segmentation or detection, which only this
project's files have, is under `head.`.

Shapes: `N` patches, `D` width, `P` patch side, `C` channels.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.build import VIT_SIZES, build_model
from models.spec import ClassifierSpec, DenseSpec, MAESpec, ModelSpec, pair, spec_from_dict
from models.weights.files import RawWeights, read_files, weights_files
from models.weights.huggingface import from_huggingface, is_huggingface, read_config
from models.weights.info import WeightsInfo, spelled
from models.weights.own import PIXEL_SETTINGS
from models.weights.reference_project import decoder_heads, from_reference, is_reference
from util.errors import InputError

CANONICAL = re.compile(
    r"cls_token|reg_token|register_tokens|pos_embed|mask_token|decoder_pos_embed|"
    r"(patch_embed\.proj|norm|fc_norm|head|decoder_embed|decoder_norm|decoder_pred)\.(weight|bias)|"
    r"(decoder_)?blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
)
# The geometry is read from these, which have this many dimensions.
ALWAYS = {"patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2}
WITH_DECODER = {"decoder_embed.weight": 2, "decoder_pos_embed": 3}
UNSUPPORTED = {  # parts of other ViTs, by a piece of their names
    "gamma_": "layer scale",
    "layer_scale": "layer scale",
    "storage_tokens": "register tokens",
    "dist_token": "a distillation token",
    "head_dist": "a distillation token",
    "q_norm": "normalised queries and keys",
    "norm_pre": "a norm before the blocks",
    "rel_pos": "relative positions",
    "relative_position": "relative positions",
    "running_mean": "BatchNorm, as a linear probe's head has",
}
REGISTERS = ("reg_token", "register_tokens")  # timm's and DINOv2's names
MAX_NAMES = 5  # in one list of an error
PUBLISHED_HEADS = {(row["embed_dim"], row["depth"]): row["num_heads"] for row in VIT_SIZES.values()}
PUBLISHED_HEADS |= {(1536, 48): 24, (3072, 48): 32}  # Pixio's 1B and 5B, by its model file
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
    files = weights_files(Path(path))
    raw, sha256 = read_files(files)
    try:
        if raw.source in ("checkpoint", "weights"):
            tensors, info = raw.tensors, _own_info(raw, sha256)
        else:
            tensors, info = _foreign(raw, sha256, files[0].parent, img_size)
        if img_size not in (None, pair(info.spec.img_size)):
            raise InputError(
                f"its img_size is {spelled(info.spec.img_size)}, {spelled(img_size)} was given"
            )
        _check_tensors(tensors, info.spec)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # noqa: BLE001 (a file may say anything)
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{path}: describes a model that cannot be: {what}") from error
    return tensors, info


def _own_info(raw: RawWeights, sha256: str) -> WeightsInfo:
    """From the specification that this project's files carry."""
    if "patch_embed.proj.weight" not in raw.tensors:
        raise InputError(
            f"holds only {_listed(list(raw.tensors))}, as the checkpoints of a linear "
            f"classification do: name the model.safetensors that its run wrote at the end"
        )
    spec = spec_from_dict(raw.header["model_args"])
    mean, std = (raw.header[n] and tuple(raw.header[n]) for n in ("mean", "std"))
    blocks = spec.depth + getattr(spec, "decoder_depth", 0)
    if blocks > len(raw.tensors):  # before a model of this depth is built
        raise InputError(f"its header says {blocks} blocks, but it has {len(raw.tensors)} tensors")
    kind = f"this project's {raw.source} ({_contents(spec)})"
    names = raw.header.get("class_names")
    pixels = {n: tuple(raw.header.get(n, usual)) for n, usual in PIXEL_SETTINGS.items()}
    return WeightsInfo(
        kind=kind,
        spec=spec,
        sha256=sha256,
        mean=mean,
        std=std,
        pixels=pixels,
        objective=raw.header.get("objective"),
        class_names=names and tuple(names),
    )


def _foreign(
    raw: RawWeights, sha256: str, folder: Path, img_size: tuple[int, int] | None
) -> tuple[dict[str, Tensor], WeightsInfo]:
    """Canonical tensors of another project's file, and what they are."""
    tensors = raw.tensors
    # Fields of the specification that do not show in the tensors' shapes.
    types = {"norm_pix_loss": bool, "mask_ratio": float}
    stated = {n: raw.header[n] for n, kind in types.items() if isinstance(raw.header.get(n), kind)}
    if is_huggingface(tensors):
        tensors, stated = from_huggingface(tensors), read_config(folder)
        owner = f"Hugging Face {stated['owner']}"
    elif is_reference(tensors):
        owner = "reference project"
        tensors = from_reference(tensors)
        stated["decoder_num_heads"] = decoder_heads(tensors)
    else:
        owner = "MAE" if raw.source == "model" or "decoder_embed.weight" in tensors else "timm"
    tensors = _fold_layer_scale(tensors)
    if not any(name.startswith("decoder_") for name in tensors):
        tensors.pop("mask_token", None)  # of a method that masks without a decoder, as DINOv2
    _check_names(tensors)
    if img_size:
        stated["img_size"] = img_size
    has_registers = not tensors.keys().isdisjoint(REGISTERS)
    tensors = _join_class_tokens(tensors, stated.get("img_size"))
    spec, unknown = _foreign_spec(tensors, stated, has_registers)
    kind = f"{owner} ({_contents(spec)}{' with registers' * has_registers})"
    return tensors, WeightsInfo(kind=kind, spec=spec, sha256=sha256, unknown=unknown)


def _fold_layer_scale(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layer scale as a part of the layer before it, in float32, which gives the same function.

    Source: arXiv 2103.17239, section 2.
    """
    folded = dict(tensors)
    for scale, layer in (("ls1.gamma", "attn.proj"), ("ls2.gamma", "mlp.fc2")):
        for name in [name for name in tensors if name.endswith(scale)]:
            gamma = folded.pop(name).float()  # (D,)
            for kind, shape in (("weight", (-1, 1)), ("bias", (-1,))):
                scaled = name.replace(scale, f"{layer}.{kind}")
                folded[scaled] = folded[scaled].float() * gamma.view(shape)  # (D, F) or (D,)
    return folded


def _join_class_tokens(
    tensors: dict[str, Tensor], img_size: tuple[int, int] | None
) -> dict[str, Tensor]:
    """Class tokens and registers as class tokens, in this order, and a row of the position table
    for each, of zeros where the file has none: DINOv2 has none for its registers, and some of
    timm's models have none for any of them."""
    joined = dict(tensors)
    tokens = [joined.pop(name) for name in ("cls_token", *REGISTERS) if name in tensors]
    if not tokens:
        return joined
    joined["cls_token"] = torch.cat(tokens, dim=1)  # (1, class tokens, D)
    count, table = joined["cls_token"].shape[1], tensors["pos_embed"]  # (1, rows + N, D)
    p, q = tensors["patch_embed.proj.weight"].shape[2:]
    wanted = img_size and (img_size[0] // p) * (img_size[1] // q)
    fitting = [
        possible
        for possible in sorted({0, tokens[0].shape[1], count})
        if (patches := table.shape[1] - possible) > 0
        and patches == (wanted or math.isqrt(patches) ** 2)
    ]
    if len(fitting) > 1:
        raise InputError(
            f"its position table of {table.shape[1]} rows may have {fitting[0]} or {fitting[1]} of "
            "class tokens and registers: give img_size"
        )
    rows = fitting[0] if fitting else count
    zeros = table.new_zeros(1, count - rows, table.shape[2])
    joined["pos_embed"] = torch.cat([table[:, :rows], zeros, table[:, rows:]], dim=1)
    return joined


def _foreign_spec(
    tensors: dict[str, Tensor], stated: dict[str, Any], has_registers: bool
) -> tuple[ModelSpec, frozenset[str]]:
    """The specification, from the tensors' shapes, the published sizes and what the file `stated`,
    and the fields of it that are unknown."""
    embed_dim, in_chans, height, width = tensors["patch_embed.proj.weight"].shape
    depth = _depth(tensors, "blocks.")
    class_tokens = tensors["cls_token"].shape[1] if "cls_token" in tensors else 0
    num_patches = tensors["pos_embed"].shape[1] - class_tokens
    found: dict[str, object] = {
        "num_heads": PUBLISHED_HEADS.get((embed_dim, depth)),
        "mask_ratio": PAPER_MASK_RATIO,
        **stated,
        "img_size": _image_size(num_patches, (height, width), stated.get("img_size")),
        "patch_size": (height, width),
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": depth,
        "mlp_ratio": _mlp_ratio(len(tensors["blocks.0.mlp.fc1.weight"]), embed_dim),
        "class_tokens": class_tokens,
    }
    kind: type[ModelSpec] = MAESpec if "decoder_embed.weight" in tensors else ClassifierSpec
    # For fields that the file may leave unknown.
    stand_ins: dict[str, object] = {"num_heads": 1, "decoder_num_heads": 1, "norm_pix_loss": False}
    if kind is MAESpec:
        decoder_dim = len(tensors["decoder_embed.weight"])
        found.setdefault("decoder_num_heads", PAPER_DECODER_HEADS.get(decoder_dim))
        found |= {
            "decoder_embed_dim": decoder_dim,
            "decoder_depth": _depth(tensors, "decoder_blocks."),
            "decoder_class_token": tensors["decoder_pos_embed"].shape[1] > num_patches,
        }
    else:
        fc_norm = "fc_norm.weight" in tensors
        found |= {"num_classes": len(tensors.get("head.weight", ())), "fc_norm": fc_norm}
        reads_token = class_tokens and not fc_norm and not has_registers
        stand_ins["global_pool"] = "token" if reads_token else "avg"
    names = {f.name for f in fields(kind)}
    unknown = names.intersection(n for n in stand_ins if found.get(n) is None)
    found |= {name: stand_ins[name] for name in unknown}
    return spec_from_dict({n: found[n] for n in names & found.keys()}), frozenset(unknown)


def _image_size(
    num_patches: int, patch_size: tuple[int, int], img_size: tuple[int, int] | None
) -> tuple[int, int]:
    """(H, W) of the images: the stated size, or that of a square of patches."""
    side = math.isqrt(max(num_patches, 0))
    size = img_size or (side * patch_size[0], side * patch_size[1])
    (rows, no_height), (columns, no_width) = map(divmod, size, patch_size)
    if no_height or no_width or rows * columns != num_patches:
        raise InputError(
            f"{num_patches} patches of {spelled(patch_size)} do not make images of "
            f"{spelled(size)}, and images are square where no size is given: "
            f"tools/convert_checkpoint.py --img_size H W --format safetensors writes a "
            f"file that states the size"
        )
    return size


def _mlp_ratio(hidden_dim: int, embed_dim: int) -> float:
    """The ratio that gives this MLP width in spite of float noise: int(embed_dim * ratio) is
    hidden_dim."""
    ratio = hidden_dim / embed_dim
    return ratio if int(embed_dim * ratio) == hidden_dim else math.nextafter(ratio, math.inf)


def _contents(spec: ModelSpec) -> str:
    if isinstance(spec, MAESpec):
        return "autoencoder"
    if isinstance(spec, DenseSpec):
        return f"model of task {spec.task}"
    return "classifier" if spec.num_classes else "encoder"


def _check_names(tensors: dict[str, Tensor]) -> None:
    """That these are the weights of a ViT that this project has, before their shapes are read."""
    unexpected = [name for name in tensors if not CANONICAL.fullmatch(name)]
    has_decoder = any("decoder_" in name or name == "mask_token" for name in tensors)
    needed = {name: 3 for name in ("cls_token", *REGISTERS) if name in tensors} | ALWAYS
    needed |= WITH_DECODER if has_decoder else {}
    wrong = [
        f"{name} is {tuple(tensors[name].shape)}, expected {ndim} dimensions"
        for name, ndim in needed.items()
        if name in tensors and (tensors[name].ndim != ndim or not tensors[name].numel())
    ]
    _refuse(unexpected, [name for name in needed if name not in tensors], wrong)


def _check_tensors(tensors: dict[str, Tensor], spec: ModelSpec) -> None:
    """That every tensor of the model is there, as numbers in its shape, and no other."""
    with torch.device("meta"):
        expected = {n: tuple(t.shape) for n, t in build_model(spec).state_dict().items()}
    wrong = [
        f"{name} is {tuple(t.shape)}, {t.dtype} on {t.device}, expected {expected[name]}, floating "
        f"point on cpu"
        for name, t in tensors.items()
        if name in expected
        and (t.shape != expected[name] or not t.is_floating_point() or t.device.type != "cpu")
    ]
    unexpected = [name for name in tensors if name not in expected]
    _refuse(unexpected, [name for name in expected if name not in tensors], wrong)


def _refuse(unexpected: list[str], missing: list[str], wrong: list[str]) -> None:
    """Raises: InputError that lists both sides, if there is anything to list."""
    sides = {"unexpected": unexpected, "missing": missing, "unfit": wrong}
    found = [f"{side} {_listed(names)}" for side, names in sides.items() if names]
    parts = {word for name in unexpected for piece, word in UNSUPPORTED.items() if piece in name}
    if found:
        because = f" (it has {', '.join(sorted(parts))})" if parts else ""
        raise InputError(
            f"not the weights of a ViT that this project has{because}: {'; '.join(found)}"
        )


def _listed(names: Sequence[str]) -> str:
    """The first few names and how many there are in all."""
    rest = f", ... ({len(names)} in all)" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + rest


def _depth(tensors: dict[str, Tensor], stack: str) -> int:
    """The number of blocks; a gap in their numbering shows as a missing tensor later."""
    return len({name.split(".")[1] for name in tensors if name.startswith(stack)})
