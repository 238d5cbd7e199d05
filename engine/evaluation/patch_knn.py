"""Segmentation by the nearest patches of training images: cosine similarity, weighted averages.

A memory holds patches of training images, each with its feature and the share of each class among
its pixels that count. A patch of a validation image takes the average of the shares of its k
nearest in the memory, with weights exp(similarity / temperature), and the pixels lie between the
patches. One search serves every k, in the order of `knn.py`. Every process holds the whole memory,
whose size does not depend on the number of images.

Source: the idea, arXiv 2306.01667.

Shapes: `B` batch, `C` classes, `D` width, `R` patches in the memory, `Q` queries, `K` neighbours,
`H` and `W` height and width of an image as the model takes it, `h` and `w` in patches.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from data.annotated import IGNORED, AnnotatedSource, AnnotatedSubset
from engine.evaluation.features import check_finite
from engine.evaluation.knn import nearest_keys, neighbours
from engine.evaluation.segmentation import segmented
from engine.run.folder import Run
from models.vit import VisionTransformer
from util.dist import gather_rows
from util.errors import InputError
from util.rng import PATCHES, generator
from util.settings.evaluation import KnnConfig


class Memory(NamedTuple):
    """Features `(R, D)` of patches, and the share of each class among their pixels `(R, C)`."""

    features: Tensor
    shares: Tensor


def build_memory(
    cfg: KnnConfig, run: Run, model: VisionTransformer, source: AnnotatedSource
) -> Memory:
    """`cfg.memory_patches` patches of `source`, of each image as many, within one, chosen among
    those with pixels that count; all of an image's patches if it has fewer. On the run's device.

    The choice is a pure function of the seed and the images. All processes must call, and all get
    the same.

    Raises: DataError if an image or its mask cannot be read; InputError if a feature is not finite
        or no pixel counts.
    """
    wanted = patches_of_images(len(source), cfg.memory_patches, cfg.seed)
    chosen = AnnotatedSubset(source, np.flatnonzero(wanted))
    num_classes, most, processes = len(source.class_names), int(wanted.max()), run.processes
    share = len(range(processes.rank, len(chosen), processes.world_size))
    features = torch.zeros(share, most, model.spec.embed_dim)
    shares = torch.full((share, most, num_classes), torch.nan)  # where there is no patch
    for sample, windows in segmented(cfg, run, chosen, model.forward_map):
        height, width = sample.image.shape[-2:]
        mask = F.interpolate(  # float32 holds the classes exactly
            sample.target["mask"][None, None].float(), (height, width), mode="nearest-exact"
        )[0, 0].long()
        of_patches = torch.cat([of.logits[0].flatten(1).T for of in windows]).float().cpu()
        counts = torch.cat(
            [
                class_counts(mask[of.rows, of.columns], of.logits.shape[-2:], num_classes)
                for of in windows
            ]
        )
        index = int(chosen.indices[sample.number])
        candidates = counts.sum(dim=1).nonzero()[:, 0]
        order = torch.randperm(len(candidates), generator=generator(cfg.seed, PATCHES, index))
        picked = candidates[order[: wanted[index]].sort().values]
        place = sample.number // processes.world_size
        features[place, : len(picked)] = of_patches[picked]
        shares[place, : len(picked)] = counts[picked] / counts[picked].sum(dim=1, keepdim=True)
    check_finite(features)
    features, shares = (gather_rows(rows, len(chosen)).flatten(0, 1) for rows in (features, shares))
    is_there = ~shares.isnan().any(dim=1)
    if not is_there.any():
        raise InputError("no pixel of the training masks counts: there are no neighbours")
    return Memory(features[is_there].to(run.device), shares[is_there].to(run.device))


def patches_of_images(num_images: int, num_patches: int, seed: int) -> np.ndarray:
    """How many patches each image gives to a memory of `num_patches`, `(num_images,)` int64."""
    wanted = np.full(num_images, num_patches // num_images)
    order = torch.randperm(num_images, generator=generator(seed, PATCHES)).numpy()
    wanted[order[: num_patches % num_images]] += 1
    return wanted


def class_counts(mask: Tensor, grid: tuple[int, int] | torch.Size, num_classes: int) -> Tensor:
    """The pixels of each class in each patch, `(H, W)` -> `(h * w, C)` int64."""
    pixels = rearrange(mask, "(h p) (w q) -> (h w) (p q)", h=grid[0], w=grid[1])
    places = torch.arange(len(pixels))[:, None] * num_classes + pixels
    counts = places[pixels != IGNORED].bincount(minlength=len(pixels) * num_classes)
    return counts.view(len(pixels), num_classes)


def by_neighbours(
    model: VisionTransformer, memory: Memory, ks: tuple[int, ...], temperature: float
) -> Callable[[Tensor], Tensor]:
    """A function of normalised images `(B, channels, H, W)`: for each k the average shares of the
    neighbours of their patches, `(number of ks, B, C, h, w)` float32."""

    def predict(images: Tensor) -> Tensor:
        features = model.forward_map(images).float()  # (B, D, h, w)
        rows = rearrange(features, "b d h w -> (b h w) d")
        with torch.autocast(images.device.type, enabled=False):
            found = average_shares(rows, memory, ks, temperature)  # (number of ks, Q, C)
        size = features.shape[-2:]
        found = rearrange(found, "k (b h w) c -> k b c h w", h=size[0], w=size[1])
        return found.to(images.device)

    return predict


def average_shares(
    queries: Tensor, memory: Memory, ks: tuple[int, ...], temperature: float
) -> Tensor:
    """For each k the average shares of the k nearest, `(Q, D)` -> `(number of ks, Q, C)` float32.
    A k above the size of the memory takes all of it."""
    most = min(max(ks), len(memory.features))
    places = torch.arange(len(memory.features))
    keys = nearest_keys(memory.features, places, F.normalize(queries, dim=1), most)  # (Q, K)
    nearest, weights = neighbours(keys, temperature)
    shares = memory.shares.to(keys.device)
    # one after the other, so that the sums do not depend on threads
    total = torch.zeros(len(queries), shares.shape[1], dtype=torch.float64, device=keys.device)
    weight = total[:, :1].clone()
    found: dict[int, Tensor] = {}
    for place in range(most):
        total += weights[:, place, None] * shares[nearest[:, place]]
        weight += weights[:, place, None]
        if place + 1 in (*ks, most):
            found[place + 1] = (total / weight).float()
    return torch.stack([found[min(k, most)] for k in ks])
