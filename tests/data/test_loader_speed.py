"""What makes loading cheap changes nothing: crops are torchvision's to the last bit, batches keep
their layout."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from data.loader import Sample, collate
from data.sampler import SampleKey
from data.transforms import CropAndFlip, PixelNormalizer
from models.mae import MaskedAutoencoder

MODES = {"bicubic": v2.InterpolationMode.BICUBIC, "bilinear": v2.InterpolationMode.BILINEAR}


def picture(chance: np.random.Generator, channels_last: bool, channels: int = 3) -> torch.Tensor:
    """uint8 `(C, H, W)` of some size, smooth enough that neighbouring pixels do not just average
    out."""
    height, width = chance.integers(1, 90, 2).tolist()
    coarse = torch.from_numpy(chance.integers(0, 256, (1, channels, 5, 7))).float()
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].to(
        torch.uint8
    )
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1) if channels_last else image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("size", "interpolation", "crop_min", "hflip"),
    [((32, 32), "bicubic", 0.2, 0.5), ((24, 40), "bilinear", 0.6, 0.3), ((9, 9), "bicubic", 1, 1)],
)
def test_crops_and_flips_are_torchvisions_to_the_last_bit(
    size, interpolation, crop_min, hflip, channels_last, channels
):
    """Also what is drawn afterwards is the same: as many numbers were taken."""
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(crop_min, 1.0), interpolation=MODES[interpolation]),
            v2.RandomHorizontalFlip(hflip),
        ]
    )
    ours = CropAndFlip(size, crop_min, interpolation, hflip)
    chance = np.random.default_rng(0)
    flips = 0
    for seed in range(150):
        image = picture(chance, channels_last, channels)
        before, found = image.clone(), []
        for transform in (theirs, ours):
            torch.manual_seed(seed)
            found.append((transform(image), torch.rand(1)))
        (expected, after), (crop, after_ours) = found
        assert (crop.shape, crop.dtype) == ((channels, *size), torch.uint8)
        assert torch.equal(crop, expected) and torch.equal(after_ours, after)
        assert torch.equal(image, before)
        assert crop.permute(1, 2, 0).is_contiguous()
        flips += not torch.equal(crop, crop.flip(-1))
    assert flips > 100  # the pictures tell left from right


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_channels_last_whatever_its_images_are(channels):
    chance = np.random.default_rng(2)
    planes = torch.from_numpy(chance.integers(0, 256, (5, channels, 8, 6), dtype=np.uint8))
    last = [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) for image in planes]
    for images in (planes, last, [*planes[:2], *last[2:]]):
        key, target = SampleKey(0, 0, 0, 0), torch.tensor(0)
        batch = collate([Sample(image, target, key, []) for image in images]).images
        assert torch.equal(batch, planes)
        assert batch.permute(0, 2, 3, 1).is_contiguous()


def test_the_layout_of_a_batch_changes_neither_loss_nor_gradient():
    images = torch.from_numpy(
        np.random.default_rng(4).integers(0, 256, (6, 3, 16, 16), dtype=np.uint8)
    )
    torch.manual_seed(0)
    model = MaskedAutoencoder(
        img_size=16,
        patch_size=4,
        in_chans=3,
        embed_dim=16,
        depth=1,
        num_heads=2,
        mlp_ratio=2.0,
        class_tokens=1,
        decoder_embed_dim=8,
        decoder_depth=1,
        decoder_num_heads=2,
        decoder_class_token=True,
        mask_ratio=0.75,
        norm_pix_loss=True,
    )
    normalize = PixelNormalizer((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), torch.device("cpu"))
    ids_shuffle = torch.rand(6, 16).argsort(dim=1)
    found = []
    for batch in (images, images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):
        model.zero_grad()
        loss = model(normalize(batch), ids_shuffle)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
