"""Classification: the labelled data of a stage's settings, and the exact scores of classifiers.

On any number of processes every image counts once: nothing is padded, integer counts are summed,
and what the other figures need is gathered in the order of the images.

Shapes: `B` batch, `H` heads that share their images, `C` classes.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from data.images import pixel_format
from data.labels import LabelledData, LabelledSource
from data.tables import build_data
from engine.evaluation.features import TOP, Predictions, answers
from engine.evaluation.metrics import (
    Figures,
    multiclass_figures,
    multilabel_figures,
    regression_figures,
)
from engine.evaluation.objective import Objective
from engine.evaluation.predictions import save_predictions
from engine.run.folder import EVAL_PREDICTIONS_FILE, PREDICTIONS_FILE, Run
from engine.run.records import without_nan
from util.dist import all_gather, first_process_first, from_main, gather_rows
from util.settings.evaluation import METRICS, FinetuneConfig, KnnConfig, LinclsConfig

# Of all images, heads and classes: more than those of ImageNet's validation set for one head. They
# take 256 MiB of the main process, and 1 GiB while they are ranked. Beyond, no images are ranked.
MOST_LOGITS = 2**26
# figures from 0 to 100
PERCENT = ("acc1", "acc5", *METRICS["segment"], *METRICS["detect"])
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """What one model was worth on the images of a split.

    loss: mean over the images, or over the pixels that count, without weights of classes.
    figures: of the objective, see `engine/evaluation/metrics.py`.
    """

    num_samples: int
    loss: float
    figures: Figures = Figures({}, {})

    @property
    def scalars(self) -> dict[str, float]:
        """All figures over all classes by name, NaN for one that is not defined."""
        return self.figures.scalars

    @property
    def shown(self) -> tuple[str, ...]:
        """The figures that a line about an epoch shows."""
        return tuple(self.scalars)

    @property
    def logged(self) -> dict[str, float]:
        """For log.jsonl and its curves: the loss and all figures."""
        return {"val_loss": self.loss, **self.scalars}

    def text(self, *names: str) -> str:
        """These figures for a line of the log, by default all."""
        return "  ".join(said(name, self.scalars[name]) for name in names or self.scalars)

    def as_dict(self, class_names: list[str] | None = None) -> dict[str, object]:
        """For results.json: the figures, and with `class_names` those of each class."""
        results: dict[str, object] = {"num_samples": self.num_samples, **self.scalars}
        results["loss"] = self.loss
        if class_names is not None:
            for name, values in self.figures.per_class.items():
                of_classes = dict(zip(class_names, values, strict=True))
                results[f"per_class_{name}"] = without_nan(of_classes)
            if self.figures.confusion is not None:
                results["confusion"] = self.figures.confusion
        return without_nan(results)


@dataclass(frozen=True, kw_only=True)
class ClassScores(Scores):
    """What a classifier of one class per image got right.

    correct1, correct5: images whose class is the first, or among the first five.
    class_correct, class_total: images per class, in the order of the labels.
    predictions: what it says of each image, on the main process.
    """

    correct1: int
    correct5: int
    class_correct: list[int]
    class_total: list[int]
    predictions: Predictions | None = field(default=None, compare=False, repr=False)

    @property
    def scalars(self) -> dict[str, float]:
        """Also the top-1 and top-5 accuracies in percent."""
        percents = [100 * right / self.num_samples for right in (self.correct1, self.correct5)]
        return {"acc1": percents[0], "acc5": percents[1], **self.figures.scalars}

    @property
    def shown(self) -> tuple[str, ...]:
        return ("acc1", "acc5")

    def as_dict(self, class_names: list[str] | None = None) -> dict[str, object]:
        results = super().as_dict(class_names)
        results |= {"correct1": self.correct1, "correct5": self.correct5}
        if class_names is not None:
            results["per_class"] = percent_by_class(
                class_names, self.class_correct, self.class_total
            )
        return results


def said(name: str, value: float) -> str:
    """A figure for a line of the log: those of PERCENT in percent, others as they are."""
    title = {"acc1": "top-1", "acc5": "top-5"}.get(name, name)
    return f"{title} {said_alone(name, value)}"


def said_alone(name: str, value: float) -> str:
    """The same without its name."""
    return f"{value:.2f} %" if name in PERCENT else f"{value:.4f}"


def percent_by_class(
    class_names: list[str], correct: list[int], total: list[int]
) -> dict[str, float | None]:
    """Percent right of each class, None for a class without images."""
    counts = zip(class_names, correct, total, strict=True)
    return {name: 100 * right / of_class if of_class else None for name, right, of_class in counts}


def open_labelled_data(cfg: FinetuneConfig | LinclsConfig | KnnConfig, run: Run) -> LabelledData:
    """Both splits of the data set that the settings name. Raises: InputError."""
    needs_8_bits = isinstance(cfg, FinetuneConfig) and cfg.needs_8_bits
    pixels = pixel_format(cfg, cfg.in_chans, needs_8_bits)
    with first_process_first(run.processes) if cfg.download else nullcontext():
        return build_data(cfg, pixels, cfg.seed, cfg.download, cfg.num_classes)


@dataclass(frozen=True)
class Evaluator:
    """Scores models on one labelled source of images by what they are for."""

    cfg: FinetuneConfig | LinclsConfig
    run: Run
    source: LabelledSource
    objective: Objective

    @property
    def class_names(self) -> list[str] | None:
        """The classes whose figures are reported one by one, None without `per_class`."""
        return self.objective.names if self.cfg.per_class else None

    def __call__(self, classify: Callable[[Tensor], Tensor], num_heads: int = 1) -> list[Scores]:
        """Scores of one classifier, or of several that share their images, on the whole source.

        Args:
            classify: normalised images `(B, channels, height, width)` to outputs `(B, C)` or
                `(H, B, C)`.

        All processes must call, and all get the scores.

        Raises: DataError on all processes if a file cannot be decoded.
        """
        device, num_classes = self.run.device, len(self.objective.names)
        is_multiclass = self.objective.name == "multiclass"
        keeps = not is_multiclass or len(self.source) * num_heads * num_classes <= MOST_LOGITS
        losses = torch.zeros(  # sums over images
            num_heads, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device
        )
        # What the scores need of each image, a part for each batch, after one of no image: the five
        # most probable classes (H, 5), their probabilities and that of the truth (H, 6), and
        # outputs (H, C).
        first = min(TOP, num_classes)
        classes = [torch.empty(0, num_heads, first, dtype=torch.int64, device=device)]
        probabilities = [torch.empty(0, num_heads, first + 1, device=device)]
        outputs = [torch.empty(0, num_heads, num_classes, device=device)]
        for own, logits in answers(self.cfg, self.run, self.source, self.cfg.crop_pct, classify):
            logits = logits.float().view(num_heads, len(own), num_classes)  # (H, B, C)
            if keeps:
                outputs.append(logits.transpose(0, 1))
            if is_multiclass:
                best = logits.topk(first, dim=-1).indices  # (H, B, 5)
                # logits that are not finite name no class: such an image counts as wrong
                is_finite = logits.isfinite().all(dim=-1, keepdim=True)
                named = torch.cat([best, own.expand(num_heads, -1)[:, :, None]], dim=-1)
                of_named = logits.gather(-1, named) - logits.logsumexp(dim=-1, keepdim=True)
                of_named = torch.where(is_finite, of_named.exp(), 0.0)  # (H, B, 6)
                probabilities.append(of_named.transpose(0, 1))
                best = torch.where(is_finite, best, num_classes)
                classes.append(best.transpose(0, 1))
            losses += torch.stack(
                [
                    F.cross_entropy(of_head, own, reduction="sum")
                    if is_multiclass
                    else self.objective.losses(of_head, own, weigh=False).sum()
                    for of_head in logits
                ]
            )
        sums = torch.stack(all_gather(losses.cpu())).sum(dim=0).tolist()
        total = len(self.source)
        rows = [
            gather_rows(torch.cat(parts), total if are_kept else 0, everywhere=False)
            for parts, are_kept in (
                (classes, is_multiclass),
                (probabilities, is_multiclass),
                (outputs, keeps),
            )
        ]
        if not keeps:
            logger.info("no AUROC and average precision: more than %d logits", MOST_LOGITS)
        return from_main(lambda: [self.scores(head, loss, *rows) for head, loss in enumerate(sums)])

    def scores(
        self, head: int, loss: float, classes: Tensor, probabilities: Tensor, outputs: Tensor
    ) -> Scores:
        """The scores of one head on all images, from the sum of their losses and of each head the
        most probable classes `(n, H, 5)`, their probabilities with that of the truth `(n, H, 6)`
        and the outputs `(n, H, C)`, of which there are none if they are too many."""
        name, count = self.objective.name, len(self.source)
        labels = torch.from_numpy(self.source.labels)
        # 64 bits and sorting are fast on CUDA
        device = self.run.device if self.run.device.type == "cuda" else torch.device("cpu")
        own, of_head = labels.to(device), outputs[:, head].to(device)
        if name == "multilabel":
            return Scores(count, loss / count, multilabel_figures(of_head, own))
        if name == "regression":
            predicted = self.objective.predictions(of_head)
            return Scores(count, loss / count, regression_figures(predicted, own))
        best, num_classes = classes[:, head], len(self.objective.names)  # (n, 5)
        chosen = best[:, 0]
        is_right = chosen == labels
        logits = of_head if len(of_head) == count else None
        return ClassScores(
            count,
            loss / count,
            multiclass_figures(chosen.to(device), logits, own, num_classes),
            correct1=int(is_right.sum()),
            correct5=int((best == labels[:, None]).sum()),
            class_correct=labels[is_right].bincount(minlength=num_classes).tolist(),
            class_total=labels.bincount(minlength=num_classes).tolist(),
            predictions=Predictions(
                labels, best, probabilities[:, head, :-1], probabilities[:, head, -1]
            ),
        )


def keep_predictions(evaluator: object, scores: Scores) -> None:
    """Writes what a classifier said of each image that `evaluator` knows into the run's folder, if
    each has one class. Only the main process does."""
    if isinstance(evaluator, Evaluator) and isinstance(scores, ClassScores) and scores.predictions:
        run, cfg = evaluator.run, evaluator.cfg
        is_eval = isinstance(cfg, FinetuneConfig) and cfg.eval
        path = run.output_dir / (EVAL_PREDICTIONS_FILE if is_eval else PREDICTIONS_FILE)
        if run.processes.is_main:
            names = evaluator.objective.names
            save_predictions(path, scores.predictions, names, cfg, evaluator.source)
