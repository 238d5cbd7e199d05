"""Draws the method in one picture, with a real image and what a trained model makes of it; this is
figures/overview.png of the README.

    python tools/draw_overview.py --config cfgs/pretrain/ViT-Ti_CIFAR10.yaml \\
        --model_path /path/to/pretrain/model --img_path /path/to/image \\
        --save_path figures/overview.png

It takes the settings of tools/run_mae_vis.py, for one image under one mask; --save_path is the
picture.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon

from data.transforms import EvalTransform, PixelNormalizer
from engine.evaluation.from_weights import build_autoencoder
from engine.pictures.choose import open_images
from engine.pictures.drawing import DPI, check_replaceable, figure_picture, to_picture, write_png
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

# In units of the drawing, of which DPI / 10 pixels make one.
WIDTH, HEIGHT, MIDDLE = 121, 36, 19  # the drawing, and the height of its arrows
SIDE = 18  # of an image
TOKENS_HEIGHT, TOKENS_ROWS = 24, 16  # of a block of tokens: its height, and tokens in a column
ARROWS = ((20.5, 24.5), (43.5, 46.5), (49.5, 52.5), (66.5, 70.5), (79.5, 83.5), (95.5, 99.5))
ENCODER, DECODER, INK = "#3b6ea5", "#d98c3f", "#333333"
MASK_TOKEN, WHITE = 201, 255  # grey levels


def main(argv: Sequence[str] | None = None) -> Path:
    """Writes the picture and returns its path."""
    cfg = load_config(OverviewConfig, "draw_overview", argv, siblings=STAGE_CONFIGS)
    assert cfg.model_path is not None, "the config checks that there are weights"
    path = Path(cfg.save_path)
    check_writable("save_path", path.parent)
    check_replaceable(path)
    (image,) = open_images(
        "img_path", cfg.img_path, cfg.dataset, cfg.data_path, 1, cfg.in_chans
    ).values()
    stream = generator(cfg.seed[0], MASK, 0)
    with init_processes(cfg.device) as processes:
        model = build_autoencoder(cfg, cfg.model_path, cfg.mask_ratio[0]).to(processes.device)
        normalize = PixelNormalizer(cfg.mean, cfg.std, processes.device)
        mask = draw_mask(cfg.mask, model.grid_size, cfg.mask_ratio[0], stream)
        found = reconstruct(model, EvalTransform(cfg.img_size, 1.0)(image), mask, normalize)
    write_png(path, draw(model, mask, found))
    print(f"wrote {path}")
    return path


def draw(model: MaskedAutoencoder, mask: Mask, found: Reconstruction) -> np.ndarray:
    """The drawing, left to right: image, kept patches, encoder, all tokens, decoder,
    reconstruction."""
    figure = Figure(figsize=(WIDTH / 10, HEIGHT / 10), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    original, masked, pasted = (
        to_picture(picture) for picture in (found.original, found.masked, found.pasted)
    )
    total, (rows, columns), (height, width) = model.num_patches, model.grid_size, model.patch_size
    cut = original.reshape(rows, height, columns, width, 3).swapaxes(1, 2)
    patches = cut.reshape(total, height, width, 3)
    removed = mask.ids_shuffle[mask.kept :].numpy()
    filled = patches.copy()
    filled[removed] = MASK_TOKEN
    reading = "asks for each" if model.decoder == "cross" else "sees all"
    for picture, center, longest, title, words in (
        (original, 11, SIDE, "image", f"{total} patches"),
        (masked, 34, SIDE, "masked", f"{len(removed)} removed, {mask.kept} kept"),
        (token_block(np.delete(patches, removed, axis=0)), 48, TOKENS_HEIGHT, "", ""),
        (token_block(filled), 75, TOKENS_HEIGHT, "", ""),
        (pasted, 109, SIDE, "reconstruction", "kept patches pasted in"),
    ):
        show(axes, picture, center, longest, title, words)
    trapezoid(axes, 53, 66, 22, 17, ENCODER, f"encoder\ndepth {len(model.blocks)}")
    trapezoid(axes, 84, 95, 13, 18, DECODER, f"decoder\ndepth {len(model.decoder_blocks)}")
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "color": INK, "shrinkA": 0, "shrinkB": 0}
    for start, end in ARROWS:
        axes.annotate("", (end, MIDDLE), (start, MIDDLE), arrowprops=style)
    for x, color, words in (
        (57, ENCODER, "sees the kept patches only;\nis kept after pretraining"),
        (75, INK, "mask tokens\nin the gaps"),
        (89.5, DECODER, f"{reading};\nis dropped after pretraining"),
        (109, INK, "loss: squared error of\nthe removed patches"),
    ):
        axes.text(x, 1.5, words, ha="center", fontsize=9, color=color)
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="auto")
    axes.set_axis_off()
    return figure_picture(figure)


def show(
    axes: Axes, picture: np.ndarray, center: float, longest: float, title: str, words: str
) -> None:
    """A picture in its own aspect around (`center`, MIDDLE), a title above it and words below."""
    height, width = (longest * side / max(picture.shape[:2]) for side in picture.shape[:2])
    extent = (center - width / 2, center + width / 2, MIDDLE - height / 2, MIDDLE + height / 2)
    axes.imshow(picture, extent=extent, interpolation="nearest")
    axes.text(center, MIDDLE + longest / 2 + 1.5, title, ha="center", fontsize=11, color=INK)
    axes.text(center, MIDDLE - longest / 2 - 2.5, words, ha="center", fontsize=9, color=INK)


def token_block(patches: np.ndarray) -> np.ndarray:
    """Patches `(n, P, Q, 3)` in order, row by row with gaps between them, as one picture."""
    (count, height, width, _), columns = patches.shape, -(-len(patches) // TOKENS_ROWS)
    gap = max(1, height // 6)
    tokens = np.full((TOKENS_ROWS, columns, height + gap, width + gap, 3), WHITE, np.uint8)
    tokens.reshape(-1, *tokens.shape[2:])[:count, :height, :width] = patches
    return np.concatenate(np.concatenate(list(tokens), axis=1), axis=1)


def trapezoid(
    axes: Axes, left: float, right: float, first: float, last: float, color: str, words: str
) -> None:
    """A network, `first` high on its left and `last` high on its right."""
    corners = [(left, -first / 2), (left, first / 2), (right, last / 2), (right, -last / 2)]
    axes.add_patch(Polygon([(x, MIDDLE + y) for x, y in corners], color=color))
    place = ((left + right) / 2, MIDDLE)
    axes.text(*place, words, ha="center", va="center", fontsize=11, color="white")


if __name__ == "__main__":
    run_cli(main)
