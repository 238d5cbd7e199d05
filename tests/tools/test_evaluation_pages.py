"""Pages of `tools/plot_run.py` about evaluations, and the slider of the page about pretraining."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import log_lines, pictures, pretrain_pictures, results_of
from sklearn.metrics import confusion_matrix

import main_finetune
import main_knn
from engine.evaluation.classification import Scores
from engine.evaluation.features import Predictions
from engine.evaluation.metrics import Figures, segmentation_figures
from engine.evaluation.predictions import load_predictions, save_predictions
from engine.pictures.drawing import write_png
from engine.pictures.history import keep_picture
from tools import plot_run
from tools.reporting import evaluations
from util.errors import InputError
from util.settings.evaluation import KnnConfig

LIMIT = 5e6  # bytes of a page


def page_of(folder: Path) -> str:
    return plot_run.main([str(folder)])["reports"][0].read_text()


def write_predictions(folder: Path, count: int, num_classes: int, seed: int = 0) -> None:
    """An evaluation whose predictions were drawn, some of no class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % num_classes
    classes = np.argsort(rng.random((count, num_classes)), axis=1)[:, :5]
    classes[: count // 2, 0] = labels[: count // 2]
    probabilities = np.sort(rng.dirichlet(np.ones(5), count).astype(np.float32))[:, ::-1].copy()
    classes[-3:], probabilities[-3:] = num_classes, 0
    arrays = (labels, classes, probabilities, probabilities[:, 0])
    predictions = Predictions(*map(torch.from_numpy, arrays))
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"class {label}" for label in range(num_classes)]
    save_predictions(folder / "predictions.npz", predictions, names, KnnConfig(), None)
    results = {"protocol": "k-NN", "acc1": 50.0, "acc1_by_k": {"5": 50.0}}
    (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def output(tmp_path_factory, data) -> Path:
    """Pretraining with pictures over time, k-NN and fine-tuning, each untrained as well."""
    folder = tmp_path_factory.mktemp("pages") / "output"
    more = ["--monitor_epochs", 1, "--monitor_images", 2]
    weights = pretrain_pictures(data, folder / "pretrain", *more) / "model.safetensors"
    for name, given in (("knn", weights), ("knn_untrained", "random")):
        more = ["--finetune", given, "--ks", 5, 20, "--layer", 0, 1]
        main_knn.main(pictures(data, folder / name, *more, training=False))
    for name, more in (("finetune", ["--finetune", weights]), ("finetune_untrained", [])):
        main_finetune.main(pictures(data, folder / name, *more, "--epochs", 1))
    return folder


def test_figures_of_predictions_equal_plain_numpy(tmp_path):
    write_predictions(tmp_path / "run", 203, 7)
    predictions = load_predictions(tmp_path / "run" / "predictions.npz")
    labels, chosen, confidence = (
        predictions.labels,
        predictions.classes[:, 0],
        predictions.probabilities[:, 0],
    )
    (report,) = evaluations.reports_of(tmp_path / "run")
    expected = confusion_matrix(labels, chosen, labels=range(8))[:7, :7]
    assert report["cells"] == expected.tolist() and expected.sum() == 200
    right = {name: [] for name in predictions.class_names}
    for label, predicted in zip(labels, chosen, strict=True):
        right[f"class {label}"].append(label == predicted)
    found = {name: (total, values, bar) for name, total, values, bar, _ in report["classes"]}
    for name, of_class in right.items():
        assert found[name][1] == [pytest.approx(100 * np.mean(of_class))]
        assert found[name][2] == found[name][1][0]
    assert [row[3] for row in report["classes"]] == sorted(row[3] for row in report["classes"])
    error = 0.0
    for place in range(15):  # bins hold their upper ends, the first one 0 as well
        low, high = place / 15, (place + 1) / 15
        inside = (confidence > low) & (confidence <= high) | (place == 0) & (confidence == 0)
        if inside.any():
            gap = abs((chosen == labels)[inside].mean() - confidence[inside].mean())
            error += inside.mean() * gap
    assert report["error"] == pytest.approx(100 * error, abs=1e-4)
    (truth, predicted, count), *_ = report["confusions"]
    beside = expected * (1 - np.eye(7, dtype=int))
    assert count == beside.max()
    assert beside[int(truth.split()[1]), int(predicted.split()[1])] == count


def test_counts_of_classes_are_those_of_their_images(tmp_path):
    write_predictions(tmp_path / "run", 203, 7)
    labels = load_predictions(tmp_path / "run" / "predictions.npz").labels
    (report,) = evaluations.reports_of(tmp_path / "run")
    totals = {name: total for name, total, *_ in report["classes"]}
    assert totals == {f"class {label}": n for label, n in enumerate(np.bincount(labels))}


def test_pages_of_evaluations_stand_beside_the_untrained_model(output):
    found = plot_run.main([str(output)])
    names = [path.parent.name for path in found["reports"]]
    assert names == ["finetune", "finetune_untrained", "knn", "knn_untrained", "pretrain"]
    for name in ("knn", "finetune"):
        page = (output / name / "report.html").read_text()
        ours, theirs = (results_of(output / of)["acc1"] for of in (name, f"{name}_untrained"))
        cells = [f"{value:.2f}" for value in (ours, theirs)] + [f"{ours - theirs:+.2f}"]
        row = "top-1 %</td>" + "".join(f'<td class="number">{cell}</td>' for cell in cells)
        assert row in page and ("top-1 %, k = 20</td>" in page) == (name == "knn")
        assert page.count("<li><img") == min(12, 60 - results_of(output / name)["correct1"])
        assert len(page) < LIMIT and "Their pictures are not there" not in page
    (report,) = evaluations.reports_of(output / "knn")
    before = load_predictions(output / "knn_untrained" / "predictions.npz")
    for name, _, _, _, untrained in report["classes"]:
        is_class = before.labels == before.class_names.index(name)
        right = before.classes[is_class, 0] == before.labels[is_class]
        assert untrained == pytest.approx(100 * right.mean())
    assert "No untrained model" in (output / "knn_untrained" / "report.html").read_text()


def test_the_most_confident_mistakes_come_first(output):
    predictions = load_predictions(output / "knn" / "predictions.npz")
    (report,) = evaluations.reports_of(output / "knn")
    wrong = predictions.classes[:, 0] != predictions.labels
    expected = sorted(predictions.probabilities[wrong, 0].tolist(), reverse=True)[:12]
    assert [row[-1] / 100 for row in report["mistakes"]] == pytest.approx(expected)
    for _, name, truth, predicted, _ in report["mistakes"]:
        place = predictions.names.index(name)
        assert name.startswith(f"val/{truth}/") and truth != predicted
        assert predictions.class_names[predictions.classes[place, 0]] == predicted


def test_without_images_or_predictions_the_page_says_so(tmp_path, data, weights, capsys):
    own = Path(shutil.copytree(data, tmp_path / "own"))
    more = ["--finetune", weights, "--ks", 5]
    main_knn.main(pictures(own, tmp_path / "run", *more, training=False))
    assert "<li><img" in page_of(tmp_path / "run")
    own.rename(tmp_path / "elsewhere")
    page = page_of(tmp_path / "run")
    assert "<li><img" not in page and "Their pictures are not there: data_path" in page
    (tmp_path / "run" / "predictions.npz").write_bytes(b"PK")
    assert "Their pictures" not in page_of(tmp_path / "run")
    assert "/run/predictions.npz holds no complete predictions of a run" in capsys.readouterr().out


def test_predictions_of_an_earlier_task_do_not_count(tmp_path):
    """A later evaluation in the same folder may leave none, as that of pixels."""
    write_predictions(tmp_path / "run", 203, 7)
    results = {"protocol": "k-NN of patches", "miou": 50.0}
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    (report,) = evaluations.reports_of(tmp_path / "run")
    assert report["figures"] == [("mean IoU, %", 50.0, None)] and "error" not in report


def test_mistakes_of_deep_images_have_pictures(tmp_path, monkeypatch):
    """Whose pixels are floats up to 255."""
    image = torch.tensor([0.0, 100.2, 255.0]).view(1, 1, 3)
    write_predictions(tmp_path / "run", 203, 7)
    predictions = load_predictions(tmp_path / "run" / "predictions.npz")._replace(names=["x"] * 203)
    source = SimpleNamespace(read=lambda place: image)
    monkeypatch.setattr(evaluations, "open_predicted_images", lambda settings, names: source)
    (picture, *_), *_ = evaluations.mistakes_of(predictions)["mistakes"]
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 100, 255]


