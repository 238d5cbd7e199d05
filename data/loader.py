"""From sample keys to batches: decode, augment, draw the mask, replace bad files; and batches for
evaluation. Images on the device (`data/on_device.py`) become a batch in one operation, others one
by one in loader processes.

In training, a sample whose file cannot be decoded is replaced by another one that is a pure
function of its key, and the file is reported in the batch. The engine decides what follows
(`engine/run/faults.py`). Evaluation shows every image exactly once, shared by the processes,
and replaces none.

Shapes: `B` batch, `C` channels, `H` height, `W` width, `N` patches.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from data.handover import ready_to_send
from data.images import BadImageError
from data.labels import LabelledSource
from data.on_device import DecodedSource
from data.sampler import SampleKey
from data.sources import ImageSource
from data.transforms import CropAndFlip, to_device
from util.dist import Processes, available_cores
from util.rng import CROP, MASK, REPLACEMENT, derive_seed, generators, seeded
from util.settings.base import DataConfig

MAX_REPLACEMENTS = 8


class BadSample(NamedTuple):
    """A file that could not be decoded."""

    path: str
    reason: str


# What belongs to an image. Segmentation: "mask" (H, W) int64, the class of each pixel or IGNORED.
# Detection of n objects: "boxes" (n, 4) float32, left, top, right and bottom in pixels; "labels"
# (n,) int64; and, if they are asked for, "masks" (n, H, W) uint8, 0 or 1.
Annotation = dict[str, Tensor]


class Sample(NamedTuple):
    """One augmented image `(C, H, W)`, what it is trained on, its key, and the bad files that
    it stands for.

    target: the order of the patches `(N,)` in pretraining, the label `()` in classification, else
        the image's annotation.
    """

    image: Tensor
    target: Tensor | Annotation
    key: SampleKey
    bad: list[BadSample]


class Batch(NamedTuple):
    """A micro-batch of training, or a batch of an evaluation.

    images `(B, C, H, W)`: uint8, or float32 in [0, 255] if one of them is. targets: in pretraining
    the patches in shuffled order `(B, N)` int64, those that are kept first; in classification the
    labels, `(B,)` int64 or `(B, L)` as `LabelledSource` has them; else the images' annotations, a
    list. keys and bad as in Sample.
    failed: whether there are no images, because all files were bad or one had no readable
    replacement (an evaluation looks for none); then the caller has to stop.
    """

    images: Tensor
    targets: Any
    keys: list[SampleKey]
    bad: list[BadSample]
    failed: bool


@dataclass(eq=False)
class SampleDataset(Dataset[Sample]):
    """Samples by `SampleKey`: crops and flips from (seed, epoch, position).

    Args:
        source: decoded images.
        transform: pixels `(C, H, W)` to `(C, H', W')`, random by torch's generator.
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
        image, index, bad = self.shown(key)
        with seeded(derive_seed(*self.crop_place(key)), self.libraries):
            augmented = self.transform(image)
        return Sample(augmented, self.targets([key], [index])[0], key, bad)

    def __getitems__(self, keys: list[SampleKey]) -> "list[Sample] | Batch":
        """What a loader asks for: samples for it to collate, or a batch on the device."""
        source = self.source
        if not isinstance(source, DecodedSource):
            return [self[key] for key in keys]
        pixels = source.images
        of_keys = [
            self.shown(key)[1:] if key.image in source.bad else (key.image, []) for key in keys
        ]
        indices, bad = [index for index, _ in of_keys], [found for _, found in of_keys]
        targets = to_device(self.targets(keys, indices), pixels.device)
        failed, images = has_failed(keys, bad, self.max_replacements), pixels[:0]
        if not failed and isinstance(self.transform, CropAndFlip):
            streams = generators([self.crop_place(key) for key in keys])
            drawn = self.transform.draw_many(streams, *pixels.shape[-2:])
            images = self.transform.batch(pixels, indices, drawn)
        elif not failed:  # an evaluation's transform is without chance
            images = self.transform(pixels[to_device(torch.tensor(indices), pixels.device)])
        return Batch(images, targets, keys, [entry for of_one in bad for entry in of_one], failed)

    def read(self, index: int) -> Any:
        """What a sample shows of the image at this index. Raises: BadImageError."""
        return self.source.read(index)

    def shown(self, key: SampleKey) -> tuple[Any, int, list[BadSample]]:
        """As `read_or_replace`; the samples of one image share its replacement, too."""
        first = key.position - key.position % self.aug_repeats
        return read_or_replace(self, key._replace(position=first))

    def crop_place(self, key: SampleKey) -> tuple[int, ...]:
        """The coordinates that seed a sample's crop and flip."""
        return self.seed, CROP, key.epoch, key.position

    def targets(self, keys: list[SampleKey], indices: list[int]) -> Tensor:
        """What the samples of these keys, `(B, ...)`, are trained on if they show the images at
        `indices`."""
        raise NotImplementedError


