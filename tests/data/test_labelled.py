"""Labelled data: what a folder must look like, which label an image gets, and fixed choices of a
part of it."""

import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from runs import loading
from test_listing import touch
from test_sampler import Spoilt, drawing, global_states

from data.images import PixelFormat
from data.labels import LabelledData, Subset, build_labelled_data, stratified_choice, take_subset
from data.loader import LabelledDataset
from data.sampler import SampleKey, StepSampler
from data.sources import ArraySource
from data.transforms import CropAndFlip
from util.errors import InputError
from util.rng import seed_libraries


def read(root: Path, num_classes: int | None = None) -> LabelledData:
    return build_labelled_data(
        "folder", str(root), PixelFormat(3), download=False, num_classes=num_classes
    )


def listed(source) -> list[tuple[str, int]]:
    """(path below the split, label) of every image."""
    root = (source.source if isinstance(source, Subset) else source).root
    names = [source.name(index).removeprefix(f"{root}/") for index in range(len(source))]
    return list(zip(names, source.labels.tolist(), strict=True))


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        # classes are numbered in the order of their names
        (
            ["dog/1.jpg", "cat/2.jpg", "cat/1.jpg", "Zebra/1.png", "10/a.gif"],
            {"10": 0, "Zebra": 1, "cat": 2, "dog": 3},
        ),
        # the first folder is the class, however deep an image lies
        (["a/b/1.jpg", "a/b/c/2.jpg", "a/train/3.jpg", "b/a/4.jpg", "b/5.jpg"], {"a": 0, "b": 1}),
        # a slash sorts behind a space and a hyphen, so names are not in the order of the paths
        (
            ["cat/1.jpg", "cat-big/1.jpg", "cat big/1.jpg", "cats/1.jpg"],
            {"cat": 0, "cat big": 1, "cat-big": 2, "cats": 3},
        ),
        # what is hidden is no class and no image
        (["a/1.jpg", ".git/2.jpg", "a/.cache/3.jpg", "a/.4.jpg", "a/notes.txt"], {"a": 0}),
        (["a/1.jpg", "@eaDir/2.jpg", "__MACOSX/3.jpg", "lost+found/4.jpg"], {"a": 0}),
    ],
)
def test_the_label_is_the_place_of_the_first_folder_among_the_names(tmp_path, names, labels):
    for split in ("train", "val"):
        touch(tmp_path, *(f"{split}/{name}" for name in names))
    data = read(tmp_path, num_classes=len(labels))
    images = sorted(name for name in names if name.split("/")[0] in labels)
    images = [name for name in images if "/." not in name and ".txt" not in name]
    for source in (data.train, data.val):
        assert listed(source) == [(name, labels[name.split("/")[0]]) for name in images]
        assert source.labels.dtype == np.int64
    assert data.class_names == list(labels)


def test_linked_classes_are_followed(tmp_path):
    touch(
        tmp_path,
        "elsewhere/cats/1.jpg",
        "all/train/dog/1.jpg",
        "all/val/dog/1.jpg",
        "all/val/cat/2.jpg",
    )
    (tmp_path / "all/train/cat").symlink_to(tmp_path / "elsewhere/cats")
    assert listed(read(tmp_path / "all").train) == [("cat/1.jpg", 0), ("dog/1.jpg", 1)]


BOTH = [f"{split}/{name}/1.jpg" for split in ("train", "val") for name in "ab"]
# the files of a data set, and what the message names
WRONG_LAYOUTS = {
    "nothing": ([], "data_path {root}"),
    "no train": (["val/a/1.jpg"], "{root} has no train/"),
    "no val": (["train/a/1.jpg"], "{root} has no val/"),
    "neither": (["a/1.jpg"], "{root} has no train/"),
    "train is a file": (["train", "val/a/1.jpg"], "{root} has no train/"),
    "no classes in val": (
        ["train/a/1.jpg", "val/1.jpg", "val/.b/1.jpg"],
        "only in train/ are ['a']",
    ),
    "no classes": (["train/1.jpg", "val/1.jpg"], "{root}/train must hold images in class folders"),
    "more in val": ([*BOTH, "val/dog/1.jpg", "val/cat/1.jpg"], "only in val/ ['cat', 'dog']"),
    "another case": (["train/Dog/1.jpg", "val/dog/1.jpg"], "['Dog'], and only in val/ ['dog']"),
    "seven more": ([*BOTH, *(f"train/{n}/1.jpg" for n in range(7))], "['0', '1', '2', '3', '4']"),
    "an empty class": (
        [*BOTH, "val/cat/notes.txt", "train/cat/1.jpg"],
        "{root}/val must hold images in class folders, or packed from class folders, of each of "
        "the 3 classes and of no other; classes without an image: ['cat']",
    ),
    "a class of hidden files": ([*BOTH, "val/c/1.jpg", "train/c/.1.jpg"], "an image: ['c']"),
    "no image in train": (["train/a/notes.txt", "val/a/1.jpg"], "{root}/train"),
    "only a stray image": (["train/1.jpg", "train/a/notes.txt", "val/a/1.jpg"], "image: ['a']"),
}


