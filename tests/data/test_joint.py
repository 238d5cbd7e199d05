"""Transforms of images with masks and boxes, against torchvision's and plain loops, and the loaders
of both tasks."""

import tracemalloc

import numpy as np
import pytest
import torch
from test_sampler import global_states
from torchvision import tv_tensors
from torchvision.transforms import v2

from data.annotated import (
    IGNORED,
    AnnotatedDataset,
    EvalImages,
    build_annotated_eval_loader,
    open_annotated_data,
    take_images,
)
from data.images import BadImageError, PixelFormat
from data.joint import (
    MAX_OBJECTS,
    Crop,
    TrainTransform,
    detect_eval,
    fitted_size,
    joint_transform,
    segment_eval,
)
from data.labels import build_labelled_data
from data.loader import loader_maker
from data.sampler import SampleKey
from data.scenes import SceneMasks, SceneObjects
from data.unlabelled import open_images
from engine.pictures.choose import validation_source
from util.dist import Processes
from util.errors import DataError, InputError
from util.rng import generator, seeded
from util.settings.evaluation import FinetuneConfig
from util.settings.tools import EmbedConfig

GREY = PixelFormat(1)
MEAN = (0.25,)
ALONE = Processes(0, 1, 0, 1, torch.device("cpu"))


def transform(**changes) -> TrainTransform:
    usual = {"img_size": 64, "scales": (0.5, 2.0), "hflip": 0.5, "interpolation": "bilinear"}
    return TrainTransform(**{**usual, "mean": MEAN, "task": "segment", **changes})


def blocks(seed: int, height: int, width: int, channels: int = 1) -> torch.Tensor:
    """An image (C, h, w) uint8 of 8 x 8 blocks of 0 and 200."""
    drawn = torch.randint(2, (channels, height // 8 + 1, width // 8 + 1), generator=generator(seed))
    return (
        (200 * drawn)
        .to(torch.uint8)
        .repeat_interleave(8, 1)
        .repeat_interleave(8, 2)[:, :height, :width]
    )


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (200, 40), (7, 300)])
@pytest.mark.parametrize("task", ["segment", "detect"])
def test_pixels_mask_and_boxes_share_one_geometry(size, task):
    """The image's channel is its mask. Away from the edges of blocks, which the resize blurs, the
    two stay equal; boxes are those of the objects' pixels up to rounding, as loops find them."""
    changed = transform(task=task, scales=(0.9, 3.0))
    for seed in range(20):
        image = blocks(seed, *size)
        with seeded(seed):
            shown, found = changed(image, {"mask": image[0].long()})
        with seeded(seed):
            crop = changed.draw(*size)
        mask = found["mask"]
        assert shown.shape == (1, 64, 64) and shown.dtype == torch.uint8
        rows, columns = crop.resized
        is_inside = torch.zeros(64, 64, dtype=torch.bool)
        is_inside[:rows, :columns] = True
        assert torch.equal(mask != IGNORED, is_inside)
        assert (shown[0][~is_inside] == 64).all()  # the mean pixel, 0.25 * 255
        # a blurred pixel is nearer to the colour of the pixel at its centre
        wrong = ((shown[0] > 100) != (mask > 100))[is_inside].float().mean()
        assert wrong < 0.02, (seed, wrong)
        boxes = torch.tensor([[3.0, 1.0, 30.0, 6.0], [20.0, 4.0, 39.0, 7.0], [0.0, 0.0, 9.0, 1.0]])
        masks = torch.zeros(3, *size, dtype=torch.uint8)
        for one, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            one[top:bottom, left:right] = 1
        raw = {"boxes": boxes, "labels": torch.arange(3), "masks": masks}
        with seeded(seed):
            again, objects = changed(image, raw)
        assert torch.equal(again, shown)  # the annotation changes no draw of the image
        for box, one in zip(objects["boxes"], objects["masks"], strict=True):
            ys, xs = np.nonzero(one.numpy())
            around = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert np.abs(box.numpy() - around).max() <= 0.5 + 1e-4


