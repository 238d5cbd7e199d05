"""Labels from a table: what is read, how it is split, and what is refused before any compute."""

import os
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from test_listing import touch
from test_sampler import global_states

from data.images import PixelFormat
from data.labels import LabelledData, strata
from data.tables import build_table_data, validation_choice
from util.errors import InputError
from util.settings.evaluation import TableConfig

ROWS = """file,kind,age,left,right,where,who
b/2.png,cat,2.5,1,0,train,anna
a/1.png,dog,-1,0,TRUE,train,ben
"with, comma.png",cat,1e3,1,1,val,carl
d.png,dog,0,0,0,test,dora
c.png,"dog",4,false,1.0,val,carl
"""


def read(root: Path, text: str | bytes = ROWS, seed: int = 0, **settings) -> LabelledData:
    content = text if isinstance(text, bytes) else text.encode()
    (root / "table.csv").write_bytes(content)
    cfg = TableConfig(**{"labels": str(root / "table.csv"), **settings})
    return build_table_data(cfg, str(root), PixelFormat(3), seed)


@pytest.fixture
def root(tmp_path) -> Path:
    touch(tmp_path, "b/2.png", "a/1.png", "with, comma.png", "d.png", "c.png")
    return tmp_path


def listed(root: Path, source) -> list[str]:
    return [source.name(index).removeprefix(f"{root}/") for index in range(len(source))]


def test_a_column_splits_and_another_is_the_class(root, caplog):
    data = read(root, split_column="where")
    assert listed(root, data.train) == ["a/1.png", "b/2.png"]  # sorted, whatever the table's order
    assert listed(root, data.val) == ["c.png", "with, comma.png"]
    assert data.class_names == ["cat", "dog"]
    assert data.train.labels.tolist() == [1, 0] and data.val.labels.tolist() == [1, 0]
    assert data.train.labels.dtype == np.int64
    assert "1 rows say neither train nor val in where" in caplog.text


def test_several_labels_and_numbers(root):
    several = read(
        root, split_column="where", objective="multilabel", label_columns=["left", "right"]
    )
    assert several.class_names == ["left", "right"] and several.train.labels.dtype == np.int64
    assert several.train.labels.tolist() == [[0, 1], [1, 0]]
    assert several.val.labels.tolist() == [[0, 1], [1, 1]]
    numbers = read(root, split_column="where", objective="regression", label_columns="age")
    assert numbers.class_names == ["age"] and numbers.train.labels.dtype == np.float32
    assert numbers.train.labels.tolist() == [[-1.0], [2.5]]
    assert numbers.val.labels.tolist() == [[4.0], [1000.0]]
    # by default all that is left, and the first that is left
    text = "where,file,left,right\ntrain,a/1.png,1,0\nval,c.png,0,1\n"
    others = {"file_column": "file", "split_column": "where"}
    assert read(root, text, objective="multilabel", **others).class_names == ["left", "right"]
    assert read(root, text, objective="regression", **others).class_names == ["left"]


def test_a_parquet_table_is_read_like_its_csv(root):
    columns = {
        "file": ["b/2.png", "a/1.png", "c.png", "d.png"],
        "digit": [10, 9, 9, 10],
        "where": ["train", "train", "val", None],
    }
    parquet.write_table(pyarrow.table(columns), root / "t.parquet")
    text = "file,digit,where\nb/2.png,10,train\na/1.png,9,train\nc.png,9,val\nd.png,10,\n"
    found = [
        read(root, text, split_column="where", **more)
        for more in ({}, {"labels": str(root / "t.parquet")})
    ]
    for data in found:
        assert data.class_names == ["9", "10"]  # whole numbers are in their order
        assert data.train.labels.tolist() == [0, 1] and data.val.labels.tolist() == [0]
    assert found[0].train.fingerprint() == found[1].train.fingerprint()


