"""Shards that others wrote: which samples are found, and what hostile or broken tar files come
to."""

import gzip
import io
import os
import random
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packs import contents, index_tars, member, patched, png, refused, write_tar
from runs import CLASSES, run

from data.images import IMAGE_ENDINGS, PixelFormat, decode_image
from data.packs.shards import index_shard
from data.packs.source import PackedSource
from tools import pack_dataset
from util.errors import InputError


def found_in(path: Path) -> list[tuple[str, int]]:
    index = index_shard(path)
    return [*zip(map(os.fsdecode, index.names), index.entries["label"].tolist(), strict=True)]


def test_samples_are_runs_of_members_with_one_key(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        [
            member("a/1.jpg", png(1)),
            member("a/1.cls", b"7"),
            member("b/1.cls", b" 12\n"),
            member("b/1.json", b"{}"),
            member("b/1.PNG", png(2)),  # another folder, other key
            member("./c/2.webp", png(3)),
            member("3.jpeg", png(4)),
            member("3.seg.png", b"a mask"),
            member("3.txt", b"a caption"),
            member("3.cls", b"0"),
            member("no ending"),
            member(".hidden.jpg"),
            member("a/._1.jpg"),
            member("folder", type=tarfile.DIRTYPE),
            member("4.txt", b"no image"),
            member("5.mp4", b"no image"),
            member("6.x.jpg", b"an ending that is not listed"),
            member("/etc/passwd", b"root"),
            member("../x.txt", b"x"),
            member("latest", type=tarfile.SYMTYPE, linkname="/"),
            member("dev/null", type=tarfile.CHRTYPE),
            member("a.txt", type=tarfile.LNKTYPE),
            member("1.jpg", png(5)),
            member("__index__", b"?"),
        ],
    )
    expected = [("a/1.jpg", 7), ("b/1.PNG", 12), ("./c/2.webp", -1), ("3.jpeg", 0), ("1.jpg", -1)]
    assert found_in(path) == expected
    assert index_tars(path) == 5
    source = PackedSource(tmp_path, PixelFormat(1))
    assert [int(source.read(index)[0, 0, 0]) for index in range(5)] == [1, 2, 3, 4, 5]


def test_every_kind_of_image_that_a_folder_lists_is_found_in_a_shard(tmp_path):
    names = [f"{number}{ending}" for number, ending in enumerate(IMAGE_ENDINGS)]
    path = write_tar(tmp_path / "a.tar", [member(name, png(1)) for name in names])
    assert found_in(path) == [(name, -1) for name in names]
    assert {".jpe", ".pgm"} < set(IMAGE_ENDINGS)


def test_features_beside_an_image_are_no_image(tmp_path):
    """As public sets have them; without an image beside it an array is one."""
    names = ["1.jpg", "1.npy", "2.npy", "3.npy", "3.png"]
    path = write_tar(tmp_path / "a.tar", [member(name, png(1)) for name in names])
    assert found_in(path) == [("1.jpg", -1), ("2.npy", -1), ("3.png", -1)]


LONG = "a folder with a long name/" * 8 + "übung 日本 " + "x" * 90


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_every_usual_way_to_write_a_name(tmp_path, format):
    """Long names lie in headers of their own before the member's; USTAR splits them."""
    long = "a/" * 60 + "x" * 90 if format == tarfile.USTAR_FORMAT else LONG
    odd = os.fsdecode(b"caf\xe9")
    names = [f"{long}.png", "short.png", f"{odd}.png", f"{long}2.png", "übung.png"]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=format, errors="surrogateescape") as archive:
        for shade, name in enumerate(names):
            archive.addfile(member(name, png(shade))[0], io.BytesIO(png(shade)))
    assert [name for name, _ in found_in(path)] == names
    index_tars(path)
    source = PackedSource(tmp_path, PixelFormat(1))
    assert [int(source.read(index)[0, 0, 0]) for index in range(5)] == [0, 1, 2, 3, 4]
    assert source.name(1) == f"{tmp_path}/a.tar/short.png"


@pytest.mark.parametrize("format", ["gnu", "pax", "ustar", "v7"])
def test_tar_files_of_the_system_s_own_tar(tmp_path, data, format):
    (tmp_path / "in").mkdir()
    for path in sorted((data / "val").rglob("*.png"))[::6]:
        label, copy = path.parent.name, tmp_path / f"in/{path.parent.name}_{path.name}"
        shutil.copy(path, copy)
        copy.with_suffix(".cls").write_text(f"{CLASSES.index(label)}\n")
    make = ["tar", "--sort=name", f"--format={format}", "-C", tmp_path / "in", "-cf"]
    assert run([*map(str, make), str(tmp_path / "a.tar"), "."]).returncode == 0
    index_tars(tmp_path / "a.tar")
    source = PackedSource(tmp_path, PixelFormat(1))
    assert len(source) == 10
    for index in range(10):
        name = source.name(index).removeprefix(f"{tmp_path}/a.tar/")
        expected = decode_image((tmp_path / "in" / name).read_bytes(), PixelFormat(1))
        assert torch.equal(source.read(index), expected)
        assert source.labels[index] == CLASSES.index(name.split("_")[0])


