"""The scenes of digits: what they show, and what is said about it."""

import numpy as np
import pytest
import torch
from pycocotools.mask import decode

from data.images import PixelFormat
from data.known_sets import read_mnist5k
from data.scenes import NUM_SCENES, SHADES, SIDE, SceneMasks, SceneObjects, compose, stickers

GREY = PixelFormat(1)
SCENES = [(is_train, index) for is_train in (True, False) for index in range(40)]


def test_a_scene_is_a_pure_function_of_its_split_and_index():
    first = [compose(*scene).image for scene in SCENES]
    again = [compose(*scene).image for scene in reversed(SCENES)][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({image.tobytes() for image in first}) == len(SCENES)


def test_one_to_three_stickers_are_where_the_masks_say():
    counts = set()
    for scene in (compose(*scene) for scene in SCENES):
        counts.add(len(scene.labels))
        assert scene.masks.shape == (len(scene.labels), SIDE, SIDE)
        assert scene.masks.sum(axis=0).max() == 1  # no pixel is of two digits
        for mask in scene.masks:
            of_sticker = scene.image[mask]
            assert SHADES[0] <= of_sticker.min() <= SHADES[1]  # its outline, and no background
            assert of_sticker.max() > 150  # its stroke
    assert counts == {1, 2, 3}


def test_scenes_show_digits_of_their_own_split_only(monkeypatch):
    asked = []
    monkeypatch.setattr("data.scenes.stickers", lambda t: asked.append(t) or stickers(t))
    for is_train in (True, False):
        compose.__wrapped__(is_train, 7)
    assert asked == [True, False]
    for is_train in (True, False):
        digits, classes = stickers(is_train)
        images, labels = read_mnist5k(is_train)
        assert np.array_equal(classes, labels)
        assert np.array_equal(digits[:, :1], images)
        padded = np.pad(images[:50, 0], ((0, 0), (3, 3), (3, 3)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (7, 7), axis=(1, 2))
        assert np.array_equal(digits[:50, 1], windows.max(axis=(3, 4)))


@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_boxes_and_ground_truth_say_the_same(split):
    masks, objects = SceneMasks(split, GREY), SceneObjects(split, GREY)
    assert len(masks) == NUM_SCENES[split]
    for index in range(10):
        assert torch.equal(masks.read(index), objects.read(index))
        mask = masks.annotation(index, SIDE, SIDE)["mask"]
        found = objects.annotation(index, SIDE, SIDE)
        expected = torch.zeros(SIDE, SIDE, dtype=torch.int64)
        for box, label, own in zip(found["boxes"], found["labels"], found["masks"], strict=True):
            rows, columns = np.nonzero(own.numpy())
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == edges
            expected[own.bool()] = label + 1  # 0 is the background
        assert torch.equal(mask, expected)


def test_the_ground_truth_of_all_validation_scenes_is_that_of_each():
    source = SceneObjects("val", GREY)
    truth = source.ground_truth()
    assert [image["id"] for image in truth["images"]] == [*range(500)]
    assert [kind["name"] for kind in truth["categories"]] == source.class_names
    assert len({entry["id"] for entry in truth["annotations"]}) == len(truth["annotations"])
    of_scene = [entry for entry in truth["annotations"] if entry["image_id"] == 3]
    found = source.annotation(3, SIDE, SIDE)
    assert [entry["category_id"] for entry in of_scene] == found["labels"].tolist()
    for entry, box, mask in zip(of_scene, found["boxes"], found["masks"], strict=True):
        left, top, width, height = entry["bbox"]
        assert [left, top, left + width, top + height] == box.tolist()
        assert np.array_equal(decode(entry["segmentation"]), mask.numpy())
        assert entry["area"] == mask.sum()
