"""Examines every image of a data set as training would meet it: its kind, its size, whether it can
be read, and a key by which equal images are found, in one split or in both.

A quick check reads a file's header and end, and decodes the file only if its end does not show that
it is complete. A full check decodes every image. Shards are read completely in both, as their
checksums are verified whenever they are read.
"""

import hashlib
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data.arrays import UPRIGHT, may_be_array
from data.images import (
    IMAGE_ENDINGS,
    IMAGE_KINDS,
    BadImageError,
    PixelFormat,
    array_kind,
    decode_image,
    kind_of,
    open_image,
    orientation_of,
    read_values,
)
from data.packs.source import PackedSource
from data.pixels import PHOTOGRAPH, Values, depth_of, pick_channels, to_pixels
from data.sources import PASSED_OVER, FolderSource
from util.pool import in_processes

NUM_SAMPLED = 1000  # about, images of a source whose values give the percentiles
PER_IMAGE = 256  # about, pixels of each of them
PART = PackedSource.block_size  # images of one task
TAIL = 4096  # bytes of a file's end that are read
ROWS = 64  # of an image, about, from which its mean and variance are taken
PNG_DEPTH = 24  # where a PNG's header has its bits per channel
HEAD = 132  # bytes of a file's beginning that are read
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"\0\0\0\0IEND\xaeB`\x82", "GIF": b"\0;"}
MODES = {"1": "1-bit", "I": "16-bit L"}
ANIMATED = ("GIF", "PNG", "WEBP")  # kinds whose several pictures are frames


def finding_dtype(in_chans: int) -> np.dtype:
    """FINDING: what is found in one image. All but reason, num_bytes, extremes and values is 0 or
    empty for one that cannot be read."""
    return np.dtype(
        [
            ("reason", object),  # why it cannot be read, 0 if it can
            ("num_bytes", "<i8"),
            ("kind", object),
            ("ending", object),  # a remark on an ending that is not of its kind, 0 without one
            ("turn", object),  # a remark on its orientation, 0 if there is none
            ("sides", "<i4", 2),  # short and long, in pixels
            ("key", "S32"),  # equal for images that may be equal; in a full check if the pixels are
            # Only in a full check: mean and mean square by channel, in units of 255
            ("moments", "<f4", (2, in_chans)),
            # and of an image that is deeper than 8 bits, in the file's unit: lowest and highest
            # value by channel, and of some images a sample of them `(C, k)`
            ("extremes", "<f8", (2, in_chans)),
            ("values", object),
        ]
    )


def format_of(source: FolderSource | PackedSource, asked: PixelFormat) -> PixelFormat:
    """`asked`, its in_chans that of the first image if it is 0; grey is taken as RGB."""
    count = 3
    with suppress(OSError, BadImageError), _open_file(source, 0) as file:
        count = len(read_values(file.read(), PHOTOGRAPH).numbers)
    return replace(asked, in_chans=asked.in_chans or (3 if count == 1 else count))


def examine(
    source: FolderSource | PackedSource, full: bool, workers: int, pixels: PixelFormat
) -> np.ndarray:
    """The images of a source as `(n,)` of FINDING, with a progress bar on a terminal."""
    source.read_ahead()
    tasks = np.split(np.arange(len(source)), range(PART, len(source), PART))
    parts = tqdm(
        in_processes(partial(_examine_part, source, full, pixels), tasks, workers),
        total=len(tasks),
        unit=f" x {PART} images",
        dynamic_ncols=True,
        leave=False,
        disable=None,  # where there is no terminal
    )
    return np.concatenate([*parts])


def equal_images(
    sources: Sequence[FolderSource | PackedSource], keys: list[np.ndarray], full: bool
) -> list[list[tuple[int, int]]]:
    """Groups of equal images, each by the number of its source and its index there. Their bytes are
    equal, or after a full check their pixels.

    keys: of FINDING, for each source. Only files whose sizes and ends are equal are read again.
    """
    values, counts = np.unique(np.concatenate([[b""], *keys]), return_counts=True)
    repeated = values[(counts > 1) & (values != b"")]
    groups = defaultdict(list)
    for number, (source, of_source) in enumerate(zip(sources, keys, strict=True)):
        for index in np.flatnonzero(np.isin(of_source, repeated)).tolist():
            content = of_source[index] if full else _digest(source, index)
            groups[content].append((number, index))
    groups.pop(b"", None)  # files that have become unreadable
    return sorted(group for group in groups.values() if len(group) > 1)


def other_files(root: Path) -> Counter[str]:
    """Number of files below a folder that are not listed as images, by ending, hidden ones left
    out."""
    found: Counter[str] = Counter()
    for _, subfolders, files in os.walk(root):
        subfolders[:] = [n for n in subfolders if n[0] != "." and n not in PASSED_OVER]
        found.update(
            Path(name).suffix.lower()
            for name in files
            if not name.startswith(".") and not name.lower().endswith(IMAGE_ENDINGS)
        )
    return found


def _open_file(source: FolderSource | PackedSource, index: int) -> BinaryIO:
    """An image's file. Raises: OSError or BadImageError."""
    if isinstance(source, PackedSource):
        return BytesIO(source.read_bytes(index))
    return Path(source.name(index)).open("rb")