def test_as_torchvision_where_nothing_is_resized():
    """Scale 1 of a square image: crop, flip and padding alone, which v2 does on all at once."""
    image = blocks(0, 90, 120, channels=4)  # more channels than a photograph has
    boxes = torch.tensor([[5.0, 7.0, 50.0, 33.5], [60.5, 20.0, 118.0, 90.0], [0.0, 0.0, 1.0, 1.0]])
    mask = torch.randint(20, (90, 120), generator=generator(1))
    for is_flipped in (False, True):
        crop = Crop(10, 30, (70, 80), (70, 80), is_flipped)
        steps = [tv_tensors.Image(image), tv_tensors.Mask(mask)]
        steps.append(tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(90, 120)))
        wanted = [v2.functional.crop(step, 10, 30, 70, 80) for step in steps]
        if is_flipped:
            wanted = [v2.functional.horizontal_flip(step) for step in wanted]
        assert torch.equal(crop.part(image), wanted[0])
        assert torch.equal(crop.mask(mask, (70, 80), 0), wanted[1])
        inside = v2.functional.clamp_bounding_boxes(wanted[2])
        assert torch.equal(crop.boxes(boxes), inside)


def test_a_mask_takes_the_pixel_at_the_centre():
    """As the image's resize does, in contrast to its corner."""
    mask = torch.arange(12).view(3, 4)
    crop = Crop(0, 0, (3, 4), (1, 2), False)
    assert crop.mask(mask, (2, 3), -1).tolist() == [[5, 7, -1], [-1, -1, -1]]
    larger = Crop(0, 1, (2, 2), (3, 4), True).mask(mask, (3, 4), -1)
    assert larger.tolist() == [[2, 2, 1, 1], [6, 6, 5, 5], [6, 6, 5, 5]]


def test_scales_are_those_of_the_evaluations():
    image = torch.zeros(1, 60, 100, dtype=torch.uint8)
    for task, rows in (("segment", 32 * 1.0), ("detect", 32 * 0.6)):
        drawn = []
        for seed in range(300):
            with seeded(seed):
                crop = transform(task=task, img_size=32, scales=(0.5, 2.0)).draw(60, 100)
            drawn.append(crop.resized[0] / crop.sides[0] * 60 / rows)
        assert 0.48 < min(drawn) < 0.54 and 1.9 < max(drawn) < 2.1
    assert segment_eval(image, 32, 16).shape == (1, 32, 64)  # 32 x 53, to whole patches
    assert segment_eval(image, (64, 32), (8, 16)).shape == (1, 32, 64)
    assert segment_eval(image[:, :1], 32, 16).shape == (1, 16, 128)  # not 32 x 3,200
    assert fitted_size(60, 100, 32) == (19, 32) and fitted_size(1, 999, 32) == (1, 32)
    shown = detect_eval(image + 200, 32, MEAN)
    assert (shown[:, :19] == 200).all() and (shown[:, 19:] == 64).all()
    deep = detect_eval((image + 200).float(), 32, MEAN)
    assert deep.dtype == torch.float32 and (deep[:, 19:] == 63.75).all()
    five = 65.5 * torch.ones(5, 60, 100)  # of 16 bits: floats, which are not rounded
    for task in ("segment", "detect"):
        change = transform(task=task, scales=(0.4, 0.4), mean=(0.1,) * 5)
        shown, found = change(five, {"mask": torch.zeros(60, 100, dtype=torch.int64)})
        is_inside = found["mask"] == 0
        assert shown.dtype == torch.float32 and 0 < is_inside.float().mean() < 1
        assert torch.allclose(shown[:, is_inside], torch.tensor(65.5))
        assert (shown[:, ~is_inside] == torch.tensor(0.1) * 255).all()


