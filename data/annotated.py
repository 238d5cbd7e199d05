"""Images with masks or objects: what the sources of segmentation and detection give, and samples of
both.

Shapes: `B` batch, `C` channels, `H` and `W` height and width, `n` objects.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from data.loader import Annotation, BadSample, Sample, SampleDataset
from data.sampler import SampleKey
from data.sources import ImageSource
from util.rng import derive_seed, seeded

IGNORED = -100  # the class of pixels that do not count; torch's usual value in a cross-entropy


class AnnotatedSource(ImageSource, Protocol):
    """Images by index, each with what belongs to it (see `Annotation`).

    class_names: in the order of the labels.
    """

    class_names: list[str]

    def annotation(self, index: int, height: int, width: int) -> Annotation:
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


@dataclass(eq=False)
class AnnotatedDataset(SampleDataset):
    """Training samples with annotations: image and annotation are replaced together if one of the
    two cannot be read.

    Args:
        transform: an image `(C, h, w)` and its annotation to those of a sample, random by torch's
            generator.
    """

    source: AnnotatedSource
    transform: Callable[[Tensor, Annotation], tuple[Tensor, Annotation]]  # type: ignore[assignment]

    def read(self, index: int) -> tuple[Tensor, Annotation]:
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
        asked for.
    """

    number: int
    image: Tensor
    size: tuple[int, int]
    target: Annotation
    bad: list[BadSample]
