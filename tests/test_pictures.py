"""Heat maps, grids and overlays pixel by pixel; the part of an image that a model sees; which
images are drawn."""

import math
import os
import time
from fractions import Fraction
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data.known_sets import read_mnist5k
from data.transforms import EvalTransform
from engine.pictures.choose import find_images, open_images, spread
from engine.pictures.drawing import (
    CELL,
    LARGEST_CELL,
    OPACITY,
    TEXT,
    draw_grid,
    draw_overlay,
    enlarged,
    heat_over,
    square_rows,
    to_picture,
    unit_range,
    write_png,
)
from util.errors import InputError

TURBO = matplotlib.colormaps["turbo"]


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def blended(pixels, value: float) -> np.ndarray:
    """Half of the pixels, half of the colour that stands for a value in [0, 1]."""
    return np.round(
        np.asarray(pixels) * (1 - OPACITY) + np.array(TURBO(float(value))[:3]) * 255 * OPACITY
    )


def places(canvas: np.ndarray, picture: np.ndarray, tolerance: int = 0) -> list[tuple[int, int]]:
    """(row, column) wherever on a canvas a picture stands, so many levels of colour apart at
    most."""
    height, width = picture.shape[:2]
    inner = canvas[: canvas.shape[0] - height + 1, : canvas.shape[1] - width + 1].astype(int)
    candidates = np.argwhere((np.abs(inner - picture[0, 0]) <= tolerance).all(axis=-1))
    return [
        (int(y), int(x))
        for y, x in candidates
        if np.abs(canvas[y : y + height, x : x + width].astype(int) - picture).max() <= tolerance
    ]


# --- heat maps over a picture
# -----------------------------------------------------------------------------------------


def test_only_the_box_is_coloured():
    picture = noise(60, 90)
    before = picture.copy()
    heat = np.random.default_rng(1).random((3, 4))
    result = heat_over(
        picture, heat, (10.3, 19.6, 49.7, 80.2)
    )  # rounds to rows 10 to 49, columns 20 to 79
    assert np.array_equal(picture, before) and (result.shape, result.dtype) == (
        picture.shape,
        np.uint8,
    )
    inside = np.zeros((60, 90), dtype=bool)
    inside[10:50, 20:80] = True
    assert np.array_equal(result[~inside], picture[~inside])
    assert (result[inside] != picture[inside]).any(axis=-1).mean() > 0.99
    # what is under it shows through by half, so no pixel moves by more than half of the range and a
    # rounding
    assert np.abs(result[inside].astype(int) - picture[inside]).max() <= 128
    alone = heat_over(picture[10:50, 20:80], heat)  # without a box, the whole of that part
    assert np.array_equal(result[10:50, 20:80], alone)


@pytest.mark.parametrize(
    ("box", "coloured"),
    [
        ((0, 0, 40, 30), (0, 0, 40, 30)),
        ((-0.4, -0.4, 40.4, 30.4), (0, 0, 40, 30)),
        ((-1, -1, 41, 31), (0, 0, 40, 30)),  # a pixel out on every side
        ((-1.2, 5, 20, 30.9), (0, 5, 20, 30)),
        ((39.2, 28.8, 40.3, 30.1), (39, 29, 40, 30)),
        ((0.4, 0.4, 1.4, 1.4), (0, 0, 1, 1)),
    ],
)
def test_a_box_at_the_edges_or_past_them_by_rounding(box, coloured):
    picture = noise(40, 30)
    top, left, bottom, right = coloured
    result = heat_over(picture, np.array([[0.0, 0.2], [0.7, 1.0], [0.4, 0.1]]), box)
    inside = np.zeros((40, 30), dtype=bool)
    inside[top:bottom, left:right] = True
    assert np.array_equal(result[~inside], picture[~inside])
    assert (result[inside] != picture[inside]).any(axis=-1).mean() >= 0.99


def test_a_box_past_the_edge_keeps_its_map_in_place():
    """The map belongs to the whole box: what lies outside of the picture is cut off, not squeezed
    in."""
    picture, heat = np.zeros((20, 30, 3), np.uint8), np.random.default_rng(0).random((2, 3))
    whole = heat_over(np.zeros((22, 33, 3), np.uint8), heat)
    assert np.array_equal(heat_over(picture, heat, (-1, -2, 21, 31)), whole[1:21, 2:32])


