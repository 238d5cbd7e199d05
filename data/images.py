"""Image files: which kinds are read, and how their bytes become pixels.

What a file holds decides how it is decoded, never its ending. torchcodec decodes JPEG, PNG and
still WebP. Pillow reads every header of photographs, which bounds the size before anything is
decoded, and decodes the other kinds. `data/arrays.py` reads TIFF that is no ordinary photograph,
`.npy` and DICOM. Transparency is dropped, the EXIF orientation is applied, and an animation gives
its first frame. Of metadata only the orientation is needed: where it cannot be read, the image is
taken as upright.

Shapes: `C` channels, `H` height, `W` width.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from data.arrays import (
    ARRAY_PHOTOMETRICS,
    DICOM_MAGIC,
    NPY_MAGIC,
    TIFF_MAGICS,
    check_size,
    read_dicom,
    read_npy,
    read_tiff,
    turned_upright,
    values_of,
)
from data.pixels import BadImageError as BadImageError  # others take both from here
from data.pixels import PixelFormat as PixelFormat
from data.pixels import Values, to_pixels
from util.settings.base import PixelConfig, word_or_pair

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
    "NPY": ("npy",),
    "DICOM": ("dcm",),
}
ARRAY_READERS = {"NPY": read_npy, "TIFF": read_tiff, "DICOM": read_dicom}
PILLOW_KINDS = tuple(kind for kind in IMAGE_KINDS if kind not in ("NPY", "DICOM"))
GREY_MODES = ("1", "L", "LA", "La", "I", "F")  # of Pillow, beside the 16-bit ones
BY_TORCHCODEC = ("JPEG", "PNG", "WEBP") if USE_TORCHCODEC else ()  # if it is a still image
IMAGE_ENDINGS = tuple(f".{ending}" for endings in IMAGE_KINDS.values() for ending in endings)
# Pillow refuses a PNG with more than 1 MiB in one compressed text, XMP or colour profile, which
# editors do write. Its limit on the sum of the texts (64 MiB) stays.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
BITS_PER_SAMPLE, PHOTOMETRIC, DESCRIPTION = 258, 262, 270  # tags of TIFF


def pixel_format(cfg: PixelConfig, in_chans: int, needs_8_bits: bool = False) -> PixelFormat:
    """The format that a stage's settings ask for."""
    return PixelFormat(
        in_chans,
        word_or_pair(cfg.pixel_range),
        cfg.channels,
        word_or_pair(cfg.dicom_window),
        cfg.dicom_frames == "all",
        needs_8_bits,
    )


def decode_image(encoded: bytes, pixels: PixelFormat, frame: int = 0) -> Tensor:
    """The image as `(C, H, W)`: uint8, or float32 in [0, 255] if the file is deeper or its range is
    not the usual one. `frame` is the place of a DICOM file's frame.

    Raises: BadImageError for an empty, truncated, foreign or too large file, and for one that does
        not fit the settings.
    """
    return to_pixels(read_values(encoded, pixels, frame), pixels)


def read_values(encoded: bytes, pixels: PixelFormat, frame: int = 0) -> Values:
    """What a file holds, with no range applied. Photographs are grey or RGB already.

    Raises: BadImageError.
    """
    if kind := array_kind(encoded, pixels):
        with explained():
            return ARRAY_READERS[kind](encoded, pixels, frame)
    with open_image(BytesIO(encoded)) as image:
        is_grey = image.mode in GREY_MODES or _is_16_bit(image)
        is_rgb = pixels.in_chans == 3 if pixels.of_photographs else not is_grey
        if not uses_torchcodec(image):
            return _decode_with_pillow(image, is_rgb)
        decoded = torchcodec_decode(
            encoded, mode="RGB" if is_rgb else "GRAY", output_dtype="auto"
        ).numpy()
        numbers = decoded[0] if decoded.ndim == 4 else decoded  # WebP is a stack of frames
        return values_of(numbers, kind_of(image), is_colour=True)  # (C, H, W)


def array_kind(encoded: bytes, pixels: PixelFormat) -> str:
    """The kind of a file that `data/arrays.py` reads, empty for others. TIFF of at most 8 bits is
    Pillow's if it is grey, RGB or a palette's, and no array by OME's description."""
    if encoded.startswith(NPY_MAGIC):
        return "NPY"
    if encoded[128:132] == DICOM_MAGIC:
        return "DICOM"
    if not encoded.startswith(TIFF_MAGICS):
        return ""
    try:
        with Image.open(BytesIO(encoded), formats=("TIFF",)) as image:
            tags = image.tag_v2  # type: ignore[attr-defined]
            is_array = (
                max(tags.get(BITS_PER_SAMPLE, (1,))) > 8
                or "OME" in str(tags.get(DESCRIPTION))
                # palettes, inks, and luma with chroma become RGB, whose channels are picked
                or (not pixels.of_photographs and tags.get(PHOTOMETRIC) in ARRAY_PHOTOMETRICS)
            )
    except Exception:  # noqa: BLE001 (Pillow's, of any type)
        is_array = True
    return "TIFF" if is_array else ""


@contextmanager
def open_image(file: BinaryIO) -> Iterator[Image.Image]:
    """The photograph with its header read and nothing decoded yet. What decoders raise in the body
    becomes a BadImageError, too.

    Raises: BadImageError for a file that its header alone refuses.
    """
    with explained():
        if not file.read(1):
            raise BadImageError("the file is empty")
        file.seek(0)
        with Image.open(file, formats=PILLOW_KINDS) as image:
            check_size(image.height, image.width)
            if image.mode in ("I", "F") and not (_is_16_bit(image) or uses_torchcodec(image)):
                pixels = "floating-point" if image.mode == "F" else "32-bit"
                raise BadImageError(f"holds {pixels} pixels, whose range is not defined")
            yield image


@contextmanager
def explained() -> Iterator[None]:
    """Whatever a decoder raises in the body becomes a BadImageError: broken files are seen to make
    them raise nearly every type."""
    try:
        yield
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(
            f"cannot identify image file: it is no readable {', '.join(IMAGE_KINDS)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise BadImageError(f"declares too many pixels: {error}") from error
    except Exception as error:
        text = next(iter(str(error).splitlines()), "")
        if " " not in text:  # a bare value, as of a KeyError
            text = f"{type(error).__name__} {text}".rstrip()
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


def orientation_of(image: Image.Image) -> object:
    """The number of an opened image's EXIF orientation; 1, upright, if it cannot be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 (Pillow's, of any type)
        return 1


def _decode_with_pillow(image: Image.Image, is_rgb: bool) -> Values:
    image.seek(0)
    image.load()  # before the orientation is asked for: Pillow turns a TIFF when it loads it
    if _is_16_bit(image):
        numbers = np.asarray(image).astype(np.uint16)[None]  # (1, H, W)
    else:
        converted = np.array(image.convert("RGB" if is_rgb else "L"))  # (H, W, 3) or (H, W)
        numbers = np.atleast_3d(converted).transpose(2, 0, 1)  # (C, H, W)
    # not ImageOps.exif_transpose: it writes the other EXIF entries again, and fails on odd ones
    numbers = turned_upright(numbers, orientation_of(image))
    return values_of(numbers, kind_of(image), is_colour=True)
