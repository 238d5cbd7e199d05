"""Detection from files: images, and for each split a JSON file of their objects in COCO's format.

A file of 860,000 objects would be millions of Python objects in each loader process. Here it is a
few arrays, and one string of bytes in which each object's segmentation stays JSON until its image
is read.

Source: the format is described at https://cocodataset.org/#format-data (boxes are left, top, width
and height; run lengths count down the columns, zeros first).

Shapes: `n` images, `m` objects, `H` and `W` height and width of an image.
"""

import hashlib
import json
import logging
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NotRequired

import numpy as np
import torch
from annotated_types import MinLen
from pydantic import ConfigDict, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from torch import Tensor
from typing_extensions import TypedDict  # of pydantic, which needs it for Python 3.11

from data.annotated import SourceAnnotation
from data.arrays import MAX_PIXELS
from data.pixels import BadImageError, PixelFormat
from data.sources import SHOWN, FolderSource, check_folder, image_names
from util.errors import DataError, InputError
from util.settings.dense import DenseDataConfig

FARTHEST = 2  # a polygon's corner lies within so many sides of its image, else it is broken
logger = logging.getLogger(__name__)


class Image(TypedDict):
    """An image of a file; other keys are passed over here and below."""

    id: int
    file_name: str
    height: PositiveInt
    width: PositiveInt


class Object(TypedDict):
    """An object of a file. bbox: left, top, width and height."""

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)  # type: ignore[misc]
    id: NotRequired[int]
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: NotRequired[float | None]
    iscrowd: NotRequired[int | None]
    segmentation: NotRequired[bytes]  # JSON, which is read with its image


class Category(TypedDict):
    """A category of a file."""

    id: int
    name: str


class Content(TypedDict):
    """What a file holds."""

    images: Annotated[list[Image], MinLen(1)]
    annotations: Annotated[list[Object], MinLen(1)]
    categories: list[Category]


class Runs(TypedDict):
    """Run lengths down the columns, of zeros first; or COCO's text of them."""

    size: tuple[int, int]
    counts: str | list[NonNegativeInt]


SEGMENTATION: TypeAdapter[Any] = TypeAdapter(Runs | list[list[float]] | None)


def _with_json(record: dict[str, Any]) -> dict[str, Any]:
    """An object of JSON, its segmentation as JSON again: the numbers of all would be gigabytes."""
    if "segmentation" in record:
        text = json.dumps(record["segmentation"] or None, separators=(",", ":"))
        record["segmentation"] = text.encode()
    return record


class CocoFile:
    """The content of one file.

    heights, widths: `(n,)` int64. file_names: of the images. rows: `(n + 1,)` where the objects of
        each image begin, which lie together.
    boxes: `(m, 4)` float64, left, top, width and height. labels: `(m,)` int64, the place of the
        category among all by their ids. areas: `(m,)` float64; without one in the file, the box's.
        is_crowd: `(m,)` bool.
    segmentations: JSON, of which `ends` `(m + 1,)` says where each object's begins.
    categories: ids and names, by id. digest: of the file.

    Raises: DataError if it is no such file, or is at odds with itself.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            content = path.read_bytes()
            found = TypeAdapter(Content).validate_python(
                json.loads(content, object_hook=_with_json)
            )
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "it"
            is_whole = first["type"] == "missing" and len(first["loc"]) == 1  # of all the file
            got = "" if is_whole else f", got {reprlib.repr(first['input'])}"
            raise DataError(
                f"{path} is no file of COCO's format: {place}: {first['msg']}{got}"
            ) from error
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{path} is no JSON file: {error}") from error
        self.digest = hashlib.sha256(content).hexdigest()
        images, objects = found["images"], found["annotations"]
        self.categories = sorted((one["id"], one["name"]) for one in found["categories"])
        self.file_names = np.array([image["file_name"] for image in images])
        self.heights = np.array([image["height"] for image in images])
        self.widths = np.array([image["width"] for image in images])
        if (self.heights.astype(float) * self.widths > MAX_PIXELS).any():
            raise DataError(f"{path} has images of more than {MAX_PIXELS:,} pixels")

        of_image = self._places("image", [image["id"] for image in images], objects)
        order = np.argsort(of_image, kind="stable")
        self.rows = np.searchsorted(of_image[order], np.arange(len(images) + 1))
        objects = [objects[place] for place in order]
        self.labels = self._places("category", [number for number, _ in self.categories], objects)
        self.boxes = np.array([one["bbox"] for one in objects])
        of_boxes = (self.boxes[:, 2] * self.boxes[:, 3]).tolist()
        areas = [one.get("area") for one in objects]
        self.areas = np.array(
            [of_box if area is None else area for area, of_box in zip(areas, of_boxes, strict=True)]
        )
        self.is_crowd = np.array([bool(one.get("iscrowd")) for one in objects])
        texts = [one.get("segmentation", b"null") for one in objects]
        self.ends = np.cumsum([0, *map(len, texts)])
        self.segmentations = b"".join(texts)

    def segmentation(self, row: int) -> bytes:
        """What the file says of an object's pixels, as JSON; `null` if nothing."""
        return self.segmentations[self.ends[row] : self.ends[row + 1]]

    def has_segmentation(self) -> np.ndarray:
        """Of each object `(m,)` bool whether the file says something of its pixels."""
        return np.diff(self.ends) > len("null")

    def _places(self, kind: str, ids: list[int], objects: list[Object]) -> np.ndarray:
        """Of each object the place in `ids` of its image or category. Raises: DataError if two have
        one id, or an object names none of them."""
        places = {number: place for place, number in enumerate(ids)}
        if len(places) < len(ids):
            twice = [number for place, number in enumerate(ids) if places[number] != place]
            raise DataError(f"{self.path}: more than one {kind} has an id of {twice[:SHOWN]}")
        key = f"{kind}_id"
        named = [one[key] for one in objects]  # type: ignore[literal-required]
        if unknown := [number for number in named if number not in places]:
            raise DataError(
                f"{self.path}: {len(unknown)} annotations have a {key} that the file does not "
                f"explain: {sorted({*unknown})[:SHOWN]}"
            )
        return np.array([places[number] for number in named])


