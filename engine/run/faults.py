"""Bad files and bad steps: what training replaces or skips, how it reports that, and when it stops.

A file that cannot be decoded is replaced by the loader; here it is counted, written to
`bad_samples.jsonl`, and too many of them end the run. A step with a non-finite gradient is skipped
by the optimiser; too many in a row end the run, and `bad_steps.jsonl` says what went into them.
"""

import json
import math
from collections import deque
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from data.loader import BadSample, Batch
from data.sampler import StepSampler
from util.dist import all_gather
from util.errors import DataError, InputError, LocalDataError, LocalInputError
from util.files import write_output, writing

MIN_BAD_FILES = 10
BAD_FILES_SHARE = 0.001
IMAGES_SHOWN = 8  # in the error about bad steps
NOT_RECORDED = ", all of them before this resume, so that they are not recorded"


def max_bad_files(num_images: int) -> int:
    """How many distinct bad files training tolerates in a data set of `num_images`."""
    return max(MIN_BAD_FILES, int(BAD_FILES_SHARE * num_images))


def why_training_stops(num_bad: int, num_images: int) -> str | None:
    """The reason why training stops at `num_bad` distinct bad files; None if it goes on."""
    if num_bad == num_images:
        return f"none of the {num_images:,} images can be read"
    limit = max_bad_files(num_images)
    return (
        f"{num_bad:,} bad files, more than the {limit:,} that are tolerated"
        if num_bad > limit
        else None
    )


class BadSamples:
    """The distinct bad files of a run.

    Each process collects what its loader replaced. When a line is logged all processes exchange
    their lists, so all hold the same set and stop together. The main process writes the set to
    `path`, which also keeps it across a resume.
    """

    def __init__(self, path: Path, num_images: int, is_main: bool):
        self.path = path
        self.limit = max_bad_files(num_images)
        self.is_main = is_main
        self.new: list[BadSample] = []
        self.known: dict[str, str] = {}
        written = path.read_text(encoding="utf-8") if path.exists() else ""
        self.is_cut_off = bool(written) and not written.endswith("\n")
        for line in written.splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # cut off by a kill; training will meet the file again
                continue
            self.known[entry["path"]] = entry["reason"]

    def collect(self, batch: Batch) -> None:
        """Takes over a batch's bad files. Raises: LocalDataError at once if the whole batch is
        bad."""
        self.new += batch.bad
        if batch.failed:
            first = batch.bad[0]
            num_files = len({path for path, _ in batch.bad})
            raise LocalDataError(
                f"a whole batch could not be read ({num_files} files, first {first.path}: "
                f"{first.reason}): is the disk still there?"
            )

    def exchange(self) -> int:
        """Brings all processes to the same set and returns its size.

        Raises: DataError if it exceeds the limit; LocalInputError if `path` cannot be written.
        """
        everywhere = [entry for entries in all_gather(self.new) for entry in entries]
        fresh = {path: reason for path, reason in everywhere if path not in self.known}
        self.new = []
        self.known |= fresh
        if self.is_main and fresh:
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write("\n" if self.is_cut_off else "")
                self.is_cut_off = False
                file.writelines(
                    json.dumps({"path": p, "reason": r}) + "\n" for p, r in fresh.items()
                )
        if len(self.known) > self.limit:
            path, reason = next(iter(self.known.items()))
            raise DataError(
                f"{len(self.known)} bad files, more than the {self.limit} that are tolerated; "
                f"all are in {self.path}, the first is {path}: {reason}"
            )
        return len(self.known)


class RecentStep(NamedTuple):
    """A finished optimiser step, counted from 1 as in the log.

    loss: mean over this process's samples, a scalar on the device.
    is_bad: 1.0 if the step was skipped, a scalar on the device.
    """

    step: int
    lr: float
    loss: Tensor
    is_bad: Tensor


class BadSteps:
    """Ends a run after `limit` bad steps in a row, and writes what went into them to `path`.

    Losses stay on the device until then, so no step waits for them; the images of a step are
    recomputed from its number.

    Args:
        window: optimiser steps between two calls of `check`.
        is_main: whether this process writes `path`.
        sampler: of this process's training batches.
    """

    def __init__(self, path: Path, limit: int, window: int, is_main: bool, sampler: StepSampler):
        self.path = path
        self.limit = limit
        self.is_main = is_main
        self.sampler = sampler
        self.recent: deque[RecentStep] = deque(maxlen=limit + window)  # as long as a row can be

    def add(self, step: int, lr: float, loss: Tensor, is_bad: Tensor) -> None:
        """Takes note of a step; see `RecentStep`."""
        self.recent.append(RecentStep(step, lr, loss, is_bad))

    def check(self, most_in_a_row: int) -> None:
        """Ends the run if `most_in_a_row`, counted since the last call, reaches the limit.

        All processes must call, with the same number. Raises: InputError.
        """
        if most_in_a_row < self.limit:
            return
        rows = [list(g) for is_bad, g in groupby(self.recent, lambda s: bool(s.is_bad)) if is_bad]
        # a row that began before a resume is known in part
        rows = [r for r in rows if len(r) == most_in_a_row or r[0] is self.recent[0]]
        mine = [
            {
                "step": s.step,
                "lr": s.lr,
                "loss": s.loss.item(),
                "images": self.sampler.images(s.step),
            }
            for s in max(rows, key=len, default=[])
        ]
        entries: list[dict[str, Any]] = [
            {**entry, "process": process}
            for process, of_one in enumerate(all_gather(mine))
            for entry in of_one
        ]
        entries.sort(key=lambda entry: entry["step"])
        raise InputError(
            f"{most_in_a_row} steps in a row had a non-finite gradient"
            f"{self._describe(entries) if entries else NOT_RECORDED}. "
            "Lower lr, set clip_grad, or use precision bf16 or fp32"
        )

    def _describe(self, entries: list[dict[str, Any]]) -> str:
        """Writes `path`; returns where the entries are, and the first step's loss and images."""
        for entry in entries:
            entry["loss"] = entry["loss"] if math.isfinite(entry["loss"]) else None
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        written = f"all are in {self.path}"
        try:
            if self.is_main:
                write_output(self.path, lambda target: target.write_text(text, encoding="utf-8"))
        except LocalInputError as error:  # a full disk must not hide what is known
            written = str(error)
        first = [entry for entry in entries if entry["step"] == entries[0]["step"]]
        broken = [entry for entry in first if entry["loss"] is None]
        images = [str(image) for entry in broken or first for image in entry["images"]]
        shown = " ".join(images[:IMAGES_SHOWN]) + (" ..." if len(images) > IMAGES_SHOWN else "")
        processes = " and ".join(str(entry["process"]) for entry in broken)
        loss = f"a loss that is not finite on process {processes}" if broken else "finite losses"
        return (
            f", the first that is known at step {first[0]['step']} and lr {first[0]['lr']:.3g}, "
            f"with {loss} and images {shown} of the data set; {written}"
        )