@pytest.mark.parametrize(
    ("start", "end"), [(2499.5, 2500.5), (7.2, 7.4), (9.6, 9.9), (0, 0.2), (4999.6, 4999.9)]
)
def test_a_box_of_less_than_a_pixel_is_drawn_too(start, end):
    """The model's view of a very long image may be that small; one pixel shows it."""
    heat = np.array([[0.0, 1.0]])
    tall = heat_over(np.zeros((5000, 1, 3), np.uint8), heat, (start, 0, end, 1)).any(axis=-1)
    wide = heat_over(np.zeros((1, 5000, 3), np.uint8), heat, (0, start, 1, end)).any(axis=-1)
    assert tall.sum() == wide.sum() == 1
    assert np.argwhere(tall)[0, 0] == pytest.approx((start + end) / 2 - 0.5, abs=1)
    assert np.argwhere(wide)[0, 1] == pytest.approx((start + end) / 2 - 0.5, abs=1)


GRIDS = [(3, 5, 90, 250), (5, 3, 90, 250), (4, 4, 48, 200), (2, 7, 70, 49)]


@pytest.mark.parametrize(("rows", "columns", "height", "width"), GRIDS)
def test_a_peak_lands_in_its_patch(rows, columns, height, width):
    """Patches that are not square, and neither grid nor picture is: nothing may be transposed or
    squashed."""
    hottest = blended((0, 0, 0), 1.0)
    for row in range(rows):
        for column in range(columns):
            heat = np.zeros((rows, columns), dtype=np.float32)
            heat[row, column] = 3.0
            for box, offset in ((None, (0, 0)), ((7, 11, 7 + height, 11 + width), (7, 11))):
                picture = np.zeros(
                    (height + 20, width + 20, 3) if box else (height, width, 3), dtype=np.uint8
                )
                result = heat_over(picture, heat, box).astype(int)
                distance = np.abs(result - hottest).sum(axis=-1)
                y, x = (
                    np.argwhere(distance == distance.min()).mean(axis=0) + 0.5 - offset
                )  # pixel centres
                patch_height, patch_width = height / rows, width / columns
                # at the picture's border the peak is a plateau from the patch's centre outwards
                edge = (row in (0, rows - 1), column in (0, columns - 1))
                assert (
                    abs(y - (row + 0.5) * patch_height)
                    <= (0.5 if edge[0] else 0.1) * patch_height + 0.5
                )
                assert (
                    abs(x - (column + 0.5) * patch_width)
                    <= (0.5 if edge[1] else 0.1) * patch_width + 0.5
                )


def test_values_between_two_patches_by_hand():
    # two patches of 4 pixels in a row of 8: pixel centres at 0.5 to 7.5, patch centres at 2 and 6
    result = heat_over(np.full((1, 8, 3), 100, np.uint8), np.array([[0.0, 8.0]]))
    values = [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]
    expected = np.stack([blended((100, 100, 100), value) for value in values])
    assert np.abs(result[0].astype(int) - expected).max() <= 1  # of 255, by rounding
    assert np.array_equal(result[0, [0, 7]], expected[[0, 7]])


def test_a_flat_map_is_one_colour_and_ranges_are_stretched():
    picture = np.full((8, 12, 3), 40, dtype=np.uint8)
    for value in (0.0, 0.25, -3.0):
        result = heat_over(picture, np.full((2, 3), value, dtype=np.float32))
        assert np.array_equal(result, np.broadcast_to(blended((40, 40, 40), 0.0), (8, 12, 3)))
    heat = np.random.default_rng(0).random((2, 3)).astype(np.float32)
    assert (
        np.abs(heat_over(picture, heat).astype(int) - heat_over(picture, heat * 1e-6 + 5e-5)).max()
        <= 1
    )
    assert unit_range(np.array([[2.0, 4.0, 3.0]])).tolist() == [[0.0, 1.0, 0.5]]
    assert unit_range(np.array([[7.0, 7.0]])).tolist() == [[0.0, 0.0]]


