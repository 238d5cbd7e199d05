"""Ends a process that hangs, after printing where each of its threads is.

Time in which the process is stopped (SIGSTOP, a suspended job) does not count, so it goes on
afterwards. That is why a thread counts ticks here, and why the time limit of the process group,
which counts by the clock, is much longer. A call that hangs and keeps the interpreter's lock is not
noticed.
"""

import faulthandler
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

_watches: list["_Watch"] = []  # of this process


class _Watch(threading.Thread):
    """Counts the seconds since the last call of `alive`, and ends the process at `limit_s`."""

    def __init__(self, limit_s: float):
        super().__init__(name="watchdog", daemon=True)
        self.limit_s = limit_s
        self.silent_s = 0.0
        self.ended = threading.Event()

    def run(self) -> None:
        tick_s = min(1.0, self.limit_s / 10)
        while not self.ended.wait(tick_s):
            self.silent_s += tick_s
            if self.silent_s >= self.limit_s:
                try:
                    if sys.__stderr__ is not None:
                        sys.__stderr__.write(f"Timeout ({timedelta(seconds=self.limit_s)})!\n")
                        sys.__stderr__.flush()
                        faulthandler.dump_traceback(sys.__stderr__)
                finally:
                    os._exit(1)


@contextmanager
def watched(minutes: float) -> Iterator[None]:
    """Ends the process if its block goes on for that long without a call of `alive`."""
    watch = _Watch(60 * minutes)
    alive()  # an outer limit begins anew here and at the end
    _watches.append(watch)
    watch.start()
    try:
        yield
    finally:
        watch.ended.set()
        _watches.remove(watch)
        alive()


def alive() -> None:
    """Starts the time limits anew."""
    for watch in _watches:
        watch.silent_s = 0.0
