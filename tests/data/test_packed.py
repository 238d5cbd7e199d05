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
    launch,
    loading,
    log_lines,
    make_pictures,
    pictures,
    pretrain_pictures,
    pretraining,
    step_losses,
)
from test_sampler import dataset

import engine.loop
import main_finetune
import main_knn
import main_lincls
import main_pretrain
from data.images import BadImageError
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


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """120 + 60 digits of 3 classes."""
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def packs(tmp_path_factory, data) -> Path:
    """The same, packed into six and three shards."""
    return pack(data, tmp_path_factory.mktemp("packs") / "digits")


@pytest.fixture
def own(tmp_path, packs) -> Path:
    """A copy to spoil."""
    return shutil.copytree(packs, tmp_path / "own")


def test_a_pack_shows_the_images_of_the_folder(data, packs):
    source, folder = (
        PackedSource(packs / "train", 3),
        FolderSource(str(data / "train"), 3, prefer_train=False),
    )
    assert len(source) == len(folder) == 120
    by_name = {
        folder.name(i).removeprefix(f"{data}/train/").replace("/", "_"): folder.read(i)
        for i in range(120)
    }
    for index in range(120):
        shard, name = source.name(index).removeprefix(f"{packs}/train/").split("/")
        assert re.fullmatch(r"shard-00000\d\.tar", shard)
        assert torch.equal(source.read(index), by_name[name.split("-", 1)[1]])
        assert (packs / "train" / shard).read_bytes().count(name.encode()) == 1
    assert PackedSource(packs / "train", 1).read(7).shape == (1, 28, 28)


def test_the_fingerprint_is_that_of_the_images_not_of_the_shards(tmp_path, data, packs):
    def fingerprint(folder: Path) -> str:
        return PackedSource(folder, 1).fingerprint()

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


def place_of(folder: Path, index: int) -> tuple[Path, int, int]:
    """Shard, offset and length of an image."""
    source = PackedSource(folder, 1)
    entry = source.index.entries[index]
    return (
        folder / source.index.shards[entry["shard"]].name,
        int(entry["offset"]),
        int(entry["length"]),
    )


