"""Work spread over processes that end with the one that started them."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

from util.errors import InputError

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_processes(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[Result]:
    """The results of `function` in the order of the tasks, by so many processes of one thread each;
    here, where one.

    Raises: what `function` raises, after the tasks that are under way; InputError where a process
    was killed.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context(
        "fork" if sys.platform == "linux" else "spawn"
    )  # as torch's loaders start
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start)
    try:
        yield from executor.map(function, tasks)
    except BrokenProcessPool as error:
        raise InputError(
            "a process was killed (by lack of memory?): try fewer --workers"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _start() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this, processes whose parent was killed wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a pool"
    parent.join()
    os._exit(1)


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
