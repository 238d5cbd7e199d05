"""Vision Transformer classifier (arXiv 2010.11929) with the readouts that go with
masked-autoencoder pretraining.

Shapes: `B` batch, `N` patches, `T` tokens (patches and class token), `D` width, `C` channels.
"""

from collections.abc import Iterator

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from models.blocks import LAYER_NORM_EPS, Block, PatchEmbed, init_patch_embed, patchify
from models.pos_embed import sincos_pos_embed
from models.spec import Size, pair, vit_problems
from util.errors import InputError


def readout_problems(
    global_pool: str, class_token: bool | None, fc_norm: bool | None = None
) -> list[str]:
    """What is wrong with a classifier's readout, one line each; None is not decided yet."""
    found = []
    if global_pool not in ("avg", "token"):
        found.append(f"global_pool must be avg or token, got {global_pool!r}")
    if global_pool == "token" and class_token is False:
        found.append("global_pool token reads the class token: it needs class_token true")
    if global_pool == "token" and fc_norm:
        found.append("fc_norm belongs to global_pool avg, got global_pool token")
    return found


class VisionTransformer(nn.Module):
    """ViT classifier with the readouts that go with masked-autoencoder pretraining.

    Args:
        img_size, patch_size: pixels, an int or (H, W); the patch divides the image.
        in_chans: image channels, any number.
        num_classes: outputs of the head.
        embed_dim, depth, num_heads, mlp_ratio: width, blocks, heads, MLP width over embed_dim.
        class_token: a learned token precedes the patches.
        global_pool: "avg", the mean over the patch tokens, or "token", the class token.
        fc_norm: "avg" only. True: mean, then `fc_norm` (no `norm`). False: `norm` on each token,
            then the mean. None is True for "avg".
        drop_path_rate: stochastic depth (arXiv 1603.09382) of the last block, rising linearly from
            0.

    Raises: InputError for a geometry or readout that cannot be.
    """

    def __init__(
        self,
        img_size: Size,
        patch_size: Size,
        in_chans: int,
        num_classes: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        class_token: bool,
        global_pool: str,
        fc_norm: bool | None = None,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        problems = vit_problems(img_size, patch_size, embed_dim, num_heads)
        problems += readout_problems(global_pool, class_token, fc_norm)
        if problems:
            raise InputError("; ".join(problems))
        self.patch_size = pair(patch_size)
        height, width = pair(img_size)
        self.grid_size = (height // self.patch_size[0], width // self.patch_size[1])
        self.global_pool = global_pool
        use_fc_norm = global_pool == "avg" if fc_norm is None else fc_norm

        self.patch_embed = PatchEmbed(self.patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.pos_embed = nn.Parameter(sincos_pos_embed(embed_dim, self.grid_size, class_token))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            [Block(embed_dim, num_heads, mlp_ratio, rate) for rate in rates]
        )
        self.norm: nn.Module = (
            nn.Identity() if use_fc_norm else nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        )
        self.fc_norm: nn.Module = (
            nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS) if use_fc_norm else nn.Identity()
        )
        self.head = nn.Linear(embed_dim, num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
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
        """Logits `(B, num_classes)` and, per block, the attention weights `(B, heads, T, T)` with
        their graph."""
        x = self._embed(images)
        attentions = []
        for block in self.blocks:
            assert isinstance(block, Block)
            x, attention = block.forward_with_attention(x)
            attentions.append(attention)
        return self.head(self._pool(x)), attentions

    def attention_maps(self, images: Tensor) -> list[Tensor]:
        """Per block, the attention weights `(B, heads, T, T)` with their graph."""
        return list(self.iterate_attention(images))

    def iterate_attention(self, images: Tensor) -> Iterator[Tensor]:
        """As `attention_maps`, one block after the other, so that not all of them are in memory."""
        x = self._embed(images)
        for block in self.blocks:
            assert isinstance(block, Block)
            x, attention = block.forward_with_attention(x)
            yield attention
