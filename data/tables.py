"""Labels from a table: a .csv or .parquet file with a column of image paths, one or more columns of
labels, and perhaps one that splits and one of groups.

What is used of it is checked before anything is computed, and a mistake is one line.

Shapes: `n` images, `L` labels.
"""

import csv
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.images import PixelFormat
from data.labels import (
    SHOWN,
    SPLITS,
    LabelledData,
    build_labelled_data,
    check_num_classes,
    strata,
    stratified_choice,
)
from data.parquet import import_parquet
from data.sources import WALK_THREADS, FolderSource, check_folder, check_format
from util.errors import DataError, InputError
from util.rng import SUBSET, generator
from util.settings.evaluation import LabelledDataConfig, TableConfig

YES_OR_NO = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0}
LARGEST_NUMBER = float(np.finfo(np.float32).max)
LONGEST_CELL = 2**24  # characters; csv's own limit refuses long texts in columns of no interest
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    """What is used of a table, in the order of the paths: that of its rows changes nothing.

    names: paths of the images `(n,)`, as bytes, relative to data_path.
    labels: of multiclass `(n,)` int64; of multilabel `(n, L)` int64, 0 or 1; of regression
        `(n, L)` float32.
    label_names: the classes in the order of the labels, or the label columns.
    splits: `(n,)`, train or val, if a column says so, else None.
    groups: `(n,)` int64, equal for images that must be in one split, or None.
    num_left_out: rows with another word in the column that splits.
    """

    names: np.ndarray
    labels: np.ndarray
    label_names: list[str]
    splits: np.ndarray | None
    groups: np.ndarray | None
    num_left_out: int

    def digest(self) -> str:
        """Equal for equal paths, labels, splits and groups."""
        columns = (self.names, self.labels, self.splits, self.groups)
        plain = [None if column is None else column.tolist() for column in columns]
        text = repr((self.label_names, plain))
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


class TableImages(FolderSource):
    """The images in some rows of a table, with their labels."""

    def __init__(self, table: LabelTable, rows: np.ndarray, root: Path, pixels: PixelFormat):
        names = table.names[rows].tolist()
        super().__init__(root, pixels, prefer_train=False, names=[*map(os.fsdecode, names)])
        # names are sorted; frames of one file have one label
        self.labels = table.labels[rows[np.searchsorted(table.names[rows], self.names)]]
        self.digest = table.digest()

    def fingerprint(self) -> str:
        return f"{self.digest} {super().fingerprint()}"


def build_data(
    cfg: LabelledDataConfig, pixels: PixelFormat, seed: int, download: bool, num_classes: int | None
) -> LabelledData:
    """Training and validation images that the settings name, with labels from a table if they name
    one, else from folders or the data set.

    Raises: InputError if they are not there or wrong, or have another number of classes.
    """
    if cfg.labels is None:
        return build_labelled_data(cfg.dataset, cfg.data_path, pixels, download, num_classes)
    data = build_table_data(cfg, cfg.data_path, pixels, seed)
    check_num_classes(num_classes, data.class_names)
    return data


def build_table_data(
    cfg: TableConfig, data_path: str | None, pixels: PixelFormat, seed: int
) -> LabelledData:
    """Training and validation images of a folder as the table `cfg.labels` says, split by its
    column or by `seed`.

    Raises: InputError if table or images are not there or wrong, or no image of a class is for
        training.
    """
    root = check_folder(data_path)
    table = read_label_table(cfg, root)
    if table.num_left_out:
        logger.warning(
            "%s: %d rows say neither train nor val in %s, and are left out",
            cfg.labels,
            table.num_left_out,
            cfg.split_column,
        )
    if table.splits is not None:
        is_val = table.splits == "val"
    else:
        assert cfg.val_share is not None, "the settings ask for one of the two"
        is_val = validation_choice(table.labels, table.groups, cfg.val_share, seed)
    parts = [np.flatnonzero(rows) for rows in (~is_val, is_val)]
    if not all(map(len, parts)):
        raise DataError(
            f"labels {cfg.labels}: {len(parts[0])} images would be for training and "
            f"{len(parts[1])} for validation: it needs more images, or more groups"
        )
    train, val = (check_format(TableImages(table, rows, root, pixels)) for rows in parts)
    if cfg.objective == "multiclass":
        present = set(train.labels.tolist())
        absent = [name for label, name in enumerate(table.label_names) if label not in present]
        if absent:
            raise DataError(
                f"labels {cfg.labels}: no image for training has the class {absent[:SHOWN]}"
            )
    logger.info("%s: %d training and %d validation images", cfg.labels, len(train), len(val))
    return LabelledData(train, val, table.label_names)


