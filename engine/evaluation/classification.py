"""Classification: the labelled data of a stage's settings, and the exact scores of classifiers.

On any number of processes every image counts once: nothing is padded, and integer counts are
summed.

Shapes: `B` batch, `H` heads that share their images, `C` classes.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from data.images import pixel_format
from data.labels import (
    LabelledData,
    LabelledSource,
    build_labelled_data,
    build_table_data,
    check_num_classes,
)
from engine.evaluation.features import answers
from engine.run.folder import Run
from engine.run.records import without_nan
from util.dist import all_gather, first_process_first
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

    def as_dict(self, class_names: list[str] | None = None) -> dict[str, object]:
        """For results.json: counts and percent, and with `class_names` each class's accuracy."""
        results: dict[str, object] = {
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
    if cfg.labels is not None:
        pixels = pixel_format(cfg, cfg.in_chans)
        data = build_table_data(cfg, cfg.data_path, pixels, cfg.seed)
        check_num_classes(cfg.num_classes, data.class_names)
        return data
    with first_process_first(run.processes) if cfg.download else nullcontext():
        return build_labelled_data(
            cfg.dataset,
            cfg.data_path,
            pixel_format(cfg, cfg.in_chans),
            cfg.download,
            cfg.num_classes,
        )


@dataclass(frozen=True)
class Evaluator:
    """Scores classifiers on one labelled source of images of `classes`."""

    cfg: FinetuneConfig | LinclsConfig
    run: Run
    source: LabelledSource
    classes: list[str]

    @property
    def class_names(self) -> list[str] | None:
        """The classes whose accuracies are reported one by one, None without `per_class`."""
        return self.classes if self.cfg.per_class else None

    def __call__(self, classify: Callable[[Tensor], Tensor], num_heads: int = 1) -> list[Scores]:
        """Scores of one classifier, or of several that share their images, on the whole source.

        Args:
            classify: normalised images `(B, channels, height, width)` to logits `(B, C)` or
                `(H, B, C)`.

        All processes must call, and all get the scores.

        Raises: DataError on all processes if a file cannot be decoded.
        """
        device, num_classes = self.run.device, len(self.classes)
        counts = torch.zeros(num_heads, 3, num_classes, dtype=torch.int64, device=device)
        losses = torch.zeros(  # sums over images
            num_heads, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device
        )
        for labels, logits in answers(self.cfg, self.run, self.source, self.cfg.crop_pct, classify):
            logits = logits.float().view(num_heads, len(labels), num_classes)  # (H, B, C)
            best = logits.topk(min(5, num_classes), dim=-1).indices  # (H, B, 5)
            # logits that are not finite name no class: such an image counts as wrong
            hits = (best == labels[:, None]) & logits.isfinite().all(dim=-1, keepdim=True)
            for row, hit in enumerate((hits[..., 0], hits.any(-1), torch.ones_like(hits[..., 0]))):
                counts[:, row].scatter_add_(1, labels.expand(num_heads, -1), hit.long())
            losses += torch.stack(
                [F.cross_entropy(of_head, labels, reduction="sum") for of_head in logits]
            )
        of_processes = zip(*all_gather((counts.cpu(), losses.cpu())), strict=True)
        counts, losses = (torch.stack(parts).sum(dim=0) for parts in of_processes)
        return [
            Scores(sum(total), sum(first), sum(among_five), loss / sum(total), first, total)
            for (first, among_five, total), loss in zip(
                counts.tolist(), losses.tolist(), strict=True
            )
        ]
