"""Pictures of what an encoder's features tell apart, without labels.

    python tools/see_features.py --finetune /path/to/pretrain/model --data_path /path/to/images \\
        --save_path output/features --beside random

`--data_path` is what tools/embed.py takes, and the weights say what the model is. `--beside` names
more weights, or random, whose features are drawn on the same images. The folder `--save_path` gets:

- patches.png: the three main directions (PCA) of the patches' features as red, green and blue, one
  basis for all images. Patches of one colour are alike to the model.
- similar.png: how alike each patch of the images is to one patch of the first image, `--patch`.
- neighbours.png: the images whose mean features are most alike to those of each image.
- map.png: the mean features of all images in two dimensions, by UMAP where umap-learn is installed
  and else by PCA, coloured by folder, or without folders by cluster.

Features of masked autoencoders tell much of where a patch is. `--remove_position` subtracts from
those of patches.png and similar.png the mean feature of their place over all images.
"""

import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps, figure
from torch import Tensor
from torch.nn import functional as F

from data.images import pixel_format
from data.loader import loader_maker
from data.sources import ArraySource, ImageSource, check_format
from data.transforms import EvalTransform
from data.unlabelled import ReadableDataset, open_images
from engine.evaluation.apply import load_model, with_weights
from engine.evaluation.features import on_pixels
from engine.pictures.choose import spread
from engine.pictures.drawing import (
    CELL,
    DPI,
    check_replaceable,
    draw_grid,
    enlarged,
    figure_picture,
    heat_over,
    to_picture,
    write_png,
)
from engine.run.folder import check_writable
from models.blocks import init_weights
from models.spec import block_numbers
from models.vit import VisionTransformer
from util.dist import Processes, init_processes
from util.errors import InputError, run_cli
from util.files import printable
from util.settings.base import DataConfig
from util.settings.evaluation import RANDOM_WEIGHTS, STAGE_CONFIGS
from util.settings.read import load_config
from util.settings.tools import SeeFeaturesConfig

PICTURES = ("patches", "similar", "neighbours", "map")
CLUSTERS = 10
MOST_GROUPS = 20  # folders that have colours of their own
INLIERS = (0.01, 0.99)  # quantiles of a direction that are drawn as none and all of a colour
CHARACTERS = 22  # of a text above a picture


@dataclass(frozen=True)
class Seen:
    """What one model makes of the images.

    title: of the weights.
    source: the images.
    numbers: of the `m` images in the source that could be read.
    means: their mean features `(m, D)`.
    shown: places in `numbers` of the `n` images that are shown.
    patches: the features of their patches `(n, rows, columns, D)`.
    picture: an image of `numbers`, by its place, as the model sees it.
    """

    title: str
    source: ImageSource
    numbers: list[int]
    means: Tensor
    shown: list[int]
    patches: Tensor
    picture: Callable[[int], np.ndarray]


def main(argv: Sequence[str] | None = None) -> dict[str, Path]:
    """Writes the pictures; returns their paths by name."""
    cfg = load_config(SeeFeaturesConfig, "see_features", argv, siblings=STAGE_CONFIGS)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    folder = Path(cfg.save_path)
    check_writable("save_path", folder)
    paths = {name: folder / f"{name}.png" for name in PICTURES}
    check_replaceable(*paths.values())
    with init_processes(cfg.device) as processes:
        seen = [see(cfg, weights, processes) for weights in (cfg.finetune, *cfg.beside)]
    if any(each.numbers != seen[0].numbers for each in seen):
        raise InputError("beside: some of these weights cannot read all images that others can")
    drawn = {
        "patches": draw_patches(seen),
        "similar": draw_similar(seen, cfg.patch),
        "neighbours": draw_neighbours(seen, cfg.num_neighbours),
        "map": draw_map(seen, cfg.seed),
    }
    for name, picture in drawn.items():
        print(f"wrote {write_png(paths[name], picture)}")
    return paths


