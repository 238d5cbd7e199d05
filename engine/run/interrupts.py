"""Signals that stop a training run: all processes finish the same step, save, and end.

SIGTERM comes from a scheduler that wants the machine back, or from a launcher one of whose
processes has ended; SIGINT from a user; SIGUSR1 from a scheduler that warns before its time limit;
SIGHUP from a terminal that is closed, unless nohup shields the run from it. They only take note
here: `StopVote` and the evaluations bring all processes to one decision.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import distributed as dist

from util.errors import LocalInputError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
REPEAT_S = 2.0  # launchers send a signal twice; one that comes later means it
# The first signal and when it came; one list, as signals are the process's.
_received: list[tuple[int, float]] = []
_launcher: list[int] = []  # torchrun's process id while `noted`, in processes that it has started
_failure: list[LocalInputError | None] = []  # while `noted`: what `stop_with` was called with


class Stopped(SystemExit):
    """Ends a process with the exit code that a shell gives to one that a signal has ended: 128 +
    its number; with 2, as for every mistake that is one line, if a loader process has failed."""

    def __init__(self, signum: int):
        failed = signum == signal.SIGCHLD  # see `stop_with`
        super().__init__(2 if failed else 128 + signum)
        self.name = "a failed loader process" if failed else signal.Signals(signum).name


def received() -> int:
    """The number of the signal that this process got while `noted`, or 0.

    The end of torchrun counts as SIGTERM: it can end without a word, and then nobody could stop
    what it has started.
    """
    if _launcher and os.getppid() != _launcher[0] and not _received:
        _received.append((signal.SIGTERM, time.monotonic()))
    return _received[0][0] if _received else 0


@contextmanager
def noted() -> Iterator[None]:
    """Takes note of a first signal in place of ending at once; one that comes more than REPEAT_S
    later ends the process."""
    # Python handles signals in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    shielded = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    signums = [signum for signum in SIGNALS if not (shielded and signum == signal.SIGHUP)]
    previous = {signum: signal.signal(signum, _note) for signum in signums}
    _launcher[:] = [os.getppid()] if "TORCHELASTIC_RUN_ID" in os.environ else []
    _failure[:] = [None]
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        _received.clear()
        _launcher.clear()
        _failure.clear()


def failure() -> LocalInputError | None:
    """What `stop_with` was called with in this process, if it was."""
    return _failure[0] if _failure else None


def stop_with(error: LocalInputError) -> None:
    """Stops a run that is `noted` as a signal does: all processes finish a step and save, then this
    one raises `error`. Without such a run, raises it now."""
    if not _failure:
        raise error
    if not received():
        _received.append((signal.SIGCHLD, time.monotonic()))
        _failure[0] = error


def _note(signum: int, _: FrameType | None) -> None:
    now = time.monotonic()
    if not _received or _received[0][0] == signal.SIGCHLD:  # see `stop_with`
        _received[:] = [(signum, now)]
    elif now - _received[0][1] > REPEAT_S:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)


class StopVote:
    """Asks all processes at each step whether one of them got a signal.

    The answer to a question comes with the next one, so that no process waits for the others in
    this step, and none ever for its device: the votes go between the CPUs.
    """

    def __init__(self) -> None:
        self.vote = torch.zeros(1, dtype=torch.int64)
        self.work: dist.Work | None = None

    def ask(self) -> None:
        """All processes must call at the same step. Raises: Stopped on all of them, a step after
        the signal."""
        signum = self.answer() if dist.is_initialized() else received()
        if signum:
            raise Stopped(signum)
        if dist.is_initialized():
            self.vote[0] = received()
            self.work = dist.all_reduce(self.vote, dist.ReduceOp.MAX, async_op=True)

    def answer(self) -> int:
        """The number of the signal that any process had when it last asked, or 0; then no question
        is open."""
        if self.work is None:
            return 0
        self.work.wait()
        self.work = None
        return int(self.vote)
