"""Pictures of predictions: what is coloured, where, and what is left out."""

import weakref
from collections.abc import Iterator

import numpy as np
import torch

from data.annotated import IGNORED
from engine.pictures.predictions import Example, Examples, color, draw_bars, draw_examples, over

IMAGE = torch.full((1, 56, 112), 100, dtype=torch.uint8)  # shown twice as large


def test_masks_are_mixed_in_where_they_are_and_nowhere_else():
    mask = torch.full((56, 112), IGNORED)
    mask[10:20, 30:50] = 2
    found = over(IMAGE, {"mask": mask}, ["a", "b", "c"])
    expected = np.full((224, 224, 3), 255)
    expected[:112] = 100
    expected[20:40, 60:100] = (100 + np.array(color(2))) // 2
    assert (found == expected).all()


def test_a_large_image_is_reduced_with_its_mask():
    mask = torch.zeros(400, 896, dtype=torch.int64)
    mask[200:] = 1
    found = over(torch.zeros(3, 400, 896, dtype=torch.uint8), {"mask": mask}, ["a", "b"])
    assert (found[:50] == np.array(color(0)) // 2).all()
    assert (found[50:100] == np.array(color(1)) // 2).all() and (found[100:] == 255).all()


def test_boxes_lie_around_their_objects_and_improbable_ones_are_left_out():
    objects = {
        "boxes": torch.tensor([[20.0, 20, 40, 50], [60, 20, 80, 50]]),
        "labels": torch.tensor([1, 0]),
        "masks": torch.zeros(2, 56, 112, dtype=torch.uint8),
        "scores": torch.tensor([0.7, 0.49]),
    }
    objects["masks"][0, 30:40, 25:30] = 1
    found = over(IMAGE, objects, ["a", "b"])
    plain = over(IMAGE, {}, ["a", "b"])
    changed = (found != plain).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert (columns.min(), rows.max()) == (40, 99) and columns.max() < 120
    assert (found[60, 40] == color(1)).all() and (found[60, 79] == color(1)).all()
    assert (found[70, 55] == (100 + np.array(color(1))) // 2).all() and not changed[90, 60]
    truth = {name: values for name, values in objects.items() if name != "scores"}
    assert (over(IMAGE, truth, ["a", "b"])[60, 120] == color(0)).all()


def test_neighbouring_classes_differ_and_bars_have_their_lengths():
    colors = [color(label) for label in range(20)]
    assert len(set(colors)) == 20
    assert all(
        np.abs(np.subtract(a, b)).max() > 60 for a, b in zip(colors, colors[1:], strict=False)
    )
    picture = draw_bars(["a", "b", "c"], {"iou": [100.0, 50.0, float("nan")]})
    long, half, none = (int((picture == color(label)).all(axis=2).sum()) for label in range(3))
    assert 1.8 < long / half < 2.2 and none == 0


def test_images_are_not_all_held_at_once():
    seen: list[weakref.ref[torch.Tensor]] = []

    def rows() -> Iterator[Example]:
        mask = torch.zeros(56, 112, dtype=torch.int64)
        for name in "abcd":
            assert sum(ref() is not None for ref in seen) <= 1  # the one that was just drawn
            seen.append(weakref.ref(image := IMAGE.clone()))
            yield Example(name, image, {"mask": mask}, {"mask": mask})
            del image

    draw_examples(Examples(["a"], rows()))
    assert len(seen) == 4


def test_a_row_shows_image_truth_and_prediction():
    mask = torch.zeros(56, 112, dtype=torch.int64)
    row = Example("one", IMAGE, {"mask": mask}, {"mask": mask + 1})
    picture = draw_examples(Examples(["a", "b"], [row]))
    for label in (0, 1):
        blended = (100 + np.array(color(label))) // 2
        assert (picture == blended).all(axis=2).sum() == 112 * 224
