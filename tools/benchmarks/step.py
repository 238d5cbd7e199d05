"""A pretraining step: its images per second beside the peers' and the peak of matrix products, by
two processes beside one, and its memory.

A table holds one precision, and in it eager models compare with eager ones and compiled with
compiled.
"""

import gc
import importlib.util
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from engine.optim import build_adamw, optimizer_step
from engine.parallel import place_model
from models.build import build_model, mae_spec
from models.mae import MaskedAutoencoder
from models.spec import MAESpec, pair
from tools.benchmarks.memory import peak_bytes
from tools.benchmarks.peers import build_public, build_transformers
from tools.benchmarks.timing import Table, interleaved, rates, ratio, say
from util.dist import Processes
from util.settings.pretrain import MAEConfig, PretrainConfig

OURS, CROSS, CHECKPOINTING, PUBLIC = "ours", "ours cross", "ours checkpointing", "public code"
TRANSFORMERS = ("transformers sdpa", "transformers eager")  # by their kinds of attention
# Each ratio's column: whose it is, and to the fastest of which others.
RATIOS: dict[str, tuple[str, tuple[str, ...]]] = {
    "over_transformers": (OURS, TRANSFORMERS),
    "over_public_code": (OURS, (PUBLIC,)),
    "over_ours": (CROSS, (OURS,)),
}
MODES = ("", " compiled")
PRODUCT = "matrix product"
SIDES = {"cpu": (1024, 2048, 4096), "mps": (4096,), "cuda": (4096, 8192)}  # of square products
LEAST = 0.2  # seconds of a variant in a round
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEPS = 2  # in a round of the processes
ONE, TWO = "1 process of 2 threads", "2 processes of 1 thread"


class Shape(NamedTuple):
    """A pretraining step: the model, and the images of its batch, on CUDA more."""

    spec: MAESpec
    batch: int
    cuda_batch: int


SHAPES = {
    "small/16": Shape(
        mae_spec(
            MAEConfig(size="small", decoder_embed_dim=192, decoder_depth=4, decoder_num_heads=3)
        ),
        32,
        256,
    ),
    "base/16": Shape(mae_spec(MAEConfig(size="base")), 8, 256),
    "large/16": Shape(mae_spec(MAEConfig(size="large")), 4, 128),
    "huge/14": Shape(mae_spec(MAEConfig(size="huge")), 2, 64),
    "192/4 at 32": Shape(
        mae_spec(
            MAEConfig(
                size="tiny",
                img_size=32,
                patch_size=4,
                decoder_embed_dim=96,
                decoder_depth=2,
                decoder_num_heads=3,
            )
        ),
        256,
        1024,
    ),
}


def builders_of(spec: MAESpec, public_mae: Path | None) -> dict[str, Callable[[], nn.Module]]:
    """What builds each model of a specification: ours, transformers' with both kinds of attention
    if it is installed, and the public code's if its folder is given."""
    attentions = TRANSFORMERS if importlib.util.find_spec("transformers") else ()
    return {
        OURS: partial(build_model, spec),
        **{name: partial(build_transformers, spec, name.split()[1]) for name in attentions},
        **({PUBLIC: partial(build_public, spec, public_mae)} if public_mae else {}),
    }


def draw_inputs(spec: MAESpec, batch: int) -> tuple[Tensor, Tensor]:
    """Noise as images `(B, C, H, W)`, and orders of their patches `(B, N)`."""
    images = torch.randn(batch, spec.in_chans, *pair(spec.img_size))
    return images, torch.rand(batch, spec.num_patches).argsort(dim=1)


