"""Curves of one or several runs in one picture, and a page about each run that opens from disk.

    python tools/plot_run.py output/pretrain/Vit-S_100E_GAP output/pretrain/ViT-B_400E_Norm_GAP

An argument is a run's folder, or any folder above runs. It writes the curves of loss and accuracy
to --save_path (default: curves.png in the folder that the runs have in common), and report.html
into each run's folder: figures, curves, reconstructions with attention, the monitor's figures, the
evaluations of the run's weights that lie in folders beside it, and the settings. The run may still
be training. Of several runs it also writes compare.html into the folder that they have in common:
a table of the settings that differ and the final figures, and curves; of more than 100 runs, and
with --compare, only that.
"""

import base64
import os
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml
from matplotlib.figure import Figure
from PIL import Image

from engine.pictures.choose import spread
from engine.pictures.drawing import (
    MARK,
    MONITOR_PICTURE,
    PER_CLASS_PICTURE,
    PREDICTIONS_PICTURE,
    check_replaceable,
)
from engine.pictures.history import kept_pictures
from engine.run.records import read_log, read_results
from models.weights.files import weights_digest
from tools.reporting.charts import lines
from tools.reporting.compare import compare_runs, find_folders
from tools.reporting.evaluations import BINS, FILES, reports_of
from util.errors import InputError, LineParser, run_cli
from util.files import write_output
from util.settings.evaluation import MAIN_METRIC

TEMPLATE = Path(__file__).with_name("reporting") / "report.html.jinja"
ACCURACIES = {  # key in log.jsonl -> legend
    "acc1": "validation",
    "val_acc1": "validation",
    "ema_acc1": "moving average",
    "held_out_acc1": "held-out",
    "knn_acc1": "10-NN",
    "probe_acc1": "linear",
}
LOSS = {
    "loss": "training",
    "val_loss": "validation",
    "held_out_loss": "held-out",
    "seen_loss": "fixed training images",
}
COMPARED = {"loss": LOSS, "top-1 %": ACCURACIES}
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
FIGURES = {  # key in log.jsonl -> words at the head of the page
    "epoch_loss": "mean training loss of the last epoch",
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
COMPARED_FIGURES = FIGURES | {"epoch_loss": "mean training loss"}  # also titles of curves
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
COLUMNS = 2  # of panels
MOST_REPORTS = 100  # a page and its pictures take about a second each
SMALL, LONGEST = 160, 2400  # pixels of a mistake's picture, and of any
MOST_BYTES = 2_400_000  # of the pictures over time
LAYERS = "block after which the features are read, from 0"
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
        "--save_path", type=Path, metavar="PNG", help="file of the curves of all runs"
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help=f"write compare.html alone, as for more than {MOST_REPORTS} runs",
    )
    args = parser.parse_args(argv)
    compared = find_folders(args.runs)
    comparison = Path(os.path.commonpath(compared)) / "compare.html"
    if args.compare or len(compared) > MOST_REPORTS:
        if not args.compare:
            print(f"{len(compared)} runs: compare.html alone; curves and pages are of fewer runs")
        write_pages({comparison: compare_runs(compared, comparison.parent, COMPARED_FIGURES)})
        return {"compare": comparison}
    found = dict.fromkeys(folder.resolve() for path in args.runs for folder in find_runs(path))
    common = Path(os.path.commonpath(found))
    above = {common: common.parent.parent}  # a run that has no other beside it, or else common
    runs = [
        RunLog(
            folder,
            folder.relative_to(above.get(folder, common)).as_posix(),
            read_records(log) if (log := folder / "log.jsonl").exists() else [],
        )
        for folder in found
    ]
    curves = args.save_path or common / "curves.png"
    trained = [run for run in runs if run.records]
    contents = {curves: draw(trained, COMPARED)} if trained else {}
    contents |= {  # names need not be UTF-8
        run.folder / "report.html": report(run).encode(errors="xmlcharrefreplace") for run in runs
    }
    reports = [run.folder / "report.html" for run in runs]
    made: dict[str, Path | list[Path]] = {"curves": curves, "reports": reports}
    if len(compared) > 1:
        for run in runs:
            compared[run.folder] = compared.get(run.folder, frozenset()) | {"report.html"}
        contents[comparison] = compare_runs(compared, comparison.parent, COMPARED_FIGURES)
        made["compare"] = comparison
    write_pages(contents)
    return made


def write_pages(contents: dict[Path, bytes]) -> None:
    """Writes files in place of this tool's own. Raises: InputError if one is somebody else's."""
    check_replaceable(*contents)
    for path, content in contents.items():
        write_output(path, partial(Path.write_bytes, data=content))
        print(f"wrote {path}")


def find_runs(path: Path) -> list[Path]:
    """The folder itself if it is a run's, with or without training, else the runs below it. Raises:
    InputError if there is none."""
    if is_run(path):
        return [path]
    found = sorted(folder for name, *_ in os.walk(path) if is_run(folder := Path(name)))
    if not found:
        raise InputError(
            f"{path} is no run's folder and holds none: there is no log.jsonl or results.json"
        )
    return found


