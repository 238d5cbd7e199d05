"""compare.html: the settings that differ between runs and their final figures, as a table to sort,
filter and export, and the runs' curves.

A run is a folder with a log.jsonl or, as after an evaluation, results.json or eval.json alone. The
figures are read from the end of a log, so that ten thousand runs take seconds; only the logs whose
curves are drawn are read completely. The page holds all of it as JSON, which its script shows.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeVar, get_args
from urllib.parse import quote

import jinja2
import yaml

from engine.pictures.drawing import MARK
from engine.run.records import Kind, read_log, read_results
from util.errors import InputError
from util.files import printable

TEMPLATE = Path(__file__).with_name("compare.html.jinja")
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
Value = TypeVar("Value")
Cell = str | int | float | None  # None is a value that the run has not


def find_folders(paths: Sequence[Path]) -> dict[Path, frozenset[str]]:
    """The runs' folders among `paths` and below, and the names of the files in each. Raises:
    InputError if there are none."""
    found = {
        Path(folder): frozenset(files)
        for path in paths
        for folder, _, files in os.walk(path.resolve())
        if not {"log.jsonl", "results.json", "eval.json"}.isdisjoint(files)
    }
    if not found:
        raise InputError(
            f"{' '.join(map(str, paths))} holds no run: no log.jsonl, results.json or eval.json"
        )
    return dict(sorted(found.items()))


def compare_runs(
    folders: Mapping[Path, frozenset[str]], common: Path, titles: Mapping[str, str]
) -> bytes:
    """The page about several runs: HTML that loads nothing from elsewhere.

    Args:
        folders: as `find_folders` gives them.
        common: the folder above all of them, where the page will be.
        titles: of the figures, key in log.jsonl or results.json -> words. Keys with the same words
            share a column and a panel of curves.
    """
    rows = {
        folder: read_row(folder, files, common, titles)
        for folder, files in [*folders.items()][:MOST_ROWS]
    }
    different: dict[str, set[Cell]] = {}
    for row in rows.values():
        for name, value in row.items():
            different.setdefault(name, set()).add(value)
    titled = dict.fromkeys(titles.values())
    figures = [name for name in titled if name in different]
    names = different.keys() - titled.keys() - {*FIRST}
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
            quote(f"{folder.relative_to(common)}/report.html", errors="surrogateescape")
            if "report.html" in folders[folder]
            else None
            for folder in rows
        ],
        "curves": [
            {"row": place, "series": read_curves(log, titles)}
            for place, log in enumerate(folder / "log.jsonl" for folder in rows)
            if log in newest
        ],
    }
    template = jinja2.Template(
        TEMPLATE.read_text(encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return template.render(
        generator=MARK,
        data=data,
        num_runs=len(folders),
        num_rows=len(rows),
        num_logs=len(logs),
        num_drawn=len(newest),
    ).encode()


def read_row(
    folder: Path, files: frozenset[str], common: Path, titles: Mapping[str, str]
) -> dict[str, Cell]:
    """What the files of a run's folder say, by the heads of columns; a file that cannot be read
    says nothing."""
    logged = contents(last_values, folder / "log.jsonl") if "log.jsonl" in files else {}
    is_alone = "log.jsonl" not in files  # else eval.json may be about other weights
    path = folder / ("eval.json" if is_alone and "results.json" not in files else "results.json")
    results = contents(read_results, path) if path.name in files else {}
    settings = contents(read_settings, folder / "config.yaml") if "config.yaml" in files else {}
    settings.pop("output_dir", None)  # the run's name says it
    found = {titles[key]: number(v) for key, v in (logged | results).items() if key in titles}
    return {
        **{name: cell(results[key]) for key, name in NAMES.items() if key in results},
        **settings,
        **{words: value for words, value in found.items() if value is not None},
        "run": folder.relative_to(common).as_posix(),
        "protocol": cell(results.get("protocol", "")) or None,
        "state": "finished" if is_alone or files & RESULTS else "not finished",
        "epoch": number(logged.get("epoch")),
    }


def contents(read: Callable[[Path], dict[str, Value]], path: Path) -> dict[str, Value]:
    """What `read` finds in a file; nothing, and a line, if it is not what a run writes."""
    try:
        found = read(path)
        if isinstance(found, dict):
            return found
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        pass
    print(f"compare.html lacks what {printable(str(path))} holds: it cannot be read")
    return {}


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


def read_curves(path: Path, titles: Mapping[str, str]) -> dict[str, list[tuple[Cell, Cell]]]:
    """Words of `titles` -> epoch and value of records that have one, evenly over the run."""
    curves: dict[str, list[tuple[Cell, Cell]]] = {}
    records = contents(
        lambda log: {str(n): record for n, record in enumerate(read_log(log))}, path
    ).values()
    for record in (record for record in records if isinstance(record, dict)):
        for key in titles.keys() & record:
            point = (number(record.get("epoch")), number(record[key]))
            if None not in point:
                curves.setdefault(titles[key], []).append(point)
    for words, points in curves.items():
        every = -(-len(points) // MOST_POINTS)
        curves[words] = points[(len(points) - 1) % every :: every]  # the last one is there
    return curves


def number(value: object) -> int | float | None:
    """The value if it is a finite number, as JSON has them, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < 1e308 else None


def cell(value: object) -> Cell:
    """A setting as a number or a text of bounded length, as YAML spells it."""
    if number(value) is not None:
        return number(value)
    if isinstance(value, list):
        value = " ".join(map(str, value))
    text = json.dumps(value) if value is None or isinstance(value, bool) else str(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."
