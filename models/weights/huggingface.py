"""Names and settings of Hugging Face's ViTMAE (`transformers`), in both directions, and of its
Pixio and DINOv2, which are only read.

Three generations of names are read: those of the published weights, those that the current model
has in memory, and those that its `save_pretrained` writes (where the decoder's layers have a third
name). The published ones are written, because every version of `transformers` loads them.

Shapes: `D` width. The library keeps q, k and v apart, this project has them in one projection of 3D
rows.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.blocks import LAYER_NORM_EPS
from models.spec import MAESpec, pair
from util.errors import InputError

MARK = "embeddings.patch_embeddings.projection.weight"  # with or without its prefix, in each file
# A name is a stack of blocks and a place in it, or neither, then a part, then the kind of tensor.
NAME = re.compile(r"(?:(.+)\.(\d+)\.)?(.+?)(\.weight|\.bias)?")
PUBLISHED = {  # stacks and parts as the published weights name them; q, k and v become one
    "vit.encoder.layer": "blocks",
    "decoder.decoder_layers": "decoder_blocks",
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "vit.layernorm": "norm",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "decoder.decoder_embed": "decoder_embed",
    "decoder.decoder_norm": "decoder_norm",
    "decoder.decoder_pred": "decoder_pred",
}
WRITTEN = {ours: theirs for theirs, ours in PUBLISHED.items()}
# All generations; a `ViTMAEModel` has no prefix.
READ = {theirs.removeprefix("vit."): ours for theirs, ours in PUBLISHED.items()} | {
    "layers": "blocks",
    "decoder.decoder_encoder.layer": "decoder_blocks",
    "attention.q_proj": "attn.q",
    "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v",
    "attention.o_proj": "attn.proj",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
OWNERS = {"vit_mae": "ViTMAE", "pixio": "Pixio"} | dict.fromkeys(
    ("dinov2", "dinov2_with_registers"), "DINOv2"
)  # by `model_type`
DEFAULTS = {  # the library's, for settings that a config leaves out
    "num_attention_heads": 12,
    "decoder_num_attention_heads": 16,
    "image_size": 224,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "mask_ratio": 0.75,
    "norm_pix_loss": False,
}
logger = logging.getLogger(__name__)


def is_huggingface(tensors: Iterable[str]) -> bool:
    """Whether these are the names of a ViT of that library."""
    return any(name.endswith(MARK) for name in tensors)


def from_huggingface(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Canonical names; parts of a name that no ViT here has stay as they are."""
    found = {_renamed(name.removeprefix("vit."), READ): t for name, t in tensors.items()}
    for name in [name for name in found if ".attn.q." in name]:
        parts = [name.replace(".q.", f".{part}.") for part in "qkv"]
        if all(part in found for part in parts):
            # (3D, D) or (3D,)
            found[name.replace(".q.", ".qkv.")] = torch.cat([found.pop(part) for part in parts])
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of the specification that the `config.json` in a folder says and the tensors'
    shapes do not, and as `owner` whose model it is.

    Raises: InputError for another model or activation, or if there is no such file.
    """
    path = folder / "config.json"
    try:
        config: dict[str, Any] = DEFAULTS | json.loads(path.read_text(encoding="utf-8"))
        height, width = pair(config["image_size"])
        eps = float(config["layer_norm_eps"])
        stated = {
            "num_heads": int(config["num_attention_heads"]),
            "decoder_num_heads": int(config["decoder_num_attention_heads"]),
            "img_size": (int(height), int(width)),
            "mask_ratio": float(config["mask_ratio"]),
            "norm_pix_loss": bool(config["norm_pix_loss"]),
        }
    except (OSError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"needs {path} as Hugging Face writes it: {error}") from None
    for name, needed in {"model_type": [*OWNERS], "hidden_act": ["gelu"]}.items():
        if config.get(name) not in needed:
            raise InputError(
                f"{path}: only {name} {' or '.join(map(repr, needed))} is read, got "
                f"{config.get(name)!r}"
            )
    if eps != LAYER_NORM_EPS:
        logger.warning("%s: layer_norm_eps is %g there and %g here", path, eps, LAYER_NORM_EPS)
    return stated | {"owner": OWNERS[config["model_type"]]}


def to_huggingface(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published weights' names of a `ViTMAEForPreTraining`."""
    separate = dict(tensors)
    for name in [name for name in tensors if ".qkv." in name]:
        for part, rows in zip("qkv", separate.pop(name).chunk(3), strict=True):
            separate[name.replace(".qkv.", f".{part}.")] = rows.clone()  # memory of its own
    return {_renamed(name, WRITTEN): tensor for name, tensor in separate.items()}


def huggingface_config(spec: MAESpec) -> dict[str, object]:
    """The `config.json` of a `ViTMAEForPreTraining`."""
    return {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "hidden_size": spec.embed_dim,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.num_heads,
        "intermediate_size": spec.mlp_dim,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": spec.img_size,
        "patch_size": spec.patch_size,
        "num_channels": spec.in_chans,
        "qkv_bias": True,
        "decoder_hidden_size": spec.decoder_embed_dim,
        "decoder_num_hidden_layers": spec.decoder_depth,
        "decoder_num_attention_heads": spec.decoder_num_heads,
        "decoder_intermediate_size": int(spec.decoder_embed_dim * spec.mlp_ratio),
        "mask_ratio": spec.mask_ratio,
        "norm_pix_loss": spec.norm_pix_loss,
    }


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """`name` with its stack and its part replaced."""
    match = NAME.fullmatch(name)
    stack, place, part, kind = match.groups("") if match else ("", "", name, "")
    prefix = f"{names.get(stack, stack)}.{place}." if place else ""
    return f"{prefix}{names.get(part, part)}{kind}"
