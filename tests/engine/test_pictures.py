"""Heat maps, grids and overlays; the part of an image that a model sees; which images are drawn;
and that only a tool's own files are replaced."""

import os
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.images import PixelFormat
from data.transforms import EvalTransform
from engine.pictures.choose import find_images, open_images, spread
from engine.pictures.drawing import (
    CELL,
    check_replaceable,
    draw_grid,
    enlarged,
    heat_over,
    to_picture,
    write_png,
)
from tools.vit_explain import draw_overlay, write_npy
from util.errors import InputError

TURBO = matplotlib.colormaps["turbo"]


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def blended(pixels, value: float) -> np.ndarray:
    """Half of the pixels and half of the colour of a value in [0, 1]."""
    color = np.array(TURBO(float(value))[:3]) * 255
    return np.round((np.asarray(pixels) + color) / 2)


def places(canvas: np.ndarray, picture: np.ndarray, tolerance: int = 0) -> list[tuple[int, int]]:
    """Each (row, column) of a canvas at which a picture stands, up to `tolerance` grey levels."""
    height, width = picture.shape[:2]
    canvas, picture = canvas.astype(int), picture.astype(int)
    y, x = np.indices((len(canvas) - height + 1, canvas.shape[1] - width + 1)).reshape(2, -1)
    for row, column in np.ndindex(8, 8):  # one pixel at a time leaves few places to compare whole
        row, column = row * height // 8, column * width // 8
        gap = np.abs(canvas[y + row, x + column] - picture[row, column]).max(axis=-1)
        y, x = y[gap <= tolerance], x[gap <= tolerance]
    return [
        (top, left)
        for top, left in zip(y.tolist(), x.tolist(), strict=True)
        if np.abs(canvas[top:, left:][:height, :width] - picture).max() <= tolerance
    ]


# Heat maps


@pytest.mark.parametrize(
    ("rows", "columns", "height", "width"), [(3, 5, 90, 250), (5, 3, 90, 250), (2, 7, 70, 49)]
)
def test_a_peak_is_drawn_over_its_patch(rows, columns, height, width):
    """Neither patches nor grid nor picture are square, so a transposed map would show."""
    hottest = blended((0, 0, 0), 1.0)
    for row, column in np.ndindex(rows, columns):
        heat = np.zeros((rows, columns), dtype=np.float32)
        heat[row, column] = 3.0
        result = heat_over(np.zeros((height, width, 3), np.uint8), heat).astype(int)
        distance = np.abs(result - hottest).sum(axis=-1)
        y, x = np.argwhere(distance == distance.min()).mean(axis=0) + 0.5  # pixel centres
        assert (
            abs(y * rows / height - row - 0.5) < 0.5
            and abs(x * columns / width - column - 0.5) < 0.5
        )


def test_values_between_two_patches_by_hand():
    # Two patches of 4 pixels: the pixels' centres are 0.5 to 7.5, the patches' centres 2 and 6.
    result = heat_over(np.full((1, 8, 3), 100, np.uint8), np.array([[0.0, 8.0]]))
    values = [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]
    expected = np.stack([blended((100, 100, 100), value) for value in values])
    assert np.abs(result[0].astype(int) - expected).max() <= 1  # by rounding
    assert np.array_equal(result[0, [0, 7]], expected[[0, 7]])


def test_a_flat_map_is_one_colour_and_a_narrow_range_is_stretched():
    picture = np.full((8, 12, 3), 40, dtype=np.uint8)
    flat = heat_over(picture, np.full((2, 3), 0.25, dtype=np.float32))
    assert (flat == blended((40, 40, 40), 0.0)).all()
    heat = np.random.default_rng(0).random((2, 3)).astype(np.float32)
    narrow = heat_over(picture, heat * 1e-6 + 5e-5).astype(int)
    assert np.abs(heat_over(picture, heat) - narrow).max() <= 1


@pytest.mark.parametrize(
    ("height", "width", "factor"), [(28, 28, 17), (32, 48, 10), (480, 300, 1), (29, 700, 1)]
)
def test_an_overlay_colours_the_seen_part_of_the_image_alone(height, width, factor):
    picture, heat = noise(height, width), np.random.default_rng(1).random((3, 5))
    result = draw_overlay(picture, heat, (height / 4, width / 8, height / 2, width), "attention")
    image = result[:, : width * factor]
    large = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    assert result.shape[0] == height * factor and result.shape[1] > width * factor + 100
    changed = np.argwhere((image != large).any(axis=-1))
    edges = np.array([[height / 4, width / 8], [height / 2, width]]) * factor
    assert np.abs([changed.min(axis=0), changed.max(axis=0) + 1] - edges).max() <= 1


