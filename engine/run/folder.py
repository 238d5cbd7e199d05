"""A run's folder and its records: log.txt, log.jsonl, TensorBoard curves, config.yaml and the
progress bar."""

import json
import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from engine.run.checkpoint import tidy, weights_path
from engine.run.lock import locked
from engine.run.results import without_nan, write_results
from util.dist import Processes, broadcast, init_processes
from util.errors import DataError, InputError
from util.files import write_output, writing
from util.settings.base import DatasetConfig, RunConfig, TrainRunConfig
from util.settings.read import dump_config

GROUPS = {
    "epoch_loss": "epoch",
    "val_loss": "val",
    "monitor_s": "monitor",
}  # of curves, by a fact that only they have
logger = logging.getLogger(__name__)


class Run:
    """What an entry script works with: the processes, the folder, and a place for each kind of
    record.

    Only the main process writes; the others' calls do nothing.
    """

    def __init__(self, cfg: RunConfig, processes: Processes):
        assert cfg.output_dir is not None, "load_config fills it in"
        self.processes = processes
        self.device = processes.device
        self.output_dir = Path(cfg.output_dir)
        self.tensorboard: Any = None
        self.settings: dict[str, Any] = {}
        self.last_step = 0
        self.bar: tqdm[Any] | None = None

    def start(self, cfg: Any, step: int, total_steps: int, owes_look: bool) -> None:
        """Begins the records of a run, or goes on with them from `step`; lines a killed run wrote
        past it go."""
        if not self.processes.is_main:
            return
        tidy(
            self.output_dir, step
        )  # here, as --eval and k-NN may look into a folder that is in use
        write_output(
            self.output_dir / "config.yaml",
            lambda target: target.write_text(dump_config(cfg), encoding="utf-8"),
        )
        for of_an_earlier_stop in (weights_path(self.output_dir), self.results_path):
            of_an_earlier_stop.unlink(missing_ok=True)  # the state behind them is in its checkpoint
        again = (
            {"val_loss", "monitor_s"}
            if owes_look
            else {"val_loss"}
            if step == total_steps
            else set()
        )
        _drop_lines_after(self.output_dir / "log.jsonl", step, again)
        if cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # here, as importing it takes seconds

            with writing(self.output_dir / "tb"):
                self.tensorboard = SummaryWriter(
                    str(self.output_dir / "tb"), purge_step=step + 1 if step else 0
                )
            self.settings = cfg.model_dump(mode="json")
        if sys.stderr.isatty():
            self.bar = tqdm(initial=step, total=total_steps, unit="step", dynamic_ncols=True)

    @property
    def results_path(self) -> Path:
        """Where an evaluation says what it found."""
        return self.output_dir / "results.json"

    def finish(self, results: dict[str, Any], path: Path | None = None) -> dict[str, Any]:
        """Writes an evaluation's results (to results.json unless told otherwise) and returns
        them."""
        path = path or self.results_path
        if self.processes.is_main:
            write_results(path, results)
            logger.info("wrote %s", path)
        self.record_settings(
            {f"final/{name}": results[name] for name in ("acc1", "loss") if name in results}
        )
        return results

    def advance(self) -> None:
        """Moves the progress bar by one optimiser step."""
        if self.bar is not None:
            self.bar.update()

    def record(self, facts: dict[str, Any], line: str, to_terminal: bool) -> None:
        """Writes one set of facts (with `step`) to log.jsonl and TensorBoard, and `line` to log.txt
        and the terminal.

        Under a progress bar, lines that are not for the terminal become the bar's text.
        """
        if not self.processes.is_main:
            return
        self.last_step = facts["step"]
        path = self.output_dir / "log.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(without_nan(facts)) + "\n")
        if self.tensorboard is not None:
            prefix = next((group for fact, group in GROUPS.items() if fact in facts), "train")
            with writing(self.output_dir / "tb"):
                for name, value in facts.items():
                    if isinstance(value, float) and name != "epoch":
                        self.tensorboard.add_scalar(f"{prefix}/{name}", value, facts["step"])
        logger.info(line, extra={"to_terminal": to_terminal or self.bar is None})
        if self.bar is not None and not to_terminal:
            self.bar.set_postfix_str(f"loss {facts['loss']:.4f}", refresh=False)

    def record_picture(self, name: str, picture: Any, step: int) -> None:
        """Writes a picture, uint8 `(H, W, 3)`, to TensorBoard and, in place of an earlier one, into
        the folder."""
        if not self.processes.is_main:
            return
        from engine.pictures.output import write_png  # here, as most stages draw nothing

        write_png(self.output_dir / name, picture)
        if self.tensorboard is not None:
            with writing(self.output_dir / "tb"):
                self.tensorboard.add_image(Path(name).stem, picture, step, dataformats="HWC")

    def record_settings(self, metrics: dict[str, float]) -> None:
        """Writes the settings with a finished run's figures to TensorBoard, where its HParams page
        compares runs."""
        # once only, as the first settings stay: not at a stop on the way
        is_whole = self.settings.get("stop_epoch") in (None, self.settings.get("epochs"))
        if self.tensorboard is not None and is_whole:
            settings = {
                n: v if isinstance(v, bool | int | float | str) else str(v)
                for n, v in self.settings.items()
            }
            with writing(self.output_dir / "tb"):
                self.tensorboard.add_hparams(
                    settings, metrics, run_name=".", global_step=self.last_step
                )

    def close(self) -> None:
        """Ends bar and curves."""
        if self.bar is not None:
            self.bar.close()
        if self.tensorboard is not None:
            try:
                self.tensorboard.close()
            except (
                OSError
            ) as error:  # what ends the run may be the same full disk, and says it better
                logger.warning(
                    "%s may lack its last points: %s", self.output_dir / "tb", error.strerror
                )


