"""Says what a file of weights holds, or writes it in another project's format.

    python tools/convert_checkpoint.py SRC --describe
    python tools/convert_checkpoint.py SRC DST --format huggingface

SRC is a file or Hugging Face folder of any kind that models/README.md lists. What a foreign file
does not record and the new format needs (numbers of heads, the target, the size of images that are
not square) is given by flags.
"""

import logging
import sys
from collections.abc import Sequence

from models.weights.info import WeightsInfo, complete
from models.weights.read import read_weights
from models.weights.write import FORMATS, write_weights
from util.errors import InputError, LineParser, run_cli


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
    parser.add_argument("--format", choices=FORMATS, help="Format of DST.")
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
    args = parser.parse_args(argv)
    wanted = [args.target, args.format]
    if any(wanted) if args.describe else not all(wanted):
        raise InputError("give either --describe, or DST and --format")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    tensors, info = read_weights(args.source, tuple(args.img_size) if args.img_size else None)
    sys.stdout.write(f"{info}\n")
    info = complete(
        info,
        num_heads=args.num_heads,
        decoder_num_heads=args.decoder_num_heads,
        norm_pix_loss=None if args.norm_pix_loss is None else args.norm_pix_loss == "true",
    )
    if args.target:
        write_weights(tensors, info, args.target, args.format)
        sys.stdout.write(f"wrote {args.target}\n")
    return info


if __name__ == "__main__":
    run_cli(main)
