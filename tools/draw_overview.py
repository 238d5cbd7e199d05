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
from matplotlib.figure import Figure

from data.images import pixel_format
from data.transforms import EvalTransform, PixelNormalizer
from engine.evaluation.from_weights import build_autoencoder
from engine.pictures.choose import open_images
from engine.pictures.drawing import DPI, check_replaceable, figure_picture, to_picture, write_png
from engine.pictures.reconstruction import reconstruct
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
SIDE, TOKENS = 18, 24  # longest side of an image, and of a block of tokens
TOKENS_ROWS = 16  # tokens in a column of a block
ARROWS = (22.5, 45, 51, 68.5, 81.5, 97.5)  # where they lie
READING = {"self": "sees all", "cross": "asks for each"}  # decoder -> what it does
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
        "img_path", cfg.img_path, cfg.dataset, cfg.data_path, 1, pixel_format(cfg, cfg.in_chans)
    ).values()
    with init_processes(cfg.device) as processes:
        model = build_autoencoder(cfg, cfg.model_path, cfg.mask_ratio[0]).to(processes.device)
        normalize = PixelNormalizer(cfg.mean, cfg.std, processes.device)
        mask = draw_mask(
            cfg.mask,
            model.grid_size,
            cfg.mask_ratio[0],
            generator(cfg.seed[0], MASK, 0),
            cfg.mask_block,
        )
        found = reconstruct(model, EvalTransform(cfg.img_size, 1.0)(image), mask, normalize)
    pictures = [
        to_picture(picture, cfg.show_channels)
        for picture in (found.original, found.masked, found.pasted)
    ]
    write_png(path, draw(model, mask, pictures))
    print(f"wrote {path}")
    return path


def draw(model: MaskedAutoencoder, mask: Mask, pictures: list[np.ndarray]) -> np.ndarray:
    """The drawing, left to right: image, kept patches, encoder, all tokens, decoder,
    reconstruction. `pictures` are the original, the masked and the pasted one."""
    original, masked, pasted = pictures
    total, (rows, columns), (height, width) = model.num_patches, model.grid_size, model.patch_size
    cut = original.reshape(rows, height, columns, width, 3).swapaxes(1, 2)
    patches = cut.reshape(total, height, width, 3)
    removed = mask.ids_shuffle[mask.kept :].numpy()
    filled = patches.copy()
    filled[removed] = MASK_TOKEN
    figure = Figure(figsize=(WIDTH / 10, HEIGHT / 10), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    for picture, center, longest in (
        (original, 11, SIDE),
        (masked, 34, SIDE),
        (token_block(np.delete(patches, removed, axis=0)), 48, TOKENS),
        (token_block(filled), 75, TOKENS),
        (pasted, 109, SIDE),
    ):
        up, right = (longest * side / max(picture.shape[:2]) / 2 for side in picture.shape[:2])
        extent = (center - right, center + right, MIDDLE - up, MIDDLE + up)
        axes.imshow(picture, extent=extent, interpolation="nearest")
    # The encoder narrows and the decoder widens.
    axes.fill((53, 53, 66, 66), (MIDDLE - 11, MIDDLE + 11, MIDDLE + 8.5, MIDDLE - 8.5), ENCODER)
    axes.fill((84, 84, 95, 95), (MIDDLE - 6.5, MIDDLE + 6.5, MIDDLE + 9, MIDDLE - 9), DECODER)
    for x, y, size, color, words in (
        *((x, MIDDLE, 17, INK, "\u27f6") for x in ARROWS),
        (11, 30, 11, INK, "image"),
        (34, 30, 11, INK, "masked"),
        (109, 30, 11, INK, "reconstruction"),
        (59.5, MIDDLE, 11, "white", f"encoder\ndepth {len(model.blocks)}"),
        (89.5, MIDDLE, 11, "white", f"decoder\ndepth {len(model.decoder_blocks)}"),
        (11, 8, 9, INK, f"{total} patches"),
        (34, 8, 9, INK, f"{len(removed)} removed, {mask.kept} kept"),
        (109, 8, 9, INK, "kept patches pasted in"),
        (57, 2.8, 9, ENCODER, "sees the kept patches only;\nis kept after pretraining"),
        (75, 2.8, 9, INK, "mask tokens\nin the gaps"),
        (89.5, 2.8, 9, DECODER, f"{READING[model.decoder]};\nis dropped after pretraining"),
        (109, 2.8, 9, INK, "loss: squared error of\nthe removed patches"),
    ):
        axes.text(x, y, words, ha="center", va="center", fontsize=size, color=color)
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="auto")
    axes.set_axis_off()
    return figure_picture(figure)


def token_block(patches: np.ndarray) -> np.ndarray:
    """Patches `(n, P, Q, 3)` in order, row by row with gaps between them, as one picture."""
    (count, height, width, _), columns = patches.shape, -(-len(patches) // TOKENS_ROWS)
    gap = max(1, height // 6)
    tokens = np.full((TOKENS_ROWS, columns, height + gap, width + gap, 3), WHITE, np.uint8)
    tokens.reshape(-1, *tokens.shape[2:])[:count, :height, :width] = patches
    return np.concatenate(np.concatenate(list(tokens), axis=1), axis=1)


if __name__ == "__main__":
    run_cli(main)