class RunLengths:
    """Masks `(H, W)` uint8 by their number, each made of its run lengths when it is asked for."""

    def __init__(self, masks: list[dict[str, Any]]):
        self.masks = masks

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, number: int) -> Tensor:
        from pycocotools.mask import decode  # here, as few runs need it

        return torch.from_numpy(np.ascontiguousarray(decode(self.masks[number])))


def run_lengths(segmentation: bytes, height: int, width: int) -> dict[str, Any]:
    """The pixels of an object as COCO's compressed run lengths, `size` and `counts`.

    Args:
        segmentation: JSON as the format has it: a list of polygons, run lengths, compressed or not,
            or null, which is no pixel.

    Raises: BadImageError for anything else. pycocotools would read and write beyond its memory.
    """
    from pycocotools import mask as coco_mask

    size = (height, width)
    try:
        found = SEGMENTATION.validate_json(segmentation)
    except ValidationError as error:
        first = error.errors(include_url=False)[-1]
        raise BadImageError(f"has an object with a broken segmentation: {first['msg']}") from error
    if isinstance(found, dict):
        counts = found["counts"]
        counts = _decompressed(counts) if isinstance(counts, str) else counts
        if found["size"] != size or sum(counts) != height * width or min(counts) < 0:
            raise BadImageError(
                "has an object with broken run lengths: they must make "
                f"{height} x {width} pixels, and say {found['size']} and make {max(sum(counts), 0)}"
            )
        return dict(coco_mask.frPyObjects({"size": size, "counts": counts}, height, width))
    polygons = found or []
    farthest = FARTHEST * max(size)
    if any(len(p) % 2 or not all(abs(value) <= farthest for value in p) for p in polygons):
        raise BadImageError(
            "has an object with a broken polygon: it must be pairs of x and y, not far outside of "
            "the image"
        )
    areas = [polygon for polygon in polygons if len(polygon) >= 6]  # others have no area
    if not areas:
        empty = {"size": size, "counts": [height * width]}
        return dict(coco_mask.frPyObjects(empty, height, width))
    return dict(coco_mask.merge(coco_mask.frPyObjects(areas, height, width)))


