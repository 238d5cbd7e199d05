"""Bytes that a computation holds at once: on CUDA those that its allocator gave, elsewhere a count
of its tensors, the same on every machine."""

from collections.abc import Callable
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The largest number of bytes that `run` holds at once beyond those that were there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        run()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """The largest number of bytes in tensors made inside and alive at once; kernels' workspaces are
    not seen, and tensors from outside do not count."""

    live = peak = 0  # bytes

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
