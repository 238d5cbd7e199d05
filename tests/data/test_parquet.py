"""`dataset: parquet`: files that the library `datasets` writes, read back; training, resuming and
evaluating from them."""

import pickle
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from runs import (
    CLASSES,
    PICTURE_STEPS,
    Cut,
    cut_after,
    loading,
    pictures,
    pretrain_pictures,
    step_losses,
)
from test_sampler import assert_same_batches, dataset

import main_finetune
import main_knn
from data import parquet
from data.images import BadImageError, PixelFormat
from data.labels import build_labelled_data
from data.parquet import ParquetSource, open_parquet
from data.sampler import StepSampler
from data.sources import FolderSource, build_pretrain_source
from engine.pictures.choose import validation_source
from util.errors import DataError, InputError

PARQUET = ("--dataset", "parquet")
ROWS = 16  # of a row group


def write(path: Path, files: list[Path], labels: list[int], names=CLASSES, rows=ROWS) -> None:
    """Has the library write these images with their labels."""
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=[*names])}
    content = {
        "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        "label": labels,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    made = datasets.Dataset.from_dict(content, features=datasets.Features(features))
    made.to_parquet(path, batch_size=rows)


def write_splits(data: Path, root: Path) -> Path:
    """The images of class folders in their order: three files to train on, one of others."""
    for split, name, count in (("train", "train", 3), ("val", "validation", 1)):
        files = sorted((data / split).rglob("*.png"))
        labels = [CLASSES.index(file.parent.name) for file in files]
        of_parts = np.array_split(np.arange(len(files)), count)
        for number, part in enumerate(of_parts):
            path = root / f"data/{name}-{number:05d}-of-{count:05d}.parquet"
            write(path, [files[i] for i in part], [labels[i] for i in part])
    return root


@pytest.fixture(scope="session")
def tables(tmp_path_factory, data) -> Path:
    """The pictures of `data`, row groups of 16, 16 and 8 in each file of training images."""
    return write_splits(data, tmp_path_factory.mktemp("tables"))


def test_images_labels_and_classes_are_those_of_the_folder(data, tables):
    found = build_labelled_data("parquet", str(tables), PixelFormat(3), False, 3)
    expected = build_labelled_data("folder", str(data), PixelFormat(3), False, 3)
    assert found.class_names == list(CLASSES)
    for ours, theirs in ((found.train, expected.train), (found.val, expected.val)):
        assert np.array_equal(ours.labels, theirs.labels) and ours.labels.dtype == np.int64
        for index in range(len(theirs)):
            assert torch.equal(ours.read(index), theirs.read(index))
    assert isinstance(found.train, ParquetSource)
    assert found.train.block_size == ROWS and len(found.train.groups) == 9
    assert found.train.name(57) == f"{tables}/data/train-00001-of-00003.parquet[17]"
    assert open_parquet(tables, PixelFormat(1), ("train",)).read(7).shape == (1, 28, 28)


def test_row_groups_are_decoded_once_and_the_last_ones_kept(tables, monkeypatch):
    monkeypatch.setattr(parquet, "RECENT", 2)
    source = open_parquet(tables, PixelFormat(1), ("train",))
    for index in (0, 15, 119, 1, 60, 2, 119):  # of three groups: the one used last stays
        source.read(index)
    assert source.rows.cache_info() == (3, 4, 2, 2)  # hits, misses, at most and now kept


def test_a_file_that_its_neighbours_promise_is_missed(tmp_path, tables, caplog):
    root = shutil.copytree(tables, tmp_path / "own")
    (root / "data/train-00001-of-00003.parquet").unlink()
    assert len(open_parquet(root, PixelFormat(1), ("train",))) == 80
    (line,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert (
        line == f"{root}/data/train-00000-of-00003.parquet: its name promises 3 files, there are 2"
    )


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_processes_that_are_forked_or_spawned_read_the_same(tables, context):
    source = open_parquet(tables, PixelFormat(1), ("train",))
    made = dataset(source=source)
    steps = StepSampler(num_images=120, batch_size=10, seed=0, stop_step=8, block_size=16)
    expected = list(loading(0)(made, batch_sampler=steps))
    found = list(loading(2)(made, batch_sampler=steps, multiprocessing_context=context))
    assert_same_batches(found, expected)
    assert len(pickle.dumps(source)) < 500


@pytest.mark.parametrize(
    ("names", "split", "found"),
    [
        (["train-0.parquet", "val-0.parquet", "test.parquet"], "val", ["val-0.parquet"]),
        (["train/0.parquet", "test/0.parquet"], "val", ["test/0.parquet"]),
        (["test/a/train/0.parquet", "values.parquet"], "train", ["test/a/train/0.parquet"]),
        (["Validation.parquet", "train_1.parquet"], "val", ["Validation.parquet"]),
        (["b.parquet", ".cache/a.parquet", "a.parquet"], "train", ["a.parquet", "b.parquet"]),
    ],
)
def test_the_split_is_in_the_name_of_the_file_or_of_its_folder(tmp_path, data, names, split, found):
    image = data / "val/one/040.png"
    for name in names:
        write(tmp_path / name, [image], [0])
    splits = {"train": ("train",), "val": ("val", "test", "train")}[split]
    source = open_parquet(tmp_path, PixelFormat(3), splits)
    assert source.files == [tmp_path / name for name in found]
    assert len(validation_source("parquet", str(tmp_path), PixelFormat(3))) >= 1
    one = open_parquet(tmp_path / names[0], PixelFormat(3), splits)  # a file is a data set, too
    assert one.files == [tmp_path / names[0]]


def test_an_image_without_bytes_is_read_beside_the_file(tmp_path, data):
    shutil.copy(data / "val/one/040.png", tmp_path / "040.png")
    rows = [
        {"bytes": None, "path": path} for path in ("040.png", "gone.png", None, "a" * 300, "\0")
    ]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"n": [1] * 6, "picture": pa.array([*rows, None], kind)})
    pa.parquet.write_table(table, tmp_path / "train.parquet")
    source = open_parquet(tmp_path, PixelFormat(1), ("train",))
    expected = FolderSource(data / "val/one", PixelFormat(1))
    assert torch.equal(source.read(0), expected.read(0))
    for index in range(1, 6):
        with pytest.raises(BadImageError):
            source.read(index)
    assert source.labels.tolist() == [-1] * 6  # n is no label
    with pytest.raises(DataError, match="no column of labels"):
        build_labelled_data("parquet", str(tmp_path), PixelFormat(1), False, None)


