"""Images that a picture tool is given by name: files, or folders of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from data.datasets import FolderSource
from data.images import BadImageError, decode_image
from util.errors import InputError


def find_images(setting: str, paths: Sequence[str], num_images: int) -> dict[str, Path]:
    """Image files by unique names, in order; of a folder `num_images`, evenly spaced.

    Raises: InputError naming `setting` for a path that is not there or a folder without images.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{setting} {path} does not exist")
        if path.is_dir():
            source = FolderSource(str(path), in_chans=3, prefer_train=False)
            files += [Path(source.name(index)) for index in spread(len(source), num_images)]
        else:
            files.append(path)
    alone = len({file.stem for file in files}) == len(files)
    return {file.stem if alone else f"{place}_{file.stem}": file for place, file in enumerate(files)}


def read_image(setting: str, path: Path, in_chans: int) -> Tensor:
    """One image, uint8 `(C, H, W)`. Raises: InputError naming `setting` for a file that is no readable image."""
    try:
        return decode_image(path.read_bytes(), in_chans)
    except OSError as error:
        raise InputError(f"{setting} {path} cannot be read: {error.strerror}") from error
    except BadImageError as error:
        raise InputError(f"{setting} {path}: {error}") from error


def spread(total: int, count: int) -> list[int]:
    """At most `count` indices below `total`, evenly spaced."""
    return [int(index) for index in np.linspace(0, total - 1, min(count, total)).round()]
