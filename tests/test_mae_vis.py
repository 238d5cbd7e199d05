"""`tools/run_mae_vis.py`: the pictures it writes, the images it takes, and one clear line for what
it cannot do."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from runs import command, run
from safetensors.torch import load_file, save_file
from test_images import KINDS, STORED_AS, oriented, shown
from timm.models.vision_transformer import VisionTransformer as TimmViT

from data.known_sets import read_mnist5k
from data.sources import ArraySource
from data.transforms import EvalTransform
from engine.pictures.drawing import CELL, GAP, TEXT
from engine.pictures.reconstruction import NORMALISED_TARGET, RAW_TARGET
from engine.run.checkpoint import save_weights
from engine.run.resume import run_facts
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
GREY = {"in_chans": 1, "mean": 0.5, "std": 0.5}
COLUMNS = ("original", "masked", "prediction", "pasted")
QUICKSTART = ["--config", str(ROOT / "cfgs/quickstart/pretrain.yaml")]


def save_untrained(path: Path, cfg: PretrainConfig) -> Path:
    """Weights as a finished run writes them, all of them random: with zero biases a forgotten
    tensor would not show."""
    torch.manual_seed(0)
    model = build_model(mae_spec(cfg))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    facts = run_facts(cfg, mae_spec(cfg), ArraySource("none", np.zeros((1, 1, 1, 1)), 1))
    return save_weights(path, model, facts)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """An autoencoder of RGB images of 32 x 32 and 4 x 4 patches, with a normalised target."""
    return save_untrained(
        tmp_path_factory.mktemp("weights") / "mae.safetensors", PretrainConfig(**SMALL)
    )


def flags(settings: dict[str, object]) -> list[str]:
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


def words(folder: Path | str, *more: object) -> list[str]:
    """The command line of a small autoencoder's pictures; later flags win."""
    return [*flags(SMALL), "--device", "cpu", "--save_path", str(folder), *map(str, more)]


def draw(weights: Path, folder: Path, *more: object) -> dict[str, object]:
    return run_mae_vis.main(words(folder, "--model_path", weights, *more))


