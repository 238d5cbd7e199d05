"""What the pages have in common: how runs are found and read, and the words for their figures.

A run is a folder with a log.jsonl or, as after an evaluation, results.json or eval.json alone.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import jinja2
import yaml

from engine.pictures.drawing import MARK
from engine.run.records import read_results
from util.errors import InputError
from util.files import printable

FIGURES = {  # key in log.jsonl and results.json -> words at the head of a page and of a column
    "epoch_loss": "mean training loss",
    "val_loss": "validation loss",
    "acc1": "top-1 %",
    "val_acc1": "top-1 %",
    "knn_acc1": "10-NN, top-1 %",
    "probe_acc1": "linear, top-1 %",
    "psnr": "PSNR of reconstructions, dB",
    "held_out_loss": "held-out loss",
    "effective_rank": "effective rank of the features",
    "dead_share": "dead dimensions of the features, %",
    "map": "mean average precision",
    "val_map": "mean average precision",
    "rmse": "RMSE",
    "val_rmse": "RMSE",
    "miou": "mean IoU, %",
    "val_miou": "mean IoU, %",
    "box_ap": "box AP, %",
    "mask_ap": "mask AP, %",
}
NAMES = FIGURES | {  # also those that only the page about an evaluation shows
    "acc5": "top-5 %",
    "balanced_acc": "balanced accuracy",
    "kappa_quadratic": "kappa, quadratic",
    "auroc": "AUROC",
    "ap": "average precision",
    "f1": "F1",
    "mae": "MAE",
    "r2": "R²",
    "pixel_acc": "pixels right, %",
    "mean_acc": "mean accuracy of classes, %",
    "iou": "IoU, %",
    "acc": "accuracy, %",
    "box_ap50": "box AP at IoU 0.50, %",
    "box_ap75": "box AP at IoU 0.75, %",
    "mask_ap50": "mask AP at IoU 0.50, %",
    "mask_ap75": "mask AP at IoU 0.75, %",
}
RESULTS = ("results.json", "eval.json")
Content = TypeVar("Content", dict, list)


def find_folders(paths: Sequence[Path]) -> dict[Path, frozenset[str]]:
    """The runs' folders among `paths` and below, and the names of the files in each. Raises:
    InputError if there are none."""
    found = {
        Path(folder): frozenset(files)
        for path in paths
        for folder, _, files in os.walk(path.resolve())
        if is_run(Path(folder), files)
    }
    if not found:
        raise InputError(
            f"{' '.join(map(str, paths))} holds no run: no log.jsonl, results.json or eval.json"
        )
    return dict(sorted(found.items()))


def is_run(folder: Path, files: Sequence[str]) -> bool:
    """Whether a run has left its log among the files of the folder, or an evaluation its results,
    which other programs may call alike."""
    return "log.jsonl" in files or any(
        "protocol" in contents(read_results, folder / name, dict)
        for name in RESULTS
        if name in files
    )


def contents(read: Callable[[Path], object], path: Path, kind: type[Content]) -> Content:
    """What `read` finds in a file; nothing, and a line, if it is not of the kind that a run
    writes."""
    try:
        found = read(path)
        if isinstance(found, kind):
            return found
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        pass
    print(f"skipped {printable(str(path))}: it is not what a run writes, or cannot be read")
    return kind()


def number(value: object) -> int | float | None:
    """The value if it is a finite number, as JSON has them, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < 1e308 else None


def render(template: str, **values: object) -> bytes:
    """A page from a template of this folder: HTML that loads nothing from elsewhere."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template(template).render(generator=MARK, **values)
    return page.encode(errors="xmlcharrefreplace")  # names need not be UTF-8
