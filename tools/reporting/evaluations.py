"""What a page says about an evaluation: from results.json or eval.json, from the predictions beside
it, and from the same files of the untrained model where its folder lies beside.

Shapes: `n` images, `C` classes.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from markupsafe import Markup
from PIL import Image
from pydantic import ValidationError

from data.images import BadImageError
from engine.evaluation.classification import percent_by_class
from engine.evaluation.predictions import PredictionsFile, load_predictions, open_predicted_images
from engine.pictures.drawing import to_picture
from engine.run.folder import EVAL_PREDICTIONS_FILE, PREDICTIONS_FILE
from engine.run.records import read_results
from tools.reporting.charts import lines, reliability
from tools.reporting.runs import NAMES, RESULTS, contents
from util.errors import InputError
from util.files import printable
from util.settings.evaluation import METRICS

PREDICTIONS = dict(zip(RESULTS, (PREDICTIONS_FILE, EVAL_PREDICTIONS_FILE), strict=True))
UNTRAINED = "_untrained"  # ending of the folder of the same evaluation of an untrained model
PER_CLASS = "per_class"  # beginning of keys in results.json
FIGURES = (*dict.fromkeys(name for names in METRICS.values() for name in names), "loss")
UNBOUNDED = ("mae", "rmse", "r2")  # have no bar
LAYERS = "block after which the features are read, from 0"
BINS = 15  # of the calibration, of equal width, as in arXiv 1706.04599
MOST_CELLS, MOST_CLASSES = 20, 1000  # of a confusion matrix on the page, and of one that is counted
MISTAKES, CONFUSIONS = 12, 10  # that are shown
Report = dict[str, object]  # what the template shows, without what an evaluation has not


def reports_of(folder: Path) -> list[Report]:
    """The evaluations that lie in a run's folder."""
    return [report for name in RESULTS if (report := report_of(folder, name))]


def report_of(folder: Path, name: str) -> Report:
    """The evaluation of one file of results; nothing if it is not there."""
    beside = folder.with_name(folder.name + UNTRAINED)
    results, predictions = read_evaluation(folder, name)
    if not results:
        return {}
    other, other_predictions = read_evaluation(beside, name)
    figures, before = figures_of(results), figures_of(other)
    report: Report = {
        "title": str(results.get("protocol", "evaluation")),
        "file": name,
        "untrained": beside.name if other else None,
        "figures": [(words, value, before.get(words)) for words, value in figures.items()],
        "details": {
            key: value
            for key, value in results.items()
            if key not in FIGURES and not isinstance(value, dict | list)
        },
        "charts": charts_of(results, other),
    }
    if predictions is None:
        return report | classes_of(results, other)
    untrained = {} if other_predictions is None else by_class(other_predictions)
    return (
        report
        | classes_of(by_class(predictions), untrained)
        | calibration_of(predictions)
        | mistakes_of(predictions)
    )


def read_evaluation(folder: Path, name: str) -> tuple[dict, PredictionsFile | None]:
    """Results and what was said of each image, {} and None for what there is not, and with a line
    for what is damaged."""
    results = contents(read_results, folder / name, dict) if (folder / name).exists() else {}
    predictions = folder / PREDICTIONS[name]
    # results of another task leave an earlier file of predictions as it is
    if "acc1" not in results or not predictions.exists():
        return results, None
    try:
        return results, load_predictions(predictions)
    except InputError as error:
        print(f"skipped {printable(str(error))}")
        return results, None


def figures_of(results: Mapping) -> dict[str, float | None]:
    """The figures by their names on the page, those of k-NN for each k."""
    return {NAMES.get(key, key): results[key] for key in FIGURES if key in results} | {
        f"{NAMES[key]}, k = {k}": value
        for key in ("acc1", "miou")
        for k, value in results.get(f"{key}_by_k", {}).items()
    }


def charts_of(results: Mapping, other: Mapping) -> list[Markup]:
    """Curves over learning rates or C, and over layers."""
    found = []
    curve = results.get("curve", [])
    if len(curve) > 1:
        x, *names = curve[0]
        words = {"lr": "learning rate per 256 images", "c": "C, inverse L2 penalty"}[x]
        curves = {
            name.replace("held_out_", "held-out, ").replace("val_", "validation, "): [
                (point[x], point[name]) for point in curve if point[name] is not None
            ]
            for name in names
        }
        found.append(lines("Which probe is best", curves, words, log_x=True))
    layers = {
        model: [(row["layer"], row["acc1"]) for row in of_one.get("layers", [])]
        for model, of_one in {"this model": results, "untrained": other}.items()
    }
    if layers["this model"]:
        found.append(lines("top-1 % over layers", layers, LAYERS))
    return found


