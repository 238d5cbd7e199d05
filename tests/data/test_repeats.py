"""`aug_repeats`: several samples of each decoded image, as exact as one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from packs import PACKED, pack
from runs import (
    STEPS_PER_EPOCH,
    digits,
    loading,
    log_lines,
    make_pictures,
    pretraining,
    step_losses,
)
from test_sampler import PICTURES, assert_same_batches, batches, dataset
from torch import Tensor

import data.packs.source
import data.sources
import main_pretrain
from data.images import BadImageError
from data.loader import PretrainDataset, build_train_loader
from data.sampler import SampleKey
from data.sources import ArraySource
from util.errors import InputError
from util.settings.pretrain import PretrainConfig
from util.settings.read import load_config


class CountingSource(ArraySource):
    """Notes which images are decoded; some are bad. Image i is filled with i if `flat`."""

    def __init__(self, bad: tuple[int, ...] = (), flat: bool = False):
        shades = np.arange(len(PICTURES), dtype=np.uint8)[:, None, None, None]
        images = shades + 0 * PICTURES if flat else PICTURES
        super().__init__("noise", images, np.arange(len(images)), 3)
        self.bad = bad
        self.decoded: list[int] = []

    def read(self, index: int) -> Tensor:
        self.decoded.append(index)
        if index in self.bad:
            raise BadImageError("spoiled")
        return super().read(index)


def repeated(repeats: int, bad: tuple[int, ...] = (), flat: bool = False) -> PretrainDataset:
    return dataset(source=CountingSource(bad, flat), aug_repeats=repeats)


@pytest.mark.parametrize("repeats", [1, 2, 4])
def test_an_image_is_decoded_once_for_all_its_samples(repeats):
    made = repeated(repeats)
    found = batches(made)
    assert made.source.decoded == [key.image for batch in found for key in batch.keys[::repeats]]
    assert len(made.source.decoded) == 9 * 12 // repeats


def test_workers_prefetching_and_restarts_change_nothing():
    bad = (4, 5, 6)
    expected = batches(repeated(3, bad))
    assert any(batch.bad for batch in expected)
    assert_same_batches(batches(repeated(3, bad), 2), expected)
    tail = batches(repeated(3, bad), 1, start_step=4, prefetch_factor=5)
    assert_same_batches(tail, expected[4:])


def test_the_samples_of_a_bad_file_share_one_replacement():
    bad = (1, 2, 3, 7, 11, 18, 22, 23, 30, 34, 36)
    alone = repeated(4, bad, flat=True)
    replaced: dict[tuple[int, int], set[int]] = {}
    for batch in batches(repeated(4, bad, flat=True)):
        assert not batch.failed
        for image, key in zip(batch.images, batch.keys, strict=True):
            shown = int(image[0, 0, 0])
            assert shown == int(alone[key].image[0, 0, 0])
            if key.image in bad:
                replaced.setdefault((key.epoch, key.image), set()).add(shown)
                assert f"noise[{key.image}]" in {entry.path for entry in batch.bad}
            else:
                assert shown == key.image
    assert len(replaced) > 3
    assert all(len(images) == 1 and not images & set(bad) for images in replaced.values())
    assert len(set.union(*replaced.values())) > 1


@pytest.mark.parametrize(("images", "failed"), [([5], False), ([5, 6], True)])
def test_a_batch_of_one_bad_image_has_not_failed_and_one_of_several_has(images, failed):
    keys = [SampleKey(image, 0, 4 * n + i, 0) for n, image in enumerate(images) for i in range(4)]
    (batch,) = build_train_loader(repeated(4, bad=(5, 6)), [keys], loading(0))
    assert (batch.failed, len(batch.images)) == (failed, 0 if failed else 4)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--aug_repeats", 3], "batch_size 64 .* aug_repeats 3"),
        (["-b", 2, "--aug_repeats", 4], "batch_size 2 .* aug_repeats 4"),
        (["--aug_repeats", 0], "aug_repeats"),
    ],
)
def test_a_batch_must_hold_all_samples_of_an_image(flags, named):
    with pytest.raises(InputError, match=named):
        load_config(PretrainConfig, "pretrain", ["--dataset", "mnist5k", *map(str, flags)])


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
def test_a_run_decodes_one_file_for_all_its_samples(tmp_path, decoded, packed):
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
