"""Bytes of a pretraining step: a count, the same on every machine."""

from collections.abc import Iterator
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from tools.benchmarks.models import SHAPES, Shape, build, build_peer, loss_fn_of

PEER = "peer fp32"


class LiveBytes(TorchDispatchMode):
    """The largest number of bytes in tensors made inside and alive at once; kernels' workspaces are
    not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.known = WeakIdKeyDictionary()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors_in(
            args
        ):  # what comes from outside is not counted, changed in place or viewed
            self.known.setdefault(tensor.untyped_storage(), 0)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors_in(result):
            if tensor.untyped_storage() not in self.known:
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: Any) -> None:
        """Counts a storage until it is freed."""
        size = storage.nbytes()
        self.known[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        finalize(storage, self.remove, size)

    def remove(self, size: int) -> None:
        """Forgets a freed storage."""
        self.live -= size


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in an operation's arguments or result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors_in(item)


def activation_bytes(model: nn.Module, shape: Shape, dtype: torch.dtype | None) -> int:
    """Peak over forward and backward of the bytes beside parameters, gradients and the optimiser's
    state."""
    loss_of = loss_fn_of(model, shape, dtype)
    # the gradients are there from now on, so that what is made below is activations
    loss_of().backward()
    with LiveBytes() as live:
        loss_of().backward()
    return live.peak


def benchmark_memory(name: str) -> dict[str, Any]:
    """MiB of a step of SHAPES, ours beside the peer's in fp32 where it is installed."""
    shape = SHAPES[name]
    checkpointing = build(shape)
    checkpointing.checkpointing = True
    variants: dict[str, tuple[nn.Module | None, torch.dtype | None]] = {
        "ours bf16": (build(shape), torch.bfloat16),
        "ours bf16 checkpointing": (checkpointing, torch.bfloat16),
        PEER: (build_peer(shape, "sdpa"), None),
    }
    peaks = {
        variant: activation_bytes(model, shape, dtype)
        for variant, (model, dtype) in variants.items()
        if model
    }
    persistent = 16 * sum(
        p.numel() for p in checkpointing.parameters()
    )  # fp32 parameters, gradients, two moments
    found: dict[str, Any] = {
        "activations_mib": {variant: peak / 2**20 for variant, peak in peaks.items()},
        "total_mib": {variant: (peak + persistent) / 2**20 for variant, peak in peaks.items()},
    }
    if PEER in peaks:
        found["activations_over_peer"] = {
            v: peak / peaks[PEER] for v, peak in peaks.items() if v != PEER
        }
    return found
