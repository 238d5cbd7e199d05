"""Mixing and augmentation of fine-tuning, in numbers."""

import math
from collections import Counter

import pytest
import torch
from test_sampler import global_states
from torch import nn

from data.transforms import CropAndFlip, finetune_transform
from engine.evaluation.objective import Objective
from engine.mixing import BatchMixer
from util.rng import seed_libraries, seeded
from util.settings.evaluation import FinetuneConfig

CPU = torch.device("cpu")
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"


def mixer(num_classes: int = 5, **changes) -> BatchMixer:
    objective = Objective("multiclass", [*map(str, range(num_classes))])
    return BatchMixer(FinetuneConfig(**{"label_smoothing": 0.0} | changes), objective, CPU)


def test_without_any_mixing_nothing_changes():
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 4, 2])
    found = mixer()(images.clone(), labels)
    assert torch.equal(found[0], images) and found[1] is labels


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing_comes_as_often_as_asked_and_paints_as_asked(mode):
    """A quarter of 1,600 images: 400, standard deviation 17."""
    seed_libraries(0)
    images, _ = mixer(re_prob=0.25, re_mode=mode)(
        torch.full((1600, 3, 16, 16), 9.0), torch.zeros(1600)
    )
    erased = images[(images != 9.0).flatten(1).any(1)]
    assert 330 < len(erased) < 470
    for image in erased:
        area = image[:, (image != 9.0).all(0)]  # (3, pixels)
        colours = [len(of_channel.unique()) for of_channel in area]
        assert colours == [area.shape[1] if mode == "pixel" else 1] * 3
        assert (area == 0).all() == (mode == "const")


@pytest.mark.parametrize(("count", "low", "high"), [(1, 0, 0), (3, 120, 300)])
def test_erasing_up_to_so_many_areas(count, low, high):
    """Of three, two thirds of the images have two or three: what is erased is no rectangle."""
    seed_libraries(1)
    images, _ = mixer(re_prob=1.0, re_mode="const", re_count=count)(
        torch.ones(300, 1, 32, 32), torch.zeros(300)
    )
    changed = (images == 0).squeeze(1)
    box = changed.any(2).sum(1) * changed.any(1).sum(1)
    assert low <= (changed.sum((1, 2)) != box).sum() <= high


def flat_images(count: int) -> torch.Tensor:
    """Image i is filled with i."""
    return torch.arange(float(count)).view(-1, 1, 1, 1).expand(count, 3, 20, 20).clone()