def plain(path: Path) -> Path:
    """Two images of 1,000 and 2,000 bytes; the second header lies at 1,536."""
    return write_tar(
        path, [member("1.jpg", b"1" * 1000), member("2.jpg", b"2" * 2000)], tarfile.USTAR_FORMAT
    )


def huge_pax(path: Path) -> Path:
    """A pax header of 8 GiB, and a file (with holes) of that size, so that it is not cut off."""
    write_tar(path, [member("1.jpg", b"1", pax_headers={"comment": "x"})])
    patched(path, 124, b"%011o\0" % (8**11 - 1), header=0)
    os.truncate(path, 8**11 + 10_000)
    return path


Writer = Callable[[Path], Path]


def tar_of(*members) -> Writer:
    return lambda path: write_tar(path, members)


def of_kind(kind: bytes, name: str = "1.jpg", content: bytes = b"", **more) -> Writer:
    return tar_of(member(name, content, type=kind, **more))


def pax_of(records: bytes, kind: bytes = tarfile.XHDTYPE) -> Writer:
    return tar_of(member("x", records, type=kind), member("1.jpg", b"1" * 9))


def labelled(label: bytes) -> Writer:
    return tar_of(member("1.jpg", b"1"), member("1.cls", label))


def sized(field: bytes) -> Writer:
    """The size field of the second header."""
    return lambda path: patched(plain(path), 1536 + 124, field, header=1536)


def changed(change: Callable[[bytes], bytes]) -> Writer:
    """The bytes of a sound tar file, changed."""

    def write(path: Path) -> Path:
        path.write_bytes(change(plain(path).read_bytes()))
        return path

    return write


