"""Curves of one or several runs in one picture, and a page about each run that opens from disk.

    python tools/plot_run.py output/pretrain/Vit-S_100E_GAP output/pretrain/ViT-B_400E_Norm_GAP

An argument is a run's folder, or any folder above runs. It writes the curves of loss and accuracy
to --save_path (default: curves.png in the folder that the runs have in common), and report.html
into each run's folder: figures, curves, reconstructions with attention, the monitor's figures, the
evaluations of the run's weights that lie in folders beside it, and the settings. The run may still
be training. Of several runs it also writes compare.html beside the picture of the curves: a table
of the settings that differ and the final figures, and curves; of more than 100 runs, and with
--compare, only that.
"""

import base64
import os
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from engine.pictures.choose import spread
from engine.pictures.drawing import (
    MONITOR_PICTURE,
    PER_CLASS_PICTURE,
    PREDICTIONS_PICTURE,
    check_replaceable,
)
from engine.pictures.history import kept_pictures
from engine.run.records import read_log, read_results
from models.weights.files import weights_digest
from tools.reporting.charts import Curve, lines, picture
from tools.reporting.compare import compare_runs, read_settings
from tools.reporting.evaluations import BINS, LAYERS, reports_of
from tools.reporting.runs import FIGURES, contents, find_folders, number, render
from util.errors import InputError, LineParser, run_cli, where
from util.files import printable, write_output
from util.settings.evaluation import MAIN_METRIC

COMPARED = {  # title of a panel -> key in log.jsonl -> legend
    "loss": {
        "loss": "training",
        "val_loss": "validation",
        "held_out_loss": "held-out",
        "seen_loss": "fixed training images",
    },
    "top-1 %": {
        "acc1": "validation",
        "val_acc1": "validation",
        "ema_acc1": "moving average",
        "held_out_acc1": "held-out",
        "knn_acc1": "10-NN",
        "probe_acc1": "linear",
    },
}
OF_ONE_RUN = COMPARED | {
    "mean average precision": {"map": "", "val_map": "", "held_out_map": "held-out"},
    "RMSE": {"rmse": "", "val_rmse": "", "held_out_rmse": "held-out"},
    "mean IoU, %": {"miou": "", "val_miou": "", "ema_miou": "moving average"},
    "average precision, %": {"box_ap": "boxes", "mask_ap": "masks", "ema_box_ap": "moving average"},
    "PSNR of reconstructions, dB": {"psnr": ""},
    "effective rank of the features": {"effective_rank": ""},
    "dead dimensions of the features, %": {"dead_share": ""},
    "learning rate": {"lr": ""},
    "gradient norm": {"grad_norm": ""},
    "images per second": {"images_per_s": ""},
    "share of time waiting for data": {"data_wait": ""},
    "peak memory, GB": {"memory_gb": ""},
}
PICTURES = {  # file in a run's folder -> title and description
    MONITOR_PICTURE: (
        "Reconstructions and attention rollout",
        "original, masked, prediction, prediction with the visible patches, attention",
    ),
    PREDICTIONS_PICTURE: ("Predictions", "image, truth, prediction"),
    PER_CLASS_PICTURE: ("Figures of each class", "a bar for each class"),
}
MONITORED = {  # key in log.jsonl -> head of a column
    "knn_acc1": "10-NN, top-1 %",
    "probe_acc1": "linear, top-1 %",
    "psnr": "PSNR, dB",
    "held_out_loss": "held-out loss",
    "seen_loss": "loss of training images",
    "effective_rank": "effective rank",
    "dead_share": "dead dimensions, %",
    "monitor_s": "cost, s",
}
MOST_REPORTS = 100  # a page and its pictures take about a second each
SMALL, LONGEST = 160, 2400  # pixels of a mistake's picture, and of any
MOST_PICTURES, MOST_BYTES = 30, 2_400_000  # of the pictures over time
URL = "data:image/webp;base64,"  # beginning of a picture inside the page
# folder, protocol, the main figure and its name, numbers of images, accuracy over layers
Evaluation = tuple[str, str, str, str, list[tuple[int, float]]]


