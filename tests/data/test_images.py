"""Decoding: every kind of file that a folder of images may hold, and every way in which one may be
broken."""

import random
import re
import resource
import struct
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from packs import saved as encoded
from PIL import EpsImagePlugin, Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo
from pydicom.data import get_testdata_file

from data import arrays
from data.images import USE_TORCHCODEC, BadImageError, PixelFormat, decode_image
from data.pixels import to_channels
from data.sources import FolderSource
from data.transforms import CropAndFlip

HEIGHT, WIDTH = 48, 64
ROWS, COLUMNS = np.mgrid[0:HEIGHT, 0:WIDTH]
# Smooth, so that JPEG keeps it, and with no symmetry, so that every orientation shows.
COLOURS = np.stack([COLUMNS * 4, ROWS * 5, 255 - 2 * COLUMNS - ROWS], axis=-1).astype(
    np.uint8
)  # (H, W, 3)
RAMP16 = np.linspace(0, 65535, HEIGHT * WIDTH).round().astype(np.uint16).reshape(HEIGHT, WIDTH)
RGB = Image.fromarray(COLOURS)
GREY = RGB.convert("L")
ALPHA = Image.fromarray((COLUMNS * 4).astype(np.uint8))  # from transparent to opaque
PALETTE = RGB.quantize(64)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8))
JPEG_ERROR = 6  # largest difference that compression makes on RGB at quality 98


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA" if image.mode == "RGB" else "LA")
    image.putalpha(ALPHA)
    return image


def animated(kind: str, **options) -> bytes:
    return encoded(RGB, kind, save_all=True, append_images=[ImageOps.invert(RGB)], **options)


def chunk(name: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    check = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)