def noise(path: Path, seed: int, size: tuple[int, int] = (40, 36)) -> Path:
    """A file of random pixels, of (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(
        path
    )
    return path


def read(path: Path) -> np.ndarray:
    """A picture, int `(H, W, 3)`."""
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image).astype(int)


def fitted(pixels: np.ndarray, size: int = SIZE) -> np.ndarray:
    """What a model is shown of `(C, H, W)` pixels, the whole of them: int `(H, W, 3)`."""
    image = EvalTransform(size, 1.0)(torch.from_numpy(pixels.astype(np.uint8)))
    return image.expand(3, -1, -1).permute(1, 2, 0).numpy().astype(int)


def fitted_file(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return fitted(shown(image, 3))


def grey_patches(picture: np.ndarray) -> np.ndarray:
    """Which patches of 8 x 8 are all grey, bool `(4, 4)`."""
    return (picture == 128).reshape(4, 8, 4, 8, 3).all(axis=(1, 3, 4))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pictures_of(*names: str) -> list[str]:
    return sorted(["grid.png", *(f"{name}_{column}.png" for name in names for column in COLUMNS)])


# What is written


@pytest.mark.parametrize(("kind", "mask_ratio"), [("random", 0.75), ("block", 0.5), ("grid", 0.75)])
def test_the_pictures_are_what_the_saved_model_makes_of_the_image(
    weights, tmp_path, capsys, kind, mask_ratio
):
    file = noise(tmp_path / "noise.png", 1)
    found = draw(
        weights,
        tmp_path / "out",
        "--img_path",
        file,
        "--mask",
        kind,
        "--mask_ratio",
        mask_ratio,
        "--seed",
        5,
    )
    assert names_in(tmp_path / "out") == pictures_of("noise")
    original, masked, prediction, pasted = (
        read(tmp_path / "out" / f"noise_{column}.png") for column in COLUMNS
    )
    assert np.array_equal(original, fitted_file(file))

    mask = draw_mask(kind, (4, 4), mask_ratio, generator(5, MASK, 0))
    removed = np.ones(16, dtype=bool)
    removed[mask.ids_shuffle[: mask.kept]] = False
    removed = np.kron(removed.reshape(4, 4), np.ones((8, 8))).astype(bool)[..., None]  # (H, W, 1)
    assert np.array_equal(masked, np.where(removed, 128, original))
    assert np.array_equal(pasted, np.where(removed, prediction, original))

    model = build_model(mae_spec(PretrainConfig(**SMALL))).eval()
    model.load_state_dict(load_file(weights), strict=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    unit = torch.from_numpy(original / 255).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        pred, _ = model.reconstruct((unit - mean) / std, mask.ids_shuffle[None], mask.mask_ratio)
        pixels = (
            (model.to_pixels(pred, (unit - mean) / std) * std + mean)
            .clamp(0, 1)[0]
            .permute(1, 2, 0)
            .numpy()
        )
    assert np.abs(prediction - pixels * 255).max() < 0.51
    error = ((pixels - original / 255) ** 2)[removed[..., 0]].mean()
    assert found["psnr"]["noise"] == pytest.approx(-10 * np.log10(error), abs=1e-3)

    share = f"{100 * removed.mean():.3g} % removed ({kind}, seed 5)"
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"noise  {share}  PSNR {found['psnr']['noise']:.2f} dB"
    assert printed[1:] == [f"wrote {tmp_path / 'out' / 'grid.png'} and 4 single pictures beside it"]


def test_the_grid_shows_all_the_pictures(weights, tmp_path, capsys):
    files = [
        noise(tmp_path / f"{name}.png", seed)
        for seed, name in enumerate(("cat", "$x$ 100%", "dog"))
    ]
    found = draw(weights, tmp_path / "out", "--img_path", *files)
    assert names_in(tmp_path / "out") == pictures_of("cat", "$x$ 100%", "dog")
    assert list(found["psnr"]) == ["cat", "$x$ 100%", "dog"]
    printed = capsys.readouterr().out
    for name, psnr in found["psnr"].items():
        assert f"{name}  75 % removed (random, seed 0)  PSNR {psnr:.2f} dB\n" in printed
    assert "12 single pictures" in printed
    assert found["grid"] == tmp_path / "out" / "grid.png"
    grid = read(found["grid"])
    assert 600 < grid.shape[0] < 700 and 640 < grid.shape[1] < 700
    for row, name in enumerate(found["psnr"]):
        y = TEXT + row * (TEXT + CELL + GAP) + TEXT  # below the titles and the label
        for column, title in enumerate(COLUMNS):
            x = GAP + column * (CELL + GAP)
            large = np.kron(read(tmp_path / "out" / f"{name}_{title}.png"), np.ones((5, 5, 1)))
            assert np.array_equal(grid[y : y + CELL, x : x + CELL], large), (name, title)


def test_each_image_ratio_and_seed_has_its_own_mask(weights, tmp_path):
    same = [noise(tmp_path / name, 3) for name in ("a.png", "b.png")]
    found = draw(
        weights, tmp_path / "out", "--img_path", *same, "--mask_ratio", 0.5, 0.75, "--seed", 0, 1, 2
    )
    names = [
        f"{name}_seed{seed}_{ratio}"
        for name in "ab"
        for seed in range(3)
        for ratio in ("0.5", "0.75")
    ]
    assert names_in(tmp_path / "out") == pictures_of(*names)
    assert list(found["psnr"]) == names
    assert len(set(found["psnr"].values())) == len(names)
    gaps = {name: grey_patches(read(tmp_path / "out" / f"{name}_masked.png")) for name in names}
    assert [gap.sum() for gap in gaps.values()] == [8, 12] * 6
    assert len({gap.tobytes() for gap in gaps.values()}) == len(names)

    alone = draw(
        weights, tmp_path / "alone", "--img_path", same[0], "--mask_ratio", 0.75, "--seed", 1
    )
    assert alone["psnr"] == {"a": found["psnr"]["a_seed1_0.75"]}
    for column in COLUMNS:
        path = tmp_path / "out" / f"a_seed1_0.75_{column}.png"
        assert (tmp_path / "alone" / f"a_{column}.png").read_bytes() == path.read_bytes()


def test_the_same_command_gives_the_same_files(weights, tmp_path):
    """Whatever the random state that it starts from: nothing is cropped or drawn from there."""
    files = [noise(tmp_path / "a.png", 0, (50, 70)), noise(tmp_path / "b.png", 1, (33, 32))]
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        folder = tmp_path / str(seed)
        arguments = ["--img_path", *files, "--mask", "block", "--seed", 0, 1]
        results.append(draw(weights, folder, *arguments)["psnr"])
    assert results[0] == results[1]
    assert (
        names_in(tmp_path / "1") == names_in(tmp_path / "2") and len(names_in(tmp_path / "1")) == 17
    )
    for name in names_in(tmp_path / "1"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_grid_carries_the_caption_of_the_target(tmp_path, monkeypatch, norm_pix_loss):
    captions = []
    real = run_mae_vis.draw_grid
    monkeypatch.setattr(
        run_mae_vis, "draw_grid", lambda *rest: captions.append(rest[-1]) or real(*rest)
    )
    path = save_untrained(
        tmp_path / "a.safetensors", PretrainConfig(**SMALL, norm_pix_loss=norm_pix_loss)
    )
    settings = ["--img_path", noise(tmp_path / "a.png", 0), "--norm_pix_loss", norm_pix_loss]
    draw(path, tmp_path / "out", *settings)
    assert len(captions) == 1
    assert captions[0].startswith(NORMALISED_TARGET if norm_pix_loss else RAW_TARGET)


# The images that it takes


def test_the_same_name_in_two_folders(weights, tmp_path):
    files = [
        noise(tmp_path / folder / "same.png", seed) for seed, folder in enumerate(("one", "two"))
    ]
    found = draw(weights, tmp_path / "out", "--img_path", *files)
    assert list(found["psnr"]) == ["0_same", "1_same"]
    assert names_in(tmp_path / "out") == pictures_of("0_same", "1_same")
    for place, file in enumerate(files):
        assert np.array_equal(
            read(tmp_path / "out" / f"{place}_same_original.png"), fitted_file(file)
        )


def test_a_folder_gives_evenly_spaced_images(weights, tmp_path):
    for index in range(9):
        noise(tmp_path / "images" / f"class{index % 3}" / f"{index}.png", index)
    (tmp_path / "images" / "notes.txt").write_text("no image", encoding="utf-8")
    listed = [0, 3, 6, 1, 4, 7, 2, 5, 8]  # by class
    every = draw(weights, tmp_path / "every", "--img_path", tmp_path / "images")
    assert list(every["psnr"]) == [str(index) for index in listed]
    other = noise(tmp_path / "other.png", 10)
    some = draw(
        weights, tmp_path / "some", "--img_path", tmp_path / "images", other, "--num_images", 3
    )
    assert list(some["psnr"]) == ["0", "4", "8", "other"]  # places 0, 4 and 8 of nine


def test_without_img_path_validation_images_of_the_folder_are_taken(weights, tmp_path):
    for split in ("train", "val"):
        for index in range(3):
            noise(tmp_path / "data" / split / "cat" / f"{index}.png", index + 10 * (split == "val"))
    found = draw(weights, tmp_path / "out", "--data_path", tmp_path / "data", "--num_images", 2)
    assert list(found["psnr"]) == ["val_00000", "val_00002"]
    expected = fitted_file(tmp_path / "data" / "val" / "cat" / "2.png")
    assert np.array_equal(read(tmp_path / "out" / "val_00002_original.png"), expected)
    every = draw(weights, tmp_path / "flat", "--data_path", tmp_path / "data" / "train")
    assert len(every["psnr"]) == 3


def test_the_quickstart_s_recipe_draws_validation_digits(tmp_path):
    """Its settings of training are skipped, its `mask_ratio` is taken."""
    path = save_untrained(
        tmp_path / "a.safetensors", load_config(PretrainConfig, "pretrain", QUICKSTART)
    )
    more = [
        "--model_path",
        str(path),
        "--save_path",
        str(tmp_path / "out"),
        "--num_images",
        "3",
        "--device",
        "cpu",
    ]
    found = run_mae_vis.main([*QUICKSTART, *more])
    assert list(found["psnr"]) == ["val_00000", "val_00500", "val_00999"]
    digits, _ = read_mnist5k(train=False)
    for index in (0, 500, 999):
        original, masked = (
            read(tmp_path / "out" / f"val_{index:05d}_{column}.png") for column in COLUMNS[:2]
        )
        assert np.array_equal(original, np.repeat(digits[index, 0, :, :, None], 3, axis=2))
        assert (masked == 128).sum() >= 37 * 16 * 3  # 49 patches, 12 kept


OTHER_KINDS = (
    "png RGBA",
    "png L",
    "jpeg CMYK",
    "png 16-bit L",
    "png 16-bit RGB",
    "gif",
    "gif animated",
    "tiff LZW",
)


@pytest.mark.parametrize("in_chans", [3, 1])
def test_every_kind_of_image_is_shown_as_it_is(weights, tmp_path, in_chans):
    """Whatever its ending."""
    settings = SMALL if in_chans == 3 else {**SMALL, **GREY}
    if in_chans == 1:
        cfg = PretrainConfig(**{**settings, "mean": (0.5,), "std": (0.5,)})
        weights = save_untrained(tmp_path / "grey.safetensors", cfg)
    files = [tmp_path / f"{kind}.jpg" for kind in OTHER_KINDS]
    for file, kind in zip(files, OTHER_KINDS, strict=True):
        file.write_bytes(KINDS[kind][0]())
    found = draw(weights, tmp_path / "out", "--img_path", *files, *flags(settings))
    assert list(found["psnr"]) == list(OTHER_KINDS)
    for kind in OTHER_KINDS:
        _, picture, tolerance = KINDS[kind]
        original = read(tmp_path / "out" / f"{kind}_original.png")
        difference = np.abs(original - fitted(shown(picture, in_chans)))
        assert difference.max() <= tolerance + 2, (
            kind
        )  # of grey, rounded before or after it is resized
        assert original.std() > 10, kind


def test_a_16_bit_middle_grey_stays_a_middle_grey(weights, tmp_path):
    Image.fromarray(np.full((40, 40), 32768, dtype=np.uint16)).save(tmp_path / "grey.png")
    draw(weights, tmp_path / "out", "--img_path", tmp_path / "grey.png")
    assert np.unique(read(tmp_path / "out" / "grey_original.png")).tolist() == [128]


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_turned_photograph_is_shown_upright(weights, tmp_path, orientation):
    (tmp_path / "turned.jpg").write_bytes(oriented("JPEG", orientation, STORED_AS[orientation]))
    draw(weights, tmp_path / "out", "--img_path", tmp_path / "turned.jpg")
    expected = fitted(shown(KINDS["png RGBA"][1], 3))
    assert (
        np.abs(read(tmp_path / "out" / "turned_original.png") - expected).max() <= KINDS["jpeg"][2]
    )


def test_a_large_photograph(weights, photographs, tmp_path):
    with Image.open(min(photographs.rglob("*.JPEG"))) as image:
        large = image.convert("RGB").resize((5000, 3000), Image.Resampling.BILINEAR)
    large.save(tmp_path / "large.jpg", quality=90)
    draw(weights, tmp_path / "out", "--img_path", tmp_path / "large.jpg")
    # as a whole to 53 x 32, and of that the middle
    expected = np.asarray(large.resize((53, SIZE), Image.Resampling.BICUBIC)).astype(int)[:, 10:42]
    difference = np.abs(read(tmp_path / "out" / "large_original.png") - expected)
    assert difference.mean() < 0.5 and difference.max() < 5


@pytest.mark.parametrize(("side", "marker"), [(32, 1), (64, 4), (200, 13)])
def test_the_whole_of_a_square_image_is_seen(weights, tmp_path, side, marker):
    """Red, green, blue and white corners, of a sixteenth of the side or less: a cut of 1 - 224/256
    would lose them."""
    image = np.zeros((side, side, 3), dtype=np.uint8)
    ends = (slice(0, marker), slice(side - marker, side))
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    for place, colour in enumerate(colours):
        image[ends[place // 2], ends[place % 2]] = colour
    Image.fromarray(image).save(tmp_path / "corners.png")
    draw(weights, tmp_path / "out", "--img_path", tmp_path / "corners.png")
    original = read(tmp_path / "out" / "corners_original.png")
    for place, colour in enumerate(colours):
        assert np.abs(original[-(place // 2), -(place % 2)] - colour).max() < 40, colour


def test_an_image_and_patches_that_are_not_square(tmp_path):
    shape = {**SMALL, "img_size": (24, 40), "patch_size": (6, 10)}
    path = save_untrained(tmp_path / "a.safetensors", PretrainConfig(**shape))
    more = ["--img_size", 24, 40, "--patch_size", 6, 10, "--mask_ratio", 0.5]
    (tmp_path / "a.png").write_bytes(KINDS["png RGBA"][0]())
    draw(path, tmp_path / "out", "--img_path", tmp_path / "a.png", *more)
    expected = fitted(shown(KINDS["png RGBA"][1], 3), (24, 40))
    assert np.array_equal(read(tmp_path / "out" / "a_original.png"), expected)
    assert (read(tmp_path / "out" / "a_masked.png") == 128).all(axis=-1).sum() == 8 * 60


def test_a_file_name_that_is_no_text(weights, tmp_path):
    """Names are bytes to Linux: old archives hold ones that are no UTF-8."""
    file = tmp_path / os.fsdecode(b"caf\xe9.png")
    noise(tmp_path / "a.png", 0).rename(file)
    found = draw(weights, tmp_path / "out", "--img_path", file)
    assert found["grid"].exists()
    assert np.array_equal(read(tmp_path / "out" / "caf?_original.png"), fitted_file(file))


# One clear line, and no picture


@pytest.fixture
def inputs(tmp_path, monkeypatch) -> Path:
    """Images, good and bad, in the working directory."""
    monkeypatch.chdir(tmp_path)
    noise(tmp_path / "good.png", 0)
    (tmp_path / "text.jpg").write_text("an error page\n" * 20, encoding="utf-8")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:1000])
    (tmp_path / "zero.jpg").touch()
    (tmp_path / "empty").mkdir()
    return tmp_path


def refusal(arguments: list[str], problems: int = 1) -> str:
    """What a user gets: a line for each problem, and no pictures."""
    with pytest.raises(InputError) as error:
        run_mae_vis.main(arguments)
    lines = str(error.value).splitlines()
    assert len(lines) == (1 if problems == 1 else 1 + problems), lines
    assert list(Path().rglob("*_original.png")) + list(Path().rglob("grid.png")) == []
    return str(error.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--img_path nowhere.jpg", "img_path nowhere.jpg does not exist"),
        ("--img_path good.png nowhere", "img_path nowhere does not exist"),
        ("--img_path text.jpg", "img_path text.jpg: cannot identify image file"),
        ("--img_path good.png text.jpg", "img_path text.jpg: cannot identify image file"),
        ("--img_path cut.png", "img_path cut.png: cannot be decoded"),
        ("--img_path zero.jpg", "img_path zero.jpg: the file is empty"),
        (
            f"--img_path {'a' * 300}.jpg",
            f"img_path {'a' * 300}.jpg ",
        ),  # the system refuses even to look
        ("--img_path empty", "no images under empty"),
        ("--data_path nowhere", "data_path nowhere does not exist"),
        ("--save_path good.png", "save_path good.png cannot be written: File exists"),
        ("--save_path good.png/out", "save_path good.png/out cannot be written: Not a directory"),
        ("--mask_ratio 0", "command line: mask_ratio: expected > 0, < 1, got 0"),
        ("--mask_ratio 1", "command line: mask_ratio: expected > 0, < 1, got 1"),
        ("--mask_ratio 1.5", "command line: mask_ratio: expected > 0, < 1, got 1.5"),
        ("--mask_ratio 0.5 1.5", "command line: mask_ratio: expected > 0, < 1, got 1.5"),
        ("--mask_ratio abc", "command line: mask_ratio: expected a list of numbers, got 'abc'"),
        ("--mask_ratio 0.75 0.99", "mask_ratio 0.99 keeps 0 of 16 patches"),
        ("--mask_ratio 0.5 0.5", "mask_ratio names a number twice: 0.5 0.5"),
        (
            "--mask_ratio 0.75 0.7500001",
            "mask_ratio names a number twice: 0.75 0.75",
        ),  # files of the same name
        ("--seed 1 2 1", "seed names a number twice: 1 2 1"),
        ("--seed -1", "command line: seed: expected >= 0, <= 2147483647, got -1"),
        ("--num_images 0", "command line: num_images: expected >= 1, got 0"),
        (
            "--mask blok",
            "command line: mask: expected one of random, block, grid, got 'blok', did you mean 'block'?",
        ),
        (
            "--mask grid --mask_ratio 0.6",
            "mask grid keeps one patch of every 4, 9 or 16: mask_ratio 0.75, 0.89, 0.94",
        ),
        (
            "--mask grid --mask_ratio 0.75 0.6",
            "mask grid keeps one patch of every 4, 9 or 16: mask_ratio 0.75, 0.89",
        ),
        (
            "--mask_raito 0.5",
            "command line: unknown setting 'mask_raito', did you mean 'mask_ratio'?",
        ),
        (
            "--image_path good.png",
            "command line: unknown setting 'image_path', did you mean 'img_path'?",
        ),
        ("--model_path nowhere.safetensors", "nowhere.safetensors: there is no such file"),
        ("--model_path text.jpg", "text.jpg: "),
        ("--patch_size 8 7", "patch_size 7 does not divide the image width 32"),
    ],
)
def test_a_mistake_is_one_line(weights, inputs, arguments, said):
    given = arguments.split()
    images = [] if "--img_path" in given or "--data_path" in given else ["--img_path", "good.png"]
    assert said in refusal(words("out", "--model_path", weights, *images, *given))


def test_a_bad_validation_image_is_named(weights, inputs):
    noise(inputs / "data" / "val" / "good.png", 0)
    (inputs / "text.jpg").rename(inputs / "data" / "val" / "text.jpg")
    message = refusal(words("out", "--model_path", weights, "--data_path", "data"))
    assert "data/val/text.jpg" in message and "cannot identify image file" in message


@pytest.mark.parametrize(
    ("settings", "sides"),
    [
        (
            {"size": "tiny"},
            ["embed_dim 32 in the file, 192 in the settings", "depth 2 in the file, 12 in"],
        ),
        ({"embed_dim": 64}, ["embed_dim 32 in the file, 64 in the settings"]),
        ({"img_size": 64}, ["img_size 32x32 in the file, 64x64 in the settings"]),
        ({"patch_size": 4}, ["patch_size 8x8 in the file, 4x4 in the settings"]),
        ({"decoder_embed_dim": 32}, ["decoder_embed_dim 16 in the file, 32 in the settings"]),
        ({"decoder_depth": 2}, ["decoder_depth 1 in the file, 2 in the settings"]),
        (
            {"decoder_class_token": "false"},
            ["decoder_class_token true in the file, false in the settings"],
        ),
        (GREY, ["in_chans 3 in the file, 1 in the settings"]),
        ({"norm_pix_loss": "false"}, ["norm_pix_loss is false in the settings and true in "]),
    ],
)
def test_settings_that_are_not_the_weights_name_both_sides(weights, inputs, settings, sides):
    message = refusal(
        words("out", "--model_path", weights, "--img_path", "good.png", *flags(settings))
    )
    assert str(weights) in message
    for side in sides:
        assert side in message


def test_a_normalised_target_is_not_taken_for_weights_of_a_raw_one(inputs):
    path = save_untrained(inputs / "raw.safetensors", PretrainConfig(**SMALL, norm_pix_loss=False))
    message = refusal(words("out", "--model_path", path, "--img_path", "good.png"))
    assert message == f"norm_pix_loss is true in the settings and false in {path}"


@pytest.mark.parametrize("kind", ["MAE", "timm"])
def test_weights_without_a_decoder_are_refused_and_not_filled_up(weights, inputs, kind):
    if kind == "MAE":
        encoder = {
            n: t for n, t in load_file(weights).items() if not n.startswith(("decoder", "mask"))
        }
        torch.save({"model": encoder}, "encoder.pth")
    else:
        timm_vit = TimmViT(
            img_size=SIZE, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3
        )
        save_file(timm_vit.state_dict(), "encoder.pth")
    message = refusal(words("out", "--model_path", "encoder.pth", "--img_path", "good.png"))
    assert "it holds no decoder: take a file of the whole autoencoder" in message
    assert message.startswith("encoder.pth (")


def test_all_that_is_missing_is_said_in_one_go(inputs):
    message = refusal(words("out"), problems=2)
    assert "model_path is needed: give --model_path PATH" in message
    assert "img_path is needed: give --img_path PATH" in message


def test_the_command_line_says_one_line_and_needs_no_display(inputs, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    more = [
        "--model_path",
        "nowhere.safetensors",
        "--img_path",
        str(inputs / "text.jpg"),
        "--save_path",
    ]
    result = run(command(*QUICKSTART, *more, str(inputs / "out"), script="tools/run_mae_vis.py"))
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert (
        len(errors) == 1
        and f"img_path {inputs / 'text.jpg'}: cannot identify image file" in errors[0]
    )
    assert result.stderr.splitlines()[-1] == errors[0]
    assert "Traceback" not in result.stderr and not result.stdout
    assert not list(inputs.rglob("*_original.png"))
