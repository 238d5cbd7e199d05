"""Curves of one or several runs in one picture, and a page about each run that opens from disk.

    python tools/plot_run.py output/pretrain/Vit-S_100E_GAP output/pretrain/ViT-B_400E_Norm_GAP

An argument is a run's folder, or any folder above runs. It writes the curves of loss and accuracy
to --save_path (default: curves.png in the folder that the runs have in common), and report.html
into each run's folder: figures, curves, reconstructions with attention, the monitor's figures, the
evaluations of the run's weights that lie in folders beside it, and the settings. The run may still
be training.
"""

import base64
import json
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from engine.pictures.drawing import MARK, MONITOR_PICTURE, check_replaceable
from engine.run.results import read_results
from models.weights.files import weights_digest
from util.errors import InputError, LineParser, run_cli
from util.files import write_output

TEMPLATE = Path(__file__).with_name("report.html.jinja")
ACCURACIES = {  # key in log.jsonl -> legend
    "acc1": "validation",
    "val_acc1": "validation",
    "ema_acc1": "moving average",
    "held_out_acc1": "held out",
    "knn_acc1": "10-NN",
    "probe_acc1": "linear",
}
LOSS = {"loss": "", "val_loss": "validation"}
COMPARED = {"loss": LOSS, "top-1 %": ACCURACIES}
OF_ONE_RUN = COMPARED | {
    "PSNR of reconstructions, dB": {"psnr": ""},
    "learning rate": {"lr": ""},
    "gradient norm": {"grad_norm": ""},
    "images per second": {"images_per_s": ""},
    "share of time waiting for data": {"data_wait": ""},
}
FIGURES = {  # key in log.jsonl -> words at the head of the page
    "epoch_loss": "mean training loss of the last epoch",
    "val_loss": "validation loss",
    "acc1": "top-1 %",
    "val_acc1": "top-1 %",
    "knn_acc1": "10-NN, top-1 %",
    "probe_acc1": "linear, top-1 %",
    "psnr": "PSNR of reconstructions, dB",
}
COLUMNS = 2  # of panels


class RunLog(NamedTuple):
    """A run's folder, its name in pictures, and the records of its log.jsonl."""

    folder: Path
    name: str
    records: list[dict[str, Any]]

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Epochs and values of one key, without values that were not finite."""
        points = [(r["epoch"], r[key]) for r in self.records if r.get(key) is not None]
        return [x for x, _ in points], [y for _, y in points]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Writes the picture and the pages; returns their paths, `curves` and `reports`. Raises:
    InputError."""
    parser = LineParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("runs", metavar="OUTPUT", nargs="+", type=Path, help="a run's folder, or one above runs")
    add("--save_path", type=Path, metavar="PNG", help="file of the curves of all runs")
    args = parser.parse_args(argv)
    found = {folder.resolve(): None for path in args.runs for folder in find_runs(path)}
    common = Path(os.path.commonpath(found))
    runs = [RunLog(run, name_of(run, common), read_log(run / "log.jsonl")) for run in found]
    curves = args.save_path or common / "curves.png"
    reports = [run.folder / "report.html" for run in runs]
    check_replaceable(curves, *reports)
    write(curves, draw(runs, COMPARED))
    print(f"wrote {curves}: {', '.join(run.name for run in runs)}")
    for run, path in zip(runs, reports, strict=True):
        write(path, report(run).encode())
        print(f"wrote {path}")
    return {"curves": curves, "reports": reports}


def find_runs(path: Path) -> list[Path]:
    """The folder itself if it is a run's, else the runs below it. Raises: InputError if there is
    none."""
    if (path / "log.jsonl").is_file():
        return [path]
    found = sorted(log.parent for log in path.rglob("log.jsonl") if log.is_file())
    if not found:
        raise InputError(f"{path} is no run's folder and holds none: there is no log.jsonl")
    return found


def name_of(folder: Path, common: Path) -> str:
    """A run's name in pictures: its path below `common`, or the end of its path if it is alone."""
    return folder.relative_to(common.parent.parent if folder == common else common).as_posix()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl, without a last one that is still being written. Raises:
    InputError."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["step"], record["epoch"]
            found.append(record)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number < len(lines):
                raise InputError(
                    f"{path}, line {number} is no record of a run: {line[:60]!r}"
                ) from error
    if not found:
        raise InputError(f"{path} is empty: the run has not logged anything yet")
    return found


