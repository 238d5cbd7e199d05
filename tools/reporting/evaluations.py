"""What a page says about an evaluation: from results.json or eval.json, from the predictions beside
it, and from the same files of the untrained model where its folder lies beside.

Shapes: `n` images, `C` classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from pydantic import ValidationError

from data.images import BadImageError
from engine.evaluation.guesses import GuessesFile, load_guesses, open_guessed_images
from engine.pictures.drawing import to_picture
from engine.run.folder import EVAL_GUESSES_FILE, GUESSES_FILE
from engine.run.records import read_results
from tools.reporting.charts import lines, matrix, reliability
from util.errors import InputError
from util.settings.evaluation import METRICS

FILES = {"results.json": GUESSES_FILE, "eval.json": EVAL_GUESSES_FILE}
UNTRAINED = "_untrained"  # ending of the folder of the same evaluation of an untrained model
NAMES = {  # figure in results.json -> words, where they are not its own name
    "acc1": "top-1, %",
    "acc5": "top-5, %",
    "balanced_acc": "balanced accuracy",
    "kappa_quadratic": "kappa, quadratic",
    "auroc": "AUROC",
    "ap": "average precision",
    "map": "mean average precision",
    "f1": "F1",
    "mae": "MAE",
    "rmse": "RMSE",
    "r2": "R²",
    "miou": "mean IoU, %",
    "pixel_acc": "pixels right, %",
    "mean_acc": "mean accuracy of classes, %",
    "box_ap": "box AP, %",
    "mask_ap": "mask AP, %",
}
FIGURES = (*dict.fromkeys(name for names in METRICS.values() for name in names), "loss")
BINS = 15  # of the calibration, of equal width, as in arXiv 1706.04599
MOST_CELLS = 20  # classes of a confusion matrix with numbers
MOST_PIXELS = 1000  # classes of one as a picture
MISTAKES, CONFUSIONS = 12, 10  # that are shown
UNITS = {
    "": 100,
    "iou": 100,
    "acc": 100,
    "box_ap": 100,
    "mask_ap": 100,
    "auroc": 1,
    "ap": 1,
    "f1": 1,
}


class ClassRow(NamedTuple):
    """total: images or pixels, None if it is not known. values: of the columns. bar: the first
    value as a percentage of its highest, None without. untrained: likewise, of the other model."""

    name: str
    total: int | None
    values: list[float | None]
    bar: float | None
    untrained: float | None


class Mistake(NamedTuple):
    """A validation image `picture`, uint8 `(H, W, 3)`, whose class was not recognised."""

    picture: np.ndarray
    name: str
    truth: str
    predicted: str
    confidence: float  # %


@dataclass
class Report:
    """One evaluation on a page.

    figures: name, value, and the untrained model's. details: what else results.json says, on a
    line. cells: the confusion matrix, of few classes. confusions: true class, predicted class,
    count. error: expected calibration error in percent.
    """

    title: str
    file: str
    untrained: str | None
    figures: list[tuple[str, float | None, float | None]]
    details: dict[str, object]
    charts: list[Markup]
    columns: list[str] = field(default_factory=list)
    classes: list[ClassRow] = field(default_factory=list)
    unit: str = "images"
    names: list[str] = field(default_factory=list)
    cells: np.ndarray | None = None
    picture: Markup | None = None
    confusions: list[tuple[str, str, int]] = field(default_factory=list)
    calibration: Markup | None = None
    error: float | None = None
    num_wrong: int = 0
    mistakes: list[Mistake] = field(default_factory=list)
    missing: str = ""


def reports_of(folder: Path) -> list[Report]:
    """The evaluations that lie in a run's folder. Raises: InputError if a file is damaged."""
    return [report_of(folder, name) for name in FILES if (folder / name).exists()]


