"""Image files: which kinds are read, and how their bytes become uint8 pixels.

What a file holds decides how it is decoded, never its ending. torchcodec decodes JPEG, PNG and
still WebP. Pillow reads every header, which bounds the size before anything is decoded, and decodes
the other kinds. Transparency is dropped, the EXIF orientation is applied, 16-bit pixels keep their
upper 8 bits, and an animation gives its first frame.

Shapes: `C` channels, `H` height, `W` width.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from util.settings.base import PixelConfig

if USE_TORCHCODEC := torch.__version__ >= "2.11":  # before that, Pillow decodes all kinds
    from torchcodec.decoders import decode_image as torchcodec_decode

# The kinds that are listed in folders, found in shards, decoded, packed and checked, by Pillow's
# name, with the endings of their files' names without the dot, the usual one first. It is an
# allow-list, as some of Pillow's other formats start programs (PostScript).
IMAGE_KINDS = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
    "PPM": ("ppm", "pgm"),
}
BY_TORCHCODEC = ("JPEG", "PNG", "WEBP") if USE_TORCHCODEC else ()  # if it is a still image
IMAGE_ENDINGS = tuple(f".{ending}" for endings in IMAGE_KINDS.values() for ending in endings)
# Pillow has the same limit but only warns up to twice of it; an animated WebP was seen to take 25
# bytes per pixel in decoding.
MAX_PIXELS = 89_478_485
# Pillow refuses a PNG with more than 1 MiB in one compressed text, XMP or colour profile, which
# editors do write. Its limit on the sum of the texts (64 MiB) stays.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
# What the decoders raise on broken files.
DECODING_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    SyntaxError,
    EOFError,
    TypeError,
    LookupError,
    ArithmeticError,
    struct.error,
    zlib.error,
)
UPRIGHT = {  # how an image with an EXIF orientation is turned upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImageError(ValueError):
    """A file that is no readable image; its text is the reason, in one line."""


@dataclass(frozen=True)
class PixelFormat:
    """What the pixels of every file become, whatever they are in the file.

    in_chans: number of channels: 3 is RGB, 1 is grey.
    """

    in_chans: int


def pixel_format(cfg: PixelConfig, in_chans: int) -> PixelFormat:
    """The format that a stage's settings ask for."""
    return PixelFormat(in_chans)


def decode_image(encoded: bytes, pixels: PixelFormat) -> Tensor:
    """The image as uint8 `(C, H, W)`.

    Raises: BadImageError for an empty, truncated, foreign or too large file.
    """
    with open_image(BytesIO(encoded)) as image:
        if not uses_torchcodec(image):
            return _decode_with_pillow(image, pixels.in_chans)
        decoded = torchcodec_decode(encoded, mode="RGB" if pixels.in_chans == 3 else "GRAY")
        return decoded[0] if decoded.ndim == 4 else decoded  # WebP is a stack of frames; (C, H, W)


@contextmanager
def open_image(file: BinaryIO) -> Iterator[Image.Image]:
    """The image with its header read and nothing decoded yet. What decoders raise in the body
    becomes a BadImageError, too.

    Raises: BadImageError for a file that its header alone refuses.
    """
    try:
        if not file.read(1):
            raise BadImageError("the file is empty")
        file.seek(0)
        with Image.open(file, formats=tuple(IMAGE_KINDS)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImageError(f"declares too many pixels: {image.width} x {image.height}")
            if image.mode in ("I", "F") and not (_is_16_bit(image) or uses_torchcodec(image)):
                pixels = "floating-point" if image.mode == "F" else "32-bit"
                raise BadImageError(f"holds {pixels} pixels, whose range is not defined")
            yield image
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(
            f"cannot identify image file: it is no readable {', '.join(IMAGE_KINDS)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise BadImageError(f"declares too many pixels: {error}") from error
    except DECODING_ERRORS as error:
        text = (str(error) or type(error).__name__).splitlines()[0]
        # torchcodec's texts begin with a place in its C++ source
        raise BadImageError(re.sub(r"^(.*\.cpp:\d+, )?", "cannot be decoded: ", text)) from error


def kind_of(image: Image.Image) -> str:
    """The key of an opened image in IMAGE_KINDS."""
    return "JPEG" if image.format == "MPO" else image.format or ""  # MPO is several JPEGs


def uses_torchcodec(image: Image.Image) -> bool:
    """Whether torchcodec decodes the image: stills of the kinds that it knows."""
    return image.format in BY_TORCHCODEC and getattr(image, "n_frames", 1) == 1


def _is_16_bit(image: Image.Image) -> bool:
    # Pillow widens those of a PPM to mode "I"
    return image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")


def _decode_with_pillow(image: Image.Image, in_chans: int) -> Tensor:
    image.seek(0)
    image.load()  # before the orientation is asked for: Pillow turns a TIFF when it loads it
    is_16_bit = _is_16_bit(image)
    # not ImageOps.exif_transpose: it writes the other EXIF entries again, and fails on odd ones
    turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    upright = image if turn is None else image.transpose(turn)
    if is_16_bit:
        upright = Image.fromarray((np.asarray(upright) // 256).astype(np.uint8))
    pixels = np.array(upright.convert("RGB" if in_chans == 3 else "L"))  # (H, W, 3) or (H, W)
    return torch.from_numpy(pixels).view(*pixels.shape[:2], in_chans).permute(2, 0, 1)  # (C, H, W)


def to_channels(image: Tensor, in_chans: int) -> Tensor:
    """An already decoded uint8 image `(1 or 3, H, W)` as RGB or grey."""
    if in_chans >= len(image):
        return image.expand(in_chans, -1, -1)
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # ITU-R 601, as Pillow and torchcodec
    return (image * luma).sum(dim=0, keepdim=True).round().to(torch.uint8)  # (1, H, W)
