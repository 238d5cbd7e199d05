"""Repeated augmentation (`aug_repeats`): several samples of each decoded image, in one batch, as
exact as without."""

import gzip
import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packs import PACKED, member, pack, write_tar
from runs import (
    STEPS_PER_EPOCH,
    assert_same,
    command,
    digits,
    launch,
    loading,
    log_lines,
    make_pictures,
    pretraining,
    run,
    step_losses,
)
from torch import Tensor

import data.packs.source
import data.sources
import main_pretrain
from data.images import BadImageError
from data.known_sets import CIFAR_ARCHIVES
from data.loader import PretrainBatch, PretrainDataset, build_train_loader
from data.sampler import SampleKey, StepSampler, epoch_order
from data.sources import ArraySource
from data.transforms import pretrain_transform
from models.masks import training_order
from util.errors import InputError
from util.settings.pretrain import PretrainConfig
from util.settings.read import load_config

COUNT, BATCH = 43, 12
PICTURES = np.random.default_rng(0).integers(0, 256, (COUNT, 3, 20, 24), dtype=np.uint8)


class CountingSource(ArraySource):
    """Notes which images are decoded; some are bad."""

    def __init__(self, bad: tuple[int, ...] = ()):
        super().__init__("noise", PICTURES, 3)
        self.bad = bad
        self.decoded: list[int] = []

    def read(self, index: int) -> Tensor:
        self.decoded.append(index)
        if index in self.bad:
            raise BadImageError("spoiled")
        return super().read(index)


def dataset(
    repeats: int, source: CountingSource | None = None, shared_mask: bool = False
) -> PretrainDataset:
    transform = pretrain_transform(8, 0.2, "bicubic", 0.5)
    return PretrainDataset(
        source or CountingSource(),
        transform,
        partial(training_order, 16),
        shared_mask,
        seed=0,
        aug_repeats=repeats,
    )


def sampler(repeats: int, start: int = 0, stop: int = 9, **changes) -> StepSampler:
    settings = {
        "batch_size": BATCH,
        "accum_iter": 1,
        "rank": 0,
        "world_size": 1,
        "block_size": 1,
    } | changes
    return StepSampler(
        COUNT, seed=0, start_step=start, stop_step=stop, aug_repeats=repeats, **settings
    )


def batches(
    made: PretrainDataset, num_workers: int = 0, start: int = 0, prefetch_factor: int = 2
) -> list[PretrainBatch]:
    steps = sampler(made.aug_repeats, start)
    return list(build_train_loader(made, steps, loading(num_workers, prefetch_factor)))


