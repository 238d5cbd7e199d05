"""Prints what the evaluations in a folder found, beside the same model untrained.

    python tools/results_table.py output/quickstart

Reads <folder>/<stage>/results.json and <folder>/<stage>_untrained/results.json for knn, lincls and
finetune.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.run.results import read_results
from util.errors import InputError, run_cli

STAGES = ("knn", "lincls", "finetune")
COLUMNS = ("pretrained", "untrained")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints the table and returns it: {stage: {"pretrained": percent, "untrained": percent}}."""
    parser = argparse.ArgumentParser(
        description="Top-1 accuracy of pretrained and untrained models."
    )
    parser.add_argument(
        "folder", type=Path, help="holds knn/, lincls/, finetune/ and the same with _untrained"
    )
    folder = parser.parse_args(argv).folder
    table: dict[str, dict[str, float]] = {}
    rows = [["top-1 %", *COLUMNS, "train / val images"]]
    for stage in STAGES:
        runs = [read(folder / stage), read(folder / f"{stage}_untrained")]
        table[stage] = {column: run["acc1"] for column, run in zip(COLUMNS, runs, strict=True)}
        images = f"{runs[0]['num_train']:,} / {runs[0]['num_samples']:,}"
        rows.append([name_of(stage, runs[0]), *(f"{run['acc1']:.2f}" for run in runs), images])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *rest = (text.rjust(width) for text, width in zip(row, widths, strict=True))
        print("  ".join([row[0].ljust(len(first)), *rest]))
    return table


def read(folder: Path) -> dict[str, Any]:
    """A run's results. Raises: InputError where there are none."""
    path = folder / "results.json"
    if not path.exists():
        raise InputError(f"{path} is not there: the run has not finished")
    return read_results(path)


def name_of(stage: str, results: dict[str, Any]) -> str:
    """A row's first cell."""
    if stage == "knn":
        return f"{results['k']}-NN"
    if stage == "lincls":
        return f"linear, lr {results['lr']:g}"
    return "fine-tuning / from scratch"


if __name__ == "__main__":
    run_cli(main)
