"""Paths as users write them, names of weights among them; files that appear complete or not at all,
because they are written under a temporary name, flushed to disk and renamed."""

import errno
import fcntl
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TextIO

from util.errors import LocalInputError

logger = logging.getLogger(__name__)
PRETRAINED = Path(__file__).parents[1] / "models" / "weights" / "pretrained"
TEMPORARY = ".tmp"  # ending of a file that is still being written
# How file systems say that they cannot flush a folder, or not open it for that
UNFLUSHED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EISDIR)


def pretrained() -> dict[str, Path]:
    """The names of the weights that come with this project, and their files."""
    return {path.stem: path for path in sorted(PRETRAINED.glob("*.safetensors"))}


def expand_path(path: str) -> str:
    """`path` with `~`, `~user`, `$NAME` and `${NAME}` replaced.

    Raises: ValueError for a variable that is not set and a user who does not exist, unless a file
    has that very name.
    """
    # A Path would change how the rest is written.
    expanded = os.path.expanduser(os.path.expandvars(path))  # noqa: PTH111
    unknown = re.findall(r"\$\{?\w+|^~[^/]*", expanded)  # what is still there
    if unknown and not os.path.lexists(expanded):
        raise ValueError(f"must be a path, got {path!r}: {unknown[0]} is not known")
    return expanded


def path(text: str) -> Path:
    """A path of a command line, as `expand_path` reads it."""
    return Path(expand_path(text))


def printable(text: str) -> str:
    """A text on one line: control characters, line ends among them, and bytes of a file's name that
    are no UTF-8 are escaped, as `\\xe9`."""
    text = text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: ascii(found[0])[1:-1], text)


def write_temporary(path: Path, write: Callable[[Path], object]) -> Path:
    """Lets `write` fill a file with a temporary name beside `path` and flushes it; removes it where
    that fails."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill the file that becomes `path`."""
    write_temporary(path, write).replace(path)
    flush_folder(path.parent)


def write_output(path: Path, write: Callable[[Path], object]) -> Path:
    """As `write_whole`, for what a user sees. Raises: LocalInputError where it cannot be written,
    as on a full disk."""
    with writing(path):
        write_whole(path, write)
    return path


def write_text(path: Path, text: str) -> None:
    """`write_output` of a text in UTF-8."""
    write_output(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """For a block that writes to `path`. Raises: LocalInputError where the system refuses, as on a
    full disk."""
    try:
        yield
    except OSError as error:
        raise LocalInputError(f"{path} cannot be written: {error.strerror or error}") from error


def flush_folder(folder: Path) -> None:
    """Makes renames in a folder durable; a warning where the file system cannot."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in UNFLUSHED:
            raise
        _warn_of_unflushed(folder)


def lock(file: TextIO, how: Callable[[TextIO, int], None]) -> None:
    """Locks an open file for this process alone, by `fcntl.lockf` or `fcntl.flock`; a warning where
    the file system has no locks.

    Raises: BlockingIOError or PermissionError if another process holds the lock.
    """
    try:
        how(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise
    except OSError as error:
        logger.warning(
            "%s does not support locks, so another job could use it unnoticed (%s)",
            Path(file.name).parent,
            error.strerror,
        )


@cache
def _warn_of_unflushed(folder: Path) -> None:
    logger.warning(
        "the folder %s cannot be flushed to disk: a power cut may lose what was written last",
        folder,
    )
