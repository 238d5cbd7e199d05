"""What predictions are worth: the figures of each objective, as scikit-learn defines them, and of
segmentation.

They lie between 0 and 1 (kappa and R² may be negative), but for errors, which are in the data's
unit, and those of segmentation, which are in percent. All images count at once, in 64 bits. A
figure that is not defined is NaN: AUROC of a class that no image or every image has, and average
precision of one that no image has. Means over classes are over those that are defined. Logits that
are not finite rank no image, so all of these are NaN then, and such an image is predicted to be of
no class.

torchmetrics computes what ranks images, and the errors. Its accuracies, F1 and kappas have 32 bits,
so here they come from counts, which are exact.

Shapes: `n` images, `C` classes, `L` labels of an image.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

# Figures of which less is better; of the others more is.
ERRORS = ("mae", "rmse")


class Figures(NamedTuple):
    """scalars: by name, over all classes, NaN for one that is not defined. per_class: by name, of
    each class or label. confusion: images, or pixels, `(C, C)` by their class, then by the
    predicted one; of multiclass and segmentation."""

    scalars: dict[str, float]
    per_class: dict[str, list[float]]
    confusion: list[list[int]] | None = None


def merit(metric: str, value: float) -> float:
    """A figure as a number of which more is better; NaN is worse than any."""
    if math.isnan(value):
        return -math.inf
    return -value if metric in ERRORS else value


def multiclass_figures(
    predicted: Tensor, logits: Tensor | None, labels: Tensor, num_classes: int
) -> Figures:
    """Figures of one class per image: of the predicted classes, and of the softmax of the logits.

    Balanced accuracy is the mean recall of the classes that images have, F1 the mean over the
    classes that images have or are predicted to have. For kappa "no class" is one class more.

    Args:
        predicted: `(n,)` int64; `num_classes` is no class.
        logits: `(n, C)`, or None to leave out what ranks images (NaN).
        labels: `(n,)` int64.
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    counts = multiclass_confusion_matrix(  # (C + 1, C + 1)
        predicted, labels, num_classes + 1, validate_args=False
    )
    confusion, right = counts.double(), counts.diag()[:num_classes].double()
    of_class, as_class = confusion.sum(dim=1)[:num_classes], confusion.sum(dim=0)[:num_classes]
    place = torch.arange(num_classes + 1, dtype=torch.float64, device=labels.device)
    distance = (place[:, None] - place).abs()
    scores = None if logits is None else logits.double().softmax(dim=1)
    one_by_one = ((labels == label).long() for label in range(num_classes))
    auroc, ap = _rankings(scores, one_by_one, num_classes)
    scalars = {
        "balanced_acc": _mean(right / of_class),
        "f1": _mean(2 * right / (of_class + as_class)),
        "kappa": _kappa(confusion, (distance > 0).double()),
        "kappa_quadratic": _kappa(confusion, distance**2),
        "auroc": _mean(auroc),
        "ap": _mean(ap),
    }
    per_class = {"auroc": auroc.tolist(), "ap": ap.tolist()}
    return Figures(scalars, per_class, counts[:num_classes, :num_classes].tolist())


def multilabel_figures(logits: Tensor, labels: Tensor) -> Figures:
    """Figures of several labels per image, both `(n, L)`: an image has a label if its logit is
    above 0, a probability of 0.5.

    F1 is the mean over the labels that images have or are predicted to have.
    """
    predicted = (logits > 0) & logits.isfinite().all(dim=1, keepdim=True)  # (n, L)
    right = (predicted & (labels == 1)).sum(dim=0).double()
    f1 = 2 * right / (predicted.sum(dim=0) + labels.sum(dim=0))
    auroc, ap = _rankings(logits.double().sigmoid(), labels.T, labels.shape[1])
    per_label = {"auroc": auroc, "ap": ap, "f1": f1}
    return Figures(
        {"map": _mean(ap), "auroc": _mean(auroc), "f1": _mean(f1)},
        {name: values.tolist() for name, values in per_label.items()},
    )


def regression_figures(predicted: Tensor, targets: Tensor) -> Figures:
    """Mean absolute error, root of the mean squared error, and the coefficient of determination R²,
    each the mean of those of the L numbers. All are NaN if a prediction is not finite, and R² is
    for equal targets.

    Args:
        predicted, targets: `(n, L)` in the data's unit.
    """
    from torchmetrics.functional.regression import mean_absolute_error, mean_squared_error

    columns: dict[str, list[float]] = {"mae": [], "rmse": [], "r2": []}
    centre = targets.double().mean(dim=0)  # far from 0 the sums of squares would lose digits
    for ours, own in zip((predicted - centre).T, (targets - centre).T, strict=True):
        # what is not finite is NaN from here on
        ours = ours + 0 * ours.sum()
        columns["mae"].append(mean_absolute_error(ours, own).item())
        columns["rmse"].append(mean_squared_error(ours, own, squared=False).item())
        # not the library's, which takes sums of squares below 1e-4, of any unit, for none
        spread = own.square().sum() if own.unique().numel() > 1 else math.nan
        columns["r2"].append((1 - (ours - own).square().sum() / spread).item())
    means = {name: sum(values) / len(values) for name, values in columns.items()}
    return Figures(means, columns)


def segmentation_figures(counts: Tensor) -> Figures:
    """Figures of the classes of pixels in percent: the mean over the classes that masks or
    predictions have of intersection over union (IoU); the share of pixels that are right; and the
    mean over the classes that masks have of that share.

    Args:
        counts: pixels `(C, C + 1)` int64 by their class, then by the predicted one, of which the
            last is no class.
    """
    confusion = counts[:, :-1]  # (C, C)
    right, of_class = confusion.diag().double(), counts.sum(dim=1).double()
    iou = 100 * right / (of_class + confusion.sum(dim=0) - right)
    accuracy = 100 * right / of_class
    scalars = {
        "miou": _mean(iou),
        "pixel_acc": (100 * right.sum() / of_class.sum()).item(),
        "mean_acc": _mean(accuracy),
    }
    return Figures(scalars, {"iou": iou.tolist(), "acc": accuracy.tolist()}, confusion.tolist())


def _rankings(
    scores: Tensor | None, truths: Iterable[Tensor], num_classes: int
) -> tuple[Tensor, Tensor]:
    """AUROC and average precision of each class, `(C,)` float64, from the probabilities `(n, C)`
    and for each class 0 or 1 `(n,)`."""
    from torchmetrics.functional.classification import binary_auroc, binary_average_precision

    found = torch.full((2, num_classes), math.nan, dtype=torch.float64)
    usual = torch.get_default_dtype()
    if scores is None or not scores.isfinite().all():
        return found[0], found[1]
    try:
        torch.set_default_dtype(torch.float64)  # of the library's divisions of counts
        for place, (of_class, is_class) in enumerate(zip(scores.T, truths, strict=True)):
            if is_class.any() and not is_class.all():
                found[0, place] = binary_auroc(of_class, is_class, validate_args=False)
            if is_class.any():
                found[1, place] = binary_average_precision(of_class, is_class, validate_args=False)
    finally:
        torch.set_default_dtype(usual)
    return found[0], found[1]


def _kappa(confusion: Tensor, weights: Tensor) -> float:
    """Cohen's kappa of counts `(C, C)`; `weights` say how bad each confusion is."""
    by_chance = confusion.sum(dim=1)[:, None] * confusion.sum(dim=0) / confusion.sum()
    return (1 - (weights * confusion).sum() / (weights * by_chance).sum()).item()


def _mean(values: Tensor) -> float:
    """Of those that are defined; NaN if none is."""
    return values.nanmean().item()