@torch.no_grad()
def see(cfg: SeeFeaturesConfig, weights: str | None, processes: Processes) -> Seen:
    """What the model of `weights` makes of the images.

    Raises: InputError for weights that cannot be read, a layer that they do not have, or if fewer
    than two images can be read.
    """
    is_random = weights == RANDOM_WEIGHTS
    cfg = cfg.model_copy(update={} if is_random else {"finetune": weights})
    model, info = load_model(cfg, uses_head=False)
    assert isinstance(model, VisionTransformer), "without its head a model is an encoder"
    if is_random:
        torch.manual_seed(cfg.seed)
        init_weights(model)
    cfg = with_weights(cfg, info)
    assert cfg.img_size is not None, "the weights have one"
    block = block_numbers([cfg.layer], len(model.blocks))[0]
    source = check_format(open_images(cfg, pixel_format(cfg, info.spec.in_chans)))
    model = model.to(processes.device).eval()

    def encode(images: Tensor) -> Tensor:
        """`(B, C, H, W)` -> the features of the patches `(B, N, D)`."""
        tokens = next(islice(model.iterate_tokens(images), block, None))
        if cfg.last_norm:  # of a classifier that reads the mean through fc_norm, that one
            tokens = model.fc_norm(model.norm(tokens))
        return tokens[:, model.spec.class_tokens :].float()

    fit = EvalTransform(cfg.img_size, cfg.crop_pct)
    dataset = ReadableDataset(source, fit, info.spec.in_chans)
    make_loader = loader_maker(DataConfig(num_workers=cfg.num_workers), processes)
    call = on_pixels(encode, cfg, cfg.precision, processes.device)
    compared = spread(len(source), cfg.num_compared)
    batches = [compared[at : at + cfg.batch_size] for at in range(0, len(compared), cfg.batch_size)]
    means, readable, of_position = [], [], torch.zeros(())
    for batch in make_loader(dataset, batch_sampler=batches):
        features = call(batch.images).cpu()  # (B, N, D)
        means.append(features.mean(dim=1))
        readable += batch.targets.bool().tolist()
        of_position = of_position + features[batch.targets.bool()].sum(dim=0)  # (N, D)
    numbers = [number for number, is_kept in zip(compared, readable, strict=True) if is_kept]
    if len(numbers) < len(compared):
        logging.warning("%d images cannot be read", len(compared) - len(numbers))
    if len(numbers) < 2:
        raise InputError(f"data_path {cfg.data_path} has fewer than two images that can be read")
    shown = spread(len(numbers), cfg.num_images)
    patches = torch.cat([call(fit(source.read(numbers[place]))[None]).cpu() for place in shown])
    if cfg.remove_position:
        patches = patches - of_position / len(numbers)  # (n, N, D)

    def picture(place: int) -> np.ndarray:
        return to_picture(fit(source.read(numbers[place])).float() / 255, cfg.show_channels)

    kind = RANDOM_WEIGHTS if is_random else Path(str(cfg.finetune)).name
    return Seen(
        title=kind,
        source=source,
        numbers=numbers,
        means=torch.cat(means)[torch.tensor(readable)],
        shown=shown,
        patches=patches.unflatten(1, model.grid_size),
        picture=picture,
    )


def main_directions(features: Tensor, count: int) -> Tensor:
    """Features `(n, D)` along the `count` directions of their largest variance, `(n, count)`. The
    largest weight of a direction is positive, so that the same features give the same picture."""
    centred = features.double() - features.double().mean(dim=0)
    directions = torch.linalg.eigh(centred.mT @ centred).eigenvectors.flip(1)[:, :count]  # (D, .)
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    return centred @ (directions * largest.sign())


def draw_patches(seen: Sequence[Seen]) -> np.ndarray:
    """The images, and beside each the main directions of its patches' features as colours."""
    colours = []
    for each in seen:
        found = main_directions(each.patches.flatten(0, 2), 3)  # (n * N, 3)
        low, high = found.quantile(torch.tensor(INLIERS, dtype=found.dtype), dim=0)
        levels = ((found - low) / (high - low).clamp(min=1e-12)).clamp(0, 1) * 255
        colours.append(levels.to(torch.uint8).view(*each.patches.shape[:3], 3).numpy())
    return beside_images(seen, lambda model, place, image: fitted(colours[model][place], image))


