"""compare.html: the settings that differ between runs and their final figures, as a table to sort,
filter and export, and the runs' curves.

The figures are read from the end of a log, so that ten thousand runs take seconds; only the logs
whose curves are drawn are read completely. The page holds all of it as JSON, which its script
shows.
"""

import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import get_args
from urllib.parse import quote

import yaml

from engine.run.records import Kind, read_log, read_results
from tools.reporting.runs import FIGURES, contents, number, render

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the fast one needs libyaml
TAIL = 1 << 18  # bytes at the end of a log in which the last records are searched
# What bounds the page
MOST_ROWS = 20_000
MOST_DRAWN = 100  # runs with curves, the newest
MOST_POINTS = 100  # of a curve
MOST_CHARACTERS = 200  # of a value
RESULTS = {"model.safetensors", "results.json"}  # of which a finished run has one at least
NAMES = {  # in results.json -> the setting that it comes from, or a name of its own
    "checkpoint": "finetune",
    "dataset": "dataset",
    "img_size": "img_size",
    "readout": "global_pool",
    "layer": "layer",
    "last_norm": "last_norm",
    "k": "k",
    "num_train": "num_train",
}
FIRST = ("run", "protocol", "state", "epoch")  # columns
Cell = str | int | float | None  # None is a value that the run has not


def compare_runs(folders: Mapping[Path, frozenset[str]], page: Path) -> bytes:
    """What the file `page` about several runs will hold. Keys of `FIGURES` with the
    same words share a column and a panel of curves.

    Args:
        folders: as `find_folders` gives them.
    """
    common = Path(os.path.commonpath(folders))
    rows = {
        folder: read_row(folder, files, common) for folder, files in [*folders.items()][:MOST_ROWS]
    }
    different: dict[str, set[Cell]] = {}
    for row in rows.values():
        for name, value in row.items():
            different.setdefault(name, set()).add(value)
    titles = dict.fromkeys(FIGURES.values())
    figures = [name for name in titles if name in different]
    names = different.keys() - titles.keys() - {*FIRST}
    settings = [name for name in different if name in names and len(different[name]) > 1]
    columns = [*FIRST, *figures, *settings]
    logs = [folder / "log.jsonl" for folder in rows if "log.jsonl" in folders[folder]]
    newest = {*sorted(logs, key=lambda log: log.stat().st_mtime)[-MOST_DRAWN:]}
    data = {
        "columns": columns,
        "figures": figures,
        "rows": [[row.get(name) for name in columns] for row in rows.values()],
        "links": [
            # quoted, as a folder may be called javascript:
            quote(os.path.relpath(folder / "report.html", page.parent), errors="surrogateescape")
            if "report.html" in folders[folder]
            else None
            for folder in rows
        ],
        "curves": [
            {"row": place, "series": read_curves(log)}
            for place, log in enumerate(folder / "log.jsonl" for folder in rows)
            if log in newest
        ],
    }
    return render(
        "compare.html.jinja",
        data=data,
        num_runs=len(folders),
        num_rows=len(rows),
        num_logs=len(logs),
        num_drawn=len(newest),
    )


def read_row(folder: Path, files: frozenset[str], common: Path) -> dict[str, Cell]:
    """What the files of a run's folder say, by the heads of columns; a file that cannot be read
    says nothing."""
    logged = contents(last_values, folder / "log.jsonl", dict) if "log.jsonl" in files else {}
    is_alone = "log.jsonl" not in files  # else eval.json may be about other weights
    path = folder / ("eval.json" if is_alone and "results.json" not in files else "results.json")
    results = contents(read_results, path, dict) if path.name in files else {}
    config = folder / "config.yaml"
    settings = contents(read_settings, config, dict) if config.name in files else {}
    settings.pop("output_dir", None)  # the run's name says it
    found = {FIGURES[key]: number(v) for key, v in (logged | results).items() if key in FIGURES}
    epoch, epochs = number(logged.get("epoch")), number(settings.get("epochs"))
    is_early = epoch is not None and epochs is not None and epoch < epochs
    state = "stopped" if is_early else "finished"
    return {
        **{name: cell(results[key]) for key, name in NAMES.items() if key in results},
        **settings,
        **{words: value for words, value in found.items() if value is not None},
        "run": folder.relative_to(common).as_posix(),
        "protocol": cell(results.get("protocol", "")) or None,
        "state": state if is_alone or files & RESULTS else "not finished",
        "epoch": epoch,
    }


def last_values(path: Path) -> dict[str, object]:
    """The values of the last record of each kind, the later one where two have a value. A last line
    that is still being written does not count. Raises: OSError, ValueError."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL))
        text = file.read()
    first = text.find(b"\n") + 1 if size > TAIL else 0  # the line at the cut is not complete
    last = text.rfind(b"\n")
    places = {text.rfind(b'"kind": "%s"' % kind.encode(), first, last) for kind in get_args(Kind)}
    values: dict[str, object] = {}
    for place in sorted({last - 1} | places):  # in the order of the lines
        if place >= first:
            start = text.rfind(b"\n", 0, place) + 1
            values |= json.loads(text[start : text.find(b"\n", place)])
    return values


def read_settings(path: Path) -> dict[str, Cell]:
    """The settings of a config.yaml. Raises: OSError, ValueError, AttributeError,
    yaml.YAMLError."""
    # One by one, as most runs share most of them, and reading YAML is slow.
    entries = re.split(r"\n(?=\w+:)", path.read_text(encoding="utf-8"))
    return {name: value for entry in entries for name, value in read_entry(entry).items()}


@lru_cache(maxsize=10_000)
def read_entry(text: str) -> dict[str, Cell]:
    """A setting's line in a YAML file, and those that belong to it."""
    entry = yaml.load(text, Loader=LOADER) or {}  # noqa: S506 (both loaders are safe ones)
    return {str(name): cell(value) for name, value in entry.items()}


def read_curves(path: Path) -> dict[str, list[tuple[Cell, Cell]]]:
    """Words of `FIGURES` -> epoch and value of records that have one, evenly over the run."""
    curves: dict[str, list[tuple[Cell, Cell]]] = {}
    for record in contents(read_log, path, list):
        for key in FIGURES.keys() & record if isinstance(record, dict) else ():
            point = (number(record.get("epoch")), number(record[key]))
            if None not in point:
                curves.setdefault(FIGURES[key], []).append(point)
    for words, points in curves.items():
        every = -(-len(points) // MOST_POINTS)
        curves[words] = points[(len(points) - 1) % every :: every]  # the last one is there
    return curves


def cell(value: object) -> Cell:
    """A setting as a number or a text of bounded length, as YAML spells it."""
    if number(value) is not None:
        return number(value)
    if isinstance(value, list):
        value = " ".join(map(str, value))
    text = json.dumps(value) if value is None or isinstance(value, bool) else str(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."
