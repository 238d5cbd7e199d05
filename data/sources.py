"""The images behind `dataset:`, without labels: a folder of files, packed shards, parquet files, or
a known set.

Each is an `ImageSource`: decoded uint8 images by index, a name for messages, and a fingerprint by
which a resumed run notices that its images changed.
"""

import hashlib
import logging
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from data.arrays import num_frames, values_of
from data.images import IMAGE_ENDINGS, BadImageError, PixelFormat, decode_image
from data.known_sets import read_known_set
from data.packs.source import open_pack
from data.pixels import FormatError, to_pixels
from util.errors import DataError, InputError

SourceT = TypeVar("SourceT", bound="ImageSource")
SHOWN = 5  # names in a message
WALK_THREADS = 16  # they wait for the disk or the network, not for a core
# Folders that systems leave beside images, with previews and remains in them.
PASSED_OVER = ("@eaDir", "__MACOSX", "lost+found")
SPLIT_FOLDERS = ("train", "val", "validation", "test")
logger = logging.getLogger(__name__)


class ImageSource(Protocol):
    """Images by index, without labels.

    block_size: number of neighbours that lie together and are best read at about the same time.
    """

    block_size: int = 1

    def __len__(self) -> int:
        """The number of images."""

    def read(self, index: int) -> Tensor:
        """The image as `(C, H, W)`, uint8 or float32 in [0, 255]. Raises: BadImageError."""

    def name(self, index: int) -> str:
        """The file's path, or what a message should call the image."""

    def fingerprint(self) -> str:
        """Equal for equal lists of images."""

    def read_ahead(self) -> None:
        """Announces that every image will be read, block by block."""
        return


def check_folder(data_path: str | Path | None) -> Path:
    """`data_path` as a path. Raises: InputError if it is no folder."""
    if data_path is None or not Path(data_path).is_dir():
        raise InputError(f"data_path {data_path} is not an existing folder")
    return Path(data_path)


class FolderSource(ImageSource):
    """Every image file under a folder, at any depth; by default only those of `train/` if there is
    one. Or the files of these `names` there, which are not looked for."""

    def __init__(
        self,
        data_path: str | Path,
        pixels: PixelFormat,
        prefer_train: bool = True,
        names: list[str] | None = None,
    ):
        root = Path(data_path)
        self.root = root / "train" if prefer_train and (root / "train").is_dir() else root
        self.pixels = pixels
        if self.root != root and (others := set(list_folder(root, "")[1]) - {*SPLIT_FOLDERS}):
            shown = ", ".join(sorted(others)[:SHOWN])
            say_once(
                f"{root}: only train/ is read, and none of {len(others)} other folders: {shown}"
            )
        names = image_names(self.root) if names is None else names
        if not names:
            endings = " ".join(IMAGE_ENDINGS)
            if any(self.root.rglob("*.parquet")):
                endings += "; .parquet files are read by --dataset parquet"
            raise DataError(f"no images under {self.root}: none of its files ends in {endings}")
        # One flat array: reference counts would copy a list of a million strings into every loader
        # process.
        self.names = np.array([os.fsencode(name) for name in names])
        # (n,), the place of each image in its file, where files hold several
        self.frames: np.ndarray | None = None
        if pixels.all_frames:
            with ThreadPoolExecutor(WALK_THREADS) as pool:
                counts = [*pool.map(lambda name: num_frames(self.root / name), names)]
            self.names = np.repeat(self.names, counts)
            self.frames = np.concatenate([*map(np.arange, counts)])

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Tensor:
        frame = 0 if self.frames is None else int(self.frames[index])
        try:
            return decode_image(self.path(index).read_bytes(), self.pixels, frame)
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror}") from error

    def path(self, index: int) -> Path:
        """The image's file."""
        return self.root / os.fsdecode(self.names[index].item())

    def name(self, index: int) -> str:
        frame = "" if self.frames is None else f"[{self.frames[index]}]"
        return f"{self.path(index)}{frame}"

    def fingerprint(self) -> str:
        return hashlib.sha256(b"\0".join(self.names.tolist())).hexdigest()


class ArraySource(ImageSource):
    """Images held in memory as one uint8 array `(n, C, H, W)`, with their labels `(n,)` int64."""

    def __init__(self, title: str, images: np.ndarray, labels: np.ndarray, pixels: PixelFormat):
        self.title = title
        self.images = torch.from_numpy(images)
        self.labels = labels
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        found = values_of(self.images[index].numpy(), self.title, is_colour=True)
        return to_pixels(found, self.pixels)

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"

    def fingerprint(self) -> str:
        return hashlib.sha256(self.images.numpy().tobytes()).hexdigest()


