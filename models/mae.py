"""Masked autoencoder (arXiv 2111.06377, section 3): encode the kept patches, decode all, predict
the removed ones.

The decoder works on the shuffled order [kept, removed], with positions gathered in that order:
attention does not care, and nothing has to be unshuffled in training. Only removed patches go
through the prediction head.

`decoder: cross` is the cheaper one of arXiv 2401.14391: queries of the predicted patches attend to
the encoder's output and not to one another, so that some of the removed patches are enough.

With `decoder_fusion` the decoder reads a learned mix of several encoder layers (`LayerFusion`); the
encoder itself stays a plain ViT.

Shapes: `B` batch, `N` patches, `K` kept patches, `D` width, `P` patch side, `C` channels; a `+`
before a token count stands for the class tokens if there are any.
"""

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import LAYER_NORM_EPS, Block, Encoder, init_weights, patchify
from models.pos_embed import sincos_pos_embed
from models.spec import MAESpec, checked_spec

# Beginnings of the names of the tensors that an encoder does not have.
DECODER_NAMES = ("decoder_", "mask_token")
TARGET_VAR_EPS = 1e-6  # added to a patch's variance under the root
# Radius of the low-pass filter over half the sampling rate: 40 of 112 periods at 224 pixels, as in
# the public configuration of arXiv 2303.02416.
PAPER_CUTOFF = 40 / 112


