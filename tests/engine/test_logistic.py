"""Logistic regression by L-BFGS against scikit-learn: the fit alone, and the stage with
`optimizer: lbfgs`, in one process and in two."""

from pathlib import Path

import numpy as np
import pytest
import torch
from compare import assert_same_run
from runs import Cut, changed_files, files_of, launch, normalised, pictures, results_of
from safetensors.torch import load_file

import hubconf
import main_finetune
import main_lincls
from data.labels import strata
from engine.evaluation import logistic
from engine.evaluation.logistic import fit_logistic
from engine.tasks.linear import hold_out
from models.vit import VisionTransformer

linear_model = pytest.importorskip("sklearn.linear_model")
CS = (0.001, 0.01, 100.0)  # the last one fits noise


def regression(c: float, balanced: bool = False):
    """scikit-learn's, to the last digits."""
    weights = "balanced" if balanced else None
    return linear_model.LogisticRegression(C=c, tol=1e-10, max_iter=10_000, class_weight=weights)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("c", [0.01, 1.0])
def test_the_fit_is_that_of_scikit_learn(monkeypatch, c, balanced):
    """Of noise, where the penalty decides much, in classes of unlike sizes; and the same in
    chunks."""
    chance = np.random.default_rng(0)
    inputs = chance.normal(size=(300, 12))
    labels = np.minimum(chance.integers(0, 9, 300), 4)  # of the last one are five ninths
    counts = np.bincount(labels)
    weights = torch.from_numpy(300 / (5 * counts)) if balanced else None
    rows, own = torch.from_numpy(inputs), torch.from_numpy(labels)
    more = {"max_iter": 1000, "dtype": torch.float64, "class_weights": weights}
    weight, bias, steps = fit_logistic(rows, own, 5, 1 / (c * 300), **more)
    expected = regression(c, balanced).fit(inputs, labels)
    np.testing.assert_allclose(weight.numpy(), expected.coef_, rtol=0, atol=2e-6)
    shift = bias.numpy() - expected.intercept_  # the same number for all classes changes nothing
    np.testing.assert_allclose(shift - shift.mean(), 0, rtol=0, atol=2e-6)
    assert abs(expected.coef_).max() > 0.02 and 3 < steps < 1000
    monkeypatch.setattr(logistic, "ROWS", 7)
    again = fit_logistic(rows, own, 5, 1 / (c * 300), **more)
    torch.testing.assert_close(again[0], weight, rtol=0, atol=1e-6)


# --- the stage


def fitted(data: Path, output: Path, weights: object, *more) -> dict:
    more = ["--finetune", weights, "--optimizer", "lbfgs", "--lbfgs_c", *CS, *more]
    return main_lincls.main(pictures(data, output, *more))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data, weights):
    """Folder and results of a run, with a recipe's settings of a schedule, which do not matter; and
    how many images the backbone saw."""
    folder, seen = tmp_path_factory.mktemp("finished"), []
    original = VisionTransformer.forward_features

    def watched(self, images, maps=None):
        seen.append(len(images))
        return original(self, images, maps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VisionTransformer, "forward_features", watched)
        schedule = ["--lr", 0.1, 3, "--epochs", 90, "--warmup_epochs", 10, "--crop_min", 0.1]
        results = fitted(data, folder, weights, *schedule)
    return folder, results, seen


