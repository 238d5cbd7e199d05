"""Transforms of an image together with its mask or its objects, and the transforms of images in the
evaluations of segmentation and detection.

A random crop is a rectangle of whole pixels of the image, which is cut out before it is resized:
memory does not grow with the scale, and pixels, masks and boxes share one geometry. A mask takes
the pixel at the centre of each new one, as the image's resize does. (torchvision's v2, which the
tests compare with, resizes before it crops, and takes a mask's pixels at the corner.)

Source: random scale and crop are the large-scale jitter of arXiv 2012.07177.

Shapes: `C` channels, `h` and `w` height and width of an image, `H` and `W` of a result, `n`
objects.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from data.annotated import IGNORED, SourceAnnotation
from data.loader import Annotation
from data.transforms import LONGEST_ASPECT, resize
from util.settings.base import pair
from util.settings.evaluation import FinetuneConfig, LinclsConfig

MAX_OBJECTS = 500  # of one training image; chance chooses among more
Size = int | tuple[int, int]
Sides = tuple[int, int]  # height and width


@dataclass(frozen=True)
class Crop:
    """A rectangle of an image: where it lies and its sides, in pixels; the size `(H', W')` to which
    it is resized; and whether it is flipped."""

    top: int
    left: int
    sides: Sides
    resized: Sides
    is_flipped: bool

    def part(self, pixels: Tensor) -> Tensor:
        """The rectangle of an image or mask `(..., h, w)`, in its own size."""
        height, width = self.sides
        part = pixels[..., self.top : self.top + height, self.left : self.left + width]
        return part.flip(-1) if self.is_flipped else part

    def mask(self, mask: Tensor, size: Sides, outside: int) -> Tensor:
        """A mask `(h, w)`, resized and filled up to `size` with the value `outside`: `(H, W)`."""
        rows, columns = (
            ((torch.arange(new) + 0.5) * (old / new)).long().clamp(max=old - 1)
            for old, new in zip(self.sides, self.resized, strict=True)
        )
        shown = self.part(mask)[rows[:, None], columns]  # (H', W')
        below, right = size[0] - self.resized[0], size[1] - self.resized[1]
        return F.pad(shown, (0, right, 0, below), value=outside)

    def boxes(self, boxes: Tensor) -> Tensor:
        """Boxes `(n, 4)` in pixels of the image, cut off at the rectangle, in pixels of the result;
        those outside have no area."""
        height, width = self.sides
        ends = torch.tensor([width, height, width, height])
        inside = (boxes - torch.tensor([self.left, self.top] * 2)).clamp(min=0).minimum(ends)
        if self.is_flipped:
            left, top, right, bottom = inside.unbind(dim=1)
            inside = torch.stack([width - right, top, width - left, bottom], dim=1)
        rows, columns = self.resized
        return inside * (torch.tensor([columns, rows, columns, rows]) / ends)  # (n, 4)


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """A part of an image in a random scale, flipped by chance, in the size `img_size`.

    Args:
        img_size: of the result, an int or (H, W).
        scales: smallest and largest scale; 1 is that in which the evaluation shows an image.
        hflip: probability of a horizontal flip.
        interpolation: of the image, bicubic or bilinear, antialiased.
        mean: of each channel, for pixels in [0, 1]. It fills what lies below and to the right of an
            image that is smaller than the result; there a mask is IGNORED.
        task: segment or detect, which show images in different scales.
    """

    img_size: Size
    scales: tuple[float, float]
    hflip: float
    interpolation: str
    mean: tuple[float, ...]
    task: str

    def __call__(self, image: Tensor, found: SourceAnnotation) -> tuple[Tensor, Annotation]:
        """An image `(C, h, w)` and its annotation to `(C, H, W)` and what is left of that, by draws
        from torch's global generator. Objects without area or pixels are left out."""
        size = pair(self.img_size)
        crop = self.draw(image.shape[-2], image.shape[-1])
        shown = resize(crop.part(image).contiguous(), crop.resized, self.interpolation)
        sample = pad_with_mean(shown, size, self.mean)
        if "mask" in found:
            return sample, {"mask": crop.mask(found["mask"], size, IGNORED)}
        boxes = crop.boxes(found["boxes"])
        kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1).nonzero()[:, 0]
        if len(kept) > MAX_OBJECTS:
            kept = kept[torch.randperm(len(kept))[:MAX_OBJECTS].sort().values]
        target = {"boxes": boxes[kept], "labels": found["labels"][kept]}
        if "masks" in found:
            masks = torch.empty(len(kept), *size, dtype=torch.uint8)
            seen: list[int] = []
            for row, number in enumerate(kept.tolist()):  # one by one: no other is dense
                mask = crop.mask(found["masks"][number], size, 0)
                if mask.any():
                    masks[len(seen)] = mask
                    seen.append(row)
            target = {name: values[seen] for name, values in target.items()}
            target["masks"] = masks[: len(seen)]
        return sample, target

    def draw(self, height: int, width: int) -> Crop:
        """The part of an image of this size that a sample shows: where the scaled image is larger
        than the result, a part of it in the result's size, else all of it."""
        size = pair(self.img_size)
        fit = segment_scale if self.task == "segment" else detect_scale
        scale = torch.empty(()).uniform_(*self.scales).item() * fit(height, width, size)
        is_flipped = torch.rand(()).item() < self.hflip
        sides, resized = [], []
        for side, new in zip((height, width), size, strict=True):
            length = min(side, max(1, round(new / scale)))
            sides.append(length)
            resized.append(min(new, max(1, round(length * scale))))
        top = int(torch.randint(height - sides[0] + 1, ()))
        left = int(torch.randint(width - sides[1] + 1, ()))
        return Crop(top, left, (sides[0], sides[1]), (resized[0], resized[1]), is_flipped)


