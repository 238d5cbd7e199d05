"""Walks through the headers of a tar file, whoever wrote it: nothing is unpacked, and no header is
believed.

Python's tarfile allocates what a header declares and ends quietly at a damaged one; here only its
reading of a single header of 512 bytes is used. Archives that are compressed, sparse, cut off or
damaged are errors.
"""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from util.errors import InputError

BLOCK = tarfile.BLOCKSIZE
MAX_EXTENSION = (
    1 << 20
)  # bytes of a long name or a pax header; real ones are below a hundredth of that
MAX_PADDING = 1 << 20  # bytes behind the end mark; tar pads to 10 KiB
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)
WITHOUT_CONTENT = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)


class Member(NamedTuple):
    """Something in a tar file; `offset` and `length` say which bytes of the file are its
    content."""

    name: str
    offset: int
    length: int
    is_regular: bool


def walk_tar(path: Path, descriptor: int) -> Iterator[Member]:
    """The members of an open tar file in their order. Raises: InputError for what is no whole,
    plain tar file."""
    size = os.fstat(descriptor).st_size
    position = 0
    extended: dict[str, str] = {}  # by the headers before the member's own
    while (header := os.pread(descriptor, BLOCK, position)) != bytes(BLOCK):
        info = _parse(path, header, position, size)
        offset = position + BLOCK
        length = 0 if info.type in WITHOUT_CONTENT else int(extended.get("size", info.size))
        if not 0 <= length <= size - offset:
            raise InputError(
                f"{path} is cut off or damaged: {info.name!r} at byte {position} declares {length} bytes, "
                f"the file has {size}"
            )
        if info.type == tarfile.GNUTYPE_SPARSE or any(
            name.startswith("GNU.sparse") for name in extended
        ):
            raise InputError(
                f"{path} has a sparse member, {info.name!r}: write the tar file without --sparse"
            )
        if info.type in PAX:
            extended |= _read_pax(path, _read_extension(path, descriptor, offset, length))
        elif info.type == tarfile.XGLTYPE:
            shared = _read_pax(path, _read_extension(path, descriptor, offset, length))
            if {"path", "size"} & shared.keys():
                raise InputError(
                    f"{path} gives one path or size to all members: it is no usual tar file"
                )
        elif info.type == tarfile.GNUTYPE_LONGNAME:
            name = _read_extension(path, descriptor, offset, length).partition(b"\0")[0]
            extended["path"] = name.decode("utf-8", "surrogateescape")
        elif info.type != tarfile.GNUTYPE_LONGLINK:
            yield Member(extended.get("path", info.name), offset, length, info.type in REGULAR)
            extended = {}
        position = offset + -(-length // BLOCK) * BLOCK
    rest = os.pread(descriptor, MAX_PADDING, position)
    if rest.strip(b"\0") or size - position > MAX_PADDING:
        raise InputError(
            f"{path} goes on after its end mark at byte {position}: two tar files in one cannot be read"
        )


def _parse(path: Path, header: bytes, position: int, size: int) -> tarfile.TarInfo:
    if position == 0 and header.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise InputError(
            f"{path} is compressed: images are read at their place in the file, so decompress it first"
        )
    if len(header) < BLOCK:
        raise InputError(f"{path} is cut off: it ends at byte {size} without an end mark")
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise InputError(
            f"{path} is no tar file or a damaged one: {error} at byte {position}"
        ) from error


def _read_extension(path: Path, descriptor: int, offset: int, length: int) -> bytes:
    if length > MAX_EXTENSION:
        raise InputError(
            f"{path} has an extended header of {length} bytes at byte {offset}: more than {MAX_EXTENSION}"
        )
    return os.pread(descriptor, length, offset)


def _read_pax(path: Path, content: bytes) -> dict[str, str]:
    """The records `<length> <name>=<value>\\n` of a pax header."""
    content = content.rstrip(b"\0")
    found = {}
    position = 0
    while position < len(content):
        space = content.find(b" ", position, position + 8)
        digits = content[position : max(space, position)]
        end = position + int(digits) if digits.isdigit() else 0
        name, equals, value = content[space + 1 : end].partition(b"=")
        if not (space < end <= len(content) and equals and value.endswith(b"\n")):
            raise InputError(f"{path} has a damaged pax header")
        found[name.decode("utf-8", "surrogateescape")] = value[:-1].decode(
            "utf-8", "surrogateescape"
        )
        position = end
    size = found.get("size", "0")
    if not size.isdecimal() or len(size) > 20:
        raise InputError(f"{path} has a damaged pax header: its size is no number")
    return found