def changed(tables: Path, folder: Path, change) -> ParquetSource:
    root = shutil.copytree(tables, folder)
    change(root / "data/train-00001-of-00003.parquet")
    return open_parquet(root, PixelFormat(1), ("train",))


def test_the_fingerprint_tells_of_other_images_labels_and_files(tmp_path, tables, data):
    files = sorted((data / "train").rglob("*.png"))[40:80]
    changes = {
        "the same": lambda path: None,
        "a label": lambda path: write(path, files, [1] * 39 + [0]),
        "an image": lambda path: write(path, [files[1], *files[1:]], [1] * 40),
        "row groups": lambda path: write(path, files, [1] * 40, rows=8),
        "one less": lambda path: path.unlink(),
    }
    found = {n: changed(tables, tmp_path / n, do).fingerprint() for n, do in changes.items()}
    assert found["the same"] == open_parquet(tables, PixelFormat(1), ("train",)).fingerprint()
    assert len(set(found.values())) == 5


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1000:3000] = bytes(2000)
    path.write_bytes(content)


def no_images(path: Path) -> None:
    pa.parquet.write_table(pa.table({"label": [1], "file": ["a.png"]}), path)


def test_splits_that_number_their_classes_in_another_order_are_refused(tmp_path, data):
    files = sorted((data / "val").rglob("*.png"))[:3]
    for split, names in (("train", "abc"), ("val", "acb")):
        write(tmp_path / f"{split}.parquet", files, [0, 1, 2], names)
    with pytest.raises(DataError, match="what train/ calls 'b', val/ calls 'c'"):
        build_labelled_data("parquet", str(tmp_path), PixelFormat(1), False, None)