@contextmanager
def open_run(cfg: RunConfig) -> Iterator[Run]:
    """Joins the other processes, claims the output folder and starts logging; undoes all of it at
    the end.

    Training claims the folder for itself alone; k-NN and --eval only look, and may do so while a
    run is under way. An error about the images gets a note of how to look at them. Raises:
    InputError where the device is absent or the folder is in use or cannot be written, before any
    compute.
    """
    with init_processes(cfg.device, cfg.timeout) as processes, ExitStack() as claim:
        run = Run(cfg, processes)
        problem = ""
        try:
            if processes.is_main:
                check_writable("output_dir", run.output_dir)
                if isinstance(cfg, TrainRunConfig) and not getattr(cfg, "eval", False):
                    claim.enter_context(locked(run.output_dir))
        except InputError as error:
            problem = str(error)
        if problem := broadcast(problem):
            raise InputError(problem)
        with (
            _logging_to(run.output_dir / "log.txt" if processes.is_main else None),
            logging_redirect_tqdm(),
        ):
            try:
                yield run
            except DataError as error:
                if isinstance(cfg, DatasetConfig) and cfg.dataset in ("folder", "packed"):
                    path = shlex.quote(str(cfg.data_path))
                    error.add_note(f"look at the data with: python tools/check_dataset.py {path}")
                raise
            finally:
                run.close()


def check_writable(setting: str, folder: Path) -> None:
    """Makes the folder that `setting` names. Raises: InputError where nothing can be written
    there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{setting} {folder} cannot be written: {error.strerror}") from error


@contextmanager
def _logging_to(path: Path | None) -> Iterator[None]:
    """Plain lines to the terminal and a file on the main process; errors only on the others."""
    root = logging.getLogger()
    previous = root.level
    root.setLevel(logging.ERROR if path is None else logging.INFO)
    terminal = logging.StreamHandler(sys.stdout)
    terminal.addFilter(lambda record: getattr(record, "to_terminal", True))
    handlers: list[logging.Handler] = [terminal]
    if path is not None:
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
    rank = os.environ.get("RANK", "0")
    layout = (
        "%(asctime)s %(message)s" if rank == "0" else f"%(asctime)s [process {rank}] %(message)s"
    )
    for handler in handlers:
        handler.setFormatter(logging.Formatter(layout, datefmt="%H:%M:%S"))
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(previous)


def _drop_lines_after(path: Path, step: int, again: set[str]) -> None:
    """Removes the lines of a log.jsonl that lie past `step`, and a last line that was cut off.

    Of those of `step` itself the ones go, too, that have a fact named in `again`: their evaluation
    is still to come, as that of a run's end, which is after the last checkpoint.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            facts = json.loads(line)
            if facts["step"] < step or (facts["step"] == step > 0 and not again & facts.keys()):
                kept.append(line)
        except json.JSONDecodeError:
            logger.warning("%s: dropping a line that was cut off", path)
    write_output(
        path,
        lambda target: target.write_text("".join(line + "\n" for line in kept), encoding="utf-8"),
    )


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))
