"""What fine-tuning does to a batch on the device: random erasing, mixup or cutmix, and the loss
that goes with them."""

import torch
from torch import Tensor
from torch.nn import functional as F

from util.settings.evaluation import FinetuneConfig


class BatchMixer:
    """Erasing (arXiv 1708.04896), mixup (1710.09412) and cutmix (1905.04899) by timm.

    They draw from numpy, `random` and torch: seed all three per step (`util/rng.py`).
    """

    def __init__(self, cfg: FinetuneConfig, num_classes: int, device: torch.device):
        self.label_smoothing = cfg.label_smoothing
        self.erase = self.mix = None
        if cfg.re_prob:
            from timm.data.random_erasing import RandomErasing  # here, as timm takes long to import

            self.erase = RandomErasing(
                cfg.re_prob, mode=cfg.re_mode, max_count=cfg.re_count, device=device
            )
        if cfg.mixup or cfg.cutmix:
            from timm.data import Mixup

            self.mix = Mixup(
                cfg.mixup,
                cfg.cutmix,
                switch_prob=cfg.mixup_switch_prob,
                label_smoothing=cfg.label_smoothing,
                num_classes=num_classes,
            )

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Erases and mixes normalised images `(B, C, H, W)` with labels `(B,)`.

        Returns: the images, and the labels, which mixing turns into shares `(B, num_classes)`.
        """
        if self.erase is not None:
            images = self.erase(images)
        if self.mix is not None:
            images, labels = self.mix(images, labels)
        return images, labels

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in 32 bits with label smoothing, which mixed labels have already."""
        smoothing = 0.0 if self.mix is not None else self.label_smoothing
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
