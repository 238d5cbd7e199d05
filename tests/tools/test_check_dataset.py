"""tools/check_dataset.py: what it says about every kind of file, and that its verdict is
training's."""

import io
import json
import os
import random
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import ROOT
from packs import pack, patched
from PIL import Image
from runs import digits, pictures
from test_images import (
    CUT_KINDS,
    KINDS,
    NOISE,
    PHOTOGRAPHS,
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
from data.images import BadImageError, PixelFormat
from data.sources import FolderSource
from engine.run.faults import why_training_stops
from engine.run.folder import open_run
from tools import check_dataset
from tools.check_dataset import verdicts_of
from tools.checking import checks
from util.errors import DataError, LocalDataError, LocalInputError, run_cli
from util.files import printable
from util.settings.evaluation import STAGE_CONFIGS, FinetuneConfig
from util.settings.pretrain import PretrainConfig
from util.settings.read import load_config

TOOL = str(ROOT / "tools/check_dataset.py")


def check(*arguments) -> dict:
    return check_dataset.main([*map(str, arguments), "--workers", "1"])


def exit_code(*arguments) -> int:
    """Of the tool as it is called on a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [TOOL, *map(str, arguments), "--workers", "1"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(TOOL, run_name="__main__")
    return stop.value.code


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    """Writes files, whose folders need not be there."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def flat(shade: int, size: tuple[int, int] = (6, 5)) -> bytes:
    return encoded(Image.new("L", size, shade), "PNG")


def bad_files(folder: str, count: int) -> dict[str, bytes]:
    return {f"{folder}/bad {number:02d}.jpg": b"" for number in range(count)}


@pytest.fixture
def shop(tmp_path) -> Path:
    """Two classes of four different images in train/ and two in val/."""
    places = ["train/cat"] * 4 + ["train/dog"] * 4 + ["val/cat"] * 2 + ["val/dog"] * 2
    images = {f"{place}/{number}.png": flat(number) for number, place in enumerate(places)}
    return fill(tmp_path / "shop", images)


def findings_of(folder: Path, full: bool) -> np.ndarray:
    return checks.examine(FolderSource(str(folder), PixelFormat(3)), full, 1, PixelFormat(3))


def bad_in(findings: np.ndarray) -> dict[int, str]:
    """Reasons by index."""
    return {index: reason for index, reason in enumerate(findings["reason"]) if reason}


def training_says(folder: Path) -> dict[int, str]:
    """Reasons by index, as training's loader finds them."""
    source, found = FolderSource(str(folder), PixelFormat(3)), {}
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
    "tiff 16-bit L": "TIFF 16-bit x 1",
    "tiff 16-bit L, big-endian": "TIFF 16-bit x 1",
}
LA_16 = {
    "PNG 16-bit LA",
    "PNG 16-bit RGBA",
}  # Pillow has no mode for it and widens, in some versions to colours


@pytest.mark.parametrize("full", [False, True])
def test_every_kind_of_good_file_is_named(tmp_path, full):
    names = {kind: f"{kind}/a.{kind.split()[0].strip(',')}" for kind in KINDS}
    fill(tmp_path, {names[kind]: content() for kind, (content, _, _) in KINDS.items()})
    found = findings_of(tmp_path, full)
    named = dict(zip(sorted(KINDS, key="{}/".format), found["kind"].tolist(), strict=True))
    assert named.pop("png 16-bit LA") in LA_16
    assert named == NAMED
    assert (found["sides"] == [48, 64]).all()
    assert not any(found[remark].any() for remark in ("reason", "ending", "turn"))


BAD = {  # content, and what the reason begins with
    "zero bytes.jpg": (b"", "the file is empty"),
    "text.jpg": (b"404 not found\n" * 40, "cannot identify image file: "),
    "PostScript.jpg": (encoded(RGB, "EPS"), "cannot identify image file: "),
    "huge.png": (declared("PNG", 30000), "declares too many pixels: "),
    "huge.jpg": (declared("JPEG", 30000), "declares too many pixels: "),
    "large.png": (declared("PNG", 10000), "declares too many pixels: 10000 x 10000"),
    "float.tif": (
        encoded(Image.fromarray(RAMP16.astype(np.float32)), "TIFF"),
        "holds 32-bit floating-point TIFF pixels, whose range",
    ),
    "32-bit.tif": (
        encoded(Image.fromarray(RAMP16.astype(np.int32) * 30000), "TIFF"),
        "holds 32-bit signed TIFF pixels, whose range is not defined",
    ),
}


