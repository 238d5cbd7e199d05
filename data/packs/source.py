"""`dataset: packed`: images read from tar shards at the place that an index gives.

Each image's crc32 is checked before it is decoded. Epochs are ordered by blocks of neighbours
(`data/sampler.py`), so that a block can be read ahead in one request.
"""

import os
import zlib
from contextlib import suppress
from functools import lru_cache
from io import FileIO
from pathlib import Path

import numpy as np
from torch import Tensor

from data.images import BadImageError, PixelFormat, decode_image
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

    def __init__(self, folder: Path, pixels: PixelFormat):
        self.folder = folder
        self.pixels = pixels
        self.index = open_index(folder)
        self.labels = self.index.entries["label"].astype(np.int64)
        self.reads_ahead = False
        # a shard that is dropped from the cache is closed, as nothing else refers to it
        self.open_shard = lru_cache(maxsize=RECENT)(self._open_shard)
        self.announce = lru_cache(maxsize=RECENT)(self._announce)

    def __reduce__(self) -> tuple[object, ...]:
        # a process that is spawned opens its own files
        return type(self), (self.folder, self.pixels), {"reads_ahead": self.reads_ahead}

    def __len__(self) -> int:
        return len(self.index.entries)

    def read_ahead(self) -> None:
        self.reads_ahead = hasattr(os, "posix_fadvise")

    def read(self, index: int) -> Tensor:
        return decode_image(self.read_bytes(index), self.pixels)

    def read_bytes(self, index: int) -> bytes:
        """The image's file. Raises: BadImageError if it is not what it was when it was indexed."""
        shard, offset, length, crc32, _, _ = self.index.entries[index].tolist()
        if self.reads_ahead:
            self.announce(index // self.block_size)
        try:
            # reading at an offset moves no position, so processes may share inherited files
            content = os.pread(self.open_shard(shard).fileno(), length, offset)
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror}") from error
        found = zlib.crc32(content)
        if found != crc32:
            raise BadImageError(
                f"is damaged: at byte {offset}, {len(content)} of {length} bytes have "
                f"the crc32 {found:08x}, expected {crc32:08x}"
            )
        return content

    def _open_shard(self, shard: int) -> FileIO:
        return FileIO(self.folder / self.index.shards[shard])

    def _announce(self, block: int) -> None:
        """Has the system read a block from the disk, without waiting."""
        entries = self.index.entries[block * self.block_size : (block + 1) * self.block_size]
        for shard in np.unique(entries["shard"]).tolist():
            inside = entries[entries["shard"] == shard]
            start, last = int(inside["offset"][0]), inside[-1]
            length = int(last["offset"] + last["length"]) - start
            with suppress(OSError):  # reading an image there will report it
                descriptor = self.open_shard(shard).fileno()
                os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)

    def name(self, index: int) -> str:
        shard = self.index.shards[self.index.entries["shard"][index]]
        start, end = [*self.index.entries["name"][index : index + 2].tolist(), None][:2]
        return str(self.folder / shard / os.fsdecode(self.index.names[start:end].tobytes()))

    def fingerprint(self) -> str:
        return self.index.fingerprint


def open_pack(data_path: str | Path, pixels: PixelFormat, splits: tuple[str, ...]) -> PackedSource:
    """The first of `splits` that the folder has, else the shards in the folder itself.

    Raises: DataError.
    """
    folders = [Path(data_path, split) for split in splits]
    return PackedSource(next(filter(Path.is_dir, folders), Path(data_path)), pixels)