def png(
    width: int, height: int, depth: int, colour_type: int, rows: bytes, extra: bytes = b""
) -> bytes:
    """A PNG by hand: Pillow writes neither 16-bit colours nor headers that lie. Each row starts
    with a filter byte; `extra` are chunks before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = [
        chunk(b"IHDR", header),
        extra,
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png16(pixels: np.ndarray, colour_type: int) -> bytes:
    """`(H, W, C)` uint16 as a PNG."""
    height, width = pixels.shape[:2]
    return png(
        width,
        height,
        16,
        colour_type,
        b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels),
    )


def inks() -> np.ndarray:
    """RGB separated into cyan, magenta, yellow and a black that is not empty, `(H, W, 4)`."""
    black = 255 - COLOURS.max(axis=-1, keepdims=True).astype(float)
    colours = (255 - black - COLOURS) / np.maximum(255 - black, 1) * 255
    return np.concatenate([colours, black], axis=-1).round().astype(np.uint8)


def cmyk_jpeg() -> bytes:
    """As Photoshop writes it: inks stored inverted, and an Adobe marker with transform 0."""
    return encoded(Image.fromarray(inks(), "CMYK"), "JPEG", quality=98)


def cmyk_jpeg_without_marker() -> bytes:
    """Inverted all the same, as every common reader takes it."""
    content = cmyk_jpeg()
    start = content.index(b"Adobe") - 4
    return content[:start] + content[start + 16 :]  # 2 bytes of marker, 14 of content


def ycck_jpeg() -> bytes:
    """The inverted inks as luma and chroma of their complement, beside the black; the Adobe marker
    says transform 2."""
    ycc = np.asarray(Image.fromarray(inks()[..., :3]).convert("YCbCr"))
    stored = np.concatenate(
        [255 - ycc, inks()[..., 3:]], axis=-1
    )  # Pillow inverts all four when it writes
    content = bytearray(encoded(Image.fromarray(stored, "CMYK"), "JPEG", quality=98))
    content[content.index(b"Adobe") + 11] = 2
    return bytes(content)


def one_frame_webp() -> bytes:
    """An animation of a single frame."""
    content = animated("WEBP", lossless=True)
    start = content.index(b"ANMF")
    content = content[: start + 8 + struct.unpack_from("<I", content, start + 4)[0]]
    return b"RIFF" + struct.pack("<I", len(content) - 8) + content[8:]


COLOURS16 = np.stack([RAMP16, RAMP16[::-1], RAMP16[:, ::-1]], axis=-1)
GREY16 = Image.fromarray((RAMP16 >> 8).astype(np.uint8))
# file, what it shows, tolerance
KINDS: dict[str, tuple[Callable[[], bytes], Image.Image, int]] = {
    "jpeg": (lambda: encoded(RGB, "JPEG", quality=98), RGB, JPEG_ERROR),
    "jpeg progressive": (
        lambda: encoded(RGB, "JPEG", quality=98, progressive=True),
        RGB,
        JPEG_ERROR,
    ),
    "jpeg L": (lambda: encoded(GREY, "JPEG", quality=98), GREY, 2),
    "jpeg stored as RGB": (lambda: encoded(RGB, "JPEG", quality=98, keep_rgb=True), RGB, 2),
    "jpeg CMYK": (cmyk_jpeg, RGB, 4),
    "jpeg CMYK without a marker": (cmyk_jpeg_without_marker, RGB, 4),
    "jpeg YCCK": (ycck_jpeg, RGB, JPEG_ERROR),
    "jpeg of two pictures": (lambda: animated("MPO", quality=98), RGB, JPEG_ERROR),
    "png": (lambda: encoded(RGB, "PNG"), RGB, 0),
    "png L": (lambda: encoded(GREY, "PNG"), GREY, 0),
    "png LA": (lambda: encoded(with_alpha(GREY), "PNG"), GREY, 0),
    "png RGBA": (lambda: encoded(with_alpha(RGB), "PNG"), RGB, 0),
    "png P": (lambda: encoded(PALETTE, "PNG"), PALETTE, 0),
    "png P, one colour transparent": (lambda: encoded(PALETTE, "PNG", transparency=7), PALETTE, 0),
    "png P, a transparency each": (
        lambda: encoded(PALETTE, "PNG", transparency=bytes(range(64))),
        PALETTE,
        0,
    ),
    "png 1-bit": (lambda: encoded(RGB.convert("1"), "PNG"), RGB.convert("1"), 0),
    "png 16-bit L": (lambda: encoded(Image.fromarray(RAMP16), "PNG"), GREY16, 1),
    "png 16-bit LA": (lambda: png16(np.stack([RAMP16, RAMP16[::-1]], axis=-1), 4), GREY16, 1),
    "png 16-bit RGB": (
        lambda: png16(COLOURS16, 2),
        Image.fromarray((COLOURS16 >> 8).astype(np.uint8)),
        1,
    ),
    "png animated": (lambda: animated("PNG"), RGB, 0),
    "webp": (lambda: encoded(RGB, "WEBP", quality=98), RGB, 8),
    "webp lossless": (lambda: encoded(RGB, "WEBP", lossless=True), RGB, 0),
    "webp RGBA": (lambda: encoded(with_alpha(RGB), "WEBP", lossless=True, exact=True), RGB, 0),
    "webp animated": (lambda: animated("WEBP", lossless=True), RGB, 0),
    "webp of one frame": (one_frame_webp, RGB, 0),
    "gif": (lambda: encoded(PALETTE, "GIF"), PALETTE, 0),
    "gif, one colour transparent": (lambda: encoded(PALETTE, "GIF", transparency=7), PALETTE, 0),
    "gif animated": (
        lambda: encoded(PALETTE, "GIF", save_all=True, append_images=[GREY]),
        PALETTE,
        0,
    ),
    "bmp": (lambda: encoded(RGB, "BMP"), RGB, 0),
    "bmp P": (lambda: encoded(PALETTE, "BMP"), PALETTE, 0),
    "ppm": (lambda: encoded(RGB, "PPM"), RGB, 0),
    "pgm 16-bit": (
        lambda: b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + RAMP16.astype(">u2").tobytes(),
        GREY16,
        1,
    ),
    "tiff": (lambda: encoded(RGB, "TIFF"), RGB, 0),
    "tiff LZW": (lambda: encoded(RGB, "TIFF", compression="tiff_lzw"), RGB, 0),
    "tiff L": (lambda: encoded(GREY, "TIFF"), GREY, 0),
    "tiff LA": (lambda: encoded(with_alpha(GREY), "TIFF"), GREY, 0),
    "tiff RGBA": (lambda: encoded(with_alpha(RGB), "TIFF"), RGB, 0),
    "tiff CMYK": (lambda: encoded(Image.fromarray(inks(), "CMYK"), "TIFF"), RGB, 2),
    "tiff P": (lambda: encoded(PALETTE, "TIFF"), PALETTE, 0),
    "tiff 1-bit": (lambda: encoded(RGB.convert("1"), "TIFF"), RGB.convert("1"), 0),
    "tiff 16-bit L": (lambda: encoded(Image.fromarray(RAMP16), "TIFF"), GREY16, 1),
    "tiff 16-bit L, big-endian": (
        lambda: encoded(Image.fromarray(RAMP16.astype(">u2")), "TIFF"),
        GREY16,
        1,
    ),
}


# Of PNG with 16 bits, Pillow alone reads grey without alpha in full
PILLOW_CUTS = set() if USE_TORCHCODEC else {"png 16-bit LA", "png 16-bit RGB"}
DEEP = {kind for kind in KINDS if "16-bit" in kind} - PILLOW_CUTS


def shown(image: Image.Image, in_chans: int) -> np.ndarray:
    """What Pillow makes of an image: `(C, H, W)`, int."""
    pixels = np.asarray(image.convert("RGB" if in_chans == 3 else "L")).astype(int)
    return pixels.reshape(image.height, image.width, in_chans).transpose(2, 0, 1)


def largest_difference(decoded: torch.Tensor, expected: np.ndarray, deep: bool = False) -> float:
    assert decoded.dtype == (torch.float32 if deep else torch.uint8)
    assert tuple(decoded.shape) == expected.shape
    return float(np.abs(decoded.numpy().astype(float) - expected).max())


def refusal(content: bytes, in_chans: int = 3) -> str:
    """The reason, which goes to a log and to bad_samples.jsonl: one line, no memory address, no
    source line of somebody's build machine."""
    with pytest.raises(BadImageError) as error:
        decode_image(content, PixelFormat(in_chans))
    assert not re.search(r"\n| at 0x|\.cpp", str(error.value))
    return str(error.value)


