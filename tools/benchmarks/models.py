"""The three pretraining steps that are compared, of this project's model and of the peer's."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.optim import optimizer_step
from models.spec import MAESpec, pair


class Shape(NamedTuple):
    """A pretraining step: the images of its batch, and the model."""

    batch: int
    spec: MAESpec


def shape_of(
    batch: int,
    img_size: int,
    patch_size: int,
    encoder: tuple[int, int, int],
    decoder: tuple[int, int, int],
) -> Shape:
    """A step of the paper's model; `encoder` and `decoder` are width, depth and heads."""
    spec = MAESpec(
        img_size=img_size,
        patch_size=patch_size,
        in_chans=3,
        embed_dim=encoder[0],
        depth=encoder[1],
        num_heads=encoder[2],
        mlp_ratio=4.0,
        class_token=True,
        decoder_embed_dim=decoder[0],
        decoder_depth=decoder[1],
        decoder_num_heads=decoder[2],
        decoder_class_token=True,
        mask_ratio=0.75,
        norm_pix_loss=True,
    )
    return Shape(batch, spec)


SHAPES = {
    "small/16": shape_of(32, 224, 16, (384, 12, 6), (192, 4, 3)),
    "base/16": shape_of(8, 224, 16, (768, 12, 12), (512, 8, 16)),
    "192/4 at 32": shape_of(256, 32, 4, (192, 12, 3), (96, 2, 3)),
}


def build_peer(spec: MAESpec, attention: str) -> nn.Module | None:
    """The peer's model of a specification; None if transformers is not installed."""
    try:
        from transformers import AutoModelForPreTraining, ViTMAEConfig
    except ImportError:
        return None
    config = ViTMAEConfig(
        hidden_size=spec.embed_dim,
        num_hidden_layers=spec.depth,
        num_attention_heads=spec.num_heads,
        intermediate_size=4 * spec.embed_dim,
        image_size=spec.img_size,
        patch_size=spec.patch_size,
        decoder_hidden_size=spec.decoder_embed_dim,
        decoder_num_hidden_layers=spec.decoder_depth,
        decoder_num_attention_heads=spec.decoder_num_heads,
        decoder_intermediate_size=4 * spec.decoder_embed_dim,
        mask_ratio=spec.mask_ratio,
        norm_pix_loss=spec.norm_pix_loss,
    )
    return AutoModelForPreTraining.from_config(config, attn_implementation=attention)


def loss_fn_of(model: nn.Module, shape: Shape, dtype: torch.dtype | None) -> Callable[[], Tensor]:
    """The loss of either model on one batch, as a function."""
    images = torch.randn(shape.batch, 3, *pair(shape.spec.img_size))
    ids_shuffle = torch.rand(shape.batch, shape.spec.num_patches).argsort(dim=1)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            found = model(images, ids_shuffle)  # the peer takes them as the noise that it sorts
        return found if isinstance(found, Tensor) else found.loss

    return loss


def step_of(model: nn.Module, shape: Shape, dtype: torch.dtype | None) -> Callable[[], None]:
    """Forward, backward and fused AdamW on one batch, as a function."""
    loss_of = loss_fn_of(model, shape, dtype)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, weight_decay=0.05, betas=(0.9, 0.95), fused=True
    )
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step() -> None:
        loss_of().backward()
        optimizer_step(optimizer, scaler, clip_grad=None)

    return step
