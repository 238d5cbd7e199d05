"""Names and settings of Hugging Face's ViTMAE (`transformers`), in both directions.

Three generations of names are read: those of the published weights, those that the current model
has in memory, and those that its `save_pretrained` writes (where the decoder's layers have a third
name). The published ones are written, because every version of `transformers` loads them.

Shapes: `D` width. The library keeps q, k and v apart, this project has them in one projection of 3D
rows.
"""

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.blocks import LAYER_NORM_EPS
from models.spec import MAESpec, pair
from models.weights.files import read_json
from util.errors import InputError

MARK = "embeddings.patch_embeddings.projection.weight"  # with or without its prefix, in each file
ENCODER_LAYER = re.compile(r"(?:vit\.)?(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)")
DECODER_LAYER = re.compile(
    r"decoder\.(?:decoder_layers|decoder_encoder\.layer)\.(\d+)\.(.+)\.(weight|bias)"
)
PUBLISHED = {  # parts of a block as the published weights name them; q, k and v become one
    "attention.attention.query": "q",
    "attention.attention.key": "k",
    "attention.attention.value": "v",
    "attention.output.dense": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
PARTS = PUBLISHED | {
    "attention.q_proj": "q",
    "attention.k_proj": "k",
    "attention.v_proj": "v",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
ENCODER = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
DECODER = ("mask_token", "decoder_pos_embed", "decoder_embed", "decoder_norm", "decoder_pred")
DEFAULTS: dict[str, Any] = {  # the library's, for settings that a config leaves out
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
    """Whether these are the names of a ViTMAE."""
    return any(name.endswith(MARK) for name in tensors)


def from_huggingface(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Canonical names; a name that no ViTMAE has stays as it is."""
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        name = _canonical(key)
        if match := re.fullmatch(r"(.+)\.([qkv])\.(weight|bias)", name):
            parts.setdefault(f"{match[1]}.attn.qkv.{match[3]}", {})[match[2]] = (key, tensor)
        else:
            renamed[name] = tensor
    for name, found in parts.items():
        if len(found) == 3:
            renamed[name] = torch.cat([found[part][1] for part in "qkv"])  # (3D, D) or (3D,)
        else:
            renamed.update(found.values())
    return renamed


def read_config(folder: Path, where: str) -> dict[str, Any]:
    """The fields of the specification that the `config.json` in a folder says and the tensors'
    shapes do not.

    Raises: InputError for another model or activation, or if there is no such file.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{where}: Hugging Face's weights need their config.json beside them")
    config = read_json(path)
    if config.get("model_type") != "vit_mae":
        raise InputError(
            f"{path}: only model_type 'vit_mae' is read, got {config.get('model_type')!r}"
        )
    config = DEFAULTS | config
    if config["hidden_act"] != "gelu":
        raise InputError(f"{path}: only hidden_act 'gelu' is read, got {config['hidden_act']!r}")
    try:
        height, width = pair(config["image_size"])
        eps = float(config["layer_norm_eps"])
        stated = {
            "num_heads": int(config["num_attention_heads"]),
            "decoder_num_heads": int(config["decoder_num_attention_heads"]),
            "img_size": (int(height), int(width)),
            "mask_ratio": float(config["mask_ratio"]),
            "norm_pix_loss": bool(config["norm_pix_loss"]),
        }
    except (TypeError, ValueError, IndexError) as error:
        raise InputError(f"{path}: a setting has the wrong type: {error}") from None
    if eps != LAYER_NORM_EPS:
        logger.warning("%s: layer_norm_eps is %g there and %g here", path, eps, LAYER_NORM_EPS)
    return stated


def to_huggingface(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published weights' names of a `ViTMAEForPreTraining`."""
    inner = {ours: theirs for theirs, ours in PUBLISHED.items()}
    fixed = {ours: f"vit.{theirs}" for theirs, ours in ENCODER.items()}
    renamed = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)", key)
        if match is None:
            renamed[fixed.get(key, f"decoder.{key}")] = tensor
            continue
        layer = f"{'decoder.decoder_layers' if match[1] else 'vit.encoder.layer'}.{match[2]}"
        if match[3] == "attn.qkv":
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{layer}.{inner[part]}.{match[4]}"] = rows
        else:
            renamed[f"{layer}.{inner[match[3]]}.{match[4]}"] = tensor
    return renamed


def huggingface_config(spec: MAESpec) -> dict[str, Any]:
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


def _canonical(key: str) -> str:
    """A canonical name, with q, k and v apart; the name itself if there is none."""
    for pattern, stack in ((ENCODER_LAYER, "blocks"), (DECODER_LAYER, "decoder_blocks")):
        match = pattern.fullmatch(key)
        if match and match[2] in PARTS:
            return f"{stack}.{match[1]}.{PARTS[match[2]]}.{match[3]}"
    if key.startswith("decoder.") and key.split(".")[1] in DECODER:
        return key.removeprefix("decoder.")
    return ENCODER.get(key.removeprefix("vit."), key)
