"""The samples of one tar shard in WebDataset's format, whoever wrote it.

A sample is an image and `<key>.cls` with its label as text, if it has one. They follow one another
and have one key, which is a name up to the first dot of its last part. Members with other endings
and hidden files are skipped.

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
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
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
# key and ending of a member's name
SAMPLE = re.compile(
    rf"((?:.*/)?[^/.]+)\.({'|'.join([LABEL_ENDING, *(ending[1:] for ending in IMAGE_ENDINGS)])})",
    re.DOTALL | re.IGNORECASE,
)
MAX_IMAGE = 1 << 30  # bytes
MAX_LABEL = 32  # bytes of a .cls member
MAX_HEADERS = 1 << 20  # bytes of one member's headers; real ones are below a hundredth of that
MAX_PADDING = 1 << 20  # bytes from the end mark on; tar pads to 10 KiB
BLOCK = tarfile.BLOCKSIZE
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
            matched = ((SAMPLE.fullmatch(m.name), m) for m in _members(path, file, size))
            found = ((match[1], match[2].lower(), m) for match, m in matched if match)
            for key, run in groupby(found, key=itemgetter(0)):
                image, label = _read_sample(path, descriptor, key, [row[1:] for row in run])
                crc32 = zlib.crc32(os.pread(descriptor, image.size, image.offset_data))
                rows.append((0, image.offset_data, image.size, crc32, label, 0))
                names.append(image.name.encode("utf-8", "surrogateescape"))
            entries = np.array(rows, dtype=ENTRY)
            return ShardIndex(
                size, shard_fingerprint(descriptor, entries["offset"]), entries, names
            )
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def shard_fingerprint(descriptor: int, offsets: np.ndarray) -> str:
    """The fingerprint of an open shard whose images begin at `offsets`."""
    size = os.fstat(descriptor).st_size
    places = np.linspace(0, len(offsets) - 1, min(SAMPLED, len(offsets))).astype(int)
    headers = [os.pread(descriptor, BLOCK, int(offset) - BLOCK) for offset in offsets[places]]
    return hashlib.sha256(b"".join([str(size).encode(), *headers])).hexdigest()[:16]


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
                if (
                    member.issparse()
                    or member.size < 0
                    or member.offset_data + length > size
                    or {"path", "size"} & archive.pax_headers.keys()  # given to all members
                ):
                    raise tarfile.ReadError(
                        f"{member.name!r} declares {member.size} bytes, is sparse or shares a path"
                    )
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
    path: Path, descriptor: int, key: str, members: list[tuple[str, tarfile.TarInfo]]
) -> tuple[tarfile.TarInfo, int]:
    """The image and the label (-1 if there is none) of members with one key, each with its
    ending."""
    for _, member in members:
        leads_out = member.name.startswith("/") or ".." in member.name.split("/")
        if leads_out or not member.isreg() or member.size > MAX_IMAGE:
            raise InputError(
                f"{path}: {member.name!r} is a link or a device, has more than {MAX_IMAGE} bytes, "
                "or its name leads out of the archive: pack plain files"
            )
    arrays = [member for ending, member in members if ending == "npy"]
    images = [member for ending, member in members if ending not in (LABEL_ENDING, "npy")]
    images = images or arrays  # features of an image may lie beside it
    if len(images) != 1:
        raise InputError(
            f"{path}: the key {key!r} has the images {[image.name for image in images]}, expected "
            "one: the members of a sample must follow one another (tar --sort=name)"
        )
    texts = [
        os.pread(descriptor, min(member.size, MAX_LABEL + 1), member.offset_data)
        for ending, member in members
        if ending == LABEL_ENDING
    ]
    if any(len(text) > MAX_LABEL or not re.fullmatch(rb"\s*\d{1,9}\s*", text) for text in texts):
        raise InputError(
            f"{path}: {key}.{LABEL_ENDING} must hold a label, an integer from 0 on, got {texts}"
        )
    return images[0], int(texts[0]) if texts else -1
