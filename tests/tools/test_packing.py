"""`tools/pack_dataset.py`: what it writes, byte for byte, what it leaves out, and how it goes on
after a kill."""

import fcntl
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from packs import SMALL, Killed, contents, index_tars, pack, refused, saved, shards
from PIL import Image
from runs import CLASSES, environment, make_pictures, run
from torchvision.transforms import v2

from data.images import decode_image
from data.packs.shards import ENTRY
from data.packs.source import PackedSource
from tools.packing import packing
from tools.packing.packing import pack_image, shard_starts
from util.errors import InputError


def samples(folder: Path) -> list[tuple[str, bytes, str | None]]:
    """Name, content and label of every image, by another reader: tarfile, and WebDataset's way to
    group."""
    found: list[list] = []
    for path in shards(folder):
        keys = []
        with tarfile.open(path) as archive:
            for member in archive:
                key, ending = re.fullmatch(r"((?:.*/)?[^/.]+)\.([^/]*)", member.name).groups()
                content = archive.extractfile(member).read()
                if ending == "cls":
                    assert keys[-1] == key
                    found[-1][2] = content.decode()
                else:
                    keys.append(key)
                    found.append([member.name, content, None])
        assert len(set(keys)) == len(keys)
    return [tuple(sample) for sample in found]


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


def test_a_folder_with_classes_becomes_shards_with_labels(data, packs):
    assert sorted(contents(packs)) == sorted(
        f"{split}/{name}"
        for split, count in (("train", 6), ("val", 3))
        for name in [
            "index.json",
            "index.npy",
            "names.npy",
            "packing.json",
            *(f"shard-{number:06d}.tar" for number in range(count)),
        ]
    )
    for split, each in (("train", 40), ("val", 20)):
        found = samples(packs / split)
        assert Counter(label for _, _, label in found) == {"0": each, "1": each, "2": each}
        expected = {
            (path.read_bytes(), str(CLASSES.index(path.parent.name)))
            for path in (data / split).rglob("*.png")
        }
        assert {(content, label) for _, content, label in found} == expected
        for number, (name, content, label) in enumerate(found):
            # the key counts in the order of the pack and ends like the source
            key = re.fullmatch(rf"{number:09d}-({CLASSES[int(label)]}_\d\d\d)\.png", name)
            assert (data / split / f"{key[1].replace('_', '/')}.png").read_bytes() == content


def test_tar_headers_are_plain_and_always_the_same(packs):
    names = []
    with tarfile.open(shards(packs / "train")[0]) as archive:
        for member in archive:
            names.append(member.name)
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert (member.uname, member.gname, member.type) == ("", "", tarfile.REGTYPE)
    assert names[1::2] == [re.sub(r"png$", "cls", name) for name in names[::2]]
    header = shards(packs / "train")[0].read_bytes()[:512]
    assert header[257:265] == b"ustar\x0000"


def test_the_index_says_where_each_image_lies(packs):
    folder = packs / "train"
    entries, names = np.load(folder / "index.npy"), np.load(folder / "names.npy").tobytes()
    facts = json.loads((folder / "index.json").read_text())
    assert (entries.dtype, len(entries)) == (ENTRY, 120)
    assert (
        facts["version"],
        facts["num_images"],
        facts["num_labelled"],
        facts["num_left_out"],
    ) == (1, 120, 120, 0)
    assert (facts["class_names"], facts["side"]) == (list(CLASSES), 256)
    assert [shard["name"] for shard in facts["shards"]] == [path.name for path in shards(folder)]
    assert [shard["size"] for shard in facts["shards"]] == [
        path.stat().st_size for path in shards(folder)
    ]
    ends = [*entries["name"][1:], len(names)]
    for entry, end, (name, content, label) in zip(entries, ends, samples(folder), strict=True):
        shard = (folder / facts["shards"][entry["shard"]]["name"]).read_bytes()
        assert shard[entry["offset"] :][: entry["length"]] == content
        assert (entry["crc32"], entry["label"]) == (zlib.crc32(content), int(label))
        assert names[entry["name"] : end].decode() == name


def test_without_train_all_of_a_folder_is_packed_without_labels(tmp_path, data, caplog):
    caplog.set_level(logging.INFO)
    for source in (data / "train", tmp_path / "flat"):
        if not source.exists():
            source.mkdir()
            for number, path in enumerate(sorted((data / "val").rglob("*.png"))):
                shutil.copy(path, source / f"{number}.png")
        folder = pack(source, tmp_path / f"packed {source.name}")
        found = samples(folder)
        assert sorted(content for _, content, _ in found) == sorted(
            p.read_bytes() for p in source.rglob("*.png")
        )
        assert {label for _, _, label in found} == {None}
        assert json.loads((folder / "index.json").read_text())["class_names"] is None
        assert f"{folder} has no labels" in caplog.text
    assert (len(samples(tmp_path / "packed train")), len(samples(tmp_path / "packed flat"))) == (
        120,
        60,
    )


