"""Drawing: grids of images with labels, heat maps over images, and their files.

Pictures are uint8 `(H, W, 3)` numpy arrays, heat maps float `(rows, columns)` of patches. Nothing
here opens a window, so no display is needed. A tool replaces only files that a tool made, which
have a mark: who calls a file of theirs `grid.png` keeps it.
"""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F

from util.errors import InputError
from util.files import write_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARK = "masked-autoencoder picture tools"  # PNG text "Software", HTML generator, tail of an array
# in the folder of a run
MONITOR_PICTURE = "monitor.png"
PREDICTIONS_PICTURE, PER_CLASS_PICTURE = "predictions.png", "per_class.png"

DPI = 100  # of matplotlib's figures
COLORS = "turbo"  # of heat maps, in matplotlib's words
CELL = 160  # a small picture is enlarged as often as keeps it within these pixels
LARGEST_CELL = 224  # longest side, in pixels, to which a large image is reduced in a grid
GAP, TEXT = 6, 20  # pixels between images, and height in pixels of a line of text
CHARACTER = 6  # average width of a letter in pixels
FONT, FONT_SIZE = "DejaVu Sans", 11


def to_picture(image: Tensor, show_channels: tuple[int, ...] = ()) -> np.ndarray:
    """An image `(C, H, W)`, uint8 or float in [0, 1], as a picture of one or three of its channels,
    counted from 1; without such a choice of the first three, or of one or two of the first."""
    chosen = show_channels or ((1, 2, 3) if len(image) >= 3 else (1,))
    image = image[[number - 1 for number in chosen]]
    if image.is_floating_point():
        image = (image * 255).round().to(torch.uint8)
    return np.ascontiguousarray(image.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy())  # (H, W, 3)


def enlarged(picture: np.ndarray, longest: int) -> np.ndarray:
    """A copy with every pixel repeated, as often as keeps the picture within `longest` pixels."""
    factor = max(1, longest // max(picture.shape[:2]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def heat_over(
    picture: np.ndarray, heat: np.ndarray, limits: tuple[float, float] | None = None
) -> np.ndarray:
    """The picture, blended half and half with a heat map whose colours run from the lower to the
    upper limit; None is its lowest and highest value."""
    from matplotlib import colormaps  # here, as importing matplotlib takes long

    low, high = limits or (float(heat.min()), float(heat.max()))
    values = torch.from_numpy((heat - low) / ((high - low) or 1.0)).float()[None, None]
    smooth = F.interpolate(values, size=picture.shape[:2], mode="bilinear")[0, 0]  # (H, W)
    colors = colormaps[COLORS](smooth.numpy(), bytes=True)[..., :3]
    return np.round((np.float32(picture) + colors) / 2).astype(np.uint8)


def draw_grid(
    rows: Sequence[Sequence[np.ndarray]],
    columns: Sequence[str],
    labels: Sequence[str],
    caption: str = "",
) -> np.ndarray:
    """Pictures of one size in rows, with a title over each column, a label over each row (unless
    it is empty) and a caption below."""
    from matplotlib import font_manager

    font = ImageFont.truetype(font_manager.findfont(FONT), FONT_SIZE)
    cells = [[_cell(picture) for picture in row] for row in rows]
    height, width = cells[0][0].shape[:2]
    lefts = [GAP + (width + GAP) * place for place in range(max(map(len, cells)))]
    right = lefts[-1] + width + GAP

    def blank(height: int) -> np.ndarray:
        return np.full((height, right, 3), 255, np.uint8)

    def written(texts: Sequence[str]) -> np.ndarray:
        """A line of texts, each at the left of its column; nothing if all of them are empty."""
        line = Image.fromarray(blank(TEXT if any(texts) else 0))
        for left, text in zip(lefts, texts, strict=False):
            printable = text.encode(errors="replace").decode()  # a file's name may not be Unicode
            ImageDraw.Draw(line).text((left, 2), printable, fill="black", font=font)
        return np.asarray(line)

    parts = [blank(GAP), written(columns)]
    for row, label in zip(cells, labels, strict=True):
        pictures = blank(height + GAP)
        for left, cell in zip(lefts, row, strict=False):
            pictures[:height, left : left + width] = cell
        parts += [written([label]), pictures]
    parts += [written([line]) for line in textwrap.wrap(caption, max(20, right // CHARACTER))]
    return np.concatenate(parts)


def figure_picture(drawn: "Figure") -> np.ndarray:
    """A figure of matplotlib as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # (H, W, 3)


def check_replaceable(*paths: Path) -> None:
    """Raises: InputError for the first file that exists and was not made by a picture tool."""
    for path in paths:
        readable = os.access(path, os.R_OK) and path.is_file()
        if os.access(path, os.F_OK) and not (readable and MARK.encode() in path.read_bytes()):
            raise InputError(
                f"{path} was not made by this tool and would be replaced: move it away, or "
                f"choose another place for the pictures"
            )


def write_png(path: Path, picture: np.ndarray) -> Path:
    """Writes a picture, uint8 `(H, W, 3)`. Raises: InputError where that is not possible."""
    info = PngInfo()
    info.add_text("Software", MARK)
    return write_output(
        path, lambda target: Image.fromarray(picture).save(target, format="PNG", pnginfo=info)
    )


def _cell(picture: np.ndarray) -> np.ndarray:
    """A picture at the size that it has in a grid."""
    image = Image.fromarray(picture)
    image.thumbnail((LARGEST_CELL, LARGEST_CELL), Image.Resampling.LANCZOS)  # only ever reduces
    return enlarged(np.asarray(image), CELL)
