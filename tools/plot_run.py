"""Curves of one or several runs in one picture, and a page about each run that opens from disk.

    python tools/plot_run.py output/pretrain/Vit-S_100E_GAP output/pretrain/ViT-B_400E_Norm_GAP

An argument is a run's folder, or any folder above runs. Writes curves.png (loss and accuracy, where
--save_path says, else into the folder that the runs have in common) and into each run's folder
report.html: figures, curves, reconstructions with attention, the k-NN while training, evaluations
of its weights that lie beside it, and the settings. It may be called while a run goes on.
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

from engine.pictures.monitor import PICTURE
from engine.run.results import read_results
from models.weights.files import weights_digest
from util.errors import InputError, LineParser, run_cli
from util.files import write_output

TEMPLATE = Path(__file__).with_name("report.html.jinja")
ACCURACIES = {  # in log.jsonl: in words
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
FIGURES = {  # at the head of a page
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
    """A run's folder, what to call it, and the lines of its log.jsonl."""

    folder: Path
    name: str
    lines: list[dict[str, Any]]

    def series(self, fact: str) -> tuple[list[float], list[float]]:
        """Epochs and values of one fact, where it is a number."""
        points = [(line["epoch"], line[fact]) for line in self.lines if line.get(fact) is not None]
        return [x for x, _ in points], [y for _, y in points]

    def last(self, fact: str) -> float | None:
        """The newest value of a fact."""
        values = self.series(fact)[1]
        return values[-1] if values else None


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Writes the picture and the pages; returns their paths, `curves` and `reports`. Raises:
    InputError."""
    parser = LineParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "runs",
        metavar="OUTPUT",
        nargs="+",
        type=Path,
        help="a run's folder, or any folder above runs",
    )
    parser.add_argument(
        "--save_path", type=Path, metavar="PNG", help="where the picture of all runs goes"
    )
    args = parser.parse_args(argv)
    folders = list(
        dict.fromkeys(folder.resolve() for path in args.runs for folder in find_runs(path))
    )
    common = Path(os.path.commonpath(folders))
    runs = [
        RunLog(folder, name_of(folder, common), read_log(folder / "log.jsonl"))
        for folder in folders
    ]
    curves = args.save_path or common / "curves.png"
    write(curves, draw(runs, COMPARED))
    print(f"wrote {curves}: {', '.join(run.name for run in runs)}")
    reports = [write(run.folder / "report.html", report(run).encode()) for run in runs]
    for path in reports:
        print(f"wrote {path}")
    return {"curves": curves, "reports": reports}


def find_runs(path: Path) -> list[Path]:
    """The folder itself where it is a run's, else those of the runs below it. Raises: InputError if
    there is none."""
    if (path / "log.jsonl").is_file():
        return [path]
    found = sorted(log.parent for log in path.rglob("log.jsonl"))
    if not found:
        raise InputError(f"{path} is no run's folder and holds none: there is no log.jsonl")
    return found


def name_of(folder: Path, common: Path) -> str:
    """A run's name in pictures: what differs from the others', or the end of its path where it is
    alone."""
    return folder.relative_to(common.parent.parent if folder == common else common).as_posix()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl; a last one that is still being written is left out. Raises:
    InputError."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            facts = json.loads(line)
            facts["step"], facts["epoch"]
            found.append(facts)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number < len(lines):
                raise InputError(
                    f"{path}, line {number} is no line of a run's log: {line[:60]!r}"
                ) from error
    if not found:
        raise InputError(f"{path} is empty: the run has not logged anything yet")
    return found


def draw(runs: Sequence[RunLog], panels: dict[str, dict[str, str]]) -> bytes:
    """A PNG with a panel for each kind of curve that the runs have, over epochs."""
    present = {
        title: facts
        for title, facts in panels.items()
        if any(run.series(f)[0] for run in runs for f in facts)
    }
    present = present or {"loss": LOSS}  # nothing yet: an empty panel
    rows = -(-len(present) // COLUMNS)
    figure = Figure(figsize=(11, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for panel, (title, facts) in zip(axes, present.items(), strict=False):
        for number, run in enumerate(runs):
            for style, (fact, words) in enumerate(facts.items()):
                x, y = run.series(fact)
                if x:
                    label = " ".join(
                        word for word in (run.name if len(runs) > 1 else "", words) if word
                    )
                    panel.plot(
                        x,
                        y,
                        label=label or None,
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
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def report(run: RunLog) -> str:
    """The page about a run: HTML without anything from elsewhere."""
    picture = run.folder / PICTURE
    settings = run.folder / "config.yaml"
    bad = run.folder / "bad_samples.jsonl"
    values = yaml.safe_load(settings.read_text(encoding="utf-8")) if settings.exists() else {}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=run.name,
        step=run.lines[-1]["step"],
        epoch=run.lines[-1]["epoch"],
        state=state_of(run, values),
        figures={
            words: run.last(fact) for fact, words in FIGURES.items() if run.last(fact) is not None
        },
        curves=as_url(draw([run], OF_ONE_RUN)),
        pictures=as_url(picture.read_bytes()) if picture.exists() else None,
        looks=[line for line in run.lines if "monitor_s" in line],
        evaluations=evaluations_of(run.folder),
        settings=values,
        num_bad=len(bad.read_text(encoding="utf-8").splitlines()) if bad.exists() else 0,
    )


def evaluations_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The results that judge a run's final weights and lie beside it or beside its folder, by their
    folders' names."""
    weights = folder / "model.safetensors"
    if not weights.exists():
        return {}
    digest = weights_digest(weights)
    found = {}
    near = [*folder.parent.glob("*/results.json"), *folder.parent.parent.glob("*/*/results.json")]
    for path in sorted(set(near)):
        try:
            results = read_results(path)
        except ValueError:  # no JSON, or no text: somebody else's file
            continue
        if results.get("sha256") == digest:
            found[os.path.relpath(path.parent, folder.parent)] = results
    return found


def state_of(run: RunLog, settings: dict[str, Any]) -> str:
    """How far a run is, in words."""
    epoch, epochs = run.lines[-1]["epoch"], settings.get("epochs")
    if not (run.folder / "model.safetensors").exists():
        return "not finished"
    return "finished" if epochs is None or epoch >= epochs else f"stopped, of {epochs} epochs"


def as_url(png: bytes) -> str:
    """A picture inside the page itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def write(path: Path, content: bytes) -> Path:
    """Writes a file whole. Raises: InputError where that is not possible."""
    return write_output(path, lambda target: target.write_bytes(content))


if __name__ == "__main__":
    run_cli(main)
