"""The three pretraining steps that are compared, of this project's model and of the peer's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.optim import build_adamw, optimizer_step, param_groups
from models.mae import MaskedAutoencoder


class Shape(NamedTuple):
    """A pretraining step: sides in pixels, then the encoder's and the decoder's width, depth and
    heads."""

    batch: int
    img_size: int
    patch_size: int
    encoder: tuple[int, int, int]
    decoder: tuple[int, int, int]


SHAPES = {
    "small/16": Shape(32, 224, 16, (384, 12, 6), (192, 4, 3)),
    "base/16": Shape(8, 224, 16, (768, 12, 12), (512, 8, 16)),
    "192/4 at 32": Shape(256, 32, 4, (192, 12, 3), (96, 2, 3)),
}
CROSS = {"decoder": "cross", "pred_ratio": 0.25}


def build(shape: Shape, **decoder: Any) -> MaskedAutoencoder:
    """Our model of a shape."""
    torch.manual_seed(0)
    width, depth, heads = shape.encoder
    decoder_width, decoder_depth, decoder_heads = shape.decoder
    return MaskedAutoencoder(
        img_size=shape.img_size,
        patch_size=shape.patch_size,
        in_chans=3,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=4.0,
        class_token=True,
        decoder_embed_dim=decoder_width,
        decoder_depth=decoder_depth,
        decoder_num_heads=decoder_heads,
        decoder_class_token=True,
        mask_ratio=0.75,
        norm_pix_loss=True,
        **decoder,
    )


def build_peer(shape: Shape, attention: str) -> nn.Module | None:
    """The peer's model of a shape; None where it is not installed."""
    try:
        from transformers import AutoModelForPreTraining, ViTMAEConfig
    except ImportError:
        return None
    width, depth, heads = shape.encoder
    decoder_width, decoder_depth, decoder_heads = shape.decoder
    config = ViTMAEConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=shape.img_size,
        patch_size=shape.patch_size,
        decoder_hidden_size=decoder_width,
        decoder_num_hidden_layers=decoder_depth,
        decoder_num_attention_heads=decoder_heads,
        decoder_intermediate_size=4 * decoder_width,
        mask_ratio=0.75,
        norm_pix_loss=True,
    )
    return AutoModelForPreTraining.from_config(config, attn_implementation=attention)


def loss_fn_of(
    model: nn.Module, shape: Shape, dtype: torch.dtype | None, wrapped: nn.Module | None = None
) -> Callable[[], Tensor]:
    """The loss on one batch, as a function; `wrapped` is `model` in DDP."""
    images = torch.randn(shape.batch, 3, shape.img_size, shape.img_size)
    ids = torch.rand(shape.batch, (shape.img_size // shape.patch_size) ** 2).argsort(dim=1)
    ours, call = isinstance(model, MaskedAutoencoder), wrapped or model

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            return call(images, ids) if ours else call(images).loss

    return loss


def step_of(
    model: nn.Module, shape: Shape, dtype: torch.dtype | None, wrapped: nn.Module | None = None
) -> Callable[[], None]:
    """Forward, backward and fused AdamW on one batch, as a function."""
    loss_of = loss_fn_of(model, shape, dtype, wrapped)
    if isinstance(model, MaskedAutoencoder):
        optimizer = build_adamw(param_groups(model, 0.05), 0.9, 0.95)
    else:
        optimizer = torch.optim.AdamW(
            model.parameters(), weight_decay=0.05, betas=(0.9, 0.95), fused=True
        )
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step() -> None:
        loss_of().backward()
        optimizer_step(optimizer, scaler, clip_grad=None)

    return step
