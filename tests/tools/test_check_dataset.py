"""tools/check_dataset.py: what it says about every kind of file, and that its verdict is
training's."""

import json
import os
import random
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from packs import pack
from PIL import Image
from runs import digits, pictures
from test_images import (
    CUT_KINDS,
    FUZZED,
    KINDS,
    NOISE,
    RAMP16,
    RGB,
    STORED_AS,
    corrupted,
    declared,
    encoded,
    oriented,
)

import main_finetune
import main_knn
import main_lincls
import main_pretrain
from data.images import BadImageError
from data.labels import build_labelled_data
from data.sources import FolderSource
from engine.run.faults import why_training_stops
from engine.run.folder import open_run
from tools import check_dataset
from tools.check_dataset import verdicts_of
from tools.checking.checks import PART, Findings, examine, joined, open_file
from tools.checking.report import printable
from util.errors import DataError, InputError, LocalDataError, LocalInputError, run_cli
from util.settings.evaluation import STAGE_CONFIGS
from util.settings.pretrain import PretrainConfig
from util.settings.read import load_config

TOOL = str(ROOT / "tools/check_dataset.py")


def check(*arguments) -> dict:
    return check_dataset.main([*map(str, arguments), "--workers", "1"])


def exit_code(*arguments) -> int:
    """Of the tool as it is called on a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [TOOL, *map(str, arguments), "--workers", "1"])
        patch.delenv("LOCAL_RANK", raising=False)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(TOOL, run_name="__main__")
    return stop.value.code


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def flat(shade: int, size: tuple[int, int] = (6, 5)) -> bytes:
    return encoded(Image.new("L", size, shade), "PNG")


@pytest.fixture
def shop(tmp_path) -> Path:
    """Two classes of four different images in train/ and two in val/."""
    for number in range(8):
        put(tmp_path / f"shop/train/{'cat' if number < 4 else 'dog'}/{number}.png", flat(number))
    for number in range(4):
        put(
            tmp_path / f"shop/val/{'cat' if number < 2 else 'dog'}/{number}.png", flat(100 + number)
        )
    return tmp_path / "shop"


def findings_of(folder: Path, full: bool) -> Findings:
    return joined(examine(FolderSource(str(folder), 3), full, 1))


def training_says(folder: Path) -> dict[int, str]:
    """Reasons by index, as training's loader finds them."""
    source, found = FolderSource(str(folder), 3), {}
    for index in range(len(source)):
        try:
            source.read(index)
        except BadImageError as error:
            found[index] = str(error)
    return found


# Every kind of file

NAMED = {
    "jpeg": "JPEG RGB",
    "jpeg progressive": "JPEG RGB",
    "jpeg L": "JPEG L",
    "jpeg stored as RGB": "JPEG RGB",
    "jpeg CMYK": "JPEG CMYK",
    "jpeg CMYK without a marker": "JPEG CMYK",
    "jpeg YCCK": "JPEG YCCK",
    "jpeg of two pictures": "JPEG RGB, several pictures",
    "png": "PNG RGB",
    "png L": "PNG L",
    "png LA": "PNG LA",
    "png RGBA": "PNG RGBA",
    "png P": "PNG P",
    "png P, one colour transparent": "PNG P",
    "png P, a transparency each": "PNG P",
    "png 1-bit": "PNG 1-bit",
    "png 16-bit L": "PNG 16-bit L",
    "png 16-bit RGB": "PNG 16-bit RGB",
    "png animated": "PNG RGB, animated",
    "webp": "WEBP RGB",
    "webp lossless": "WEBP RGB",
    "webp RGBA": "WEBP RGBA",
    "webp animated": "WEBP RGB, animated",
    "webp of one frame": "WEBP RGB",
    "gif": "GIF P",
    "gif, one colour transparent": "GIF P",
    "gif animated": "GIF P, animated",
    "bmp": "BMP RGB",
    "bmp P": "BMP P",
    "ppm": "PPM RGB",
    "pgm 16-bit": "PPM 16-bit L",
    "tiff": "TIFF RGB",
    "tiff LZW": "TIFF RGB",
    "tiff L": "TIFF L",
    "tiff LA": "TIFF LA",
    "tiff RGBA": "TIFF RGBA",
    "tiff CMYK": "TIFF CMYK",
    "tiff P": "TIFF P",
    "tiff 1-bit": "TIFF 1-bit",
    "tiff 16-bit L": "TIFF 16-bit L",
    "tiff 16-bit L, big-endian": "TIFF 16-bit L",
}
LA_16 = {
    "PNG 16-bit LA",
    "PNG 16-bit RGBA",
}  # Pillow has no mode for it and widens, in some versions to colours


