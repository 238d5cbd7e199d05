"""Vision Transformer classifier (arXiv 2010.11929) with the readouts that go with
masked-autoencoder pretraining.

Shapes: `B` batch, `N` patches, `T` tokens (class tokens and patches), `D` width, `C` channels.
"""

import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from models.blocks import LAYER_NORM_EPS, Encoder, init_weights, patchify
from models.heads.attentive import AttentivePool
from models.pos_embed import resize_pos_embed, sincos_pos_embed
from models.spec import ClassifierSpec, EncoderSpec, checked_spec


class PatchEncoder(Encoder):
    """An encoder of all patches of an image, with its positions.

    Images may have any size that the patches divide: positions are resized to their grid.
    """

    def __init__(self, spec: EncoderSpec, drop_path_rate: float):
        super().__init__(spec, drop_path_rate)
        positions = sincos_pos_embed(spec.embed_dim, spec.grid_size, spec.class_tokens)
        self.pos_embed = nn.Parameter(positions)

    def _embed(self, images: Tensor) -> Tensor:
        x = self.patch_embed(patchify(images, self.patch_size))  # (B, N, D)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, T, D)
        return x + self._positions(self.grid_of(images))  # (B, T, D)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """The positions for a grid of patches, `(1, T, D)`."""
        if grid == self.grid_size:
            return self.pos_embed
        return resize_pos_embed(self.pos_embed, self.grid_size, grid, self.class_tokens)

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of `(B, C, H, W)`."""
        return images.shape[-2] // self.patch_size[0], images.shape[-1] // self.patch_size[1]

    def _as_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens `(B, T, D)` without the class tokens as a map `(B, D, rows, columns)`."""
        patches = x[:, self.class_tokens :]  # (B, N, D)
        return patches.mT.unflatten(2, grid)  # (B, D, rows, columns)


class VisionTransformer(PatchEncoder):
    """ViT classifier with the readouts that go with masked-autoencoder pretraining.

    Args:
        img_size, patch_size: pixels, an int or (H, W); the patch divides the image.
        in_chans: image channels, any number.
        num_classes: outputs of the head; with 0 there is none, and the output is the feature.
        embed_dim, depth, num_heads, mlp_ratio: width, blocks, heads, MLP width over embed_dim.
        class_tokens: number of learned tokens that precede the patches.
        global_pool: "avg", the mean over the patch tokens, "token", that over the class tokens, or
            "attentive", what learned queries gather from the patch tokens.
        fc_norm: not with "token". True: mean, then `fc_norm` (no `norm`). False: `norm` on each
            token, then the mean. None is True for "avg". "attentive" has one norm on each token.
        drop_path_rate: stochastic depth (arXiv 1603.09382) of the last block, rising linearly from
            0.
        probe_queries, probe_dim: "attentive" only: number of queries, and width of what they
            gather together, which is that of the feature.
        last_norm: False has neither `norm` nor `fc_norm`.

    Raises: InputError for a geometry or readout that cannot be.
    """

    def __init__(self, **fields: Any):
        spec = checked_spec(ClassifierSpec, fields)
        super().__init__(spec, spec.drop_path_rate)
        self.spec = spec
        self.global_pool = spec.global_pool
        width = spec.embed_dim
        norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        has_norm = spec.last_norm and not spec.fc_norm
        self.norm: nn.Module = norm if has_norm else nn.Identity()
        self.fc_norm: nn.Module = norm if spec.fc_norm else nn.Identity()
        self.pool = None
        if spec.probe_queries and spec.probe_dim:
            self.pool = AttentivePool(width, spec.probe_dim, spec.probe_queries)
            width = spec.probe_dim
        self.head: nn.Module = (
            nn.Linear(width, spec.num_classes) if spec.num_classes else nn.Identity()
        )
        init_weights(self, draw_normal)

    def _pool(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.global_pool == "token":
            return x[:, : self.class_tokens].mean(dim=1)  # (B, D)
        patches = x[:, self.class_tokens :]  # (B, N, D)
        if self.pool is not None:
            return self.pool(self.fc_norm(patches))  # (B, E)
        return self.fc_norm(patches.mean(dim=1))  # (B, D)

    def forward_features(self, images: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """The pooled, normalised feature that the head sees: `(B, C, H, W)` -> `(B, D)`, or for
        the "attentive" readout `(B, probe_dim)`.

        The attention weights of each block, `(B, heads, T, T)`, are added to `maps`.
        """
        return self._pool(self.run_blocks(self.blocks, self._embed(images), maps=maps))

    def forward_layers(self, images: Tensor, layers: Collection[int]) -> Tensor:
        """The feature as `forward_features` has it of the tokens after each of these blocks, which
        are counted from 0: `(B, C, H, W)` -> `(layers, B, D)`, in the order of the blocks."""
        tokens = enumerate(self.iterate_tokens(images))
        return torch.stack([self._pool(x) for number, x in tokens if number in layers])

    def forward_map(self, images: Tensor) -> Tensor:
        """The normalised feature of each patch, `(B, C, H, W)` -> `(B, D, rows, columns)`, for
        images of any size that the patches divide.

        A classifier that reads the mean through `fc_norm` has no other norm: each patch passes it.
        """
        x = self.run_blocks(self.blocks, self._embed(images))
        return self._as_map(self.fc_norm(self.norm(x)), self.grid_of(images))

    def forward(self, images: Tensor) -> Tensor:
        """Logits: `(B, C, H, W)` float, already normalised -> `(B, num_classes)`."""
        return self.head(self.forward_features(images))

    def forward_with_attention(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits `(B, num_classes)` and the attention weights of each block, `(B, heads, T, T)`.

        Gradients flow through both.
        """
        maps: list[Tensor] = []
        return self.head(self.forward_features(images, maps)), maps

    def iterate_attention(self, images: Tensor) -> Iterator[Tensor]:
        """The attention weights of each block, `(B, heads, T, T)`, while only one is in memory."""
        maps: list[Tensor] = []
        x = self._embed(images)
        for block in self.blocks:
            x = block(x, maps=maps)
            yield maps.pop()

    def iterate_tokens(self, images: Tensor) -> Iterator[Tensor]:
        """The tokens `(B, T, D)` after each block, before any norm."""
        x = self._embed(images)
        for block in self.blocks:
            x = block(x)
            yield x

    def attention_maps(self, images: Tensor) -> list[Tensor]:
        """The attention weights of all blocks, `(B, heads, T, T)` each."""
        return self.forward_with_attention(images)[1]


@torch.no_grad()
def draw_normal(weight: Tensor) -> None:
    """Draws from a normal distribution with std 0.02, truncated at -2 and 2, by the inverse of its
    distribution function; timm's draws (tested)."""
    weight.uniform_(-1, 1).erfinv_().mul_(0.02 * math.sqrt(2)).clamp_(-2, 2)
