"""What tests of the models share: small geometries, random weights, and independent implementations
(transformers' ViTMAE and timm's ViT) that are fed with our weights."""

from typing import TypeVar

import torch
from timm.models.vision_transformer import VisionTransformer as TimmViT
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from models.mae import MaskedAutoencoder
from models.vit import VisionTransformer

ENCODER = {
    "img_size": 32,
    "patch_size": 8,
    "in_chans": 3,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "mlp_ratio": 4.0,
    "class_token": True,
}
MAE = ENCODER | {
    "decoder_embed_dim": 24,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
    "decoder_class_token": True,
    "mask_ratio": 0.75,
    "norm_pix_loss": True,
}
VIT = ENCODER | {"num_classes": 7, "global_pool": "token", "fc_norm": False}
READOUTS = [
    {},
    {"global_pool": "avg", "fc_norm": True},
    {"global_pool": "avg"},
    {"global_pool": "avg", "fc_norm": True, "class_token": False},
    {"global_pool": "avg", "class_token": False},
]
LAYER_NAMES = {
    "attn.proj": "attention.o_proj",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
FIXED_NAMES = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}
ModelT = TypeVar("ModelT", bound=torch.nn.Module)


def randomized(model: ModelT, seed: int = 0) -> ModelT:
    """The model with random parameters and position tables, in eval mode: with biases of zero and
    norms of one, a swapped or forgotten tensor would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model.eval()


def to_huggingface(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names (weights or gradients alike) as transformers' names; the fused qkv is cut into
    three."""
    renamed = {}
    for key, value in tensors.items():
        stem, _, kind = key.rpartition(".") if key.endswith(("weight", "bias")) else (key, "", "")
        if "blocks." not in key:
            renamed[".".join(filter(None, (FIXED_NAMES[stem], kind)))] = value
            continue
        stack, index, part = stem.split(".", 2)
        stack = "decoder.decoder_layers" if stack == "decoder_blocks" else "vit.layers"
        if part == "attn.qkv":
            for name, rows in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{stack}.{index}.attention.{name}_proj.{kind}"] = rows
        else:
            renamed[f"{stack}.{index}.{LAYER_NAMES[part]}.{kind}"] = value
    return renamed


def huggingface_mae(ours: MaskedAutoencoder) -> ViTMAEForPreTraining:
    """transformers' model with our weights. `layer_norm_eps` must be set: its default is 1e-12."""
    spec = ours.spec
    config = ViTMAEConfig(
        hidden_size=spec.embed_dim,
        num_hidden_layers=spec.depth,
        num_attention_heads=spec.num_heads,
        intermediate_size=int(spec.embed_dim * spec.mlp_ratio),
        image_size=spec.img_size,
        patch_size=spec.patch_size,
        num_channels=spec.in_chans,
        decoder_hidden_size=spec.decoder_embed_dim,
        decoder_num_hidden_layers=spec.decoder_depth,
        decoder_num_attention_heads=spec.decoder_num_heads,
        decoder_intermediate_size=int(spec.decoder_embed_dim * spec.mlp_ratio),
        mask_ratio=spec.mask_ratio,
        norm_pix_loss=spec.norm_pix_loss,
        layer_norm_eps=1e-6,
    )
    reference = ViTMAEForPreTraining(config).to(ours.pos_embed.dtype)
    reference.load_state_dict(to_huggingface(ours.state_dict()), strict=True)
    return reference


def timm_vit(ours: VisionTransformer) -> TimmViT:
    """timm's model with our weights."""
    keywords = ours.spec.as_dict()
    del keywords["drop_path_rate"]
    reference = TimmViT(**keywords).to(ours.pos_embed.dtype)
    reference.load_state_dict(ours.state_dict(), strict=True)
    return reference.eval()
