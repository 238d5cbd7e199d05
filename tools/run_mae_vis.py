"""Pictures of what a masked autoencoder reconstructs (arXiv 2111.06377, figures 2 to 4 and 6).

    python tools/run_mae_vis.py --config cfgs/pretrain/ViT-B_400E_Norm_GAP.yaml \\
        --save_path output/reconstructions --model_path /path/to/pretrain/model \\
        --img_path /path/to/image

For each image, --mask_ratio and --seed it writes four PNGs: original, masked, prediction, and
pasted (the visible patches, with the prediction in the gaps); and grid.png with all of them and the
PSNR of the removed patches. --img_path takes several images and folders; without it the images are
validation images of the data set. --mask is random, block, grid, green or blockwise. An image is
resized to cover img_size, and its centre is cropped. --layout columns puts the images of grid.png
side by side, without the prediction of visible patches; so is figures/front.png of the README.
"""

from collections.abc import Sequence
from itertools import chain, product
from pathlib import Path

from data.images import pixel_format
from data.transforms import EvalTransform, PixelNormalizer
from engine.evaluation.from_weights import build_autoencoder
from engine.pictures.choose import open_images
from engine.pictures.drawing import check_replaceable, draw_grid, to_picture, write_png
from engine.pictures.reconstruction import COLUMNS, caption_of, reconstruct
from engine.run.folder import check_writable
from models.build import mae_config_problems
from models.masks import draw_mask
from util.dist import init_processes
from util.errors import run_cli
from util.rng import MASK, generator
from util.settings.evaluation import STAGE_CONFIGS
from util.settings.read import load_config
from util.settings.tools import MaeVisConfig


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Writes the pictures; returns `grid` (the path of grid.png) and `psnr` in dB by the pictures'
    names."""
    cfg = load_config(
        MaeVisConfig, "run_mae_vis", argv, checks=[mask_problems], siblings=STAGE_CONFIGS
    )
    assert cfg.model_path is not None, "the config checks that there are weights"
    folder = Path(cfg.save_path)
    check_writable("save_path", folder)
    images = open_images(
        "img_path",
        cfg.img_path,
        cfg.dataset,
        cfg.data_path,
        cfg.num_images,
        pixel_format(cfg, cfg.in_chans),
    )
    tasks = [
        (full_name_of(cfg, name, seed, ratio), name, place, seed, ratio)
        for (place, name), seed, ratio in product(enumerate(images), cfg.seed, cfg.mask_ratio)
    ]
    grid = folder / "grid.png"
    check_replaceable(
        grid, *(folder / f"{task[0]}_{column}.png" for task in tasks for column in COLUMNS)
    )
    with init_processes(cfg.device) as processes:
        model = build_autoencoder(cfg, cfg.model_path, cfg.mask_ratio[0]).to(processes.device)
        normalize = PixelNormalizer(cfg.mean, cfg.std, processes.device)
        fit = EvalTransform(cfg.img_size, crop_pct=1.0)
        masks = [  # all of them first, so that an impossible one is refused before any is drawn
            draw_mask(
                cfg.mask, model.grid_size, ratio, generator(seed, MASK, place), cfg.mask_block
            )
            for _, _, place, seed, ratio in tasks
        ]
        rows, labels, psnr = [], [], {}
        for (full_name, name, _, seed, _), mask in zip(tasks, masks, strict=True):
            found = reconstruct(model, fit(images[name]), mask, normalize)
            rows.append([to_picture(picture, cfg.show_channels) for picture in found[:-1]])
            for column, picture in zip(COLUMNS, rows[-1], strict=True):
                write_png(folder / f"{full_name}_{column}.png", picture)
            psnr[full_name] = found.psnr.item()
            labels.append(
                f"{name}  {100 * mask.mask_ratio:.3g} % removed ({cfg.mask}, seed {seed})  "
                f"PSNR {psnr[full_name]:.2f} dB"
            )
            print(labels[-1])
    titles: Sequence[str] = COLUMNS
    if cfg.layout == "columns":
        titles = [f"PSNR {value:.2f} dB" for value in psnr.values()]
        labels = [column for column in COLUMNS if column != "prediction"]
        rows = [[row[COLUMNS.index(column)] for row in rows] for column in labels]
    write_png(grid, draw_grid(rows, titles, labels, caption_of(model)))
    print(f"wrote {grid} and {len(COLUMNS) * len(tasks)} single pictures beside it")
    return {"grid": grid, "psnr": psnr}


def mask_problems(cfg: MaeVisConfig) -> list[str]:
    """What is wrong with the geometry or with a mask ratio, one line each."""
    found = [mae_config_problems(cfg, mask_ratio=r, pred_ratio=None) for r in cfg.mask_ratio]
    return list(dict.fromkeys(chain.from_iterable(found)))


def full_name_of(cfg: MaeVisConfig, name: str, seed: int, ratio: float) -> str:
    """The image's name, followed by the seed and the ratio if there are several of these."""
    seed_part = f"_seed{seed}" if len(cfg.seed) > 1 else ""
    return f"{name}{seed_part}" + (f"_{ratio:g}" if len(cfg.mask_ratio) > 1 else "")


if __name__ == "__main__":
    run_cli(main)
