"""Images to make pictures of: files and folders by name, or the validation images of a data set."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from torch import Tensor

from data.images import BadImageError, PixelFormat, decode_image
from data.labels import build_labelled_data
from data.packs.source import open_pack
from data.parquet import open_parquet
from data.scenes import Scenes
from data.sources import FolderSource, ImageSource, check_folder
from util.errors import InputError

LONGEST_NAME = 180  # bytes of a picture's name; file systems take 255 with all that is added


def open_images(
    setting: str,
    paths: Sequence[str],
    dataset: str,
    data_path: str | None,
    num_images: int,
    pixels: PixelFormat,
) -> dict[str, Tensor]:
    """Images `(C, H, W)`, by unique names for the files of their pictures: those of `paths`,
    which `setting` names, or without any validation images of the data set. From here on, log lines
    go to stderr.

    Raises: InputError for a path that does not exist, is no image, or is a folder without images.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    found = {}
    if paths:
        for name, path in find_images(paths, num_images).items():
            with named(f"{setting} {path}"):
                found[name] = decode_image(path.read_bytes(), pixels)
        return found
    source = validation_source(dataset, data_path, pixels)
    for index in spread(len(source), num_images):
        with named(f"validation image {source.name(index)}"):
            found[f"val_{index:05d}"] = source.read(index)
    return found


@contextmanager
def named(image: str) -> Iterator[None]:
    """For a block that reads an image. Raises: InputError with its name where that fails."""
    try:
        yield
    except (OSError, BadImageError) as error:
        raise InputError(f"{image}: {error}") from error


def validation_source(dataset: str, data_path: str | None, pixels: PixelFormat) -> ImageSource:
    """The validation images of a data set. A folder without val/ gives all its images, a pack
    without one its training images.

    Raises: InputError if they are not there.
    """
    if dataset == "parquet":
        return open_parquet(data_path, pixels, ("val", "test", "train"))
    if dataset == "digits_scenes":
        return Scenes("val", pixels)
    if dataset not in ("folder", "packed"):
        return build_labelled_data(dataset, data_path, pixels, False, None).val
    root = check_folder(data_path)
    if dataset == "packed":
        return open_pack(root, pixels, ("val", "train"))
    split = root / "val"
    return FolderSource(split if split.is_dir() else root, pixels, prefer_train=False)


def find_images(paths: Sequence[str], num_images: int) -> dict[str, Path]:
    """Image files by unique, printable names, in order; of each folder `num_images` evenly spaced.

    Raises: InputError for a folder without images.
    """
    files: list[Path] = []
    for path in paths:
        if os.path.isdir(path):  # noqa: PTH112  (Path.is_dir raises for a name that is too long)
            source = FolderSource(path, PixelFormat(3), prefer_train=False)
            files += [Path(source.name(index)) for index in spread(len(source), num_images)]
        else:
            files.append(Path(path))
    # A file's name may not be Unicode, and too long for what is added to it.
    names = [
        file.stem.encode(errors="replace")[:LONGEST_NAME].decode(errors="ignore") for file in files
    ]
    if len(set(names)) < len(names):
        names = [f"{place}_{name}" for place, name in enumerate(names)]
    return dict(zip(names, files, strict=True))


def spread(total: int, count: int) -> list[int]:
    """At most `count` indices below `total`, evenly spaced."""
    return [int(index) for index in np.linspace(0, total - 1, min(count, total)).round()]
