"""Bytes of a pretraining step: a count, the same on every machine."""

from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from models.build import build_model
from tools.benchmarks.models import Shape, build_peer, loss_fn_of
from tools.benchmarks.timing import Figures

PEER = "peer fp32"


class LiveBytes(TorchDispatchMode):
    """The largest number of bytes in tensors made inside and alive at once; kernels' workspaces are
    not seen, and tensors from outside do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.known = WeakIdKeyDictionary()
        self.live = self.peak = 0

    # Any: torch's signature
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages_in(args):
            self.known.setdefault(storage, None)
        result = func(*args, **(kwargs or {}))
        for storage in _storages_in(result):
            if storage not in self.known:
                self.known[storage] = None
                self.grow(storage.nbytes())
                finalize(storage, self.grow, -storage.nbytes())
        return result

    def grow(self, size: int) -> None:
        """Counts a new storage's bytes, or with a minus a freed one's."""
        self.live += size
        self.peak = max(self.peak, self.live)


def _storages_in(values: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def activation_bytes(model: nn.Module, shape: Shape, dtype: torch.dtype | None) -> int:
    """Peak over forward and backward of the bytes beside parameters, gradients and the optimiser's
    state."""
    loss_of = loss_fn_of(model, shape, dtype)
    loss_of().backward()  # makes the gradients, so that what is made below is activations
    with LiveBytes() as live:
        loss_of().backward()
    return live.peak


def benchmark_memory(shape: Shape) -> Figures:
    """MiB of a step's activations, ours beside the peer's in fp32 if it is installed."""
    checkpointing = build_model(shape.spec)
    checkpointing.checkpointing = True
    models = {
        "ours bf16": build_model(shape.spec),
        "ours bf16 checkpointing": checkpointing,
        PEER: build_peer(shape.spec, "sdpa"),
    }
    peaks = {
        name: activation_bytes(model, shape, None if name == PEER else torch.bfloat16) / 2**20
        for name, model in models.items()
        if model is not None
    }
    if PEER not in peaks:
        return {"activations_mib": peaks}
    over_peer = {name: peak / peaks[PEER] for name, peak in peaks.items() if name != PEER}
    return {"activations_mib": peaks, "activations_over_peer": over_peer}
