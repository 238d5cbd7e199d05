"""Models and batches on devices: placing, compiling, data parallelism and sharding.

`parallel: ddp` gives each process the whole model. `parallel: fsdp` gives it one part of every
parameter, gradient and moment: a block's parameters are gathered just before it computes and freed
right after, forward and backward, and its gradient is averaged over the processes part by part. The
mathematics is that of DistributedDataParallel. Checkpoints and weights hold full tensors under the
same names, so any number of processes can go on with them, sharded or not.

Source: ZeRO stage 3 (arXiv 1910.02054) in torch's FSDP2 (arXiv 2304.11277), whose sharded tensors
are `DTensor`s.
"""

import os
import resource
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch import distributed as dist

from data.loader import Batch
from models.blocks import Encoder
from models.build import build_model
from models.vit import VisionTransformer
from util.dist import Processes, autocast_dtype, waiting
from util.errors import InputError
from util.settings.base import CheckpointingConfig, CompileConfig, ParallelConfig, RunConfig

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

ModelT = TypeVar("ModelT", bound=nn.Module)


def asks_for_shards(cfg: RunConfig, processes: Processes) -> bool:
    """Whether `parallel` shards the model; a single process keeps all of it.

    Raises: InputError for fp16, as torch's scaler looks for overflows in this process's part only.
    """
    if not isinstance(cfg, ParallelConfig) or cfg.parallel == "ddp" or processes.world_size == 1:
        return False
    if autocast_dtype(cfg.precision, processes.device) == torch.float16:
        raise InputError(
            "parallel fsdp goes with precision bf16 or fp32, not fp16: use another, or parallel ddp"
        )
    return True


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held since its start: tensors on a CUDA device, else all
    of the process's memory, without its loader processes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def check_speed(cfg: RunConfig, processes: Processes) -> None:
    """Raises: InputError if `parallel` or `compile` asks for what cannot be had here."""
    asks_for_shards(cfg, processes)
    if isinstance(cfg, CompileConfig) and cfg.compile and cfg.compile_backend == "inductor":
        compilers = (os.environ.get("CXX", "g++"), os.environ.get("CC", "gcc"), "clang++", "clang")
        if not any(map(shutil.which, compilers)):
            raise InputError("compile needs a C++ compiler: install g++, or leave compile out")


def place_model(
    model: nn.Module, state: dict[str, Tensor], cfg: RunConfig, processes: Processes
) -> None:
    """Does what `checkpointing`, `compile` and `parallel` ask for, in place, and moves the model
    onto its device with the values of `state`, before an optimiser takes its parameters. Its state
    keeps its names.

    Only the main process needs values, in `state`: elsewhere that and the model may be on the meta
    device.
    """
    shards = asks_for_shards(cfg, processes)
    if isinstance(model, Encoder):  # not the linear classifiers, which have few products
        if isinstance(cfg, CheckpointingConfig):
            model.checkpointing = cfg.checkpointing
        if isinstance(cfg, CompileConfig) and cfg.compile:
            for part in blocks_of(model) if shards else [model]:  # no graph can span a gathering
                part.compile(**compile_options(cfg))
    if shards:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard  # here, as importing it takes long

        model.to("meta")  # no process cuts its part out of a copy of its own
        mesh = init_device_mesh(processes.device.type, (processes.world_size,))
        for part in [*blocks_of(model), model]:  # at last what is in no block
            fully_shard(part, mesh=mesh)
    spread_model(model, processes.device, state)


def spread_model(
    model: ModelT, device: torch.device, state: dict[str, Tensor] | None = None
) -> ModelT:
    """Moves a model onto its device on every process, with the main one's values: those of `state`,
    by default its own. All processes must call; a sharded model gets its parts."""
    state = model.state_dict() if state is None else state
    model.to_empty(device=device)
    spread_tensors(state, model.state_dict())
    return model


def spread_tensors(state: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
    """Gives `targets` the values that `state` has on the main process, one tensor after the other.

    All processes must call, with the same names. `state` holds full tensors, which have values on
    the main process only; the targets are on their device, each one full or a process's part.
    """
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in targets.items()}
    for name, target in targets.items():
        source, whole = state[name], target
        if is_part(target):  # elsewhere than on the main process never written to
            whole = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        if not source.is_meta:
            whole.copy_(source)
        with waiting() if dist.is_initialized() else nullcontext():
            if is_part(target):
                _scatter(whole, target)
            elif dist.is_initialized():
                dist.broadcast(whole, 0)


