"""What a model in training is worth, told without labels: its loss on held-out images under fixed
masks, and how many directions its features use.

The images are cropped, flipped and masked as in training, by draws that are the same at each
measurement, so that the loss stands beside the training's own.

Shapes: `n` images, `D` width, `B` images of a batch, `C` channels, `N` patches.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from data.loader import Batch, PretrainDataset, collate
from data.sampler import SampleKey
from data.sources import ImageSource
from engine.evaluation.features import on_pixels
from models.build import encoder_of
from models.mae import MaskedAutoencoder
from util.settings.pretrain import PretrainConfig

BATCH = 32  # images; the result does not depend on the batches of the training
EPSILON = 1e-7  # added to each share of the singular values, as in the paper
DEAD = 0.01  # standard deviation of a dead dimension at most, over the features' root mean square
logger = logging.getLogger(__name__)


def fixed_batches(
    dataset: PretrainDataset, source: ImageSource, indices: Sequence[int]
) -> list[Batch]:
    """The images of `source` at these indices, cropped and masked as samples of `dataset`, each
    with its own mask. Files that cannot be decoded are left out, with a line in the log."""
    fixed = replace(dataset, source=source, aug_repeats=1, shared_mask=False)
    fixed.max_replacements = 0
    samples = [fixed[SampleKey(index, 0, place, 0)] for place, index in enumerate(indices)]
    for path, reason in (bad for sample in samples for bad in sample.bad):
        logger.warning("the monitor's gauges leave out %s: %s", path, reason)
    good = [sample for sample in samples if not sample.bad]
    return [collate(good[start : start + BATCH]) for start in range(0, len(good), BATCH)]


@torch.no_grad()
def measure(
    model: MaskedAutoencoder, batches: Sequence[Batch], cfg: PretrainConfig, device: torch.device
) -> tuple[float, Tensor]:
    """The mean loss over all images of `batches`, as the training counts it, and their pooled
    features `(n, D)` float32 on the CPU. Neither depends on the number of processes."""
    encoder = encoder_of(model)
    total, features = 0.0, []
    for batch in batches:
        # `forward` itself is not compiled, for another shape of batches
        loss_of = partial(
            model.forward, ids_shuffle=batch.targets.to(device), visible_weight=cfg.visible_weight
        )
        loss = on_pixels(loss_of, cfg, cfg.precision, device)(batch.images)
        total += loss.item() * len(batch.images)
        found = on_pixels(encoder.forward_features, cfg, cfg.precision, device)(batch.images)
        features.append(found.float().cpu())  # (B, D)
    rows = torch.cat(features)  # (n, D)
    return total / len(rows), rows


def effective_rank(features: Tensor) -> float:
    """RankMe: the exponential of the entropy of the singular values of `features` `(n, D)` as
    shares of their sum, from 1 to min(n, D); NaN where a feature is not finite.

    Source: arXiv 2210.02885, equation 1.
    """
    if not features.isfinite().all():
        return float("nan")
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum() + EPSILON
    return (-shares * shares.log()).sum().exp().item()


def dead_share(features: Tensor) -> float:
    """Share in percent of the dimensions of `features` `(n, D)` that hardly differ between images:
    their standard deviation is at most DEAD times the root mean square of all features."""
    rows = features.double()
    alive = rows.std(dim=0, correction=0) > DEAD * rows.square().mean().sqrt()  # (D,)
    return 100 * (~alive).double().mean().item()
