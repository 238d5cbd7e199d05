"""Files that hold arrays of numbers, of any depth and number of channels: scientific TIFF by
tifffile, NumPy's `.npy`, and DICOM by pydicom.

Each reader takes a file's bytes and returns its `Values`; what it raises is made a bad image by
`data/images.py`. Shapes: `C` channels, `H` height, `W` width.
"""

import logging
import math
import struct
import warnings
from functools import cache
from io import BytesIO
from operator import add
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from data.pixels import BadImageError, FormatError, Interval, PixelFormat, Values, depth_of

if TYPE_CHECKING:
    from pydicom import Dataset

MAX_PIXELS = 89_478_485  # of one channel, as Pillow's limit
MAX_VALUES = 2**28  # of all channels: 1 GiB as float32
# How the first row and column of a file's pixels lie, by the orientation of EXIF and TIFF: whether
# rows are columns, then the axes of (C, H, W) that run backwards.
UPRIGHT: dict[int, tuple[bool, tuple[int, ...]]] = {
    2: (False, (2,)),
    3: (False, (1, 2)),
    4: (False, (1,)),
    5: (True, ()),
    6: (True, (2,)),
    7: (True, (1, 2)),
    8: (True, (1,)),
}
NPY_MAGIC, DICOM_MAGIC = b"\x93NUMPY", b"DICM"  # the second after 128 bytes
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ORIENTATION = 274  # a tag of TIFF
# Tags that say how large a picture is and in how many parts, with their defaults: width, height,
# channels, rows of a strip, whether channels lie apart, width and height of a tile.
TIFF_SIZES = {256: 0, 257: 0, 277: 1, 278: 2**32 - 1, 284: 1, 322: 0, 323: 0}
TIFF_INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # types of a tag, and how they are unpacked
PLANAR = 2
ARRAY_PHOTOMETRICS = TIFF_INVERTED, TIFF_GREY, TIFF_COLOUR = (0, 1, 2)  # what its pixels mean
TIFF_ALPHA = (1, 2)  # what further channels are


def may_be_array(head: bytes) -> bool:
    """Whether a file of which this is the beginning, 132 bytes at least, may be read here."""
    return head.startswith((NPY_MAGIC, *TIFF_MAGICS)) or head[128:132] == DICOM_MAGIC


def check_size(height: int, width: int, channels: int = 1) -> None:
    """Raises: BadImageError for more pixels than one image may have."""
    if height * width > MAX_PIXELS or height * width * channels > MAX_VALUES:
        count = f" x {channels}" if channels > 1 else ""
        raise BadImageError(f"declares too many pixels: {width} x {height}{count}")


def turned_upright(numbers: np.ndarray, orientation: object) -> np.ndarray:
    """An array `(C, H, W)` as it is to be looked at. An orientation that does not exist is none."""
    if not isinstance(orientation, int) or orientation not in UPRIGHT:
        return numbers
    are_swapped, backwards = UPRIGHT[orientation]
    return np.flip(numbers.swapaxes(1, 2) if are_swapped else numbers, backwards).copy()


def values_of(
    numbers: np.ndarray, kind: str, *, is_colour: bool, bits: int = 0, is_inverted: bool = False
) -> Values:
    """The values of an array `(C, H, W)`, in the byte order of this machine. `bits` are those that
    are used, 0 for all.

    Raises: BadImageError if they are no real numbers.
    """
    if numbers.dtype.kind == "b":
        numbers, bits = numbers.astype(np.uint8) * np.uint8(255), 8
    if numbers.dtype.kind not in "uif" or not numbers.size:
        raise BadImageError(f"holds {numbers.size} values of type {numbers.dtype}, and no pixels")
    numbers = numbers.astype(numbers.dtype.newbyteorder("="), copy=False)
    bits = bits or 8 * numbers.dtype.itemsize
    # other numbers have a unit, or their range was never said
    usual = (0.0, 2.0**bits - 1) if numbers.dtype.kind == "u" and bits <= 16 else None
    return Values(numbers, f"{depth_of(numbers)} {kind}", is_colour, usual, is_inverted)


def read_npy(encoded: bytes, pixels: PixelFormat, frame: int) -> Values:
    """An array `(H, W)`, `(H, W, C)` or `(C, H, W)`.

    The axis of the channels is the one of `in_chans` entries, the last before the first; without
    one it is the shorter of them. Nothing is unpickled.
    """
    numbers = np.load(BytesIO(encoded), allow_pickle=False)
    if numbers.ndim not in (2, 3):
        raise BadImageError(
            f"holds an array of shape {numbers.shape}, expected (H, W), (H, W, C) or (C, H, W)"
        )
    numbers = _channels_first(numbers, pixels)
    channels, height, width = numbers.shape
    check_size(height, width, channels)
    return values_of(numbers, "NPY", is_colour=False)


