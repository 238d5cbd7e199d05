"""Images with masks or objects: what the sources of segmentation and detection give, and samples of
both.

Shapes: `B` batch, `C` channels, `H` and `W` height and width, `n` objects.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.handover import ready_to_send
from data.images import BadImageError, pixel_format
from data.labels import check_num_classes
from data.loader import Annotation, BadSample, Sample, SampleDataset
from data.sampler import SampleKey
from data.sources import Chosen, ImageSource, check_format
from util.errors import DataError, InputError
from util.rng import SUBSET, derive_seed, generator, seeded
from util.settings.evaluation import FinetuneConfig, KnnConfig, LinclsConfig

IGNORED = -100  # the class of pixels that do not count; torch's usual value in a cross-entropy
# What a source says of an image: as `Annotation`, but that the "masks" of objects may be anything
# that gives the mask (H, W) of one of them by its number, so that not all need to be dense at once.
SourceAnnotation = dict[str, Any]


class AnnotatedSource(ImageSource, Protocol):
    """Images by index, each with what belongs to it (see `Annotation`).

    class_names: in the order of the labels.
    """

    class_names: list[str]

    def annotation(self, index: int, height: int, width: int) -> SourceAnnotation:
        """What belongs to the image if that has this size. Raises: BadImageError if it cannot be
        read, or does not fit the image."""


class DetectionSource(AnnotatedSource, Protocol):
    """Images with objects."""

    def ground_truth(self) -> dict[str, list[dict[str, object]]]:
        """All objects as COCO's JSON has them, the masks as polygons or run lengths: `images` with
        their index as `id`, `annotations`, and `categories` with the label as `id`."""


@dataclass(frozen=True)
class AnnotatedData:
    """Both splits of a data set."""

    train: AnnotatedSource
    val: AnnotatedSource

    @property
    def class_names(self) -> list[str]:
        """In the order of the labels."""
        return self.train.class_names


class AnnotatedSubset(Chosen):
    """Some images of a source with their annotations."""

    source: AnnotatedSource

    def __init__(self, source: AnnotatedSource, indices: np.ndarray):
        super().__init__(source, indices)
        self.class_names = source.class_names

    def annotation(self, index: int, height: int, width: int) -> SourceAnnotation:
        return self.source.annotation(int(self.indices[index]), height, width)


def open_annotated_data(cfg: FinetuneConfig | LinclsConfig | KnnConfig) -> AnnotatedData:
    """Both splits of the data set that the settings name, for their task; of the training images
    `cfg.subset`.

    Raises: InputError if they are not there or wrong, or the first image of validation is bad.
    """
    from data.scenes import SceneMasks, SceneObjects  # here, as few runs need them

    pixels = pixel_format(cfg, cfg.in_chans)
    with_masks = isinstance(cfg, FinetuneConfig) and cfg.instance_masks
    train: AnnotatedSource
    val: AnnotatedSource
    if cfg.dataset == "digits_scenes" and cfg.task == "segment":
        train, val = SceneMasks("train", pixels), SceneMasks("val", pixels)
    elif cfg.dataset == "digits_scenes":
        train = SceneObjects("train", pixels, with_masks)
        val = SceneObjects("val", pixels, with_masks)
    elif cfg.task == "segment":
        from data.segmentation import open_mask_folder

        train, val = open_mask_folder(cfg, cfg.num_classes, pixels)
    else:
        from data.coco import open_coco

        train, val = open_coco(cfg, pixels, with_masks)
    check_num_classes(cfg.num_classes, train.class_names)
    try:  # what is wrong with the masks or objects of one is often so with all
        val.annotation(0, *val.read(0).shape[-2:])
    except BadImageError as error:
        raise DataError(f"{val.name(0)} {error}") from error
    return AnnotatedData(take_images(check_format(train), cfg.subset, cfg.seed), val)


def take_images(source: AnnotatedSource, count: int | None, seed: int) -> AnnotatedSource:
    """A fixed choice of `count` images, a pure function of (count, seed); None takes all.

    Raises: InputError if there are not so many.
    """
    if count is None:
        return source
    if count > len(source):
        raise InputError(
            f"subset {count} is more than the {len(source)} training images", settings=("subset",)
        )
    order = torch.randperm(len(source), generator=generator(seed, SUBSET))
    return AnnotatedSubset(source, np.sort(order[:count].numpy()))


@dataclass(eq=False)
class AnnotatedDataset(SampleDataset):
    """Training samples with annotations: image and annotation are replaced together if one of the
    two cannot be read.

    Args:
        transform: an image `(C, h, w)` and its annotation to those of a sample, random by torch's
            generator.
    """

    source: AnnotatedSource
    transform: Callable[  # type: ignore[assignment]
        [Tensor, SourceAnnotation], tuple[Tensor, Annotation]
    ]

    def read(self, index: int) -> tuple[Tensor, SourceAnnotation]:
        image = self.source.read(index)
        return image, self.source.annotation(index, *image.shape[-2:])

    def __getitem__(self, key: SampleKey) -> Sample:
        content, _, bad = self.shown(key)
        if isinstance(content, Tensor):  # nothing could be read, which `collate` finds
            return Sample(content, {}, key, bad)
        with seeded(derive_seed(*self.crop_place(key)), self.libraries):
            image, target = self.transform(*content)
        return Sample(image, target, key, bad)


class EvalSample(NamedTuple):
    """An image of an evaluation, which none is left out of.

    number: its index in the source. image: `(C, h, w)` as the model takes it. size: height and
        width of the image itself. target: its annotation, in that size; empty where it is not
        asked for. bad: if it or its annotation cannot be read, why; then the rest is empty.
    """

    number: int
    image: Tensor
    size: tuple[int, int]
    target: Annotation
    bad: list[BadSample]


@dataclass(eq=False)
class EvalImages(Dataset[EvalSample]):
    """All images of a source, by index.

    Args:
        transform: of an image `(C, h, w)`, as `data/joint.py` has them.
        with_targets: whether a sample has its annotation. It is read without that, too, as it may
            not fit its image; None is for a source without annotations.
    """

    source: ImageSource
    transform: Callable[[Tensor], Tensor]
    with_targets: bool | None

    def __getitem__(self, index: int) -> EvalSample:
        try:
            image = self.source.read(index)
            height, width = image.shape[-2:]
            found: SourceAnnotation = {}
            if self.with_targets is not None:
                found = cast(AnnotatedSource, self.source).annotation(index, height, width)
        except BadImageError as error:
            bad = [BadSample(self.source.name(index), str(error))]
            return EvalSample(index, torch.zeros(1, 1, 1, dtype=torch.uint8), (1, 1), {}, bad)
        target = found if self.with_targets else {}
        return EvalSample(index, self.transform(image), (height, width), target, [])


def build_annotated_eval_loader(
    images: EvalImages,
    batch_size: int,
    rank: int,
    world_size: int,
    make_loader: partial[DataLoader[Any]],
) -> DataLoader[Any]:
    """This process's share of the images, rank, rank + world_size, ..., in lists of samples."""
    share = range(rank, len(images.source), world_size)
    return make_loader(
        images,
        batch_sampler=[share[at : at + batch_size] for at in range(0, len(share), batch_size)],
        collate_fn=ready_to_send,
    )
