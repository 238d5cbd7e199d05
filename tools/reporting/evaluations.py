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
from engine.evaluation.guesses import GuessesFile, load_guesses, open_guessed_images
from engine.pictures.drawing import to_picture
from engine.run.folder import EVAL_GUESSES_FILE, GUESSES_FILE
from engine.run.records import read_results
from tools.reporting.charts import lines, matrix, reliability
from util.errors import InputError
from util.settings.evaluation import METRICS

FILES = {"results.json": GUESSES_FILE, "eval.json": EVAL_GUESSES_FILE}
UNTRAINED = "_untrained"  # ending of the folder of the same evaluation of an untrained model
PER_CLASS = "per_class"  # beginning of keys in results.json
NAMES = {  # figure in results.json -> words, where they are not its own name
    "": "top-1, %",
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
    "iou": "IoU, %",
    "acc": "accuracy, %",
    "box_ap": "box AP, %",
    "box_ap50": "box AP at IoU 0.50, %",
    "box_ap75": "box AP at IoU 0.75, %",
    "mask_ap": "mask AP, %",
    "mask_ap50": "mask AP at IoU 0.50, %",
    "mask_ap75": "mask AP at IoU 0.75, %",
}
FIGURES = (*dict.fromkeys(name for names in METRICS.values() for name in names), "loss")
UNBOUNDED = ("mae", "rmse", "r2")  # have no bar
BINS = 15  # of the calibration, of equal width, as in arXiv 1706.04599
MOST_CELLS, MOST_PIXELS = 20, 1000  # classes of a confusion matrix in numbers, and as a picture
MISTAKES, CONFUSIONS = 12, 10  # that are shown
Report = dict[str, object]  # what the template shows, without what an evaluation has not


def reports_of(folder: Path) -> list[Report]:
    """The evaluations that lie in a run's folder. Raises: InputError if a file is damaged."""
    return [report_of(folder, name) for name in FILES if (folder / name).exists()]


def report_of(folder: Path, name: str) -> Report:
    """The evaluation of one file of results."""
    beside = folder.with_name(folder.name + UNTRAINED)
    results, guesses = read_evaluation(folder, name)
    other, other_guesses = read_evaluation(beside, name)
    figures = [figure for figure in FIGURES if figure in results]
    report: Report = {
        "title": str(results.get("protocol", "evaluation")),
        "file": name,
        "untrained": beside.name if other else None,
        "figures": [(NAMES.get(key, key), results[key], other.get(key)) for key in figures],
        "details": {
            key: value
            for key, value in results.items()
            if key not in FIGURES and not isinstance(value, dict | list)
        },
        "charts": charts_of(results, other),
    }
    if guesses is None:
        return report | classes_of(results, other)
    before = {} if other_guesses is None else by_class(other_guesses)
    return (
        report
        | classes_of(by_class(guesses), before)
        | calibration_of(guesses)
        | mistakes_of(guesses)
    )


def read_evaluation(folder: Path, name: str) -> tuple[dict, GuessesFile | None]:
    """Results and what was said of each image, {} and None for what there is not. Raises:
    InputError."""
    path = folder / FILES[name]
    try:
        results = read_results(folder / name) if (folder / name).exists() else {}
    except ValueError as error:
        raise InputError(f"{folder / name} holds no results of an evaluation: {error}") from error
    return results, load_guesses(path) if results and path.exists() else None


def charts_of(results: Mapping, other: Mapping) -> list[Markup]:
    """Curves over learning rates or C, over layers, and over k."""
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
    both = {"this model": results, "untrained": other}
    layers = {
        model: [(row["layer"], row["acc1"]) for row in of_one["layers"]]
        for model, of_one in both.items()
        if "layers" in of_one
    }
    if "this model" in layers:
        found.append(lines("Top-1 % over layers", layers, "block, counted from 0"))
    for name in ("acc1_by_k", "miou_by_k"):
        by_k = {
            model: sorted((int(k), value) for k, value in of_one.get(name, {}).items())
            for model, of_one in both.items()
        }
        if len(by_k["this model"]) > 1:
            title = f"{NAMES[name.removesuffix('_by_k')]} over k"
            found.append(lines(title, by_k, "k, number of neighbours", log_x=True))
    return found