# --- the overlay with its bar
# -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "factor"),
    [
        (28, 28, 17),
        (32, 48, 10),
        (480, 300, 1),
        (241, 240, 1),
        (240, 239, 2),
        (600, 29, 1),
        (29, 700, 1),
        (1, 1, 480),
    ],
)
def test_the_overlay_is_the_image_not_squashed_and_a_bar(height, width, factor):
    picture, heat = noise(height, width), np.random.default_rng(1).random((3, 5))
    box = (height * 0.25, width * 0.125, height * 0.75, width * 0.875)
    result = draw_overlay(picture, heat, box, "attention")
    assert result.dtype == np.uint8
    assert result.shape[0] == height * factor
    assert width * factor + 100 < result.shape[1] < width * factor + 300
    large = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    image = result[: height * factor, : width * factor]
    assert np.array_equal(image, heat_over(large, heat, tuple(edge * factor for edge in box)))
    top, left, bottom, right = (round(edge * factor) for edge in box)
    outside = np.ones(large.shape[:2], dtype=bool)
    outside[top:bottom, left:right] = False
    assert np.array_equal(image[outside], large[outside])
    assert not np.array_equal(image[~outside], large[~outside])


def test_the_bar_has_the_maps_colours_and_its_label():
    picture, heat = np.full((480, 480, 3), 128, np.uint8), np.array([[0.25, 0.75]])
    side = draw_overlay(picture, heat, (0, 0, 480, 480), "attention rollout")[:, 480:].astype(int)
    ends = [np.array(TURBO(value)[:3]) * 255 for value in (0.02, 0.98)]
    low, high = (np.argwhere(np.abs(side - end).sum(axis=-1) < 12) for end in ends)
    assert len(low) > 20 and len(high) > 20
    assert low[:, 0].mean() > 400 and high[:, 0].mean() < 80  # low at the bottom, high at the top
    others = [
        draw_overlay(picture, heat, (0, 0, 480, 480), "attention, layer 3")[:, 480:],
        draw_overlay(picture, heat * 10, (0, 0, 480, 480), "attention rollout")[:, 480:],
    ]
    for other in others:  # another label, other numbers at the ticks
        assert 50 < (other != side).any(axis=-1).sum() < 10_000


def test_a_large_photograph_takes_seconds():
    picture = np.zeros((3000, 5000, 3), dtype=np.uint8)
    started = time.monotonic()
    result = draw_overlay(
        picture, np.random.default_rng(0).random((14, 14)), (100, 0, 2900, 5000), "attention"
    )
    assert time.monotonic() - started < 20
    assert result.shape[0] == 3000 and result.shape[1] > 5000
    assert not result[:100, :5000].any() and result[100:2900, :5000].any(axis=-1).all()


# --- grids
# ------------------------------------------------------------------------------------------------------------


def test_small_pictures_become_whole_squares_of_pixels():
    picture = np.array([[[1, 2, 3], [4, 5, 6], [7, 8, 9]]], dtype=np.uint8)  # 1 x 3
    large = enlarged(picture, 8)  # twice: three times would be 9
    assert large.shape == (2, 6, 3)
    assert large[1, :, 0].tolist() == [1, 1, 4, 4, 7, 7]
    assert np.array_equal(enlarged(noise(9, 5), 8), noise(9, 5))
    assert enlarged(noise(16, 80), CELL).shape == (32, 160, 3)


@pytest.mark.parametrize(
    ("shape", "layout", "columns", "labelled", "caption"),
    [
        ((40, 30), (2, 2, 2), ["image", "rollout"], True, ""),
        ((40, 30), (3, 3, 1), [], False, ""),  # the last row is shorter
        ((28, 28), (1,), ["one"], True, "a caption " * 30),
        ((32, 96), (4, 4), [], True, "short"),
        ((29, 57), (2, 2, 2), ["a", "b"], False, "x"),
        ((113, 29), (1, 1), [], True, ""),
        ((224, 150), (2,), ["a", "b"], True, ""),
        ((300, 450), (2, 2), ["a", "b"], True, "reduced"),
        ((1000, 3), (2, 2), ["a", "b"], True, "thin"),
    ],
)
def test_every_picture_of_a_grid_is_there_pixel_by_pixel(shape, layout, columns, labelled, caption):
    rows, number = [], 0
    for length in layout:
        rows.append([noise(*shape, seed=number + place) for place in range(length)])
        number += length
    labels = [f"row {place}" if labelled else "" for place in range(len(rows))]
    canvas = draw_grid(rows, columns, labels, caption)
    found = [[places(canvas, cell_of(picture)) for picture in row] for row in rows]
    assert all(len(place) == 1 for row in found for place in row)
    height, width = cell_of(rows[0][0]).shape[:2]
    tops = [{place[0][0] for place in row} for row in found]
    assert all(len(top) == 1 for top in tops)
    tops = [top.pop() for top in tops]
    assert all(upper + height < lower for upper, lower in zip(tops, tops[1:], strict=False))
    for row in found:
        lefts = [place[0][1] for place in row]
        assert lefts == [
            found[0][place][0][1] for place in range(len(row))
        ]  # columns stand under each other
        assert all(left + width < right for left, right in zip(lefts, lefts[1:], strict=False))

    # around the pictures it is white, but for the texts, of which there are some where they belong
    ink = (canvas < 128).all(axis=-1)
    for row in found:
        for ((y, x),) in row:
            ink[y : y + height, x : x + width] = False
    for place, top in enumerate(tops):
        above = 0 if place == 0 else tops[place - 1] + height
        assert ink[above:top].any() == (labelled or bool(columns and place == 0))
    assert ink[tops[-1] + height :].any() == bool(caption)
    if not (columns or labelled or caption):
        assert not ink.any()


