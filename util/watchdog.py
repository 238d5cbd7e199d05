"""Ends a process that hangs, after printing where each of its threads is.

Time in which the process is stopped (SIGSTOP, a suspended job) does not count, so it goes on
afterwards. That is why a thread counts ticks here, and why the time limit of the process group,
which counts by the clock, is much longer. A call that hangs and keeps the interpreter's lock is not
noticed.
"""

import faulthandler
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

_signs_of_life = [0]  # how often `alive` was called


@contextmanager
def watched(minutes: float) -> Iterator[None]:
    """Ends the process if its block goes on for that long without a call of `alive`."""
    ended = threading.Event()
    alive()  # an outer limit begins anew here and at the end
    threading.Thread(target=_watch, args=(60 * minutes, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        alive()


def alive() -> None:
    """Starts the time limits anew."""
    _signs_of_life[0] += 1


def _watch(limit_s: float, ended: threading.Event) -> None:
    tick_s = min(1.0, limit_s / 10)
    seen, silent_s = _signs_of_life[0], 0.0
    while not ended.wait(tick_s):
        silent_s = silent_s + tick_s if _signs_of_life[0] == seen else 0.0
        seen = _signs_of_life[0]
        if silent_s >= limit_s:
            try:
                # Descriptor 2 is stderr, whose lock may be what hangs.
                os.write(2, f"Timeout ({timedelta(seconds=limit_s)})!\n".encode())
                faulthandler.dump_traceback(2)
            finally:
                os._exit(1)
