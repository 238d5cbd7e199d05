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
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.lora import merged_tensors
from models.weights.own import CHECKPOINT_VERSION, own_bytes, unusual_pixels
from util.errors import InputError
from util.files import TEMPORARY, flush_folder, write_output, write_temporary, write_whole

NAME = re.compile(r"checkpoint-(\d{8,})\.pth(\.sha256)?")
DAMAGED = ".damaged"  # ending of a checkpoint that was set aside
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What stays the same as long as a run lasts, and decides whether a command goes on with it.

    config: the settings. model_args: the fields of the model's specification.
    mean, std: how pixels are normalised, per channel.
    data: `num_images` and `fingerprint` of the training images.
    weights: sha256 of the file that `finetune` or `init` names, None without one.
    """

    config: dict[str, object]
    model_args: dict[str, object]
    mean: list[float]
    std: list[float]
    data: dict[str, object]
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
    optimizer: dict[str, object]
    scaler: dict[str, object]
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
    """Writes a checkpoint and removes the older ones that `outdated_steps` names.

    Raises: OSError or RuntimeError if it cannot be written; then what counts is as it was.
    """
    path = _path(folder, checkpoint.step)
    temporary = write_temporary(path, lambda target: torch.save(vars(checkpoint), target))
    line = f"{_digest(temporary)}  {path.name}\n"
    write_whole(_digest_path(path), lambda target: target.write_text(line))
    temporary.replace(path)
    flush_folder(folder)
    for step in outdated_steps(checkpoint_steps(folder), keep_last, keep_every):
        old = _path(folder, step)
        try:
            old.unlink(missing_ok=True)
            _digest_path(old).unlink(missing_ok=True)
        except OSError as error:  # no reason to stop
            logger.warning("cannot remove the old checkpoint %s: %s", old, error.strerror)
    return path


def outdated_steps(steps: list[int], keep_last: int, keep_every: int) -> set[int]:
    """The steps whose checkpoints go: all but the newest `keep_last` and the multiples of
    `keep_every` (0 keeps none of those)."""
    newest = sorted(steps)[-keep_last:]
    return {step for step in steps if step not in newest and (not keep_every or step % keep_every)}


def load_newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a run's folder, on the CPU; None if there is none yet.

    Its tensors are views of the file, which is mapped: what is read of them comes into memory.

    A damaged one is passed over with a warning that names the file and the reason. No file is
    changed.

    Raises: InputError if checkpoints exist and all of them are damaged, or one is of another
        version.
    """
    damaged = []
    for step in checkpoint_steps(folder):
        path = _path(folder, step)
        try:
            content = _read(path)
        except (OSError, ValueError) as error:
            logger.warning("passing over the damaged checkpoint %s: %s", path, error)
            # A save that was interrupted leaves a checksum alone, and the state still under its
            # temporary name.
            if path.exists() or not path.with_name(path.name + TEMPORARY).exists():
                damaged.append(f"{path.name}: {error}")
        else:
            others = content.keys() ^ {field.name for field in fields(Checkpoint)}
            if content["format_version"] != CHECKPOINT_VERSION or others:
                raise InputError(
                    f"{path} is of another version: its format is {content['format_version']}, "
                    f"{CHECKPOINT_VERSION} is read; fields that only one of them has: "
                    f"{sorted(others)}. Go on with the version that wrote it, or start anew with "
                    f"another --output_dir"
                )
            return Checkpoint(**content)
    if damaged:
        raise InputError(
            f"every checkpoint in {folder} is damaged ({'; '.join(damaged)}): "
            f"bring one back, or start anew with another --output_dir"
        )
    return None


def set_aside_damaged(folder: Path, step: int) -> None:
    """Renames the damaged checkpoints that are newer than `step`, which was loaded.

    Only the main process may call. Raises: OSError.
    """
    for path in [_path(folder, newer) for newer in checkpoint_steps(folder) if newer > step]:
        if path.exists():
            path.replace(path.with_name(path.name + DAMAGED))
            logger.warning("set aside the damaged checkpoint as %s", path.name + DAMAGED)
        _digest_path(path).unlink(missing_ok=True)


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of all checkpoints in a folder, newest first, complete or not."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted({int(match[1]) for match in map(NAME.fullmatch, names) if match}, reverse=True)


def checkpoint_seen(folder: Path, step: int | None) -> str | None:
    """The checkpoint of `step` as this process sees it, by its name and size; None if it does not.
    Without a step it is the newest one."""
    steps = checkpoint_steps(folder)[:1] if step is None else [step]
    found = [path for path in map(partial(_path, folder), steps) if path.exists()]
    return f"{found[0].name} of {found[0].stat().st_size} bytes" if found else None


def save_weights(
    path: Path,
    model: nn.Module,
    identity: RunIdentity,
    replaced: Mapping[str, Tensor] | None = None,
    **more: object,
) -> Path:
    """Writes a model's weights for others to use, with those in `replaced` in place of its own.

    The header holds, as JSON, the model's specification, mean and std, settings of the pixels that
    are not the defaults, and `more`.

    Raises: LocalInputError if it cannot be written; then what was there stays.
    """
    header = {"model_args": identity.model_args, "mean": identity.mean, "std": identity.std, **more}
    header |= unusual_pixels(identity.config)
    return write_output(
        path,
        lambda target: target.write_bytes(
            own_bytes({**merged_tensors(model), **(replaced or {})}, header)
        ),
    )


def weights_path(folder: Path) -> Path:
    """Where a finished run's weights are; a run that goes on has none."""
    return folder / "model.safetensors"


def best_path(folder: Path) -> Path:
    """Where the weights of the best evaluation so far are."""
    return folder / "best.safetensors"


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint's content. None of what the file says is executed.

    Raises: OSError or ValueError if it is damaged.
    """
    if _digest_path(path).read_text().split()[:1] != [_digest(path)]:
        raise ValueError("its sha256 does not agree")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {**content, "format_version": content["format_version"]}
    except Exception as error:  # noqa: BLE001 (damaged bytes raise errors of any class)
        raise ValueError(f"it is no checkpoint of a run ({type(error).__name__})") from error


def _path(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step:08d}.pth"


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
