"""`tools/run_mae_vis.py`: the pictures it writes, the images it takes, and one line for what it
cannot do."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from runs import command, run
from safetensors.torch import load_file
from test_images import shown
from test_pictures import places
from test_rollout import saved

from data.known_sets import read_mnist5k
from data.transforms import EvalTransform, PixelNormalizer
from engine.pictures.drawing import CELL, enlarged, to_picture
from engine.pictures.reconstruction import COLUMNS, reconstruct
from models.build import build_model, mae_spec
from models.masks import draw_mask
from tools import run_mae_vis
from util.errors import InputError
from util.rng import MASK, generator, seed_libraries
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


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """An autoencoder of RGB images of 32 x 32 and 4 x 4 patches, with a normalised target."""
    folder = tmp_path_factory.mktemp("weights")
    return saved(folder / "mae.safetensors", PretrainConfig(**SMALL))


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


def fitted_file(path: Path) -> np.ndarray:
    """What a model is shown of a file: int `(H, W, 3)`."""
    with Image.open(path) as image:
        pixels = torch.from_numpy(shown(image, 3).astype(np.uint8))
    return EvalTransform(SIZE, 1.0)(pixels).permute(1, 2, 0).numpy().astype(int)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pictures_of(*names: str) -> list[str]:
    return sorted(["grid.png", *(f"{name}_{column}.png" for name in names for column in COLUMNS)])


# What is written


@pytest.mark.parametrize(
    ("kind", "mask_ratio"),
    [("random", 0.75), ("block", 0.5), ("grid", 0.75), ("green", 0.75), ("blockwise", 0.5)],
)
def test_the_pictures_are_what_the_saved_model_makes_of_the_image(
    weights, tmp_path, capsys, kind, mask_ratio
):
    file, out = noise(tmp_path / "noise.png", 1), tmp_path / "out"
    more = ["--mask", kind, "--mask_ratio", mask_ratio, "--seed", 5]
    found = draw(weights, out, "--img_path", file, *more)
    assert names_in(out) == pictures_of("noise") and found["grid"] == out / "grid.png"
    cfg = PretrainConfig(**SMALL)
    model = build_model(mae_spec(cfg)).eval()
    model.load_state_dict(load_file(weights), strict=True)
    mask = draw_mask(kind, (4, 4), mask_ratio, generator(5, MASK, 0))
    normalize = PixelNormalizer(cfg.mean, cfg.std, torch.device("cpu"))
    image = torch.from_numpy(fitted_file(file)).permute(2, 0, 1).to(torch.uint8)
    expected = reconstruct(model, image, mask, normalize)
    grid = read(out / "grid.png")
    for column in COLUMNS:
        picture = read(out / f"noise_{column}.png")
        assert np.array_equal(picture, to_picture(getattr(expected, column)))
        assert len(places(grid, enlarged(picture, CELL))) == 1
    assert found["psnr"] == {"noise": expected.psnr.item()}
    printed = capsys.readouterr().out
    assert f"{100 * (1 - mask.kept / 16):.3g} %" in printed
    assert f"{expected.psnr.item():.2f} dB" in printed


def test_images_stand_side_by_side_without_the_prediction_of_visible_patches(weights, tmp_path):
    files = [noise(tmp_path / name, seed) for seed, name in enumerate(("a.png", "b.png"))]
    draw(weights, tmp_path / "out", "--img_path", *files, "--layout", "columns")
    assert names_in(tmp_path / "out") == pictures_of("a", "b")
    grid = read(tmp_path / "out" / "grid.png")
    found = {
        (name, column): places(grid, enlarged(read(tmp_path / f"out/{name}_{column}.png"), CELL))
        for name in "ab"
        for column in COLUMNS
    }
    assert found.pop(("a", "prediction")) == found.pop(("b", "prediction")) == []
    at = {key: place for key, (place,) in found.items()}  # (top, left) of each picture
    for column in ("original", "masked", "pasted"):
        assert at["a", column][0] == at["b", column][0]
        assert at["a", column][1] == at["a", "original"][1] < at["b", column][1]
    assert at["a", "original"] < at["a", "masked"] < at["a", "pasted"]


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
        seed_libraries(seed)
        draw(weights, tmp_path / "out", "--img_path", *files, "--mask", "blockwise", "--seed", 0, 1)
        contents.append({path: path.read_bytes() for path in (tmp_path / "out").iterdir()})
    assert contents[0] == contents[1] and len(contents[0]) == 17


@pytest.mark.parametrize("name", ["grid.png", "x_masked.png"])
def test_only_the_tools_own_files_are_replaced(weights, tmp_path, name):
    file, theirs = noise(tmp_path / "x.png", 0), noise(tmp_path / "out" / name, 1)
    before = theirs.read_bytes()
    with pytest.raises(InputError, match=name):
        draw(weights, theirs.parent, "--img_path", file)
    assert names_in(theirs.parent) == [name] and theirs.read_bytes() == before


# The images that it takes


def test_the_quickstarts_recipe_draws_validation_digits(tmp_path):
    cfg = load_config(PretrainConfig, "pretrain", QUICKSTART)
    path = saved(tmp_path / "a.safetensors", cfg)
    more = ["--model_path", path, "--save_path", tmp_path, "--num_images", 2, "--device", "cpu"]
    found = run_mae_vis.main([*QUICKSTART, *map(str, more)])
    assert list(found["psnr"]) == ["val_00000", "val_00999"]
    digit = read_mnist5k(train=False)[0][999, 0]
    original = read(tmp_path / "val_00999_original.png")
    assert np.array_equal(original, np.repeat(digit[:, :, None], 3, axis=2))


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
        ("--mask block --mask_block 3", "mask_block"),
        ("--seed 1 2 1", "seed"),
        ("--num_images 0", "num_images"),
        ("--model_path nowhere.safetensors", "nowhere.safetensors"),
        ("--model_path text.jpg", "text.jpg"),
        ("--model_path encoder.pth", "encoder.pth"),
        ("--model_path raw.safetensors", "norm_pix_loss"),
        ("--patch_size 8 7", "patch_size"),
        ("--img_size 64", "img_size"),
        ("--decoder_depth 2", "decoder_depth"),
        ("--decoder_fusion 2", "decoder_fusion"),
        ("--target lowpass", "target"),
        ("--in_chans 1 --mean 0.5 --std 0.5", "in_chans"),
    ],
)
def test_a_mistake_is_one_line(weights, tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    noise(tmp_path / "good.png", 0)
    (tmp_path / "text.jpg").write_text("an error page\n" * 20)
    if "raw" in arguments:
        saved(tmp_path / "raw.safetensors", PretrainConfig(**SMALL, norm_pix_loss=False))
    if "encoder" in arguments:
        tensors = load_file(weights).items()
        encoder = {n: t for n, t in tensors if not n.startswith(("decoder", "mask"))}
        torch.save({"model": encoder}, "encoder.pth")
    has_images = "--img_path" in arguments or "--data_path" in arguments
    images = [] if has_images else ["--img_path", "good.png"]
    with pytest.raises(InputError, match=named) as error:
        draw(weights, "out", *images, *arguments.split())
    assert "\n" not in str(error.value)
    assert not list(Path().rglob("*_original.png")) and not list(Path().rglob("grid.png"))


@pytest.mark.long
def test_the_command_says_one_line_and_needs_no_display(tmp_path):
    more = ["--model_path", "nowhere.safetensors", "--img_path", "nowhere.png"]
    more += ["--save_path", str(tmp_path)]
    result = run(command(*QUICKSTART, *more, script="tools/run_mae_vis.py"), DISPLAY="")
    assert result.returncode == 2 and not result.stdout and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: img_path nowhere.png")


@pytest.mark.parametrize("letter", ["a", "\u00fc"])
def test_names_as_long_as_the_system_takes(weights, tmp_path, letter):
    """Two that begin alike keep pictures of their own."""
    stem = letter * (248 // len(letter.encode()))
    for number in (1, 2):
        noise(tmp_path / "in" / f"{stem}{number}.png", number)
    more = ["--mask_ratio", 0.25, 0.123456, "--seed", 2**31 - 1, 0]
    found = draw(weights, tmp_path / "out", "--img_path", tmp_path / "in", *more)
    assert len(found["psnr"]) == 8 and len(list((tmp_path / "out").glob("*.png"))) == 8 * 4 + 1
