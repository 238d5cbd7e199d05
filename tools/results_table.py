"""Prints what the evaluations in a folder found, beside the same model untrained.

    python tools/results_table.py output/quickstart

Reads <folder>/<stage>/results.json and <folder>/<stage>_untrained/results.json for knn, lincls and
finetune.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.run.records import read_results
from util.errors import InputError, run_cli

ROWS = {"knn": "{k}-NN", "lincls": "linear, lr {lr:g}", "finetune": "fine-tuning / from scratch"}


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
    try:
        runs = {
            stage: [
                read_results(folder / name / "results.json")
                for name in (stage, f"{stage}_untrained")
            ]
            for stage in ROWS
        }
    except FileNotFoundError as error:
        raise InputError(f"{error.filename} is not there: the run has not finished") from error
    print(f"{'top-1 %':<26}  pretrained  untrained  train / val images")
    for stage, (pretrained, untrained) in runs.items():
        accuracies = f"{pretrained['acc1']:>10.2f}  {untrained['acc1']:>9.2f}"
        images = f"{pretrained['num_train']:,} / {pretrained['num_samples']:,}"
        print(f"{ROWS[stage].format(**pretrained):<26}  {accuracies}  {images:>18}")
    return {
        stage: {"pretrained": pretrained["acc1"], "untrained": untrained["acc1"]}
        for stage, (pretrained, untrained) in runs.items()
    }


if __name__ == "__main__":
    run_cli(main)
