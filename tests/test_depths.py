"""Images of more than 8 bits or other channels than grey and RGB, through the stages and tools:
TIFF of five 16-bit channels, floating-point `.npy` and DICOM, all made of real digits."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import tifffile
import torch
from compare import assert_same_run
from packs import PACKED, pack
from PIL import Image
from pydicom.data import get_testdata_file
from runs import Cut, cut_after, make_pictures, pictures, pretraining, step_losses

import main_finetune
import main_knn
import main_pretrain
from data.images import PixelFormat
from data.packs.source import PackedSource
from data.sources import FolderSource
from data.transforms import PixelNormalizer

FACTORS = np.array([50, 100, 150, 200, 250])  # of the five channels
SHARES = (FACTORS * 255 / 65535).tolist()  # of the range that each uses
WIDE = ["--in_chans", 5, "--mean", *[0.1307 * share for share in SHARES]]
WIDE += ["--std", *[0.3081 * share for share in SHARES]]



def as_bands(digit: np.ndarray, path: Path) -> None:
    bands = (digit[None].astype(np.uint16) * FACTORS[:, None, None]).astype(np.uint16)
    tifffile.imwrite(path, bands, photometric="minisblack", planarconfig="separate")


def as_floats(digit: np.ndarray, path: Path) -> None:
    np.save(path, np.stack([digit / 255 - 0.5, 0.5 - digit / 255]).astype(np.float32))


def as_dicom(digit: np.ndarray, path: Path) -> None:
    data = pydicom.dcmread(get_testdata_file("MR_small.dcm", download=False))
    data.Rows, data.Columns = digit.shape
    data.PixelData = (digit.astype(np.int16) * 8 + 100).tobytes()
    data.RescaleSlope, data.RescaleIntercept = 2, -200  # so that values are 0 to 4080
    data.WindowCenter, data.WindowWidth = 2040.5, 4081
    data.save_as(path)


# ending, writer, flags, and what pixels are of a digit, in [0, 1] `(C, H, W)`
KINDS: dict[str, tuple[str, Callable[[np.ndarray, Path], None], list, Callable]] = {
    "tiff": (".tif", as_bands, WIDE, lambda d: d * FACTORS[:, None, None] / 65535),
    "npy": (
        ".npy",
        as_floats,
        ["--in_chans", 2, "--mean", 0.2, 0.8, "--std", 0.3, 0.4, "--pixel_range", -0.4, 0.5],
        lambda d: np.clip(np.stack([d / 255 - 0.1, 0.9 - d / 255]) / 0.9, 0, 1),
    ),
    "dicom": (".dcm", as_dicom, [], lambda d: d[None] / 255),
}
FORMATS = {
    "tiff": PixelFormat(5),
    "npy": PixelFormat(2, pixel_range=(-0.4, 0.5)),
    "dicom": PixelFormat(1),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The digits as `train/<class>/*` and `val/<class>/*` of each kind."""
    root = make_pictures(tmp_path_factory.mktemp("digits"), train=24, val=6)
    made = {}
    for kind, (ending, write, _, _) in KINDS.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        for path in root.rglob("*.png"):
            target = (made[kind] / path.relative_to(root)).with_suffix(ending)
            target.parent.mkdir(parents=True, exist_ok=True)
            write(np.asarray(Image.open(path)), target)
    return made | {"png": root}


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_after_normalisation_equal_numpy_s(folders, kind):
    _, _, flags, expected = KINDS[kind]
    channels = FORMATS[kind].in_chans
    mean, std = np.linspace(0.1, 0.3, channels), np.linspace(0.3, 0.5, channels)
    normalize = PixelNormalizer(tuple(mean), tuple(std), torch.device("cpu"))
    png = FolderSource(folders["png"], PixelFormat(1))
    source = FolderSource(folders[kind], FORMATS[kind])
    assert len(source) == len(png) == 72
    for index in range(0, 72, 7):
        digit = png.read(index)[0].numpy().astype(float)
        wanted = (expected(digit) - mean[:, None, None]) / std[:, None, None]
        found = normalize(source.read(index)[None])[0].numpy()
        assert np.abs(found - wanted).max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_deep_images_pretrain_resume_pack_and_fine_tune(folders, kind, tmp_path, monkeypatch):
    flags = KINDS[kind][2]
    command = pretraining(folders[kind], tmp_path / "run", *flags, "--monitor_epochs", 1)
    found = main_pretrain.main(command)
    assert found["epoch_losses"][1] < found["epoch_losses"][0]
    assert (tmp_path / "run" / "monitor.png").stat().st_size > 1000

    def again(name: str, *more) -> list[str]:
        return pretraining(folders[kind], tmp_path / name, *flags, "--monitor_epochs", 1, *more)

    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_after(patch, 8)  # of 12 steps, 6 in an epoch
        main_pretrain.main(again("cut"))
    main_pretrain.main(again("cut"))
    assert_same_run(tmp_path / "run", tmp_path / "cut")
    main_pretrain.main(again("workers", "--num_workers", 2))
    assert_same_run(tmp_path / "run", tmp_path / "workers")

    packed = pack(folders[kind], tmp_path / "packed", "--side", 256)
    source = PackedSource(packed / "train", FORMATS[kind])
    kept = sorted(source.read_bytes(index) for index in range(len(source)))
    assert kept == sorted(path.read_bytes() for path in (folders[kind] / "train").rglob("*.*"))
    weights = ["--finetune", tmp_path / "run" / "model.safetensors"]
    more = ["--dataset", "packed", "--lr", 1e-2, *weights]
    main_finetune.main(pictures(packed, tmp_path / "tuned", *flags, *more))
    losses = list(map(float.fromhex, step_losses(tmp_path / "tuned").values()))
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    found = [
        main_knn.main(
            pictures(path, tmp_path / f"knn{place}", *flags, *weights, *more, training=False)
        )
        for place, (path, more) in enumerate([(folders[kind], ()), (packed, PACKED)])
    ]
    assert found[0]["acc1"] == found[1]["acc1"] > 50  # 33 by chance