def test_many_classes_stay_small(tmp_path):
    write_predictions(tmp_path / "run", 50_000, 1000)
    page = page_of(tmp_path / "run")
    assert len(page) < LIMIT and "What is confused most often" in page
    assert page.count('<span class="bar">') == 1000 and "without the images at hand" in page


def test_of_many_pictures_over_time_the_page_has_a_few(tmp_path):
    for step in range(40):
        keep_picture(tmp_path, np.zeros((4, 4, 3), np.uint8), step)
    found = plot_run.history_of(plot_run.RunLog(tmp_path, "run", [{"step": 39, "epoch": 3.0}]))
    assert len(found) == 30 and (found[0][0], found[-1][0]) == ("step 0", "epoch 3")


def test_segmentation_and_detection_have_pages(tmp_path):
    counts = torch.tensor([[50, 5, 5, 2], [10, 20, 0, 0], [0, 0, 0, 0]])  # the last is no class
    seg = Scores(9, 0.5, segmentation_figures(counts)).as_dict(["sky", "road", "sea"])
    det = Scores(9, 0.5, Figures({"box_ap": 25.0}, {"box_ap": [30.0, 20.0, float("nan")]}))
    for name, results in (("segment", seg), ("detect", det.as_dict(["cat", "dog", "cow"]))):
        for ending, of_one in (("", results), ("_untrained", results | {"miou": 10.0})):
            folder = tmp_path / (name + ending)
            folder.mkdir()
            text = json.dumps({"protocol": "fine-tuning"} | of_one)
            (folder / "results.json").write_text(text)
        write_png(tmp_path / name / "predictions.png", np.zeros((2, 2, 3), np.uint8))
    page = page_of(tmp_path / "segment")
    iou = 100 * 50 / (62 + 60 - 50)
    assert f'<td>sky</td><td class="number">62</td><td class="number">{iou:.2f}</td>' not in page
    assert f'<td>sky</td><td class="number">60</td><td class="number">{iou:.2f}</td>' in page
    assert "Rows are true classes, columns predicted ones, in pixels." in page
    assert f"{seg['miou'] - 10:+.2f}" in page and 'id="picture-predictions"' in page
    page = page_of(tmp_path / "detect")
    assert '<td>dog</td><td class="number">20.00</td>' in page
    assert '<td>cow</td><td class="number">none</td>' in page and "Confusion matrix" not in page