def test_names_that_are_no_utf_8_and_a_byte_order_mark(root):
    odd = os.fsdecode(b"caf\xe9.png")
    touch(root, odd)
    text = b"\xef\xbb\xbffile,kind,where\r\ncaf\xe9.png,\xe9,train\r\n./c.png,\xe9,val\r\n"
    data = read(root, text, split_column="where")
    assert listed(root, data.train) == [odd] and listed(root, data.val) == ["c.png"]
    assert data.class_names == [os.fsdecode(b"\xe9")] and data.train.fingerprint()


def test_a_fingerprint_follows_what_is_used_and_nothing_else(root):
    def fingerprint(text: str = ROWS, **more) -> str:
        return read(root, text, **{"split_column": "where", **more}).train.fingerprint()

    usual = fingerprint()
    head, *rows = ROWS.splitlines()
    assert fingerprint("\n".join([head, *reversed(rows)])) == usual
    assert fingerprint(ROWS.replace("2.5", "7").replace("d.png,dog", "gone.png,cat")) == usual
    changed = [
        ROWS.replace("2.png,cat", "2.png,dog").replace("1.png,dog", "1.png,cat"),
        ROWS.replace('c.png,"dog"', "c.png,cat"),  # a label of the validation images
        ROWS.replace("1.png,dog", "1.png,cow").replace('"dog"', "cow"),  # a class's name
        ROWS.replace("d.png,dog,0,0,0,test", "d.png,dog,0,0,0,train"),
    ]
    found = {fingerprint(text) for text in changed} | {usual, fingerprint(group="who")}
    assert len(found) == 6
    shares = [read(root, val_share=0.4, seed=seed).train for seed in range(8)]
    assert len({tuple(listed(root, source)) for source in shares}) > 2


WRONG = {  # what is wrong: the table, the settings, and what the message names
    "no row": ("file,kind,where\n", {}, "no row"),
    "empty": ("", {}, "no column"),
    "ragged": ("file,kind,where\na/1.png,cat\n", {}, "row 2 has not the 3 cells"),
    "a quote": ('file,kind,where\na/1.png,"cat"x,train\n', {}, "cannot be read as a table"),
    "unknown": (ROWS, {"label_columns": "colour"}, "no column colour: its columns are file, kind"),
    "unknown group": (ROWS, {"group": "patient"}, "no column patient"),
    "unknown file": (ROWS, {"file_column": "path"}, "no column path"),
    "unknown split": (ROWS, {"split_column": "fold"}, "no column fold"),
    "no labels": ("file,where\na/1.png,train\n", {}, "no column of labels"),
    "used twice": (ROWS, {"label_columns": "file"}, "column file is there, or is used, twice"),
    "named twice": (ROWS.replace("age", "kind"), {}, "column kind is there"),
    "two classes": (ROWS, {"label_columns": ["kind", "age"]}, "names 2 columns"),
    "missing": (
        ROWS.replace("c.png", "x.png"),
        {},
        "1 of 4 images that are not in {root}: .'x.png'",
    ),
    "duplicate": (ROWS.replace("b/2.png", "./a/1.png"), {}, "1 images more than once: .'a/1.png'"),
    "empty label": (
        ROWS.replace('"dog"', ""),
        {},
        "1 cells of column kind are empty, the first in",
    ),
    "empty path": (ROWS.replace("c.png", " "), {}, "column file are empty"),
    "one split": (ROWS.replace("val", "test"), {}, "split_column where .* and says test, train"),
    "no number": (
        ROWS,
        {"label_columns": "kind", "objective": "regression"},
        "column kind must hold finite numbers .* 'dog'",
    ),
    "not finite": (
        ROWS.replace("2.5", "nan"),
        {"label_columns": "age", "objective": "regression"},
        "'nan'",
    ),
    "too large": (
        ROWS.replace("2.5", "1e39"),
        {"label_columns": "age", "objective": "regression"},
        "'1e39'",
    ),
    "no yes": (ROWS, {"label_columns": "age", "objective": "multilabel"}, "0 or 1 .* '-1'"),
    "a group in both": (ROWS.replace("ben", "carl"), {"group": "who"}, r"in both .* \['carl'\]"),
    "a class only in val": (ROWS.replace('"dog"', "cow"), {}, r"no image for training .*\['cow'\]"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_table_is_one_line(root, wrong):
    text, settings, named = WRONG[wrong]
    with pytest.raises(InputError, match=named.format(root=root)) as error:
        read(root, text, **{"split_column": "where"} | settings)
    assert "\n" not in str(error.value)


def test_a_table_that_is_none_is_one_line(root):
    (root / "torn.parquet").write_bytes(b"PAR1 and no more")
    for name in ("torn.parquet", "nothing.csv", "nothing.parquet", "b"):
        with pytest.raises(InputError, match=name):
            read(root, labels=str(root / name), split_column="where")
    with pytest.raises(InputError, match="2 images would be for training and 0"):
        read(root, "file,kind,who\na/1.png,cat,x\nc.png,cat,x\n", val_share=0.5, group="who")


def test_a_class_absent_from_the_validation_images_is_no_mistake(root):
    data = read(root, ROWS.replace('"dog"', "cat"), split_column="where")
    assert set(data.val.labels.tolist()) == {0} and data.class_names == ["cat", "dog"]


@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=60),
    st.floats(0.05, 0.6),
    st.integers(2, 4),
    st.integers(0, 99),
)
def test_no_group_is_in_both_splits_and_the_share_is_near(sizes, share, num_classes, seed):
    chance = np.random.default_rng(len(sizes))
    groups = chance.permutation(np.repeat(np.arange(len(sizes)), sizes))
    labels = chance.integers(0, num_classes, len(groups))
    before = global_states()
    is_val = validation_choice(labels, groups, share, seed)
    assert global_states() == before
    for group in range(len(sizes)):
        assert len(set(is_val[groups == group])) == 1
    assert is_val.any() and not is_val.all()
    assert abs(is_val.sum() - share * len(groups)) <= max(sizes)
    assert np.array_equal(validation_choice(labels, groups, share, seed), is_val)