@pytest.mark.parametrize("layout", WRONG_LAYOUTS)
def test_wrong_layouts_are_refused(tmp_path, layout):
    names, named = WRONG_LAYOUTS[layout]
    touch(tmp_path / "data", *names)
    with pytest.raises(InputError) as error:
        read(tmp_path / "data")
    assert named.format(root=tmp_path / "data") in str(error.value)
    assert "\n" not in str(error.value)


E_ACUTE = ("\u00e9", "e\u0301")  # the same letter in one character and in two


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (
            [*(f"{s}/{n}/1.jpg" for s in ("train", "val") for n in E_ACUTE)],
            "in {root}/train differ",
        ),
        ([f"train/{E_ACUTE[0]}/1.jpg", f"val/{E_ACUTE[1]}/1.jpg"], "form only"),
        (BOTH, "the class folders ['a', 'link'] in {root}/train are one folder"),
    ],
)
def test_names_that_look_the_same_and_links_are_said_as_that(tmp_path, names, named):
    touch(tmp_path, *names)
    if names == BOTH:
        (tmp_path / "train/link").symlink_to(tmp_path / "train/a")
    with pytest.raises(InputError) as error:
        read(tmp_path)
    assert named.format(root=tmp_path) in str(error.value)
    if names != BOTH:
        assert "\\xe9" in str(error.value)  # so that the difference can be seen


@pytest.mark.parametrize("given", [1, 3, 1000])
def test_a_number_of_classes_that_the_data_does_not_have_is_refused(tmp_path, given):
    touch(tmp_path, *BOTH)
    with pytest.raises(InputError, match=f"num_classes is {given} .* 2 classes"):
        read(tmp_path, num_classes=given)


@pytest.mark.parametrize("folder", ["train/a/deep", "val/b", "train", "val"])
def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch, folder):
    """Permissions do not stop the superuser, so the system's answer is made up."""
    touch(tmp_path, *(f"{split}/{name}/deep/1.jpg" for split in ("train", "val") for name in "ab"))
    closed = str(tmp_path / folder)

    def maybe(path=".", original=os.scandir):
        if os.fspath(path) == closed:
            raise PermissionError(13, "Permission denied", closed)
        return original(path)

    monkeypatch.setattr(os, "scandir", maybe)
    with pytest.raises(InputError, match=f"{closed}: Permission denied"):
        read(tmp_path)


LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [100, 50, 31, 17, 2]))  # 200


@given(st.integers(5, 200), st.integers(0, 99))
def test_a_choice_holds_each_class_in_proportion(count, seed):
    before = global_states()
    chosen = stratified_choice(LABELS, count, seed)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    quota = np.bincount(LABELS[chosen], minlength=5)
    exact = np.array([100, 50, 31, 17, 2]) * count / 200
    assert quota.sum() == count and (np.abs(quota - exact) < 1).all()
    assert np.array_equal(stratified_choice(LABELS, count, seed), chosen)
    assert global_states() == before


def test_quotas_by_hand():
    """200 images, 20 asked for: 10, 5, 3.1, 1.7, 0.2; the missing one goes to the class of the
    largest rest."""
    quota = np.bincount(LABELS[stratified_choice(LABELS, 20, 0)], minlength=5)
    assert quota.tolist() == [10, 5, 3, 2, 0]
    # 10 of 40: 2.5 each; of equal rests chance gives one more, by the seed
    equal = np.repeat(np.arange(4), 10)
    quotas = [tuple(np.bincount(equal[stratified_choice(equal, 10, seed)])) for seed in range(12)]
    assert {tuple(sorted(quota)) for quota in quotas} == {(2, 2, 3, 3)} and len(set(quotas)) > 2
    many = np.repeat(np.arange(1000), 5)  # fewer than classes: not the first ones
    assert 400 < np.mean(many[stratified_choice(many, 500, 0)]) < 600


def test_another_seed_chooses_others_and_the_same_seed_the_same():
    labels = np.repeat(np.arange(10), 400)
    chosen = [tuple(stratified_choice(labels, 400, seed).tolist()) for seed in (0, 1, 2, 0)]
    assert chosen[0] == chosen[3]
    assert len(set(chosen)) == 3
    assert len(set(chosen[0]) & set(chosen[1])) < 80  # 40 by chance
    # not the first ones of each class
    assert len([index for index in chosen[0] if index % 400 < 40]) < 80


