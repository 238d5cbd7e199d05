"""Prints what the frozen encoders of several runs are worth, side by side.

    python tools/options_table.py output/cifar10_options recipe block2

Reads <folder>/<option>/seed*/<readout>/results.json for knn, linear and attentive, and, where there
is <folder>/times/<round>/<option>/log.jsonl, how long a step took beside the first option's.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

from engine.run.records import read_log, read_results
from util.errors import InputError, LineParser, run_cli

READOUTS = {"knn": "10-NN, best layer", "linear": "linear", "attentive": "attentive"}


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Prints the table in Markdown and returns its rows.

    Raises: InputError if an option has no results.
    """
    parser = LineParser(description="Figures of the encoders of several runs.")
    parser.add_argument("folder", type=Path, help="holds a folder for each option")
    parser.add_argument("options", nargs="+", help="as rows, in this order")
    args = parser.parse_args(argv)
    head = ["top-1 %", *READOUTS.values(), "time of a step"]
    rows = [head, ["---"] * len(head)]
    for option in args.options:
        cells = [figures(args.folder / option, readout) for readout in READOUTS]
        rows.append([option, *cells, time_of_step(args.folder / "times", option, args.options[0])])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    print(*lines, sep="\n")
    return lines


def figures(folder: Path, readout: str) -> str:
    """The mean over the seeds, and in brackets each seed's figure.

    Raises: InputError if there are none.
    """
    files = sorted(folder.glob(f"seed*/{readout}/results.json"))
    if not files:
        raise InputError(f"{folder} has no seed*/{readout}/results.json: the run has not finished")
    found = [read_results(file)["acc1"] for file in files]
    return f"{fmean(found):.2f} ({', '.join(f'{figure:.2f}' for figure in found)})"


def time_of_step(folder: Path, option: str, first: str) -> str:
    """The median over rounds, in which all options ran in turn, of the time over the first
    option's."""
    ratios = [
        speed(times / first) / speed(times / option)
        for times in sorted(folder.glob("*"))
        if (times / option / "log.jsonl").exists()
    ]
    return f"{median(ratios):.2f} x" if ratios else ""


def speed(folder: Path) -> float:
    """Images per second, the median over the lines of a run's log."""
    log = read_log(folder / "log.jsonl")
    return median(record["images_per_s"] for record in log if record["kind"] == "train")


if __name__ == "__main__":
    run_cli(main)