class Chosen(ImageSource):
    """Some images of a source, in the order of `indices`."""

    source: ImageSource

    def __init__(self, source: ImageSource, indices: np.ndarray):
        self.source = source
        self.indices = indices
        self.block_size = source.block_size  # neighbours stay neighbours

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Tensor:
        return self.source.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def fingerprint(self) -> str:
        return self.source.fingerprint()  # the choice follows from settings that a resume compares

    def read_ahead(self) -> None:
        if 2 * len(self) > len(self.source):  # for a smaller part it would read too much
            self.source.read_ahead()


def build_pretrain_source(
    dataset: str, data_path: str | None, pixels: PixelFormat, download: bool
) -> ImageSource:
    """The training images of a data set. Raises: InputError if they are not there, or the first of
    them does not fit the settings."""
    if dataset == "parquet":
        from data.parquet import open_parquet  # here, as it imports this file

        return check_format(open_parquet(data_path, pixels, ("train",)))
    if dataset == "digits_scenes":
        from data.scenes import Scenes  # likewise

        return check_format(Scenes("train", pixels))
    if dataset not in ("folder", "packed"):
        known = read_known_set(dataset, data_path, True, download)
        return check_format(ArraySource(dataset, *known, pixels))
    root = check_folder(data_path)
    if dataset == "folder":
        return check_format(FolderSource(root, pixels))
    return check_format(open_pack(root, pixels, ("train",)))


def check_format(source: SourceT) -> SourceT:
    """The source. Raises: DataError if its first image needs other settings, or a library that is
    not installed: so would all others."""
    try:
        source.read(0)
    except FormatError as error:
        raise DataError(f"{source.name(0)} {error}") from error
    except BadImageError:
        return source  # the training replaces and names it
    return source


def value_bytes(source: ImageSource) -> int:
    """Bytes of a pixel's value in the first image of a source; 4 if that cannot be read."""
    try:
        return source.read(0).element_size()
    except BadImageError:
        return 4


def image_names(root: Path) -> list[str]:
    """Paths of the images below `root`, sorted; a line in the log counts what is passed over. Links
    are followed, each folder once: under the name with the fewest parts, of these the first.

    Raises: InputError if a folder cannot be listed.
    """
    found: dict[tuple[int, int], list[str]] = {}  # images by device and inode of their folder
    level = [""]  # folders of one depth
    passed_over: Counter[str] = Counter()
    with ThreadPoolExecutor(WALK_THREADS) as pool:
        while level:
            subfolders: list[str] = []
            for identity, folders, images, others in pool.map(partial(list_folder, root), level):
                if identity not in found:
                    found[identity] = images
                    subfolders += folders
                    passed_over.update(others)
            level = sorted(subfolders)
    if counts := ", ".join(f"{count} {kind}" for kind, count in passed_over.items() if count):
        say_once(f"{root}: passed over {counts}")
    return sorted(name for images in found.values() for name in images)


def list_folder(
    root: Path, path: str
) -> tuple[tuple[int, int], list[str], list[str], dict[str, int]]:
    """A folder's device and inode, the paths below the root of its subfolders and images, and how
    many it has of what is left out: hidden files and folders, those in PASSED_OVER, other files.

    Raises: InputError if it cannot be listed.
    """
    try:
        status = (root / path).stat()
        # the first step of a walk; what cannot be told, such as a link to itself, is a file
        _, *names = next(os.walk(root / path, onerror=_raise))
    except OSError as error:
        raise InputError(f"cannot list {error.filename}: {error.strerror}") from error
    start = f"{path}/" if path else ""
    folders, files = (
        [f"{start}{name}" for name in of_kind if name[0] != "." and name not in PASSED_OVER]
        for of_kind in names
    )
    images = [name for name in files if name.lower().endswith(IMAGE_ENDINGS)]
    left_out = {
        "hidden files": len(names[1]) - len(files),
        "files that are no images": len(files) - len(images),
        "folders": len(names[0]) - len(folders),
    }
    return (status.st_dev, status.st_ino), folders, images, left_out


@cache
def say_once(line: str) -> None:
    """Logs a line about a data set, which a stage may open several times."""
    logger.info("%s", line)


def _raise(error: OSError) -> None:
    raise error