def draw(runs: Sequence[RunLog], panels: dict[str, dict[str, str]]) -> bytes:
    """A PNG of curves over epochs, with a panel for each quantity that a run has logged."""
    present = {
        title: keys
        for title, keys in panels.items()
        if any(run.series(key)[0] for run in runs for key in keys)
    }
    present = present or {"loss": LOSS}  # an empty panel, as there is no curve yet
    rows = -(-len(present) // COLUMNS)
    figure = Figure(figsize=(11, 3.4 * rows))
    figure.set_layout_engine("constrained", h_pad=0.1)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for panel, (title, keys) in zip(axes, present.items(), strict=False):
        for number, run in enumerate(runs):
            for style, (key, words) in enumerate(keys.items()):
                x, y = run.series(key)
                if x:
                    name = f"{run.name} {words}".strip() if len(runs) > 1 else words
                    panel.plot(
                        x,
                        y,
                        label=name or None,
                        color=f"C{number if len(runs) > 1 else style}",
                        linestyle=("-", "--", ":", "-.")[style % 4],
                        marker="." if len(x) < 30 else None,
                    )
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("epoch", fontsize=9)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[1]:
            panel.legend(fontsize=8)
    for unused in axes[len(present) :]:
        unused.remove()
    content = BytesIO()
    figure.savefig(content, format="png", dpi=110, metadata={"Software": MARK})
    return content.getvalue()


def report(run: RunLog) -> str:
    """The page about a run: HTML that loads nothing from elsewhere."""
    picture = run.folder / MONITOR_PICTURE
    settings = run.folder / "config.yaml"
    bad = run.folder / "bad_samples.jsonl"
    values = yaml.safe_load(settings.read_text(encoding="utf-8")) if settings.exists() else {}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        generator=MARK,
        name=run.name,
        step=run.records[-1]["step"],
        epoch=run.records[-1]["epoch"],
        state=state_of(run, values),
        figures={words: y[-1] for key, words in FIGURES.items() if (y := run.series(key)[1])},
        curves=as_url(draw([run], OF_ONE_RUN)),
        pictures=as_url(picture.read_bytes()) if picture.exists() else None,
        monitor=[record for record in run.records if record.get("kind") == "monitor"],
        evaluations=evaluations_of(run.folder),
        settings=values,
        num_bad=len(bad.read_text(encoding="utf-8").splitlines()) if bad.exists() else 0,
    )


def evaluations_of(folder: Path) -> list[tuple[str, ...]]:
    """Rows about the evaluations of a run's final weights, in folders beside it or beside its own
    folder: folder, protocol, top-1 in percent, numbers of images."""
    weights = folder / "model.safetensors"
    if not weights.exists():
        return []
    digest = weights_digest(weights)
    found: list[tuple[str, ...]] = []
    near = [*folder.parent.glob("*/results.json"), *folder.parent.parent.glob("*/*/results.json")]
    for path in sorted({path.resolve() for path in near}):
        try:
            results = read_results(path)
            if results["sha256"] == digest:
                images = f"{results['num_train']:,} / {results['num_samples']:,}"
                name = os.path.relpath(path.parent, folder.parent)
                found.append((name, results["protocol"], f"{results['acc1']:.2f}", images))
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"skipped {path}: it holds no results of an evaluation ({error!r})")
    return found


def state_of(run: RunLog, settings: dict[str, Any]) -> str:
    """Whether a run has ended, and how."""
    epoch, epochs = run.records[-1]["epoch"], settings.get("epochs")
    if not (run.folder / "model.safetensors").exists():
        return "not finished"
    return "finished" if epochs is None or epoch >= epochs else f"stopped, of {epochs} epochs"


def as_url(png: bytes) -> str:
    """A picture inside the page itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def write(path: Path, content: bytes) -> Path:
    """Writes a file. Raises: InputError where that is not possible."""
    return write_output(path, lambda target: target.write_bytes(content))


if __name__ == "__main__":
    run_cli(main)
