"""`tools/pack_dataset.py`: what it writes, byte for byte, what it leaves out, and how it goes on
after a kill."""

import fcntl
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from packs import SMALL, Killed, contents, index_tars, pack, refused, saved, shards
from PIL import Image
from runs import CLASSES, command, environment, files_of, run
from test_images import KINDS, RGB, STORED_AS, oriented
from torchvision.transforms import v2

from data.images import PixelFormat, decode_image
from data.packs.shards import ENTRY
from data.packs.source import PackedSource
from tools.packing import packing
from tools.packing.packing import pack_image, shard_starts
from util.errors import InputError


def samples(folder: Path) -> list[tuple[str, bytes, str | None]]:
    """Name, content and label of every image, by another reader: tarfile, and WebDataset's way to
    group."""
    found: dict[str, list] = {}
    for path in shards(folder):
        with tarfile.open(path) as archive:
            for member in archive:
                key, ending = re.fullmatch(r"((?:.*/)?[^/.]+)\.([^/]*)", member.name).groups()
                assert (ending == "cls") == (key in found)  # an image, then its label
                content = archive.extractfile(member).read()
                sample = found.setdefault(key, [member.name, content, None])
                sample[2] = content.decode() if ending == "cls" else None
    return [tuple(sample) for sample in found.values()]


def facts_of(folder: Path) -> dict:
    """What index.json holds."""
    return json.loads((folder / "index.json").read_text())


def test_a_folder_with_classes_becomes_shards_with_labels_in_mixed_order(data, packs):
    files = ["index.json", "index.npy", "names.npy", "packing.json"]
    for split, count, each in (("train", 6, 40), ("val", 3, 20)):
        tars = [f"shard-{number:06d}.tar" for number in range(count)]
        assert sorted(contents(packs / split)) == [*files, *tars]
        found = samples(packs / split)
        assert Counter(label for _, _, label in found) == {"0": each, "1": each, "2": each}
        for number, (name, content, label) in enumerate(found):
            # the key counts in the order of the pack and ends like the source
            key = re.fullmatch(rf"{number:09d}-({CLASSES[int(label)]}_\d\d\d)\.png", name)
            assert (data / split / f"{key[1].replace('_', '/')}.png").read_bytes() == content
        assert len({name[10:] for name, _, _ in found}) == 3 * each
    # Sorted, a block would be of one class: neighbours would differ at two borders alone.
    labels = PackedSource(packs / "train", PixelFormat(1)).labels
    assert 60 < (labels[1:] != labels[:-1]).sum() < 100  # 80 by chance


def test_tar_headers_are_plain_and_always_the_same(packs):
    first = shards(packs / "train")[0]
    with tarfile.open(first) as archive:
        members = archive.getmembers()
    plain = {"mtime": 0, "uid": 0, "gid": 0, "mode": 0o644, "uname": "", "gname": "", "type": b"0"}
    assert all(plain.items() <= member.get_info().items() for member in members)
    names = [member.name for member in members]
    assert names[1::2] == [re.sub(r"png$", "cls", name) for name in names[::2]]
    assert first.read_bytes()[257:265] == b"ustar\x0000"


def test_the_index_says_where_each_image_lies(packs):
    folder, tars = packs / "train", shards(packs / "train")
    entries, names = np.load(folder / "index.npy"), np.load(folder / "names.npy").tobytes()
    facts = facts_of(folder)
    assert (entries.dtype, len(entries)) == (ENTRY, 120)
    assert [(shard["name"], shard["size"]) for shard in facts.pop("shards")] == [
        (path.name, path.stat().st_size) for path in tars
    ]
    counts = {"num_images": 120, "num_labelled": 120, "num_left_out": 0, "side": 256}
    assert counts.items() <= facts.items() and facts["class_names"] == list(CLASSES)
    ends = [*entries["name"][1:], len(names)]
    for entry, end, (name, content, label) in zip(entries, ends, samples(folder), strict=True):
        shard = tars[entry["shard"]].read_bytes()
        assert shard[entry["offset"] :][: entry["length"]] == content
        assert (entry["crc32"], entry["label"]) == (zlib.crc32(content), int(label))
        assert names[entry["name"] : end].decode() == name


