"""k-NN against a brute force in numpy, ties and all; chunks and shares of the training set change
no bit of it.

And its memory: features, results, and a budget beside them, however many images there are.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from runs import environment, loading
from test_evaluation import free_port
from torch import multiprocessing

from data.labels import LabelledArray
from data.loader import build_eval_loader
from data.transforms import PixelNormalizer
from engine.evaluation import knn
from engine.evaluation.features import Features, compute_features, load_features, save_features
from engine.evaluation.knn import (
    chunk_sizes,
    knn_predict,
    merge_over_processes,
    nearest_keys,
    rank_of_label,
    ranks_by_k,
    votes,
)
from tools.benchmarks.memory import LiveBytes
from util import dist as util_dist
from util.dist import gather_rows, init_processes

TEMPERATURE = 0.07


def brute_force(train, labels, queries, k: int, temperature: float, num_classes: int) -> np.ndarray:
    """Votes `(Q, num_classes)`, one neighbour at a time.

    Similarities are rounded to nine places: in the last bits of 64, equal ones differ by the order
    of their sums.
    """
    train, queries = (
        (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)) for x in (train, queries)
    )
    result = np.zeros((len(queries), num_classes))
    for row, query in enumerate(queries):
        similarities = np.round((train * query).sum(axis=1), 9)
        for neighbour in np.argsort(-similarities, kind="stable")[:k]:
            result[row, labels[neighbour]] += math.exp(similarities[neighbour] / temperature)
    return result


def by_vote(class_votes: np.ndarray) -> list[int]:
    """The class with the most votes; of equals the lowest."""
    return np.argsort(-class_votes, axis=1, kind="stable")[:, 0].tolist()


def random_data(
    seed: int, n: int, queries: int, width: int, num_classes: int
) -> tuple[np.ndarray, ...]:
    chance = np.random.default_rng(seed)
    train, test = chance.normal(size=(n, width)), chance.normal(size=(queries, width))
    return train.astype(np.float32), chance.integers(0, num_classes, n), test.astype(np.float32)


def tied_data(
    seed: int, n: int, queries: int, width: int, num_classes: int
) -> tuple[np.ndarray, ...]:
    """Whole numbers from -1 to 1: duplicates, opposites, right angles, zero vectors, and -0.0."""
    chance = np.random.default_rng(seed)
    train = chance.integers(-1, 2, (n, width)).astype(np.float32)
    test = chance.integers(-1, 2, (queries, width)).astype(np.float32)
    train[chance.random(train.shape) < 0.2] *= np.float32(-0.0)
    return train, chance.integers(0, num_classes, n), test


def neighbours(keys: torch.Tensor) -> torch.Tensor:
    """Places in the training set."""
    return knn.INDEX_MASK - (keys & knn.INDEX_MASK)


def as_tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


@pytest.mark.parametrize("data", [random_data, tied_data])
@pytest.mark.parametrize(
    ("n", "queries", "width", "num_classes", "ks"),
    [
        (60, 30, 4, 5, (1, 3, 10, 59, 60)),
        (60, 1, 4, 2, (10, 1)),  # one query; ks in any order
        (7, 5, 3, 2, (1, 8, 200)),  # more neighbours than training images
        (1, 4, 3, 3, (1, 5)),
        (
            300,
            40,
            2,
            11,
            (10, 20, 100, 200),
        ),  # two dimensions: in whole numbers only nine directions
    ],
)
def test_votes_and_classes_equal_brute_force(data, n, queries, width, num_classes, ks):
    for seed in range(5):
        train, labels, test = data(seed, n, queries, width, num_classes)
        found = knn_predict(*as_tensors(train, labels, test), ks, TEMPERATURE, num_classes)
        assert list(found) == list(ks)
        for k in ks:
            expected = brute_force(
                train.astype(float), labels, test.astype(float), k, TEMPERATURE, num_classes
            )
            assert found[k].shape == (queries, num_classes)
            np.testing.assert_allclose(
                found[k].numpy(), expected, rtol=2e-6, atol=0
            )  # 32 bits over 0.07
            ranks = torch.stack(
                [rank_of_label(found[k], torch.full((queries,), c)) for c in range(num_classes)]
            )
            assert (ranks == 0).long().argmax(dim=0).tolist() == by_vote(expected)
            # every query has each rank once, in the order of a stable sort
            order = torch.from_numpy(np.argsort(-expected, axis=1, kind="stable"))
            assert torch.equal(
                ranks.T.gather(1, order), torch.arange(num_classes).expand(queries, -1)
            )


def test_the_tied_data_does_have_ties():
    """Else the test above would prove nothing: most cut-offs at k fall between equal
    similarities."""
    train, labels, test = as_tensors(*tied_data(0, 300, 40, 2, 11))
    similarities = knn._to_similarities(nearest_keys(train, torch.arange(300), test, 300))
    for k in (10, 20, 100, 200):
        assert ((similarities[:, k - 1] - similarities[:, k]).abs() < 1e-9).float().mean() > 0.7
    assert (similarities < -0.1).any() and (similarities.abs() < 1e-9).any()


def test_two_neighbours_by_hand():
    """Similarities 1 and 0.6 (3-4-5), temperature 0.5: e^2 = 7.389... and e^1.2 = 3.320..."""
    train = torch.tensor([[2.0, 0.0], [0.3, 0.4], [-1.0, 0.0]])
    found = knn_predict(
        train, torch.tensor([2, 0, 1]), torch.tensor([[7.0, 0.0]]), (1, 2, 3), 0.5, 4
    )
    assert found[1].tolist()[0] == pytest.approx([0, 0, 7.38905609893065, 0])
    assert found[2].tolist()[0] == pytest.approx(
        [3.3201169227365472, 0, 7.38905609893065, 0], rel=1e-6
    )
    assert found[3].tolist()[0][1] == pytest.approx(0.1353352832366127)  # e^-2


def test_the_temperature_decides_between_one_near_and_three_far():
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [0.6, 0.8]])
    labels, query = torch.tensor([1, 0, 0, 0]), torch.tensor([[1.0, 0.0]])
    # e^(1/T) against 3 e^(0.6/T): equal at T = 0.4 / log 3 = 0.3641
    for temperature, winner in ((0.07, 1), (0.364, 1), (0.3643, 0), (10.0, 0)):
        assert by_vote(knn_predict(train, labels, query, (4,), temperature, 2)[4].numpy()) == [
            winner
        ]
    assert (
        knn_predict(train, labels, query, (4,), 0.01, 2)[4].isfinite().all()
    )  # the smallest that the settings take


def test_lengths_do_not_count():
    train, labels, test = as_tensors(*random_data(1, 50, 20, 6, 4))
    expected = knn_predict(train, labels, test, (5,), TEMPERATURE, 4)[5]
    powers = 2.0 ** torch.arange(-10, 40)[:, None]  # powers of two lose no bit
    assert torch.equal(
        knn_predict(train * powers, labels, test * 1024, (5,), TEMPERATURE, 4)[5], expected
    )


def test_of_equal_neighbours_the_lower_index_is_nearer():
    train = torch.ones(9, 3)
    labels = torch.tensor([4, 3, 2, 1, 0, 4, 4, 4, 4])
    found = knn_predict(train, labels, torch.ones(1, 3), (1, 3, 5), TEMPERATURE, 5)
    assert [(found[k][0] > 0).tolist() for k in (1, 3, 5)] == [
        [False, False, False, False, True],
        [False, False, True, True, True],
        [True, True, True, True, True],
    ]
    # a zero vector is at right angles to everything
    assert (knn_predict(train, labels, torch.zeros(1, 3), (1,), TEMPERATURE, 5)[1][0]).tolist() == [
        0,
        0,
        0,
        0,
        1,
    ]


def test_keys_order_by_similarity_then_lower_index_and_give_both_back():
    noise = 1e-17  # what a sum in 64 bits can leave of 0
    similarities = [-1.0, -0.5, -1e-6, -0.0, 0.0, noise, -noise, 1e-6, 0.5, 1.0, 0.5, -1.0, -0.0]
    indices = torch.tensor([5, 2**32 - 1, 3, 9, 2, 10, 1, 0, 7, 6, 8, 4, 2**31])
    keys = knn._to_keys(torch.tensor(similarities, dtype=torch.float64), indices)
    order = keys.argsort(descending=True).tolist()
    # 1 | 0.5 (7, then 8) | 1e-6 | 0 (1, 2, 9, 10, 2**31, whatever the sign) | -1e-6 | -0.5 | -1 (4,
    # then 5)
    assert indices[order].tolist() == [6, 7, 8, 0, 1, 2, 9, 10, 2**31, 3, 2**32 - 1, 4, 5]
    assert knn._to_similarities(keys).tolist() == pytest.approx(similarities, abs=1e-9)
    assert torch.equal(neighbours(keys), indices)
    assert (keys > knn.NO_NEIGHBOUR).all()


@pytest.mark.parametrize("data", [random_data, tied_data])
@pytest.mark.parametrize(
    ("queries_at_once", "rows_at_once"), [(1, 1), (7, 5), (256, 13), (3, 65536), (19, 300)]
)
@pytest.mark.parametrize("width", [2, 5])
def test_chunks_change_no_bit(monkeypatch, data, queries_at_once, rows_at_once, width):
    train, labels, test = as_tensors(*data(3, 300, 40, width, 6))
    ks = (1, 10, 200, 301)
    expected = nearest_keys(train, torch.arange(300), test, 200)
    expected_votes = knn_predict(train, labels, test, ks, TEMPERATURE, 6)
    monkeypatch.setattr(knn, "chunk_sizes", lambda *_: (queries_at_once, rows_at_once))
    assert torch.equal(nearest_keys(train, torch.arange(300), test, 200), expected)
    found = knn_predict(train, labels, test, ks, TEMPERATURE, 6)
    assert all(torch.equal(found[k], expected_votes[k]) for k in ks)


@pytest.mark.parametrize("data", [random_data, tied_data])
@pytest.mark.parametrize("shares", [2, 3])
@pytest.mark.parametrize(("n", "k"), [(1, 5), (2, 1), (7, 3), (7, 20), (100, 10), (300, 200)])
def test_shares_of_the_training_set_merge_to_the_whole(data, shares, n, k):
    train, labels, test = as_tensors(*data(4, n, 20, 5, 6))
    whole = nearest_keys(train, torch.arange(n), test, k)
    assert whole.shape == (20, min(n, k))
    found = [
        nearest_keys(train[r::shares], torch.arange(n)[r::shares], test, k) for r in range(shares)
    ]
    assert [keys.shape[1] for keys in found] == [
        min(k, len(train[r::shares])) for r in range(shares)
    ]
    merged = torch.cat(found, dim=1).sort(dim=1, descending=True).values[:, :k]
    assert torch.equal(merged, whole)
    assert torch.equal(
        votes(merged, labels, (k,), 0.1, 6)[k], votes(whole, labels, (k,), 0.1, 6)[k]
    )
    assert torch.equal(merge_over_processes(whole, k), whole)  # one process


def test_neighbours_are_named_by_their_place_in_the_whole_training_set():
    train, test = torch.eye(4), torch.tensor([[0.1, 0.2, 0.9, 0.3]])
    keys = nearest_keys(train[1::2], torch.tensor([1, 3]), test, 2)
    assert neighbours(keys).tolist() == [[3, 1]]


def test_ranks_by_hand():
    """Before the right class come those with more votes, and those with as many and a lower
    label."""
    class_votes = torch.tensor([[1.0, 3.0, 3.0, 0.0, 0.0]]).expand(5, -1)
    assert rank_of_label(class_votes, torch.arange(5)).tolist() == [2, 0, 1, 3, 4]
    assert rank_of_label(torch.zeros(3, 3), torch.tensor([0, 1, 2])).tolist() == [0, 1, 2]
    assert rank_of_label(torch.tensor([[0.1, 0.2]]), torch.tensor([0])).tolist() == [1]


def test_similarities_are_exact_so_that_the_order_of_their_sums_plays_no_part():
    """Products of another shape, or another kernel, add in another order: in plain 64 bits the last
    bits differ."""
    chance = torch.Generator().manual_seed(0)
    queries, train = (torch.randn(200, 768, generator=chance) for _ in range(2))
    for scale in (1.0, 1e-6, 1e30):
        a, b = knn._unit_vectors(queries * scale), knn._unit_vectors(train * scale)
        shuffled = torch.randperm(768, generator=chance)
        assert torch.equal(a @ b.T, a[:, shuffled] @ b[:, shuffled].T)
        assert torch.equal(a @ b.T, (a.flip(1)[:, None] * b.flip(1)).sum(dim=2))
        plain = torch.nn.functional.normalize(queries.double(), dim=1)
        torch.testing.assert_close(a, plain, rtol=0, atol=2e-8)
    assert not torch.equal(
        plain @ train.double().T, plain[:, shuffled] @ train.double()[:, shuffled].T
    )
    alone = torch.cat([knn._unit_vectors(row) for row in queries.split(1)])
    shares = [knn._unit_vectors(queries[rank::3]) for rank in range(3)]
    assert torch.equal(alone, knn._unit_vectors(queries)) and torch.equal(alone[1::3], shares[1])
    doubles = queries.double()
    assert torch.equal(knn._unit_vectors(doubles), knn._unit_vectors(queries))
    assert torch.equal(doubles, queries.double())  # what comes in stays as it is


# --- memory
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [100, 3000, 20_000])
@pytest.mark.parametrize(
    ("queries", "width", "k"), [(3, 5, 10), (700, 16, 20), (300, 256, 1), (50, 8, 500)]
)
def test_a_search_stays_within_its_budget(monkeypatch, n, queries, width, k):
    """Counted by storage: what is there at once beside the features and the keys that are
    returned."""
    budget = 2**20
    monkeypatch.setattr(knn, "BUDGET", budget)
    chance = torch.Generator().manual_seed(0)
    train, test = (
        torch.randn(n, width, generator=chance),
        torch.randn(queries, width, generator=chance),
    )
    with LiveBytes() as live:
        keys = nearest_keys(train, torch.arange(n), test, k)
    assert keys.shape == (queries, min(k, n))
    assert live.peak <= budget + keys.nbytes + 8 * n
    if n == 20_000 and queries > 100:
        assert live.peak > 0.5 * budget  # it is used, too
    monkeypatch.undo()
    assert torch.equal(keys, nearest_keys(train, torch.arange(n), test, k))


def test_chunk_sizes_by_hand():
    """ImageNet's features of ViT-B: 256 queries take 4.2 MiB; a training row 9,224 bytes and 256
    times 16."""
    assert chunk_sizes(768, 200) == (
        256,
        (2**28 - 256 * (12 * 768 + 40 * 200)) // (12 * 768 + 8 + 256 * 16),
    )
    assert chunk_sizes(768, 200)[1] == 19_821
    queries, rows = chunk_sizes(1024, 1_281_167)  # every image a neighbour: one query at a time
    assert queries == 1 and rows >= 1
    assert chunk_sizes(10**9, 10) == (1, 1)  # there is always one


@pytest.mark.parametrize("num_classes", [3, 1000])
def test_votes_and_ranks_stay_within_the_budget(monkeypatch, num_classes):
    """50,000 images by 1,000 classes by four k would be 1.6 GB of votes."""
    chance = torch.Generator().manual_seed(0)
    train, test = torch.randn(500, 4, generator=chance), torch.randn(900, 4, generator=chance)
    labels, right = (torch.randint(num_classes, (n,), generator=chance) for n in (500, 900))
    ks = (1, 5, 20, 100)
    expected = ranks_by_k(train, labels, test, right, ks, TEMPERATURE, num_classes, 0, 1)
    budget = 2**20
    monkeypatch.setattr(knn, "BUDGET", budget)
    with LiveBytes() as live:
        found = ranks_by_k(train, labels, test, right, ks, TEMPERATURE, num_classes, 0, 1)
    assert all(torch.equal(found[k], expected[k]) for k in ks)
    results = 900 * (8 * 100 + 2 * 8 * len(ks))  # keys, and ranks before and after they are joined
    assert live.peak <= budget + results + 8 * 500 * 2
    class_votes = knn_predict(train, labels, test, ks, TEMPERATURE, num_classes)
    assert all(torch.equal(rank_of_label(class_votes[k], right), found[k]) for k in ks)


# Searches a training set of some size, and says by how many bytes its peak of resident memory grew.
SEARCH = r"""
import re, sys, torch
from engine.evaluation import knn