class RunLog(NamedTuple):
    """A run's folder, its name in pictures, and the records of its log.jsonl, none of an evaluation
    without training."""

    folder: Path
    name: str
    records: list[dict[str, Any]]

    def series(self, key: str) -> list[tuple[float, float]]:
        """Epoch and value of each record that has a finite value of this key."""
        return [(r["epoch"], r[key]) for r in self.records if r.get(key) is not None]


def main(argv: Sequence[str] | None = None) -> dict[str, Path | list[Path]]:
    """Writes the picture and the pages; returns their paths, `curves`, `reports` and, of several
    runs, `compare`. Raises: InputError."""
    parser = LineParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "runs", metavar="OUTPUT", nargs="+", type=Path, help="a run's folder, or one above runs"
    )
    parser.add_argument(
        "--save_path",
        type=Path,
        metavar="PNG",
        help="file of the curves of all runs, beside which compare.html is written",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help=f"write compare.html alone, as for more than {MOST_REPORTS} runs",
    )
    args = parser.parse_args(argv)
    folders = find_folders(args.runs)
    common = Path(os.path.commonpath(folders))
    curves = args.save_path or common / "curves.png"
    comparison = curves.parent / "compare.html"
    if args.compare or len(folders) > MOST_REPORTS:
        if not args.compare:
            print(f"{len(folders)} runs: compare.html alone; curves and pages are of fewer runs")
        write_pages({comparison: compare_runs(folders, comparison)})
        return {"compare": comparison}
    above = {common: common.parent.parent}  # a run that has no other beside it, or else common
    runs = [
        RunLog(
            folder,
            folder.relative_to(above.get(folder, common)).as_posix(),
            read_records(folder / "log.jsonl") if "log.jsonl" in files else [],
        )
        for folder, files in folders.items()
    ]
    reports = [run.folder / "report.html" for run in runs]
    made: dict[str, Path | list[Path]] = {"curves": curves, "reports": reports}
    trained = [run for run in runs if run.records]
    pages = {curves: draw(trained)} if trained else {}
    pages |= dict(zip(reports, map(report, runs), strict=True))
    if len(runs) > 1:
        linked = {folder: files | {"report.html"} for folder, files in folders.items()}
        pages[comparison] = compare_runs(linked, comparison)
        made["compare"] = comparison
    write_pages(pages)
    return made


def write_pages(pages: dict[Path, bytes]) -> None:
    """Writes files in place of this tool's own. Raises: InputError if one is somebody else's."""
    check_replaceable(*pages)
    for path, content in pages.items():
        write_output(path, partial(Path.write_bytes, data=content))
        print(f"wrote {printable(str(path))}")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl, without a last one that is still being written. Raises:
    InputError if there are none, or others than a run's."""
    records = contents(read_log, path, list)
    are_of_a_run = (isinstance(r, dict) and {"step", "epoch"} <= r.keys() for r in records)
    if not records or not all(are_of_a_run):
        raise InputError(f"{path} holds no records of a run, or none yet")
    return records


def draw(runs: Sequence[RunLog]) -> bytes:
    """A PNG of the curves of all runs, with a panel for each quantity that one has logged. Of
    several runs each has its colour."""
    panels: dict[str, list[Curve]] = {}
    for title, keys in COMPARED.items():
        for color, run in enumerate(runs):
            for dashes, (key, words) in enumerate(keys.items()):
                if points := run.series(key):
                    curve = (words, points, dashes, dashes)
                    if len(runs) > 1:
                        curve = (f"{printable(run.name)} {words}", points, color, dashes)
                    panels.setdefault(title, []).append(curve)
    return picture(panels or {"loss": []})  # an empty panel if there is no curve yet