def test_only_train_and_images_outside_the_class_folders(tmp_path, data, caplog):
    shutil.copytree(data / "train", tmp_path / "in/train")
    shutil.copy(data / "val/one/040.png", tmp_path / "in/train/stray.png")
    (tmp_path / "in/test").mkdir()
    shutil.copy(data / "val/one/040.png", tmp_path / "in/test/other.png")
    folder = pack(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in folder.iterdir()] == ["train"]
    labels = Counter(label for _, _, label in samples(folder / "train"))
    assert labels == {"0": 40, "1": 40, "2": 40, None: 1}
    assert "1 images lie in no class folder" in caplog.text


def test_splits_with_different_classes_are_refused_before_anything_is_written(tmp_path, data):
    source = shutil.copytree(data, tmp_path / "in")
    (source / "val/one").rename(source / "val/two")
    assert "only in train/ are ['one']" in refused(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def decoded(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def gradient(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Each channel its own slope."""
    y, x = np.mgrid[:height, :width]
    planes = np.stack(
        [255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)], axis=-1
    )
    return Image.fromarray(planes.astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("side", [256, 384])
def test_photographs_are_reduced_with_the_decoder_of_training(photographs, side):
    """Pixels are those of torch's resize up to what JPEG loses, close to Pillow's own; smaller
    images stay."""
    reduced = kept = 0
    for path in sorted(photographs.rglob("*.JPEG"))[::5]:
        original = path.read_bytes()
        content, ending = pack_image(original, side)
        assert ending == "jpg"
        image = decode_image(original, 3)
        if min(image.shape[-2:]) <= side:
            assert content == original
            kept += 1
            continue
        reduced += 1
        expected = v2.functional.resize(
            image, [side], interpolation=v2.InterpolationMode.BICUBIC, antialias=True
        )
        found = decode_image(content, 3)
        assert found.shape == expected.shape
        assert min(found.shape[-2:]) == side
        assert found.shape[-1] / found.shape[-2] == pytest.approx(
            image.shape[-1] / image.shape[-2], rel=0.01
        )
        pixels = Image.fromarray(expected.permute(1, 2, 0).numpy())
        assert content == saved(pixels.convert(decoded(content).mode), "JPEG", quality=90)
        by_pillow = (
            decoded(original).convert("RGB").resize(found.shape[:0:-1], Image.Resampling.BICUBIC)
        )
        assert np.abs(np.asarray(by_pillow, float) - expected.permute(1, 2, 0).numpy()).mean() < 1.5
    assert min(reduced, kept) >= 4
    assert kept + reduced == 50


KINDS = [  # ending by content, whatever a file is called
    ("jpg", lambda: saved(gradient(40, 30), "JPEG")),
    ("png", lambda: saved(gradient(40, 30), "PNG")),
    ("png", lambda: saved(gradient(40, 30, "LA"), "PNG")),
    ("webp", lambda: saved(gradient(40, 30), "WEBP")),
    ("gif", lambda: saved(gradient(40, 30, "P"), "GIF")),
    ("bmp", lambda: saved(gradient(40, 30), "BMP")),
    ("tif", lambda: saved(gradient(40, 30), "TIFF")),
    ("ppm", lambda: saved(gradient(40, 30), "PPM")),
]


@pytest.mark.parametrize(("ending", "make"), KINDS)
def test_what_is_not_larger_is_kept_byte_for_byte_with_a_fitting_ending(ending, make):
    content = make()
    assert pack_image(content, 256) == (content, ending)
    assert pack_image(content, 0) == (content, ending)
    assert pack_image(content, 30) == (content, ending)  # just as large


@pytest.mark.parametrize(("ending", "make"), KINDS)
def test_every_kind_becomes_jpeg_where_it_is_larger(ending, make):
    small, found = pack_image(make(), 15)
    assert (found, decoded(small).format, decoded(small).size) == ("jpg", "JPEG", (20, 15))


def test_side_0_keeps_everything(photographs, tmp_path):
    folder = pack(photographs, tmp_path / "out", "--side", 0, "--shard_mb", 10)
    assert sorted(content for _, content, _ in samples(folder)) == sorted(
        path.read_bytes() for path in photographs.rglob("*.JPEG")
    )
    assert len(shards(folder)) == 3  # 27 MB


def test_grey_images_stay_grey_and_turned_ones_are_upright():
    grey = pack_image(saved(gradient(80, 60, "L"), "PNG"), 30)[0]
    assert (decoded(grey).mode, decoded(grey).size) == ("L", (40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    original = saved(gradient(80, 60), "JPEG", exif=exif, quality=95)
    upright = decoded(pack_image(original, 30)[0])
    assert (upright.size, dict(upright.getexif())) == ((30, 40), {})
    shown = decode_image(pack_image(original, 30)[0], 3).float()
    expected = v2.functional.resize(decode_image(original, 3), [30], antialias=True).float()
    assert (shown - expected).abs().mean() < 8
    assert pack_image(original, 60)[0] == original  # kept with its mark


def test_an_image_that_would_be_too_long_for_jpeg_is_kept():
    content = saved(Image.new("L", (40_000, 20)), "PNG")
    assert pack_image(content, 10)[1] == "jpg"
    content = saved(Image.new("L", (140_000, 20)), "PNG")
    assert pack_image(content, 10) == (content, "png")


def test_shard_borders_by_hand():
    """Each image counts its file's size, at most 0.35 bytes a pixel of a 4:3 image, and 2048 bytes
    of tar."""
    mib = 2**20
    sizes = np.full(10, mib // 2 - 2048)
    assert shard_starts(sizes, 0, 1.0).tolist() == [0, 2, 4, 6, 8]
    assert shard_starts(sizes, 0, 1.5).tolist() == [0, 3, 6, 9]
    assert shard_starts(sizes, 0, 5).tolist() == [0]
    assert shard_starts(np.array([5 * mib, 1, 1, 5 * mib, 5 * mib, 1]), 0, 1.0).tolist() == [
        0,
        1,
        4,
        5,
    ]
    largest = 0.35 * 256 * 256 * 4 / 3  # 30,583
    assert shard_starts(sizes, 256, 9.1 * (largest + 2048) / mib).tolist() == [0]
    assert shard_starts(sizes, 256, 4.9 * (largest + 2048) / mib).tolist() == [0, 5]
    assert shard_starts(np.array([-1, -1]), 256, 1).tolist() == [0]


def test_photographs_come_to_about_the_size_that_was_asked_for(photographs, tmp_path):
    folder = pack(photographs, tmp_path / "out", "--shard_mb", 2)
    sizes = [path.stat().st_size / 2**20 for path in shards(folder)]
    assert len(sizes) == 4
    assert all(1.6 < size < 2.4 for size in sizes[:-1]), sizes
    assert not (folder / "bad_samples.jsonl").exists()


def test_neighbours_are_of_mixed_classes(packs):
    """Sorted, a block would be of one class; 0 of 119 neighbours differ but at two borders."""
    labels = PackedSource(packs / "train", 1).labels
    assert 60 < (labels[1:] != labels[:-1]).sum() < 100  # 80 by chance
    names = [re.sub(r"^\d+-", "", name) for name, _, _ in samples(packs / "train")]
    assert sorted(names) != names
    assert len(set(names)) == 120


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_time_or_workers(tmp_path, data, packs, workers):
    again = pack(data, tmp_path / "again", "--workers", workers)
    assert contents(again) == contents(packs)


def test_another_place_and_other_times_give_the_same_shards(tmp_path, data, packs):
    source = shutil.copytree(data, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    again, first = contents(pack(source, tmp_path / "again")), contents(packs)
    assert {name for name in first if again[name] != first[name]} == {
        "train/packing.json",
        "val/packing.json",
    }


@pytest.fixture
def spoilt(tmp_path, data) -> Path:
    """The digits with four bad files among them."""
    source = shutil.copytree(data / "train", tmp_path / "spoilt")
    (source / "one/003.png").write_bytes(b"")
    (source / "one/004.png").write_text("an error page", encoding="utf-8")
    content = (source / "seven/005.png").read_bytes()
    (source / "seven/005.png").write_bytes(content[: len(content) // 2])
    (source / "nought/gone.png").symlink_to(source / "nowhere.png")
    return source


def test_what_cannot_be_decoded_is_left_out_counted_and_listed(tmp_path, spoilt, caplog):
    folder = pack(spoilt, tmp_path / "out")
    lines = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    reasons = {line["path"].removeprefix(f"{spoilt}/"): line["reason"] for line in lines}
    assert reasons.keys() == {"one/003.png", "one/004.png", "seven/005.png", "nought/gone.png"}
    assert reasons["one/003.png"] == "the file is empty"
    assert reasons["one/004.png"].startswith("cannot identify image file")
    assert reasons["nought/gone.png"] == "cannot be read: No such file or directory"
    assert len(samples(folder)) == len(PackedSource(folder, 1)) == 117
    facts = json.loads((folder / "index.json").read_text())
    assert (facts["num_images"], facts["num_left_out"]) == (117, 4)


def test_a_folder_with_no_readable_image_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/1.jpg").write_bytes(b"")
    assert str(tmp_path / "out") in refused(tmp_path / "in", tmp_path / "out", *SMALL)
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out/index.json").exists()


def at_image(monkeypatch, number: int, do: Callable[[], None]) -> None:
    """Does something just before the image of this place is packed."""
    original, count = packing.pack_image, []

    def counted(encoded, side):
        if len(count) == number:
            do()
        count.append(None)
        return original(encoded, side)

    monkeypatch.setattr(packing, "pack_image", counted)


def retouch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize(
    "change",
    [
        lambda last: last.unlink(),
        lambda last: last.write_bytes(last.read_bytes() + b"\0"),
        retouch,
        lambda last: shutil.copy(last, last.with_name("new.png")),
        lambda last: next(last.parent.parent.glob("*/000.png")).unlink(),
    ],
    ids=["vanished", "size", "time", "one more", "one less"],
)
def test_a_source_that_changes_is_one_clear_error(tmp_path, data, monkeypatch, change):
    source = shutil.copytree(data / "train", tmp_path / "in")
    last = source / os.fsdecode(packing.list_images(source, False).images["name"][-1])
    at_image(monkeypatch, 60, lambda: change(last))
    assert str(source) in refused(source, tmp_path / "out", *SMALL)
    with pytest.raises(InputError, match=r"index\.json"):
        PackedSource(tmp_path / "out", 1)


def test_a_shard_is_read_back_and_compared(tmp_path, data, monkeypatch):
    """As if the disk had changed one bit of the third image."""
    original, count = packing._add, []

    def add(archive, name, content):
        count.append(None)
        changed = (
            content[:50] + bytes([content[50] ^ 1]) + content[51:] if len(count) == 3 else content
        )
        original(archive, name, changed)

    monkeypatch.setattr(packing, "_add", add)
    assert "out/shard-000000.tar" in refused(data / "train", tmp_path / "out", *SMALL)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["packing.json"]


def stamp(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


def test_a_pack_goes_on_where_it_stopped(tmp_path, spoilt, monkeypatch, caplog):
    """Finished shards are kept, and what was left out of them is still listed."""
    caplog.set_level(logging.INFO)
    whole = pack(spoilt, tmp_path / "whole")
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        at_image(patch, 110, lambda: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            pack(spoilt, folder)
    made = {path: stamp(path) for path in shards(folder)}
    assert 4 <= len(made) <= 5
    assert not (folder / "index.json").exists()
    (folder / "shard-000005.tar.tmp").write_bytes(b"left by a process that was killed")
    (folder / "notes.tmp").write_bytes(b"not of the pack")
    caplog.clear()
    pack(spoilt, folder)
    assert (folder / "notes.tmp").read_bytes() == b"not of the pack"
    (folder / "notes.tmp").unlink()
    assert caplog.text.count("there already") == len(made)
    assert {path: stamp(path) for path in made} == made
    assert contents(folder) == contents(whole)
    assert len((folder / "bad_samples.jsonl").read_text().splitlines()) == 4
    caplog.clear()
    before = {path: stamp(path) for path in folder.iterdir()}
    pack(spoilt, folder)
    assert "is packed already: 117 images" in caplog.text
    assert {path: stamp(path) for path in folder.iterdir()} == before


def test_a_shard_that_went_missing_is_made_again(own, data, packs):
    shards(own / "train")[2].unlink()
    pack(data, own)
    assert contents(own) == contents(packs)


def test_another_pack_in_the_same_folder_is_refused(own, data, tmp_path):
    before = contents(own)
    assert "side: 256 -> 384" in refused(data, own, *SMALL, "--side", 384)
    assert "shard_mb: 0.05 -> 0.1" in refused(data, own, "--shard_mb", 0.1)
    source = shutil.copytree(data, tmp_path / "in")  # with its times
    retouch(source / "train/one/003.png")
    assert "images: " in refused(source, own, *SMALL)
    (source / "train/one/003.png").unlink()
    assert "num_images: 120 -> 119" in refused(source, own, *SMALL)
    assert contents(own) == before


def test_a_folder_that_cannot_be_packed_into_is_refused_and_left_alone(own, data, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    assert str(tmp_path / "full") in refused(data / "train", tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    assert str(data) in refused(data, data)
    (tmp_path / "file").touch()
    assert str(tmp_path / "file/out/train") in refused(data, tmp_path / "file/out")
    assert str(tmp_path / "nowhere") in refused(tmp_path / "nowhere", tmp_path / "out")
    with (own / "train/packing.json").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert f"another process packs into {own}/train" in refused(data, own, *SMALL)
    (own / "train/packing.json").write_text("{")
    assert f"{own}/train/packing.json" in refused(data, own, *SMALL)


def test_the_home_folder_is_expanded(tmp_path, data, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(data / "val", tmp_path / "in")
    assert pack(Path("~/in"), Path("~/out"))
    assert len(PackedSource(tmp_path / "out", 1)) == 60


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "SRC"),
        (["in"], "DST"),
        (["in", "out", "--index", "a.tar"], "--index"),
        (["in", "out", "--side", "200"], "--side"),
        (["in", "out", "--shard_mb", "0"], "--shard_mb"),
        (["in", "out", "--shard_mb", "nan"], "--shard_mb"),
        (["in", "out", "--sides", "256"], "--sides"),
    ],
)
def test_wrong_command_lines(arguments, named):
    assert named in refused(*arguments)


def tool(*arguments) -> list[str]:
    return [sys.executable, str(ROOT / "tools/pack_dataset.py"), *map(str, arguments)]


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_process_leaves_no_half_shard_and_no_process(tmp_path, photographs, workers):
    """SIGKILL at three times; then the same command to the end."""
    arguments = (photographs, tmp_path / "out", "--shard_mb", 0.5, "--workers", workers)
    whole = pack(photographs, tmp_path / "whole", "--shard_mb", 0.5)
    assert len(shards(whole)) > 10
    for wanted in (1, 5, 9):
        process = subprocess.Popen(tool(*arguments), env=environment(), stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while len(shards(tmp_path / "out")) < wanted and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        _, printed = process.communicate(timeout=60)  # comes back when the last worker has ended
        assert process.returncode == -signal.SIGKILL, "it must be killed before it ends by itself"
        assert b"Traceback" not in printed
        made = {path.name: path.read_bytes() for path in shards(tmp_path / "out")}
        assert wanted <= len(made) < len(shards(whole))
        for name, content in made.items():
            assert content == (whole / name).read_bytes()
        assert not (tmp_path / "out/index.json").exists()
    result = run(tool(*arguments))
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("there already") >= 9
    assert contents(tmp_path / "out") == contents(whole)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from tools.pack_dataset import main
from util.errors import run_cli
run_cli(lambda: main(sys.argv[2:]))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_leaves_no_half_shard(tmp_path, data, packs, workers):
    """A file may have 60 kB, which the first shard passes: exit 2 and one line; then the same
    command goes on."""
    largest = max(path.stat().st_size for path in shards(packs / "train"))
    arguments = [str(data), str(tmp_path / "out"), *map(str, SMALL), "--workers", str(workers)]
    for limit in (largest - 1, 3000):
        result = run([sys.executable, "-c", LIMITED, str(limit), *arguments])
        assert result.returncode == 2, result.stderr
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert re.search(rf"{tmp_path}/out/train/shard-\d+\.tar .*File too large", line)
        assert "Traceback" not in result.stderr
        for path in (tmp_path / "out/train").iterdir():
            assert (
                path.name == "packing.json"
                or path.read_bytes() == (packs / "train" / path.name).read_bytes()
            )
    pack(data, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(packs)


@pytest.mark.parametrize("name", ["index.npy", "names.npy", "index.json"])
def test_a_disk_that_is_full_at_the_index(own, data, packs, monkeypatch, name):
    """Neither the old index nor half of the new one is left to be taken for it."""
    original = Path.replace

    def replace(self, target):
        if Path(target).name == name:
            raise OSError(28, "No space left on device")
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        found = refused("--index", *shards(own / "train"), "--workers", 1)
    assert f"{own}/train" in found and "No space left on device" in found
    with pytest.raises(InputError, match=r"has no index\.json"):
        PackedSource(own / "train", 1)
    index_tars(*shards(own / "train"))
    assert len(PackedSource(own / "train", 1)) == 120


def test_our_own_shards_indexed_anew_keep_their_class_names(own, packs):
    before = PackedSource(packs / "train", 1)
    assert index_tars(*shards(own / "train")) == 120
    after = PackedSource(own / "train", 1)
    assert after.fingerprint() == before.fingerprint()
    assert (after.index.entries == before.index.entries).all()
    assert after.index.class_names == list(CLASSES)
    (own / "train/index.json").unlink()
    index_tars(*shards(own / "train"))
    assert PackedSource(own / "train", 1).index.class_names is None
