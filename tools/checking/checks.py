"""Looks at every image of a data set as training would meet it: its kind, its size, whether it can
be read, its equals.

A look reads a file's header and its end, and decodes it where the end does not show that the file
is whole. A full look decodes every image. Shards are read whole in both, as their checksums are
verified whenever they are read.
"""

import copy
import hashlib
import os
import struct
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.images import DECODING_ERRORS, IMAGE_ENDINGS, BadImageError, decode_image, open_image
from data.packs.source import PackedSource
from data.sources import FolderSource
from util.pool import in_processes

PART = PackedSource.block_size  # images that a process looks at in one go
TAIL = 4096  # bytes of a file's end that are read
ROWS = 64  # of an image, about, that its mean and variance are taken from
ORIENTATION = 274  # of EXIF; 1 is upright
PNG_DEPTH = 24  # where a PNG's header has its bits per channel
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
MODES = {
    "1": "1-bit",
    "I": "16-bit L",
    "I;16": "16-bit L",
    "I;16B": "16-bit L",
    "I;16L": "16-bit L",
}
ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jpe"),
    "MPO": (".jpg", ".jpeg", ".jpe"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm"),
}

Source = FolderSource | PackedSource


class Task(NamedTuple):
    """A part of a source to look at. source: the part of a folder, or the folder of a pack, which
    is opened anew."""

    source: FolderSource | Path
    indices: np.ndarray
    full: bool


class Header(NamedTuple):
    """What an image's header says, and whether the end of its file is the one that files of its
    kind have.

    kind: format and mode in Pillow's names, such as "PNG 16-bit RGB". sides: short and long, in
    pixels.
    """

    kind: str
    format: str
    sides: tuple[int, int]
    is_turned: bool
    is_whole: bool


@dataclass
class Looks:
    """What was found in n images.

    kinds: number of images by kind. notes: number by remark about good images. bad: reasons by
    index.
    num_bytes: of the files that were read. sides `(n, 2)` int32: short and long, in pixels, 0 where
    bad. keys `(n,)` bytes: equal for images that may be equal, of a full look for those that have
    equal pixels; empty where bad. sums `(2, 3)`: of the images' mean and mean square per channel,
    in units of 255; zeros unless full.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    bad: dict[int, str] = field(default_factory=dict)
    num_bytes: int = 0
    sides: np.ndarray = field(default_factory=lambda: np.empty((0, 2), dtype=np.int32))
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, dtype="S32"))
    sums: np.ndarray = field(default_factory=lambda: np.zeros((2, 3)))


def look_at(source: Source, full: bool, workers: int) -> Iterator[Looks]:
    """Looks at all images of a source, part by part in order."""
    yield from in_processes(_look_at_part, tasks_of(source, np.arange(len(source)), full), workers)


def joined(parts: Iterable[Looks]) -> Looks:
    """One of all parts."""
    whole, sides, keys, start = Looks(), [Looks().sides], [Looks().keys], 0
    for part in parts:
        whole.kinds += part.kinds
        whole.notes += part.notes
        whole.bad |= {start + index: reason for index, reason in part.bad.items()}
        whole.num_bytes += part.num_bytes
        whole.sums += part.sums
        sides.append(part.sides)
        keys.append(part.keys)
        start += len(part.keys)
    whole.sides, whole.keys = np.concatenate(sides), np.concatenate(keys)
    return whole


def tasks_of(source: Source, indices: np.ndarray, full: bool) -> list[Task]:
    """The images of a source at `indices`, in tasks for processes."""
    parts = [indices[start : start + PART] for start in range(0, len(indices), PART)]
    _pack_at.cache_clear()  # it may be another one by now
    if isinstance(source, PackedSource):
        return [Task(source.folder, part, full) for part in parts]
    tasks = []
    for part in parts:
        of_part = copy.copy(source)
        of_part.names = source.names[part]
        tasks.append(Task(of_part, np.arange(len(part)), full))
    return tasks


@lru_cache(maxsize=1)
def _pack_at(folder: Path) -> PackedSource:
    pack = PackedSource(folder, in_chans=3)
    pack.read_ahead()
    return pack


def opened(task: Task) -> Source:
    """Where a task's indices point."""
    return _pack_at(task.source) if isinstance(task.source, Path) else task.source


def open_file(source: Source, index: int) -> BinaryIO:
    """An image's file. Raises: BadImageError."""
    if isinstance(source, PackedSource):
        return BytesIO(source.read_bytes(index))
    try:
        return Path(source.name(index)).open("rb")
    except OSError as error:
        raise BadImageError(f"cannot be read: {error.strerror}") from error


