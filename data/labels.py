"""Labelled images for the evaluations: the training and validation split of a folder or known set.

A folder holds `train/<class>/...` and `val/<class>/...`, or packed shards of them. Both splits must
have the same classes, none of them empty: a wrong layout would only show as a bad accuracy.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data.known_sets import read_known_set
from data.packs.source import PackedSource
from data.sources import ArraySource, FolderSource, ImageSource, check_folder
from util.errors import DataError, InputError
from util.rng import SUBSET, generator

SPLITS = ("train", "val")
SHOWN = 5  # names in a message
logger = logging.getLogger(__name__)


class LabelledSource(ImageSource, Protocol):
    """Images by index with `labels` `(n,)` int64, counted from 0."""

    labels: np.ndarray


@dataclass(frozen=True)
class LabelledData:
    """Both splits of a data set and its classes' names in the order of the labels."""

    train: LabelledSource
    val: LabelledSource
    class_names: list[str]


class ClassFolder(FolderSource):
    """The images of one split, `<split>/<class>/...`, at any depth below the class; the label is -1
    for those in no class folder."""

    def __init__(self, split: Path, class_names: list[str], in_chans: int):
        super().__init__(str(split), in_chans, prefer_train=False)
        self.labels = folder_labels(self.names, class_names)


class Subset(LabelledSource):
    """Some images of a labelled source, in the order of `indices`."""

    def __init__(self, source: LabelledSource, indices: np.ndarray):
        self.source = source
        self.indices = indices
        self.labels = source.labels[indices]
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


def build_labelled_data(
    dataset: str, data_path: str | None, in_chans: int, download: bool, num_classes: int | None
) -> LabelledData:
    """Training and validation images of a data set.

    Raises: InputError if they are not there, the splits' classes differ, a class is empty, or there
        are not `num_classes` of them (None accepts any number).
    """
    if dataset in ("folder", "packed"):
        assert data_path is not None, "the settings' checks ask for data_path"
        data = _read_splits(Path(data_path), dataset == "packed", in_chans)
    else:
        train, val = (
            ArraySource(
                f"{dataset} {split}",
                *read_known_set(dataset, data_path, split == "train", download),
                in_chans,
            )
            for split in SPLITS
        )
        count = 100 if dataset == "cifar100" else 10
        data = LabelledData(train, val, [str(label) for label in range(count)])
    found = len(data.class_names)
    if num_classes not in (None, found):
        raise InputError(
            f"num_classes is {num_classes} and the data has {found} classes: leave num_classes out"
        )
    for split, source in (("train", data.train), ("val", data.val)):
        outside = source.labels[(source.labels < 0) | (source.labels >= found)]
        if len(outside):
            raise DataError(
                f"the {split} split of {dataset} has the label {outside[0]}, outside its {found} "
                "classes"
            )
    return data


def take_subset(source: LabelledSource, count: int | None, seed: int) -> LabelledSource:
    """A fixed choice of `count` images with each class in proportion; None takes all.

    Raises: InputError if `count` is below the number of classes or above that of the images.
    """
    if count is None:
        return source
    classes = np.unique(source.labels).size
    if not classes <= count <= len(source):
        raise InputError(
            f"subset {count} must lie between the {classes} classes and the {len(source)} training "
            "images"
        )
    return Subset(source, stratified_choice(source.labels, count, seed))


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
    for label, number in zip(classes, quota, strict=True):
        members = np.flatnonzero(labels == label)
        order = torch.randperm(len(members), generator=generator(seed, SUBSET, int(label))).numpy()
        chosen.append(members[order[:number]])
    return np.sort(np.concatenate(chosen))


