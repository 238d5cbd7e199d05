"""Prints what the evaluations in a folder found, beside the same model untrained.

    python tools/results_table.py output/quickstart

Reads <folder>/<stage>/results.json and <folder>/<stage>_untrained/results.json for knn, lincls and
finetune.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.run.records import read_results
from util.errors import InputError, run_cli

ROWS = {"knn": "{k}-NN", "lincls": "linear, lr {lr:g}", "finetune": "fine-tuning / from scratch"}
COLUMNS = ("pretrained", "untrained")


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Prints the table and returns it: {stage: {"pretrained": percent, "untrained": percent}}.

    Raises: InputError if a run has no results.
    """
    parser = argparse.ArgumentParser(
        description="Top-1 accuracy of pretrained and untrained models."
    )
    parser.add_argument(
        "folder", type=Path, help="holds knn/, lincls/, finetune/ and the same with _untrained"
    )
    folder = parser.parse_args(argv).folder
    runs = {stage: (read(folder / stage), read(folder / f"{stage}_untrained")) for stage in ROWS}
    print(f"{'top-1 %':<26}  {COLUMNS[0]:>10}  {COLUMNS[1]:>9}  train / val images")
    for stage, (pretrained, untrained) in runs.items():
        accuracies = f"{pretrained['acc1']:>10.2f}  {untrained['acc1']:>9.2f}"
        images = f"{pretrained['num_train']:,} / {pretrained['num_samples']:,}"
        print(f"{ROWS[stage].format(**pretrained):<26}  {accuracies}  {images:>18}")
    return {
        stage: {column: run["acc1"] for column, run in zip(COLUMNS, both, strict=True)}
        for stage, both in runs.items()
    }


def read(folder: Path) -> dict[str, Any]:
    """A run's results. Raises: InputError if there are none."""
    path = folder / "results.json"
    if not path.exists():
        raise InputError(f"{path} is not there: the run has not finished")
    return read_results(path)


if __name__ == "__main__":
    run_cli(main)
