"""Files that the picture tools write, and the mark in them by which a tool knows its own.

A tool replaces only what a tool made: who calls a file of theirs `grid.png` keeps it.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from util.errors import InputError
from util.files import write_output

MARK = "masked-autoencoder picture tools"  # PNG text "Software", HTML generator, tail of an array
MONITOR_PICTURE = "monitor.png"  # in the folder of a run


def check_replaceable(*paths: Path) -> None:
    """Raises: InputError for the first file that exists and was not made by a picture tool."""
    for path in paths:
        try:
            is_ours = MARK.encode() in path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError:  # a folder, or a file that may not be read
            is_ours = False
        if not is_ours:
            raise InputError(
                f"{path} was not made by this tool and would be replaced: move it away, or "
                f"choose another place for the pictures"
            )


def write_png(path: Path, picture: np.ndarray) -> Path:
    """Writes a picture, uint8 `(H, W, 3)`. Raises: InputError where that is not possible."""
    info = PngInfo()
    info.add_text("Software", MARK)
    image = Image.fromarray(picture)
    return write_output(path, lambda target: image.save(target, format="PNG", pnginfo=info))


def write_npy(path: Path, array: np.ndarray) -> Path:
    """Writes an array in numpy's format. Raises: InputError where that is not possible."""

    def write(target: Path) -> None:
        with target.open("wb") as file:
            np.save(file, array, allow_pickle=False)
            file.write(MARK.encode())  # readers stop where the array ends

    return write_output(path, write)
