"""Image and mask files: layouts, what the values of a mask become, and what is refused."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from data.annotated import IGNORED, AnnotatedData, AnnotatedDataset, open_annotated_data
from data.images import BadImageError
from data.joint import joint_transform
from data.sampler import SampleKey
from data.segmentation import read_mask
from util.errors import DataError, InputError
from util.settings.evaluation import FinetuneConfig

VALUES = np.array([[0, 1, 2], [255, 2, 0]], dtype=np.uint8)


def png(values: np.ndarray, palette: list[int] | None = None, **options) -> bytes:
    image = Image.fromarray(values)
    if palette is not None:
        image.putpalette(palette)
    file = BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def picture(height: int = 2, width: int = 3, orientation: int = 1) -> bytes:
    image, file = Image.new("RGB", (width, height), (9, 99, 200)), BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(file, "JPEG", exif=exif)
    return file.getvalue()


def settings(root: Path, **more) -> FinetuneConfig:
    return FinetuneConfig(
        **{"task": "segment", "data_path": str(root), "num_classes": 3, "img_size": 32, **more}
    )


def opened(root: Path, **more) -> AnnotatedData:
    return open_annotated_data(settings(root, **more))


LAYOUTS = {  # folders of the images and masks of training and validation
    "plain": ("images/train", "masks/train", "images/val", "masks/val"),
    "by split": ("train/images", "train/masks", "val/images", "val/masks"),
    "ade20k": (
        "images/training",
        "annotations/training",
        "images/validation",
        "annotations/validation",
    ),
    "voc": ("JPEGImages", "SegmentationClass", "JPEGImages", "SegmentationClass"),
}


def make(root: Path, layout: str = "plain") -> Path:
    """Two training images and one of validation, with VALUES and their flips as masks."""
    images, masks, val_images, val_masks = LAYOUTS[layout]
    for folder, masked, names in ((images, masks, "ab"), (val_images, val_masks, "c")):
        for name in names:
            write(root / folder / f"{name}.x.jpg", picture())
            values = VALUES if name == "a" else VALUES[:, ::-1].copy()
            write(root / masked / f"{name}.x.png", png(values))
    if layout == "voc":
        write(root / "ImageSets/Segmentation/train.txt", b"a.x\nb.x\n\n")
        write(root / "ImageSets/Segmentation/val.txt", b"c.x\r\n")
        write(root / "JPEGImages/not listed.jpg", picture())
    return root


@pytest.fixture
def root(tmp_path) -> Path:
    return make(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(tmp_path, layout):
    data = opened(make(tmp_path, layout))
    assert (len(data.train), len(data.val), data.class_names) == (2, 1, ["0", "1", "2"])
    wanted = torch.tensor([[0, 1, 2], [IGNORED, 2, 0]])
    for source, index, mask in (
        (data.train, 0, wanted),
        (data.train, 1, wanted.flip(1)),
        (data.val, 0, wanted.flip(1)),
    ):
        assert source.read(index).shape == (3, 2, 3)
        found = source.annotation(index, 2, 3)["mask"]
        assert torch.equal(found, mask) and found.dtype == torch.int64
    assert data.train.fingerprint() != data.val.fingerprint()


def test_values_of_every_kind_of_png():
    colours = [*range(30), *[200] * 738]  # a palette of colours
    assert read_mask(png(VALUES, colours), 2, 3).tolist() == VALUES.tolist()
    small = np.array([[0, 1, 2, 3], [3, 0, 1, 2]], dtype=np.uint8)
    for bits in (2, 4, 8):
        assert read_mask(png(small, colours[:48], bits=bits), 2, 4).tolist() == small.tolist()
    deep = np.array([[0, 300], [65535, 7]], dtype=np.uint16)
    assert read_mask(png(deep), 2, 2).tolist() == deep.tolist()
    assert read_mask(png(np.array([[True, False]])), 1, 2).tolist() == [[1, 0]]
    greys = [grey for grey in range(256) for _ in range(3)]  # each index shows itself
    assert read_mask(png(VALUES, greys), 2, 3).tolist() == VALUES.tolist()


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_of_few_bits_is_not_spread(bits):
    """A PNG made by hand, as Pillow writes none of these."""
    from struct import pack
    from zlib import compress, crc32

    def chunk(kind: bytes, content: bytes) -> bytes:
        return pack(">I", len(content)) + kind + content + pack(">I", crc32(kind + content))

    row = {2: bytes([0b00011011]), 4: bytes([0x01, 0x23])}[bits]  # 0 1 2 3
    header = pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0)
    encoded = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    encoded += chunk(b"IDAT", compress(b"\0" + row)) + chunk(b"IEND", b"")
    assert read_mask(encoded, 1, 4).tolist() == [[0, 1, 2, 3]]


def test_meaning_of_the_values(root):
    """As ADE20K's: 0 does not count, and 1 is the first class; and 16 bits beside 255."""
    found = opened(root, num_classes=2, zero_is_ignored=True).train.annotation(0, 2, 3)["mask"]
    assert found.tolist() == [[IGNORED, 0, 1], [IGNORED, 1, IGNORED]]
    other = opened(root, num_classes=256, ignore_index=0).train.annotation(0, 2, 3)["mask"]
    assert other.tolist() == [[IGNORED, 1, 2], [255, 2, IGNORED]]
    for many, is_ignored in ((256, False), (255, True)):  # 255 would be a class
        with pytest.raises(InputError) as raised:
            opened(root, num_classes=many, zero_is_ignored=is_ignored)
        assert raised.value.settings == ("ignore_index",)
    write(root / "masks/train/a.x.png", png(VALUES.astype(np.uint16) * 256))
    deep = opened(root, num_classes=60000, ignore_index=65280).train.annotation(0, 2, 3)["mask"]
    assert deep.tolist() == [[0, 256, 512], [IGNORED, 512, 0]]


