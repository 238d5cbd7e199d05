"""From sample keys to batches: decode, augment, draw the mask, replace bad files; and batches for
evaluation.

In training, a sample whose file cannot be decoded is replaced by another one that is a pure
function of its key, and the file is reported in the batch. The engine decides what follows
(`engine/run/faults.py`). Evaluation shows every image exactly once, shared by the processes,
and replaces none.

Shapes: `B` batch, `C` channels, `H` height, `W` width, `N` patches.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
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
from util.dist import Processes, available_cores
from util.rng import CROP, MASK, REPLACEMENT, derive_seed, generator, seeded
from util.settings.base import DataConfig

MAX_REPLACEMENTS = 8


class BadSample(NamedTuple):
    """A file that could not be decoded."""

    path: str
    reason: str


class Sample(NamedTuple):
    """One augmented image `(C, H, W)` uint8, what it is trained on, its key, and the bad files that
    it stands for.

    target: the order of the patches `(N,)` in pretraining, the label `()` in classification.
    """

    image: Tensor
    target: Tensor
    key: SampleKey
    bad: list[BadSample]


class TrainBatch(NamedTuple):
    """A micro-batch of training.

    images `(B, C, H, W)` uint8. targets int64: in pretraining the patches in shuffled order
    `(B, N)`, those that are kept first; in classification the labels `(B,)`. keys and bad as in
    Sample. `failed`: every sample's own file was bad, or one found no readable replacement; there
    are no images then.
    """

    images: Tensor
    targets: Tensor
    keys: list[SampleKey]
    bad: list[BadSample]
    failed: bool


class EvalBatch(NamedTuple):
    """A batch of an evaluation: images `(B, C, H, W)` uint8, labels `(B,)` int64, and the files
    that could not be decoded. If there are such files, there are no images: the caller has to
    stop."""

    images: Tensor
    labels: Tensor
    bad: list[BadSample]


@dataclass(kw_only=True, eq=False)
class PretrainDataset(Dataset[Sample]):
    """Samples by `SampleKey`: crops and flips from (seed, epoch, position), masks from that or from
    (seed, step).

    Args:
        source: decoded images.
        transform: uint8 `(C, H, W)` to uint8 `(C, H', W')`, random by torch's generator.
        draw_order: draws a sample's mask, the order `(N,)` of its patches, from a generator.
        shared_mask: one mask per optimiser step for all images.
        seed: of the run.
        aug_repeats: number of samples of each decoded image, as in `StepSampler`.
    """

    source: ImageSource
    transform: Callable[[Tensor], Tensor]
    draw_order: Callable[[torch.Generator], Tensor]
    shared_mask: bool
    seed: int
    aug_repeats: int = 1

    def __getitem__(self, key: SampleKey) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[SampleKey]) -> list[Sample]:
        """The samples of a batch, each image decoded once."""
        samples = []
        for (_, number), group in groupby(
            keys, key=lambda key: (key.image, key.position // self.aug_repeats)
        ):
            sharing = list(group)
            # the samples of one image share its replacement, too
            first = sharing[0]._replace(position=number * self.aug_repeats)
            image, _, bad = read_or_replace(self.source, first, self.seed)
            samples += [self._augment(image, bad, key) for key in sharing]
        return samples

    def _augment(self, image: Tensor, bad: list[BadSample], key: SampleKey) -> Sample:
        place = (key.epoch, key.position)
        with seeded(derive_seed(self.seed, CROP, *place)):
            image = self.transform(image)
        mask_place = (key.step,) if self.shared_mask else place
        ids_shuffle = self.draw_order(generator(self.seed, MASK, *mask_place))  # (N,)
        return Sample(image, ids_shuffle, key, bad)


@dataclass(eq=False)
class LabelledDataset(Dataset[Sample]):
    """Augmented images with their labels by `SampleKey`; a replaced image brings its own label.

    Args: as in PretrainDataset; `transform` may also draw from numpy's generator and from `random`.
    """

    source: LabelledSource
    transform: Callable[[Tensor], Tensor]
    seed: int
    aug_repeats = 1

    def __getitem__(self, key: SampleKey) -> Sample:
        image, index, bad = read_or_replace(self.source, key, self.seed)
        with seeded(derive_seed(self.seed, CROP, key.epoch, key.position), libraries=True):
            image = self.transform(image)
        return Sample(image, torch.tensor(self.source.labels[index]), key, bad)


def read_or_replace(
    source: ImageSource, key: SampleKey, seed: int
) -> tuple[Tensor, int, list[BadSample]]:
    """The image or its first readable replacement, its index, and the bad files tried before it.

    After too many bad files it is a placeholder, and `collate` marks the batch as failed.
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


