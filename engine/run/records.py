"""The records of a run: log.jsonl, log.txt, TensorBoard curves and pictures, the progress bar, and
results.json.

A record is a line of log.jsonl with a `kind` ("train", "epoch", "val" or "monitor"), a `step` and
values. Its numbers are also curves in TensorBoard and, by `tracking.py`, in a service. A sentence
about it goes to log.txt and the terminal. results.json says what an evaluation measured, and of
which weights.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm import tqdm

from util.files import write_text, writing
from util.settings.base import RunConfig, TrainRunConfig

if TYPE_CHECKING:
    from engine.run.tracking import Tracker

FINAL = "final"  # the kind of the figures of a run that has come to its end
Kind = Literal["train", "epoch", "val", "monitor"]
logger = logging.getLogger(__name__)


class Records:
    """Writes a run's records into `folder`. Only the main process writes: the other processes'
    calls do nothing."""

    def __init__(self, folder: Path, is_main: bool):
        self.folder = folder
        self.is_main = is_main
        self.tensorboard: Any = None
        self.tracker: Tracker | None = None
        self.settings: dict[str, object] = {}  # for TensorBoard's page of finished runs
        self.last_step = 0
        self.bar = tqdm(disable=True)

    def open(self, cfg: TrainRunConfig, step: int, total_steps: int) -> None:
        """Opens the curves and the progress bar of a run that goes on from `step`."""
        if not self.is_main:
            return
        if cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # here, as importing it takes seconds

            folder = self.folder / "tb"
            with writing(folder):
                folder.mkdir(exist_ok=True)
                if os.fsencode(folder).decode(errors="ignore") != str(folder):
                    # TensorBoard takes no name that is not UTF-8
                    folder = Path(f"/proc/self/fd/{os.open(folder, os.O_RDONLY)}")
                self.tensorboard = SummaryWriter(str(folder), purge_step=step + 1 if step else 0)
            # Figures are recorded beside settings only once, as TensorBoard keeps the first.
            settings = cfg.model_dump(mode="json")
            if settings["stop_epoch"] in (None, settings["epochs"]):
                self.settings = settings
        self.track(cfg, step)
        # None shows the bar on a terminal only
        self.bar = tqdm(
            initial=step, total=total_steps, unit="step", dynamic_ncols=True, disable=None
        )

    def track(self, cfg: RunConfig, step: int = 0) -> None:
        """Begins to track the run by the service that the settings name, or goes on from `step`."""
        if self.is_main and cfg.track:
            from engine.run.tracking import Tracker  # here, as most runs are not tracked

            settings = as_scalars(cfg.model_dump(mode="json"))
            self.tracker = Tracker(self.folder, cfg.track, settings, step)

    def write(self, kind: Kind, step: int, values: dict[str, float], line: str) -> None:
        """Writes `values` to log.jsonl and TensorBoard, and `line` to log.txt and the terminal."""
        if not self.is_main:
            return
        self.last_step = step
        path = self.folder / "log.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, **without_nan(values)}) + "\n")
        scalars = {f"{kind}/{name}": value for name, value in values.items() if name != "epoch"}
        if self.tensorboard is not None:
            with writing(self.folder / "tb"):
                for name, value in scalars.items():
                    self.tensorboard.add_scalar(name, value, step)
        if self.tracker is not None:
            self.tracker.log(kind, step, scalars)
        logger.info(line)

    def write_picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Writes a picture, uint8 `(H, W, 3)`, to TensorBoard and, in place of an earlier one, into
        the folder. Only the main process may call."""
        from engine.pictures.drawing import write_png  # here, as most stages draw nothing

        write_png(self.folder / name, picture)
        if self.tensorboard is not None:
            with writing(self.folder / "tb"):
                self.tensorboard.add_image(Path(name).stem, picture, step, dataformats="HWC")

    def write_settings(self, metrics: Mapping[str, object]) -> None:
        """Writes the settings with a finished run's figures to TensorBoard, whose HParams page
        compares runs, and the figures to the tracking service."""
        if self.tracker is not None:
            self.tracker.log(FINAL, self.last_step, metrics)
        settings = as_scalars(self.settings)
        if settings:
            with writing(self.folder / "tb"):
                self.tensorboard.add_hparams(
                    settings, metrics, run_name=".", global_step=self.last_step
                )

    def close(self) -> None:
        """Closes the progress bar and the curves."""
        self.bar.close()
        if self.tracker is not None:
            self.tracker.close()
        if self.tensorboard is not None:
            try:
                self.tensorboard.close()
            except OSError as error:  # the error that ends the run may come from the same full disk
                tb = self.folder / "tb"
                logger.warning("%s may lack its last points: %s", tb, error.strerror)


class LogHandler(logging.FileHandler):
    """Writes lines to a file and to stdout, above a progress bar. Lines that nobody can read any
    more, as stdout is closed or its reader has ended, are dropped there."""

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except (OSError, ValueError, AttributeError):  # the last one if stdout is None
            with suppress(OSError, ValueError, AttributeError):
                descriptor = sys.stdout.fileno()  # what is still buffered would be an error at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Sends log lines to the terminal and the file `path`; of all processes but the main one only
    errors."""
    root = logging.getLogger()
    rank = int(os.environ.get("RANK", "0"))
    process = f"[process {rank}] " if rank else ""
    with writing(path):
        handler = LogHandler(path, encoding="utf-8", errors="surrogateescape")
    handler.setFormatter(logging.Formatter(f"%(asctime)s {process}%(message)s", "%H:%M:%S"))
    previous = root.level
    root.setLevel(logging.ERROR if rank else logging.INFO)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(previous)
        handler.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file without a line that was cut off; none if there is no file."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s: dropping a line that was cut off", path)
    return records


def write_log(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Writes all of a .jsonl file anew; a reader never sees half of it. Raises: LocalInputError."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def drop_records(path: Path, step: int, pending: set[Kind]) -> None:
    """Removes the records of a log.jsonl that lie past `step`, and a last line that was cut off.

    Records of `step` itself go if their kind is in `pending`: their evaluation is still to come.
    """
    if path.exists():
        write_log(
            path,
            [
                record
                for record in read_log(path)
                if record["step"] < step
                or (record["step"] == step > 0 and record["kind"] not in pending)
            ],
        )


def as_scalars(settings: Mapping[str, object]) -> dict[str, bool | int | float | str]:
    """The settings as services take them: all but numbers as text."""
    return {
        name: value
        if isinstance(value, bool | int | float)
        else str(value).encode(errors="replace").decode()
        for name, value in settings.items()
    }


def without_nan(values: Mapping[str, object]) -> dict[str, Any]:
    """The values with None for numbers that are not finite, which JSON cannot hold."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def write_results(path: Path, results: Mapping[str, object]) -> None:
    """Writes `results` as JSON; a reader never sees half of it. Raises: LocalInputError if it
    cannot be written."""
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    write_text(path, text.encode(errors="backslashreplace").decode())  # names need not be UTF-8


def read_results(path: Path) -> dict[str, Any]:
    """What `write_results` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
