"""Labelled images for the evaluations: training and validation split of a folder or a known set.

A folder holds `train/<class>/...` and `val/<class>/...`, or packed shards of them. Both splits must
have the same classes, none of them empty: a wrong layout would only show as a bad accuracy.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data.known_sets import read_cifar
from data.packs.source import LabelledPack
from data.sources import ArraySource, FolderSource, ImageSource, check_folder, read_mnist5k
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
    """The images of one split, `<split>/<class>/...`, each class nested as deep as it likes."""

    def __init__(self, split: Path, class_names: list[str], in_chans: int):
        super().__init__(str(split), in_chans, prefer_train=False)
        labels = folder_labels(self.names, class_names)
        inside = labels >= 0
        if not inside.all():
            logger.warning(
                "%s: %d images lie in no class folder and are left out", split, (~inside).sum()
            )
        self.names = self.names[inside]
        self.labels = labels[inside]


class LabelledArray(ArraySource):
    """Images held in memory, with their labels."""

    def __init__(self, label: str, images: np.ndarray, labels: np.ndarray, in_chans: int):
        super().__init__(label, images, in_chans)
        self.labels = labels


class Subset:
    """Some images of a labelled source, in the order of `indices`."""

    def __init__(self, source: LabelledSource, indices: np.ndarray):
        self.source = source
        self.indices = indices
        self.labels = source.labels[indices]
        self.block_size = getattr(source, "block_size", 1)  # neighbours stay neighbours

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Tensor:
        return self.source.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def fingerprint(self) -> str:
        return self.source.fingerprint()  # the choice follows from settings that a resume compares


def build_labelled_data(
    dataset: str, data_path: str | None, in_chans: int, download: bool, num_classes: int | None
) -> LabelledData:
    """Training and validation images of a data set.

    Raises: InputError where they are not to be had, the splits' classes differ, one is empty, or
        there are not `num_classes` of them (None takes any number).
    """
    if dataset == "folder":
        assert data_path is not None, "the config checks that data_path is given"
        data = _read_class_folders(Path(data_path), in_chans)
    elif dataset == "packed":
        assert data_path is not None, "the config checks that data_path is given"
        data = _read_packs(Path(data_path), in_chans)
    else:
        splits = []
        for train in (True, False):
            if dataset == "mnist5k":
                images, labels = read_mnist5k(train)
            else:
                assert data_path is not None, "the config checks that data_path is given"
                images, labels = read_cifar(dataset, data_path, train, download)
            splits.append(
                LabelledArray(f"{dataset} {'train' if train else 'val'}", images, labels, in_chans)
            )
        count = 100 if dataset == "cifar100" else 10
        data = LabelledData(splits[0], splits[1], [str(label) for label in range(count)])
    found = len(data.class_names)
    if num_classes not in (None, found):
        raise InputError(
            f"num_classes is {num_classes} and the data has {found} classes: leave num_classes out"
        )
    for split, source in (("train", data.train), ("val", data.val)):
        outside = (source.labels < 0) | (source.labels >= found)
        if outside.any():
            bad = int(source.labels[outside][0])
            raise DataError(
                f"the {split} split of {dataset} has the label {bad}, outside its {found} classes"
            )
    return data


def take_subset(source: LabelledSource, count: int | None, seed: int) -> LabelledSource:
    """A fixed choice of `count` images with each class in proportion; None takes all. Raises:
    InputError."""
    if count is None:
        return source
    if not np.unique(source.labels).size <= count <= len(source):
        classes = np.unique(source.labels).size
        raise InputError(
            f"subset {count} must lie between the {classes} classes and the {len(source)} training images"
        )
    return Subset(source, stratified_choice(source.labels, count, seed))


def stratified_choice(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` sorted indices, a pure function of (labels, count, seed), with each class's share
    within one image."""
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * count / len(labels)
    quota = np.floor(exact).astype(int)
    tied = torch.randperm(
        len(classes), generator=generator(seed, SUBSET)
    ).numpy()  # else the first classes would win
    largest_rest = tied[np.argsort((quota - exact)[tied], kind="stable")][: count - quota.sum()]
    quota[largest_rest] += 1
    chosen = []
    for label, number in zip(classes, quota, strict=True):
        members = np.flatnonzero(labels == label)
        order = torch.randperm(len(members), generator=generator(seed, SUBSET, int(label))).numpy()
        chosen.append(members[order[:number]])
    return np.sort(np.concatenate(chosen))