def source_of(labels: np.ndarray) -> ArraySource:
    """Image i is filled with i."""
    images = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1) * np.ones(
        (1, 3, 6, 6), dtype=np.uint8
    )
    return ArraySource("shades", images, labels, PixelFormat(3))


def test_a_subset_keeps_images_with_their_labels():
    source = source_of(LABELS)
    subset = take_subset(source, 50, seed=4)
    assert isinstance(subset, Subset)
    assert len(subset) == len(subset.labels) == 50
    for index in range(50):
        image = int(subset.read(index)[0, 0, 0])
        assert subset.labels[index] == LABELS[image]
        assert subset.name(index) == f"shades[{image}]"
    assert subset.fingerprint() == source.fingerprint()
    nested = Subset(subset, np.array([3, 1]))
    assert [nested.name(0), nested.name(1)] == [subset.name(3), subset.name(1)]
    assert nested.labels.tolist() == subset.labels[[3, 1]].tolist()
    assert take_subset(source, None, seed=4) is source


def test_subsets_of_impossible_size_are_refused_with_the_numbers():
    source = source_of(LABELS)
    assert (len(take_subset(source, 5, 0)), len(take_subset(source, 200, 0))) == (5, 200)
    for count in (1, 4, 201):
        with pytest.raises(InputError, match=f"subset {count} .* 5 classes .* 200 training"):
            take_subset(source, count, 0)
    source.labels = np.resize(np.arange(64)[:, None] >> np.arange(6) & 1, (200, 6))
    assert len(take_subset(source, 20, 0)) == 20  # of 64 combinations of labels


def test_a_replaced_image_brings_its_own_label():
    bad = set(range(0, 40, 2))
    dataset = LabelledDataset(Spoilt(*bad), torch.clone, seed=0)
    replaced = set()
    for epoch, position in itertools.product(range(4), range(40)):
        sample = dataset[SampleKey(position, epoch, position, 0)]
        image = int(sample.image[0, 0, 0])
        assert sample.target.item() == 2 * image
        assert (sample.target.dtype, sample.target.shape) == (torch.int64, ())
        assert image not in bad and (image == position) == (position not in bad)
        if position in bad:
            assert sample.bad[0].path == f"shades[{position}]"
            replaced.add((position, image))
    assert len(replaced) > 40  # of 80: another one in another epoch


def test_an_image_is_a_function_of_seed_epoch_and_position():
    def made(seed: int, epoch: int, position: int, step: int = 0) -> bytes:
        dataset = LabelledDataset(Spoilt(), drawing, seed)
        return dataset[SampleKey(0, epoch, position, step)].image.numpy().tobytes()

    everything = [
        (seed, epoch, position) for seed in range(2) for epoch in range(3) for position in range(4)
    ]
    before = global_states()
    first = [made(*coordinates) for coordinates in everything]
    assert global_states() == before
    seed_libraries(1)
    assert [made(*coordinates) for coordinates in reversed(everything)] == first[::-1]
    assert len(set(first)) == 24
    for generator in range(3):  # each of the three is seeded, and by the sample
        assert len({pixels[64 * generator] for pixels in first}) > 12
    # another total batch size gives the same crop
    assert made(0, 1, 2, step=9) == made(0, 1, 2, step=3)


def test_the_usual_transform_keeps_labels_and_images_together(tmp_path, caplog):
    """Through files: a class's images have its colour, before and after crop and flip. Stray images
    are left out with a warning."""
    names = sorted(["übung", "日本", "💡", os.fsdecode(b"caf\xe9")])
    for split, name in itertools.product(("train", "val"), names):
        (tmp_path / split / name).mkdir(parents=True)
        for number in range(3):
            image = Image.new("RGB", (9 + number, 8), (60 * names.index(name), 0, 0))
            image.save(tmp_path / split / name / f"{number}.png")
    shutil.copy(tmp_path / "val" / names[0] / "0.png", tmp_path / "train/stray.png")
    data = read(tmp_path)
    assert data.class_names == names
    assert f"{tmp_path}/train: 1 images" in caplog.text
    assert "left out where labels are needed" in caplog.text  # pretraining takes them
    assert data.train.fingerprint() != data.val.fingerprint()
    for source in (data.train, data.val):
        dataset = LabelledDataset(source, CropAndFlip(8, 0.2, "bicubic", 0.5), seed=0)
        steps = StepSampler(num_images=len(source), batch_size=4, seed=0, stop_step=3)
        for batch in loading(0)(dataset, batch_sampler=steps):
            assert batch.images.shape == (4, 3, 8, 8)
            assert (batch.images[:, 0, 0, 0] // 60).tolist() == batch.targets.tolist()
