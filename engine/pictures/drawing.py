"""Drawing: grids of images with labels, and heat maps over images.

Pictures are uint8 `(H, W, 3)` numpy arrays, heat maps float `(rows, columns)` of patches. Nothing
here opens a window, so no display is needed.
"""

import math
import textwrap
from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

Box = tuple[float, float, float, float]  # top, left, bottom, right, in pixels

DPI = 100  # of matplotlib's figures
COLORS = matplotlib.colormaps["turbo"]
OPACITY = 0.5  # of a heat map over its image
CELL = (
    160  # a small image is enlarged by the largest whole factor that keeps it within these pixels
)
LARGEST_CELL = 224  # longest side, in pixels, to which a large image is reduced in a grid
OVERLAY = 480  # as CELL, for an image that is drawn alone
GAP, TEXT = 6, 20  # pixels between images, and height in pixels of a line of text
CHARACTER = 6  # average width of a letter in pixels
FONT = ImageFont.truetype(findfont("DejaVu Sans"), 11)


def to_picture(image: Tensor) -> np.ndarray:
    """An image `(1 or 3, H, W)`, uint8 or float in [0, 1], as a picture."""
    if image.is_floating_point():
        image = (image * 255).round().to(torch.uint8)
    return np.ascontiguousarray(image.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy())  # (H, W, 3)


def enlarged(picture: np.ndarray, longest: int) -> np.ndarray:
    """A copy with every pixel repeated, as often as keeps the picture within `longest` pixels."""
    factor = max(1, longest // max(picture.shape[:2]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def heat_over(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """The picture under a heat map, whose colours run from its lowest to its highest value."""
    low, high = float(heat.min()), float(heat.max())
    values = torch.from_numpy((heat - low) / ((high - low) or 1.0)).float()[None, None]
    smooth = F.interpolate(values, size=picture.shape[:2], mode="bilinear")[0, 0]  # (H, W)
    colors = COLORS(smooth.numpy(), bytes=True)[..., :3]
    mixed = np.float32(1 - OPACITY) * picture + np.float32(OPACITY) * colors
    return np.round(mixed).astype(np.uint8)


def draw_overlay(picture: np.ndarray, heat: np.ndarray, box: Box, label: str) -> np.ndarray:
    """A picture with a heat map over its part `box`, and a colour bar beside it.

    A small picture is enlarged by a whole factor. The bar shows the values of the map, and `label`
    says what they are.
    """
    result = enlarged(picture, OVERLAY)
    height = result.shape[0]
    top, left, bottom, right = (edge * (height // picture.shape[0]) for edge in box)
    # Rounded outwards, so that a part of less than a pixel is drawn too.
    part = np.s_[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)]
    result[part] = heat_over(result[part], heat)
    scale = max(1.0, height / 600)  # enlarges the bar and its text beside a large picture
    figure = Figure(figsize=(1.5 * scale, (height + 0.5) / DPI), dpi=DPI)
    axes = figure.add_axes((0.1, 0.08, 0.13, 0.84))
    colors = ScalarMappable(Normalize(float(heat.min()), float(heat.max())), COLORS)
    bar = figure.colorbar(colors, cax=axes, format="%.3g")
    bar.set_label(label, fontsize=9 * scale)
    axes.tick_params(labelsize=9 * scale)
    return np.hstack([result, figure_picture(figure)])


def draw_grid(
    rows: Sequence[Sequence[np.ndarray]],
    columns: Sequence[str],
    labels: Sequence[str],
    caption: str = "",
) -> np.ndarray:
    """Pictures of one size in rows, with a title over each column, a label over each row (unless
    it is empty) and a caption below."""
    cells = [[_cell(picture) for picture in row] for row in rows]
    width, height = cells[0][0].size
    lefts = [GAP + (width + GAP) * place for place in range(max(map(len, cells)))]
    right = lefts[-1] + width + GAP
    lines = textwrap.wrap(caption, max(20, right // CHARACTER))
    num_texts = bool(columns) + sum(map(bool, labels)) + len(lines)
    size = (right, GAP + TEXT * num_texts + (height + GAP) * len(rows))
    canvas = Image.new("RGB", size, "white")
    y = _write(canvas, GAP, lefts, columns)
    for row, label in zip(cells, labels, strict=True):
        y = _write(canvas, y, lefts, [label] if label else [])
        for left, cell in zip(lefts, row, strict=False):
            canvas.paste(cell, (left, y))
        y += height + GAP
    for line in lines:
        y = _write(canvas, y, lefts, [line])
    return np.array(canvas)


def square_rows(pictures: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Pictures in rows of equal length (the last may be shorter), about as many rows as columns."""
    columns = math.ceil(math.sqrt(len(pictures)))
    return [list(pictures[start : start + columns]) for start in range(0, len(pictures), columns)]


def figure_picture(figure: Figure) -> np.ndarray:
    """A figure of matplotlib as a picture."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # (H, W, 3)


def _cell(picture: np.ndarray) -> Image.Image:
    """A picture at the size that it has in a grid."""
    if max(picture.shape[:2]) <= LARGEST_CELL:
        return Image.fromarray(enlarged(picture, CELL))
    image = Image.fromarray(picture)
    image.thumbnail((LARGEST_CELL, LARGEST_CELL), Image.Resampling.LANCZOS)
    return image


def _write(canvas: Image.Image, y: int, lefts: Sequence[int], texts: Sequence[str]) -> int:
    """Writes texts side by side; returns where the next line begins."""
    for left, text in zip(lefts, texts, strict=False):
        printable = text.encode(errors="replace").decode()  # a file's name may not be Unicode
        ImageDraw.Draw(canvas).text((left, y + 2), printable, fill="black", font=FONT)
    return y + TEXT if texts else y
