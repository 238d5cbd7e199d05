"""Signals that stop a training run: all processes finish the same step, save, and end.

SIGTERM comes from a scheduler that wants the machine back, or from a launcher one of whose
processes has ended; SIGINT from a user; SIGUSR1 from a scheduler that warns before its time limit;
SIGHUP from a terminal that is closed, unless nohup shields the run from it. They only take note
here: `engine/run/saving.py` and the evaluations bring all processes to one decision.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from util.errors import LocalInputError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# Stands among the numbers of signals for a failed loader process, of which `stop_with` takes note.
LOADER_FAILED: int = signal.SIGCHLD
REPEAT_S = 2.0  # launchers send a signal twice; one that comes later means it
# torchrun's process id in processes that it has started
LAUNCHER = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
# Both are lists of at most one entry, as signals are the process's; `noted` empties them.
failures: list[LocalInputError] = []  # what `stop_with` was called with
_received: list[tuple[int, float]] = []  # the first signal and when it came


class Stopped(SystemExit):
    """Ends a process with the exit code that a shell gives to one that a signal has ended: 128 +
    its number; with 2, as for every mistake that is one line, if a loader process has failed."""

    def __init__(self, signum: int):
        super().__init__(2 if signum == LOADER_FAILED else 128 + signum)


def received() -> int:
    """The number of the signal that this process got while `noted`, or 0.

    The end of torchrun counts as SIGTERM: it can end without a word, and then nobody could stop
    what it has started.
    """
    if LAUNCHER not in (None, os.getppid()) and not _received:
        _note(signal.SIGTERM, None)
    return _received[0][0] if _received else 0


@contextmanager
def noted() -> Iterator[None]:
    """Takes note of a first signal in place of ending at once; one that comes more than REPEAT_S
    later ends the process."""
    # Python handles signals in the main thread only.
    in_main = threading.current_thread() is threading.main_thread()
    shielded = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    signums = [s for s in SIGNALS if in_main and not (shielded and s == signal.SIGHUP)]
    previous = {signum: signal.signal(signum, _note) for signum in signums}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        _received.clear()
        failures.clear()


def stop_with(error: LocalInputError) -> None:
    """Stops a run that is `noted` as a signal does: all processes finish a step and save, then this
    one raises `error`. Without such a run, raises it now."""
    if signal.getsignal(signal.SIGTERM) is not _note:
        raise error
    if not received():
        _note(LOADER_FAILED, None)
        failures.append(error)


def _note(signum: int, _: object) -> None:
    now = time.monotonic()
    if not _received or _received[0][0] == LOADER_FAILED:
        _received[:] = [(signum, now)]
    elif now - _received[0][1] > REPEAT_S:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
