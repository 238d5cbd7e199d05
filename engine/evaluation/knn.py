"""k-NN classification by cosine similarity with weighted votes (arXiv 1805.01978, section 3.4).

Each of the k nearest training images votes for its class with weight exp(similarity / temperature).
One search serves every k. It compares QUERIES with ROWS at a time, so that memory beside the
features does not grow with the number of training images.

The order is total, so that chunks and processes do not change it: similarities are rounded to
multiples of 2^-18, a step that is wider than the noise of 32-bit products of the widest features
(1,664); of equally similar training images the one with the lower index is nearer; of classes with
equal votes the lower label comes first. A class without a vote is never predicted.

Shapes: `Q` queries, `R` training rows at a time, `D` width, `K` neighbours, `C` classes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.evaluation.features import TOP, Features, Predictions
from util.dist import Processes, all_gather

QUERIES, ROWS = 256, 2**14
GRID = 2**18  # steps of a similarity of 1
INDEX_MASK = 2**32 - 1
NO_NEIGHBOUR = -(2**63)  # sorts behind every key
NOT_PREDICTED = 2**31  # the rank of a class without a vote


def rank_labels(
    features: Features,
    num_classes: int,
    ks: tuple[int, ...],
    temperature: float,
    processes: Processes,
    predictions: list[Predictions] | None = None,
) -> dict[int, Tensor]:
    """The rank of each query's own class as predicted, `(Q,)` int64 for each k: 0 is a hit.

    All processes must call, and all get the ranks. `features.val` are the queries, the same on
    every process; `features.train` is this process's share of the training rows. A k above the
    number of training images takes all of them. What the neighbours of the first k vote for is
    added to the list `predictions`, a part of the queries after the other.
    """
    queries = F.normalize(features.val.to(processes.device), dim=1)  # (Q, D)
    most = min(max(ks), len(features.train_labels))
    places = torch.arange(len(features.train_labels))[processes.rank :: processes.world_size]
    nearest = nearest_keys(features.train, places, queries, most).cpu()  # (Q, K)
    ranks: dict[int, list[Tensor]] = {k: [] for k in ks}
    for of_share, labels in zip(
        nearest.split(QUERIES), features.val_labels.split(QUERIES), strict=True
    ):
        # a copy, as a view would be sent with all that it is a view of
        keys = torch.cat(all_gather(of_share.clone()), dim=1).topk(most, dim=1).values
        votes_by_count = growing_votes(keys, features.train_labels, temperature, num_classes)
        for count, votes in enumerate(votes_by_count, start=1):
            for k in ks:
                if count == min(k, most):
                    ranks[k].append(rank_of_label(votes, labels))
                    if k == ks[0] and predictions is not None:
                        predictions.append(predicted_by(votes, labels))
    return {k: torch.cat(parts) for k, parts in ranks.items()}


def nearest_keys(rows: Tensor, places: Tensor, queries: Tensor, k: int) -> Tensor:
    """Keys `(Q, k)` of the training rows `(n, D)` nearest to the normalised queries, nearest first.

    A key is an integer that orders by similarity, then by lower place in the whole training set:
    the rounded similarity in its upper 32 bits, and the inverted place, below 2^32, in the lower
    ones. Where there are fewer than k rows, NO_NEIGHBOUR fills the rest.
    """
    # MPS cannot sort int64
    device = torch.device("cpu") if queries.device.type == "mps" else queries.device
    nearest = torch.full((len(queries), k), NO_NEIGHBOUR, device=device)
    for chunk, indices in zip(rows.split(ROWS), places.split(ROWS), strict=True):
        chunk = F.normalize(chunk.to(queries.device), dim=1)  # (R, D)
        inverted = INDEX_MASK - indices.to(device)
        for best, some in zip(nearest.split(QUERIES), queries.split(QUERIES), strict=True):
            similarities = (some @ chunk.T).to(device)  # (some, R)
            keys = (similarities.mul_(GRID).round_().long() << 32) | inverted
            keys = torch.cat([best, keys.topk(min(k, len(chunk)), dim=1).values], dim=1)
            best.copy_(keys.topk(k, dim=1).values)
    return nearest


def neighbours(keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The places of training rows, int64, and the weights of their votes, float64, from keys
    `(Q, K)`; both `(Q, K)`."""
    return INDEX_MASK - (keys & INDEX_MASK), ((keys >> 32).double() / GRID / temperature).exp()


def growing_votes(
    keys: Tensor, train_labels: Tensor, temperature: float, num_classes: int
) -> Iterator[Tensor]:
    """The votes `(Q, C)` float64 of the nearest training image, of the two nearest, and so on to
    all K, from keys `(Q, K)` and the labels of all training images: one tensor that grows.

    Vote after vote in the order of the neighbours, so that their sums do not depend on threads.
    """
    places, weights = neighbours(keys, temperature)  # (Q, K)
    labels = train_labels[places]
    votes = torch.zeros(len(keys), num_classes, dtype=torch.float64)
    for place in range(keys.shape[1]):
        yield votes.scatter_add_(1, labels[:, place, None], weights[:, place, None])


def predicted_by(votes: Tensor, labels: Tensor) -> Predictions:
    """The classes with most of the votes `(Q, C)`, and their shares of all votes as
    probabilities."""
    shares, classes = (votes / votes.sum(dim=1, keepdim=True)).sort(
        dim=1, descending=True, stable=True
    )
    shares, classes = shares[:, :TOP], classes[:, :TOP]
    classes = torch.where(shares > 0, classes, votes.shape[1])
    of_truth = votes.gather(1, labels[:, None])[:, 0] / votes.sum(dim=1)
    return Predictions(labels, classes, shares.float(), of_truth.float())


def rank_of_label(votes: Tensor, labels: Tensor) -> Tensor:
    """How many classes are predicted before the right one, `(Q, C)` and `(Q,)` -> `(Q,)`.

    NOT_PREDICTED where the right one has no vote.
    """
    own = votes.gather(1, labels[:, None])
    lower = torch.arange(votes.shape[1], device=labels.device) < labels[:, None]
    before = ((votes > own) | ((votes == own) & lower)).sum(dim=1)
    return torch.where(own[:, 0] > 0, before, NOT_PREDICTED)
