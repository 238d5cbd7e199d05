"""A run's folder: how it is opened and claimed, and what in it may be removed or overwritten.

Only what a run made is ever removed or overwritten. A run that finds its own checkpoint goes on in
its folder. One that begins must find no results there, and no records of another run.
"""

import json
import logging
import re
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from engine.run.checkpoint import best_path, checkpoint_steps, set_aside_damaged
from engine.run.lock import locked
from engine.run.records import Kind, Records, drop_records, logging_to, read_log
from engine.run.results import write_results
from models.weights.own import read_header
from util.dist import Processes, broadcast, init_processes
from util.errors import DataError, InputError
from util.files import TEMPORARY, write_output
from util.settings.base import DatasetConfig, RunConfig, TrainRunConfig
from util.settings.evaluation import FinetuneConfig, KnnConfig, LinclsConfig
from util.settings.pretrain import PretrainConfig
from util.settings.read import dump_config

TrainConfig = PretrainConfig | FinetuneConfig | LinclsConfig
OF_THE_END = ("model.safetensors", "best.safetensors", "results.json")
OF_THE_WAY = (
    "config.yaml",
    "log.jsonl",
    "tb",
    "bad_samples.jsonl",
    "bad_steps.jsonl",
    "monitor.png",
)
OWN_NAME = re.compile(
    r"checkpoint-\d{8,}\.pth(\.sha256)?|eval\.json|"
    + "|".join(map(re.escape, OF_THE_END + OF_THE_WAY))
)
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

    def finish(self, results: dict[str, Any], path: Path | None = None) -> dict[str, Any]:
        """Writes an evaluation's results to `path`, by default results.json, and returns them."""
        path = path or self.results_path
        if self.processes.is_main:
            write_results(path, results)
            logger.info("wrote %s", path)
        self.records.write_settings(
            {f"final/{name}": results[name] for name in ("acc1", "loss") if name in results}
        )
        return results


@contextmanager
def open_run(cfg: RunConfig) -> Iterator[Run]:
    """Joins the other processes, claims the output folder and starts logging; undoes all of it at
    the end.

    An error about the images gets a note of how to look at them.

    Raises: InputError, before any compute, if the device is absent or the folder is in use, cannot
    be written, or holds files of others that would be lost.
    """
    assert cfg.output_dir is not None, "load_config fills it in"
    folder = Path(cfg.output_dir)
    with init_processes(cfg.device, cfg.timeout) as processes, ExitStack() as stack:
        problem = None
        try:
            if processes.is_main:
                stack.enter_context(_claimed(cfg, folder))
        except InputError as error:
            problem = str(error), error.settings
        if problem := broadcast(problem):
            raise InputError(problem[0], settings=problem[1])
        records = Records(folder, processes.is_main)
        stack.enter_context(logging_to(folder / "log.txt" if processes.is_main else None))
        stack.callback(records.close)
        try:
            yield Run(folder, processes, records)
        except DataError as error:
            if isinstance(cfg, DatasetConfig) and cfg.dataset in ("folder", "packed"):
                path = shlex.quote(str(cfg.data_path))
                error.add_note(f"look at the data with: python tools/check_dataset.py {path}")
            raise