def joint_transform(cfg: FinetuneConfig | LinclsConfig) -> TrainTransform:
    """The augmentation of a task that is not classify."""
    return TrainTransform(
        img_size=cfg.img_size,
        scales=cfg.scales(cfg.task),
        hflip=cfg.hflip,
        interpolation=cfg.interpolation,
        mean=cfg.mean,
        task=cfg.task,
    )


def segment_scale(height: int, width: int, size: Sides) -> float:
    """By what the evaluation of segmentation scales an image: the shorter side becomes that of
    `size`, or less if the longer one would be more than LONGEST_ASPECT times `size`."""
    longest = LONGEST_ASPECT * max(size) / max(height, width)
    return min(min(size) / min(height, width), longest)


def detect_scale(height: int, width: int, size: Sides) -> float:
    """By what the evaluation of detection scales an image: it just fits into `size`."""
    return min(size[0] / height, size[1] / width)


def segment_eval(image: Tensor, img_size: Size, patch_size: Size) -> Tensor:
    """Pixels `(C, h, w)` to `(C, H, W)`, scaled as `segment_scale` says, both sides then rounded up
    to whole patches by the same resize. Bicubic and antialiased."""
    height, width = image.shape[-2:]
    scale = segment_scale(height, width, pair(img_size))
    rows, columns = (
        math.ceil(max(1, round(side * scale)) / patch) * patch
        for side, patch in zip((height, width), pair(patch_size), strict=True)
    )
    return resize(image, (rows, columns), "bicubic")


def detect_eval(image: Tensor, img_size: Size, mean: tuple[float, ...]) -> Tensor:
    """Pixels `(C, h, w)` to `(C, H, W)` of `img_size`: resized to `fitted_size`, bicubic and
    antialiased, with the mean pixel below and to the right."""
    size = pair(img_size)
    shown = resize(image, fitted_size(image.shape[-2], image.shape[-1], img_size), "bicubic")
    return pad_with_mean(shown, size, mean)


def fitted_size(height: int, width: int, img_size: Size) -> Sides:
    """The size in which `detect_eval` shows an image of this height and width. Predicted boxes are
    scaled back by `height` and `width` over it."""
    scale = detect_scale(height, width, pair(img_size))
    return max(1, round(height * scale)), max(1, round(width * scale))


def pad_with_mean(image: Tensor, size: Sides, mean: tuple[float, ...]) -> Tensor:
    """Pixels `(C, h, w)` at the top left of `(C, H, W)`, the rest of which the normalisation makes
    0, to half a level of 8 bits. In channels-last memory."""
    fill = torch.tensor(mean) * 255
    fill = fill if image.is_floating_point() else fill.round().to(image.dtype)
    canvas = fill.repeat(*size, 1).permute(2, 0, 1)  # (C, H, W)
    canvas[:, : image.shape[-2], : image.shape[-1]] = image
    return canvas