def assert_same_batches(left: list[PretrainBatch], right: list[PretrainBatch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert_same(list(map(tuple, one.keys)), list(map(tuple, other.keys)))
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.ids_shuffle, other.ids_shuffle)
        assert (one.bad, one.failed) == (other.bad, other.failed)


def test_one_process_by_hand():
    """10 images, 2 micro-batches of 2, each image twice: two steps and four images an epoch, one
    order for two."""
    steps = StepSampler(10, 2, 2, 0, 1, seed=0, start_step=0, stop_step=5, aug_repeats=2)
    first, second = epoch_order(10, 1, 0, 0), epoch_order(10, 1, 0, 1)
    images = [*first[:8], *second[:2]]
    expected = []
    for number, image in enumerate(images):
        epoch, place = divmod(number, 4)
        expected.append(
            [SampleKey(int(image), epoch, 2 * place + copy, number // 2) for copy in (0, 1)]
        )
    assert list(steps) == expected
    assert (len(steps), steps.steps_per_epoch) == (10, 2)


@pytest.mark.parametrize("repeats", [1, 2, 3, 4, 6, 12])
def test_epochs_count_samples_and_every_image_comes_as_often_as_without(repeats):
    """43 images in steps of 12: three steps an epoch; 36 images, each once in so many epochs."""
    assert sampler(repeats).steps_per_epoch == 3
    left_out = []
    for period in range(3):
        seen = []
        for epoch in range(period * repeats, (period + 1) * repeats):
            keys = [key for batch in sampler(repeats, 3 * epoch, 3 * epoch + 3) for key in batch]
            assert [key.position for key in keys] == list(range(36))
            assert {key.epoch for key in keys} == {epoch}
            assert [key.step for key in keys] == [
                3 * epoch + position // 12 for position in range(36)
            ]
            images = [key.image for key in keys]
            assert images == [image for image in images[::repeats] for _ in range(repeats)]
            seen += images[::repeats]
        assert len(seen) == len(set(seen)) == 36
        left_out.append(frozenset(range(COUNT)) - set(seen))
        assert seen == epoch_order(COUNT, 1, 0, period)[:36].tolist()
    assert len(set(left_out)) == 3


def steps_of(
    repeats: int, world_size: int, accum_iter: int, start: int = 0, block_size: int = 1
) -> list[list[SampleKey]]:
    """The samples of each step over all processes, by position."""
    gathered: list[list[SampleKey]] = [[] for _ in range(20 - start)]
    for rank in range(world_size):
        settings = {
            "batch_size": 24 // world_size // accum_iter,
            "accum_iter": accum_iter,
            "block_size": block_size,
        }
        steps = sampler(repeats, start, 20, rank=rank, world_size=world_size, **settings)
        for number, batch in enumerate(steps):
            assert [key.image for key in batch] == [
                key.image for key in batch[::repeats] for _ in range(repeats)
            ]
            gathered[number // accum_iter] += batch
    return [sorted(keys, key=lambda key: key.position) for keys in gathered]


@pytest.mark.parametrize("block_size", [1, 5])
@pytest.mark.parametrize("repeats", [2, 3])
def test_a_step_is_the_same_however_it_is_shared_out_and_wherever_it_starts(repeats, block_size):
    whole = steps_of(repeats, 1, 1, block_size=block_size)
    for world_size, accum_iter in ((2, 1), (4, 1), (1, 4), (2, 2)):
        assert steps_of(repeats, world_size, accum_iter, block_size=block_size) == whole
    for start in (1, 2, 3, 4, 5, 11):
        assert steps_of(repeats, 2, 2, start, block_size) == whole[start:]


@pytest.mark.parametrize("repeats", [1, 2, 4])
def test_an_image_is_decoded_once_for_all_its_samples(repeats):
    source = CountingSource()
    made = batches(dataset(repeats, source))
    assert source.decoded == [key.image for batch in made for key in batch.keys[::repeats]]
    assert len(source.decoded) == 9 * BATCH // repeats
    assert all(len(batch.images) == BATCH for batch in made)


def test_the_samples_of_an_image_have_crops_and_masks_of_their_own():
    for batch in batches(dataset(4)):
        assert len({image.numpy().tobytes() for image in batch.images}) == BATCH
        assert len({mask.numpy().tobytes() for mask in batch.ids_shuffle}) == BATCH
        for first in range(0, BATCH, 4):
            assert len({key.image for key in batch.keys[first : first + 4]}) == 1


@pytest.mark.parametrize("shared_mask", [False, True])
def test_a_sample_is_a_function_of_its_key_alone(shared_mask):
    """Made by itself, and without repeats, it is the same."""
    alone, without = dataset(4, shared_mask=shared_mask), dataset(1, shared_mask=shared_mask)
    for batch in reversed(batches(dataset(4, shared_mask=shared_mask))):
        for number in reversed(range(BATCH)):
            for sample in (alone[batch.keys[number]], without[batch.keys[number]]):
                assert torch.equal(sample.image, batch.images[number])
                assert torch.equal(sample.target, batch.ids_shuffle[number])
        masks = {mask.numpy().tobytes() for mask in batch.ids_shuffle}
        assert len(masks) == (1 if shared_mask else BATCH)


def test_workers_prefetching_and_restarts_change_nothing():
    expected = batches(dataset(3, CountingSource(bad=(4, 5, 6))))
    assert any(batch.bad for batch in expected)
    assert_same_batches(batches(dataset(3, CountingSource(bad=(4, 5, 6))), num_workers=2), expected)
    tail = batches(
        dataset(3, CountingSource(bad=(4, 5, 6))), num_workers=1, start=4, prefetch_factor=5
    )
    assert_same_batches(tail, expected[4:])


def shown(image: Tensor) -> int:
    """Which image of those of one colour."""
    return int(image[0, 0, 0])


def test_the_samples_of_a_bad_file_share_one_replacement(monkeypatch):
    plain = np.broadcast_to(
        np.arange(COUNT, dtype=np.uint8)[:, None, None, None], PICTURES.shape
    ).copy()
    monkeypatch.setitem(globals(), "PICTURES", plain)
    bad = (1, 2, 3, 7, 11, 18, 22, 23, 30, 34, 36, 41)
    found = batches(dataset(4, CountingSource(bad)))
    alone = dataset(4, CountingSource(bad))
    replaced = {}
    for batch in found:
        assert not batch.failed
        for number, key in enumerate(batch.keys):
            stands_for = shown(batch.images[number])
            assert stands_for == shown(alone[key].image)
            if key.image in bad:
                replaced.setdefault((key.epoch, key.image), set()).add(stands_for)
                assert f"noise[{key.image}]" in {entry.path for entry in batch.bad}
            else:
                assert stands_for == key.image
    assert len(replaced) > 3
    assert all(len(images) == 1 and not images & set(bad) for images in replaced.values())
    assert len({next(iter(images)) for images in replaced.values()}) > 1


def test_a_batch_of_one_bad_image_is_not_a_dead_disk_and_one_of_several_is():
    one = dataset(4, CountingSource(bad=(5,)))
    loader = build_train_loader(
        one, [[SampleKey(5, 0, position, 0) for position in range(4)]], loading(0)
    )
    (batch,) = loader
    assert (batch.failed, len(batch.images)) == (False, 4)
    several = dataset(4, CountingSource(bad=(5, 6)))
    keys = [SampleKey(5 + position // 4, 0, position, 0) for position in range(8)]
    (batch,) = build_train_loader(several, [keys], loading(0))
    assert batch.failed


# The setting


def refused(*argv: object) -> str:
    with pytest.raises(InputError) as error:
        load_config(PretrainConfig, "pretrain", ["--dataset", "mnist5k", *map(str, argv)])
    return str(error.value)


def test_a_batch_must_hold_all_samples_of_an_image():
    expected = "batch_size 64 is not a multiple of aug_repeats 3: all samples of an image are in one batch of one process"
    assert expected in refused("--aug_repeats", 3)
    assert "\n" not in refused("--aug_repeats", 3).strip()
    assert "batch_size 2 is not a multiple of aug_repeats 4" in refused("-b", 2, "--aug_repeats", 4)
    assert "expected >= 1, got 0" in refused("--aug_repeats", 0)
    assert load_config(PretrainConfig, "pretrain", ["--dataset", "mnist5k"]).aug_repeats == 1
    argv = ["--dataset", "mnist5k", "--aug_repeats", "4"]
    assert load_config(PretrainConfig, "pretrain", argv).aug_repeats == 4


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """One entry for each file that is decoded."""
    calls: list[int] = []
    for module in (data.sources, data.packs.source):
        monkeypatch.setattr(module, "decode_image", noting(calls, module.decode_image))
    return calls


def noting(calls: list[int], decode: Callable[[Any, int], Tensor]) -> Callable[[Any, int], Tensor]:
    def noted(encoded: Any, number: int) -> Tensor:
        calls.append(number)
        return decode(encoded, number)

    return noted


@pytest.mark.parametrize("packed", [False, True])
def test_a_run_decodes_one_file_for_so_many_samples(tmp_path, decoded, packed):
    """120 pictures, 12 a step, each three times: ten steps and 40 files an epoch."""
    pictures = make_pictures(tmp_path / "pictures")
    where = [*PACKED, "--data_path", pack(pictures, tmp_path / "packed")] if packed else []
    decoded.clear()
    for repeats, files in ((1, 240), (3, 80)):
        decoded.clear()
        result = main_pretrain.main(
            pretraining(pictures, tmp_path / f"run{repeats}", *where, "--aug_repeats", repeats)
        )
        assert (result["step"], len(decoded)) == (20, files)
    first, second = (step_losses(tmp_path / f"run{repeats}") for repeats in (1, 3))
    assert first.keys() == second.keys()
    assert first != second
    rates = [
        [line["lr"] for line in log_lines(tmp_path / f"run{repeats}") if "lr" in line]
        for repeats in (1, 3)
    ]
    assert rates[0] == rates[1]


def test_a_run_on_cifar(tmp_path, monkeypatch):
    spec = CIFAR_ARCHIVES["cifar10"]
    rows = np.random.default_rng(0).integers(0, 10, (5, 12, 1 + 3072), dtype=np.uint8)
    members = [
        member(name, part.tobytes()) for name, part in zip(spec.train_members, rows, strict=True)
    ]
    archive = write_tar(tmp_path / Path(spec.url).name, members)
    archive.write_bytes(gzip.compress(archive.read_bytes()))
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(CIFAR_ARCHIVES, "cifar10", replace(spec, md5=md5))
    monkeypatch.setattr(ArraySource, "read", noting(read := [], ArraySource.read))
    colour = ["--in_chans", 3, "--mean", 0.5, 0.5, 0.5, "--std", 0.2, 0.2, 0.2, "--img_size", 32]
    where = [
        "--dataset",
        "cifar10",
        "--data_path",
        tmp_path,
        "--output_dir",
        tmp_path / "run",
        *colour,
    ]
    result = main_pretrain.main(
        digits(tmp_path / "run", "-b", 12, "--total_batch_size", 12, *where, "--aug_repeats", 4)
    )
    assert (result["step"], len(read)) == (10, 30)  # 60 images: 5 steps an epoch


@pytest.mark.long
def test_a_stopped_run_goes_on_bit_for_bit_and_another_number_is_refused(tmp_path):
    """Stopped within the epochs of one order; resumed in micro-batches."""
    settings = [
        "--aug_repeats",
        4,
        "--log_interval",
        1,
        "--epochs",
        3,
        "--total_batch_size",
        64,
        "--save_epochs",
        1,
    ]
    whole = main_pretrain.main(digits(tmp_path / "whole", *settings))
    main_pretrain.main(digits(tmp_path / "cut", *settings, "--stop_epoch", 2))
    with pytest.raises(InputError, match=r"aug_repeats: 4 -> 2"):
        main_pretrain.main(digits(tmp_path / "cut", *settings, "--aug_repeats", 2))
    main_pretrain.main(digits(tmp_path / "cut", *settings))
    assert whole["step"] == 3 * STEPS_PER_EPOCH
    assert step_losses(tmp_path / "cut") == step_losses(tmp_path / "whole")


@pytest.mark.long
def test_two_processes_equal_one(tmp_path):
    settings = ["--aug_repeats", 4, "--log_interval", 1]
    assert run(command(*digits(tmp_path / "one", *settings))).returncode == 0
    result = launch(
        digits(tmp_path / "two", *settings, "--batch_size", 16, "--num_workers", 1), processes=2
    )
    assert result.returncode == 0, result.stderr
    ours, theirs = step_losses(tmp_path / "one"), step_losses(tmp_path / "two")
    assert ours.keys() == theirs.keys() == set(range(1, 2 * STEPS_PER_EPOCH + 1))
    for step, loss in ours.items():
        assert float.fromhex(loss) == pytest.approx(float.fromhex(theirs[step]), abs=1e-5), step
