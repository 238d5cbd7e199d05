"""Training of linear and attentive probes (`models/heads/probe.py`), one or many that share each
forward pass.

Probes differ in their learning rate only and never touch one another: each has its own parameters,
loss, optimiser state and its own skipped steps.

Shapes: `B` batch, `H` probes, `C` classes.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch import distributed as dist
from torch.amp import GradScaler
from torch.nn import functional as F

from engine.evaluation.classification import Scores
from engine.evaluation.metrics import merit
from models.heads.probe import AttentiveProbes, LinearProbes
from models.spec import ClassifierSpec, EncoderSpec
from util.rng import HEAD, generator
from util.settings.evaluation import LinclsConfig

TRUST_COEFFICIENT = 0.001
CROSS_ENTROPY = partial(F.cross_entropy, reduction="none")


def probe_loss(
    logits: Tensor, labels: Tensor, losses_of: Callable[[Tensor, Tensor], Tensor] = CROSS_ENTROPY
) -> Tensor:
    """Each probe's mean loss, `(H, B, C)` and labels `(B,)` or `(B, C)` -> `(H,)`.

    The sum of them trains each as if alone. `losses_of` gives the loss of each image.
    """
    repeated = labels.repeat(len(logits), *[1] * (labels.ndim - 1))  # (H*B,) or (H*B, C)
    losses = losses_of(logits.flatten(0, 1), repeated)  # (H*B,)
    return losses.view(len(logits), -1).mean(dim=1)  # (H,)


def mean_of_finite(losses: Tensor) -> Tensor:
    """Mean over the probes that have not diverged, `(H,)` -> scalar; NaN where all have."""
    return torch.where(losses.isfinite(), losses, float("nan")).nanmean()


def choose_probe(scores: list[Scores], metric: str = "acc1") -> int:
    """The probe that is best by `metric`, of equals the first; one that has diverged only where all
    have."""
    return max(
        range(len(scores)),
        key=lambda place: (
            math.isfinite(scores[place].loss),
            merit(metric, scores[place].scalars[metric]),
            -place,
        ),
    )


def build_probes(cfg: LinclsConfig, spec: EncoderSpec, num_classes: int) -> LinearProbes:
    """The fresh probes of the settings, one for each learning rate, on a frozen encoder."""
    draws = generator(cfg.seed, HEAD)
    if not isinstance(spec, ClassifierSpec) or not (spec.probe_queries and spec.probe_dim):
        return LinearProbes(spec.embed_dim, num_classes, len(cfg.lr), draws)
    return AttentiveProbes(
        embed_dim=spec.embed_dim,
        dim=spec.probe_dim,
        num_queries=spec.probe_queries,
        num_classes=num_classes,
        num_probes=len(cfg.lr),
        generator=draws,
    )


def build_probe_optimizer(probes: LinearProbes, cfg: LinclsConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or LARS (arXiv 1708.03888), with a learning rate per probe, in
    the order of `cfg.lr`.

    The schedule runs at the largest rate, and `lr_scale` brings each probe to its own. LARS adapts
    the matrices, even without weight decay, and never the biases; biases do not decay.
    """
    groups: list[dict[str, object]] = []
    for lr, parameters in zip(cfg.lr, probes.of_each(), strict=True):
        for parameter in parameters:
            is_matrix = parameter.ndim > 1
            groups.append(
                {
                    "params": [parameter],
                    "weight_decay": cfg.weight_decay if is_matrix else 0.0,
                    "always_adapt": is_matrix,
                    "lr_scale": lr / cfg.base_lr,
                }
            )
    if cfg.optimizer == "lars":
        from timm.optim import Lars  # here, as importing timm takes long

        return Lars(groups, lr=0.0, momentum=cfg.momentum, trust_coeff=TRUST_COEFFICIENT)
    return torch.optim.SGD(groups, lr=0.0, momentum=cfg.momentum, nesterov=True)


def average_statistics(probes: LinearProbes) -> None:
    """Gives every process the mean of the running statistics, which batch normalisation keeps per
    process.

    Called in every step, so that they never depend on when the run was saved or evaluated.
    """
    if not dist.is_initialized():
        return
    for statistic in (probes.bn.running_mean, probes.bn.running_var):
        assert statistic is not None
        dist.all_reduce(statistic)
        statistic.div_(dist.get_world_size())


def probe_step(
    probes: LinearProbes, optimizer: torch.optim.Optimizer, scaler: GradScaler
) -> tuple[Tensor, Tensor]:
    """Steps each probe whose gradient is finite, clears the gradients, and averages the statistics
    over the processes.

    Returns: the L2 norm of the finite probes' gradient, and 1.0 where there was none and nothing
    moved, both scalars.
    """
    assert not scaler.is_enabled(), "probes are trained without loss scaling"
    average_statistics(probes)
    norms = torch.stack(
        [
            torch.nn.utils.get_total_norm([p.grad for p in each if p.grad is not None])
            for each in probes.of_each()
        ]
    )  # (H,)
    finite = norms.isfinite()
    # waits for the device: timm's LARS cannot skip a parameter on its own
    for parameters, is_finite in zip(probes.of_each(), finite.tolist(), strict=True):
        if not is_finite:
            for parameter in parameters:
                parameter.grad = None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    found_inf = (~finite.any()).float()
    norm = torch.where(finite, norms, 0.0).norm()
    return norm / (1 - found_inf), found_inf  # 0 / 0 is NaN: there is no norm
