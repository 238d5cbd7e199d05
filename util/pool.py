"""Work spread over processes that end with the one that started them."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from typing import TypeVar, cast

import torch

from util.errors import InputError

Task = TypeVar("Task")
Result = TypeVar("Result")
_function: Callable[..., object]  # of this process, if it is one of a pool


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
    # as torch's loaders start; forked processes share what `function` holds
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    try:
        with ProcessPoolExecutor(workers, context, _start, (function,)) as executor:
            yield from cast(Iterator[Result], executor.map(_call, tasks))
    except BrokenProcessPool as error:
        raise InputError(
            "a process was killed (by lack of memory?): try fewer --workers"
        ) from error


def _start(function: Callable[..., object]) -> None:
    global _function
    _function = function
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _call(task: object) -> object:
    return _function(task)


def _end_with_parent() -> None:
    """Without this, processes whose parent was killed wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a pool"
    parent.join()
    os._exit(1)
