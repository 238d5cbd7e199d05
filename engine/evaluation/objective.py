"""What a classifier is trained for (`objective:`): its loss, the weights of its classes, and what
the file of its weights says about it.

A regression trains on standardised targets, (target - mean) / std, with the mean and the standard
deviation of the training images' targets, so that no learning rate depends on the unit. The head in
a file predicts in the data's own unit: that of the run is scaled when it is written and scaled back
when it is read.

Shapes: `B` images, `C` outputs: classes, labels or numbers. `n` training images.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from util.settings.evaluation import LossConfig

HEAD_NAMES = ("head.weight", "head.bias")
ObjectiveName = Literal["multiclass", "multilabel", "regression"]


@dataclass(frozen=True)
class Objective:
    """What the outputs are for.

    names: of the classes or the label columns, in the order of the outputs.
    weights: `(C,)` of the classes, or of the positives of each label, in training; None weighs all
        alike.
    mean, std: `(C,)` of a regression's targets in training.
    """

    name: ObjectiveName
    names: list[str]
    weights: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None

    def losses(
        self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0, weigh: bool = True
    ) -> Tensor:
        """The loss of each image, `(B, C)` and its targets -> `(B,)`: cross-entropy; the mean over
        the labels of the binary one; the mean over the numbers of smooth L1.

        Args:
            targets: classes `(B,)` or shares of them `(B, C)`; 0 to 1 `(B, C)`; numbers `(B, C)`.
            smoothing: share of a target that is spread over the classes, or over yes and no.
            weigh: whether `weights` count.
        """
        weights = self.weights if weigh else None
        if self.name == "multiclass":
            return F.cross_entropy(
                outputs, targets, weight=weights, reduction="none", label_smoothing=smoothing
            )
        if self.name == "multilabel":
            smooth = targets * (1 - smoothing) + smoothing / 2
            return F.binary_cross_entropy_with_logits(
                outputs, smooth, pos_weight=weights, reduction="none"
            ).mean(dim=1)
        assert self.mean is not None and self.std is not None
        standard = (targets - self.mean) / self.std
        return F.smooth_l1_loss(outputs, standard, reduction="none").mean(dim=1)

    def predictions(self, outputs: Tensor) -> Tensor:
        """A regression's outputs `(..., C)` in the data's unit, as float64."""
        assert self.mean is not None and self.std is not None
        return outputs.double() * self.std.to(outputs.device) + self.mean.to(outputs.device)

    def header(self) -> dict[str, object]:
        """What a file of weights says about its outputs."""
        return {"objective": self.name, "class_names": self.names}

    def head_in_unit(self, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
        """A trained head `(C, D)`, `(C,)` as a file holds it, a regression's in the data's unit."""
        if self.mean is None or self.std is None:
            return dict(zip(HEAD_NAMES, (weight, bias), strict=True))
        mean, std = self.mean.to(weight.device), self.std.to(weight.device)
        return dict(zip(HEAD_NAMES, (weight * std[:, None], bias * std + mean), strict=True))

    @torch.no_grad()
    def standardise(self, weight: Tensor, bias: Tensor) -> None:
        """Changes a head as a file holds it into one that predicts standardised targets."""
        if self.mean is not None and self.std is not None:
            mean, std = self.mean.to(weight.device), self.std.to(weight.device)
            weight.div_(std[:, None])
            bias.sub_(mean).div_(std)


def build_objective(
    cfg: LossConfig, names: list[str], labels: np.ndarray, device: torch.device
) -> Objective:
    """The objective of the settings for outputs of these names and the training images' labels, as
    `LabelledSource` has them."""
    weights = mean = std = None
    if cfg.objective == "regression":
        # of equal targets the difference to the mean is 0 whatever it is divided by
        spread = labels.std(axis=0, dtype=np.float64)
        mean = _as_tensor(labels.mean(axis=0, dtype=np.float64), device)
        std = _as_tensor(np.where(spread > 0, spread, 1.0), device)
    elif cfg.class_weights == "balanced" and cfg.objective == "multiclass":
        counts = np.bincount(labels, minlength=len(names))
        weights = _as_tensor(len(labels) / (len(names) * np.maximum(counts, 1)), device)
    elif cfg.class_weights == "balanced":
        positives = labels.sum(axis=0)
        negatives = len(labels) - positives
        ratios = negatives / np.maximum(positives, 1)
        # a label that no image or every image has cannot be balanced
        weights = _as_tensor(np.where(positives * negatives > 0, ratios, 1.0), device)
    return Objective(cfg.objective, names, weights, mean, std)


def _as_tensor(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)
