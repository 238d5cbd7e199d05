"""Recognises whose weights a file holds, renames them to the published MAE weights' names, and
checks every one.

Shapes: `N` patches, `D` width, `P` patch side, `C` channels.
"""

import logging
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from models.blocks import LAYER_NORM_EPS
from models.build import VIT_SIZES
from models.spec import ClassifierSpec, MAESpec, pair
from models.weights.files import RawWeights, read_json
from models.weights.huggingface import MARK, from_huggingface, huggingface_facts
from models.weights.info import WeightsInfo, by, expected_shapes, ratio_of
from models.weights.reference_project import decoder_heads, from_reference, is_reference
from util.errors import InputError

CANONICAL = re.compile(
    r"cls_token|pos_embed|mask_token|decoder_pos_embed|"
    r"(patch_embed\.proj|norm|fc_norm|head|decoder_embed|decoder_norm|decoder_pred)\.(weight|bias)|"
    r"(decoder_)?blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
)
ALWAYS = (
    "patch_embed.proj.weight",
    "pos_embed",
    "blocks.0.mlp.fc1.weight",
)  # the geometry is read from these
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
NAMED = 5  # so many names at most in an error
DECODER_FACTS = ("decoder_num_heads", "mask_ratio", "norm_pix_loss")
PAPER_DECODER = {512: 16}  # width and heads of the decoder of every published MAE size
logger = logging.getLogger(__name__)


def recognise(
    raw: RawWeights, folder: Path, where: str, img_size: tuple[int, int] | None
) -> tuple[dict[str, Tensor], WeightsInfo]:
    """Canonical tensors and their facts; `folder` is looked in for a Hugging Face `config.json`.

    `img_size` (H, W) is only for foreign files whose images were not square.
    Raises: InputError for anything that is not a ViT which this project can hold, whole.
    """
    if raw.source in ("checkpoint", "weights"):
        tensors, info = raw.tensors, _own_info(raw, where)
    else:
        tensors, owner, facts = _renamed(raw, folder, where)
        _check_names(tensors, where)
        info = _foreign_info(tensors, owner, facts, where, img_size)
    if img_size not in (None, info.img_size):
        raise InputError(
            f"{where}: its images are {by(info.img_size)}, img_size {by(img_size)} was given"
        )
    _check_shapes(tensors, info, where)
    return tensors, info


def _renamed(
    raw: RawWeights, folder: Path, where: str
) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """Canonical names, whose weights they are, and what is known beyond the tensors' shapes."""
    names = raw.tensors
    if any(name.endswith(MARK) for name in names):
        config = folder / "config.json"
        if not config.is_file():
            raise InputError(f"{where}: Hugging Face's weights need their config.json beside them")
        facts = huggingface_facts(read_json(config), str(config))
        if facts["layer_norm_eps"] != LAYER_NORM_EPS:
            logger.warning(
                "%s: layer_norm_eps is %g there and %g here",
                config,
                facts["layer_norm_eps"],
                LAYER_NORM_EPS,
            )
        return from_huggingface(names), "Hugging Face ViTMAE", facts
    types = {"norm_pix_loss": bool, "mask_ratio": float}
    facts = {
        name: raw.facts[name]
        for name, kind in types.items()
        if isinstance(raw.facts.get(name), kind)
    }
    if is_reference(names):
        return from_reference(names), "reference project", facts
    is_mae = raw.source == "model" or "mask_token" in names
    return names, "MAE" if is_mae else "timm", facts


def _own_info(raw: RawWeights, where: str) -> WeightsInfo:
    """From the constructor's keywords that this project's files carry."""
    if "patch_embed.proj.weight" not in raw.tensors:
        raise InputError(
            f"{where}: holds only {_listed(raw.tensors)}, as the checkpoints of a linear classification do: "
            "name the model.safetensors that its run wrote at the end"
        )
    args = raw.facts["model_args"]
    args = args if isinstance(args, dict) else {}
    has_decoder = "decoder_embed_dim" in args
    known = {f.name: f for f in fields(MAESpec if has_decoder else ClassifierSpec)}
    needed = {name for name, f in known.items() if f.default is MISSING}
    wrong = sorted((needed - args.keys()) | (args.keys() - known.keys()))
    if wrong:
        raise InputError(
            f"{where}: its model_args lack, or should not have: {', '.join(map(str, wrong))}"
        )
    use_fc_norm = (
        not has_decoder and args["global_pool"] == "avg" and args.get("fc_norm") is not False
    )
    holds = "autoencoder" if has_decoder else "classifier" if args["num_classes"] else "encoder"
    for name, stack in (("depth", "blocks."), ("decoder_depth", "decoder_blocks.")):
        if name in args and args[name] != _depth(raw.tensors, stack):
            raise InputError(
                f"{where}: its {name} is {args[name]}, but it holds {_depth(raw.tensors, stack)} {stack}*"
            )
    shared = {name: args[name] for name in WeightsInfo.__dataclass_fields__ if name in args}
    try:
        changes = {
            "kind": f"this project's {raw.source} ({holds})",
            "img_size": pair(args["img_size"]),
            "patch_size": pair(args["patch_size"]),
            "has_decoder": has_decoder,
            "num_classes": args.get("num_classes") or None,
            "fc_norm": use_fc_norm,
            "decoder": args.get("decoder", "self") if has_decoder else None,
            **{
                name: tuple(raw.facts[name])
                for name in ("mean", "std")
                if raw.facts[name] is not None
            },
        }
    except (TypeError, IndexError) as error:
        raise InputError(f"{where}: a value of its header has the wrong type: {error}") from None
    return WeightsInfo(**shared | changes)


