"""Ends a process that hangs, after printing where each of its threads is.

It works where the interpreter itself is stuck, in a call that never returns. Waiting for another
process is also limited by the time limit of `init_processes`; this one says where it was.
"""

import faulthandler
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_limit_s: list[float] = []  # while `watched`
_armed: list[float] = []  # when the time limit last began


@contextmanager
def watched(minutes: float) -> Iterator[None]:
    """Within this, `alive` must be called at least that often; an outer limit goes on after it."""
    outer = list(_limit_s)
    _begin([60 * minutes])
    try:
        yield
    finally:
        _begin(outer)


def _begin(limit_s: list[float]) -> None:
    """A new time limit, or none, from now on."""
    faulthandler.cancel_dump_traceback_later()
    _limit_s[:] = limit_s
    _armed.clear()
    alive()


def alive() -> None:
    """Starts the time limit anew; nothing where nobody watches."""
    if not _limit_s or sys.__stderr__ is None:
        return
    now = time.monotonic()
    if not _armed or now - _armed[0] > min(1.0, _limit_s[0] / 10):  # it costs 0.1 ms
        faulthandler.dump_traceback_later(_limit_s[0], exit=True, file=sys.__stderr__)
        _armed[:] = [now]
