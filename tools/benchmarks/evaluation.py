"""k-NN of every k at once, and many learning rates of a linear classification at once."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from engine.evaluation.knn import knn_predict
from engine.evaluation.probe import LinearProbes, build_probe_optimizer, probe_loss, probe_step
from models.build import build_model, classifier_spec
from tools.benchmarks.timing import Variants, interleaved, ratio
from util.settings.evaluation import LinclsConfig


def benchmark_knn(rounds: int) -> dict[str, Any]:
    """Queries per second of k-NN, every k at once, beside one search for each k."""
    generator = torch.Generator().manual_seed(0)
    train, queries = (torch.randn(n, 384, generator=generator) for n in (50_000, 1_000))
    labels = torch.randint(1000, (50_000,), generator=generator)
    ks = (10, 20, 100, 200)
    variants: Variants = {
        "every k at once": lambda: knn_predict(train, labels, queries, ks, 0.07, 1000),
        "one k after the other": lambda: [
            knn_predict(train, labels, queries, (k,), 0.07, 1000) for k in ks
        ],
    }
    seconds = interleaved(variants, rounds)
    return {
        "queries_per_s": {name: len(queries) / statistics.median(s) for name, s in seconds.items()},
        "gain": ratio(seconds, "one k after the other", "every k at once"),
    }


def benchmark_probe(rounds: int) -> dict[str, Any]:
    """A step of linear classification, small/16 at 224, 1,000 classes: 13 learning rates beside
    one."""
    torch.manual_seed(0)
    cfg = LinclsConfig(size="small", lr=(0.1,))
    backbone = build_model(
        classifier_spec(cfg, num_classes=1000, class_token=False, fc_norm=False)
    ).eval()
    backbone.requires_grad_(False)
    images, labels = torch.randn(32, 3, 224, 224), torch.randint(1000, (32,))

    def step_for(lrs: tuple[float, ...]) -> Callable[[], None]:
        cfg = LinclsConfig(lr=lrs, optimizer="lars")
        probes = LinearProbes(384, 1000, len(lrs), torch.Generator().manual_seed(0))
        optimizer = build_probe_optimizer(probes, cfg)
        scaler = torch.amp.GradScaler("cpu", enabled=False)

        def step() -> None:
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                features = backbone.forward_features(images)
            probe_loss(probes(features), labels).sum().backward()
            probe_step(optimizer, scaler)

        return step

    thirteen = tuple(0.01 * 1.5**i for i in range(13))
    seconds = interleaved({"1 rate": step_for((0.1,)), "13 rates": step_for(thirteen)}, rounds)
    return {
        "images_per_s": {name: 32 / statistics.median(s) for name, s in seconds.items()},
        "time_of_13_over_1": ratio(seconds, "13 rates", "1 rate"),
    }
