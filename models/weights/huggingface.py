"""Names and settings of Hugging Face's ViTMAE (`transformers`), in both directions.

Three generations of names are read: those of the published weights, those that the current model
has in memory, and those that its `save_pretrained` writes (where the decoder's layers have a third
name). The published ones are written, because every version of `transformers` loads them.

Shapes: `D` width. The library keeps q, k and v apart, this project has them in one projection of 3D
rows.
"""

import re
from typing import Any

import torch
from torch import Tensor

from models.blocks import LAYER_NORM_EPS
from models.spec import pair
from models.weights.info import PAPER_MASK_RATIO, WeightsInfo, mae_args
from util.errors import InputError

MARK = (
    "embeddings.patch_embeddings.projection.weight"  # in every ViTMAE, with or without its prefix
)
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


def huggingface_facts(config: dict[str, Any], where: str) -> dict[str, Any]:
    """What `config.json` says beyond the tensors' shapes, under the names of `WeightsInfo`.

    Raises: InputError for another model or activation.
    """
    if config.get("model_type") != "vit_mae":
        raise InputError(
            f"{where}: only model_type 'vit_mae' is read, got {config.get('model_type')!r}"
        )
    config = DEFAULTS | config
    if config["hidden_act"] != "gelu":
        raise InputError(f"{where}: only hidden_act 'gelu' is read, got {config['hidden_act']!r}")
    try:
        height, width = pair(config["image_size"])
        return {
            "num_heads": int(config["num_attention_heads"]),
            "decoder_num_heads": int(config["decoder_num_attention_heads"]),
            "img_size": (int(height), int(width)),
            "mask_ratio": float(config["mask_ratio"]),
            "norm_pix_loss": bool(config["norm_pix_loss"]),
            "layer_norm_eps": float(config["layer_norm_eps"]),
        }
    except (TypeError, ValueError, IndexError) as error:
        raise InputError(f"{where}: a setting has the wrong type: {error}") from None


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


def huggingface_config(info: WeightsInfo) -> dict[str, Any]:
    """The `config.json` of a `ViTMAEForPreTraining`.

    Raises: InputError with every reason why that class cannot hold the model.
    """
    problems = huggingface_problems(info)
    if problems:
        raise InputError(f"Hugging Face's ViTMAE cannot hold {info.kind}: {'; '.join(problems)}")
    arguments = mae_args(info)
    decoder_dim = arguments["decoder_embed_dim"]
    return {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "hidden_size": info.embed_dim,
        "num_hidden_layers": info.depth,
        "num_attention_heads": info.num_heads,
        "intermediate_size": int(info.embed_dim * info.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": info.img_size[0],
        "patch_size": info.patch_size[0],
        "num_channels": info.in_chans,
        "qkv_bias": True,
        "decoder_hidden_size": decoder_dim,
        "decoder_num_hidden_layers": info.decoder_depth,
        "decoder_num_attention_heads": info.decoder_num_heads,
        "decoder_intermediate_size": int(decoder_dim * info.mlp_ratio),
        "mask_ratio": PAPER_MASK_RATIO if info.mask_ratio is None else info.mask_ratio,
        "norm_pix_loss": info.norm_pix_loss,
    }


def huggingface_problems(info: WeightsInfo) -> list[str]:
    """Why `ViTMAEForPreTraining` cannot hold a model, one line each."""
    needs = {
        "it needs a decoder": info.has_decoder,
        "it has no head": info.num_classes is None,
        "it needs a class token in the encoder": info.class_token,
        "it needs the class token in the decoder": not info.has_decoder
        or bool(info.decoder_class_token),
        "it needs the standard decoder": info.decoder != "cross",
        "it needs square images": info.img_size[0] == info.img_size[1],
        "it needs square patches": info.patch_size[0] == info.patch_size[1],
    }
    return [need for need, met in needs.items() if not met]


def _canonical(key: str) -> str:
    """A canonical name, with q, k and v apart; the name itself where there is none."""
    for pattern, stack in ((ENCODER_LAYER, "blocks"), (DECODER_LAYER, "decoder_blocks")):
        match = pattern.fullmatch(key)
        if match and match[2] in PARTS:
            return f"{stack}.{match[1]}.{PARTS[match[2]]}.{match[3]}"
    if key.startswith("decoder.") and key.split(".")[1] in DECODER:
        return key.removeprefix("decoder.")
    return ENCODER.get(key.removeprefix("vit."), key)
