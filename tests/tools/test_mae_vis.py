"""`tools/run_mae_vis.py`: the pictures it writes, the images it takes, and one line for what it
cannot do."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import identity
from conftest import ROOT
from PIL import Image
from runs import command, run
from safetensors.torch import load_file
from test_images import shown

from data.known_sets import read_mnist5k
from data.transforms import EvalTransform
from engine.pictures.drawing import CELL, enlarged
from engine.pictures.reconstruction import COLUMNS
from engine.run.checkpoint import save_weights
from models.build import build_model, mae_spec
from models.masks import draw_mask
from tools import run_mae_vis
from util.errors import InputError
from util.rng import MASK, generator
from util.settings.base import IMAGENET_MEAN, IMAGENET_STD
from util.settings.pretrain import PretrainConfig
from util.settings.read import load_config

SIZE = 32
SMALL = {
    "size": "debug",
    "img_size": SIZE,
    "patch_size": 8,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
QUICKSTART = ["--config", str(ROOT / "cfgs/quickstart/pretrain.yaml")]


def save_untrained(path: Path, cfg: PretrainConfig) -> Path:
    """Weights as a finished run writes them, all of them random: with biases of zero a forgotten
    tensor would not show."""
    torch.manual_seed(0)
    model = build_model(mae_spec(cfg))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    of_run = identity(model_args=model.spec.as_dict(), mean=cfg.mean, std=cfg.std)
    return save_weights(path, model, of_run, norm_pix_loss=cfg.norm_pix_loss)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """An autoencoder of RGB images of 32 x 32 and 4 x 4 patches, with a normalised target."""
    folder = tmp_path_factory.mktemp("weights")
    return save_untrained(folder / "mae.safetensors", PretrainConfig(**SMALL))


def draw(weights: Path, folder: Path | str, *more: object) -> dict[str, object]:
    """Runs the tool for a small autoencoder; later flags win."""
    words = [word for name, value in SMALL.items() for word in (f"--{name}", value)]
    words += ["--device", "cpu", "--save_path", folder, "--model_path", weights, *more]
    return run_mae_vis.main([str(word) for word in words])


def noise(path: Path, seed: int, size: tuple[int, int] = (40, 36)) -> Path:
    """A file of random pixels, of (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def read(path: Path) -> np.ndarray:
    """A picture, int `(H, W, 3)`."""
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image).astype(int)


def fitted(pixels: np.ndarray, size: int | tuple[int, int] = SIZE) -> np.ndarray:
    """What a model is shown of `(C, H, W)` pixels: int `(H, W, 3)`."""
    image = EvalTransform(size, 1.0)(torch.from_numpy(pixels.astype(np.uint8)))
    return image.expand(3, -1, -1).permute(1, 2, 0).numpy().astype(int)


