"""From sample keys to batches: decode, augment, draw the mask, replace bad files.

Policy for bad files in training: a sample whose file cannot be decoded is replaced by another one that is a pure
function of its key, and the file is reported in the batch; what happens then is the engine's decision
(`engine/bad_samples.py`).
"""

import os
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from data.datasets import ImageSource
from data.images import BadImageError
from data.sampler import CROP, MASK, REPLACEMENT, SampleKey, StepSampler, derive_seed, generator
from data.transforms import seeded

MAX_REPLACEMENTS = 8


class BadSample(NamedTuple):
    """A file that could not be decoded."""

    path: str
    reason: str


class Sample(NamedTuple):
    """One augmented image `(C, H, W)` uint8, its mask order `(N,)`, its key, and the bad files met on the way."""

    image: Tensor
    ids_shuffle: Tensor
    key: SampleKey
    bad: list[BadSample]


class PretrainBatch(NamedTuple):
    """A micro-batch.

    images `(B, C, H, W)` uint8; ids_shuffle `(B, N)` int64, patches in the order kept first; keys and bad as in Sample.
    `failed`: every sample's own file was bad, or one found no readable replacement; there may be no images then.
    """

    images: Tensor
    ids_shuffle: Tensor
    keys: list[SampleKey]
    bad: list[BadSample]
    failed: bool


class PretrainDataset(Dataset[Sample]):
    """Samples by `SampleKey`: crops and flips from (seed, epoch, position), masks from that or from (seed, step).

    Args:
        source: decoded images.
        transform: uint8 `(C, H, W)` to uint8 `(C, H', W')`, random by torch's generator.
        num_patches: N.
        shared_mask: one mask per optimiser step for all images.
        seed: of the run.
    """

    def __init__(self, source: ImageSource, transform: v2.Transform, num_patches: int, shared_mask: bool, seed: int):
        self.source = source
        self.transform = transform
        self.num_patches = num_patches
        self.shared_mask = shared_mask
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey) -> Sample:
        where = (key.epoch, key.position)
        image, bad = self._read(key)
        with seeded(derive_seed(self.seed, CROP, *where)):
            image = self.transform(image)
        mask_coordinates = (key.step,) if self.shared_mask else where
        ids_shuffle = torch.randperm(self.num_patches, generator=generator(self.seed, MASK, *mask_coordinates))
        return Sample(image, ids_shuffle, key, bad)

    def _read(self, key: SampleKey) -> tuple[Tensor, list[BadSample]]:
        """The image, or its first readable replacement; after too many bad ones a black pixel, which is never used."""
        bad: list[BadSample] = []
        index = key.image
        for attempt in range(1 + MAX_REPLACEMENTS):
            try:
                return self.source.read(index), bad
            except BadImageError as error:
                bad.append(BadSample(self.source.name(index), str(error)))
            index = derive_seed(self.seed, REPLACEMENT, key.epoch, key.position, attempt) % len(self.source)
        return torch.zeros(1, 1, 1, dtype=torch.uint8), bad


def collate(samples: list[Sample]) -> PretrainBatch:
    """Stacks samples into a batch, or marks it as failed."""
    bad = [entry for sample in samples for entry in sample.bad]
    exhausted = any(len(sample.bad) > MAX_REPLACEMENTS for sample in samples)
    failed = exhausted or (len(samples) > 1 and all(sample.bad for sample in samples))
    images = torch.empty(0, dtype=torch.uint8) if failed else torch.stack([sample.image for sample in samples])
    ids_shuffle = torch.stack([sample.ids_shuffle for sample in samples])  # (B, N)
    return PretrainBatch(images, ids_shuffle, [sample.key for sample in samples], bad, failed)


def default_num_workers(processes_here: int) -> int:
    """The cores that each of this machine's training processes can have for loading, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores // processes_here)


def build_pretrain_loader(
    dataset: PretrainDataset, sampler: StepSampler, num_workers: int, prefetch_factor: int, pin_memory: bool
) -> DataLoader[Sample]:
    """One loader for the rest of the run: prefetching does not stop at the end of an epoch."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        collate_fn=collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else it draws from the training's own random state
    )
