"""`dataset: parquet`: images in parquet files as the Hugging Face library `datasets` writes them.

An image is a struct of `bytes`, the encoded file, and `path`, which is read beside the parquet file
if there are no bytes. Labels are a column of whole numbers, whose names are in the schema's
metadata. A row group is the smallest part that can be read: it is decoded as a whole and kept.
Epochs are ordered by blocks of about that size (`data/sampler.py`), so that neighbours are read at
about the same time.
"""

import hashlib
import json
import logging
import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from data.images import BadImageError, PixelFormat, decode_image
from data.sources import ImageSource, say_once
from util.errors import DataError, InputError

if TYPE_CHECKING:
    from pyarrow import ChunkedArray, Schema
    from pyarrow.parquet import ParquetFile

# What a process keeps: at most so many row groups (twice as many as are mixed at a time) and bytes.
RECENT, RECENT_BYTES = 128, 2**30
SPLIT = re.compile(r"(train|val|test)(ing|id|idation)?(?![a-z])", re.IGNORECASE)
PROMISED = re.compile(r"-\d+-of-0*(\d+)")  # how many files there are, in a file's name
# What pyarrow raises on damaged files
READING_ERRORS = (OSError, ValueError, LookupError, RuntimeError, TypeError)
logger = logging.getLogger(__name__)