def cell_of(picture: np.ndarray) -> np.ndarray:
    """A picture at the size it has in a grid: small ones by whole factors, large ones reduced."""
    longest = max(picture.shape[:2])
    if longest <= LARGEST_CELL:
        factor = max(1, CELL // longest)
        return picture.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = (max(1, round(side * LARGEST_CELL / longest)) for side in picture.shape[:2])
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))


def test_titles_labels_and_captions_take_their_lines():
    rows = [[noise(32, 32)], [noise(32, 32, 1)]]
    plain = draw_grid(rows, [], ["", ""])
    assert draw_grid(rows, [], ["a", "b"]).shape[0] == plain.shape[0] + 2 * TEXT
    assert draw_grid(rows, [], ["a", ""]).shape[0] == plain.shape[0] + TEXT
    lines = [draw_grid(rows, [], ["", ""], "word " * count).shape[0] for count in (1, 20, 60)]
    assert lines[0] == plain.shape[0] + TEXT  # a long caption is broken, not cut off
    assert plain.shape[0] + 2 * TEXT < lines[1] < lines[2]
    with pytest.raises(ValueError, match="zip"):  # a label for each row
        draw_grid(rows, [], ["a"])


@pytest.mark.parametrize(
    "text",
    [
        "$",
        "a$b$",
        r"$\frac{1}{$",
        "_under_score_^",
        r"back\slash {brace} %percent",
        "naïve façade ÄÖÜ ß",
        "日本語",
        "a\nb",
        "tab\there",
        "n02$_^\x01",
        b"caf\xe9".decode("utf-8", "surrogateescape"),
        "x" * 300,
    ],
)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_of_files_are_drawn_as_they_are(text):
    """No mathematics, and no crash for what a file's name may hold; the last but one is not
    UTF-8."""
    picture = noise(32, 32)
    canvas = draw_grid([[picture]], [text], [text], text)
    assert len(places(canvas, cell_of(picture))) == 1
    assert canvas.dtype == np.uint8


def test_a_dollar_is_a_dollar():
    (drawn, other, same) = (
        draw_grid([[noise(32, 32)]], [], [text]) for text in ("$x_1$", "x_1", "$x_1$")
    )
    assert np.array_equal(drawn, same)
    ink = [(canvas[:TEXT] < 128).all(axis=-1).sum() for canvas in (drawn, other)]
    assert ink[0] > ink[1] + 15  # the two dollars are there


def test_pictures_in_about_as_many_rows_as_columns():
    pictures = [noise(4, 4, seed) for seed in range(16)]
    lengths = {
        1: [1],
        2: [2],
        3: [2, 1],
        4: [2, 2],
        6: [3, 3],
        7: [3, 3, 1],
        12: [4, 4, 4],
        16: [4, 4, 4, 4],
    }
    for count, expected in lengths.items():
        rows = square_rows(pictures[:count])
        assert [len(row) for row in rows] == expected
        assert all(a is b for a, b in zip([p for row in rows for p in row], pictures, strict=False))


def test_tensors_become_pictures():
    image = torch.tensor([[[0.0, 1.0, 0.5]], [[0.25, 0.002, 0.7]], [[1.0, 0.0, 0.1]]])  # (3, 1, 3)
    assert to_picture(image).tolist() == [[[0, 64, 255], [255, 1, 0], [128, 178, 26]]]
    grey = torch.arange(6, dtype=torch.uint8).reshape(1, 2, 3)
    assert to_picture(grey).tolist() == [[[0] * 3, [1] * 3, [2] * 3], [[3] * 3, [4] * 3, [5] * 3]]
    assert to_picture(grey).flags["C_CONTIGUOUS"] and to_picture(grey).dtype == np.uint8


