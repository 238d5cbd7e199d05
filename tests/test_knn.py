"""k-NN against a brute force in numpy, ties and all; chunks and shares of the training set change no bit of it."""

import math

import numpy as np
import pytest
import torch

from engine import knn
from engine.knn import knn_predict, merge_over_processes, nearest_keys, rank_of_label, votes

TEMPERATURE = 0.07


def brute_force(train, labels, queries, k: int, temperature: float, num_classes: int) -> np.ndarray:
    """Votes `(Q, num_classes)`, one neighbour at a time.

    Similarities are rounded to nine places: in the last bits of 64, equal ones differ by the order of their sums.
    """
    train, queries = ((x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)) for x in (train, queries))
    result = np.zeros((len(queries), num_classes))
    for row, query in enumerate(queries):
        similarities = np.round((train * query).sum(axis=1), 9)
        for neighbour in np.argsort(-similarities, kind="stable")[:k]:
            result[row, labels[neighbour]] += math.exp(similarities[neighbour] / temperature)
    return result


def by_vote(class_votes: np.ndarray) -> list[int]:
    """The class with the most votes; of equals the lowest."""
    return np.argsort(-class_votes, axis=1, kind="stable")[:, 0].tolist()


def random_data(seed: int, n: int, queries: int, width: int, num_classes: int) -> tuple[np.ndarray, ...]:
    chance = np.random.default_rng(seed)
    train, test = chance.normal(size=(n, width)), chance.normal(size=(queries, width))
    return train.astype(np.float32), chance.integers(0, num_classes, n), test.astype(np.float32)


def tied_data(seed: int, n: int, queries: int, width: int, num_classes: int) -> tuple[np.ndarray, ...]:
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
        (300, 40, 2, 11, (10, 20, 100, 200)),  # two dimensions: in whole numbers only nine directions
    ],
)
def test_votes_and_classes_equal_brute_force(data, n, queries, width, num_classes, ks):
    for seed in range(5):
        train, labels, test = data(seed, n, queries, width, num_classes)
        found = knn_predict(*as_tensors(train, labels, test), ks, TEMPERATURE, num_classes)
        assert list(found) == list(ks)
        for k in ks:
            expected = brute_force(train.astype(float), labels, test.astype(float), k, TEMPERATURE, num_classes)
            assert found[k].shape == (queries, num_classes)
            np.testing.assert_allclose(found[k].numpy(), expected, rtol=2e-6, atol=0)  # 32 bits over 0.07
            ranks = torch.stack([rank_of_label(found[k], torch.full((queries,), c)) for c in range(num_classes)])
            assert (ranks == 0).long().argmax(dim=0).tolist() == by_vote(expected)
            # every query has each rank once, in the order of a stable sort
            order = torch.from_numpy(np.argsort(-expected, axis=1, kind="stable"))
            assert torch.equal(ranks.T.gather(1, order), torch.arange(num_classes).expand(queries, -1))


def test_the_tied_data_does_have_ties():
    """Else the test above would prove nothing: most cut-offs at k fall between equal similarities."""
    train, labels, test = as_tensors(*tied_data(0, 300, 40, 2, 11))
    similarities = knn._to_similarities(nearest_keys(train, torch.arange(300), test, 300))
    for k in (10, 20, 100, 200):
        assert ((similarities[:, k - 1] - similarities[:, k]).abs() < 1e-9).float().mean() > 0.7
    assert (similarities < -0.1).any() and (similarities.abs() < 1e-9).any()


def test_two_neighbours_by_hand():
    """Similarities 1 and 0.6 (3-4-5), temperature 0.5: e^2 = 7.389... and e^1.2 = 3.320..."""
    train = torch.tensor([[2.0, 0.0], [0.3, 0.4], [-1.0, 0.0]])
    found = knn_predict(train, torch.tensor([2, 0, 1]), torch.tensor([[7.0, 0.0]]), (1, 2, 3), 0.5, 4)
    assert found[1].tolist()[0] == pytest.approx([0, 0, 7.38905609893065, 0])
    assert found[2].tolist()[0] == pytest.approx([3.3201169227365472, 0, 7.38905609893065, 0], rel=1e-6)
    assert found[3].tolist()[0][1] == pytest.approx(0.1353352832366127)  # e^-2