def test_the_stage_is_that_of_scikit_learn_on_images_seen_once(data, weights, finished):
    """Each C on nine tenths, judged on the tenth; then the best on all images, whose file is it."""
    folder, results, seen = finished
    assert sum(seen) == 120 + 60  # without augmentation
    images = {split: normalised(data / split) for split in ("train", "val")}
    model = hubconf.encoder(str(weights))
    with torch.no_grad():
        tokens = {s: model.norm([*model.iterate_tokens(x)][-1]) for s, x in images.items()}
    features = {s: x[:, 1:].mean(dim=1).double().numpy() for s, x in tokens.items()}
    labels = {s: np.repeat(np.arange(3), len(of) // 3) for s, of in features.items()}

    def fit(c: float, rows: np.ndarray):
        some = features["train"][rows]
        mean, std = some.mean(axis=0), np.sqrt(some.var(axis=0) + 1e-6)
        found = regression(c).fit((some - mean) / std, labels["train"][rows])
        return found, lambda x: (x - mean) / std, std

    train, held_out = hold_out(strata(labels["train"]), 0)
    curve = []
    for c in CS:
        found, standardised, _ = fit(c, train)
        right = found.predict(standardised(features["train"][held_out]))
        accuracy = 100 * (right == labels["train"][held_out]).mean()
        curve.append({"c": c, "held_out_acc1": pytest.approx(accuracy)})
    assert results["curve"] == curve and results["num_held_out"] == 12
    accuracies = [point["held_out_acc1"] for point in results["curve"]]
    assert results["c"] == CS[int(np.argmax(accuracies))] and len({*accuracies}) > 1
    best, standardised, std = fit(results["c"], np.arange(120))
    predicted = best.predict(standardised(features["val"]))
    assert results["correct1"] == (predicted == labels["val"]).sum() > 30
    written = load_file(folder / "model.safetensors")["head.weight"].double().numpy()
    np.testing.assert_allclose(written * std, best.coef_, rtol=0, atol=2e-4)
    assert results["protocol"].startswith("logistic regression") and "lr" not in results
    assert results["num_train"] == 120 and results_of(folder) == results


def test_the_written_classifier_is_the_one_that_was_scored(tmp_path, data, weights, finished):
    folder, results, _ = finished
    arguments = ["--eval", "--finetune", folder / "model.safetensors"]
    found = main_finetune.main(pictures(data, tmp_path, *arguments))
    assert found["correct1"] == results["correct1"]
    assert found["loss"] == pytest.approx(results["loss"], rel=1e-5)
    before = files_of(folder)
    assert fitted(data, folder, weights) == results  # of other settings of a schedule
    assert changed_files(folder, before) <= {"log.txt", ".lock"}


def test_a_fit_that_was_cut_before_its_results_is_done_again(
    tmp_path, data, weights, finished, monkeypatch
):
    def cut(*_: object) -> None:
        raise Cut

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(main_lincls, "evaluate_epoch", cut)
        fitted(data, tmp_path, weights)
    assert fitted(data, tmp_path, weights) == finished[1]
    assert_same_run(tmp_path, finished[0])


def test_neither_batch_nor_schedule_matters_to_a_run_that_goes_on(
    tmp_path, data, weights, finished
):
    folder, results, _ = finished
    for size in (7, 500):
        assert fitted(data, folder, weights, "--batch_size", size, "--lr", 3) == results


def test_one_c_and_few_images(tmp_path, data, weights):
    """Fewer than in a batch, all of which are fitted; classes are weighed if that is asked for."""
    more = ["--lbfgs_c", 0.1, "--batch_size", 500]
    results = fitted(data, tmp_path / "few", weights, *more, "--subset", 30)
    assert (results["num_train"], results["num_held_out"], results["curve"]) == (30, 0, [])
    assert results["acc1"] > 50  # 33.3 is chance
    inner = fitted(data, tmp_path / "inner", weights, *more, "--layer", 0, "--last_norm", "false")
    assert inner["loss"] != results["loss"]
    names = load_file(tmp_path / "inner" / "model.safetensors").keys()
    assert not {name for name in names if name.startswith(("blocks.1", "norm."))}


@pytest.mark.long
def test_two_processes_fit_the_same(tmp_path, data, weights, finished):
    more = ["--finetune", weights, "--optimizer", "lbfgs", "--lbfgs_c", *CS]
    found = launch(pictures(data, tmp_path, *more), 2, "run_lincls.sh")
    assert found.returncode == 0, found.stderr
    results = results_of(tmp_path)
    assert results["correct1"] == finished[1]["correct1"] and results["c"] == finished[1]["c"]
    assert results["curve"] == finished[1]["curve"]
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path, finished[0]))
    for name in ("head.weight", "head.bias"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
