"""Linear classification on frozen features: one or many probes that share each forward pass.

A probe is BatchNorm without affine and a linear layer (paper, appendix A.1). Probes differ in their
learning rate only and never touch one another: each has its own parameters, loss, optimiser state
and its own skipped steps.

Shapes: `B` batch, `D` width, `H` probes, `C` classes.
"""

import hashlib
import math
from typing import Any

import torch
from timm.optim import Lars
from torch import Tensor, nn
from torch import distributed as dist
from torch.amp import GradScaler
from torch.nn import functional as F

from engine.evaluation.evaluate import Scores

BATCH_NORM_EPS = 1e-6
TRUST_COEFFICIENT = 0.001


class LinearProbes(nn.Module):
    """`num_probes` linear classifiers on one batch-normalised feature, all with the same initial
    weights.

    The weight matrices are separate parameters, as LARS takes the norm of each, and are
    concatenated for one product.
    """

    def __init__(
        self, embed_dim: int, num_classes: int, num_probes: int, generator: torch.Generator
    ):
        super().__init__()
        self.bn = nn.BatchNorm1d(embed_dim, affine=False, eps=BATCH_NORM_EPS)
        weight = torch.empty(num_classes, embed_dim).normal_(0, 0.01, generator=generator)
        self.weights = nn.ParameterList([nn.Parameter(weight.clone()) for _ in range(num_probes)])
        self.biases = nn.ParameterList(
            [nn.Parameter(torch.zeros(num_classes)) for _ in range(num_probes)]
        )

    def forward(self, features: Tensor) -> Tensor:
        """`(B, D)` -> logits `(H, B, C)`, never in half precision."""
        with torch.autocast(features.device.type, enabled=False):
            weight = torch.cat(list(self.weights))  # (H*C, D)
            logits = F.linear(
                self.bn(features.to(weight.dtype)), weight, torch.cat(list(self.biases))
            )  # (B, H*C)
        return logits.unflatten(1, (len(self.weights), -1)).transpose(0, 1)  # (H, B, C)

    def folded(self, probe: int) -> tuple[Tensor, Tensor]:
        """Weight `(C, D)` and bias `(C,)` of one probe with the batch normalisation in them."""
        assert self.bn.running_mean is not None and self.bn.running_var is not None
        tensors = (
            self.bn.running_mean,
            self.bn.running_var,
            self.weights[probe],
            self.biases[probe],
        )
        mean, var, matrix, shift = (
            tensor.detach().cpu().double() for tensor in tensors
        )  # MPS has no 64 bits
        weight = matrix * (var + self.bn.eps).rsqrt()
        dtype = self.weights[probe].dtype
        return weight.to(dtype), (shift - weight @ mean).to(dtype)


def probe_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Each probe's mean cross-entropy, `(H, B, C)` and `(B,)` -> `(H,)`; their sum trains each as
    if alone."""
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none"
    )  # (H*B,)
    return losses.view(len(logits), -1).mean(dim=1)  # (H,)


def mean_of_finite(losses: Tensor) -> Tensor:
    """Mean over the probes that have not diverged, `(H,)` -> scalar; NaN where all have."""
    return torch.where(losses.isfinite(), losses, float("nan")).nanmean()


def choose_probe(scores: list[Scores]) -> int:
    """The probe with the most correct images; of equals the first, and none that has diverged while
    another has not."""
    return max(
        range(len(scores)), key=lambda i: (math.isfinite(scores[i].loss), scores[i].correct1, -i)
    )


def build_probe_optimizer(probes: LinearProbes, cfg: Any) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum or LARS (arXiv 1708.03888) with a learning rate per probe, in
    `cfg.lr`'s order.

    The schedule runs at the largest rate, and `lr_scale` brings each probe to its own. LARS adapts
    the matrices, even without weight decay, and never the biases; biases do not decay.
    """
    groups: list[dict[str, Any]] = []
    for lr, weight, bias in zip(cfg.lr, probes.weights, probes.biases, strict=True):
        scale = lr / cfg.base_lr
        groups.append(
            {
                "params": [weight],
                "lr_scale": scale,
                "weight_decay": cfg.weight_decay,
                "always_adapt": True,
            }
        )
        groups.append(
            {"params": [bias], "lr_scale": scale, "weight_decay": 0.0, "always_adapt": False}
        )
    if cfg.optimizer == "lars":
        return Lars(groups, lr=0.0, momentum=cfg.momentum, trust_coeff=TRUST_COEFFICIENT)
    return torch.optim.SGD(groups, lr=0.0, momentum=cfg.momentum, nesterov=True)


def average_statistics(probes: LinearProbes) -> None:
    """Gives every process the mean of the running statistics, which batch normalisation keeps per
    process.

    Call it in every step: so they never depend on when the run was saved or evaluated.
    """
    if not dist.is_initialized():
        return
    for statistic in (probes.bn.running_mean, probes.bn.running_var):
        assert statistic is not None
        dist.all_reduce(statistic)
        statistic.div_(dist.get_world_size())


def probe_step(optimizer: torch.optim.Optimizer, scaler: GradScaler) -> tuple[Tensor, Tensor]:
    """Steps each probe whose gradient is finite and clears the gradients.

    Returns: the L2 norm of the finite probes' gradient, and 1.0 where there was none and nothing
    moved, both scalars.
    """
    assert not scaler.is_enabled(), "probes are trained without loss scaling"
    groups = optimizer.param_groups
    probes = [
        [*matrix["params"], *bias["params"]]
        for matrix, bias in zip(groups[::2], groups[1::2], strict=True)
    ]
    norms = torch.stack(
        [torch.nn.utils.get_total_norm([p.grad for p in probe]) for probe in probes]
    )  # (H,)
    finite = norms.isfinite()
    for probe, is_finite in zip(
        probes, finite.tolist(), strict=True
    ):  # one wait: timm's LARS cannot skip by itself
        if not is_finite:
            for parameter in probe:
                parameter.grad = None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    found_inf = (~finite.any()).float()
    return torch.where(finite, norms, 0.0).norm() / (
        1 - found_inf
    ), found_inf  # 0 / 0 is NaN: no norm


def tensors_digest(module: nn.Module) -> str:
    """sha256 over every parameter and buffer."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
