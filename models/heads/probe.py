"""Linear classifiers on frozen features: batch normalisation without affine parameters, and a
linear layer (arXiv 2111.06377, appendix A.1).

Shapes: `B` batch, `D` width, `H` probes, `C` classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH_NORM_EPS = 1e-6


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
        weight, bias = torch.cat(list(self.weights)), torch.cat(list(self.biases))  # (H*C, D)
        with torch.autocast(features.device.type, enabled=False):
            logits = F.linear(self.bn(features.to(weight.dtype)), weight, bias)  # (B, H*C)
        return logits.unflatten(1, (len(self.weights), -1)).transpose(0, 1)  # (H, B, C)

    def of_each(self) -> list[list[nn.Parameter]]:
        """The parameters of each probe."""
        lists = [part for part in self.children() if isinstance(part, nn.ParameterList)]
        return [list(parts) for parts in zip(*lists, strict=True)]

    def pool_tensors(self, probe: int) -> dict[str, Tensor]:
        """What a classifier has of one probe beside the head, by its names: nothing."""
        return {}

    def folded(self, probe: int) -> tuple[Tensor, Tensor]:
        """Weight `(C, D)` and bias `(C,)` of one probe with the batch normalisation in them."""
        assert self.bn.running_mean is not None and self.bn.running_var is not None
        width = self.weights[probe].shape[1]
        mean, var = (  # those of one feature for all, or of each probe's own
            statistic.view(-1, width).expand(len(self.weights), -1)[probe]  # (D,)
            for statistic in (self.bn.running_mean, self.bn.running_var)
        )
        tensors = (mean, var, self.weights[probe], self.biases[probe])
        mean, var, matrix, shift = (t.detach().cpu().double() for t in tensors)  # not on MPS
        weight = matrix * (var + self.bn.eps).rsqrt()
        dtype = self.weights[probe].dtype
        return weight.to(dtype), (shift - weight @ mean).to(dtype)