def check_writable(setting: str, folder: Path) -> None:
    """Makes the folder that `setting` names. Raises: InputError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{setting} {folder} cannot be written: {error.strerror}", settings=(setting,)
        ) from error


def take_over_folder(folder: Path, cfg: TrainConfig, step: int, pending: set[Kind]) -> None:
    """Makes a claimed folder that of a run at `step`: for the main process, once all processes have
    loaded the checkpoint.

    Newer checkpoints, which were found damaged, get another name. Records that a killed run wrote
    past `step`, and those of `step` itself whose kind is `pending`, are removed; so are unfinished
    files, and the results of an earlier stop, whose state is in its checkpoint.
    """
    set_aside_damaged(folder, step)
    for path in folder.glob(f"*{TEMPORARY}"):  # last: they tell a first save that was interrupted
        if OWN_NAME.fullmatch(path.name.removesuffix(TEMPORARY)):
            path.unlink(missing_ok=True)
    text = dump_config(cfg)
    write_output(folder / "config.yaml", lambda target: target.write_text(text, encoding="utf-8"))
    for name in OF_THE_END:
        if name != "best.safetensors" or step == 0:
            (folder / name).unlink(missing_ok=True)
    drop_records(folder / "log.jsonl", step, pending)


@contextmanager
def _claimed(cfg: RunConfig, folder: Path) -> Iterator[None]:
    """Makes sure that the folder can be written and that nothing of others would be lost there.

    Training claims the folder for itself alone. `eval` only adds its results and log lines, and may
    do so beside a training run. k-NN adds its results as well, but needs a folder of its own.
    """
    check_writable("output_dir", folder)
    if isinstance(cfg, TrainRunConfig) and not (isinstance(cfg, FinetuneConfig) and cfg.eval):
        _check_weights_stay(folder, getattr(cfg, "finetune", None))
        _check_begin(folder, cfg)
        with locked(folder):
            yield
        return
    if isinstance(cfg, KnnConfig):
        _check_results(folder / "results.json", "k-NN")
    elif isinstance(cfg, FinetuneConfig):
        _check_results(folder / "eval.json", "evaluation")
    yield


def _check_weights_stay(folder: Path, finetune: str | None) -> None:
    """Raises: InputError if the weights that `finetune` names lie where the run writes."""
    for path in [Path(finetune), *Path(finetune).glob("model.safetensors")] if finetune else []:
        lies_here = path.resolve().parent == folder.resolve()
        if lies_here and path.is_file() and OWN_NAME.fullmatch(path.name):
            raise InputError(
                f"finetune {finetune} lies in output_dir {folder}, where the run would overwrite "
                f"it: give another --output_dir",
                settings=("finetune", "output_dir"),
            )


def _check_begin(folder: Path, cfg: TrainRunConfig) -> None:
    """Raises: InputError if a run would begin where there are results, or records of another run.

    A run that was killed before its first checkpoint leaves its config.yaml and its records, and
    begins anew.
    """
    if any((folder / f"checkpoint-{step:08d}.pth").exists() for step in checkpoint_steps(folder)):
        return
    is_own = _config_keys(folder / "config.yaml") == type(cfg).model_fields.keys()
    names = [name for name in OF_THE_END if (folder / name).exists()]
    if is_own and names == ["best.safetensors"] and _is_in_log(folder):
        names = []
    if not is_own:
        names += [name for name in OF_THE_WAY if (folder / name).exists()]
    if names:
        raise InputError(
            f"output_dir {folder} holds {', '.join(names)} and no checkpoint of this run: move "
            f"them away, or give another --output_dir",
            settings=("output_dir",),
        )


def _config_keys(path: Path) -> set[str]:
    """The settings that a config.yaml names; none if it is not one."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return set()
    return set(content) if isinstance(content, dict) else set()


def _is_in_log(folder: Path) -> bool:
    """Whether the best weights come from an evaluation that the folder's log.jsonl tells of."""
    try:
        epoch = read_header(best_path(folder)).get("epoch")
    except Exception:  # noqa: BLE001 (damaged bytes raise errors of any class)
        return False
    records = read_log(folder / "log.jsonl")
    return any(record.get("kind") == "val" and record.get("epoch") == epoch for record in records)


def _check_results(path: Path, protocol: str) -> None:
    """Raises: InputError if `path` is there and holds no results of this `protocol`."""
    if not path.exists():
        return
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        is_own = str(results["protocol"]).startswith(protocol)
    except (OSError, ValueError, TypeError, KeyError):
        is_own = False
    if not is_own:
        raise InputError(
            f"{path} is not of this evaluation and would be overwritten: move it away, or give "
            f"another --output_dir",
            settings=("output_dir",),
        )
