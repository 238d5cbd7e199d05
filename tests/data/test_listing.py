"""The list of a folder's images: which files, in which order, through which links."""

import os
import random
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.images import IMAGE_ENDINGS, PixelFormat
from data.sources import FolderSource, image_names
from util.errors import InputError


def touch(root: Path, *names: str) -> None:
    """Makes empty files, with their folders."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def walked(root: Path) -> list[str]:
    """What is to be found without links, by the standard library's walk."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name[0] != "."]
        inside = [name for name in files if name[0] != "." and name.lower().endswith(IMAGE_ENDINGS)]
        found += [str((Path(folder) / name).relative_to(root)) for name in inside]
    return sorted(found)


NAMES = st.sampled_from(["a", "b.jpg", "C.PNG", ".h", "d.txt", "e\n.gif", "\udce9.bmp", "f.jpe"])


@settings(max_examples=30)
@given(paths=st.sets(st.lists(NAMES, min_size=1, max_size=4).map("/".join), max_size=12))
def test_images_are_found_at_any_depth_and_hidden_ones_are_not(tmp_path_factory, paths):
    root = tmp_path_factory.mktemp("tree")
    for path in sorted(paths, key=len, reverse=True):
        if not (root / path).exists() and not any(p.is_file() for p in (root / path).parents):
            touch(root, path)
    assert image_names(root) == walked(root)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["a folder/an image.jpg", "übung/日本.jpg", "💡.png"], None),
        (["1.JPG", "2.JPEG", "3.Png", "4.TIFF", "5.jpe", "6.webp", "7.gif", "8.bmp"], None),
        (["a.jpg/1.jpg", "b.png"], None),
        (["cat/1.jpg", "cat/.2.jpg", "cat/._1.jpg", ".git/3.jpg", "dog/x.db"], ["cat/1.jpg"]),
        (["labels.csv", "1.jpg.part", "jpg", "2.mp4", "9.pgm"], ["9.pgm"]),
        (["a/@eaDir/1.jpg", "__MACOSX/b/2.jpg", "lost+found/3.jpg", "4.jpg"], ["4.jpg"]),
        ([".thumbnails/1.jpg", "a/.thumbnails/2.jpg", "3.jfif", "4.JFIF"], ["3.jfif", "4.JFIF"]),
    ],
)
def test_what_counts_as_an_image(tmp_path, names, found):
    touch(tmp_path, *names)
    assert image_names(tmp_path) == sorted(found or names)


def test_what_is_passed_over_is_counted_in_one_line(tmp_path, caplog):
    caplog.set_level("INFO")
    touch(tmp_path, "train/1.jpg", "train/.2.jpg", "train/a/.git/3.jpg", "train/a/@eaDir/4.jpg")
    touch(tmp_path, "train/a/notes.txt", "train/a/._5.jpg", "train/a/6.jpg", "train/b.txt")
    touch(tmp_path, "train/c.mp4", "val/7.jpg", ".cache/8.jpg")
    assert len(FolderSource(tmp_path, PixelFormat(3))) == 2
    counts = "2 hidden files, 3 files that are no images, 2 folders"
    assert caplog.messages == [f"{tmp_path}/train: passed over {counts}"]
    FolderSource(tmp_path, PixelFormat(3))  # a stage opens it again
    assert len(caplog.messages) == 1
    touch(tmp_path, "cat/1.jpg", "dog/2.jpg")
    assert len(FolderSource(tmp_path, PixelFormat(3))) == 2
    assert caplog.messages[1:] == [
        f"{tmp_path}: only train/ is read, and none of 2 other folders: cat, dog"
    ]
    image_names(tmp_path / "dog")  # there is nothing to say
    assert len(caplog.messages) == 2


def test_a_root_may_be_hidden_or_a_link(tmp_path):
    touch(tmp_path, ".cache/images/1.jpg")
    (tmp_path / "link").symlink_to(tmp_path / ".cache/images")
    assert image_names(tmp_path / ".cache/images") == image_names(tmp_path / "link") == ["1.jpg"]


def test_links_are_followed_and_cycles_cut(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    touch(elsewhere, "deep/1.jpg", "2.jpg", "other/9.jpg")
    touch(root, "a/3.jpg")
    (root / "b").symlink_to(elsewhere)
    (root / "c.jpg").symlink_to(elsewhere / "2.jpg")
    (root / "chain").symlink_to(elsewhere / "chain")
    (elsewhere / "chain").symlink_to(elsewhere / "other")
    (root / "gone.jpg").symlink_to(elsewhere / "gone.jpg")
    (root / "itself").symlink_to(root / "itself")
    for name, target in (("a/up", root), ("a/self", root / "a")):
        (root / name).symlink_to(target)
    (elsewhere / "deep/back").symlink_to(root)
    assert image_names(root) == [
        "a/3.jpg",
        "b/2.jpg",
        "b/deep/1.jpg",
        "c.jpg",
        "chain/9.jpg",
        "gone.jpg",
    ]


@pytest.mark.parametrize("seed", range(4))
def test_the_list_depends_neither_on_the_file_system_nor_on_threads(tmp_path, monkeypatch, seed):
    """Nor does the name, of two, under which a linked folder is entered."""
    touch(tmp_path, *(f"{folder}/{name}.jpg" for folder in "bcd" for name in "zyx"))
    for alias in ("a", "e"):
        (tmp_path / alias).symlink_to(tmp_path / "c")
    expected = [f"{folder}/{name}.jpg" for folder in "abd" for name in "xyz"]
    chance, walk = random.Random(seed), os.walk

    def slow_walk_in_any_order(path, **more):
        time.sleep(chance.random() / 100)
        for folder, *names in walk(path, **more):
            yield folder, *(chance.sample(of_kind, len(of_kind)) for of_kind in names)

    monkeypatch.setattr(os, "walk", slow_walk_in_any_order)
    assert image_names(tmp_path) == expected


def test_folders_are_read_at_the_same_time(tmp_path, monkeypatch):
    touch(tmp_path, *(f"{number}/1.jpg" for number in range(4)))
    together, scandir = threading.Barrier(4, timeout=30), os.scandir

    def waiting(path):
        if Path(path) != tmp_path:
            together.wait()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", waiting)
    assert len(image_names(tmp_path)) == 4


def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    with pytest.raises(InputError, match=str(tmp_path / "gone")):
        image_names(tmp_path / "gone")
