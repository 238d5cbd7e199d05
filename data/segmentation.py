"""Segmentation from files: images, and for each a PNG of the same name whose values are the classes
of its pixels.

Layouts are those of LAYOUTS and of Pascal VOC (Everingham et al., 2010), found by their folders.

Shapes: `H` height, `W` width.
"""

import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePath

import numpy as np
import torch
from PIL import Image

from data.annotated import IGNORED, SourceAnnotation
from data.images import open_image
from data.pixels import BadImageError, PixelFormat
from data.sources import SHOWN, FolderSource, check_folder, image_names, say_once
from util.errors import DataError, InputError
from util.settings.dense import DenseDataConfig

# Folders of images and masks, of training and validation; the third is ADE20K's.
LAYOUTS = (
    (("images/train", "masks/train"), ("images/val", "masks/val")),
    (("train/images", "train/masks"), ("val/images", "val/masks")),
    (("images/training", "annotations/training"), ("images/validation", "annotations/validation")),
)
VOC = ("JPEGImages", "SegmentationClass")  # of both splits, which lists of names tell apart
VOC_LISTS = "ImageSets/Segmentation"
NUM_VALUES = 2**16  # that a mask of 16 bits may hold
OUTSIDE = -1
GREY = 0  # a colour type of PNG


@dataclass(frozen=True)
class MaskValues:
    """What the values of masks mean: 0 and on, or with `zero_is_ignored` 1 and on, are the classes;
    `ignore_index` is none."""

    num_classes: int
    ignore_index: int
    zero_is_ignored: bool

    def table(self) -> np.ndarray:
        """The class, IGNORED or OUTSIDE of each value, `(NUM_VALUES,)` int64."""
        table = np.full(NUM_VALUES, OUTSIDE)
        first = int(self.zero_is_ignored)
        table[:first] = IGNORED
        table[first : first + self.num_classes] = range(self.num_classes)
        table[self.ignore_index : self.ignore_index + 1] = IGNORED
        return table

    def __str__(self) -> str:
        first = int(self.zero_is_ignored)
        ignored = f"0 and {self.ignore_index} are" if first else f"{self.ignore_index} is"
        return f"{first} to {first + self.num_classes - 1} are classes, and {ignored} ignored"


class MaskFolder(FolderSource):
    """The images of one split with the classes of their pixels.

    Args:
        images, masks: their folders.
        names: of the images below theirs; a mask has the image's name and ends in .png.
        class_names: in the order of the values.
    """

    def __init__(
        self,
        images: Path,
        masks: Path,
        *,
        names: list[str],
        class_names: list[str],
        values: MaskValues,
        pixels: PixelFormat,
    ):
        super().__init__(images, pixels, prefer_train=False, names=names)
        self.masks = masks
        self.class_names = class_names
        self.values = values
        self.table = values.table()

    def annotation(self, index: int, height: int, width: int) -> SourceAnnotation:
        path = self.masks / mask_name(os.fsdecode(self.names[index].item()))
        try:
            found = read_mask(path.read_bytes(), height, width)
            classes = self.table[found]  # (H, W) int64
            if (wrong := np.argwhere(classes == OUTSIDE)).size:
                row, column = wrong[0]
                raise BadImageError(
                    f"it holds the value {found[row, column]} (row {row}, column {column}), but "
                    f"{self.values}: correct num_classes, class_file, ignore_index or "
                    "zero_is_ignored, or write the numbers of classes into it, not colours or "
                    "their greys"
                )
        except OSError as error:
            raise BadImageError(f"has no readable mask {path}: {error.strerror}") from error
        except BadImageError as error:
            raise BadImageError(f"has a mask that cannot be used, {path}: {error}") from error
        return {"mask": torch.from_numpy(classes)}


def mask_name(image_name: str) -> str:
    """The name of an image's mask."""
    return str(PurePath(image_name).with_suffix(".png"))


def read_mask(encoded: bytes, height: int, width: int) -> np.ndarray:
    """The values `(H, W)` of a mask of an image of this size; of a palette the indexes.

    Raises: BadImageError for another size, and for a file that holds no numbers of classes.
    """
    with open_image(BytesIO(encoded)) as image:
        if image.format != "PNG":
            raise BadImageError(f"it is a {image.format} file, and a mask must be a PNG")
        if image.size != (width, height):
            turned = image.size == (height, width)
            raise BadImageError(
                f"it is {image.width} x {image.height} pixels, and the image {width} x {height}"
                + ", which its EXIF orientation may have turned: turn the mask, too" * turned
            )
        if image.mode not in ("1", "L", "P", "I", "I;16"):
            raise BadImageError(
                f"it holds colours ({image.mode}), and a mask must hold one number of a class for "
                "each pixel: write those as 8-bit or 16-bit grey"
            )
        values = np.asarray(image)
        if image.mode == "P":
            _check_palette(image, np.unique(values))
        depth, colour_type = encoded[24:26]
        if colour_type == GREY and depth in (2, 4):
            values = values // (255 // (2**depth - 1))  # Pillow spreads them over 8 bits
        return values.astype(np.uint16)


