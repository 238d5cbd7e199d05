"""What fine-tuning does to a batch on the device: random erasing, mixup or cutmix, and the loss
that goes with them."""

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.evaluation.objective import Objective
from util.settings.evaluation import FinetuneConfig


class BatchMixer:
    """Erasing (arXiv 1708.04896), mixup (1710.09412) and cutmix (1905.04899) by timm.

    They draw from numpy, `random` and torch: seed all three per step (`util/rng.py`).
    """

    def __init__(self, cfg: FinetuneConfig, objective: Objective, device: torch.device):
        self.objective = objective
        self.label_smoothing = cfg.label_smoothing
        self.erase = self.mix = None
        if cfg.re_prob:
            from timm.data.random_erasing import RandomErasing  # here, as timm takes long to import

            self.erase = RandomErasing(
                cfg.re_prob, mode=cfg.re_mode, max_count=cfg.re_count, device=device
            )
        if cfg.mixup or cfg.cutmix:
            from timm.data import Mixup

            is_multiclass = objective.name == "multiclass"
            self.mix = Mixup(
                cfg.mixup,
                cfg.cutmix,
                switch_prob=cfg.mixup_switch_prob,
                label_smoothing=cfg.label_smoothing if is_multiclass else 0.0,
                # of several labels those of images are mixed, each image being a class of its own
                num_classes=len(objective.names) if is_multiclass else cfg.batch_size,
            )

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Erases and mixes normalised images `(B, C, H, W)` with classes `(B,)` or labels
        `(B, L)`.

        Returns: the images, and the labels, which mixing turns into shares `(B, num_classes)` or
        numbers between 0 and 1.
        """
        if self.erase is not None:
            images = self.erase(images)
        if self.mix is not None and labels.ndim == 1:
            images, labels = self.mix(images, labels)
        elif self.mix is not None:
            images, shares = self.mix(images, torch.arange(len(labels), device=labels.device))
            labels = shares @ labels.to(shares.dtype)  # (B, B) @ (B, L)
        return images, labels

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in 32 bits with label smoothing, which mixed classes have already."""
        logits, is_multiclass = logits.float(), self.objective.name == "multiclass"
        smoothing = 0.0 if self.mix is not None and is_multiclass else self.label_smoothing
        if is_multiclass and self.objective.weights is None:
            return F.cross_entropy(logits, targets, label_smoothing=smoothing)
        return self.objective.losses(logits, targets, smoothing).mean()
