"""Logistic regression on features by L-BFGS: the monitor's linear probe, fitted on the CPU within a
second, and the exact fit of `main_lincls.py --optimizer lbfgs`.

Shapes: `n` and `m` images, `D` width, `C` classes.
"""

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

DECAY = 1e-3  # L2 penalty of the monitor's weights, on standardised features
ROWS = 2**16  # images whose logits are in memory at a time


def fit_linear(train: Tensor, labels: Tensor, val: Tensor, num_classes: int) -> Tensor:
    """Classes `(m,)` of `val` `(m, D)` by a regression fitted to `train` `(n, D)` with its
    `labels`.

    It starts from zero and draws no random numbers: the result depends on the arguments alone.
    """
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0) + 1e-6
    inputs = (train - mean) / std
    weight, bias, _ = fit_logistic(inputs, labels, num_classes, DECAY, max_iter=50)
    return F.linear((val - mean) / std, weight, bias).argmax(dim=1)


def fit_logistic(
    inputs: Tensor,
    labels: Tensor,
    num_classes: int,
    decay: float,
    *,
    max_iter: int,
    dtype: torch.dtype = torch.float32,
    class_weights: Tensor | None = None,
    total: int | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Weight `(C, D)` and bias `(C,)` of the multinomial regression of `labels` `(n,)` on inputs
    `(n, D)`, in `dtype`, and the iterations that it took, at most `max_iter`.

    They minimise the cross-entropy's mean over the images, plus `decay` / 2 times the squared
    weights, by L-BFGS (Liu and Nocedal, 1989) with strong Wolfe line searches, from zero. That is
    scikit-learn's LogisticRegression with C = 1 / (decay * n).

    Args:
        class_weights: `(C,)` of each class's losses in the mean; None is 1.
        total: number of images of all processes, each of which calls with its share; all get the
            same. None is a fit of this process alone.
    """
    weight = torch.zeros(num_classes, inputs.shape[1], dtype=dtype, device=inputs.device)
    bias = torch.zeros(num_classes, dtype=dtype, device=inputs.device)
    for parameter in (weight, bias):
        parameter.grad = torch.zeros_like(parameter.requires_grad_())
    is_exact = dtype == torch.float64
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iter,
        tolerance_grad=1e-8 if is_exact else 1e-7,
        tolerance_change=1e-14 if is_exact else 1e-9,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        value = torch.zeros((), dtype=dtype, device=inputs.device)
        for some, own in zip(inputs.split(ROWS), labels.split(ROWS), strict=True):
            logits = F.linear(some.to(dtype), weight, bias)  # (rows, C)
            part = F.cross_entropy(logits, own, weight=class_weights, reduction="sum")
            part = part / (total or len(inputs))
            part.backward()
            value += part.detach()
        for summed in (weight.grad, bias.grad, value) if total else ():
            assert summed is not None
            add_up(summed)
        penalty = decay * weight.square().sum() / 2
        penalty.backward()
        return value + penalty.detach()

    optimizer.step(loss)
    return weight.detach(), bias.detach(), optimizer.state[weight]["n_iter"]


def add_up(values: Tensor) -> Tensor:
    """The sum over all processes, which must all call, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