class LayerFusion(nn.Module):
    """What a decoder reads in place of the encoder's last layer: learned mixes of `count` layers,
    the first, the last, and evenly spaced ones between, each before the encoder's `norm`.

    For the standard decoder it is one mix, whose weights are a softmax and equal at the start, of
    the last layer and a linear projection of each other one. Source: arXiv 2308.00261, with the
    layers of its public configuration (of 12 and a count of 6: the 1st, 3rd, ..., 9th and 12th).

    For the cross decoder it is one mix for each decoder block, of layers as they are, with weights
    of any sign. Source: inter-block attention of arXiv 2401.14391, whose public code also mixes
    before a norm, a further one in each block; here it is the encoder's, which so is trained.
    """

    def __init__(self, spec: MAESpec):
        super().__init__()
        count, width = spec.decoder_fusion, spec.embed_dim
        between = (1 + spec.depth * place // count for place in range(count - 1))
        self.layers = [*between, spec.depth]  # counted from 1
        is_cross = spec.decoder == "cross"
        shape = (spec.decoder_depth, count) if is_cross else (count,)
        self.weight = nn.Parameter(torch.zeros(shape))
        self.proj = nn.ModuleList(
            nn.Linear(width, width) for _ in range(0 if is_cross else count - 1)
        )

    def forward(self, layers: list[Tensor]) -> Tensor:
        """`depth` outputs of blocks, each `(B, T, D)` -> `(B, T, D)`, or for the cross decoder one
        such mix for each of its blocks, `(L, B, T, D)`."""
        chosen = [layers[number - 1] for number in self.layers]
        if self.weight.ndim == 2:
            return torch.tensordot(self.weight, torch.stack(chosen), dims=1)  # (L, B, T, D)
        shares = self.weight.softmax(dim=0)
        mixed = shares[-1] * chosen[-1]
        for share, project, layer in zip(shares[:-1], self.proj, chosen[:-1], strict=True):
            mixed = mixed + share * project(layer)
        return mixed  # (B, T, D)


class MaskedAutoencoder(Encoder):
    """Asymmetric encoder-decoder that predicts the pixels of removed patches.

    Args:
        img_size, patch_size: pixels, an int or (H, W); the patch divides the image.
        in_chans: image channels, any number.
        embed_dim, depth, num_heads, mlp_ratio: of the encoder; `mlp_ratio` holds for the decoder
            too.
        class_tokens: number of learned tokens that go through the encoder with the kept patches.
        decoder_embed_dim, decoder_depth, decoder_num_heads: of the decoder.
        decoder_class_token: the class tokens go on through the decoder, as in the paper;
            otherwise they leave after `norm`.
        mask_ratio: share of the patches removed, in (0, 1).
        norm_pix_loss: the target is each patch normalised by its own mean and (unbiased) variance.
        decoder: "self", the paper's, or "cross".
        pred_ratio: "cross" only: share of all N patches that is predicted, drawn among the
            removed ones; None predicts all of those.
        decoder_fusion: number of encoder layers that the decoder reads a mix of; 0 reads the last.
        target: "pixels", or "lowpass", the image without high frequencies.
        target_cutoff: "lowpass" only: the highest frequency that stays, over half the sampling
            rate, in (0, 1]; None is the paper's 40 / 112.

    Raises: InputError for a geometry that cannot be.
    """

    def __init__(self, **fields: Any):
        spec = checked_spec(MAESpec, fields)
        super().__init__(spec)
        self.spec = spec
        self.in_chans = spec.in_chans
        self.num_patches = spec.num_patches
        self.num_kept = spec.num_kept
        self.norm_pix_loss = spec.norm_pix_loss
        self.decoder = spec.decoder
        self.pos_embed = nn.Buffer(
            sincos_pos_embed(spec.embed_dim, spec.grid_size, spec.class_tokens)
        )  # (1, N + class_tokens, D)
        self.norm = nn.LayerNorm(spec.embed_dim, eps=LAYER_NORM_EPS)

        width = spec.decoder_embed_dim
        self.decoder_embed = nn.Linear(spec.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Buffer(
            sincos_pos_embed(width, spec.grid_size, spec.decoder_class_tokens)
        )  # (1, N + decoder_class_tokens, decoder D)
        self.decoder_blocks = nn.ModuleList(
            Block(width, spec.decoder_num_heads, spec.mlp_ratio, cross=spec.decoder == "cross")
            for _ in range(spec.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(width, math.prod(self.patch_size) * spec.in_chans)
        self.decoder_fusion = LayerFusion(spec) if spec.decoder_fusion else None
        init_weights(self)

    def patchify(self, images: Tensor) -> Tensor:
        """`(B, C, H, W)` -> `(B, N, P*P*C)`, patches row-major, each vector in (p, p, c) order."""
        if images.shape[1:] != (self.in_chans, *self.img_size):
            raise ValueError(
                f"expected images (B, {self.in_chans}, {self.img_size[0]}, {self.img_size[1]}), "
                f"got {tuple(images.shape)}"
            )
        return patchify(images, self.patch_size)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """`(B, N, P*P*C)` -> `(B, C, H, W)`, the inverse of `patchify`."""
        h, (p, q) = self.grid_size[0], self.patch_size
        # (B, C, H, W)
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=p, q=q)

    def forward_encoder(self, patches: Tensor, ids_keep: Tensor) -> Tensor:
        """Encodes the kept patches: `(B, N, P*P*C)`, `(B, K)` -> normalised latent `(B, +K, D)`, or
        with fusion for a cross decoder one for each of its blocks, `(L, B, +K, D)`."""
        x = self.patch_embed(_gather(patches, ids_keep))  # (B, K, D)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, +K, D)
        x = x + self.pos_embed[0, _rows(ids_keep, self.class_tokens)]  # (B, +K, D)
        if self.decoder_fusion is None:
            return self.norm(self.run_blocks(self.blocks, x))  # (B, +K, D)
        layers = []
        for block in self.blocks:
            x = self.run_blocks([block], x)
            layers.append(x)
        return self.norm(self.decoder_fusion(layers))  # (B, +K, D) or (L, B, +K, D)

    def forward_decoder(self, latent: Tensor, ids_keep: Tensor, ids_pred: Tensor) -> Tensor:
        """Decodes the patches `ids_pred` `(B, M)` from `latent`, as `forward_encoder` returns it.

        The standard decoder needs all removed patches and returns the kept ones, then those:
        `(B, K+M, decoder D)`. The cross decoder treats each patch alone, so that `ids_pred` may be
        any patches, and returns only those: `(B, M, decoder D)`.
        """
        first = self.spec.decoder_class_tokens
        latent = latent[..., self.class_tokens - first :, :]  # (B, +K, D)
        embedded = self.decoder_embed(latent)  # (B, +K, decoder D)
        table = self.decoder_pos_embed[0]  # (N + first, decoder D)
        memory = embedded + table[_rows(ids_keep, first)]  # (B, +K, decoder D)
        # (B, M, decoder D)
        queries = self.mask_token.to(embedded.dtype) + table[ids_pred + first]
        if self.decoder == "cross" and self.decoder_fusion is not None:
            for block, of_block in zip(self.decoder_blocks, memory, strict=True):
                queries = self.run_blocks([block], queries, of_block)
            return queries
        if self.decoder == "cross":
            return self.run_blocks(self.decoder_blocks, queries, memory)
        x = torch.cat([memory, queries], dim=1)  # (B, +K+M, decoder D)
        return self.run_blocks(self.decoder_blocks, x)[:, first:]  # (B, K+M, ...)

    def target(self, patches: Tensor) -> Tensor:
        """What the head learns to predict for `(B, *, P*P*C)` patches: raw pixels, or normalised
        per patch."""
        if not self.norm_pix_loss:
            return patches
        # layer_norm is much faster than `var`. It divides by the root of the biased variance plus
        # `eps`; the unbiased one is a constant factor away.
        size = patches.shape[-1]
        share = (size - 1) / size
        return F.layer_norm(patches, (size,), eps=TARGET_VAR_EPS * share) * share**0.5

    def filtered(self, images: Tensor) -> Tensor:
        """The images that are predicted, `(B, C, H, W)`: these, or their low frequencies."""
        if self.spec.target == "pixels":
            return images
        return lowpass(images, self.spec.target_cutoff or PAPER_CUTOFF)

    def forward(
        self, images: Tensor, ids_shuffle: Tensor | None = None, visible_weight: float = 0.0
    ) -> Tensor:
        """Mean over predicted patches of the mean squared error per patch, a scalar (paper,
        "Reconstruction target"), plus `visible_weight` times the same mean over the kept patches
        (after arXiv 2402.03752).

        Args:
            images: `(B, C, H, W)` float, already normalised.
            ids_shuffle: `(B, N)` int64, a permutation of the patches whose first K are kept
                (`models/masks.py` draws it); None draws one per image from torch's global
                generator.
            visible_weight: at 0 the kept patches are not predicted, and cost nothing.
        """
        patches, ids_shuffle = self._prepare(images, ids_shuffle)
        kept, predicted = self.num_kept, self.spec.num_predicted
        ids_keep, ids_pred = ids_shuffle[:, :kept], ids_shuffle[:, kept : kept + predicted]
        # (B, M), or with the kept patches (B, K+M): those that the loss counts
        ids_loss = ids_shuffle[:, : kept + predicted] if visible_weight else ids_pred
        if self.decoder == "cross":  # the other decoder has the kept patches among its tokens
            ids_pred = ids_loss
        latent = self.forward_encoder(patches, ids_keep)
        decoded = self.forward_decoder(latent, ids_keep, ids_pred)[:, -ids_loss.shape[1] :]
        pred = self.decoder_pred(self.decoder_norm(decoded))  # (B, M or K+M, P*P*C)
        if self.spec.target == "lowpass":
            patches = self.patchify(self.filtered(images))  # (B, N, P*P*C)
        target = self.target(_gather(patches, ids_loss))  # (B, M or K+M, P*P*C)
        pred = pred.to(target.dtype)
        # All patches have the same size, so the mean of their means is the mean of all values.
        if not visible_weight:
            return F.mse_loss(pred, target)
        visible = F.mse_loss(pred[:, :kept], target[:, :kept])
        return F.mse_loss(pred[:, kept:], target[:, kept:]) + visible_weight * visible

    def reconstruct(
        self, images: Tensor, ids_shuffle: Tensor | None = None, num_kept: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predictions `(B, N, P*P*C)` for all patches in image order, and the mask `(B, N)`, 1 =
        removed.

        The first `num_kept` patches of `ids_shuffle` are kept; None is the model's own number.
        """
        patches, ids_shuffle = self._prepare(images, ids_shuffle)
        kept = self.num_kept if num_kept is None else num_kept
        if not 0 < kept < self.num_patches:
            raise ValueError(f"num_kept must be 1 to {self.num_patches - 1}, got {kept}")
        ids_keep = ids_shuffle[:, :kept]  # (B, K)
        latent = self.forward_encoder(patches, ids_keep)
        ids_pred = ids_shuffle if self.decoder == "cross" else ids_shuffle[:, kept:]
        # (B, N, decoder D), in shuffled order
        decoded = self.forward_decoder(latent, ids_keep, ids_pred)
        shuffled = self.decoder_pred(self.decoder_norm(decoded))  # (B, N, P*P*C)
        ids_restore = ids_shuffle.argsort(dim=1)  # (B, N)
        mask = (ids_restore >= kept).to(images.dtype)  # (B, N)
        return _gather(shuffled, ids_restore).to(images.dtype), mask

    def to_pixels(self, pred: Tensor, images: Tensor) -> Tensor:
        """Predictions `(B, N, P*P*C)` as normalised images `(B, C, H, W)`.

        For a normalised target the patches' mean and variance are taken from `images`: the model
        does not know them. With `target: lowpass` the result has no high frequencies either.
        """
        if self.norm_pix_loss:
            patches = self.patchify(self.filtered(images))  # (B, N, P*P*C)
            std = (patches.var(dim=-1, keepdim=True) + TARGET_VAR_EPS).sqrt()
            pred = pred * std + patches.mean(dim=-1, keepdim=True)
        return self.unpatchify(pred)  # (B, C, H, W)

    def _prepare(self, images: Tensor, ids_shuffle: Tensor | None) -> tuple[Tensor, Tensor]:
        """The patches `(B, N, P*P*C)`, and their order `(B, N)`, drawn where it is None."""
        if ids_shuffle is None:
            noise = torch.rand(images.shape[0], self.num_patches, device=images.device)
            ids_shuffle = noise.argsort(dim=1)
        return self.patchify(images), ids_shuffle


def lowpass(images: Tensor, cutoff: float) -> Tensor:
    """Images `(B, C, H, W)` without frequencies above `cutoff` times half the sampling rate, at any
    angle; the mean stays.

    Source: the ideal filter of arXiv 2303.02416, here centred on frequency zero, so that the result
    is real.
    """
    height, width = images.shape[-2:]
    # lengths of frequencies in periods per pixel (an ONNX graph has no fftfreq)
    rows = torch.arange(height, device=images.device)[:, None]
    rows = torch.minimum(rows, height - rows) / height  # (H, 1)
    columns = torch.arange(width // 2 + 1, device=images.device) / width  # (W // 2 + 1,)
    # safe against float noise of a frequency at the cut-off
    stays = rows.square() + columns.square() <= (cutoff / 2) ** 2 * (1 + 1e-5)  # (H, W // 2 + 1)
    return torch.fft.irfft2(torch.fft.rfft2(images) * stays, s=(height, width))  # (B, C, H, W)


def _gather(x: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` `(B, M)` of `x` `(B, N, F)`: `(B, M, F)`."""
    # Indexing copies whole rows, which is faster than `torch.gather` of single numbers. `len(x)`
    # would fix the batch of an exported model.
    return x[torch.arange(x.shape[0], device=x.device)[:, None], ids]


def _rows(ids: Tensor, class_tokens: int) -> Tensor:
    """The rows of a position table for the patches `ids` `(B, K)`, first those of the class tokens:
    `(B, +K)`."""
    first = torch.arange(class_tokens, device=ids.device).expand(ids.shape[0], -1)
    return torch.cat([first, ids + class_tokens], dim=1)
