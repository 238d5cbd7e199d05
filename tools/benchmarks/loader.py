"""Images per second and core from files to crops, beside Pillow with torchvision's transforms."""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms import v2

from data.images import decode_image
from data.packs.source import open_pack
from data.sources import FolderSource
from data.transforms import CropAndFlip
from tools.benchmarks.timing import Figures, interleaved, rates, ratio


def benchmark_loader(images: str, packed: str | None, rounds: int) -> Figures:
    """Images per second on one core to a crop of 224, from a folder's files and from the same
    images packed.

    Raises: InputError if there are no images.
    """
    source = FolderSource(images, in_chans=3, prefer_train=False)
    paths = [source.name(index) for index in range(min(len(source), 250))]
    crop = CropAndFlip(224, 0.2, "bicubic", 0.5)
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop(224, (0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    variants: dict[str, Callable[[], object]] = {
        "pillow": lambda: [theirs(Image.open(path).convert("RGB")) for path in paths],
        "folder": lambda: [crop(decode_image(Path(path).read_bytes(), 3)) for path in paths],
    }
    if packed is not None:
        shards = open_pack(packed, 3, ("train",))
        variants["packed"] = lambda: [
            crop(shards.read(index % len(shards))) for index in range(len(paths))
        ]
    torch.set_num_threads(1)  # as in a loader process
    seconds = interleaved(variants, rounds)
    faster = {name: ratio(seconds, "pillow", name) for name in seconds if name != "pillow"}
    return {"images_per_s": rates(seconds, len(paths)), "over_pillow": faster}
