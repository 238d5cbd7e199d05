"""Attention rollout (arXiv 2005.00928): where a Vision Transformer looks, over all of its layers.

    python tools/vit_explain.py --config cfgs/finetune/ViT-S_50E_CLS-Token.yaml --finetune
        /path/to/pretrain/model \\ --image_path /path/to/image --head_fusion max --discard_ratio 0.9

Of each image: <name>_rollout.png, the map over the image with a colour bar; <name>_rollout.npy, the
map itself, a row per row of patches; <name>_heads.png, each head of the last layer (or of
--layer_index). rollouts.png shows all images as the model takes them, with their maps.
--category_index asks what speaks for one class, by the gradient (arXiv 2103.15679), and needs a
classifier with a head. Without --image_path it takes validation images of the data set.
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
from engine.pictures.drawing import (
    draw_grid,
    draw_overlay,
    heat_over,
    square_rows,
    to_picture,
    write_npy,
    write_png,
)
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


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Writes the pictures and maps; returns the paths `grid` of rollouts.png and `overlays` of each
    image's picture."""
    checks = [classifier_config_problems]
    cfg = load_config(ExplainConfig, "vit_explain", argv, checks=checks, siblings=STAGE_CONFIGS)
    assert cfg.finetune is not None, "the config checks that there are weights"
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    folder = Path(cfg.save_path)
    check_writable("save_path", folder)
    images = open_images(
        "image_path", cfg.image_path, cfg.dataset, cfg.data_path, cfg.num_images, cfg.in_chans
    )
    num_classes = check_category(cfg, cfg.finetune)
    overlays, pairs = [], []
    with init_processes(cfg.device) as processes:
        model = build_frozen(cfg, cfg.finetune, num_classes or 1).model.to(processes.device)
        check_layer(cfg, len(model.blocks))
        normalize = PixelNormalizer(cfg.mean, cfg.std, processes.device)
        fit = EvalTransform(cfg.img_size, cfg.crop_pct)
        has_cls = model.cls_token is not None
        # what speaks for a class goes by what the head reads: the gradient of a class token it
        # ignores is 0
        reader = cfg.reader or ("token" if cfg.category_index is None else cfg.global_pool)
        for name, image in images.items():
            shown = fit(image)
            picture = to_picture(shown)
            attentions = look(cfg, model, normalize(shown[None]))
            patches = rollout(
                attentions, cfg.head_fusion, cfg.discard_ratio, has_cls, cfg.layer_index, reader
            )
            heat = to_map(patches[0], model)  # (rows, columns)
            stem = folder / (name + suffix(cfg))
            write_npy(Path(f"{stem}_rollout.npy"), heat)
            overlay = draw_overlay(
                to_picture(image), heat, fit.seen(*image.shape[-2:]), label_of(cfg)
            )
            overlays.append(write_png(Path(f"{stem}_rollout.png"), overlay))
            pairs.append([picture, heat_over(picture, heat)])
            layer = len(attentions) - 1 if cfg.layer_index is None else cfg.layer_index
            heads = read_patches(attentions[layer][0], has_cls, reader)  # (heads, N)
            maps = [heat_over(picture, to_map(of_head, model)) for of_head in heads]
            title = f"{name}: the {len(maps)} heads of layer {layer}"
            rows = square_rows(maps)
            labels = [title] + [""] * (len(rows) - 1)
            write_png(Path(f"{stem}_heads.png"), draw_grid(rows, [], labels))
            print(f"wrote {overlays[-1]}, the map as .npy, and {stem.name}_heads.png")
    grid = write_png(
        folder / f"rollouts{suffix(cfg)}.png", draw_grid(pairs, ["image", "rollout"], list(images))
    )
    print(f"wrote {grid}")
    return {"grid": grid, "overlays": overlays}


def look(cfg: ExplainConfig, model: VisionTransformer, images: Tensor) -> list[Tensor]:
    """Each layer's attention `(B, heads, T, T)`, or what of it speaks for the class that is asked
    about."""
    if cfg.category_index is None:
        with torch.no_grad():
            return model.attention_maps(images)
    logits, attentions = class_attentions(model, images, cfg.category_index)
    share = logits.softmax(dim=-1)[0, cfg.category_index].item()
    print(
        f"class {cfg.category_index}: {100 * share:.1f} %, the model's choice is class {logits[0].argmax().item()}"
    )
    return attentions


def to_map(patches: Tensor, model: VisionTransformer) -> np.ndarray:
    """Values of the patches `(N,)` in their places, `(rows, columns)`."""
    return patches.view(model.grid_size).float().cpu().numpy()


def check_category(cfg: ExplainConfig, weights: str) -> int:
    """The number of classes of the weights. Raises: InputError where they cannot say what speaks
    for a class."""
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
    if cfg.category_index is None:
        return num_classes
    if info is None or not num_classes:
        kind = weights if info is None else f"{weights} ({info.kind})"
        raise InputError(
            f"category_index needs a classifier, and {kind} has no head: name a fine-tuned model"
        )
    if cfg.category_index >= num_classes:
        raise InputError(
            f"category_index {cfg.category_index} is not one of the {num_classes} classes of {weights}"
        )
    return num_classes


def check_layer(cfg: ExplainConfig, depth: int) -> None:
    """Raises: InputError where the layer that is asked for does not exist."""
    if cfg.layer_index is not None and cfg.layer_index >= depth:
        raise InputError(
            f"layer_index {cfg.layer_index} is not one of the {depth} layers, counted from 0"
        )


def label_of(cfg: ExplainConfig) -> str:
    """What a map shows, beside its colour bar."""
    words = ["attention rollout"]
    if cfg.layer_index is not None:
        words.append(f"of layer {cfg.layer_index} alone")
    if cfg.category_index is not None:
        words.append(f"for class {cfg.category_index}")
    return " ".join(words)


def suffix(cfg: ExplainConfig) -> str:
    """What tells the files of one question about an image from those of another."""
    words = [
        "" if value is None else f"_{word}{value}"
        for word, value in (("class", cfg.category_index), ("layer", cfg.layer_index))
    ]
    return "".join(words)


if __name__ == "__main__":
    run_cli(main)
