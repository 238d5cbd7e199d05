"""Labelled images for the evaluations: the training and validation split of a folder or known set.

A folder holds `train/<class>/...` and `val/<class>/...`, or packed shards of them. Both splits must
have the same classes, none of them empty: a wrong layout would only show as a bad accuracy. A table
(`data/tables.py`) may say instead what the images below a folder are; then only the training images
must have each class.

Shapes: `n` images, `L` labels of an image.
"""

import logging
import os
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from data.images import PixelFormat
from data.known_sets import read_known_set
from data.packs.source import PackedSource
from data.parquet import open_parquet
from data.sources import (
    ArraySource,
    Chosen,
    FolderSource,
    ImageSource,
    check_folder,
    check_format,
    list_folder,
)
from util.errors import DataError, InputError
from util.rng import SUBSET, generator

SPLITS = ("train", "val")
SHOWN = 5  # names in a message
NUM_BINS = 10  # of a regression's targets, each of which is in both parts of a split
logger = logging.getLogger(__name__)


class LabelledSource(ImageSource, Protocol):
    """Images by index with `labels`: classes counted from 0, `(n,)` int64; of multilabel 0 or 1,
    `(n, L)` int64; of regression numbers, `(n, L)` float32."""

    labels: np.ndarray


@dataclass(frozen=True)
class LabelledData:
    """Both splits of a data set and its classes' names in the order of the labels; of multilabel
    and regression the labels' names."""

    train: LabelledSource
    val: LabelledSource
    class_names: list[str]


class ClassFolder(FolderSource):
    """The images of one split, `<split>/<class>/...`, at any depth below the class; the label is -1
    for those in no class folder."""

    def __init__(self, split: Path, class_names: list[str], pixels: PixelFormat):
        super().__init__(split, pixels, prefer_train=False)
        self.labels = folder_labels(self.names, class_names)


class Subset(Chosen, LabelledSource):
    """Some images of a labelled source, in the order of `indices`."""

    def __init__(self, source: LabelledSource, indices: np.ndarray):
        super().__init__(source, indices)
        self.labels = source.labels[indices]


def build_labelled_data(
    dataset: str,
    data_path: str | None,
    pixels: PixelFormat,
    download: bool,
    num_classes: int | None,
) -> LabelledData:
    """Training and validation images of a data set. If the classes of neither split have names,
    their labels are the names.

    Raises: InputError if the images are not there, the splits' classes differ, a class is empty, or
        there are not `num_classes` of them (None accepts any number).
    """
    (train, train_names), (val, val_names) = (
        _open_split(dataset, data_path, split, pixels, download) for split in SPLITS
    )
    root = Path(data_path or dataset)
    if train_names is not None and val_names is not None:
        check_same_classes(root, {"train": train_names, "val": val_names})
    class_names = (
        train_names
        or val_names
        or [str(label) for label in range(np.unique(train.labels[train.labels >= 0]).size)]
    )
    check_num_classes(num_classes, class_names)
    train, val = (
        _with_labels(dataset, root / split, source, class_names)
        for split, source in zip(SPLITS, (train, val), strict=True)
    )
    return LabelledData(train, val, class_names)


def check_num_classes(num_classes: int | None, class_names: list[str]) -> None:
    """Raises: InputError if the settings say another number of classes than the data has."""
    if num_classes not in (None, len(class_names)):
        raise InputError(
            f"num_classes is {num_classes} and the data has {len(class_names)} classes: leave "
            "num_classes out, or if the recipe has it, give --num_classes null"
        )


def strata(labels: np.ndarray) -> np.ndarray:
    """What of each image should be in every part of a split in proportion, `(n,)` int64 from 0: its
    class, its combination of labels (all that one image alone has being one), or the tenth of the
    images in which its first number lies."""
    if labels.ndim == 1:
        return labels
    if labels.dtype == np.float32:
        ranks = np.argsort(np.argsort(labels[:, 0], kind="stable"), kind="stable")
        return ranks * min(NUM_BINS, len(labels)) // len(labels)
    _, kinds, sizes = np.unique(labels, axis=0, return_inverse=True, return_counts=True)
    merged = np.where(sizes == 1, (sizes == 1).argmax(), np.arange(len(sizes)))
    return merged[kinds.reshape(len(labels))]


def take_subset(source: LabelledSource, count: int | None, seed: int) -> LabelledSource:
    """A fixed choice of `count` images with each class in proportion; None takes all.

    Raises: InputError if `count` is below the number of classes or above that of the images.
    """
    if count is None:
        return source
    kinds = strata(source.labels)
    # of combinations of labels and of numbers none must be there
    classes = np.unique(kinds).size if source.labels.ndim == 1 else 1
    if not classes <= count <= len(source):
        raise InputError(
            f"subset {count} must lie between the {classes} classes and the {len(source)} training "
            "images"
        )
    return Subset(source, stratified_choice(kinds, count, seed))


