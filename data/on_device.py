"""`data_on_device`: all images of a source, decoded once into one tensor on the device that trains.

Shapes: `n` images, `C` channels, `h` and `w` height and width.
"""

import logging
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from data.images import BadImageError
from data.sources import ImageSource
from util.dist import Processes, available_cores
from util.errors import DataError, InputError
from util.settings.base import DataConfig

BLOCK = 4096  # images that threads decode at most ahead of the one that is copied
SourceT = TypeVar("SourceT", bound=ImageSource)
logger = logging.getLogger(__name__)


class DecodedSource(ImageSource):
    """A source whose images, all of one size, are on `device`. They are decoded when `images` is
    first asked for.

    bad: by index, why an image cannot be decoded. labels: `(n,)` int64, if `source` has them.
    """

    labels: np.ndarray

    def __init__(self, source: ImageSource, device: torch.device, num_threads: int):
        self.source = source
        self.device = device
        self.num_threads = num_threads
        self.block_size = source.block_size
        self.labels = getattr(source, "labels", np.empty(0))
        self.bad: dict[int, str] = {}
        readable = (image for image in map(self._decode, range(len(source))) if image is not None)
        first = next(readable, torch.empty(1, 1, 1))
        self.shape, self.dtype = first.shape, first.dtype  # (C, h, w)
        self.num_bytes = len(source) * first.nbytes

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> Tensor:
        images = self.images
        if index in self.bad:
            raise BadImageError(self.bad[index])
        return images[index].cpu()

    def name(self, index: int) -> str:
        return self.source.name(index)

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def read_ahead(self) -> None:
        self.source.read_ahead()
        _ = self.images  # decodes them before the training begins

    @cached_property
    def images(self) -> Tensor:
        """Pixels `(n, C, h, w)`, which lie in memory as `(n, h, C, w)`; bad images are black.

        Raises: DataError if the images have different sizes or depths.
        """
        started = time.monotonic()
        channels, height, width = self.shape
        images = torch.zeros(
            len(self), height, channels, width, dtype=self.dtype, device=self.device
        ).transpose(1, 2)
        with ThreadPoolExecutor(self.num_threads) as pool:
            for start in range(0, len(self), BLOCK):
                block = range(start, min(start + BLOCK, len(self)))
                for index, image in zip(block, pool.map(self._decode, block), strict=True):
                    if image is None:
                        continue
                    if image.shape != self.shape:
                        raise DataError(
                            f"data_on_device needs images of one size, and the first has height "
                            f"and width {height} x {width}, {self.name(index)} "
                            f"{image.shape[1]} x {image.shape[2]}: resize them, or give "
                            "--data_on_device false"
                        )
                    if image.dtype != self.dtype:
                        raise DataError(
                            f"data_on_device needs images of one depth, and the first has "
                            f"{self.dtype}, {self.name(index)} {image.dtype}: give "
                            "--data_on_device false"
                        )
                    images[index] = image
        logger.info(
            f"decoded {len(self)} images of {channels} x {height} x {width} onto {self.device} in "
            f"{time.monotonic() - started:.1f} s: {self.num_bytes / 1e6:.1f} MB"
        )
        return images

    def _decode(self, index: int) -> Tensor | None:
        try:
            return self.source.read(index)
        except BadImageError as error:
            self.bad[index] = str(error)
            return None


def place_on_device(
    cfg: DataConfig, processes: Processes, *sources: SourceT
) -> tuple[SourceT, ...]:
    """The sources as they are, or with `data_on_device` as a DecodedSource each.

    Raises: InputError if all their images together do not fit into memory.
    """
    if not cfg.data_on_device:
        return sources
    num_threads = max(1, available_cores() // processes.local_world_size)
    placed = [DecodedSource(source, processes.device, num_threads) for source in sources]
    needed, free = sum(source.num_bytes for source in placed), free_memory(processes)
    if needed > free:
        sizes = " + ".join("{} x {} x {} x {}".format(len(of), *of.shape) for of in placed)
        raise InputError(
            f"data_on_device needs {needed / 1e6:,.1f} MB for {sizes} pixels, and "
            f"{free / 1e6:,.1f} MB are free on {processes.device}: give --data_on_device false, "
            "or make the images smaller",
            settings=("data_on_device",),
        )
    return tuple(cast(SourceT, source) for source in placed)


def free_memory(processes: Processes) -> int:
    """Bytes that this process can have on its device; of the host's memory, its share of what is
    available."""
    if processes.device.type == "cuda":
        return torch.cuda.mem_get_info(processes.device)[0]
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if (table := Path("/proc/meminfo")).exists():
        (kilobytes,) = re.findall(r"MemAvailable: *(\d+) kB", table.read_text())
        available = 1024 * int(kilobytes)
    return available // processes.local_world_size
