"""k-NN against a brute force in 64-bit numpy, ties included; chunks and shares of the training set
change no rank; memory does not grow with it. `test_evaluation.py` has several processes."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine.evaluation import knn
from engine.evaluation.features import Features
from engine.evaluation.features_file import Origin, load_features, save_features
from engine.evaluation.knn import growing_votes, nearest_keys, rank_labels, rank_of_label
from tools.benchmarks.memory import LiveBytes
from util.dist import Processes

TEMPERATURE = 0.07
ALONE = Processes(0, 1, 0, 1, torch.device("cpu"))
KS = (1, 10, 200, 301)
TIED = pytest.mark.parametrize("tied", [False, True])


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


def some_data(tied: bool, seed: int, n: int, queries: int, width: int, num_classes: int):
    """Training features, their labels, and queries. `tied` are whole numbers from -1 to 1:
    duplicates, opposites, right angles, zero vectors, and -0.0."""
    chance = np.random.default_rng(seed)
    size = (n + queries, width)
    rows = (chance.integers(-1, 2, size) if tied else chance.normal(size=size)).astype(np.float32)
    if tied:
        rows[chance.random(size) < 0.2] *= np.float32(-0.0)
    return rows[:n], chance.integers(0, num_classes, n), rows[n:]


def votes_of(train, labels, test, ks: tuple[int, ...], num_classes: int, temperature=TEMPERATURE):
    """Votes for each k by one search."""
    queries = F.normalize(torch.as_tensor(test), dim=1)
    most = min(max(ks), len(train))
    keys = nearest_keys(torch.as_tensor(train), torch.arange(len(train)), queries, most)
    growing = growing_votes(keys, torch.as_tensor(labels), temperature, num_classes)
    votes = [of_count.clone() for of_count in growing]
    return {k: votes[min(k, most) - 1] for k in ks}


@TIED
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
def test_votes_and_ranks_equal_brute_force(tied, n, queries, width, num_classes, ks):
    for seed in range(3):
        train, labels, test = some_data(tied, seed, n, queries, width, num_classes)
        found = votes_of(train, labels, test, ks, num_classes)
        for k in ks:
            expected = brute_force(train, labels, test, k, num_classes)
            # noise may move a similarity by a step of 2^-18, over 0.07
            np.testing.assert_allclose(found[k].numpy(), expected, rtol=6e-5, atol=0)
            order = np.argsort(-found[k].numpy(), axis=1, kind="stable")
            for label in range(num_classes):
                ranks = rank_of_label(found[k], torch.full((queries,), label))
                place = (order == label).argmax(axis=1)
                place[expected[:, label] == 0] = knn.NOT_PREDICTED
                assert ranks.tolist() == place.tolist()


@pytest.mark.parametrize(
    ("temperature", "winner"), [(0.01, 1), (0.07, 1), (0.364, 1), (0.3643, 0), (10.0, 0)]
)
def test_the_temperature_decides_between_one_near_and_three_far(temperature, winner):
    """e^(1/T) against 3 e^(0.6/T): equal at T = 0.4 / log 3 = 0.3641."""
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [0.6, 0.8]])
    found = votes_of(train, [1, 0, 0, 0], [[1.0, 0.0]], (4,), 2, temperature)[4]
    assert found.argmax().item() == winner and found.isfinite().all()


def test_the_lengths_of_features_do_not_count():
    train, labels, test = some_data(False, 1, 50, 20, 6, 4)
    powers = np.float32(2) ** np.arange(-10, 40, dtype=np.float32)[:, None]  # lose no bit
    expected = votes_of(train, labels, test, (5,), 4)[5]
    assert torch.equal(votes_of(train * powers, labels, test * 1024, (5,), 4)[5], expected)


@pytest.mark.parametrize("width", [384, 1664])
@pytest.mark.parametrize("at_once", [1, 100, 2000])
def test_copies_of_an_image_are_equally_similar_despite_float_noise(monkeypatch, at_once, width):
    """Their similarities to a query are 1 up to the noise of their lengths and of the products,
    which depends on the size of a chunk; without rounding it would decide who is nearer."""
    chance = torch.Generator().manual_seed(0)
    queries = torch.randn(20, width, generator=chance)
    lengths = torch.rand(50, 1, 1, generator=chance) + 0.5
    copies = (lengths * queries).flatten(0, 1)  # 50 times the 20 queries
    monkeypatch.setattr(knn, "ROWS", at_once)
    keys = nearest_keys(copies, torch.arange(1000), F.normalize(queries, dim=1), 50)
    places = knn.INDEX_MASK - (keys & knn.INDEX_MASK)
    assert torch.equal(places, torch.arange(50) * 20 + torch.arange(20)[:, None])


def test_ranks_by_hand():
    """Before the right class come those with more votes, and those with as many and a lower label;
    a class without a vote is never predicted, however few classes there are."""
    votes = torch.tensor([[1.0, 3.0, 3.0, 0.0, 0.0]]).expand(5, -1)
    never = knn.NOT_PREDICTED
    assert rank_of_label(votes, torch.arange(5)).tolist() == [2, 0, 1, never, never]
    assert rank_of_label(torch.tensor([[0.0, 0.2]]), torch.tensor([0])).item() >= 5


@TIED
@pytest.mark.parametrize(("rows", "queries"), [(1, 1), (70, 7), (299, 256)])
def test_chunks_change_no_rank(monkeypatch, tied, rows, queries):
    train, labels, test = map(torch.from_numpy, some_data(tied, 3, 300, 40, 5, 6))
    features = Features(train, labels, test, torch.arange(40) % 6)
    expected = rank_labels(features, 6, KS, TEMPERATURE, ALONE)
    monkeypatch.setattr(knn, "ROWS", rows)
    monkeypatch.setattr(knn, "QUERIES", queries)
    found = rank_labels(features, 6, KS, TEMPERATURE, ALONE)
    assert all(torch.equal(found[k], expected[k]) for k in KS)


def test_memory_does_not_grow_with_the_training_images(monkeypatch):
    """Counted by storage, beside features and keys: 8 bytes for each image's place."""
    monkeypatch.setattr(knn, "ROWS", 256)
    peaks = []
    for n in (2_000, 20_000):
        train, test = torch.randn(n, 64), torch.randn(700, 64)
        features = Features(train, torch.arange(n) % 1000, test, torch.arange(700))
        with LiveBytes() as live:
            rank_labels(features, 1000, (1, 20), TEMPERATURE, ALONE)
        peaks.append(live.peak)
    assert peaks[1] - peaks[0] <= 8 * 18_000


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