SPARSE = {
    "GNU.sparse.major": "1",
    "GNU.sparse.minor": "0",
    "GNU.sparse.name": "1.jpg",
    "GNU.sparse.realsize": "9",
}
# what is wrong: how it is written, what the message names beside the tar file
HOSTILE: dict[str, tuple[Writer, str]] = {
    "a link": (of_kind(tarfile.SYMTYPE, linkname="/etc/passwd"), "1.jpg"),
    "a hard link": (of_kind(tarfile.LNKTYPE, linkname="../../x"), "1.jpg"),
    "a linked label": (
        tar_of(member("1.jpg", b"1"), member("1.cls", type=tarfile.SYMTYPE)),
        "1.cls",
    ),
    "a device": (of_kind(tarfile.CHRTYPE, devmajor=1, devminor=5), "1.jpg"),
    "a pipe": (of_kind(tarfile.FIFOTYPE), "1.jpg"),
    "a folder": (of_kind(tarfile.DIRTYPE), "1.jpg"),
    "a way up": (tar_of(member("../1.jpg", b"1")), "../1.jpg"),
    "a way up inside": (tar_of(member("a/../../1.cls", b"1")), "a/../../1.cls"),
    "an absolute name": (tar_of(member("/1.jpg", b"1")), "/1.jpg"),
    "10 GB": (sized(b"\x80" + (10**10).to_bytes(11, "big")), "10000000000"),
    "one byte too many": (sized(b"%011o\0" % 8193), "8193"),
    "a negative size": (sized(b"\xff" * 12), ""),
    "2^87 bytes": (sized(b"\x80\x7f" + b"\xff" * 10), "2.jpg"),
    "a size that is no number": (sized(b"99999999999\0"), "1536"),
    "10 GB by pax": (pax_of(b"20 size=10000000000\n"), "10000000000"),
    "a negative pax size": (pax_of(b"11 size=-1\n"), ""),
    "a large negative pax size": (pax_of(b"15 size=-99999\n"), ""),
    "a pax size of 100 digits": (pax_of(b"110 size=" + b"1" * 100 + b"\n"), ""),
    "a pax header of 8 GB": (huge_pax, ""),
    "a pax record of no length": (pax_of(b"0 path=x\n"), ""),
    "a shared pax path": (pax_of(b"14 path=a.jpg\n", tarfile.XGLTYPE), ""),
    "2,000 pax headers for one member": (
        tar_of(*[member("x", b"", type=tarfile.XHDTYPE)] * 2000, member("1.jpg", b"1")),
        "",
    ),
    "sparse by pax": (tar_of(member("x/1.jpg", b"1\n0\n9\n", pax_headers=SPARSE)), "1.jpg"),
    "sparse by GNU": (of_kind(tarfile.GNUTYPE_SPARSE, content=b"1"), ""),
    "two images": (
        tar_of(member("1.jpg", b"1"), member("1.txt"), member("1.png", b"2")),
        "['1.jpg', '1.png']",
    ),
    "labels apart": (
        tar_of(member("1.jpg", b"1"), member("2.jpg", b"1"), member("1.cls", b"0")),
        "'1'",
    ),
    "a word as label": (labelled(b"cat"), "b'cat'"),
    "a negative label": (labelled(b"-1"), "b'-1'"),
    "a label of 10 digits": (labelled(b"9" * 10), "1.cls"),
    "a label of 1 MB": (labelled(b"0" * 2**20), "1.cls"),
    "cut in a header": (changed(lambda content: content[:1700]), "1700"),
    "cut in an image": (changed(lambda content: content[:2500]), "2.jpg"),
    "no end mark": (changed(lambda content: content[:4096]), "4096"),
    "empty": (changed(lambda _: b""), ""),
    "compressed": (changed(gzip.compress), ""),
    "an image": (changed(lambda _: png(3) * 20), ""),
    "a damaged header": (lambda path: patched(plain(path), 1536, b"3"), "1536"),
    "two in one": (changed(lambda content: content * 2), ""),
    "no image": (tar_of(member("1.txt", b"1")), ""),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_and_broken_tar_files_are_refused(tmp_path, case):
    """In one line, with nothing written beside them, and with little memory."""
    write, named = HOSTILE[case]
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in/a.tar")
    tracemalloc.start()
    try:
        found = refused("--index", path, "--workers", 1)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
    assert named in found
    assert str(path.parent if case == "no image" else path) in found
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")] == [Path("in/a.tar")]


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_wrong_with_a_tar_file_it_is_an_input_error_or_lies_inside(tmp_path, seed):
    """200 times a few bytes of the headers are changed, half of the time with a checksum that
    fits."""
    chance = random.Random(seed)
    original = write_tar(
        tmp_path / "original.tar",
        [
            member(f"{LONG}.png", png(1)),
            member("2.png", png(2)),
            member("2.cls", b"3"),
            member("3.png", png(4)),
        ],
        chance.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    )
    whole = original.read_bytes()
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    assert len(headers) >= 5
    path = tmp_path / "changed.tar"
    refusals = 0
    for _ in range(200):
        path.write_bytes(whole)
        header = chance.choice(headers)
        for _ in range(chance.randint(1, 3)):
            place = header + chance.choice([chance.randrange(1024), chance.randrange(124, 158)])
            patched(
                path,
                place,
                bytes([chance.choice([0, 32, 48, 55, 0x80, 0xFF, chance.randrange(256)])]),
                chance.choice([header, None]),
            )
        try:
            index = index_shard(path)
        except InputError:
            refusals += 1
            continue
        ends = index.entries["offset"] + index.entries["length"]
        assert (ends <= len(whole)).all() and (index.entries["length"] >= 0).all()
    assert 50 < refusals < 200


def test_shards_of_one_index_lie_in_one_folder(tmp_path):
    one, two = plain(tmp_path / "a/1.tar"), plain(tmp_path / "b/2.tar")
    assert f"{one} and {two}" in refused("--index", one, two)
    for path in (tmp_path / "gone.tar", tmp_path / "a"):
        assert str(path) in refused("--index", path)


@pytest.mark.parametrize("name", ["index.json", "index.npy", "names.npy"])
def test_a_file_of_others_is_not_replaced_by_an_index(tmp_path, name):
    """Other programs call their indices so, too."""
    path = write_tar(tmp_path / "a.tar", [member("1.png", png(1))])
    for content in (b'{"shardlist": []}', b"[]", b""):
        (tmp_path / name).write_bytes(content)
        before = contents(tmp_path)
        assert str(tmp_path / name) in refused("--index", path, "--workers", 1)
        assert contents(tmp_path) == before
    (tmp_path / name).unlink()
    assert index_tars(path) == index_tars(path) == 1


def test_the_order_of_the_arguments_does_not_matter(tmp_path):
    for name, shade in (("b", 2), ("a", 1), ("c", 3)):
        write_tar(tmp_path / f"{name}.tar", [member(f"{name}.png", png(shade))])
    assert index_tars(*(tmp_path / f"{name}.tar" for name in "cabb")) == 3
    first = contents(tmp_path)
    assert pack_dataset.main(
        ["--index", *(str(tmp_path / f"{n}.tar") for n in "abc"), "--workers", "2"]
    )
    assert contents(tmp_path) == first
    assert [PackedSource(tmp_path, PixelFormat(1)).name(index)[-5:] for index in range(3)] == [
        "a.png",
        "b.png",
        "c.png",
    ]
