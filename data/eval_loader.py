"""Batches for evaluation: every image exactly once, shared out over the processes, none
replaced."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.images import BadImageError
from data.labels import LabelledSource
from data.loader import BadSample


class EvalBatch(NamedTuple):
    """images `(B, C, H, W)` uint8, labels and indices `(B,)` int64; `bad` are files that could not
    be decoded.

    Where there are bad files there are no images: evaluation replaces nothing, so the caller has to
    stop.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    bad: list[BadSample]


class EvalDataset(Dataset[tuple[Tensor | BadSample, int, int]]):
    """Transformed images by index, with label and index; a file that cannot be decoded gives its
    BadSample."""

    def __init__(self, source: LabelledSource, transform: Callable[[Tensor], Tensor]):
        self.source = source
        self.transform = transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor | BadSample, int, int]:
        label = int(self.source.labels[index])
        try:
            return self.transform(self.source.read(index)), label, index
        except BadImageError as error:
            return BadSample(self.source.name(index), str(error)), label, index


def collate_eval(samples: list[tuple[Tensor | BadSample, int, int]]) -> EvalBatch:
    """Stacks samples into a batch."""
    images = [image for image, _, _ in samples if isinstance(image, Tensor)]
    bad = [image for image, _, _ in samples if isinstance(image, BadSample)]
    _, labels, indices = zip(*samples, strict=True)
    stacked = torch.empty(0, dtype=torch.uint8) if bad else torch.stack(images)
    return EvalBatch(stacked, torch.tensor(labels), torch.tensor(indices), bad)


def build_eval_loader(
    source: LabelledSource,
    transform: Callable[[Tensor], Tensor],
    batch_size: int,
    rank: int,
    world_size: int,
    settings: dict[str, Any],
    start_batch: int = 0,
) -> DataLoader[Any]:
    """This process's share of `source`: the images rank, rank + world_size, ..., with
    `loader_settings`.

    It leaves out the batches before `start_batch`.
    """
    share = list(range(rank, len(source), world_size))
    batches = [
        share[start : start + batch_size]
        for start in range(start_batch * batch_size, len(share), batch_size)
    ]
    return DataLoader(
        EvalDataset(source, transform), batch_sampler=batches, collate_fn=collate_eval, **settings
    )
