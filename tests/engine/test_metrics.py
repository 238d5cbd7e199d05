"""The figures of the evaluations beside scikit-learn's, to 1e-12."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics

from engine.evaluation.metrics import (
    merit,
    multiclass_figures,
    multilabel_figures,
    regression_figures,
)

C = 5


def exactly(expected: float) -> object:
    return pytest.approx(expected, abs=1e-12, rel=1e-12, nan_ok=True)


def mean_of(values: list[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def rankings(truths: np.ndarray, scores: np.ndarray) -> tuple[list[float], list[float]]:
    """AUROC and average precision of each class, both `(n, C)`; NaN for one that is not defined."""
    auroc, ap = [], []
    for truth, of_class in zip(truths.astype(bool).T, scores.T, strict=True):
        is_there, is_mixed = truth.any(), truth.any() and not truth.all()
        auroc.append(metrics.roc_auc_score(truth, of_class) if is_mixed else math.nan)
        ap.append(metrics.average_precision_score(truth, of_class) if is_there else math.nan)
    return auroc, ap


def drawn(kind: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits `(n, C)` and classes `(n,)`."""
    generator = np.random.default_rng(seed)
    n = {"one image": 1, "two images": 2}.get(kind, 300)
    logits, labels = generator.normal(size=(n, C)), generator.integers(0, C, n)
    logits[np.arange(n), labels] += 1
    if kind == "absent":  # one class of no image, another of no image and no prediction
        labels[np.isin(labels, (1, 3))] = 2
        logits[:, 3] = -9
    if kind == "ties":
        logits = logits.round()
        logits[:20] = 0
    if kind == "one class":
        labels[:] = 2
    return logits.astype(np.float32), labels


KINDS = ["random", "absent", "ties", "one class", "one image", "two images"]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_figures_of_classes_are_those_of_scikit_learn(kind):
    logits, labels = drawn(kind)
    predicted = logits.argmax(axis=1)
    found = multiclass_figures(*map(torch.from_numpy, (predicted, logits, labels)), C)
    probabilities = torch.from_numpy(logits).double().softmax(dim=1).numpy()
    auroc, ap = rankings(np.eye(C)[labels], probabilities)
    expected = {
        "balanced_acc": metrics.balanced_accuracy_score(labels, predicted),
        "f1": metrics.f1_score(labels, predicted, average="macro"),
        "kappa": metrics.cohen_kappa_score(labels, predicted, labels=range(C)),
        "kappa_quadratic": metrics.cohen_kappa_score(
            labels, predicted, labels=range(C), weights="quadratic"
        ),
        "auroc": mean_of(auroc),
        "ap": mean_of(ap),
    }
    assert found.scalars == {name: exactly(value) for name, value in expected.items()}
    assert found.per_class == {"auroc": list(map(exactly, auroc)), "ap": list(map(exactly, ap))}
    confusion = metrics.confusion_matrix(labels, predicted, labels=range(C))
    assert found.confusion == confusion.tolist()
    if kind == "random":
        whole = metrics.roc_auc_score(labels, probabilities, multi_class="ovr")
        assert found.scalars["auroc"] == exactly(whole)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_figures_of_labels_are_those_of_scikit_learn(kind):
    logits, classes = drawn(kind)
    labels = np.eye(C, dtype=np.int64)[classes] | np.eye(C, dtype=np.int64)[(classes + 1) % C]
    if kind == "one class":
        labels[:, 4], logits[:, 4] = 0, -9  # a label of no image and no prediction
    found = multilabel_figures(torch.from_numpy(logits), torch.from_numpy(labels))
    scores = torch.from_numpy(logits).double().sigmoid().numpy()
    for name, expected in zip(("auroc", "ap"), rankings(labels, scores), strict=True):
        assert found.per_class[name] == list(map(exactly, expected))
        title = "map" if name == "ap" else name
        assert found.scalars[title] == exactly(mean_of(expected))
    options = {"average": "macro", "zero_division": np.nan}
    assert found.scalars["f1"] == exactly(metrics.f1_score(labels, logits > 0, **options))
    assert found.confusion is None


@pytest.mark.parametrize(
    ("offset", "outputs", "unit"), [(0.0, 1, 1.0), (1e4, 1, 1.0), (-3.0, 3, 1.0), (2.0, 2, 1e-5)]
)
def test_errors_of_numbers_are_those_of_scikit_learn(offset, outputs, unit):
    generator = np.random.default_rng(1)
    targets = (unit * (offset + generator.normal(size=(200, outputs)))).astype(np.float32)
    predicted = targets.astype(np.float64) + unit * generator.normal(size=(200, outputs)) / 2
    found = regression_figures(torch.from_numpy(predicted), torch.from_numpy(targets))
    truth = targets.astype(np.float64)
    assert found.scalars == {
        "mae": exactly(metrics.mean_absolute_error(truth, predicted)),
        "rmse": exactly(metrics.root_mean_squared_error(truth, predicted)),
        "r2": exactly(metrics.r2_score(truth, predicted)),
    }
    each = metrics.r2_score(truth, predicted, multioutput="raw_values")
    assert found.per_class["r2"] == list(map(exactly, each))


def test_what_is_not_defined_is_no_number_and_never_the_best():
    one = regression_figures(torch.tensor([[2.0]]), torch.tensor([[3.0]]))
    assert one.scalars == {"mae": 1.0, "rmse": 1.0, "r2": exactly(math.nan)}
    torn = regression_figures(torch.tensor([[2.0], [math.inf]]), torch.tensor([[3.0], [4.0]]))
    assert all(math.isnan(value) for value in torn.scalars.values())
    logits, labels = (torch.from_numpy(of) for of in drawn("random"))
    logits[0, 0] = math.nan
    predicted = logits.argmax(dim=1)
    predicted[0] = C  # no class
    found = multiclass_figures(predicted, logits, labels, C)
    assert math.isnan(found.scalars["auroc"]) and math.isnan(found.scalars["ap"])
    recall = [(predicted[labels == c] == c).double().mean().item() for c in range(C)]
    assert found.scalars["balanced_acc"] == exactly(sum(recall) / C)
    assert sum(map(sum, found.confusion)) == 299
    assert torch.get_default_dtype() == torch.float32
    for metric, good, bad in (("acc1", 2.0, 1.0), ("rmse", 1.0, 2.0)):
        assert merit(metric, good) > merit(metric, bad) > merit(metric, math.nan)