def _decompressed(text: str) -> list[int]:
    """Run lengths from COCO's text: numbers of 5 bits a character, low ones first; from the fourth
    on the difference to the last but one. A broken text gives a negative one."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 40:
            return [-1]
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << shift - 4  # the sign
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    return [-1] if shift else counts


class CocoImages(FolderSource):
    """The images of one split with their objects. Crowds are not trained on.

    Args:
        root: the folder of the images.
        with_masks: whether objects have masks; then those without pixels are left out.
    """

    def __init__(self, root: Path, coco: CocoFile, pixels: PixelFormat, with_masks: bool):
        super().__init__(root, pixels, prefer_train=False, names=coco.file_names.tolist())
        self.coco = coco
        self.with_masks = with_masks
        self.class_names = [name for _, name in coco.categories]
        sides = np.stack([coco.widths, coco.heights] * 2, axis=1)  # (n, 4)
        edges = np.concatenate([coco.boxes[:, :2], coco.boxes[:, :2] + coco.boxes[:, 2:]], axis=1)
        counts = np.diff(coco.rows)
        self.edges = edges.clip(0, np.repeat(sides, counts, axis=0))  # (m, 4)
        # without crowds and boxes that have no area
        self.is_shown = (self.edges[:, 2:] > self.edges[:, :2]).all(axis=1) & ~coco.is_crowd
        if with_masks:
            has_pixels = coco.has_segmentation()
            if not has_pixels[self.is_shown].any():
                raise DataError(
                    f"{coco.path}: no object has a segmentation: give --instance_masks false to "
                    "learn boxes alone"
                )
            self.is_shown &= has_pixels

    def annotation(self, index: int, height: int, width: int) -> SourceAnnotation:
        size = self._size(index)
        if size != (height, width):
            turned = size == (width, height)
            raise BadImageError(
                f"is {width} x {height} pixels, and {self.coco.path} says {size[1]} x {size[0]}"
                + ": its EXIF orientation turns it, which the file must take into account" * turned
            )
        rows = self._rows(index)
        rows = rows[self.is_shown[rows]]
        found: SourceAnnotation = {
            "boxes": torch.from_numpy(self.edges[rows]).float(),
            "labels": torch.from_numpy(self.coco.labels[rows]),
        }
        if self.with_masks:
            found["masks"] = RunLengths([*self._masks(index, rows)])
        return found

    def _size(self, index: int) -> tuple[int, int]:
        return int(self.coco.heights[index]), int(self.coco.widths[index])

    def _rows(self, index: int) -> np.ndarray:
        return np.arange(*self.coco.rows[index : index + 2])

    def _masks(self, index: int, rows: np.ndarray) -> Iterable[dict[str, Any]]:
        for row in rows.tolist():
            try:
                yield run_lengths(self.coco.segmentation(row), *self._size(index))
            except BadImageError as error:
                raise BadImageError(f"{error} ({self.coco.path})") from error

    def ground_truth(self) -> dict[str, list[dict[str, object]]]:
        """All objects, as `DetectionSource` says; also those without area, as the file has them.

        Raises: DataError if the pixels of one are broken.
        """
        coco = self.coco
        images: list[dict[str, object]] = []
        objects: list[dict[str, object]] = []
        for index in range(len(self)):
            height, width = self._size(index)
            images.append({"id": index, "height": height, "width": width})
            rows = self._rows(index)
            try:
                masks = [*self._masks(index, rows)] if self.with_masks else []
            except BadImageError as error:
                raise DataError(f"{self.name(index)} {error}") from error
            for place, row in enumerate(rows.tolist()):
                one = {
                    "id": len(objects) + 1,  # 0 would be taken for no match
                    "image_id": index,
                    "category_id": int(coco.labels[row]),
                    "bbox": coco.boxes[row].tolist(),
                    "area": float(coco.areas[row]),
                    "iscrowd": int(coco.is_crowd[row]),
                }
                objects.append({**one, "segmentation": masks[place]} if masks else one)
        names = enumerate(self.class_names)
        categories: list[dict[str, object]] = [{"id": label, "name": name} for label, name in names]
        return {"images": images, "annotations": objects, "categories": categories}

    def fingerprint(self) -> str:
        return self.coco.digest


def open_coco(
    cfg: DenseDataConfig, pixels: PixelFormat, with_masks: bool
) -> tuple[CocoImages, CocoImages]:
    """The training and validation images of `cfg.data_path`.

    Raises: InputError if a file or an image is missing or wrong, or the categories differ.
    """
    root = check_folder(cfg.data_path)
    train, val = (
        CocoFile(find_json(root, given, split))
        for split, given in (("train", cfg.train_json), ("val", cfg.val_json))
    )
    if train.categories != val.categories:
        ours, theirs = set(train.categories), set(val.categories)
        raise DataError(
            f"{train.path} and {val.path} must have the same categories: only the first has "
            f"{sorted(ours - theirs)[:SHOWN]}, only the second {sorted(theirs - ours)[:SHOWN]}"
        )
    opened = [
        CocoImages(find_images(root, coco, split), coco, pixels, with_masks)
        for split, coco in (("train", train), ("val", val))
    ]
    if left_out := int((~opened[0].is_shown & ~train.is_crowd).sum()):
        logger.warning(
            "%s: %d of %d objects are not trained on: their boxes have no area or lie outside of "
            "the image%s",
            train.path,
            left_out,
            len(train.labels),
            ", or they have no segmentation" * with_masks,
        )
    return opened[0], opened[1]


def find_json(root: Path, given: str | None, split: str) -> Path:
    """The file of a split: the one that is given, or the only one of COCO's name."""
    if given is not None:
        return Path(given)
    found = sorted(root.glob(f"annotations/instances_{split}*.json"))
    if len(found) != 1:
        raise DataError(
            f"data_path {root} has {len(found)} files annotations/instances_{split}*.json and "
            f"needs one: name the file by --{split}_json"
        )
    return found[0]


def find_images(root: Path, coco: CocoFile, split: str) -> Path:
    """The folder in which the file's images lie. Raises: DataError if one of them is missing."""
    suffix = coco.path.stem.removeprefix("instances_")
    folders = [root / suffix, root / "images" / suffix, root / split, root / "images" / split, root]
    names: list[str] = coco.file_names.tolist()
    folder = next((f for f in folders if (f / names[0]).is_file()), None)
    if folder is None:
        tried = ", ".join(str(f) for f in dict.fromkeys(folders))
        raise DataError(f"{coco.path} names {names[0]}, which is in none of {tried}")
    if missing := sorted({*names} - {*image_names(folder)}):
        raise DataError(
            f"{coco.path} names {len(missing)} images that are not in {folder}: {missing[:SHOWN]}"
        )
    return folder