def report_of(folder: Path, name: str) -> Report:
    """The evaluation of one file of results."""
    beside = folder.with_name(folder.name + UNTRAINED)
    results, guesses = read_evaluation(folder, name)
    is_there = (beside / name).exists()
    other, other_guesses = read_evaluation(beside, name) if is_there else ({}, None)
    report = Report(
        title=str(results.get("protocol", "evaluation")),
        file=name,
        untrained=beside.name if other else None,
        figures=[
            (NAMES.get(figure, figure), results[figure], other.get(figure))
            for figure in FIGURES
            if figure in results
        ],
        details={
            key: value
            for key, value in results.items()
            if key not in FIGURES and not isinstance(value, dict | list) or key == "img_size"
        },
        charts=charts_of(results, other),
    )
    if guesses is not None:
        add_guesses(report, guesses, other_guesses)
    else:
        add_classes(report, results, other)
    return report


def read_evaluation(folder: Path, name: str) -> tuple[dict, GuessesFile | None]:
    """Results, and what was said of each image, None if that was not kept. Raises: InputError."""
    try:
        results = read_results(folder / name)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / name} holds no results of an evaluation: {error}") from error
    if not isinstance(results, dict):
        raise InputError(f"{folder / name} holds no results of an evaluation")
    path = folder / FILES[name]
    return results, load_guesses(path) if path.exists() else None


def charts_of(results: Mapping, other: Mapping) -> list[Markup]:
    """Curves over learning rates or C, over layers, and over k."""
    found = []
    curve = results.get("curve", [])
    if len(curve) > 1:
        key = "lr" if "lr" in curve[0] else "c"
        names = {name: name.replace("_", " ") for name in curve[0] if name != key}
        curves = {
            words: [(point[key], point[name]) for point in curve if point[name] is not None]
            for name, words in names.items()
        }
        title = "Figures over learning rates" if key == "lr" else "Figures over C"
        xlabel = "learning rate per 256 images" if key == "lr" else "C, inverse L2 penalty"
        found.append(lines(title, {k: v for k, v in curves.items() if v}, xlabel, log_x=True))
    both = {"this model": results, "untrained": other}
    layers = {
        words: [(row["layer"], row["acc1"]) for row in of_one["layers"]]
        for words, of_one in both.items()
        if of_one.get("layers")
    }
    if "this model" in layers:
        xlabel = "block after which the features are read, from 0"
        found.append(lines("Top-1 % over layers", layers, xlabel))
    for name, words in (("acc1_by_k", "Top-1 %"), ("miou_by_k", "Mean IoU, %")):
        by_k = {
            model: sorted((int(k), value) for k, value in of_one[name].items())
            for model, of_one in both.items()
            if name in of_one
        }
        if len(by_k.get("this model", [])) > 1:
            found.append(lines(f"{words} over k", by_k, "k, number of neighbours", log_x=True))
    return found


def add_classes(report: Report, results: Mapping, other: Mapping) -> None:
    """The figures of each class that results.json has, and its confusion matrix."""
    keys = [key for key in results if key.startswith("per_class")]
    keys = [key for key in keys if isinstance(results[key], dict)]
    confusion = np.array(results.get("confusion", []), dtype=np.int64)
    if keys:
        report.columns = [
            NAMES.get(k.removeprefix("per_class_"), k[10:] or "top-1, %") for k in keys
        ]
        first = results[keys[0]]
        scale = UNITS.get(keys[0][10:])
        totals = confusion.sum(axis=1).tolist() if len(confusion) else [None] * len(first)
        untrained = other.get(keys[0], {})
        report.classes = sorted_rows(
            [
                ClassRow(
                    name,
                    total,
                    [results[key].get(name) for key in keys],
                    percent_of(first[name], scale),
                    percent_of(untrained.get(name), scale),
                )
                for name, total in zip(first, totals, strict=True)
            ]
        )
        report.names = [*first]
    if len(confusion) and report.names:
        report.unit = "pixels" if "miou" in results else "images"
        truths, predicted = np.nonzero(confusion)
        add_confusion(report, truths, predicted, confusion[truths, predicted])


def percent_of(value: float | None, scale: float | None) -> float | None:
    """A figure as a percentage of its highest, None if there is none."""
    return None if value is None or scale is None else 100 * value / scale


def sorted_rows(rows: list[ClassRow]) -> list[ClassRow]:
    """The worst first, those without a figure last."""
    return sorted(rows, key=lambda row: (row.bar is None, row.bar or 0))