def draw_similar(seen: Sequence[Seen], patch: tuple[int, int] | None) -> np.ndarray:
    """The images with the cosine similarity of their patches to one of the first image, which has a
    white frame; in one scale for all images of a model. Raises: InputError for a patch that is not
    there."""
    maps, frames = [], []
    for each in seen:
        rows, columns = each.patches.shape[1:3]
        row, column = patch or (rows // 2, columns // 2)
        if row >= rows or column >= columns:
            raise InputError(f"patch {row} {column}: there are {rows} rows and {columns} columns")
        features = F.normalize(each.patches, dim=-1)
        maps.append((features @ features[0, row, column]).numpy())
        frames.append((row / rows, (row + 1) / rows, column / columns, (column + 1) / columns))

    def draw(model: int, place: int, image: np.ndarray) -> np.ndarray:
        drawn = heat_over(image, maps[model][place], (maps[model].min(), maps[model].max()))
        if place == 0:
            height, width = image.shape[:2]
            top, bottom = (round(edge * height) for edge in frames[model][:2])
            left, right = (round(edge * width) for edge in frames[model][2:])
            inside = drawn[top + 1 : bottom - 1, left + 1 : right - 1].copy()
            drawn[top:bottom, left:right] = 255
            drawn[top + 1 : bottom - 1, left + 1 : right - 1] = inside
        return drawn

    return beside_images(seen, draw)


def beside_images(
    seen: Sequence[Seen], draw: Callable[[int, int, np.ndarray], np.ndarray]
) -> np.ndarray:
    """A row for each image of the first model, with what `draw` makes of a model's number, the
    image's and the image."""
    rows = []
    for place in range(len(seen[0].shown)):
        image = enlarged(seen[0].picture(seen[0].shown[place]), CELL)
        rows.append([image, *(draw(number, place, image) for number in range(len(seen)))])
    labels = [name_of(seen[0], place) for place in seen[0].shown]
    return draw_grid(rows, ["image", *(each.title for each in seen)], labels)


def fitted(map_of_patches: np.ndarray, image: np.ndarray) -> np.ndarray:
    """A picture of a pixel per patch, in the size of an image."""
    rows, columns = (
        np.arange(size) * patches // size
        for size, patches in zip(image.shape[:2], map_of_patches.shape[:2], strict=True)
    )
    return map_of_patches[rows][:, columns]


def draw_neighbours(seen: Sequence[Seen], count: int) -> np.ndarray:
    """A row for each image and model: the image, and those with the highest cosine similarity of
    the mean features, with the similarity and the folder."""
    queries = len(seen[0].shown)
    count = min(count, len(seen[0].numbers) - 1)
    drawn = figure.Figure((1.5 * (count + 1), 1.75 * queries * len(seen)), dpi=DPI)
    axes = drawn.subplots(queries * len(seen), count + 1, squeeze=False)
    for number, each in enumerate(seen):
        groups = groups_of(each)
        features = F.normalize(each.means, dim=1)
        for query, place in enumerate(each.shown):
            alike = features @ features[place]  # (m,)
            alike[place] = math.inf  # the image itself comes first
            for cell, found in enumerate(alike.topk(count + 1).indices.tolist()):
                panel = axes[query * len(seen) + number, cell]
                panel.imshow(each.picture(found))
                panel.axis("off")
                said = f"{alike[found]:.3f}" if cell else each.title
                panel.set_title(shortened(f"{said} {groups[found]}".strip()), fontsize=8)
    drawn.tight_layout()
    return figure_picture(drawn)


def draw_map(seen: Sequence[Seen], seed: int) -> np.ndarray:
    """The mean features of each model in two dimensions."""
    drawn = figure.Figure((7 * len(seen), 6), dpi=DPI)
    for panel, each in zip(drawn.subplots(1, len(seen), squeeze=False)[0], seen, strict=True):
        points, how = in_two_dimensions(each.means, seed)
        groups = groups_of(each)
        if not 1 < len(set(groups)) <= MOST_GROUPS:
            groups = [f"cluster {number}" for number in clusters(each.means, seed)]
        names = sorted(set(groups))
        for number, name in enumerate(names):
            chosen = [place for place, group in enumerate(groups) if group == name]
            colour = colormaps["tab20"](number)
            panel.scatter(*points[chosen].T, s=8, color=colour, label=shortened(name))
        panel.set_title(f"{each.title}: {len(points)} images, {how}")
        panel.set_xticks([])
        panel.set_yticks([])
        panel.legend(fontsize=7, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    drawn.tight_layout()
    return figure_picture(drawn)


def in_two_dimensions(means: Tensor, seed: int) -> tuple[np.ndarray, str]:
    """Features `(m, D)` as points `(m, 2)`, and by what."""
    try:
        from umap import UMAP
    except ImportError:
        return main_directions(means, 2).numpy(), "PCA"
    return UMAP(random_state=seed).fit_transform(main_directions(means, 50).numpy()), "UMAP"


def clusters(means: Tensor, seed: int) -> list[int]:
    """The number of the cluster of each feature `(m, D)`, by k-means."""
    from sklearn.cluster import KMeans  # here, as importing it takes long

    found = KMeans(min(CLUSTERS, len(means)), random_state=seed, n_init=3).fit_predict(
        means.numpy()
    )
    return found.tolist()


def groups_of(seen: Seen) -> list[str]:
    """The folder of each image that was compared, or its class in a known set; else nothing."""
    if isinstance(seen.source, ArraySource):
        return [f"class {seen.source.labels[number]}" for number in seen.numbers]
    paths = [Path(seen.source.name(number)) for number in seen.numbers]
    return [printable(path.parent.name) for path in paths]


def name_of(seen: Seen, place: int) -> str:
    """A short name of an image, by its place."""
    return shortened(printable(Path(seen.source.name(seen.numbers[place])).name))


def shortened(text: str) -> str:
    """A text that fits above a picture."""
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}..."


if __name__ == "__main__":
    run_cli(main)
