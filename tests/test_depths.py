"""Images of more than 8 bits or other channels than grey and RGB, through the stages and tools:
TIFF of five 16-bit channels, floating-point `.npy` and DICOM, all made of real digits."""

import csv
import json
import logging
import shutil
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
from safetensors.numpy import load_file

import main_finetune
import main_knn
import main_pretrain
from data.images import PixelFormat
from data.on_device import DecodedSource
from data.packs.source import PackedSource
from data.sources import FolderSource, value_bytes
from data.transforms import PixelNormalizer
from tools import check_dataset, embed, predict, run_mae_vis, vit_explain
from util.errors import InputError

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
def test_deep_images_pretrain_resume_pack_and_fine_tune(
    folders, kind, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    flags = KINDS[kind][2]
    command = pretraining(folders[kind], tmp_path / "run", *flags, "--monitor_epochs", 1)
    found = main_pretrain.main(command)
    assert found["epoch_losses"][1] < found["epoch_losses"][0]
    assert (tmp_path / "run" / "monitor.png").stat().st_size > 1000

    command = pretraining(folders[kind], tmp_path / "cut", *flags, "--monitor_epochs", 1)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_after(patch, 8)  # of 12 steps, 6 in an epoch
        main_pretrain.main(command)
    main_pretrain.main([*command, "--num_workers", "2"])
    assert_same_run(tmp_path / "run", tmp_path / "cut")

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
        main_knn.main(pictures(path, tmp_path / path.name, *flags, *weights, *more, training=False))
        for path, more in ((folders[kind], ["--save_path", tmp_path / "kept"]), (packed, PACKED))
    ]
    assert found[0]["acc1"] == found[1]["acc1"] > 50  # 33 by chance

    # The weights record how files become pixels, so that the tools need no flags.
    images = ["--data_path", str(folders[kind]), "--split", "val", "--precision", "fp32"]
    embed.main([*map(str, weights), *images, "--output_file", str(tmp_path / "f.npz")])
    said = "pixel_range follows the weights: -0.4 0.5" in caplog.text
    assert said == (kind == "npy")
    expected = load_file(tmp_path / "kept" / "features.safetensors")["val"]
    assert np.abs(np.load(tmp_path / "f.npz")["avg"] - expected).max() < 1e-5
    tuned = ["--finetune", str(tmp_path / "tuned" / "model.safetensors"), *images]
    predict.main([*tuned, "--output_file", str(tmp_path / "p.csv")])
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    right = [row["prediction"] == Path(row["name"]).parent.name for row in rows]
    results = json.loads((tmp_path / "tuned" / "results.json").read_text())
    assert len(rows) == 18 and sum(right) == results["correct1"]


@pytest.fixture(scope="module")
def weights(folders, tmp_path_factory) -> Path:
    """Of a run on the digits with five channels."""
    folder = tmp_path_factory.mktemp("weights")
    main_pretrain.main(pretraining(folders["tiff"], folder, *WIDE, "--epochs", 1))
    return folder / "model.safetensors"


def test_deep_images_on_the_device(folders, tmp_path):
    """They are counted with 4 bytes a value, and keep what lies between whole numbers."""
    source = FolderSource(folders["npy"], FORMATS["npy"])
    decoded = DecodedSource(source, torch.device("cpu"), 1)
    assert decoded.num_bytes == 72 * 2 * 28 * 28 * 4
    assert value_bytes(source) == 4  # of which the shared memory of loader processes has to be
    assert value_bytes(FolderSource(folders["png"], PixelFormat(1))) == 1
    assert all(torch.equal(decoded.read(index), source.read(index)) for index in range(72))
    command = pretraining(folders["npy"], tmp_path / "run", *KINDS["npy"][2], "--data_on_device")
    losses = main_pretrain.main(command)["epoch_losses"]
    assert losses[1] < losses[0]


def test_files_of_8_and_of_16_bits_share_a_batch(folders, tmp_path):
    """In one folder, as float32; on the device they are refused."""
    shutil.copytree(folders["png"], tmp_path / "mixed")
    for place, path in enumerate(sorted((tmp_path / "mixed").rglob("*.png"))):
        if place % 2:
            digit = np.asarray(Image.open(path)).astype(np.uint16)
            Image.fromarray(digit * 257).save(path)
    flags = ["--num_workers", 2]
    mixed = main_pretrain.main(pretraining(tmp_path / "mixed", tmp_path / "a", *flags))
    whole = main_pretrain.main(pretraining(folders["png"], tmp_path / "b", *flags))
    assert mixed["epoch_losses"] == pytest.approx(whole["epoch_losses"], rel=0.03)
    with pytest.raises(InputError, match="images of one depth.*: give --data_on_device false"):
        main_pretrain.main(pretraining(tmp_path / "mixed", tmp_path / "c", "--data_on_device"))