def _digest(source: FolderSource | PackedSource, index: int) -> bytes:
    """Of an image's file, empty if it has become unreadable."""
    with suppress(BadImageError, OSError), _open_file(source, index) as file:
        return hashlib.sha256(file.read()).digest()
    return b""


def _examine_part(
    source: FolderSource | PackedSource, full: bool, pixels: PixelFormat, indices: np.ndarray
) -> np.ndarray:
    found = np.zeros(len(indices), finding_dtype(pixels.in_chans))
    stride = -(-len(source) // NUM_SAMPLED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about files that are named anyway
        for finding, index in zip(found, indices.tolist(), strict=True):
            try:
                with _open_file(source, index) as file:
                    ending = Path(source.name(index)).suffix.lower()
                    _examine_file(file, ending, full, pixels, finding)
                    if index % stride:
                        finding["values"] = 0
            except BadImageError as error:
                finding["reason"] = str(error)
            except OSError as error:
                finding["reason"] = f"cannot be read: {error.strerror}"
    return found


def _examine_file(
    file: BinaryIO, ending: str, full: bool, pixels: PixelFormat, finding: np.void
) -> None:
    """Fills the row of FINDING of an image. Raises: OSError or BadImageError."""
    head = file.read(HEAD)
    size = finding["num_bytes"] = file.seek(0, os.SEEK_END)
    is_array = may_be_array(head)
    file.seek(0 if full or is_array else max(0, size - TAIL))
    content = file.read()
    kind = array_kind(content, pixels) if is_array else ""
    is_decoded, is_turned, sides, described = full or bool(kind), False, [0, 0], ""
    if not kind:
        file.seek(0)
        with open_image(file) as image:
            kind, sides = kind_of(image), sorted(image.size)
            described = f"{kind} {_mode(image, head)}"
            with suppress(Exception):  # training may not need what is broken there
                # Only for files whose header has EXIF: Pillow would decode a PNG to look for it.
                if kind == "TIFF" or image.info.keys() & {"exif", "xmp"}:
                    is_turned = orientation_of(image) in UPRIGHT
                if getattr(image, "n_frames", 1) > 1:
                    described += ", animated" if kind in ANIMATED else ", several pictures"
        is_decoded |= not _is_complete(kind, head, content, size)
    key = size.to_bytes(8, "little") + content[-TAIL:]
    if is_decoded:
        file.seek(0)
        content = file.read()
        # without a window, for whose lack the settings may refuse the file
        found = read_values(content, replace(pixels, dicom_window="full"))
        if full and found.numbers.dtype != np.uint8:
            _describe_values(found, pixels, finding)
        is_dicom = kind == "DICOM"
        decoded = decode_image(content, pixels) if is_dicom else to_pixels(found, pixels)
        sides = sides if described else sorted(decoded.shape[1:])
        described = described or f"{kind} {depth_of(found.numbers)} x {len(found.numbers)}"
    if full:
        rows = decoded[:, :: max(1, decoded.shape[1] // ROWS)].flatten(1).float() / 255
        finding["moments"] = torch.stack([rows.mean(dim=1), rows.square().mean(dim=1)])
        key = repr(decoded.shape).encode() + decoded.numpy().tobytes()
    finding["key"] = hashlib.sha256(key).digest()
    finding["sides"] = sides
    finding["kind"] = described
    if ending[1:] not in IMAGE_KINDS[kind]:
        finding["ending"] = f"{kind} named {ending or 'without an ending'}"
    finding["turn"] = "turned upright by EXIF" if is_turned else 0


def _describe_values(found: Values, pixels: PixelFormat, finding: np.void) -> None:
    """Notes the extremes of an image and a sample of its values, in the file's unit. Raises:
    FormatError if it has other channels."""
    numbers = pick_channels(found, pixels)
    # all of RGB that becomes grey are values of one channel, and grey those of all three
    numbers = numbers.reshape(1 if len(numbers) > pixels.in_chans else len(numbers), -1)
    numbers = np.broadcast_to(numbers, (pixels.in_chans, numbers.shape[1]))
    numbers = numbers[:, np.isfinite(numbers).all(axis=0)]  # (C, pixels)
    if numbers.size:
        finding["extremes"] = numbers.min(axis=1), numbers.max(axis=1)
        finding["values"] = numbers[:, :: max(1, numbers.shape[1] // PER_IMAGE)].astype(float)


def _mode(image: Image.Image, head: bytes) -> str:
    """Pillow's mode, and the depth and colours that it does not tell."""
    if image.mode == "CMYK" and image.info.get("adobe_transform") == 2:
        return "YCCK"
    mode = "16-bit L" if image.mode.startswith("I;16") else MODES.get(image.mode, image.mode)
    is_deep = image.format == "PNG" and head[PNG_DEPTH] == 16
    return f"16-bit {mode}" if is_deep and not mode.startswith("16-bit") else mode


def _is_complete(kind: str, head: bytes, tail: bytes, size: int) -> bool:
    """Whether a file ends as files of its kind do; False if that cannot be told."""
    if kind == "WEBP":
        return int.from_bytes(head[4:8], "little") + 8 == size
    if kind == "BMP":
        return int.from_bytes(head[2:6], "little") == size
    return kind in ENDS and tail.endswith(ENDS[kind])
