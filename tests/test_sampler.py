"""Order, crops, flips and masks are pure functions of (seed, epoch, position): the numbers, and
what moves none."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from runs import loading
from torchvision.transforms import v2

from data.loader import PretrainBatch, PretrainDataset, build_train_loader
from data.sampler import SampleKey, StepSampler
from data.sources import ArraySource
from data.transforms import PixelNormalizer, pretrain_transform
from models.masks import training_order
from util.rng import ORDER, derive_seed, generator, seeded


def sampler(num_images: int, batch_size: int, **changes) -> StepSampler:
    settings = {
        "accum_iter": 1,
        "rank": 0,
        "world_size": 1,
        "seed": 0,
        "start_step": 0,
        "stop_step": 1,
    }
    return StepSampler(num_images, batch_size, **settings | changes)


def positions(batches: StepSampler) -> list[list[int]]:
    return [[key.position for key in batch] for batch in batches]


def epoch_order(seed: int, epoch: int, num_images: int) -> list[int]:
    return torch.randperm(num_images, generator=generator(seed, ORDER, epoch)).tolist()


def test_golden_seeds_and_order():
    """The random stream belongs to every checkpoint: when these numbers change, no run can be
    resumed exactly."""
    assert derive_seed(0, 0, 0) == 5678897472729702547
    assert derive_seed(7, 1, 2, 3) == 4427128135344464814
    (batch,) = sampler(1000, 5, seed=42)
    assert [key.image for key in batch] == [333, 887, 105, 55, 224]


def test_one_process_by_hand():
    """10 images, 2 micro-batches of 2: two steps an epoch, two images left out."""
    keys = list(sampler(10, 2, accum_iter=2, stop_step=3))
    first, second = epoch_order(0, 0, 10), epoch_order(0, 1, 10)
    assert keys == [
        [SampleKey(first[0], 0, 0, 0), SampleKey(first[1], 0, 1, 0)],
        [SampleKey(first[2], 0, 2, 0), SampleKey(first[3], 0, 3, 0)],
        [SampleKey(first[4], 0, 4, 1), SampleKey(first[5], 0, 5, 1)],
        [SampleKey(first[6], 0, 6, 1), SampleKey(first[7], 0, 7, 1)],
        [SampleKey(second[0], 1, 0, 2), SampleKey(second[1], 1, 1, 2)],
        [SampleKey(second[2], 1, 2, 2), SampleKey(second[3], 1, 3, 2)],
    ]


def test_two_processes_by_hand():
    """Each micro-batch is dealt to the processes in turn: 0 1 | 2 3, then 4 5 | 6 7."""
    first = sampler(20, 2, accum_iter=2, world_size=2, rank=0, stop_step=3)
    second = sampler(20, 2, accum_iter=2, world_size=2, rank=1, stop_step=3)
    assert positions(first) == [[0, 1], [4, 5], [8, 9], [12, 13], [0, 1], [4, 5]]
    assert positions(second) == [[2, 3], [6, 7], [10, 11], [14, 15], [2, 3], [6, 7]]
    assert len(first) == len(second) == 6


@pytest.mark.parametrize(
    ("num_images", "batch_size", "accum_iter", "world_size", "steps"),
    [
        (8, 8, 1, 1, 1),
        (9, 2, 2, 2, 1),
        (15, 2, 2, 2, 1),
        (16, 2, 2, 2, 2),
        (1000, 64, 1, 1, 15),
        (3, 1, 1, 1, 3),
    ],
)
def test_steps_per_epoch(num_images, batch_size, accum_iter, world_size, steps):
    settings = {"accum_iter": accum_iter, "world_size": world_size}
    assert sampler(num_images, batch_size, **settings).steps_per_epoch == steps
    assert (
        len(sampler(num_images, batch_size, start_step=3, stop_step=10, **settings))
        == 7 * accum_iter
    )


def steps_of(
    num_images: int, batch_size: int, accum_iter: int, world_size: int, steps: int
) -> list[list[SampleKey]]:
    """The samples of each step over all processes and micro-batches, by position."""
    gathered: list[list[SampleKey]] = [[] for _ in range(steps)]
    for rank in range(world_size):
        settings = {
            "accum_iter": accum_iter,
            "world_size": world_size,
            "rank": rank,
            "stop_step": steps,
        }
        for number, batch in enumerate(sampler(num_images, batch_size, **settings)):
            assert len(batch) == batch_size
            gathered[number // accum_iter] += batch
    return [sorted(keys, key=lambda key: key.position) for keys in gathered]


def test_a_step_is_the_same_however_it_is_shared_out():
    whole = steps_of(200, 64, 1, 1, 7)
    assert whole == steps_of(200, 16, 4, 1, 7)
    assert whole == steps_of(200, 16, 2, 2, 7)
    assert whole == steps_of(200, 16, 1, 4, 7)
    # three steps an epoch
    assert [[key.position for key in keys] for keys in whole] == [
        list(range(64 * (s % 3), 64 * (s % 3 + 1))) for s in range(7)
    ]
    assert [{(key.epoch, key.step) for key in keys} for keys in whole] == [
        {(s // 3, s)} for s in range(7)
    ]


def test_an_epoch_is_a_permutation_and_its_rest_differs_each_time():
    """103 images in steps of 10: three are left out."""
    left_out, orders = [], []
    for epoch in range(6):
        keys = [
            key
            for batch in sampler(103, 10, start_step=10 * epoch, stop_step=10 * epoch + 10)
            for key in batch
        ]
        images = [key.image for key in keys]
        assert len(set(images)) == 100
        assert set(images) <= set(range(103))
        assert {key.epoch for key in keys} == {epoch}
        assert [key.position for key in keys] == list(range(100))
        left_out.append(frozenset(range(103)) - set(images))
        orders.append(tuple(images))
    assert len(set(left_out)) == len(set(orders)) == 6
    assert orders[0] != tuple(range(100))


def test_starting_at_any_step_gives_the_tail():
    """5 steps an epoch: starts in the middle of one, at its end, at the first step of the next."""
    settings = {"accum_iter": 2, "world_size": 2, "rank": 1, "stop_step": 17}
    whole = list(sampler(43, 2, **settings))
    for start in range(18):
        tail = sampler(43, 2, start_step=start, **settings)
        assert list(tail) == whole[2 * start :]
        assert list(tail) == whole[2 * start :]  # a sampler can be read again
        assert len(tail) == 2 * (17 - start)


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = {
        tuple(
            key.image
            for batch in sampler(64, 64, seed=seed, start_step=epoch, stop_step=epoch + 1)
            for key in batch
        )
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


@pytest.mark.parametrize("base", [(0,), (1, 2, 3), (5, 2**32)])
def test_different_coordinates_have_different_seeds(base):
    tuples = [
        base,
        (*base, 0),
        (*base, 0, 0),
        (*base, 1),
        (0, *base),
        base[::-1] + (9,),
        tuple(c + 1 for c in base),
    ]
    tuples += [tuple(word for c in base for word in (c % 2**32, c >> 32))]
    assert len({derive_seed(*coordinates) for coordinates in tuples}) == len(set(tuples))


def test_seeds_are_63_bits_and_use_them():
    seeds = [derive_seed(0, 1, 0, position) for position in range(2000)]
    assert len(set(seeds)) == 2000
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
    for bit in range(63):  # 1000 +- 22 of each
        assert abs(sum(seed >> bit & 1 for seed in seeds) - 1000) < 150, bit


COUNT = 40
PICTURES = np.random.default_rng(0).integers(0, 256, (COUNT, 3, 20, 24), dtype=np.uint8)


def dataset(shared_mask: bool = False, seed: int = 0, num_patches: int = 16) -> PretrainDataset:
    transform = pretrain_transform(8, 0.2, "bicubic", 0.5)
    return PretrainDataset(
        ArraySource("noise", PICTURES, 3),
        transform,
        partial(training_order, num_patches),
        shared_mask,
        seed,
    )


def batches(
    num_workers: int, start_step: int = 0, prefetch_factor: int = 2, **settings
) -> list[PretrainBatch]:
    steps = sampler(COUNT, 8, start_step=start_step, stop_step=10)  # two epochs of five
    return list(
        build_train_loader(dataset(**settings), steps, loading(num_workers, prefetch_factor))
    )


def assert_same(left: list[PretrainBatch], right: list[PretrainBatch]) -> None:
    assert [batch.keys for batch in left] == [batch.keys for batch in right]
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.ids_shuffle, b.ids_shuffle)


@pytest.mark.parametrize("shared_mask", [False, True])
def test_workers_and_prefetching_change_nothing(shared_mask):
    torch.manual_seed(1)
    expected = batches(0, shared_mask=shared_mask)
    torch.manual_seed(2)
    assert_same(batches(2, shared_mask=shared_mask), expected)
    assert_same(batches(1, shared_mask=shared_mask, prefetch_factor=5), expected)
    assert_same(batches(2, shared_mask=shared_mask, start_step=3), expected[3:])
    assert [batch.keys[0].step for batch in expected] == list(range(10))
    assert (expected[0].images.shape, expected[0].images.dtype) == ((8, 3, 8, 8), torch.uint8)
    assert (expected[0].ids_shuffle.shape, expected[0].ids_shuffle.dtype) == ((8, 16), torch.int64)


def test_a_sample_can_be_made_again_from_its_key():
    made = dataset()
    for batch in reversed(batches(0)):
        for number in reversed(range(8)):
            sample = made[batch.keys[number]]
            assert torch.equal(sample.image, batch.images[number])
            assert torch.equal(sample.target, batch.ids_shuffle[number])
            assert sample.key == batch.keys[number]


def test_position_epoch_and_seed_each_change_crop_and_mask():
    keys = [SampleKey(0, epoch, position, 0) for epoch in range(3) for position in range(4)]
    samples = [dataset(seed=seed)[key] for key in keys for seed in range(2)]
    assert len({sample.image.numpy().tobytes() for sample in samples}) == 24
    assert len({sample.target.numpy().tobytes() for sample in samples}) == 24
    # the step is not among the coordinates, so another total batch size gives the same crop
    assert torch.equal(
        dataset()[SampleKey(0, 1, 2, 3)].image, dataset()[SampleKey(0, 1, 2, 9)].image
    )
    assert torch.equal(
        dataset()[SampleKey(0, 1, 2, 3)].target, dataset()[SampleKey(0, 1, 2, 9)].target
    )


def global_states() -> int:
    """One number for the states of torch, numpy and Python."""
    _, words, place, *_ = np.random.get_state()
    return hash(
        (torch.random.get_rng_state().numpy().tobytes(), random.getstate(), words.tobytes(), place)
    )


def test_making_a_sample_leaves_the_global_random_states_alone():
    made, before = dataset(), global_states()
    made[SampleKey(3, 0, 7, 0)]
    assert global_states() == before


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_global_random_states_alone(num_workers):
    before = global_states()
    batches(num_workers)
    assert global_states() == before


def test_seeded_puts_the_state_back_even_after_an_error():
    before = global_states()
    with pytest.raises(KeyError), seeded(5):
        torch.rand(3)
        raise KeyError
    assert global_states() == before
    with seeded(5):
        first = torch.rand(3)
    assert torch.equal(first, torch.rand(3, generator=torch.Generator().manual_seed(5)))


def test_a_shared_mask_is_one_for_each_step():
    keys = [
        SampleKey(position, 0, position, step)
        for step in range(6)
        for position in range(4 * step, 4 * step + 4)
    ]
    shared = [dataset(shared_mask=True)[key].target.tolist() for key in keys]
    own = [dataset(shared_mask=False)[key].target.tolist() for key in keys]
    for step in range(6):
        assert shared[4 * step : 4 * step + 4] == [shared[4 * step]] * 4
    assert len({tuple(mask) for mask in shared}) == 6
    assert len({tuple(mask) for mask in own}) == 24
    other_seed = dataset(shared_mask=True, seed=1)
    assert other_seed[keys[0]].target.tolist() != shared[0]
    # sharing the mask moves no crop
    assert torch.equal(
        dataset(shared_mask=True)[keys[5]].image, dataset(shared_mask=False)[keys[5]].image
    )


@pytest.mark.parametrize("shared_mask", [False, True])
def test_masks_are_permutations_and_keep_every_patch_equally_often(shared_mask):
    made = dataset(shared_mask=shared_mask)
    masks = torch.stack(
        [made[SampleKey(0, 0, number, number)].target for number in range(2000)]
    )  # (2000, 16)
    assert torch.equal(masks.sort(dim=1).values, torch.arange(16).expand(2000, 16))
    kept = torch.bincount(masks[:, :4].flatten(), minlength=16)
    assert (kept - 500).abs().max() < 100  # 2000 * 4 / 16, standard deviation 19
    first = torch.bincount(masks[:, 0], minlength=16)
    assert (first - 125).abs().max() < 55  # standard deviation 11
    pairs = torch.bincount(masks[:, 0] * 16 + masks[:, 1], minlength=256).view(16, 16)
    assert pairs.diagonal().sum() == 0
    assert (pairs.sum() == 2000) and pairs.max() < 30  # 8.3 each


SIDE = 256
# red tells the column, green the row, so that a crop's place and size can be read from its pixels
RULER = torch.stack(
    [torch.arange(SIDE).expand(SIDE, SIDE), torch.arange(SIDE)[:, None].expand(SIDE, SIDE)]
)
RULER = torch.cat([RULER, RULER[:1]]).to(torch.uint8)


def measured_crops(crop_min: float, hflip: float, count: int) -> torch.Tensor:
    """Widths (negative: flipped) and heights of crops in pixels, `(count, 2)`; to about +-1.5."""
    transform = pretrain_transform(16, crop_min, "bilinear", hflip)
    sizes = []
    for number in range(count):
        with seeded(derive_seed(0, 1, 0, number)):
            crop = transform(RULER).float()
        # between pixels 2 and 13 of 16 lie 11 strides; the outermost ones feel the border
        sizes.append(
            [(crop[0, 8, 13] - crop[0, 8, 2]) / 11 * 16, (crop[1, 13, 8] - crop[1, 2, 8]) / 11 * 16]
        )
    return torch.tensor(sizes)


@pytest.mark.parametrize("crop_min", [0.2, 0.6])
def test_crops_cover_the_range_of_areas_and_aspects(crop_min):
    width, height = measured_crops(crop_min, 0.0, 600).unbind(dim=1)
    assert (width > 0).all()
    area, aspect = width * height / SIDE**2, width / height
    assert crop_min - 0.02 < area.min() < crop_min + 0.03
    assert 0.9 < area.max() < 1.03
    assert 0.72 < aspect.min() < 0.78  # 3/4, and measured to 2 %
    assert 1.28 < aspect.max() < 1.38  # 4/3
    # uniform in area, but for the large and narrow ones that do not fit and are drawn again
    assert crop_min + 0.35 * (1 - crop_min) < area.mean() < crop_min + 0.55 * (1 - crop_min)


@pytest.mark.parametrize(
    ("hflip", "low", "high"), [(0.0, 0, 0), (0.5, 250, 350), (0.2, 75, 165), (1.0, 600, 600)]
)
def test_flips_come_as_often_as_asked(hflip, low, high):
    flipped = (measured_crops(0.2, hflip, 600)[:, 0] < 0).sum().item()
    assert low <= flipped <= high


def test_a_full_crop_without_flip_is_the_image():
    image = torch.from_numpy(PICTURES[0, :, :20, :20].copy())
    with seeded(0):
        whole = pretrain_transform(20, 0.9999, "bicubic", 0.0)(image)
    assert torch.equal(whole, image)


def test_normalisation_equals_torchvision():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = (
        torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    )  # every value in every channel
    images[1] = images[1].flip(-1)
    normalized = PixelNormalizer(mean, std, torch.device("cpu"))(images)
    expected = v2.functional.normalize(
        v2.functional.to_dtype(images, torch.float32, scale=True), mean, std
    )
    assert normalized.dtype == torch.float32
    torch.testing.assert_close(normalized, expected, rtol=0, atol=1e-6)
    grey = PixelNormalizer((0.5,), (0.25,), torch.device("cpu"))(images[:, :1])
    assert (grey.min().item(), grey.max().item()) == pytest.approx((-2.0, 2.0), abs=1e-6)