def classes_of(results: Mapping, other: Mapping) -> Report:
    """The figures of each class, the worst first, and the confusion matrix, as far as there are
    any."""
    per_class = {k: v for k, v in results.items() if k.startswith(PER_CLASS) and v}
    if not per_class:
        return {}
    (key, first), *_ = per_class.items()
    figures = [name.removeprefix(f"{PER_CLASS}_").removeprefix(PER_CLASS) for name in per_class]
    columns = [NAMES.get(figure, figure) for figure in figures]
    scale = 1 if "%" in columns[0] else 100  # of a bar in percent
    before = {} if figures[0] in UNBOUNDED else other.get(key) or {}
    confusion = np.array(results.get("confusion", []), dtype=np.int64)  # (C, C), or empty
    names = [*first]
    counts = results.get("totals", confusion.sum(axis=1).tolist() if len(confusion) else [])
    totals = dict(zip(names, counts, strict=False))
    rows = [
        (
            name,
            totals.get(name),
            [of_classes[name] for of_classes in per_class.values()],
            None if value is None or figures[0] in UNBOUNDED else scale * value,
            None if before.get(name) is None else scale * before[name],
        )
        for name, value in first.items()
    ]
    rows.sort(key=lambda row: (row[3] is None, row[3]))
    report: Report = {"columns": columns, "classes": rows, "names": names}
    report["unit"] = "pixels" if "miou" in results else "images"
    if len(confusion):
        if len(confusion) <= MOST_CELLS:
            report["cells"] = confusion.tolist()
        else:
            report["picture"] = matrix(confusion)
        beside = np.where(np.eye(len(confusion), dtype=bool), 0, confusion).ravel()
        largest = np.argsort(-beside, kind="stable")[:CONFUSIONS]
        report["confusions"] = [
            (*(names[part] for part in divmod(place, len(names))), int(beside[place]))
            for place in largest.tolist()
            if beside[place]
        ]
    return report


def by_class(guesses: GuessesFile) -> dict[str, object]:
    """As results.json has them: of each class the percentage of its images that are right, None
    without an image; the number of its images; and unless there are too many classes, the confusion
    matrix."""
    names, labels, chosen = guesses.class_names, guesses.labels, guesses.classes[:, 0]
    totals = np.bincount(labels, minlength=len(names)).tolist()
    right = np.bincount(labels[chosen == labels], minlength=len(names)).tolist()
    found: dict[str, object] = {PER_CLASS: percent_by_class(names, right, totals)}
    found["totals"] = totals
    if len(names) <= MOST_PIXELS:
        counts = np.zeros((len(names), len(names) + 1), dtype=np.int64)
        np.add.at(counts, (labels, chosen), 1)
        found["confusion"] = counts[:, :-1]
    return found


def calibration_of(guesses: GuessesFile) -> Report:
    """The expected calibration error in percent (arXiv 1706.04599, equation 3): the mean over the
    images of how far accuracy and mean confidence of their bin differ. BINS bins of equal width
    hold their upper ends."""
    confidence = guesses.probabilities[:, 0].astype(np.float64)
    is_right = guesses.classes[:, 0] == guesses.labels
    places = (np.ceil(confidence * BINS).clip(1, BINS) - 1).astype(np.int64)
    counts = np.bincount(places, minlength=BINS)
    sums = [np.bincount(places, values, minlength=BINS) for values in (confidence, is_right)]
    error = 100 * np.abs(sums[1] - sums[0]).sum() / len(confidence)
    accuracy = 100 * sums[1] / np.maximum(1, counts)
    return {"error": error, "calibration": reliability(accuracy, 100 * counts / counts.sum())}


def mistakes_of(guesses: GuessesFile) -> Report:
    """The most confident mistakes: picture, name, true class, predicted class and confidence in
    percent; or why there are no pictures."""
    names, chosen = guesses.class_names, guesses.classes[:, 0]
    wrong = np.flatnonzero(chosen != guesses.labels)
    named = wrong[chosen[wrong] < len(names)]
    first = named[np.argsort(-guesses.probabilities[named, 0], kind="stable")][:MISTAKES]
    report: Report = {"num_wrong": len(wrong), "mistakes": [], "missing": ""}
    try:
        source = open_guessed_images(guesses.settings, guesses.names)
        report["mistakes"] = [
            (
                Image.fromarray(to_picture(source.read(place))),
                guesses.names[place],
                names[guesses.labels[place]],
                names[chosen[place]],
                100 * float(guesses.probabilities[place, 0]),
            )
            for place in first.tolist()
        ]
    except (InputError, BadImageError, OSError, ValidationError) as error:
        report["missing"] = f"Their pictures are not there: {str(error).splitlines()[0]}."
    return report