def _foreign_info(
    tensors: dict[str, Tensor],
    owner: str,
    facts: dict[str, Any],
    where: str,
    img_size: tuple[int, int] | None,
) -> WeightsInfo:
    """From the tensors' shapes, the published sizes, and what else the file said."""
    embed_dim, in_chans, *patch = _shape(tensors, "patch_embed.proj.weight", 4, where)
    _, rows, _ = _shape(tensors, "pos_embed", 3, where)
    depth = _depth(tensors, "blocks.")
    class_token, has_decoder = "cls_token" in tensors, "decoder_embed.weight" in tensors
    num_patches = rows - class_token
    heads = [
        row["num_heads"]
        for row in VIT_SIZES.values()
        if (row["embed_dim"], row["depth"]) == (embed_dim, depth)
    ]
    found: dict[str, Any] = {"num_heads": heads[0] if heads else None, "img_size": img_size}
    if has_decoder:
        found["decoder"] = "self"
        width = _shape(tensors, "decoder_embed.weight", 2, where)[0]
        from_width = decoder_heads if owner == "reference project" else PAPER_DECODER.get
        found["decoder_num_heads"] = from_width(width)
        found["decoder_embed_dim"], found["decoder_depth"] = (
            width,
            _depth(tensors, "decoder_blocks."),
        )
        found["decoder_class_token"] = (
            _shape(tensors, "decoder_pos_embed", 3, where)[1] == num_patches + 1
        )
    found |= {
        name: value for name, value in facts.items() if has_decoder or name not in DECODER_FACTS
    }
    if found["img_size"] is None:
        side = round(max(num_patches, 0) ** 0.5)
        if side * side != num_patches:
            raise InputError(
                f"{where}: {num_patches} patches of {by(patch)} make no square image and the file does not say which: "
                "tools/convert_checkpoint.py --img_size H W --format safetensors writes a file that says it"
            )
        found["img_size"] = (side * patch[0], side * patch[1])
    height, width = found["img_size"]
    if (
        height % patch[0]
        or width % patch[1]
        or (height // patch[0]) * (width // patch[1]) != num_patches
    ):
        raise InputError(
            f"{where}: images of {by((height, width))} do not have {num_patches} patches of {by(patch)}"
        )
    num_classes = len(tensors["head.weight"]) if "head.weight" in tensors else None
    holds = "autoencoder" if has_decoder else "encoder" if num_classes is None else "classifier"
    return WeightsInfo(
        kind=f"{owner} ({holds})",
        embed_dim=embed_dim,
        depth=depth,
        patch_size=(patch[0], patch[1]),
        class_token=class_token,
        has_decoder=has_decoder,
        num_classes=num_classes,
        in_chans=in_chans,
        mlp_ratio=ratio_of(_shape(tensors, "blocks.0.mlp.fc1.weight", 2, where)[0], embed_dim),
        fc_norm="fc_norm.weight" in tensors,
        **found,
    )


def _check_names(tensors: dict[str, Tensor], where: str) -> None:
    """Before the geometry is read: are these a ViT's weights at all, and of one that this project
    has?"""
    unexpected = [name for name in tensors if not CANONICAL.fullmatch(name)]
    needed = ALWAYS + (
        WITH_DECODER if any("decoder_" in name or name == "mask_token" for name in tensors) else ()
    )
    missing = [name for name in needed if name not in tensors]
    _refuse(where, unexpected, missing, [])


def _check_shapes(tensors: dict[str, Tensor], info: WeightsInfo, where: str) -> None:
    """Every tensor that the model has, as numbers in its shape, and no other."""
    try:
        expected = expected_shapes(info)
    except (
        TypeError,
        ValueError,
        RuntimeError,
        ArithmeticError,
    ) as error:  # an InputError is a ValueError
        raise InputError(f"{where}: {info.kind} has a geometry that cannot be: {error}") from None
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
    if not (unexpected or missing or wrong):
        return
    parts = sorted(
        {word for name in unexpected for piece, word in UNSUPPORTED.items() if piece in name}
    )
    because = f" (it has {', '.join(parts)})" if parts else ""
    sides = [f"unexpected {_listed(unexpected)}"] if unexpected else []
    sides += [f"missing {_listed(missing)}"] if missing else []
    sides += [f"unfit {_listed(wrong)}"] if wrong else []
    raise InputError(
        f"{where}: not the weights of a ViT that this project has{because}: {'; '.join(sides)}"
    )


def _listed(names: Any) -> str:
    """The first few names and how many there are in all."""
    names = list(names)
    return ", ".join(names[:NAMED]) + (f", ... ({len(names)} in all)" if len(names) > NAMED else "")


def _shape(tensors: dict[str, Tensor], name: str, ndim: int, where: str) -> tuple[int, ...]:
    if tensors[name].ndim != ndim or 0 in tensors[name].shape:
        raise InputError(
            f"{where}: {name} is {tuple(tensors[name].shape)}, expected {ndim} dimensions"
        )
    return tuple(tensors[name].shape)


def _depth(tensors: dict[str, Tensor], stack: str) -> int:
    """How many blocks there are; a gap in their numbers shows as a missing one later."""
    return len({name.split(".")[1] for name in tensors if name.startswith(stack)})
