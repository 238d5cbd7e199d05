"""A pretraining step: its images per second beside the peer's and the peak of matrix products, and
by two processes beside one; and its memory."""

import multiprocessing
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from engine.optim import optimizer_step
from models.build import build_model, mae_spec
from models.spec import MAESpec, pair
from tools.benchmarks.memory import LiveBytes
from tools.benchmarks.timing import Figures, interleaved, rates, ratio
from util.settings.pretrain import MAEConfig

OURS, CROSS = "ours bf16", "ours cross bf16"
PEERS = {  # variant -> its kind of attention
    f"peer {precision} {attention}": attention
    for precision in ("fp32", "bf16")
    for attention in ("sdpa", "eager")
}
FP32 = "peer fp32"  # of the memory
SIDES = (1024, 2048, 4096)  # of the square matrix products
STEPS = 2  # in a round of the processes
ONE, TWO = "1 process of 2 threads", "2 processes of 1 thread"


class Shape(NamedTuple):
    """A pretraining step: the images of its batch, and the model."""

    batch: int
    spec: MAESpec


SHAPES = {
    "small/16": Shape(
        32,
        mae_spec(
            MAEConfig(size="small", decoder_embed_dim=192, decoder_depth=4, decoder_num_heads=3)
        ),
    ),
    "base/16": Shape(8, mae_spec(MAEConfig(size="base"))),
    "192/4 at 32": Shape(
        256,
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
    ),
}


def build_peers(spec: MAESpec, attentions: Mapping[str, str]) -> dict[str, nn.Module]:
    """The peer's models of a specification, by name, each with its kind of attention; none if
    transformers is not installed."""
    try:
        from transformers import AutoModelForPreTraining, ViTMAEConfig
    except ImportError:
        return {}
    config = ViTMAEConfig(
        hidden_size=spec.embed_dim,
        num_hidden_layers=spec.depth,
        num_attention_heads=spec.num_heads,
        intermediate_size=4 * spec.embed_dim,
        image_size=spec.img_size,
        patch_size=spec.patch_size,
        decoder_hidden_size=spec.decoder_embed_dim,
        decoder_num_hidden_layers=spec.decoder_depth,
        decoder_num_attention_heads=spec.decoder_num_heads,
        decoder_intermediate_size=4 * spec.decoder_embed_dim,
        mask_ratio=spec.mask_ratio,
        norm_pix_loss=spec.norm_pix_loss,
    )
    return {
        name: AutoModelForPreTraining.from_config(config, attn_implementation=attention)
        for name, attention in attentions.items()
    }


def loss_fn_of(model: nn.Module, shape: Shape, dtype: torch.dtype | None) -> Callable[[], Tensor]:
    """The loss of either model on one batch, as a function."""
    images = torch.randn(shape.batch, 3, *pair(shape.spec.img_size))
    ids_shuffle = torch.rand(shape.batch, shape.spec.num_patches).argsort(dim=1)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            found = model(images, ids_shuffle)  # the peer takes them as the noise that it sorts
        return found if isinstance(found, Tensor) else found.loss

    return loss


def step_of(model: nn.Module, shape: Shape, dtype: torch.dtype | None) -> Callable[[], None]:
    """Forward, backward and fused AdamW on one batch, as a function."""
    loss_of = loss_fn_of(model, shape, dtype)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, weight_decay=0.05, betas=(0.9, 0.95), fused=True
    )

    def step() -> None:
        loss_of().backward()
        optimizer_step(optimizer, torch.amp.GradScaler("cpu", enabled=False), clip_grad=None)

    return step


def step_flops(spec: MAESpec) -> int:
    """FLOPs of one image, forward and backward, counted without computing."""
    with torch.device("meta"):
        loss_of = loss_fn_of(build_model(spec), Shape(1, spec), None)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss_of().backward()
    return counter.get_total_flops()


def benchmark_step(shape: Shape, rounds: int) -> Figures:
    """Images per second of a step, ours beside the peer's if it is installed; and our share of the
    FLOPs per second of the fastest square bf16 product."""
    models = {
        OURS: build_model(shape.spec),
        CROSS: build_model(replace(shape.spec, decoder="cross", pred_ratio=0.25)),
        **build_peers(shape.spec, PEERS),
    }
    steps = {
        name: step_of(model, shape, None if "fp32" in name else torch.bfloat16)
        for name, model in models.items()
    }
    factors = {side: torch.randn(2, side, side).bfloat16() for side in SIDES}
    products = {str(side): partial(torch.mm, *both) for side, both in factors.items()}
    seconds = interleaved({**steps, **products}, rounds)
    peak = max(2 * side**3 / min(seconds[str(side)]) for side in SIDES)
    found = rates({name: seconds[name] for name in steps}, shape.batch)
    over_peer = {  # the fastest of a precision comes last and stays
        f"over_peer_{name.split()[1]}": ratio(seconds, name, OURS)
        for name in sorted(found.keys() & PEERS.keys(), key=found.__getitem__)
    }
    return {
        "images_per_s": found,
        "peak_gflops": peak / 1e9,
        "share_of_peak": found[OURS] * step_flops(shape.spec) / peak,
        **over_peer,
        "cross_over_standard": ratio(seconds, OURS, CROSS),
    }


def benchmark_memory(shape: Shape) -> Figures:
    """MiB of a step's activations, ours beside the peer's in fp32 if it is installed: the peak over
    forward and backward of all but parameters, gradients and the optimiser's state."""
    checkpointing = build_model(shape.spec)
    checkpointing.checkpointing = True
    models = {"ours bf16": build_model(shape.spec), "ours bf16 checkpointing": checkpointing}
    peaks = {}
    for name, model in (models | build_peers(shape.spec, {FP32: "sdpa"})).items():
        loss_of = loss_fn_of(model, shape, None if name == FP32 else torch.bfloat16)
        loss_of().backward()  # makes the gradients, so that what is made below is activations
        with LiveBytes() as live:
            loss_of().backward()
        peaks[name] = live.peak / 2**20
    over_peer = {name: peaks[name] / peaks[FP32] for name in models if FP32 in peaks}
    return {"activations_mib": peaks, "activations_over_peer": over_peer}


def benchmark_processes(shape: Shape, rounds: int) -> Figures:
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
    return {
        "images_per_s": rates(seconds, STEPS * shape.batch),
        "two_over_one": ratio(seconds, ONE, TWO),
    }


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
    return step_of(model, Shape(shape.batch // world_size, shape.spec), torch.bfloat16)
