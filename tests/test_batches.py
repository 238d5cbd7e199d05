"""Which errors of a loader say that one of its processes is gone: row R14, with
`tests/test_faults.py`."""

import pytest

from engine.run.batches import is_death

WITHIN = (
    "Caught {} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  ..."
)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. "),
        RuntimeError("DataLoader worker (pid(s) 1, 2) exited unexpectedly"),
        ConnectionResetError(104, "Connection reset by peer"),
        ConnectionRefusedError(111, "Connection refused"),
        BrokenPipeError(32, "Broken pipe"),
        FileNotFoundError(2, "No such file or directory"),  # the socket that it shared a batch by
        EOFError(),
    ],
    ids=repr,
)
def test_a_process_that_is_gone(error):
    assert is_death(error)


@pytest.mark.parametrize(
    "error",
    [
        *(
            kind(WITHIN.format(kind.__name__))
            for kind in (RuntimeError, ConnectionResetError, FileNotFoundError, EOFError)
        ),
        RuntimeError(
            "Caught RuntimeError in DataLoader worker process 0.\nDataLoader worker (pid 1) is killed by signal"
        ),
        RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"),
        RuntimeError("CUDA out of memory"),
        PermissionError(13, "Permission denied"),
        OSError(28, "No space left on device"),
        ValueError("DataLoader worker (pid 1) is killed by signal"),
        MemoryError(),
    ],
    ids=repr,
)
def test_what_happens_within_a_process_or_elsewhere(error):
    assert not is_death(error)