def is_run(folder: Path) -> bool:
    """Whether a run has left its log in the folder, or an evaluation its results."""
    if (folder / "log.jsonl").is_file():
        return True
    for name in filter(lambda name: (folder / name).is_file(), FILES):
        try:
            if "protocol" in read_results(folder / name):
                return True
        except (ValueError, TypeError):
            continue  # a file of others
    return False


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl, without a last one that is still being written. Raises:
    InputError if there are none, or others than a run's."""
    try:
        records = read_log(path)
    except UnicodeDecodeError:
        records = []
    are_of_a_run = (isinstance(r, dict) and {"step", "epoch"} <= r.keys() for r in records)
    if not records or not all(are_of_a_run):
        raise InputError(f"{path} holds no records of a run, or none yet")
    return records


def draw(runs: Sequence[RunLog], panels: dict[str, dict[str, str]]) -> bytes:
    """A PNG of curves over epochs, with a panel for each quantity that a run has logged."""
    present = {
        title: keys
        for title, keys in panels.items()
        if any(run.series(key) for run in runs for key in keys)
    } or {"loss": LOSS}  # an empty panel if there is no curve yet
    rows = -(-len(present) // COLUMNS)
    figure = Figure(figsize=(11, 3.4 * rows))
    figure.set_layout_engine("constrained", h_pad=0.1)
    for place, (title, keys) in enumerate(present.items(), start=1):
        panel = figure.add_subplot(rows, COLUMNS, place)
        for number, run in enumerate(runs):
            for style, (key, words) in enumerate(keys.items()):
                points = run.series(key)
                if points:
                    panel.plot(
                        *zip(*points, strict=True),
                        label=f"{run.name} {words}".strip() if len(runs) > 1 else words,
                        color=f"C{number if len(runs) > 1 else style}",
                        linestyle=("-", "--", ":", "-.")[style % 4],
                        marker="." if len(points) < 30 else None,
                    )
        panel.set(title=title, xlabel="epoch")
        panel.locator_params(axis="x", integer=True)
        if "dead" in title:  # so that a curve of zeros is one
            panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[1]:
            panel.legend(fontsize=8)
    return as_png(figure)


def as_png(figure: Figure) -> bytes:
    """The picture as a file of this tool's."""
    content = BytesIO()
    figure.savefig(content, format="png", dpi=110, metadata={"Software": MARK})
    return content.getvalue()


def report(run: RunLog) -> str:
    """The page about a run: HTML that loads nothing from elsewhere."""
    settings = run.folder / "config.yaml"
    bad = run.folder / "bad_samples.jsonl"
    values = yaml.safe_load(settings.read_text(encoding="utf-8")) if settings.exists() else None
    values = values if isinstance(values, dict) else {}  # the file may be empty
    template = jinja2.Template(
        TEMPLATE.read_text(encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    monitor = [record for record in run.records if record.get("kind") == "monitor"]
    evaluations = evaluations_of(run.folder)
    layers = {name: points for name, *_, points in evaluations if points}
    history = history_of(run)
    return template.render(
        generator=MARK,
        name=run.name,
        state=state_of(run, values.get("epochs")),
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
    places = spread(len(kept), max(2, int(len(kept) * MOST_BYTES / max(total, MOST_BYTES))))
    found = []
    for step in [[*kept][place] for place in places]:
        words = f"epoch {epochs[step]:g}" if step in epochs else f"step {step}"
        content = base64.b64encode(kept[step].read_bytes()).decode()
        found.append((words, f"data:image/webp;base64,{content}"))
    return found


def evaluations_of(folder: Path) -> list[Evaluation]:
    """The evaluations of a run's final weights, in folders beside it or beside its own folder."""
    weights = folder / "model.safetensors"
    if not weights.exists():
        return []
    digest = weights_digest(weights)
    found: list[Evaluation] = []
    near = [*folder.parent.glob("*/results.json"), *folder.parent.parent.glob("*/*/results.json")]
    for path in sorted({path.resolve() for path in near}):
        try:
            results = read_results(path)
            if results["sha256"] == digest:
                key = next((key for key in MAIN_METRIC.values() if key in results), "acc1")
                layers = results.get("layers", [])
                how = results["protocol"]
                if layers:
                    how += f", best of {len(layers)} layers: {results['layer']}"
                if not results.get("last_norm", True):
                    how += ", without the last norm"
                row = (
                    os.path.relpath(path.parent, folder.parent),
                    how,
                    f"{results[key]:.2f} ({FIGURES[key]})",
                    f"{results['num_train']:,} / {results['num_samples']:,}",
                    [(of_layer["layer"], of_layer["acc1"]) for of_layer in layers],
                )
                found.append(row)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"skipped {path}: it holds no results of an evaluation ({error!r})")
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
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


if __name__ == "__main__":
    run_cli(main)
