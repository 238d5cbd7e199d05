"""Exact evaluation on any number of processes: every image once, integer counts summed, nothing
padded."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from data.loader import BadSample, EvalBatch
from data.transforms import PixelNormalizer
from engine.run.interrupts import Stopped, received
from engine.run.results import without_nan
from util.dist import all_gather
from util.errors import DataError


@dataclass(frozen=True)
class Scores:
    """What one classifier got right.

    correct1, correct5: images whose class is the first, or among the first five. loss: mean
    cross-entropy.
    class_correct, class_total: per class, in the order of the labels.
    """

    num_samples: int
    correct1: int
    correct5: int
    loss: float
    class_correct: list[int]
    class_total: list[int]

    @property
    def acc1(self) -> float:
        """Percent."""
        return 100 * self.correct1 / self.num_samples

    @property
    def acc5(self) -> float:
        """Percent."""
        return 100 * self.correct5 / self.num_samples

    def as_dict(self, class_names: list[str] | None = None) -> dict[str, Any]:
        """For results.json: counts and percent, and with `class_names` the accuracy of each
        class."""
        facts: dict[str, Any] = {
            "num_samples": self.num_samples,
            "correct1": self.correct1,
            "correct5": self.correct5,
            "acc1": self.acc1,
            "acc5": self.acc5,
            "loss": self.loss,
        }
        if class_names is not None:
            facts["per_class"] = percent_by_class(class_names, self.class_correct, self.class_total)
        return without_nan(facts)


def percent_by_class(
    class_names: list[str], correct: list[int], total: list[int]
) -> dict[str, float | None]:
    """Percent right of each class, None for a class without images."""
    counts = zip(class_names, correct, total, strict=True)
    return {name: 100 * right / of_class if of_class else None for name, right, of_class in counts}


@torch.no_grad()
def evaluate(
    classify: Callable[[Tensor], Tensor],
    batches: Iterable[EvalBatch],
    normalize: PixelNormalizer,
    dtype: torch.dtype | None,
    num_classes: int,
    num_heads: int = 1,
) -> list[Scores]:
    """Scores of one classifier, or of several that share their images.

    Args:
        classify: normalised images `(B, C, H, W)` to logits `(B, num_classes)` or `(num_heads, B,
            num_classes)`.
        batches: this process's share; all processes must call.
        dtype: what to autocast to, or None.

    Raises: DataError on all processes where a file cannot be decoded.
    """
    device = normalize.device
    counts = torch.zeros(
        num_heads, 3, num_classes, dtype=torch.int64, device=device
    )  # first, among five, images
    losses = torch.zeros(
        num_heads, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device
    )
    bad: list[BadSample] = []
    for batch in until_bad(batches, bad):
        labels = batch.labels.to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            logits = classify(normalize(batch.images))
        logits = logits.float().view(num_heads, len(labels), num_classes)  # (H, B, classes)
        best = logits.topk(min(5, num_classes), dim=-1).indices  # (H, B, 5)
        # logits that are not finite name no class: such an image counts as wrong
        hits = (best == labels[:, None]) & logits.isfinite().all(dim=-1, keepdim=True)  # (H, B, 5)
        for row, hit in enumerate((hits[..., 0], hits.any(-1), torch.ones_like(hits[..., 0]))):
            counts[:, row].scatter_add_(1, labels.expand(num_heads, -1), hit.long())
        for head, of_head in enumerate(logits):
            losses[head] += F.cross_entropy(of_head, labels, reduction="sum")
    raise_bad(bad)
    if dist.is_initialized():
        dist.all_reduce(counts)
        dist.all_reduce(losses)
    return [_scores(*of_head) for of_head in zip(counts.tolist(), losses.tolist(), strict=True)]


def until_bad(batches: Iterable[EvalBatch], bad: list[BadSample]) -> Iterator[EvalBatch]:
    """The batches up to the first with a file that cannot be decoded, which is added to `bad`: see
    `raise_bad`.

    A signal that stops the run ends them, too.
    """
    for batch in batches:
        bad += batch.bad
        if batch.bad or received():
            return
        yield batch


def raise_bad(bad: list[BadSample]) -> None:
    """Stops all processes together where one met a file that cannot be decoded, or got a signal.

    Raises: DataError, Stopped.
    """
    said = all_gather((bad, received()))
    everywhere = [sample for of_one, _ in said for sample in of_one]
    if everywhere:
        path, reason = everywhere[0]
        raise DataError(
            f"evaluation leaves no image out, and {path} {reason}: mend or remove the file"
        )
    if signum := max(signum for _, signum in said):
        raise Stopped(signum)


def _scores(counts: list[list[int]], loss_sum: float) -> Scores:
    class_correct, among_five, class_total = counts
    total = sum(class_total)
    return Scores(
        total, sum(class_correct), sum(among_five), loss_sum / total, class_correct, class_total
    )
