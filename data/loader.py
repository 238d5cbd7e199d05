"""From sample keys to batches: decode, augment, draw the mask, replace bad files.

Policy for bad files in training: a sample whose file cannot be decoded is replaced by another one
that is a pure function of its key, and the file is reported in the batch; what happens then is the
engine's decision (`engine/run/bad_samples.py`).
"""

import os
import sys
from collections.abc import Callable
from itertools import groupby
from multiprocessing.queues import Queue
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from data.images import BadImageError
from data.labels import LabelledSource
from data.sampler import SampleKey, StepSampler
from data.sources import ImageSource
from util.dist import Processes
from util.pool import available_cores
from util.rng import CROP, MASK, REPLACEMENT, derive_seed, generator, seeded
from util.settings.base import DataConfig

MAX_REPLACEMENTS = 8


class BadSample(NamedTuple):
    """A file that could not be decoded."""

    path: str
    reason: str


class Sample(NamedTuple):
    """One augmented image `(C, H, W)` uint8, what it is trained on, its key, and the bad files met
    on the way.

    target: the mask order `(N,)` in pretraining, the label `()` in classification.
    """

    image: Tensor
    target: Tensor
    key: SampleKey
    bad: list[BadSample]


class PretrainBatch(NamedTuple):
    """A micro-batch of pretraining.

    images `(B, C, H, W)` uint8; ids_shuffle `(B, N)` int64, patches in the order kept first; keys
    and bad as in Sample. `failed`: every sample's own file was bad, or one found no readable
    replacement; there may be no images then.
    """

    images: Tensor
    ids_shuffle: Tensor
    keys: list[SampleKey]
    bad: list[BadSample]
    failed: bool


class LabelledBatch(NamedTuple):
    """A micro-batch of classification: labels `(B,)` int64, all else as in PretrainBatch."""

    images: Tensor
    labels: Tensor
    keys: list[SampleKey]
    bad: list[BadSample]
    failed: bool


