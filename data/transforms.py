"""Augmentation of pixels, of single images in a loader process or of a batch on the device, and
normalisation on the device. Pixels are uint8 or, of deeper images, float32 in [0, 255].

Random decisions come from torch generators that are seeded per sample (`util/rng.py`), so a crop is
a function of the sample, and the training's random state is left alone.

Shapes: `B` batch, `C` channels, `h` and `w` height and width of an image, `H` and `W` of a result.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from util.settings.base import pair
from util.settings.evaluation import FinetuneConfig
from util.settings.pretrain import SIMPLE_PADDING, CropConfig

# Longest over shortest side of an image that is resized for evaluation. What lies outside is cut
# off first, as no centre crop shows it.
LONGEST_ASPECT = 4
# Of random crops, as in torchvision: the smallest and largest ratio of width to height, and how
# often a crop is drawn until one lies within the image.
ASPECTS = (3 / 4, 4 / 3)
ATTEMPTS = 10


class CropAndFlip:
    """Random resized crop of area share [crop_min, 1] and aspect 3/4 to 4/3, then a horizontal flip
    with probability `hflip`.

    The draws are those of torchvision's RandomResizedCrop and RandomHorizontalFlip in sequence.
    Source: arXiv 2111.06377, appendix A.1 ("random-sized cropping only"); crop_min 0.2 as in the
    public code.

    Args:
        img_size: of the result, an int or (H, W).
        interpolation: bicubic or bilinear, antialiased.
    """

    def __init__(
        self, img_size: int | tuple[int, int], crop_min: float, interpolation: str, hflip: float
    ):
        self.size = pair(img_size)
        self.crop_min = crop_min
        self.interpolation = interpolation
        # as float32, which is what torch draws and compares
        self.hflip = torch.tensor(hflip).item()
        self.log_aspects = torch.tensor(ASPECTS).log().tolist()

    def __call__(self, image: Tensor) -> Tensor:
        """An image `(C, h, w)`, cropped to `(C, H, W)` by draws from torch's global generator.

        The pixels are torchvision's. The result has channels-last memory.
        """
        top, left, height, width, flip = self.draw(torch.default_generator, *image.shape[-2:])
        part = image[:, top : top + height, left : left + width]
        # a resize is fastest from and to channels-last memory, and a part of an image has to be
        # copied for that
        part = part.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
        (resized,) = resize(part, self.size, self.interpolation)
        return resized.flip(-1) if flip else resized  # (C, H, W)

    def draw(self, stream: torch.Generator, height: int, width: int) -> tuple[int, ...]:
        """The crop and flip of an image of this size: top, left, height and width in pixels, and 1
        for a flip."""
        real, whole = torch.empty(1), torch.empty(1, dtype=torch.int64)
        for _ in range(ATTEMPTS):
            area = height * width * real.uniform_(self.crop_min, 1.0, generator=stream).item()
            aspect = real.uniform_(*self.log_aspects, generator=stream).exp_().item()
            columns, rows = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < columns <= width and 0 < rows <= height:
                top = int(whole.random_(height - rows + 1, generator=stream))
                left = int(whole.random_(width - columns + 1, generator=stream))
                break
        else:
            rows, columns = _largest_crop(height, width)
            top, left = (height - rows) // 2, (width - columns) // 2
        flip = real.uniform_(generator=stream).item() < self.hflip
        return top, left, rows, columns, int(flip)

    def draw_many(self, streams: Iterable[torch.Generator], height: int, width: int) -> np.ndarray:
        """As `draw` for each of the streams, and the same numbers in half the time: `(5, B)`
        int64. A stream has been read before the next is taken.

        One read of a stream takes all bits that its crop may need, of which all crops are made at
        once.
        """
        pairs = torch.stack(
            [
                torch.empty(ATTEMPTS + 2, dtype=torch.int64).random_(-(2**63), None, generator=each)
                for each in streams
            ]
        ).numpy()
        # in the order in which the generator made them, 32 bits each
        words = np.stack([pairs >> 32 & 0xFFFFFFFF, pairs & 0xFFFFFFFF], axis=-1)
        words = words.reshape(len(pairs), -1)  # (B, 24)
        tries = words[:, : 2 * ATTEMPTS]
        areas = height * width * _uniform(tries[:, ::2], self.crop_min, 1.0).astype(np.float64)
        aspects = torch.from_numpy(_uniform(tries[:, 1::2], *self.log_aspects)).exp().double()
        widths = np.rint(np.sqrt(areas * aspects.numpy())).astype(np.int64)
        heights = np.rint(np.sqrt(areas / aspects.numpy())).astype(np.int64)
        fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)

        row, first = np.arange(len(words)), fits.argmax(axis=1)
        found = fits[row, first]
        largest_height, largest_width = _largest_crop(height, width)
        crop_height = np.where(found, heights[row, first], largest_height)
        crop_width = np.where(found, widths[row, first], largest_width)
        place = np.where(found, 2 * first + 2, 2 * ATTEMPTS)  # of the next word
        free_rows, free_columns = height - crop_height, width - crop_width
        top = np.where(found, words[row, place] % (free_rows + 1), free_rows // 2)
        left = np.where(found, words[row, place + 1] % (free_columns + 1), free_columns // 2)
        flip = _uniform(words[row, place + 2 * found], 0.0, 1.0) < self.hflip
        return np.stack([top, left, crop_height, crop_width, flip])

    def batch(self, images: Tensor, indices: list[int], drawn: np.ndarray) -> Tensor:
        """Crops and flips `drawn` of some of all images `(n, C, h, w)`, on their device:
        `(B, C, H, W)`.

        A resize is a product with one matrix per axis. Nearly all pixels equal those of the
        resize of single images, whose weights are rounded to 16 bits.
        """
        numbers = torch.from_numpy(np.concatenate([[indices], drawn]))
        chosen, top, left, height, width, flip = to_device(numbers, images.device)
        rows = images.permute(0, 2, 1, 3)[chosen].float()  # (B, h, C, w)
        size, channels = len(indices), images.shape[1]
        by_column = self._weights(left, width, self.size[1], images.shape[3], flip)  # (B, W, w)
        by_row = self._weights(top, height, self.size[0], images.shape[2], 0 * flip)  # (B, H, h)
        # uint8 to whole numbers after each axis, and floats into the range after both, as the
        # resize of single images does
        is_whole = images.dtype == torch.uint8
        rows = rows.flatten(1, 2) @ by_column.mT  # (B, h * C, W)
        rows = _within_range(rows, is_whole) if is_whole else rows
        rows = by_row @ rows.view(size, images.shape[2], -1)  # (B, H, C * W)
        pixels = _within_range(rows, is_whole).to(images.dtype)
        return pixels.view(size, self.size[0], channels, -1).permute(0, 2, 1, 3).contiguous()

    def _weights(self, start: Tensor, length: Tensor, out: int, side: int, flip: Tensor) -> Tensor:
        """Along one axis, what each of the `side` pixels of an image gives to each of the `out`
        pixels of its crop, `(B, out, side)` float32."""
        start, length, flip = (values.float()[:, None, None] for values in (start, length, flip))
        pixel = torch.arange(side, device=start.device) + 0.5
        target = torch.arange(out, device=start.device)[:, None] + 0.5
        scale = length / out
        centre = start + scale * torch.where(flip > 0, out - target, target)  # (B, out, 1)
        distance = ((pixel - centre) / scale.clamp(min=1)).abs_()  # (B, out, side)
        weights = KERNELS[self.interpolation](distance)
        weights *= (pixel > start) & (pixel < start + length)
        return weights / weights.sum(dim=-1, keepdim=True)


class SimpleCropAndFlip(CropAndFlip):
    """The image resized to cover the result, mirrored 4 pixels beyond each edge and cut at a random
    place, then a horizontal flip with probability `hflip`.

    The draws and pixels are those of torchvision's Resize, RandomCrop (padding_mode reflect) and
    RandomHorizontalFlip in sequence, and on the CPU the same by a loader and by `batch`.
    Source: the conservative crop of arXiv 2303.02416, as in its authors' public configurations.
    """

    def __init__(self, img_size: int | tuple[int, int], interpolation: str, hflip: float):
        super().__init__(img_size, 1.0, interpolation, hflip)
        self.cover = EvalTransform(img_size, crop_pct=1.0)

    def __call__(self, image: Tensor) -> Tensor:
        """As of the base class."""
        drawn = self.draw_many([torch.default_generator], *image.shape[-2:])
        return self.batch(image[None], [0], drawn)[0]  # (C, H, W)

    def draw(self, stream: torch.Generator, height: int, width: int) -> tuple[int, ...]:
        """The crop and flip of an image of this size: top and left in pixels of the resized image
        with its margin, and 1 for a flip."""
        places = [
            int(torch.randint(2 * SIMPLE_PADDING + covering - side + 1, (), generator=stream))
            for covering, side in zip(self.cover.sizes(height, width)[1], self.size, strict=True)
        ]
        flip = torch.rand(1, generator=stream).item() < self.hflip
        return *places, int(flip)

    def draw_many(self, streams: Iterable[torch.Generator], height: int, width: int) -> np.ndarray:
        """As `draw` for each of the streams: `(3, B)` int64."""
        return np.array([self.draw(stream, height, width) for stream in streams]).T

    def batch(self, images: Tensor, indices: list[int], drawn: np.ndarray) -> Tensor:
        """Crops and flips `drawn` of some of all images `(n, C, h, w)`, on their device:
        `(B, C, H, W)`."""
        numbers = torch.from_numpy(np.concatenate([[indices], drawn]))
        chosen, top, left, flip = to_device(numbers, images.device)
        covering = self.cover.covering(images[chosen], self.interpolation)  # (B, C, h', w')
        rows = _mirrored(top, self.size[0], covering.shape[2], 0 * flip)[:, :, None]  # (B, H, 1)
        columns = _mirrored(left, self.size[1], covering.shape[3], flip)[:, None]  # (B, 1, W)
        of_each = torch.arange(len(indices), device=images.device)[:, None, None]
        return covering[of_each, :, rows, columns].permute(0, 3, 1, 2)  # (B, C, H, W)


def _mirrored(start: Tensor, size: int, side: int, flip: Tensor) -> Tensor:
    """Along one axis, the pixels of an image of `side` that a crop shows which begins at `start` of
    the image with its mirrored margin, `(B, size)`."""
    place = torch.arange(size, device=start.device)
    place = torch.where(flip[:, None] > 0, size - 1 - place, place) + start[:, None]
    place = (place - SIMPLE_PADDING).abs()
    return side - 1 - (side - 1 - place).abs()


def pretrain_transform(cfg: CropConfig, img_size: int | tuple[int, int]) -> CropAndFlip:
    """The augmentation of pretraining."""
    if cfg.crop == "simple":
        return SimpleCropAndFlip(img_size, cfg.interpolation, cfg.hflip)
    return CropAndFlip(img_size, cfg.crop_min, cfg.interpolation, cfg.hflip)


def _largest_crop(height: int, width: int) -> tuple[int, int]:
    """Height and width of the largest part of an image whose aspect a random crop may have."""
    return min(height, round(width / ASPECTS[0])), min(width, round(height * ASPECTS[1]))


def _uniform(words: np.ndarray, start: float, end: float) -> np.ndarray:
    """Uniform float32 in [start, end), as torch makes them of random 32-bit words."""
    low, high = np.float32(start), np.float32(end)
    return ((words & 0xFFFFFF) * 2.0**-24 * float(high - low) + float(low)).astype(np.float32)


def _bicubic(distance: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -0.5."""
    x = distance.clamp(max=2)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    return torch.where(x < 1, near, far)