@pytest.mark.parametrize(("start", "end"), [(2499.5, 2500.5), (7.2, 7.4), (0, 0.2), (4999.6, 5000)])
def test_a_seen_part_of_less_than_a_pixel_is_drawn(start, end):
    picture = np.zeros((5000, 1, 3), np.uint8)
    tall = draw_overlay(picture, np.array([[0.0, 1.0]]), (start, 0, end, 1), "attention")
    (changed,) = np.nonzero(tall[:, 0].any(axis=-1))
    assert 1 <= len(changed) <= 2 and changed[0] <= start < changed[-1] + 1


# Grids


def test_small_pictures_are_enlarged_by_whole_factors():
    picture = np.array([[[1, 2, 3], [4, 5, 6], [7, 8, 9]]], dtype=np.uint8)  # 1 x 3
    assert enlarged(picture, 8)[1, :, 0].tolist() == [1, 1, 4, 4, 7, 7]  # three times would be 9
    assert np.array_equal(enlarged(noise(9, 5), 8), noise(9, 5))


@pytest.mark.parametrize("layout", [(2, 2, 2), (3, 3, 1), (1,)])
def test_every_picture_of_a_grid_is_there_in_its_place(layout):
    rows = [[noise(40, 30, 10 * row + i) for i in range(n)] for row, n in enumerate(layout)]
    canvas = draw_grid(rows, ["a", "b"], ["label"] * len(rows), "caption " * 40)
    found = [[places(canvas, enlarged(picture, CELL)) for picture in row] for row in rows]
    assert all(len(place) == 1 for row in found for place in row)
    for row in found:  # rows and columns are straight
        assert {place[0][0] for place in row} == {row[0][0][0]}
        assert [place[0][1] for place in row] == [p[0][1] for p in found[0][: len(row)]]
    with pytest.raises(ValueError, match="zip"):  # every row needs a label
        draw_grid(rows, [], [])


@pytest.mark.parametrize(
    "text", ["a$b$", r"$\frac{1}{$", "日本語", "a\nb", "\x01", os.fsdecode(b"caf\xe9"), "x" * 300]
)
def test_any_name_of_a_file_can_be_written(text):
    canvas = draw_grid([[noise(32, 32)]], [text], [text], text)
    assert len(places(canvas, enlarged(noise(32, 32), CELL))) == 1


def test_tensors_become_pictures():
    image = torch.tensor([[[0.0, 1.0, 0.5]], [[0.25, 0.002, 0.7]], [[1.0, 0.0, 0.1]]])  # (3, 1, 3)
    assert to_picture(image).tolist() == [[[0, 64, 255], [255, 1, 0], [128, 178, 26]]]
    grey = torch.arange(6, dtype=torch.uint8).reshape(1, 2, 3)
    assert to_picture(grey).tolist() == [[[0] * 3, [1] * 3, [2] * 3], [[3] * 3, [4] * 3, [5] * 3]]


# Files


def test_files_hold_what_was_drawn_and_only_our_own_are_replaced(tmp_path):
    picture, heat = noise(7, 5), np.random.default_rng(0).random((3, 5)).astype(np.float32)
    png, npy = write_png(tmp_path / "a.png", picture), tmp_path / "a.npy"
    write_npy(npy, heat)
    assert np.array_equal(np.array(Image.open(png)), picture)
    assert np.array_equal(np.load(npy), heat) and np.load(npy, mmap_mode="r").shape == (3, 5)
    check_replaceable(png, npy, tmp_path / "absent.png", tmp_path / ("a" * 300))
    Image.fromarray(picture).save(tmp_path / "b.png")
    (tmp_path / "c.png").mkdir()
    for theirs in (tmp_path / "b.png", tmp_path / "c.png"):
        with pytest.raises(InputError, match=str(theirs)):
            check_replaceable(png, theirs)
    for place in (tmp_path / "none" / "a.png", png / "b.png"):
        with pytest.raises(InputError, match=str(place)):
            write_png(place, picture)


# What of an image the model sees

SOURCES = [(480, 640), (333, 500), (37, 37), (1, 1), (3, 2), (60, 239), (1000, 100), (1, 5000)]
TARGETS = [(224, 1.0), (32, None), ((48, 96), 0.875), ((16, 224), None)]


