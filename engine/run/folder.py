"""A run's folder: how it is opened and claimed, and what in it may be removed or overwritten.

Only what a run made is ever removed or overwritten. A run that finds its own checkpoint goes on in
its folder. One that begins must find no results there, and no records of another run. One job at a
time trains in a folder, by a lock that the system releases when its process ends, however it ends.
"""

import fcntl
import logging
import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.parallel import check_speed
from engine.pictures.history import drop_pictures
from engine.run.checkpoint import checkpoint_steps, set_aside_damaged
from engine.run.records import Kind, Records, drop_records, logging_to, write_results
from util.dist import Processes, broadcast, init_processes
from util.errors import DataError, InputError, LocalInputError
from util.files import TEMPORARY, lock, write_text
from util.settings.base import CheckpointingConfig, DatasetConfig, RunConfig
from util.settings.evaluation import MAIN_METRIC, FinetuneConfig, KnnConfig, LinclsConfig
from util.settings.pretrain import PretrainConfig
from util.settings.read import dump_config

TrainConfig = PretrainConfig | FinetuneConfig | LinclsConfig
# What a classifier said of each image: beside results.json, and beside eval.json
PREDICTIONS_FILE, EVAL_PREDICTIONS_FILE = "predictions.npz", "eval_predictions.npz"
PREDICTIONS_MARK = b"of_truth.npy"  # an array in them
RESULT_FILES = ("model.safetensors", "best.safetensors", PREDICTIONS_FILE, "results.json")
PROGRESS_FILES = (
    "config.yaml",
    "log.jsonl",
    "tb",
    "tracking.json",
    "bad_samples.jsonl",
    "bad_steps.jsonl",
    "monitor.png",
    "monitor",
    "predictions.png",
    "per_class.png",
)
OWN_NAME = re.compile(
    r"checkpoint-\d{8,}\.pth(\.sha256)?|eval\.json|eval_predictions\.npz|"
    + "|".join(map(re.escape, RESULT_FILES + PROGRESS_FILES))
)
# Settings that a config.yaml may have more or less, as other versions write it; stages differ by 20
OTHER_SETTINGS = 5
# In torch's words: on CUDA and MPS, and on the CPU, which has no class of its own for it.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What an entry script works with: the folder, the processes, and where records go."""

    output_dir: Path
    processes: Processes
    records: Records

    @property
    def device(self) -> torch.device:
        return self.processes.device

    @property
    def results_path(self) -> Path:
        """Where a finished stage says what it found."""
        return self.output_dir / "results.json"

    def finish(self, results: dict[str, object], path: Path | None = None) -> dict[str, object]:
        """Writes an evaluation's results to `path`, by default results.json, and returns them."""
        path = path or self.results_path
        if self.processes.is_main:
            write_results(path, results)
            logger.info("wrote %s", path)
        self.records.write_settings(
            # a loss that is not finite is None in the results
            {
                f"final/{name}": results[name]
                for name in (*MAIN_METRIC.values(), "loss")
                if results.get(name) is not None
            }
        )
        return results


@contextmanager
def open_run(cfg: RunConfig) -> Iterator[Run]:
    """Joins the other processes, claims the output folder and starts logging; undoes all of it at
    the end.

    An error about the images gets a note of how to look at them; a lack of memory becomes one line.

    Raises: InputError, before any compute, if the device is absent, the settings of speed do not
    fit it, or the folder is in use, cannot be written, or holds files of others that would be lost;
    LocalInputError if memory runs out.
    """
    assert cfg.output_dir is not None, "load_config fills it in"
    folder = Path(cfg.output_dir)
    with init_processes(cfg.device, cfg.timeout) as processes, ExitStack() as stack:
        check_speed(cfg, processes)
        problem = ""
        try:
            if processes.is_main:
                claim(folder, cfg, stack)
            log = folder / "log.txt" if processes.is_main else Path(os.devnull)
            stack.enter_context(logging_to(log))
        except (InputError, OSError) as error:
            problem = str(error)
        if problem := broadcast(problem):
            raise InputError(f"output_dir cannot be used: {problem}", settings=("output_dir",))
        records = Records(folder, processes.is_main)
        stack.callback(records.close)
        try:
            yield Run(folder, processes, records)
        except DataError as error:
            # check_dataset.py knows nothing of masks and boxes
            is_dense = getattr(cfg, "task", "classify") != "classify"
            known = ("folder", "packed")
            if isinstance(cfg, DatasetConfig) and cfg.dataset in known and not is_dense:
                path = shlex.quote(str(cfg.data_path))
                error.add_note(f"look at the data with: python tools/check_dataset.py {path}")
            raise
        except RuntimeError as error:
            if not any(text in str(error) for text in OUT_OF_MEMORY):
                raise
            can_checkpoint = isinstance(cfg, CheckpointingConfig) and not cfg.checkpointing
            advice = " or give --checkpointing" if can_checkpoint else ""
            raise LocalInputError(
                f"process {processes.rank} has no memory left on {processes.device}: give a "
                f"smaller -b (batch_size){advice}; what is saved stays, and a training run goes on "
                f"from it ({str(error).splitlines()[0]})",
                settings=("batch_size", *["checkpointing"] * can_checkpoint),
            ) from error


