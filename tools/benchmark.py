"""How fast the parts are, beside what users would run otherwise, in one interleaved run.

    python tools/benchmark.py step
    python tools/benchmark.py processes
    python tools/benchmark.py memory
    python tools/benchmark.py loader --images /path/to/images --packed /path/to/packed
    python tools/benchmark.py knn
    python tools/benchmark.py probe

Times are medians of rounds in which every variant runs once, in turn, so that a busy machine slows
all alike; ratios are medians of the rounds' ratios. `step` also gives the share of the peak of
matrix products, measured in the same run. The peer of step and memory is
`transformers.ViTMAEForPreTraining`, left out where it is not installed; that of the loader is
Pillow with torchvision's transforms. The figures end the output as a JSON object, which --json also
writes to a file.
"""

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tools.benchmarks.evaluation import benchmark_knn, benchmark_probe
from tools.benchmarks.loader import benchmark_loader
from tools.benchmarks.step import SHAPES, benchmark_memory, benchmark_processes, benchmark_step
from tools.benchmarks.timing import Figures
from util.errors import InputError, LineParser, run_cli
from util.files import write_text

PARTS: dict[str, Callable[[argparse.Namespace], Figures]] = {
    "step": lambda args: {name: benchmark_step(SHAPES[name], args.rounds) for name in args.shapes},
    "processes": lambda args: {"small/16": benchmark_processes(SHAPES["small/16"], args.rounds)},
    "memory": lambda args: {"base/16": benchmark_memory(SHAPES["base/16"])},
    "loader": lambda args: {"one core": benchmark_loader(args.images, args.packed, args.rounds)},
    "knn": lambda args: {"50,000 x 384, k = 10, 20, 100, 200": benchmark_knn(args.rounds)},
    "probe": lambda args: {"small/16 at 224, 1,000 classes, LARS": benchmark_probe(args.rounds)},
}


def main(argv: Sequence[str] | None = None) -> Figures:
    """Runs one part, prints its figures and returns them. Raises: InputError."""
    parser = LineParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument(
        "--rounds", type=int, default=5, help="in which each variant runs once (default 5)"
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=SHAPES,
        default=list(SHAPES),
        help="step: which (default all)",
    )
    parser.add_argument("--images", help="loader: folder of photographs")
    parser.add_argument("--packed", help="loader: the same, packed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise InputError(f"rounds must be 1 or more, got {args.rounds}")
    if args.part == "loader" and args.images is None:
        raise InputError("loader needs photographs: give --images FOLDER")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    figures = PARTS[args.part](args)
    text = json.dumps(figures, indent=2) + "\n"
    print(text, end="")
    if args.json is not None:
        write_text(args.json, text)
    return figures


if __name__ == "__main__":
    run_cli(main)
