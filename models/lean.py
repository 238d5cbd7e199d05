"""Linear layers for bf16 on the CPU that keep less for the gradient than autograd would.

Autocast keeps a bf16 copy of each weight until the backward pass, a third of a step's memory at
small batches, and autograd the result of GELU beside its input. Here the weight is cast again and
GELU computed again. The same products in the same order: results and gradients are those of the
plain layers, bit by bit (tested).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional as F


def is_lean(x: Tensor) -> bool:
    """Whether these layers serve: autocast on the CPU, not traced (a compiler decides itself what
    it keeps)."""
    return (
        x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`(*, D)` -> `(*, D')` in autocast's type; weight `(D', D)`, bias `(D')` in fp32."""
    return _Linear.apply(x, weight, bias, False)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`linear` of the exact GELU of `x`, of which only `x` is kept."""
    return _Linear.apply(x, weight, bias, True)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, with_gelu: bool) -> Tensor:
        x = x.to(torch.get_autocast_dtype("cpu"))
        ctx.save_for_backward(x, weight)
        ctx.with_gelu = with_gelu
        rows = (F.gelu(x) if with_gelu else x).reshape(-1, x.shape[-1])
        out = torch.addmm(bias.to(x.dtype), rows, weight.to(x.dtype).t())  # (rows, D')
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])  # (rows, D')
        with torch.enable_grad():
            source = x.detach().requires_grad_()
            activated = F.gelu(source) if ctx.with_gelu else source
        rows = activated.detach().reshape(-1, x.shape[-1])  # (rows, D)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight.to(x.dtype)).view(x.shape)
            if ctx.with_gelu:
                (grad_x,) = torch.autograd.grad(activated, source, grad_x)
        grad_weight = grad.t() @ rows if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, grad.sum(dim=0) if ctx.needs_input_grad[2] else None, None