def peak():  # not ru_maxrss, which begins with the memory of the process that started this one
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])

n, queries, width, knn.BUDGET = map(int, sys.argv[1:])
train, test = torch.randn(n, width), torch.randn(queries, width)
labels, right = torch.randint(1000, (n,)), torch.randint(1000, (queries,))
# libraries are loaded
knn.ranks_by_k(train[:300], labels[:300], test[:2], right[:2], (1, 5), 0.07, 1000, 0, 1)
ballast = torch.ones(2**27)  # else the peak of the imports hides what comes now
before = peak()
knn.ranks_by_k(train, labels, test, right, (10, 20, 100, 200), 0.07, 1000, 0, 1)
print(peak() - before, train.nbytes)
"""


def grown(n: int, queries: int, width: int, budget: int) -> tuple[int, int]:
    """Bytes of resident memory that a search takes, in a process of its own, and those of the
    training features."""
    command = [sys.executable, "-c", SEARCH, *map(str, (n, queries, width, budget))]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    more, features = map(int, result.stdout.split())
    return more, features


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="Linux only has /proc")
@pytest.mark.parametrize(("n", "queries"), [(400_000, 64), (5_000, 6_000)])
def test_resident_memory_grows_by_the_budget_and_no_more(n, queries):
    """Many training images, then many queries; slack is what kernels and the allocator need."""
    budget, slack = 64 * 2**20, 48 * 2**20
    more, features = grown(n, queries, 768, budget)
    results = (
        8 * (200 + 2 * 4) * queries + 16 * n
    )  # keys, ranks, and the places of the training images
    assert 0.3 * budget < more <= budget + results + slack
    assert features > 15 * budget or queries > 1000


class Pixels(torch.nn.Module):
    """A backbone whose features are the pixels, on which batch they come."""

    head = torch.nn.Linear(256, 2)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


@pytest.mark.parametrize("n", [1000, 1001, 1024])
def test_computed_features_are_in_memory_once(n):
    pixels = np.random.default_rng(0).integers(0, 256, (n, 1, 16, 16), dtype=np.uint8)
    source = LabelledArray("noise", pixels, np.zeros(n, dtype=np.int64), 1)
    loader = build_eval_loader(source, lambda image: image, 16, 0, 1, loading(0))
    normalize = PixelNormalizer((0.0,), (1.0,), torch.device("cpu"))
    with LiveBytes() as live:
        found = compute_features(Pixels(), loader, normalize, None)
    expected = normalize(torch.from_numpy(pixels)).flatten(1)
    assert torch.equal(found, expected)
    of_batch = 16 * 256 * 4
    assert live.peak <= expected.nbytes + 10 * of_batch


def test_loading_features_reads_none_of_them(tmp_path):
    """Each process takes its share of a large file, and the file's pages are everyone's."""
    train = torch.randn(40_000, 512)
    labels, facts = (
        torch.zeros(40_000, dtype=torch.int64),
        dict.fromkeys(("checkpoint", "sha256", "readout"), "x"),
    )
    path = save_features(
        tmp_path,
        Features(
            train, labels, train[:9].clone(), labels[:9].clone(), {**facts, "class_names": ["a"]}
        ),
    )
    before = anonymous_bytes()
    share = load_features(path).train[1::2]
    assert torch.equal(share, train[1::2])
    assert anonymous_bytes() - before < train.nbytes / 4  # 80 MB would have been copied


def anonymous_bytes() -> int:
    """This process's memory that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def work(rank: int, world_size: int, port: int, folder: str) -> None:
    """Searches and gathers on one of several processes, with budgets that take many turns."""
    torch.set_num_threads(1)
    names = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": world_size,
    }
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    knn.BUDGET, util_dist.GATHER_BYTES = 2**18, 2**14
    with init_processes("cpu"):
        found = search_and_gather(rank, world_size)
    torch.save(found, Path(folder) / f"{rank}.pt")