@pytest.mark.parametrize("in_chans", [3, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_shows_its_picture(kind, in_chans):
    content, picture, tolerance = KINDS[kind]
    decoded = decode_image(content(), PixelFormat(in_chans))
    grey_rounding = (
        2 if in_chans == 1 else 0
    )  # weights in fixed point, before or after the colours are rounded
    difference = largest_difference(decoded, shown(picture, in_chans), kind in DEEP)
    assert difference <= tolerance + grey_rounding


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("kind", sorted(DEEP - {"png 16-bit RGB"}))
def test_16_bit_grey_keeps_its_depth(kind, in_chans):
    decoded = decode_image(KINDS[kind][0](), PixelFormat(in_chans))
    assert np.allclose(decoded.numpy(), RAMP16 / 257, rtol=1e-6, atol=0)
    assert decoded.shape == (in_chans, HEIGHT, WIDTH)


@pytest.mark.skipif(not USE_TORCHCODEC, reason="Pillow reads the upper 8 bits")
def test_16_bit_colours_keep_their_depth():
    decoded = decode_image(KINDS["png 16-bit RGB"][0](), PixelFormat(3))
    assert np.allclose(decoded.permute(1, 2, 0).numpy(), COLOURS16 / 257, rtol=1e-6, atol=0)


def test_a_picture_of_16_bits_that_uses_8_of_them_stays_dark():
    """A stretch to the file's own range would hide what the values mean."""
    dark = Image.fromarray(np.asarray(GREY).astype(np.uint16))
    for content in (encoded(dark, "PNG"), encoded(dark, "TIFF")):
        assert decode_image(content, PixelFormat(1)).max() <= 1


@pytest.mark.parametrize("in_chans", [1, 3])
def test_pixels_without_a_defined_range_are_refused(in_chans):
    """32-bit integers, too: most would come out all white, or all black."""
    ramp = RAMP16.astype(np.float32) / 65535
    assert "floating-point" in refusal(encoded(Image.fromarray(ramp), "TIFF"), in_chans)
    ramp = RAMP16.astype(np.int32) * 30000
    assert "32-bit" in refusal(encoded(Image.fromarray(ramp), "TIFF"), in_chans)


@pytest.mark.parametrize(
    "colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (12, 200, 77)]
)
def test_channels_of_decoded_pixels(colour):
    """Grey has the weights of Pillow."""
    grey = torch.arange(12, dtype=torch.uint8).view(1, 3, 4)
    assert torch.equal(to_channels(grey, 1), grey)
    assert torch.equal(to_channels(grey, 3), grey.repeat(3, 1, 1))
    pixels = torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1)
    assert torch.equal(to_channels(pixels, 3), pixels)
    expected = Image.new("RGB", (1, 1), colour).convert("L").getpixel((0, 0))
    assert abs(to_channels(pixels, 1).item() - expected) <= 1


STORED_AS = {
    1: COLOURS,
    2: COLOURS[:, ::-1],
    3: COLOURS[::-1, ::-1],
    4: COLOURS[::-1],
    # from here on a stored row is a column of the picture: the left one first, or the right one
    5: COLOURS.swapaxes(0, 1),
    6: COLOURS[:, ::-1].swapaxes(0, 1),
    7: COLOURS[::-1, ::-1].swapaxes(0, 1),
    8: COLOURS[::-1].swapaxes(0, 1),
}


def oriented(kind: str, orientation: int, stored: np.ndarray) -> bytes:
    image = Image.fromarray(np.ascontiguousarray(stored))
    if kind.startswith("TIFF"):
        return encoded(
            image,
            "TIFF",
            tiffinfo={274: orientation},
            compression="tiff_lzw" if "LZW" in kind else None,
        )
    exif = Image.Exif()
    exif[274] = orientation
    options = (
        {"quality": 98} if kind in ("JPEG", "MPO") else {"lossless": True} if "WEBP" in kind else {}
    )
    if kind == "MPO" or "animated" in kind:
        options |= {"save_all": True, "append_images": [ImageOps.invert(image)]}
    return encoded(image, kind.split()[0], exif=exif.tobytes(), **options)


@pytest.mark.parametrize(
    "kind", ["JPEG", "MPO", "PNG", "PNG animated", "WEBP", "WEBP animated", "TIFF", "TIFF LZW"]
)
def test_all_8_orientations_come_out_upright(kind):
    """JPEG, PNG and still WebP by torchcodec, the others by Pillow. One that does not exist is
    ignored."""
    none = {} if kind == "TIFF LZW" else {0: COLOURS, 9: COLOURS}  # which libtiff does not write
    for orientation, stored in (STORED_AS | none).items():
        decoded = decode_image(oriented(kind, orientation, stored), PixelFormat(3))
        tolerance = JPEG_ERROR if kind in ("JPEG", "MPO") else 0
        assert largest_difference(decoded, shown(RGB, 3)) <= tolerance, orientation
        assert decode_image(oriented(kind, orientation, stored), PixelFormat(1)).shape == (
            1,
            HEIGHT,
            WIDTH,
        ), orientation


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_a_phone_s_exif_with_a_resolution_in_words_is_no_obstacle(kind):
    """Pillow fails to write such an entry again, as it does when it turns an image upright."""
    text = b"300 dpi\0"
    orientation = struct.pack("<HHIHH", 274, 3, 1, 6, 0)
    resolution = struct.pack("<HHII", 282, 2, len(text), 8 + 2 + 24 + 4)
    entries = struct.pack("<H", 2) + orientation + resolution + struct.pack("<I", 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + entries + text
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[6]))
    several = {"save_all": True, "append_images": [stored]} if kind == "MPO" else {}
    content = encoded(stored, kind, exif=exif, quality=98, **several)
    assert largest_difference(decode_image(content, PixelFormat(3)), shown(RGB, 3)) <= JPEG_ERROR


