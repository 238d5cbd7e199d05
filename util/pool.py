"""Work spread over processes that end with the one that started them."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from util.errors import InputError

Task = TypeVar("Task")
Result = TypeVar("Result")
_function: Callable[[Any], Any]  # of this process, if it is one of a pool


def in_processes(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[Result]:
    """The results of `function` in the order of the tasks, computed in `workers` single-threaded
    processes, or in this process if `workers` is 1. Each process gets `function` once, so it may
    hold much that all tasks need.

    Raises: what `function` raises, after the tasks that are under way; InputError if a process was
    killed.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    method = "fork" if sys.platform == "linux" else "spawn"  # as torch's loaders start
    executor = ProcessPoolExecutor(
        workers, multiprocessing.get_context(method), initializer=_start, initargs=(function,)
    )
    try:
        yield from executor.map(_call, tasks)
    except BrokenProcessPool as error:
        raise InputError(
            "a process was killed (by lack of memory?): try fewer --workers"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _call(task: Any) -> Any:
    return _function(task)


def _end_with_parent() -> None:
    """Without this, processes whose parent was killed wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a pool"
    parent.join()
    os._exit(1)


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
