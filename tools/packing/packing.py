"""Packs images into tar shards (`data/packs/shards.py`), each no larger than training needs it.

What a shard holds is decided beforehand, from the sorted list of images and their sizes. So shards
are the same bytes whatever the number of processes, and a finished shard need not be made again.
The order is shuffled once: readers take neighbours together, and in a sorted list these are of one
class.
"""

import hashlib
import os
import re
import tarfile
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from data.images import (
    IMAGE_KINDS,
    BadImageError,
    PixelFormat,
    array_kind,
    kind_of,
    open_image,
    read_values,
)
from data.labels import class_folders, folder_labels
from data.loader import BadSample
from data.packs.shards import LABEL_ENDING, ShardIndex, index_shard
from data.pixels import PHOTOGRAPH
from data.sources import FolderSource
from util.errors import InputError
from util.files import write_output
from util.rng import PACK, generator

QUALITY = 90  # of JPEG
LONGEST = 65500  # pixels a side, of JPEG
BYTES_PER_PIXEL = 0.35  # of a photograph at that quality; shard borders depend on it
TAR_OVERHEAD = 2048  # bytes per image: headers of image and label, and padding
DIGITS = 9  # of the running number in a key
LONGEST_STEM = 60  # characters of the source's name in a key; a plain tar header holds 100
KEPT = (b".npy", b".dcm", b".tif", b".tiff")  # endings of files that may stay as they are
UNCHANGED = "images must not change meanwhile; give another folder to pack into"


@dataclass(frozen=True)
class Listing:
    """The images of a split in the order of the pack.

    images: structured array `(n,)` with the fields name (bytes, below root), size, mtime_ns and
    label (-1 if there is none). size is -1 for a file without a state, such as a link to nowhere.
    """

    root: Path
    images: np.ndarray
    class_names: list[str] | None

    def path(self, number: int) -> Path:
        """Where an image lies."""
        return self.root / os.fsdecode(self.images["name"][number].item())

    def may_stay(self) -> np.ndarray:
        """By their endings, which images may hold more than 8 bits or other channels `(n,)`."""
        return np.array([name.lower().endswith(KEPT) for name in self.images["name"].tolist()])

    def digest(self) -> str:
        """Equal for equal lists of unchanged files."""
        columns = [self.images[column].tobytes() for column in ("size", "mtime_ns", "label")]
        names = b"\0".join(self.images["name"].tolist())
        return hashlib.sha256(b"".join([names, *columns])).hexdigest()


def list_images(root: Path, has_classes: bool) -> Listing:
    """Lists a split. Raises: InputError if there are no images."""
    names = FolderSource(str(root), PixelFormat(3), prefer_train=False).names
    names = names[torch.randperm(len(names), generator=generator(PACK)).numpy()]
    class_names = (class_folders(root) or None) if has_classes else None
    labels = folder_labels(names, class_names) if class_names else np.full(len(names), -1)
    states = np.array([_state(root / os.fsdecode(name)) for name in names.tolist()]).T  # (2, n)
    images = np.rec.fromarrays(
        [names, *states, labels],
        dtype=[("name", names.dtype), ("size", "<i8"), ("mtime_ns", "<i8"), ("label", "<i8")],
    )
    return Listing(root, images, class_names)


def _state(path: Path) -> tuple[int, int]:
    """Size and time of a file, -1 and 0 if it has none."""
    try:
        status = path.stat()
    except OSError:
        return -1, 0
    return status.st_size, status.st_mtime_ns


def shard_starts(sizes: np.ndarray, are_kept: np.ndarray, side: int, shard_mb: float) -> np.ndarray:
    """Where each shard begins among images of these file sizes, of which some may stay as they are,
    if shards are to have about `shard_mb` MiB."""
    largest = np.where(are_kept | (side == 0), np.inf, BYTES_PER_PIXEL * side * side * 4 / 3)
    estimates = np.minimum(np.maximum(sizes, 0), largest) + TAR_OVERHEAD
    shard_of = (np.cumsum(estimates) - estimates) // (shard_mb * 2**20)
    return np.flatnonzero(np.diff(shard_of, prepend=-1))