def test_objects_without_area_or_pixels_go():
    masks = torch.zeros(4, 64, 64, dtype=torch.uint8)
    masks[0, 10:20, 10:20] = masks[1, 40:60, 40:60] = 1  # the third has no pixel
    boxes = torch.tensor([[10, 10, 20, 20], [40, 40, 60, 60], [1, 1, 9, 9], [5, 5, 5, 9.0]])
    found = {"boxes": boxes, "labels": torch.tensor([3, 4, 5, 6]), "masks": masks}
    image = torch.zeros(1, 64, 64, dtype=torch.uint8)
    same = transform(task="detect", scales=(1.0, 1.0), hflip=0.0)
    _, kept = same(image, found)
    assert kept["labels"].tolist() == [3, 4] and torch.equal(kept["boxes"], boxes[:2])
    assert kept["masks"].sum(dim=(1, 2)).tolist() == [100, 400]
    del found["masks"]
    assert same(image, found)[1]["labels"].tolist() == [3, 4, 5]
    close = transform(task="detect", scales=(4.0, 4.0), hflip=0.0)
    for seed in range(20):  # 16 x 16 pixels of the image are seen, never both objects
        with seeded(seed):
            labels = close(image, {**found, "masks": masks})[1]["labels"].tolist()
        assert labels in ([], [3], [4])


class Many:
    """Masks of many objects, each dense when it is asked for."""

    def __init__(self):
        self.asked: list[int] = []

    def __getitem__(self, number: int) -> torch.Tensor:
        self.asked.append(number)
        return torch.ones(2000, 2000, dtype=torch.uint8)


def test_memory_of_ten_thousand_objects_is_bounded():
    """All masks at once would take 40 GB; the sample's are 500 of 32 x 32."""
    masks = Many()
    boxes = torch.tensor([0.0, 0.0, 2000.0, 2000.0]).expand(10_000, 4)
    found = {"boxes": boxes, "labels": torch.arange(10_000), "masks": masks}
    image = torch.zeros(1, 2000, 2000, dtype=torch.uint8)
    change = transform(task="detect", img_size=32)
    before = _peak()
    tracemalloc.start()
    with seeded(3):
        _, target = change(image, found)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    assert _peak() - before < 100 * 2**20
    assert target["masks"].shape == (MAX_OBJECTS, 32, 32) and len(masks.asked) == MAX_OBJECTS
    chosen = target["labels"].tolist()
    assert chosen == sorted(set(chosen)) and max(chosen) > 9000  # not the first ones
    with seeded(3):
        assert torch.equal(change(image, found)[1]["labels"], target["labels"])


def _peak() -> int:
    from resource import RUSAGE_SELF, getrusage

    return getrusage(RUSAGE_SELF).ru_maxrss * 1024


class Spoiled(SceneObjects):
    """Scenes of which one has a broken annotation."""

    def annotation(self, index, height, width):
        if index == 3:
            raise BadImageError("has a broken mask")
        return super().annotation(index, height, width)


