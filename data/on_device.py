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

BLOCK = 1024  # images that are decoded before they are copied to the device
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
        self.shape = next(readable, torch.empty(1, 1, 1)).shape  # (C, h, w)
        self.num_bytes = len(source) * self.shape.numel()

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

    @cached_property
    def images(self) -> Tensor:
        """uint8 `(n, C, h, w)`, which lie in memory as `(n, h, C, w)`; bad images are black.

        Raises: DataError if the images have different sizes.
        """
        started = time.monotonic()
        channels, height, width = self.shape
        images = torch.zeros(
            len(self), height, channels, width, dtype=torch.uint8, device=self.device
        ).transpose(1, 2)
        self.source.read_ahead()
        with ThreadPoolExecutor(self.num_threads) as pool:
            for block in torch.arange(len(self)).split(BLOCK):
                decoded = torch.zeros(len(block), *self.shape, dtype=torch.uint8)
                indices = block.tolist()
                for place, image in enumerate(pool.map(self._decode, indices)):
                    if image is not None:
                        self._check_size(indices[place], image)
                        decoded[place] = image
                images[indices[0] : indices[-1] + 1] = decoded.to(self.device)
        logger.info(
            f"decoded {len(self)} images of {channels} x {height} x {width} onto {self.device} in "
            f"{time.monotonic() - started:.1f} s: {self.num_bytes / 1e6:.0f} MB"
        )
        return images

    def _decode(self, index: int) -> Tensor | None:
        try:
            return self.source.read(index)
        except BadImageError as error:
            self.bad[index] = str(error)
            return None

    def _check_size(self, index: int, image: Tensor) -> None:
        if image.shape != self.shape:
            sizes = (f"{height} x {width}" for _, height, width in (self.shape, image.shape))
            raise DataError(
                f"data_on_device needs images of one size, and the first is {next(sizes)}, "
                f"{self.name(index)} {next(sizes)} (height x width): resize them, or leave "
                "data_on_device out"
            )


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
            f"data_on_device: {sizes} bytes are {needed / 1e9:,.3f} GB of pixels, and "
            f"{free / 1e9:,.3f} GB of memory are free for them on {processes.device}: leave "
            "data_on_device out, or make the images smaller",
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
