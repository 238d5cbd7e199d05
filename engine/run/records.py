"""The records of a run: log.jsonl, log.txt, TensorBoard curves and pictures, and the progress bar.

A record is a line of log.jsonl with a `kind` ("train", "epoch", "val" or "monitor"), a `step` and
values. Its numbers are also curves in TensorBoard, and a sentence about it goes to log.txt and the
terminal.
"""

import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from engine.run.results import without_nan
from util.files import write_output, writing
from util.settings.base import TrainRunConfig

Kind = Literal["train", "epoch", "val", "monitor"]
logger = logging.getLogger(__name__)


class Records:
    """Writes a run's records into `folder`. Only the main process writes: the other processes'
    calls do nothing."""

    def __init__(self, folder: Path, is_main: bool):
        self.folder = folder
        self.is_main = is_main
        self.tensorboard: Any = None
        self.settings: dict[str, Any] = {}
        self.last_step = 0
        self.bar: tqdm[Any] | None = None
        self.link: tempfile.TemporaryDirectory[str] | None = None

    def open(self, cfg: TrainRunConfig, step: int, total_steps: int) -> None:
        """Opens the curves and the progress bar of a run that goes on from `step`."""
        if not self.is_main:
            return
        if cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # here, as importing it takes seconds

            with writing(self.folder / "tb"):
                purge_step = step + 1 if step else 0
                folder = self._utf8_link(self.folder / "tb")
                self.tensorboard = SummaryWriter(str(folder), purge_step=purge_step)
            # Figures are recorded beside settings only once, as TensorBoard keeps the first.
            settings = cfg.model_dump(mode="json")
            if settings["stop_epoch"] in (None, settings["epochs"]):
                self.settings = settings
        if sys.stderr is not None and sys.stderr.isatty():
            self.bar = tqdm(initial=step, total=total_steps, unit="step", dynamic_ncols=True)

    def _utf8_link(self, folder: Path) -> Path:
        """The folder, or a link to it if its path is no UTF-8, as TensorBoard takes no other."""
        if os.fsencode(folder).decode(errors="ignore") == str(folder):
            return folder
        folder.mkdir(exist_ok=True)
        self.link = tempfile.TemporaryDirectory()
        link = Path(self.link.name) / "tb"
        link.symlink_to(folder.absolute())
        return link

    def advance(self) -> None:
        """Moves the progress bar by one optimiser step."""
        if self.bar is not None:
            self.bar.update()

    def write(self, kind: Kind, step: int, values: dict[str, Any], line: str) -> None:
        """Writes `values` to log.jsonl and TensorBoard, and `line` to log.txt and the terminal.

        The lines of training become the text of the progress bar if there is one.
        """
        if not self.is_main:
            return
        self.last_step = step
        path = self.folder / "log.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, **without_nan(values)}) + "\n")
        if self.tensorboard is not None:
            with writing(self.folder / "tb"):
                for name, value in values.items():
                    if isinstance(value, int | float) and name != "epoch":
                        self.tensorboard.add_scalar(f"{kind}/{name}", value, step)
        bar = self.bar if kind == "train" else None
        logger.info(line, extra={"to_terminal": bar is None})
        if bar is not None:
            bar.set_postfix_str(f"loss {values['loss']:.4f}", refresh=False)

    def write_picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Writes a picture, uint8 `(H, W, 3)`, to TensorBoard and, in place of an earlier one, into
        the folder."""
        if not self.is_main:
            return
        from engine.pictures.drawing import write_png  # here, as most stages draw nothing

        write_png(self.folder / name, picture)
        if self.tensorboard is not None:
            with writing(self.folder / "tb"):
                self.tensorboard.add_image(Path(name).stem, picture, step, dataformats="HWC")

    def write_settings(self, metrics: dict[str, float]) -> None:
        """Writes the settings with a finished run's figures to TensorBoard, whose HParams page
        compares runs."""
        if self.tensorboard is None or not self.settings:
            return
        settings = {
            name: value
            if isinstance(value, bool | int | float)
            else str(value).encode(errors="replace").decode()
            for name, value in self.settings.items()
        }
        with writing(self.folder / "tb"):
            self.tensorboard.add_hparams(
                settings, metrics, run_name=".", global_step=self.last_step
            )

    def close(self) -> None:
        """Closes the progress bar and the curves."""
        if self.bar is not None:
            self.bar.close()
        if self.tensorboard is not None:
            try:
                self.tensorboard.close()
            except OSError as error:  # the error that ends the run may come from the same full disk
                tb = self.folder / "tb"
                logger.warning("%s may lack its last points: %s", tb, error.strerror)


class TerminalHandler(logging.Handler):
    """Writes lines to stdout, above a progress bar. Lines that nobody can read any more, as stdout
    is closed or its reader has ended, are dropped."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stdout is None or not getattr(record, "to_terminal", True):
            return
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):  # what is still buffered would be an error at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def logging_to(path: Path | None) -> Iterator[None]:
    """Sends log lines to the terminal and the file `path`.

    Without a path, as on all processes but the main one, only errors go to the terminal.
    """
    root = logging.getLogger()
    previous = root.level
    root.setLevel(logging.ERROR if path is None else logging.INFO)
    handlers: list[logging.Handler] = [TerminalHandler()]
    if path is not None:
        with writing(path):
            handlers.append(logging.FileHandler(path, encoding="utf-8", errors="surrogateescape"))
    rank = os.environ.get("RANK", "0")
    process = "" if rank == "0" else f"[process {rank}] "
    for handler in handlers:
        layout = f"%(asctime)s {process}%(message)s"
        handler.setFormatter(logging.Formatter(layout, datefmt="%H:%M:%S"))
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(previous)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl without a line that was cut off; none if there is no file."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s: dropping a line that was cut off", path)
    return records


def drop_records(path: Path, step: int, pending: set[Kind]) -> None:
    """Removes the records of a log.jsonl that lie past `step`, and a last line that was cut off.

    Records of `step` itself go if their kind is in `pending`: their evaluation is still to come.
    """
    if not path.exists():
        return
    kept = [
        record
        for record in read_log(path)
        if record["step"] < step or (record["step"] == step > 0 and record["kind"] not in pending)
    ]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    write_output(path, lambda target: target.write_text(text, encoding="utf-8"))


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))