def _channels_first(numbers: np.ndarray, pixels: PixelFormat) -> np.ndarray:
    """An array `(H, W)`, `(H, W, C)` or `(C, H, W)` as `(C, H, W)`."""
    if numbers.ndim == 2:
        return numbers[None]
    first, _, last = numbers.shape
    if pixels.in_chans in (first, last) and not pixels.channels:
        is_last = last == pixels.in_chans
    else:
        is_last = last <= first
    return numbers.transpose(2, 0, 1) if is_last else numbers


def check_tiff(encoded: bytes) -> None:
    """Looks at a TIFF's header before tifffile does, which makes lists of as many strips or tiles
    as that declares.

    Raises: BadImageError for more pixels or parts than one image, or this file, may have.
    """
    order = "<" if encoded.startswith(b"II") else ">"
    is_big = 43 in encoded[2:4]
    # the place of the first directory, the number of its entries, and one of them
    where, number, entry = ("8xQ", "Q", "HHQ8s") if is_big else ("4xI", "H", "HHI4s")
    (start,) = struct.unpack_from(order + where, encoded)
    (count,) = struct.unpack_from(order + number, encoded, start)
    start += struct.calcsize(order + number)
    size = struct.calcsize(order + entry)
    found = dict(TIFF_SIZES)
    entries = encoded[start : start + count * size]
    for tag, kind, values, content in struct.iter_unpack(order + entry, entries):
        if tag in TIFF_SIZES:
            if values != 1 or kind not in TIFF_INTEGERS:
                raise BadImageError(f"cannot be decoded: its tag {tag} is no number")
            (found[tag],) = struct.unpack_from(order + TIFF_INTEGERS[kind], content)
    width, height, channels, rows, planar, tile_width, tile_height = found.values()
    check_size(height, width, channels)
    parts = math.ceil(height / max(tile_height or rows, 1)) * math.ceil(
        width / (tile_width or width or 1)
    )
    if parts * (channels if planar == PLANAR else 1) > len(encoded):
        raise BadImageError(f"declares {parts} parts, and the file has {len(encoded)} bytes")


def read_tiff(encoded: bytes, pixels: PixelFormat, frame: int) -> Values:
    """The first picture. What OME, ImageJ or tifffile describe as one array gives all its planes
    as channels, and of time and depth the first."""
    import tifffile  # here, as few runs need it

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # its reasons are in the exceptions
    check_tiff(encoded)
    with tifffile.TiffFile(BytesIO(encoded)) as file:
        page: Any = file.pages.first
        is_array = file.is_ome or file.is_imagej or file.is_shaped
        picture: Any = file.series[0] if is_array else page
        lengths = dict(zip(picture.axes, picture.shape, strict=True))
        planes = [name for name in picture.axes if name in "CSQI"]
        num_channels = math.prod(picture.shape) // (lengths["Y"] * lengths["X"])
        check_size(lengths["Y"], lengths["X"], num_channels)
        for part in filter(None, picture.pages if is_array else [page]):  # None is left out
            ends = map(add, part.dataoffsets, part.databytecounts)
            if max(ends) > len(encoded):  # tifffile would fill what was cut off
                raise BadImageError("cannot be decoded: the file is truncated")
        if (photometric := page.photometric) not in ARRAY_PHOTOMETRICS:
            raise BadImageError(f"holds pixels of photometric interpretation {photometric}")
        try:
            numbers = picture.asarray()
        except Exception as error:
            if "requires the 'imagecodecs' package" in str(error):
                raise FormatError(f"{error}: pip install -e .[tiff]") from error
            raise
        tag = page.tags.get(ORIENTATION)
        num_alpha = sum(kind in TIFF_ALPHA for kind in page.extrasamples)
    if picture.axes == "QYX":  # as np.save would write it: which axis is which was not said
        numbers = _channels_first(numbers, pixels)
    else:
        kept = [name for name in picture.axes if name in "YX" or name in planes]
        first = tuple(slice(None) if name in kept else 0 for name in picture.axes)
        order = [kept.index(name) for name in (*planes, "Y", "X")]
        numbers = numbers[first].transpose(order).reshape(-1, lengths["Y"], lengths["X"])
    if num_alpha and pixels.of_photographs:
        numbers = numbers[:-num_alpha]
    return values_of(
        turned_upright(numbers, 1 if tag is None else tag.value),
        "TIFF",
        is_colour=len(numbers) == 1 or photometric == TIFF_COLOUR,
        bits=page.bitspersample,
        is_inverted=photometric == TIFF_INVERTED,
    )