def _check_palette(image: Image.Image, used: np.ndarray) -> None:
    """Raises: BadImageError if the palette has greys only, and others than the indexes: programs
    that make files smaller turn grey images into such, and then the greys are meant."""
    colours = np.array(image.getpalette("RGB")).reshape(-1, 3)
    shown = colours[np.minimum(used, len(colours) - 1), 0]
    if (colours == colours[:, :1]).all() and (shown != used).any():
        at = (shown != used).argmax()
        raise BadImageError(
            f"its palette has greys only, and index {used[at]} shows grey {shown[at]}, so that "
            "either may be the class: write the numbers of classes as 8-bit grey"
        )


def open_mask_folder(
    cfg: DenseDataConfig, num_classes: int | None, pixels: PixelFormat
) -> tuple[MaskFolder, MaskFolder]:
    """The training and validation images of `cfg.data_path`.

    Raises: InputError if no layout is there, a split has no image, an image has no mask, or nothing
        says what the classes are.
    """
    root = check_folder(cfg.data_path)
    class_names = read_class_names(cfg.class_file, num_classes)
    values = MaskValues(len(class_names), cfg.ignore_index, cfg.zero_is_ignored)
    if 0 < cfg.ignore_index < cfg.zero_is_ignored + values.num_classes:
        raise InputError(
            f"ignore_index {cfg.ignore_index} would leave a class out, but {values}: give one that "
            "is none of them",
            settings=("ignore_index",),
        )

    def opened(images: Path, masks: Path, listed: Path | None = None) -> MaskFolder:
        names = image_names(images) if listed is None else _listed_names(listed, images)
        if not names:
            raise DataError(f"no images under {listed or images}")
        there = set(image_names(masks))
        wanted = {mask_name(name) for name in names}
        if missing := sorted(wanted - there):
            raise DataError(
                f"{len(missing)} images in {images} have no mask in {masks} (which has its image's "
                f"name and ends in .png): {missing[:SHOWN]} must be added, or their images removed"
            )
        if listed is None and there - wanted:
            say_once(f"{masks}: passed over {len(there - wanted)} masks without an image")
        return MaskFolder(
            images, masks, names=names, class_names=class_names, values=values, pixels=pixels
        )

    if all((root / folder).is_dir() for folder in (*VOC, VOC_LISTS)):
        images, masks = (root / folder for folder in VOC)
        lists = [root / VOC_LISTS / f"{split}.txt" for split in ("train", "val")]
        return opened(images, masks, lists[0]), opened(images, masks, lists[1])
    absent = [
        [folder for split in layout for folder in split if not (root / folder).is_dir()]
        for layout in LAYOUTS
    ]
    nearest = min(absent, key=len)
    if nearest:
        known = "; ".join(" ".join((*train, *val)) for train, val in LAYOUTS)
        raise DataError(
            f"data_path {root} has no {', '.join(nearest)}: task segment reads one of these sets "
            f"of folders: {known}; or Pascal VOC's {' '.join((*VOC, VOC_LISTS))}"
        )
    train, val = LAYOUTS[absent.index(nearest)]
    return (opened(root / train[0], root / train[1]), opened(root / val[0], root / val[1]))


def read_class_names(class_file: str | None, num_classes: int | None) -> list[str]:
    """The names in the file, or numbers. Raises: InputError."""
    if class_file is None:
        if num_classes is None:
            raise InputError(
                "masks do not say how many classes there are: give --num_classes N, or "
                "--class_file FILE with a name per line",
                settings=("num_classes", "class_file"),
            )
        return [str(label) for label in range(num_classes)]
    try:
        names = [*map(str.strip, Path(class_file).read_text("utf-8").rstrip().splitlines())]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"class_file {class_file} cannot be read: {error}", settings=("class_file",)
        ) from error
    if not names or not all(names) or len(set(names)) < len(names):
        number = next((n for n, name in enumerate(names) if not name or name in names[:n]), 0)
        raise InputError(
            f"class_file {class_file} must have another name in each line: line {number + 1} is "
            f"{names[number : number + 1]}",
            settings=("class_file",),
        )
    return names


def _listed_names(listed: Path, images: Path) -> list[str]:
    """The images whose names, without their endings, are the lines of a file. Raises: DataError if
    one is not there."""
    try:
        names = map(str.strip, listed.read_text("utf-8").splitlines())
        lines = [*filter(None, dict.fromkeys(names))]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{listed} cannot be read: {error}") from error
    by_stem = {str(PurePath(name).with_suffix("")): name for name in image_names(images)}
    if missing := [line for line in lines if line not in by_stem]:
        raise DataError(
            f"{listed} names {len(missing)} images that are not in {images}: {missing[:SHOWN]}"
        )
    return [by_stem[line] for line in lines]
