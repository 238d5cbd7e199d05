"""What training does about files that cannot be decoded: count and log them, and stop when there
are too many.

Each process collects what its loader replaced; when a line is logged all processes exchange their
lists, so all hold the same set and stop together. `bad_samples.jsonl` in the run's folder keeps it
across a resume.
"""

import json
from pathlib import Path

from data.loader import BadSample, LabelledBatch, PretrainBatch
from util.dist import all_gather
from util.errors import DataError, LocalDataError
from util.files import writing

MIN_LIMIT = 10
LIMIT_SHARE = 0.001


def tolerated(num_images: int) -> int:
    """How many distinct bad files training replaces, of so many images, before it stops."""
    return max(MIN_LIMIT, int(LIMIT_SHARE * num_images))


class BadSamples:
    """The distinct bad files of a run of `num_images` images, written to `path` by the main
    process."""

    def __init__(self, path: Path, num_images: int, is_main: bool):
        self.path = path
        self.limit = tolerated(num_images)
        self.is_main = is_main
        self.new: list[BadSample] = []
        self.known: dict[str, str] = {}
        self.cut_off = path.exists() and not path.read_bytes().endswith(b"\n")
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # cut off by a kill; the file will be met again
                    continue
                self.known[entry["path"]] = entry["reason"]

    def collect(self, batch: PretrainBatch | LabelledBatch) -> None:
        """Takes note of a batch's bad files. Raises: LocalDataError at once where the whole batch
        is bad."""
        self.new += batch.bad
        if batch.failed:
            first = batch.bad[0]
            num_files = len({path for path, _ in batch.bad})
            raise LocalDataError(
                f"a whole batch could not be read ({num_files} files, first {first.path}: {first.reason}): "
                f"is the disk still there?"
            )

    def exchange(self) -> int:
        """Brings all processes to the same set and returns its size.

        Raises: DataError where it passes the limit; LocalInputError where `path` cannot be written.
        """
        fresh = {
            path: reason
            for entries in all_gather(self.new)
            for path, reason in entries
            if path not in self.known
        }
        self.new = []
        self.known |= fresh
        if self.is_main and fresh:
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write("\n" if self.cut_off else "")
                self.cut_off = False
                file.writelines(
                    json.dumps({"path": p, "reason": r}) + "\n" for p, r in fresh.items()
                )
        if len(self.known) > self.limit:
            path, reason = next(iter(self.known.items()))
            raise DataError(
                f"{len(self.known)} bad files, more than the {self.limit} that are tolerated; all are in {self.path}, "
                f"the first is {path}: {reason}"
            )
        return len(self.known)


def why_training_stops(num_bad: int, num_images: int) -> str | None:
    """What ends a training run with so many bad files; None where nothing does."""
    if num_bad == num_images:
        return f"none of the {num_images:,} images can be read"
    limit = tolerated(num_images)
    return (
        f"{num_bad:,} bad files, more than the {limit:,} that are tolerated"
        if num_bad > limit
        else None
    )
