"""Processes and devices: one process or many under torchrun, on CUDA, MPS or CPU, by the same
code."""

import atexit
import io
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import distributed as dist

from util.errors import InputError, LocalInputError
from util.watchdog import watched

# torch's own limit counts by the clock, also while the job is suspended; `watched` does not
UNLIMITED = timedelta(days=365)
EXIT_S = 0.3  # for which a process of several waits at its very end
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_timeout = [30.0]  # minutes that a message may take, of `init_processes`
Message = TypeVar("Message")


@dataclass(frozen=True)
class Processes:
    """This process among those of the job, and its device.

    rank and world_size count all machines, local_rank and local_world_size this one.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def init_processes(device: str, timeout: float = 30.0) -> Iterator[Processes]:
    """Joins torchrun's processes, or is a single one where no launcher is, and leaves them at the
    end.

    Waiting for another process fails after `timeout` minutes, and at once where that has ended.

    Raises: InputError where the device asked for is absent; LocalInputError where the launcher's
    variables do not fit together, and where another process has ended.
    """
    rank, world_size, local_rank, local_world_size = _launched_as()
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size > 1:
        # Tensors on the GPU go through NCCL; small messages between the processes stay on the CPU.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        with watched(timeout):  # gloo waits for a peer that never comes as long as it likes
            dist.init_process_group(
                backend,
                store=_store_of_one_machine(world_size),
                rank=rank,
                world_size=world_size,
                timeout=UNLIMITED,
            )
        _timeout[:] = [timeout]
        # A gloo thread that still has a collective's tensors to release when Python shuts down
        # aborts the process, as some short runs did (torch 2.14.1, pytorch issue 190489).
        atexit.register(time.sleep, EXIT_S)
    try:
        yield Processes(rank, world_size, local_rank, local_world_size, chosen)
    except RuntimeError as error:
        if "gloo/transport" not in str(error):
            raise
        raise LocalInputError(
            f"process {rank} has lost the connection to another one, see that one's message or the "
            f"launcher's: {error}"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _launched_as() -> tuple[int, int, int, int]:
    """rank, world_size, local_rank and local_world_size as torchrun's variables state them, or of
    a single process if there are none."""
    stated = {name: os.environ[name] for name in NAMES if name in os.environ}
    if not stated.keys() & NAMES[:4]:
        return 0, 1, 0, 1
    with suppress(KeyError, ValueError):
        rank, world_size, local_rank = (int(stated[name]) for name in NAMES[:3])
        local_world_size = int(stated.get("LOCAL_WORLD_SIZE", world_size))
        has_address = world_size == 1 or stated.keys() >= {*NAMES[4:]}
        if (
            has_address
            and 0 <= rank < world_size
            and 0 <= local_rank < local_world_size <= world_size
        ):
            return rank, world_size, local_rank, local_world_size
    shown = " ".join(f"{name}={value!r}" for name, value in stated.items())
    raise LocalInputError(
        f"the environment has {shown}, which is no process of a job: unset them, or start with "
        f"run_*.sh or torchrun, which set {', '.join(NAMES)}"
    )


def _store_of_one_machine(world_size: int) -> dist.Store | None:
    """What torchrun's processes on one machine find each other by; None, on several, is torch's
    choice.

    It is a file in the launcher's folder for this start, and the processes speak by the loopback
    interface: torch's own store listens on all interfaces, and after a restart it still has the
    addresses of processes that ended (2.14.1).
    """
    folder = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parent.parent
    if os.environ.get("GROUP_WORLD_SIZE") != "1" or not folder.name.startswith("attempt_"):
        return None
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    store = dist.FileStore(str(folder / "store"), world_size)
    store.set_timeout(UNLIMITED)
    return store


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(device: str, local_rank: int) -> torch.device:
    """The device of a `device:` setting. Raises: InputError."""
    # how many processes find room, in the order of preference
    rooms = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": sys.maxsize if torch.backends.mps.is_available() else 0,
        "cpu": sys.maxsize,
    }
    if device == "auto":
        device = next(name for name, room in rooms.items() if room)
    if local_rank >= rooms[device]:
        # once, by the first process that has none
        raise (LocalInputError if local_rank == rooms[device] else InputError)(
            f"device {device} was asked for and this machine has {rooms[device]} of them, "
            f"none for process {local_rank}: use --device cpu, or fewer processes"
        )
    return torch.device(device, local_rank) if device == "cuda" else torch.device(device)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What to autocast to for a `precision:` setting; None is plain fp32."""
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif precision == "auto" and device.type == "cpu":
        # torch 2.9 has no public way to tell what a CPU can do
        able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        # An Intel CPU whose matrix unit a virtual machine hides: a product of its vector unit took
        # 1.7 times as long in bf16 as in fp32. Only Intel's with bf16 have avx512_fp16.
        is_slow = able.get("avx512_fp16") and not able.get("amx_bf16")
        has_bf16 = any(map(able.get, ("avx512_bf16", "amx_bf16", "bf16")))
        precision = "bf16" if has_bf16 and not is_slow else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def waiting() -> AbstractContextManager[None]:
    """Ends this process if its block waits for the others longer than `timeout` minutes."""
    return watched(_timeout[0])


