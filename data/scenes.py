"""Scenes of real digits, for segmentation and detection without a download (`dataset:
digits_scenes`).

Each scene shows several of the 5,000 MNIST digits that a package carries (`data/known_sets.py`) as
stickers: the stroke, and around it a wide grey outline that belongs to the digit. Stickers have
several sizes and cover one another in part, before a background of strokes from other digits. The
scenes are pure functions of their index; those for training show training digits only.

Shapes: `n` digits of a scene, `H` and `W` height and width, both SIDE.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.arrays import values_of
from data.images import PixelFormat
from data.known_sets import read_mnist5k
from data.loader import Annotation
from data.pixels import to_pixels
from data.sources import ImageSource
from data.transforms import resize
from util.rng import derive_seed

SIDE = 64  # pixels of a scene
NUM_SCENES = {"train": 4000, "val": 500}
DIGITS = (1, 3)  # fewest and most in a scene
DIGIT_SIDES = (30, 44)  # pixels of a digit's square
STROKES = (3, 8)  # fewest and most pieces of other digits in the background
STROKE_SIDES = (6, 13)  # pixels of a piece
OUTLINE = 3  # pixels around a stroke, of MNIST's 28 x 28
SHADES = (60, 120)  # darkest and brightest outline
VISIBLE = 0.75  # smallest share of a sticker's pixels that no later one covers
ON_STICKER = 100  # a pixel of the widened stroke from which on it belongs to its sticker
VERSION = 1  # of the scenes: other scenes are other data


@dataclass(frozen=True)
class Scene:
    """A scene: `image` (H, W) uint8, and for each digit its class `labels` (n,) int64 and its
    visible pixels `masks` (n, H, W) bool."""

    image: np.ndarray
    labels: np.ndarray
    masks: np.ndarray


@cache
def stickers(is_train: bool) -> tuple[Tensor, np.ndarray]:
    """The digits of a split as two channels, their stroke and the same stroke widened by OUTLINE,
    `(n, 2, 28, 28)` uint8, and their classes `(n,)`."""
    images, classes = read_mnist5k(is_train)
    strokes = torch.from_numpy(images).float()
    wide = F.max_pool2d(strokes, kernel_size=2 * OUTLINE + 1, stride=1, padding=OUTLINE)
    return torch.cat([strokes, wide], dim=1).to(torch.uint8), classes


@lru_cache(maxsize=1)  # image and annotation are read one after the other
def compose(is_train: bool, index: int) -> Scene:
    """The scene of this index."""
    digits, classes = stickers(is_train)
    random = np.random.default_rng(derive_seed(VERSION, is_train, index))
    image = np.zeros((SIDE, SIDE), dtype=np.uint8)
    for _ in range(random.integers(*STROKES, endpoint=True)):
        height, width = random.integers(*STROKE_SIDES, endpoint=True, size=2)
        top, left = random.integers(4, 24 - height), random.integers(4, 24 - width)
        strokes = digits[random.integers(len(digits)), 0].numpy()
        piece = strokes[top : top + height, left : left + width]
        row, column = random.integers(SIDE - height), random.integers(SIDE - width)
        place = image[row : row + height, column : column + width]
        np.maximum(place, piece * random.uniform(0.4, 1.0), out=place, casting="unsafe")
    owner = np.full((SIDE, SIDE), -1)  # which sticker a pixel belongs to
    labels: list[int] = []
    sizes: list[int] = []
    wanted = random.integers(*DIGITS, endpoint=True)
    for _ in range(4 * wanted):  # tries: one may cover too much of an earlier sticker
        if len(labels) == wanted:
            break
        chosen = random.integers(len(digits))
        side = int(random.integers(*DIGIT_SIDES, endpoint=True))
        row, column = random.integers(0, SIDE - side, size=2, endpoint=True)
        stroke, wide = resize(digits[chosen], (side, side), "bilinear").numpy()
        is_sticker = wide >= ON_STICKER
        part = np.s_[row : row + side, column : column + side]
        after = owner.copy()
        after[part][is_sticker] = len(labels)
        visible = np.bincount(after[after >= 0], minlength=len(labels) + 1)
        shade = random.integers(*SHADES, endpoint=True)
        if (visible[:-1] >= VISIBLE * np.array(sizes)).all():
            image[part] = np.where(is_sticker, np.maximum(stroke, shade), image[part])
            owner = after
            labels.append(int(classes[chosen]))
            sizes.append(int(visible[-1]))
    masks = owner == np.arange(len(labels))[:, None, None]
    return Scene(image, np.array(labels), masks)


class Scenes(ImageSource):
    """The scenes of one split, or of both after one another (all), without annotations."""

    def __init__(self, split: str, pixels: PixelFormat):
        self.split = split
        self.pixels = pixels

    def __len__(self) -> int:
        return NUM_SCENES.get(self.split) or sum(NUM_SCENES.values())

    def scene(self, index: int) -> Scene:
        """The scene of this index."""
        if self.split != "all":
            return compose(self.split == "train", index)
        return compose(index < NUM_SCENES["train"], index % NUM_SCENES["train"])

    def read(self, index: int) -> Tensor:
        found = values_of(self.scene(index).image[None], self.split, is_colour=True)
        return to_pixels(found, self.pixels)

    def name(self, index: int) -> str:
        return f"digits_scenes {self.split}[{index}]"

    def fingerprint(self) -> str:
        return f"digits_scenes {VERSION} {self.split}"


class SceneMasks(Scenes):
    """Scenes with the class of each pixel: 0 is the background, 1 to 10 are the digits 0 to 9."""

    class_names = ["background", *map(str, range(10))]

    def annotation(self, index: int, height: int, width: int) -> Annotation:
        scene = self.scene(index)
        mask = ((scene.labels + 1)[:, None, None] * scene.masks).sum(axis=0)
        return {"mask": torch.from_numpy(mask)}


class SceneObjects(Scenes):
    """Scenes with the boxes of their digits, by what is visible of them, and the masks if they are
    asked for."""

    class_names = [*map(str, range(10))]

    def __init__(self, split: str, pixels: PixelFormat, with_masks: bool = True):
        super().__init__(split, pixels)
        self.with_masks = with_masks

    def annotation(self, index: int, height: int, width: int) -> Annotation:
        from torchvision.ops import masks_to_boxes  # here, as importing it takes long

        scene = self.scene(index)
        masks = torch.from_numpy(scene.masks)
        # ends of boxes lie behind their last pixel
        boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
        labels = torch.from_numpy(scene.labels)
        found = {"boxes": boxes.float(), "labels": labels}
        return {**found, "masks": masks.to(torch.uint8)} if self.with_masks else found

    def ground_truth(self) -> dict[str, list[dict[str, object]]]:
        """All objects as COCO's JSON has them."""
        from pycocotools.mask import encode

        truth: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
        for index in range(len(self)):
            truth["images"].append({"id": index, "height": SIDE, "width": SIDE})
            found = self.annotation(index, SIDE, SIDE)
            masks = self.scene(index).masks
            for box, label, mask in zip(found["boxes"], found["labels"], masks, strict=True):
                left, top, right, bottom = box.tolist()
                truth["annotations"].append(
                    {
                        "id": len(truth["annotations"]) + 1,  # 0 would be taken for no match
                        "image_id": index,
                        "category_id": int(label),
                        "bbox": [left, top, right - left, bottom - top],
                        "area": int(mask.sum()),
                        "iscrowd": 0,
                        "segmentation": encode(np.asfortranarray(mask.astype(np.uint8))),
                    }
                )
        names = enumerate(self.class_names)
        return {**truth, "categories": [{"id": label, "name": name} for label, name in names]}
