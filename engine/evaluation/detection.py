"""Detection: boxes and masks of a model in the images' own size, and COCO's average precision.

The average precision of a class at one IoU is the mean, over 101 recalls from 0 to 1, of the
highest precision at that recall or above; box_ap is the mean over the IoUs 0.50, 0.55, ..., 0.95
and the classes, box_ap50 and box_ap75 over the classes alone, all in percent. A class without an
object does not count. At most MAX_DETECTIONS of an image count. Objects are small below 32 x 32
pixels, and large above 96 x 96.

Source: COCO's evaluation, by pycocotools.

Shapes: `n` detections of an image, `h` and `w` sides of a predicted mask, `H` and `W` of an image.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.annotated import DetectionSource, EvalSample
from data.joint import detect_eval, fitted_size
from data.loader import Annotation, BadSample
from engine.evaluation.classification import Scores
from engine.evaluation.features import end_together, on_pixels
from engine.evaluation.metrics import Figures
from engine.run.annotated_batches import annotated_eval_batches
from engine.run.folder import Run
from engine.run.interrupts import received
from models.dense import DenseTransformer
from models.spec import Size
from util.dist import all_gather, from_main
from util.settings.evaluation import METRICS, FinetuneConfig

MAX_DETECTIONS = 100  # of an image, the most probable ones
KINDS = {"box": "bbox", "mask": "segm"}  # of figures, and pycocotools' words for them
# Figures by the places of the IoUs 0.50, 0.55, ... and by pycocotools' number of the area.
PARTS: dict[str, tuple[slice, int]] = {
    "ap": (slice(None), 0),
    "ap50": (slice(0, 1), 0),
    "ap75": (slice(5, 6), 0),
    "ap_small": (slice(None), 1),
    "ap_medium": (slice(None), 2),
    "ap_large": (slice(None), 3),
}
CocoEntry = dict[str, Any]  # an object or a detection as COCO's JSON has it


class DetectionScores(Scores):
    """What a detector was worth. There is no loss, and the figures of small, medium and large
    objects are in results.json alone."""

    @property
    def shown(self) -> tuple[str, ...]:
        return tuple(name for name in METRICS["detect"] if name in self.scalars)

    @property
    def logged(self) -> dict[str, float]:
        return {name: self.scalars[name] for name in self.shown}

    def as_dict(self, class_names: list[str] | None = None) -> dict[str, object]:
        results = super().as_dict(class_names)
        del results["loss"]
        return results


@dataclass(frozen=True)
class DetectionEvaluator:
    """Scores models on one source of images with objects."""

    cfg: FinetuneConfig
    run: Run
    source: DetectionSource

    @cached_property
    def truth(self) -> dict[str, list[dict[str, object]]]:
        """What the detections are compared with, the same after every epoch."""
        return self.source.ground_truth()

    def transform(self, image: Tensor) -> Tensor:
        """An image `(C, h, w)` as the model takes it, padded to a square."""
        return detect_eval(image, self.cfg.img_size, self.cfg.mean)

    def __call__(self, model: nn.Module) -> DetectionScores:
        """The scores of a model in eval mode on the whole source. All processes must call, and all
        get them. They are the same on any number of processes.

        Raises: DataError on all processes if an image or its objects cannot be read.
        """
        bad: list[BadSample] = []
        entries: list[CocoEntry] = []
        batches = annotated_eval_batches(
            self.cfg, self.run, self.source, self.transform, with_targets=False
        )
        for batch in batches:
            bad += [entry for sample in batch for entry in sample.bad]
            if bad or received():
                break
            for sample, found in zip(batch, self.detect(model, batch), strict=True):
                entries += coco_entries(sample.number, found, sample.size)
        end_together(bad)
        # those of an image are of one process and keep their order, which alone matters
        gathered = [entry for of_process in all_gather(entries) for entry in of_process]
        kinds = ("box", "mask") if self.has_masks(model) else ("box",)
        figures = from_main(lambda: average_precision(self.truth, gathered, kinds))
        return DetectionScores(len(self.source), math.nan, figures)

    def detect(self, model: nn.Module, samples: list[EvalSample]) -> list[Annotation]:
        """What a model finds in some images, in their own pixels, see `within`."""
        call = on_pixels(model, self.cfg, self.cfg.precision, self.run.device)
        answers = detect(call, samples, self.cfg.img_size)
        if not self.has_masks(model):
            answers = [{n: v for n, v in found.items() if n != "masks"} for found in answers]
        return answers

    def has_masks(self, model: nn.Module) -> bool:
        """Whether masks are judged: both the model and the data may have none."""
        assert isinstance(model, DenseTransformer)
        return self.cfg.instance_masks and model.spec.instance_masks


@torch.no_grad()
def detect(
    call: Callable[[Tensor], list[Annotation]], samples: list[EvalSample], img_size: Size
) -> list[Annotation]:
    """What a model finds in some images, in their own pixels, see `within`.

    Args:
        call: as `on_pixels` returns it.
        samples: of `detect_eval` for this `img_size`.
    """
    images = [sample.image for sample in samples]
    if len({image.dtype for image in images}) > 1:  # files of 8 bits and deeper ones
        images = [image.float() for image in images]
    answers = call(torch.stack(images))
    return [
        within(found, fitted_size(*sample.size, img_size), sample.size)
        for sample, found in zip(samples, answers, strict=True)
    ]


def within(found: Annotation, shown: tuple[int, int], size: tuple[int, int]) -> Annotation:
    """The most probable detections of a padded image, in the pixels of the image itself: sorted by
    their scores, and without those that lie in the padding.

    Args:
        found: of the model, see `models/dense.py`.
        shown: height and width at which the model saw the image, without the padding.
        size: height and width `(H, W)` of the image itself.
    """
    found = {name: values.cpu() for name, values in found.items()}
    order = found["scores"].argsort(descending=True, stable=True)[:MAX_DETECTIONS]
    found = {name: values[order] for name, values in found.items()}
    (height, width), (rows, columns) = size, shown
    scale = torch.tensor([width / columns, height / rows] * 2, dtype=torch.float64)
    boxes = found["boxes"].double() * scale  # (n, 4)
    left, top, right, bottom = boxes.unbind(dim=1)
    inside = (right.clamp(max=width) > left.clamp(min=0)) & (
        bottom.clamp(max=height) > top.clamp(min=0)
    )
    return {name: values[inside] for name, values in {**found, "boxes": boxes}.items()}


def paste(mask: Tensor, box: Tensor, size: tuple[int, int]) -> np.ndarray:
    """A mask of probabilities `(h, w)` within a box as the pixels `(H, W)` uint8 of an image that
    it covers: those at whose centres the interpolated probability is at least a half."""
    (height, width), (left, top, right, bottom) = size, box.tolist()
    rows = torch.arange(max(0, math.floor(top)), min(height, math.ceil(bottom)))
    columns = torch.arange(max(0, math.floor(left)), min(width, math.ceil(right)))
    canvas = np.zeros(size, dtype=np.uint8)
    if len(rows) and len(columns):
        # from -1 to 1 within the box
        y = 2 * (rows + 0.5 - top) / (bottom - top) - 1
        x = 2 * (columns + 0.5 - left) / (right - left) - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]  # (1, rows, cols, 2)
        values = F.grid_sample(mask[None, None].float(), grid.float(), align_corners=False)[0, 0]
        part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        canvas[part] = (values >= 0.5).numpy()
    return canvas


def coco_entries(number: int | str, found: Annotation, size: tuple[int, int]) -> list[CocoEntry]:
    """The detections of an image, in its own pixels, as COCO's results have them: the masks as run
    lengths, made one after the other.

    Args:
        number: the image's `image_id`.
        found: as `within` returns it.
    """
    from pycocotools.mask import encode  # here, as the other evaluations do not need it

    height, width = size
    entries = []
    for place, (label, score) in enumerate(
        zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)
    ):
        box = found["boxes"][place]
        left, top, right, bottom = box.tolist()
        left, top = max(left, 0.0), max(top, 0.0)
        sides = [min(right, float(width)) - left, min(bottom, float(height)) - top]
        entry: CocoEntry = {
            "image_id": number,
            "category_id": label,
            "bbox": [left, top, *sides],
            "score": score,
        }
        if "masks" in found:
            pixels = paste(found["masks"][place], box, size)
            entry["segmentation"] = encode(np.asfortranarray(pixels))
        entries.append(entry)
    return entries


def average_precision(
    truth: Mapping[str, list[CocoEntry]], detections: Iterable[CocoEntry], kinds: Iterable[str]
) -> Figures:
    """COCO's figures in percent of boxes and masks, NaN where no class has an object.

    Args:
        truth: COCO's `images`, `annotations` and `categories`; see `DetectionSource`.
        detections: of all images; equally probable ones in the order in which they count.
        kinds: "box", "mask" or both.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    from pycocotools.mask import area

    detections = list(detections)
    scalars, per_class = {}, {}
    for kind in kinds:
        found = []
        for number, entry in enumerate(detections, start=1):  # 0 would be taken for no match
            *_, width, height = entry["bbox"]
            size = width * height if kind == "box" else int(area(entry["segmentation"]))
            found.append({**entry, "id": number, "area": size, "iscrowd": 0})
        with redirect_stdout(StringIO()):  # the library prints
            sides = []
            for entries in (truth["annotations"], found):
                side = COCO()
                # copies, to which the library adds what it needs
                side.dataset = {**truth, "annotations": [dict(entry) for entry in entries]}
                side.createIndex()
                sides.append(side)
            evaluation = COCOeval(*sides, KINDS[kind])
            evaluation.params.maxDets = [MAX_DETECTIONS]
            evaluation.evaluate()
            evaluation.accumulate()
        # (IoUs, recalls, classes, areas); -1 where a class has no object
        precision = evaluation.eval["precision"][..., 0]
        precision = np.where(precision < 0, math.nan, 100 * precision)
        for name, (ious, size) in PARTS.items():
            part = precision[ious, :, :, size]
            scalars[f"{kind}_{name}"] = _mean(part)
        per_class[f"{kind}_ap"] = [_mean(of_class) for of_class in precision[..., 0].swapaxes(0, 2)]
    return Figures(scalars, per_class)


def _mean(values: np.ndarray) -> float:
    """Of those that are defined; NaN if none is."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else math.nan
