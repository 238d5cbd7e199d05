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
    """Holds the folder's lock. The file stays and says who had it last; alone it locks nothing.

    Raises: InputError where another process holds it.
    """
    # a+ as the holder's words must not go before the lock is ours; nothing else may open the file
    # in this process, as closing it would release the lock
    try:
        opened = (folder / NAME).open("a+", encoding="utf-8")
    except OSError as error:  # another user's, say
        raise InputError(f"{folder / NAME} cannot be written: {error.strerror}") from error
    with opened as file:
        try:
            fcntl.lockf(
                file, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # not flock, which loader processes would go on holding
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise InputError(
                    f"{folder} is in use by another job ({file.read().strip() or 'just begun'}): "
                    f"wait for its end, or give another --output_dir"
                ) from error
            logger.warning(
                "cannot tell whether another job uses %s: no locks there (%s)",
                folder,
                error.strerror,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
