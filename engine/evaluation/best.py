"""The best evaluation of a run: its weights lie in `best.safetensors`, whose header says how good
they are."""

from pathlib import Path

from engine.run.checkpoint import best_path
from models.weights.own import read_header
from util.errors import InputError


def read_best(folder: Path) -> tuple[float, int]:
    """Top-1 accuracy in percent and epoch of the best evaluation so far of the run in `folder`; -1
    and 0 before the first.

    Raises: InputError if the file is damaged, as the best weights would be lost without a word if
        others took their place.
    """
    path = best_path(folder)
    if not path.exists():
        return -1.0, 0
    try:
        header = read_header(path)
        return header["acc1"], header["epoch"]
    except Exception as error:  # noqa: BLE001 (damaged bytes raise errors of any class)
        raise InputError(
            f"{path} is damaged ({type(error).__name__}: {error}): bring it back, or move it away "
            f"to keep the best of the epochs from here on"
        ) from error
