"""Images per second of a pretraining step: beside the peer's and the peak of matrix products, and
by two processes beside one."""

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from itertools import product

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from models.build import build_model
from models.spec import MAESpec, pair
from tools.benchmarks.models import SHAPES, Shape, build_peer, step_of
from tools.benchmarks.timing import Figures, interleaved, rates, ratio

OURS, CROSS = "ours bf16", "ours cross bf16"
PRECISIONS = ("fp32", "bf16")
THREADS = 2  # of all processes together
STEPS = 2  # in a round of the processes
ONE, TWO = "1 process of 2 threads", "2 processes of 1 thread"


def peak_flops() -> float:
    """FLOPs per second of the fastest square bf16 product of 1024, 2048 and 4096."""
    factors = {side: torch.randn(2, side, side).bfloat16() for side in (1024, 2048, 4096)}
    products = {str(side): partial(torch.mm, *pair) for side, pair in factors.items()}
    seconds = interleaved(products, 3)
    return max(2 * side**3 / min(seconds[str(side)]) for side in factors)


def step_flops(spec: MAESpec) -> int:
    """FLOPs of one image, forward and backward, counted without computing."""
    with torch.device("meta"):
        model = build_model(spec)
        images = torch.zeros(1, 3, *pair(spec.img_size))
        ids_shuffle = torch.zeros(1, spec.num_patches).long()
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(images, ids_shuffle).backward()
    return counter.get_total_flops()


def benchmark_step(name: str, rounds: int) -> Figures:
    """Images per second of a step of SHAPES, ours beside the peer's if it is installed."""
    shape = SHAPES[name]
    models: dict[str, nn.Module | None] = {OURS: build_model(shape.spec)}
    if name == "base/16":
        models[CROSS] = build_model(replace(shape.spec, decoder="cross", pred_ratio=0.25))
    for word, attention in product(PRECISIONS, ("sdpa", "eager")):
        models[f"peer {word} {attention}"] = build_peer(shape.spec, attention)
    variants = {
        variant: step_of(model, shape, None if "fp32" in variant else torch.bfloat16)
        for variant, model in models.items()
        if model is not None
    }
    peak = peak_flops()
    seconds = interleaved(variants, rounds)
    peak = max(peak, peak_flops())
    found = rates(seconds, shape.batch)
    figures: dict[str, float | Figures] = {
        "images_per_s": found,
        "peak_gflops": peak / 1e9,
        "share_of_peak": found[OURS] * step_flops(shape.spec) / peak,
    }
    for word in PRECISIONS:
        peers = [variant for variant in found if variant.startswith(f"peer {word}")]
        if peers:
            figures[f"over_peer_{word}"] = ratio(seconds, max(peers, key=found.__getitem__), OURS)
    if CROSS in seconds:
        figures["cross_over_standard"] = ratio(seconds, OURS, CROSS)
    return figures


def benchmark_processes(shape: Shape, rounds: int) -> Figures:
    """Images per second of a step by one process of two threads and by two processes of one thread
    that average their gradients over gloo, of the same total batch.

    The processes of both variants are there all the time, and those whose turn it is not sleep.
    """
    spawn = multiprocessing.get_context("spawn")  # forked ones would share this one's thread pools
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, spawn)) for _ in range(1 + THREADS)]

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
    torch.set_num_threads(THREADS // world_size)
    dist.init_process_group("gloo", place, rank=rank, world_size=world_size)
    model: nn.Module = build_model(shape.spec)
    if world_size > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return step_of(model, Shape(shape.batch // world_size, shape.spec), torch.bfloat16)
