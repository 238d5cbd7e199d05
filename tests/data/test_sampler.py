"""Order, crops, flips and masks are pure functions of (seed, epoch, position): the numbers, and
what changes none of them."""

import random
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import loading
from torchvision.transforms import v2

from data.images import BadImageError, PixelFormat
from data.loader import Batch, LabelledDataset, PretrainDataset
from data.sampler import SampleKey, StepSampler, epoch_order
from data.sources import ArraySource
from data.transforms import CropAndFlip, PixelNormalizer
from models.masks import draw_orders
from util.rng import derive_seed


def test_golden_seeds_and_orders():
    """The random stream belongs to every checkpoint: when these numbers change, no run can be
    resumed exactly."""
    assert derive_seed(0, 0, 0) == 5678897472729702547
    assert derive_seed(7, 1, 2, 3) == 4427128135344464814
    (batch,) = StepSampler(num_images=1000, batch_size=5, seed=42, stop_step=1)
    assert [key.image for key in batch] == [333, 887, 105, 55, 224]
    assert epoch_order(10, 4, 42, 0).tolist() == [3, 6, 2, 8, 4, 5, 7, 9, 0, 1]
    by_blocks = epoch_order(100_000, 256, 0, 3)
    assert by_blocks[[0, 1, 20_000, 99_999]].tolist() == [50752, 8242, 6793, 65846]


@pytest.mark.parametrize(
    ("rank", "positions"),
    [
        (0, [[0, 1], [4, 5], [8, 9], [12, 13], [0, 1], [4, 5]]),
        (1, [[2, 3], [6, 7], [10, 11], [14, 15], [2, 3], [6, 7]]),
    ],
)
def test_two_processes_by_hand(rank, positions):
    """20 images, two steps of 8 an epoch. Each micro-batch is dealt to the processes in turn:
    0 1 | 2 3, then 4 5 | 6 7."""
    sampler = StepSampler(
        num_images=20, batch_size=2, accum_iter=2, rank=rank, world_size=2, seed=0, stop_step=3
    )
    assert [[key.position for key in batch] for batch in sampler] == positions
    assert [batch[0].epoch for batch in sampler] == [0, 0, 0, 0, 1, 1]


