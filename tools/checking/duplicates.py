"""Images of a data set that are there more than once, in one split or in both."""

import hashlib

import numpy as np

from data.images import BadImageError
from tools.checking.checks import Source, Task, open_file, opened, tasks_of
from util.pool import in_processes


def equal_images(
    sources: list[Source], keys: list[np.ndarray], full: bool, workers: int
) -> list[list[int]]:
    """Groups of images with equal bytes, or pixels where the look was full; counted through all
    sources.

    Only files whose sizes and ends are equal are read.
    """
    every = np.concatenate([np.empty(0, dtype="S32"), *keys])
    candidates = _repeated(every)
    if not full:
        starts = np.cumsum([0, *map(len, keys)])
        for source, start, end in zip(sources, starts, starts[1:], strict=False):
            inside = candidates[(candidates >= start) & (candidates < end)]
            tasks = tasks_of(source, inside - start, full)
            every[inside] = [
                digest for part in in_processes(_hash_part, tasks, workers) for digest in part
            ]
        candidates = candidates[_repeated(every[candidates])]
    order = candidates[np.argsort(every[candidates], kind="stable")]
    borders = np.flatnonzero(every[order][1:] != every[order][:-1]) + 1
    return sorted(group.tolist() for group in np.split(order, borders) if len(group))


def _repeated(keys: np.ndarray) -> np.ndarray:
    """Indices, in order, of the keys that are there more than once, empty ones left out."""
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return np.flatnonzero((counts[inverse] > 1) & (keys != b""))


def _hash_part(task: Task) -> list[bytes]:
    """Digests of files, empty where one has become unreadable."""
    source = opened(task)
    digests = []
    for index in task.indices.tolist():
        try:
            with open_file(source, index) as file:
                digests.append(hashlib.sha256(file.read()).digest())
        except (BadImageError, OSError):
            digests.append(b"")
    return digests
