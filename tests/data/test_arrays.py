"""Files of any depth and number of channels: TIFF, `.npy` and DICOM hold the values that NumPy's
own arithmetic gives."""

import struct
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
import tifffile
import torch
from conftest import ROOT
from PIL import Image
from pydicom.data import get_testdata_file
from test_images import STORED_AS, as_npy, as_ome, by_tifffile, encoded, refusal

from data.images import BadImageError, PixelFormat, decode_image
from data.sources import FolderSource, check_format
from data.transforms import CropAndFlip, EvalTransform, PixelNormalizer
from util.errors import DataError

BANDS = np.random.default_rng(0).integers(0, 65536, (5, 24, 32)).astype(np.uint16)  # (C, H, W)
LAST = np.ascontiguousarray(BANDS.transpose(1, 2, 0))
GREY = {"photometric": "minisblack"}
SAME = {  # files of BANDS
    "tiff, channels last": lambda: by_tifffile(LAST, planarconfig="contig", **GREY),
    "tiff, planes": lambda: by_tifffile(BANDS, planarconfig="separate", **GREY),
    "tiff, an axis that was not named": lambda: by_tifffile(LAST),
    "tiff, pages": lambda: by_tifffile(BANDS),
    "tiff, tiles": lambda: by_tifffile(LAST, planarconfig="contig", tile=(16, 16), **GREY),
    "tiff LZW": lambda: by_tifffile(LAST, planarconfig="contig", compression="lzw", **GREY),
    "tiff Zstandard": lambda: by_tifffile(LAST, planarconfig="contig", compression="zstd", **GREY),
    "tiff, predictor": lambda: by_tifffile(
        LAST, planarconfig="contig", compression="zlib", predictor=True, **GREY
    ),
    "tiff, big-endian": lambda: by_tifffile(LAST, planarconfig="contig", byteorder=">", **GREY),
    "big tiff": lambda: by_tifffile(LAST, planarconfig="contig", bigtiff=True, **GREY),
    "OME-TIFF": lambda: as_ome(BANDS),
    "OME-TIFF, of several times the first": lambda: by_tifffile(
        np.stack([BANDS, 65535 - BANDS]), ome=True, metadata={"axes": "TCYX"}, **GREY
    ),
    "ImageJ": lambda: by_tifffile(BANDS, imagej=True, metadata={"axes": "CYX"}),
    "npy (H, W, C)": lambda: as_npy(LAST),
    "npy (C, H, W)": lambda: as_npy(BANDS),
    "npy in Fortran's order": lambda: as_npy(np.asfortranarray(LAST)),
    "npy, big-endian": lambda: as_npy(LAST.astype(">u2")),
}


@pytest.mark.parametrize("kind", SAME)
def test_every_channel_has_its_values(kind):
    decoded = decode_image(SAME[kind](), PixelFormat(5))
    assert decoded.dtype == torch.float32
    assert np.allclose(decoded.numpy(), BANDS / 257, rtol=1e-6, atol=0)
    picked = decode_image(SAME[kind](), PixelFormat(3, channels=(3, 2, 1)))
    assert np.allclose(picked.numpy(), BANDS[[2, 1, 0]] / 257, rtol=1e-6, atol=0)


def test_transparency_of_a_deep_tiff_is_dropped_unless_it_is_asked_for():
    content = by_tifffile(LAST[..., :4], photometric="rgb")
    assert np.allclose(decode_image(content, PixelFormat(3)), BANDS[:3] / 257, rtol=1e-6)
    assert np.allclose(decode_image(content, PixelFormat(4)), BANDS[:4] / 257, rtol=1e-6)


def test_channels_of_photographs_are_picked_too():
    photo = STORED_AS[1]
    inks = Image.fromarray(photo).convert("CMYK")
    files = [encoded(Image.fromarray(photo), kind) for kind in ("PNG", "BMP", "TIFF")]
    for content in (*files, encoded(inks, "TIFF")):
        picked = decode_image(content, PixelFormat(2, channels=(3, 1)))
        assert picked.dtype == torch.uint8
        assert np.array_equal(picked.numpy(), photo.transpose(2, 0, 1)[[2, 0]])
    grey = decode_image(as_npy(LAST[..., 0]), PixelFormat(3))  # one channel becomes three
    assert np.allclose(grey.numpy(), BANDS[:1].repeat(3, axis=0) / 257, rtol=1e-6, atol=0)


DEPTHS = {
    "uint8": (np.uint8, 0, 255),
    "int16": (np.int16, -1000, 3000),
    "uint16": (np.uint16, 0, 10_000),
    "int32": (np.int32, -(2**30), 2**30),
    "uint32": (np.uint32, 2**31, 2**32 - 1),
    "float16": (np.float16, -2, 2),
    "float32": (np.float32, -0.25, 1.25),
    "float64": (np.float64, 1e9, 1e9 + 100),
}


