"""Attentive pooling: learned queries gather the tokens of a frozen encoder before a linear
classifier, by "efficient probing" (arXiv 2506.10178, section 3). `probe.py` trains it.

The patch tokens are the keys, so that only queries and values are learned. Its average of values is
computed as the values of an average: what a query gathers is projected once, not each token.

Shapes: `B` batch, `N` patches, `D` width, `M` queries, `E` width of the values of all queries, `H`
sets of queries.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