def test_the_check_prints_what_deep_files_hold(folders, tmp_path):
    numbers = np.stack(
        [np.load(path) for path in sorted((folders["npy"] / "train").rglob("*.npy"))]
    )
    command = [str(folders["npy"]), "--full", "--in_chans", "2", "--workers", "1"]
    facts = check_dataset.main(command)
    assert "pixel_range LOW HIGH" in facts["verdicts"]["pretrain"]
    found, bad = facts["splits"]["train"]["values"], facts["splits"]["train"]["bad"]
    assert bad == 72
    for name, expected in {
        "min": numbers.min((0, 2, 3)),
        "max": numbers.max((0, 2, 3)),
        "1 %": np.percentile(numbers, 1, axis=(0, 2, 3)),
        "99 %": np.percentile(numbers, 99, axis=(0, 2, 3)),
    }.items():
        assert np.allclose(found[name], expected, atol=0.02), name
    facts = check_dataset.main([*command, "--pixel_range", "-0.4", "0.5"])
    assert facts["could_start"]
    of_range = facts["splits"]["train"]
    unit = np.clip((numbers + 0.4) / 0.9, 0, 1)
    scans = tmp_path / "scans"
    scans.mkdir()
    shutil.copy(get_testdata_file("CT_small.dcm", download=False), scans / "a.dcm")
    facts = check_dataset.main([str(scans), "--full", "--workers", "1"])  # it has no window
    assert "dicom_window" in facts["verdicts"]["pretrain"]
    assert facts["splits"]["all"]["values"]["max"] == [2191 - 1024] * 3
    for name in ("mean", "std"):
        expected = getattr(unit, name)(axis=(0, 2, 3))
        assert np.allclose(of_range[name], expected, atol=1e-4), name


def test_pictures_show_three_of_five_channels(folders, weights, tmp_path):
    """The first three, or those that are asked for."""
    paths = sorted(folders["tiff"].rglob("*.tif"))[:2]
    numbers = [tifffile.imread(path).astype(float) / 257 for path in paths]
    shown = {(): [0, 1, 2], (5, 3, 1): [4, 2, 0], (2,): [1, 1, 1]}
    common = ["--img_path", *paths, "--model_path", weights, "--size", "debug", "--patch_size", 4]
    decoder = ["--decoder_embed_dim", 16, "--decoder_depth", 1, "--decoder_num_heads", 2]
    common += [*decoder, "--img_size", 28, *WIDE, "--device", "cpu"]
    for chosen, places in shown.items():
        folder = tmp_path / f"pictures{len(chosen)}"
        more = ["--show_channels", *chosen] if chosen else []
        run_mae_vis.main([*map(str, [*common, *more, "--save_path", folder])])
        for path, bands in zip(paths, numbers, strict=True):
            found = next(folder.glob(f"*{path.stem}_original.png"))
            picture = np.asarray(Image.open(found)).astype(float).transpose(2, 0, 1)
            assert np.abs(picture - bands[places]).max() <= 1
    explain = ["--image_path", paths[0], "--finetune", weights, "--size", "debug"]
    explain += ["--patch_size", 4, "--img_size", 28, *WIDE, "--device", "cpu"]
    found = vit_explain.main([*map(str, [*explain, "--save_path", tmp_path / "explained"])])
    assert found["grid"].exists()


@pytest.mark.parametrize(
    "kind, flags, text",
    [
        ("tiff", ["--in_chans", 3, "--mean", 0, 0, 0, "--std", 1, 1, 1], "has 5 channels"),
        ("tiff", [*WIDE, "--channels", 1, 2, 3, 4, 6], "has 5 channels .* number 6"),
        ("npy", KINDS["npy"][2][:8], "32-bit floating-point NPY pixels, whose range"),
        ("tiff", [*WIDE, "--channels", 1, 2], "channels has 2 values and in_chans is 5"),
        ("tiff", ["--in_chans", 5], "mean has 1 values and in_chans is 5"),
        ("npy", ["--pixel_range", 3, 2], "pixel_range must be auto or per_channel, or LOW HIGH"),
        ("dicom", ["--dicom_window", 40, 0], "dicom_window must be file or full, or CENTER WIDTH"),
        ("tiff", [*WIDE, "--show_channels", 6], "show_channels must be one or three numbers"),
        ("png", ["--in_chans", 5, *WIDE[2:]], "has 1 channel .*8-bit PNG.* in_chans is 5"),
    ],
)
def test_settings_that_do_not_fit_the_files_are_refused(kind, flags, text, folders, tmp_path):
    command = pretraining(folders[kind], tmp_path / "run", *flags)
    with pytest.raises(InputError, match=text):
        main_pretrain.main(command)


def test_augmentation_by_pillow_refuses_deep_images(folders, weights, tmp_path):
    more = ["--finetune", weights, "--auto_augment", "rand-m9"]
    with pytest.raises(InputError, match="auto_augment and color_jitter"):
        main_finetune.main(pictures(folders["dicom"], tmp_path / "a", *more))
    with pytest.raises(InputError, match="an in_chans other than 1 and 3"):
        main_finetune.main(pictures(folders["tiff"], tmp_path / "b", *WIDE, *more))
    files = sorted(folders["dicom"].rglob("*.dcm"))
    lines = [
        f"{file},{place % 2},{'val' if place < 9 else 'train'}" for place, file in enumerate(files)
    ]
    (tmp_path / "table.csv").write_text("\n".join(["file,kind,split", *lines]))
    more += ["--labels", tmp_path / "table.csv", "--split_column", "split"]
    with pytest.raises(InputError, match="auto_augment and color_jitter"):
        main_finetune.main(pictures(folders["dicom"], tmp_path / "c", *more))