@dataclass(frozen=True)
class Run:
    """A run's geometry, from which the definition in `data/sampler.py` gives every sample."""

    num_images: int
    total: int
    steps: int
    seed: int
    block_size: int
    repeats: int

    def keys(self, step: int) -> list[SampleKey]:
        """The samples of a step, by position."""
        steps_per_epoch = self.num_images // self.total
        epoch = step // steps_per_epoch
        order = epoch_order(self.num_images, self.block_size, self.seed, epoch // self.repeats)
        decoded = np.split(order[: steps_per_epoch * self.total], self.repeats)[
            epoch % self.repeats
        ]
        first = step % steps_per_epoch * self.total
        return [
            SampleKey(int(decoded[position // self.repeats]), epoch, position, step)
            for position in range(first, first + self.total)
        ]


@st.composite
def shared_runs(draw) -> tuple[Run, dict[str, int]]:
    """A run, and how its steps are shared by processes and micro-batches."""
    repeats = draw(st.integers(1, 4))
    sharing = {
        "batch_size": repeats * draw(st.integers(1, 4)),
        "accum_iter": draw(st.integers(1, 3)),
        "world_size": draw(st.integers(1, 4)),
    }
    total = int(np.prod(list(sharing.values())))
    num_images = draw(st.integers(total, 4 * total))
    steps, seed, block = draw(st.integers(1, 12)), draw(st.integers(0, 9)), st.integers(1, 9)
    return Run(num_images, total, steps, seed, draw(block), repeats), sharing


def sampler_of(run: Run, start: int, stop: int, **sharing: int) -> StepSampler:
    return StepSampler(
        num_images=run.num_images,
        seed=run.seed,
        start_step=start,
        stop_step=stop,
        block_size=run.block_size,
        aug_repeats=run.repeats,
        **sharing,
    )


@given(shared_runs(), st.data())
def test_a_step_is_the_same_however_it_is_shared_and_wherever_the_run_starts(shared, data):
    run, sharing = shared
    start = data.draw(st.integers(0, run.steps))
    gathered: dict[int, list[SampleKey]] = {step: [] for step in range(start, run.steps)}
    for rank in range(sharing["world_size"]):
        sampler = sampler_of(run, start, run.steps, rank=rank, **sharing)
        batches = list(sampler)
        assert list(sampler) == batches  # a sampler can be read again
        assert len(sampler) == len(batches) == (run.steps - start) * sharing["accum_iter"]
        for batch in batches:
            assert len(batch) == sharing["batch_size"]
            samples_of_one = np.array([key.image for key in batch]).reshape(-1, run.repeats)
            assert (samples_of_one == samples_of_one[:, :1]).all()
            gathered[batch[0].step] += batch
    for step, keys in gathered.items():
        assert sorted(keys, key=lambda key: key.position) == run.keys(step)


@given(shared_runs())
def test_an_image_is_decoded_once_in_as_many_epochs_as_it_has_repeats(shared):
    run, _ = shared
    for period in range(2):
        steps = run.num_images // run.total * run.repeats
        sampler = sampler_of(run, period * steps, (period + 1) * steps, batch_size=run.total)
        images = [key.image for batch in sampler for key in batch[:: run.repeats]]
        assert len(set(images)) == len(images) == steps * run.total // run.repeats
        assert set(images) <= set(range(run.num_images))


@given(st.integers(1, 3000), st.integers(1, 40), st.integers(0, 2**31 - 1), st.integers(0, 1000))
def test_an_epoch_is_a_permutation(num_images, block_size, seed, epoch):
    order = epoch_order(num_images, block_size, seed, epoch)
    assert np.array_equal(np.sort(order), np.arange(num_images))
    epoch_order.cache_clear()
    assert np.array_equal(order, epoch_order(num_images, block_size, seed, epoch))


@pytest.mark.parametrize("block_size", [1, 5])
def test_seeds_and_epochs_have_orders_of_their_own(block_size):
    """Also the images that an epoch leaves out differ."""
    run = {"num_images": 203, "batch_size": 50, "block_size": block_size}
    orders = set()
    for seed in range(5):
        images = [key.image for step in StepSampler(seed=seed, stop_step=20, **run) for key in step]
        orders |= {tuple(epoch) for epoch in np.split(np.array(images), 5)}
    assert len(orders) == len({frozenset(order) for order in orders}) == 25


def test_64_blocks_are_read_at_a_time_and_mixed():
    """10,000 blocks of 8: each 512 positions hold 64 complete blocks, from all over the data set,
    in no order."""
    order = epoch_order(80_000, 8, 0, 0)
    for images in np.split(order[: 156 * 512], 156):
        blocks, counts = np.unique(images // 8, return_counts=True)
        assert (len(blocks), set(counts)) == (64, {8})
        assert np.ptp(images) > 60_000
        assert abs(np.corrcoef(np.arange(512), np.argsort(np.argsort(images)))[0, 1]) < 0.2
        assert np.mean(np.diff(images) == 1) < 0.05


@given(*[st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4).map(tuple)] * 2)
def test_seeds_have_63_bits(one, other):
    assert 0 <= derive_seed(*one) < 2**63
    assert (derive_seed(*one) == derive_seed(*other)) == (one == other)


@pytest.mark.parametrize("base", [(0,), (1, 2, 3), (5, 2**32)])
def test_different_coordinates_have_different_seeds(base):
    """Trailing zeros and split words are what SeedSequence cannot tell apart."""
    words = tuple(word for c in base for word in (c % 2**32, c >> 32))
    tuples = {base, (*base, 0), (*base, 0, 0), (*base, 1), (0, *base), words}
    assert len({derive_seed(*coordinates) for coordinates in tuples}) == len(tuples)


COUNT = 40
PICTURES = np.random.default_rng(0).integers(0, 256, (COUNT, 3, 20, 24), dtype=np.uint8)


class Spoilt(ArraySource):
    """Some images are bad; image i is filled with i, and its label is 2 i."""

    def __init__(self, *bad: int):
        shades = np.arange(COUNT, dtype=np.uint8)[:, None, None, None]
        super().__init__("shades", shades + 0 * PICTURES, 2 * np.arange(COUNT), PixelFormat(3))
        self.bad = bad

    def read(self, index: int) -> torch.Tensor:
        if index in self.bad:
            raise BadImageError("cannot be decoded: it is torn")
        return super().read(index)


def drawing(image: torch.Tensor) -> torch.Tensor:
    """A transform that draws from all three generators."""
    added = [torch.randint(256, (1,)).item(), np.random.randint(256), random.randrange(256)]
    return image[:, :8, :8] + torch.tensor(added, dtype=torch.uint8).view(3, 1, 1)


DATASET = PretrainDataset(
    source=ArraySource("noise", PICTURES, np.arange(COUNT), PixelFormat(3)),
    transform=CropAndFlip(8, 0.2, "bicubic", 0.5),
    draw_orders=partial(draw_orders, "random", (4, 4), 0.75, 2),
    shared_mask=False,
    seed=0,
)


def dataset(**changes) -> PretrainDataset:
    """40 pictures of noise, crops of 8 x 8 pixels, 16 patches."""
    return replace(DATASET, **changes)


def batches(
    made: PretrainDataset, num_workers: int = 0, start_step: int = 0, prefetch_factor: int = 2
) -> list[Batch]:
    """Three epochs of three steps of 12 samples."""
    steps = StepSampler(
        num_images=len(made.source),
        batch_size=12,
        seed=0,
        start_step=start_step,
        stop_step=9,
        aug_repeats=made.aug_repeats,
    )
    return list(loading(num_workers, prefetch_factor)(made, batch_sampler=steps))


def assert_same_batches(left: list[Batch], right: list[Batch]) -> None:
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)
        assert (one.keys, one.bad, one.failed) == (other.keys, other.bad, other.failed)


def global_states() -> int:
    """One number for the states of torch, numpy and Python."""
    _, words, place, *_ = np.random.get_state()
    return hash(
        (torch.random.get_rng_state().numpy().tobytes(), random.getstate(), words.tobytes(), place)
    )


@pytest.mark.parametrize(
    "made",
    [
        dataset(),
        dataset(shared_mask=True),
        dataset(source=Spoilt(4, 5, 6), aug_repeats=3),
        dataset(draw_orders=partial(draw_orders, "green", (4, 4), 0.75, 2), aug_repeats=3),
        LabelledDataset(Spoilt(3, 8), drawing, seed=5),
    ],
    ids=["masks", "one mask", "repeats", "green", "labels"],
)
def test_workers_prefetching_and_restarts_change_nothing(made):
    torch.manual_seed(1)
    expected = batches(made)
    torch.manual_seed(2)
    before = global_states()
    assert_same_batches(batches(made, 2), expected)
    assert_same_batches(batches(made, 1, start_step=4, prefetch_factor=5), expected[4:])
    assert global_states() == before
    assert [batch.keys[0].step for batch in expected] == list(range(9))
    assert any(batch.bad for batch in expected) == isinstance(made.source, Spoilt)
    for batch in expected:
        assert (batch.images.shape, batch.images.dtype) == ((12, 3, 8, 8), torch.uint8)
        assert batch.images.permute(0, 2, 3, 1).is_contiguous()  # channels last, as crops are
        assert batch.targets.dtype == torch.int64
        assert batch.targets.shape == ((12,) if isinstance(made, LabelledDataset) else (12, 16))


@pytest.mark.parametrize("shared_mask", [False, True])
@pytest.mark.parametrize("repeats", [1, 4])
def test_a_sample_is_a_function_of_its_key_alone(repeats, shared_mask):
    """Made by itself, and without repeats, it is the same; and the global random states stay."""
    alone = dataset(shared_mask=shared_mask)
    for batch in reversed(batches(dataset(shared_mask=shared_mask, aug_repeats=repeats))):
        assert len({image.numpy().tobytes() for image in batch.images}) == 12
        masks = {mask.numpy().tobytes() for mask in batch.targets}
        assert len(masks) == (1 if shared_mask else 12)
        before = global_states()
        for number in reversed(range(12)):
            sample = alone[batch.keys[number]]
            assert torch.equal(sample.image, batch.images[number])
            assert torch.equal(sample.target, batch.targets[number])
            assert sample.key == batch.keys[number]
        assert global_states() == before


def test_position_epoch_and_seed_each_change_crop_and_mask():
    keys = [SampleKey(0, epoch, position, 0) for epoch in range(3) for position in range(4)]
    samples = [dataset(seed=seed)[key] for key in keys for seed in range(2)]
    assert len({sample.image.numpy().tobytes() for sample in samples}) == 24
    assert len({sample.target.numpy().tobytes() for sample in samples}) == 24
    # the step is not among the coordinates, so another total batch size gives the same sample
    one, other = (dataset()[SampleKey(0, 1, 2, step)] for step in (3, 9))
    assert torch.equal(one.image, other.image)
    assert torch.equal(one.target, other.target)


def test_a_shared_mask_is_one_for_each_step():
    shared = batches(dataset(shared_mask=True))
    masks = [{tuple(mask.tolist()) for mask in batch.targets} for batch in shared]
    assert [len(of_step) for of_step in masks] == [1] * 9
    assert len(set.union(*masks)) == 9
    other_seed = dataset(shared_mask=True, seed=1)[shared[0].keys[0]]
    assert not torch.equal(other_seed.target, shared[0].targets[0])
    for one, other in zip(shared, batches(dataset()), strict=True):
        assert torch.equal(one.images, other.images)  # sharing the mask moves no crop


@pytest.mark.parametrize("shared_mask", [False, True])
def test_masks_are_permutations_and_keep_every_patch_equally_often(shared_mask):
    made = dataset(shared_mask=shared_mask)
    masks = torch.stack(
        [made[SampleKey(0, 0, number, number)].target for number in range(2000)]
    )  # (2000, 16)
    assert torch.equal(masks.sort(dim=1).values, torch.arange(16).expand(2000, 16))
    kept = torch.bincount(masks[:, :4].flatten(), minlength=16)
    assert (kept - 500).abs().max() < 100  # 2000 * 4 / 16, standard deviation 19
    pairs = torch.bincount(masks[:, 0] * 16 + masks[:, 1], minlength=256).view(16, 16)
    assert (pairs.sum(dim=1) - 125).abs().max() < 55  # standard deviation 11
    assert pairs.max() < 30  # 8.3 each


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