def test_the_temperature_decides_between_one_near_and_three_far():
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [0.6, 0.8]])
    labels, query = torch.tensor([1, 0, 0, 0]), torch.tensor([[1.0, 0.0]])
    # e^(1/T) against 3 e^(0.6/T): equal at T = 0.4 / log 3 = 0.3641
    for temperature, winner in ((0.07, 1), (0.364, 1), (0.3643, 0), (10.0, 0)):
        assert by_vote(knn_predict(train, labels, query, (4,), temperature, 2)[4].numpy()) == [winner]
    assert knn_predict(train, labels, query, (4,), 0.01, 2)[4].isfinite().all()  # the smallest that the settings take


def test_lengths_do_not_count():
    train, labels, test = as_tensors(*random_data(1, 50, 20, 6, 4))
    expected = knn_predict(train, labels, test, (5,), TEMPERATURE, 4)[5]
    powers = 2.0 ** torch.arange(-10, 40)[:, None]  # powers of two lose no bit
    assert torch.equal(knn_predict(train * powers, labels, test * 1024, (5,), TEMPERATURE, 4)[5], expected)


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
    assert (knn_predict(train, labels, torch.zeros(1, 3), (1,), TEMPERATURE, 5)[1][0]).tolist() == [0, 0, 0, 0, 1]


def test_keys_order_by_similarity_then_lower_index_and_give_both_back():
    noise = 1e-17  # what a sum in 64 bits can leave of 0
    similarities = [-1.0, -0.5, -1e-6, -0.0, 0.0, noise, -noise, 1e-6, 0.5, 1.0, 0.5, -1.0, -0.0]
    indices = torch.tensor([5, 2**32 - 1, 3, 9, 2, 10, 1, 0, 7, 6, 8, 4, 2**31])
    keys = knn._to_keys(torch.tensor(similarities, dtype=torch.float64), indices)
    order = keys.argsort(descending=True).tolist()
    # 1 | 0.5 (7, then 8) | 1e-6 | 0 (1, 2, 9, 10, 2**31, whatever the sign) | -1e-6 | -0.5 | -1 (4, then 5)
    assert indices[order].tolist() == [6, 7, 8, 0, 1, 2, 9, 10, 2**31, 3, 2**32 - 1, 4, 5]
    assert knn._to_similarities(keys).tolist() == pytest.approx(similarities, abs=1e-9)
    assert torch.equal(neighbours(keys), indices)
    assert (keys > knn.NO_NEIGHBOUR).all()


@pytest.mark.parametrize("data", [random_data, tied_data])
@pytest.mark.parametrize(("queries_at_once", "rows_at_once"), [(1, 1), (7, 5), (256, 13), (3, 65536), (19, 300)])
@pytest.mark.parametrize("width", [2, 5])
def test_chunks_change_no_bit(monkeypatch, data, queries_at_once, rows_at_once, width):
    train, labels, test = as_tensors(*data(3, 300, 40, width, 6))
    ks = (1, 10, 200, 301)
    expected = nearest_keys(train, torch.arange(300), test, 200)
    expected_votes = knn_predict(train, labels, test, ks, TEMPERATURE, 6)
    monkeypatch.setattr(knn, "QUERIES", queries_at_once)
    monkeypatch.setattr(knn, "TRAIN_ROWS", rows_at_once)
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
    found = [nearest_keys(train[r::shares], torch.arange(n)[r::shares], test, k) for r in range(shares)]
    assert [keys.shape[1] for keys in found] == [min(k, len(train[r::shares])) for r in range(shares)]
    merged = torch.cat(found, dim=1).sort(dim=1, descending=True).values[:, :k]
    assert torch.equal(merged, whole)
    assert torch.equal(votes(merged, labels, (k,), 0.1, 6)[k], votes(whole, labels, (k,), 0.1, 6)[k])
    assert torch.equal(merge_over_processes(whole, k), whole)  # one process


def test_neighbours_are_named_by_their_place_in_the_whole_training_set():
    train, test = torch.eye(4), torch.tensor([[0.1, 0.2, 0.9, 0.3]])
    keys = nearest_keys(train[1::2], torch.tensor([1, 3]), test, 2)
    assert neighbours(keys).tolist() == [[3, 1]]


def test_ranks_by_hand():
    """Before the right class come those with more votes, and those with as many and a lower label."""
    class_votes = torch.tensor([[1.0, 3.0, 3.0, 0.0, 0.0]]).expand(5, -1)
    assert rank_of_label(class_votes, torch.arange(5)).tolist() == [2, 0, 1, 3, 4]
    assert rank_of_label(torch.zeros(3, 3), torch.tensor([0, 1, 2])).tolist() == [0, 1, 2]
    assert rank_of_label(torch.tensor([[0.1, 0.2]]), torch.tensor([0])).tolist() == [1]
