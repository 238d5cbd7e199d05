"""Attention rollout (arXiv 2005.00928): where a Vision Transformer looks, over all of its layers.

    python tools/vit_explain.py --config cfgs/finetune/ViT-S_50E_CLS-Token.yaml \\
        --finetune /path/to/pretrain/model --image_path /path/to/image \\
        --head_fusion max --discard_ratio 0.9

For each image it writes <name>_rollout.png, the map over the image with a colour bar;
<name>_rollout.npy, the map itself, one value per patch; and <name>_heads.png, each head of the last
layer (or of --layer_index). rollouts.png shows all images as the model sees them, with their maps.
With --category_index the maps show what speaks for one class, by the gradient (arXiv 2103.15679);
this needs a classifier with a head. With --reader probe the weights are those of an attentive probe
(main_lincls.py --probe attentive): <name>_probe.png and .npy are the mean attention of its queries,
<name>_queries.png that of each. Without --image_path the images are validation images of the data
set.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import cm, colors, figure
from torch import Tensor

from data.images import pixel_format
from data.transforms import EvalTransform, PixelNormalizer
from engine.evaluation.from_weights import build_frozen
from engine.pictures.choose import open_images
from engine.pictures.drawing import (
    COLORS,
    DPI,
    MARK,
    check_replaceable,
    draw_grid,
    enlarged,
    figure_picture,
    heat_over,
    to_picture,
    write_png,
)
from engine.pictures.rollout import read_patches, rollout
from engine.run.folder import check_writable
from models.build import classifier_config_problems
from models.heads.attentive import attention_of
from models.vit import VisionTransformer
from models.weights.read import read_weights
from util.dist import init_processes
from util.errors import InputError, run_cli, where
from util.files import write_output
from util.settings.evaluation import RANDOM_WEIGHTS, STAGE_CONFIGS
from util.settings.read import load_config
from util.settings.tools import ExplainConfig

OVERLAY = 480  # a small image is enlarged as often as keeps it within these pixels


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Writes the pictures and maps; returns the paths `grid` of rollouts.png or probes.png, and
    `overlays` of each image's picture."""
    cfg = load_config(
        ExplainConfig,
        "vit_explain",
        argv,
        checks=[classifier_config_problems],
        siblings=STAGE_CONFIGS,
    )
    assert cfg.finetune is not None, "the config checks that there are weights"
    folder = Path(cfg.save_path)
    check_writable("save_path", folder)
    images = open_images(
        "image_path",
        cfg.image_path,
        cfg.dataset,
        cfg.data_path,
        cfg.num_images,
        pixel_format(cfg, cfg.in_chans),
    )
    chosen = {"class": cfg.category_index, "layer": cfg.layer_index}
    suffix = "".join(f"_{key}{index}" for key, index in chosen.items() if index is not None)
    kind, parts = ("probe", "queries") if cfg.reader == "probe" else ("rollout", "heads")
    endings = (f"{kind}.png", f"{kind}.npy", f"{parts}.png")
    files = {name: [folder / f"{name}{suffix}_{end}" for end in endings] for name in images}
    grid = folder / f"{kind}s{suffix}.png"
    check_replaceable(grid, *(path for paths in files.values() for path in paths))
    info = None if cfg.finetune == RANDOM_WEIGHTS else read_weights(cfg.finetune)[1]
    num_classes = info.known("num_classes") if info and info.task == "classify" else 0
    pairs = []
    with init_processes(cfg.device) as processes:
        model = build_frozen(cfg, cfg.finetune, num_classes or 1)[0].to(processes.device)
        check_choices(cfg, model, num_classes, info and info.known("global_pool"))
        normalize = PixelNormalizer(cfg.mean, cfg.std, processes.device)
        fit = EvalTransform(cfg.img_size, cfg.crop_pct)
        class_tokens = model.class_tokens
        # For a class, the rows that the head reads: a token that it ignores has a gradient of 0.
        reader = cfg.reader or ("token" if cfg.category_index is None else cfg.global_pool)
        if model.pool is not None and cfg.reader is None:
            reader = "avg"
            print(
                "an attentive probe reads the patches: --reader probe draws what its queries take"
            )
        for name, image in images.items():
            shown = fit(image)
            pixels = normalize(shown[None])
            if model.pool is not None and reader == "probe":
                with torch.no_grad():
                    tokens = model.forward_map(pixels).flatten(2).mT  # (1, N, D)
                    each = attention_of(tokens, model.pool.queries)[0]  # (M, N)
                whole_map, title = each.mean(dim=0), f"{name}: the {len(each)} queries of the probe"
            else:
                attentions = attentions_of(cfg, model, pixels)
                layer = len(attentions) - 1 if cfg.layer_index is None else cfg.layer_index
                layers = attentions if cfg.layer_index is None else [attentions[layer]]
                whole_map = rollout(
                    layers, cfg.head_fusion, cfg.discard_ratio, class_tokens, reader
                )[0]
                each = read_patches(attentions[layer][0], class_tokens, reader)  # (heads, N)
                title = f"{name}: the {len(each)} heads of layer {layer}"
            heat = to_map(whole_map, model)  # (rows, columns)
            overlay_path, map_path, heads_path = files[name]
            write_npy(map_path, heat)
            box = fit.seen(*image.shape[-2:])
            whole, picture = (
                to_picture(pixels.float() / 255, cfg.show_channels) for pixels in (image, shown)
            )
            write_png(overlay_path, draw_overlay(whole, heat, box, label_of(cfg)))
            pairs.append([picture, heat_over(picture, heat)])
            maps = [heat_over(picture, to_map(one, model)) for one in each]
            columns = math.ceil(math.sqrt(len(maps)))  # about as many as rows
            rows = [maps[start : start + columns] for start in range(0, len(maps), columns)]
            write_png(heads_path, draw_grid(rows, [title], [""] * len(rows)))
            print(f"wrote {overlay_path}, {map_path.name} and {heads_path.name}")
    write_png(grid, draw_grid(pairs, ["image", kind], list(images)))
    print(f"wrote {grid}")
    return {"grid": grid, "overlays": [paths[0] for paths in files.values()]}


