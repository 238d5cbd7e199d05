"""Labelled images for the evaluations: training and validation split of a folder or a known set.

A folder holds `train/<class>/...` and `val/<class>/...`. Both splits must have the same classes, none of them empty:
a wrong layout would only show as a bad accuracy.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data.cifar import read_cifar
from data.datasets import ArraySource, FolderSource, ImageSource, check_folder, read_mnist5k
from data.sampler import SUBSET, generator
from util.errors import InputError

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
        folders = [os.fsdecode(name).partition(os.sep)[::2] for name in self.names.tolist()]  # (class, rest)
        inside = np.array([bool(rest) for _, rest in folders])
        if not inside.all():
            logger.warning("%s: %d images lie in no class folder and are left out", split, (~inside).sum())
        self.names = self.names[inside]
        position = {name: index for index, name in enumerate(class_names)}
        self.labels = np.array([position[folder] for folder, rest in folders if rest], dtype=np.int64)


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

    Raises: InputError where they are not to be had, the splits' classes differ, one is empty, or there are not
        `num_classes` of them (None takes any number).
    """
    if dataset == "folder":
        assert data_path is not None, "the config checks that data_path is given"
        data = _read_class_folders(Path(data_path), in_chans)
    else:
        splits = []
        for train in (True, False):
            if dataset == "mnist5k":
                images, labels = read_mnist5k(train)
            else:
                assert data_path is not None, "the config checks that data_path is given"
                images, labels = read_cifar(dataset, data_path, train, download)
            splits.append(LabelledArray(f"{dataset} {'train' if train else 'val'}", images, labels, in_chans))
        count = 100 if dataset == "cifar100" else 10
        data = LabelledData(splits[0], splits[1], [str(label) for label in range(count)])
    found = len(data.class_names)
    if num_classes not in (None, found):
        raise InputError(f"num_classes is {num_classes} and the data has {found} classes: leave num_classes out")
    for split, source in (("train", data.train), ("val", data.val)):
        outside = (source.labels < 0) | (source.labels >= found)
        if outside.any():
            bad = int(source.labels[outside][0])
            raise InputError(f"the {split} split of {dataset} has the label {bad}, outside its {found} classes")
    return data


def take_subset(source: LabelledSource, count: int | None, seed: int) -> LabelledSource:
    """A fixed choice of `count` images with each class in proportion; None takes all. Raises: InputError."""
    if count is None:
        return source
    if not np.unique(source.labels).size <= count <= len(source):
        classes = np.unique(source.labels).size
        raise InputError(f"subset {count} must lie between the {classes} classes and the {len(source)} training images")
    return Subset(source, stratified_choice(source.labels, count, seed))


def stratified_choice(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` sorted indices, a pure function of (labels, count, seed), with each class's share within one image."""
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * count / len(labels)
    quota = np.floor(exact).astype(int)
    largest_rest = np.argsort(quota - exact, kind="stable")[: count - quota.sum()]
    quota[largest_rest] += 1
    chosen = []
    for label, number in zip(classes, quota, strict=True):
        members = np.flatnonzero(labels == label)
        order = torch.randperm(len(members), generator=generator(seed, SUBSET, int(label))).numpy()
        chosen.append(members[order[:number]])
    return np.sort(np.concatenate(chosen))


def _read_class_folders(root: Path, in_chans: int) -> LabelledData:
    check_folder(root)
    names = {}
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise InputError(f"data_path {root} has no {split}/: it must hold train/ and val/, with a folder per class")
        try:
            names[split] = sorted(
                path.name for path in (root / split).iterdir() if path.is_dir() and not path.name.startswith(".")
            )
        except OSError as error:
            raise InputError(f"cannot list {root / split}: {error.strerror}") from error
        if not names[split]:
            raise InputError(f"{root / split} has no class folders: it must hold a folder per class")
    for one, other in (("train", "val"), ("val", "train")):
        alone = sorted(set(names[one]) - set(names[other]))
        if alone:
            raise InputError(f"{len(alone)} class folders are in {root / one} and not in {other}/: {_some(alone)}")
    splits = []
    for split in ("train", "val"):
        source = ClassFolder(root / split, names[split], in_chans)
        filled = np.bincount(source.labels, minlength=len(names[split])) > 0
        empty = [name for name, is_filled in zip(names[split], filled, strict=True) if not is_filled]
        if empty:
            raise InputError(f"{len(empty)} class folders in {root / split} hold no image: {_some(empty)}")
        splits.append(source)
    return LabelledData(splits[0], splits[1], names["train"])


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
