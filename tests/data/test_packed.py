"""`dataset: packed`: reading at an index, labels, the order of an epoch, and training and
evaluating from shards."""

import json
import os
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from packs import PACKED, Killed, member, pack, patched, png, shards, write_tar
from runs import (
    CLASSES,
    PICTURE_STEPS,
    loading,
    log_lines,
    pictures,
    pretrain_pictures,
    pretraining,
    step_losses,
)
from test_sampler import assert_same_batches, dataset

import engine.loop
import main_finetune
import main_knn
import main_lincls
import main_pretrain
from data.images import BadImageError, PixelFormat
from data.labels import LabelledData, build_labelled_data
from data.packs import index as pack_index
from data.packs import source as packed
from data.packs.shards import index_shard
from data.packs.source import PackedSource
from data.sampler import StepSampler
from data.sources import FolderSource, build_pretrain_source
from engine.pictures.choose import validation_source
from engine.run import batches as batches_module
from util.errors import DataError, InputError


def test_a_pack_shows_the_images_of_the_folder(data, packs):
    source = PackedSource(packs / "train", PixelFormat(3))
    folder = FolderSource(str(data / "train"), PixelFormat(3), prefer_train=False)
    assert len(source) == len(folder) == 120
    names = [folder.name(i).removeprefix(f"{data}/train/").replace("/", "_") for i in range(120)]
    for index in range(120):
        shard, name = source.name(index).removeprefix(f"{packs}/train/").split("/")
        assert re.fullmatch(r"shard-00000\d\.tar", shard)
        of_folder = folder.read(names.index(name.split("-", 1)[1]))
        assert torch.equal(source.read(index), of_folder)
        assert (packs / "train" / shard).read_bytes().count(name.encode()) == 1
    assert PackedSource(packs / "train", PixelFormat(1)).read(7).shape == (1, 28, 28)


def test_the_fingerprint_is_that_of_the_images_not_of_the_shards(tmp_path, data, packs):
    def fingerprint(folder: Path) -> str:
        return PackedSource(folder, PixelFormat(1)).fingerprint()

    first = fingerprint(packs / "train")
    assert fingerprint(pack(data, tmp_path / "one shard", "--shard_mb", 256) / "train") == first
    seen = {first, fingerprint(packs / "val")}
    source = shutil.copytree(data / "train", tmp_path / "in")
    seen.add(fingerprint(pack(source, tmp_path / "unlabelled")))
    (source / "one/003.png").write_bytes((source / "one/004.png").read_bytes())
    seen.add(fingerprint(pack(source, tmp_path / "other content")))
    (source / "one/003.png").unlink()
    seen.add(fingerprint(pack(source, tmp_path / "one less")))
    assert len(seen) == 5


