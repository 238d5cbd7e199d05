"""The list of a folder's images: the same whether it was kept or is made anew, and never a stale
one."""

import hashlib
import json
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from data.listing import IMAGE_ENDINGS, image_names

from data import listing
from data.labels import ClassFolder
from data.sources import FolderSource
from tools.packing.packing import list_images
from util.errors import InputError

GRAIN = 0.03  # s; more than the clock of any file system here


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def walked(root: Path) -> list[str]:
    """What is to be found, by the library's own walk."""
    found, seen = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        inside = [name for name in files if name[0] != "." and name.lower().endswith(IMAGE_ENDINGS)]
        found += [str((Path(folder) / name).relative_to(root)) for name in inside]
    return sorted(found)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of kept lists; any tree is kept as soon as it has been still for a moment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "KEPT_FROM", 1)
    monkeypatch.setattr(listing, "KEPT_SHARE", 0)
    monkeypatch.setattr(listing, "RECENT_S", GRAIN / 2)
    return tmp_path / "cache/mae/listings"


@pytest.fixture
def looked_into(monkeypatch) -> list[str]:
    """The folders whose entries were read."""
    folders: list[str] = []
    scandir = os.scandir

    def noted(path):
        folders.append(str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", noted)
    return folders


def kept_file(cache: Path) -> Path:
    (path,) = cache.iterdir()
    return path


def make_tree(tmp_path: Path) -> Path:
    """Folders, hidden things, links to folders, files and nowhere, and a cycle."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    touch(
        root,
        "a/1.jpg",
        "a/deep/2.JPG",
        "a/.hidden.png",
        ".git/3.jpg",
        "b/notes.txt",
        "b/4.png",
        "5.webp",
        "empty/x",
    )
    touch(elsewhere, "folder/6.jpg", "folder/deep/7.jpg", "8.jpg", "other/9.jpg")
    (root / "linked").symlink_to(elsewhere / "folder")
    (root / "chain").symlink_to(elsewhere / "chain")
    (elsewhere / "chain").symlink_to(elsewhere / "other")
    (root / "b/file.jpg").symlink_to(elsewhere / "8.jpg")
    (root / "b/nowhere").symlink_to(elsewhere / "gone")
    (root / "a/up").symlink_to(root)
    time.sleep(GRAIN)
    return root


TREE = [
    "5.webp",
    "a/1.jpg",
    "a/deep/2.JPG",
    "b/4.png",
    "b/file.jpg",
    "chain/9.jpg",
    "linked/6.jpg",
    "linked/deep/7.jpg",
]


def test_a_kept_list_is_the_same_and_no_folder_is_read_for_it(tmp_path, cache, looked_into, caplog):
    root = make_tree(tmp_path)
    assert image_names(root) == TREE == walked(root)
    assert kept_file(cache).stat().st_size > 0
    looked_into.clear()
    with caplog.at_level(logging.INFO):
        names = image_names(root)
    assert looked_into == []
    assert names == TREE
    assert (
        f"{len(TREE)} images as listed in {kept_file(cache)}, as nothing changed in its 9 folders"
        in caplog.text
    )


def change_the_time_back(root: Path) -> None:
    before = (root / "a").stat()
    touch(root, "a/new.jpg")
    os.utime(root / "a", ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync and tar do


def put_another_folder_in_place(folder: Path) -> None:
    """Of the same name and time, with other images."""
    before = folder.stat()
    folder.rename(folder.with_name("aside"))
    touch(folder, "another.jpg")
    os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))


def point_elsewhere(link: Path, target: Path) -> None:
    link.unlink()
    link.symlink_to(target)


CHANGES: dict[str, Callable[[Path, Path], object]] = {
    "file added": lambda root, _: touch(root, "a/deep/new.jpg"),
    "file added at the top": lambda root, _: touch(root, "new.jpg"),
    "file removed": lambda root, _: (root / "a/1.jpg").unlink(),
    "file renamed": lambda root, _: (root / "a/1.jpg").rename(root / "a/0.jpg"),
    "file moved": lambda root, _: (root / "a/1.jpg").rename(root / "b/1.jpg"),
    "file hidden": lambda root, _: (root / "a/1.jpg").rename(root / "a/.1.jpg"),
    "folder added": lambda root, _: touch(root, "empty/more/new.jpg"),
    "folder removed": lambda root, _: shutil.rmtree(root / "a/deep"),
    "folder renamed": lambda root, _: (root / "a").rename(root / "z"),
    "folder hidden": lambda root, _: (root / "a").rename(root / ".a"),
    "folder shown": lambda root, _: (root / ".git").rename(root / "git"),
    "folder replaced": lambda root, _: put_another_folder_in_place(root / "a"),
    "file replaced by a folder": lambda root, _: [
        (root / "5.webp").unlink(),
        touch(root, "5.webp/new.jpg"),
    ],
    "time set back": lambda root, _: change_the_time_back(root),
    "file added behind a link": lambda _, elsewhere: touch(elsewhere, "folder/deep/new.jpg"),
    "file added behind two links": lambda _, elsewhere: touch(elsewhere, "other/new.jpg"),
    "folder behind a link replaced": lambda _, elsewhere: put_another_folder_in_place(
        elsewhere / "folder"
    ),
    "folder behind a link removed": lambda _, elsewhere: (elsewhere / "folder").rename(
        elsewhere / "away"
    ),
    "link points elsewhere": lambda root, elsewhere: point_elsewhere(
        root / "linked", elsewhere / "other"
    ),
    "second link points elsewhere": lambda _, elsewhere: point_elsewhere(
        elsewhere / "chain", elsewhere / "folder"
    ),
    "folder appears behind a link to nowhere": lambda _, elsewhere: touch(
        elsewhere, "gone/new.jpg"
    ),
    "folder appears behind a link to a file": lambda _, elsewhere: [
        (elsewhere / "8.jpg").unlink(),
        touch(elsewhere, "8.jpg/new.jpg"),
    ],
    "cycle opened": lambda root, elsewhere: point_elsewhere(root / "a/up", elsewhere),
    "root replaced": lambda root, _: put_another_folder_in_place(root),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(tmp_path, cache, change):
    root = make_tree(tmp_path)
    image_names(root)
    assert kept_file(cache)
    CHANGES[change](root, tmp_path / "elsewhere")
    changed = walked(root)
    assert changed != TREE
    assert image_names(root) == changed
    time.sleep(GRAIN)
    assert image_names(root) == image_names(root) == changed  # kept anew


def test_folders_of_the_same_time_are_told_apart(tmp_path, cache):
    """Made within one tick of the clock, they differ by their inodes alone."""
    root = make_tree(tmp_path)
    one, other = tmp_path / "elsewhere/other", tmp_path / "elsewhere/twin"
    touch(other, "twin.jpg")
    times: set[tuple[int, int]] = set()
    while len(times) != 1:
        time.sleep(
            GRAIN
        )  # else newer kernels give times finer than a tick, as these were looked at
        os.utime(one, ns=(0, 0))
        os.utime(other, ns=(0, 0))
        times = {(path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in (one, other)}
    time.sleep(GRAIN)
    assert image_names(root) == TREE
    point_elsewhere(tmp_path / "elsewhere/chain", other)
    assert "chain/twin.jpg" in image_names(root)


def test_other_content_in_the_same_files_is_no_change(tmp_path, cache, looked_into):
    root = make_tree(tmp_path)
    image_names(root)
    looked_into.clear()
    (root / "a/1.jpg").write_bytes(b"more")
    (
        tmp_path / "elsewhere/8.jpg"
    ).unlink()  # what b/file.jpg points to: now a bad image, and still listed
    names = image_names(root)
    assert looked_into == []
    assert names == TREE == walked(root)


def random_name(chance: random.Random) -> str:
    return chance.choice("abcde") + chance.choice(
        ["", "", ".jpg", ".PNG", ".txt", "\n.gif", "\udce9.bmp"]
    )


def change_at_random(root: Path, elsewhere: Path, chance: random.Random) -> None:
    """Adds, links, renames or removes something somewhere."""
    folders = [
        path for top in (root, elsewhere) for path in (top, *top.rglob("*")) if path.is_dir()
    ]
    folder = chance.choice(folders)
    path = folder / random_name(chance)
    action = chance.randrange(5)
    if not os.path.lexists(path):
        if action == 0:
            path.mkdir()
        elif action == 1:
            path.symlink_to(
                chance.choice([*folders, elsewhere / "gone", elsewhere / random_name(chance)])
            )
        else:
            path.touch()
    elif action == 0:
        path.rename(folder / f"moved{random_name(chance)}")
    elif action == 1 and path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # its parent may be a link to something in it
    elif not path.is_dir() or path.is_symlink():
        path.unlink()


@pytest.mark.parametrize("seed", range(6))
def test_random_trees_under_random_changes(tmp_path, cache, looked_into, seed):
    chance = random.Random(seed)
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    for _ in range(40):
        change_at_random(root, elsewhere, chance)
    times_kept = 0
    for _ in range(25):
        change_at_random(root, elsewhere, chance)
        assert image_names(root) == walked(root)
        if chance.random() < 0.5:
            time.sleep(GRAIN)
            assert image_names(root) == walked(root)
            looked_into.clear()
            names = image_names(root)
            times_kept += not looked_into
            assert names == walked(root)
    assert times_kept > 5


def test_a_change_while_folders_are_read_is_noticed_afterwards(tmp_path, cache, monkeypatch):
    root = make_tree(tmp_path)
    monkeypatch.setattr(listing, "RECENT_S", -3600)  # this must hold without that rule
    scandir = os.scandir

    def scandir_and_change(path):
        entries = scandir(path)
        monkeypatch.setattr(os, "scandir", scandir)
        names = list(entries)
        touch(Path(path), "meanwhile.jpg")
        return scandir_of(names)

    class scandir_of(list):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", scandir_and_change)
    assert image_names(root) == TREE
    assert kept_file(cache)
    assert image_names(root) == walked(root) == sorted([*TREE, "meanwhile.jpg"])


def test_a_folder_that_has_just_changed_is_not_trusted(tmp_path, cache, monkeypatch, caplog):
    root = make_tree(tmp_path)
    monkeypatch.setattr(listing, "RECENT_S", 0.3)
    time.sleep(0.3)
    touch(root, "a/deep/new.jpg")
    with caplog.at_level(logging.INFO):
        image_names(root)
    assert not cache.exists()
    assert "is not kept: a folder was changed less than 0.3 s ago" in caplog.text
    time.sleep(0.31)
    image_names(root)
    assert kept_file(cache)


def test_the_margin_is_longer_than_a_coarse_clock_and_a_servers_delay():
    assert listing.RECENT_S >= 2


def test_file_systems_that_may_not_keep_times_are_not_trusted(
    tmp_path, cache, monkeypatch, looked_into, caplog
):
    assert listing._keep_times({tmp_path.stat().st_dev})
    assert not listing._keep_times({tmp_path.stat().st_dev, Path("/proc").stat().st_dev})
    assert not listing._keep_times({os.makedev(4095, 4095)})
    root = make_tree(tmp_path)
    trusted = listing.KEEP_TIMES
    monkeypatch.setattr(listing, "KEEP_TIMES", frozenset())
    with caplog.at_level(logging.INFO):
        assert image_names(root) == TREE
    assert not cache.exists()
    assert "its file system is not known to keep folders' times" in caplog.text
    monkeypatch.setattr(listing, "KEEP_TIMES", trusted)
    image_names(root)
    assert kept_file(cache)
    monkeypatch.setattr(listing, "KEEP_TIMES", frozenset())  # nor is one that was kept before
    looked_into.clear()
    assert image_names(root) == TREE
    assert looked_into != []


def test_small_trees_and_those_with_a_folder_per_image_leave_no_file(tmp_path, cache, monkeypatch):
    root = tmp_path / "root"
    touch(
        root, *(f"{folder}/{number}.jpg" for folder in range(4) for number in range(10))
    )  # 40 images, 5 looks
    time.sleep(GRAIN)
    for kept_from, share, keeps in ((41, 8, False), (40, 9, False), (40, 8, True)):
        monkeypatch.setattr(listing, "KEPT_FROM", kept_from)
        monkeypatch.setattr(listing, "KEPT_SHARE", share)
        assert len(image_names(root)) == 40
        assert cache.exists() == keeps
    shutil.rmtree(cache)
    (root / "link.jpg").symlink_to(root / "0/0.jpg")  # a sixth look
    time.sleep(GRAIN)
    assert len(image_names(root)) == 41
    assert not cache.exists()
    assert not listing.KEPT_FROM < 40


def test_the_shipped_limits():
    """CIFAR-10's 50,000 files and ImageNet's 50,000 for validation leave none, its 1,281,167 of
    1,000 classes do."""
    assert 50_000 < listing.KEPT_FROM < 1_281_167
    assert 1_001 * listing.KEPT_SHARE < listing.KEPT_FROM


def damage(content: bytes) -> list[bytes]:
    flipped = [bytearray(content) for _ in range(6)]
    places = (0, 63, 64, 65, len(content) // 2, len(content) - 1)
    for copy, place in zip(flipped, places, strict=True):
        copy[place] ^= 1
    return [
        b"",
        b"\n",
        content[:10],
        content[:64],
        content[:65],
        content[:-1],
        content + b" ",
        b"\0" * 500,
        *flipped,
    ]


def test_a_damaged_file_is_listed_anew_and_replaced(tmp_path, cache, looked_into):
    root = make_tree(tmp_path)
    image_names(root)
    whole = kept_file(cache).read_bytes()
    for damaged in map(bytes, damage(whole)):
        kept_file(cache).write_bytes(damaged)
        looked_into.clear()
        assert image_names(root) == TREE
        assert looked_into != []
        assert kept_file(cache).read_bytes() == whole


@pytest.mark.parametrize("entry", [("version", 0), ("root", "/elsewhere"), ("endings", [".jpg"])])
def test_a_file_of_another_version_root_or_rule_is_not_used(tmp_path, cache, entry):
    root = make_tree(tmp_path)
    image_names(root)
    whole = kept_file(cache).read_bytes()
    content = json.loads(whole.partition(b"\n")[2])
    content["header"] |= dict([entry])
    content["folders"][0][2] = ["invented.jpg"]
    text = json.dumps(content).encode()
    kept_file(cache).write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    assert image_names(root) == TREE
    assert kept_file(cache).read_bytes() == whole


def test_a_cache_that_cannot_be_written_or_read_is_no_error(tmp_path, cache, monkeypatch, caplog):
    root = make_tree(tmp_path)
    touch(tmp_path, "file")
    for place in ("/dev/null", "/proc", str(tmp_path / "file")):
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        with caplog.at_level(logging.INFO):
            assert image_names(root) == image_names(root) == TREE
        assert "is not kept" in caplog.text
        caplog.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "folder"))
    listing._place(root).mkdir(parents=True)  # a folder where the file should be
    assert image_names(root) == image_names(root) == TREE
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert image_names(root) == TREE


def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path, cache, caplog):
    root = make_tree(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        names = image_names(root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names == TREE
    assert list(cache.iterdir()) == []


def test_the_cache_folder_follows_the_rules(tmp_path, cache, monkeypatch):
    root = make_tree(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given, place in (
        (str(tmp_path / "given"), tmp_path / "given"),
        ("relative", tmp_path / "home/.cache"),
        ("", tmp_path / "home/.cache"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        image_names(root)
        assert kept_file(place / "mae/listings")
        assert (place / "mae/listings").stat().st_mode & 0o777 == 0o700
        shutil.rmtree(place)
    monkeypatch.delenv("XDG_CACHE_HOME")
    image_names(root)
    assert kept_file(tmp_path / "home/.cache/mae/listings")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "elsewhere",
        "home",
        "root",
    ]  # nothing beside the images


def test_a_folder_is_the_same_by_every_path_to_it_and_another_one_is_not(
    tmp_path, cache, looked_into, monkeypatch
):
    root = make_tree(tmp_path)
    (tmp_path / "alias").symlink_to(root)
    image_names(tmp_path / "alias")
    monkeypatch.chdir(root / "a")
    looked_into.clear()
    assert image_names(root) == image_names(Path("..")) == TREE
    assert looked_into == []
    assert image_names(Path()) == walked(Path())
    assert len(list(cache.iterdir())) == 2
    touch(tmp_path / "second", "1.jpg")
    point_elsewhere(tmp_path / "alias", tmp_path / "second")
    assert image_names(tmp_path / "alias") == ["1.jpg"]


def test_all_that_read_folders_find_the_same_kept_or_not(tmp_path, cache, looked_into):
    for split in ("train", "val"):
        touch(
            tmp_path / "data",
            *(f"{split}/{name}/{number}.jpg" for name in ("cat", "dog") for number in range(3)),
        )
    time.sleep(GRAIN)
    train = tmp_path / "data/train"

    def facts() -> list[object]:
        source, labelled = (
            FolderSource(str(tmp_path / "data"), 3),
            ClassFolder(train, ["cat", "dog"], 3),
        )
        packing = list_images(train, True)
        lists = [
            array.tolist()
            for array in (source.names, labelled.names, labelled.labels, packing.names)
        ]
        return [*lists, source.names.dtype, source.fingerprint(), source.name(5), packing.digest()]

    first = facts()
    looked_into.clear()
    assert facts() == first
    assert looked_into == []
    touch(train, "cat/new.jpg")
    assert len(list_images(train, True).names) == 7


def test_an_unreadable_folder_is_the_same_error_with_a_kept_list(tmp_path, cache, monkeypatch):
    root = make_tree(tmp_path)
    image_names(root)
    scandir = os.scandir

    def refused(path):
        if Path(path).name == "deep":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    (root / "a/deep").chmod(0o000)  # changes its ctime; whoever runs as root can still read it
    with pytest.raises(InputError) as error:
        image_names(root)
    assert str(error.value) == f"cannot list {root / 'a/deep'}: Permission denied"


# Several processes

CHILD = """
import sys, time
from pathlib import Path
from data import listing
listing.KEPT_FROM, listing.KEPT_SHARE, listing.RECENT_S = 1, 0, 0.01
sys.stdout.write("ready\\n"); sys.stdout.flush()
sys.stdin.readline()
for _ in range(30):
    names = listing.image_names(Path(sys.argv[1]))
    assert len(names) == 400, len(names)
    Path(sys.argv[2]).unlink(missing_ok=True)
sys.stdout.write("same\\n")
"""


def test_processes_that_start_together_do_not_disturb_one_another(tmp_path, cache):
    """Each lists, writes, reads and removes, thirty times, at the same time as the three others."""
    root = tmp_path / "root"
    touch(
        root,
        *(
            f"{folder}/a long enough name for a file {number}.jpg"
            for folder in range(4)
            for number in range(100)
        ),
    )
    time.sleep(GRAIN)
    command = [sys.executable, "-c", CHILD, str(root), str(listing._place(root))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    children = [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(4)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    for child in children:
        printed, errors = child.communicate(timeout=60)
        assert (printed, errors, child.returncode) == ("same\n", "", 0)
    assert image_names(root) == walked(root)
    assert [path.name for path in cache.iterdir()] == [listing._place(root).name]


KILLED = """
import os, sys
from pathlib import Path
from data import listing
listing.KEPT_FROM, listing.KEPT_SHARE, listing.RECENT_S = 1, 0, 0.01
os.fsync = lambda descriptor: os._exit(9)  # written, and not yet renamed
listing.image_names(Path(sys.argv[1]))
"""


def test_a_process_killed_while_it_writes_leaves_what_a_later_one_removes(tmp_path, cache):
    root = make_tree(tmp_path)
    child = subprocess.run([sys.executable, "-c", KILLED, str(root)], cwd=ROOT, check=False)
    assert child.returncode == 9
    leftover = kept_file(cache)
    assert leftover.name != listing._place(root).name
    assert image_names(root) == TREE
    assert leftover.exists()  # another process may be writing it
    os.utime(leftover, (time.time() - 7200, time.time() - 7200))
    listing._place(root).unlink()
    assert image_names(root) == TREE
    assert kept_file(cache) == listing._place(root)
