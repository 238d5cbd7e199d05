"""The user's own mistakes: one exception type, and the wrapper that turns it into one line and exit
code 2."""

import argparse
import io
import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

STDOUT = 1  # file descriptor
STREAMS = {"stdin": "r", "stdout": "w", "stderr": "w"}


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


class LineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are InputErrors, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def run_cli(main: Callable[[], object]) -> None:
    """Runs an entry script: an `InputError` becomes `error: ...` on stderr and exit code 2, without
    a traceback.

    Notes that were added to the error end its line. A mistake that every process of a job finds is
    reported once per machine. Closed standard streams are replaced by the null device; a reader of
    our output that ends early (`| head`) ends the script with 141, Ctrl-C with 130, as in a shell.
    """
    for name, mode in STREAMS.items():  # in the order of their descriptors, which they get back
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # file names need not be UTF-8
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # here, where a reader that has left can still be told apart
    except InputError as error:
        others_say_it = "RANK" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"
        if isinstance(error, LocalInputError) or not others_say_it:
            _say(f"error: {'; '.join([str(error), *getattr(error, '__notes__', [])])}")
        sys.exit(2)
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # takes what is still in the buffer
        sys.exit(141)


def _say(line: str) -> None:
    with suppress(OSError):  # stderr may have lost its reader, too
        sys.stderr.write(f"{line}\n")


def _reader_has_left() -> bool:
    """Whether stdout is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(STDOUT, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