def _bilinear(distance: Tensor) -> Tensor:
    """The triangle."""
    return (1 - distance).clamp_(min=0)


KERNELS = {"bicubic": _bicubic, "bilinear": _bilinear}


def resize(images: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Pixels `(C, h, w)` or `(B, C, h, w)` to `(C, H, W)` or `(B, C, H, W)`, antialiased."""
    if images.shape[-2:] == size:
        return images
    if images.ndim == 3:
        return resize(images[None], size, interpolation)[0]
    is_whole = images.dtype == torch.uint8
    directly = is_whole and images.device.type == "cpu"  # which alone resizes whole numbers
    pixels = images if directly else images.float()
    pixels = F.interpolate(pixels, list(size), mode=interpolation, antialias=True)
    return pixels if directly else _within_range(pixels, is_whole).to(images.dtype)


def _within_range(values: Tensor, is_whole: bool) -> Tensor:
    """Interpolated float values, changed to lie in [0, 255] and perhaps to be whole numbers."""
    return (values.round_() if is_whole else values).clamp_(0, 255)


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Small `numbers` on `device`, without waiting for what that computes."""
    pinned = numbers.pin_memory() if device.type == "cuda" else numbers
    return pinned.to(device, non_blocking=True)


def finetune_transform(cfg: FinetuneConfig) -> Callable[[Tensor], Tensor]:
    """The augmentation of fine-tuning, `(C, H, W)` in and out; erasing comes later, on the device.

    Without RandAugment and colour jitter it is `CropAndFlip`. Else it draws from the generators of
    numpy and `random`, too, and takes uint8 alone.
    Source: arXiv 2111.06377, table 9; timm's RandAugment.
    """
    if not cfg.needs_8_bits:
        return CropAndFlip(cfg.img_size, cfg.crop_min, cfg.interpolation, cfg.hflip)
    from timm.data import create_transform  # here, as few runs need them
    from torchvision.transforms import v2

    augment = create_transform(
        (cfg.in_chans, *pair(cfg.img_size)),
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
    """Resizes images of one size and cuts their centres; pixels `(C, h, w)` or `(B, C, h, w)` to
    `(C, H, W)` or `(B, C, H, W)`.

    Args:
        img_size: of the result, an int or (H, W).
        crop_pct: the image is resized to cover img_size / crop_pct; None is 224/256, and 1 if no
            side is longer than 32 pixels.

    Bicubic and antialiased.
    Source: crop_pct 224/256 as in the public code (which takes 1 above 224 pixels).
    """

    def __init__(self, img_size: int | tuple[int, int], crop_pct: float | None):
        self.size = pair(img_size)
        usual_pct = 1.0 if max(self.size) <= 32 else 224 / 256
        self.cover = tuple(math.floor(side / (crop_pct or usual_pct)) for side in self.size)

    def __call__(self, images: Tensor) -> Tensor:
        return _centre(self.covering(images, "bicubic"), self.size)  # (C, H, W) or (B, C, H, W)

    def covering(self, images: Tensor, interpolation: str) -> Tensor:
        """The images resized to cover the result, before their centres are cut."""
        cut, resized = self.sizes(*images.shape[-2:])
        return resize(_centre(images, cut), resized, interpolation)

    def seen(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The part of a (height, width) image that the result shows: top, left, bottom and right,
        in pixels of that image."""
        edges = []
        for side, cut, resized, size in zip(
            (height, width), *self.sizes(height, width), self.size, strict=True
        ):
            start = _margin(side, cut) + _margin(resized, size) * cut / resized
            edges.append((start, start + size * cut / resized))
        (top, bottom), (left, right) = edges
        return top, left, bottom, right

    def sizes(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The size that is first cut from the centre of an image, and the size to which that is
        resized."""
        longest = LONGEST_ASPECT * max(self.cover) / min(self.cover) * min(height, width)
        # without this resizing a 1 x 5000 image would take a gigabyte
        height, width = min(height, math.ceil(longest)), min(width, math.ceil(longest))
        rows, columns = self.cover
        resized = max(rows, columns * height // width), max(columns, rows * width // height)
        return (height, width), resized


def _centre(images: Tensor, size: tuple[int, int]) -> Tensor:
    top, left = map(_margin, images.shape[-2:], size)
    return images[..., top : top + size[0], left : left + size[1]]


def _margin(side: int, cut: int) -> int:
    """Pixels before a part of length `cut` at the centre, rounded as torchvision's centre crop
    does."""
    return round((side - cut) / 2)


class PixelNormalizer:
    """Pixels in [0, 255], `(B, C, H, W)`, to float32 on `device`, less each channel's mean and
    divided by its std.

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
