"""How loader processes hand their batches over: in shared memory, whose file descriptors torch
sends through a Unix socket.

torch does that in a thread whose errors it only prints, while the training waits for the batch.
Here the room is checked before the training, and what fails later is an error of the loader
process, which reaches the training at once.
"""

import os
import shutil
import tempfile
from multiprocessing.connection import Listener
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, TypeVar, cast

from torch.utils.data import DataLoader, get_worker_info

from util.dist import Processes, all_gather
from util.errors import InputError

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (where Linux keeps it)
BatchT = TypeVar("BatchT")


class Parcel:
    """A batch that is ready to be sent, and is a batch again where it is received."""

    def __init__(self, batch: object):
        # The thread that sends the descriptors needs one itself, which this one keeps free.
        with Path(os.devnull).open():
            self.content = bytes(ForkingPickler.dumps(batch))

    def __reduce__(self) -> tuple[object, tuple[bytes]]:
        return ForkingPickler.loads, (self.content,)


def ready_to_send(batch: BatchT) -> BatchT:
    """The batch itself, or its `Parcel` in a loader process. Raises there: OSError or RuntimeError
    if it cannot be handed over."""
    return batch if get_worker_info() is None else cast(BatchT, Parcel(batch))


def check_handover(
    loader: DataLoader[Any], batch_size: int, image_bytes: int, processes: Processes
) -> None:
    """Checks that this machine has a socket, and room for the batches that loader processes hold
    ready. All processes must call, before any of them takes a batch.

    Raises: InputError.
    """
    found = ""
    if loader.num_workers and processes.local_rank == 0:  # for all processes of its machine
        found = _problem(loader, batch_size, image_bytes, processes.local_world_size)
    if problem := next(filter(None, all_gather(found)), ""):
        raise InputError(problem, settings=("num_workers",))


def _problem(
    loader: DataLoader[Any], batch_size: int, image_bytes: int, local_world_size: int
) -> str:
    try:
        Listener(family="AF_UNIX").close()
    except OSError as error:
        return (
            f"loader processes find no socket in {tempfile.gettempdir()} ({error}): shorten "
            f"TMPDIR, or set num_workers 0"
        )
    held = local_world_size * loader.num_workers * (loader.prefetch_factor or 0)
    needed = held * batch_size * image_bytes
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else needed
    if needed <= free:
        return ""
    return (
        f"{SHARED_MEMORY} has {free / 2**20:,.1f} MiB free, and the batches that loader processes "
        f"hold ready need {needed / 2**20:,.1f} MiB ({local_world_size} processes x num_workers "
        f"{loader.num_workers} x prefetch_factor {loader.prefetch_factor} x batch_size "
        f"{batch_size} x {image_bytes:,} bytes): lower these, or enlarge {SHARED_MEMORY} "
        f"(docker run --shm-size)"
    )