def _look_at_part(task: Task) -> Looks:
    source, count = opened(task), len(task.indices)
    found = Looks(sides=np.zeros((count, 2), dtype=np.int32), keys=np.zeros(count, dtype="S32"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about files that are named anyway
        for place, index in enumerate(task.indices.tolist()):
            try:
                with open_file(source, index) as file:
                    _look(file, Path(source.name(index)).suffix.lower(), task.full, place, found)
            except BadImageError as error:
                found.bad[place] = str(error)
    return found


def _look(file: BinaryIO, ending: str, full: bool, place: int, found: Looks) -> None:
    """Adds what an image shows to `found`. Raises: BadImageError."""
    try:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL))
        tail = file.read()
        file.seek(0)
        content = file.read() if full else b""
        file.seek(0)
    except OSError as error:
        raise BadImageError(f"cannot be read: {error.strerror}") from error
    found.num_bytes += size
    header = read_header(file, tail, size)
    if full:
        pixels = decode_image(content, in_chans=3)  # (3, H, W)
        found.sums += _sums(pixels)
        found.keys[place] = hashlib.sha256(
            repr(pixels.shape).encode() + pixels.numpy().tobytes()
        ).digest()
    else:
        if not header.is_whole:
            file.seek(0)
            decode_image(file.read(), in_chans=3)
        found.keys[place] = hashlib.sha256(size.to_bytes(8, "little") + tail).digest()
    found.sides[place] = header.sides
    found.kinds[header.kind] += 1
    if ending not in ENDINGS[header.format]:
        found.notes[
            f"{'JPEG' if header.format == 'MPO' else header.format} named {ending or 'without an ending'}"
        ] += 1
    if header.is_turned:
        found.notes["turned upright by EXIF"] += 1


def passed_over(root: Path) -> Counter[str]:
    """Number of files below a folder that are not listed as images, by ending; hidden ones are not
    counted."""
    found: Counter[str] = Counter()
    for _, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found.update(
            Path(name).suffix.lower()
            for name in files
            if not name.startswith(".") and not name.lower().endswith(IMAGE_ENDINGS)
        )
    return found


def read_header(file: BinaryIO, tail: bytes, size: int) -> Header:
    """Header of a file of `size` bytes that ends in `tail`. Raises: BadImageError."""
    with open_image(file) as image:
        kind = image.format or ""
        mode = MODES.get(image.mode, image.mode)
        if image.info.get("adobe_transform") == 2 and mode == "CMYK":
            mode = "YCCK"
        is_turned, several = False, False
        with suppress(
            *DECODING_ERRORS, LookupError, TypeError, ArithmeticError
        ):  # training may not need what is broken there
            # Without EXIF up to here, a PNG would be decoded to look for it.
            if kind == "TIFF" or image.info.keys() & {"exif", "xmp"}:
                is_turned = image.getexif().get(ORIENTATION, 1) in range(2, 9)
            several = getattr(image, "n_frames", 1) > 1
        sides = sorted(image.size)
    file.seek(0)
    head = file.read(PNG_DEPTH + 1)
    if kind == "PNG" and head[PNG_DEPTH] == 16 and not mode.startswith("16-bit"):
        mode = f"16-bit {mode}"
    name = "JPEG" if kind == "MPO" else kind
    more = (
        ""
        if not several
        else ", animated"
        if kind in ("GIF", "PNG", "WEBP")
        else ", several pictures"
    )
    return Header(
        f"{name} {mode}{more}",
        kind,
        (sides[0], sides[1]),
        is_turned,
        _is_whole(kind, head, tail, size),
    )


def _is_whole(kind: str, head: bytes, tail: bytes, size: int) -> bool:
    """Whether a file ends as files of its kind do; False where that cannot be told."""
    if kind in ("JPEG", "MPO"):
        return tail.endswith(b"\xff\xd9")
    if kind == "PNG":
        return tail.endswith(PNG_END)
    if kind == "GIF":
        return tail.endswith(b"\0;")
    if kind == "WEBP":
        return struct.unpack_from("<I", head, 4)[0] + 8 == size
    return kind == "BMP" and struct.unpack_from("<I", head, 2)[0] == size


def _sums(pixels: Tensor) -> np.ndarray:
    """Mean and mean square of each channel of uint8 `(3, H, W)`, `(2, 3)`, in units of 255."""
    rows = pixels[:, :: max(1, pixels.shape[1] // ROWS)].flatten(1).float() / 255
    return torch.stack([rows.mean(dim=1), rows.square().mean(dim=1)]).numpy()
