"""Classification: the labelled data of a stage's settings, and the exact scores of classifiers.

On any number of processes every image counts once: nothing is padded, and integer counts are
summed.

Shapes: `B` batch, `H` heads that share their images, `C` classes.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from data.labels import LabelledData, LabelledSource, build_labelled_data
from data.loader import Batch
from data.transforms import PixelNormalizer
from engine.evaluation.batches import complete_batches
from engine.run.batches import eval_batches
from engine.run.folder import Run
from engine.run.records import without_nan
from util.dist import autocast_dtype, first_process_first, waiting
from util.settings.evaluation import FinetuneConfig, KnnConfig, LinclsConfig


@dataclass(frozen=True)
class Scores:
    """What one classifier got right.

    correct1, correct5: images whose class is the first, or among the first five.
    loss: mean cross-entropy.
    class_correct, class_total: images per class, in the order of the labels.
    """

    num_samples: int
    correct1: int
    correct5: int
    loss: float
    class_correct: list[int]
    class_total: list[int]

    @property
    def acc1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * self.correct1 / self.num_samples

    @property
    def acc5(self) -> float:
        """Top-5 accuracy in percent."""
        return 100 * self.correct5 / self.num_samples

    def as_dict(self, class_names: list[str] | None = None) -> dict[str, Any]:
        """For results.json: counts and percent, and with `class_names` each class's accuracy."""
        results: dict[str, Any] = {
            "num_samples": self.num_samples,
            "correct1": self.correct1,
            "correct5": self.correct5,
            "acc1": self.acc1,
            "acc5": self.acc5,
            "loss": self.loss,
        }
        if class_names is not None:
            results["per_class"] = percent_by_class(
                class_names, self.class_correct, self.class_total
            )
        return without_nan(results)


def percent_by_class(
    class_names: list[str], correct: list[int], total: list[int]
) -> dict[str, float | None]:
    """Percent right of each class, None for a class without images."""
    counts = zip(class_names, correct, total, strict=True)
    return {name: 100 * right / of_class if of_class else None for name, right, of_class in counts}


def open_labelled_data(cfg: FinetuneConfig | LinclsConfig | KnnConfig, run: Run) -> LabelledData:
    """Both splits of the data set that the settings name. Raises: InputError."""
    with first_process_first(run.processes) if cfg.download else nullcontext():
        return build_labelled_data(
            cfg.dataset, cfg.data_path, cfg.in_chans, cfg.download, cfg.num_classes
        )


class Evaluator:
    """Scores classifiers on one labelled source.

    `class_names` are the classes whose accuracies are reported one by one, None without
    `per_class`.
    """

    def __init__(
        self,
        cfg: FinetuneConfig | LinclsConfig,
        run: Run,
        source: LabelledSource,
        class_names: list[str],
    ):
        self.batches = eval_batches(cfg, run, source, cfg.crop_pct)
        self.normalize = PixelNormalizer(cfg.mean, cfg.std, run.device)
        self.dtype = autocast_dtype(cfg.precision, run.device)
        self.num_classes = len(class_names)
        self.class_names = class_names if cfg.per_class else None

    def __call__(self, classify: Callable[[Tensor], Tensor], num_heads: int = 1) -> list[Scores]:
        """Scores of `classify` on all images of the source, one per head; all processes must call.

        Args: see `evaluate`.
        """
        return evaluate(
            classify, self.batches, self.normalize, self.dtype, self.num_classes, num_heads
        )


@torch.no_grad()
def evaluate(
    classify: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    normalize: PixelNormalizer,
    dtype: torch.dtype | None,
    num_classes: int,
    num_heads: int = 1,
) -> list[Scores]:
    """Scores of one classifier, or of several that share their images.

    Args:
        classify: normalised images `(B, channels, height, width)` to logits `(B, C)` or
            `(H, B, C)`.
        batches: this process's share; all processes must call.
        dtype: what to autocast to, or None.

    Raises: DataError on all processes if a file cannot be decoded.
    """
    device = normalize.device
    counts = torch.zeros(num_heads, 3, num_classes, dtype=torch.int64, device=device)
    loss_dtype = torch.float32 if device.type == "mps" else torch.float64
    losses = torch.zeros(num_heads, dtype=loss_dtype, device=device)  # sums over images
    for batch in complete_batches(batches):
        labels = batch.targets.to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            logits = classify(normalize(batch.images))
        logits = logits.float().view(num_heads, len(labels), num_classes)  # (H, B, C)
        best = logits.topk(min(5, num_classes), dim=-1).indices  # (H, B, 5)
        # logits that are not finite name no class: such an image counts as wrong
        hits = (best == labels[:, None]) & logits.isfinite().all(dim=-1, keepdim=True)  # (H, B, 5)
        for row, hit in enumerate((hits[..., 0], hits.any(-1), torch.ones_like(hits[..., 0]))):
            counts[:, row].scatter_add_(1, labels.expand(num_heads, -1), hit.long())
        for head, of_head in enumerate(logits):
            losses[head] += F.cross_entropy(of_head, labels, reduction="sum")
    if dist.is_initialized():
        with waiting():
            dist.all_reduce(counts)
            dist.all_reduce(losses)
    return [
        Scores(sum(total), sum(first), sum(among_five), loss / sum(total), first, total)
        for (first, among_five, total), loss in zip(counts.tolist(), losses.tolist(), strict=True)
    ]
