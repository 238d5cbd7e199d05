"""Batches on the device, copied while it still computes on the ones before."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def on_device(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """The batches, named tuples, in their order; on CUDA with their tensors on the device,
    elsewhere as they come.

    A batch is taken from `batches` when it is asked for and never before, so errors, bad files and
    the time waited for data belong to the step that they are counted in. What runs ahead is the
    host: it has queued a step and asks for the next batch while the device computes, and the copy,
    from pinned memory and on a stream of its own, does not queue behind that step. Not measured
    here.
    """
    if device.type != "cuda":
        yield from batches
        return
    copies = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(copies):
            tensors = {
                name: value.to(device, non_blocking=True)
                for name, value in batch._asdict().items()
                if isinstance(value, Tensor)
            }
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copies)
        for tensor in tensors.values():
            tensor.record_stream(
                computing
            )  # its memory is the copying stream's: not to be reused before that step
        yield batch._replace(**tensors)
