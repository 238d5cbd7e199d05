"""Classifiers on frozen features: batch normalisation without affine parameters, and a linear layer
(arXiv 2111.06377, appendix A.1), in attentive ones on what queries gather (arXiv 2506.10178).

Shapes: `B` batch, `N` patches, `D` width, `M` queries, `E` width of the values of all queries, `H`
probes, `C` classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.heads.attentive import gather

BATCH_NORM_EPS = 1e-6
QUERY_STD = 0.02


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


class AttentiveProbes(LinearProbes):
    """`num_probes` attentive classifiers of the same tokens, all with the same initial weights.

    Each has its own queries, values, statistics of the batch normalisation, and linear layer, as
    separate parameters. They are stacked, so that one pass computes all of them.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        dim: int,
        num_queries: int,
        num_classes: int,
        num_probes: int,
        generator: torch.Generator,
    ):
        super().__init__(dim, num_classes, num_probes, generator)
        self.bn = nn.BatchNorm1d(num_probes * dim, affine=False, eps=BATCH_NORM_EPS)
        queries = torch.empty(num_queries, embed_dim).normal_(0, QUERY_STD, generator=generator)
        values = nn.init.xavier_uniform_(torch.empty(dim, embed_dim), generator=generator)
        self.queries, self.values = (
            nn.ParameterList([nn.Parameter(start.clone()) for _ in range(num_probes)])
            for start in (queries, values)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, N, D)` -> logits `(H, B, C)`, never in half precision."""
        queries, values, weight, bias = (
            torch.stack(list(parts))
            for parts in (self.queries, self.values, self.weights, self.biases)
        )
        with torch.autocast(tokens.device.type, enabled=False):
            pooled = gather(tokens.to(weight.dtype), queries, values)  # (H, B, E)
            normed = self.bn(pooled.transpose(0, 1).flatten(1))  # (B, H*E)
            features = normed.unflatten(1, (len(weight), -1)).transpose(0, 1)  # (H, B, E)
            return torch.baddbmm(bias[:, None], features, weight.mT)  # (H, B, C)

    def pool_tensors(self, probe: int) -> dict[str, Tensor]:
        """What a classifier with `AttentivePool` has of one probe beside the head."""
        parts = {"pool.queries": self.queries[probe], "pool.values": self.values[probe]}
        return {name: part.detach() for name, part in parts.items()}