def pack_image(encoded: bytes, side: int) -> tuple[bytes, str]:
    """An image's file with its short side at most `side` pixels, and the ending it should have.

    A file that is no larger, or any if `side` is 0, stays as it is, as does one that is no RGB or
    grey of 8 bits; others become JPEG.
    Raises: BadImageError.
    """
    numbers = read_values(encoded, PHOTOGRAPH).numbers  # (C, H, W)
    if kind := array_kind(encoded, PHOTOGRAPH):
        return encoded, IMAGE_KINDS[kind][0]
    short, long = sorted(numbers.shape[1:])
    with open_image(BytesIO(encoded)) as header:
        is_photograph = numbers.dtype == np.uint8 and header.mode != "RGBX"  # a fourth channel
        if not (is_photograph and side) or short <= side or long * side // short > LONGEST:
            return encoded, IMAGE_KINDS[kind_of(header)][0]
    image = torch.from_numpy(numbers)
    image = F.resize(image, [side], interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    is_grey = torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    pixels = image[0] if is_grey else image.permute(1, 2, 0)  # (H, W) or (H, W, 3)
    packed = BytesIO()
    Image.fromarray(pixels.numpy()).save(packed, format="JPEG", quality=QUALITY)
    return packed.getvalue(), IMAGE_KINDS["JPEG"][0]


def make_shard(
    listing: Listing, side: int, task: tuple[Path, range]
) -> tuple[ShardIndex, list[BadSample], bool]:
    """Makes a complete shard or none, reads it back and compares. A shard that exists is only read.

    Args:
        side: short side of the images, in pixels.
        task: path of the shard, and the places of its images in the listing.

    Returns: what the shard holds, the images that were left out of it, and whether an earlier
        process had made it.
    Raises: InputError if a source file has changed, or the shard cannot be written.
    """
    path, numbers = task
    bad: list[BadSample] = []
    found: list[ShardIndex] = []
    was_there = path.exists()
    if was_there:
        found.append(index_shard(path))
        made = {int(name[:DIGITS]) for name in found[0].names}
        for number in sorted({*numbers} - made):
            _pack_or_note(listing, side, number, bad)
    else:
        write_output(
            path,
            lambda target: found.append(_write_shard(listing, side, path, numbers, bad, target)),
        )
    return found[0], bad, was_there


def _write_shard(
    listing: Listing, side: int, path: Path, numbers: range, bad: list[BadSample], target: Path
) -> ShardIndex:
    """Writes what becomes the tar file `path` and returns what is found in it. Images that cannot
    be read are added to `bad`."""
    written = []
    with target.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for number in numbers:
                content, ending = _pack_or_note(listing, side, number, bad)
                if ending:
                    label = listing.images["label"][number].item()
                    member = f"{_key(listing, number)}.{ending}"
                    _add(archive, member, content)
                    if label >= 0:
                        _add(archive, f"{_key(listing, number)}.{LABEL_ENDING}", b"%d" % label)
                    written.append((member.encode(), len(content), zlib.crc32(content), label))
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that it is read back from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    index = index_shard(target)
    columns = (index.entries[column].tolist() for column in ("length", "crc32", "label"))
    if list(zip(index.names, *columns, strict=True)) != written:
        raise InputError(f"{path} was not read back as it was written: is the disk in order?")
    for number in numbers:
        if _state(listing.path(number)) != listing.images[["size", "mtime_ns"]][number].tolist():
            raise InputError(f"{listing.path(number)} changed while it was packed: {UNCHANGED}")
    return index


def _pack_or_note(
    listing: Listing, side: int, number: int, bad: list[BadSample]
) -> tuple[bytes, str]:
    """The packed file and its ending; both are empty for an image that cannot be read, which is
    added to `bad`."""
    path = listing.path(number)
    try:
        return pack_image(path.read_bytes(), side)
    except OSError as error:
        bad.append(BadSample(str(path), f"cannot be read: {error.strerror}"))
    except BadImageError as error:
        bad.append(BadSample(str(path), str(error)))
    return b"", ""


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # with fixed defaults: time, user and group 0, mode 0644
    member.size = len(content)
    archive.addfile(member, BytesIO(content))


def _key(listing: Listing, number: int) -> str:
    """A running number, which makes the key unique and sorted, and the end of the source's name,
    for people."""
    path = Path(os.fsdecode(listing.images["name"][number].item()))
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", str(path.with_suffix("")))
    return f"{number:0{DIGITS}d}-{stem[-LONGEST_STEM:]}"