def flip_bit(folder: Path, index: int) -> str:
    """Damages an image; returns how a message should name the place."""
    path, offset, length = place_of(folder, index)
    content = bytearray(path.read_bytes())
    content[offset + length // 2] ^= 4
    path.write_bytes(content)
    return f"{path.name} at byte {offset}, member {Path(PackedSource(folder, 1).name(index)).name}"


def bad_reason(source: PackedSource, index: int) -> str:
    with pytest.raises(BadImageError) as error:
        source.read(index)
    return str(error.value)


def test_a_damaged_image_is_a_bad_image_that_names_its_place(own):
    folder = own / "train"
    source = PackedSource(folder, 1)
    where = flip_bit(folder, 50)
    assert re.search(rf"{where}.* crc32 \w{{8}}, expected \w{{8}}$", bad_reason(source, 50))
    assert source.read(49).shape == (1, 28, 28)
    path, offset, length = place_of(folder, 60)
    os.truncate(path, offset + length - 1)
    expected = rf"cut off: {path.name} at byte {offset}, .* {length - 1} of {length} bytes"
    assert re.search(expected, bad_reason(source, 60))
    fresh = PackedSource(own / "val", 1)
    shards(own / "val")[0].unlink()
    assert "shard-000000.tar at byte 512, member 0" in bad_reason(fresh, 0)


def test_a_length_in_the_index_is_checked_before_memory_is_asked_for(own):
    entries = np.load(own / "train/index.npy")
    entries["length"][3] = 2**62
    np.save(own / "train/index.npy", entries)
    assert "behind the shard" in bad_reason(PackedSource(own / "train", 1), 3)


def edited(folder: Path, change: Callable[[dict], object]) -> None:
    """Changes what index.json holds."""
    content = json.loads((folder / "index.json").read_text())
    change(content)
    (folder / "index.json").write_text(json.dumps(content))


SECOND = "shard-000001.tar"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is missing": (lambda folder: (folder / SECOND).unlink(), SECOND),
    "a shard is longer": (lambda folder: (folder / SECOND).open("ab").write(bytes(512)), SECOND),
    "another shard": (
        lambda folder: shutil.copy(folder / "shard-000000.tar", folder / SECOND),
        SECOND,
    ),
    "another name in a shard": (lambda folder: patched(folder / SECOND, 0, b"9", 0), SECOND),
    "fewer entries": (
        lambda folder: np.save(folder / "index.npy", np.load(folder / "index.npy")[:-1]),
        "do not fit",
    ),
    "a pickle": (
        lambda folder: np.save(folder / "names.npy", np.array([None, {}], dtype=object)),
        "is damaged",
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
        "is damaged",
    )


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_index_that_does_not_fit_its_shards_is_refused(own, damage):
    damaging, named = DAMAGES[damage]
    damaging(own / "train")
    with pytest.raises(DataError) as error:
        PackedSource(own / "train", 1)
    assert str(own / "train") in str(error.value)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_on_a_damaged_shard_says_how_to_check_the_data(tmp_path, own):
    shards(own / "train")[1].unlink()
    with pytest.raises(DataError, match=SECOND) as error:
        main_pretrain.main(pretraining(own, tmp_path / "run", *PACKED))
    assert f"tools/check_dataset.py {own}" in error.value.__notes__[0]


def test_a_data_path_without_a_pack_is_refused(tmp_path, data):
    with pytest.raises(InputError, match="data_path .*nowhere") as error:
        build_pretrain_source("packed", str(tmp_path / "nowhere"), 3, False)
    assert not isinstance(error.value, DataError)  # there is nothing to check
    with pytest.raises(DataError, match=r"train has no index\.json"):
        build_pretrain_source("packed", str(data), 3, False)


def loaded(source: PackedSource, context: str | None, num_workers: int = 2) -> list[torch.Tensor]:
    made = dataset(source=source)
    steps = StepSampler(num_images=len(source), batch_size=10, seed=0, stop_step=8, block_size=16)
    loader = loading(num_workers)(made, batch_sampler=steps, multiprocessing_context=context)
    return [batch.images for batch in loader]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_processes_that_are_forked_or_spawned_read_the_same(packs, context):
    source = PackedSource(packs / "train", 1)
    expected = loaded(source, None, 0)
    assert source.files  # is open when the processes start
    for images, others in zip(expected, loaded(source, context), strict=True):
        assert torch.equal(images, others)


def test_a_pickled_source_holds_no_data_and_opens_its_own_files(packs):
    source = PackedSource(packs / "train", 1)
    source.read_ahead()
    source.read(3)
    copy = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 500
    assert (type(copy), copy.reads_ahead, len(copy.files)) == (PackedSource, True, 0)
    assert torch.equal(copy.read(100), source.read(100))
    assert copy.labels.tolist() == source.labels.tolist()


def test_few_shards_are_open_at_a_time(packs, monkeypatch):
    monkeypatch.setattr(packed, "RECENT", 2)
    source = PackedSource(packs / "train", 1)
    assert not source.files
    for index in [0, 119, 60, 0, 119, *range(120)]:
        source.read(index)
        assert len(source.files) <= 2
    assert list(source.files) == [4, 5]
    source.read(
        int(np.flatnonzero(source.index.entries["shard"] == 4)[0])
    )  # used again: the other one goes next
    source.read(0)
    assert list(source.files) == [4, 0]


def test_a_block_is_announced_once_and_in_full(packs, monkeypatch):
    """The images of block 2 of 32, which lie in three shards, and nothing before it is asked
    for."""
    announced = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: announced.append(arguments))
    source = PackedSource(packs / "train", 1)
    source.block_size = 32
    source.read(70)
    assert announced == []  # only where all images will be read
    source.read_ahead()
    for index in (70, 64, 95, 70):
        source.read(index)
    entries = source.index.entries[64:96]
    expected = {}
    for entry in entries:
        start, end = expected.get(int(entry["shard"]), (int(entry["offset"]), 0))
        expected[int(entry["shard"])] = (start, int(entry["offset"] + entry["length"]))
    assert len(expected) >= 2
    assert [(offset, offset + length) for _, offset, length, _ in announced] == list(
        expected.values()
    )
    assert [descriptor for descriptor, *_ in announced] == [
        source.files[shard].fileno() for shard in expected
    ]
    assert {advice for *_, advice in announced} == {os.POSIX_FADV_WILLNEED}
    source.read(63)
    assert len(announced) > len(expected)


def labelled(root: Path, num_classes: int | None = None) -> LabelledData:
    return build_labelled_data("packed", str(root), 1, download=False, num_classes=num_classes)


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
        (([0, 1],), ([None, None],), "/val have no labels"),
        (([0, 1],), ([0, 0],), "/val hold no image: 1"),
        (([0, 1],), ([0, 1, 999_999_999],), "999999999"),
        (CATS_AND_DOGS, ([0, 1, 999_999_999],), "label 999999999, outside its 2 classes"),
        (CATS_AND_DOGS, ([0, 1], ["cat", "mouse"]), "/train and not in val/: dog"),
        (CATS_AND_DOGS, ([0, 0], ["cat", "dog"]), "/val hold no image: dog"),
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
    make_pack(tmp_path / "val", [0, 1, 2], ["cat", "dog", "cow"])
    assert labelled(tmp_path).class_names == [
        "cat",
        "dog",
        "cow",
    ]  # one split's names are both splits'


