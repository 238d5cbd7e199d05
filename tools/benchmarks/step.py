"""Images per second of a pretraining step, beside the peer's and beside the peak of matrix
products."""

from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tools.benchmarks.models import CROSS, SHAPES, Shape, build, build_peer, step_of
from tools.benchmarks.timing import Variants, interleaved, rates, ratio

OURS = "ours bf16"


def peak_flops() -> float:
    """FLOPs per second of the fastest square bf16 product of 1024, 2048 and 4096."""
    best = 0.0
    for side in (1024, 2048, 4096):
        a, b = torch.randn(2, side, side).bfloat16()
        seconds = interleaved({"product": partial(torch.mm, a, b)}, 3)["product"]
        best = max(best, 2 * side**3 / min(seconds))
    return best


def step_flops(shape: Shape, **decoder: Any) -> int:
    """Of one image, forward and backward, counted without computing."""
    with torch.device("meta"):
        model = build(shape, **decoder)
        images = torch.zeros(1, 3, shape.img_size, shape.img_size)
        ids = torch.zeros(1, model.num_patches).long()
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(images, ids).backward()
    return counter.get_total_flops()


def benchmark_step(name: str, rounds: int) -> dict[str, Any]:
    """Images per second of a step of SHAPES, ours beside the peer's where it is installed."""
    shape = SHAPES[name]
    variants: Variants = {OURS: step_of(build(shape), shape, torch.bfloat16)}
    if name == "base/16":
        variants["ours cross bf16"] = step_of(build(shape, **CROSS), shape, torch.bfloat16)
    for attention in ("sdpa", "eager"):
        for word, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
            peer = build_peer(shape, attention)
            if peer is not None:
                variants[f"peer {word} {attention}"] = step_of(peer, shape, dtype)
    peak = peak_flops()
    seconds = interleaved(variants, rounds)
    peak = max(peak, peak_flops())
    found = rates(seconds, shape.batch)
    figures: dict[str, Any] = {"images_per_s": found, "peak_gflops": peak / 1e9}
    figures["share_of_peak"] = found[OURS] * step_flops(shape) / peak
    for word in ("fp32", "bf16"):
        peers = [variant for variant in found if variant.startswith(f"peer {word}")]
        if peers:
            figures[f"over_peer_{word}"] = ratio(seconds, max(peers, key=found.__getitem__), OURS)
    if "ours cross bf16" in seconds:
        figures["cross_over_standard"] = ratio(seconds, OURS, "ours cross bf16")
    return figures
