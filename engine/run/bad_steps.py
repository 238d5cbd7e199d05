"""Steps with a non-finite gradient: skipped one by one, and the end of the run after too many in a
row.

Which samples went in is kept as numbers on the host and losses on the device, so that no step
waits; they are read when the run ends.
"""

import json
import math
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from data.sampler import SampleKey
from util.dist import all_gather
from util.errors import InputError, LocalInputError
from util.files import write_output

SHOWN = 8  # images that an error names


class RecentStep(NamedTuple):
    """What one process put into an optimiser step: its samples, and the mean of their loss, a
    scalar on the device.

    is_bad: another one, 1.0 where the step was skipped.
    """

    step: int
    lr: float
    keys: list[SampleKey]
    loss: Tensor
    is_bad: Tensor


class BadSteps:
    """Ends a run after `limit` bad steps in a row, and says in `path` and in the error what went
    into them.

    Args:
        window: steps between two calls of `check`.
        is_main: whether this process writes `path`.
    """

    def __init__(self, path: Path, limit: int, window: int, is_main: bool):
        self.path = path
        self.limit = limit
        self.is_main = is_main
        self.recent: deque[RecentStep] = deque(
            maxlen=limit + window
        )  # reaches back to the first of a row

    def add(
        self, step: int, lr: float, keys: list[SampleKey], loss: Tensor, is_bad: Tensor
    ) -> None:
        """Takes note of a step that was taken or skipped; `step` counts from 1, as in the log."""
        self.recent.append(RecentStep(step, lr, keys, loss, is_bad))

    def check(self, most_in_a_row: int) -> None:
        """All processes must call, with the same number, of the steps since the last call.

        Raises: InputError after too many.
        """
        if most_in_a_row < self.limit:
            return
        row = self._row(most_in_a_row)
        mine = [
            {
                "step": s.step,
                "lr": s.lr,
                "loss": s.loss.item(),
                "images": [key.image for key in s.keys],
            }
            for s in row
        ]
        entries = [
            {**entry, "process": process}
            for process, of_one in enumerate(all_gather(mine))
            for entry in of_one
        ]
        entries.sort(key=lambda entry: entry["step"])
        is_whole = len(row) == most_in_a_row
        until = f"up to step {row[-1].step}" if row else f"before step {self.recent[0].step}"
        known = f": {describe(entries, is_whole)}; {self._write(entries, is_whole)}" if row else ""
        raise InputError(
            f"{most_in_a_row} steps in a row {until} had a non-finite gradient{known}. "
            f"Lower lr, set clip_grad, or use precision bf16 or fp32"
            f"{'; the last checkpoint is from before' if is_whole else ''}"
        )

    def _row(self, length: int) -> list[RecentStep]:
        """The bad steps in a row of that number; fewer where they began before this start of the
        run, or none."""
        rows: list[list[RecentStep]] = [[]]  # the first is what goes on from before
        for recent in self.recent:
            if recent.is_bad.item():
                rows[-1].append(recent)
            else:
                rows.append([])
        return next((row for row in rows if len(row) == length), rows[0])

    def _write(self, entries: list[dict[str, Any]], is_whole: bool) -> str:
        """Writes `path` and returns where the entries are; a full disk must not hide what they are
        about."""
        lines = [
            json.dumps({**e, "loss": e["loss"] if math.isfinite(e["loss"]) else None}) + "\n"
            for e in entries
        ]
        try:
            if self.is_main:
                write_output(
                    self.path, lambda target: target.write_text("".join(lines), encoding="utf-8")
                )
        except LocalInputError as error:
            return str(error)
        return f"{'all' if is_whole else 'those that are known'} are in {self.path}"


def describe(entries: list[dict[str, Any]], is_whole: bool) -> str:
    """The first of the bad steps, or of those that are known, and the images on the processes with
    a bad loss."""
    first = [entry for entry in entries if entry["step"] == entries[0]["step"]]
    culprits = [entry for entry in first if not math.isfinite(entry["loss"])]
    images = [image for entry in culprits or first for image in entry["images"]]
    which = f"images {' '.join(map(str, images[:SHOWN]))}{' ...' if len(images) > SHOWN else ''} of the data set"
    processes = " and ".join(str(entry["process"]) for entry in culprits)
    where = (
        f"the loss of process {processes} was not finite with"
        if culprits
        else "every loss was finite, it took"
    )
    which_step = "of them" if is_whole else "that is known"
    return f"in the first {which_step}, step {first[0]['step']} at lr {first[0]['lr']:.3g}, {where} {which}"
