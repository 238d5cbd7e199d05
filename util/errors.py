"""The user's own mistakes: one exception type, and the wrapper that turns it into one line and exit
code 2."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class InputError(ValueError):
    """A setting, file or environment that the user can mend; its text says what came, where, and
    what to do."""


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

    Notes that were added to the error end its line. Mistakes that every process of a job finds
    alike are said once per machine.
    """
    try:
        main()
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, LocalInputError):
            sys.stderr.write(
                f"error: {'; '.join([str(error), *getattr(error, '__notes__', [])])}\n"
            )
        sys.exit(2)
