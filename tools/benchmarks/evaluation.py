"""k-NN with every k at once, and linear and attentive probes with many learning rates at once."""

from collections.abc import Callable
from typing import Literal

import torch

from engine.evaluation.features import Features
from engine.evaluation.knn import rank_labels
from engine.evaluation.probe import build_probe_optimizer, build_probes, probe_loss, probe_step
from engine.tasks.linear import probed_features
from models.build import build_model, classifier_spec
from tools.benchmarks.timing import Table, interleaved, rates, ratio
from util.dist import Processes
from util.settings.evaluation import LinclsConfig

KS, QUERIES = (10, 20, 100, 200), 1_000  # of k-NN
KINDS: tuple[Literal["linear"], Literal["attentive"]] = ("linear", "attentive")  # of probes


def benchmark_knn(rounds: int, num_train: int = 50_000, width: int = 384) -> Table:
    """Queries per second of k-NN with four k in one search, beside one search for each k."""
    features = Features(
        torch.randn(num_train, width),
        torch.randint(1000, (num_train,)),
        torch.randn(QUERIES, width),
        torch.randint(1000, (QUERIES,)),
    )

    def search(*ks: int) -> object:
        alone = Processes(0, 1, 0, 1, torch.device("cpu"))
        return rank_labels(features, 1000, ks, 0.07, alone)

    together, apart = "every k at once", "one k after the other"
    variants = {together: lambda: search(*KS), apart: lambda: [search(k) for k in KS]}
    seconds = interleaved(variants, rounds)
    table = rates(seconds, "queries_per_s", QUERIES)
    table[together]["over_apart"] = ratio(seconds, apart, together)
    return table


def benchmark_probe(
    rounds: int, size: Literal["small", "debug"] = "small", batch: int = 32
) -> Table:
    """A step of linear classification at 224 with 1,000 classes, and one with attentive probes: 13
    learning rates beside one."""
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))

    def step_for(
        probe: Literal["linear", "attentive"], lrs: tuple[float, ...]
    ) -> Callable[[], None]:
        cfg = LinclsConfig(size=size, lr=lrs, optimizer="lars", probe=probe)
        spec = classifier_spec(cfg, num_classes=1000, class_tokens=0, fc_norm=False)
        backbone = build_model(spec).eval().requires_grad_(False)
        probes = build_probes(cfg, spec, 1000)
        optimizer = build_probe_optimizer(probes, cfg)

        def step() -> None:
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                features = probed_features(backbone, images)
            probe_loss(probes(features), labels).sum().backward()
            probe_step(probes, optimizer, torch.amp.GradScaler("cpu", enabled=False))

        return step

    lrs = tuple(0.01 * 1.5**i for i in range(13))
    variants = {}
    for probe in KINDS:
        variants[f"{probe}, 1 rate"] = step_for(probe, (0.1,))
        variants[f"{probe}, 13 rates"] = step_for(probe, lrs)
    seconds = interleaved(variants, rounds)
    table = rates(seconds, "images_per_s", batch)
    for probe in KINDS:
        many, one = f"{probe}, 13 rates", f"{probe}, 1 rate"
        table[many]["time_over_1_rate"] = ratio(seconds, many, one)
    return table
