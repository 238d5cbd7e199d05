"""k-NN classification by cosine similarity with weighted votes (arXiv 1805.01978, section 3.4).

One search serves every k. Its order is total: neighbours by similarity, then lower index; classes by vote, then lower
label. Similarities are summed in 64 bits and rounded to 2^-30, so that neither chunks nor the number of processes
change which ones are equal. A similarity and its index are packed into one integer key, whose order is that order.

Shapes: `Q` queries, `n` training images, `D` width, `k` neighbours.
"""

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

QUERIES = 256  # searched at a time
TRAIN_ROWS = 65536  # compared at a time: 256 x 65536 similarities are 128 MiB in 64 bits
INDEX_MASK = 2**32 - 1
UNIT = 2**30  # of similarities as integers
NO_NEIGHBOUR = -(2**63)  # sorts behind every key


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    ks: tuple[int, ...],
    temperature: float,
    num_classes: int,
) -> dict[int, Tensor]:
    """Votes `(Q, num_classes)` for each k: a neighbour of similarity s gives its class exp(s / temperature).

    Args:
        train_features, train_labels: `(n, D)` float and `(n,)` int64.
        features: `(Q, D)` float.
        ks: numbers of neighbours; more than n takes all n.

    Features are normalised here. Source: arXiv 1805.01978, section 3.4, temperature 0.07.
    """
    indices = torch.arange(len(train_features), device=train_features.device)
    keys = nearest_keys(train_features, indices, features, max(ks))
    return votes(keys, train_labels, ks, temperature, num_classes)


def ranks_by_k(
    train_share: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    ks: tuple[int, ...],
    temperature: float,
    num_classes: int,
    rank: int,
    world_size: int,
) -> dict[int, Tensor]:
    """For each k, how many classes come before each query's right one `(Q,)`, by the training rows of all processes.

    Args: as `knn_predict`; `train_share` are the rows rank, rank + world_size, ... of the `(n, D)` training features,
        `labels` `(Q,)` the right classes. All processes must call, with the same queries.
    """
    num_train = len(train_labels)
    most = min(max(ks), num_train)
    places = torch.arange(num_train)[rank::world_size]
    keys = merge_over_processes(nearest_keys(train_share, places, features, most), most)
    right = labels.to(keys.device)
    by_k = votes(keys, train_labels, ks, temperature, num_classes)
    return {k: rank_of_label(of_k, right) for k, of_k in by_k.items()}


def nearest_keys(train_features: Tensor, train_indices: Tensor, features: Tensor, k: int) -> Tensor:
    """Keys `(Q, min(k, n))` of each query's nearest training rows, nearest first.

    `train_indices` `(n,)` below 2^32 are the rows' places in the whole training set, of which this may be a share.
    """
    queries = _normalised(features)
    keys = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(train_features), TRAIN_ROWS):  # the outer loop, so that each row is normalised once
        rows = slice(start, start + TRAIN_ROWS)
        block = _normalised(train_features[rows].to(queries.device))
        indices = train_indices[rows].to(queries.device)
        fresh = [_largest(_to_keys(part @ block.T, indices), k) for part in queries.split(QUERIES)]
        keys = _largest(torch.cat([keys, torch.cat(fresh)], dim=1), k)  # (Q, <= k)
    return keys


def merge_over_processes(keys: Tensor, k: int) -> Tensor:
    """The nearest k of all processes' keys `(Q, <= k)` for the same queries, on every process: `(Q, <= k)`."""
    if not dist.is_initialized():
        return keys
    padded = F.pad(keys.cpu(), (0, k - keys.shape[1]), value=NO_NEIGHBOUR)  # (Q, k): shares differ in length
    shares = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, padded)
    merged = _largest(torch.cat(shares, dim=1), k)  # (Q, k)
    return merged[:, (merged != NO_NEIGHBOUR).all(dim=0)].to(keys.device)


def votes(
    keys: Tensor, train_labels: Tensor, ks: tuple[int, ...], temperature: float, num_classes: int
) -> dict[int, Tensor]:
    """Votes `(Q, num_classes)` for each k from the keys `(Q, >= max(ks) or n)` and all labels `(n,)`."""
    labels = train_labels.to(keys.device)[INDEX_MASK - (keys & INDEX_MASK)]  # (Q, k)
    weights = (_to_similarities(keys) / temperature).exp()
    total = torch.zeros(len(keys), num_classes, dtype=torch.float64, device=keys.device)
    result: dict[int, Tensor] = {}
    for place in range(keys.shape[1]):  # one neighbour after the other: the order of the sums is fixed
        total.scatter_add_(1, labels[:, place, None], weights[:, place, None])
        result |= {k: total.clone() for k in ks if k == place + 1}
    return {k: result.get(k, total) for k in ks}


def rank_of_label(class_votes: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the right one, `(Q, C)` and `(Q,)` -> `(Q,)`: by vote, then lower label."""
    own = class_votes.gather(1, labels[:, None])
    lower = torch.arange(class_votes.shape[1], device=labels.device) < labels[:, None]
    return ((class_votes > own) | ((class_votes == own) & lower)).sum(dim=1)


def _normalised(features: Tensor) -> Tensor:
    """Rows of length 1 in 64 bits; a device without them (MPS) hands over to the CPU."""
    return F.normalize((features.cpu() if features.device.type == "mps" else features).double(), dim=1)


def _to_keys(similarities: Tensor, indices: Tensor) -> Tensor:
    """Integers that order by similarity, then lower index: the rounded similarity above the index."""
    return ((similarities * UNIT).round().long() << 32) | (INDEX_MASK - indices)


def _to_similarities(keys: Tensor) -> Tensor:
    return (keys >> 32).double() / UNIT


def _largest(keys: Tensor, k: int) -> Tensor:
    return keys.topk(min(k, keys.shape[1]), dim=1).values  # sorted