@pytest.mark.parametrize("full", [False, True])
def test_every_kind_of_good_file_is_named(tmp_path, full):
    for kind, (content, _, _) in KINDS.items():
        folder = tmp_path / kind
        put(
            folder
            / f"a.{kind[:3].replace('jpe', 'jpeg').replace('web', 'webp').replace('tif', 'tiff')}",
            content(),
        )
        looks = findings_of(folder, full)
        assert looks.bad == {}, kind
        (named,) = looks.kinds
        assert named in LA_16 if kind == "png 16-bit LA" else named == NAMED[kind], kind
        assert looks.sides.tolist() == [[48, 64]], kind
        assert looks.notes == {}, kind


def bad_files() -> dict[str, tuple[bytes, str]]:
    """Content and what the reason begins with."""
    cut = {
        f"cut {kind}.x.jpg": (encoded(NOISE, name, **options), "cannot be decoded: ")
        for kind, (name, options) in CUT_KINDS.items()
        if kind != "TIFF LZW"
    }
    return {
        **{name: (content[: len(content) // 2], reason) for name, (content, reason) in cut.items()},
        "zero bytes.jpg": (b"", "the file is empty"),
        "text.jpg": (b"404 not found\n" * 40, "cannot identify image file: "),
        "PostScript.jpg": (encoded(RGB, "EPS"), "cannot identify image file: "),
        "huge.png": (declared("PNG", 30000), "declares too many pixels: "),
        "huge.jpg": (declared("JPEG", 30000), "declares too many pixels: "),
        "large.png": (declared("PNG", 10000), "declares too many pixels: 10000 x 10000"),
        "float.tif": (
            encoded(Image.fromarray(RAMP16.astype(np.float32)), "TIFF"),
            "holds floating-point pixels",
        ),
        "32-bit.tif": (
            encoded(Image.fromarray(RAMP16.astype(np.int32) * 30000), "TIFF"),
            "holds 32-bit pixels",
        ),
    }


@pytest.mark.parametrize("full", [False, True])
def test_every_kind_of_bad_file_is_found_with_the_reason_that_training_gives(tmp_path, full):
    files = bad_files()
    for name, (content, _) in files.items():
        put(tmp_path / name, content)
    (tmp_path / "to nowhere.jpg").symlink_to("nowhere")
    looks = findings_of(tmp_path, full)
    assert len(looks.bad) == len(files) + 1
    assert looks.bad == training_says(tmp_path)
    source = FolderSource(str(tmp_path), 3)
    for index, reason in looks.bad.items():
        name = Path(source.name(index)).name
        start = "cannot be read: No such file" if name == "to nowhere.jpg" else files[name][1]
        assert reason.startswith(start), name
    assert not looks.kinds
    assert (looks.keys == b"").all()
    assert not looks.sides.any()


@pytest.mark.parametrize("kind", CUT_KINDS)
def test_a_file_that_was_cut_off_is_found_without_decoding_all(tmp_path, kind):
    name, options = CUT_KINDS[kind]
    content = encoded(NOISE, name, **options)
    lengths = [int(share * len(content)) + 1 for share in (0.001, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97)]
    for length in lengths:
        put(tmp_path / f"{length}.jpg", content[:length])
    zeros = put(
        tmp_path / "zeros.jpg", content[: len(content) // 2].ljust(len(content), b"\0")
    )  # as a full disk does
    found = findings_of(tmp_path, full=False).bad
    assert found == training_says(tmp_path)
    assert len(found) >= len(lengths)
    assert zeros.stat().st_size == len(content)


def test_whole_files_of_the_common_kinds_are_not_decoded(tmp_path, monkeypatch):
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        put(tmp_path / f"{kind}.jpg", encoded(NOISE, kind))
    put(tmp_path / "animated.webp", KINDS["webp animated"][0]())

    def decode(*_args, **_kwargs):
        raise AssertionError("decoded")

    monkeypatch.setattr("tools.checking.checks.decode_image", decode)
    assert sum(findings_of(tmp_path, full=False).kinds.values()) == 6
    put(tmp_path / "trailing.jpg", encoded(NOISE, "JPEG") + b"more")
    with pytest.raises(AssertionError, match="decoded"):
        findings_of(tmp_path, full=False)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::RuntimeWarning:PIL")
@pytest.mark.parametrize("kind", FUZZED)
def test_corrupted_files_are_bad_if_training_finds_them_bad(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)
    content = FUZZED[kind]()
    for seed in range(150):
        put(tmp_path / f"{seed:03d}.jpg", corrupted(content, seed))
    says = training_says(tmp_path)
    assert 5 < len(says) < 145
    assert findings_of(tmp_path, full=True).bad == says
    by_header = findings_of(tmp_path, full=False).bad
    assert {
        index: says[index] for index in by_header
    } == by_header  # none is called bad that training takes
    assert len(by_header) > len(says) / 3


def test_damage_inside_is_found_by_a_full_check_only(tmp_path):
    content = bytearray(encoded(NOISE, "PNG"))
    content[len(content) // 2] ^= 1
    put(tmp_path / "a.png", bytes(content))
    assert findings_of(tmp_path, full=False).bad == {}
    assert findings_of(tmp_path, full=True).bad == training_says(tmp_path) != {}


def test_orientations_and_wrong_endings_are_remarks(tmp_path):
    for orientation, stored in STORED_AS.items():
        put(tmp_path / f"{orientation}.JPG", oriented("JPEG", orientation, stored))
        put(tmp_path / f"{orientation}.Tif", oriented("TIFF", orientation, stored))
        put(tmp_path / f"{orientation}.png", oriented("PNG", orientation, stored))
    put(tmp_path / "n02105855_2933.JPEG", encoded(RGB, "PNG"))
    put(tmp_path / "b.gif", encoded(RGB, "WEBP"))
    put(tmp_path / "c c.png", KINDS["jpeg of two pictures"][0]())
    looks = findings_of(tmp_path, full=False)
    assert looks.bad == {}
    expected = {
        "turned upright by EXIF": 21,
        "PNG named .jpeg": 1,
        "WEBP named .gif": 1,
        "JPEG named .png": 1,
    }
    assert looks.notes == expected
    assert (looks.sides == [48, 64]).all()


# Files that are no images, and images of odd sizes


def test_what_is_listed_is_what_training_lists(tmp_path, capsys):
    deep = tmp_path / "a b/é/C"
    for name in ("1.JPG", "2 x.Png", "ü.jpeg"):
        put(deep / name, flat(len(name)))
    for name in (
        ".hidden.jpg",
        ".hidden.txt",
        "Thumbs.db",
        "notes.TXT",
        "more.txt",
        "README",
        ".git/a.txt",
        ".git/b.jpg",
    ):
        put(tmp_path / name, b"x")
    (deep / "loop").symlink_to(tmp_path)
    facts = check(tmp_path)["splits"]["all"]
    assert (facts["images"], facts["bad"]) == (3, 0)
    assert facts["other_files"] == {".txt": 2, ".db": 1, "": 1}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if line.startswith(("other", "  .", "  without"))] == [
        ["other", "files", "4"],
        [".txt", "2"],
        [".db", "1"],
        ["without", "an", "ending", "1"],
    ]


def test_sizes(tmp_path):
    for number, size in enumerate(
        [(1, 1), (1, 5000), (5000, 1), (31, 40), (32, 90), (100, 32), (400, 300)]
    ):
        put(tmp_path / f"{number}.png", flat(number, size))
    put(tmp_path / "bad.png", b"")
    facts = check(tmp_path, "--img_size", 32)["splits"]["all"]
    assert facts["short_side"] == [1, 31, 300]
    assert facts["long_side"] == [1, 100, 5000]
    assert facts["smaller_than_crop"] == 4
    assert check(tmp_path)["splits"]["all"]["smaller_than_crop"] == 6  # 224
    assert facts["bytes"] == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_mean_and_std_are_those_of_a_config(tmp_path):
    for number, colour in enumerate([(255, 0, 51), (0, 0, 51), (51, 102, 51), (102, 102, 51)]):
        put(
            tmp_path / f"{number}.png",
            encoded(Image.new("RGB", (8 * number + 1, 5), colour), "PNG"),
        )
    facts = check(tmp_path, "--full")["splits"]["all"]
    assert facts["mean"] == pytest.approx(
        [0.4, 0.2, 0.2]
    )  # each image counts alike, whatever its size
    assert facts["std"] == pytest.approx([np.std([1, 0, 0.2, 0.4]), 0.2, 0], abs=1e-4)
    assert "mean" not in check(tmp_path)["splits"]["all"]


def test_mean_and_std_of_noise(tmp_path):
    """Within an image too; of a tall one every fourth row is taken."""
    pixels = np.random.default_rng(0).integers(0, 256, (256, 80, 3), dtype=np.uint8)
    put(tmp_path / "a.png", encoded(Image.fromarray(pixels), "PNG"))
    facts = check(tmp_path, "--full")["splits"]["all"]
    rows = pixels[::4].reshape(-1, 3) / 255
    assert facts["mean"] == pytest.approx(rows.mean(axis=0), abs=1e-4)
    assert facts["std"] == pytest.approx(rows.std(axis=0), abs=1e-4)


# Classes, and which stage could start


def could(facts: dict) -> set[str]:
    """The stages that could start and would not stop."""
    return {stage for stage, reason in facts["verdicts"].items() if reason is None}


def test_a_good_data_set_could_start_everything(shop):
    facts = check(shop)
    assert could(facts) == set(STAGES)
    assert facts["asked"] == ["pretrain", "finetune", "lincls"]
    assert facts["num_classes"] == 2
    train = facts["splits"]["train"]
    assert (train["images_per_class"], train["without_class"]) == ({"cat": 4, "dog": 4}, 0)
    assert exit_code(shop) == exit_code(shop, "--full") == exit_code(shop, "--for", *STAGES) == 0


def test_class_balance_counts_strays_and_empty_classes(shop):
    put(shop / "train/stray.png", flat(60))
    put(shop / "train/dog/deep/9.png", flat(61))
    (shop / "train/empty").mkdir()
    train = check(shop)["splits"]["train"]
    assert train["images_per_class"] == {"cat": 4, "dog": 5, "empty": 0}
    assert (train["images"], train["without_class"]) == (10, 1)


def spoil_layout(shop: Path, how: str) -> None:
    if how == "empty class":
        for split in ("train", "val"):
            (shop / split / "empty").mkdir()
    elif how == "other classes":
        (shop / "val/dog").rename(shop / "val/hund")
    elif how == "no classes in val":
        for path in (*(shop / "val").rglob("*.png"), shop / "val/cat", shop / "val/dog"):
            path.rename(
                shop / "val" / f"{path.parent.name}-{path.name}"
            ) if path.is_file() else path.rmdir()
    elif how == "empty val":
        for path in (shop / "val").rglob("*.png"):
            path.unlink()


@pytest.mark.parametrize("how", ["empty class", "other classes", "no classes in val", "empty val"])
def test_a_wrong_layout_stops_the_evaluations_in_their_own_words(shop, how):
    spoil_layout(shop, how)
    with pytest.raises(InputError) as error:
        build_labelled_data("folder", str(shop), 3, False, None)
    verdicts = check(shop)["verdicts"]
    assert verdicts == {
        "pretrain": None,
        **dict.fromkeys(("finetune", "lincls", "knn"), str(error.value)),
    }
    assert exit_code(shop) == exit_code(shop, "--for", "knn") == 1
    assert exit_code(shop, "--for", "pretrain") == 0


def test_pretraining_needs_no_classes(shop):
    assert could(check(shop / "train/cat")) == {"pretrain"}
    assert exit_code(shop / "train/cat", "--for", "finetune") == 1
    assert exit_code(shop / "train") == 0  # classes, and nothing to validate on
    facts = check(shop / "train")
    assert (facts["asked"], list(facts["splits"])) == (["pretrain"], ["all"])


def test_a_folder_without_images_could_not_start(tmp_path):
    (tmp_path / "train/cat").mkdir(parents=True)
    assert exit_code(tmp_path) == 1
    assert str(tmp_path / "train") in check(tmp_path)["verdicts"]["pretrain"]


def add_bad(folder: Path, count: int) -> None:
    for number in range(count):
        put(folder / f"bad {number:02d}.jpg", b"")


@pytest.mark.parametrize("full", [(), ("--full",)])
def test_bad_files_stop_training_from_the_limit_on(shop, full):
    add_bad(shop / "train/cat", 10)
    facts = check(shop, *full)
    assert could(facts) == {"pretrain", "finetune", "lincls"}
    assert facts["verdicts"]["knn"].startswith("10 bad in train")
    assert exit_code(shop, *full) == 0
    assert exit_code(shop, *full, "--for", "pretrain", "knn") == 1
    add_bad(shop / "train/dog", 1)
    facts = check(shop, *full)
    assert could(facts) == set()
    assert all("11 bad" in reason for reason in facts["verdicts"].values())
    assert exit_code(shop, *full, "--for", "pretrain") == 1


def test_one_bad_file_in_val_stops_the_evaluations(shop):
    add_bad(shop / "val/dog", 1)
    facts = check(shop)
    assert could(facts) == {"pretrain"}
    assert all("1 bad in val" in facts["verdicts"][stage] for stage in set(STAGES) - could(facts))
    assert exit_code(shop) == 1


def test_bad_files_outside_of_the_classes_concern_pretraining_only(shop):
    add_bad(shop / "train", 11)
    add_bad(shop / "val", 1)
    assert could(check(shop)) == {"finetune", "lincls", "knn"}


def test_the_limit_is_a_thousandth_of_many_images():
    assert why_training_stops(11, 11_000) is why_training_stops(0, 1) is None
    assert "11 bad" in why_training_stops(11, 10_999)
    assert "1,281" in why_training_stops(1282, 1_281_167)
    assert "3 images" in why_training_stops(3, 3)
    expected = {"pretrain": "a", "finetune": "b", "lincls": "b", "knn": "b"}
    assert verdicts_of({}, {"pretrain": "a", "labelled": "b"}) == expected


# Equal images


def bmp_pair() -> tuple[bytes, bytes]:
    """Equal in size and in the last 4 KiB, which are the upper rows; not in the lowest row."""
    pixels = np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    other = pixels.copy()
    other[-1, 0, 0] ^= 1
    return encoded(Image.fromarray(pixels), "BMP"), encoded(Image.fromarray(other), "BMP")


def test_equal_files_are_found_within_and_across_splits_and_classes(shop):
    one, other = bmp_pair()
    put(shop / "train/cat/x.bmp", one)
    put(shop / "train/dog/not the same.bmp", other)
    put(shop / "train/dog/5b.png", flat(5))  # as 5.png
    put(shop / "val/cat/0b.png", flat(0))  # as train/cat/0.png
    put(shop / "val/dog/1b.png", flat(1))  # as train/cat/1.png, in another class
    put(shop / "val/dog/1c.png", flat(1))
    put(shop / "val/dog/3.png", flat(102))  # as val/dog/2.png
    put(shop / "train/dog/x.png", flat(200))
    put(shop / "train/stray.png", flat(200))  # in no class, so in no second one
    add_bad(shop / "train/cat", 2)  # two empty files are bad, not equal images
    facts = check(shop)["duplicates"]
    assert facts == {
        "groups": 5,
        "images": 11,
        "groups_in_train_and_val": 2,
        "val_images_in_train": 3,
        "groups_in_several_classes": 1,
        "files": [
            ["train/cat/0.png", "val/cat/0b.png"],
            ["train/cat/1.png", "val/dog/1b.png", "val/dog/1c.png"],
            ["train/dog/5.png", "train/dog/5b.png"],
            ["train/dog/x.png", "train/stray.png"],
            ["val/dog/2.png", "val/dog/3.png"],
        ],
    }


def test_only_files_of_equal_size_and_end_are_read_again(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        "tools.checking.duplicates.open_file",
        lambda source, index: read.append(index) or open_file(source, index),
    )
    for shade in range(6):
        put(tmp_path / f"{shade}.bmp", encoded(Image.new("RGB", (60, 60), (shade, 0, 0)), "BMP"))
    assert check(tmp_path)["duplicates"]["groups"] == 0
    assert read == []
    put(tmp_path / "7.bmp", (tmp_path / "3.bmp").read_bytes())
    assert check(tmp_path)["duplicates"]["groups"] == 1
    assert len(read) == 2


def test_a_full_check_compares_pixels(shop):
    one, other = bmp_pair()
    put(shop / "train/cat/x.bmp", one)
    put(shop / "train/dog/x.png", encoded(Image.open(put(shop / "train/cat/y.bmp", other)), "PNG"))
    put(shop / "val/dog/tall.png", flat(0, (5, 6)))  # the same values as 0.png, in another shape
    assert check(shop)["duplicates"]["files"] == []
    assert check(shop, "--full")["duplicates"]["files"] == [["train/cat/y.bmp", "train/dog/x.png"]]


def test_a_link_is_an_equal_image(shop):
    (shop / "val/cat/9.png").symlink_to(shop / "train/cat/0.png")
    assert check(shop)["duplicates"]["val_images_in_train"] == 1


# Packed shards


def test_packed_shards_have_the_facts_of_their_folder(shop, tmp_path):
    put(shop / "val/cat/0b.png", flat(0))
    put(shop / "train/dog/9.jpg", encoded(NOISE, "JPEG"))
    packed = pack(shop, tmp_path / "packed", "--side", 0)
    for full in ((), ("--full",)):
        folder, shards = check(shop, *full), check(packed, *full)
        assert (folder["dataset"], shards["dataset"]) == ("folder", "packed")
        for fact in ("num_classes", "verdicts", "asked", "could_start"):
            assert shards[fact] == folder[fact]
        for split in ("train", "val"):
            assert {**shards["splits"][split], "mean": 0, "std": 0} == {
                **folder["splits"][split],
                "mean": 0,
                "std": 0,
            }
        assert shards["duplicates"]["val_images_in_train"] == 1
    assert exit_code(packed) == 0
    assert check(packed / "train")["asked"] == ["pretrain"]


def test_a_damaged_image_in_a_shard_is_found_by_its_checksum(shop, tmp_path):
    packed = pack(shop, tmp_path / "packed", "--side", 0)
    shard = packed / "val/shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[512 + 20] ^= 1
    shard.write_bytes(content)
    facts = check(packed)
    assert facts["splits"]["val"]["bad_by_reason"] == {"is damaged": 1}
    assert could(facts) == {"pretrain"}
    shard.write_bytes(content[:-2000])
    facts = check(packed)
    assert could(facts) == {"pretrain"}
    assert shard.name in facts["verdicts"]["knn"]
    (packed / "train/index.npy").unlink()
    assert "index.npy" in check(packed)["verdicts"]["pretrain"]
    assert exit_code(packed) == 1
    assert "index.json" in check(shop, "--dataset", "packed")["verdicts"]["pretrain"]


def test_shards_that_were_packed_again_are_looked_at_again(shop, tmp_path):
    packed = pack(shop / "val", tmp_path / "packed", "--side", 0)
    assert check(packed)["splits"]["all"]["images"] == 4
    shutil.rmtree(packed)
    for number in range(3):
        put(shop / f"val/cat/more {number}.png", flat(150 + number))
    facts = check(pack(shop / "val", packed, "--side", 0))["splits"]["all"]
    assert (facts["images"], facts["bad"]) == (7, 0)


def test_shards_without_labels_serve_pretraining(shop, tmp_path):
    packed = pack(shop / "train/cat", tmp_path / "packed", "--side", 0)
    facts = check(packed)
    assert (list(facts["splits"]), facts["asked"]) == (["all"], ["pretrain"])
    assert "images_per_class" not in facts["splits"]["all"]


# Processes, files, terminal


def test_the_facts_do_not_depend_on_the_number_of_processes(tmp_path):
    chance = random.Random(0)
    for number in range(2 * PART + 40):
        content = b"" if chance.random() < 0.1 else flat(chance.randrange(250), (1 + number % 7, 3))
        put(tmp_path / f"{number % 9}/{number}.png", content)
    for full in ([], ["--full"]):
        facts = [
            check_dataset.main([str(tmp_path), *full, "--workers", workers])
            for workers in ("1", "3")
        ]
        for fact in facts:
            fact.pop("seconds")
        assert facts[0] == facts[1]
        assert facts[0]["splits"]["all"]["bad"] == len(training_says(tmp_path)) > 20
        assert facts[0]["duplicates"]["groups"] > 20
    source, says = FolderSource(str(tmp_path), 3), training_says(tmp_path)
    means = [
        source.read(index).float().mean() / 255 for index in range(len(source)) if index not in says
    ]
    assert facts[0]["splits"]["all"]["mean"] == pytest.approx([float(np.mean(means))] * 3, abs=1e-4)


def test_bad_files_and_facts_are_written(shop, tmp_path, capsys):
    odd = os.fsdecode(b"caf\xe9\n.jpg")
    put(shop / "train/cat" / odd, b"")
    put(shop / "val/dog/text.jpg", b"text")
    facts = check(shop, "--problems", tmp_path / "bad.jsonl", "--json", tmp_path / "facts.json")
    lines = [
        json.loads(line)
        for line in (tmp_path / "bad.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["path"] for line in lines] == [
        str(shop / "train/cat" / odd),
        str(shop / "val/dog/text.jpg"),
    ]
    assert lines[0] == {"path": str(shop / "train/cat" / odd), "reason": "the file is empty"}
    assert json.loads((tmp_path / "facts.json").read_text(encoding="utf-8")) == facts
    out = capsys.readouterr().out
    assert "  train/cat/caf\\udce9\\n.jpg: the file is empty\n" in out
    out.encode("utf-8")
    assert printable("é x") == "é x"


def test_the_report_has_a_column_for_each_split(shop, capsys):
    add_bad(shop / "train/cat", 3)
    put(shop / "train/cat/8.png", flat(77, (9, 5)))
    put(shop / "val/dog/2.jpg", encoded(Image.new("RGB", (6, 5)), "PNG"))
    put(shop / "val/dog/notes.txt", b"")
    check(shop, "--img_size", 6)
    captured = capsys.readouterr()
    table = captured.out.split("\n\n")[1].splitlines()
    assert len({len(line) for line in table}) == 1  # aligned to the right
    rows = {" ".join(line.split()[:-2]): line.split()[-2:] for line in table}
    assert rows[""] == ["train", "val"]
    assert rows["images"] == ["12", "5"]
    assert rows["bad files"] == ["3", "0"]
    assert rows["PNG named .jpg"] == ["0", "1"]
    assert rows[".txt"] == ["0", "1"]
    assert captured.err == ""  # no bar if there is no terminal


def test_no_more_than_five_bad_files_and_groups_are_shown(tmp_path, capsys):
    add_bad(tmp_path, 8)
    for number in range(14):
        put(tmp_path / f"{number}.png", flat(number // 2))
    check(tmp_path)
    out = capsys.readouterr().out
    assert out.count(": the file is empty") == 5
    assert "  ... and 3 more: --problems FILE writes all\n" in out
    assert out.count(".png = ") == 5
    assert "  ... and 2 more: --json FILE writes all\n" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["/nowhere"], "/nowhere"),
        ([ROOT / "README.md"], "README.md"),
        ([], "PATH"),
        ([ROOT, "--for", "knnn"], "knnn"),
        ([ROOT, "--fulll"], "--fulll"),
    ],
)
def test_wrong_commands_are_one_line_and_exit_code_2(arguments, named, capsys):
    assert exit_code(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert named in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_the_home_folder_is_expanded(shop, monkeypatch):
    monkeypatch.setenv("HOME", str(shop))
    assert check("~/train", "--json", "~/facts.json")["path"] == str(shop / "train")
    assert (shop / "facts.json").exists()


def test_a_file_that_cannot_be_written_is_an_error_of_the_command(shop):
    for flag in ("--json", "--problems"):
        assert exit_code(shop, flag, shop / "nowhere/file") == 2


# What training says, and its hint


def hints(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


def pretrain_on(folder: Path, output_dir: Path) -> DataError:
    small = ("--dataset", "folder", "--batch_size", 4, "--total_batch_size", 4)
    with pytest.raises(DataError) as error:
        main_pretrain.main(digits(output_dir, *small, "--data_path", folder, "--log_interval", 1))
    return error.value


def test_pretraining_stops_where_the_verdict_says_so(shop, tmp_path):
    add_bad(shop / "train/cat", 11)
    for number in range(60):
        put(shop / f"train/dog/more {number}.png", flat(number + 30))
    error = pretrain_on(shop, tmp_path / "run")
    assert str(error).startswith(check(shop)["verdicts"]["pretrain"])
    assert f"check_dataset.py {shop}" in hints(error)[0]


def test_a_batch_of_bad_files_comes_with_the_hint(tmp_path):
    add_bad(tmp_path / "a b", 8)
    error = pretrain_on(tmp_path / "a b", tmp_path / "run")
    assert isinstance(error, LocalDataError)  # only the process that met it says it
    assert isinstance(error, LocalInputError)
    assert f"check_dataset.py '{tmp_path}/a b'" in hints(error)[0]


STAGES = {
    "pretrain": main_pretrain.main,
    "finetune": main_finetune.main,
    "lincls": main_lincls.main,
    "knn": main_knn.main,
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_gives_the_hint_for_a_folder_without_images(shop, tmp_path, stage):
    for path in (shop / "train").rglob("*.png"):
        path.unlink()
    more = () if stage in ("pretrain", "finetune") else ("--finetune", "random")
    more = more if stage == "pretrain" else (*more, "--class_token", "true")
    training = stage != "knn"
    with pytest.raises(DataError) as error:
        STAGES[stage](pictures(shop, tmp_path / "run", *more, training=training))
    assert f"{shop}/train" in str(error.value)
    assert f"check_dataset.py {shop}" in hints(error.value)[0]


@pytest.mark.parametrize("split", ["train", "val"])
def test_knn_stops_where_the_verdict_says_so(shop, tmp_path, split):
    add_bad(shop / split / "cat", 1)
    assert "knn" not in could(check(shop))
    arguments = ("--finetune", "random", "--class_token", "true")
    with pytest.raises(DataError, match="bad 00.jpg") as error:
        main_knn.main(pictures(shop, tmp_path / "run", *arguments, training=False))
    assert f"check_dataset.py {shop}" in hints(error.value)[0]


def test_the_hint_ends_the_line_and_is_for_folders_and_shards_only(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for dataset, has_hint in (("packed", True), ("cifar10", False)):
        arguments = digits(tmp_path, "--dataset", dataset, "--data_path", "some")
        cfg = load_config(PretrainConfig, "pretrain", arguments, checks=[], siblings=STAGE_CONFIGS)

        def main(cfg=cfg):
            with open_run(cfg):
                raise DataError("it is torn")

        with pytest.raises(SystemExit) as stop:
            run_cli(main)
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("error: it is torn") and said.count("\n") == 1
        assert said.endswith("check_dataset.py some\n") == has_hint


# Real images


def test_photographs(photographs):
    facts = check(photographs, "--full")
    split = facts["splits"]["all"]
    assert split["kinds"] == {"JPEG RGB": 246, "JPEG L": 4}
    assert (split["images"], split["bad"], facts["duplicates"]["groups"]) == (250, 0, 0)
    assert split["short_side"] == [97, 375, 1200]
    source = FolderSource(str(photographs), 3)
    assert split["smaller_than_crop"] == sum(
        min(source.read(index).shape[1:]) < 224 for index in range(len(source))
    )


@pytest.mark.long
def test_cifar10(cifar10_jpeg):
    facts = check_dataset.main([str(cifar10_jpeg), "--full"])
    assert facts["could_start"]
    train, val = facts["splits"]["train"], facts["splits"]["val"]
    assert (train["images"], val["images"], train["bad"], val["bad"]) == (50_000, 10_000, 0, 0)
    assert set(train["images_per_class"].values()) == {5000}
    assert train["mean"] == pytest.approx([0.4914, 0.4822, 0.4465], abs=2e-3)  # as published
    assert train["std"] == pytest.approx([0.247, 0.243, 0.262], abs=4e-3)
