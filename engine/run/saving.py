"""When a run's state is saved: at intervals, in the background while the training goes on, and when
a signal comes."""

import logging
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from engine.parallel import full_tensor, own_part
from engine.run.checkpoint import Checkpoint, save_checkpoint
from engine.run.interrupts import LOADER_FAILED, Stopped, failures, noted, received
from engine.run.job import Job
from util.dist import all_gather, broadcast
from util.errors import InputError, LocalInputError
from util.watchdog import alive, watched

logger = logging.getLogger(__name__)


class Saver(ExitStack):
    """Saves a job's state. It is a context around the training and its evaluations.

    At most one save is under way, and none at the context's end. All processes call, the main one
    writes. An error in the background is raised by the next call. Within the context a signal stops
    the run, see `engine/run/interrupts.py`, and a process that hangs ends after `timeout`, see
    `util/watchdog.py`.
    """

    def __init__(self, job: Job):
        super().__init__()
        self.job = job
        self.last_time = time.monotonic()
        self.last_step = job.state.step  # a run that goes on has this checkpoint already
        self.pending: Future[Path] | None = None
        self.vote = torch.zeros(1, dtype=torch.int64)  # the number of a signal, or 0
        self.voting: dist.Work | None = None
        self.enter_context(watched(job.cfg.timeout))
        self.enter_context(noted())
        self.executor = self.enter_context(ThreadPoolExecutor(1, thread_name_prefix="save"))
        self.push(self._end)  # what is left in reverse order at the context's end

    def _end(self, _: object, error: BaseException | None, __: object) -> None:
        """Raises: Stopped if a signal ends the run, or what `stop_with` was called with."""
        if error is not None and not isinstance(error, Stopped):
            try:
                self.wait()
            except InputError as problem:
                logger.error("%s", problem)  # what ends the run is another error
            return
        self._answer()
        if error is not None:
            self.save()
        self.wait()
        # All processes end together: when the first one ends, a launcher terminates the others,
        # even in the middle of a save.
        if signum := max(all_gather(received())):
            step = self.job.state.step
            logger.warning(
                "stopped by %s; the same command %s",
                "a failed loader process"
                if signum == LOADER_FAILED
                else signal.Signals(signum).name,
                f"goes on after step {step}" if step else "begins anew",
            )
            raise failures[0] if failures else Stopped(signum)

    def due(self, epochs_done: int | None) -> bool:
        """Whether a save is due, after `epochs_done` epochs or (None) within one; all processes
        must ask together."""
        cfg, state, plan = self.job.cfg, self.job.state, self.job.plan
        at_epoch = epochs_done is not None and (
            state.step == plan.stop_step
            or any(epochs_done % every == 0 for every in (cfg.save_epochs, cfg.keep_every) if every)
        )
        minutes = (time.monotonic() - self.last_time) / 60
        return at_epoch or broadcast(0 < cfg.save_minutes <= minutes)

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
        finite: list[torch.Tensor] = []
        content = vars(state.checkpoint(self.job.identity, plan.total_batch))
        content = on_host(content, run.processes.is_main, finite)
        is_finite = bool(torch.stack(finite).all())
        # A process sees only its part of a sharded tensor.
        if not state.may_diverge and not all(all_gather(is_finite)):
            raise InputError(
                f"the state is not finite after step {state.step}, so it is not saved: lower lr, "
                f"set clip_grad, or use precision bf16 or fp32; the last checkpoint is from before"
            )
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
        """Asks all processes whether one of them got a signal; all must call at the same step.

        The answer comes with the next question, so that no process waits for the others in this
        step, and none ever for its device: the votes go between the CPUs.

        Raises: LocalInputError if a save has failed; Stopped on all processes, a step after the
        signal.
        """
        alive()
        if self.pending is not None and self.pending.done():
            self.wait()
        if signum := self._answer() if dist.is_initialized() else received():
            raise Stopped(signum)
        if dist.is_initialized():
            self.vote[0] = received()
            self.voting = dist.all_reduce(self.vote, dist.ReduceOp.MAX, async_op=True)

    def _answer(self) -> int:
        """The number of the signal that any process had when it was last asked, or 0; then no
        question is open."""
        if self.voting is not None:
            self.voting.wait()
            self.voting = None
        return int(self.vote)

    def wait(self) -> None:
        """Waits for the save that is under way. Raises: LocalInputError if it has failed."""
        pending, self.pending = self.pending, None
        try:
            if pending is not None:
                logger.info("saved %s", pending.result())
        except (OSError, RuntimeError) as error:  # torch.save turns some OSErrors into the latter
            raise LocalInputError(
                f"the checkpoint of step {self.last_step} cannot be saved in "
                f"{self.job.run.output_dir}: {error}. Is the disk full? The ones before it are as "
                f"they were"
            ) from error


def on_host(value: Any, keep: bool, finite: list[torch.Tensor]) -> Any:
    """A copy of nested plain values and tensors, with unsharded tensors in the host's memory.

    All processes must call if some tensors are sharded. Those without `keep` only help, and get
    None in place of tensors. `finite` gets a scalar for each tensor: whether this process's part
    of it is finite.
    """
    if isinstance(value, torch.Tensor):
        finite.append(own_part(value).isfinite().all().cpu())
        tensor = full_tensor(value.detach())
        return tensor.to("cpu", copy=True) if keep else None
    if isinstance(value, dict):
        return {name: on_host(entry, keep, finite) for name, entry in value.items()}
    if isinstance(value, list):
        return [on_host(entry, keep, finite) for entry in value]
    return value
