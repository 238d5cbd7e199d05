"""The best evaluation of a run: its weights lie in `best.safetensors`, whose header says how good
they are."""

import math
from pathlib import Path

from engine.run.checkpoint import best_path
from models.weights.own import read_header
from util.errors import InputError


def read_best(folder: Path, metric: str = "acc1") -> tuple[float, int]:
    """The figure `metric` and the epoch of the best evaluation so far of the run in `folder`, and
    before the first NaN and 0.

    Raises: InputError if the file is damaged, as the best weights would be lost without a word if
        others took their place.
    """
    path = best_path(folder)
    if not path.exists():
        return math.nan, 0
    try:
        header = read_header(path)
        return header[metric], header["epoch"]
    except Exception as error:  # noqa: BLE001 (damaged bytes raise errors of any class)
        raise InputError(
            f"{path} is damaged ({type(error).__name__}: {error}): bring it back, or move it away "
            f"to keep the best of the epochs from here on"
        ) from error