class PretrainDataset(Dataset[Sample]):
    """Samples by `SampleKey`: crops and flips from (seed, epoch, position), masks from that or from
    (seed, step).

    Args:
        source: decoded images.
        transform: uint8 `(C, H, W)` to uint8 `(C, H', W')`, random by torch's generator.
        num_patches: N.
        shared_mask: one mask per optimiser step for all images.
        seed: of the run.
        aug_repeats: samples that are made of each decoded image, as `StepSampler` has it.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Callable[[Tensor], Tensor],
        num_patches: int,
        shared_mask: bool,
        seed: int,
        aug_repeats: int = 1,
    ):
        self.source = source
        self.transform = transform
        self.num_patches = num_patches
        self.shared_mask = shared_mask
        self.seed = seed
        self.aug_repeats = aug_repeats

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey) -> Sample:
        return self._augment(*self._read(key), key)

    def __getitems__(self, keys: list[SampleKey]) -> list[Sample]:
        """The samples of a batch, each image decoded once."""
        samples = []
        for _, group in groupby(
            keys, key=lambda key: (key.image, key.position // self.aug_repeats)
        ):
            sharing = list(group)
            image, bad = self._read(sharing[0])
            samples += [self._augment(image, bad, key) for key in sharing]
        return samples

    def _read(self, key: SampleKey) -> tuple[Tensor, list[BadSample]]:
        """The image of a key, and of those that share it: they share its replacement, too."""
        shared = key._replace(position=key.position - key.position % self.aug_repeats)
        image, _, bad = read_or_replace(self.source, shared, self.seed)
        return image, bad

    def _augment(self, image: Tensor, bad: list[BadSample], key: SampleKey) -> Sample:
        where = (key.epoch, key.position)
        with seeded(derive_seed(self.seed, CROP, *where)):
            image = self.transform(image)
        mask_coordinates = (key.step,) if self.shared_mask else where
        ids_shuffle = torch.randperm(
            self.num_patches, generator=generator(self.seed, MASK, *mask_coordinates)
        )
        return Sample(image, ids_shuffle, key, bad)


class LabelledDataset(Dataset[Sample]):
    """Augmented images with their labels by `SampleKey`; a replaced image brings its own label.

    Args: as PretrainDataset; `transform` may also draw from numpy's generator and from `random`.
    """

    def __init__(self, source: LabelledSource, transform: Callable[[Tensor], Tensor], seed: int):
        self.source = source
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey) -> Sample:
        image, index, bad = read_or_replace(self.source, key, self.seed)
        with seeded(derive_seed(self.seed, CROP, key.epoch, key.position), libraries=True):
            image = self.transform(image)
        return Sample(image, torch.tensor(self.source.labels[index]), key, bad)


def read_or_replace(
    source: ImageSource, key: SampleKey, seed: int
) -> tuple[Tensor, int, list[BadSample]]:
    """The image or its first readable replacement, its index, and the bad files on the way.

    After too many bad ones it is a black pixel, which is never used.
    """
    bad: list[BadSample] = []
    index = key.image
    for attempt in range(1 + MAX_REPLACEMENTS):
        try:
            return source.read(index), index, bad
        except BadImageError as error:
            bad.append(BadSample(source.name(index), str(error)))
        index = derive_seed(seed, REPLACEMENT, key.epoch, key.position, attempt) % len(source)
    return torch.zeros(1, 1, 1, dtype=torch.uint8), index, bad


def collate(samples: list[Sample]) -> PretrainBatch:
    """Stacks samples into a batch, or marks it as failed."""
    return PretrainBatch(*_stack(samples))


def collate_labelled(samples: list[Sample]) -> LabelledBatch:
    """As `collate`, for classification."""
    return LabelledBatch(*_stack(samples))


def _stack(samples: list[Sample]) -> tuple[Tensor, Tensor, list[SampleKey], list[BadSample], bool]:
    bad = [entry for sample in samples for entry in sample.bad]
    exhausted = any(len(sample.bad) > MAX_REPLACEMENTS for sample in samples)
    several = len({sample.key.image for sample in samples}) > 1
    failed = exhausted or (several and all(sample.bad for sample in samples))
    images = (
        torch.empty(0, dtype=torch.uint8)
        if failed
        else _stack_images([sample.image for sample in samples])
    )
    targets = torch.stack([sample.target for sample in samples])  # (B, N) or (B,)
    return images, targets, [sample.key for sample in samples], bad, failed


def _stack_images(images: list[Tensor]) -> Tensor:
    """`(B, C, H, W)` in the memory layout of its images: another one would cost a third of their
    crops.

    torch's own collate writes to shared memory at once where it runs in a loader process.
    """
    pixels = [image.permute(1, 2, 0) for image in images]  # (H, W, C)
    if all(part.is_contiguous() for part in pixels):
        return default_collate(pixels).permute(0, 3, 1, 2)  # channels-last, (B, C, H, W)
    return default_collate(images)


def default_num_workers(processes_here: int) -> int:
    """The cores that each of this machine's training processes can have for loading, at most 8."""
    return min(8, available_cores() // processes_here)


def build_train_loader(
    dataset: PretrainDataset | LabelledDataset, sampler: StepSampler, settings: dict[str, Any]
) -> DataLoader[Sample]:
    """One loader for the rest of the run, with `loader_settings`: prefetching does not stop at an
    epoch's end."""
    collate_fn = collate if isinstance(dataset, PretrainDataset) else collate_labelled
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_fn, **settings)


def start_worker(_: int) -> None:
    """Makes a loader process fail at once if it cannot hand batches over.

    torch sends them in a thread, whose errors (no shared memory, no socket in TMPDIR) it only
    prints, while the training waits. So the start sends a tensor for trial, where an error is
    reported, and a later error ends the process.
    """

    def end(error: Exception, _: object) -> None:
        sys.stderr.write(f"a loader process cannot hand over a batch: {error}\n")
        os._exit(1)

    ForkingPickler.dumps(torch.zeros(1))
    Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[attr-defined]


def loader_settings(cfg: DataConfig, processes: Processes) -> dict[str, Any]:
    """What every DataLoader of a run has in common."""
    workers = (
        default_num_workers(processes.local_world_size)
        if cfg.num_workers is None
        else cfg.num_workers
    )
    return {
        "num_workers": workers,
        "prefetch_factor": cfg.prefetch_factor if workers else None,
        "worker_init_fn": start_worker,
        "pin_memory": processes.device.type == "cuda",
        "generator": torch.Generator(),  # else it draws from the training's own random state
    }
