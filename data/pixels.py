"""What the values of an image file become: which channels are taken, and which values are black and
white. Pixels are in units of 0 to 255 everywhere, whatever the depth of the file.

Shapes: `C` channels, `H` height, `W` width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Interval = tuple[float, float]
WHITE = 255.0  # the unit: what the upper end of a range becomes
HINT = "tools/check_dataset.py --full prints the values that the files hold"


class BadImageError(ValueError):
    """A file that is no readable image; its text is the reason, in one line."""


class FormatError(BadImageError):
    """A file that is no readable image under these settings or with these libraries."""


@dataclass(frozen=True)
class PixelFormat:
    """What the pixels of every file become, whatever they are in the file.

    in_chans: number of channels. Of photographs, 3 is RGB and 1 is grey.
    pixel_range: the values that become black and white: the usual ones of the file's depth (auto),
        two stated ones, or each channel's own extremes (per_channel).
    channels: the channels that are taken, in this order, counted from 1; () takes all.
    dicom_window: centre and width in the file's unit, those that the file names (file), or all
        values that its depth allows (full).
    all_frames: whether each frame of a DICOM file is an image, and not only the first.
    needs_8_bits: whether deeper images are refused.
    """

    in_chans: int
    pixel_range: Interval | str = "auto"
    channels: tuple[int, ...] = ()
    dicom_window: Interval | str = "file"
    all_frames: bool = False
    needs_8_bits: bool = False

    @property
    def of_photographs(self) -> bool:
        """Whether all channels of an RGB or a grey image are asked for."""
        return self.in_chans in (1, 3) and not self.channels


# As checks and packs read files whose use is not known yet.
PHOTOGRAPH = PixelFormat(3, dicom_window="full")


@dataclass(frozen=True)
class Values:
    """What a file holds.

    numbers: `(C, H, W)` integers or floats. kind: for messages, as `16-bit TIFF`.
    is_colour: whether one channel is grey and three are RGB, so that one can become the other.
    usual: the values that are black and white, None if the file does not tell.
    is_inverted: whether the lowest value is white.
    """

    numbers: np.ndarray
    kind: str
    is_colour: bool
    usual: Interval | None
    is_inverted: bool = False


def depth_of(numbers: np.ndarray) -> str:
    """The kind of number in words, as `16-bit` or `32-bit floating-point`."""
    words = {"f": " floating-point", "i": " signed", "c": " complex"}.get(numbers.dtype.kind, "")
    return f"{numbers.dtype.itemsize * 8}-bit{words}"


def to_pixels(found: Values, pixels: PixelFormat) -> Tensor:
    """Values as pixels `(in_chans, H, W)`: uint8 if those of the file are, else float32 in [0,
    255]; what lies outside of the range is clipped.

    Raises: FormatError if they do not fit the settings, BadImageError for NaN and infinity.
    """
    numbers = pick_channels(found, pixels)
    if np.issubdtype(numbers.dtype, np.floating) and not np.isfinite(numbers).all():
        what = "NaN" if np.isnan(numbers).any() else "infinite"
        raise BadImageError(f"holds {what} pixels: {(~np.isfinite(numbers)).sum()} of them")
    scaled = _scaled(numbers, found, pixels)
    if pixels.needs_8_bits and scaled.dtype != np.uint8:
        raise FormatError(
            f"holds {found.kind}, and auto_augment and color_jitter change photographs of 8 bits: "
            "leave them out"
        )
    own = scaled if scaled.flags.writeable else scaled.copy()  # not the file's bytes
    return to_channels(torch.from_numpy(own), pixels.in_chans)


def pick_channels(found: Values, pixels: PixelFormat) -> np.ndarray:
    """The channels that the settings ask for; of photographs those that become them.

    Raises: FormatError if they are not there.
    """
    numbers, count = found.numbers, len(found.numbers)
    if pixels.channels:
        if max(pixels.channels) > count:
            raise FormatError(
                f"has {count} channels ({found.kind}), and channels asks for number "
                f"{max(pixels.channels)}"
            )
        numbers = numbers[[number - 1 for number in pixels.channels]]
    becomes_rgb = len(numbers) == 1 and pixels.in_chans == 3
    becomes_grey = found.is_colour and len(numbers) == 3 and pixels.in_chans == 1
    if len(numbers) != pixels.in_chans and not (becomes_rgb or becomes_grey):
        raise FormatError(
            f"has {len(numbers)} channel{'s' * (len(numbers) > 1)} ({found.kind}), and in_chans is "
            f"{pixels.in_chans}: set in_chans, with as many values of mean and std, or channels"
        )
    return numbers


def _scaled(numbers: np.ndarray, found: Values, pixels: PixelFormat) -> np.ndarray:
    """Values whose range becomes 0 to 255, `(C, H, W)` uint8 or float32."""
    wide = np.float32 if numbers.dtype.itemsize <= 2 else np.float64
    if isinstance(pixels.pixel_range, tuple):
        ends = np.array(pixels.pixel_range, wide)
    elif pixels.pixel_range == "per_channel":
        extremes = [end(numbers, axis=(1, 2), keepdims=True) for end in (np.min, np.max)]
        ends = np.array(extremes, wide)  # (2, C, 1, 1)
    elif found.usual is not None:
        ends = np.array(found.usual, wide)
    else:
        raise FormatError(
            f"holds {found.kind} pixels, whose range is not defined: "
            f"set pixel_range LOW HIGH or per_channel ({HINT})"
        )
    if numbers.dtype == np.uint8 and ends.tolist() == [0, WHITE]:
        return 255 - numbers if found.is_inverted else numbers
    low, high = ends
    factor = WHITE / np.where(high == low, np.inf, high - low)  # a channel of one value is black
    scaled: np.ndarray = numbers.astype(wide)  # and then in place, as images may be large
    np.subtract(scaled, low, out=scaled)
    np.multiply(scaled, factor, out=scaled)
    scaled = np.clip(scaled, 0, WHITE, out=scaled).astype(np.float32, copy=False)
    return WHITE - scaled if found.is_inverted else scaled


def to_channels(image: Tensor, in_chans: int) -> Tensor:
    """An image of pixels `(1 or 3, H, W)` as RGB or grey; one that has `in_chans` as it is."""
    if in_chans >= len(image):
        return image.expand(in_chans, -1, -1)
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # ITU-R 601, as Pillow and torchcodec
    grey = (image * luma).sum(dim=0, keepdim=True)  # (1, H, W)
    return grey.clamp(max=WHITE) if image.is_floating_point() else grey.round().to(torch.uint8)