@pytest.mark.parametrize("full", [False, True])
def test_every_kind_of_bad_file_is_found_with_the_reason_that_training_gives(tmp_path, full):
    fill(tmp_path, {name: content for name, (content, _) in BAD.items()})
    (tmp_path / "to nowhere.jpg").symlink_to("nowhere")
    starts = {name: start for name, (_, start) in BAD.items()}
    starts["to nowhere.jpg"] = "cannot be read: No such file"
    found = findings_of(tmp_path, full)
    assert bad_in(found) == training_says(tmp_path)
    for name, reason in zip(sorted(starts), found["reason"], strict=True):
        assert reason.startswith(starts[name]), name
    assert not found["kind"].any() and not found["sides"].any() and not any(found["key"])


@pytest.mark.parametrize("kind", CUT_KINDS)
def test_a_file_that_was_cut_off_is_found_without_decoding_all(tmp_path, kind):
    name, options = CUT_KINDS[kind]
    content = encoded(NOISE, name, **options)
    shares = (0.001, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97)
    files = {f"{share}.jpg": content[: int(share * len(content)) + 1] for share in shares}
    half = content[: len(content) // 2]
    fill(tmp_path, files | {"zeros.jpg": half.ljust(len(content), b"\0")})  # as a full disk does
    found = bad_in(findings_of(tmp_path, full=False))
    assert found == training_says(tmp_path)
    assert len(found) >= len(shares)


def test_whole_files_of_the_common_kinds_are_not_decoded(tmp_path, monkeypatch):
    kinds = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
    files = {f"{kind}.jpg": encoded(NOISE, kind) for kind in kinds}
    files |= {"animated.webp": KINDS["webp animated"][0](), "x.jpg": files["JPEG.jpg"] + b"more"}
    fill(tmp_path, files)
    monkeypatch.setattr(checks, "read_values", Mock(side_effect=BadImageError("decoded")))
    assert bad_in(findings_of(tmp_path, full=False)) == {6: "decoded"}  # x.jpg


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::RuntimeWarning:PIL")
@pytest.mark.parametrize("kind", PHOTOGRAPHS)
def test_corrupted_files_are_bad_if_training_finds_them_bad(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)
    content = PHOTOGRAPHS[kind]()
    fill(tmp_path, {f"{seed:03d}.jpg": corrupted(content, seed) for seed in range(150)})
    says = training_says(tmp_path)
    assert 5 < len(says) < 145
    assert bad_in(findings_of(tmp_path, full=True)) == says
    by_header = bad_in(findings_of(tmp_path, full=False))
    assert by_header.items() <= says.items()  # none is called bad that training takes
    assert len(by_header) > len(says) / 3


def test_orientations_and_wrong_endings_are_remarks(tmp_path):
    files = {
        f"{orientation}.{ending}": oriented(kind, orientation, stored)
        for orientation, stored in STORED_AS.items()
        for kind, ending in (("JPEG", "JPG"), ("TIFF", "Tif"), ("PNG", "png"))
    }
    files["n02105855_2933.JPEG"] = encoded(RGB, "PNG")
    files["b.gif"] = encoded(RGB, "WEBP")
    files["c c.png"] = KINDS["jpeg of two pictures"][0]()
    fill(tmp_path, files)
    facts = check(tmp_path)["splits"]["all"]
    assert facts["notes"] == {
        "turned upright by EXIF": 21,
        "PNG named .jpeg": 1,
        "WEBP named .gif": 1,
        "JPEG named .png": 1,
    }
    assert (facts["bad"], facts["short_side"], facts["long_side"]) == (0, [48] * 3, [64] * 3)


# Files that are no images, and images of odd sizes


def test_what_is_listed_is_what_training_lists(tmp_path, capsys):
    fill(tmp_path / "a b/é/C", {"1.JPG": flat(1), "2 x.Png": flat(2), "ü.jpeg": flat(3)})
    others = ".hidden.jpg .hidden.txt Thumbs.db notes.TXT more.txt README .git/a.txt .git/b.jpg"
    fill(tmp_path, dict.fromkeys(others.split(), b"x"))
    (tmp_path / "a b/loop").symlink_to(tmp_path)
    facts = check(tmp_path)["splits"]["all"]
    assert (facts["images"], facts["bad"], facts["other_files"]) == (
        3,
        0,
        {".txt": 2, ".db": 1, "": 1},
    )
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    start = rows.index(["other", "files", "4"])
    assert rows[start + 1 : start + 4] == [
        [".txt", "2"],
        [".db", "1"],
        ["without", "an", "ending", "1"],
    ]


def test_sizes(tmp_path):
    sizes = [(1, 1), (1, 5000), (5000, 1), (31, 40), (32, 90), (100, 32), (400, 300)]
    fill(tmp_path, {f"{number}.png": flat(number, size) for number, size in enumerate(sizes)})
    fill(tmp_path, {"bad.png": b""})
    facts = check(tmp_path, "--img_size", 32)["splits"]["all"]
    assert (facts["short_side"], facts["long_side"]) == ([1, 31, 300], [1, 100, 5000])
    assert facts["smaller_than_crop"] == 4
    assert check(tmp_path)["splits"]["all"]["smaller_than_crop"] == 6  # 224
    assert facts["bytes"] == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_mean_and_std_are_those_of_a_config(tmp_path):
    """Each image counts alike, whatever its size; of a tall one every fourth row is taken."""
    colours = [(255, 0, 51), (0, 0, 51), (51, 102, 51), (102, 102, 51)]
    pixels = np.random.default_rng(0).integers(0, 256, (256, 80, 3), dtype=np.uint8)
    images = {"noise/a.png": Image.fromarray(pixels)}
    for number, colour in enumerate(colours):
        images[f"flat/{number}.png"] = Image.new("RGB", (8 * number + 1, 5), colour)
    fill(tmp_path, {name: encoded(image, "PNG") for name, image in images.items()})
    rows = pixels[::4].reshape(-1, 3) / 255
    for name, mean, std in (
        ("flat", [0.4, 0.2, 0.2], [np.std([1, 0, 0.2, 0.4]), 0.2, 0]),
        ("noise", rows.mean(axis=0), rows.std(axis=0)),
    ):
        facts = check(tmp_path / name, "--full")["splits"]["all"]
        assert facts["mean"] == pytest.approx(mean, abs=1e-4)
        assert facts["std"] == pytest.approx(std, abs=1e-4)
    assert "mean" not in check(tmp_path)["splits"]["all"]


# Classes, and which stage could start


def could(facts: dict) -> set[str]:
    """The stages that could start and would not stop."""
    return {stage for stage, reason in facts["verdicts"].items() if reason is None}


@pytest.mark.parametrize(
    ("removed", "added", "able", "words"),
    [
        ([], [], "pretrain finetune lincls knn", ""),
        # folders, and the evaluations' own words about them
        ([], ["train/empty/.keep", "val/empty/.keep"], "pretrain", "without an image: ['empty']"),
        (["val/dog"], ["val/hund/1.png"], "pretrain", "only in train/ are ['dog']"),
        (["val"], ["val/1.png"], "pretrain", "only in train/ are ['cat', 'dog']"),
        (["val"], ["val/cat/.keep", "val/dog/.keep"], "pretrain", "no images under"),
        (["val"], [], "pretrain", "has no val/"),
        (["train"], ["train/cat/.keep"], "", "train"),
        # bad files: ten are tolerated, those outside of the classes concern pretraining alone
        ([], bad_files("train/cat", 10), "pretrain finetune lincls", "10 bad in train"),
        ([], bad_files("train/cat", 11), "", "11 bad"),
        ([], bad_files("val/dog", 1), "pretrain", "1 bad in val"),
        ([], [*bad_files("train", 11), "val/bad.jpg"], "finetune lincls knn", "11 bad files"),
    ],
)
def test_the_verdict_on_each_stage(shop, removed, added, able, words):
    for name in removed:
        shutil.rmtree(shop / name)
    fill(shop, {name: flat(0) if name.endswith("png") else b"" for name in added})
    for full in ((), ("--full",)):
        facts = check(shop, *full)
        assert could(facts) == set(able.split())
        assert all(words in reason for reason in facts["verdicts"].values() if reason)
        assert exit_code(shop, *full) == (not could(facts).issuperset(facts["asked"]))
    for stage in STAGES:
        assert exit_code(shop, "--for", stage) == (stage not in could(facts))


def test_classes_are_counted_and_decide_what_is_asked(shop):
    more = {"stray.png": flat(60), "dog/deep/9.png": flat(61), "empty/.keep": b""}
    facts = check(fill(shop / "train", more).parent)
    train = facts["splits"]["train"]
    assert train["images_per_class"] == {"cat": 4, "dog": 5, "empty": 0}
    assert (train["images"], train["without_class"]) == (10, 1)
    shutil.rmtree(shop / "train/empty")
    assert facts["asked"] == ["pretrain", "finetune", "lincls"]
    assert check(shop)["num_classes"] == 2
    for folder in (shop / "train/cat", shop / "train"):  # classes, and nothing to validate on
        facts = check(folder)
        assert (facts["asked"], list(facts["splits"])) == (["pretrain"], ["all"])
        assert could(facts) == {"pretrain"}


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
    files = {
        "train/cat/x.bmp": one,
        "train/dog/not the same.bmp": other,
        "train/dog/5b.png": flat(5),
        "val/cat/0b.png": flat(0),
        "val/dog/1b.png": flat(1),  # in another class
        "val/dog/1c.png": flat(1),
        "val/dog/3.png": flat(10),
        "train/dog/x.png": flat(200),
        "train/stray.png": flat(200),  # in no class, so in no second one
    }
    fill(shop, files | bad_files("train/cat", 2))  # two empty files are bad, not equal images
    (shop / "val/cat/link.png").symlink_to(shop / "train/cat/0.png")
    assert check(shop)["duplicates"] == {
        "groups": 5,
        "images": 12,
        "groups_in_train_and_val": 2,
        "val_images_in_train": 4,
        "groups_in_several_classes": 1,
        "files": [
            ["train/cat/0.png", "val/cat/0b.png", "val/cat/link.png"],
            ["train/cat/1.png", "val/dog/1b.png", "val/dog/1c.png"],
            ["train/dog/5.png", "train/dog/5b.png"],
            ["train/dog/x.png", "train/stray.png"],
            ["val/dog/10.png", "val/dog/3.png"],
        ],
    }


def test_only_files_of_equal_size_and_end_are_read_again(tmp_path, monkeypatch):
    digest = Mock(wraps=checks._digest)
    monkeypatch.setattr(checks, "_digest", digest)
    images = [Image.new("RGB", (60, 60), (shade, 0, 0)) for shade in range(6)]
    files = {f"{shade}.bmp": encoded(image, "BMP") for shade, image in enumerate(images)}
    fill(tmp_path, files)
    assert (check(tmp_path)["duplicates"]["groups"], digest.call_count) == (0, 0)
    fill(tmp_path, {"7.bmp": files["3.bmp"]})
    assert (check(tmp_path)["duplicates"]["groups"], digest.call_count) == (1, 2)


def test_a_full_check_compares_pixels(shop):
    one, other = bmp_pair()
    same = encoded(Image.open(io.BytesIO(other)), "PNG")
    tall = flat(0, (5, 6))  # the same values as 0.png, in another shape
    fill(
        shop / "train", {"cat/x.bmp": one, "cat/y.bmp": other, "dog/x.png": same, "tall.png": tall}
    )
    assert check(shop)["duplicates"]["files"] == []
    assert check(shop, "--full")["duplicates"]["files"] == [["train/cat/y.bmp", "train/dog/x.png"]]


# Packed shards


def test_packed_shards_have_the_facts_of_their_folder(shop, tmp_path):
    fill(shop, {"val/cat/0b.png": flat(0), "train/dog/9.jpg": encoded(NOISE, "JPEG")})
    packed = pack(shop, tmp_path / "packed", "--side", 0)
    for full in ((), ("--full",)):
        folder, shards = check(shop, *full), check(packed, *full)
        assert (folder["dataset"], shards["dataset"]) == ("folder", "packed")
        for fact in ("num_classes", "verdicts", "asked", "could_start", "splits"):
            assert shards[fact] == folder[fact]
        assert shards["duplicates"]["val_images_in_train"] == 1
    assert exit_code(packed) == 0
    facts = check(pack(shop / "train/cat", tmp_path / "unlabelled", "--side", 0))
    assert (list(facts["splits"]), facts["asked"]) == (["all"], ["pretrain"])
    assert "images_per_class" not in facts["splits"]["all"]


def test_a_damaged_image_in_a_shard_is_found_by_its_checksum(shop, tmp_path):
    packed = pack(shop, tmp_path / "packed", "--side", 0)
    shard = packed / "val/shard-000000.tar"
    patched(shard, 512 + 20, b"?")
    facts = check(packed)
    assert facts["splits"]["val"]["bad_by_reason"] == {"is damaged": 1}
    assert could(facts) == {"pretrain"}
    os.truncate(shard, shard.stat().st_size - 2000)
    assert shard.name in check(packed)["verdicts"]["knn"]
    (packed / "train/index.npy").unlink()
    assert "index.npy" in check(packed)["verdicts"]["pretrain"]
    assert exit_code(packed) == 1
    assert "index.json" in check(shop, "--dataset", "packed")["verdicts"]["pretrain"]


# Processes, files, terminal


def test_the_facts_do_not_depend_on_the_number_of_processes(tmp_path):
    chance = random.Random(0)
    for number in range(2 * checks.PART + 40):
        content = b"" if chance.random() < 0.1 else flat(chance.randrange(250), (1 + number % 7, 3))
        fill(tmp_path, {f"{number % 9}/{number}.png": content})
    for full in ([], ["--full"]):
        facts, others = (
            check_dataset.main([str(tmp_path), *full, "--workers", workers]) | {"seconds": 0}
            for workers in ("1", "3")
        )
        assert facts == others
        assert facts["splits"]["all"]["bad"] == len(training_says(tmp_path)) > 20
        assert facts["duplicates"]["groups"] > 20


def test_the_report_has_a_column_for_each_split_and_files_hold_the_rest(shop, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(shop.parent))  # the home folder is expanded
    odd = os.fsdecode(b"train/cat/\xe9\n.jpg")
    files = bad_files("train/cat", 7) | {odd: b"", "train/cat/\u00e9.png": flat(77, (9, 5))}
    files |= {"val/dog/2.jpg": encoded(RGB, "PNG"), "val/dog/notes.txt": b""}
    fill(shop, files | {f"train/dog/again {number}.png": flat(number) for number in range(7)})
    facts = check("~/shop", "--problems", "~/bad.jsonl", "--json", "~/facts.json")
    out, err = capsys.readouterr()
    table = out.split("\n\n")[1].splitlines()
    assert len({len(line) for line in table}) == 1  # aligned to the right
    rows = {" ".join(line.split()[:-2]): line.split()[-2:] for line in table}
    expected = {
        "": ["train", "val"],
        "images": ["24", "5"],
        "bad files": ["8", "0"],
        "PNG named .jpg": ["0", "1"],
        ".txt": ["0", "1"],
    }
    assert expected.items() <= rows.items() and err == ""  # no bar if there is no terminal
    # five lines of each list
    assert (out.count(": the file is empty"), out.count(".png = ")) == (5, 5)
    assert "  ... and 3 more: --problems FILE writes all\n" in out
    assert "  ... and 2 more: --json FILE writes all\n" in out
    lines = (shop.parent / "bad.jsonl").read_text(encoding="utf-8").splitlines()
    bad = {entry["path"]: entry["reason"] for entry in map(json.loads, lines)}
    assert len(bad) == 8 and bad[str(shop / odd)] == "the file is empty"
    assert json.loads((shop.parent / "facts.json").read_text(encoding="utf-8")) == facts
    assert printable(odd) == "train/cat/\\xe9\\n.jpg" and printable("\u00e9 x") == "\u00e9 x"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["/nowhere"], "/nowhere"),
        ([ROOT / "README.md"], "README.md"),
        ([], "PATH"),
        ([ROOT, "--for", "knnn"], "knnn"),
        ([ROOT, "--fulll"], "--fulll"),
        ([ROOT / "figures", "--json", "/nowhere/file"], "/nowhere/file"),
        ([ROOT / "figures", "--problems", "/nowhere/file"], "/nowhere/file"),
    ],
)
def test_wrong_commands_are_one_line_and_exit_code_2(arguments, named, capsys):
    assert exit_code(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and named in said and said.count("\n") == 1


# What training says, and its hint

STAGES = {
    "pretrain": (main_pretrain.main, ["--decoder_depth", 1]),
    "finetune": (main_finetune.main, ["--class_tokens", "1"]),
    "lincls": (main_lincls.main, ["--class_tokens", "1", "--finetune", "random"]),
    "knn": (main_knn.main, ["--class_tokens", "1", "--finetune", "random"]),
}


def stopped(stage: str, folder: Path) -> DataError:
    """The error with which a stage stops on a folder of images; it has the hint."""
    main, more = STAGES[stage]
    with pytest.raises(DataError) as error:
        main(pictures(folder, folder.parent / "run", *more, training=stage != "knn"))
    assert f"check_dataset.py {shlex.quote(str(folder))}" in error.value.__notes__[0]
    return error.value


def test_pretraining_stops_where_the_verdict_says_so(shop):
    more = {f"train/dog/more {number}.png": flat(number + 30) for number in range(60)}
    fill(shop, bad_files("train/cat", 11) | more)
    error = stopped("pretrain", shop)
    assert str(error).startswith(check(shop)["verdicts"]["pretrain"])


def test_a_batch_of_bad_files_stops_one_process(tmp_path):
    fill(tmp_path, bad_files("a b", 24))
    error = stopped("pretrain", tmp_path / "a b")
    assert isinstance(error, LocalDataError)  # only the process that met it says it
    assert isinstance(error, LocalInputError)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_stops_at_a_folder_without_images(shop, stage):
    for path in (shop / "train").rglob("*.png"):
        path.unlink()
    assert f"{shop}/train" in str(stopped(stage, shop))


@pytest.mark.parametrize("split", ["train", "val"])
def test_knn_stops_where_the_verdict_says_so(shop, split):
    fill(shop, bad_files(f"{split}/cat", 1))
    assert "knn" not in could(check(shop))
    assert "bad 00.jpg" in str(stopped("knn", shop))


@pytest.mark.parametrize(("dataset", "has_hint"), [("packed", True), ("cifar10", False)])
def test_the_hint_ends_the_line_and_is_for_folders_and_shards_only(
    dataset, has_hint, tmp_path, capsys
):
    words = digits(tmp_path, "--dataset", dataset, "--data_path", "some")
    cfg = load_config(PretrainConfig, "pretrain", words, checks=[], siblings=STAGE_CONFIGS)

    def main():
        with open_run(cfg):
            raise DataError("it is torn")

    with pytest.raises(SystemExit, match="2"):
        run_cli(main)
    ending = "; look at the data with: python tools/check_dataset.py some" if has_hint else ""
    assert capsys.readouterr().err == f"error: it is torn{ending}\n"


def test_masks_and_boxes_have_no_hint(tmp_path):
    words = digits(tmp_path, "--dataset", "folder", "--data_path", "some", "--task", "detect")
    cfg = load_config(FinetuneConfig, "finetune", words, checks=[], siblings=STAGE_CONFIGS)
    with pytest.raises(DataError) as caught, open_run(cfg):
        raise DataError("it is torn")
    assert not hasattr(caught.value, "__notes__")


# Real images


def test_photographs(photographs):
    split = check(photographs, "--full")["splits"]["all"]
    assert split["kinds"] == {"JPEG RGB": 246, "JPEG L": 4}
    assert (split["images"], split["bad"], split["short_side"]) == (250, 0, [97, 375, 1200])


@pytest.mark.long
def test_cifar10(cifar10_jpeg):
    facts = check_dataset.main([str(cifar10_jpeg), "--full"])
    train, val = facts["splits"].values()
    assert (train["images"], val["images"], facts["could_start"]) == (50_000, 10_000, True)
    assert {*train["images_per_class"].values()} == {5000}
    assert train["mean"] == pytest.approx([0.4914, 0.4822, 0.4465], abs=2e-3)  # as published
    assert train["std"] == pytest.approx([0.247, 0.243, 0.262], abs=4e-3)
