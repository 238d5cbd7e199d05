"""When a run's state is saved: at intervals, in the background while the training goes on, and when
a signal comes."""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from engine.run.checkpoint import Checkpoint, save_checkpoint
from engine.run.interrupts import Stopped, StopVote, failure, noted, received
from engine.run.job import Job
from engine.run.state import check_finite, on_host
from util.dist import all_gather, broadcast
from util.errors import InputError, LocalInputError
from util.watchdog import alive, watched

logger = logging.getLogger(__name__)


class Saver:
    """Saves a job's state. It is a context around the training and its evaluations.

    At most one save is under way, and none at the context's end. All processes call, the main one
    writes. An error in the background is raised by the next call. Within the context a signal stops
    the run, see `engine/run/interrupts.py`, and a process that hangs ends after `timeout`, see
    `util/watchdog.py`.
    """

    def __init__(self, job: Job):
        self.job = job
        self.last_time = time.monotonic()
        self.last_step = job.state.step  # a run that goes on has this checkpoint already
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="save")
        self.pending: Future[Path] | None = None
        self.vote = StopVote()
        self.surroundings = ExitStack()

    def __enter__(self) -> "Saver":
        self.surroundings.enter_context(watched(self.job.cfg.timeout))
        self.surroundings.enter_context(noted())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        with self.surroundings, self.executor:
            if error is not None and not isinstance(error, Stopped):
                try:
                    self.wait()
                except InputError as problem:
                    logger.error("%s", problem)  # what ends the run is another error
                return
            self.vote.answer()
            if error is not None:
                self.save()
            self.wait()
            # All processes end together: when the first one ends, a launcher terminates the others,
            # even in the middle of a save.
            signum = max(all_gather(received()))
            if error is None and not signum:
                return
            stopped = error or Stopped(signum)
            step = self.job.state.step
            again = f"goes on after step {step}" if step else "begins anew"
            logger.warning("stopped by %s; the same command %s", stopped.name, again)
            if (cause := failure()) is not None:
                raise cause
            if error is None:
                raise stopped

    def due(self, epochs_done: int | None) -> bool:
        """Whether a save is due, after `epochs_done` epochs or (None) within one; all processes
        must ask together."""
        cfg, state, plan = self.job.cfg, self.job.state, self.job.plan
        if epochs_done is not None and (
            state.step == plan.stop_step
            or any(
                every and epochs_done % every == 0 for every in (cfg.save_epochs, cfg.keep_every)
            )
        ):
            return True
        minutes = (time.monotonic() - self.last_time) / 60
        return bool(broadcast(cfg.save_minutes > 0 and minutes >= cfg.save_minutes))

    def save(self) -> None:
        """Begins to write a checkpoint of this step unless there is one; the state may change as
        soon as it returns.

        Raises: InputError if the state is not finite, so that it never replaces a good one.
        """
        run, cfg, state, plan = self.job.run, self.job.cfg, self.job.state, self.job.plan
        if state.step == self.last_step:
            return
        self.wait()
        state.epoch_meter.average()
        state.window_meter.average()
        checkpoint = state.checkpoint(self.job.identity, plan.total_batch)
        if not state.may_diverge:
            check_finite(checkpoint)
        content = on_host(vars(checkpoint), run.processes.is_main)
        if run.processes.is_main:
            self.pending = self.executor.submit(
                save_checkpoint,
                run.output_dir,
                Checkpoint(**content),
                cfg.keep_last,
                cfg.keep_every * plan.steps_per_epoch,
            )
        self.last_time, self.last_step = time.monotonic(), state.step

    def between_steps(self) -> None:
        """Raises: LocalInputError if a save has failed; Stopped after a signal."""
        alive()
        if self.pending is not None and self.pending.done():
            self.wait()
        self.vote.ask()

    def wait(self) -> None:
        """Waits for the save that is under way. Raises: LocalInputError if it has failed."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        try:
            logger.info("saved %s", pending.result())
        except (OSError, RuntimeError) as error:  # torch.save turns some OSErrors into the latter
            hint = "" if isinstance(error, OSError) else "; is the disk full?"
            raise LocalInputError(
                f"the checkpoint of step {self.last_step} cannot be saved in "
                f"{self.job.run.output_dir}: {error}{hint}; the ones before it are as they were"
            ) from error
