"""Draws the method in one picture, with a real image and what a trained model makes of it
(figures/overview.png).

    python tools/draw_overview.py --config cfgs/pretrain/ViT-Ti_CIFAR10.yaml --model_path
        /path/to/pretrain/model \\ --img_path /path/to/image --save_path figures/overview.png

Takes the settings of tools/run_mae_vis.py, for one image under one mask; --save_path is the
picture.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Polygon, Rectangle

from data.transforms import EvalTransform, PixelNormalizer
from engine.evaluation.from_weights import build_autoencoder
from engine.pictures.choose import open_images
from engine.pictures.drawing import DPI, figure_picture, to_picture, write_png
from engine.pictures.reconstruction import Reconstruction, reconstruct
from engine.run.folder import check_writable
from models.mae import MaskedAutoencoder
from models.masks import Mask, draw_mask
from util.dist import init_processes
from util.errors import run_cli
from util.rng import MASK, generator
from util.settings.evaluation import STAGE_CONFIGS
from util.settings.read import load_config
from util.settings.tools import OverviewConfig

WIDTH, HEIGHT = 121, 36  # units of the drawing
ENCODER, DECODER, REMOVED, INK = "#3b6ea5", "#d98c3f", "#c9c9c9", "#333333"
MIDDLE, SIDE = 19, 18  # height of the arrows, side of an image
TOKEN, COLUMN, LONGEST = (
    1.5,
    16,
    8,
)  # side of a token, tokens one above the other, and how wide all may be


def main(argv: Sequence[str] | None = None) -> Path:
    """Writes the picture and returns its path."""
    cfg = load_config(OverviewConfig, "draw_overview", argv, siblings=STAGE_CONFIGS)
    assert cfg.model_path is not None, "the config checks that there are weights"
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    path = Path(cfg.save_path)
    check_writable("save_path", path.parent)
    image = next(
        iter(
            open_images(
                "img_path", cfg.img_path, cfg.dataset, cfg.data_path, 1, cfg.in_chans
            ).values()
        )
    )
    with init_processes(cfg.device) as processes:
        model = build_autoencoder(cfg, cfg.model_path, cfg.mask_ratio[0]).to(processes.device)
        normalize = PixelNormalizer(cfg.mean, cfg.std, processes.device)
        mask = draw_mask(
            cfg.mask, model.grid_size, cfg.mask_ratio[0], generator(cfg.seed[0], MASK, 0)
        )
        found = reconstruct(model, EvalTransform(cfg.img_size, 1.0)(image)[None], [mask], normalize)
    write_png(path, draw(model, mask, found))
    print(f"wrote {path}")
    return path


def draw(model: MaskedAutoencoder, mask: Mask, found: Reconstruction) -> np.ndarray:
    """The drawing, left to right: image, kept patches, encoder, all tokens, decoder,
    reconstruction."""
    figure = Figure(figsize=(WIDTH / 10, HEIGHT / 10), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.set_axis_off()
    kept, total = mask.kept, model.num_patches
    original, masked, pasted = (
        to_picture(picture[0]) for picture in (found.original, found.masked, found.pasted)
    )
    show(axes, original, 2, "image", f"{total} patches")
    show(axes, masked, 25, "masked", f"{total - kept} removed, {kept} kept")
    rows, columns = model.grid_size
    patch_rows, patch_columns = model.patch_size
    cut = original.reshape(rows, patch_rows, columns, patch_columns, 3).swapaxes(
        1, 2
    )  # (rows, columns, P, P, 3)
    patches = cut.reshape(total, patch_rows, patch_columns, 3)
    visible = set(mask.ids_shuffle[:kept].tolist())
    tokens(axes, [patches[index] for index in sorted(visible)], 48)
    trapezoid(axes, 53, 13, 22, 17, ENCODER, f"encoder\ndepth {len(model.blocks)}")
    tokens(axes, [patches[index] if index in visible else None for index in range(total)], 75)
    trapezoid(axes, 84, 11, 13, 18, DECODER, f"decoder\ndepth {len(model.decoder_blocks)}")
    show(axes, pasted, 100, "reconstruction", "kept patches pasted in")
    for start, end in (
        (20.5, 24.5),
        (43.5, 46.5),
        (49.5, 52.5),
        (66.5, 70.5),
        (79.5, 83.5),
        (95.5, 99.5),
    ):
        axes.add_patch(
            FancyArrowPatch(
                (start, MIDDLE), (end, MIDDLE), arrowstyle="-|>", mutation_scale=11, color=INK
            )
        )
    notes = (
        (57, ENCODER, "sees the kept patches only;\nstays after pretraining"),
        (75, INK, "mask tokens\nin the gaps"),
        (
            89.5,
            DECODER,
            f"{'asks for each' if model.decoder == 'cross' else 'sees all'};\ngoes after pretraining",
        ),
        (109, INK, "loss: squared error of\nthe removed patches"),
    )
    for x, color, words in notes:
        axes.text(x, 1.5, words, ha="center", fontsize=9, color=color)
    return figure_picture(figure)


def show(axes: Axes, picture: np.ndarray, left: float, title: str, words: str) -> None:
    """A picture with a title above and words below."""
    put(axes, picture, left, MIDDLE - SIDE / 2, SIDE)
    axes.text(left + SIDE / 2, MIDDLE + SIDE / 2 + 1.5, title, ha="center", fontsize=11, color=INK)
    axes.text(left + SIDE / 2, MIDDLE - SIDE / 2 - 2.5, words, ha="center", fontsize=9, color=INK)


def tokens(axes: Axes, patches: Sequence[np.ndarray | None], center: float) -> None:
    """Patches as tokens in order, row by row, around `center`; None is a mask token."""
    columns = -(-len(patches) // COLUMN)
    size = min(TOKEN, LONGEST / columns)
    top = MIDDLE + size * -(-len(patches) // columns) / 2
    for number, patch in enumerate(patches):
        x, y = (
            center + (number % columns - columns / 2) * size,
            top - (number // columns + 1) * size,
        )
        if patch is None:
            axes.add_patch(Rectangle((x, y), 0.85 * size, 0.85 * size, color=REMOVED))
        else:
            put(axes, patch, x, y, 0.85 * size)


def put(axes: Axes, picture: np.ndarray, left: float, bottom: float, side: float) -> None:
    """A picture in the middle of a square, in its own aspect, without moving the drawing's
    limits."""
    height, width = (side * length / max(picture.shape[:2]) for length in picture.shape[:2])
    left, bottom = left + (side - width) / 2, bottom + (side - height) / 2
    extent = (left, left + width, bottom, bottom + height)
    axes.imshow(picture, extent=extent, interpolation="nearest", aspect="auto")
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))


def trapezoid(
    axes: Axes, left: float, width: float, first: float, last: float, color: str, words: str
) -> None:
    """A network: heights `first` at its entry and `last` at its end."""
    right = left + width
    corners = [(left, -first / 2), (left, first / 2), (right, last / 2), (right, -last / 2)]
    axes.add_patch(Polygon([(x, MIDDLE + y) for x, y in corners], color=color))
    axes.text(left + width / 2, MIDDLE, words, ha="center", va="center", fontsize=11, color="white")


if __name__ == "__main__":
    run_cli(main)
