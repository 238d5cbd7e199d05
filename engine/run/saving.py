"""When a run's state is saved: now and then, in the background while the training goes on, and when
a signal comes."""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from engine.parallel import whole
from engine.run.checkpoint import save_checkpoint
from engine.run.folder import Run
from engine.run.interrupts import Stopped, StopVote, noted, received
from engine.run.state import TrainState
from engine.schedule import Plan
from util.dist import all_gather, broadcast
from util.errors import InputError, LocalInputError
from util.settings.base import TrainRunConfig
from util.watchdog import alive, watched

logger = logging.getLogger(__name__)


class Saver:
    """Saves a run's state. It is a context that spans the training.

    At most one save is under way, and none at the context's end. All processes call, the main one
    writes. What went wrong in the background is raised by the next call. Within the context a
    signal stops the run, see `engine/run/interrupts.py`, and what hangs ends after `cfg.timeout`,
    see `util/watchdog.py`.

    Args:
        state: what is saved, of the run that `plan` describes.
        facts: the checkpoint's constant entries, of `run_facts`.
    """

    def __init__(
        self, run: Run, cfg: TrainRunConfig, facts: dict[str, Any], state: TrainState, plan: Plan
    ):
        self.run = run
        self.cfg = cfg
        self.facts = facts
        self.state = state
        self.plan = plan
        self.last_time = time.monotonic()
        self.last_step = state.step  # a run that goes on has this one, and a new one needs none
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="save")
        self.pending: Future[Path] | None = None
        self.vote = StopVote()
        self.surroundings = ExitStack()

    def __enter__(self) -> "Saver":
        self.surroundings.enter_context(watched(self.cfg.timeout))
        self.surroundings.enter_context(noted())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        with self.surroundings, self.executor:
            if error is not None and not isinstance(error, Stopped):
                try:
                    self.wait()
                except InputError as failure:
                    logger.error("%s", failure)  # what ends the run is another error
                return
            self.vote.answer()
            if error is not None:
                self.save()
            self.wait()
            # all end together: a launcher terminates those that are left when the first one ends,
            # also in a save
            signum = max(all_gather(received()))
            if error is None and not signum:
                return
            stopped = error or Stopped(signum)
            again = f"goes on after step {self.state.step}" if self.state.step else "begins anew"
            logger.warning("stopped by %s; the same command %s", stopped.name, again)
            if error is None:
                raise stopped

    def due(self, epochs_done: int | None) -> bool:
        """Whether a save is due, after `epochs_done` epochs or (None) within one; processes must
        ask together."""
        if epochs_done is not None:
            if self.state.step == self.plan.stop_step:
                return True
            if any(
                every and epochs_done % every == 0
                for every in (self.cfg.save_epochs, self.cfg.keep_every)
            ):
                return True
        minutes = (time.monotonic() - self.last_time) / 60
        return bool(broadcast(self.cfg.save_minutes > 0 and minutes >= self.cfg.save_minutes))

    def save(self) -> None:
        """Begins to write a checkpoint of this step unless there is one; the state may change as
        soon as it returns.

        Raises: InputError where the state is broken, so that it never replaces a good one.
        """
        state = self.state
        if state.step == self.last_step:
            return
        self.wait()
        state.check()
        state.epoch_meter.average()
        state.window_meter.average()
        content = on_host(state.content(), self.run.processes.is_main)
        if self.run.processes.is_main:
            more = {
                "total_batch": self.plan.total_batch,
                "samples_seen": state.step * self.plan.total_batch,
            }
            self.pending = self.executor.submit(
                save_checkpoint,
                self.run.output_dir,
                state.step,
                {**content, **self.facts, **more},
                self.cfg.keep_last,
                self.cfg.keep_every * self.plan.steps_per_epoch,
            )
        self.last_time, self.last_step = time.monotonic(), state.step

    def check(self) -> None:
        """For the moment between two steps. Raises: LocalInputError where a save has failed;
        Stopped after a signal."""
        alive()
        if self.pending is not None and self.pending.done():
            self.wait()
        self.vote.ask()

    def wait(self) -> None:
        """Waits for the save that is under way. Raises: LocalInputError where it has failed."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        try:
            logger.info("saved %s", pending.result())
        except (
            OSError,
            RuntimeError,
        ) as error:  # torch.save turns some of the system's errors into the latter
            hint = "" if isinstance(error, OSError) else "; is the disk full?"
            raise LocalInputError(
                f"the checkpoint of step {self.last_step} cannot be saved in {self.run.output_dir}: {error}{hint}; "
                f"the ones before it are as they were"
            ) from error


def on_host(value: Any, keep: bool = True) -> Any:
    """A copy of nested plain values and tensors, with all tensors in one piece in the host's
    memory.

    All processes must call where some are sharded; those without `keep` only help, and get None in
    place of tensors.
    """
    if isinstance(value, torch.Tensor):
        tensor = whole(value.detach())
        return tensor.to("cpu", copy=True) if keep else None
    if isinstance(value, dict):
        return {name: on_host(entry, keep) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_host(entry, keep) for entry in value)
    return value
