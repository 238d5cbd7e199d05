"""Images that a data set has more than once, in one split or in both."""

import hashlib

import numpy as np

from data.images import BadImageError
from tools.checking.checks import Source, Task, open_file, opened, tasks_of
from util.pool import in_processes


def equal_images(
    sources: list[Source], keys: list[np.ndarray], full: bool, workers: int
) -> list[list[tuple[int, int]]]:
    """Groups of equal images, each by the number of its source and its index there. Their bytes are
    equal, or after a full check their pixels.

    keys: of `Findings`, for each source. Only files whose sizes and ends are equal are read again.
    """
    every = np.concatenate([np.empty(0, dtype="S32"), *keys])
    numbers = np.repeat(np.arange(len(keys)), [len(of_source) for of_source in keys])
    indices = np.concatenate([np.arange(0), *(np.arange(len(of_source)) for of_source in keys)])
    candidates = _repeated(every)
    if not full:
        for number, source in enumerate(sources):
            inside = candidates[numbers[candidates] == number]
            tasks = tasks_of(source, indices[inside], full)
            digests = [part for parts in in_processes(_hash_part, tasks, workers) for part in parts]
            every[inside] = digests
        candidates = candidates[_repeated(every[candidates])]
    order = candidates[np.argsort(every[candidates], kind="stable")]
    borders = np.flatnonzero(every[order][1:] != every[order][:-1]) + 1
    groups = sorted(group.tolist() for group in np.split(order, borders) if len(group))
    return [[(int(numbers[place]), int(indices[place])) for place in group] for group in groups]


def _repeated(keys: np.ndarray) -> np.ndarray:
    """Indices, in order, of the keys that occur more than once, empty ones left out."""
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return np.flatnonzero((counts[inverse] > 1) & (keys != b""))


def _hash_part(task: Task) -> list[bytes]:
    """Digests of files, empty for one that has become unreadable."""
    source = opened(task)
    digests = []
    for index in task.indices.tolist():
        try:
            with open_file(source, index) as file:
                digests.append(hashlib.sha256(file.read()).digest())
        except (BadImageError, OSError):
            digests.append(b"")
    return digests
