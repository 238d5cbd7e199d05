"""The best evaluation of a run: its weights on disk, whose header says which epoch and accuracy
they have."""

from typing import Any

from torch import nn

from engine.run.checkpoint import best_path, save_weights, weights_header
from engine.run.folder import Run
from util.errors import InputError


class Best:
    """Keeps `best.safetensors`, and so finds it again after a restart; the file is written whole or
    not at all.

    Raises: InputError where a run goes on and its file is damaged: to begin anew without a word
    would lose the best.

    Args:
        facts: of `run_facts`, for the header.
        resumed: whether the run goes on; a file that an unfinished run left before its first
            checkpoint is removed.
    """

    def __init__(self, run: Run, facts: dict[str, Any], resumed: bool):
        self.path = best_path(run.output_dir)
        self.facts = facts
        self.is_main = run.processes.is_main
        self.acc1, self.epoch = -1.0, 0
        if not resumed and self.is_main:
            self.path.unlink(missing_ok=True)
        elif resumed and self.path.exists():
            try:
                header = weights_header(self.path)
                self.acc1, self.epoch = header["acc1"], header["epoch"]
            except Exception as error:  # noqa: BLE001 (damaged bytes raise errors of any class)
                raise InputError(
                    f"{self.path} is damaged ({type(error).__name__}: {error}): bring it back, or move it away to keep "
                    f"the best of the epochs from here on"
                ) from error

    def offer(self, model: nn.Module, epoch: int, acc1: float) -> None:
        """Keeps `model` where it is better than all before it; of equals the first stays. Raises:
        LocalInputError."""
        if acc1 <= self.acc1:
            return
        self.acc1, self.epoch = acc1, epoch
        if self.is_main:
            save_weights(self.path, model, self.facts, acc1=acc1, epoch=epoch)