def class_folders(split: Path) -> list[str]:
    """The class names of a split, in the order of their labels.

    Raises: InputError if it cannot be listed.
    """
    try:
        return sorted(
            path.name for path in split.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
    except OSError as error:
        raise InputError(f"cannot list {split}: {error.strerror}") from error


def folder_labels(names: np.ndarray, class_names: list[str]) -> np.ndarray:
    """Labels `(n,)` int64 of images by their paths below a split, -1 for images outside the class
    folders."""
    position = {name: label for label, name in enumerate(class_names)}
    folders = [os.fsdecode(name).partition(os.sep)[::2] for name in names.tolist()]  # (class, rest)
    return np.array([position[folder] if rest else -1 for folder, rest in folders], dtype=np.int64)


def check_same_classes(
    root: Path, names: dict[str, list[str]], noun: str = "class folders"
) -> None:
    """Raises: DataError if the splits' class names differ."""
    for one, other in (("train", "val"), ("val", "train")):
        alone = sorted(set(names[one]) - set(names[other]))
        if alone:
            raise DataError(
                f"{len(alone)} {noun} are in {root / one} and not in {other}/: {_some(alone)}"
            )


def _read_splits(root: Path, is_packed: bool, in_chans: int) -> LabelledData:
    """Both splits of a folder. Raises: InputError, as `build_labelled_data`."""
    check_folder(root)
    folders = {split: root / split for split in SPLITS}
    content = "each with shards" if is_packed else "with a folder per class"
    for split, folder in folders.items():
        if not folder.is_dir():
            raise DataError(
                f"data_path {root} has no {split}/: it must hold train/ and val/, {content}"
            )
    open_splits = _open_packs if is_packed else _open_class_folders
    sources, class_names = open_splits(root, folders, in_chans)
    noun = "classes" if is_packed else "class folders"
    train, val = (
        _labelled_part(folders[split], source, class_names, noun)
        for split, source in sources.items()
    )
    return LabelledData(train, val, class_names)


def _open_class_folders(
    root: Path, folders: dict[str, Path], in_chans: int
) -> tuple[Mapping[str, LabelledSource], list[str]]:
    names = {split: class_folders(folder) for split, folder in folders.items()}
    for split, folder in folders.items():
        if not names[split]:
            raise DataError(f"{folder} has no class folders: it must hold a folder per class")
    check_same_classes(root, names)
    sources = {
        split: ClassFolder(folder, names[split], in_chans) for split, folder in folders.items()
    }
    return sources, names["train"]


def _open_packs(
    root: Path, folders: dict[str, Path], in_chans: int
) -> tuple[Mapping[str, LabelledSource], list[str]]:
    """Both splits' packs and the class names; without names in either index, the labels are the
    names."""
    packs = {split: PackedSource(folder, in_chans) for split, folder in folders.items()}
    for pack in packs.values():
        if (pack.labels < 0).all():
            raise DataError(
                f"the images in {pack.folder} have no labels, which evaluation needs: pack a "
                "folder with class folders"
            )
    named = {split: pack.index.class_names for split, pack in packs.items()}
    names = {split: class_names for split, class_names in named.items() if class_names is not None}
    if len(names) == len(SPLITS):
        check_same_classes(root, names, "classes")
    if names:
        return packs, next(iter(names.values()))
    highest = max(int(pack.labels.max()) for pack in packs.values())
    if highest >= len(packs["train"]):
        raise DataError(
            f"the labels in {root} go up to {highest}, with {len(packs['train'])} training images"
        )
    return packs, [str(label) for label in range(highest + 1)]


def _labelled_part(
    split: Path, source: LabelledSource, class_names: list[str], noun: str
) -> LabelledSource:
    """The images with a label. Raises: DataError if a class has no image."""
    filled = set(np.unique(source.labels).tolist())
    empty = [name for label, name in enumerate(class_names) if label not in filled]
    if empty:
        raise DataError(f"{len(empty)} {noun} in {split} hold no image: {_some(empty)}")
    labelled = np.flatnonzero(source.labels >= 0)
    if len(labelled) == len(source):
        return source
    num_left_out = len(source) - len(labelled)
    logger.warning(
        "%s: %d images have no label or lie in no class folder, and are left out",
        split,
        num_left_out,
    )
    return Subset(source, labelled)


def _some(names: list[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
