"""Segmentation: how images are segmented, at once or by windows, and the exact scores of models
that do.

Each image is judged at its own size. On any number of processes every image counts once, and the
figures come from whole numbers of pixels; the losses of the images are added in their order.

Shapes: `B` batch, `C` classes (of images: channels), `H` and `W` height and width of an image as
the model takes it, `h` and `w` of the logits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from data.annotated import IGNORED, AnnotatedSource, EvalSample
from data.joint import segment_eval
from data.loader import BadSample
from engine.evaluation.classification import Scores
from engine.evaluation.features import end_together, on_pixels
from engine.evaluation.metrics import segmentation_figures
from engine.run.annotated_batches import annotated_eval_batches
from engine.run.folder import Run
from engine.run.interrupts import received
from models.build import classifier_spec
from models.dense import DenseTransformer
from models.heads.segmentation import to_pixels
from models.spec import pair
from util.dist import all_gather
from util.settings.evaluation import FinetuneConfig, KnnConfig, LinclsConfig

# Normalised images `(B, C, H, W)` to logits `(B, C, h, w)`, or to those of several heads
# `(heads, B, C, h, w)`.
Predict = Callable[[Tensor], Tensor]
MOST_LOGITS = 2**26  # of an image at its own size that are held at a time: 256 MiB


class WindowLogits(NamedTuple):
    """The logits of a window, `(heads, B, C, h, w)` of some images of one size, `(heads, C, h, w)`
    of a single one; `rows` and `columns` are its place in them."""

    rows: slice
    columns: slice
    logits: Tensor


def pixel_loss(logits: Tensor, masks: Tensor, smoothing: float = 0.0) -> Tensor:
    """The mean cross-entropy over the pixels that count, `(B, C, H, W)` and `(B, H, W)` -> scalar;
    0 if none does.

    Args:
        smoothing: share of a target that is spread over the classes.
    """
    total = F.cross_entropy(
        logits, masks, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing
    )
    return total / (masks != IGNORED).sum().clamp(min=1)


def window_starts(length: int, window: int) -> list[int]:
    """Where windows begin that cover a side of this length and overlap by a third, or by more at
    its end."""
    step = max(1, 2 * window // 3)
    return [*range(0, length - window, step), length - window]


def logits_of_windows(
    predict: Predict, images: Tensor, window: tuple[int, int] | None
) -> list[WindowLogits]:
    """What `predict` makes of each window of the images `(B, C, H, W)`; None is one window, the
    whole image."""
    sides = images.shape[-2:]
    size = [min(pixels) for pixels in zip(sides, window or sides, strict=True)]
    places = [
        [slice(start, start + cut) for start in window_starts(side, cut)]
        for side, cut in zip(sides, size, strict=True)
    ]
    found = []
    for rows, columns in product(*places):
        logits = predict(images[..., rows, columns])
        found.append(WindowLogits(rows, columns, logits.view(-1, len(images), *logits.shape[-3:])))
    return found


def averaged(windows: list[WindowLogits], head: int, size: tuple[int, int] | torch.Size) -> Tensor:
    """The logits of one head for the pixels of an image of this size, `(C, H, W)` float32: the mean
    of those of the windows that show a pixel, each `(heads, C, h, w)`."""
    like = windows[0].logits
    total = like.new_zeros(like.shape[1], *size, dtype=torch.float32)
    count = like.new_zeros(size, dtype=torch.float32)
    for rows, columns, logits in windows:
        shown = (rows.stop - rows.start, columns.stop - columns.start)
        total[:, rows, columns] += to_pixels(logits[head, None], shown)[0]
        count[rows, columns] += 1
    return total / count


def bands(logits: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Logits `(C, H, W)` at another size as `to_pixels` has them, some rows of pixels at a time:
    which rows, and the logits `(C, rows, width)`."""
    height, width = size
    num_rows = logits.shape[1]
    place = (torch.arange(height, device=logits.device) + 0.5) * (num_rows / height) - 0.5
    place = place.clamp(min=0)
    above = place.long()
    below, share = (above + 1).clamp(max=num_rows - 1), (place - above)[:, None]
    rows_at_once = max(1, MOST_LOGITS // (len(logits) * width))
    for start in range(0, height, rows_at_once):
        rows = slice(start, min(start + rows_at_once, height))
        some = logits[:, above[rows]].lerp(logits[:, below[rows]], share[rows])
        yield rows, to_pixels(some[None], (rows.stop - rows.start, width))[0]


@torch.no_grad()
def segmented(
    cfg: FinetuneConfig | LinclsConfig | KnnConfig,
    run: Run,
    source: AnnotatedSource,
    predict: Predict,
) -> Iterator[tuple[EvalSample, list[WindowLogits]]]:
    """The samples of this process's share of `source`, and what `predict` makes of the windows of
    each, of a single image. Images of one batch that have one size go through it together.

    All processes must go on to the end, where they wait for one another.

    Raises: as `end_together`.
    """
    call = on_pixels(predict, cfg, cfg.precision, run.device)
    window = pair(cfg.img_size) if cfg.eval_mode == "slide" else None
    patch_size = classifier_spec(cfg, num_classes=0, class_tokens=1).patch_size
    transform = partial(segment_eval, img_size=cfg.img_size, patch_size=patch_size)
    bad: list[BadSample] = []
    for batch in annotated_eval_batches(cfg, run, source, transform, with_targets=True):
        bad += [entry for sample in batch for entry in sample.bad]
        if bad or received():
            break
        alike: dict[object, list[EvalSample]] = {}
        for sample in batch:
            alike.setdefault((sample.image.shape, sample.image.dtype), []).append(sample)
        for samples in alike.values():
            images = torch.stack([sample.image for sample in samples])
            windows = logits_of_windows(call, images, window)
            for place, sample in enumerate(samples):
                yield sample, [of._replace(logits=of.logits[:, place]) for of in windows]
    end_together(bad)


def place_logits(model: DenseTransformer) -> Predict:
    """Of a model for segmentation, the logits at the steps of its head: those of all pixels would
    take more memory."""
    return lambda images: model.head(model.forward_map(images))


@torch.no_grad()
def segment_image(
    call: Predict, image: Tensor, size: tuple[int, int], window: tuple[int, int] | None
) -> Tensor:
    """The most probable class of each pixel of an image in its own size, `(H, W)` int64 on the CPU.

    Args:
        call: as `on_pixels` returns it.
        image: `(C, h, w)` as `segment_eval` shows it.
        size: height and width of the image itself.
        window: as `logits_of_windows` takes it.
    """
    windows = logits_of_windows(call, image[None], window)
    of_image = [found._replace(logits=found.logits[:, 0]) for found in windows]
    mask = torch.empty(size, dtype=torch.int64)
    for rows, logits in bands(averaged(of_image, 0, image.shape[-2:]), size):
        mask[rows] = logits.argmax(dim=0).cpu()
    return mask


@dataclass(frozen=True)
class SegmentationEvaluator:
    """Scores models on one source of images with masks."""

    cfg: FinetuneConfig | LinclsConfig | KnnConfig
    run: Run
    source: AnnotatedSource

    @property
    def class_names(self) -> list[str] | None:
        """The classes whose figures are reported one by one, None without `per_class`."""
        return self.source.class_names if self.cfg.per_class else None

    def __call__(self, predict: Predict, num_heads: int = 1) -> list[Scores]:
        """Scores of one model, or of several heads that share their images, on the whole source.

        Only one head's logits are in memory at the size of an image. A pixel whose logits are not
        finite counts as wrong. All processes must call, and all get the scores.

        Raises: DataError on all processes if an image or its mask cannot be read.
        """
        device, num_classes = self.run.device, len(self.source.class_names)
        # MPS has no 64-bit floats
        precise = torch.float32 if device.type == "mps" else torch.float64
        losses = torch.zeros(len(self.source), num_heads, dtype=precise, device=device)
        counts = torch.zeros(
            num_heads, num_classes, num_classes + 1, dtype=torch.int64, device=device
        )
        for sample, windows in segmented(self.cfg, self.run, self.source, predict):
            mask = sample.target["mask"].to(device)
            for head in range(num_heads):
                logits = averaged(windows, head, sample.image.shape[-2:])
                for rows, of_pixels in bands(logits, sample.size):
                    own = mask[rows]
                    losses[sample.number, head] += F.cross_entropy(
                        of_pixels[None], own[None], ignore_index=IGNORED, reduction="none"
                    ).sum(dtype=precise)
                    counts[head] += confusion_of(of_pixels, own)
        # each image has a loss on one process alone: their sum is exact
        losses = torch.stack(all_gather(losses.cpu())).double().sum(dim=(0, 1))
        counts = torch.stack(all_gather(counts.cpu())).sum(dim=0)
        return [
            Scores(len(self.source), (loss / of_head.sum()).item(), segmentation_figures(of_head))
            for loss, of_head in zip(losses, counts, strict=True)
        ]


def confusion_of(logits: Tensor, mask: Tensor) -> Tensor:
    """The pixels that count, `(C, C + 1)` int64, by their class, then by the predicted one, from
    logits `(C, H, W)` and a mask `(H, W)`; the last predicted class is none."""
    num_classes = len(logits)
    is_finite = logits.isfinite().all(dim=0)
    predicted = torch.where(is_finite, logits.argmax(dim=0), num_classes)  # (H, W)
    places = (mask * (num_classes + 1) + predicted)[mask != IGNORED]
    counts = places.bincount(minlength=num_classes * (num_classes + 1))
    return counts.view(num_classes, num_classes + 1)
