"""The weights of a run's best evaluation on disk, with its epoch and accuracy in their header."""

from pathlib import Path

from torch import nn

from engine.run.checkpoint import RunIdentity, best_path, save_weights
from models.weights.own import read_header
from util.errors import InputError


class Best:
    """Keeps `best.safetensors` of the run's folder, and finds it again after a restart. The file is
    written whole or not at all.

    Args:
        identity: of the run, for the header.
        is_main: whether this process writes.
        resumed: whether the run goes on, and so may have a best evaluation already.

    Raises: InputError if a run goes on and its file is damaged, as its best weights would be lost
        without a word if another began.
    """

    def __init__(self, folder: Path, identity: RunIdentity, is_main: bool, resumed: bool):
        self.path = best_path(folder)
        self.identity = identity
        self.is_main = is_main
        self.acc1, self.epoch = -1.0, 0
        if resumed and self.path.exists():
            try:
                header = read_header(self.path)
                self.acc1, self.epoch = header["acc1"], header["epoch"]
            except Exception as error:  # noqa: BLE001 (damaged bytes raise errors of any class)
                raise InputError(
                    f"{self.path} is damaged ({type(error).__name__}: {error}): bring it back, or "
                    f"move it away to keep the best of the epochs from here on"
                ) from error

    def offer(self, model: nn.Module, epoch: int, acc1: float) -> None:
        """Keeps `model` if it is better than all before it; of equals the first stays. Raises:
        LocalInputError."""
        if acc1 <= self.acc1:
            return
        self.acc1, self.epoch = acc1, epoch
        if self.is_main:
            save_weights(self.path, model, self.identity, acc1=acc1, epoch=epoch)