def test_images_without_a_label_are_left_out_of_evaluation(tmp_path, caplog):
    make_pack(tmp_path / "train", [2, None, 0, None, 1])
    make_pack(tmp_path / "val", [0, 1, 2])
    data = labelled(tmp_path)
    assert (len(data.train), data.train.labels.tolist()) == (3, [2, 0, 1])
    assert [int(data.train.read(index)[0, 0, 0]) for index in range(3)] == [20, 0, 10]
    assert f"{tmp_path}/train: 2 images" in caplog.text
    assert len(build_pretrain_source("packed", str(tmp_path), 1, False)) == 5


def test_pictures_are_made_of_the_validation_images_or_else_all(tmp_path, packs, data):
    assert (
        validation_source("packed", str(packs), 1)
        .name(0)
        .startswith(f"{packs}/val/shard-000000.tar/000000000-")
    )
    assert len(validation_source("packed", str(packs), 1)) == 60
    flat = pack(data / "val", tmp_path / "flat")
    assert validation_source("packed", str(flat), 1).name(0).startswith(f"{flat}/shard-000000.tar/")
    shutil.copytree(packs / "train", tmp_path / "half/train")
    assert len(validation_source("packed", str(tmp_path / "half"), 1)) == 120
    make_pack(tmp_path / "half/val", [None])  # labels are not needed
    assert len(validation_source("packed", str(tmp_path / "half"), 1)) == 1


@pytest.fixture
def small_blocks(monkeypatch) -> list[int]:
    """Blocks of 8, 4 to a group; collects the block sizes that runs take."""
    monkeypatch.setattr(PackedSource, "block_size", 8)
    monkeypatch.setattr("data.sampler.GROUP", 4)
    taken = []

    class Seen(StepSampler):
        def __post_init__(self):
            super().__post_init__()
            taken.append(self.block_size)

    monkeypatch.setattr(batches_module, "StepSampler", Seen)
    return taken


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, packs, small_blocks):
    """Stopped after the first epoch of two; then with loader processes, and after a move to another
    folder."""
    pretrain_pictures(packs, tmp_path / "whole", *PACKED)
    pretrain_pictures(packs, tmp_path / "parts", *PACKED, "--stop_epoch", 1)
    moved = shutil.copytree(packs, tmp_path / "moved")
    pretrain_pictures(moved, tmp_path / "parts", *PACKED, "--num_workers", 2)
    losses = step_losses(tmp_path / "whole")
    assert len(set(losses.values())) == 2 * PICTURE_STEPS
    assert step_losses(tmp_path / "parts") == losses
    assert (tmp_path / "parts/model.safetensors").read_bytes() == (
        tmp_path / "whole/model.safetensors"
    ).read_bytes()
    assert small_blocks == [8, 8, 8]


def test_a_run_killed_within_an_epoch_goes_on_bit_for_bit(
    tmp_path, packs, small_blocks, monkeypatch
):
    """Saved at every line; the process ends in place of step 16, the checkpoint is of step 15 of
    20."""
    often = ("--save_minutes", 1e-9, "--log_interval", 5)
    pretrain_pictures(packs, tmp_path / "whole", *PACKED, "--log_interval", 1)
    original, taken = engine.loop.optimizer_step, []

    def counted(*arguments, **keywords):
        taken.append(None)
        if len(taken) == 16:
            raise Killed
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(engine.loop, "optimizer_step", counted)
        with pytest.raises(Killed):
            pretrain_pictures(packs, tmp_path / "parts", *PACKED, *often)
    assert (tmp_path / "parts/checkpoint-00000015.pth").exists()
    pretrain_pictures(packs, tmp_path / "parts", *PACKED, "--log_interval", 1)
    losses = step_losses(tmp_path / "whole")
    assert {step: loss for step, loss in step_losses(tmp_path / "parts").items() if step > 15} == {
        step: losses[step] for step in range(16, 21)
    }
    assert (tmp_path / "parts/model.safetensors").read_bytes() == (
        tmp_path / "whole/model.safetensors"
    ).read_bytes()


