"""Transformer blocks (arXiv 2010.11929) that encoder, decoder and classifier share, and patches as
vectors.

Pre-norm blocks, one qkv projection with bias, exact GELU, LayerNorm eps 1e-6; equal to timm's
`Block` (tested). Patches are embedded as vectors, not by a convolution, so that a masked
autoencoder can embed only those it keeps.

Shapes: `B` batch, `N` patches, `T` tokens (class tokens and patches), `D` width, `P` patch side,
`C` channels.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.spec import EncoderSpec, pair

LAYER_NORM_EPS = 1e-6
# On CPU the fused kernel's backward is several times slower in bf16 and fp16, and its memory saving
# only matters on long sequences.
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
        self.proj = nn.Conv2d(
            spec.in_chans, spec.embed_dim, kernel_size=spec.patch_size, stride=spec.patch_size
        )

    def forward(self, patches: Tensor) -> Tensor:
        """`(B, N, P*P*C)` in (p, p, c) order -> `(B, N, D)`, for any subset of an image's
        patches."""
        weight = self.proj.weight
        # With one channel both are the same; after a transposition DistributedDataParallel would
        # warn of the strides of the gradient.
        weight = (
            weight.flatten(1) if weight.shape[1] == 1 else rearrange(weight, "d c p q -> d (p q c)")
        )
        return F.linear(patches, weight, self.proj.bias)  # (B, N, D)


def attend(q: Tensor, k: Tensor, v: Tensor, maps: list[Tensor] | None = None) -> Tensor:
    """Scaled dot-product attention (arXiv 1706.03762, equation 1), by the path that is fastest on
    the device at this length.

    `(B, heads, T, d)`, two of `(B, heads, S, d)` -> `(B, T, D)`. The attention weights `(B, heads,
    T, S)` are added to `maps`, with their graph.
    """
    scale = q.shape[-1] ** -0.5
    slow = q.device.type == "cpu" and q.itemsize < 4 and k.shape[2] < CPU_FUSED_FROM_TOKENS
    if maps is None and not slow:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        # The scale is part of the product: a scaled copy of q would be kept for the gradient.
        queries, keys = q.flatten(0, 1), k.flatten(0, 1)
        scores = torch.baddbmm(q.new_zeros(()), queries, keys.mT, beta=0, alpha=scale)
        attention = scores.softmax(dim=-1).view(*q.shape[:-1], -1)  # (B, heads, T, S)
        if maps is not None:
            maps.append(attention)
        out = attention.to(v.dtype) @ v
    return rearrange(out, "b h t d -> b t (h d)")  # (B, T, D)


def attend_in_windows(
    q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], window_size: int
) -> Tensor:
    """Attention within windows of `window_size` patches on a side, which begin at the top left.

    Windows at the bottom and the right have what is left of the grid: nothing is padded. Each class
    token, before the patches, has a copy in each window; the copies' outputs are averaged.

    Three of `(B, heads, T, d)` -> `(B, T, D)`.

    Source: window attention of ViTDet (arXiv 2203.16527, section 3), which pads.
    """
    batch, first = len(q), q.shape[2] - grid[0] * grid[1]  # class tokens
    maps = [t[:, :, first:].unflatten(2, grid) for t in (q, k, v)]  # (B, heads, h, w, d)
    tokens, strips = [], []
    for rows in _equal_windows(grid[0], window_size):
        strip = []
        for columns in _equal_windows(grid[1], window_size):
            parts = [x[:, :, rows, columns] for x in maps]
            sides = [min(window_size, side) for side in parts[0].shape[2:4]]
            windows = [
                rearrange(x, "b n (i r) (j c) d -> (b i j) n (r c) d", r=sides[0], c=sides[1])
                for x in parts
            ]
            count = len(windows[0]) // batch
            copies = [t[:, :, :first].repeat_interleave(count, dim=0) for t in (q, k, v)]
            seen = [torch.cat(both, dim=2) for both in zip(copies, windows, strict=True)]
            out = attend(seen[0], seen[1], seen[2])  # (B * windows, tokens of one, D)
            tokens.append(out[:, :first].unflatten(0, (batch, count)))  # (B, windows, class, D)
            across = parts[0].shape[3] // sides[1]
            strip.append(
                rearrange(
                    out[:, first:],
                    "(b i j) (r c) d -> b (i r) (j c) d",
                    b=batch,
                    j=across,
                    r=sides[0],
                )
            )
        strips.append(torch.cat(strip, dim=2))  # (B, rows, w, D)
    patches = torch.cat(strips, dim=1).flatten(1, 2)  # (B, N, D)
    return torch.cat([torch.cat(tokens, dim=1).mean(dim=1), patches], dim=1)  # (B, T, D)


def _equal_windows(side: int, window_size: int) -> list[slice]:
    """A side of the grid as a part that whole windows fill, and what is left, if anything is."""
    whole = side - side % window_size
    return [part for part in (slice(0, whole), slice(whole, side)) if part.start < part.stop]


class Attention(nn.Module):
    """Multi-head attention of the tokens to one another, or with `cross` to a memory. With the
    attribute `window_size` set it is within windows of the grid of patches."""

    def __init__(self, dim: int, num_heads: int, cross: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.window_size: int | None = None
        if cross:
            self.q = nn.Linear(dim, dim)
            self.kv = nn.Linear(dim, 2 * dim)
        else:
            self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        maps: list[Tensor] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """`(B, T, D)`, with `cross` also the memory `(B, S, D)` -> `(B, T, D)`. With windows it
        needs the `grid`, rows and columns of patches, and has no maps."""
        # each of q, k, v: (B, heads, T or S, D / heads)
        if memory is None:
            q, k, v = rearrange(
                self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.num_heads
            )
        else:
            q = rearrange(self.q(x), "b t (h d) -> b h t d", h=self.num_heads)
            k, v = rearrange(
                self.kv(memory), "b s (two h d) -> two b h s d", two=2, h=self.num_heads
            )
        if self.window_size is not None:
            assert grid is not None and maps is None
            return self.proj(attend_in_windows(q, k, v, grid, self.window_size))  # (B, T, D)
        return self.proj(attend(q, k, v, maps))  # (B, T, D)


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training a sample's residual branch is 0 with
    probability `drop_prob`, and else scaled so that its mean stays; timm's draws (tested)."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """`(B, ...)` -> `(B, ...)`."""
        if not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        kept = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(keep_prob)  # (B, 1, ...)
        return x * kept.div_(keep_prob)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    With `cross` it is the block of a cross-attention decoder: the tokens are queries that attend to
    a memory, which is not normalised, and not to one another. Source: arXiv 2401.14391, section
    3.2; which of the encoder's layers the memory is made of is `models/mae.py`'s.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path: float = 0.0,
        cross: bool = False,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads, cross)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, dim))
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        maps: list[Tensor] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """`(B, T, D)`, with `cross` also the memory `(B, S, D)` -> `(B, T, D)`; `maps` and `grid`
        as `Attention`."""
        x = x + self.drop_path(self.attn(self.norm1(x), memory, maps, grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    """What all models share: the patch projection, the class tokens and the blocks.

    Stochastic depth rises linearly from 0 to `drop_path_rate`. With the attribute `checkpointing`
    set, blocks keep nothing for the gradient and are computed again in the backward pass.
    """

    def __init__(self, spec: EncoderSpec, drop_path_rate: float = 0.0):
        super().__init__()
        self.img_size = pair(spec.img_size)
        self.patch_size = pair(spec.patch_size)
        self.grid_size = spec.grid_size
        self.checkpointing = False
        width = spec.embed_dim
        self.patch_embed = PatchEmbed(spec)
        self.class_tokens = spec.class_tokens
        self.cls_token = (
            nn.Parameter(torch.zeros(1, spec.class_tokens, width)) if spec.class_tokens else None
        )
        rates = [drop_path_rate * i / max(spec.depth - 1, 1) for i in range(spec.depth)]
        self.blocks = nn.ModuleList(
            Block(width, spec.num_heads, spec.mlp_ratio, rate) for rate in rates
        )

    def run_blocks(
        self,
        blocks: Iterable[nn.Module],
        x: Tensor,
        memory: Tensor | None = None,
        maps: list[Tensor] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Tokens `(B, T, D)` through blocks one after the other, by `checkpointing` unless the
        attention weights are asked for; `memory`, `maps` and `grid` as `Block` takes them."""
        for block in blocks:
            if self.checkpointing and maps is None:
                # a block that drops paths must drop the same ones when it is computed again
                draws = block.training and not isinstance(block.drop_path, nn.Identity)
                given = (x, memory, None, grid)
                x = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=draws)
            else:
                x = block(x, memory, maps, grid)
        return x


def init_weights(
    model: Encoder, draw: Callable[[Tensor], object] = nn.init.xavier_uniform_
) -> None:
    """Draws the weights of all Linear layers, in their order; biases are zero, tokens normal with
    std 0.02. The default is the public MAE's.

    The patch projection is xavier-uniform on its `(D, C*P*P)` view: it acts as a linear layer.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            draw(parameter)
    nn.init.xavier_uniform_(model.patch_embed.proj.weight.flatten(1))
    for token in (getattr(model, "mask_token", None), model.cls_token):
        if token is not None:
            nn.init.normal_(token, std=0.02)