@pytest.mark.parametrize("to_file", [as_npy, lambda a: by_tifffile(a, **GREY)], ids=["npy", "tiff"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_stated_and_own_ranges_equal_numpy_s(depth, to_file):
    """After normalisation, in float64, to 1e-6."""
    dtype, low, high = DEPTHS[depth]
    numbers = np.random.default_rng(1).uniform(low, high, (4, 24, 32)).astype(dtype)
    wide, mean, std = numbers.astype(np.float64), (0.5, 0.4, 0.3, 0.2), (0.25, 0.3, 0.5, 1.0)
    span = (low + 0.2 * (high - low), low + 0.7 * (high - low))  # so that some are clipped
    own = wide.min((1, 2), keepdims=True), wide.max((1, 2), keepdims=True)
    for setting, (black, white) in ((span, span), ("per_channel", own)):
        decoded = decode_image(to_file(numbers), PixelFormat(4, pixel_range=setting))
        found = PixelNormalizer(mean, std, torch.device("cpu"))(decoded[None])[0].numpy()
        unit = np.clip((wide - black) / (white - black), 0, 1)
        expected = (unit - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
        assert np.abs(found - expected).max() < 1e-6
    if dtype not in (np.uint8, np.uint16):
        assert "pixel_range LOW HIGH" in refusal(to_file(numbers), in_chans=4)


def test_a_channel_of_one_value_is_black_in_its_own_range():
    decoded = decode_image(as_npy(np.full((8, 9), 7.5)), PixelFormat(1, pixel_range="per_channel"))
    assert decoded.eq(0).all()


@pytest.mark.parametrize(
    "numbers, pixels",
    [(BYTES := (BANDS >> 8).astype(np.uint8), BYTES), (YES := BANDS > 30_000, YES * np.uint8(255))],
    ids=["8 bits", "yes and no"],
)
def test_8_bits_stay_whole_numbers_and_yes_is_white(numbers, pixels):
    for content in (as_npy(numbers), by_tifffile(numbers, planarconfig="separate", **GREY)):
        decoded = decode_image(content, PixelFormat(5))
        assert decoded.dtype == torch.uint8 and np.array_equal(decoded.numpy(), pixels)


@pytest.mark.parametrize("orientation", STORED_AS)
def test_a_deep_tiff_is_turned_upright(orientation):
    stored = np.ascontiguousarray(STORED_AS[orientation]).astype(np.uint16)
    tag = (274, "H", 1, orientation, True)
    content = by_tifffile(stored, photometric="rgb", extratags=[tag])
    decoded = decode_image(content, PixelFormat(3))
    expected = STORED_AS[1].transpose(2, 0, 1) / 257
    assert np.allclose(decoded.numpy(), expected, rtol=1e-6, atol=0)


def test_white_is_zero_where_the_file_says_so():
    content = by_tifffile(BANDS[0], photometric="miniswhite")
    decoded = decode_image(content, PixelFormat(1))
    assert np.allclose(decoded.numpy(), 255 - BANDS[:1] / 257, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", [kind for kind in SAME if "not named" not in kind])
def test_a_file_that_was_cut_off_is_bad(kind):
    content = SAME[kind]()
    for share in (0.01, 0.3, 0.6, 0.9):  # the pages' directories are at the end
        assert refusal(content[: int(share * len(content))], in_chans=5), share


def test_what_is_wrong_is_said_in_one_line():
    pit = BANDS.astype(np.float32)
    pit[2, 3, 4:7] = np.nan
    asked = PixelFormat(5, pixel_range=(0.0, 1.0))
    for content in (as_npy(pit), by_tifffile(pit)):
        with pytest.raises(BadImageError, match="NaN pixels: 3"):
            decode_image(content, asked)
    without = PixelFormat(2, (0.0, 1.0), channels=(1, 5))  # the channel with the pit
    assert decode_image(as_npy(pit), without).shape == (2, 24, 32)
    assert "5 channels" in refusal(as_npy(BANDS), in_chans=3)
    assert "in_chans is 4" in refusal(as_npy(BANDS), in_chans=4)
    assert "number 6" in str(
        pytest.raises(
            BadImageError, decode_image, as_npy(BANDS), PixelFormat(1, channels=(6,))
        ).value
    )
    for array in (BANDS[None], np.array(["a"]), BANDS.astype(complex), np.array([[None]], object)):
        assert refusal(as_npy(array), in_chans=5)


def test_a_source_whose_first_image_does_not_fit_is_refused_at_once(tmp_path):
    (tmp_path / "a.npy").write_bytes(as_npy(BANDS.astype(np.float32)))
    (tmp_path / "b.tif").write_bytes(by_tifffile(BANDS, planarconfig="separate", **GREY))
    with pytest.raises(DataError, match=r"a\.npy has 5 channels .* in_chans is 3"):
        check_format(FolderSource(tmp_path, PixelFormat(3)))
    with pytest.raises(DataError, match=r"a\.npy holds 32-bit floating-point .*check_dataset"):
        check_format(FolderSource(tmp_path, PixelFormat(5)))
    assert len(check_format(FolderSource(tmp_path, PixelFormat(5, (0.0, 65535.0))))) == 2


def test_crops_of_deep_images_keep_their_depth_and_their_range():
    """Equal to the crop of the same image in 8 bits to its rounding, and not rounded themselves."""
    smooth = np.stack([STORED_AS[1][..., 0], STORED_AS[1][..., 1]])  # (2, H, W)
    for transform in (CropAndFlip(32, 0.2, "bicubic", 0.5), EvalTransform(40, None)):
        whole, deep = torch.from_numpy(smooth), torch.from_numpy(smooth.astype(np.float32))
        torch.manual_seed(3)
        expected = transform(whole)
        torch.manual_seed(3)
        found = transform(deep)
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() < 1.6  # two axes are rounded
        assert found.frac().ne(0).any()
    spots = torch.zeros(5, 40, 40)
    spots[:, ::7, ::5] = 255  # bicubic overshoots
    resized = EvalTransform(64, 1.0)(spots)
    assert resized.min() == 0
    assert resized.max() <= 255


def dicom(name: str) -> tuple[bytes, pydicom.Dataset]:
    path = get_testdata_file(name, download=False)
    return Path(path).read_bytes(), pydicom.dcmread(path)


def changed(name: str, **elements) -> bytes:
    """A test file of pydicom with other elements."""
    _, data = dicom(name)
    for keyword, value in elements.items():
        setattr(data, keyword, value)
    file = BytesIO()
    data.save_as(file)
    return file.getvalue()


def windowed(numbers: np.ndarray, centre: float, width: float) -> np.ndarray:
    """DICOM PS3.3, C.11.2.1.2.1, to [0, 1]."""
    return np.clip((numbers - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)


MRI, CT, TWO = "MR_small.dcm", "CT_small.dcm", "SC_rgb_rle_2frame.dcm"


def test_dicom_equals_numpy():
    content, data = dicom(MRI)
    raw = data.pixel_array.astype(float)
    unit = windowed(raw, 600, 1600)
    assert np.allclose(decode_image(content, PixelFormat(1))[0].numpy(), 255 * unit, atol=2e-5)
    inverted = changed(MRI, PhotometricInterpretation="MONOCHROME1")
    inverse = decode_image(inverted, PixelFormat(1))[0].numpy()
    assert np.allclose(inverse, 255 * (1 - unit), atol=5e-5)
    exact = changed(MRI, VOILUTFunction="LINEAR_EXACT")
    expected = 255 * np.clip((raw - 600) / 1600 + 0.5, 0, 1)
    assert np.allclose(decode_image(exact, PixelFormat(1))[0].numpy(), expected, atol=2e-5)
    curved = changed(MRI, VOILUTFunction="SIGMOID")
    expected = 255 / (1 + np.exp(-4 * (raw - 600) / 1600))
    assert np.allclose(decode_image(curved, PixelFormat(1))[0].numpy(), expected, atol=2e-5)

    table = pydicom.Dataset()
    table.LUTDescriptor, table.LUTData = (
        [4096, 0, 12],
        (np.arange(4096) ** 2 // 4096).astype("<u2").tobytes(),
    )
    found = decode_image(changed(MRI, VOILUTSequence=[table]), PixelFormat(1))[0].numpy()
    assert np.allclose(found, 255 * (raw**2 // 4096) / 4095, atol=2e-5)

    content, data = dicom(CT)  # slope 1, intercept -1024, no window
    units = data.pixel_array.astype(float) - 1024
    asked = PixelFormat(1, dicom_window=(40.0, 400.0))
    expected = 255 * windowed(units, 40, 400)
    assert np.allclose(decode_image(content, asked)[0].numpy(), expected, atol=2e-5)
    asked = PixelFormat(1, pixel_range=(-1000.0, 1000.0))
    expected = 255 * np.clip((units + 1000) / 2000, 0, 1)
    assert np.allclose(decode_image(content, asked)[0].numpy(), expected, atol=2e-5)
    full = decode_image(content, PixelFormat(1, dicom_window="full"))[0].numpy()
    assert np.allclose(full, 255 * (units + 1024 + 32768) / 65535, atol=2e-5)
    assert "dicom_window" in refusal(content, in_chans=1)
    empty = changed(MRI, WindowCenter=None, WindowWidth=None)
    assert "dicom_window" in refusal(empty, in_chans=1)


IN_COLOUR = [
    "ExplVR_BigEnd",
    "SC_rgb_rle_16bit",
    "examples_palette",
    "SC_ybr_full_422_uncompressed",
]


@pytest.mark.parametrize("name", IN_COLOUR)
def test_dicom_in_colour(name):
    content, data = dicom(f"{name}.dcm")
    expected = pydicom.pixels.pixel_array(data, raw=True)
    if "palette" in name:
        expected = pydicom.pixels.apply_color_lut(expected, data)
    if "ybr" in name:
        expected = pydicom.pixels.convert_color_space(expected, "YBR_FULL", "RGB")
    decoded = decode_image(content, PixelFormat(3)).numpy()
    unit = 255 / np.iinfo(expected.dtype).max
    assert np.allclose(decoded, expected.transpose(2, 0, 1) * unit, rtol=1e-6)


def test_pydicom_writes_nothing_and_its_reasons_are_those_of_bad_images():
    script = """
import logging, pathlib
from pydicom.data import get_testdata_file
from data.images import BadImageError, PixelFormat, decode_image
logging.basicConfig(level=logging.INFO)  # as a run does, to stderr
for name in ("CT_small.dcm", "JPGExtended.dcm", "SC_rgb_jls_lossy_line.dcm"):
    try:
        decode_image(pathlib.Path(get_testdata_file(name)).read_bytes(), PixelFormat(1))
    except BadImageError as error:
        print(error)
"""
    done = subprocess.run(  # a process of its own: pytest takes warnings and logs
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.stderr == ""
    for reason in ("without a window", "12-bit", "pylibjpeg"):
        assert reason in done.stdout
    assert done.stdout.count("\n") == 3


def test_all_frames_of_dicom_are_images(tmp_path):
    content, data = dicom(TWO)
    (tmp_path / "b.dcm").write_bytes(content)
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(STORED_AS[1]), "PNG"))
    (tmp_path / "c.dcm").write_bytes(b"no image")
    first = FolderSource(tmp_path, PixelFormat(3))
    assert len(first) == 3
    assert np.array_equal(first.read(1).permute(1, 2, 0), data.pixel_array[0])
    source = FolderSource(tmp_path, PixelFormat(3, all_frames=True))
    assert [Path(source.name(index)).name for index in range(4)] == [
        "a.png[0]",
        "b.dcm[0]",
        "b.dcm[1]",
        "c.dcm[0]",
    ]
    for frame in (0, 1):
        assert np.array_equal(source.read(1 + frame).permute(1, 2, 0), data.pixel_array[frame])
    assert source.fingerprint() != first.fingerprint()


@pytest.mark.parametrize(
    "library, content, extra",
    [
        ("pydicom", lambda: dicom(MRI)[0], "dicom"),
        ("imagecodecs", lambda: SAME["tiff LZW"](), "tiff"),
    ],
)
def test_an_absent_library_is_named_with_its_extra(library, content, extra, monkeypatch):
    content = content()
    if library == "pydicom":
        monkeypatch.setitem(sys.modules, library, None)
    else:
        monkeypatch.setattr(tifffile.tifffile, "imagecodecs", SimpleNamespace())
        codecs = tifffile.tifffile.CompressionCodec(encode=False)
        monkeypatch.setattr(tifffile.TIFF, "DECOMPRESSORS", codecs)
    assert f"pip install -e .[{extra}]" in refusal(content, in_chans=5)


@pytest.mark.parametrize(
    "values, reason",
    [
        ({257: (1, 2**31)}, "declares too many pixels: 8 x 2147483648"),
        ({256: (2**28, 8)}, "its tag 256 is no number"),
        ({256: (1, 1), 257: (1, 30_000_000), 278: (1, 1)}, "declares 30000000 parts, and the file"),
        ({277: (1, 60_000), 257: (1, 70_000)}, "declares too many pixels: 8 x 70000 x 60000"),
    ],
)
@pytest.mark.parametrize("is_big", [False, True])
def test_a_tiff_s_declarations_are_checked_before_memory_is_taken(is_big, values, reason):
    """tifffile makes a list of all parts when it opens a file: 20 GB of memory were seen."""
    file = BytesIO()
    zeros = np.zeros((6, 8, 5), np.uint16)
    layout = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(file, zeros, bigtiff=is_big, **layout)
    content = bytearray(file.getvalue())
    assert decode_image(bytes(content), PixelFormat(5)).shape == (5, 6, 8)
    with tifffile.TiffFile(BytesIO(bytes(content))) as opened:
        offsets = {tag: opened.pages.first.tags[tag].offset for tag in values}
    for tag, (count, value) in values.items():
        kind = 16 if is_big else 4  # whole numbers of 8 or 4 bytes
        struct.pack_into(
            "<HHQQ" if is_big else "<HHII", content, offsets[tag], tag, kind, count, value
        )
    with pytest.raises(BadImageError, match=reason):
        decode_image(bytes(content), PixelFormat(5))
