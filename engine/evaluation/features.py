"""What a model makes of every image of a labelled source, and the features of frozen models.

An evaluation leaves no image out: each process takes its share, and all of them end together.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from data.labels import LabelledData, LabelledSource
from data.loader import BadSample
from data.transforms import PixelNormalizer
from engine.run.batches import eval_batches
from engine.run.folder import Run, TrainConfig
from engine.run.interrupts import Stopped, received
from models.vit import VisionTransformer
from util.dist import all_gather, autocast_dtype, gather_rows
from util.errors import DataError, InputError
from util.settings.base import PixelConfig
from util.settings.evaluation import KnnConfig

Answer = TypeVar("Answer")
TOP = 5  # classes that are kept of what a classifier says of an image


class Features(NamedTuple):
    """Features `(n, D)` float32 and labels `(n,)` int64 of both splits.

    In a search `train` is one process's share of the rows (see `gather_rows`); in a file it is all
    of them.
    """

    train: Tensor
    train_labels: Tensor
    val: Tensor
    val_labels: Tensor


class Predictions(NamedTuple):
    """The most probable classes of each image, all on the CPU.

    labels: `(n,)` int64, their own classes.
    classes: `(n, K)` int64, the most probable first, K at most TOP; the number of classes stands
        for none, as for logits that are not finite.
    probabilities: `(n, K)` float32 of these, 0 of none. of_truth: `(n,)` float32, of the image's
        own class.
    """

    labels: Tensor
    classes: Tensor
    probabilities: Tensor
    of_truth: Tensor


def on_pixels(
    model: Callable[[Tensor], Answer], cfg: PixelConfig, precision: str, device: torch.device
) -> Callable[[Tensor], Answer]:
    """A function of a loader's images `(B, C, H, W)`: `model` on them, normalised, in the
    precision of a `precision:` setting."""
    normalize = PixelNormalizer(cfg.mean, cfg.std, device)
    dtype = autocast_dtype(precision, device)

    def call(images: Tensor) -> Answer:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            return model(normalize(images))

    return call


@torch.no_grad()
def answers(
    cfg: TrainConfig | KnnConfig,
    run: Run,
    source: LabelledSource,
    crop_pct: float | None,
    model: Callable[[Tensor], Tensor],
) -> Iterator[tuple[Tensor, Tensor]]:
    """The labels `(B,)` of each batch of this process's share of `source`, which are the images
    rank, rank + world_size, ..., and what `model` makes of its normalised images `(B, C, H, W)`;
    both on the device.

    All processes must go on to the end, where they wait for one another.

    Args:
        crop_pct: as `EvalTransform` takes it.

    Raises: DataError at the end on all processes if one met a file that cannot be decoded,
        Stopped if one got a signal; that process's batches end there.
    """
    call = on_pixels(model, cfg, cfg.precision, run.device)
    bad: list[BadSample] = []
    for batch in eval_batches(cfg, run, source, crop_pct):
        bad += batch.bad
        if bad or received():
            break
        images, rows = batch.images, len(batch.images)
        if cfg.compile and rows < cfg.batch_size:  # another shape would be compiled anew
            images = F.pad(images, (0,) * 7 + (cfg.batch_size - rows,))  # keeps the strides
        yield batch.targets.to(run.device), call(images)[..., :rows, :]
    end_together(bad)


def end_together(bad: list[BadSample]) -> None:
    """Ends an evaluation, in which this process met these bad files. All processes must call.

    Raises: DataError on all processes if one met a bad file, Stopped if one got a signal.
    """
    ends = all_gather((bad, received()))
    for samples, _ in ends:
        for path, reason in samples:
            raise DataError(
                f"evaluation leaves no image out, and {path} {reason}: mend or remove the file"
            )
    if signum := max(signum for _, signum in ends):
        raise Stopped(signum)


def compute_features(
    cfg: TrainConfig | KnnConfig,
    run: Run,
    backbone: VisionTransformer,
    data: LabelledData,
    crop_pct: float | None,
) -> Features:
    """The pooled, normalised features of both splits, on the CPU; of the training images this
    process's share.

    Args and Raises: as `answers`; InputError on all processes if a feature is not finite.
    """
    return compute_layers(cfg, run, backbone, data, crop_pct)[0]


def compute_layers(
    cfg: TrainConfig | KnnConfig,
    run: Run,
    backbone: VisionTransformer,
    data: LabelledData,
    crop_pct: float | None,
    layers: Sequence[int] = (-1,),
) -> list[Features]:
    """The same after each of some blocks, of which the last one is the backbone's last, in one pass
    over the images.

    Args: as `compute_features`; layers are counted from 0.
    """
    train, val = (
        share_of_features(cfg, run, backbone, source, crop_pct, layers)
        for source in (data.train, data.val)
    )
    train_labels, val_labels = map(torch.from_numpy, (data.train.labels, data.val.labels))
    return [
        Features(of_train, train_labels, gather_rows(of_val, len(data.val)), val_labels)
        for of_train, of_val in zip(train, val, strict=True)
    ]


def share_of_features(
    cfg: TrainConfig | KnnConfig,
    run: Run,
    backbone: VisionTransformer,
    source: LabelledSource,
    crop_pct: float | None,
    layers: Sequence[int] = (-1,),
) -> Tensor:
    """The features `(layers, n, D)` float32 of this process's share of `source`, on the CPU. Args
    and Raises: as `compute_layers`."""

    def forward(images: Tensor) -> Tensor:
        if len(layers) == 1:
            return backbone.forward_features(images)[None]  # (1, B, D)
        return backbone.forward_layers(images, layers)  # (layers, B, D)

    share = len(range(run.processes.rank, len(source), run.processes.world_size))
    features = torch.empty(len(layers), share, backbone.spec.embed_dim)
    for (_, answer), part in zip(
        answers(cfg, run, source, crop_pct, forward),
        features.split(cfg.batch_size, dim=1),
        strict=False,  # an empty share has one empty part and no batch
    ):
        part.copy_(answer)
    check_finite(features)
    return features


def check_finite(features: Tensor) -> None:
    """Raises: InputError on all processes, which must all call, if a feature of one of them is not
    finite."""
    if not all(all_gather(bool(features.sum().isfinite()))):
        raise InputError(
            "the features are not finite: the weights are broken, or precision fp32 is needed"
        )
