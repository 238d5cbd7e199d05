"""This project's training state on disk: written whole or not at all, verified before it is read.

A checkpoint is `checkpoint-<step>.pth`, one dict of tensors and plain values, with
`checkpoint-<step>.pth.sha256` beside it, and counts when both agree (a flipped bit would load
silently otherwise). Both are written under a temporary name and flushed to disk; then the checksum
is renamed and the state after it, which is the moment from which the checkpoint counts. The newest
complete one is found by scanning the folder.
"""

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.weights.files import CHECKPOINT_VERSION
from models.weights.own import own_bytes, read_header
from util.errors import InputError
from util.files import TEMPORARY, flush_folder, write_output, write_temporary

NAME = re.compile(r"checkpoint-(\d{8,})\.pth(\.sha256)?")
DAMAGED = ".damaged"  # ending of a checkpoint that was set aside
logger = logging.getLogger(__name__)


def save_checkpoint(
    output_dir: Path, step: int, content: dict[str, Any], keep_last: int, keep_every: int = 0
) -> Path:
    """Writes the state of optimiser step `step`; of the others those stay that `kept_steps` names.

    Raises: OSError or RuntimeError where it cannot be written; then nothing has changed.
    """
    path = _path(output_dir, step)
    content = {"format_version": CHECKPOINT_VERSION, "step": step, **content}
    temporary = write_temporary(path, lambda target: torch.save(content, target))
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
    flush_folder(output_dir)
    _prune(output_dir, keep_last, keep_every)
    return path


def kept_steps(steps: list[int], keep_last: int, keep_every: int) -> set[int]:
    """Which checkpoints stay: the newest `keep_last`, and those of every `keep_every`-th step (0 is
    none)."""
    newest = sorted(steps)[-keep_last:]
    return {step for step in steps if step in newest or (keep_every and step % keep_every == 0)}


def load_newest_checkpoint(output_dir: Path) -> dict[str, Any] | None:
    """The newest complete checkpoint of a run's folder, on the CPU; None where there is none yet.

    A damaged one is passed over with a warning that names the file and the reason; nothing is
    changed.

    Raises: InputError where checkpoints exist and all of them are damaged.
    """
    damaged = []
    steps = _steps(output_dir)
    for step in steps:
        path = _path(output_dir, step)
        content, reason = _read(path)
        if not reason:
            found = content["format_version"]
            if found != CHECKPOINT_VERSION:
                raise InputError(
                    f"{path} has format {found}, this version reads {CHECKPOINT_VERSION}"
                )
            return content
        logger.warning("passing over the damaged checkpoint %s: %s", path, reason)
        # a first save that was cut off leaves a checksum alone, and the state still under its
        # temporary name
        if path.exists() or len(steps) > 1 or not path.with_name(path.name + TEMPORARY).exists():
            damaged.append(f"{path.name}: {reason}")
    if damaged:
        raise InputError(
            f"every checkpoint in {output_dir} is damaged ({'; '.join(damaged)}): "
            f"bring one back, or start anew with another --output_dir"
        )
    return None


def tidy(output_dir: Path, step: int) -> None:
    """Clears up before a run goes on from `step`, which loaded: for the main process, once all have
    loaded it.

    What a save that was cut off has left is removed. Newer checkpoints were found damaged: they get
    another name, so that the run can save these steps again and whoever wants to can look into
    them.
    """
    for newer in [found for found in _steps(output_dir) if found > step]:
        path = _path(output_dir, newer)
        if path.exists():
            path.replace(path.with_name(path.name + DAMAGED))
            logger.warning("set aside the damaged checkpoint as %s", path.name + DAMAGED)
        _digest_path(path).unlink(missing_ok=True)
    for path in output_dir.glob(
        f"*{TEMPORARY}"
    ):  # last: by these a checksum alone is known for a save's
        path.unlink(missing_ok=True)


def save_weights(path: Path, model: nn.Module, facts: dict[str, Any], **more: Any) -> Path:
    """Writes a model's weights for others to use.

    The header holds, as JSON, what `facts` say of the model (its constructor arguments, mean and
    std) and `more`.

    Raises: LocalInputError where it cannot be written; then what was there stays.
    """
    header = {name: facts[name] for name in ("model_args", "mean", "std")} | more
    content = own_bytes(model.state_dict(), header)
    return write_output(path, lambda target: target.write_bytes(content))


def weights_header(path: Path) -> dict[str, Any]:
    """What `save_weights` wrote beside the tensors."""
    return read_header(path)


def weights_path(output_dir: Path) -> Path:
    """Where a finished run's weights are; a run that goes on has none."""
    return output_dir / "model.safetensors"


def best_path(output_dir: Path) -> Path:
    """Where the weights of the best evaluation so far are."""
    return output_dir / "best.safetensors"


def _steps(output_dir: Path) -> list[int]:
    """The steps of all checkpoints, newest first, complete or not."""
    names = [path.name for path in output_dir.iterdir()] if output_dir.is_dir() else []
    return sorted({int(match[1]) for match in map(NAME.fullmatch, names) if match}, reverse=True)


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """A checkpoint's content, and why it does not count, or nothing. None of what it says is
    executed."""
    reason = _damage(path)
    if reason:
        return {}, reason
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (damaged bytes raise errors of any class)
        return {}, f"torch.load refuses it ({type(error).__name__})"
    if not isinstance(content, dict) or "format_version" not in content:
        return {}, "it is no checkpoint of a run"
    return content, ""


def _damage(path: Path) -> str:
    """In what way a checkpoint and its checksum do not agree, or nothing."""
    try:
        expected = _digest_path(path).read_text().split()
        if not expected or expected[0] != _digest(path):
            return "its sha256 does not agree"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, UnicodeDecodeError) as error:
        return f"it cannot be read ({error})"
    return ""


def _prune(output_dir: Path, keep_last: int, keep_every: int) -> None:
    """Removes what `kept_steps` does not name; a file that stays in spite of that is no reason to
    stop."""
    steps = _steps(output_dir)
    for step in set(steps) - kept_steps(steps, keep_last, keep_every):
        path = _path(output_dir, step)
        for name in (path, _digest_path(path)):
            try:
                name.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("cannot remove the old checkpoint %s: %s", name, error.strerror)


def _path(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step:08d}.pth"


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
