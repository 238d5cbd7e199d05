"""Attention rollout (arXiv 2005.00928): where a Vision Transformer looks, over all of its layers.

    python tools/vit_explain.py --config cfgs/finetune/ViT-S_50E_CLS-Token.yaml \\
        --finetune /path/to/pretrain/model --image_path /path/to/image \\
        --head_fusion max --discard_ratio 0.9

For each image it writes <name>_rollout.png, the map over the image with a colour bar;
<name>_rollout.npy, the map itself, one value per patch; and <name>_heads.png, each head of the last
layer (or of --layer_index). rollouts.png shows all images as the model sees them, with their maps.
With --category_index the maps show what speaks for one class, by the gradient (arXiv 2103.15679);
this needs a classifier with a head. Without --image_path the images are validation images of the
data set.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.transforms import EvalTransform, PixelNormalizer
from engine.evaluation.from_weights import build_frozen
from engine.pictures.choose import open_images
from engine.pictures.drawing import draw_grid, draw_overlay, heat_over, square_rows, to_picture
from engine.pictures.output import check_replaceable, write_npy, write_png
from engine.pictures.rollout import class_attentions, read_patches, rollout
from engine.run.folder import check_writable
from models.build import classifier_config_problems
from models.vit import VisionTransformer
from models.weights.read import read_weights
from util.dist import init_processes
from util.errors import InputError, run_cli
from util.settings.evaluation import RANDOM_WEIGHTS, STAGE_CONFIGS
from util.settings.read import load_config
from util.settings.tools import ExplainConfig

ENDINGS = ("rollout.png", "rollout.npy", "heads.png")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Writes the pictures and maps; returns the paths `grid` of rollouts.png and `overlays` of each
    image's picture."""
    checks = [classifier_config_problems]
    cfg = load_config(ExplainConfig, "vit_explain", argv, checks=checks, siblings=STAGE_CONFIGS)
    assert cfg.finetune is not None, "the config checks that there are weights"
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    folder, suffix = Path(cfg.save_path), suffix_of(cfg)
    check_writable("save_path", folder)
    images = open_images(
        "image_path", cfg.image_path, cfg.dataset, cfg.data_path, cfg.num_images, cfg.in_chans
    )
    files = {name: [folder / f"{name}{suffix}_{end}" for end in ENDINGS] for name in images}
    grid = folder / f"rollouts{suffix}.png"
    check_replaceable(grid, *(path for paths in files.values() for path in paths))
    num_classes = check_category(cfg, cfg.finetune)
    pairs = []
    with init_processes(cfg.device) as processes:
        model = build_frozen(cfg, cfg.finetune, num_classes or 1)[0].to(processes.device)
        check_layer(cfg, len(model.blocks))
        normalize = PixelNormalizer(cfg.mean, cfg.std, processes.device)
        fit = EvalTransform(cfg.img_size, cfg.crop_pct)
        has_cls = model.cls_token is not None
        # For a class, the rows that the head reads: a token that it ignores has a gradient of 0.
        reader = cfg.reader or ("token" if cfg.category_index is None else cfg.global_pool)
        for name, image in images.items():
            shown = fit(image)
            attentions = attentions_of(cfg, model, normalize(shown[None]))
            patches = rollout(
                attentions, cfg.head_fusion, cfg.discard_ratio, has_cls, cfg.layer_index, reader
            )
            heat = to_map(patches[0], model)  # (rows, columns)
            overlay_path, map_path, heads_path = files[name]
            write_npy(map_path, heat)
            box = fit.seen(*image.shape[-2:])
            write_png(overlay_path, draw_overlay(to_picture(image), heat, box, label_of(cfg)))
            picture = to_picture(shown)
            pairs.append([picture, heat_over(picture, heat)])
            layer = len(attentions) - 1 if cfg.layer_index is None else cfg.layer_index
            heads = read_patches(attentions[layer][0], has_cls, reader)  # (heads, N)
            rows = square_rows([heat_over(picture, to_map(head, model)) for head in heads])
            title = f"{name}: the {len(heads)} heads of layer {layer}"
            write_png(heads_path, draw_grid(rows, [], [title] + [""] * (len(rows) - 1)))
            print(f"wrote {overlay_path}, {map_path.name} and {heads_path.name}")
    write_png(grid, draw_grid(pairs, ["image", "rollout"], list(images)))
    print(f"wrote {grid}")
    return {"grid": grid, "overlays": [paths[0] for paths in files.values()]}


def attentions_of(cfg: ExplainConfig, model: VisionTransformer, images: Tensor) -> list[Tensor]:
    """Each layer's attention `(B, heads, T, T)`, or its part that speaks for the chosen class."""
    if cfg.category_index is None:
        with torch.no_grad():
            return model.attention_maps(images)
    logits, attentions = class_attentions(model, images, cfg.category_index)
    share = 100 * logits.softmax(dim=-1)[0, cfg.category_index].item()
    choice = logits[0].argmax().item()
    print(f"class {cfg.category_index}: {share:.1f} %, the model's choice is class {choice}")
    return attentions


def to_map(patches: Tensor, model: VisionTransformer) -> np.ndarray:
    """Values of the patches `(N,)` in their places, `(rows, columns)`."""
    return patches.view(model.grid_size).float().cpu().numpy()


def check_category(cfg: ExplainConfig, weights: str) -> int:
    """The number of classes of the weights, 0 without a head. Raises: InputError if the settings
    contradict the weights, or if the chosen class does not exist."""
    info = None if weights == RANDOM_WEIGHTS else read_weights(weights)[1]
    num_classes = 0 if info is None else info.known("num_classes") or 0
    trained_with = None if info is None else info.known("global_pool")
    if trained_with not in (None, cfg.global_pool):
        raise InputError(
            f"global_pool is {cfg.global_pool} and {weights} was trained with {trained_with}"
        )
    if num_classes and cfg.num_classes not in (None, num_classes):
        raise InputError(
            f"num_classes is {cfg.num_classes} in the settings and {num_classes} in {weights}"
        )
    if cfg.category_index is not None and not num_classes:
        kind = weights if info is None else f"{weights} ({info.kind})"
        raise InputError(
            f"category_index needs a classifier, and {kind} has no head: name a fine-tuned model"
        )
    if cfg.category_index is not None and cfg.category_index >= num_classes:
        raise InputError(
            f"category_index is {cfg.category_index} and {weights} has {num_classes} classes, "
            f"counted from 0"
        )
    return num_classes


def check_layer(cfg: ExplainConfig, depth: int) -> None:
    """Raises: InputError if the chosen layer does not exist."""
    if cfg.layer_index is not None and cfg.layer_index >= depth:
        raise InputError(
            f"layer_index is {cfg.layer_index} and the model has {depth} layers, counted from 0"
        )


def label_of(cfg: ExplainConfig) -> str:
    """What a map shows, for its colour bar."""
    layer = "" if cfg.layer_index is None else f" of layer {cfg.layer_index} alone"
    category = "" if cfg.category_index is None else f" for class {cfg.category_index}"
    return f"attention rollout{layer}{category}"


def suffix_of(cfg: ExplainConfig) -> str:
    """The chosen class and layer, as part of the files' names."""
    category = "" if cfg.category_index is None else f"_class{cfg.category_index}"
    return category + ("" if cfg.layer_index is None else f"_layer{cfg.layer_index}")


if __name__ == "__main__":
    run_cli(main)
