"""From sample keys to batches: decode, augment, draw the mask, replace bad files; and batches for
evaluation.

In training, a sample whose file cannot be decoded is replaced by another one that is a pure
function of its key, and the file is reported in the batch. The engine decides what follows
(`engine/run/faults.py`). Evaluation shows every image exactly once, shared by the processes,
and replaces none.

Shapes: `B` batch, `C` channels, `H` height, `W` width, `N` patches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from data.handover import ready_to_send
from data.images import BadImageError
from data.labels import LabelledSource
from data.sampler import SampleKey
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


class Batch(NamedTuple):
    """A micro-batch of training, or a batch of an evaluation.

    images `(B, C, H, W)` uint8. targets int64: in pretraining the patches in shuffled order
    `(B, N)`, those that are kept first; in classification the labels `(B,)`. keys and bad as in
    Sample. failed: whether there are no images, because all files were bad or one had no readable
    replacement (an evaluation looks for none); then the caller has to stop.
    """

    images: Tensor
    targets: Tensor
    keys: list[SampleKey]
    bad: list[BadSample]
    failed: bool


@dataclass(eq=False)
class SampleDataset(Dataset[Sample]):
    """Samples by `SampleKey`: crops and flips from (seed, epoch, position).

    Args:
        source: decoded images.
        transform: uint8 `(C, H, W)` to uint8 `(C, H', W')`, random by torch's generator.
        seed: of the run.
        aug_repeats: number of samples of each decoded image, as in `StepSampler`.
    """

    source: ImageSource
    transform: Callable[[Tensor], Tensor]
    seed: int
    aug_repeats: int = 1
    max_replacements = MAX_REPLACEMENTS
    libraries = False  # whether `transform` also draws from numpy's generator and from `random`

    def __getitem__(self, key: SampleKey) -> Sample:
        # the samples of one image share its replacement, too
        first = key.position - key.position % self.aug_repeats
        image, index, bad = read_or_replace(self, key._replace(position=first))
        with seeded(derive_seed(self.seed, CROP, key.epoch, key.position), self.libraries):
            augmented = self.transform(image)
        return Sample(augmented, self.target(key, index), key, bad)

    def target(self, key: SampleKey, index: int) -> Tensor:
        """What the sample of a key is trained on if it shows the image at `index`."""
        raise NotImplementedError


@dataclass(kw_only=True, eq=False)
class PretrainDataset(SampleDataset):
    """Samples with masks, from (seed, epoch, position) or from (seed, step).

    Args:
        draw_order: draws a sample's mask, the order `(N,)` of its patches, from a generator.
        shared_mask: one mask per optimiser step for all images.
    """

    draw_order: Callable[[torch.Generator], Tensor]
    shared_mask: bool

    def target(self, key: SampleKey, index: int) -> Tensor:
        place = (key.step,) if self.shared_mask else (key.epoch, key.position)
        return self.draw_order(generator(self.seed, MASK, *place))  # (N,)


@dataclass(eq=False)
class LabelledDataset(SampleDataset):
    """Samples with labels; a replaced image brings its own."""

    source: LabelledSource
    libraries = True  # RandAugment

    def target(self, key: SampleKey, index: int) -> Tensor:
        return torch.tensor(self.source.labels[index])


class EvalDataset(LabelledDataset):
    """Samples with labels of a transform without chance; no image is replaced."""

    max_replacements = 0
    libraries = False


@lru_cache(maxsize=1)  # an image that several samples show one after the other is decoded once
def read_or_replace(dataset: SampleDataset, key: SampleKey) -> tuple[Tensor, int, list[BadSample]]:
    """The image or its first readable replacement, its index, and the bad files tried before it.

    After too many bad files it is a placeholder, and `collate` marks the batch as failed.
    """
    bad: list[BadSample] = []
    source, index = dataset.source, key.image
    for attempt in range(1 + dataset.max_replacements):
        try:
            return source.read(index), index, bad
        except BadImageError as error:
            bad.append(BadSample(source.name(index), str(error)))
        coordinates = (dataset.seed, REPLACEMENT, key.epoch, key.position, attempt)
        index = derive_seed(*coordinates) % len(source)
    return torch.zeros(1, 1, 1, dtype=torch.uint8), index, bad


def collate(samples: list[Sample], max_replacements: int = MAX_REPLACEMENTS) -> Batch:
    """Stacks samples into a batch, or marks it as failed.

    In a loader process torch's own collate writes into shared memory: if there is none left, the
    process fails here and not when the batch is handed over.
    """
    bad = [entry for sample in samples for entry in sample.bad]
    # one bad file alone proves nothing about the disk
    failed = len({sample.key.image for sample in samples}) > 1 and all(s.bad for s in samples)
    failed |= any(len(sample.bad) > max_replacements for sample in samples)
    images = torch.empty(0, dtype=torch.uint8)
    if not failed:
        # Channels last in memory, as crops are: another layout would cost a third of their time.
        pixels = default_collate([sample.image.permute(1, 2, 0) for sample in samples])
        images = pixels.permute(0, 3, 1, 2)  # (B, C, H, W)
    targets = default_collate([sample.target for sample in samples])  # (B, N) or (B,)
    return ready_to_send(Batch(images, targets, [s.key for s in samples], bad, failed))


def loader_maker(cfg: DataConfig, processes: Processes) -> partial[DataLoader[Sample]]:
    """Makes a loader of a `SampleDataset`, by `batch_sampler`, for the rest of the run: prefetching
    does not stop at an epoch's end.

    The default of `num_workers` is this machine's cores, shared by its training processes, and at
    most 8.
    """
    workers = cfg.num_workers
    if workers is None:
        workers = min(8, available_cores() // processes.local_world_size)
    return partial(
        DataLoader,
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=cfg.prefetch_factor if workers else None,
        pin_memory=processes.device.type == "cuda",
        generator=torch.Generator(),  # else it draws from the training's own random state
    )


def build_eval_loader(
    source: LabelledSource,
    transform: Callable[[Tensor], Tensor],
    batch_size: int,
    rank: int,
    world_size: int,
    make_loader: partial[DataLoader[Sample]],
) -> DataLoader[Sample]:
    """This process's share of `source`, the images rank, rank + world_size, ..."""
    keys = [SampleKey(index, 0, index, 0) for index in range(rank, len(source), world_size)]
    return make_loader(
        EvalDataset(source, transform, seed=0),
        batch_sampler=[keys[at : at + batch_size] for at in range(0, len(keys), batch_size)],
        collate_fn=partial(collate, max_replacements=0),
    )
