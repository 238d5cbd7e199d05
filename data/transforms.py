"""Augmentation on uint8 tensors in the loader process, normalisation on the device.

Random decisions come from global generators, which are seeded per sample and put back afterwards
(`util/rng.py`), so the transforms of torchvision and timm are pure functions of the sample and
leave the training's random state alone.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from util.settings.evaluation import FinetuneConfig

# Longest over shortest side of an image that is resized for evaluation. What lies outside is cut
# off first, as no centre crop shows it.
LONGEST_ASPECT = 4


def pretrain_transform(
    img_size: int | tuple[int, int], crop_min: float, interpolation: str, hflip: float
) -> Callable[[Tensor], Tensor]:
    """Random resized crop of area share [crop_min, 1] and aspect 3/4 to 4/3, then a horizontal
    flip; uint8 in and out.

    Source: arXiv 2111.06377, appendix A.1 ("random-sized cropping only"); crop_min 0.2 as in the
    public code.
    """
    crop = v2.RandomResizedCrop(
        _pair(img_size), scale=(crop_min, 1.0), interpolation=v2.InterpolationMode(interpolation)
    )
    return partial(crop_and_flip, crop, hflip)


def crop_and_flip(crop: v2.RandomResizedCrop, hflip: float, image: Tensor) -> Tensor:
    """A random resized crop, flipped horizontally with probability `hflip`; uint8 `(C, h, w)` to
    uint8 `(C, H, W)`.

    The draws and pixels are those of torchvision's two transforms in sequence, in two thirds of the
    time. The result has channels-last memory.
    """
    part = F.crop(image, **crop.make_params([image]))
    # a resize is fastest from and to channels-last memory, and a part of an image has to be copied
    # for that
    part = part.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    resized = F.resize(part, list(crop.size), interpolation=crop.interpolation, antialias=True)
    return resized.flip(-1) if torch.rand(1) < hflip else resized  # (C, H, W)


def finetune_transform(cfg: FinetuneConfig) -> Callable[[Tensor], Tensor]:
    """The augmentation of fine-tuning, uint8 `(C, H, W)` in and out; erasing comes later, on the
    device.

    Without RandAugment and colour jitter it is `pretrain_transform`.
    Source: arXiv 2111.06377, table 9; timm's RandAugment.
    """
    if cfg.auto_augment is None and not cfg.color_jitter:
        return pretrain_transform(cfg.img_size, cfg.crop_min, cfg.interpolation, cfg.hflip)
    augment = create_transform(
        (cfg.in_chans, *_pair(cfg.img_size)),
        is_training=True,
        use_prefetcher=True,  # ends in a uint8 tensor
        scale=(cfg.crop_min, 1.0),
        hflip=cfg.hflip,
        color_jitter=cfg.color_jitter,
        auto_augment=cfg.auto_augment,
        interpolation=cfg.interpolation,
        mean=cfg.mean,  # what geometric operations fill with
        std=cfg.std,
    )
    return v2.Compose([v2.ToPILImage(), augment])


class EvalTransform:
    """Resizes an image and cuts its centre; uint8 `(C, h, w)` to uint8 `(C, H, W)`.

    Args:
        img_size: of the result, an int or (H, W).
        crop_pct: the image is resized to cover img_size / crop_pct; None is 224/256, and 1 if no
            side is longer than 32 pixels.

    Bicubic and antialiased.
    Source: crop_pct 224/256 as in the public code (which takes 1 above 224 pixels).
    """

    def __init__(self, img_size: int | tuple[int, int], crop_pct: float | None):
        self.size = _pair(img_size)
        usual_pct = 1.0 if max(self.size) <= 32 else 224 / 256
        self.cover = tuple(math.floor(side / (crop_pct or usual_pct)) for side in self.size)

    def __call__(self, image: Tensor) -> Tensor:
        cut, resized = self._sizes(*image.shape[-2:])
        image = F.center_crop(image, list(cut))
        image = F.resize(
            image, list(resized), interpolation=v2.InterpolationMode.BICUBIC, antialias=True
        )
        return F.center_crop(image, list(self.size))  # (C, H, W)

    def seen(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The part of a (height, width) image that the result shows: top, left, bottom and right,
        in pixels of that image."""
        edges = []
        for side, cut, resized, size in zip(
            (height, width), *self._sizes(height, width), self.size, strict=True
        ):
            # as torchvision's centre crop rounds
            start = round((side - cut) / 2) + round((resized - size) / 2) * cut / resized
            edges.append((start, start + size * cut / resized))
        (top, bottom), (left, right) = edges
        return top, left, bottom, right

    def _sizes(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The size that is first cut from the centre of an image, and the size to which that is
        resized."""
        longest = LONGEST_ASPECT * max(self.cover) / min(self.cover) * min(height, width)
        # without this resizing a 1 x 5000 image would take a gigabyte
        height, width = min(height, math.ceil(longest)), min(width, math.ceil(longest))
        rows, columns = self.cover
        resized = max(rows, columns * height // width), max(columns, rows * width // height)
        return (height, width), resized


class PixelNormalizer:
    """uint8 images `(B, C, H, W)` to float32 on `device`, less each channel's mean and divided by
    its std.

    Args:
        mean, std: one value per channel, for pixels in [0, 1].
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device):
        self.device = device
        mean_255, std_255 = (
            torch.tensor(values, device=device).view(-1, 1, 1) * 255 for values in (mean, std)
        )  # (C, 1, 1)
        self.scale = 1 / std_255
        self.shift = -mean_255 / std_255

    def __call__(self, images: Tensor) -> Tensor:
        pixels = images.to(self.device, non_blocking=True).float()
        return pixels * self.scale + self.shift  # (B, C, H, W)

    def to_unit(self, images: Tensor) -> Tensor:
        """The inverse: float images `(B, C, H, W)` as pixels, clamped to [0, 1]."""
        return ((images - self.shift) / self.scale / 255).clamp(0, 1)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
