"""k-NN with every k at once, and linear probes with many learning rates at once."""

from collections.abc import Callable
from typing import Literal

import torch

from engine.evaluation.features import Features
from engine.evaluation.knn import rank_labels
from engine.evaluation.probe import build_probe_optimizer, probe_loss, probe_step
from models.build import build_model, classifier_spec
from models.heads.probe import LinearProbes
from tools.benchmarks.timing import Figures, interleaved, rates, ratio
from util.dist import Processes
from util.settings.evaluation import LinclsConfig

KS = (10, 20, 100, 200)
RATES = tuple(0.01 * 1.5**i for i in range(13))


def benchmark_knn(rounds: int, num_train: int = 50_000, width: int = 384) -> Figures:
    """Queries per second of k-NN with four k in one search, beside one search for each k."""
    sizes = (num_train, 1_000)  # training images, queries
    rows, queries = (torch.randn(size, width) for size in sizes)
    labels, query_labels = (torch.randint(1000, (size,)) for size in sizes)
    features = Features(rows, labels, queries, query_labels)
    alone = Processes(0, 1, 0, 1, torch.device("cpu"))

    def search(*ks: int) -> object:
        return rank_labels(features, 1000, ks, 0.07, alone)

    variants = {
        "every k at once": lambda: search(*KS),
        "one k after the other": lambda: [search(k) for k in KS],
    }
    seconds = interleaved(variants, rounds)
    return {
        "queries_per_s": rates(seconds, len(queries)),
        "gain": ratio(seconds, "one k after the other", "every k at once"),
    }


def benchmark_probe(
    rounds: int, size: Literal["small", "debug"] = "small", batch: int = 32
) -> Figures:
    """A step of linear classification at 224 with 1,000 classes: 13 learning rates beside one."""
    spec = classifier_spec(
        LinclsConfig(size=size), num_classes=1000, class_token=False, fc_norm=False
    )
    backbone = build_model(spec).eval().requires_grad_(False)
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step_for(lrs: tuple[float, ...]) -> Callable[[], None]:
        probes = LinearProbes(spec.embed_dim, 1000, len(lrs), torch.default_generator)
        optimizer = build_probe_optimizer(probes, LinclsConfig(lr=lrs, optimizer="lars"))

        def step() -> None:
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                features = backbone.forward_features(images)
            probe_loss(probes(features), labels).sum().backward()
            probe_step(probes, optimizer, scaler)

        return step

    seconds = interleaved({"1 rate": step_for((0.1,)), "13 rates": step_for(RATES)}, rounds)
    return {
        "images_per_s": rates(seconds, batch),
        "time_of_13_over_1": ratio(seconds, "13 rates", "1 rate"),
    }
