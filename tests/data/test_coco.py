"""COCO's files: what is read of them, against pycocotools and plain loops, and what is refused."""

import copy
import json
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from test_segmentation_data import picture, write

from data.annotated import AnnotatedData, AnnotatedDataset, open_annotated_data
from data.coco import CocoFile, run_lengths
from data.images import BadImageError
from data.joint import MAX_OBJECTS, joint_transform
from data.sampler import SampleKey
from util.errors import DataError, InputError
from util.settings.evaluation import FinetuneConfig

HEIGHT, WIDTH = 24, 40
CATEGORIES = [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}]  # with gaps, out of order


def filled(seed: int) -> np.ndarray:
    """A mask (H, W) uint8 of a rectangle with holes."""
    random = np.random.default_rng(seed)
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[4:20, 6:30] = random.integers(2, size=(16, 24))
    return mask


def uncompressed(mask: np.ndarray) -> list[int]:
    """Run lengths by a loop down the columns."""
    counts, last = [0], 0
    for value in mask.T.reshape(-1).tolist():
        if value != last:
            counts.append(0)
            last = value
        counts[-1] += 1
    return counts


def compressed(mask: np.ndarray) -> dict[str, object]:
    found = coco_mask.encode(np.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": found["counts"].decode()}


def content() -> dict[str, list[dict]]:
    """Two images; of the first a polygon, both kinds of run lengths and a crowd, none of the
    second."""
    common = {"image_id": 7, "category_id": 90, "bbox": [6, 4, 24, 16], "iscrowd": 0}
    runs = {"size": [HEIGHT, WIDTH], "counts": uncompressed(filled(1))}
    return {
        "images": [
            {"id": 9, "file_name": "b.jpg", "height": HEIGHT, "width": WIDTH},
            {"id": 7, "file_name": "in/a.jpg", "height": HEIGHT, "width": WIDTH},
        ],
        "annotations": [
            {**common, "id": 1, "category_id": 3, "segmentation": [[2, 2, 12, 2, 12, 10, 2, 10]]}
            | {"bbox": [2, 2, 10, 8], "area": 77.5},
            {**common, "id": 2, "segmentation": runs},
            {**common, "id": 3, "segmentation": compressed(filled(2))},
            {**common, "id": 4, "segmentation": {**runs}, "iscrowd": 1},
        ],
        "categories": CATEGORIES,
    }


def make(root: Path, train: object = None, val: object = None) -> Path:
    for split, wanted in (("train2017", train), ("val2017", val)):
        for name in ("b.jpg", "in/a.jpg"):
            write(root / split / name, picture(HEIGHT, WIDTH))
        found = content() if wanted is None else wanted
        encoded = found if isinstance(found, bytes) else json.dumps(found).encode()
        write(root / f"annotations/instances_{split}.json", encoded)
    return root


def settings(root: Path, **more) -> FinetuneConfig:
    return FinetuneConfig(**{"task": "detect", "data_path": str(root), "img_size": 32, **more})


def opened(root: Path, **more) -> AnnotatedData:
    return open_annotated_data(settings(root, **more))


def dense(found) -> list[torch.Tensor]:
    return [found["masks"][number] for number in range(len(found["boxes"]))]


def test_objects_are_those_of_pycocotools(tmp_path):
    data = opened(make(tmp_path))
    assert data.class_names == ["cat", "dog"] and len(data.train) == 2
    assert data.train.name(1) == str(tmp_path / "train2017/in/a.jpg")
    empty = data.train.annotation(0, HEIGHT, WIDTH)
    assert empty["boxes"].shape == (0, 4) and len(empty["masks"]) == 0
    found = data.train.annotation(1, HEIGHT, WIDTH)
    assert found["labels"].tolist() == [0, 1, 1]  # no crowd
    assert found["boxes"].tolist() == [[2, 2, 12, 10], [6, 4, 30, 20], [6, 4, 30, 20]]
    theirs = COCO(str(tmp_path / "annotations/instances_train2017.json"))
    for one, mask in zip(theirs.loadAnns([1, 2, 3]), dense(found), strict=True):
        assert np.array_equal(theirs.annToMask(one), mask) and mask.dtype == torch.uint8
    assert np.array_equal(dense(found)[1], filled(1))
    boxes = opened(tmp_path, instance_masks=False).train.annotation(1, HEIGHT, WIDTH)
    assert sorted(boxes) == ["boxes", "labels"]


def test_ground_truth_has_everything(tmp_path):
    truth = opened(make(tmp_path)).val.ground_truth()
    assert truth["images"] == [{"id": n, "height": HEIGHT, "width": WIDTH} for n in (0, 1)]
    assert truth["categories"] == [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    objects = truth["annotations"]
    assert [one["id"] for one in objects] == [1, 2, 3, 4]
    assert [one["iscrowd"] for one in objects] == [0, 0, 0, 1]
    assert {one["image_id"] for one in objects} == {1}
    assert objects[0]["bbox"] == [2, 2, 10, 8] and objects[0]["area"] == 77.5
    assert objects[1]["area"] == 24 * 16  # of the box, where the file has none
    assert np.array_equal(coco_mask.decode(objects[3]["segmentation"]), filled(1))
    boxes = opened(tmp_path, instance_masks=False).val.ground_truth()["annotations"]
    assert "segmentation" not in boxes[0]


def test_run_lengths_of_random_masks():
    """Compressed, uncompressed and by pycocotools: the same bytes."""
    random = np.random.default_rng(0)
    for number in range(60):
        height, width = random.integers(1, 70, size=2)
        mask = (random.random((height, width)) < random.random()).astype(np.uint8)
        if number % 3 == 0:  # long runs
            mask[:] = mask[:, :1]
        wanted = coco_mask.encode(np.asfortranarray(mask))
        texts = compressed(mask), {"size": [int(height), int(width)], "counts": uncompressed(mask)}
        for text in texts:
            found = run_lengths(json.dumps(text).encode(), int(height), int(width))
            assert found["counts"] == wanted["counts"]
            assert [*found["size"]] == [*wanted["size"]]


RUNS = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
BROKEN = {
    "cut": {"size": [HEIGHT, WIDTH], "counts": compressed(filled(2))["counts"][:-1]},
    "no text": {"size": [HEIGHT, WIDTH], "counts": "~~~"},
    "empty": {"size": [HEIGHT, WIDTH], "counts": ""},
    "endless": {"size": [HEIGHT, WIDTH], "counts": "o" * 99},
    "too long": {**RUNS, "counts": [HEIGHT * WIDTH, 1]},
    "too short": {**RUNS, "counts": [5]},
    "negative": {**RUNS, "counts": [HEIGHT * WIDTH + 5, -5]},
    "negative text": {**RUNS, "counts": compressed(np.zeros((4, 4), np.uint8))["counts"] + "O"},
    "other size": {**RUNS, "size": [WIDTH, HEIGHT]},
    "no size": {"counts": [HEIGHT * WIDTH]},
    "odd": [[1, 2, 3, 4, 5, 6, 7]],
    "far": [[0, 0, 1e9, 0, 1e9, 1e9]],
    "words": [["a", 2, 3, 4, 5, 6]],
    "flat": [1, 2, 3, 4, 5, 6],
    "text": "all of it",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_segmentations(tmp_path, kind):
    """A bad sample of training, which is replaced; an error of an evaluation."""
    wrong = content()
    wrong["annotations"][2]["segmentation"] = BROKEN[kind]
    data = opened(make(tmp_path, wrong, wrong))
    with pytest.raises(BadImageError) as raised:
        data.train.annotation(1, HEIGHT, WIDTH)
    text = str(raised.value)
    assert "instances_train2017.json" in text and "\n" not in text
    dataset = AnnotatedDataset(data.train, joint_transform(settings(tmp_path)), 0)
    sample = dataset[SampleKey(1, 0, 0, 0)]
    assert sample.bad[0] == (str(tmp_path / "train2017/in/a.jpg"), text)
    with pytest.raises(DataError, match="instances_val2017.json"):
        data.val.ground_truth()


def changed(part: str, place: int | None = None, **values) -> dict:
    """The usual content with other values of one record, `...` for none; or with another list."""
    found = copy.deepcopy(content())
    if place is None:
        return {**found, part: values["records"]}
    record = found[part][place] | values
    found[part][place] = {key: value for key, value in record.items() if value is not ...}
    return found


REFUSED = {  # content of the training's file, and what the line must name
    "no json": (b"{", "instances_train2017.json"),
    "binary": (b"\xff\xfe\x00", "instances_train2017.json"),
    "a list": ([], "it"),
    "no images": ({key: value for key, value in content().items() if key != "images"}, "images"),
    "no object": (changed("annotations", records=[]), "annotations"),
    "no name": (changed("images", 1, file_name=...), "images.1.file_name"),
    "no height": (changed("images", 0, height=...), "images.0.height"),
    "flat image": (changed("images", 0, height=0), "images.0.height"),
    "no id": (changed("images", 0, id=...), "images.0.id"),
    "id of text": (changed("images", 0, id="b"), "images.0.id"),
    "huge image": (changed("images", 0, height=10**9), "pixels"),
    "no bbox": (changed("annotations", 2, bbox=...), "annotations.2.bbox"),
    "bbox of three": (changed("annotations", 2, bbox=[1, 2, 3]), "annotations.2.bbox"),
    "bbox of words": (changed("annotations", 2, bbox=[1, 2, 3, "x"]), "annotations.2.bbox"),
    "bbox of nan": (changed("annotations", 2, bbox=[1, 2, 3, float("nan")]), "annotations.2.bbox"),
    "two of one id": (changed("images", 0, id=7), "[7]"),
    "two categories": (changed("categories", 0, id=3), "[3]"),
    "unknown category": (changed("annotations", 1, category_id=4), "category_id"),
    "unknown image": (changed("annotations", 1, image_id=4), "image_id"),
    "other categories": (changed("categories", 0, name="wolf"), "wolf"),
    "no such image": (changed("images", 1, file_name="c.jpg"), "c.jpg"),
    "no image at all": (changed("images", 0, file_name="none/b.jpg"), "none/b.jpg"),
    "outside": (changed("images", 1, file_name="../val2017/b.jpg"), "../val2017/b.jpg"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_files_that_are_refused(tmp_path, kind):
    wrong, named = REFUSED[kind]
    with pytest.raises(DataError) as raised:
        opened(make(tmp_path, wrong))
    text = str(raised.value)
    assert named in text and "instances_train2017.json" in text and "\n" not in text
    assert len(text) < 600


def test_no_segmentations(tmp_path):
    """Boxes alone can be learned; some objects without one are left out."""
    found = content()
    for place, nothing in enumerate((None, [], {})):
        found["annotations"][place]["segmentation"] = nothing
    with pytest.raises(DataError, match="instance_masks false"):
        opened(make(tmp_path, found))
    assert (
        len(opened(tmp_path, instance_masks=False).train.annotation(1, HEIGHT, WIDTH)["boxes"]) == 3
    )
    found["annotations"][0] = content()["annotations"][0]
    data = opened(make(tmp_path, found, found))
    assert len(data.train.annotation(1, HEIGHT, WIDTH)["boxes"]) == 1
    truth = data.val.ground_truth()["annotations"]
    assert [coco_mask.area(one["segmentation"]) for one in truth][1:3] == [0, 0]


def test_boxes_outside_and_without_area(tmp_path, caplog):
    found = content()
    boxes = [[-5, -5, 15, 20], [6, 4, 0, 16], [WIDTH, 0, 9, 9], [1, 1, 5, 5]]
    for one, box in zip(found["annotations"], boxes, strict=True):
        one.update(bbox=box, iscrowd=0)
    data = opened(make(tmp_path, found, found))
    kept = data.train.annotation(1, HEIGHT, WIDTH)
    assert kept["boxes"].tolist() == [[0, 0, 10, 15], [1, 1, 6, 6]]
    assert len(kept["masks"]) == 2 and np.array_equal(dense(kept)[1], filled(1))
    (line,) = [r.message for r in caplog.records if "not trained on" in r.message]
    assert "2 of 4" in line and "instances_train2017.json" in line
    assert [one["bbox"] for one in data.val.ground_truth()["annotations"]] == boxes


def test_an_image_of_another_size(tmp_path):
    source = opened(make(tmp_path)).train
    with pytest.raises(BadImageError, match="EXIF"):
        source.annotation(1, WIDTH, HEIGHT)
    with pytest.raises(BadImageError, match="instances_train2017.json says 40 x 24"):
        source.annotation(1, HEIGHT, WIDTH + 1)
    write(tmp_path / "train2017/in/a.jpg", picture(HEIGHT, WIDTH, orientation=6))
    dataset = AnnotatedDataset(source, joint_transform(settings(tmp_path)), 0)
    assert dataset[SampleKey(1, 0, 0, 0)].bad


def test_where_files_and_images_are_looked_for(tmp_path):
    root = make(tmp_path / "data")
    names = root / "annotations"
    (names / "instances_train2017.json").rename(tmp_path / "ours.json")
    with pytest.raises(DataError, match="--train_json"):
        opened(root)
    with pytest.raises(InputError, match="none.json"):
        opened(root, train_json=str(tmp_path / "none.json"))
    (root / "train2017").rename(root / "train")
    data = opened(root, train_json=str(tmp_path / "ours.json"))
    assert data.train.name(0) == str(root / "train/b.jpg")
    (root / "images").mkdir()
    (root / "train").rename(root / "images/train")
    assert opened(root, train_json=str(tmp_path / "ours.json")).train.read(0).shape[0] == 3
    write(names / "instances_val2014.json", b"{}")
    with pytest.raises(DataError, match="--val_json"):
        opened(root, train_json=str(tmp_path / "ours.json"))
    before = data.train.fingerprint()
    write(tmp_path / "ours.json", json.dumps(changed("annotations", 0, area=1.0)).encode())
    val = str(names / "instances_val2017.json")
    later = opened(root, train_json=str(tmp_path / "ours.json"), val_json=val)
    assert later.train.fingerprint() != before  # a resume notices


def test_memory_of_many_objects(tmp_path):
    """10,000 objects in one image, and what a loader process is sent of 20,000: no Python objects,
    and of the masks of a sample at most 500 are dense."""
    side = 1000
    found = content()
    one = {"image_id": 7, "category_id": 3, "iscrowd": 0}
    polygon = [1.5, 1.5, 900.25, 1.5, 900.25, 900.75, 400.5, 950.5, 1.5, 900.75]
    objects = [
        {
            **one,
            "id": n,
            "bbox": [1, 1, 900, 949],
            "segmentation": [polygon],
            "image_id": 7 + 2 * (n % 2),
        }
        for n in range(20_000)
    ]
    for image in found["images"]:
        image.update(height=side, width=side)
    path = tmp_path / "many.json"
    path.write_text(json.dumps({**found, "annotations": objects}))
    coco = CocoFile(path)
    assert len(pickle.dumps(coco)) < 20_000 * 150  # 70 of them the polygon's text
    for name in ("b.jpg", "in/a.jpg"):
        write(tmp_path / name, picture(side, side))
    data = opened(tmp_path, train_json=str(path), val_json=str(path))
    dataset = AnnotatedDataset(data.train, joint_transform(settings(tmp_path)), 0)
    tracemalloc.start()
    sample = dataset[SampleKey(0, 0, 0, 0)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sample.target["masks"].shape == (MAX_OBJECTS, 32, 32)
    assert peak < 40 * 2**20  # 10,000 masks would take 10 GB; 23 MiB are measured
