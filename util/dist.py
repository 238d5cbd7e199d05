"""Processes and devices: one process or many under torchrun, on CUDA, MPS or CPU, by the same
code."""

import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from util.errors import InputError, LocalInputError
from util.watchdog import watched

# torch's own limit counts by the clock, also while the job is suspended; `watched` does not
UNLIMITED = timedelta(days=365)
_timeout = [30.0]  # minutes that a message may take, of `init_processes`
GATHER_BYTES = 2**26  # received at a time in `gather_rows`
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
        limit = timedelta(minutes=timeout)
        with watched(timeout):  # gloo waits for a peer that never comes as long as it likes
            store = _store_of_one_machine(world_size, limit)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world_size, timeout=UNLIMITED
            )
        _timeout[:] = [timeout]
    try:
        yield Processes(rank, world_size, local_rank, local_world_size, chosen)
    except RuntimeError as error:
        if "gloo/transport" not in str(error) or "Timed out" in str(error):
            raise  # the stack of what hangs is of use
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
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    stated = {name: os.environ[name] for name in names if name in os.environ}
    if not stated.keys() & names[:4]:
        return 0, 1, 0, 1
    try:
        rank, world_size, local_rank = (int(stated[name]) for name in names[:3])
        local_world_size = int(stated.get("LOCAL_WORLD_SIZE", world_size))
        has_address = world_size == 1 or {"MASTER_ADDR", "MASTER_PORT"} <= stated.keys()
        is_rank = 0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size
    except (KeyError, ValueError):
        has_address = is_rank = False
    if not (has_address and is_rank):
        shown = " ".join(f"{name}={value!r}" for name, value in stated.items())
        raise LocalInputError(
            f"the environment has {shown}, which is no process of a job: unset them, or start with "
            f"run_*.sh or torchrun, which set {', '.join(names)}"
        )
    return rank, world_size, local_rank, local_world_size


def _store_of_one_machine(world_size: int, timeout: timedelta) -> dist.Store | None:
    """What torchrun's processes on one machine find each other by; None, on several, is torch's
    choice.

    It is a file in the launcher's folder for this start, and the processes speak by the loopback
    interface: torch's own store listens on all interfaces, and after a restart it still has the
    addresses of processes that ended (2.14.1).
    """
    folder = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parent.parent
    if os.environ.get("GROUP_WORLD_SIZE") != "1" or not folder.name.startswith("attempt_"):
        return None
    loopback = {"lo", "lo0"} & {name for _, name in socket.if_nameindex()}
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback.pop())
    store = dist.FileStore(str(folder / "store"), world_size)
    store.set_timeout(timeout)
    return store


def choose_device(device: str, local_rank: int) -> torch.device:
    """The device of a `device:` setting. Raises: InputError."""
    if device == "auto":
        device = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    if device == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if local_rank >= count:
            # once, by the first process that has none
            raise (LocalInputError if local_rank == count else InputError)(
                f"device cuda was asked for and this machine has {count} CUDA devices "
                f"for process {local_rank}: use --device cpu, or fewer processes"
            )
        return torch.device("cuda", local_rank)
    if device == "mps" and not torch.backends.mps.is_available():
        raise InputError("device mps was asked for and this machine has none: use --device cpu")
    return torch.device(device)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What to autocast to for a `precision:` setting; None is plain fp32."""
    if precision == "auto":
        if device.type == "cuda":
            precision = (
                "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
            )
        elif device.type == "cpu":
            capabilities = torch.cpu.get_capabilities()
            fast = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
            precision = "bf16" if fast else "fp32"
        else:
            precision = "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]


@contextmanager
def waiting() -> Iterator[None]:
    """Ends this process if its block waits for the others longer than `timeout` minutes."""
    with watched(_timeout[0]) if _timeout else nullcontext():
        yield


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
    if not dist.is_initialized():
        return message
    messages = [message]
    with waiting():
        dist.broadcast_object_list(messages, src=0)
    return messages[0]


@contextmanager
def first_process_first(processes: Processes) -> Iterator[None]:
    """Runs its body on the first process of each machine, then on the others: a download happens
    once."""
    if dist.is_initialized() and processes.local_rank > 0:
        with waiting():
            dist.barrier()
    try:
        yield
    finally:
        if dist.is_initialized() and processes.local_rank == 0:
            with waiting():
                dist.barrier()


def gather_rows(rows: Tensor, total: int, everywhere: bool = True) -> Tensor:
    """All `total` rows, where process r of w holds the rows r, r + w, ...; on the CPU.

    All processes must call. With `everywhere` False only the first one gets them, and the others
    none.
    """
    if not dist.is_initialized():
        return rows.cpu()
    world_size, is_main = dist.get_world_size(), dist.get_rank() == 0
    whole = torch.empty(total if everywhere or is_main else 0, *rows.shape[1:], dtype=rows.dtype)
    longest = -(-total // world_size)
    at_once = max(1, GATHER_BYTES // (world_size * rows.element_size() * math.prod(rows.shape[1:])))
    for start in range(0, longest, at_once):  # in parts, so that the rows are not held twice
        padded = torch.zeros(min(at_once, longest - start), *rows.shape[1:], dtype=rows.dtype)
        part = rows[start : start + at_once]
        padded[: len(part)] = part.cpu()
        shares = [torch.empty_like(padded) for _ in range(world_size)]
        with waiting():
            if everywhere:
                dist.all_gather(shares, padded)
            else:
                dist.gather(padded, shares if is_main else None)
        target = whole[start * world_size : (start + at_once) * world_size]
        target.copy_(torch.stack(shares, dim=1).flatten(0, 1)[: len(target)])
    return whole
