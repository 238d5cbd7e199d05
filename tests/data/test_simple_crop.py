"""`crop: simple` against torchvision's transforms, one by one and in a batch on the device."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from data.transforms import CropAndFlip, SimpleCropAndFlip, pretrain_transform
from util.rng import generators
from util.settings.pretrain import PretrainConfig

MODES = {"bicubic": v2.InterpolationMode.BICUBIC, "bilinear": v2.InterpolationMode.BILINEAR}


def pixels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3)).byte()


@pytest.mark.parametrize(
    ("shape", "side", "interpolation"),
    [
        ((3, 32, 32), 32, "bicubic"),  # nothing is resized
        ((3, 50, 81), 24, "bicubic"),
        ((1, 91, 40), 24, "bilinear"),
        ((5, 17, 12), 20, "bicubic"),
    ],
)
def test_draws_and_pixels_are_torchvisions(shape, side, interpolation):
    image = pixels(*shape)
    theirs = v2.Compose(
        [
            v2.Resize(side, interpolation=MODES[interpolation], antialias=True),
            v2.RandomCrop(side, padding=4, padding_mode="reflect"),
            v2.RandomHorizontalFlip(0.3),
        ]
    )
    ours = SimpleCropAndFlip(side, interpolation, 0.3)
    found = set()
    for seed in range(40):
        torch.manual_seed(seed)
        expected = theirs(image)
        torch.manual_seed(seed)
        crop = ours(image)
        assert torch.equal(crop, expected), seed
        found.add(crop.numpy().tobytes())
    assert len(found) > 30


def test_a_batch_on_the_device_has_the_crops_of_single_images():
    images = pixels(4, 3, 20, 28)
    images = images.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)  # as they lie there
    crop = SimpleCropAndFlip((16, 24), "bicubic", 0.5)
    indices, seeds = [3, 0, 1, 3, 2, 2], range(6)
    drawn = crop.draw_many(generators([(0, seed) for seed in seeds]), 20, 28)
    found = crop.batch(images, indices, drawn)
    assert found.shape == (6, 3, 16, 24) and set(drawn[2]) == {0, 1}
    for place, (index, stream) in enumerate(
        zip(indices, generators([(0, seed) for seed in seeds]), strict=True)
    ):
        top, left, flip = crop.draw(stream, 20, 28)  # covered by 17 x 24 pixels
        image = v2.functional.resize(images[index], [17, 24], MODES["bicubic"], antialias=True)
        padded = v2.functional.pad(image, [4], padding_mode="reflect")
        expected = padded[:, top : top + 16, left : left + 24]
        assert torch.equal(found[place], expected.flip(-1) if flip else expected)


def test_every_place_is_drawn_equally_often():
    crop = SimpleCropAndFlip(8, "bicubic", 0.5)
    drawn = crop.draw_many(generators([(1, seed) for seed in range(2000)]), 8, 8)
    for values, count in zip(drawn, (9, 9, 2), strict=True):
        shares = np.bincount(values, minlength=count) / 2000
        assert len(shares) == count and np.abs(shares - 1 / count).max() < 0.03


def test_the_setting_chooses_the_crop_and_small_images_are_refused():
    cfg = PretrainConfig(hflip=0.25, interpolation="bilinear")
    default, simple = (
        pretrain_transform(cfg.model_copy(update={"crop": crop}), 32)
        for crop in ("resized", "simple")
    )
    assert type(default) is CropAndFlip and default.crop_min == cfg.crop_min
    assert type(simple) is SimpleCropAndFlip
    assert (simple.hflip, simple.interpolation, simple.size) == (0.25, "bilinear", (32, 32))
    small = PretrainConfig(crop="simple", img_size=4, patch_size=1)
    assert any("crop simple" in line for line in small.problems())