def test_results_of_others_are_no_runs(tmp_path):
    (tmp_path / "x").mkdir()
    for content in ("[]", "{", '{"acc": 1}'):
        (tmp_path / "x" / "results.json").write_text(content)
        with pytest.raises(InputError, match="holds no run"):
            plot_run.main([str(tmp_path)])


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_pages_on_phone_and_desktop(output, browser, violations, scheme):
    browser.emulate_media(color_scheme=scheme)
    pages = plot_run.main([str(output)])["reports"]
    for page in pages:
        browser.goto(page.as_uri())
        for width in (390, 1100):
            browser.set_viewport_size({"width": width, "height": 900})
            assert browser.evaluate("document.documentElement.scrollWidth") == width
            assert violations() == []
        red = browser.evaluate("getComputedStyle(document.body).backgroundColor").split("(")[1]
        assert (int(red.split(",")[0]) < 60) == (scheme == "dark")
        assert browser.evaluate(
            "[...document.images].every(image => image.hidden || image.naturalWidth > 0)"
        )
    # the last page is that of pretraining
    slider = browser.get_by_label("After")
    visible = browser.locator("#history img:visible")
    epochs = [r["epoch"] for r in log_lines(output / "pretrain") if r["kind"] == "monitor"]
    assert browser.locator("#history img").count() == len(epochs) == 3
    before = visible.get_attribute("src")
    slider.focus()
    browser.keyboard.press("Home")
    assert visible.count() == 1 and visible.get_attribute("src") != before
    assert browser.locator("#said").inner_text() == "epoch 0"
    browser.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "epoch 1"
