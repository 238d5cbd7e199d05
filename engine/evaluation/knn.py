"""k-NN classification by cosine similarity with weighted votes (arXiv 1805.01978, section 3.4).

One search serves every k. Its order is total: neighbours by similarity, then lower index; classes
by vote, then lower label. Unit vectors are rounded to multiples of 2^-26 and multiplied in 64 bits,
where every sum of such products is
exact: so neither chunks nor the number of processes change a similarity. Rounded to 2^-30, it is
packed with its index into one integer key, whose order is that order.

Memory: features and results aside, a search works in chunks within BUDGET, whatever n, Q and the
number of classes.

Shapes: `Q` queries, `n` training images, `D` width, `k` neighbours, `C` classes.
"""

import torch
from torch import Tensor
from torch import distributed as dist

BUDGET = (
    2**28
    # bytes of tensors made at once, on the device and on the CPU; what kernels need inside is not
    # counted
)
# searched at a time: more would leave fewer training rows within the budget, and gain nothing
MOST_QUERIES = 256
INDEX_MASK = 2**32 - 1
GRID = (
    2**26
    # steps of a unit vector's entries: products are multiples of 2^-52, their sums below 2, so 53
    # bits do
)
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
    """Votes `(Q, num_classes)` for each k: a neighbour of similarity s gives its class exp(s /
    temperature).

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
    """For each k, how many classes come before each query's right one `(Q,)`, by the training rows
    of all processes.

    Args: as `knn_predict`; `train_share` are the rows rank, rank + world_size, ... of the `(n, D)`
        training features, `labels` `(Q,)` the right classes. All processes must call, with the same
        queries.
    """
    num_train = len(train_labels)
    most = min(max(ks), num_train)
    places = torch.arange(num_train)[rank::world_size]
    keys = merge_over_processes(nearest_keys(train_share, places, features, most), most)
    right, train_labels = labels.to(keys.device), train_labels.to(keys.device)
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    # of one query: votes for each k, their sum (8 C each), comparisons (C each), labels and weights
    # (8 k each)
    at_once = _fitting(8 * num_classes * (len(ks) + 2) + 32 * most)
    for of_keys, of_right in zip(keys.split(at_once), right.split(at_once), strict=True):
        for k, of_k in votes(of_keys, train_labels, ks, temperature, num_classes).items():
            found[k].append(rank_of_label(of_k, of_right))
    return {k: torch.cat(ranks) for k, ranks in found.items()}


def nearest_keys(train_features: Tensor, train_indices: Tensor, features: Tensor, k: int) -> Tensor:
    """Keys `(Q, min(k, n))` of each query's nearest training rows, nearest first.

    `train_indices` `(n,)` below 2^32 are the rows' places in the whole training set, of which this
    may be a share.
    """
    device = (
        torch.device("cpu") if features.device.type == "mps" else features.device
    )  # MPS has no 64 bits
    k = min(k, len(train_features))
    queries_at_once, rows_at_once = chunk_sizes(features.shape[1], k)
    keys = torch.full((len(features), k), NO_NEIGHBOUR, device=device)
    chunks = zip(train_features.split(rows_at_once), train_indices.split(rows_at_once), strict=True)
    for rows, indices in chunks:  # the outer loop, so that each row is normalised once
        _search(keys, features, rows.to(device), indices.to(device), queries_at_once)
    return keys


def _search(
    keys: Tensor, features: Tensor, rows: Tensor, indices: Tensor, queries_at_once: int
) -> None:
    """Brings the nearest so far `(Q, k)` up to date with some more training rows."""
    block = _unit_vectors(rows)  # (R, D)
    for best, queries in zip(
        keys.split(queries_at_once), features.split(queries_at_once), strict=True
    ):
        fresh = _to_keys(_unit_vectors(queries.to(keys.device)) @ block.T, indices)  # (at once, R)
        fresh = _largest(fresh, keys.shape[1])
        best.copy_(_largest(torch.cat([best, fresh], dim=1), keys.shape[1]))


def chunk_sizes(width: int, k: int) -> tuple[int, int]:
    """Queries and training rows that are compared at a time within BUDGET, at least one of each.

    Bytes: a row or a query is there in 32 bits (where it comes from another device) and in 64; a
    pair has a similarity and a key; and a query's nearest are there as found, beside the best so
    far, and sorted with their places.
    """
    of_row, of_pair, of_query = 12 * width + 8, 16, 12 * width + 40 * k
    queries = max(1, min(MOST_QUERIES, BUDGET // 4 // of_query))
    return queries, max(1, (BUDGET - queries * of_query) // (of_row + queries * of_pair))


def merge_over_processes(keys: Tensor, k: int) -> Tensor:
    """The nearest k of all processes' keys `(Q, <= k)` for the same queries, on every process: `(Q,
    <= k)`."""
    if not dist.is_initialized():
        return keys
    world_size = dist.get_world_size()
    at_once = min(_fitting(8 * k * (2 * world_size + 2)), max(1, len(keys)))
    merged = torch.full((len(keys), k), NO_NEIGHBOUR)
    rooms = torch.empty(
        world_size, at_once, k, dtype=keys.dtype
    )  # once: gloo lets go of what it gets some time later
    for best, part in zip(merged.split(at_once), keys.split(at_once), strict=True):
        best[:, : part.shape[1]] = part  # shares differ in length
        shares = [room[: len(best)] for room in rooms]
        dist.all_gather(shares, best)
        best.copy_(_largest(torch.cat(shares, dim=1), k))
    return merged[:, : int((merged != NO_NEIGHBOUR).all(dim=0).sum())].to(keys.device)


def votes(
    keys: Tensor, train_labels: Tensor, ks: tuple[int, ...], temperature: float, num_classes: int
) -> dict[int, Tensor]:
    """Votes `(Q, num_classes)` for each k from the keys `(Q, >= max(ks) or n)` and all labels
    `(n,)`."""
    labels = train_labels.to(keys.device)[INDEX_MASK - (keys & INDEX_MASK)]  # (Q, k)
    weights = (_to_similarities(keys) / temperature).exp()
    total = torch.zeros(len(keys), num_classes, dtype=torch.float64, device=keys.device)
    result: dict[int, Tensor] = {}
    for place in range(
        keys.shape[1]
    ):  # one neighbour after the other: the order of the sums is fixed
        total.scatter_add_(1, labels[:, place, None], weights[:, place, None])
        result |= {k: total.clone() for k in ks if k == place + 1}
    return {k: result.get(k, total) for k in ks}


def rank_of_label(class_votes: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the right one, `(Q, C)` and `(Q,)` -> `(Q,)`: by vote, then
    lower label."""
    own = class_votes.gather(1, labels[:, None])
    lower = torch.arange(class_votes.shape[1], device=labels.device) < labels[:, None]
    return ((class_votes > own) | ((class_votes == own) & lower)).sum(dim=1)


def _fitting(size: int) -> int:
    """How many things of so many bytes are within BUDGET, at least one."""
    return max(1, BUDGET // size)


def _unit_vectors(features: Tensor) -> Tensor:
    """Rows of length 1 (or 0) in 64 bits, rounded to multiples of 1 / GRID."""
    unit = features.to(torch.float64, copy=True)
    unit /= torch.linalg.vector_norm(unit, dim=1, keepdim=True).clamp_min_(1e-12)
    return unit.mul_(GRID).round_().div_(GRID)


def _to_keys(similarities: Tensor, indices: Tensor) -> Tensor:
    """Integers that order by similarity, then lower index: the rounded similarity above the index.

    Overwrites `similarities`.
    """
    return (
        similarities.mul_(UNIT)
        .round_()
        .long()
        .bitwise_left_shift_(32)
        .bitwise_or_(INDEX_MASK - indices)
    )


def _to_similarities(keys: Tensor) -> Tensor:
    return (keys >> 32).double() / UNIT


def _largest(keys: Tensor, k: int) -> Tensor:
    return keys.topk(min(k, keys.shape[1]), dim=1).values  # sorted
