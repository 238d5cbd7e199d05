"""Times that compare on a busy machine: every variant runs once in each round, in turn."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeAlias

Figures: TypeAlias = "Mapping[str, float | Figures]"


def interleaved(
    variants: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: of_rounds[1:] for name, of_rounds in seconds.items()}


def rates(seconds: dict[str, list[float]], count: int) -> dict[str, float]:
    """What each variant does per second if it does `count` in a round, by its median time."""
    return {name: count / statistics.median(of_rounds) for name, of_rounds in seconds.items()}


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """How many times faster `fast` is: the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))