PACKED_TEXT = zlib.compress(b"<history/>" * 200_000)  # 2 MB of text in 6 kB


@pytest.mark.parametrize(
    "metadata",
    [
        chunk(b"zTXt", b"prompt\0\0" + PACKED_TEXT),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\x01\0\0\0" + PACKED_TEXT),
        chunk(b"iCCP", b"profile\0\0" + PACKED_TEXT),
        chunk(b"tEXt", b"workflow\0" + b"x" * 3_000_000),
    ],
    ids=["zTXt", "XMP", "profile", "tEXt"],
)
def test_megabytes_of_metadata_are_read_over(metadata):
    rows = b"".join(b"\0" + row.tobytes() for row in COLOURS)
    content = png(WIDTH, HEIGHT, 8, 2, rows, metadata)
    assert largest_difference(decode_image(content, PixelFormat(3)), shown(RGB, 3)) == 0


def test_metadata_without_bound_is_refused():
    bomb = zlib.compress(bytes(200 << 20))
    rows = b"".join(b"\0" + row.tobytes() for row in COLOURS)
    assert refusal(png(WIDTH, HEIGHT, 8, 2, rows, chunk(b"zTXt", b"x\0\0" + bomb)))


def test_the_content_decides_and_not_the_ending(tmp_path):
    """ImageNet holds a PNG named .JPEG and CMYK JPEGs."""
    (tmp_path / "a.JPEG").write_bytes(encoded(RGB, "PNG"))
    (tmp_path / "b.png").write_bytes(cmyk_jpeg())
    (tmp_path / "c.gif").write_bytes(encoded(RGB, "TIFF"))
    (tmp_path / "d.jpg").write_text("an error page\n" * 20, encoding="utf-8")
    (tmp_path / "e.jpg").touch()
    source = FolderSource(str(tmp_path), PixelFormat(3))
    for index, tolerance in enumerate([0, 4, 0]):
        assert largest_difference(source.read(index), shown(RGB, 3)) <= tolerance
    with pytest.raises(BadImageError, match="cannot identify image file"):
        source.read(3)
    with pytest.raises(BadImageError, match="the file is empty"):
        source.read(4)


