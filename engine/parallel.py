"""Fully sharded data parallelism: each process keeps one part of every parameter, gradient and
moment.

A block's parameters are gathered just before it computes and let go right after, forward and
backward; its gradient is averaged over the processes part by part. The mathematics is that of
DistributedDataParallel. Checkpoints and weights hold whole tensors under the same names, so any
number of processes can go on with them, sharded or not.

Source: ZeRO stage 3 (arXiv 1910.02054) in torch's FSDP2 (arXiv 2304.11277), whose sharded tensors
are `DTensor`s.
"""

import atexit
import logging
import time
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from engine.run.folder import Run
from models.build import build_model
from util.dist import autocast_dtype
from util.errors import InputError

# DTensor's caches keep gloo's threads to the very end, and one that still has a collective's
# tensors to let go of when Python shuts down aborts the process, as some short runs did (torch
# 2.14.1, pytorch issue 190489): a moment for it.
EXIT_S = 0.3
ModelT = TypeVar("ModelT", bound=nn.Module)
logger = logging.getLogger(__name__)


def asks_for_shards(cfg: Any, run: Run) -> bool:
    """Whether `parallel` shards the model; one process has nobody to share it with.

    Raises: InputError for fp16, as torch's scaler looks for overflows in this process's parts only.
    """
    if cfg.parallel == "ddp" or run.processes.world_size == 1:
        return False
    if autocast_dtype(cfg.precision, run.device) == torch.float16:
        raise InputError(
            "parallel fsdp goes with precision bf16 or fp32, not fp16: use another, or parallel ddp"
        )
    return True


def to_device(model: nn.Module, cfg: Any, run: Run) -> None:
    """Moves a model onto its device, in parts where `parallel` asks for it; before an optimiser
    takes its parameters.

    Every process must hold the same whole model, on the CPU: it goes over and is cut block by
    block.
    """
    if not asks_for_shards(cfg, run):
        model.to(run.device)
        return
    mesh = init_device_mesh(run.device.type, (run.processes.world_size,))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # what is in no block
    atexit.register(time.sleep, EXIT_S)
    own = sum(own_part(parameter).numel() for parameter in model.parameters())
    logger.info(
        "fsdp: each process holds about %.2f M parameters, their gradients and moments", own / 1e6
    )


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Encoder and decoder blocks: each is gathered, and compiled, as one."""
    return [block for name in ("blocks", "decoder_blocks") for block in getattr(model, name, [])]


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's parameters are in parts."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; all processes must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_model(model: ModelT, device: torch.device, keep: bool = True) -> ModelT:
    """The model itself, or where it is sharded a frozen copy of it in one piece; all processes must
    call.

    Args:
        device: of the copy.
        keep: False only helps the others: what it returns is not to be used.
    """
    if not is_sharded(model):
        return model
    with torch.device("meta"):
        copy: Any = build_model(model.spec)  # type: ignore[call-overload]
    tensors = {}
    for name, shard in model.state_dict().items():
        tensor = whole(shard)
        if keep:
            tensors[name] = tensor.to(device)
    if keep:
        copy.load_state_dict(tensors, strict=True, assign=True)
    return copy.requires_grad_(False)


def shard_model_state(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The whole tensors of a model's state, as `load_state_dict` of a model that may be sharded
    takes them."""
    targets = model.state_dict()
    return {
        name: _like(tensor, targets[name]) if name in targets else tensor
        for name, tensor in state.items()
    }


def shard_optimizer_state(
    state: dict[str, Any], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The same for an optimiser's state, whose moments have the shapes of the parameters that they
    belong to."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {
        index: {name: _like(value, parameters[index]) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


def _like(tensor: Tensor, target: Tensor) -> Tensor:
    """This process's part of a whole tensor, where `target` is sharded and of its shape."""
    if not isinstance(target, DTensor) or tensor.shape != target.shape:
        return tensor
    tensor = tensor.to(target.device)  # each process has read the whole file: nothing is sent
    return distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)
