"""Decodes one image file to uint8, whatever its kind. The content decides, never the file's ending.

torchcodec decodes JPEG, PNG and still WebP; Pillow reads every header (which bounds the size before anything is
decoded) and decodes the rest. Transparency is dropped, EXIF orientation applied, 16 bits keep their upper 8, and an
animation gives its first frame.
"""

import re
import struct
import zlib
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchcodec.decoders import decode_image as torchcodec_decode

# Refused by the header, before anything is decoded. Pillow has the same limit but only warns up to twice of it; an
# animated WebP was seen to take 25 bytes per pixel in decoding.
MAX_PIXELS = 89_478_485
# An allow-list, as some of Pillow's other formats start programs (PostScript).
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
TORCHCODEC_FORMATS = ("JPEG", "PNG", "WEBP")


class BadImageError(ValueError):
    """A file that is no readable image; its text is the reason, in one line."""


def decode_image(encoded: bytes, in_chans: int) -> Tensor:
    """The image as uint8 `(C, H, W)`: RGB for `in_chans` 3, grey for 1.

    Raises: BadImageError for an empty, truncated, foreign or too large file.
    """
    if not encoded:
        raise BadImageError("the file is empty")
    try:
        with Image.open(BytesIO(encoded), formats=PILLOW_FORMATS) as header:
            if header.width * header.height > MAX_PIXELS:
                raise BadImageError(f"declares too many pixels: {header.width} x {header.height}")
            if header.format in TORCHCODEC_FORMATS and getattr(header, "n_frames", 1) == 1:
                image = torchcodec_decode(encoded, mode="RGB" if in_chans == 3 else "GRAY")
                return image[0] if image.ndim == 4 else image  # (C, H, W); WebP comes as a stack of frames
            return _decode_with_pillow(header, in_chans)
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(f"cannot identify image file: it is no readable {', '.join(PILLOW_FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise BadImageError(f"declares too many pixels: {error}") from error
    # What the decoders raise on broken files, as seen in tests: Pillow's plugins use SyntaxError and struct.error too.
    except (OSError, ValueError, RuntimeError, SyntaxError, EOFError, struct.error, zlib.error) as error:
        # torchcodec's texts begin with a place in its C++ source
        text = re.sub(r"^.*\.cpp:\d+, ", "", str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise BadImageError(f"cannot be decoded: {text}") from error


def _decode_with_pillow(image: Image.Image, in_chans: int) -> Tensor:
    image.seek(0)
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16") or (upright.mode == "I" and image.format == "PPM"):  # 16 bits, widened by Pillow
        upright = Image.fromarray((np.asarray(upright) // 256).astype(np.uint8))
    elif upright.mode in ("I", "F"):
        kind = "floating-point" if upright.mode == "F" else "32-bit"
        raise BadImageError(f"holds {kind} pixels, whose range is not defined")
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