def all_gather(message: Message) -> list[Message]:
    """Every process's message (plain values), in the order of the ranks."""
    if not dist.is_initialized():
        return [message]
    messages = [message] * dist.get_world_size()
    with waiting():
        dist.all_gather_object(messages, message)
    return messages


def broadcast(message: Message) -> Message:
    """Rank 0's message (plain values), on every process."""
    return all_gather(message)[0]


class _WithoutValues(pickle.Pickler):
    """Pickles a tensor as an empty one of its shape and dtype, on the meta device."""

    def reducer_override(self, value: object) -> Any:
        if type(value) is not torch.Tensor:
            return NotImplemented
        return partial(torch.empty, value.shape, dtype=value.dtype, device="meta"), ()


def from_main(compute: Callable[[], Message]) -> Message:
    """What `compute` returns on rank 0, which alone calls it, on every process.

    Elsewhere the tensors in it, also those of a model, have no values and lie on the meta device.

    Raises: on every process the InputError that rank 0 met.
    """
    if not dist.is_initialized():
        return compute()
    found, content = None, io.BytesIO()
    if dist.get_rank() == 0:
        try:
            found = compute()
        except InputError as error:
            found = error  # type: ignore[assignment]
        _WithoutValues(content).dump(found)
    sent = broadcast(content.getvalue())
    if dist.get_rank() > 0:
        found = pickle.loads(sent)  # noqa: S301 (from rank 0 of this job)
    if isinstance(found, InputError):
        raise found
    return cast(Message, found)


@contextmanager
def first_process_first(processes: Processes) -> Iterator[None]:
    """Runs its body on the first process of each machine, then on the others: a download happens
    once."""
    if processes.local_rank > 0:
        all_gather(None)
    try:
        yield
    finally:
        if processes.local_rank == 0:
            all_gather(None)


def gather_rows(rows: torch.Tensor, total: int, everywhere: bool = True) -> torch.Tensor:
    """All `total` rows, where process r of w holds the rows r, r + w, ...; on the CPU.

    All processes must call. With `everywhere` False only the first one gets them, and the others
    none.
    """
    if not dist.is_initialized():
        return rows.cpu()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    is_wanted = everywhere or rank == 0
    whole = torch.empty(total if is_wanted else 0, *rows.shape[1:], dtype=rows.dtype)
    for source in range(world_size):  # one after the other, so that rows are not held twice
        share = (
            rows.cpu().contiguous()
            if source == rank
            else torch.empty(-(-(total - source) // world_size), *rows.shape[1:], dtype=rows.dtype)
        )
        with waiting():
            dist.broadcast(share, source)
        if is_wanted:
            whole[source::world_size] = share
    return whole