def report(run: RunLog) -> bytes:
    """The page about a run."""
    settings = run.folder / "config.yaml"
    bad = run.folder / "bad_samples.jsonl"
    values = contents(read_settings, settings, dict) if settings.exists() else {}
    monitor = [record for record in run.records if record.get("kind") == "monitor"]
    evaluations = evaluations_of(run.folder)
    layers = {name: points for name, *_, points in evaluations if points}
    history = history_of(run)
    return render(
        "report.html.jinja",
        name=run.name,
        state=state_of(run, number(values.get("epochs"))),
        figures={
            words: run.series(key)[-1][1] for key, words in FIGURES.items() if run.series(key)
        },
        reports=reports_of(run.folder),
        bins=BINS,
        as_url=as_url,
        curves=[
            lines(title, curves, "epoch", floor="dead" in title)
            for title, keys in OF_ONE_RUN.items()
            if (
                curves := {words: run.series(key) for key, words in keys.items() if run.series(key)}
            )
        ],
        history=history,
        pictures=[
            (f"picture-{Path(name).stem}", *words, as_url(Image.open(run.folder / name)))
            for name, words in PICTURES.items()
            if (run.folder / name).exists() and not (history and name == MONITOR_PICTURE)
        ],
        monitor=monitor,
        columns={
            key: words
            for key, words in MONITORED.items()
            if any(record.get(key) is not None for record in monitor)
        },
        evaluations=evaluations,
        layers=lines("k-NN, top-1 %", layers, LAYERS) if layers else None,
        settings=values,
        num_bad=len(bad.read_text(encoding="utf-8").splitlines()) if bad.exists() else 0,
    )


def history_of(run: RunLog) -> list[tuple[str, str]]:
    """The pictures of the monitor over time, each with its epoch in words and inside the page; of
    many an evenly spaced choice, so that the page stays small."""
    epochs = {record["step"]: record["epoch"] for record in run.records}
    kept = kept_pictures(run.folder)
    total = sum(path.stat().st_size for path in kept.values())
    most = min(MOST_PICTURES, int(len(kept) * MOST_BYTES / max(total, MOST_BYTES)))
    places = spread(len(kept), max(2, most))
    return [
        (
            f"epoch {epochs[step]:g}" if step in epochs else f"step {step}",
            URL + base64.b64encode(kept[step].read_bytes()).decode(),
        )
        for step in [[*kept][place] for place in places]
    ]


def evaluations_of(folder: Path) -> list[Evaluation]:
    """The evaluations of a run's final weights, in folders beside it or beside its own folder."""
    weights = folder / "model.safetensors"
    if not weights.exists():
        return []
    digest = weights_digest(weights)
    found: list[Evaluation] = []
    near = [*folder.parent.glob("*/results.json"), *folder.parent.parent.glob("*/*/results.json")]
    for path in sorted({path.resolve() for path in near}):
        results = contents(read_results, path, dict)
        figures = [key for key in MAIN_METRIC.values() if number(results.get(key)) is not None]
        if results.get("sha256") != digest or not figures:
            continue
        layers = results.get("layers", [])
        how = where(
            (True, results["protocol"]),
            (layers, f"best of {len(layers)} layers: {results.get('layer')}"),
            (not results.get("last_norm", True), "without the last norm"),
        )
        found.append(
            (
                os.path.relpath(path.parent, folder.parent),
                ", ".join(how),
                f"{results[figures[0]]:.2f} ({FIGURES[figures[0]]})",
                f"{results['num_train']:,} / {results['num_samples']:,}",
                [(of_layer["layer"], of_layer["acc1"]) for of_layer in layers],
            )
        )
    return found


def state_of(run: RunLog, epochs: float | None) -> str:
    """How far a run of so many epochs is, and whether it has ended, and how."""
    if not run.records:
        return "evaluation without training"
    place = f"step {run.records[-1]['step']}, epoch {run.records[-1]['epoch']:.4g}"
    if not (run.folder / "model.safetensors").exists():
        return f"{place}, not finished"
    is_whole = epochs is None or run.records[-1]["epoch"] >= epochs
    return f"{place}, finished" if is_whole else f"{place}, stopped, of {epochs} epochs"


def as_url(picture: Image.Image, longest: int = LONGEST) -> str:
    """A picture inside the page itself, without loss if it is small; not above so many pixels."""
    picture = picture.convert("RGB")
    picture.thumbnail((longest, longest))
    content = BytesIO()
    picture.save(content, format="WEBP", quality=85, lossless=max(picture.size) <= SMALL)
    return URL + base64.b64encode(content.getvalue()).decode()


if __name__ == "__main__":
    run_cli(main)