def loss_fn_of(
    model: nn.Module, images: Tensor, masks: Tensor | float, precision: str, compiled: bool = False
) -> Callable[[], Tensor]:
    """The loss of any of the models on one batch, as a function.

    Args:
        masks: the order of the patches, which transformers takes as the noise that it sorts; for
            the public code the share of the removed patches.
        compiled: for a model that has been compiled in place: whether it runs so.
    """
    forward = model if compiled else model.forward

    def loss() -> Tensor:
        with (
            torch.autocast(images.device.type, PRECISIONS[precision])
            if precision != "fp32"
            else nullcontext()
        ):
            found = forward(images, masks)
        return found if isinstance(found, Tensor) else found[0]

    return loss


def step_of(model: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward, backward and the step of training's AdamW, as a function. The learning rate stays 0,
    which takes as long as another one."""
    group = {"params": list(model.parameters()), "weight_decay": 0.05}
    optimizer = build_adamw([group], beta1=0.9, beta2=0.95)

    def step() -> None:
        loss_of().backward()
        optimizer_step(optimizer, torch.amp.GradScaler("cpu", enabled=False), clip_grad=None)

    return step


def step_flops(spec: MAESpec) -> int:
    """FLOPs of one image, forward and backward, counted without computing."""
    with torch.device("meta"):
        loss_of = loss_fn_of(build_model(spec), *draw_inputs(spec, 1), "fp32")
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss_of().backward()
    return counter.get_total_flops()


def benchmark_step(
    spec: MAESpec,
    batch: int,
    device: torch.device,
    precision: str,
    public_mae: Path | None,
    modes: tuple[str, ...],
    rounds: int,
) -> Table:
    """Images per second of each model's step, their share of the FLOPs per second of the fastest
    square product, and on CUDA the peak memory of the step.

    A model that needs too much memory or cannot be compiled is left out with a line.

    Raises: InputError if compiling needs a compiler that this machine does not have, or if the
    public code cannot be used.
    """
    torch.compiler.reset()  # torch keeps a limited number of graphs
    gc.collect()  # frees the models of the table before, which are in cycles
    synchronize = partial(torch.accelerator.synchronize, device) if device.type != "cpu" else int
    runs: dict[str, Callable[[], object]] = {}
    for side in SIDES[device.type]:
        factors = torch.randn(2, side, side, device=device, dtype=PRECISIONS[precision])
        runs[f"{PRODUCT} {side}"] = partial(torch.mm, *factors)
    images, ids_shuffle = (tensor.to(device) for tensor in draw_inputs(spec, batch))
    cross = replace(spec, decoder="cross", pred_ratio=0.25)
    builders = builders_of(spec, public_mae) | {CROSS: partial(build_model, cross)}
    table: Table = {}
    for who, build in builders.items():
        row = {"batch": batch, "gflop_per_image": step_flops(cross if who == CROSS else spec) / 1e9}
        try:
            model = placed(build, device, compiled=len(modes) > 1)
            masks = spec.mask_ratio if who == PUBLIC else ids_shuffle
            for mode in modes:
                started = time.perf_counter()
                loss_of = loss_fn_of(model, images, masks, precision, mode != "")
                step = step_of(model, loss_of)
                step()  # compiles, and makes the optimiser's state
                say(f"{who}{mode}: the first step took {time.perf_counter() - started:.1f} s")
                if device.type == "cuda":  # with the parameters and their two moments
                    held = 3 * sum(parameter.nbytes for parameter in model.parameters())
                    row["peak_mib"] = (held + peak_bytes(step, device)) / 2**20
                runs[who + mode], table[who + mode] = step, dict(row)
        except RuntimeError as error:  # torch's
            say(f"{who} is left out: {type(error).__name__}: {str(error).splitlines()[0]}")
    seconds = interleaved(runs, rounds, LEAST, synchronize)
    peak = max(2 * side**3 / min(seconds[f"{PRODUCT} {side}"]) for side in SIDES[device.type]) / 1e9
    speeds = rates(seconds, "images_per_s", batch)
    for name, figures in table.items():
        figures |= speeds[name]
        figures["share_of_peak"] = figures["images_per_s"] * figures["gflop_per_image"] / peak
    for mode, (column, (who, others)) in product(modes, RATIOS.items()):
        there = [other + mode for other in others if other + mode in table]
        if who + mode in table and there:
            table[who + mode][column] = min(ratio(seconds, name, who + mode) for name in there)
    table[PRODUCT] = {"gflops": peak}
    return table


def benchmark_memory(
    spec: MAESpec, batch: int, device: torch.device, precision: str, public_mae: Path | None
) -> Table:
    """MiB of a step's activations: the peak over forward and backward of all but parameters,
    gradients and the optimiser's state."""
    images, ids_shuffle = (tensor.to(device) for tensor in draw_inputs(spec, batch))
    builders = builders_of(spec, public_mae)
    table: Table = {}
    for who, build in {**builders, CHECKPOINTING: builders[OURS]}.items():
        model = placed(build, device, checkpointing=who == CHECKPOINTING)
        masks = spec.mask_ratio if who == PUBLIC else ids_shuffle
        loss_of = loss_fn_of(model, images, masks, precision)
        backward(loss_of)  # makes the gradients, so that what is made below is activations
        held = peak_bytes(partial(backward, loss_of), device) / 2**20
        say(f"{who}: {held:,.0f} MiB")
        table[who] = {"batch": batch, "activations_mib": held}
        table[who]["over_ours"] = held / table[OURS]["activations_mib"]
    return table


def backward(loss_of: Callable[[], Tensor]) -> None:
    """Computes a loss and its gradient."""
    loss_of().backward()


def placed(
    build: Callable[[], nn.Module],
    device: torch.device,
    compiled: bool = False,
    checkpointing: bool = False,
) -> nn.Module:
    """A fresh model on the device, ours as training places it. All are compiled in place, so that
    `forward` itself stays eager."""
    with device:
        model = build().to(device).train()
    if isinstance(model, MaskedAutoencoder):
        cfg = PretrainConfig(compile=compiled, checkpointing=checkpointing)
        place_model(model, model.state_dict(), cfg, Processes(0, 1, 0, 1, device))
    elif compiled:
        model.compile(dynamic=False)
    return model


def benchmark_processes(shape: Shape, rounds: int) -> Table:
    """Images per second of a step by one process of two threads and by two processes of one thread
    that average their gradients over gloo, of the same total batch.

    The processes of both variants are there all the time, and those whose turn it is not sleep.
    """
    spawn = multiprocessing.get_context("spawn")  # forked ones would share this one's thread pools
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        # one that is alone, and two that are a team
        pools = [stack.enter_context(ProcessPoolExecutor(1, spawn)) for _ in range(3)]

        def take_steps(members: list[ProcessPoolExecutor]) -> None:
            place = f"file://{folder}/{len(members)}"
            for done in [
                pool.submit(_take_steps, shape, rank, len(members), place)
                for rank, pool in enumerate(members)
            ]:
                done.result()

        variants = {ONE: partial(take_steps, pools[:1]), TWO: partial(take_steps, pools[1:])}
        seconds = interleaved(variants, rounds)
    table = rates(seconds, "images_per_s", STEPS * shape.batch)
    table[TWO]["over_one"] = ratio(seconds, ONE, TWO)
    return table


def _take_steps(shape: Shape, rank: int, world_size: int, place: str) -> None:
    for _ in range(STEPS):
        _step_of_process(shape, rank, world_size, place)()


@cache
def _step_of_process(shape: Shape, rank: int, world_size: int, place: str) -> Callable[[], None]:
    torch.set_num_threads(2 // world_size)  # two threads in all
    dist.init_process_group("gloo", place, rank=rank, world_size=world_size)
    model: nn.Module = build_model(shape.spec)
    if world_size > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    inputs = draw_inputs(shape.spec, shape.batch // world_size)
    return step_of(model, loss_fn_of(model, *inputs, "fp32"))
