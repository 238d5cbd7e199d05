"""`data_on_device`: the batches of the loader, but for a last bit of some pixels, without loader
processes."""

import multiprocessing.process
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from compare import assert_same_run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from runs import Cut, cut_after, loading, pictures, pretraining, step_losses
from test_sampler import COUNT, PICTURES, Spoilt, batches, dataset
from torchvision.transforms import v2

import main_finetune
import main_knn
import main_lincls
import main_pretrain
from data import on_device
from data.images import PixelFormat
from data.loader import LabelledDataset, build_eval_loader
from data.on_device import DecodedSource
from data.sources import ArraySource, FolderSource
from data.transforms import CropAndFlip, EvalTransform
from models.masks import draw_orders
from util.errors import DataError, InputError
from util.rng import derive_seed, derive_seeds
from util.settings.evaluation import FinetuneConfig
from util.settings.read import load_config

ON_DEVICE = ["--data_on_device", "true", "--num_workers", "2"]


def decoded(made):
    """The same data set with its images on the device."""
    return replace(made, source=DecodedSource(made.source, torch.device("cpu"), num_threads=2))


def drawn(crop: CropAndFlip, seeds: range, height: int, width: int) -> np.ndarray:
    stream = torch.Generator()
    return crop.draw_many(map(stream.manual_seed, seeds), height, width)


@given(st.data(), st.integers(1, 6))
def test_seeds_made_together_are_those_made_one_by_one(data, length):
    numbers = st.integers(0, 2**64 - 1) | st.integers(0, 3)
    tuples = data.draw(st.lists(st.tuples(*[numbers] * length), min_size=1, max_size=9))
    tuples += [(*tuples[0][:-1], last) for last in range(3)]  # that share most coordinates
    assert derive_seeds(tuples) == [derive_seed(*of_one) for of_one in tuples]


@pytest.mark.parametrize("crop_min", [0.08, 0.6, 1.0])
@pytest.mark.parametrize("size", [(32, 32), (500, 333), (7, 90), (90, 7), (1, 1)])
def test_crops_drawn_together_are_torchvisions(size, crop_min):
    """Also where most or all of the ten attempts lie outside the image."""
    crop = CropAndFlip(9, crop_min, "bicubic", 0.3)
    theirs = v2.RandomResizedCrop(9, scale=(crop_min, 1.0))
    image = torch.zeros(1, *size, dtype=torch.uint8)
    found = drawn(crop, range(300), *size).T.tolist()
    for seed, (top, left, height, width, flip) in enumerate(found):
        alone = crop.draw(torch.Generator().manual_seed(seed), *size)
        assert alone == (top, left, height, width, flip)
        torch.manual_seed(seed)
        expected = {"top": top, "left": left, "height": height, "width": width}
        assert theirs.make_params([image]) == expected
        assert (torch.rand(1) < 0.3) == flip
    assert 40 < sum(flip for *_, flip in found) < 140


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("side", "out", "channels"),
    [((28, 28), 28, 1), ((32, 32), 32, 3), ((60, 44), 224, 3), ((500, 333), (224, 160), 3)],
)
def test_pixels_are_within_one_step_of_256_of_those_of_single_crops(
    side, out, channels, interpolation, noise
):
    """On 99.9 % of the pixels, and equal on 93 %."""
    chance = np.random.default_rng(0)
    coarse = torch.from_numpy(chance.integers(0, 256, (12, channels, 9, 8)).astype(np.float32))
    images = torch.nn.functional.interpolate(coarse, side, mode="bilinear")
    if noise:
        images = torch.from_numpy(chance.integers(0, 256, images.shape))
    images = images.to(torch.uint8)
    crop = CropAndFlip(out, 0.08, interpolation, 0.5)
    order = [3, 3, *range(11, 0, -1)]
    found = crop.batch(images, order, drawn(crop, range(len(order)), *side))
    expected = []
    for seed, index in enumerate(order):
        torch.manual_seed(seed)
        expected.append(crop(images[index]))
    distance = (found.int() - torch.stack(expected).int()).abs()
    assert found.dtype == torch.uint8
    assert (distance <= 1).double().mean() >= 0.999
    assert (distance == 0).double().mean() >= 0.93
    deep = images.float() / 1.5
    found = crop.batch(deep, order, drawn(crop, range(len(order)), *side))
    for seed, index in enumerate(order):
        torch.manual_seed(seed)
        torch.testing.assert_close(found[seed], crop(deep[index]), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    "made",
    [
        dataset(),
        dataset(shared_mask=True),
        dataset(source=Spoilt(0, 4, 5, 6), aug_repeats=3),
        dataset(draw_orders=partial(draw_orders, "green", (4, 4), 0.75, 2), aug_repeats=3),
        dataset(draw_orders=partial(draw_orders, "block", (4, 4), 0.75, 2), shared_mask=True),
        dataset(source=Spoilt(*range(39))),
        LabelledDataset(Spoilt(3, 8), CropAndFlip(8, 0.2, "bicubic", 0.5), seed=5),
    ],
    ids=["masks", "one mask", "repeats", "green", "one block", "nearly all bad", "labels"],
)
def test_batches_are_those_of_the_loader(made):
    """The same images, replacements, crops, flips, masks and labels."""
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    found, expected = batches(decoded(made)), batches(made)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert any(batch.bad for batch in expected) == isinstance(made.source, Spoilt)
    for one, other in zip(found, expected, strict=True):
        assert (one.keys, one.bad, one.failed) == (other.keys, other.bad, other.failed)
        assert torch.equal(one.targets, other.targets) and one.targets.dtype == torch.int64
        assert one.images.dtype == torch.uint8 and len(one.images) == len(other.images)
        if not one.failed:
            assert (one.images.int() - other.images.int()).abs().max() <= 1