@pytest.mark.parametrize("source", [SceneMasks("train", GREY), Spoiled("train", GREY)])
def test_samples_are_functions_of_their_keys(source):
    """Two loader processes or none; a bad annotation is replaced together with its image."""
    task = "segment" if isinstance(source, SceneMasks) else "detect"
    dataset = AnnotatedDataset(source, transform(task=task), 5)
    keys = [[SampleKey(n, 2, 10 + n, 7) for n in range(at, at + 3)] for at in (0, 3)]
    shown = []
    before = global_states()
    for workers in (0, 2):
        cfg = FinetuneConfig(
            dataset="digits_scenes", task=task, num_workers=workers, in_chans=1, mean=0.5, std=0.5
        )
        loader = loader_maker(cfg, ALONE)(dataset, batch_sampler=keys)
        shown.append([*loader])
    assert global_states() == before
    for one, other in zip(*shown, strict=True):
        assert torch.equal(one.images, other.images) and one.bad == other.bad
        for ours, theirs in zip(one.targets, other.targets, strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    bad = [found for batch in shown[0] for found in batch.bad]
    wanted = [] if task == "segment" else [("digits_scenes train[3]", "has a broken mask")]
    assert bad == wanted
    (image, target, _, _) = dataset[keys[0][1]]
    assert torch.equal(shown[0][0].images[1], image)
    other = dataset[keys[0][1]._replace(epoch=3)]
    assert not torch.equal(other.image, image)


def test_an_evaluation_shows_each_image_once():
    source = Spoiled("val", GREY)
    images = EvalImages(source, lambda image: detect_eval(image, 32, MEAN), True)
    cfg = FinetuneConfig(dataset="digits_scenes", num_workers=0, task="detect")
    make = loader_maker(cfg, ALONE)
    parts = [
        [s for batch in build_annotated_eval_loader(images, 7, rank, 3, make) for s in batch]
        for rank in range(3)
    ]
    assert [sample.number for sample in parts[1]] == list(range(1, 500, 3))
    assert sorted(sample.number for part in parts for sample in part) == list(range(500))
    assert parts[0][1].bad == [("digits_scenes val[3]", "has a broken mask")]
    sample = parts[2][5]
    assert sample.image.shape == (1, 32, 32) and sample.size == (64, 64) and not sample.bad
    wanted = source.annotation(17, 64, 64)
    assert all(torch.equal(sample.target[name], wanted[name]) for name in wanted)


def test_scenes_by_their_settings():
    def opened(**settings):
        fixed = {"dataset": "digits_scenes", "in_chans": 1, "mean": 0.5, "std": 0.5}
        return open_annotated_data(FinetuneConfig(**fixed, **settings))

    data = opened(task="segment", subset=20, seed=4)
    assert (len(data.train), len(data.val), len(data.class_names)) == (20, 500, 11)
    chosen = data.train.indices.tolist()
    assert chosen == sorted(set(chosen)) and max(chosen) > 1000
    assert chosen == opened(task="segment", subset=20, seed=4).train.indices.tolist()
    assert chosen != opened(task="segment", subset=20, seed=5).train.indices.tolist()
    source = SceneMasks("train", GREY)
    for place, index in enumerate(chosen[:3]):
        assert torch.equal(data.train.read(place), source.read(index))
        ours, theirs = (s.annotation(n, 64, 64) for s, n in ((data.train, place), (source, index)))
        assert torch.equal(ours["mask"], theirs["mask"])
    boxes = opened(task="detect", instance_masks=False).val
    assert sorted(boxes.annotation(0, 64, 64)) == ["boxes", "labels"]
    assert len(boxes.ground_truth()["annotations"]) > 500
    with pytest.raises(InputError) as raised:
        take_images(source, 4001, 0)
    assert raised.value.settings == ("subset",)
    with pytest.raises(InputError, match="num_classes"):
        opened(task="detect", num_classes=11)
    cfg = FinetuneConfig(dataset="digits_scenes", task="detect", img_size=64)
    assert joint_transform(cfg).scales == (0.1, 2.0)


def test_scenes_are_known_to_the_tools_and_have_no_classes():
    weights = {"finetune": "w", "output_file": "o.npz", "dataset": "digits_scenes"}
    both = open_images(EmbedConfig(**weights), GREY)
    assert len(both) == 4500 and EmbedConfig(**weights).problems() == []
    for split, first in (("train", 0), ("val", 4000)):
        source = open_images(EmbedConfig(**weights, split=split), GREY)
        assert torch.equal(both.read(first + 7), source.read(7))
    shown = validation_source("digits_scenes", None, GREY)
    assert torch.equal(shown.read(7), both.read(4007))
    with pytest.raises(DataError, match="digits_scenes"):
        build_labelled_data("digits_scenes", None, GREY, False, None)