def test_postscript_is_refused_without_starting_an_interpreter(monkeypatch):
    """Pillow would hand such a file to Ghostscript, which runs what it is given."""
    content, started = encoded(RGB, "EPS"), []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append(True))
    assert refusal(content)
    assert not started


CUT_KINDS = {
    "JPEG": ("JPEG", {}),
    "progressive JPEG": ("JPEG", {"progressive": True}),
    "PNG": ("PNG", {}),
    "WEBP": ("WEBP", {}),
    "animated WEBP": ("WEBP", {"save_all": True, "append_images": [ImageOps.invert(NOISE)]}),
    "GIF": ("GIF", {}),
    "BMP": ("BMP", {}),
    "TIFF": ("TIFF", {}),
    "TIFF LZW": ("TIFF", {"compression": "tiff_lzw"}),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", CUT_KINDS)
def test_a_truncated_file_is_bad_and_not_a_grey_half(kind):
    name, options = CUT_KINDS[kind]
    content = encoded(NOISE, name, **options)
    assert decode_image(content, PixelFormat(3)).shape == (3, 96, 128)
    for share in (0.001, 0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97):
        for in_chans in (1, 3):
            assert refusal(content[: int(share * len(content)) + 1], in_chans), share


def declared(kind: str, side: int) -> bytes:
    """A small file whose header declares `side x side` pixels."""
    if kind == "PNG":
        return png(side, side, 8, 2, b"")
    content = bytearray(encoded(NOISE.quantize(16) if kind == "GIF" else NOISE, kind))
    if kind == "JPEG":  # start of frame: marker, length, precision, height, width
        struct.pack_into(">HH", content, content.index(b"\xff\xc0") + 5, side, side)
    elif kind == "BMP":
        struct.pack_into("<ii", content, 18, side, side)
    else:
        struct.pack_into("<HH", content, 6, side, side)
    return bytes(content)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF"])
def test_a_header_that_declares_too_many_pixels_is_refused_before_decoding(kind):
    content = declared(kind, 30000)
    unit = 1 if sys.platform == "darwin" else 1024
    peak, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, time.perf_counter()
    assert "too many pixels" in refusal(content)
    assert time.perf_counter() - begin < 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - peak
    assert grown < 50e6  # decoded it would be 2.7 GB


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (10, 20), (3, 2)])
def test_tiny_and_thin_images_can_be_cropped(size, in_chans):
    height, width = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = decode_image(encoded(Image.fromarray(pixels), "PNG"), PixelFormat(in_chans))
    assert image.shape == (in_chans, height, width)
    for crop, expected in ((32, (in_chans, 32, 32)), ((16, 24), (in_chans, 16, 24))):
        cropped = CropAndFlip(crop, 0.2, "bicubic", 0.5)(image)
        assert (tuple(cropped.shape), cropped.dtype) == (expected, torch.uint8)


