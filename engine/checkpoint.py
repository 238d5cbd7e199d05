"""This project's training state on disk: written whole or not at all, verified before it is read.

A checkpoint is `checkpoint-<step>.pth`, one dict of tensors and plain values, with `checkpoint-<step>.pth.sha256`
beside it, and counts when both agree (a flipped bit would load silently otherwise). Both are written under a temporary
name, flushed to disk and renamed. The newest complete one is found by scanning the folder.
"""

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

from models.weights_file import CHECKPOINT_VERSION, safetensors_bytes
from util.errors import InputError
from util.files import TEMPORARY, flush_folder, write_temporary, write_whole

NAME = re.compile(r"checkpoint-(\d{8,})\.pth")
logger = logging.getLogger(__name__)


def save_checkpoint(output_dir: Path, step: int, content: dict[str, Any], keep_last: int) -> Path:
    """Writes the state of optimiser step `step` and removes all but the newest `keep_last` checkpoints."""
    path = output_dir / f"checkpoint-{step:08d}.pth"
    content = {"format_version": CHECKPOINT_VERSION, "step": step, **content}
    temporary = write_temporary(path, lambda target: torch.save(content, target))
    digest = _digest(temporary)
    digest_path = _digest_path(path)
    temporary_digest = write_temporary(digest_path, lambda t: t.write_text(f"{digest}  {path.name}\n"))
    temporary.replace(path)
    temporary_digest.replace(digest_path)
    flush_folder(output_dir)
    for old in _checkpoints(output_dir)[keep_last:]:
        for name in (_digest_path(old), old):
            try:
                name.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("cannot remove the old checkpoint %s: %s", name, error.strerror)
    return path


def load_newest_checkpoint(output_dir: Path) -> dict[str, Any] | None:
    """The newest complete checkpoint of a run's folder, on the CPU; None where there is none yet.

    A damaged one is passed over with a warning that names the file and the reason.

    Raises: InputError where checkpoints exist and all of them are damaged.
    """
    damaged = []
    for path in _checkpoints(output_dir):
        reason = _damage(path)
        if not reason:
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            found = content["format_version"]
            if found != CHECKPOINT_VERSION:
                raise InputError(f"{path} has format {found}, this version reads {CHECKPOINT_VERSION}")
            return content
        logger.warning("passing over the damaged checkpoint %s: %s", path, reason)
        damaged.append(f"{path.name}: {reason}")
    if damaged:
        raise InputError(
            f"every checkpoint in {output_dir} is damaged ({'; '.join(damaged)}): "
            f"bring one back, or start anew with another --output_dir"
        )
    return None


def remove_leftovers(output_dir: Path) -> None:
    """Removes the temporary files of a save that was cut off."""
    for path in output_dir.glob(f"*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def save_weights(path: Path, model: nn.Module, facts: dict[str, Any], **more: Any) -> Path:
    """Writes a model's weights for others to use.

    The header holds, as JSON, what `facts` say of the model (its constructor arguments, mean and std) and `more`.
    """
    header = {**{name: facts[name] for name in ("model_args", "mean", "std")}, **more}
    metadata = {"format": "pt", **{name: json.dumps(value) for name, value in header.items()}}
    content = safetensors_bytes(model.state_dict(), metadata)
    write_whole(path, lambda target: target.write_bytes(content))
    return path


def weights_header(path: Path) -> dict[str, Any]:
    """What `save_weights` wrote beside the tensors."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return {name: json.loads(value) for name, value in metadata.items() if name != "format"}


def weights_path(output_dir: Path) -> Path:
    """Where a finished run's weights are; a run that goes on has none."""
    return output_dir / "model.safetensors"


def best_path(output_dir: Path) -> Path:
    """Where the weights of the best evaluation so far are."""
    return output_dir / "best.safetensors"


def _checkpoints(output_dir: Path) -> list[Path]:
    """Every checkpoint file, newest first, complete or not."""
    found = [path for path in output_dir.iterdir() if NAME.fullmatch(path.name)] if output_dir.is_dir() else []
    return sorted(found, key=lambda path: int(path.stem.split("-")[1]), reverse=True)


def _damage(path: Path) -> str:
    """Why a checkpoint does not count, or nothing."""
    try:
        expected = _digest_path(path).read_text().split()
    except FileNotFoundError:
        return f"{_digest_path(path).name} is missing"
    if not expected or expected[0] != _digest(path):
        return "its sha256 does not agree"
    return ""


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