def fitted_file(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return fitted(shown(image, 3))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pictures_of(*names: str) -> list[str]:
    return sorted(["grid.png", *(f"{name}_{column}.png" for name in names for column in COLUMNS)])


# What is written


@pytest.mark.parametrize(("kind", "mask_ratio"), [("random", 0.75), ("block", 0.5), ("grid", 0.75)])
def test_the_pictures_are_what_the_saved_model_makes_of_the_image(
    weights, tmp_path, capsys, kind, mask_ratio
):
    file, out = noise(tmp_path / "noise.png", 1), tmp_path / "out"
    more = ["--mask", kind, "--mask_ratio", mask_ratio, "--seed", 5]
    found = draw(weights, out, "--img_path", file, *more)
    assert names_in(out) == pictures_of("noise") and found["grid"] == out / "grid.png"
    pictures = [read(out / f"noise_{column}.png") for column in COLUMNS]
    original, masked, prediction, pasted = pictures
    assert np.array_equal(original, fitted_file(file))
    grid = read(out / "grid.png").astype(np.uint8)
    for picture in pictures:  # each stands in the grid
        cell = enlarged(picture.astype(np.uint8), CELL)
        windows = np.lib.stride_tricks.sliding_window_view(grid, cell.shape)[::1, ::1, 0]
        corner = (windows[:, :, 0, 0] == cell[0, 0]).all(axis=-1)
        assert any((windows[y, x] == cell).all() for y, x in np.argwhere(corner))

    mask = draw_mask(kind, (4, 4), mask_ratio, generator(5, MASK, 0))
    removed = np.ones(16, dtype=bool)
    removed[mask.ids_shuffle[: mask.kept]] = False
    removed = np.kron(removed.reshape(4, 4), np.ones((8, 8))).astype(bool)[..., None]  # (H, W, 1)
    assert np.array_equal(masked, np.where(removed, 128, original))
    assert np.array_equal(pasted, np.where(removed, prediction, original))

    model = build_model(mae_spec(PretrainConfig(**SMALL))).eval()
    model.load_state_dict(load_file(weights), strict=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    images = (torch.from_numpy(original / 255).permute(2, 0, 1)[None].float() - mean) / std
    with torch.no_grad():
        pred, _ = model.reconstruct(images, mask.ids_shuffle[None], mask.kept)
        pixels = (model.to_pixels(pred, images) * std + mean).clamp(0, 1)[0]
    pixels = pixels.permute(1, 2, 0).numpy()
    assert np.abs(prediction - pixels * 255).max() < 0.51
    error = ((pixels - original / 255) ** 2)[removed[..., 0]].mean()
    assert found["psnr"]["noise"] == pytest.approx(-10 * np.log10(error), abs=1e-3)
    printed = capsys.readouterr().out
    assert f"{100 * removed.mean():.3g} %" in printed
    assert f"{found['psnr']['noise']:.2f} dB" in printed


def test_each_image_ratio_and_seed_has_its_own_mask(weights, tmp_path):
    same = [noise(tmp_path / name, 3) for name in ("a.png", "b.png")]
    more = ["--mask_ratio", 0.5, 0.75, "--seed", 0, 1, 2]
    found = draw(weights, tmp_path / "out", "--img_path", *same, *more)
    names = [f"{n}_seed{s}_{r}" for n in "ab" for s in range(3) for r in ("0.5", "0.75")]
    assert names_in(tmp_path / "out") == pictures_of(*names)
    assert list(found["psnr"]) == names and len(set(found["psnr"].values())) == len(names)
    gaps = [
        (read(tmp_path / "out" / f"{name}_masked.png") == 128)
        .reshape(4, 8, 4, 8, 3)
        .all(axis=(1, 3, 4))
        for name in names
    ]
    assert [gap.sum() for gap in gaps] == [8, 12] * 6
    assert len({gap.tobytes() for gap in gaps}) == len(names)
    alone = draw(weights, tmp_path / "alone", "--img_path", same[0], "--seed", 1)
    assert alone["psnr"] == {"a": found["psnr"]["a_seed1_0.75"]}


def test_the_same_command_writes_the_same_files(weights, tmp_path):
    """Whatever the random state that it starts from."""
    files = [noise(tmp_path / "a.png", 0, (50, 70)), noise(tmp_path / "b.png", 1, (33, 32))]
    contents = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        draw(weights, tmp_path / "out", "--img_path", *files, "--mask", "block", "--seed", 0, 1)
        contents.append({path: path.read_bytes() for path in (tmp_path / "out").iterdir()})
    assert contents[0] == contents[1] and len(contents[0]) == 17


def test_only_the_tools_own_files_are_replaced(weights, tmp_path):
    file = noise(tmp_path / "x.png", 0)
    for name in ("grid.png", "x_masked.png"):
        folder = tmp_path / name
        theirs = noise(folder / name, 1).read_bytes()
        with pytest.raises(InputError, match=name):
            draw(weights, folder, "--img_path", file)
        assert names_in(folder) == [name] and (folder / name).read_bytes() == theirs


# The images that it takes


def test_the_quickstarts_recipe_draws_validation_digits(tmp_path):
    cfg = load_config(PretrainConfig, "pretrain", QUICKSTART)
    path = save_untrained(tmp_path / "a.safetensors", cfg)
    more = ["--model_path", path, "--save_path", tmp_path, "--num_images", 2, "--device", "cpu"]
    found = run_mae_vis.main([*QUICKSTART, *map(str, more)])
    assert list(found["psnr"]) == ["val_00000", "val_00999"]
    digit = read_mnist5k(train=False)[0][999, 0]
    original = read(tmp_path / "val_00999_original.png")
    assert np.array_equal(original, np.repeat(digit[:, :, None], 3, axis=2))


def test_the_whole_of_a_square_image_is_seen(weights, tmp_path):
    """A crop to 224 / 256 of the sides, as for evaluation, would lose the white border."""
    image = np.full((200, 200, 3), 255, dtype=np.uint8)
    image[8:-8, 8:-8] = 0
    Image.fromarray(image).save(tmp_path / "border.png")
    draw(weights, tmp_path, "--img_path", tmp_path / "border.png")
    original = read(tmp_path / "border_original.png")
    for edge in (original[0], original[-1], original[:, 0], original[:, -1]):
        assert edge.min() > 200


def test_an_image_and_patches_that_are_not_square(tmp_path):
    cfg = PretrainConfig(**{**SMALL, "img_size": (24, 40), "patch_size": (6, 10)})
    path = save_untrained(tmp_path / "a.safetensors", cfg)
    more = ["--img_size", 24, 40, "--patch_size", 6, 10, "--mask_ratio", 0.5]
    file = noise(tmp_path / "a.png", 0)
    draw(path, tmp_path / "out", "--img_path", file, *more)
    with Image.open(file) as image:
        expected = fitted(shown(image, 3), (24, 40))
    assert np.array_equal(read(tmp_path / "out" / "a_original.png"), expected)
    assert (read(tmp_path / "out" / "a_masked.png") == 128).all(axis=-1).sum() == 8 * 60


def test_a_file_name_that_is_no_text(weights, tmp_path):
    folder = tmp_path / "images"
    file = noise(folder / "a.png", 0).rename(folder / os.fsdecode(b"caf\xe9.png"))
    draw(weights, tmp_path / "out", "--img_path", folder)
    assert np.array_equal(read(tmp_path / "out" / "caf?_original.png"), fitted_file(file))


# One line, and no picture


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--img_path nowhere.jpg", "img_path nowhere.jpg"),
        ("--img_path good.png text.jpg", "img_path text.jpg"),
        (f"--img_path {'a' * 300}.jpg", "img_path aaa"),  # the system refuses even to look
        ("--data_path nowhere", "data_path nowhere"),
        ("--save_path good.png/out", "save_path good.png/out"),
        ("--mask_ratio 0.5 1", "mask_ratio"),
        ("--mask_ratio 0.75 0.99", "mask_ratio"),  # keeps no patch of 16
        ("--mask_ratio 0.75 0.7500001", "mask_ratio"),  # files of the same name
        ("--mask grid --mask_ratio 0.75 0.6", "mask_ratio"),
        ("--mask blok", "mask"),
        ("--seed 1 2 1", "seed"),
        ("--num_images 0", "num_images"),
        ("--model_path nowhere.safetensors", "nowhere.safetensors"),
        ("--model_path text.jpg", "text.jpg"),
        ("--model_path encoder.pth", "encoder.pth"),
        ("--model_path raw.safetensors", "norm_pix_loss"),
        ("--patch_size 8 7", "patch_size 7"),
        ("--img_size 64", "img_size"),
        ("--decoder_depth 2", "decoder_depth"),
        ("--in_chans 1 --mean 0.5 --std 0.5", "in_chans"),
    ],
)
def test_a_mistake_is_one_line(weights, tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    noise(tmp_path / "good.png", 0)
    (tmp_path / "text.jpg").write_text("an error page\n" * 20)
    if "raw" in arguments:
        save_untrained(tmp_path / "raw.safetensors", PretrainConfig(**SMALL, norm_pix_loss=False))
    if "encoder" in arguments:
        tensors = load_file(weights).items()
        encoder = {n: t for n, t in tensors if not n.startswith(("decoder", "mask"))}
        torch.save({"model": encoder}, "encoder.pth")
    images = [] if "_path" in arguments and "img" in arguments else ["--img_path", "good.png"]
    images = [] if "--data_path" in arguments else images
    with pytest.raises(InputError, match=named) as error:
        draw(weights, "out", *images, *arguments.split())
    assert "\n" not in str(error.value)
    assert not list(Path().rglob("*_original.png")) and not list(Path().rglob("grid.png"))


def test_all_that_is_missing_is_said_in_one_go():
    with pytest.raises(InputError, match=r"(?s)model_path.*img_path"):
        run_mae_vis.main([])


def test_the_command_says_one_line_and_needs_no_display(tmp_path):
    more = ["--model_path", "nowhere.safetensors", "--img_path", "nowhere.png"]
    more += ["--save_path", str(tmp_path)]
    result = run(command(*QUICKSTART, *more, script="tools/run_mae_vis.py"), DISPLAY="")
    assert result.returncode == 2 and not result.stdout and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: img_path nowhere.png")
