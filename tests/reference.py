"""What tests of the models share: small geometries, random weights, and independent implementations
(transformers' ViTMAE and timm's ViT) that are fed with our weights."""

from typing import TypeVar

import torch
from timm.models.vision_transformer import VisionTransformer as TimmViT
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from models.mae import MaskedAutoencoder
from models.vit import VisionTransformer
from models.weights.huggingface import huggingface_config, to_huggingface
from models.weights.write import NOT_IN_TIMM

ENCODER = {
    "img_size": 32,
    "patch_size": 8,
    "in_chans": 3,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "mlp_ratio": 4.0,
    "class_tokens": 1,
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
    {"global_pool": "avg", "fc_norm": True, "class_tokens": 0},
    {"global_pool": "avg", "class_tokens": 0},
]
ModelT = TypeVar("ModelT", bound=torch.nn.Module)


def randomized(model: ModelT, seed: int = 0) -> ModelT:
    """The model with random parameters and position tables, in eval mode: with biases of zero and
    norms of one, a swapped or forgotten tensor would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model.eval()


def huggingface_mae(ours: MaskedAutoencoder) -> ViTMAEForPreTraining:
    """transformers' model with our weights, whose names it must all know."""
    theirs, report = ViTMAEForPreTraining.from_pretrained(
        None,
        config=ViTMAEConfig(**huggingface_config(ours.spec)),
        state_dict=to_huggingface(ours.state_dict()),
        dtype=ours.pos_embed.dtype,
        output_loading_info=True,
    )
    assert not any(report.values()), report
    return theirs


def timm_vit(ours: VisionTransformer) -> TimmViT:
    """timm's model with our weights."""
    keywords = {n: v for n, v in ours.spec.as_dict().items() if n not in NOT_IN_TIMM}
    keywords["class_token"] = bool(ours.spec.class_tokens)
    keywords["final_norm"] = ours.spec.last_norm
    reference = TimmViT(**keywords).to(ours.pos_embed.dtype)
    reference.load_state_dict(ours.state_dict(), strict=True)
    return reference.eval()
