"""Which image goes where: a pure function of (seed, epoch, position), whatever the number of
processes or workers.

An epoch is a permutation of the data set, by blocks if the images lie in large files. `position`
counts through it. Optimiser step s of an epoch takes the positions [s * total, (s + 1) * total),
which its micro-batches and processes share: with batches of 4, 2 processes and 2 micro-batches,
process 0 takes 0 to 3 and 8 to 11 of the first step, process 1 takes 4 to 7 and 12 to 15. The
images left at the end of an epoch are not decoded and differ each time. One integer, the step, is
enough to continue anywhere.

With `aug_repeats` M (repeated augmentation, arXiv 1901.09335) each M consecutive positions show one
image, cropped, flipped and masked M times. Epochs are counted in samples, that is in crops: an
epoch has as many steps as without, decodes one M-th of the images, and one permutation lasts for M
epochs. So over the same number of epochs an image is seen as often, and decoded one M-th as often.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from util.rng import ORDER, generator

GROUP = 64  # blocks that are mixed with one another


class SampleKey(NamedTuple):
    """One sample of a run: the image's index in the data set, and the coordinates that seed its
    crop and mask."""

    image: int
    epoch: int
    position: int
    step: int


@lru_cache(maxsize=1)
def epoch_order(num_images: int, block_size: int, seed: int, epoch: int) -> np.ndarray:
    """The images of an epoch (of several, with `aug_repeats`), `(num_images,)` int64: a function of
    the arguments.

    With `block_size` 1 it is any permutation. Else blocks of `block_size` neighbours are put into a
    random order, and images are mixed within each 64 consecutive blocks of it, so that the images
    read at about the same time lie in 64 places.
    """
    stream = generator(seed, ORDER, epoch)
    if block_size == 1:
        return torch.randperm(num_images, generator=stream).numpy()
    blocks = torch.randperm(-(-num_images // block_size), generator=stream)
    order = []
    for group in blocks.split(GROUP):
        images = (group[:, None] * block_size + torch.arange(block_size)).flatten()
        images = images[images < num_images]  # the last block may be shorter
        order.append(images[torch.randperm(len(images), generator=stream)])
    return torch.cat(order).numpy()


@dataclass(kw_only=True, eq=False)
class StepSampler:
    """The micro-batches of one process from `start_step` to `stop_step`, across epochs.

    Args:
        num_images: length of the data set, at least `batch_size * accum_iter * world_size`.
        batch_size: per process and micro-batch.
        accum_iter: micro-batches per optimiser step.
        rank, world_size: this process, and the number of processes.
        seed: of the run.
        start_step, stop_step: optimiser steps of the run, counted from 0.
        block_size: see `epoch_order`.
        aug_repeats: number of samples of an image, which follow one another; divides `batch_size`,
            so that they share a batch.
    """

    num_images: int
    batch_size: int
    accum_iter: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int
    start_step: int = 0
    stop_step: int
    block_size: int = 1
    aug_repeats: int = 1

    def __len__(self) -> int:
        return (self.stop_step - self.start_step) * self.accum_iter

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> list[SampleKey]:
        """The micro-batch of this number, counted from `start_step` on."""
        total = self.batch_size * self.accum_iter * self.world_size
        per_epoch = self.num_images // total * total
        micro = self.start_step * self.accum_iter + number
        first = (micro * self.world_size + self.rank) * self.batch_size  # sample of the run
        epoch, position = divmod(first, per_epoch)
        order_number, place = divmod(first, per_epoch * self.aug_repeats)
        order = epoch_order(self.num_images, self.block_size, self.seed, order_number)
        images = order[np.arange(place, place + self.batch_size) // self.aug_repeats].tolist()
        step = micro // self.accum_iter
        return [
            SampleKey(image, epoch, position + sample, step) for sample, image in enumerate(images)
        ]

    def images(self, step: int) -> list[int]:
        """The images of this process in an optimiser step that is counted from 1, as in the log."""
        first = (step - 1 - self.start_step) * self.accum_iter
        return [key.image for micro in range(self.accum_iter) for key in self[first + micro]]
