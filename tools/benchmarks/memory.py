"""Bytes of a pretraining step: a count, the same on every machine."""

from collections.abc import Callable
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.build import build_model
from tools.benchmarks.step import Shape, build_peers, loss_fn_of
from tools.benchmarks.timing import Figures

PEER = "peer fp32"


class LiveBytes(TorchDispatchMode):
    """The largest number of bytes in tensors made inside and alive at once; kernels' workspaces are
    not seen, and tensors from outside do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        given, found = _storages_in((args, kwargs)), _storages_in(result)
        for place in found.keys() - given.keys():  # what is given was counted, or is from outside
            size = found[place].nbytes()
            self.grow(size)
            finalize(found[place], self.grow, -size)
        return result

    def grow(self, size: int) -> None:
        """Counts a new storage's bytes, or with a minus a freed one's."""
        self.live += size
        self.peak = max(self.peak, self.live)


def _storages_in(values: object) -> dict[int, torch.UntypedStorage]:
    """The storages of the tensors in nested values, by their address."""
    storages = [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return {storage.data_ptr(): storage for storage in storages}


def benchmark_memory(shape: Shape) -> Figures:
    """MiB of a step's activations, ours beside the peer's in fp32 if it is installed: the peak over
    forward and backward of all but parameters, gradients and the optimiser's state."""
    checkpointing = build_model(shape.spec)
    checkpointing.checkpointing = True
    models = {"ours bf16": build_model(shape.spec), "ours bf16 checkpointing": checkpointing}
    peaks = {}
    for name, model in (models | build_peers(shape.spec, {PEER: "sdpa"})).items():
        loss_of = loss_fn_of(model, shape, None if name == PEER else torch.bfloat16)
        loss_of().backward()  # makes the gradients, so that what is made below is activations
        with LiveBytes() as live:
            loss_of().backward()
        peaks[name] = live.peak / 2**20
    if PEER not in peaks:
        return {"activations_mib": peaks}
    over_peer = {name: peaks[name] / peaks[PEER] for name in models}
    return {"activations_mib": peaks, "activations_over_peer": over_peer}
