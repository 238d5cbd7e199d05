"""Bytes of a pretraining step: a count, the same on every machine."""

from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from tools.benchmarks.models import SHAPES, Shape, build, build_peer, loss_fn_of

PEER = "peer fp32"


class LiveBytes(TorchDispatchMode):
    """The largest number of bytes in tensors made inside and alive at once; kernels' workspaces are
    not seen, and tensors from outside do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.known = WeakIdKeyDictionary()
        self.live = self.peak = 0

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


def _storages_in(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def activation_bytes(model: nn.Module, shape: Shape, dtype: torch.dtype | None) -> int:
    """Peak over forward and backward of the bytes beside parameters, gradients and the optimiser's
    state."""
    loss_of = loss_fn_of(model, shape, dtype)
    loss_of().backward()  # makes the gradients, so that what is made below is activations
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
        variant: activation_bytes(model, shape, dtype) / 2**20
        for variant, (model, dtype) in variants.items()
        if model
    }
    # fp32 parameters and gradients, and AdamW's two moments
    persistent = 16 * sum(p.numel() for p in checkpointing.parameters()) / 2**20
    total = {variant: peak + persistent for variant, peak in peaks.items()}
    found: dict[str, Any] = {"activations_mib": peaks, "total_mib": total}
    if PEER in peaks:
        found["activations_over_peer"] = {
            variant: peak / peaks[PEER] for variant, peak in peaks.items() if variant != PEER
        }
    return found
