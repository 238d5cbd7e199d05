"""The user's own mistakes: one exception type, and the wrapper that turns it into one line and exit
code 2."""

import argparse
import errno
import io
import os
import select
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TypeVar

Result = TypeVar("Result")


# How the system says that a path is not for this user, or not for any
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
SILENT_S = 3.0  # seconds that a process which says nothing waits for the one that does


class InputError(ValueError):
    """A setting, file or environment that the user can mend; its text says what came, where, and
    what to do.

    settings: names of the settings that are wrong, empty where it is something else.
    """

    def __init__(self, *texts: str, settings: tuple[str, ...] = ()):
        super().__init__(*texts)
        self.settings = settings


class LocalInputError(InputError):
    """An InputError that only one process sees (its own data, say), so that process has to say
    it."""


class DataError(InputError):
    """An InputError about the images themselves, of which `tools/check_dataset.py` tells more."""


class LocalDataError(DataError, LocalInputError):
    """A DataError that only one process sees."""


def where(*rows: tuple[object, str]) -> list[str]:
    """The texts whose condition holds."""
    return [text for condition, text in rows if condition]


class LineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are InputErrors, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def run_cli(main: Callable[[], Result]) -> Result:
    """Runs an entry script, or its beginning, and returns its result: an `InputError`, or a path
    that the system refuses, becomes `error: ...` on stderr and exit code 2, without a traceback.

    Notes that were added to the error end its line. A mistake that every process of a job finds is
    reported once per machine. Closed standard streams are replaced by the null device; a reader of
    our output that ends early (`| head`) ends the script with 141, Ctrl-C with 130, as in a shell.
    """
    # In the order of their descriptors, which they get back.
    sys.stdin = sys.stdin or Path(os.devnull).open()  # noqa: SIM115
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # file names need not be UTF-8
    try:
        try:
            return main()
        except OSError as error:
            if error.errno not in REFUSED or error.filename is None:
                raise
            raise InputError(f"{error.filename}: {error.strerror}") from error
        finally:
            sys.stdout.flush()  # here, as a reader that has left would be an error at the end
    except InputError as error:
        if (
            isinstance(error, LocalInputError)
            or "RANK" not in os.environ
            or os.environ.get("LOCAL_RANK", "0") == "0"
        ):
            _say(f"error: {'; '.join([str(error), *getattr(error, '__notes__', [])])}")
        else:
            # A launcher ends all processes when the first one ends, and the one that speaks may
            # have started later.
            time.sleep(SILENT_S)
        sys.exit(2)
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        # Descriptor 1, stdout, goes to the null device with what is still in its buffer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)


def _reader_has_left() -> bool:
    """Whether stdout, descriptor 1, is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _say(line: str) -> None:
    with suppress(OSError):  # stderr may have lost its reader, too
        sys.stderr.write(f"{line}\n")
