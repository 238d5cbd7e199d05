"""`dataset: packed`: images read from tar shards at the place that an index gives.

Each image's crc32 is checked before it is decoded. Epochs are ordered by blocks of neighbours
(`data/sampler.py`), so that a block can be read ahead in one request.
"""

import os
import zlib
from collections import OrderedDict, deque
from contextlib import suppress
from io import FileIO
from pathlib import Path

import numpy as np
from torch import Tensor

from data.images import BadImageError, decode_image
from data.packs.index import open_index

# Shards that a process keeps open, and blocks that it remembers to have read ahead: twice as many
# as are mixed at a time.
RECENT = 128


class PackedSource:
    """The images in a folder of shards, an `ImageSource` with labels `(n,)` int64, -1 for images
    without one.

    Raises: DataError if index and shards do not fit.
    """

    block_size = 256

    def __init__(self, folder: Path, in_chans: int):
        self.folder = folder
        self.in_chans = in_chans
        self.index = open_index(folder)
        self.labels = self.index.entries["label"].astype(np.int64)
        self.files: OrderedDict[int, FileIO] = OrderedDict()  # by shard, the last used at the end
        self.reads_ahead = False
        self.announced: deque[int] = deque(maxlen=RECENT)  # blocks

    def __reduce__(self) -> tuple[object, ...]:
        # a process that is spawned opens its own files
        return type(self), (self.folder, self.in_chans), {"reads_ahead": self.reads_ahead}

    def __len__(self) -> int:
        return len(self.index.entries)

    def read_ahead(self) -> None:
        self.reads_ahead = True

    def read(self, index: int) -> Tensor:
        return decode_image(self.read_bytes(index), self.in_chans)

    def read_bytes(self, index: int) -> bytes:
        """The image's file. Raises: BadImageError if it is not what it was when it was indexed."""
        shard, offset, length, crc32, _, _ = self.index.entries[index].tolist()
        where = f"{self.index.shards[shard].name} at byte {offset}, member {self.index.name(index)}"
        if offset + length > self.index.shards[shard].size:  # before memory is asked for
            raise BadImageError(f"cannot be read: {where}, would end behind the shard")
        if self.reads_ahead:
            self._announce(index // self.block_size)
        try:
            content = os.pread(self._descriptor(shard), length, offset)
        except OSError as error:
            raise BadImageError(f"cannot be read: {where}: {error.strerror}") from error
        if len(content) < length:
            raise BadImageError(f"is cut off: {where}, has {len(content)} of {length} bytes")
        found = zlib.crc32(content)
        if found != crc32:
            raise BadImageError(
                f"is damaged: {where}, has the crc32 {found:08x}, expected {crc32:08x}"
            )
        return content

    def _descriptor(self, shard: int) -> int:
        """Of an open shard. Reading at an offset moves no position, so processes may share the
        files that they inherit."""
        if shard not in self.files:
            if len(self.files) >= RECENT:
                self.files.popitem(last=False)[1].close()
            self.files[shard] = FileIO(self.folder / self.index.shards[shard].name)
        self.files.move_to_end(shard)
        return self.files[shard].fileno()

    def _announce(self, block: int) -> None:
        """Has the system read a block from the disk, without waiting, unless that was done
        recently."""
        if block in self.announced or not hasattr(os, "posix_fadvise"):
            return
        self.announced.append(block)
        entries = self.index.entries[block * self.block_size : (block + 1) * self.block_size]
        for shard in np.unique(entries["shard"]).tolist():
            inside = entries[entries["shard"] == shard]
            start, last = int(inside["offset"][0]), inside[-1]
            length = int(last["offset"] + last["length"]) - start
            with suppress(OSError):  # reading an image there will report it
                os.posix_fadvise(self._descriptor(shard), start, length, os.POSIX_FADV_WILLNEED)

    def name(self, index: int) -> str:
        shard = self.index.shards[self.index.entries[index]["shard"]]
        return str(self.folder / shard.name / self.index.name(index))

    def fingerprint(self) -> str:
        return self.index.fingerprint


def open_pack(data_path: str, in_chans: int, splits: tuple[str, ...]) -> PackedSource:
    """The first of `splits` that the folder has, else the shards in the folder itself.

    Raises: InputError.
    """
    root = Path(data_path)
    folders = (root / split for split in splits)
    return PackedSource(next(filter(Path.is_dir, folders), root), in_chans)