@pytest.mark.parametrize("bad", [(), (5,)])
def test_batches_of_an_evaluation_are_bit_for_bit_those_of_the_loader(bad):
    source = (
        Spoilt(*bad) if bad else ArraySource("noise", PICTURES, np.arange(COUNT), PixelFormat(3))
    )
    on_device = DecodedSource(source, torch.device("cpu"), num_threads=2)
    loaders = [
        build_eval_loader(images, EvalTransform(14, 0.8), 6, 1, 3, loading(0))
        for images in (on_device, source)
    ]
    for one, other in zip(*loaders, strict=True):
        assert torch.equal(one.targets, other.targets)
        assert (one.keys, one.bad, one.failed) == (other.keys, other.bad, other.failed)
        assert one.failed or torch.equal(one.images, other.images)


def test_without_a_process_a_run_goes_on_bit_for_bit(tmp_path, data, monkeypatch):
    """It is cut within an epoch, and monitored."""

    def refuse(_):
        raise AssertionError("a process was started")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    more = [*ON_DEVICE, "--hflip", "0.5", "--monitor_epochs", 1]
    main_pretrain.main(pretraining(data, tmp_path / "whole", *more))
    arguments = pretraining(data, tmp_path / "run", *more)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_after(patch, 13)
        main_pretrain.main(arguments)
    main_pretrain.main(arguments)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert len(step_losses(tmp_path / "run")) == 20
    with pytest.raises(InputError, match="data_on_device: True -> False"):
        main_pretrain.main([*arguments, "--data_on_device", "false", "--epochs", "2"])


def test_evaluations_without_a_process(tmp_path, data, weights, monkeypatch):
    """k-NN has the same result as with a loader; the others, which draw crops, nearly."""

    def results(folder, *more):
        more = ["--finetune", weights, *more]
        knn = main_knn.main(pictures(data, folder / "knn", *more, training=False))
        return knn, *(
            main(pictures(data, folder / main.__module__, *more, "--lr", *lr))["loss"]
            for main, lr in ((main_lincls.main, (0.1, 0.3)), (main_finetune.main, (1e-2,)))
        )

    knn, *losses = results(tmp_path / "loader", "--num_workers", "0")
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", None)
    found, *losses_found = results(tmp_path / "device", *ON_DEVICE)
    assert found == knn and losses_found == pytest.approx(losses, rel=0.02)


def test_images_of_different_sizes_are_refused(tmp_path):
    for name, size in (("a", (6, 4)), ("b", (6, 4)), ("c", (5, 4))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    source = DecodedSource(
        FolderSource(tmp_path, PixelFormat(3)), torch.device("cpu"), num_threads=2
    )
    with pytest.raises(DataError, match=r"width 4 x 6, .*c\.png 4 x 5") as error:
        source.read(0)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_is_refused_before_it_is_decoded(tmp_path, data, monkeypatch):
    """120 x 28 x 28 bytes; the monitor's k-NN has no place of its own here."""
    read: list[int] = []

    def noted(source, index, original=FolderSource.read):
        read.append(index)
        return original(source, index)

    monkeypatch.setattr(FolderSource, "read", noted)
    monkeypatch.setattr(on_device, "free_memory", lambda _: 94_079)
    arguments = pretraining(data, tmp_path / "run", *ON_DEVICE)
    with pytest.raises(InputError, match=r"120 x 1 x 28 x 28 .* 0\.1 MB") as error:
        main_pretrain.main(arguments)
    assert error.value.settings == ("data_on_device",)
    assert set(read) == {0} and not list((tmp_path / "run").glob("config.yaml"))
    monkeypatch.setattr(on_device, "free_memory", lambda _: 94_080)
    assert main_pretrain.main(arguments)["step"] == 20


@pytest.mark.parametrize("flags", ["--auto_augment rand-m9", "--color_jitter 0.4"])
def test_augmentations_of_single_images_are_refused(flags):
    flags = ["--dataset", "mnist5k", "--in_chans", "1", "--mean", "0", "--std", "1", *flags.split()]
    load_config(FinetuneConfig, "finetune", flags)
    with pytest.raises(InputError) as error:
        load_config(FinetuneConfig, "finetune", [*flags, "--data_on_device"])
    assert error.value.settings == ("data_on_device",)
