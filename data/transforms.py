"""Augmentation on uint8 tensors in the loader process, normalisation on the device.

Random decisions come from torch's CPU generator, which is seeded per sample and put back afterwards, so torchvision's
transforms are pure functions of the sample and leave the training's own random state alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torchvision.transforms import v2


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Runs its body with torch's CPU generator at `seed`, and restores the generator after it."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: in a process that never uses CUDA that one queues a call each time, for ever.
        torch.default_generator.manual_seed(seed)
        yield


def pretrain_transform(
    img_size: int | tuple[int, int], crop_min: float, interpolation: str, hflip: float
) -> v2.Compose:
    """Random resized crop of area share [crop_min, 1] and aspect 3/4 to 4/3, then a horizontal flip; uint8 in and out.

    Source: paper, appendix A.1 ("random-sized cropping only"); crop_min 0.2 as in the public code.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    crop = v2.RandomResizedCrop(
        size, scale=(crop_min, 1.0), interpolation=v2.InterpolationMode(interpolation), antialias=True
    )
    return v2.Compose([crop, v2.RandomHorizontalFlip(hflip)])


class PixelNormalizer:
    """uint8 images `(B, C, H, W)` to float32 with each channel's mean subtracted and divided by its std, on `device`.

    Args:
        mean, std: one value per channel, for pixels in [0, 1].
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device):
        mean_255 = torch.tensor(mean, device=device).view(-1, 1, 1) * 255
        std_255 = torch.tensor(std, device=device).view(-1, 1, 1) * 255
        self.scale = 1 / std_255
        self.shift = -mean_255 / std_255

    def __call__(self, images: Tensor) -> Tensor:
        return images.float() * self.scale + self.shift  # (B, C, H, W)
