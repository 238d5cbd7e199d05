"""Linear classification by logistic regression (`optimizer: lbfgs`): the features of all training
images are computed once, without augmentation, and fitted exactly, in place of many epochs.

Each process keeps the features of its share of the images, and they add up their gradients.

Shapes: `n` images of this process, `D` width, `C` classes.
"""

import logging

import numpy as np
import torch
from torch import Tensor

from data.labels import strata
from engine.evaluation.features import share_of_features
from engine.evaluation.logistic import add_up, fit_logistic
from engine.run.folder import Run
from engine.tasks.linear import LinearImages, hold_out
from models.heads.probe import LinearProbes
from models.vit import VisionTransformer
from util.settings.base import AugmentConfig, ScheduleConfig
from util.settings.evaluation import LinclsConfig

MAX_ITER = 1000
# Settings that a fit has not: a schedule, whose epoch is one pass over the images, and augmentation
UNUSED = {*ScheduleConfig.model_fields, *AugmentConfig.model_fields}
UNUSED |= {"lr", "momentum", "weight_decay"}
logger = logging.getLogger(__name__)


def without_schedule(cfg: LinclsConfig, batch_size: int | None = None) -> LinclsConfig:
    """The settings, for `optimizer: lbfgs` with the defaults of those that it has not, so that a
    recipe for SGD serves, and with a batch of at most `batch_size` images."""
    if cfg.optimizer != "lbfgs":
        return cfg
    update = {name: LinclsConfig.model_fields[name].default for name in UNUSED}
    size = cfg.batch_size if batch_size is None else max(1, batch_size)  # an epoch is one step
    return cfg.model_copy(update=update | {"epochs": 1, "warmup_epochs": 0.0, "batch_size": size})


def fit_on_features(
    cfg: LinclsConfig, run: Run, task: LinearImages, frozen: VisionTransformer, probes: LinearProbes
) -> dict[str, object]:
    """Fits the one probe of `probes` to all training images, with the `c` of `cfg.lbfgs_c` that is
    best on a held-out tenth, of equals the smallest. All processes must call.

    Returns: for results.json this `c`, `num_held_out`, and if there are several the accuracy of
    each as a `curve`.

    Raises: as `share_of_features`.
    """
    share = slice(run.processes.rank, None, run.processes.world_size)
    features = share_of_features(cfg, run, frozen, task.train, cfg.crop_pct)[0].to(run.device)
    labels = torch.from_numpy(task.train.labels)[share].to(run.device)
    is_held_out = np.zeros(len(task.train), dtype=bool)
    accuracies: dict[float, float] = {}
    probes.eval()
    if len(cfg.lbfgs_c) > 1:
        is_held_out[hold_out(strata(task.train.labels), cfg.seed)[1]] = True
        judges = torch.from_numpy(is_held_out[share]).to(run.device)
        for c in sorted(cfg.lbfgs_c):
            fit_probe(task, probes, features[~judges], labels[~judges], c)
            found = probes(features[judges])[0].argmax(dim=1)  # (n,)
            right = add_up((found == labels[judges]).sum())
            accuracies[c] = 100 * int(right) / int(is_held_out.sum())
            logger.info("C %g: held-out top-1 %.2f %%", c, accuracies[c])
    best = max(accuracies, key=accuracies.__getitem__, default=cfg.lbfgs_c[0])
    if accuracies and best in (min(cfg.lbfgs_c), max(cfg.lbfgs_c)):
        logger.warning("C %g is at an end of lbfgs_c: others beyond it may be better", best)
    steps = fit_probe(task, probes, features, labels, best)
    logger.info("C %g: fitted to all %d images in %d iterations", best, len(task.train), steps)
    curve = [{"c": c, "held_out_acc1": accuracy} for c, accuracy in accuracies.items()]
    return {"c": best, "iterations": steps, "num_held_out": int(is_held_out.sum()), "curve": curve}


def fit_probe(
    task: LinearImages, probes: LinearProbes, features: Tensor, labels: Tensor, c: float
) -> int:
    """Fits the one probe of `probes`, in eval mode, to features `(n, D)` with labels `(n,)`, this
    process's share, in place; returns the iterations that it took.

    Args:
        c: inverse L2 penalty of the weights on standardised features, beside the sum of the losses.
    """
    # MPS has no 64-bit floats
    dtype = torch.float32 if features.device.type == "mps" else torch.float64
    total = int(add_up(torch.tensor(len(labels), device=labels.device)))
    mean = add_up(features.sum(dim=0, dtype=dtype)) / total  # (D,)
    var = add_up((features - mean.float()).square().sum(dim=0, dtype=dtype)) / total
    state = {"bn.running_mean": mean, "bn.running_var": var}
    probes.load_state_dict(state, strict=False)
    weights = task.objective.weights
    weight, bias, steps = fit_logistic(
        probes.bn(features),
        labels,
        len(task.all_names),
        1 / (c * total),
        max_iter=MAX_ITER,
        dtype=dtype,
        class_weights=None if weights is None else weights.to(dtype),
        total=total,
    )
    probes.load_state_dict({"weights.0": weight, "biases.0": bias}, strict=False)
    if steps >= MAX_ITER:
        logger.warning(
            "C %g: not converged in %d iterations; its accuracy is usually right, its coefficients "
            "are not exact, and smaller values of lbfgs_c converge",
            c,
            MAX_ITER,
        )
    return steps
