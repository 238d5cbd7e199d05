"""Attentive pooling and probes: learned queries gather the tokens of a frozen encoder before a
linear classifier, by "efficient probing" (arXiv 2506.10178, section 3).

The patch tokens are the keys, so that only queries and values are learned. Its average of values is
computed as the values of an average: what a query gathers is projected once, not each token.

Shapes: `B` batch, `N` patches, `D` width, `M` queries, `E` width of the values of all queries, `H`
probes, `C` classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.heads.probe import BATCH_NORM_EPS, LinearProbes

QUERY_STD = 0.02


def attention_of(tokens: Tensor, queries: Tensor) -> Tensor:
    """How much each query takes of each token, `(B, N, D)` and `(M, D)` -> `(B, M, N)`; rows sum
    to 1."""
    scores = F.linear(tokens, queries * queries.shape[-1] ** -0.5)  # (B, N, M)
    return scores.softmax(dim=1).mT  # (B, M, N)


def gather(tokens: Tensor, queries: Tensor, values: Tensor) -> Tensor:
    """What H sets of queries gather: tokens `(B, N, D)`, queries `(H, M, D)` and values `(H, E, D)`
    -> `(H, B, E)`. Query m fills the m-th of M equal parts of E."""
    sets, count, _ = queries.shape
    taken = attention_of(tokens, queries.flatten(0, 1)) @ tokens  # (B, H*M, D)
    parts = values.unflatten(1, (count, -1)).flatten(0, 1)  # (H*M, E / M, D)
    found = taken.transpose(0, 1) @ parts.mT  # (H*M, B, E / M)
    return found.unflatten(0, (sets, count)).transpose(1, 2).flatten(2)  # (H, B, E)


class AttentivePool(nn.Module):
    """The readout of a classifier that an attentive probe trained: tokens `(B, N, D)` ->
    `(B, E)`."""

    def __init__(self, embed_dim: int, dim: int, num_queries: int):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(num_queries, embed_dim))
        self.values = nn.Parameter(torch.zeros(dim, embed_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, N, D)` -> `(B, E)`."""
        return gather(tokens, self.queries[None], self.values[None])[0]


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