def check_choices(
    cfg: ExplainConfig, model: VisionTransformer, num_classes: int, trained_with: object
) -> None:
    """Raises: InputError if the settings contradict weights of `num_classes` classes (0 without a
    head), `trained_with` a global_pool or None, or if the chosen class or layer does not exist."""
    category, layer, depth = cfg.category_index, cfg.layer_index, len(model.blocks)
    problems = where(
        (
            # an attentive readout reads the patch tokens as well
            {"attentive": "avg"}.get(str(trained_with), trained_with)
            not in (None, cfg.global_pool),
            f"global_pool is {cfg.global_pool} and {cfg.finetune} was trained with {trained_with}",
        ),
        (
            num_classes > 0 and cfg.num_classes not in (None, num_classes),
            f"num_classes is {cfg.num_classes} in the settings and {num_classes} in {cfg.finetune}",
        ),
        (
            category is not None and category >= num_classes,
            f"category_index is {category} and {cfg.finetune} has {num_classes} classes, counted "
            f"from 0: name one of them, or a fine-tuned model with a head",
        ),
        (
            layer is not None and layer >= depth,
            f"layer_index is {layer} and the model has {depth} layers, counted from 0",
        ),
        (
            cfg.reader == "probe" and model.pool is None,
            f"reader probe draws an attentive probe and {cfg.finetune} has none: name the "
            "model.safetensors of a linear classification with probe attentive",
        ),
    )
    if problems:
        raise InputError("; ".join(problems))


def attentions_of(cfg: ExplainConfig, model: VisionTransformer, images: Tensor) -> list[Tensor]:
    """Each layer's attention `(B, heads, T, T)`, or for a chosen class the positive part of the
    attention times its gradient.

    Source: arXiv 2103.15679, equation 5.
    """
    if cfg.category_index is None:
        return model.attention_maps(images)
    logits, attentions = model.forward_with_attention(images.requires_grad_())
    gradients = torch.autograd.grad(logits[:, cfg.category_index].sum(), attentions)
    share = 100 * logits.softmax(dim=-1)[0, cfg.category_index].item()
    choice = logits[0].argmax().item()
    print(f"class {cfg.category_index}: {share:.1f} %, the model's choice is class {choice}")
    return [(a * g).clamp(min=0).detach() for a, g in zip(attentions, gradients, strict=True)]


def to_map(patches: Tensor, model: VisionTransformer) -> np.ndarray:
    """Values of the patches `(N,)` in their places, `(rows, columns)`."""
    return patches.view(model.grid_size).float().cpu().numpy()


def draw_overlay(
    picture: np.ndarray, heat: np.ndarray, box: Sequence[float], label: str
) -> np.ndarray:
    """A picture with a heat map over its part `box`, and a colour bar beside it.

    A small picture is enlarged by a whole factor. The bar shows the values of the map, and `label`
    says what they are. `box` is top, left, bottom and right, in pixels.
    """
    result = enlarged(picture, OVERLAY)
    height = result.shape[0]
    top, left, bottom, right = (edge * (height // picture.shape[0]) for edge in box)
    # Rounded outwards, so that a part of less than a pixel is drawn too.
    part = np.s_[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)]
    result[part] = heat_over(result[part], heat)
    scale = max(1.0, height / 600)  # enlarges the bar and its text beside a large picture
    side = figure.Figure(figsize=(1.5 * scale, (height + 0.5) / DPI), dpi=DPI)
    axes = side.add_axes((0.1, 0.08, 0.13, 0.84))
    values = cm.ScalarMappable(colors.Normalize(float(heat.min()), float(heat.max())), COLORS)
    bar = side.colorbar(values, cax=axes, format="%.3g")
    bar.set_label(label, fontsize=9 * scale)
    axes.tick_params(labelsize=9 * scale)
    return np.hstack([result, figure_picture(side)])


def label_of(cfg: ExplainConfig) -> str:
    """What a map shows, for its colour bar."""
    if cfg.reader == "probe":
        return "attention of the probe's queries"
    layer = "" if cfg.layer_index is None else f" of layer {cfg.layer_index} alone"
    category = "" if cfg.category_index is None else f" for class {cfg.category_index}"
    return f"attention rollout{layer}{category}"


def write_npy(path: Path, array: np.ndarray) -> None:
    """Writes an array in numpy's format. Raises: InputError where that is not possible."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    content.write(MARK.encode())  # readers stop where the array ends
    write_output(path, lambda target: target.write_bytes(content.getvalue()))


if __name__ == "__main__":
    run_cli(main)
