"""Checkpoints: what one holds, and how it is written, verified, found and removed.

A checkpoint is `checkpoint-<step>.pth`, the fields of `Checkpoint` as one dict of tensors and plain
values, with `checkpoint-<step>.pth.sha256` beside it. It counts when both agree (a flipped bit
would load silently otherwise). Both are written under a temporary name and flushed to disk; then
the checksum is renamed and the state after it, which is the moment from which the checkpoint
counts. The newest complete one is found by scanning the folder.
"""

import hashlib
import logging
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.weights.own import CHECKPOINT_VERSION, own_bytes
from util.errors import InputError
from util.files import TEMPORARY, flush_folder, write_output, write_temporary

NAME = re.compile(r"checkpoint-(\d{8,})\.pth(\.sha256)?")
DAMAGED = ".damaged"  # ending of a checkpoint that was set aside
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What stays the same as long as a run lasts, and decides whether a command goes on with it.

    config: the settings. model_args: the fields of the model's specification.
    mean, std: how pixels are normalised, per channel.
    data: `num_images` and `fingerprint` of the training images.
    weights: sha256 of the file that `finetune` names, None without one.
    """

    config: dict[str, Any]
    model_args: dict[str, Any]
    mean: list[float]
    std: list[float]
    data: dict[str, Any]
    weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint(RunIdentity):
    """The state of a run after `step` optimiser steps: exactly what the file holds.

    ema: the moving average of the model's tensors, None without one.
    epoch_meter, window_meter: sums since the epoch's begin and since the last log line.
    epoch_losses: the mean loss of each finished epoch.
    epoch_end_pending: whether the evaluation after the epoch that ends here is still to come.
    total_batch, samples_seen: images per optimiser step, and since the run's begin.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    ema: dict[str, Tensor] | None
    epoch_meter: dict[str, Tensor]
    window_meter: dict[str, Tensor]
    epoch_losses: list[float]
    epoch_end_pending: bool
    total_batch: int
    samples_seen: int
    format_version: int = CHECKPOINT_VERSION


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, keep_last: int, keep_every: int = 0
) -> Path:
    """Writes a checkpoint and removes the older ones that `kept_steps` does not name.

    Raises: OSError or RuntimeError if it cannot be written; then nothing has changed.
    """
    path = _path(folder, checkpoint.step)
    temporary = write_temporary(path, lambda target: torch.save(vars(checkpoint), target))
    try:
        line = f"{_digest(temporary)}  {path.name}\n"
        temporary_digest = write_temporary(
            _digest_path(path), lambda target: target.write_text(line)
        )
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    temporary_digest.replace(_digest_path(path))
    temporary.replace(path)
    flush_folder(folder)
    _prune(folder, keep_last, keep_every)
    return path


def kept_steps(steps: list[int], keep_last: int, keep_every: int) -> set[int]:
    """The steps whose checkpoints stay: the newest `keep_last`, and every multiple of `keep_every`
    (0 keeps none of those)."""
    newest = sorted(steps)[-keep_last:]
    return {step for step in steps if step in newest or (keep_every and step % keep_every == 0)}


def load_newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a run's folder, on the CPU; None if there is none yet.

    A damaged one is passed over with a warning that names the file and the reason. No file is
    changed.

    Raises: InputError if checkpoints exist and all of them are damaged.
    """
    damaged = []
    steps = checkpoint_steps(folder)
    for step in steps:
        path = _path(folder, step)
        content, reason = _read(path)
        if not reason:
            return Checkpoint(**content)
        logger.warning("passing over the damaged checkpoint %s: %s", path, reason)
        # A first save that was interrupted leaves a checksum alone, and the state still under its
        # temporary name.
        if path.exists() or len(steps) > 1 or not path.with_name(path.name + TEMPORARY).exists():
            damaged.append(f"{path.name}: {reason}")
    if damaged:
        raise InputError(
            f"every checkpoint in {folder} is damaged ({'; '.join(damaged)}): "
            f"bring one back, or start anew with another --output_dir"
        )
    return None


def set_aside_damaged(folder: Path, step: int) -> None:
    """Renames the damaged checkpoints that are newer than `step`, which was loaded.

    Only the main process may call, after all processes have loaded. Raises: OSError.
    """
    for newer in checkpoint_steps(folder):
        if newer <= step:
            break
        path = _path(folder, newer)
        if path.exists():
            path.replace(path.with_name(path.name + DAMAGED))
            logger.warning("set aside the damaged checkpoint as %s", path.name + DAMAGED)
        _digest_path(path).unlink(missing_ok=True)


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of all checkpoints in a folder, newest first, complete or not."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted({int(match[1]) for match in map(NAME.fullmatch, names) if match}, reverse=True)


def save_weights(path: Path, model: nn.Module, identity: RunIdentity, **more: Any) -> Path:
    """Writes a model's weights for others to use.

    The header holds, as JSON, the model's specification, mean and std, and `more`.

    Raises: LocalInputError if it cannot be written; then what was there stays.
    """
    header = {"model_args": identity.model_args, "mean": identity.mean, "std": identity.std, **more}
    content = own_bytes(model.state_dict(), header)
    return write_output(path, lambda target: target.write_bytes(content))


def weights_path(folder: Path) -> Path:
    """Where a finished run's weights are; a run that goes on has none."""
    return folder / "model.safetensors"


def best_path(folder: Path) -> Path:
    """Where the weights of the best evaluation so far are."""
    return folder / "best.safetensors"


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """A checkpoint's fields, and the reason why it does not count, or "". None of what it says is
    executed.

    Raises: InputError for a checkpoint of another version.
    """
    reason = _damage(path)
    if reason:
        return {}, reason
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (damaged bytes raise errors of any class)
        return {}, f"torch.load refuses it ({type(error).__name__})"
    if not isinstance(content, dict) or "format_version" not in content:
        return {}, "it is no checkpoint of a run"
    version = content["format_version"]
    if version != CHECKPOINT_VERSION:
        raise InputError(f"{path} has format {version}, this version reads {CHECKPOINT_VERSION}")
    if content.keys() != {field.name for field in fields(Checkpoint)}:
        return {}, "it is no checkpoint of a run"
    return content, ""


def _damage(path: Path) -> str:
    """In what way a checkpoint and its checksum do not agree, or ""."""
    try:
        expected = _digest_path(path).read_text().split()
        if not expected or expected[0] != _digest(path):
            return "its sha256 does not agree"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, UnicodeDecodeError) as error:
        return f"it cannot be read ({error})"
    return ""


def _prune(folder: Path, keep_last: int, keep_every: int) -> None:
    """Removes the checkpoints that `kept_steps` does not name. A file that cannot be removed is no
    reason to stop."""
    steps = checkpoint_steps(folder)
    for step in set(steps) - kept_steps(steps, keep_last, keep_every):
        path = _path(folder, step)
        for name in (path, _digest_path(path)):
            try:
                name.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("cannot remove the old checkpoint %s: %s", name, error.strerror)


def _path(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step:08d}.pth"


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