def stratified_choice(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` sorted indices, a pure function of (labels, count, seed), with each class's share
    within one image."""
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * count / len(labels)
    quota = np.floor(exact).astype(int)
    # of classes with equal remainders chance decides, as else the first ones would win
    shuffled = torch.randperm(len(classes), generator=generator(seed, SUBSET)).numpy()
    by_remainder = shuffled[np.argsort((quota - exact)[shuffled], kind="stable")]
    quota[by_remainder[: count - quota.sum()]] += 1
    chosen = []
    for label, size, number in zip(classes.tolist(), sizes.tolist(), quota, strict=True):
        order = torch.randperm(size, generator=generator(seed, SUBSET, label)).numpy()
        chosen.append(np.flatnonzero(labels == label)[order[:number]])
    return np.sort(np.concatenate(chosen))


def class_folders(split: Path) -> list[str]:
    """The class names of a split, in the order of their labels.

    Raises: InputError if it cannot be listed, or if two of them are one folder, by a link, or have
        names that look the same.
    """
    names = sorted(list_folder(split, "")[1])
    alike: dict[object, list[str]] = defaultdict(list)
    for name in names:
        status = (split / name).stat()
        alike[status.st_dev, status.st_ino].append(name)
        alike[_normal(name)].append(name)
    for key, of_one in alike.items():
        if len(of_one) > 1:
            same = (
                "differ in Unicode normal form only" if isinstance(key, str) else "are one folder"
            )
            raise DataError(
                f"the class folders {ascii(of_one)} in {split} {same}: keep one of them"
            )
    return names


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def folder_labels(names: np.ndarray, class_names: list[str]) -> np.ndarray:
    """Labels `(n,)` int64 of images by their paths below a split, -1 for images outside the class
    folders."""
    position = {os.fsencode(name): label for label, name in enumerate(class_names)}
    labels = [position.get(name.partition(b"/")[0], -1) for name in names.tolist()]
    return np.array(labels, dtype=np.int64)


def check_same_classes(root: Path, names: dict[str, list[str]]) -> None:
    """Raises: DataError if the splits' class names differ."""
    train, val = set(names["train"]), set(names["val"])
    if train != val and {*map(_normal, train)} == {*map(_normal, val)}:
        raise DataError(
            f"train/ and val/ in {root} must have the same classes: the names of "
            f"{ascii(sorted(train - val)[:SHOWN])} differ in their Unicode normal form only, as "
            "after copying from macOS: rename those in one of them"
        )
    if train != val:
        raise DataError(
            f"train/ and val/ in {root} must have the same classes: only in train/ are "
            f"{sorted(train - val)[:SHOWN]}, and only in val/ {sorted(val - train)[:SHOWN]}"
        )
    if names["train"] != names["val"]:  # only where files number their classes
        ours, theirs = next(
            pair for pair in zip(names["train"], names["val"], strict=True) if pair[0] != pair[1]
        )
        raise DataError(
            f"train/ and val/ in {root} must number their classes alike: what train/ calls "
            f"{ours!r}, val/ calls {theirs!r}"
        )


def _open_split(
    dataset: str, data_path: str | None, split: str, pixels: PixelFormat, download: bool
) -> tuple[LabelledSource, list[str] | None]:
    """The images of a split, and the names of its classes if they are known. Raises: InputError."""
    if dataset == "parquet":
        splits = ("train",) if split == "train" else ("val", "test")
        parquet = open_parquet(data_path, pixels, splits, strict=True)
        if parquet.label_column is None:
            raise DataError(f"{parquet.files[0]} has no column of labels (whole numbers)")
        return check_format(parquet), parquet.class_names
    if dataset == "digits_scenes":
        raise DataError("dataset digits_scenes has masks and boxes, and no class of an image")
    if dataset not in ("folder", "packed"):
        content = read_known_set(dataset, data_path, split == "train", download)
        return check_format(ArraySource(f"{dataset} {split}", *content, pixels)), None
    folder = check_folder(data_path) / split
    if not folder.is_dir():
        raise DataError(
            f"data_path {data_path} has no {split}/: it must hold train/ and val/, each with a "
            "folder per class, or with shards for --dataset packed"
        )
    if dataset == "packed":
        pack = check_format(PackedSource(folder, pixels))
        return pack, pack.index.class_names
    class_names = class_folders(folder)
    return check_format(ClassFolder(folder, class_names, pixels)), class_names


def _with_labels(
    dataset: str, split: Path, source: LabelledSource, class_names: list[str]
) -> LabelledSource:
    """The images with a label. Raises: DataError if a class has no image, or a label no class."""
    labelled = np.flatnonzero(source.labels >= 0)
    labels = set(np.unique(source.labels[labelled]).tolist())
    empty = [name for label, name in enumerate(class_names) if label not in labels]
    unknown = [label for label in labels if label >= len(class_names)]
    if empty or unknown or not class_names:
        images = f"{split} must hold images in class folders, or packed from class folders,"
        if dataset == "parquet":  # its splits are names of files
            images = f"split {split.name} of {split.parent} must hold images"
        raise DataError(
            f"{images} of each of the {len(class_names)} classes and of no other; classes without "
            f"an image: {empty[:SHOWN]}, labels without a class: {unknown[:SHOWN]}"
        )
    if len(labelled) == len(source):
        return source
    logger.warning(
        "%s: %d images have no label or lie in no class folder, and are left out where labels are "
        "needed",
        split,
        len(source) - len(labelled),
    )
    return Subset(source, labelled)
