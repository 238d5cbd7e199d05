"""The samples of one tar shard in WebDataset's format.

A sample is a run of members with one key (a name up to the first dot of its last part): an image,
and `<key>.cls` with its label as text, where it has one. Members of other endings are passed over.
"""

import hashlib
import os
import re
import zlib
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.packs.tar import BLOCK, Member, walk_tar
from util.errors import InputError

ENTRY = np.dtype(
    [
        ("shard", "<i4"),
        ("offset", "<i8"),
        ("length", "<i8"),
        ("crc32", "<u4"),
        ("label", "<i8"),
        ("name", "<i8"),
    ]
)  # label -1: none; name: where the member's name begins in the index's names
IMAGE_ENDINGS = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"}
LABEL_ENDING = "cls"
MAX_LABEL = 32  # bytes of a .cls member
CHUNK = 1 << 20  # bytes read at a time
SAMPLED = 8  # member headers of a shard that its fingerprint covers


class ShardIndex(NamedTuple):
    """What lies in one shard: entries `(n,)` of ENTRY, whose `shard` and `name` are 0, and the
    names of n members.

    fingerprint: of the file's size and of some headers, so that another shard in its place is
    noticed cheaply. What an image holds is guarded by its crc32.
    """

    size: int
    fingerprint: str
    entries: np.ndarray
    names: list[bytes]


def index_shard(path: Path) -> ShardIndex:
    """Reads a shard from end to end. Raises: InputError for what is no whole shard of WebDataset's
    format."""
    try:
        with path.open("rb") as file:
            descriptor = file.fileno()
            rows, names = [], []
            keyed = ((*split_name(member.name), member) for member in walk_tar(path, descriptor))
            for key, members in groupby(
                (entry for entry in keyed if entry[0]), key=lambda entry: entry[0]
            ):
                image, label = _read_sample(path, descriptor, key, (entry[1:] for entry in members))
                if image is not None:
                    rows.append(
                        (0, image.offset, image.length, _crc32(descriptor, image), label, 0)
                    )
                    names.append(image.name.encode("utf-8", "surrogateescape"))
            size = os.fstat(descriptor).st_size
            entries = np.array(rows, dtype=ENTRY)
            return ShardIndex(
                size, shard_fingerprint(descriptor, size, entries["offset"]), entries, names
            )
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def shard_fingerprint(descriptor: int, size: int, offsets: np.ndarray) -> str:
    """Of a shard of `size` bytes whose images begin at `offsets`."""
    digest = hashlib.sha256(str(size).encode())
    for place in np.linspace(0, len(offsets) - 1, min(SAMPLED, len(offsets))).astype(int):
        digest.update(os.pread(descriptor, BLOCK, int(offsets[place]) - BLOCK))
    return digest.hexdigest()[:16]


def split_name(name: str) -> tuple[str, str]:
    """Key and ending, in lower case, of a member; the key is empty for a hidden file or one without
    an ending."""
    folder, slash, last = name.rpartition("/")
    stem, dot, ending = last.partition(".")
    return (folder + slash + stem, ending.lower()) if stem and dot else ("", "")


def _read_sample(
    path: Path, descriptor: int, key: str, members: Iterable[tuple[str, Member]]
) -> tuple[Member | None, int]:
    """The image, None where there is none, and the label, -1 where there is none, of a run of
    members."""
    image, label = None, -1
    for ending, member in members:
        if ending not in IMAGE_ENDINGS and ending != LABEL_ENDING:
            continue
        if not member.is_regular:
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
            f"{path}: the label of {key!r} has no image beside it: the members of a sample must follow one another "
            "(tar --sort=name)"
        )
    return image, label


def _read_label(path: Path, descriptor: int, member: Member) -> int:
    text = os.pread(descriptor, min(member.length, MAX_LABEL + 1), member.offset)
    if len(text) > MAX_LABEL or not re.fullmatch(rb"\s*\d{1,9}\s*", text):
        raise InputError(
            f"{path}: {member.name!r} must hold a label, a whole number from 0 on, got {text!r}"
        )
    return int(text)


def _crc32(descriptor: int, member: Member) -> int:
    crc = 0
    for start in range(0, member.length, CHUNK):
        crc = zlib.crc32(
            os.pread(descriptor, min(CHUNK, member.length - start), member.offset + start), crc
        )
    return crc