def add_guesses(report: Report, guesses: GuessesFile, other: GuessesFile | None) -> None:
    """Accuracies, confusions, calibration and mistakes, from what was said of each image."""
    names, chosen, labels = guesses.class_names, guesses.classes[:, 0], guesses.labels
    report.names, report.columns = names, ["top-1, %"]
    accuracy, totals = class_accuracy(guesses)
    untrained: list[float | None] = [None] * len(names)
    if other is not None and other.class_names == names:
        untrained = class_accuracy(other)[0]
    rows = zip(names, totals, accuracy, untrained, strict=True)
    report.classes = sorted_rows(
        [ClassRow(name, total, [value], value, before) for name, total, value, before in rows]
    )
    named = chosen < len(names)
    pairs, counts = np.unique(
        labels[named].astype(np.int64) * len(names) + chosen[named], return_counts=True
    )
    add_confusion(report, *np.divmod(pairs, len(names)), counts)
    confidence, is_right = guesses.probabilities[:, 0], chosen == labels
    report.error, bins = calibration(confidence, is_right)
    report.calibration = reliability(bins)
    wrong = np.flatnonzero(~is_right & named)
    report.num_wrong = int((~is_right).sum())
    add_mistakes(report, guesses, wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES])


def class_accuracy(guesses: GuessesFile) -> tuple[list[float | None], list[int]]:
    """Of each class the percentage of its images that are right, None without an image, and their
    number."""
    count = len(guesses.class_names)
    totals = np.bincount(guesses.labels, minlength=count).tolist()
    is_right = guesses.classes[:, 0] == guesses.labels
    right = np.bincount(guesses.labels[is_right], minlength=count).tolist()
    return [100 * r / t if t else None for r, t in zip(right, totals, strict=True)], totals


def add_confusion(
    report: Report, truths: np.ndarray, predicted: np.ndarray, counts: np.ndarray
) -> None:
    """The confusion matrix, from the pairs of classes that occur, and its largest entries beside
    the diagonal."""
    size = len(report.names)
    if size <= MOST_PIXELS:
        cells = np.zeros((size, size), dtype=np.int64)
        cells[truths, predicted] = counts
        if size <= MOST_CELLS:
            report.cells = cells
        else:
            report.picture = matrix(cells)
    beside = np.flatnonzero(truths != predicted)
    largest = beside[np.argsort(-counts[beside], kind="stable")][:CONFUSIONS]
    report.confusions = [
        (report.names[truths[i]], report.names[predicted[i]], int(counts[i])) for i in largest
    ]


def calibration(
    confidence: np.ndarray, is_right: np.ndarray
) -> tuple[float, list[tuple[int, float, float]]]:
    """The expected calibration error in percent (arXiv 1706.04599, equation 3): the mean over the
    images of how far accuracy and mean confidence of their bin differ. And the number of images,
    the mean confidence and the accuracy, from 0 to 1, of each of BINS bins, which hold their upper
    ends."""
    places = np.ceil(confidence.astype(np.float64) * BINS).clip(1, BINS) - 1
    bins, error = [], 0.0
    for place in range(BINS):
        inside = places == place
        count = int(inside.sum())
        mean = float(confidence[inside].mean(dtype=np.float64)) if count else 0.0
        accuracy = float(is_right[inside].mean()) if count else 0.0
        bins.append((count, mean, accuracy))
        error += 100 * count / max(1, len(confidence)) * abs(accuracy - mean)
    return error, bins


def add_mistakes(report: Report, guesses: GuessesFile, indices: np.ndarray) -> None:
    """Pictures of some images, or why there are none."""
    if not guesses.names:
        report.missing = "The images were not at hand when saved features were evaluated."
        return
    try:
        source = open_guessed_images(guesses.settings, guesses.names)
        for index in indices.tolist():
            report.mistakes.append(
                Mistake(
                    to_picture(source.read(index)),
                    guesses.names[index],
                    guesses.class_names[guesses.labels[index]],
                    guesses.class_names[guesses.classes[index, 0]],
                    100 * float(guesses.probabilities[index, 0]),
                )
            )
    except (InputError, BadImageError, OSError, KeyError, ValidationError) as error:
        report.missing = f"The pictures are not there any more: {str(error).splitlines()[0]}"
