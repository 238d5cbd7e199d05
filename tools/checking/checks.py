"""Examines every image of a data set as training would meet it: its kind, its size, whether it can
be read, and a key by which equal images are found.

A quick check reads a file's header and end, and decodes the file only if its end does not show that
it is complete. A full check decodes every image. Shards are read completely in both, as their
checksums are verified whenever they are read.
"""

import hashlib
import os
import struct
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image

from data.images import (
    DECODING_ERRORS,
    IMAGE_ENDINGS,
    IMAGE_KINDS,
    UPRIGHT,
    BadImageError,
    decode_image,
    kind_of,
    open_image,
)
from data.packs.source import PackedSource
from data.sources import FolderSource
from util.pool import in_processes

PART = PackedSource.block_size  # images of one task
TAIL = 4096  # bytes of a file's end that are read
ROWS = 64  # of an image, about, from which its mean and variance are taken
HEAD = 25  # bytes of a file's beginning that are read
PNG_DEPTH = 24  # where a PNG's header has its bits per channel
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"\0\0\0\0IEND\xaeB`\x82", "GIF": b"\0;"}
MODES = {"1": "1-bit", "I": "16-bit L"}
ANIMATED = ("GIF", "PNG", "WEBP")  # kinds whose several pictures are frames

Source = FolderSource | PackedSource


@dataclass
class Findings:
    """What was found in n images.

    kinds: number of images by kind. notes: number by remark about good images. bad: reasons by
    index. num_bytes: of the files that were read. sides `(n, 2)` int32: short and long, in pixels,
    0 if bad. keys `(n,)` bytes: equal for images that may be equal, after a full check for those
    with equal pixels; empty if bad. sums `(2, 3)`: of the images' mean and mean square per channel,
    in units of 255; zeros after a quick check.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    bad: dict[int, str] = field(default_factory=dict)
    num_bytes: int = 0
    sides: np.ndarray = field(default_factory=lambda: np.empty((0, 2), dtype=np.int32))
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, dtype="S32"))
    sums: np.ndarray = field(default_factory=lambda: np.zeros((2, 3)))


def examine(source: Source, full: bool, workers: int) -> Iterator[Findings]:
    """Examines all images of a source, `PART` by `PART` in order."""
    source.read_ahead()
    tasks = parts_of(np.arange(len(source)))
    yield from in_processes(partial(_examine_part, source, full), tasks, workers)


def parts_of(indices: np.ndarray) -> list[np.ndarray]:
    """Indices in tasks for processes."""
    return np.split(indices, range(PART, len(indices), PART))


def joined(parts: Iterable[Findings]) -> Findings:
    """The findings of all parts."""
    every = [Findings(), *parts]
    starts = accumulate((len(part.keys) for part in every), initial=0)
    return Findings(
        kinds=sum((part.kinds for part in every), Counter()),
        notes=sum((part.notes for part in every), Counter()),
        bad={
            start + index: reason
            for start, part in zip(starts, every, strict=False)
            for index, reason in part.bad.items()
        },
        num_bytes=sum(part.num_bytes for part in every),
        sides=np.concatenate([part.sides for part in every]),
        keys=np.concatenate([part.keys for part in every]),
        sums=np.sum([part.sums for part in every], axis=0),
    )


def open_file(source: Source, index: int) -> BinaryIO:
    """An image's file. Raises: OSError or BadImageError."""
    if isinstance(source, PackedSource):
        return BytesIO(source.read_bytes(index))
    return Path(source.name(index)).open("rb")


def _examine_part(source: Source, full: bool, indices: np.ndarray) -> Findings:
    count = len(indices)
    found = Findings(sides=np.zeros((count, 2), dtype=np.int32), keys=np.zeros(count, dtype="S32"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about files that are named anyway
        for place, index in enumerate(indices.tolist()):
            try:
                with open_file(source, index) as file:
                    _examine_file(file, Path(source.name(index)).suffix, full, place, found)
            except BadImageError as error:
                found.bad[place] = str(error)
            except OSError as error:
                found.bad[place] = f"cannot be read: {error.strerror}"
    return found


def _examine_file(file: BinaryIO, ending: str, full: bool, place: int, found: Findings) -> None:
    """Adds what an image shows to `found`. Raises: OSError or BadImageError."""
    head = file.read(HEAD)
    size = file.seek(0, os.SEEK_END)
    file.seek(0 if full else max(0, size - TAIL))
    content = file.read()
    file.seek(0)
    found.num_bytes += size
    with open_image(file) as image:
        kind, sides, is_turned = kind_of(image), sorted(image.size), False
        described = f"{kind} {_mode(image, head)}"
        with suppress(*DECODING_ERRORS):  # training may not need what is broken there
            # Only for files whose header has EXIF: Pillow would decode a PNG to look for it.
            if kind == "TIFF" or image.info.keys() & {"exif", "xmp"}:
                is_turned = image.getexif().get(ExifTags.Base.Orientation) in UPRIGHT
            if getattr(image, "n_frames", 1) > 1:
                described += ", animated" if kind in ANIMATED else ", several pictures"
    if full:
        pixels = decode_image(content, in_chans=3)  # (3, H, W)
        rows = pixels[:, :: max(1, pixels.shape[1] // ROWS)].flatten(1).float() / 255
        found.sums += torch.stack([rows.mean(dim=1), rows.square().mean(dim=1)]).numpy()
        key = repr(pixels.shape).encode() + pixels.numpy().tobytes()
    else:
        key = size.to_bytes(8, "little") + content
        if not _is_complete(kind, head, content, size):
            file.seek(0)
            decode_image(file.read(), in_chans=3)
    found.keys[place] = hashlib.sha256(key).digest()
    found.sides[place] = sides
    found.kinds[described] += 1
    ending = ending.lower()
    if ending[1:] not in IMAGE_KINDS[kind]:
        found.notes[f"{kind} named {ending or 'without an ending'}"] += 1
    found.notes["turned upright by EXIF"] += is_turned


def _mode(image: Image.Image, head: bytes) -> str:
    """Pillow's mode, and the depth and colours that it does not tell."""
    if image.mode == "CMYK" and image.info.get("adobe_transform") == 2:
        return "YCCK"
    mode = "16-bit L" if image.mode.startswith("I;16") else MODES.get(image.mode, image.mode)
    is_deep = image.format == "PNG" and head[PNG_DEPTH] == 16
    return f"16-bit {mode}" if is_deep and not mode.startswith("16-bit") else mode


def other_files(root: Path) -> Counter[str]:
    """Number of files below a folder that are not listed as images, by ending, hidden ones left
    out."""
    found: Counter[str] = Counter()
    for _, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found.update(
            Path(name).suffix.lower()
            for name in files
            if not name.startswith(".") and not name.lower().endswith(IMAGE_ENDINGS)
        )
    return found


def _is_complete(kind: str, head: bytes, tail: bytes, size: int) -> bool:
    """Whether a file ends as files of its kind do; False if that cannot be told."""
    if kind in ENDS:
        return tail.endswith(ENDS[kind])
    if kind == "WEBP":
        return struct.unpack_from("<I", head, 4)[0] + 8 == size
    return kind == "BMP" and struct.unpack_from("<I", head, 2)[0] == size
