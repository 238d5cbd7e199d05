"""Prints what the evaluations in a folder found, beside the same model untrained.

    python tools/results_table.py output/quickstart

Reads <folder>/<stage>/results.json and <folder>/<stage>_untrained/results.json for knn, lincls,
finetune, segment and detect, as far as there are such folders.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.run.records import read_results
from util.errors import InputError, run_cli

ROWS = {
    "knn": "{k}-NN",
    "lincls": "{how}",
    "finetune": "fine-tuning / from scratch",
    "segment": "fine-tuning / from scratch",
    "detect": "fine-tuning / from scratch",
}
FIGURES = {"acc1": "top-1", "miou": "mIoU", "box_ap": "box AP", "mask_ap": "mask AP"}  # in percent


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Prints the table and returns it: {stage: {"pretrained": percent, "untrained": percent}}, by
    the first figure of each stage.

    Raises: InputError if a run has no results.
    """
    parser = argparse.ArgumentParser(description="Figures of pretrained and untrained models.")
    parser.add_argument(
        "folder", type=Path, help="holds folders of stages, and the same with _untrained"
    )
    folder = parser.parse_args(argv).folder
    stages = [stage for stage in ROWS if (folder / stage).is_dir()]
    if not stages:
        raise InputError(f"{folder} has none of the folders {', '.join(ROWS)}")
    try:
        runs = {
            stage: [
                read_results(folder / name / "results.json")
                for name in (stage, f"{stage}_untrained")
            ]
            for stage in stages
        }
    except FileNotFoundError as error:
        raise InputError(f"{error.filename} is not there: the run has not finished") from error
    print(f"{'%':<36}  pretrained  untrained  train / val images")
    table: dict[str, dict[str, float]] = {}
    for stage, (pretrained, untrained) in runs.items():
        images = f"{pretrained['num_train']:,} / {pretrained['num_samples']:,}"
        for figure in [figure for figure in FIGURES if figure in pretrained]:
            both = {"pretrained": pretrained[figure], "untrained": untrained[figure]}
            how = pretrained.get("protocol", "")
            if "lr" in pretrained:  # of a probe; logistic regression has none
                how = f"{how.split()[0]}, lr {pretrained['lr']:g}"
            title = f"{ROWS[stage].format(**pretrained, how=how)}, {FIGURES[figure]}"
            values = "  ".join(f"{both[kind]:>{len(kind)}.2f}" for kind in both)
            print(f"{title:<36}  {values}  {images:>18}")
            table.setdefault(stage, both)
    return table


if __name__ == "__main__":
    run_cli(main)