def classes_of(results: Mapping, other: Mapping) -> Report:
    """The figures of each class, the worst first, and what is confused, as far as there are
    any."""
    per_class = {k: v for k, v in results.items() if k.startswith(PER_CLASS) and v}
    if not per_class:
        return {}
    (key, first), *_ = per_class.items()
    figures = [name.removeprefix(PER_CLASS).removeprefix("_") or "acc1" for name in per_class]
    names, has_bar = [*first], figures[0] not in UNBOUNDED
    columns = [NAMES.get(figure, figure) for figure in figures]
    scale = 1 if "%" in columns[0] else 100  # of a bar in percent
    before = other.get(key) or {}
    confusion = np.array(results.get("confusion", []), dtype=np.int64)  # (C, C), or empty
    counts = results.get("totals", confusion.reshape(-1, len(names)).sum(axis=1).tolist())
    totals = dict(zip(names, counts, strict=False))
    rows = [
        (
            name,
            totals.get(name),
            [of_classes[name] for of_classes in per_class.values()],
            *(
                scale * of_one[name] if has_bar and of_one.get(name) is not None else None
                for of_one in (first, before)
            ),
        )
        for name in names
    ]
    rows.sort(key=lambda row: (row[3] is None, row[3]))
    report: Report = {
        "columns": columns,
        "classes": rows,
        "names": names,
        "has_bar": has_bar,
        "unit": "pixels" if "miou" in results else "images",
    }
    if 0 < len(confusion) <= MOST_CELLS:
        report["cells"] = confusion.tolist()
    if len(confusion):
        beside = confusion - np.diag(np.diag(confusion))
        largest = np.argsort(-beside, axis=None, kind="stable")[:CONFUSIONS].tolist()
        report["confusions"] = [
            (*(names[part] for part in divmod(place, len(names))), int(beside.flat[place]))
            for place in largest
            if beside.flat[place]
        ]
    return report


def by_class(predictions: PredictionsFile) -> dict[str, object]:
    """As results.json has them: of each class the percentage of its images that are right, None
    without an image; the number of its images; and unless there are too many classes, the confusion
    matrix."""
    names, labels, chosen = predictions.class_names, predictions.labels, predictions.classes[:, 0]
    totals = np.bincount(labels, minlength=len(names)).tolist()
    right = np.bincount(labels[chosen == labels], minlength=len(names)).tolist()
    found: dict[str, object] = {PER_CLASS: percent_by_class(names, right, totals)}
    found["totals"] = totals
    if len(names) <= MOST_CLASSES:
        counts = np.zeros((len(names), len(names) + 1), dtype=np.int64)
        np.add.at(counts, (labels, chosen), 1)
        found["confusion"] = counts[:, :-1]
    return found


def calibration_of(predictions: PredictionsFile) -> Report:
    """The expected calibration error in percent (arXiv 1706.04599, equation 3): the mean over the
    images of how far accuracy and mean confidence of their bin differ. BINS bins of equal width
    hold their upper ends."""
    confidence = predictions.probabilities[:, 0].astype(np.float64)
    is_right = predictions.classes[:, 0] == predictions.labels
    places = (np.ceil(confidence * BINS).clip(1, BINS) - 1).astype(np.int64)
    counts = np.bincount(places, minlength=BINS)
    sums = [np.bincount(places, values, minlength=BINS) for values in (confidence, is_right)]
    error = 100 * np.abs(sums[1] - sums[0]).sum() / len(confidence)
    accuracy = 100 * sums[1] / np.maximum(1, counts)
    return {"error": error, "calibration": reliability(accuracy, 100 * counts / counts.sum())}


def mistakes_of(predictions: PredictionsFile) -> Report:
    """The most confident mistakes: picture, name, true class, predicted class and confidence in
    percent; or why there are no pictures."""
    names, chosen = predictions.class_names, predictions.classes[:, 0]
    wrong = np.flatnonzero(chosen != predictions.labels)
    named = wrong[chosen[wrong] < len(names)]
    first = named[np.argsort(-predictions.probabilities[named, 0], kind="stable")][:MISTAKES]
    report: Report = {"num_wrong": len(wrong), "mistakes": [], "missing": ""}
    try:
        source = open_predicted_images(predictions.settings, predictions.names)
        report["mistakes"] = [
            (
                Image.fromarray(to_picture(source.read(place).float() / 255)),
                predictions.names[place],
                names[predictions.labels[place]],
                names[chosen[place]],
                100 * float(predictions.probabilities[place, 0]),
            )
            for place in first.tolist()
        ]
    except (InputError, BadImageError, OSError, ValidationError) as error:
        report["missing"] = f"Their pictures are not there: {str(error).splitlines()[0]}."
    return report
