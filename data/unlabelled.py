"""Any images, without labels, for tools that apply a model to all of them: a folder, a list of
files, one file, parquet files, packed shards, or a known set.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.images import IMAGE_ENDINGS, BadImageError, PixelFormat
from data.known_sets import read_known_set
from data.loader import Sample
from data.packs.source import PackedSource
from data.parquet import open_parquet
from data.sampler import SampleKey
from data.scenes import Scenes
from data.sources import ArraySource, FolderSource, ImageSource, check_folder
from util.errors import DataError
from util.settings.tools import EncodeConfig


def read_list(path: Path) -> list[str]:
    """The paths that a text file lists, one in each line, or that of a single image; relative to
    the file's folder.

    Raises: DataError if there is none.
    """
    lines = [os.fsencode(path.name)]
    if not path.name.lower().endswith(IMAGE_ENDINGS):
        lines = [line for line in path.read_bytes().splitlines() if line.strip()]
    if not lines:
        raise DataError(f"data_path {path} lists no image: it must hold a path in each line")
    return [os.fsdecode(line) for line in lines]


def open_images(cfg: EncodeConfig, pixels: PixelFormat) -> ImageSource:
    """The images that the settings name. Raises: InputError if they are not there."""
    path, has_split = Path(cfg.data_path or ""), cfg.split != "all"
    if cfg.dataset == "digits_scenes":
        return Scenes(cfg.split, pixels)
    if cfg.dataset not in ("folder", "packed", "parquet"):
        parts = [
            read_known_set(cfg.dataset, cfg.data_path, split == "train", download=False)
            for split in ("train", "val")
            if cfg.split in ("all", split)
        ]
        images, labels = (np.concatenate(of_parts) for of_parts in zip(*parts, strict=True))
        title = f"{cfg.dataset} {cfg.split}" if has_split else cfg.dataset
        return ArraySource(title, images, labels, pixels)
    if cfg.dataset == "parquet" or (path.suffix == ".parquet" and path.is_file()):
        splits = {"all": (), "train": ("train",), "val": ("val", "test")}[cfg.split]
        return open_parquet(path, pixels, splits, strict=has_split)
    if cfg.dataset == "folder" and path.is_file():
        return FolderSource(path.parent, pixels, prefer_train=False, names=read_list(path))
    root = check_folder(path / cfg.split if has_split else path)
    if cfg.dataset == "packed":
        return PackedSource(root, pixels)
    return FolderSource(root, pixels, prefer_train=False)


@dataclass(eq=False)
class ReadableDataset(Dataset[Sample]):
    """Images by their numbers. The target is 1, or 0 for a black one in place of an image that
    cannot be read.

    Args:
        transform: without chance.
        in_chans: of the images.
    """

    source: ImageSource
    transform: Callable[[Tensor], Tensor]
    in_chans: int

    def __getitem__(self, index: int) -> Sample:
        try:
            image, target = self.source.read(index), 1
        except BadImageError:
            image, target = torch.zeros(self.in_chans, 1, 1, dtype=torch.uint8), 0
        return Sample(
            self.transform(image), torch.tensor(target), SampleKey(index, 0, index, 0), []
        )

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        return [self[index] for index in indices]