def check_writable(setting: str, folder: Path) -> None:
    """Makes the folder that `setting` names. Raises: InputError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(
            f"{setting} {folder} cannot be written: {error.strerror}", settings=(setting,)
        ) from error


def claim(folder: Path, cfg: RunConfig, stack: ExitStack) -> None:
    """Claims a folder until the end of `stack`: for the main process.

    Training claims the folder for itself alone. `eval` only adds its results and log lines, and may
    do so beside a training run. k-NN adds its results as well, but needs a folder of its own.

    Raises: InputError or OSError if it is in use, cannot be written, or holds files of others that
        would be lost.
    """
    check_writable("output_dir", folder)
    if isinstance(cfg, KnnConfig):
        lost = _unless_own(folder / "results.json", b'"protocol": "k-NN')
        lost += _unless_own(folder / PREDICTIONS_FILE, PREDICTIONS_MARK)
    elif isinstance(cfg, FinetuneConfig) and cfg.eval:
        lost = _unless_own(folder / "eval.json", b'"protocol": "evaluation')
        lost += _unless_own(folder / EVAL_PREDICTIONS_FILE, PREDICTIONS_MARK)
    else:
        stack.enter_context(locked(folder))
        lost = _weights_to_start_from(folder, cfg)
        if checkpoint_steps(folder):
            lost += _unless_own(folder / PREDICTIONS_FILE, PREDICTIONS_MARK)
        else:
            lost += _files_of_others(folder, cfg)
    if lost:
        raise InputError(
            f"{folder} holds {', '.join(lost)}, which the run would overwrite: "
            f"move that away, or give another --output_dir"
        )


def take_over_folder(folder: Path, cfg: TrainConfig, step: int, pending: set[Kind]) -> None:
    """Makes a claimed folder that of a run at `step`: for the main process, once all processes have
    loaded the checkpoint.

    Newer checkpoints, which were found damaged, get another name. Records that a killed run wrote
    past `step`, and those of `step` itself whose kind is `pending`, are removed; so are unfinished
    files, and the results of an earlier stop, whose state is in its checkpoint.
    """
    set_aside_damaged(folder, step)
    stale = [folder / name for name in RESULT_FILES if name != "best.safetensors" or step == 0]
    for path in folder.glob(f"*{TEMPORARY}"):  # only now: they tell a save that was interrupted
        if OWN_NAME.fullmatch(path.name.removesuffix(TEMPORARY)):
            stale.append(path)
    for path in stale:
        path.unlink(missing_ok=True)
    write_text(folder / "config.yaml", dump_config(cfg))
    drop_records(folder / "log.jsonl", step, pending)
    drop_pictures(folder, step)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock. The file stays and names the last holder; by itself it locks
    nothing.

    Raises: InputError if another process holds the lock; OSError if the file cannot be written.
    """
    # Mode a+ keeps the holder's name until the lock is ours. Nothing else in this process may open
    # the file, as closing it would release the lock.
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            # Not flock, which loader processes would go on holding.
            lock(file, fcntl.lockf)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise InputError(
                f"{folder} is in use by another job ({file.read().strip() or 'just begun'}): "
                f"wait for its end, or give another --output_dir"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield


def _weights_to_start_from(folder: Path, cfg: RunConfig) -> list[str]:
    """The weights that `finetune` or `init` names if they lie where the run writes."""
    name = "init" if isinstance(cfg, PretrainConfig) else "finetune"
    start = getattr(cfg, name, None)
    found = [Path(start), *Path(start).glob("model.safetensors")] if start else []
    return [
        f"{path.name}, which {name} names"
        for path in found
        if path.resolve().parent == folder.resolve()
        if path.is_file() and OWN_NAME.fullmatch(path.name)
    ]


def _files_of_others(folder: Path, cfg: RunConfig) -> list[str]:
    """The results in a folder without a checkpoint, and the records of another run.

    A run that was killed before its first checkpoint leaves its config.yaml and its records, and
    perhaps the weights of its best evaluation.
    """
    path = folder / "config.yaml"
    text = path.read_text(errors="replace") if path.exists() else ""
    settings = set(re.findall(r"^(\w+):", text, re.MULTILINE))
    own: list[str] = []
    if len(type(cfg).model_fields.keys() ^ settings) <= OTHER_SETTINGS:
        own += PROGRESS_FILES
        log = folder / "log.jsonl"
        if log.exists() and '"kind": "val"' in log.read_text(errors="replace"):
            own.append("best.safetensors")
    return [n for n in RESULT_FILES + PROGRESS_FILES if (folder / n).exists() and n not in own]


def _unless_own(path: Path, mark: bytes) -> list[str]:
    """The name of a file unless it is not there or holds the mark of this project's own."""
    return [] if not path.exists() or mark in path.read_bytes() else [path.name]
