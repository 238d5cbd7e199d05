"""`aug_repeats`: several samples of each decoded image, as exact as one."""

import shlex

import pytest
from packs import PACKED, pack
from runs import STEPS_PER_EPOCH, digits, log_lines, pretraining, step_losses
from test_sampler import Spoilt, batches, dataset
from torch import Tensor

import main_pretrain
from data import sources
from data.packs import source as packs_source
from util.errors import InputError
from util.settings.pretrain import PretrainConfig
from util.settings.read import load_config


def test_the_samples_of_a_bad_file_share_one_replacement():
    bad = (1, 2, 3, 7, 11, 18, 22, 23, 30, 34, 36)
    made = dataset(source=Spoilt(*bad), aug_repeats=4)
    replaced: dict[tuple[int, int], set[int]] = {}
    for batch in batches(made):
        assert not batch.failed
        for image, key in zip(batch.images, batch.keys, strict=True):
            shown = int(image[0, 0, 0])
            assert shown == int(made[key].image[0, 0, 0])
            if key.image in bad:
                replaced.setdefault((key.epoch, key.image), set()).add(shown)
                assert f"shades[{key.image}]" in {entry.path for entry in batch.bad}
            else:
                assert shown == key.image
    assert len(replaced) > 3
    assert all(len(images) == 1 and not images & set(bad) for images in replaced.values())
    assert len(set.union(*replaced.values())) > 1


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


@pytest.mark.parametrize("packed", [False, True])
def test_a_run_decodes_one_file_for_all_its_samples(tmp_path, data, monkeypatch, packed):
    """120 pictures, 12 a step, each three times: ten steps and 40 files an epoch."""
    where = [*PACKED, "--data_path", pack(data, tmp_path / "packed")] if packed else []
    module, decoded = (packs_source if packed else sources), []

    def noted(encoded: bytes, *more, decode=module.decode_image) -> Tensor:
        decoded.append(encoded)
        return decode(encoded, *more)

    monkeypatch.setattr(module, "decode_image", noted)
    losses, rates = [], []
    for repeats, files in ((1, 240), (3, 80)):
        decoded.clear()
        output = tmp_path / f"run{repeats}"
        main_pretrain.main(pretraining(data, output, *where, "--aug_repeats", repeats))
        assert len(decoded) == 1 + files  # the first is looked at before the training
        losses.append(step_losses(output))
        rates.append([line["lr"] for line in log_lines(output) if "lr" in line])
    assert losses[0].keys() == losses[1].keys() == set(range(1, 21))
    assert losses[0] != losses[1]
    assert rates[0] == rates[1]


@pytest.mark.long
def test_a_stopped_run_goes_on_bit_for_bit_and_another_number_is_refused(tmp_path):
    """Stopped within the epochs of one order; resumed in micro-batches."""
    settings = shlex.split(
        "--aug_repeats 4 --log_interval 1 --epochs 3 --total_batch_size 64 --save_epochs 1"
    )
    whole = main_pretrain.main(digits(tmp_path / "whole", *settings))
    main_pretrain.main(digits(tmp_path / "cut", *settings, "--stop_epoch", 2))
    with pytest.raises(InputError, match=r"aug_repeats: 4 -> 2"):
        main_pretrain.main(digits(tmp_path / "cut", *settings, "--aug_repeats", 2))
    main_pretrain.main(digits(tmp_path / "cut", *settings))
    assert whole["step"] == 3 * STEPS_PER_EPOCH
    assert step_losses(tmp_path / "cut") == step_losses(tmp_path / "whole")