def test_without_train_all_of_a_folder_is_packed_without_labels(tmp_path, data):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted((data / "val").rglob("*.png"))):
        shutil.copy(path, flat / f"{number}.png")
    for source, count in ((data / "train", 120), (flat, 60)):
        folder = pack(source, tmp_path / f"packed {source.name}")
        _, found, labels = zip(*samples(folder), strict=True)
        assert sorted(found) == sorted(path.read_bytes() for path in source.rglob("*.png"))
        assert (len(found), set(labels)) == (count, {None})
        assert facts_of(folder)["class_names"] is None


def test_only_train_and_images_outside_the_class_folders(tmp_path, data, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # the home folder is expanded
    shutil.copytree(data / "train", tmp_path / "in/train")
    (tmp_path / "in/test").mkdir()
    for name in ("train/stray.png", "test/other.png"):
        shutil.copy(data / "val/one/040.png", tmp_path / "in" / name)
    pack(Path("~/in"), Path("~/out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train"]
    labels = Counter(label for _, _, label in samples(tmp_path / "out/train"))
    assert labels == {"0": 40, "1": 40, "2": 40, None: 1}
    assert "/train: 121 images, 120 with a label, 0 left out" in capsys.readouterr().out


def decoded(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


@pytest.mark.parametrize("side", [256, 384])
def test_photographs_are_reduced_with_the_decoder_of_training(photographs, side):
    """Pixels are those of torch's resize up to what JPEG loses; smaller images stay."""
    kept, paths = 0, sorted(photographs.rglob("*.JPEG"))[::5]
    for path in paths:
        original = path.read_bytes()
        content, image = pack_image(original, side)[0], decode_image(original, PixelFormat(3))
        if min(image.shape[-2:]) <= side:
            assert content == original
            kept += 1
            continue
        expected = v2.functional.resize(
            image, [side], interpolation=v2.InterpolationMode.BICUBIC, antialias=True
        )
        pixels = Image.fromarray(expected.permute(1, 2, 0).numpy())
        assert content == saved(pixels.convert(decoded(content).mode), "JPEG", quality=90)
        assert min(pixels.size) == side
        assert pixels.width / pixels.height == pytest.approx(image.shape[2] / image.shape[1], 0.01)
    assert len(paths) == 50 and 4 <= kept <= 46


ENDINGS = {"jpeg": "jpg", "pgm": "ppm", "tiff": "tif"}  # others are as the kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_ending_fits_whether_an_image_is_kept_byte_for_byte_or_reduced(kind):
    content, word = KINDS[kind][0](), kind.split()[0].strip(",")
    for side in (256, 0, 48):  # 48: just as large
        assert pack_image(content, side) == (content, ENDINGS.get(word, word))
    small, ending = pack_image(content, 24)
    if "16-bit" in kind:  # a JPEG would lose its depth
        assert (small, ending) == (content, ENDINGS.get(word, word))
        return
    assert (ending, decoded(small).format, decoded(small).size) == ("jpg", "JPEG", (32, 24))


def test_grey_images_stay_grey_and_turned_ones_are_upright():
    grey = decoded(pack_image(saved(RGB.convert("L"), "PNG"), 24)[0])
    assert (grey.mode, grey.size) == ("L", (32, 24))
    original = oriented("JPEG", 6, STORED_AS[6])  # stored 48 wide and 64 high
    content, _ = pack_image(original, 24)
    assert (decoded(content).size, dict(decoded(content).getexif())) == ((32, 24), {})
    expected = v2.functional.resize(
        decode_image(original, PixelFormat(3)), [24], antialias=True
    ).float()
    assert (decode_image(content, PixelFormat(3)).float() - expected).abs().mean() < 8
    assert pack_image(original, 48)[0] == original  # kept with its mark


@pytest.mark.parametrize(("width", "ending"), [(40_000, "jpg"), (140_000, "png")])
def test_an_image_that_would_be_too_long_for_jpeg_is_kept(width, ending):
    content = saved(Image.new("L", (width, 20)), "PNG")
    packed, found = pack_image(content, 10)
    assert found == ending and (packed == content) == (ending == "png")


MIB = 2**20
HALVES = [MIB // 2 - 2048] * 10
LARGEST = 0.35 * 256 * 256 * 4 / 3 + 2048  # bytes


@pytest.mark.parametrize(
    ("sizes", "side", "shard_mb", "starts"),
    [
        (HALVES, 0, 1.0, [0, 2, 4, 6, 8]),
        (HALVES, 0, 1.5, [0, 3, 6, 9]),
        (HALVES, 0, 5, [0]),
        ([5 * MIB, 1, 1, 5 * MIB, 5 * MIB, 1], 0, 1.0, [0, 1, 4, 5]),
        (HALVES, 256, 9.1 * LARGEST / MIB, [0]),
        (HALVES, 256, 4.9 * LARGEST / MIB, [0, 5]),
        ([-1, -1], 256, 1, [0]),
    ],
)
def test_shard_borders_by_hand(sizes, side, shard_mb, starts):
    """Each image counts its file's size, at most 0.35 bytes a pixel of a 4:3 image, and 2048 bytes
    of tar."""
    all_kept, none_kept = np.ones(len(sizes), bool), np.zeros(len(sizes), bool)
    assert shard_starts(np.array(sizes), none_kept, side, shard_mb).tolist() == starts
    kept = shard_starts(np.array(sizes), all_kept, side, shard_mb).tolist()
    assert kept == shard_starts(np.array(sizes), none_kept, 0, shard_mb).tolist()


def test_photographs_come_to_about_the_size_that_was_asked_for(photographs, tmp_path):
    for side, size, count in ((256, 2, 4), (0, 10, 3)):  # of 27 MB
        folder = pack(photographs, tmp_path / f"{side}", "--shard_mb", size, "--side", side)
        sizes = [path.stat().st_size / MIB for path in shards(folder)]
        assert len(sizes) == count and sizes[:-1] == pytest.approx([size] * (count - 1), rel=0.2)
        assert not (folder / "bad_samples.jsonl").exists()
    kept = sorted(content for _, content, _ in samples(folder))  # side 0 keeps every file
    assert kept == sorted(path.read_bytes() for path in photographs.rglob("*.JPEG"))


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_time_place_or_workers(tmp_path, data, packs, workers):
    first = contents(packs)
    assert contents(pack(data, tmp_path / "again", "--workers", workers)) == first
    source = shutil.copytree(data, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    again = contents(pack(source, tmp_path / "out", "--workers", workers))
    changed = {name for name in first if again[name] != first[name]}
    assert changed == {"train/packing.json", "val/packing.json"}


@pytest.fixture
def spoilt(tmp_path, data) -> Path:
    """The digits with four bad files among them."""
    source = shutil.copytree(data / "train", tmp_path / "spoilt")
    (source / "one/003.png").write_bytes(b"")
    (source / "one/004.png").write_text("an error page", encoding="utf-8")
    os.truncate(source / "seven/005.png", (source / "seven/005.png").stat().st_size // 2)
    (source / "nought/gone.png").symlink_to(source / "nowhere.png")
    return source


def test_what_cannot_be_decoded_is_left_out_counted_and_listed(tmp_path, spoilt):
    folder = pack(spoilt, tmp_path / "out")
    lines = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    reasons = {line["path"].removeprefix(f"{spoilt}/"): line["reason"] for line in lines}
    assert reasons.pop("seven/005.png").startswith("cannot be decoded")
    assert reasons.pop("one/004.png").startswith("cannot identify image file")
    assert reasons == {
        "one/003.png": "the file is empty",
        "nought/gone.png": "cannot be read: No such file or directory",
    }
    assert len(samples(folder)) == len(PackedSource(folder, PixelFormat(1))) == 117
    assert (facts_of(folder)["num_images"], facts_of(folder)["num_left_out"]) == (117, 4)


def at_image(monkeypatch, number: int, do: Callable[[], None]) -> None:
    """Does something just before the image of this place is packed."""
    original, numbers = packing.pack_image, itertools.count()

    def counted(encoded, side):
        if next(numbers) == number:
            do()
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
    last = packing.list_images(source, False).path(-1)
    at_image(monkeypatch, 60, lambda: change(last))
    assert str(source) in refused(source, tmp_path / "out", *SMALL)
    with pytest.raises(InputError, match=r"index\.json"):
        PackedSource(tmp_path / "out", PixelFormat(1))


def test_a_shard_without_an_image_that_was_gone_for_a_while_is_not_kept(
    tmp_path, data, monkeypatch
):
    """As a disk that is mounted again: the same command then makes the whole pack."""
    source = shutil.copytree(data / "train", tmp_path / "in")
    path = packing.list_images(source, False).path(61)
    with monkeypatch.context() as patch:
        at_image(patch, 60, lambda: path.rename(tmp_path / "away"))
        assert str(path) in refused(source, tmp_path / "out", *SMALL)
    (tmp_path / "away").rename(path)
    assert len(samples(pack(source, tmp_path / "out"))) == 120


def test_a_shard_is_read_back_and_compared(tmp_path, data, monkeypatch):
    """As if the disk had changed one bit of the third image."""
    original, numbers = packing._add, itertools.count()

    def add(archive, name, content):
        bit = next(numbers) == 2
        original(archive, name, content[:50] + bytes([content[50] ^ bit]) + content[51:])

    monkeypatch.setattr(packing, "_add", add)
    assert "out/shard-000000.tar" in refused(data / "train", tmp_path / "out", *SMALL)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["packing.json"]


def test_a_pack_goes_on_where_it_stopped(tmp_path, spoilt, monkeypatch, capsys):
    """Finished shards are kept, and what was left out of them is still listed."""
    whole, folder = pack(spoilt, tmp_path / "whole"), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_image(patch, 110, lambda: (_ for _ in ()).throw(Killed))
        pack(spoilt, folder)
    made = files_of(folder)
    assert 4 <= len(made) - 1 <= 5 and "index.json" not in made  # and packing.json
    (folder / "shard-000005.tar.tmp").write_bytes(b"left by a process that was killed")
    (folder / "notes.tmp").write_bytes(b"not of the pack")
    capsys.readouterr()
    pack(spoilt, folder)
    assert capsys.readouterr().out.count("there already") == len(made) - 1
    assert made.items() <= files_of(folder).items()
    assert contents(folder) == contents(whole) | {"notes.tmp": b"not of the pack"}
    shards(folder)[2].unlink()  # is made again
    pack(spoilt, folder)
    assert contents(folder) == contents(whole) | {"notes.tmp": b"not of the pack"}
    before = files_of(folder)
    pack(spoilt, folder)
    assert f"{folder}: 117 images, 0 with a label, 4 left out" in capsys.readouterr().out
    assert files_of(folder) == before


def test_another_pack_in_the_same_folder_is_refused(own, data, tmp_path):
    before, source = contents(own), shutil.copytree(data, tmp_path / "in")  # with its times
    assert "side: 256 -> 384" in refused(data, own, *SMALL, "--side", 384)
    assert "shard_mb: 0.05 -> 0.1" in refused(data, own, "--shard_mb", 0.1)
    retouch(source / "train/one/003.png")
    assert "images: " in refused(source, own, *SMALL)
    (source / "train/one/003.png").unlink()
    assert "num_images: 120 -> 119" in refused(source, own, *SMALL)
    assert contents(own) == before


def test_a_folder_that_cannot_be_packed_into_is_refused_and_left_alone(own, data, tmp_path):
    for name in ("full/notes.txt", "file", "bad/1.jpg", "empty/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    other = shutil.copytree(data, tmp_path / "in")
    (other / "val/one").rename(other / "val/two")
    for source, target, named in (
        (other, tmp_path / "out", "only in train/ are ['one']"),
        (data / "train", tmp_path / "full", tmp_path / "full"),
        (data, data, data),
        (data, tmp_path / "file/out", tmp_path / "file/out/train"),
        (tmp_path / "nowhere", tmp_path / "out", tmp_path / "nowhere"),
        (tmp_path / "empty", tmp_path / "out", tmp_path / "empty"),
        (tmp_path / "bad", tmp_path / "out", tmp_path / "out"),  # no image can be read
    ):
        assert str(named) in refused(source, target, *SMALL)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    assert not (tmp_path / "out/index.json").exists()
    plan = own / "train/packing.json"
    with plan.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert f"another process packs into {own}/train" in refused(data, own, *SMALL)
    plan.write_text("{")
    assert str(plan) in refused(data, own, *SMALL)


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


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_process_leaves_no_half_shard_and_no_process(tmp_path, photographs, workers):
    """SIGKILL at three times; then the same command to the end."""
    folder = tmp_path / "out"
    arguments = (photographs, folder, "--shard_mb", 0.5, "--workers", workers)
    words = command(*map(str, arguments), script="tools/pack_dataset.py")
    whole = contents(pack(photographs, tmp_path / "whole", "--shard_mb", 0.5))
    for wanted in (1, 5, 9):
        process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while len(shards(folder)) < wanted and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        _, printed = process.communicate(timeout=60)  # comes back when the last worker has ended
        assert process.returncode == -signal.SIGKILL, "it must be killed before it ends by itself"
        assert b"Traceback" not in printed
        made = {path.name: path.read_bytes() for path in shards(folder)}
        assert wanted <= len(made) and made.items() < whole.items()
        assert not (folder / "index.json").exists()
    result = run(words)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("there already") >= 9
    assert contents(folder) == whole


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more to a file of this process and of those that it starts is an error."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_leaves_no_half_shard(tmp_path, data, packs, workers, capfd):
    """A file may have 60 kB, which the first shard passes: one line; then the same command goes
    on."""
    whole = contents(packs)
    largest = max(len(content) for name, content in whole.items() if "train/shard" in name)
    for limit in (largest - 1, 3000):
        with files_of_at_most(limit):
            found = refused(data, tmp_path / "out", *SMALL, "--workers", workers)
        assert re.fullmatch(rf"{tmp_path}/out/train/shard-\d+\.tar .*File too large", found)
        assert "Traceback" not in capfd.readouterr().err  # of the other processes
        assert contents(tmp_path / "out").items() <= whole.items()
    assert contents(pack(data, tmp_path / "out")) == whole


@pytest.mark.parametrize("name", ["index.npy", "names.npy", "index.json"])
def test_a_disk_that_is_full_at_the_index(own, data, packs, monkeypatch, name):
    """Neither the old index nor half of the new one is left to be taken for it."""
    original, tars = Path.replace, shards(own / "train")

    def replace(self, target):
        if Path(target).name == name:
            raise OSError(28, "No space left on device")
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        found = refused("--index", *tars, "--workers", 1)
    assert re.search(f"{own}/train.*No space left on device", found)
    with pytest.raises(InputError, match=r"has no index\.json"):
        PackedSource(own / "train", PixelFormat(1))
    assert index_tars(*tars) == len(PackedSource(own / "train", PixelFormat(1))) == 120


def test_our_own_shards_indexed_anew_keep_their_class_names(own, packs):
    assert index_tars(*shards(own / "train")) == 120
    before, after = (PackedSource(folder / "train", PixelFormat(1)) for folder in (packs, own))
    assert after.fingerprint() == before.fingerprint()
    assert (after.index.entries == before.index.entries).all()
    assert after.index.class_names == list(CLASSES)
    (own / "train/index.json").unlink()
    index_tars(*shards(own / "train"))
    assert PackedSource(own / "train", PixelFormat(1)).index.class_names is None