def damage(folder: Path, index: int) -> int:
    """Flips a bit of an image; returns the place of its first byte in its shard."""
    source = PackedSource(folder, PixelFormat(1))
    shard, offset, length, *_ = source.index.entries[index].tolist()
    patched(folder / source.index.shards[shard], offset + length // 2, b"\xff")
    return offset


def bad_reason(source: PackedSource, index: int) -> str:
    with pytest.raises(BadImageError) as error:
        source.read(index)
    return str(error.value)


def test_a_damaged_image_is_a_bad_image_that_names_its_place(own):
    source = PackedSource(own / "train", PixelFormat(1))
    offset = damage(own / "train", 50)
    expected = rf"at byte {offset}, (\d+) of \1 bytes .* crc32 \w{{8}}, expected \w{{8}}$"
    assert re.search(expected, bad_reason(source, 50))
    assert source.read(49).shape == (1, 28, 28)
    path = Path(source.name(119)).parent
    os.truncate(path, int(source.index.entries["offset"][119]) + 5)
    assert " 5 of " in bad_reason(source, 119)
    fresh = PackedSource(own / "val", PixelFormat(1))
    shutil.rmtree(own / "val")
    assert "No such file or directory" in bad_reason(fresh, 0)


def edited(folder: Path, change: Callable[[dict], object]) -> None:
    """Changes what index.json holds."""
    content = json.loads((folder / "index.json").read_text())
    change(content)
    (folder / "index.json").write_text(json.dumps(content))


def of_entries(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Changes what index.npy holds."""
    np.save(folder / "index.npy", change(np.load(folder / "index.npy")))


def longer(entries: np.ndarray) -> np.ndarray:
    """Found before memory is asked for."""
    entries["length"][3] = 2**62
    return entries


SECOND = "shard-000001.tar"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is missing": (lambda folder: (folder / SECOND).unlink(), SECOND),
    "a shard is longer": (lambda folder: (folder / SECOND).open("ab").write(bytes(512)), SECOND),
    "another shard": (
        lambda folder: shutil.copy(folder / "shard-000000.tar", folder / SECOND),
        SECOND,
    ),
    "another name in a shard": (lambda folder: patched(folder / SECOND, 0, b"9", 0), SECOND),
    "fewer entries": (lambda folder: of_entries(folder, lambda all: all[:-1]), "do not fit"),
    "a length": (lambda folder: of_entries(folder, longer), "shard-000000.tar, or damaged"),
    "a pickle": (
        lambda folder: np.save(folder / "names.npy", np.array([None, {}], dtype=object)),
        "cannot be used",
    ),
    "another version": (
        lambda folder: edited(folder, lambda content: content.update(version=2)),
        "do not fit",
    ),
    "a shard elsewhere": (
        lambda folder: edited(folder, lambda content: content["shards"][0].update(name="../x")),
        "do not fit",
    ),
}
for name in ("index.json", "index.npy", "names.npy"):
    DAMAGES[f"no {name}"] = (lambda folder, name=name: (folder / name).unlink(), f"no {name}")
    DAMAGES[f"a damaged {name}"] = (
        lambda folder, name=name: (folder / name).write_bytes(b"{}"),
        "cannot be used",
    )


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_index_that_does_not_fit_its_shards_is_refused(own, damage):
    damaging, named = DAMAGES[damage]
    damaging(own / "train")
    with pytest.raises(DataError) as error:
        PackedSource(own / "train", PixelFormat(1))
    assert str(own / "train") in str(error.value) and named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_on_a_damaged_shard_says_how_to_check_the_data(tmp_path, own):
    shards(own / "train")[1].unlink()
    with pytest.raises(DataError, match=SECOND) as error:
        main_pretrain.main(pretraining(own, tmp_path / "run", *PACKED))
    assert f"tools/check_dataset.py {own}" in error.value.__notes__[0]


def test_a_data_path_without_a_pack_is_refused(tmp_path, data):
    with pytest.raises(InputError, match="data_path .*nowhere") as error:
        build_pretrain_source("packed", str(tmp_path / "nowhere"), PixelFormat(3), False)
    assert not isinstance(error.value, DataError)  # there is nothing to check
    with pytest.raises(DataError, match=r"train has no index\.json"):
        build_pretrain_source("packed", str(data), PixelFormat(3), False)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_processes_that_are_forked_or_spawned_read_the_same(packs, context):
    """Each opens its own files, and is sent no data."""
    source = PackedSource(packs / "train", PixelFormat(1))
    source.read_ahead()
    made = dataset(source=source)
    steps = StepSampler(num_images=120, batch_size=10, seed=0, stop_step=8, block_size=16)
    expected = list(loading(0)(made, batch_sampler=steps))
    assert source.open_shard.cache_info().currsize == 6  # they are open when the processes start
    found = list(loading(2)(made, batch_sampler=steps, multiprocessing_context=context))
    assert_same_batches(found, expected)
    copy = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 500
    assert (copy.reads_ahead, copy.open_shard.cache_info().currsize) == (True, 0)


def test_few_shards_are_open_at_a_time(packs, monkeypatch):
    monkeypatch.setattr(packed, "RECENT", 2)
    source = PackedSource(packs / "train", PixelFormat(1))
    for index in (0, 119, 0, 60, 0, 119):  # of three shards: the one that was used last stays
        source.read(index)
    assert source.open_shard.cache_info() == (2, 4, 2, 2)  # hits, misses, at most and now open


def test_a_block_is_announced_once_and_in_full(packs, monkeypatch):
    """The images of block 2 of 32, which lie in several shards, and nothing before it is asked
    for."""
    announced = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: announced.append(arguments))
    source = PackedSource(packs / "train", PixelFormat(1))
    source.block_size = 32
    source.read(70)
    assert announced == []  # only where all images will be read
    source.read_ahead()
    for index in (70, 64, 95, 70):
        source.read(index)
    shards, offsets, lengths = (
        source.index.entries[n][64:96] for n in ("shard", "offset", "length")
    )
    expected = []
    for shard in np.unique(shards).tolist():
        start, end = offsets[shards == shard][0], (offsets + lengths)[shards == shard][-1]
        descriptor = source.open_shard(shard).fileno()
        expected.append((descriptor, start, end - start, os.POSIX_FADV_WILLNEED))
    assert announced == expected and len(expected) >= 2
    source.read(63)
    assert len(announced) > len(expected)


def labelled(root: Path, num_classes: int | None = None) -> LabelledData:
    return build_labelled_data(
        "packed", str(root), PixelFormat(1), download=False, num_classes=num_classes
    )


def make_pack(folder: Path, labels: list[int | None], class_names: list[str] | None = None) -> None:
    """Shades of grey, each with the shade of ten times its label."""
    members = []
    for number, label in enumerate(labels):
        members.append(member(f"{number}.png", png(number if label is None else 10 * label)))
        members += [] if label is None else [member(f"{number}.cls", str(label).encode())]
    path = write_tar(folder / "a.tar", members)
    pack_index.write_index(folder, [("a.tar", index_shard(path))], class_names)


def test_both_splits_with_the_class_names_of_the_index(packs):
    data = labelled(packs, num_classes=3)
    assert data.class_names == list(CLASSES)
    assert Counter(data.train.labels.tolist()) == {0: 40, 1: 40, 2: 40}
    assert Counter(data.val.labels.tolist()) == {0: 20, 1: 20, 2: 20}
    assert data.train.labels.dtype == np.int64
    for index in range(0, 120, 7):
        assert CLASSES[data.train.labels[index]] in data.train.name(index)
    with pytest.raises(InputError, match="num_classes"):
        labelled(packs, num_classes=4)


CATS_AND_DOGS = ([0, 1], ["cat", "dog"])


@pytest.mark.parametrize(
    ("train", "val", "named"),
    [
        (CATS_AND_DOGS, None, "val/"),
        (None, CATS_AND_DOGS, "train/"),
        (([0, 1],), ([None, None],), "/val must hold images in class folders, or packed from"),
        (([None],), ([None],), "/train must hold images in class folders, or packed from"),
        (([0, 1],), ([0, 0],), "/val must hold"),
        (([0, 1],), ([0, 1, 999_999_999],), "of the 2 classes and of no other"),
        (([0, 2],), ([0, 2],), "image: ['1'], labels without a class: [2]"),
        (CATS_AND_DOGS, ([0, 1, 999_999_999],), "labels without a class: [999999999]"),
        (CATS_AND_DOGS, ([0, 1], ["cat", "mouse"]), "are ['dog'], and only in val/ ['mouse']"),
        (CATS_AND_DOGS, ([0, 0], ["cat", "dog"]), "classes without an image: ['dog']"),
    ],
)
def test_packs_that_evaluation_cannot_take_are_refused(tmp_path, train, val, named):
    for split, content in (("train", train), ("val", val)):
        if content is not None:
            make_pack(tmp_path / split, *content)
    with pytest.raises(InputError) as error:
        labelled(tmp_path)
    assert named in str(error.value)


def test_classes_without_names_are_called_by_their_labels(tmp_path):
    make_pack(tmp_path / "train", [2, 0, 1, 0])
    make_pack(tmp_path / "val", [0, 1, 2])
    assert labelled(tmp_path).class_names == ["0", "1", "2"]
    names = ["cat", "dog", "cow"]
    make_pack(tmp_path / "val", [0, 1, 2], names)
    assert labelled(tmp_path).class_names == names  # one split's names are both splits'


def test_images_without_a_label_are_left_out_of_evaluation(tmp_path, caplog):
    make_pack(tmp_path / "train", [2, None, 0, None, 1])
    make_pack(tmp_path / "val", [0, 1, 2])
    data = labelled(tmp_path)
    assert (len(data.train), data.train.labels.tolist()) == (3, [2, 0, 1])
    assert [int(data.train.read(index)[0, 0, 0]) for index in range(3)] == [20, 0, 10]
    assert f"{tmp_path}/train: 2 images" in caplog.text
    assert len(build_pretrain_source("packed", str(tmp_path), PixelFormat(1), False)) == 5


def test_pictures_are_made_of_the_validation_images_or_else_all(tmp_path, packs, data):
    def shown(root: Path) -> tuple[int, Path]:
        source = validation_source("packed", str(root), PixelFormat(1))
        return len(source), Path(source.name(0)).parent.parent

    assert shown(packs) == (60, packs / "val")
    flat = pack(data / "val", tmp_path / "flat")
    assert shown(flat) == (60, flat)
    shutil.copytree(packs / "train", tmp_path / "half/train")
    assert shown(tmp_path / "half") == (120, tmp_path / "half/train")
    make_pack(tmp_path / "half/val", [None])  # labels are not needed
    assert shown(tmp_path / "half") == (1, tmp_path / "half/val")


@pytest.fixture
def small_blocks(monkeypatch) -> list[int]:
    """Blocks of 8, 4 to a group; collects the block sizes that runs take."""
    monkeypatch.setattr(PackedSource, "block_size", 8)
    monkeypatch.setattr("data.sampler.GROUP", 4)
    taken = []

    class Seen(StepSampler):
        def __init__(self, **settings):
            super().__init__(**settings)
            taken.append(self.block_size)

    monkeypatch.setattr(batches_module, "StepSampler", Seen)
    return taken


def test_a_run_killed_within_an_epoch_goes_on_bit_for_bit(
    tmp_path, packs, small_blocks, monkeypatch
):
    """Saved at every line; the process ends in place of step 16, the checkpoint is of step 15 of
    20. It goes on with loader processes, after a move to another folder."""
    pretrain_pictures(packs, tmp_path / "whole", *PACKED)
    original, taken = engine.loop.optimizer_step, []

    def counted(*arguments, **keywords):
        taken.append(None)
        if len(taken) == 16:
            raise Killed
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(engine.loop, "optimizer_step", counted)
        often = ("--save_minutes", 1e-9, "--log_interval", 5)
        pretrain_pictures(packs, tmp_path / "parts", *PACKED, *often)
    assert (tmp_path / "parts/checkpoint-00000015.pth").exists()
    moved = shutil.copytree(packs, tmp_path / "moved")
    pretrain_pictures(moved, tmp_path / "parts", *PACKED, "--num_workers", 2)
    losses, of_parts = step_losses(tmp_path / "whole"), step_losses(tmp_path / "parts")
    assert len(set(losses.values())) == 2 * PICTURE_STEPS
    assert {step: of_parts[step] for step in range(16, 21)} == {
        step: losses[step] for step in range(16, 21)
    }
    whole, parts = (tmp_path / f"{name}/model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    assert small_blocks == [8, 8, 8]


def test_a_run_on_other_images_is_not_gone_on_with(tmp_path, packs, data):
    pretrain_pictures(packs, tmp_path / "run", *PACKED, "--stop_epoch", 1)
    with pytest.raises(InputError, match="dataset: packed -> folder"):
        pretrain_pictures(data, tmp_path / "run")
    source = shutil.copytree(data, tmp_path / "in")
    shutil.copy(source / "train/one/001.png", source / "train/one/002.png")
    other = pack(source, tmp_path / "other")
    with pytest.raises(InputError, match="images: .*120.* -> .*120"):
        pretrain_pictures(other, tmp_path / "run", *PACKED)


def test_the_evaluations_take_a_pack(tmp_path, data, packs, weights):
    """k-NN sees the same images as in the folder, in another order, which decides ties."""
    arguments = ["--finetune", weights, "--ks", 1, 5]
    by_folder = main_knn.main(pictures(data, tmp_path / "folder", *arguments, training=False))
    results = main_knn.main(pictures(packs, tmp_path / "knn", *PACKED, *arguments, training=False))
    assert results["acc1_by_k"] == pytest.approx(by_folder["acc1_by_k"], abs=100 / 60 + 1e-6)
    assert results["acc1"] > 65  # 33.3 is chance
    assert (results["dataset"], results["num_train"], results["num_samples"]) == ("packed", 120, 60)
    learn = ["--crop_min", 0.8, "--epochs", 8, "--warmup_epochs", 1, "--finetune", weights]
    linear = main_lincls.main(pictures(packs, tmp_path / "lincls", *PACKED, *learn, "--lr", 0.3, 3))
    assert linear["acc1"] > 65
    assert (linear["num_train"], linear["num_held_out"]) == (108, 12)
    gentle = ["--lr", 0.1, "--label_smoothing", 0, "--drop_path_rate", 0, "--clip_grad", 1]
    tuned = main_finetune.main(
        pictures(packs, tmp_path / "finetune", *PACKED, *learn, *gentle, "--per_class")
    )
    assert tuned["acc1"] > 65
    assert list(tuned["per_class"]) == list(CLASSES)


def test_the_order_by_blocks_reaches_every_stage_and_only_there(
    tmp_path, packs, data, weights, small_blocks
):
    """A part of a pack keeps its blocks, too."""
    learn = ["--epochs", 1, "--warmup_epochs", 0, "--finetune", weights]
    main_lincls.main(pictures(packs, tmp_path / "1", *PACKED, *learn, "--lr", 0.3))
    main_lincls.main(pictures(packs, tmp_path / "2", *PACKED, *learn, "--lr", 0.3, 3))
    main_finetune.main(pictures(packs, tmp_path / "3", *PACKED, *learn))
    main_lincls.main(pictures(data, tmp_path / "4", *learn, "--lr", 0.3, 3))
    assert small_blocks == [8, 8, 8, 1]


@pytest.mark.parametrize("has_labels", [True, False])
def test_the_monitor_looks_at_a_pack(tmp_path, packs, data, has_labels):
    """With labels it classifies; without, it draws."""
    root = packs if has_labels else pack(data / "train", tmp_path / "flat")
    looking = ["--monitor_epochs", 1, "--monitor_images", 3]
    pretrain_pictures(root, tmp_path / "run", *PACKED, *looking)
    looks = [line for line in log_lines(tmp_path / "run") if "monitor_s" in line]
    assert [look["epoch"] for look in looks] == [0, 1, 2]
    assert all(("knn_acc1" in look) == has_labels and "psnr" in look for look in looks)


def test_a_damaged_image_is_replaced_in_training_and_stops_evaluation(tmp_path, own, weights):
    damaged = PackedSource(own / "train", PixelFormat(1)).name(50)
    where = f"at byte {damage(own / 'train', 50)}"
    pretrain_pictures(own, tmp_path / "run", *PACKED)
    (line,) = (tmp_path / "run/bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == damaged
    assert where in json.loads(line)["reason"]
    assert log_lines(tmp_path / "run")[-1]["step"] == 2 * PICTURE_STEPS
    with pytest.raises(InputError, match=where):
        knn = pictures(own, tmp_path / "knn", *PACKED, "--finetune", weights, training=False)
        main_knn.main(knn)
    where = f"at byte {damage(own / 'val', 33)}"
    tune = ["--finetune", weights, "--epochs", 1, "--warmup_epochs", 0]
    with pytest.raises(InputError, match=where):
        main_finetune.main(pictures(own, tmp_path / "tune", *PACKED, *tune))