def shares(labels: torch.Tensor, lam: float, num_classes: int, smoothing: float) -> torch.Tensor:
    """What an image and its partner, the one as far from the other end, give their classes."""
    on, off = 1 - smoothing + smoothing / num_classes, smoothing / num_classes
    own = torch.full((len(labels), num_classes), off)
    own[torch.arange(len(labels)), labels] = on
    return lam * own + (1 - lam) * own.flip(0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_labels_are_shared_as_pixels_are(kind, smoothing):
    """Mixup shares every pixel, cutmix the area; image 0 is 0, and its partner 5."""
    labels, found = torch.tensor([0, 1, 2, 3, 4, 1]), set()
    for seed in range(20):
        seed_libraries(seed)
        images, targets = mixer(**{kind: 0.8}, label_smoothing=smoothing)(flat_images(6), labels)
        lam = 1 - images[0].mean().item() / 5
        means = lam * torch.arange(6.0) + (1 - lam) * torch.arange(6.0).flip(0)
        torch.testing.assert_close(images.mean(dim=(1, 2, 3)), means, rtol=0, atol=1e-5)
        torch.testing.assert_close(targets, shares(labels, lam, 5, smoothing), rtol=0, atol=1e-5)
        whole = set(images[0].unique().tolist()) <= {0.0, 5.0}
        assert whole == (kind == "cutmix") and 0 <= lam <= 1
        found.add(round(lam, 6))
    assert len(found) > 15


@pytest.mark.parametrize(("switch", "low", "high"), [(0.0, 0, 0), (0.5, 160, 240), (1.0, 400, 400)])
def test_cutmix_takes_the_place_of_mixup_as_often_as_asked(switch, low, high):
    both, cut = mixer(mixup=0.8, cutmix=1.0, mixup_switch_prob=switch), 0
    for seed in range(400):
        seed_libraries(seed)
        images, _ = both(flat_images(2), torch.tensor([0, 1]))
        cut += set(images.unique().tolist()) <= {0.0, 1.0}  # mixup gives other values
    assert low <= cut <= high


@pytest.mark.parametrize(
    "changes", [{"re_prob": 0.5}, {"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}]
)
def test_mixing_is_a_function_of_the_seed(changes):
    def made(seed: int) -> tuple[bytes, bytes]:
        seed_libraries(seed)
        images, targets = mixer(**changes)(flat_images(8) + 1, torch.arange(8) % 5)
        return images.numpy().tobytes(), targets.numpy().tobytes()

    first = [made(seed) for seed in range(6)]
    assert [made(seed) for seed in reversed(range(6))] == first[::-1]
    assert len({images for images, _ in first}) == 6


LOGITS = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
LOG_SUM = math.log(sum(math.exp(x) for x in (1, 2, 3, 4)))


@pytest.mark.parametrize(("smoothing", "of_first"), [(0.1, 0.025 * 6 + 0.925 * 4), (0.0, 4)])
def test_smoothing_without_mixing_by_hand(smoothing, of_first):
    """C = 4, s = 0.1: the right class has 1 - s + s/C = 0.925, each other 0.025."""
    found = mixer(4, label_smoothing=smoothing).loss(LOGITS, torch.tensor([3, 0])).item()
    assert found == pytest.approx((LOG_SUM - of_first + math.log(4)) / 2, abs=1e-6)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_smoothing_is_not_applied_a_second_time_to_mixed_labels(kind):
    targets = torch.tensor([[0.7, 0.1, 0.0, 0.2]])
    found = mixer(4, label_smoothing=0.1, **{kind: 0.8}).loss(LOGITS[:1], targets).item()
    assert found == pytest.approx(LOG_SUM - (0.7 * 1 + 0.1 * 2 + 0.2 * 4), abs=1e-6)


def picture(channels: int = 3, height: int = 40, width: int = 36) -> torch.Tensor:
    """A smooth picture: brightness and colour run across it."""
    ramp = torch.linspace(0, 255, width).expand(height, -1)
    other = torch.linspace(255, 30, height)[:, None].expand(-1, width)
    return torch.stack([ramp, other, (ramp + other) / 2][:channels]).round().to(torch.uint8)


def augmentation(
    channels: int = 3, auto_augment: str | None = RAND_AUGMENT, **changes
) -> nn.Module:
    pixels = {"mean": (0.45,) * channels, "std": (0.22,) * channels, "in_chans": channels}
    settings = {"img_size": 24, "auto_augment": auto_augment, **pixels}
    return finetune_transform(FinetuneConfig(**settings | changes))


@pytest.mark.parametrize("auto_augment", [RAND_AUGMENT, "rand-m10-inc1", "rand-m10"])
@pytest.mark.parametrize("channels", [3, 1])
def test_rand_augment_takes_every_image(channels, auto_augment):
    """300 images; magnitude 10 is where posterising keeps 0 bits."""
    augment, image = augmentation(channels, auto_augment), picture(channels)
    results = []
    for seed in range(300):
        with seeded(seed, libraries=True):
            results.append(augment(image))
    assert {(result.dtype, tuple(result.shape)) for result in results} == {
        (torch.uint8, (channels, 24, 24))
    }
    assert len({result.numpy().tobytes() for result in results}) > 200
    assert torch.equal(image, picture(channels))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"auto_augment": None},
        {"auto_augment": None, "color_jitter": 0.4},
        {"img_size": (16, 32)},
    ],
)
def test_augmentation_is_a_function_of_the_seed_and_leaves_the_global_states_alone(changes):
    augment, image = augmentation(**changes), picture()

    def made(seed: int) -> bytes:
        with seeded(seed, libraries=True):
            return augment(image).numpy().tobytes()

    before = global_states()
    first = [made(seed) for seed in range(40)]
    assert global_states() == before
    seed_libraries(99)
    assert [made(seed) for seed in reversed(range(40))] == first[::-1]
    assert len(set(first)) == 40


def test_libraries_are_put_back_even_after_an_error():
    before = global_states()
    with pytest.raises(KeyError), seeded(5, libraries=True):
        seed_libraries(3)
        raise KeyError
    assert global_states() == before


def test_without_augmentation_it_is_the_crop_of_pretraining():
    settings = {"auto_augment": None, "crop_min": 0.3, "interpolation": "bilinear", "hflip": 0.7}
    plain, expected = augmentation(**settings), CropAndFlip(24, 0.3, "bilinear", 0.7)
    for seed in range(20):
        with seeded(seed, libraries=True):
            found = plain(picture())
        with seeded(seed):
            assert torch.equal(found, expected(picture()))


def test_rand_augment_crops_and_flips_as_asked():
    """With every operation off (none is chosen), what is left is the crop of the whole picture, or
    its mirror."""
    image, seen = picture(3, 24, 24), Counter()
    augment = augmentation(auto_augment="rand-n0", crop_min=0.9999, hflip=0.5)
    for seed in range(200):
        with seeded(seed, libraries=True):
            result = augment(image)
        seen[torch.equal(result, image), torch.equal(result, image.flip(-1))] += 1
    assert seen.keys() == {(True, False), (False, True)}  # the same, mirrored
    assert 70 < seen[False, True] < 130
