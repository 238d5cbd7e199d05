"""The pictures that a run drew of itself over time, in its folder, for the slider of its page."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from util.files import TEMPORARY, write_output, writing

FOLDER = "monitor"  # in the folder of a run
QUALITY = 80  # of WebP, from 0 to 100
OWN_NAME = re.compile(rf"\d{{8,}}\.webp({re.escape(TEMPORARY)})?")


def keep_picture(folder: Path, picture: np.ndarray, step: int) -> None:
    """Writes a picture, uint8 `(H, W, 3)`, as `monitor/<step, 8 digits>.webp` into a run's folder.
    Raises: LocalInputError where it cannot be written."""
    path = folder / FOLDER / f"{step:08d}.webp"
    with writing(path.parent):
        path.parent.mkdir(exist_ok=True)
    image = Image.fromarray(picture)
    write_output(path, lambda target: image.save(target, format="WEBP", quality=QUALITY))


def kept_pictures(folder: Path) -> dict[int, Path]:
    """The pictures in a run's folder by their step, in this order."""
    found = (folder / FOLDER).glob("*.webp")
    return {int(path.stem): path for path in sorted(found) if OWN_NAME.fullmatch(path.name)}


def drop_pictures(folder: Path, step: int) -> None:
    """Removes the pictures that a killed run drew past `step`, and one that is not complete."""
    for path in (folder / FOLDER).glob("*"):
        is_own = OWN_NAME.fullmatch(path.name)
        if is_own and (path.suffix == TEMPORARY or int(path.stem) > step):
            path.unlink()
