"""Packs a folder of images into tar shards (`data/packs/shards.py`), each image no larger than
training needs it.

What a shard holds is decided beforehand, from the sorted list of images and their sizes, so shards
are the same bytes whatever the number of processes, and a shard that is there needs not be made
again. The order is shuffled once and for all: readers take neighbours together, and in a sorted
list these are of one class.
"""

import hashlib
import os
import re
import tarfile
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from data.images import PILLOW_FORMATS, BadImageError, decode_image
from data.labels import class_folders, folder_labels
from data.loader import BadSample
from data.packs.shards import LABEL_ENDING, ShardIndex, index_shard
from data.sources import FolderSource
from util.errors import InputError
from util.files import write_whole
from util.rng import PACK, generator

QUALITY = 90  # of JPEG
LONGEST = 65500  # pixels a side, of JPEG
BYTES_PER_PIXEL = 0.35  # of a photograph at that quality; shard borders rest on it
TAR_OVERHEAD = 2048  # bytes per image: headers of image and label, and padding
ENDINGS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "PPM": "ppm",
}
DIGITS = 9  # of a key's running number
STILL = "images must not change meanwhile; give another folder to pack into"
LONGEST_STEM = 60  # characters of the source's name in a key; 100 are what a plain tar header holds


class SourceImage(NamedTuple):
    """An image to pack: its place in the pack, its path below the split, its state when listed, its
    label or -1.

    size is -1 for what could not be looked at, such as a link to nowhere.
    """

    number: int
    name: str
    size: int
    mtime_ns: int
    label: int


@dataclass(frozen=True)
class Listing:
    """The images of a split, or of one of its shards, as they were found, in the order of the pack;
    arrays `(n,)`.

    first: the place of the first one in the pack.
    """

    root: Path
    names: np.ndarray
    sizes: np.ndarray
    mtimes: np.ndarray
    labels: np.ndarray
    class_names: list[str] | None
    first: int = 0

    def digest(self) -> str:
        """Equal for equal lists of unchanged files."""
        digest = hashlib.sha256(b"\0".join(self.names.tolist()))
        for array in (self.sizes, self.mtimes, self.labels):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def part(self, start: int, end: int) -> "Listing":
        """The images of one shard."""
        names, sizes, mtimes, labels = (
            column[start:end] for column in (self.names, self.sizes, self.mtimes, self.labels)
        )
        return Listing(self.root, names, sizes, mtimes, labels, self.class_names, start)

    def images(self) -> list[SourceImage]:
        """One by one."""
        columns = (column.tolist() for column in (self.names, self.sizes, self.mtimes, self.labels))
        rows = enumerate(zip(*columns, strict=True), start=self.first)
        return [SourceImage(number, os.fsdecode(name), *rest) for number, (name, *rest) in rows]


def list_images(root: Path, has_classes: bool) -> Listing:
    """Lists a split. Raises: InputError where there are no images."""
    names = FolderSource(str(root), in_chans=3, prefer_train=False).names
    class_names = (class_folders(root) or None) if has_classes else None
    labels = folder_labels(names, class_names) if class_names else np.full(len(names), -1)
    order = torch.randperm(len(names), generator=generator(PACK)).numpy()
    names = names[order]
    states = np.array([_state(root / os.fsdecode(name)) for name in names.tolist()], dtype=np.int64)
    return Listing(root, names, states[:, 0], states[:, 1], labels[order], class_names)


def _state(path: Path) -> tuple[int, int]:
    """Size and time of a file, -1 and 0 where it cannot be looked at."""
    try:
        status = path.stat()
    except OSError:
        return -1, 0
    return status.st_size, status.st_mtime_ns


def shard_starts(sizes: np.ndarray, side: int, shard_mb: float) -> np.ndarray:
    """Where each shard begins among images of these file sizes, so that it comes to about
    `shard_mb` MiB."""
    largest = BYTES_PER_PIXEL * side * side * 4 / 3 if side else np.inf
    estimates = np.minimum(np.maximum(sizes, 0), largest) + TAR_OVERHEAD
    shard_of = (np.cumsum(estimates) - estimates) // (shard_mb * 2**20)
    return np.flatnonzero(np.diff(shard_of, prepend=-1))


