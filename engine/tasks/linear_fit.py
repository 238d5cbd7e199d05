"""Linear classification by logistic regression (`optimizer: lbfgs`): the features of all training
images are computed once, without augmentation, and fitted exactly, in place of many epochs.

Each process keeps the features of its share of the images, and they add up their gradients.

Shapes: `n` images of this process, `D` width, `C` classes.
"""

import logging

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from data.labels import strata
from engine.evaluation.features import share_of_features
from engine.evaluation.logistic import fit_logistic
from engine.run.folder import Run
from engine.tasks.linear import LinearImages, hold_out
from models.heads.probe import LinearProbes
from models.vit import VisionTransformer
from util.settings.evaluation import LinclsConfig

MAX_ITER = 1000
# The settings of a schedule, which a fit has not, as those of one pass over the images.
NO_SCHEDULE = {
    "lr": (0.1,),
    "min_lr": 0.0,
    "epochs": 1,
    "stop_epoch": None,
    "warmup_epochs": 0.0,
    "accum_iter": 1,
    "total_batch_size": None,
}
logger = logging.getLogger(__name__)


def without_schedule(cfg: LinclsConfig) -> LinclsConfig:
    """The settings, for `optimizer: lbfgs` without a schedule's: a recipe for SGD serves, too."""
    return cfg.model_copy(update=NO_SCHEDULE) if cfg.optimizer == "lbfgs" else cfg


def for_few_images(cfg: LinclsConfig, share: int) -> LinclsConfig:
    """The settings with a batch of at most a process's `share` of the images, for `optimizer:
    lbfgs`: no batch is too large for a fit."""
    size = max(1, min(cfg.batch_size, share))
    return cfg.model_copy(update={"batch_size": size}) if cfg.optimizer == "lbfgs" else cfg


def fit_on_features(
    cfg: LinclsConfig, run: Run, task: LinearImages, frozen: VisionTransformer, probes: LinearProbes
) -> dict[str, object]:
    """Fits the one probe of `probes` to all training images, with the `c` of `cfg.lbfgs_c` that is
    best on a held-out tenth, of equals the smallest. All processes must call.

    Returns: for results.json this `c`, `num_held_out` and, if there are several, the accuracy of
    each as a `curve`.

    Raises: as `share_of_features`.
    """
    rank, world_size = run.processes.rank, run.processes.world_size
    features = share_of_features(cfg, run, frozen, task.train, cfg.crop_pct)[0].to(run.device)
    labels = torch.from_numpy(task.train.labels)[rank::world_size].to(run.device)
    total, weights = len(task.train), task.objective.weights
    probes.eval()
    curve: list[dict[str, float]] = []
    held_out = np.empty(0, dtype=np.int64)
    if len(cfg.lbfgs_c) > 1:
        held_out = hold_out(strata(task.train.labels), cfg.seed)[1]
        chooses = np.isin(np.arange(total)[rank::world_size], held_out)
        some, others = (torch.from_numpy(part).to(run.device) for part in (~chooses, chooses))
        for c in sorted(cfg.lbfgs_c):
            kept = total - len(held_out)
            steps = fit_probe(probes, features[some], labels[some], kept, c, weights)
            found = probes(features[others])[0].argmax(dim=1)  # (n,)
            right = int(add_up((found == labels[others]).sum()))
            curve.append({"c": c, "held_out_acc1": 100 * right / len(held_out)})
            accuracy = curve[-1]["held_out_acc1"]
            logger.info("C %g: held_out top-1 %.2f %%, %d iterations", c, accuracy, steps)
    best = max(curve, key=lambda point: point["held_out_acc1"]) if curve else {"c": cfg.lbfgs_c[0]}
    steps = fit_probe(probes, features, labels, total, best["c"], weights)
    logger.info("C %g: fitted to all %d images, %d iterations", best["c"], total, steps)
    if len(curve) > 1 and best in (curve[0], curve[-1]):
        logger.warning("C %g is at an end of lbfgs_c: others beyond it may be better", best["c"])
    return {"c": best["c"], "num_held_out": len(held_out), "curve": curve}


@torch.no_grad()
def fit_probe(
    probes: LinearProbes,
    features: Tensor,
    labels: Tensor,
    total: int,
    c: float,
    weights: Tensor | None,
) -> int:
    """Fits the one probe of `probes` to features `(n, D)` with labels `(n,)`, this process's share
    of `total` images, in place; returns the iterations that it took.

    Args:
        c: inverse L2 penalty of the weights on standardised features, beside the sum of the losses.
        weights: `(C,)` of the classes.
    """
    # MPS has no 64-bit floats
    dtype = torch.float32 if features.device.type == "mps" else torch.float64
    mean = add_up(features.sum(dim=0, dtype=dtype)) / total  # (D,)
    var = add_up((features - mean.float()).square().sum(dim=0, dtype=dtype)) / total
    assert probes.bn.running_mean is not None and probes.bn.running_var is not None
    probes.bn.running_mean.copy_(mean)
    probes.bn.running_var.copy_(var)
    inputs = probes.bn(features)  # (n, D)
    with torch.enable_grad():
        weight, bias, steps = fit_logistic(
            inputs,
            labels,
            len(probes.biases[0]),
            total,
            1 / (c * total),
            max_iter=MAX_ITER,
            dtype=dtype,
            class_weights=None if weights is None else weights.to(dtype),
            is_shared=True,
        )
    probes.weights[0].copy_(weight)
    probes.biases[0].copy_(bias)
    if steps >= MAX_ITER:
        logger.warning("C %g: not converged in %d iterations", c, MAX_ITER)
    return steps


def add_up(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