def read_dicom(encoded: bytes, pixels: PixelFormat, frame: int) -> Values:
    """One frame, in the unit that the file's rescale slope and intercept give.

    Its range is that of the window: y = (x - (centre - 0.5)) / (width - 1) + 0.5 is 0 and 1 at its
    ends. Source: DICOM PS3.3, C.7.6.3.1.2 (photometric interpretation), C.11.1 (modality) and
    C.11.2 (window).
    """
    pydicom = _pydicom()
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    data = pydicom.dcmread(BytesIO(encoded))
    if "PixelData" not in data:
        raise BadImageError(f"is DICOM without pixels: {data.get('Modality', 'of no modality')}")
    check_size(data.Rows, data.Columns, data.SamplesPerPixel)
    try:
        numbers = pixel_array(data, index=frame)
    except RuntimeError as error:  # the reason, as a package that is missing, is not its first line
        raise BadImageError(f"cannot be decoded: {' '.join(str(error).split())}") from error
    photometric = data.PhotometricInterpretation
    if photometric == "PALETTE COLOR":
        numbers = apply_color_lut(numbers, data)
    if numbers.ndim == 3:  # colours have no window
        return values_of(numbers.transpose(2, 0, 1), "DICOM", is_colour=True)
    signed = data.PixelRepresentation
    lowest = -(2 ** (data.BitsStored - 1)) if signed else 0
    full = np.array([lowest, lowest + 2**data.BitsStored - 1], numbers.dtype)
    low, high = sorted(apply_modality_lut(full, data).tolist())
    window = (float(low), float(high))
    numbers = apply_modality_lut(numbers, data)
    if isinstance(pixels.dicom_window, tuple):
        window = _window(*pixels.dicom_window)
    elif pixels.dicom_window == "file" and pixels.pixel_range == "auto":
        if data.get("VOILUTFunction") == "SIGMOID" or data.get("VOILUTSequence"):
            numbers, window = _curved(numbers, data)
        elif None not in (data.get("WindowCenter"), data.get("WindowWidth")):  # empty is none
            exactly = data.get("VOILUTFunction") == "LINEAR_EXACT"
            window = _window(*_first_window(data), exactly)
        elif data.BitsStored > 8:
            raise FormatError(
                f"is DICOM of {data.BitsStored} bits without a window: set dicom_window CENTER "
                "WIDTH or full, or pixel_range"
            )
    found = values_of(numbers[None], "DICOM", is_colour=True)
    return Values(found.numbers, found.kind, True, window, photometric == "MONOCHROME1")


def _first_window(data: "Dataset") -> Interval:
    """Centre and width of the first of the windows that a file offers."""
    centre, width = (np.ravel(value)[0] for value in (data.WindowCenter, data.WindowWidth))
    return float(centre), float(width)


def _window(centre: float, width: float, exactly: bool = False) -> Interval:
    """The values that a window makes black and white."""
    if exactly:
        return centre - width / 2, centre + width / 2
    half = max(width - 1, 1e-6) / 2
    return centre - 0.5 - half, centre - 0.5 + half


def _curved(numbers: np.ndarray, data: "Dataset") -> tuple[np.ndarray, Interval]:
    """Values after a window that is no straight line, and their range."""
    from pydicom.pixels import apply_voi

    if data.get("VOILUTSequence"):
        bits = data.VOILUTSequence[0].LUTDescriptor[2]
        return apply_voi(numbers, data), (0.0, 2.0**bits - 1)
    centre, width = _first_window(data)
    return 1 / (1 + np.exp(-4 * (numbers - centre) / width)), (0.0, 1.0)


def num_frames(path: Path) -> int:
    """Of a DICOM file, from its header; 1 for others, and for one that cannot be read."""
    if path.suffix.lower() != ".dcm":
        return 1
    try:
        header = _pydicom().dcmread(path, stop_before_pixels=True, specific_tags=["NumberOfFrames"])
        return max(1, int(header.get("NumberOfFrames") or 1))
    except Exception:  # noqa: BLE001 (pydicom's, of any type; reading the image will report it)
        return 1


def _pydicom() -> ModuleType:
    """Raises: FormatError if it is not installed."""
    try:
        import pydicom  # an extra
    except ImportError as error:
        raise FormatError("is DICOM, which needs pydicom: pip install -e .[dicom]") from error
    _silence_pydicom()
    return pydicom


@cache
def _silence_pydicom() -> None:
    """What it warns of is no fault of an image, and its reasons are in its exceptions."""
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"pydicom\.")
