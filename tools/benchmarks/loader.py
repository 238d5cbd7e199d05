"""Images per second from files to batches of crops, on one core and by as many processes as there
are cores, beside Pillow with torchvision's transforms."""

from collections import deque
from collections.abc import Iterator
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from data.images import PixelFormat
from data.loader import PretrainDataset, loader_maker
from data.packs.source import open_pack
from data.sampler import SampleKey
from data.sources import FolderSource, ImageSource
from data.transforms import CropAndFlip
from models.masks import draw_orders
from tools.benchmarks.timing import Table, interleaved, rates, ratio
from util.dist import Processes, available_cores
from util.settings.pretrain import PretrainConfig

BATCH, BATCHES = 32, 8  # images of a batch; batches of a process in a round
PILLOW = "pillow"
THEIRS = v2.Compose(
    [
        v2.RandomResizedCrop(224, (0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


class PillowImages(Dataset[Tensor]):
    """Crops by the paths of their files, as most scripts make them."""

    def __getitem__(self, path: str) -> Tensor:
        crop: Tensor = THEIRS(Image.open(path).convert("RGB"))
        return crop


def benchmark_loader(images: str, packed: str | None, rounds: int) -> Iterator[tuple[str, Table]]:
    """Images per second to batches of crops of 224, from a folder's files and from the same images
    packed: first in this process on one core, then by a process for each core.

    Raises: InputError if there are no images.
    """
    folder = FolderSource(images, PixelFormat(3), prefer_train=False)
    sources: dict[str, ImageSource] = {"folder": folder}
    if packed is not None:
        sources["packed"] = open_pack(packed, PixelFormat(3), ("train",))
    torch.set_num_threads(1)  # as in a loader process
    cores = available_cores()
    for title, workers in (("one core", 0), (f"{cores} processes", cores)):
        places = torch.arange(max(1, workers) * BATCHES * BATCH).view(-1, BATCH).tolist()
        paths = [[folder.name(n % len(folder)) for n in batch] for batch in places]
        # processes stay for the next round
        make = partial(DataLoader, num_workers=workers, persistent_workers=workers > 0)
        loaders: dict[str, DataLoader[object]] = {PILLOW: make(PillowImages(), batch_sampler=paths)}
        for name, source in sources.items():
            dataset = PretrainDataset(
                source=source,
                transform=CropAndFlip(224, 0.2, "bicubic", 0.5),
                draw_orders=partial(draw_orders, "random", (14, 14), 0.75, 2),
                shared_mask=False,
                seed=0,
            )
            cfg = PretrainConfig(num_workers=workers)
            make = loader_maker(cfg, Processes(0, 1, 0, 1, torch.device("cpu")))
            keys = [[SampleKey(n % len(source), 0, n, 0) for n in batch] for batch in places]
            loaders[name] = make(dataset, batch_sampler=keys, persistent_workers=workers > 0)
        seconds = interleaved(
            {name: partial(deque, loader, 0) for name, loader in loaders.items()}, rounds
        )
        table = rates(seconds, "images_per_s", len(places) * BATCH)
        for name in sources:
            table[name]["over_pillow"] = ratio(seconds, PILLOW, name)
        yield title, table