def collate(samples: list[Sample]) -> TrainBatch:
    """Stacks samples into a batch, or marks it as failed."""
    bad = [entry for sample in samples for entry in sample.bad]
    exhausted = any(len(sample.bad) > MAX_REPLACEMENTS for sample in samples)
    several = len({sample.key.image for sample in samples}) > 1
    failed = exhausted or (several and all(sample.bad for sample in samples))
    images = _stack_images([] if failed else [sample.image for sample in samples])
    targets = torch.stack([sample.target for sample in samples])  # (B, N) or (B,)
    return TrainBatch(images, targets, [sample.key for sample in samples], bad, failed)


def _stack_images(images: list[Tensor]) -> Tensor:
    """`(B, C, H, W)` in the memory layout of its images, as another layout would cost a third of
    the time of their crops; without images `(0,)`.

    torch's own collate writes straight into shared memory in a loader process.
    """
    if not images:
        return torch.empty(0, dtype=torch.uint8)
    pixels = [image.permute(1, 2, 0) for image in images]  # (H, W, C)
    if all(part.is_contiguous() for part in pixels):
        stacked: Tensor = default_collate(pixels)  # (B, H, W, C)
        return stacked.permute(0, 3, 1, 2)  # (B, C, H, W), channels last in memory
    return default_collate(images)


@dataclass(eq=False)
class EvalDataset(Dataset[tuple[Tensor | BadSample, int]]):
    """Transformed images by index with their labels; a file that cannot be decoded gives its
    BadSample."""

    source: LabelledSource
    transform: Callable[[Tensor], Tensor]

    def __getitem__(self, index: int) -> tuple[Tensor | BadSample, int]:
        label = int(self.source.labels[index])
        try:
            return self.transform(self.source.read(index)), label
        except BadImageError as error:
            return BadSample(self.source.name(index), str(error)), label


def collate_eval(samples: list[tuple[Tensor | BadSample, int]]) -> EvalBatch:
    """Stacks the samples of an evaluation into a batch."""
    bad = [image for image, _ in samples if isinstance(image, BadSample)]
    images = [image for image, _ in samples if isinstance(image, Tensor)]
    labels = torch.tensor([label for _, label in samples])
    stacked = torch.empty(0, dtype=torch.uint8) if bad else torch.stack(images)
    return EvalBatch(stacked, labels, bad)


def build_train_loader(
    dataset: PretrainDataset | LabelledDataset, sampler: StepSampler, settings: dict[str, Any]
) -> DataLoader[Sample]:
    """One loader for the rest of the run, with `loader_settings`: prefetching does not stop at an
    epoch's end."""
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, **settings)


def build_eval_loader(
    source: LabelledSource,
    transform: Callable[[Tensor], Tensor],
    batch_size: int,
    rank: int,
    world_size: int,
    settings: dict[str, Any],
) -> DataLoader[tuple[Tensor | BadSample, int]]:
    """This process's share of `source`, the images rank, rank + world_size, ..., with
    `loader_settings`."""
    share = list(range(rank, len(source), world_size))
    batches = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
    return DataLoader(
        EvalDataset(source, transform), batch_sampler=batches, collate_fn=collate_eval, **settings
    )


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
    assert hasattr(Queue, "_on_queue_feeder_error"), "Python calls this hook by another name"
    Queue._on_queue_feeder_error = staticmethod(end)


def loader_settings(cfg: DataConfig, processes: Processes) -> dict[str, Any]:
    """What every DataLoader of a run has in common.

    The default of `num_workers` is this machine's cores, shared by its training processes, and at
    most 8.
    """
    workers = cfg.num_workers
    if workers is None:
        workers = min(8, available_cores() // processes.local_world_size)
    return {
        "num_workers": workers,
        "prefetch_factor": cfg.prefetch_factor if workers else None,
        "worker_init_fn": start_worker,
        "pin_memory": processes.device.type == "cuda",
        "generator": torch.Generator(),  # else it draws from the training's own random state
    }
