"""Decodes one image file to uint8, whatever its kind. The content decides, never the file's ending.

torchcodec decodes JPEG, PNG and still WebP; Pillow reads every header (which bounds the size before
anything is decoded) and decodes the rest. Transparency is dropped, EXIF orientation applied, 16
bits keep their upper 8, and an animation gives its first frame.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchcodec.decoders import decode_image as torchcodec_decode

# Refused by the header, before anything is decoded. Pillow has the same limit but only warns up to
# twice of it; an animated WebP was seen to take 25 bytes per pixel in decoding.
MAX_PIXELS = 89_478_485
# An allow-list, as some of Pillow's other formats start programs (PostScript).
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
TORCHCODEC_FORMATS = ("JPEG", "PNG", "WEBP")
# What the decoders raise on broken files, as seen in tests: Pillow's plugins use SyntaxError and
# struct.error too.
DECODING_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
)


class BadImageError(ValueError):
    """A file that is no readable image; its text is the reason, in one line."""


def decode_image(encoded: bytes, in_chans: int) -> Tensor:
    """The image as uint8 `(C, H, W)`: RGB for `in_chans` 3, grey for 1.

    Raises: BadImageError for an empty, truncated, foreign or too large file.
    """
    with open_image(BytesIO(encoded)) as image:
        if uses_torchcodec(image):
            decoded = torchcodec_decode(encoded, mode="RGB" if in_chans == 3 else "GRAY")
            return (
                decoded[0] if decoded.ndim == 4 else decoded
            )  # (C, H, W); WebP comes as a stack of frames
        return _decode_with_pillow(image, in_chans)


@contextmanager
def open_image(file: BinaryIO) -> Iterator[Image.Image]:
    """The image with its header read and nothing decoded yet; what decoders raise in the body is a
    BadImageError too.

    Raises: BadImageError for a file that its header alone refuses.
    """
    try:
        if not file.read(1):
            raise BadImageError("the file is empty")
        file.seek(0)
        with Image.open(file, formats=PILLOW_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImageError(f"declares too many pixels: {image.width} x {image.height}")
            if image.mode in ("I", "F") and not (_is_16_bit(image) or uses_torchcodec(image)):
                kind = "floating-point" if image.mode == "F" else "32-bit"
                raise BadImageError(f"holds {kind} pixels, whose range is not defined")
            yield image
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(
            f"cannot identify image file: it is no readable {', '.join(PILLOW_FORMATS)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise BadImageError(f"declares too many pixels: {error}") from error
    except DECODING_ERRORS as error:
        # torchcodec's texts begin with a place in its C++ source
        text = re.sub(
            r"^.*\.cpp:\d+, ",
            "",
            str(error).splitlines()[0] if str(error) else type(error).__name__,
        )
        raise BadImageError(f"cannot be decoded: {text}") from error


def uses_torchcodec(image: Image.Image) -> bool:
    """Whether torchcodec decodes it: stills of the kinds that it knows."""
    return image.format in TORCHCODEC_FORMATS and getattr(image, "n_frames", 1) == 1


def _is_16_bit(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (
        image.mode == "I" and image.format == "PPM"
    )  # widened by Pillow


def _decode_with_pillow(image: Image.Image, in_chans: int) -> Tensor:
    image.seek(0)
    upright = ImageOps.exif_transpose(image)
    if _is_16_bit(image):
        upright = Image.fromarray((np.asarray(upright) // 256).astype(np.uint8))
    pixels = np.asarray(upright.convert("RGB" if in_chans == 3 else "L"))
    if in_chans == 1:
        pixels = pixels[:, :, None]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)  # (C, H, W)


def to_channels(image: Tensor, in_chans: int) -> Tensor:
    """An already decoded uint8 `(1 or 3, H, W)` image as RGB or grey."""
    if image.shape[0] == in_chans:
        return image
    if in_chans == 3:
        return image.expand(3, -1, -1)
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # ITU-R 601, as Pillow and torchcodec
    return (image * luma).sum(dim=0, keepdim=True).round().to(torch.uint8)  # (1, H, W)
