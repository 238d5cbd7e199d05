"""The images behind `dataset:`, without labels: a folder of files, packed shards, or a known set.

Each is an `ImageSource`: decoded uint8 images by index, a name for messages, and a fingerprint by
which a resumed run notices that its images changed.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data.images import IMAGE_ENDINGS, BadImageError, decode_image, to_channels
from data.known_sets import read_known_set
from data.packs.source import open_pack
from util.errors import DataError, InputError

WALK_THREADS = 16  # they wait for the disk or the network, not for a core


class ImageSource(Protocol):
    """Images by index, without labels.

    block_size: number of neighbours that lie together and are best read at about the same time.
    """

    block_size: int = 1

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

    def read_ahead(self) -> None:
        """Announces that every image will be read, block by block."""
        return


def check_folder(data_path: Path) -> None:
    """Raises: InputError if `data_path` is no folder."""
    if not data_path.is_dir():
        problem = "is not a folder" if data_path.exists() else "does not exist"
        raise InputError(f"data_path {data_path} {problem}")


class FolderSource(ImageSource):
    """Every image file under a folder, at any depth; by default only those of `train/` if there is
    one."""

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
        # One flat array: reference counts would copy a list of a million strings into every loader
        # process.
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


class ArraySource(ImageSource):
    """Images held in memory as one uint8 array `(n, C, H, W)`, with their labels `(n,)` int64."""

    def __init__(self, title: str, images: np.ndarray, labels: np.ndarray, in_chans: int):
        self.title = title
        self.images = torch.from_numpy(images)
        self.labels = labels
        self.in_chans = in_chans

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        return to_channels(self.images[index], self.in_chans)

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"

    def fingerprint(self) -> str:
        return hashlib.sha256(self.images.numpy().tobytes()).hexdigest()


def build_pretrain_source(
    dataset: str, data_path: str | None, in_chans: int, download: bool
) -> ImageSource:
    """The training images of a data set. Raises: InputError if they are not there."""
    if dataset not in ("folder", "packed"):
        images, labels = read_known_set(dataset, data_path, train=True, download=download)
        return ArraySource(dataset, images, labels, in_chans)
    assert data_path is not None, "the settings' checks ask for data_path"
    if dataset == "folder":
        return FolderSource(data_path, in_chans)
    return open_pack(data_path, in_chans, ("train",))


def image_names(root: Path) -> list[str]:
    """Paths of the images below `root`, sorted. Hidden files and folders are left out, and links
    are followed, each folder once: under the name with the fewest parts, of these the first.

    Raises: InputError if a folder cannot be listed.
    """
    names: list[str] = []
    seen: set[tuple[int, int]] = set()
    level = [""]  # folders of one depth
    with ThreadPoolExecutor(WALK_THREADS) as pool:
        while level:
            subfolders: list[str] = []
            for identity, images, folders in pool.map(partial(_list_folder, root), level):
                if identity not in seen:
                    seen.add(identity)
                    names += images
                    subfolders += folders
            level = sorted(subfolders)
    return sorted(names)


def _list_folder(root: Path, path: str) -> tuple[tuple[int, int], list[str], list[str]]:
    """A folder's device and inode, and the paths below the root of its images and subfolders."""
    images, subfolders = [], []
    try:
        status = (root / path).stat()
        with os.scandir(root / path) as found:
            for entry in found:
                below_root = f"{path}/{entry.name}" if path else entry.name
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    subfolders.append(below_root)
                elif entry.name.lower().endswith(IMAGE_ENDINGS):
                    images.append(below_root)
    except OSError as error:
        raise InputError(f"cannot list {error.filename}: {error.strerror}") from error
    return (status.st_dev, status.st_ino), images, subfolders


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False