@dataclass(kw_only=True, eq=False)
class PretrainDataset(SampleDataset):
    """Samples with masks, from (seed, epoch, position) or from (seed, step).

    Args:
        draw_orders: draws masks, the order of the patches of each sample `(B, N)`, from a
            generator each.
        shared_mask: one mask per optimiser step for all images.
    """

    draw_orders: Callable[[Iterable[torch.Generator]], Tensor]
    shared_mask: bool

    def targets(self, keys: list[SampleKey], indices: list[int]) -> Tensor:
        places = [(key.step,) if self.shared_mask else (key.epoch, key.position) for key in keys]
        return self.draw_orders(generators([(self.seed, MASK, *place) for place in places]))


@dataclass(eq=False)
class LabelledDataset(SampleDataset):
    """Samples with labels; a replaced image brings its own."""

    source: LabelledSource
    libraries = True  # RandAugment

    def targets(self, keys: list[SampleKey], indices: list[int]) -> Tensor:
        return torch.from_numpy(self.source.labels[indices])  # (B,)


class EvalDataset(LabelledDataset):
    """Samples with labels of a transform without chance; no image is replaced."""

    max_replacements = 0
    libraries = False


@lru_cache(maxsize=1)  # an image that several samples show one after the other is decoded once
def read_or_replace(dataset: SampleDataset, key: SampleKey) -> tuple[Any, int, list[BadSample]]:
    """What `dataset` reads of the image or of its first readable replacement, the index of that,
    and the bad files tried before it.

    After too many bad files it is a placeholder, and `collate` marks the batch as failed.
    """
    bad: list[BadSample] = []
    source, index = dataset.source, key.image
    for attempt in range(1 + dataset.max_replacements):
        try:
            return dataset.read(index), index, bad
        except BadImageError as error:
            bad.append(BadSample(source.name(index), str(error)))
        coordinates = (dataset.seed, REPLACEMENT, key.epoch, key.position, attempt)
        index = derive_seed(*coordinates) % len(source)
    return torch.zeros(1, 1, 1, dtype=torch.uint8), index, bad


def has_failed(
    keys: list[SampleKey], bad: list[list[BadSample]], max_replacements: int = MAX_REPLACEMENTS
) -> bool:
    """Whether a batch has no images, from the bad files that each of its samples stands for."""
    # one bad file alone proves nothing about the disk
    all_bad = len({key.image for key in keys}) > 1 and all(bad)
    return all_bad or any(len(of_one) > max_replacements for of_one in bad)


def collate(samples: list[Sample] | Batch, max_replacements: int = MAX_REPLACEMENTS) -> Batch:
    """Stacks samples into a batch, or marks it as failed; a batch on the device stays as it is.

    In a loader process torch's own collate writes into shared memory: if there is none left, the
    process fails here and not when the batch is handed over.
    """
    if isinstance(samples, Batch):
        return samples
    keys, bad = [sample.key for sample in samples], [sample.bad for sample in samples]
    failed = has_failed(keys, bad, max_replacements)
    images = torch.empty(0, dtype=torch.uint8)
    if not failed:
        # Channels last in memory, as crops are: another layout would cost a third of their time.
        rows = [sample.image.permute(1, 2, 0) for sample in samples]
        if len({image.dtype for image in rows}) > 1:  # files of 8 bits and deeper ones
            rows = [image.float() for image in rows]
        pixels = default_collate(rows)
        images = pixels.permute(0, 3, 1, 2)  # (B, C, H, W)
    targets: Any = [sample.target for sample in samples]
    if isinstance(targets[0], Tensor):
        targets = default_collate(targets)  # (B, N) or (B,)
    return ready_to_send(
        Batch(images, targets, keys, [entry for of_one in bad for entry in of_one], failed)
    )


def loader_maker(cfg: DataConfig, processes: Processes) -> partial[DataLoader[Sample]]:
    """Makes a loader of a `SampleDataset`, by `batch_sampler`, for the rest of the run: prefetching
    does not stop at an epoch's end.

    The default of `num_workers` is this machine's cores, shared by its training processes, and at
    most 8. With `data_on_device` there are no loader processes.
    """
    workers = 0 if cfg.data_on_device else cfg.num_workers
    if workers is None:
        workers = min(8, available_cores() // processes.local_world_size)
    return partial(
        DataLoader,
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=cfg.prefetch_factor if workers else None,
        pin_memory=processes.device.type == "cuda" and not cfg.data_on_device,
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