def class_folders(split: Path) -> list[str]:
    """The class names of a split, in the order of their labels. Raises: InputError where it cannot
    be listed."""
    try:
        return sorted(
            path.name for path in split.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
    except OSError as error:
        raise InputError(f"cannot list {split}: {error.strerror}") from error


def folder_labels(names: np.ndarray, class_names: list[str]) -> np.ndarray:
    """Labels `(n,)` int64 of images by their paths below a split, -1 for those in no class
    folder."""
    position = {name: label for label, name in enumerate(class_names)}
    folders = [os.fsdecode(name).partition(os.sep)[::2] for name in names.tolist()]  # (class, rest)
    return np.array([position[folder] if rest else -1 for folder, rest in folders], dtype=np.int64)


def check_same_classes(
    root: Path, names: dict[str, list[str]], noun: str = "class folders"
) -> None:
    """Raises: InputError where the splits' class names differ."""
    for one, other in (("train", "val"), ("val", "train")):
        alone = sorted(set(names[one]) - set(names[other]))
        if alone:
            raise DataError(
                f"{len(alone)} {noun} are in {root / one} and not in {other}/: {_some(alone)}"
            )


def _read_class_folders(root: Path, in_chans: int) -> LabelledData:
    check_folder(root)
    names = {}
    for split in SPLITS:
        if not (root / split).is_dir():
            raise DataError(
                f"data_path {root} has no {split}/: it must hold train/ and val/, with a folder per class"
            )
        names[split] = class_folders(root / split)
        if not names[split]:
            raise DataError(f"{root / split} has no class folders: it must hold a folder per class")
    check_same_classes(root, names)
    splits = []
    for split in SPLITS:
        source = ClassFolder(root / split, names[split], in_chans)
        _check_filled(root / split, source.labels, names[split], "class folders")
        splits.append(source)
    return LabelledData(splits[0], splits[1], names["train"])


def _read_packs(root: Path, in_chans: int) -> LabelledData:
    """Both splits of a folder of packs; classes that no index names are called by their labels."""
    check_folder(root)
    packs = {}
    for split in SPLITS:
        if not (root / split).is_dir():
            raise DataError(
                f"data_path {root} has no {split}/: it must hold train/ and val/, each with shards"
            )
        packs[split] = LabelledPack(root / split, in_chans)
    named = {
        split: pack.index.class_names
        for split, pack in packs.items()
        if pack.index.class_names is not None
    }
    if len(named) == len(SPLITS):
        check_same_classes(root, named, "classes")
    highest = max(int(pack.labels.max()) for pack in packs.values())
    if named:
        class_names = next(iter(named.values()))
    elif highest < len(packs["train"]):
        class_names = [str(label) for label in range(highest + 1)]
    else:
        raise DataError(
            f"the labels in {root} go up to {highest}, with {len(packs['train'])} images to train on"
        )
    sources: list[LabelledSource] = []
    for split, pack in packs.items():
        _check_filled(root / split, pack.labels, class_names, "classes")
        labelled = np.flatnonzero(pack.labels >= 0)
        if len(labelled) < len(pack):
            logger.warning(
                "%s: %d images have no label and are left out",
                root / split,
                len(pack) - len(labelled),
            )
        sources.append(pack if len(labelled) == len(pack) else Subset(pack, labelled))
    return LabelledData(sources[0], sources[1], class_names)


def _check_filled(split: Path, labels: np.ndarray, class_names: list[str], noun: str) -> None:
    filled = set(np.unique(labels).tolist())
    empty = [name for label, name in enumerate(class_names) if label not in filled]
    if empty:
        raise DataError(f"{len(empty)} {noun} in {split} hold no image: {_some(empty)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