class ParquetSource(ImageSource):
    """The images in parquet files, one file after the other, with labels `(n,)` int64, -1 for
    images without one.

    class_names: in the order of the labels, None if they are not known.
    label_column: None if there is none.

    Raises: DataError for files without images, that cannot be read, or that differ in their
    columns; InputError without pyarrow.
    """

    def __init__(self, files: Sequence[Path], pixels: PixelFormat):
        self.files = files
        self.pixels = pixels
        self.groups: list[tuple[int, int]] = []  # file, and row group in it
        digest, labels, rows, num_bytes = hashlib.sha256(), [], [], [0]
        for number, path in enumerate(files):
            try:
                with _open(path) as file, path.open("rb") as raw:
                    columns = _columns(path, file.schema_arrow)
                    footer = file.metadata
                    of_file = np.full(footer.num_rows, -1)
                    if columns[1] is not None:
                        column = file.read(columns=[columns[1]], use_threads=False)[columns[1]]
                        of_file = column.cast("int64").fill_null(-1).to_numpy()
                    raw.seek(-footer.serialized_size - 8, 2)  # 8 for its length and a mark
                    digest.update(raw.read())
            except InputError:
                raise
            except READING_ERRORS as error:
                text = str(error).splitlines()[0]
                raise DataError(
                    f"{path} cannot be read as parquet, is it whole? ({text})"
                ) from error
            if number == 0:
                self.image_column, self.label_column, self.class_names = columns
            elif columns != (self.image_column, self.label_column, self.class_names):
                raise DataError(
                    f"{path} has other columns for images and labels, or other classes, than "
                    f"{files[0]}: give each data set a folder of its own"
                )
            labels.append(of_file.astype(np.int64))
            for group in range(footer.num_row_groups):
                self.groups.append((number, group))
                rows.append(footer.row_group(group).num_rows)
                num_bytes.append(footer.row_group(group).total_byte_size)
        self.labels = np.concatenate(labels)
        if not len(self.labels):
            raise DataError(f"there is no image in {files[0]}, or in the parquet files beside it")
        self.starts = np.cumsum([0, *rows])[:-1]  # each group's first image
        self.block_size = max(rows)
        digest.update(self.labels.tobytes())
        self._fingerprint = digest.hexdigest()
        kept = min(RECENT, max(1, RECENT_BYTES // max(*num_bytes, 1)))
        if kept < min(RECENT // 2, len(rows)):
            logger.warning(
                "%s: row groups of up to %d MB are slow to read in random order: write smaller "
                "ones, with datasets by to_parquet(path, batch_size=100)",
                files[0].parent,
                max(num_bytes) >> 20,
            )
        self.rows = lru_cache(maxsize=kept)(self._rows)

    def __reduce__(self) -> tuple[object, ...]:
        # a process that is spawned reads its own row groups
        return type(self), (self.files, self.pixels)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Tensor:
        return decode_image(self.read_bytes(index), self.pixels)

    def read_bytes(self, index: int) -> bytes:
        """The image's file. Raises: BadImageError."""
        group = self._group_of(index)
        try:
            row = self.rows(group)[index - int(self.starts[group])].as_py() or {}
            if row["bytes"] is not None:
                return row["bytes"]
            path = self.files[self.groups[group][0]].parent / (row.get("path") or "")
            if path.is_file():
                return path.read_bytes()
        except READING_ERRORS as error:
            text = (str(error) or type(error).__name__).splitlines()[0]
            raise BadImageError(f"cannot be read: {text}") from error
        raise BadImageError(f"has no bytes in {self.image_column}, and there is no file {path}")

    def name(self, index: int) -> str:
        number = self.groups[self._group_of(index)][0]
        first = bisect_left(self.groups, (number, 0))  # of the file's groups
        return f"{self.files[number]}[{index - self.starts[first]}]"

    def fingerprint(self) -> str:
        """Of the labels and of the files' footers, which hold the size of each column in each row
        group."""
        return self._fingerprint

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def _rows(self, group: int) -> "ChunkedArray":
        """The images of a row group. The file is opened for it alone, as readers are not made for
        several threads and processes."""
        number, place = self.groups[group]
        with _open(self.files[number]) as file:
            table = file.read_row_group(place, columns=[self.image_column], use_threads=False)
        return table[self.image_column]


def open_parquet(
    data_path: str | Path | None, pixels: PixelFormat, splits: tuple[str, ...], strict: bool = False
) -> ParquetSource:
    """The images of the first of `splits` (of train, val and test) that a folder of parquet files
    has; of all files, or with `strict` none, if it has none of them.

    A file's split is the beginning of its name or of its folder's: train-00000-of-00002.parquet,
    validation.parquet, test/0.parquet.

    Raises: InputError if there is no such file, or one is damaged.
    """
    root = Path(data_path or "")
    base = root if root.is_dir() else root.parent
    found = sorted(root.rglob("*.parquet")) if root.is_dir() else [root]
    files = {path: path.relative_to(base).parts for path in found}
    files = {path: parts for path, parts in files.items() if not any(p[0] == "." for p in parts)}
    chosen = [] if strict else list(files)
    for split in reversed(splits):
        chosen = [path for path, parts in files.items() if _split_of(parts) == split] or chosen
    if not chosen:
        wanted = f" whose name, or folder's, begins with {' or '.join(splits)}" if strict else ""
        raise DataError(f"data_path {root} holds no .parquet file{wanted}")
    say_once(f"{root}: {len(chosen)} of {len(files)} parquet files")
    promised = {match[1] for path in chosen if (match := PROMISED.search(path.name))}
    if len(promised) == 1 and int(*promised) != len(chosen):
        logger.warning(
            "%s: its name promises %s files, there are %d", chosen[0], *promised, len(chosen)
        )
    return ParquetSource(chosen, pixels)


def _split_of(parts: tuple[str, ...]) -> str | None:
    """The split that the last of these names says which says one."""
    found = (SPLIT.match(part) for part in reversed(parts))
    return next((match[1].lower() for match in found if match), None)


def import_parquet() -> ModuleType:
    """pyarrow's module of parquet files. Raises: InputError if it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("parquet files need pyarrow: pip install -e .[parquet]") from error
    return pyarrow.parquet


def _open(path: Path) -> "ParquetFile":
    """The file, mapped into memory."""
    return import_parquet().ParquetFile(path, memory_map=True, page_checksum_verification=True)


def _columns(path: Path, schema: "Schema") -> tuple[str, str | None, list[str] | None]:
    """The names of the columns of images and of labels, and the classes' names, if there are any.

    Raises: DataError without a column of images.
    """
    from pyarrow.types import is_integer, is_struct

    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        kinds = {name: feature.get("_type") for name, feature in features.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        features, kinds = {}, {}
    structs = [
        field.name
        for field in schema
        if is_struct(field.type) and field.type.get_field_index("bytes") >= 0
    ]
    if not structs:
        raise DataError(
            f"{path} has no column of images (a struct of bytes and path, as the library datasets "
            f"writes it), its columns are {', '.join(schema.names)}"
        )
    image = next((name for name in structs if kinds.get(name) == "Image"), structs[0])
    whole = [field.name for field in schema if is_integer(field.type)]
    classes = [name for name in whole if kinds.get(name) == "ClassLabel"]
    label = next((name for name in ("label", *classes, "labels") if name in whole), None)
    return image, label, features[label]["names"] if label in classes else None
