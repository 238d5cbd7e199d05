"""Pictures of what segmentation and detection predict, beside the truth, and bars of the figures of
each class. A class has the same colour in both.

Shapes: `C` channels, `H` and `W` height and width of an image, `n` objects.
"""

import colorsys
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from data.annotated import SourceAnnotation
from data.transforms import resize
from engine.evaluation.classification import Scores
from engine.pictures.drawing import (
    DPI,
    FONT,
    FONT_SIZE,
    LARGEST_CELL,
    PER_CLASS_PICTURE,
    PREDICTIONS_PICTURE,
    draw_grid,
    figure_picture,
    to_picture,
)
from engine.run.records import Records
from engine.tasks.task import Task

NUM_EXAMPLES = 8  # validation images in a picture
SHOWN_FROM = 0.5  # score from which on a predicted object is drawn
GOLDEN = 0.618034  # share of the circle of hues between two classes: neighbours differ
MOST_BARS = 200  # classes in the picture of bars, the first ones


class Example(NamedTuple):
    """A validation image `(C, H, W)`, the truth, and what a model says, which may have the "scores"
    `(n,)` of its objects as well; both in the image's own pixels."""

    name: str
    image: Tensor
    truth: SourceAnnotation
    predicted: SourceAnnotation


class Examples(NamedTuple):
    """Some validation images, which are made one after the other, as they may be large; and the
    names of all classes."""

    class_names: list[str]
    rows: Iterable[Example]


def write_predictions(
    records: Records, task: Task, model: nn.Module, scores: Scores, step: int
) -> None:
    """Writes the pictures of a model's predictions and of its figures of each class into the run's
    folder and TensorBoard; nothing of classification. For the main process."""
    examples = task.examples(model)
    if examples is not None:
        records.write_picture(PREDICTIONS_PICTURE, draw_examples(examples), step)
        bars = draw_bars(examples.class_names, scores.figures.per_class)
        records.write_picture(PER_CLASS_PICTURE, bars, step)


def color(label: int) -> tuple[int, int, int]:
    """The colour of a class, red, green and blue from 0 to 255."""
    red, green, blue = colorsys.hsv_to_rgb(label * GOLDEN % 1, 0.8, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_examples(examples: Examples) -> np.ndarray:
    """A picture with a row for each image: the image, the truth and the prediction."""
    rows, labels = [], []
    caption = f"The colours of the classes are those of {PER_CLASS_PICTURE}."
    for name, image, truth, predicted in examples.rows:
        shown: list[SourceAnnotation] = [{}, truth, predicted]
        rows.append([over(image, found, examples.class_names) for found in shown])
        labels.append(name)
        if "boxes" in truth:
            caption = f"Objects are drawn from a score of {SHOWN_FROM:g} on."
    return draw_grid(rows, ["image", "truth", "prediction"], labels, caption)


def over(image: Tensor, found: SourceAnnotation, class_names: list[str]) -> np.ndarray:
    """An image in a square of LARGEST_CELL pixels, at its upper left, with masks in their classes'
    colours over it, and boxes with class and score."""
    height, width = image.shape[-2:]
    scale = LARGEST_CELL / max(height, width)
    scale = max(1.0, math.floor(scale)) if scale >= 1 else scale  # whole pixels, or reduced
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    pixels = torch.from_numpy(to_picture(image)).permute(2, 0, 1)  # (3, H, W)
    if scale < 1:
        pixels = resize(pixels, (rows, columns), "bicubic")
    # (rows, columns, 3)
    picture = at_size(pixels, rows, columns).permute(1, 2, 0).contiguous().numpy().copy()
    if "mask" in found:
        mask = at_size(found["mask"], rows, columns)
        for label in mask.unique().tolist():
            if label >= 0:
                blend(picture, (mask == label).numpy(), label)
    kept: list[int] = []
    if "boxes" in found:
        scores = found.get("scores", torch.ones(len(found["boxes"])))
        kept = (scores >= SHOWN_FROM).nonzero().flatten().tolist()
    if "masks" in found:
        for place in kept:
            mask = at_size(found["masks"][place], rows, columns)
            blend(picture, (mask > 0).numpy(), int(found["labels"][place]))
    drawn = Image.fromarray(picture)
    for place in kept:
        label = int(found["labels"][place])
        text = class_names[label]
        if "scores" in found:
            text += f" {found['scores'][place]:.2f}"
        draw_box(drawn, (found["boxes"][place] * scale).tolist(), text, color(label))
    square = np.full((LARGEST_CELL, LARGEST_CELL, 3), 255, np.uint8)
    square[:rows, :columns] = np.asarray(drawn)
    return square


def at_size(values: Tensor, rows: int, columns: int) -> Tensor:
    """`(..., H, W)` at another size, each pixel that of the nearest place."""
    height, width = values.shape[-2:]
    row = (torch.arange(rows) * height).div(rows, rounding_mode="floor")
    column = (torch.arange(columns) * width).div(columns, rounding_mode="floor")
    return values[..., row[:, None], column]


def blend(picture: np.ndarray, pixels: np.ndarray, label: int) -> None:
    """Mixes a class's colour half and half into some pixels `(H, W)` bool, in place."""
    picture[pixels] = (picture[pixels].astype(np.uint16) + np.array(color(label), np.uint16)) // 2


def draw_box(
    picture: Image.Image, box: list[float], text: str, outline: tuple[int, int, int]
) -> None:
    """Draws a box (left, top, right, bottom) and a text above it, or inside where there is no room,
    in place."""
    from matplotlib import font_manager  # here, as importing matplotlib takes long

    font = ImageFont.truetype(font_manager.findfont(FONT), FONT_SIZE)
    pen = ImageDraw.Draw(picture)
    left, top, right, bottom = box
    pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=outline, width=2)
    size = pen.textbbox((0, 0), text, font=font)[2:]
    left = max(0, min(left, picture.width - size[0]))
    top = top - size[1] if top >= size[1] else top + 2
    pen.rectangle((left, top, left + size[0], top + size[1]), fill=(0, 0, 0))
    pen.text((left, top), text, fill=outline, font=font)


def draw_bars(class_names: list[str], per_class: dict[str, list[float]]) -> np.ndarray:
    """A picture with a panel for each figure of the classes, in percent, and a bar for each class,
    in its colour; a class without a figure has none."""
    from matplotlib.figure import Figure

    names = class_names[:MOST_BARS]
    places = np.arange(len(names))
    figure = Figure(figsize=(2 + 3 * len(per_class), 1 + 0.2 * len(names)), dpi=DPI)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, len(per_class), sharey=True, squeeze=False)[0]
    for panel, (title, values) in zip(panels, per_class.items(), strict=True):
        widths = [0 if math.isnan(value) else value for value in values[: len(names)]]
        colors = [tuple(part / 255 for part in color(label)) for label in range(len(names))]
        panel.barh(places, widths, color=colors)
        for place, value in zip(places, values, strict=False):
            text = "none" if math.isnan(value) else f"{value:.1f}"
            panel.text(1, place, text, va="center", fontsize=7)
        panel.set(title=f"{title}, %", xlim=(0, 100), yticks=places, ylim=(len(names) - 0.5, -0.5))
        panel.set_yticklabels(names, fontsize=8)
    return figure_picture(figure)