def compile_options(cfg: CompileConfig) -> dict[str, Any]:
    """Arguments of torch.compile for what becomes one graph, of one shape of batches."""
    # einops notes each kind of tensor that it meets, and what is new there invalidates a graph
    for tensor in (torch.zeros(1), nn.Parameter(torch.zeros(1))):
        rearrange(tensor, "n -> n")
    return {"backend": cfg.compile_backend, "fullgraph": True, "dynamic": False}


def compile_features(backbone: VisionTransformer, cfg: CompileConfig) -> None:
    """Does what `compile` asks for to what a frozen model gives, in place."""
    if cfg.compile:  # each is compiled when it is called
        for name in ("forward_features", "forward_layers", "forward_map"):
            setattr(backbone, name, torch.compile(getattr(backbone, name), **compile_options(cfg)))


def _scatter(whole: Tensor, target: "DTensor") -> None:
    """Gives each process its part of the main one's `whole`."""
    from torch.distributed.tensor import distribute_tensor

    part = distribute_tensor(whole, target.device_mesh, target.placements)
    own_part(target).copy_(own_part(part))


def wrap_model(model: nn.Module, device: torch.device, accum_iter: int, world_size: int) -> Any:
    """DistributedDataParallel around the model if there are several processes, else the model.

    A sharded model stays as it is and averages its gradient after each micro-batch: keeping the
    full gradient until the last one, as `no_sync` does, would take the memory that sharding saves.
    """
    if world_size == 1 or is_sharded(model):
        return model
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=accum_iter == 1,  # with no_sync it dies in the reducer (torch 2.14.1)
        init_sync=False,  # `place_model` has given all processes the same values
        forward_sync_buffers=False,  # position tables never change
    )


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches in their order; on CUDA with their tensors on the device, elsewhere as they come.

    A batch is taken from `batches` when it is asked for and never before, so errors, bad files and
    the time waited for data belong to the step that they are counted in. The host runs ahead: it
    has queued a step and asks for the next batch while the device computes, and the copy, from
    pinned memory and on a stream of its own, does not queue behind that step.
    """
    if device.type != "cuda":
        yield from batches
        return
    copies = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(copies):
            images = batch.images.to(device, non_blocking=True)
            targets = _to_device(batch.targets, device)
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copies)
        for tensor in (images, *_tensors_of(targets)):
            # The memory belongs to the copying stream, which must not reuse it before this step.
            tensor.record_stream(computing)
        yield batch._replace(images=images, targets=targets)


def _to_device(targets: Any, device: torch.device) -> Any:
    """A batch's targets, a tensor or a list of annotations, on a device."""
    if isinstance(targets, Tensor):
        return targets.to(device, non_blocking=True)
    return [{n: t.to(device, non_blocking=True) for n, t in of_one.items()} for of_one in targets]


def _tensors_of(targets: Any) -> list[Tensor]:
    if isinstance(targets, Tensor):
        return [targets]
    return [tensor for of_one in targets for tensor in of_one.values()]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Encoder and decoder blocks: each is gathered, and compiled, as one."""
    return [block for name in ("blocks", "decoder_blocks") for block in getattr(model, name, [])]


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's parameters are sharded."""
    return any(map(is_part, model.parameters()))


def is_part(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is this process's part of a sharded one."""
    return hasattr(tensor, "full_tensor")  # only a DTensor, whose class takes long to import


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if is_part(tensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes, which must all call; any other as it is."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def unsharded_model(model: ModelT, device: torch.device) -> ModelT:
    """The model itself, or a frozen copy with full tensors if it is sharded; all processes must
    call.

    Args:
        device: of the copy. On `meta` it has no values, for processes that only help the others.
    """
    if not is_sharded(model):
        return model
    with torch.device("meta"):
        copy: ModelT = build_model(model.spec)  # type: ignore[call-overload]
    with waiting():
        tensors = {name: full_tensor(part).to(device) for name, part in model.state_dict().items()}
    copy.load_state_dict(tensors, strict=True, assign=True)
    return copy.requires_grad_(False)


def spread_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Loads an optimiser's state, of which `state` has the values on the main process, full tensors
    as in a checkpoint; each process keeps those of its parts. All processes must call."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for index, entry in state["state"].items():
        like = parameters[index]
        entries[index] = {
            name: torch.empty_like(like, dtype=value.dtype)
            if value.shape == like.shape
            else torch.empty(value.shape, dtype=value.dtype, device=like.device)
            for name, value in entry.items()
        }
        spread_tensors(entry, entries[index])
    optimizer.load_state_dict({**state, "state": entries})
