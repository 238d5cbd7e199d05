"""Names of the reference project's weights, read into the published MAE weights' names.

Shapes: `D` width, `P` patch side, `C` channels.
"""

import re

import torch
from einops import rearrange
from torch import Tensor

HEAD_DIM = 64  # its decoders have width / 64 heads
PREFIXES = {
    "encoder.": "",
    "decoder.blocks.": "decoder_blocks.",
    "decoder.norm.": "decoder_norm.",
    "decoder.head.": "decoder_pred.",
    "encoder_to_decoder.": "decoder_embed.",
}


def is_reference(tensors: dict[str, Tensor]) -> bool:
    """Whether the names are the reference project's: nothing else here keeps the biases of q and v
    apart."""
    return any(
        name.endswith(".attn.q_bias") or name == "encoder_to_decoder.weight" for name in tensors
    )


def from_reference(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Canonical names for the reference project's models; a name that it does not have stays as it
    is.

    Its pretraining has an `encoder.` and a `decoder.`, its classifiers have no prefix. q and v have
    a bias, k has none. Its decoder's head predicts pixels in (c, p, p) order.
    """
    renamed = {}
    for key, tensor in tensors.items():
        old = next((old for old in PREFIXES if key.startswith(old)), "")
        renamed[PREFIXES.get(old, "") + key.removeprefix(old)] = tensor
    for stem in [key.removesuffix("q_bias") for key in renamed if key.endswith(".attn.q_bias")]:
        if stem + "v_bias" in renamed:
            q, v = renamed.pop(stem + "q_bias"), renamed.pop(stem + "v_bias")
            renamed[stem + "qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])  # (3D,)
    if "decoder_embed.weight" in renamed:
        weight = renamed["decoder_embed.weight"]
        renamed.setdefault("decoder_embed.bias", weight.new_zeros(len(weight)))
    for name in {"decoder_pred.weight", "decoder_pred.bias"} & renamed.keys():
        in_chans = renamed["patch_embed.proj.weight"].shape[1]
        renamed[name] = rearrange(renamed[name], "(c n) ... -> (n c) ...", c=in_chans)
    if "cls_token" in renamed:  # its fc_norm normalises what is read, here the class token
        renamed = {re.sub(r"^fc_norm\.", "norm.", name): t for name, t in renamed.items()}
    return renamed


def decoder_heads(tensors: dict[str, Tensor]) -> int | None:
    """The attention heads of a decoder under canonical names; None for a width that it does not
    have."""
    width = len(tensors.get("decoder_embed.weight", ()))
    return None if width % HEAD_DIM else width // HEAD_DIM
