"""Steps with a non-finite gradient: skipped one by one, and the end of the run after too many in a row.

Which samples went in is kept as numbers on the host and losses on the device, so that no step waits; they are read when
the run ends.
"""

import json
import math
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from data.sampler import SampleKey
from util.dist import all_gather
from util.errors import InputError

SHOWN = 8  # images that an error names


class RecentStep(NamedTuple):
    """What one process put into an optimiser step: its samples, and the mean of their loss, a scalar on the device."""

    step: int
    lr: float
    keys: list[SampleKey]
    loss: Tensor


class BadSteps:
    """Ends a run after `limit` bad steps in a row, and says in `path` and in the error what went into them.

    Args:
        window: steps between two calls of `check`.
        is_main: whether this process writes `path`.
    """

    def __init__(self, path: Path, limit: int, window: int, is_main: bool):
        self.path = path
        self.limit = limit
        self.is_main = is_main
        self.recent: deque[RecentStep] = deque(maxlen=limit + window)  # reaches back to the first of a row

    def add(self, step: int, lr: float, keys: list[SampleKey], loss: Tensor) -> None:
        """Takes note of a step that was taken or skipped; `step` counts from 1, as in the log."""
        self.recent.append(RecentStep(step, lr, keys, loss))

    def check(self, bad_in_a_row: int, step: int) -> None:
        """All processes must call, with the same count up to `step`. Raises: InputError after too many."""
        if bad_in_a_row < self.limit:
            return
        mine = [
            {"step": s.step, "lr": s.lr, "loss": s.loss.item(), "images": [key.image for key in s.keys]}
            for s in self.recent
            if s.step > step - bad_in_a_row
        ]
        entries = [{**entry, "process": process} for process, of_one in enumerate(all_gather(mine)) for entry in of_one]
        entries.sort(key=lambda entry: entry["step"])
        if self.is_main:
            lines = [json.dumps({**e, "loss": e["loss"] if math.isfinite(e["loss"]) else None}) for e in entries]
            self.path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        raise InputError(
            f"{bad_in_a_row} steps in a row up to step {step} had a non-finite gradient: {describe(entries)}; "
            f"all are in {self.path}. Lower lr, set clip_grad, or use precision bf16 or fp32; "
            f"the last checkpoint is from before"
        )


def describe(entries: list[dict[str, Any]]) -> str:
    """The first of the bad steps, and the images on the processes whose loss was not finite."""
    first = [entry for entry in entries if entry["step"] == entries[0]["step"]]
    culprits = [entry for entry in first if not math.isfinite(entry["loss"])]
    images = [image for entry in culprits or first for image in entry["images"]]
    which = f"images {' '.join(map(str, images[:SHOWN]))}{' ...' if len(images) > SHOWN else ''} of the data set"
    processes = " and ".join(str(entry["process"]) for entry in culprits)
    where = f"the loss of process {processes} was not finite with" if culprits else "every loss was finite, it took"
    return f"in the first of them, step {first[0]['step']} at lr {first[0]['lr']:.3g}, {where} {which}"
