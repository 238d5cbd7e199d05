"""Shards that others wrote: which samples are found, and what hostile or broken tar files come
to."""

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
from runs import CLASSES, make_pictures, run

from data.images import decode_image
from data.packs.shards import index_shard
from data.packs.source import LabelledPack, PackedSource
from tools import pack_dataset
from util.errors import InputError


def found_in(path: Path) -> list[tuple[str, int]]:
    index = index_shard(path)
    return list(
        zip(
            [name.decode("utf-8", "surrogateescape") for name in index.names],
            index.entries["label"].tolist(),
            strict=True,
        )
    )


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
            member("1.jpg", png(5)),
            member("__index__", b"?"),
        ],
    )
    expected = [("a/1.jpg", 7), ("b/1.PNG", 12), ("./c/2.webp", -1), ("3.jpeg", 0), ("1.jpg", -1)]
    assert found_in(path) == expected
    assert index_tars(path) == 5
    source = PackedSource(tmp_path, 1)
    assert [int(source.read(index)[0, 0, 0]) for index in range(5)] == [1, 2, 3, 4, 5]


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
    source = PackedSource(tmp_path, 1)
    assert [int(source.read(index)[0, 0, 0]) for index in range(5)] == [0, 1, 2, 3, 4]
    assert source.name(1) == f"{tmp_path}/a.tar/short.png"


@pytest.mark.parametrize("format", ["gnu", "pax", "ustar", "v7"])
def test_tar_files_of_the_system_s_own_tar(tmp_path, format):
    data = make_pictures(tmp_path / "pictures")
    (tmp_path / "in").mkdir()
    for path in sorted((data / "val").rglob("*.png"))[::6]:
        shutil.copy(path, tmp_path / f"in/{path.parent.name}_{path.name}")
        (tmp_path / f"in/{path.parent.name}_{path.stem}.cls").write_text(
            f"{CLASSES.index(path.parent.name)}\n"
        )
    command = [
        "tar",
        "--sort=name",
        f"--format={format}",
        "-cf",
        tmp_path / "a.tar",
        "-C",
        tmp_path / "in",
        ".",
    ]
    assert run(list(map(str, command))).returncode == 0
    index_tars(tmp_path / "a.tar")
    source = LabelledPack(tmp_path, 1)
    assert len(source) == 10
    for index in range(10):
        name = source.name(index).removeprefix(f"{tmp_path}/a.tar/")
        assert torch.equal(
            source.read(index), decode_image((tmp_path / "in" / name).read_bytes(), 1)
        )
        assert source.labels[index] == CLASSES.index(name.split("_")[0])


def plain(path: Path) -> Path:
    """Two images of 1,000 and 2,000 bytes; the second header lies at 1,536."""
    return write_tar(
        path, [member("1.jpg", b"1" * 1000), member("2.jpg", b"2" * 2000)], tarfile.USTAR_FORMAT
    )


def huge_pax(path: Path) -> Path:
    """A pax header of 10 GB, and as much of a file (of holes), so that it is not cut off."""
    write_tar(path, [member("1.jpg", b"1", pax_headers={"comment": "x"})])
    patched(path, 124, b"%011o\0" % (8**11 - 1), header=0)
    os.truncate(path, 8**11 + 10_000)
    return path


def pax_of(records: bytes) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        return write_tar(
            path, [member("x", records, type=tarfile.XHDTYPE), member("1.jpg", b"1" * 9)]
        )

    return write


def oversized(content: bytes) -> Callable[[Path], Path]:
    return lambda path: patched(plain(path), 1536 + 124, content, header=1536)


