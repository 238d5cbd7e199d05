"""Drawing: labelled grids of images, heat maps over images. No display is needed, as nothing here
opens a window.

Pictures are uint8 `(H, W, 3)` numpy arrays, heat maps float `(rows, columns)` of patches.
"""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from util.files import write_output

Box = tuple[float, float, float, float]  # top, left, bottom, right, in pixels

DPI = 100  # of figures; a point of text is 1 / 72 inch
COLORS = matplotlib.colormaps["turbo"]
OPACITY = 0.5  # of a heat map over its image
CELL = 160  # pixels that a small image's longest side is enlarged to, by a whole factor
LARGEST_CELL = 224  # pixels that a large image's longest side is reduced to in a grid
GAP, TEXT = 6, 22  # pixels between cells, and of a line of text
CHARACTER = 6  # pixels of a letter, on average
OVERLAY = 480  # as CELL, for a heat map of its own


def to_picture(image: Tensor) -> np.ndarray:
    """An image `(1 or 3, H, W)`, uint8 or float in [0, 1], as a picture."""
    if image.is_floating_point():
        image = (image * 255).round().to(torch.uint8)
    return np.ascontiguousarray(image.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy())  # (H, W, 3)


def enlarged(picture: np.ndarray, longest: int) -> np.ndarray:
    """Each pixel as a square of the largest whole side that keeps the picture within `longest`, at
    least 1."""
    factor = max(1, longest // max(picture.shape[:2]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def heat_over(picture: np.ndarray, heat: np.ndarray, box: Box | None = None) -> np.ndarray:
    """The picture with a heat map over its part `box`; None is all of it."""
    height, width = picture.shape[:2]
    top, left, bottom, right = (round(edge) for edge in box or (0, 0, height, width))
    top, left = min(top, height - 1), min(left, width - 1)
    bottom, right = (
        max(bottom, top + 1),
        max(right, left + 1),
    )  # rounded, a box may be less than a pixel
    values = torch.from_numpy(unit_range(heat)).float()[None, None]
    smooth = F.interpolate(
        values, size=(bottom - top, right - left), mode="bilinear", align_corners=False
    )[0, 0]
    colors = COLORS(smooth.numpy(), bytes=True)[..., :3]
    result = picture.copy()
    part = result[max(top, 0) : bottom, max(left, 0) : right]  # or reach a pixel past the image
    colors = colors[max(-top, 0) :, max(-left, 0) :][: part.shape[0], : part.shape[1]]
    part[:] = np.round(np.float32(1 - OPACITY) * part + np.float32(OPACITY) * colors)
    return result


def unit_range(heat: np.ndarray) -> np.ndarray:
    """Values from 0 (lowest) to 1 (highest); a flat map is all 0."""
    low, high = float(heat.min()), float(heat.max())
    return (heat - low) / (high - low) if high > low else np.zeros_like(heat)


def draw_grid(
    rows: Sequence[Sequence[np.ndarray]],
    columns: Sequence[str],
    labels: Sequence[str],
    caption: str = "",
) -> np.ndarray:
    """Pictures of one size in rows, a title over each column, a label (if any) over each row and a
    caption below."""
    pictures = [[_fitted(picture) for picture in row] for row in rows]
    height, width = pictures[0][0].shape[:2]
    total_width = max(len(row) for row in pictures) * (width + GAP) + GAP
    texts: list[tuple[int, int, str]] = []
    placed: list[tuple[int, int, np.ndarray]] = []
    y = TEXT if columns else GAP
    texts += [(GAP + (width + GAP) * place, 0, title) for place, title in enumerate(columns)]
    for row, label in zip(pictures, labels, strict=True):
        if label:
            texts.append((GAP, y, label))
            y += TEXT
        placed += [(GAP + (width + GAP) * place, y, picture) for place, picture in enumerate(row)]
        y += height + GAP
    for line in textwrap.wrap(caption, max(20, int(total_width / CHARACTER))):
        texts.append((GAP, y, line))
        y += TEXT
    canvas = np.full((y, total_width, 3), 255, dtype=np.uint8)
    for x, top, picture in placed:
        canvas[top : top + height, x : x + width] = picture
    return _write(canvas, texts)


def draw_overlay(picture: np.ndarray, heat: np.ndarray, box: Box, label: str) -> np.ndarray:
    """A heat map over its part of a picture, at the picture's size (a small one's multiple), and
    its colour bar.

    The bar is in the map's own values, and `label` says what they are.
    """
    large = enlarged(picture, OVERLAY)
    height, width = large.shape[:2]
    top, left, bottom, right = (edge * (height // picture.shape[0]) for edge in box)
    image = heat_over(large, heat, (top, left, bottom, right))
    scale = max(1.0, height / 600)  # of bar and text, so that they can be read beside a large image
    bar, figure_width = round(20 * scale), width + round(150 * scale)
    figure = Figure(figsize=(figure_width / DPI, height / DPI), dpi=DPI)
    axes = figure.add_axes(((width + 2 * bar / 3) / figure_width, 0.08, bar / figure_width, 0.84))
    norm = Normalize(float(heat.min()), float(heat.max()))
    colorbar = figure.colorbar(ScalarMappable(norm, COLORS), cax=axes)
    colorbar.ax.tick_params(labelsize=9 * scale)
    colorbar.formatter = FuncFormatter(lambda value, _: f"{value:.3g}")  # no factor above the bar
    colorbar.set_label(label, fontsize=9 * scale)
    result = figure_picture(figure)
    result[:height, :width] = image
    return result


def square_rows(pictures: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Pictures in rows of equal length (the last may be shorter), about as many rows as columns."""
    columns = math.ceil(math.sqrt(len(pictures)))
    return [list(pictures[start : start + columns]) for start in range(0, len(pictures), columns)]


def write_png(path: Path, picture: np.ndarray) -> Path:
    """Writes a picture. Raises: InputError where that is not possible."""
    return write_output(path, lambda target: Image.fromarray(picture).save(target, format="PNG"))


def write_npy(path: Path, array: np.ndarray) -> Path:
    """Writes an array in numpy's format. Raises: InputError where that is not possible."""

    def write(target: Path) -> None:
        with target.open("wb") as file:
            np.save(file, array, allow_pickle=False)

    return write_output(path, write)


def _fitted(picture: np.ndarray) -> np.ndarray:
    """A picture at the size of a grid's cell."""
    height, width = picture.shape[:2]
    if max(height, width) <= LARGEST_CELL:
        return enlarged(picture, CELL)
    factor = LARGEST_CELL / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def _write(canvas: np.ndarray, texts: Sequence[tuple[int, int, str]]) -> np.ndarray:
    """Texts onto a canvas, at (x, y) of their lines' top left corners."""
    height, width = canvas.shape[:2]
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.figimage(canvas)
    for x, y, text in texts:
        readable = text.encode(errors="replace").decode()  # a file's name may be no text
        figure.text(
            x / width,
            1 - (y + TEXT / 2) / height,
            readable,
            fontsize=8,
            va="center",
            parse_math=False,
        )
    return figure_picture(figure)


def figure_picture(figure: Figure) -> np.ndarray:
    """A figure of matplotlib as a picture."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # (H, W, 3)
