"""One job at a time in an output folder, by a lock that the system releases when its process ends,
however it ends."""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from util.errors import InputError

NAME = ".lock"
logger = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock. The file stays and names the last holder; by itself it locks
    nothing.

    Raises: InputError if another process holds the lock.
    """
    # Mode a+ keeps the holder's name until the lock is ours. Nothing else in this process may open
    # the file, as closing it would release the lock.
    try:
        opened = (folder / NAME).open("a+", encoding="utf-8")
    except OSError as error:  # another user's, say
        raise InputError(f"{folder / NAME} cannot be written: {error.strerror}") from error
    with opened as file:
        try:
            # Not flock, which loader processes would go on holding.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise InputError(
                    f"{folder} is in use by another job ({file.read().strip() or 'just begun'}): "
                    f"wait for its end, or give another --output_dir",
                    settings=("output_dir",),
                ) from error
            logger.warning(
                "%s does not support locks, so another job could use it unnoticed (%s)",
                folder,
                error.strerror,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