def test_a_png_holds_the_picture_and_a_missing_folder_is_one_clear_error(tmp_path):
    picture = noise(7, 5)
    path = write_png(tmp_path / "a.png", picture)
    assert path == tmp_path / "a.png" and np.array_equal(np.array(Image.open(path)), picture)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    for place, reason in (
        (tmp_path / "none" / "a.png", "No such file"),
        (path / "b.png", "Not a directory"),
    ):
        with pytest.raises(InputError, match=f"{place} cannot be written: {reason}") as error:
            write_png(place, picture)
        assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


# --- what of an image the model sees
# ----------------------------------------------------------------------------------

SOURCES = [
    (480, 640),
    (640, 480),
    (427, 640),
    (333, 500),
    (256, 256),
    (224, 224),
    (37, 37),
    (1, 1),
    (3, 2),
    (31, 33),
    (60, 239),
    (240, 61),
    (100, 1000),
    (1000, 100),
    (1, 5000),
    (5000, 1),
    (7, 5001),
    (300, 1201),
]
TARGETS = [
    (224, 1.0),
    (224, 0.875),
    (32, None),
    (32, 0.9),
    ((48, 96), 0.875),
    ((96, 48), 1.0),
    ((16, 224), None),
]


@pytest.mark.parametrize(("img_size", "crop_pct"), TARGETS)
def test_seen_is_where_the_pixels_come_from(img_size, crop_pct):
    """Images whose two channels are the coordinates of their pixels' centres, so the result says
    where it is from."""
    transform = EvalTransform(img_size, crop_pct)
    for height, width in SOURCES:
        top, left, bottom, right = transform.seen(height, width)
        assert 0 <= top < bottom <= height and 0 <= left < right <= width
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        result = transform(torch.stack([y, x])).double().numpy()
        of_rows, of_columns = result[0], result[1]
        for found, start, end, side in (
            (of_rows[:, 0], top, bottom, height),
            (of_columns[0], left, right, width),
        ):
            pixel = (end - start) / len(found)  # of the result, in pixels of the image
            expected = start + (np.arange(len(found)) + 0.5) * pixel
            where = f"{height} x {width}: {start} to {end}"
            # at an image's border the interpolation has pixels on one side only
            assert np.abs(found - expected).max() <= max(0.6, pixel), where
            inner = np.abs(expected - side / 2) < side / 2 - 4 * max(pixel, 1)
            assert np.abs(found - expected)[inner].max(initial=0) < 0.05 * max(pixel, 1), where
        assert (
            np.abs(of_rows - of_rows[:, :1]).max() < 1e-2
            and np.abs(of_columns - of_columns[:1]).max() < 1e-2
        )


@pytest.mark.parametrize(
    ("img_size", "crop_pct"), [(64, 1.0), (64, 0.875), (64, 0.5), ((32, 96), 0.875)]
)
@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (350, 350), (200, 1500)])
def test_what_is_not_seen_does_not_show(img_size, crop_pct, height, width):
    transform = EvalTransform(img_size, crop_pct)
    top, left, bottom, right = transform.seen(height, width)
    margin = 3 * (bottom - top) / transform.size[0]  # what the interpolation reaches over
    wide = slice(math.floor(top - margin) if top > margin else 0, math.ceil(bottom + margin))
    high = slice(math.floor(left - margin) if left > margin else 0, math.ceil(right + margin))
    outside = torch.full((1, height, width), 255, dtype=torch.uint8)
    outside[:, wide, high] = 0
    assert transform(outside).max() == 0
    inside = torch.zeros(1, height, width, dtype=torch.uint8)
    inside[:, math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)] = 255
    result = transform(inside)
    assert (result[:, 3:-3, 3:-3] == 255).all() and result.min() > 64  # white up to its edges


