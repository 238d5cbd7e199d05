"""Independent implementations the tests compare with: transformers' ViTMAE and timm's ViT, fed with
our weights."""

import torch
from timm.models.vision_transformer import VisionTransformer as TimmViT
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from models.mae import MaskedAutoencoder
from models.vit import VisionTransformer

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


def to_huggingface(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names (weights or gradients alike) as transformers' names; the fused qkv is cut into
    three."""
    renamed = {}
    for key, value in tensors.items():
        if "blocks." in key:
            stack, index, rest = key.split(".", 2)
            layer = (
                f"{'decoder.decoder_layers' if stack == 'decoder_blocks' else 'vit.layers'}.{index}"
            )
            if rest.startswith("attn.qkv"):
                kind = rest.rsplit(".", 1)[1]
                for name, part in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{layer}.attention.{name}_proj.{kind}"] = part
            else:
                stem, kind = rest.rsplit(".", 1)
                renamed[f"{layer}.{LAYER_NAMES[stem]}.{kind}"] = value
        elif key in FIXED_NAMES:
            renamed[FIXED_NAMES[key]] = value
        else:
            stem, kind = key.rsplit(".", 1)
            renamed[f"{FIXED_NAMES[stem]}.{kind}"] = value
    return renamed


def huggingface_mae(ours: MaskedAutoencoder, kwargs: dict, **config) -> ViTMAEForPreTraining:
    """transformers' model with our weights. `layer_norm_eps` must be set: its default is 1e-12."""
    reference = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=kwargs["embed_dim"],
            num_hidden_layers=kwargs["depth"],
            num_attention_heads=kwargs["num_heads"],
            intermediate_size=int(kwargs["embed_dim"] * kwargs["mlp_ratio"]),
            image_size=kwargs["img_size"],
            patch_size=kwargs["patch_size"],
            num_channels=kwargs["in_chans"],
            decoder_hidden_size=kwargs["decoder_embed_dim"],
            decoder_num_hidden_layers=kwargs["decoder_depth"],
            decoder_num_attention_heads=kwargs["decoder_num_heads"],
            decoder_intermediate_size=int(kwargs["decoder_embed_dim"] * kwargs["mlp_ratio"]),
            mask_ratio=kwargs["mask_ratio"],
            norm_pix_loss=kwargs["norm_pix_loss"],
            layer_norm_eps=1e-6,
            **config,
        )
    )
    reference.load_state_dict(to_huggingface(ours.state_dict()), strict=True)
    return reference


def timm_vit(ours: VisionTransformer, kwargs: dict) -> TimmViT:
    """timm's model with our weights."""
    names = (
        "img_size",
        "patch_size",
        "in_chans",
        "num_classes",
        "embed_dim",
        "depth",
        "num_heads",
        "mlp_ratio",
    )
    reference = TimmViT(
        **{name: kwargs[name] for name in names},
        class_token=kwargs["class_token"],
        global_pool=kwargs["global_pool"],
        fc_norm=kwargs["fc_norm"],
    )
    reference.load_state_dict(ours.state_dict(), strict=True)
    return reference
