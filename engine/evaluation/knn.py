"""k-NN classification by cosine similarity with weighted votes (arXiv 1805.01978, section 3.4).

Each of the k nearest training images votes for its class with weight exp(similarity / temperature).
One search serves every k, and it works in chunks, so that memory beside the features does not grow
with the number of training images.

The order is total, so that chunks and processes do not change it: similarities are rounded to
multiples of 2^-18, a step that is wider than the noise of 32-bit products of the widest features
(1,664); of equally similar training images the one with the lower index is nearer; of classes with
equal votes the lower label comes first. A class without a vote is never a guess.

Shapes: `Q` queries, `R` training rows in a chunk, `D` width, `K` neighbours, `C` classes.
"""

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from engine.evaluation.features import Features
from util.dist import Processes

BUDGET = 2**28  # bytes of the tensors that a search makes at a time
MOST_QUERIES = 256  # compared at a time: more leave fewer training rows within the budget
GRID = 2**18  # steps of a similarity of 1
INDEX_MASK = 2**32 - 1
NO_NEIGHBOUR = -(2**63)  # sorts behind every key
NOT_GUESSED = 2**31  # the rank of a class without a vote


def rank_labels(
    features: Features,
    num_classes: int,
    ks: tuple[int, ...],
    temperature: float,
    processes: Processes,
) -> dict[int, Tensor]:
    """How many classes are guessed before each query's own, `(Q,)` int64 for each k: 0 is a hit.

    All processes must call, and all get the ranks. `features.val` are the queries, the same on
    every process; `features.train` is this process's share of the training rows. A k above the
    number of training images takes all of them.
    """
    queries = F.normalize(features.val.to(processes.device), dim=1)  # (Q, D)
    most = min(max(ks), len(features.train_labels))
    places = torch.arange(len(features.train_labels))[processes.rank :: processes.world_size]
    keys = merge_over_processes(nearest_keys(features.train, places, queries, most))  # (Q, K)
    train_labels = features.train_labels.to(keys.device)
    ranks: dict[int, list[Tensor]] = {k: [] for k in ks}
    at_once = max(1, BUDGET // (8 * num_classes * (len(ks) + 3) + 32 * most))
    for part, labels in zip(keys.split(at_once), features.val_labels.split(at_once), strict=True):
        for k, votes in count_votes(part, train_labels, ks, temperature, num_classes).items():
            ranks[k].append(rank_of_label(votes, labels.to(keys.device)).cpu())
    return {k: torch.cat(parts) for k, parts in ranks.items()}


def nearest_keys(rows: Tensor, places: Tensor, queries: Tensor, k: int) -> Tensor:
    """Keys `(Q, k)` of the training rows `(n, D)` nearest to the normalised queries, nearest first.

    A key is an integer that orders by similarity, then by lower place in the whole training set:
    the rounded similarity in its upper 32 bits, and the inverted place, below 2^32, in the lower
    ones. Where there are fewer than k rows, NO_NEIGHBOUR fills the rest.
    """
    device = torch.device("cpu") if queries.device.type == "mps" else queries.device  # sorts int64
    nearest = torch.full((len(queries), k), NO_NEIGHBOUR, device=device)
    queries_at_once = max(1, min(MOST_QUERIES, BUDGET // (64 * k)))
    # bytes: a row in 32 bits, twice; a pair's similarity in 32 bits, twice, and its key, thrice
    rows_at_once = max(1, BUDGET // (8 * queries.shape[1] + 32 * queries_at_once))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 has 10 bits
    for chunk, indices in zip(rows.split(rows_at_once), places.split(rows_at_once), strict=True):
        chunk = F.normalize(chunk.to(queries.device), dim=1)  # (R, D)
        inverted = INDEX_MASK - indices.to(device)
        for best, some in zip(
            nearest.split(queries_at_once), queries.split(queries_at_once), strict=True
        ):
            similarities = (some @ chunk.T).to(device)  # (some, R)
            keys = (similarities.mul_(GRID).round_().long() << 32) | inverted
            keys = torch.cat([best, keys.topk(min(k, len(chunk)), dim=1).values], dim=1)
            best.copy_(keys.topk(k, dim=1).values)
    torch.set_float32_matmul_precision(precision)
    return nearest


def merge_over_processes(keys: Tensor) -> Tensor:
    """The nearest of all processes' keys `(Q, K)` for the same queries, on every process."""
    if not dist.is_initialized():
        return keys
    world_size = dist.get_world_size()
    for best in keys.split(max(1, BUDGET // (8 * keys.shape[1] * (2 * world_size + 2)))):
        shares = [torch.empty_like(best) for _ in range(world_size)]
        dist.all_gather(shares, best.contiguous())
        best.copy_(torch.cat(shares, dim=1).topk(keys.shape[1], dim=1).values)
    return keys


def count_votes(
    keys: Tensor, train_labels: Tensor, ks: tuple[int, ...], temperature: float, num_classes: int
) -> dict[int, Tensor]:
    """Votes `(Q, C)` float64 for each k, from keys `(Q, K)` and the labels of all training images.

    Vote after vote in the order of the neighbours, so that their sums do not depend on the device's
    threads.
    """
    labels = train_labels[INDEX_MASK - (keys & INDEX_MASK)]  # (Q, K)
    weights = ((keys >> 32).double() / GRID / temperature).exp()
    votes = torch.zeros(len(keys), num_classes, dtype=torch.float64, device=keys.device)
    by_k: dict[int, Tensor] = {}
    for place in range(keys.shape[1]):
        votes.scatter_add_(1, labels[:, place, None], weights[:, place, None])
        if place + 1 in ks:
            by_k[place + 1] = votes.clone()
    return {k: by_k.get(k, votes) for k in ks}


def rank_of_label(votes: Tensor, labels: Tensor) -> Tensor:
    """How many classes are guessed before the right one, `(Q, C)` and `(Q,)` -> `(Q,)`.

    NOT_GUESSED where the right one has no vote.
    """
    own = votes.gather(1, labels[:, None])
    lower = torch.arange(votes.shape[1], device=labels.device) < labels[:, None]
    before = ((votes > own) | ((votes == own) & lower)).sum(dim=1)
    return torch.where(own[:, 0] > 0, before, NOT_GUESSED)