def test_a_run_on_other_images_is_not_gone_on_with(tmp_path, packs, data):
    pretrain_pictures(packs, tmp_path / "run", *PACKED, "--stop_epoch", 1)
    with pytest.raises(InputError, match="dataset: packed -> folder"):
        pretrain_pictures(data, tmp_path / "run")
    source = shutil.copytree(data, tmp_path / "in")
    shutil.copy(source / "train/one/001.png", source / "train/one/002.png")
    other = pack(source, tmp_path / "other")
    with pytest.raises(InputError, match="images: 120 -> 120 others"):
        pretrain_pictures(other, tmp_path / "run", *PACKED)


@pytest.mark.long
def test_two_processes_train_as_one_and_go_on_as_one(tmp_path, packs):
    """12 images a step: by one process; by two; and by one, two and one again, an epoch each."""
    decoder = ["--decoder_embed_dim", 16, "--decoder_depth", 1, "--decoder_num_heads", 2]
    more = [
        *PACKED,
        *decoder,
        "--lr",
        1e-2,
        "--save_epochs",
        1,
        "--monitor_epochs",
        0,
        "--num_workers",
        1,
    ]

    def start(folder: str, processes: int, *flags) -> None:
        arguments = pictures(
            packs, tmp_path / folder, *more, "--batch_size", 12 // processes, *flags
        )
        result = launch(arguments, processes)
        assert result.returncode == 0, result.stderr

    start("one", 1)
    start("two", 2)
    for epoch, processes in ((1, 1), (2, 2), (3, 1)):
        start("both", processes, "--stop_epoch", epoch)
    losses = step_losses(tmp_path / "one")
    for folder in ("two", "both"):
        others = step_losses(tmp_path / folder)
        assert others.keys() == losses.keys() == set(range(1, 31))
        for step, loss in losses.items():
            assert float.fromhex(others[step]) == pytest.approx(float.fromhex(loss), abs=1e-5), step


@pytest.fixture(scope="module")
def weights(tmp_path_factory, packs) -> Path:
    return (
        pretrain_pictures(packs, tmp_path_factory.mktemp("pretrained"), *PACKED)
        / "model.safetensors"
    )


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


def test_the_monitor_looks_at_a_pack(tmp_path, packs, data):
    """With labels it classifies; without, it draws."""
    looking = ["--monitor_epochs", 1, "--monitor_images", 3]
    pretrain_pictures(packs, tmp_path / "labelled", *PACKED, *looking)
    looks = [line for line in log_lines(tmp_path / "labelled") if "monitor_s" in line]
    assert [look["epoch"] for look in looks] == [0, 1, 2]
    assert all("knn_acc1" in look and "psnr" in look for look in looks)
    flat = pack(data / "train", tmp_path / "flat")
    pretrain_pictures(flat, tmp_path / "unlabelled", *PACKED, *looking)
    looks = [line for line in log_lines(tmp_path / "unlabelled") if "monitor_s" in line]
    assert len(looks) == 3
    assert all("knn_acc1" not in look and "psnr" in look for look in looks)


def test_a_damaged_image_is_replaced_in_training_and_stops_evaluation(tmp_path, own, weights):
    where = flip_bit(own / "train", 50)
    pretrain_pictures(own, tmp_path / "run", *PACKED)
    (line,) = (tmp_path / "run/bad_samples.jsonl").read_text().splitlines()
    bad = json.loads(line)
    assert bad["path"] == PackedSource(own / "train", 1).name(50)
    assert where in bad["reason"]
    assert log_lines(tmp_path / "run")[-1]["step"] == 2 * PICTURE_STEPS
    in_val = flip_bit(own / "val", 33)
    commands = (
        (main_knn.main, where, pictures(own, tmp_path / "knn", training=False)),
        (
            main_finetune.main,
            in_val,
            pictures(own, tmp_path / "tune", "--epochs", 1, "--warmup_epochs", 0),
        ),
    )
    for main, damaged, arguments in commands:
        with pytest.raises(InputError, match=damaged):
            main([*arguments, *PACKED, "--finetune", str(weights)])


def test_a_shard_that_disappears_while_training_stops_the_run(own):
    """As an unmounted disk does."""
    source = build_pretrain_source("packed", str(own), 1, False)
    shutil.rmtree(own)
    sampler = StepSampler(num_images=120, batch_size=10, seed=0, stop_step=8, block_size=8)
    batch = next(iter(loading(0)(dataset(source=source), batch_sampler=sampler)))
    assert batch.failed
    assert "No such file or directory" in batch.bad[0].reason
