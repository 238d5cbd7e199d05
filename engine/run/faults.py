"""Bad files and bad steps: what training replaces or skips, how it reports that, and when it stops.

A file that cannot be decoded is replaced by the loader; here it is counted, written to
`bad_samples.jsonl`, and too many of them end the run. A step with a non-finite gradient is skipped
by the optimiser; too many in a row end the run, and `bad_steps.jsonl` says what went into them.
"""

from collections import deque
from pathlib import Path

from torch import Tensor

from data.loader import BadSample, Batch
from data.sampler import StepSampler
from engine.run.records import read_log, without_nan, write_log
from util.dist import all_gather
from util.errors import DataError, InputError, LocalDataError, LocalInputError

MIN_BAD_FILES = 10
BAD_FILES_SHARE = 0.001
IMAGES_SHOWN = 8  # in the error about bad steps


def why_training_stops(num_bad: int, num_images: int) -> str | None:
    """The reason why training stops at `num_bad` distinct bad files; None if it goes on."""
    if num_bad == num_images:
        return f"none of the {num_images:,} images can be read"
    limit = max(MIN_BAD_FILES, int(BAD_FILES_SHARE * num_images))
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
        self.num_images = num_images
        self.is_main = is_main
        self.new: list[BadSample] = []
        self.known = {entry["path"]: entry["reason"] for entry in read_log(path)}

    def collect(self, batch: Batch) -> None:
        """Takes over a batch's bad files. Raises: LocalDataError at once if the whole batch is
        bad."""
        self.new += batch.bad
        if batch.failed:
            first = batch.bad[0]
            raise LocalDataError(
                f"a whole batch could not be read ({len(set(batch.bad))} files, first "
                f"{first.path}: {first.reason}): correct the files, or is the disk gone?"
            )

    def exchange(self) -> int:
        """Brings all processes to the same set and returns its size.

        Raises: DataError if it exceeds the limit; LocalInputError if `path` cannot be written.
        """
        num_before = len(self.known)
        for entries in all_gather(self.new):
            for path, reason in entries:
                self.known.setdefault(path, reason)
        self.new = []
        if self.is_main and len(self.known) > num_before:
            write_log(self.path, [{"path": p, "reason": r} for p, r in self.known.items()])
        if why := why_training_stops(len(self.known), self.num_images):
            path, reason = next(iter(self.known.items()))
            raise DataError(f"{why}; all are in {self.path}, the first is {path}: {reason}")
        return len(self.known)


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
        # as long as a row can be
        self.recent: deque[tuple[int, float, Tensor, Tensor]] = deque(maxlen=limit + window)

    def add(self, step: int, lr: float, loss: Tensor, is_bad: Tensor) -> None:
        """Takes note of an optimiser step, counted from 1 as in the log. Scalars on the device are
        the mean loss of this process's samples, and 1.0 if the step was skipped."""
        self.recent.append((step, lr, loss, is_bad))

    def check(self, most_in_a_row: int) -> None:
        """Ends the run if `most_in_a_row`, counted since the last call, reaches the limit.

        All processes must call, with the same number. Raises: InputError.
        """
        if most_in_a_row < self.limit:
            return
        mine = [
            {"step": step, "lr": lr, "loss": loss.item(), "images": self.sampler.images(step)}
            for step, lr, loss, is_bad in self.recent
            if is_bad
        ]
        entries = sorted(
            [
                without_nan({**entry, "process": process})
                for process, of_one in enumerate(all_gather(mine))
                for entry in of_one
            ],
            key=lambda entry: entry["step"],
        )
        suspects = [entry for entry in entries if entry["loss"] is None] or entries
        first = [{**entry, "images": entry["images"][:IMAGES_SHOWN]} for entry in suspects[:1]]
        known = (
            f"the last bad steps since this start are in {self.path}, for example {first}"
            if first
            else "all were before this start, so that they are not recorded"
        )
        error = InputError(
            f"{most_in_a_row} steps in a row had a non-finite gradient: lower lr, set clip_grad, "
            f"or use precision bf16 or fp32; {known}"
        )
        try:
            if self.is_main and entries:
                write_log(self.path, entries)
        except LocalInputError as problem:  # a full disk must not hide what is known
            error.add_note(str(problem))
        raise error