def test_names_come_from_a_file(root):
    names = root / "names.txt"
    names.write_text("sky\n traffic light \nroad\n\n")
    found = opened(root, class_file=str(names), num_classes=None)
    assert found.class_names == ["sky", "traffic light", "road"]
    for text in ("a\n\nb\n", "a\nb\na", "\n"):
        names.write_text(text)
        with pytest.raises(InputError) as raised:
            opened(root, class_file=str(names), num_classes=None)
        assert raised.value.settings == ("class_file",)


BAD_MASKS = {  # what is written, and what the reason must name
    "size": (lambda: png(VALUES[:, :2].copy()), "2 x 2"),
    "turned": (lambda: png(VALUES.T.copy()), "EXIF"),
    "value": (lambda: png(np.array([[0, 1, 2], [1, 38, 75]], dtype=np.uint8)), "38 (row 1, col"),
    "colours": (lambda: png(np.zeros((2, 3, 3), dtype=np.uint8)), "RGB"),
    "jpeg": (picture, "JPEG"),
    "grey palette": (lambda: png(VALUES, [0] * 3 + [5] * 3 + [9] * 762), "index 1 shows grey 5"),
    "cut": (lambda: png(np.zeros((2, 3), dtype=np.uint8))[:43], "masks/train/a.x.png"),
    "empty": (lambda: b"", "empty"),
}


@pytest.mark.parametrize("kind", BAD_MASKS)
def test_a_bad_mask_is_named_and_replaced(root, kind):
    make_bad, named = BAD_MASKS[kind]
    write(root / "masks/train/a.x.png", make_bad())
    data = opened(root)
    with pytest.raises(BadImageError) as raised:
        data.train.annotation(0, 2, 3)
    text = str(raised.value)
    assert named in text and str(root / "masks/train/a.x.png") in text and "\n" not in text
    dataset = AnnotatedDataset(data.train, joint_transform(settings(root)), 0)
    sample = dataset[SampleKey(0, 0, 0, 0)]
    assert sample.bad[0] == (str(root / "images/train/a.x.jpg"), text)
    assert sample.image.shape == (3, 32, 32) and sample.target["mask"].shape == (32, 32)


def test_a_bad_mask_of_the_first_evaluated_image_is_refused(root):
    write(root / "masks/val/c.x.png", BAD_MASKS["value"][0]())
    with pytest.raises(DataError, match=r"c\.x\.png: it holds the value 38"):
        opened(root)


def test_a_turned_image_and_its_mask(root):
    """Six rows and four columns in the file, four and six after EXIF's turn."""
    write(root / "images/train/a.x.jpg", picture(4, 6, orientation=6))
    values = np.zeros((6, 4), dtype=np.uint8)
    write(root / "masks/train/a.x.png", png(values))
    source = opened(root).train
    assert source.read(0).shape == (3, 6, 4)
    assert source.annotation(0, 6, 4)["mask"].shape == (6, 4)
    write(root / "masks/train/a.x.png", png(values.T.copy()))
    with pytest.raises(BadImageError, match="EXIF"):
        source.annotation(0, 6, 4)


def test_what_a_listing_shows_is_refused(tmp_path):
    def refused(root: Path, *named: str, **more) -> None:
        with pytest.raises(InputError) as raised:
            opened(root, **more)
        text = f"{raised.value} {raised.value.settings}"
        assert all(name in text for name in named) and "\n" not in text, text

    root = make(tmp_path / "plain")
    refused(root, "num_classes", "class_file", num_classes=None)
    refused(root, "class_file", class_file=str(tmp_path / "none"))
    refused(tmp_path / "none", "data_path")
    (root / "masks/train/b.x.png").unlink()
    refused(root, "1 images", "b.x.png", str(root / "masks/train"))
    (root / "masks/train/a.x.png").rename(root / "masks/train/b.x.png")
    refused(root, "a.x.png")
    for name in "ab":
        (root / f"images/train/{name}.x.jpg").unlink()
    refused(root, "no images", str(root / "images/train"))
    (root / "images/train").rmdir()
    refused(root, "has no images/train", "SegmentationClass")
    voc = make(tmp_path / "voc", "voc")
    write(voc / "ImageSets/Segmentation/val.txt", b"c.x\nz\n")
    refused(voc, "val.txt", "'z'")
    (voc / "ImageSets/Segmentation/val.txt").unlink()
    refused(voc, "val.txt")
    with pytest.raises(DataError):
        opened(voc)


def test_photographs(photographs, tmp_path):
    """Each of eight photographs has its own brightness as mask; a crop keeps both together."""
    files = sorted(photographs.rglob("*.JPEG"))[:8]
    for number, file in enumerate(files):
        split = "train" if number < 6 else "val"
        write(tmp_path / f"images/{split}/{file.name}", file.read_bytes())
        with Image.open(file) as image:
            grey = (np.asarray(image.convert("L")) > 127).astype(np.uint8)
        write(tmp_path / f"masks/{split}/{file.stem}.png", png(grey))
    cfg = settings(tmp_path, num_classes=2, img_size=96, in_chans=1, mean=0.5, std=0.5)
    data = open_annotated_data(cfg)
    dataset = AnnotatedDataset(data.train, joint_transform(cfg), 0)
    for index in range(6):
        image, target, _, bad = dataset[SampleKey(index, 0, index, 0)]
        is_inside = target["mask"] != IGNORED
        agree = ((image[0] > 127) == (target["mask"] == 1))[is_inside].float().mean()
        assert agree > 0.85 and image.shape == (1, 96, 96) and not bad
