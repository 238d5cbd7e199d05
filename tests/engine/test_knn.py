"""k-NN against a brute force in 64-bit numpy, ties included; chunks, shares of the training set and
processes change no rank; memory stays within the budget."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import free_port
from torch import multiprocessing
from torch.nn import functional as F

from engine.evaluation import knn
from engine.evaluation.features import Features, Origin, load_features, save_features
from engine.evaluation.knn import count_votes, nearest_keys, rank_labels, rank_of_label
from tools.benchmarks.memory import LiveBytes
from util.dist import Processes, gather_rows, init_processes

TEMPERATURE = 0.07
ALONE = Processes(0, 1, 0, 1, torch.device("cpu"))
KS = (1, 10, 200, 301)


def brute_force(train, labels, queries, k: int, num_classes: int) -> np.ndarray:
    """Votes `(Q, num_classes)`, one neighbour at a time, on the grid of similarities that the
    search promises."""
    train, queries = (
        x / np.maximum(np.linalg.norm(x.astype(float), axis=1, keepdims=True), 1e-12)
        for x in (train, queries)
    )
    votes = np.zeros((len(queries), num_classes))
    for row, query in enumerate(queries):
        similarities = np.round((train * query).sum(axis=1) * 2**18) / 2**18
        for neighbour in np.argsort(-similarities, kind="stable")[:k]:
            votes[row, labels[neighbour]] += math.exp(similarities[neighbour] / TEMPERATURE)
    return votes


def random_data(seed: int, n: int, queries: int, width: int, num_classes: int):
    """Training features, their labels, and queries."""
    chance = np.random.default_rng(seed)
    train, test = (chance.normal(size=(size, width)).astype(np.float32) for size in (n, queries))
    return train, chance.integers(0, num_classes, n), test


def tied_data(seed: int, n: int, queries: int, width: int, num_classes: int):
    """Whole numbers from -1 to 1: duplicates, opposites, right angles, zero vectors, and -0.0."""
    chance = np.random.default_rng(seed)
    train, test = (
        chance.integers(-1, 2, (size, width)).astype(np.float32) for size in (n, queries)
    )
    train[chance.random(train.shape) < 0.2] *= np.float32(-0.0)
    return train, chance.integers(0, num_classes, n), test


def votes_of(train, labels, test, ks: tuple[int, ...], num_classes: int, temperature=TEMPERATURE):
    """Votes for each k by one search."""
    queries = F.normalize(torch.as_tensor(test), dim=1)
    most = min(max(ks), len(train))
    keys = nearest_keys(torch.as_tensor(train), torch.arange(len(train)), queries, most)
    return count_votes(keys, torch.as_tensor(labels), ks, temperature, num_classes)


@pytest.mark.parametrize("data", [random_data, tied_data])
@pytest.mark.parametrize(
    ("n", "queries", "width", "num_classes", "ks"),
    [
        (60, 30, 4, 5, (1, 3, 10, 59, 60)),
        (60, 1, 4, 2, (10, 1)),  # one query; ks in any order
        (7, 5, 3, 2, (1, 8, 200)),  # more neighbours than training images
        (1, 4, 3, 3, (1, 5)),
        (300, 40, 5, 11, (10, 20, 100, 200)),
    ],
)
def test_votes_and_ranks_equal_brute_force(data, n, queries, width, num_classes, ks):
    for seed in range(3):
        train, labels, test = data(seed, n, queries, width, num_classes)
        found = votes_of(train, labels, test, ks, num_classes)
        assert list(found) == list(ks)
        for k in ks:
            expected = brute_force(train, labels, test, k, num_classes)
            # noise may move a similarity by a step of 2^-18, over 0.07
            np.testing.assert_allclose(found[k].numpy(), expected, rtol=6e-5, atol=0)
            order = np.argsort(-found[k].numpy(), axis=1, kind="stable")
            for label in range(num_classes):
                ranks = rank_of_label(found[k], torch.full((queries,), label))
                place = (order == label).argmax(axis=1)
                place[expected[:, label] == 0] = knn.NOT_GUESSED
                assert ranks.tolist() == place.tolist()


def test_two_neighbours_by_hand():
    """Similarities 1 and 0.6 (3-4-5) at temperature 0.5: e^2 and e^1.2; -1 gives e^-2."""
    train = torch.tensor([[2.0, 0.0], [0.3, 0.4], [-1.0, 0.0]])
    found = votes_of(train, [2, 0, 1], [[7.0, 0.0]], (1, 2, 3), 4, temperature=0.5)
    assert found[1].tolist()[0] == pytest.approx([0, 0, math.e**2, 0])
    assert found[2].tolist()[0] == pytest.approx([math.exp(1.2), 0, math.e**2, 0], rel=1e-5)
    assert found[3][0, 1].item() == pytest.approx(math.exp(-2))


@pytest.mark.parametrize(
    ("temperature", "winner"), [(0.01, 1), (0.07, 1), (0.364, 1), (0.3643, 0), (10.0, 0)]
)
def test_the_temperature_decides_between_one_near_and_three_far(temperature, winner):
    """e^(1/T) against 3 e^(0.6/T): equal at T = 0.4 / log 3 = 0.3641."""
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [0.6, 0.8]])
    found = votes_of(train, [1, 0, 0, 0], [[1.0, 0.0]], (4,), 2, temperature)[4]
    assert found.argmax().item() == winner and found.isfinite().all()


def test_the_lengths_of_features_do_not_count():
    train, labels, test = random_data(1, 50, 20, 6, 4)
    powers = np.float32(2) ** np.arange(-10, 40, dtype=np.float32)[:, None]  # lose no bit
    expected = votes_of(train, labels, test, (5,), 4)[5]
    assert torch.equal(votes_of(train * powers, labels, test * 1024, (5,), 4)[5], expected)


def test_of_equally_similar_images_the_lower_index_is_nearer():
    labels = [4, 3, 2, 1, 0, 4, 4, 4, 4]
    for test in (torch.ones(1, 3), torch.zeros(1, 3)):  # at right angles to everything
        found = votes_of(torch.ones(9, 3), labels, test, (1, 3, 5), 5)
        voted = [found[k][0].nonzero().flatten().tolist() for k in (1, 3, 5)]
        assert voted == [[4], [2, 3, 4], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("width", [384, 1664])
@pytest.mark.parametrize("budget", [1, 2**18, 2**28])
def test_copies_of_an_image_are_equally_similar_despite_float_noise(monkeypatch, budget, width):
    """Their similarities to a query are 1 up to the noise of their lengths and of the products,
    which depends on the size of a chunk; without rounding it would decide who is nearer."""
    chance = torch.Generator().manual_seed(0)
    queries = torch.randn(20, width, generator=chance)
    lengths = torch.rand(50, 1, 1, generator=chance) + 0.5
    copies = (lengths * queries).flatten(0, 1)  # 50 times the 20 queries
    monkeypatch.setattr(knn, "BUDGET", budget)
    keys = nearest_keys(copies, torch.arange(1000), F.normalize(queries, dim=1), 50)
    places = knn.INDEX_MASK - (keys & knn.INDEX_MASK)
    assert torch.equal(places, torch.arange(50) * 20 + torch.arange(20)[:, None])


def test_ranks_by_hand():
    """Before the right class come those with more votes, and those with as many and a lower label;
    a class without a vote is never a guess, however few classes there are."""
    votes = torch.tensor([[1.0, 3.0, 3.0, 0.0, 0.0]]).expand(5, -1)
    never = knn.NOT_GUESSED
    assert rank_of_label(votes, torch.arange(5)).tolist() == [2, 0, 1, never, never]
    assert rank_of_label(torch.tensor([[0.0, 0.2]]), torch.tensor([0])).item() >= 5


@pytest.mark.parametrize("data", [random_data, tied_data])
@pytest.mark.parametrize(("budget", "queries_at_once"), [(1, 1), (2**12, 7), (2**16, 256)])
def test_chunks_change_no_rank(monkeypatch, data, budget, queries_at_once):
    train, labels, test = map(torch.from_numpy, data(3, 300, 40, 5, 6))
    features = Features(train, labels, test, torch.arange(40) % 6)
    expected = rank_labels(features, 6, KS, TEMPERATURE, ALONE)
    monkeypatch.setattr(knn, "BUDGET", budget)
    monkeypatch.setattr(knn, "MOST_QUERIES", queries_at_once)
    found = rank_labels(features, 6, KS, TEMPERATURE, ALONE)
    assert all(torch.equal(found[k], expected[k]) for k in KS)


@pytest.mark.parametrize("data", [random_data, tied_data])
@pytest.mark.parametrize(("shares", "n", "k"), [(2, 7, 3), (3, 2, 2), (3, 7, 7), (3, 300, 200)])
def test_shares_of_the_training_set_merge_to_the_whole(data, shares, n, k):
    """Rows are named by their place in the whole set; a share may hold fewer than k of them.
    Similarities may differ by a step of the grid, equal ones may not."""
    train, _, test = map(torch.from_numpy, data(4, n, 20, 5, 6))
    queries, places = F.normalize(test, dim=1), torch.arange(n)
    whole = nearest_keys(train, places, queries, k)
    found = [nearest_keys(train[r::shares], places[r::shares], queries, k) for r in range(shares)]
    merged = torch.cat(found, dim=1).sort(dim=1, descending=True).values[:, :k]
    assert torch.equal(merged & knn.INDEX_MASK, whole & knn.INDEX_MASK)
    assert ((merged >> 32) - (whole >> 32)).abs().max() <= (0 if data is tied_data else 1)


@pytest.mark.parametrize(("n", "queries", "width"), [(20_000, 700, 16), (3000, 300, 256)])
def test_a_search_stays_within_its_budget(monkeypatch, n, queries, width):
    """Counted by storage: what is there at once beside features, keys and ranks."""
    budget, num_classes, ks = 2**20, 1000, (1, 5, 20)
    monkeypatch.setattr(knn, "BUDGET", budget)
    sizes = (n, queries)
    train, test = (torch.randn(size, width) for size in sizes)
    labels, right = (torch.randint(num_classes, (size,)) for size in sizes)
    with LiveBytes() as live:
        rank_labels(Features(train, labels, test, right), num_classes, ks, TEMPERATURE, ALONE)
    kept = test.nbytes + 8 * n + 8 * queries * (max(ks) + 2 * len(ks))
    assert 0.5 * budget < live.peak <= budget + kept


def test_loading_features_reads_none_of_them(tmp_path):
    """Each process takes its share of a large file, and the file's pages are everyone's."""
    train, labels = torch.randn(40_000, 512), torch.zeros(40_000, dtype=torch.int64)
    features = Features(train, labels, train[:9].clone(), labels[:9].clone())
    path = save_features(tmp_path, features, Origin("x", "x", "x", "x", 1, ["a"]))
    before = anonymous_bytes()
    share = load_features(path)[0].train[1::2]
    assert torch.equal(share, train[1::2])
    assert anonymous_bytes() - before < train.nbytes / 4  # 80 MB would have been copied


def anonymous_bytes() -> int:
    """This process's memory that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def search_and_gather(processes: Processes) -> dict:
    """Ranks, and the training rows gathered again, on one of several processes."""
    train, labels, test = map(torch.from_numpy, tied_data(5, 1001, 600, 8, 6))
    share = train[processes.rank :: processes.world_size]
    features = Features(share, labels, test, torch.arange(600) % 6)
    found: dict = {"ranks": rank_labels(features, 6, (1, 50, 1001), TEMPERATURE, processes)}
    for everywhere in (True, False):
        with LiveBytes() as live:
            found[f"rows {everywhere}"] = gather_rows(share, 1001, everywhere)
        found[f"bytes {everywhere}"] = live.peak
    return found


def work(rank: int, world_size: int, port: int, folder: str) -> None:
    """A process of several, with a budget that takes many turns."""
    torch.set_num_threads(1)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = (rank, world_size, rank, world_size, "127.0.0.1", port)
    os.environ |= dict(zip(names, map(str, values), strict=True))
    knn.BUDGET = 2**18
    with init_processes("cpu") as processes:
        torch.save(search_and_gather(processes), Path(folder) / f"{rank}.pt")


@pytest.mark.long
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_in_many_turns_come_to_the_same(tmp_path, world_size):
    expected = search_and_gather(ALONE)
    multiprocessing.spawn(work, (world_size, free_port(), str(tmp_path)), nprocs=world_size)
    for rank in range(world_size):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(found["ranks"][k], of_k) for k, of_k in expected["ranks"].items())
        assert torch.equal(found["rows True"], expected["rows True"])
        rows = expected["rows False"]
        assert torch.equal(found["rows False"], rows if rank == 0 else rows[:0])
        most = rows.nbytes + 2 * rows[::world_size].nbytes  # its own share and that of one other
        assert found["bytes True"] <= most and found["bytes False"] <= (
            most if rank == 0 else most - rows.nbytes
        )