@pytest.mark.parametrize(("img_size", "crop_pct"), TARGETS)
def test_seen_is_where_the_pixels_come_from(img_size, crop_pct):
    """Each pixel of these images holds the coordinates of its centre, in units in which they fit
    between black and white, so the result says where it is from."""
    transform = EvalTransform(img_size, crop_pct)
    for height, width in SOURCES:
        top, left, bottom, right = transform.seen(height, width)
        assert 0 <= top < bottom <= height and 0 <= left < right <= width
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        unit = 255 / max(height, width)
        result = transform(torch.stack([y, x]) * unit).double().numpy() / unit
        for found, start, end, side in (
            (result[0][:, 0], top, bottom, height),
            (result[1][0], left, right, width),
        ):
            pixel = (end - start) / len(found)  # of the result, in pixels of the image
            expected = start + (np.arange(len(found)) + 0.5) * pixel
            where = f"{height} x {width}: {start} to {end}"
            # At an image's border the interpolation has pixels on one side only.
            assert np.abs(found - expected).max() <= max(0.6, pixel), where
            inner = np.abs(expected - side / 2) < side / 2 - 4 * max(pixel, 1)
            assert np.abs(found - expected)[inner].max(initial=0) < 0.05 * max(pixel, 1), where


# Which images are drawn


@given(st.integers(1, 50_000), st.integers(1, 1000))
def test_chosen_indices_are_evenly_spaced(total, count):
    chosen = spread(total, count)
    assert chosen[0] == 0 and (len(chosen) == 1 or chosen[-1] == total - 1)
    assert len(chosen) == min(total, count)
    gaps = set(np.diff(chosen).tolist())
    assert 0 not in gaps and max(gaps, default=0) - min(gaps, default=0) <= 1


@pytest.fixture
def images(tmp_path) -> Path:
    """Five images, each of its own grey, and a file that is no image."""
    names = ["x/a.png", "x/b.png", "y/a.png", "y/deep/c.JPG", "y/1_a.png"]
    for level, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 8, 3), 40 * level, dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "y" / "notes.txt").write_text("no image")
    return tmp_path


@pytest.mark.parametrize(
    ("paths", "num_images", "names"),
    [
        (["x/b.png", "x/a.png"], 16, {"b": "x/b.png", "a": "x/a.png"}),
        (["y/a.png", "x/a.png"], 16, {"0_a": "y/a.png", "1_a": "x/a.png"}),
        (
            ["x/a.png", "y/a.png", "y/1_a.png"],  # a name like one that is made up
            16,
            {"0_a": "x/a.png", "1_a": "y/a.png", "2_1_a": "y/1_a.png"},
        ),
        (["y"], 16, {"1_a": "y/1_a.png", "a": "y/a.png", "c": "y/deep/c.JPG"}),
        (["y"], 2, {"1_a": "y/1_a.png", "c": "y/deep/c.JPG"}),
        (  # names that are no text stay apart
            [os.fsdecode(b"caf\xe9.png"), os.fsdecode(b"caf\xe8.png")],
            16,
            {"0_caf?": os.fsdecode(b"caf\xe9.png"), "1_caf?": os.fsdecode(b"caf\xe8.png")},
        ),
    ],
)
def test_named_images_keep_their_order_and_get_unique_names(images, paths, num_images, names):
    found = find_images([str(images / path) for path in paths], num_images)
    assert list(found.items()) == [(name, images / path) for name, path in names.items()]


def greys(*paths: Path, data_path: Path | None = None, num_images: int = 16) -> dict[str, int]:
    texts, place = list(map(str, paths)), data_path and str(data_path)
    found = open_images("img_path", texts, "folder", place, num_images, PixelFormat(3))
    assert all(image.shape == (3, 6, 8) for image in found.values())
    return {name: int(image.max()) for name, image in found.items()}


def test_images_are_read_from_files_or_a_data_set(images):
    assert greys(images / "x/b.png", images / "y/a.png") == {"b": 40, "a": 80}
    everything = greys(data_path=images)  # x/, then y/ by name, as there is no val/
    assert list(everything.values()) == [0, 40, 160, 80, 120]
    (images / "y").rename(images / "val")
    assert greys(data_path=images, num_images=2) == {"val_00000": 160, "val_00002": 120}


def test_what_is_no_image_is_named_with_its_setting(images):
    (images / "empty").mkdir()
    whole = write_png(images / "whole.png", noise(40, 40)).read_bytes()
    (images / "x" / "cut.png").write_bytes(whole[: len(whole) // 2])
    cut = f"{images}/x/cut.png"
    for path in ("none.png", "y/notes.txt", "empty", "x"):
        with pytest.raises(InputError, match=cut if path == "x" else f"{images}/{path}"):
            greys(images / path)
    with pytest.raises(InputError, match=cut):
        greys(data_path=images / "x")
