"""How fast the parts are, beside what users would run otherwise, in one interleaved run.

    python tools/benchmark.py step
    python tools/benchmark.py memory
    python tools/benchmark.py processes
    python tools/benchmark.py loader --images /path/to/images --packed /path/to/packed
    python tools/benchmark.py knn
    python tools/benchmark.py probe

Times are medians of rounds in which every variant runs in turn, so that a busy machine slows all
alike; ratios are medians of the rounds' ratios. `step` and `memory` run on any device and compare
within one precision, eager models with eager ones and compiled with compiled. `step` also gives the
share of the peak of matrix products, measured in the same run. Their peers are
`transformers.ViTMAEForPreTraining`, left out where it is not installed, and with --public_mae the
public MAE code; that of the loader is Pillow with torchvision's transforms. Tables go to stdout,
progress to stderr, and with --json the figures to a file.
"""

import argparse
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product

import torch

from tools.benchmarks.evaluation import benchmark_knn, benchmark_probe
from tools.benchmarks.loader import benchmark_loader
from tools.benchmarks.peers import build_public
from tools.benchmarks.step import (
    MODES,
    PRECISIONS,
    SHAPES,
    benchmark_memory,
    benchmark_processes,
    benchmark_step,
)
from tools.benchmarks.timing import Table, say
from util.dist import autocast_dtype, choose_device
from util.errors import InputError, LineParser, run_cli
from util.files import path, write_text

SHAPES_OF_STEP = ("small/16", "base/16", "192/4 at 32")  # by default, on CUDA also large/16
Titled = tuple[str, Table]


def on_device(args: argparse.Namespace) -> Iterator[Titled]:
    """The tables of `step` or `memory`, one for each shape and precision; none of bf16 on a device
    that is slow at it."""
    device = choose_device(args.device, 0)
    is_cuda, is_step = device.type == "cuda", args.part == "step"
    of_step = [*SHAPES_OF_STEP, "large/16"] if is_cuda else SHAPES_OF_STEP
    shapes = args.shapes or (of_step if is_step else ["base/16"])
    modes = MODES[: 1 + (is_cuda if args.compiled is None else args.compiled)]
    if args.public_mae is not None:
        build_public(SHAPES["192/4 at 32"].spec, args.public_mae)  # for trial
    for name, precision in product(shapes, args.precision):
        if precision == "bf16" and autocast_dtype("auto", device) != torch.bfloat16:
            say(f"{name}, bf16 is left out: this {device.type} is slow at it")
            continue
        say(f"{name}, {precision}:")
        batch = args.batch or (SHAPES[name].cuda_batch if is_cuda else SHAPES[name].batch)
        case = (SHAPES[name].spec, batch, device, precision, args.public_mae)
        table = benchmark_step(*case, modes, args.rounds) if is_step else benchmark_memory(*case)
        yield f"{name}, {precision}", table


PARTS: dict[str, Callable[[argparse.Namespace], Iterable[Titled]]] = {
    "step": on_device,
    "memory": on_device,
    "processes": lambda args: [
        ("small/16 in fp32", benchmark_processes(SHAPES["small/16"], args.rounds))
    ],
    "loader": lambda args: benchmark_loader(args.images, args.packed, args.rounds),
    "knn": lambda args: [("50,000 x 384, k = 10, 20, 100, 200", benchmark_knn(args.rounds))],
    "probe": lambda args: [("small/16 at 224, 1,000 classes, LARS", benchmark_probe(args.rounds))],
}


def main(argv: Sequence[str] | None = None) -> dict[str, Table]:
    """Runs one part, prints its tables and returns them by their titles. Raises: InputError."""
    parser = LineParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument(
        "--rounds", type=int, default=5, help="in which each variant runs (default 5)"
    )
    devices = ("auto", "cpu", "cuda", "mps")
    parser.add_argument(
        "--device", choices=devices, default="auto", help="step, memory: where (default auto)"
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=list(PRECISIONS),
        help="step, memory: which, each by itself (default both)",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=SHAPES,
        help="step, memory: which (default for memory base/16, for step "
        f"{', '.join(SHAPES_OF_STEP)}, and on CUDA large/16)",
    )
    parser.add_argument(
        "--batch", type=int, help="step, memory: images (default by shape and device)"
    )
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        help="step: whether compiled models are measured, too (default on CUDA only)",
    )
    parser.add_argument(
        "--public_mae",
        type=path,
        metavar="FOLDER",
        help="step, memory: checkout of the public MAE code, which is run as another peer",
    )
    parser.add_argument("--images", metavar="FOLDER", help="loader: photographs")
    parser.add_argument("--packed", metavar="FOLDER", help="loader: the same, packed")
    parser.add_argument("--json", type=path, metavar="FILE", help="also write the figures here")
    args = parser.parse_args(argv)
    for name in ("rounds", "batch"):
        if (count := getattr(args, name)) is not None and count < 1:
            raise InputError(f"{name} must be 1 or more, got {count}")
    if args.part == "loader" and args.images is None:
        raise InputError("loader needs photographs: give --images FOLDER")
    if args.json is not None and not args.json.parent.is_dir():
        raise InputError(f"{args.json} cannot be written: {args.json.parent} is no folder")
    gpus = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    threads, version = f"{torch.get_num_threads()} threads", f"torch {torch.__version__}"
    figures: dict[str, Table] = {}
    record = {"machine": ", ".join([*gpus, cpu, threads, version]), "figures": figures}
    print(record["machine"], flush=True)
    for title, table in PARTS[args.part](args):
        figures[title] = table
        if args.json is not None:
            write_text(args.json, json.dumps(record, indent=2) + "\n")
        print(f"\n{title}", *lines_of(table), sep="\n", flush=True)
    return figures


def lines_of(table: Table) -> Iterator[str]:
    """A table as text: a line with its columns, and one for each variant."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    width = max(map(len, table))
    yield "  ".join([" " * width, *columns])
    for name, row in table.items():
        texts = [f"{row[c]:,.{0 if row[c] >= 100 else 2}f}" if c in row else "" for c in columns]
        cells = (text.rjust(len(column)) for text, column in zip(texts, columns, strict=True))
        yield "  ".join([name.ljust(width), *cells])


if __name__ == "__main__":
    run_cli(main)