def test_groups_keep_the_shares_of_classes_and_chance_decides_among_equals():
    """300 patients of 1 to 7 images, most of them of one class: 30, 60 and 10 %."""
    chance = np.random.default_rng(0)
    sizes, own = chance.integers(1, 8, 300), chance.choice(3, 300, p=[0.3, 0.6, 0.1])
    groups = np.repeat(np.arange(300), sizes)
    labels = np.where(chance.random(len(groups)) < 0.9, own[groups], chance.integers(0, 3))
    found = [validation_choice(labels, groups, 0.2, seed) for seed in range(3)]
    for is_val in found:
        shares = np.bincount(labels[is_val]) / np.bincount(labels)
        assert np.abs(shares - 0.2).max() < 0.02 and abs(is_val.mean() - 0.2) < 0.01
    assert not np.array_equal(found[0], found[1])


def test_without_groups_each_stratum_has_its_share():
    labels = np.repeat(np.arange(4), [200, 100, 10, 1])
    is_val = validation_choice(labels, None, 0.2, 3)
    assert np.bincount(labels[is_val], minlength=4).tolist() == [40, 20, 2, 0]  # one: for training
    pairs = np.stack([labels % 2, labels // 2], axis=1)
    assert np.array_equal(strata(pairs) % 2, labels // 2)  # combinations of labels
    is_val = validation_choice(pairs, None, 0.2, 3)
    assert np.bincount(labels[is_val], minlength=4).tolist() == [40, 20, 2, 0]
    rare = np.arange(128)[:, None] >> np.arange(7) & 1  # each combination once
    assert validation_choice(rare, None, 0.25, 3).sum() == 32
    numbers = np.random.default_rng(0).permutation(100).astype(np.float32)[:, None]
    assert np.array_equal(strata(numbers), numbers[:, 0] // 10)  # tenths
    is_val = validation_choice(numbers, None, 0.2, 3)
    assert np.bincount((numbers[is_val, 0] // 10).astype(int)).tolist() == [2] * 10
    assert not np.array_equal(is_val, validation_choice(numbers, None, 0.2, 4))
    assert not validation_choice(np.arange(3), None, 0.5, 0).any()  # one of each class