def validation_choice(
    labels: np.ndarray, groups: np.ndarray | None, share: float, seed: int
) -> np.ndarray:
    """Which images `(n,)` bool are for validation: about `share` of each stratum, and of groups
    `(n,)` all images or none. A pure function of its arguments.

    A stratum of one image is for training. Groups are dealt one by one, large ones first, each to
    the split where the counts of its strata then are nearer to their shares, by chi-square.
    """
    kinds = strata(labels)
    is_val = np.zeros(len(labels), dtype=bool)
    if groups is None:
        several = np.flatnonzero(np.bincount(kinds)[kinds] > 1)
        count = round(share * len(several))
        if count:
            is_val[several[stratified_choice(kinds[several], count, seed)]] = True
        return is_val
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
    shuffled = torch.randperm(len(members), generator=generator(seed, SUBSET)).tolist()
    totals = np.bincount(kinds)
    goals = np.stack([(1 - share) * totals, share * totals])  # (2, strata)
    have = np.zeros_like(goals)
    order = sorted(shuffled, key=lambda group: -len(members[group]))
    for group in order:
        found, counts = np.unique(kinds[members[group]], return_counts=True)
        missing = goals[:, found] - have[:, found]
        # how much the sum of (have - goal)^2 / goal grows in either split
        growth = (counts * (counts - 2 * missing) / goals[:, found]).sum(axis=1)
        split = int(growth[1] < growth[0])
        have[split, found] += counts
        is_val[members[group]] = split
    if not is_val.any() and len(order) > 1:
        is_val[members[order[-1]]] = True
    return is_val


def read_label_table(cfg: TableConfig, root: Path) -> LabelTable:
    """The table that `cfg.labels` names, for images below `root`.

    Raises: InputError if it cannot be read, lacks a column or has a bad label; DataError if images
        are missing or named twice, or a group is in both splits.
    """
    assert cfg.labels is not None, "the caller has a table"
    (files, *others), columns = _read(cfg.labels, lambda header: _columns(cfg, header))
    labels = [name for name in others if name not in (cfg.split_column, cfg.group)]
    num_rows = len(columns[files])
    kept = list(range(num_rows))
    if cfg.split_column is not None:
        kept = [row for row in kept if columns[cfg.split_column][row] in SPLITS]
    for name, cells in columns.items():
        if empty := [row for row in kept if not cells[row]]:
            raise InputError(
                f"labels {cfg.labels}: {len(empty)} cells of column {name} are empty, the first "
                f"in row {empty[0] + 2}: fill them, or remove those rows"
            )
    paths = {row: os.path.normpath(columns[files][row]) for row in kept}
    kept.sort(key=lambda row: os.fsencode(paths[row]))
    _check_files(cfg.labels, root, [paths[row] for row in kept])
    used = {name: [cells[row] for row in kept] for name, cells in columns.items()}
    splits = groups = None
    if cfg.split_column is not None:
        splits = np.array(used[cfg.split_column])
        if len(set(splits.tolist())) < len(SPLITS):
            found = sorted(set(columns[cfg.split_column]))
            raise InputError(
                f"split_column {cfg.split_column} of {cfg.labels} must say train for some images "
                f"and val for others, and says {', '.join(found[:SHOWN])}"
            )
    if cfg.group is not None:
        groups = np.unique(_raw(used[cfg.group]), return_inverse=True)[1]
        if splits is not None:
            _check_groups(cfg, used[cfg.group], splits)
    if cfg.objective == "multiclass":
        numbers, label_names = _classes(used[labels[0]])
    else:
        numbers = np.stack([_numbers(cfg, name, used[name]) for name in labels], axis=1)  # (n, L)
        label_names = labels
    return LabelTable(
        names=_raw([paths[row] for row in kept]),
        labels=numbers,
        label_names=label_names,
        splits=splits,
        groups=groups,
        num_left_out=num_rows - len(kept),
    )


def _read(
    path: str, choose: Callable[[list[str]], list[str]]
) -> tuple[list[str], dict[str, list[str]]]:
    """The names of the columns that `choose` picks from a table's first row, and their cells as
    text. Raises: InputError."""
    try:
        if path.lower().endswith(".parquet"):
            parquet = import_parquet()
            chosen = choose(parquet.read_schema(path).names)
            table = parquet.read_table(path, columns=chosen)
            columns = {
                name: [
                    "" if cell is None else str(cell).strip() for cell in table[name].to_pylist()
                ]
                for name in chosen
            }
        else:
            csv.field_size_limit(LONGEST_CELL)
            # bytes that are no UTF-8 are kept, as the names of files may be any bytes
            with Path(path).open(
                encoding="utf-8-sig", errors="surrogateescape", newline=""
            ) as file:
                rows = [row for row in csv.reader(file, strict=True) if row]
            header = [name.strip() for name in rows[0]] if rows else []
            ragged = [place for place, row in enumerate(rows, 1) if len(row) != len(header)]
            if ragged:
                raise ValueError(f"row {ragged[0]} has not the {len(header)} cells of the first")
            chosen = choose(header)
            columns = {
                name: [row[header.index(name)].strip() for row in rows[1:]] for name in chosen
            }
    except InputError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"labels {path} cannot be read as a table: {reason}") from error
    if not columns[chosen[0]]:
        raise InputError(f"labels {path} has no row below the names of its columns")
    return chosen, columns