def test_boxes_by_hand():
    # 480 x 640 to cover 256: 256 x 341; the middle 224 x 224 starts at 16 and round(58.5) = 58
    assert EvalTransform(224, None).seen(480, 640) == pytest.approx(
        (16 * 480 / 256, 58 * 640 / 341, 240 * 480 / 256, 282 * 640 / 341)
    )
    assert EvalTransform(224, 1.0).seen(500, 500) == (0, 0, 500, 500)
    assert EvalTransform(32, None).seen(32, 32) == (0, 0, 32, 32)
    # 1 x 5000: the middle 4 columns, 2498 to 2501, are all that is resized, to 32 x 128; of these
    # the middle 32
    assert EvalTransform(32, None).seen(1, 5000) == (0, 2499.5, 1, 2500.5)
    # 90 x 40 to cover 32 x 64: the width decides, 64 / 40 is 1.6, and the middle 32 rows of 144
    # start at 56
    assert EvalTransform((32, 64), 1.0).seen(90, 40) == pytest.approx((35, 0, 55, 40))


def reference_eval(image: torch.Tensor, size: tuple[int, int], crop_pct: Fraction) -> torch.Tensor:
    """Resized to cover `size` / crop_pct, the longer side rounded down, and cut: slices and
    whole-number arithmetic."""
    cover = [math.floor(side / crop_pct) for side in size]
    sides = list(image.shape[1:])
    longest = math.ceil(
        Fraction(4 * max(cover) * min(sides), min(cover))
    )  # what no centre crop sees is left out

    def middle(image, sides):
        starts = [
            round(Fraction(have - want, 2))
            for have, want in zip(image.shape[1:], sides, strict=True)
        ]
        return image[:, starts[0] : starts[0] + sides[0], starts[1] : starts[1] + sides[1]]

    image = middle(image, [min(side, longest) for side in sides])
    factor = max(Fraction(want, have) for want, have in zip(cover, image.shape[1:], strict=True))
    resized = [math.floor(side * factor) for side in image.shape[1:]]
    return middle(F.resize(image, resized, InterpolationMode.BICUBIC, antialias=True), size)


@pytest.mark.parametrize(
    ("img_size", "crop_pct", "share"),
    [
        ((224, 224), None, Fraction(224, 256)),
        ((224, 224), 1.0, Fraction(1)),
        ((32, 32), None, Fraction(1)),
        ((48, 96), 0.875, Fraction(7, 8)),
        ((96, 48), 0.5, Fraction(1, 2)),
    ],
)
def test_the_transform_equals_a_resize_and_two_slices(img_size, crop_pct, share):
    transform = EvalTransform(img_size, crop_pct)
    for height, width in SOURCES:
        generator = torch.Generator().manual_seed(height * 10_000 + width)
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        assert torch.equal(transform(image), reference_eval(image, img_size, share)), (
            height,
            width,
        )


# --- which images are drawn
# -------------------------------------------------------------------------------------------


def test_spread_is_even_unique_and_within_range():
    for total in (1, 2, 3, 7, 16, 100, 999, 50_000):
        for count in (1, 2, 3, 6, 16, 1000):
            chosen = spread(total, count)
            assert len(chosen) == len(set(chosen)) == min(total, count)
            assert chosen == sorted(chosen) and all(
                type(index) is int and 0 <= index < total for index in chosen
            )
            gaps = {b - a for a, b in zip(chosen, chosen[1:], strict=False)}
            assert not gaps or max(gaps) - min(gaps) <= 1, (total, count)
            if len(chosen) > 1:
                assert (chosen[0], chosen[-1]) == (0, total - 1)
                step = (total - 1) / (len(chosen) - 1)
                assert (
                    max(abs(index - place * step) for place, index in enumerate(chosen))
                    <= 0.5 + 1e-9
                )
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(6, 4) == [0, 2, 3, 5]
    assert spread(5, 8) == [0, 1, 2, 3, 4]


@pytest.fixture
def images(tmp_path) -> Path:
    """x/{a,b}.png, y/{a.png,deep/c.JPG}, y/1_a.png, y/notes.txt: each image of its own grey."""
    names = ["x/a.png", "x/b.png", "y/a.png", "y/deep/c.JPG", "y/1_a.png"]
    for level, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((6, 8, 3), 40 * level, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "y" / "notes.txt").write_text("no image")
    return tmp_path


