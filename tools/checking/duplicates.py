"""Images that a data set has more than once, in one split or in both."""

import hashlib
from collections import defaultdict
from functools import partial

import numpy as np

from data.images import BadImageError
from tools.checking.checks import Source, open_file, parts_of
from util.pool import in_processes


def equal_images(
    sources: list[Source], keys: list[np.ndarray], full: bool, workers: int
) -> list[list[tuple[int, int]]]:
    """Groups of equal images, each by the number of its source and its index there. Their bytes are
    equal, or after a full check their pixels.

    keys: of `Findings`, for each source. Only files whose sizes and ends are equal are read again.
    """
    values, counts = np.unique(np.concatenate([[b""], *keys]), return_counts=True)
    repeated = values[(counts > 1) & (values != b"")]
    groups = defaultdict(list)
    for number, (source, of_source) in enumerate(zip(sources, keys, strict=True)):
        candidates = np.flatnonzero(np.isin(of_source, repeated))
        digests = of_source[candidates].tolist()
        if not full:
            parts = in_processes(partial(_hash_part, source), parts_of(candidates), workers)
            digests = [digest for part in parts for digest in part]
        for digest, index in zip(digests, candidates.tolist(), strict=True):
            groups[digest].append((number, index))
    groups.pop(b"", None)  # files that have become unreadable
    return sorted(group for group in groups.values() if len(group) > 1)


def _hash_part(source: Source, indices: np.ndarray) -> list[bytes]:
    """Digests of files, empty for one that has become unreadable."""
    digests = []
    for index in indices.tolist():
        try:
            with open_file(source, index) as file:
                digests.append(hashlib.sha256(file.read()).digest())
        except (BadImageError, OSError):
            digests.append(b"")
    return digests