SPARSE = {
    "GNU.sparse.major": "1",
    "GNU.sparse.minor": "0",
    "GNU.sparse.name": "1.jpg",
    "GNU.sparse.realsize": "9",
}
HOSTILE = {
    "a link": (
        lambda p: write_tar(p, [member("1.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")]),
        "'1.jpg' is a link or device",
    ),
    "a hard link": (
        lambda p: write_tar(p, [member("1.jpg", type=tarfile.LNKTYPE, linkname="../../x")]),
        "'1.jpg' is a link or device",
    ),
    "a linked label": (
        lambda p: write_tar(p, [member("1.jpg", b"1"), member("1.cls", type=tarfile.SYMTYPE)]),
        "'1.cls' is a link or device",
    ),
    "a device": (
        lambda p: write_tar(p, [member("1.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5)]),
        "'1.jpg' is a link or device",
    ),
    "a pipe": (
        lambda p: write_tar(p, [member("1.jpg", type=tarfile.FIFOTYPE)]),
        "'1.jpg' is a link or device",
    ),
    "a folder": (
        lambda p: write_tar(p, [member("1.jpg", type=tarfile.DIRTYPE)]),
        "'1.jpg' is a link or device",
    ),
    "a way up": (
        lambda p: write_tar(p, [member("../1.jpg", b"1")]),
        "the name '../1.jpg' leads out of the archive",
    ),
    "a way up inside": (
        lambda p: write_tar(p, [member("a/../../1.cls", b"1")]),
        "leads out of the archive",
    ),
    "an absolute name": (
        lambda p: write_tar(p, [member("/1.jpg", b"1")]),
        "the name '/1.jpg' leads out",
    ),
    "10 GB": (
        oversized(
            b"%011o\0" % 10**10 if 10**10 < 8**11 else b"\x80" + (10**10).to_bytes(11, "big")
        ),
        "'2.jpg' at byte 1536 declares 10000000000 bytes, the file has 10240",
    ),
    "one byte too many": (oversized(b"%011o\0" % 8193), "declares 8193 bytes, the file has 10240"),
    "a negative size": (oversized(b"\xff" * 12), "declares -1 bytes"),
    "2^87 bytes": (oversized(b"\x80\x7f" + b"\xff" * 10), "bytes, the file has 10240"),
    "a size that is no number": (
        oversized(b"99999999999\0"),
        "damaged one: invalid header at byte 1536",
    ),
    "10 GB by pax": (pax_of(b"20 size=10000000000\n"), "declares 10000000000 bytes"),
    "a pax size that is no number": (
        pax_of(b"11 size=-1\n"),
        "a damaged pax header: its size is no number",
    ),
    "a pax size of 100 digits": (
        pax_of(b"110 size=" + b"1" * 100 + b"\n"),
        "its size is no number",
    ),
    "a pax header of 8 GB": (huge_pax, "has an extended header of 8589934591 bytes"),
    "a pax record too long": (pax_of(b"99 path=x\n"), "has a damaged pax header"),
    "a pax record of no length": (pax_of(b"0 path=x\n"), "has a damaged pax header"),
    "a pax record without end": (pax_of(b"path=x"), "has a damaged pax header"),
    "a shared pax path": (
        lambda p: write_tar(
            p, [member("x", b"12 path=abc\n", type=tarfile.XGLTYPE), member("1.jpg", b"1")]
        ),
        "gives one path or size to all members",
    ),
    "sparse by pax": (
        lambda p: write_tar(p, [member("GNUSparseFile.0/1.jpg", b"1\n0\n9\n", pax_headers=SPARSE)]),
        "has a sparse member",
    ),
    "sparse by GNU": (
        lambda p: write_tar(p, [member("1.jpg", b"1", type=tarfile.GNUTYPE_SPARSE)]),
        "has a sparse member",
    ),
    "two images": (
        lambda p: write_tar(p, [member("1.jpg", b"1"), member("1.txt"), member("1.png", b"2")]),
        "has two images under one key: '1.jpg' and '1.png'",
    ),
    "labels apart": (
        lambda p: write_tar(
            p, [member("1.jpg", b"1"), member("2.jpg", b"1"), member("1.cls", b"0")]
        ),
        "the label of '1' has no image beside it",
    ),
    "a word as label": (
        lambda p: write_tar(p, [member("1.jpg", b"1"), member("1.cls", b"cat")]),
        "'1.cls' must hold a label, a whole number from 0 on, got b'cat'",
    ),
    "a negative label": (
        lambda p: write_tar(p, [member("1.jpg", b"1"), member("1.cls", b"-1")]),
        "got b'-1'",
    ),
    "a label of 10 digits": (
        lambda p: write_tar(p, [member("1.jpg", b"1"), member("1.cls", b"9" * 10)]),
        "must hold",
    ),
    "a label of 1 MB": (
        lambda p: write_tar(p, [member("1.jpg", b"1"), member("1.cls", b"0" * 2**20)]),
        "must hold",
    ),
    "cut in a header": (
        lambda p: p.write_bytes(plain(p).read_bytes()[:1700]) and p,
        "cut off: it ends at byte 1700",
    ),
    "cut in an image": (
        lambda p: p.write_bytes(plain(p).read_bytes()[:2500]) and p,
        "declares 2000 bytes",
    ),
    "no end mark": (
        lambda p: p.write_bytes(plain(p).read_bytes()[:4096]) and p,
        "is cut off: it ends at byte 4096",
    ),
    "empty": (
        lambda p: p.write_bytes(b"") or p,
        "is cut off: it ends at byte 0 without an end mark",
    ),
    "compressed": (
        lambda p: p.write_bytes(__import__("gzip").compress(plain(p).read_bytes())) and p,
        "is compressed",
    ),
    "an image": (lambda p: p.write_bytes(png(3) * 20) and p, "is no tar file or a damaged one: "),
    "a damaged header": (
        lambda p: patched(plain(p), 1536, b"3"),
        "damaged one: bad checksum at byte 1536",
    ),
    "two in one": (
        lambda p: p.write_bytes(plain(p).read_bytes() * 2) and p,
        "goes on after its end mark",
    ),
    "no image": (
        lambda p: write_tar(p, [member("1.txt", b"1")]),
        "there is no image in the shards of",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_and_broken_tar_files_are_refused(tmp_path, case):
    """In one line, nothing written beside them, and with little memory."""
    write, message = HOSTILE[case]
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in/a.tar")
    tracemalloc.start()
    try:
        found = refused("--index", path, "--workers", 1)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
    assert message in found
    assert str(path.parent) in found
    assert [path.name for path in path.parent.iterdir()] == ["a.tar"]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_links_and_names_that_are_no_samples_are_passed_over(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        [
            member("/etc/passwd", b"root"),
            member("../x.txt", b"x"),
            member("latest", type=tarfile.SYMTYPE, linkname="/"),
            member("dev/null", type=tarfile.CHRTYPE),
            member("1.png", png(9)),
            member("a.txt", type=tarfile.LNKTYPE),
        ],
    )
    assert found_in(path) == [("1.png", -1)]


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
    found = refused("--index", one, two)
    assert found == f"shards of one index lie in one folder: {one} and {two} do not"
    assert f"{tmp_path}/gone.tar cannot be read: No such file" in refused(
        "--index", tmp_path / "gone.tar"
    )
    assert "cannot be read: Is a directory" in refused("--index", tmp_path / "a")


def test_the_order_of_the_arguments_does_not_matter(tmp_path):
    for name, shade in (("b", 2), ("a", 1), ("c", 3)):
        write_tar(tmp_path / f"{name}.tar", [member(f"{name}.png", png(shade))])
    assert index_tars(*(tmp_path / f"{name}.tar" for name in "cabb")) == 3
    first = contents(tmp_path)
    assert pack_dataset.main(
        ["--index", *(str(tmp_path / f"{n}.tar") for n in "abc"), "--workers", "2"]
    )
    assert contents(tmp_path) == first
    assert [PackedSource(tmp_path, 1).name(index)[-5:] for index in range(3)] == [
        "a.png",
        "b.png",
        "c.png",
    ]