def test_photographs_have_the_colours_that_pillow_sees(photographs):
    for path in sorted(photographs.rglob("*.JPEG"))[::50]:
        content, image = path.read_bytes(), Image.open(path)
        assert largest_difference(decode_image(content, PixelFormat(3)), shown(image, 3)) <= 2
        # A JPEG's own luma: not clipped to the range of colours before it is weighed, so a few
        # strong colours differ.
        difference = np.abs(
            decode_image(content, PixelFormat(1)).numpy().astype(int) - shown(image, 1)
        )
        assert difference.mean() < 0.5
        assert (difference > 2).mean() < 0.03


def test_an_animation_that_lost_the_head_of_a_frame_is_bad():
    """Pillow reports it by a SyntaxError, and only once the first frame is decoded."""
    content = bytearray(animated("PNG"))
    start = content.rindex(b"fcTL")
    content[start : start + 4] = b"fcGL"  # an unknown chunk, which readers pass over
    assert "frame sequence" in refusal(bytes(content))


def check_pixels(image: torch.Tensor, in_chans: int) -> None:
    """What every decoded image is."""
    assert image.ndim == 3
    assert image.shape[0] == in_chans
    assert image.dtype in (torch.uint8, torch.float32)
    assert image.numel() > 0
    assert 0 <= image.min() <= image.max() <= 255


PHOTOGRAPHS = {  # files that are mostly pixels
    "JPEG": lambda: oriented("JPEG", 6, COLOURS[:24, :32]),
    "CMYK JPEG": cmyk_jpeg,
    "PNG": lambda: oriented("PNG", 6, COLOURS[:24, :32]),
    "GIF": lambda: encoded(PALETTE, "GIF", save_all=True, append_images=[GREY]),
    "WEBP": lambda: oriented("WEBP", 6, COLOURS[:24, :32]),
    "WEBP animated": lambda: animated("WEBP"),
    "TIFF": lambda: oriented("TIFF", 6, COLOURS[:24, :32]),
    "TIFF LZW": lambda: oriented("TIFF LZW", 6, COLOURS[:24, :32]),
}


def corrupted(content: bytes, seed: int) -> bytes:
    """Perhaps cut, then one to eight bytes changed, the header's more often than others."""
    chance = random.Random(seed)
    changed = bytearray(
        content[: chance.randrange(1, len(content))] if chance.random() < 0.25 else content
    )
    for _ in range(chance.choice([1, 1, 2, 8])):
        position = chance.randrange(min(len(changed), chance.choice([40, 200, len(changed)])))
        flipped = changed[position] ^ 1 << chance.randrange(8)
        changed[position] = chance.choice([0, 255, chance.randrange(256), flipped])
    return bytes(changed)


def exif() -> bytes:
    """Orientation, texts, resolutions, a position and a time."""
    entries = Image.Exif()
    entries[274] = 6
    entries.update({271: "Maker", 272: "Model of a camera", 282: 72.0, 283: 72.0, 305: "a program"})
    entries.get_ifd(0x8769).update({33434: 0.01, 36867: "2024:01:01 10:00:00", 37500: b"note" * 5})
    entries.get_ifd(0x8825).update({1: "N", 2: (52.0, 31.0, 12.5), 29: "2024:01:01"})
    return entries.tobytes()


XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:Description tiff:Orientation='6'/></x:xmpmeta>"
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()[:300]
SMALL = Image.fromarray(COLOURS[:6, :8])  # so that most of a file is metadata
SMALL16 = (RAMP16[:6, :8], RAMP16[:6, :8, None].repeat(5, axis=2))
TEXTS = PngInfo()
TEXTS.add_text("prompt", "a cat" * 5, zip=True)
TEXTS.add_itxt("XML:com.adobe.xmp", XMP.decode(), zip=True)
TAGS = {270: "a description", 274: 6, 282: 72.0, 305: "a program", 700: XMP, 34675: PROFILE}


def two(kind: str, **options) -> bytes:
    more = {"save_all": True, "append_images": [ImageOps.invert(SMALL)]}
    return encoded(SMALL, kind, **more, **options)


def by_tifffile(pixels: np.ndarray, **options) -> bytes:
    file = BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def as_npy(array: np.ndarray) -> bytes:
    file = BytesIO()
    np.save(file, array)
    return file.getvalue()


def as_ome(array: np.ndarray) -> bytes:
    return by_tifffile(array, ome=True, metadata={"axes": "CYX"}, photometric="minisblack")


