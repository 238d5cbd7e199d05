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

from data.images import IMAGE_KINDS, BadImageError, decode_image, kind_of, open_image
from data.labels import class_folders, folder_labels
from data.loader import BadSample
from data.packs.shards import LABEL_ENDING, ShardIndex, index_shard
from data.sources import FolderSource
from util.errors import InputError
from util.files import write_whole
from util.rng import PACK, generator

QUALITY = 90  # of JPEG
LONGEST = 65500  # pixels a side, of JPEG
BYTES_PER_PIXEL = 0.35  # of a photograph at that quality; shard borders depend on it
TAR_OVERHEAD = 2048  # bytes per image: headers of image and label, and padding
DIGITS = 9  # of the running number in a key
LONGEST_STEM = 60  # characters of the source's name in a key; a plain tar header holds 100
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

    def digest(self) -> str:
        """Equal for equal lists of unchanged files."""
        columns = [self.images[column].tobytes() for column in ("size", "mtime_ns", "label")]
        names = b"\0".join(self.images["name"].tolist())
        return hashlib.sha256(b"".join([names, *columns])).hexdigest()


def list_images(root: Path, has_classes: bool) -> Listing:
    """Lists a split. Raises: InputError if there are no images."""
    names = FolderSource(str(root), in_chans=3, prefer_train=False).names
    names = names[torch.randperm(len(names), generator=generator(PACK)).numpy()]
    class_names = (class_folders(root) or None) if has_classes else None
    labels = folder_labels(names, class_names) if class_names else np.full(len(names), -1)
    states = np.array([_state(root / os.fsdecode(name)) for name in names.tolist()]).T  # (2, n)
    fields = [("name", names.dtype), ("size", "<i8"), ("mtime_ns", "<i8"), ("label", "<i8")]
    images = np.rec.fromarrays([names, *states, labels], dtype=fields)
    return Listing(root, images, class_names)


def _state(path: Path) -> tuple[int, int]:
    """Size and time of a file, -1 and 0 if it has none."""
    try:
        status = path.stat()
    except OSError:
        return -1, 0
    return status.st_size, status.st_mtime_ns


def shard_starts(sizes: np.ndarray, side: int, shard_mb: float) -> np.ndarray:
    """Where each shard begins among images of these file sizes, if shards are to have about
    `shard_mb` MiB."""
    largest = BYTES_PER_PIXEL * side * side * 4 / 3 if side else np.inf
    estimates = np.minimum(np.maximum(sizes, 0), largest) + TAR_OVERHEAD
    shard_of = (np.cumsum(estimates) - estimates) // (shard_mb * 2**20)
    return np.flatnonzero(np.diff(shard_of, prepend=-1))


def pack_image(encoded: bytes, side: int) -> tuple[bytes, str]:
    """An image's file with its short side at most `side` pixels, and the ending it should have.

    A file that is no larger, or any if `side` is 0, stays as it is; others become JPEG.
    Raises: BadImageError.
    """
    image = decode_image(encoded, in_chans=3)
    short, long = sorted(image.shape[-2:])
    if not side or short <= side or long * side // short > LONGEST:
        with open_image(BytesIO(encoded)) as header:
            return encoded, IMAGE_KINDS[kind_of(header)][0]
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
    if path.exists():
        content = index_shard(path)
        made = {int(name[:DIGITS]) for name in content.names}
        for number in sorted({*numbers} - made):
            _pack_or_note(listing, side, number, bad)
        return content, bad, True
    found: list[ShardIndex] = []
    try:
        write_whole(
            path,
            lambda target: found.append(_write_shard(listing, side, path, numbers, target, bad)),
        )
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror}; finished shards are kept, and the same "
            "command continues"
        ) from error
    return found[0], bad, False


def _write_shard(
    listing: Listing, side: int, path: Path, numbers: range, target: Path, bad: list[BadSample]
) -> ShardIndex:
    """Writes what becomes the tar file `path` and returns what is found in it. Images that cannot
    be read are added to `bad`."""
    written = []
    with target.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for number in numbers:
                packed = _pack_or_note(listing, side, number, bad)
                if packed is not None:
                    content, ending = packed
                    name, _, _, label = listing.images[number].tolist()
                    key = _key(number, name)
                    _add(archive, f"{key}.{ending}", content)
                    if label >= 0:
                        _add(archive, f"{key}.{LABEL_ENDING}", str(label).encode())
                    member = f"{key}.{ending}".encode()
                    written.append((member, len(content), zlib.crc32(content), label))
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that it is read back from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    index = index_shard(target)
    columns = (index.entries[column].tolist() for column in ("length", "crc32", "label"))
    if list(zip(index.names, *columns, strict=True)) != written:
        raise InputError(f"{path} was not read back as it was written: is the disk in order?")
    return index


def _pack_or_note(
    listing: Listing, side: int, number: int, bad: list[BadSample]
) -> tuple[bytes, str] | None:
    """The packed file and its ending; None for an image that cannot be read, which is added to
    `bad`."""
    name, size, mtime_ns, _ = listing.images[number].tolist()
    path = listing.root / os.fsdecode(name)
    try:
        return pack_image(_read(path, size, mtime_ns), side)
    except BadImageError as error:
        bad.append(BadSample(str(path), str(error)))
    return None


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # with fixed defaults: time, user and group 0, mode 0644
    member.size = len(content)
    archive.addfile(member, BytesIO(content))


def _key(number: int, name: bytes) -> str:
    """A running number, which makes the key unique and sorted, and the end of the source's name,
    for people."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", str(Path(os.fsdecode(name)).with_suffix("")))
    return f"{number:0{DIGITS}d}-{stem[-LONGEST_STEM:]}"


def _read(path: Path, size: int, mtime_ns: int) -> bytes:
    """A source file's content.

    Raises: InputError if it is no longer as listed, BadImageError if it could never be read.
    """
    try:
        with path.open("rb") as file:
            content = file.read()
            status = os.fstat(file.fileno())
    except OSError as error:
        if isinstance(error, FileNotFoundError) and size >= 0:
            raise InputError(f"{path} vanished while it was packed: {UNCHANGED}") from error
        raise BadImageError(f"cannot be read: {error.strerror}") from error
    if (status.st_size, status.st_mtime_ns, len(content)) != (size, mtime_ns, size):
        raise InputError(f"{path} changed while it was packed: {UNCHANGED}")
    return content