def pack_image(encoded: bytes, side: int) -> tuple[bytes, str]:
    """An image's file with its short side at most `side` pixels, and the ending it should have.

    What is no larger, or `side` 0, stays as it is; the rest becomes JPEG. Raises: BadImageError.
    """
    image = decode_image(encoded, in_chans=3)
    short, long = sorted(image.shape[-2:])
    if not side or short <= side or long * side // short > LONGEST:
        with Image.open(BytesIO(encoded), formats=PILLOW_FORMATS) as header:
            return encoded, ENDINGS[header.format or "JPEG"]
    image = F.resize(image, [side], interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    is_grey = torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    pixels = image[0] if is_grey else image.permute(1, 2, 0)  # (H, W) or (H, W, 3)
    packed = BytesIO()
    Image.fromarray(pixels.numpy()).save(packed, format="JPEG", quality=QUALITY)
    return packed.getvalue(), "jpg"


class ShardTask(NamedTuple):
    """One shard to make: where, of what, and the short side of its images in pixels."""

    path: Path
    source: Listing
    side: int


class MadeShard(NamedTuple):
    """A shard that is there, the images that were left out of it, and whether an earlier process
    had made it."""

    content: ShardIndex
    bad: list[BadSample]
    was_there: bool


def make_shard(task: ShardTask) -> MadeShard:
    """Makes a shard, whole or not at all, reads it back and compares; only reads one that is there.

    Raises: InputError where a source file has changed, or the shard cannot be written.
    """
    if task.path.exists():
        index = index_shard(task.path)
        made = {int(Path(os.fsdecode(name)).name[:DIGITS]) for name in index.names}
        bad = [
            _why_left_out(task, image) for image in task.source.images() if image.number not in made
        ]
        return MadeShard(index, bad, True)
    bad = []
    found: list[ShardIndex] = []
    try:
        write_whole(task.path, lambda target: found.append(_write_shard(task, target, bad)))
    except OSError as error:
        raise InputError(
            f"{task.path} cannot be written: {error.strerror}; finished shards are kept, the same command goes on"
        ) from error
    return MadeShard(found[0], bad, False)


def _write_shard(task: ShardTask, target: Path, bad: list[BadSample]) -> ShardIndex:
    """Writes the tar file and returns what is found in it; images that cannot be read are added to
    `bad`."""
    written = []
    with target.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for image in task.source.images():
                try:
                    content, ending = pack_image(_read(task.source.root, image), task.side)
                except BadImageError as error:
                    bad.append(BadSample(str(task.source.root / image.name), str(error)))
                    continue
                name = f"{_key(image)}.{ending}"
                _add(archive, name, content)
                if image.label >= 0:
                    _add(archive, f"{_key(image)}.{LABEL_ENDING}", str(image.label).encode())
                written.append((name.encode(), len(content), zlib.crc32(content), image.label))
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that it is read back from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    index = index_shard(target)
    entries = index.entries
    columns = (entries[column].tolist() for column in ("length", "crc32", "label"))
    if list(zip(index.names, *columns, strict=True)) != written:
        raise InputError(f"{task.path} was not read back as it was written: is the disk in order?")
    return index


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(
        name
    )  # its defaults are the same everywhere: time, user and group 0, mode 0644
    member.size = len(content)
    archive.addfile(member, BytesIO(content))


def _key(image: SourceImage) -> str:
    """A running number, which makes it unique and sorted, and the end of the source's name, for
    people."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", str(Path(image.name).with_suffix("")))
    return f"{image.number:0{DIGITS}d}-{stem[-LONGEST_STEM:]}"


def _read(root: Path, image: SourceImage) -> bytes:
    """A source file's content. Raises: InputError where it is no longer as listed, BadImageError if
    never readable."""
    path = root / image.name
    try:
        with path.open("rb") as file:
            content = file.read()
            status = os.fstat(file.fileno())
    except OSError as error:
        if isinstance(error, FileNotFoundError) and image.size >= 0:
            raise InputError(f"{path} vanished while it was packed: {STILL}") from error
        raise BadImageError(f"cannot be read: {error.strerror}") from error
    if (status.st_size, status.st_mtime_ns) != (image.size, image.mtime_ns) or len(
        content
    ) != image.size:
        raise InputError(f"{path} changed while it was packed: {STILL}")
    return content


def _why_left_out(task: ShardTask, image: SourceImage) -> BadSample:
    try:
        pack_image(_read(task.source.root, image), task.side)
        reason = "could not be read when its shard was made"
    except BadImageError as error:
        reason = str(error)
    return BadSample(str(task.source.root / image.name), reason)
