"""Transformer blocks (arXiv 2010.11929) that encoder, decoder and classifier share, and patches as
vectors.

Pre-norm blocks, one qkv projection with bias, exact GELU, LayerNorm eps 1e-6; equal to timm's
`Block` (tested). Patches are embedded as vectors, not by a convolution, so that a masked
autoencoder can embed only those it keeps.

Shapes: `B` batch, `N` patches, `T` tokens (patches and class token), `D` width, `P` patch side, `C`
channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.spec import EncoderSpec, pair

LAYER_NORM_EPS = 1e-6
# On CPU the fused kernel's backward is several times slower on short sequences, and its memory
# saving only matters on long ones.
CPU_FUSED_FROM_TOKENS = 512


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cuts `(B, C, H, W)` into patches in row-major order: `(B, N, P*P*C)`, each vector in (p, p,
    c) order."""
    height, width = patch_size
    # (B, N, P*P*C)
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=height, q=width)


class PatchEmbed(nn.Module):
    """Linear projection of patch vectors; the weight keeps the convolution's shape of published
    checkpoints."""

    def __init__(self, spec: EncoderSpec):
        super().__init__()
        size = pair(spec.patch_size)
        self.proj = nn.Conv2d(spec.in_chans, spec.embed_dim, kernel_size=size, stride=size)

    def forward(self, patches: Tensor) -> Tensor:
        """`(B, N, P*P*C)` in (p, p, c) order -> `(B, N, D)`, for any subset of an image's
        patches."""
        weight = rearrange(self.proj.weight, "d c p q -> d (p q c)")
        return F.linear(patches, weight, self.proj.bias)  # (B, N, D)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`(B, heads, T, d)`, two of `(B, heads, S, d)` -> out `(B, heads, T, d)` and weights `(B,
    heads, T, S)`."""
    shape = (*q.shape[:-1], k.shape[2])
    # The scale is part of the product: a scaled copy of q would be kept for the gradient.
    queries, keys = q.flatten(0, 1), k.flatten(0, 1)
    scores = torch.baddbmm(q.new_zeros(()), queries, keys.mT, beta=0, alpha=scale)
    attention = scores.softmax(dim=-1).view(shape)
    return attention.to(v.dtype) @ v, attention


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The first half of `explicit_attention`, by the path that is fastest on the device at this
    length."""
    if q.device.type == "cpu" and k.shape[2] < CPU_FUSED_FROM_TOKENS:
        return explicit_attention(q, k, v, scale)[0]
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


class Attention(nn.Module):
    """Multi-head self-attention (arXiv 1706.03762, equation 1) with one projection for q, k and
    v."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(
            self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.num_heads
        )
        return q, k, v  # each (B, heads, T, D / heads)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, D)` -> `(B, T, D)`."""
        out = attend(*self._split(x), self.scale)
        return self.proj(rearrange(out, "b h t d -> b t (h d)"))  # (B, T, D)

    def forward_with_attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, and the attention weights `(B, heads, T, T)` with their graph."""
        out, attention = explicit_attention(*self._split(x), self.scale)
        return self.proj(rearrange(out, "b h t d -> b t (h d)")), attention


class CrossAttention(nn.Module):
    """Multi-head attention of queries to a memory (arXiv 1706.03762, equation 1)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """`(B, T, D)` queries, `(B, S, D)` memory -> `(B, T, D)`."""
        # each (B, heads, T or S, D / heads)
        q = rearrange(self.q(x), "b t (h d) -> b h t d", h=self.num_heads)
        k, v = rearrange(self.kv(memory), "b s (two h d) -> two b h s d", two=2, h=self.num_heads)
        out = rearrange(attend(q, k, v, self.scale), "b h t d -> b t (h d)")
        return self.proj(out)  # (B, T, D)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, D)` -> `(B, T, D)`."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, D)` -> `(B, T, D)`."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def forward_with_attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, and the attention weights `(B, heads, T, T)` with their graph."""
        attended, attention = self.attn.forward_with_attention(self.norm1(x))
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x))), attention


class CrossBlock(nn.Module):
    """Pre-norm block of a cross-attention decoder: x + cross(norm(x), memory), then x +
    mlp(norm(x)).

    The queries do not attend to one another. Source: arXiv 2401.14391, section 3.2, without its
    inter-block attention (each block choosing among the encoder's layers).
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = CrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """`(B, T, D)` queries, `(B, S, D)` memory -> `(B, T, D)`."""
        x = x + self.attn(self.norm1(x), memory)
        return x + self.mlp(self.norm2(x))


def encoder_blocks(spec: EncoderSpec, drop_path_rate: float = 0.0) -> nn.ModuleList:
    """The encoder's blocks; stochastic depth rises linearly from 0 to `drop_path_rate`."""
    rates = [drop_path_rate * i / max(spec.depth - 1, 1) for i in range(spec.depth)]
    return nn.ModuleList(
        Block(spec.embed_dim, spec.num_heads, spec.mlp_ratio, rate) for rate in rates
    )


def run_blocks(blocks: nn.ModuleList, x: Tensor, *memory: Tensor, checkpointing: bool) -> Tensor:
    """`x` through all blocks; with `checkpointing` each block is computed again for its gradient
    instead of kept."""
    for block in blocks:
        if checkpointing:  # no block draws here: stochastic depth belongs to the classifier
            x = checkpoint(block, x, *memory, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, *memory)
    return x


def init_linears(model: nn.Module, draw: Callable[[Tensor], Tensor]) -> None:
    """Draws the weights of all Linear layers in their order; their biases are zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            draw(module.weight)
            nn.init.zeros_(module.bias)


def init_patch_embed(patch_embed: PatchEmbed) -> None:
    """Xavier-uniform on the projection's `(D, C*P*P)` view, zero bias: it acts as a linear
    layer."""
    weight = patch_embed.proj.weight
    fan_in = weight[0].numel()
    bound = (6 / (fan_in + weight.shape[0])) ** 0.5
    nn.init.uniform_(weight, -bound, bound)
    assert patch_embed.proj.bias is not None
    nn.init.zeros_(patch_embed.proj.bias)


def init_for_pretraining(model: Any) -> None:
    """The initial weights of the public MAE: Linear xavier-uniform, biases zero, tokens normal with
    std 0.02."""
    init_linears(model, nn.init.xavier_uniform_)
    init_patch_embed(model.patch_embed)
    for name in ("mask_token", "cls_token"):
        if getattr(model, name, None) is not None:
            nn.init.normal_(getattr(model, name), std=0.02)
