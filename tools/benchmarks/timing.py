"""Times that compare on a busy machine: every variant runs once in each round, in turn."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import TypeAlias

Table: TypeAlias = dict[str, dict[str, float]]  # the figures of each variant, by their columns


def say(line: str) -> None:
    """A line about progress, on stderr, so that stdout holds the tables alone."""
    print(line, file=sys.stderr, flush=True)


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    least: float = 0.0,
    synchronize: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds that one run of each variant takes in each round, after one round that does not
    count.

    Args:
        least: seconds for which each variant runs in a round, several times if need be.
        synchronize: waits until the device has done what it was given.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    runs = dict.fromkeys(variants, 1)
    for number in range(rounds + 1):
        say(f"round {number} of {rounds}" if number else "a round to warm up")
        for name, run in variants.items():
            synchronize()
            started = time.perf_counter()
            for _ in range(runs[name]):
                run()
            synchronize()
            seconds[name].append((time.perf_counter() - started) / runs[name])
            runs[name] = max(runs[name], math.ceil(least / seconds[name][0]))
    return {name: of_rounds[1:] for name, of_rounds in seconds.items()}


def rates(seconds: dict[str, list[float]], column: str, count: int) -> Table:
    """A table of what each variant does per second if it does `count` in a run, by its median
    time."""
    return {name: {column: count / statistics.median(taken)} for name, taken in seconds.items()}


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """How many times faster `fast` is: the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))
