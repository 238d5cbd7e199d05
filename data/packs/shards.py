"""The samples of one tar shard in WebDataset's format, whoever wrote it.

A sample is a run of members with one key (a name up to the first dot of its last part): an image,
and `<key>.cls` with its label as text, if it has one. Members with other endings are skipped.

Python's tarfile reads the headers and nothing is unpacked. tarfile believes what a header declares
and stops without a word at a damaged one, so sizes, offsets and the end of the file are checked
here.
"""

import hashlib
import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.images import IMAGE_ENDINGS
from util.errors import InputError

# label is -1 if there is none; name is where the member's name begins in the index's names
ENTRY = np.dtype(
    [
        ("shard", "<i4"),
        ("offset", "<i8"),
        ("length", "<i8"),
        ("crc32", "<u4"),
        ("label", "<i8"),
        ("name", "<i8"),
    ]
)
LABEL_ENDING = "cls"
SAMPLE_ENDINGS = {LABEL_ENDING, *(ending[1:] for ending in IMAGE_ENDINGS)}
MAX_LABEL = 32  # bytes of a .cls member
MAX_HEADERS = 1 << 20  # bytes of one member's headers; real ones are below a hundredth of that
MAX_PADDING = 1 << 20  # bytes from the end mark on; tar pads to 10 KiB
BLOCK = tarfile.BLOCKSIZE
CHUNK = 1 << 20  # bytes read at a time
SAMPLED = 8  # member headers of a shard that its fingerprint covers


class ShardIndex(NamedTuple):
    """What lies in one shard: entries `(n,)` of ENTRY, whose `shard` and `name` are 0, and the
    names of n members.

    fingerprint: of the file's size and some headers, so that another shard in its place is noticed
    cheaply. What an image holds is guarded by its crc32.
    """

    size: int
    fingerprint: str
    entries: np.ndarray
    names: list[bytes]


def index_shard(path: Path) -> ShardIndex:
    """Reads a shard from end to end.

    Raises: InputError if it is no complete shard in WebDataset's format.
    """
    try:
        with _HeaderFile(path) as file:
            descriptor, size = file.fileno(), os.fstat(file.fileno()).st_size
            rows, names = [], []
            keyed = ((*split_name(member.name), member) for member in _members(path, file, size))
            for key, run in groupby((row for row in keyed if row[0]), key=lambda row: row[0]):
                image, label = _read_sample(path, descriptor, key, (row[1:] for row in run))
                if image is not None:
                    crc32 = _crc32(descriptor, image)
                    rows.append((0, image.offset_data, image.size, crc32, label, 0))
                    names.append(image.name.encode("utf-8", "surrogateescape"))
            entries = np.array(rows, dtype=ENTRY)
            fingerprint = shard_fingerprint(descriptor, size, entries["offset"])
            return ShardIndex(size, fingerprint, entries, names)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def shard_fingerprint(descriptor: int, size: int, offsets: np.ndarray) -> str:
    """The fingerprint of a shard of `size` bytes whose images begin at `offsets`."""
    places = np.linspace(0, len(offsets) - 1, min(SAMPLED, len(offsets))).astype(int)
    headers = [os.pread(descriptor, BLOCK, int(offset) - BLOCK) for offset in offsets[places]]
    return hashlib.sha256(b"".join([str(size).encode(), *headers])).hexdigest()[:16]


def split_name(name: str) -> tuple[str, str]:
    """Key and ending, in lower case, of a member. The key is empty for a hidden file or one without
    an ending."""
    folder, slash, last = name.rpartition("/")
    stem, dot, ending = last.partition(".")
    return (folder + slash + stem, ending.lower()) if stem and dot else ("", "")


class _HeaderFile(io.FileIO):
    """A file of which tarfile may read `left` bytes, as it allocates what a header declares."""

    left = MAX_HEADERS

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= size or 0
        if size is None or size < 0 or self.left < 0:
            raise tarfile.ReadError(f"headers of more than {MAX_HEADERS} bytes")
        return super().read(size)


def _members(path: Path, file: _HeaderFile, size: int) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file of `size` bytes. Raises: InputError if it is not a complete one."""
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
            while (member := archive.next()) is not None:
                file.left, end = MAX_HEADERS, archive.offset
                length = member.size if member.isreg() else 0
                if member.size < 0 or member.offset_data + length > size:
                    raise tarfile.ReadError(f"{member.name!r} declares {member.size} bytes")
                if member.issparse():
                    raise tarfile.ReadError(f"{member.name!r} is sparse (tar --sparse)")
                if {"path", "size"} & archive.pax_headers.keys():
                    raise tarfile.ReadError("one path or size is given to all members")
                yield member
        rest = os.pread(file.fileno(), MAX_PADDING + 1, end)
        if not BLOCK <= len(rest) <= MAX_PADDING or rest.strip(b"\0"):
            raise tarfile.ReadError("there is no end mark, or something behind it")
    # ValueError and the others come from headers that tarfile does not expect
    except (tarfile.TarError, ValueError, LookupError, RecursionError, OverflowError) as error:
        raise InputError(
            f"{path} cannot be used, the tar file of {size} bytes is damaged, cut off, compressed "
            f"or of an unusual form: {error}, after byte {end}"
        ) from error


def _read_sample(
    path: Path, descriptor: int, key: str, members: Iterable[tuple[str, tarfile.TarInfo]]
) -> tuple[tarfile.TarInfo | None, int]:
    """The image (None if there is none) and the label (-1 if there is none) of members with one
    key."""
    image, label = None, -1
    for ending, member in members:
        if ending not in SAMPLE_ENDINGS:
            continue
        if not member.isreg():
            raise InputError(
                f"{path}: {member.name!r} is a link or device: pack the file that it stands for"
            )
        if member.name.startswith("/") or ".." in member.name.split("/"):
            raise InputError(f"{path}: the name {member.name!r} leads out of the archive")
        if ending == LABEL_ENDING:
            label = _read_label(path, descriptor, member)
        elif image is not None:
            raise InputError(
                f"{path} has two images under one key: {image.name!r} and {member.name!r}"
            )
        else:
            image = member
    if image is None and label >= 0:
        raise InputError(
            f"{path}: the label of {key!r} has no image beside it: the members of a sample must "
            "follow one another (tar --sort=name)"
        )
    return image, label


def _read_label(path: Path, descriptor: int, member: tarfile.TarInfo) -> int:
    text = os.pread(descriptor, min(member.size, MAX_LABEL + 1), member.offset_data)
    if len(text) > MAX_LABEL or not re.fullmatch(rb"\s*\d{1,9}\s*", text):
        raise InputError(
            f"{path}: {member.name!r} must hold a label, an integer from 0 on, got {text!r}"
        )
    return int(text)


def _crc32(descriptor: int, member: tarfile.TarInfo) -> int:
    crc = 0
    for start in range(0, member.size, CHUNK):
        length = min(CHUNK, member.size - start)
        crc = zlib.crc32(os.pread(descriptor, length, member.offset_data + start), crc)
    return crc
