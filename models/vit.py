"""Vision Transformer classifier (arXiv 2010.11929) with the readouts that go with
masked-autoencoder pretraining.

Shapes: `B` batch, `N` patches, `T` tokens (patches and class token), `D` width, `C` channels.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from models.blocks import (
    LAYER_NORM_EPS,
    Block,
    PatchEmbed,
    encoder_blocks,
    init_linears,
    init_patch_embed,
    patchify,
)
from models.pos_embed import sincos_pos_embed
from models.spec import ClassifierSpec, pair


class VisionTransformer(nn.Module):
    """ViT classifier with the readouts that go with masked-autoencoder pretraining.

    Args:
        img_size, patch_size: pixels, an int or (H, W); the patch divides the image.
        in_chans: image channels, any number.
        num_classes: outputs of the head; with 0 there is none, and the output is the feature.
        embed_dim, depth, num_heads, mlp_ratio: width, blocks, heads, MLP width over embed_dim.
        class_token: a learned token precedes the patches.
        global_pool: "avg", the mean over the patch tokens, or "token", the class token.
        fc_norm: "avg" only. True: mean, then `fc_norm` (no `norm`). False: `norm` on each token,
            then the mean. None is True for "avg".
        drop_path_rate: stochastic depth (arXiv 1603.09382) of the last block, rising linearly from
            0.

    Raises: InputError for a geometry or readout that cannot be.
    """

    def __init__(self, **fields: Any):
        super().__init__()
        self.spec = spec = ClassifierSpec(**fields).checked()
        self.patch_size = pair(spec.patch_size)
        self.grid_size = spec.grid_size
        self.global_pool = spec.global_pool

        width = spec.embed_dim
        self.patch_embed = PatchEmbed(spec)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if spec.class_token else None
        self.pos_embed = nn.Parameter(sincos_pos_embed(width, spec.grid_size, spec.class_token))
        self.blocks = encoder_blocks(spec, spec.drop_path_rate)
        fresh_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.norm: nn.Module = nn.Identity() if spec.fc_norm else fresh_norm
        self.fc_norm: nn.Module = fresh_norm if spec.fc_norm else nn.Identity()
        self.head: nn.Module = nn.Identity()
        if spec.num_classes:
            self.head = nn.Linear(width, spec.num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        init_linears(self, partial(trunc_normal_, std=0.02))
        init_patch_embed(self.patch_embed)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)

    def _embed(self, images: Tensor) -> Tensor:
        x = self.patch_embed(patchify(images, self.patch_size))  # (B, N, D)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, 1 + N, D)
        return x + self.pos_embed  # (B, T, D)

    def _pool(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.global_pool == "token":
            return x[:, 0]  # (B, D)
        patches = x if self.cls_token is None else x[:, 1:]  # (B, N, D)
        return self.fc_norm(patches.mean(dim=1))  # (B, D)

    def forward_features(self, images: Tensor) -> Tensor:
        """The pooled, normalised feature that the head sees: `(B, C, H, W)` -> `(B, D)`."""
        x = self._embed(images)
        for block in self.blocks:
            x = block(x)
        return self._pool(x)

    def forward(self, images: Tensor) -> Tensor:
        """Logits: `(B, C, H, W)` float, already normalised -> `(B, num_classes)`."""
        return self.head(self.forward_features(images))

    def forward_with_attention(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits `(B, num_classes)` and the attention weights of each block, `(B, heads, T, T)`.

        Gradients flow through both.
        """
        layers = list(self._attend(self._embed(images)))
        return self.head(self._pool(layers[-1][0])), [attention for _, attention in layers]

    def iterate_attention(self, images: Tensor) -> Iterator[Tensor]:
        """The attention weights of each block, `(B, heads, T, T)`, while only one is in memory."""
        for _, attention in self._attend(self._embed(images)):
            yield attention

    def attention_maps(self, images: Tensor) -> list[Tensor]:
        """The attention weights of all blocks, `(B, heads, T, T)` each."""
        return list(self.iterate_attention(images))

    def _attend(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens `(B, T, D)` after each block, and the block's attention `(B, heads, T, T)`."""
        for block in self.blocks:
            assert isinstance(block, Block)
            x, attention = block.forward_with_attention(x)
            yield x, attention