def _columns(cfg: TableConfig, header: list[str]) -> list[str]:
    """The names of the columns that are used: of the paths, of the labels, and of those that split
    and group. Raises: InputError if one is not there, there twice, or used twice."""
    others = [name for name in (cfg.split_column, cfg.group) if name is not None]
    files = cfg.file_column or next(iter(header), "")
    labels = [cfg.label_columns] if isinstance(cfg.label_columns, str) else cfg.label_columns
    if labels is None:
        labels = [name for name in header if name not in (files, *others)]
        labels = labels if cfg.objective == "multilabel" else labels[:1]
    chosen = [files, *labels, *others]
    unknown = [name for name in chosen if name not in header]
    if unknown or not labels:
        raise InputError(
            f"labels {cfg.labels} has no column {', '.join(unknown) or 'of labels'}: its columns "
            f"are {', '.join(header[: 4 * SHOWN])}"
        )
    twice = [name for name in chosen if header.count(name) > 1 or chosen.count(name) > 1]
    if twice:
        raise InputError(f"labels {cfg.labels}: column {twice[0]} is there, or is used, twice")
    if cfg.objective == "multiclass" and len(labels) > 1:
        raise InputError(
            f"label_columns names {len(labels)} columns, and objective multiclass has one class "
            "of an image: name one, or set objective multilabel"
        )
    return chosen


def _raw(texts: list[str]) -> np.ndarray:
    """Texts as one flat array of bytes, which loader processes share."""
    return np.array([os.fsencode(text) for text in texts])


def _check_files(table: str, root: Path, paths: list[str]) -> None:
    """Raises: DataError if an image is named twice or is not there."""
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise DataError(f"labels {table} names {len(twice)} images more than once: {twice[:SHOWN]}")
    with ThreadPoolExecutor(WALK_THREADS) as pool:
        is_there = list(pool.map(lambda path: os.path.isfile(root / path), paths))  # noqa: PTH113
    missing = [path for path, found in zip(paths, is_there, strict=True) if not found]
    if missing:
        raise DataError(
            f"labels {table} names {len(missing)} of {len(paths)} images that are not in {root}: "
            f"{missing[:SHOWN]}"
        )


def _check_groups(cfg: TableConfig, groups: list[str], splits: np.ndarray) -> None:
    """Raises: DataError if images of one group are in both splits."""
    train, val = (
        {group for group, of_group in zip(groups, splits, strict=True) if of_group == split}
        for split in SPLITS
    )
    if both := train & val:
        raise DataError(
            f"labels {cfg.labels}: {len(both)} of {len(train | val)} values of {cfg.group} are in "
            f"both train and val by {cfg.split_column}: {sorted(both)[:SHOWN]}"
        )


def _classes(cells: list[str]) -> tuple[np.ndarray, list[str]]:
    """Labels `(n,)` int64 and the names of the classes: whole numbers in their order, others in
    that of their letters."""
    names = sorted(set(cells))
    if all(name.removeprefix("-").isdecimal() for name in names):
        names.sort(key=int)
    place = {name: label for label, name in enumerate(names)}
    return np.array([place[cell] for cell in cells], dtype=np.int64), names


def _numbers(cfg: TableConfig, name: str, cells: list[str]) -> np.ndarray:
    """A column of labels `(n,)`: 0 or 1 as int64, or of regression numbers as float32. Raises:
    InputError for what is neither."""
    yes_or_no = cfg.objective == "multilabel"
    try:
        cell = ""  # the one that is looked at
        values = []
        for cell in cells:
            values.append(YES_OR_NO[cell.lower()] if yes_or_no else float(cell))
            if not abs(values[-1]) <= LARGEST_NUMBER:  # NaN is not, either
                raise ValueError
    except (ValueError, KeyError) as error:
        wanted = "0 or 1" if yes_or_no else "finite numbers"
        raise InputError(
            f"labels {cfg.labels}: column {name} must hold {wanted} for objective "
            f"{cfg.objective}, and has {cell!r}"
        ) from error
    return np.array(values, dtype=np.int64 if yes_or_no else np.float32)
