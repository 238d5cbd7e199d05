"""Says what a file of weights holds, or writes it in another project's format or as a graph.

    python tools/convert_checkpoint.py SRC --describe
    python tools/convert_checkpoint.py SRC DST --format huggingface
    python tools/convert_checkpoint.py SRC DST --format safetensors --half
    python tools/convert_checkpoint.py SRC DST --format onnx --images FOLDER

SRC is a file or Hugging Face folder of any kind that models/README.md lists. What a foreign file
does not record and the new format needs (numbers of heads, the target, the size of images that are
not square) is given by flags. A graph, onnx or export (torch.export), is compared with PyTorch
before it is written, and differs by at most 1e-4.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.images import PixelFormat
from data.transforms import EvalTransform
from engine.pictures.choose import open_images
from models.mae import MaskedAutoencoder
from models.weights.export import GRAPHS, PARTS, Graph, check_can_write, model_part, write_graph
from models.weights.info import WeightsInfo, complete
from models.weights.read import read_weights
from models.weights.write import FORMATS, write_weights
from util.errors import InputError, LineParser, run_cli

NUM_IMAGES = 8  # that a graph is compared on


def main(argv: Sequence[str] | None = None) -> WeightsInfo:
    """Describes or converts; returns what was found. Raises: InputError."""
    parser = LineParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("source", metavar="SRC", help="File or Hugging Face folder of weights.")
    parser.add_argument(
        "target",
        metavar="DST",
        nargs="?",
        help="File, or for huggingface folder, to write; it must not exist.",
    )
    parser.add_argument("--format", choices=[*FORMATS, *GRAPHS], help="Format of DST.")
    parser.add_argument(
        "--half",
        action="store_true",
        help="Round the weights to fp16, for a file of half the size; not for a graph.",
    )
    parser.add_argument(
        "--describe", action="store_true", help="Say what SRC holds and write nothing."
    )
    parser.add_argument(
        "--img_size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="Size in pixels of the images of a foreign file, if they were not square.",
    )
    parser.add_argument(
        "--num_heads", type=int, help="Attention heads of the encoder, if SRC does not say it."
    )
    parser.add_argument(
        "--decoder_num_heads",
        type=int,
        help="Attention heads of the decoder, if SRC does not say it.",
    )
    parser.add_argument(
        "--norm_pix_loss",
        choices=("true", "false"),
        help="Whether the target is normalised per patch, if SRC does not say it.",
    )
    graphs = parser.add_argument_group("onnx and export")
    graphs.add_argument("--part", choices=PARTS, help="Part of the model; default all of it.")
    graphs.add_argument(
        "--global_pool",
        choices=("avg", "token"),
        help="Readout of an encoder; default its classifier's, or the class tokens if it has any.",
    )
    graphs.add_argument(
        "--with_preprocessing",
        action="store_true",
        help="Take uint8 images and normalise them inside.",
    )
    for name in ("mean", "std"):
        graphs.add_argument(
            f"--{name}",
            type=float,
            nargs="+",
            help=f"{name} of each channel, for pixels in [0, 1], if SRC does not say it.",
        )
    graphs.add_argument(
        "--images",
        nargs="+",
        metavar="PATH",
        help="Images or folders of images to compare on; default random numbers.",
    )
    args = parser.parse_args(argv)
    wanted = [args.target, args.format]
    if any(wanted) if args.describe else not all(wanted):
        raise InputError("give either --describe, or DST and --format")
    if args.half and args.format not in FORMATS:
        raise InputError(f"--half goes with --format {', '.join(FORMATS)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    tensors, info = read_weights(args.source, tuple(args.img_size) if args.img_size else None)
    sys.stdout.write(f"{info}\n")
    info = complete(
        info,
        num_heads=args.num_heads,
        decoder_num_heads=args.decoder_num_heads,
        norm_pix_loss=None if args.norm_pix_loss is None else args.norm_pix_loss == "true",
    )
    if args.format in GRAPHS:
        target = Path(args.target)
        check_can_write(target, args.format)
        stats = {n: tuple(getattr(args, n) or getattr(info, n) or ()) for n in ("mean", "std")}
        model = model_part(tensors, info, args.source, args.part, args.global_pool)
        if args.with_preprocessing and {*map(len, stats.values())} != {model.spec.in_chans}:
            raise InputError(
                f"{args.source}: --with_preprocessing needs mean and std of "
                f"{model.spec.in_chans} channels, got {stats}: give --mean and --std"
            )
        interval = info.pixels.get("pixel_range", ("auto",))
        if args.with_preprocessing and interval != ("auto",):
            sys.stdout.write(
                f"trained with pixel_range {' '.join(map(str, interval))}: bring the values of "
                "files from it to 0 to 255 before the graph, which does not know it\n"
            )
        graph = Graph(model, **stats) if args.with_preprocessing else Graph(model)
        inputs = example(graph.eval(), args.images, **stats)
        difference = write_graph(graph, inputs, target, args.format)
        what = f"{len(inputs[0])} images of {' '.join(args.images or ['random numbers'])}"
        sys.stdout.write(
            "not compared with PyTorch: onnxruntime is not installed\n"
            if difference is None
            else f"largest difference to PyTorch, on {what}: {difference:.2g}\n"
        )
    elif args.target:
        write_weights(in_half(tensors) if args.half else tensors, info, args.target, args.format)
    if args.target:
        sys.stdout.write(f"wrote {args.target}\n")
    return info


def in_half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with floats rounded to fp16. Raises: InputError for values past its range."""
    halves = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
    past = [n for n, t in halves.items() if not torch.equal(t.isfinite(), tensors[n].isfinite())]
    if past:
        raise InputError(f"--half: fp16 ends at 65504, and {' '.join(past)} has larger values")
    return halves


def example(
    graph: Graph, paths: Sequence[str] | None, mean: tuple[float, ...], std: tuple[float, ...]
) -> list[Tensor]:
    """A batch to compare a graph on: the images of `paths`, or random ones, as it takes them, and
    for an autoencoder random orders of the patches.

    Raises: InputError for a path without images.
    """
    spec, random = graph.model.spec, torch.Generator().manual_seed(0)
    size = graph.model.img_size
    images = torch.randint(0, 256, (NUM_IMAGES, spec.in_chans, *size), generator=random)
    if paths:
        found = open_images("images", paths, "folder", None, NUM_IMAGES, PixelFormat(spec.in_chans))
        fit = EvalTransform(size, None)
        images = torch.stack([fit(image) for image in found.values()])
        images = images.repeat(2, 1, 1, 1) if len(images) == 1 else images  # a batch is no single
    images = images.to(torch.uint8)  # (B, C, H, W)
    if not graph.normalizes:
        shift, scale = (torch.tensor(v or 0.5).view(-1, 1, 1) for v in (mean, std))
        images = (images / 255 - shift) / scale
    if not isinstance(graph.model, MaskedAutoencoder):
        return [images]
    noise = torch.rand(len(images), spec.num_patches, generator=random)
    return [images, noise.argsort(dim=1)]  # (B, C, H, W), (B, N)


if __name__ == "__main__":
    run_cli(main)