def with_checksums(content: bytes) -> bytes:
    """A PNG whose chunks have the checksums of what they hold, as else few get past these."""
    mended, start = content[:8], 8
    while len(content) >= start + 12:
        end = start + 8 + int.from_bytes(content[start : start + 4])
        inside = content[start + 4 : end]
        mended += content[start : start + 4] + inside + zlib.crc32(inside).to_bytes(4)
        start = end + 4
    return mended + content[start:]


# Files that are mostly metadata; in_chans
WITH_METADATA: dict[str, tuple[Callable[[], bytes], int]] = {
    "JPEG": (lambda: encoded(SMALL, "JPEG", exif=exif(), xmp=XMP, icc_profile=PROFILE), 3),
    "MPO": (lambda: two("MPO", exif=exif(), xmp=XMP, icc_profile=PROFILE), 3),
    "PNG": (lambda: encoded(SMALL, "PNG", exif=exif(), pnginfo=TEXTS, icc_profile=PROFILE), 3),
    "APNG": (lambda: two("PNG", exif=exif(), pnginfo=TEXTS, icc_profile=PROFILE), 3),
    "WEBP": (lambda: encoded(SMALL, "WEBP", exif=exif(), xmp=XMP, icc_profile=PROFILE), 3),
    "TIFF 8-bit": (lambda: encoded(SMALL, "TIFF", tiffinfo=TAGS), 3),
    "TIFF 16-bit": (lambda: encoded(Image.fromarray(SMALL16[0]), "TIFF", tiffinfo=TAGS), 1),
    "TIFF of 5 channels": (lambda: by_tifffile(SMALL16[1], compression="zlib"), 5),
    "OME-TIFF": (lambda: as_ome(SMALL16[1].transpose(2, 0, 1)), 5),
    "GIF": (lambda: encoded(SMALL.quantize(4), "GIF", comment=b"a comment" * 9), 3),
    "BMP": (lambda: encoded(SMALL, "BMP", dpi=(72, 72)), 3),
    "PPM": (lambda: b"P6\n# a comment\n8 6\n# another\n255\n" + COLOURS[:6, :8].tobytes(), 3),
    "NPY": (lambda: as_npy(SMALL16[1]), 5),
    "DICOM": (lambda: Path(get_testdata_file("SC_rgb_small_odd.dcm")).read_bytes(), 3),
}
FUZZED = WITH_METADATA | {f"{kind}, pixels": (make, 3) for kind, make in PHOTOGRAPHS.items()}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("tries", [400, pytest.param(20_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", FUZZED)
def test_a_corrupted_file_gives_an_image_or_a_reason(kind, tries, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)  # a wrong size would only cost time
    monkeypatch.setattr(arrays, "MAX_PIXELS", 500_000)
    make, in_chans = FUZZED[kind]
    content, num_images = make(), 0
    check_pixels(decode_image(content, PixelFormat(in_chans)), in_chans)
    counts = (in_chans,) if in_chans == 5 else (1, 3)  # take turns
    for seed in range(tries):
        changed = corrupted(content, seed)
        if "PNG" in kind:
            changed = with_checksums(changed)
        in_chans = counts[seed % len(counts)]
        with suppress(BadImageError):
            check_pixels(decode_image(changed, PixelFormat(in_chans)), in_chans)
            num_images += 1
    assert 0.02 * tries < num_images < 0.98 * tries  # not vacuous


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "kind", ["JPEG", "MPO", "PNG", "APNG", "WEBP", "TIFF 8-bit", "TIFF 16-bit"]
)
def test_damage_inside_of_metadata_never_costs_the_image(kind):
    """EXIF, XMP and colour profile: only the orientation is needed, and upright will do."""
    make, in_chans = WITH_METADATA[kind]
    content = make()
    starts = {content.find(payload[:40]): payload for payload in (exif()[6:], XMP, PROFILE)}
    spans = [
        (at, at + (40 if "TIFF" in kind else len(part))) for at, part in starts.items() if at >= 0
    ]
    assert spans
    for seed in range(300):
        chance, changed = random.Random(seed), bytearray(content)
        for _ in range(chance.choice([1, 2, 8, 30])):
            changed[chance.randrange(*chance.choice(spans))] = chance.choice(
                [0, 255, chance.randrange(256)]
            )
        damaged = with_checksums(bytes(changed)) if "PNG" in kind else bytes(changed)
        check_pixels(decode_image(damaged, PixelFormat(in_chans)), in_chans)