def search_and_gather(rank: int, world_size: int) -> dict:
    train, labels, test = as_tensors(*tied_data(5, 1001, 600, 8, 6))
    right = torch.arange(600) % 6
    found: dict = {}
    with LiveBytes() as live:
        found["ranks"] = ranks_by_k(
            train[rank::world_size], labels, test, right, (1, 50), TEMPERATURE, 6, rank, world_size
        )
    found["search"] = live.peak
    for everywhere in (True, False):
        with LiveBytes() as live:
            found[f"rows {everywhere}"] = gather_rows(train[rank::world_size], 1001, everywhere)
        found[f"gather {everywhere}"] = live.peak
    return found


@pytest.mark.long
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_in_many_turns_come_to_the_same_within_the_budget(tmp_path, world_size):
    train = torch.from_numpy(tied_data(5, 1001, 600, 8, 6)[0])
    expected = search_and_gather(0, 1)
    multiprocessing.spawn(work, (world_size, free_port(), str(tmp_path)), nprocs=world_size)
    for rank in range(world_size):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.equal(found["ranks"][k], expected["ranks"][k]) for k in (1, 50))
        results = 600 * 8 * (2 * 50 + 2 * 2 + 1)  # keys of this and of all processes, ranks
        assert found["search"] <= 2**18 + results + 8 * (1001 * 3 + 600 * 2)
        assert torch.equal(found["rows True"], train)
        assert found["gather True"] <= train.nbytes + 4 * 2**14
        assert torch.equal(found["rows False"], train if rank == 0 else train[:0])
        assert found["gather False"] <= (train.nbytes if rank == 0 else 0) + 4 * 2**14