@pytest.mark.parametrize("kind", ["uint8", "uint64", "int16"])
def test_labels_are_whole_numbers_of_any_width_and_may_be_missing(tmp_path, data, kind):
    files = sorted((data / "val").rglob("*.png"))[:3]
    images = [{"bytes": file.read_bytes(), "path": None} for file in files]
    table = pa.table({"image": images, "label": pa.array([1, None, 0], kind)})
    pa.parquet.write_table(table, tmp_path / "train.parquet")
    found = open_parquet(tmp_path, PixelFormat(1), ("train",))
    assert found.labels.tolist() == [1, -1, 0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (no_images, "columns are label, file"),
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), "is it whole"),
        (lambda path: path.write_bytes(b""), "is it whole"),
        (lambda path: write(path, [], [], names="ab"), "has other"),
        (lambda path: shutil.rmtree(path.parent), "holds no .parquet file"),
    ],
    ids=["no images", "truncated", "empty file", "other classes", "empty folder"],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, tables, change, named):
    with pytest.raises(DataError) as error:
        changed(tables, tmp_path / "own", change)
    assert named in str(error.value) and "\n" not in str(error.value)
    assert str(tmp_path / "own") in str(error.value)


def test_an_empty_class_and_a_forgotten_setting_are_said_in_the_words_of_parquet(tmp_path, data):
    files = sorted((data / "train").rglob("*.png"))[:4]
    write(tmp_path / "train.parquet", files, [0, 0, 1, 1])
    write(tmp_path / "val.parquet", files, [0, 1, 2, 2])
    with pytest.raises(DataError, match=f"split train of {tmp_path} must hold images of each") as e:
        build_labelled_data("parquet", str(tmp_path), PixelFormat(1), False, None)
    assert "folder" not in str(e.value) and CLASSES[2] in str(e.value)
    with pytest.raises(DataError, match="--dataset parquet"):
        build_pretrain_source("folder", str(tmp_path), PixelFormat(1), False)


def test_damaged_rows_are_bad_images(tmp_path, tables):
    source = changed(tables, tmp_path / "own", spoil)
    with pytest.raises(BadImageError):
        for index in range(40, 80):
            source.read(index)
    assert source.read(0).shape == source.read(119).shape


def test_without_pyarrow_the_extra_is_named(tables, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"pip install -e \.\[parquet\]"):
        build_pretrain_source("parquet", str(tables), PixelFormat(1), False)


def test_training_is_that_of_a_folder_in_the_same_order_and_resumes_bit_for_bit(
    tmp_path, data, tables, monkeypatch
):
    """Killed in place of step 16; it goes on with loader processes, after a move."""
    pretrain_pictures(tables, tmp_path / "whole", *PARQUET)
    with monkeypatch.context() as patch:
        patch.setattr(FolderSource, "block_size", ROWS)
        pretrain_pictures(data, tmp_path / "folder")
    losses = step_losses(tmp_path / "whole")
    assert losses == step_losses(tmp_path / "folder") and len(losses) == 2 * PICTURE_STEPS
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_after(patch, 15)
        often = ("--save_minutes", 1e-9, "--log_interval", 5)
        pretrain_pictures(tables, tmp_path / "parts", *PARQUET, *often)
    moved = shutil.copytree(tables, tmp_path / "moved")
    pretrain_pictures(moved, tmp_path / "parts", *PARQUET, "--num_workers", 2)
    of_parts = step_losses(tmp_path / "parts")
    assert all(of_parts[step] == losses[step] for step in range(16, 21))
    whole, parts = (tmp_path / f"{name}/model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    write(moved / "data/train-9.parquet", [data / "val/one/040.png"], [1])
    with pytest.raises(InputError, match="images: "):
        pretrain_pictures(moved, tmp_path / "parts", *PARQUET, "--epochs", 3)


def test_evaluations_give_the_results_of_the_folder(tmp_path, data, tables, weights, monkeypatch):
    monkeypatch.setattr(FolderSource, "block_size", ROWS)
    for main, more in (
        (main_knn.main, ["--ks", 1, 5]),
        (main_finetune.main, ["--epochs", 1, "--warmup_epochs", 0, "--per_class"]),
    ):
        training = main is main_finetune.main
        arguments = ["--finetune", weights, *more]
        found, expected = (
            main(pictures(root, tmp_path / f"{name}{training}", *flags, training=training))
            for name, root, flags in (
                ("parquet", tables, [*arguments, *PARQUET]),
                ("folder", data, arguments),
            )
        )
        assert {**found, "dataset": "folder"} == {**expected, "dataset": "folder"}