def test_named_images_keep_their_order_and_get_unique_names(images):
    def found(*paths, num_images=16):
        files = find_images([str(images / path) for path in paths], num_images)
        return [(name, path.relative_to(images).as_posix()) for name, path in files.items()]

    assert found("x/b.png", "x/a.png") == [("b", "x/b.png"), ("a", "x/a.png")]
    assert found("y/a.png", "x/b.png", "x/a.png") == [
        ("0_a", "y/a.png"),
        ("1_b", "x/b.png"),
        ("2_a", "x/a.png"),
    ]
    # a name that looks like one of those that are made up
    assert found("x/a.png", "y/a.png", "y/1_a.png") == [
        ("0_a", "x/a.png"),
        ("1_a", "y/a.png"),
        ("2_1_a", "y/1_a.png"),
    ]
    assert found("x/a.png", "x/a.png") == [("0_a", "x/a.png"), ("1_a", "x/a.png")]
    assert found("y") == [("1_a", "y/1_a.png"), ("a", "y/a.png"), ("c", "y/deep/c.JPG")]
    assert found("y", num_images=2) == [("1_a", "y/1_a.png"), ("c", "y/deep/c.JPG")]
    assert found("x", "y/deep/c.JPG", num_images=1) == [("a", "x/a.png"), ("c", "y/deep/c.JPG")]
    # two names that are no text differ in what cannot be printed alone
    no_text = [(images / "x" / os.fsdecode(name)) for name in (b"caf\xe9.png", b"caf\xe8.png")]
    for path in no_text:
        path.write_bytes((images / "x" / "a.png").read_bytes())
    assert list(find_images([str(path) for path in no_text], 16)) == ["0_caf?", "1_caf?"]
    for path in no_text:
        path.unlink()
    assert [name for name, _ in found("x", "y")] == ["0_a", "1_b", "2_1_a", "3_a", "4_c"]


def test_images_are_read_by_name_from_files_or_a_data_set(images):
    read = open_images(
        "image_path", [str(images / "x/b.png"), str(images / "y/a.png")], "folder", None, 16, 3
    )
    assert list(read) == ["b", "a"]
    assert [(image.shape, image.dtype, image.max().item()) for image in read.values()] == [
        ((3, 6, 8), torch.uint8, 40),
        ((3, 6, 8), torch.uint8, 80),
    ]
    assert open_images("image_path", [str(images / "x/b.png")], "folder", None, 16, 1)[
        "b"
    ].shape == (1, 6, 8)
    # of a folder that has no val/, all; else val/
    everything = open_images("image_path", [], "folder", str(images), 16, 3)
    assert list(everything) == [f"val_{index:05d}" for index in range(5)]
    assert [image.max().item() for image in everything.values()] == [
        0,
        40,
        160,
        80,
        120,
    ]  # x/, then y/ by name
    (images / "y").rename(images / "val")
    (images / "x").rename(images / "train")
    few = open_images("image_path", [], "folder", str(images), 2, 3)
    assert [(name, image.max().item()) for name, image in few.items()] == [
        ("val_00000", 160),
        ("val_00002", 120),
    ]


def test_digits_of_the_validation_set():
    images, labels = read_mnist5k(train=False)
    digits = open_images("image_path", [], "mnist5k", None, 10, 1)
    assert list(digits) == [f"val_{index:05d}" for index in range(0, 1000, 111)]
    for name, digit in digits.items():
        assert np.array_equal(digit.numpy(), images[int(name[4:])])
    assert (
        len({int(labels[int(name[4:])]) for name in digits}) == 10
    )  # one of each, as they lie sorted by class


def test_what_is_no_image_is_named_with_its_setting(images):
    def reason(*paths, setting="img_path", data_path=None) -> str:
        with pytest.raises(InputError) as error:
            open_images(setting, [str(images / path) for path in paths], "folder", data_path, 16, 3)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert reason("x/none.png") == f"img_path {images}/x/none.png does not exist"
    assert reason("x", "none") == f"img_path {images}/none does not exist"
    expected = f"image_path {images}/y/notes.txt: cannot identify image file"
    assert reason("x/a.png", "y/notes.txt", setting="image_path").startswith(expected)
    (images / "empty").mkdir()
    assert reason("empty").startswith(f"no images under {images}/empty")
    whole = write_png(images / "whole.png", noise(40, 40)).read_bytes()
    (images / "x" / "cut.png").write_bytes(whole[: len(whole) // 2])
    assert reason("x").startswith(f"img_path {images}/x/cut.png: cannot be")
    assert reason(data_path=str(images / "x")).startswith(
        f"validation image {images}/x/cut.png: cannot be"
    )
    assert reason(data_path=str(images / "nowhere")) == f"data_path {images}/nowhere does not exist"
