"""`engine/evaluation/gauges.py`: what the monitor says without labels, recomputed here image by
image and from the formulas."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import CLASSES, make_pictures, pretrain_pictures
from safetensors.torch import load_file
from test_monitor import flatten, observations
from test_parquet import write_splits

from data.images import PixelFormat, decode_image
from data.transforms import CropAndFlip, PixelNormalizer
from engine.evaluation.gauges import dead_share, effective_rank
from engine.pictures.monitor import held_out_source
from models.build import build_model, encoder_of, mae_spec
from models.masks import draw_mask
from util.rng import CROP, MASK, derive_seed, generator, seeded
from util.settings.pretrain import PretrainConfig
from util.settings.read import load_config

ALONE = ("--monitor_epochs", 1, "--monitor_images", 0, "--monitor_knn", 0)
NAMES = ("effective_rank", "dead_share")


def by_formula(features: np.ndarray) -> float:
    """Equation 1 of arXiv 2210.02885, by the eigenvalues of the Gram matrix."""
    squares = np.linalg.eigvalsh(features.T @ features).clip(0)
    values = np.sqrt(np.sort(squares)[::-1][: min(features.shape)])
    shares = values / values.sum() + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))


@pytest.mark.parametrize("shape", [(50, 8), (8, 50), (20, 20)])
def test_the_effective_rank_is_that_of_the_formula(shape):
    stream = np.random.default_rng(0)
    features = stream.normal(size=shape) * np.logspace(-1, 0, shape[1]) + 0.5
    found = effective_rank(torch.from_numpy(features))
    assert found == pytest.approx(by_formula(features), rel=1e-6)
    assert 1 < found < min(shape)
    assert effective_rank(torch.from_numpy(30 * features)) == pytest.approx(found, rel=1e-9)


def test_the_effective_rank_of_plain_matrices():
    equal = torch.linalg.qr(torch.randn(40, 6, dtype=torch.float64))[0]
    assert effective_rank(equal) == pytest.approx(6, abs=1e-4)  # all directions alike
    assert effective_rank(torch.ones(40, 6)) == pytest.approx(1, abs=1e-3)  # one direction
    assert effective_rank(equal[:, [0, 1, 2, 0, 1, 2]]) == pytest.approx(3, abs=1e-3)
    assert math.isnan(effective_rank(torch.tensor([[1.0, math.nan], [0.0, 1.0]])))


def test_a_dimension_without_spread_is_dead():
    """At any scale: the second differs by a hundredth of what counts."""
    rows = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    rows[:, 1] = 3 + 1e-4 * rows[:, 1]
    for scale in (1e-3, 1, 1e3):
        assert dead_share(scale * rows) == 25
    rows[:, 1] = 3 + 0.1 * rows[:, 2]
    assert dead_share(rows) == 0
    assert dead_share(torch.ones(5, 4)) == dead_share(torch.zeros(5, 4)) == 100


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--mask", "block", "--img_size", 32, "--norm_pix_loss", "false"),
        ("--mask", "green", "--shared_mask", "true", "--visible_weight", 0.5),
    ],
)
def test_loss_and_features_are_those_of_each_image_alone(tmp_path, data, more):
    """Cropped, flipped and masked as the training does it; the means are over single images."""
    folder = pretrain_pictures(data, tmp_path, *ALONE, "--hflip", 0.5, *more)
    cfg = load_config(PretrainConfig, "pretrain", ["--config", str(folder / "config.yaml")])
    model = build_model(mae_spec(cfg)).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    normalize = PixelNormalizer(cfg.mean, cfg.std, torch.device("cpu"))
    crop = CropAndFlip(cfg.img_size, cfg.crop_min, cfg.interpolation, cfg.hflip)
    losses, features = [], []
    for place, file in enumerate(sorted((data / "val").rglob("*.png"))):
        pixels = decode_image(file.read_bytes(), PixelFormat(cfg.in_chans))
        with seeded(derive_seed(cfg.seed, CROP, 0, place)):
            images = normalize(crop(pixels)[None])
        stream = generator(cfg.seed, MASK, 0, place)
        mask = draw_mask(cfg.mask, model.grid_size, cfg.mask_ratio, stream, cfg.mask_block)
        with torch.no_grad():
            loss = model(images, mask.ids_shuffle[None], cfg.visible_weight)
            losses.append(loss.item())
            features.append(encoder_of(model).forward_features(images)[0].double().numpy())
    last, rows = observations(folder)[-1], np.stack(features)
    assert len(losses) == 60
    assert last["held_out_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert last["effective_rank"] == pytest.approx(by_formula(rows), rel=1e-3)
    spread = rows.std(axis=0) <= 0.01 * np.sqrt((rows**2).mean())
    assert last["dead_share"] == pytest.approx(100 * spread.mean(), abs=1e-9)


def losses_of(folder: Path) -> list[dict[str, float]]:
    """The losses of each observation, by their names."""
    return [
        {name: value for name, value in record.items() if name in ("held_out_loss", "seen_loss")}
        for record in observations(folder)
    ]


@pytest.mark.parametrize("has_val", [True, False])
def test_without_labels_they_are_measured_on_what_there_is(tmp_path, has_val):
    """Images of val/, or training images, which the log and the figures call so."""
    root = make_pictures(tmp_path / "digits")
    flatten(root / "train")
    flatten(root / "val")
    images = root if has_val else root / "train"
    folder = pretrain_pictures(images, tmp_path / "run", *ALONE, "--monitor_gauges", 50)
    name, other, text = (
        ("held_out_loss", "seen_loss", "held-out loss")
        if has_val
        else ("seen_loss", "held_out_loss", "loss of fixed training images")
    )
    log = (folder / "log.txt").read_text()
    assert all({name, *NAMES} < record.keys() for record in observations(folder))
    assert not any(other in record for record in observations(folder))
    assert len(re.findall(rf"{text} [01]\.\d{{3}}", log)) == 3
    assert f"loss and features of 50 images ({'held-out' if has_val else 'training images'}" in log
    before, after = (losses_of(folder)[place][name] for place in (0, -1))
    assert after < before


def test_validation_images_are_found_where_no_labels_are_asked_for(tmp_path, data):
    """Those of a known set, of scenes, and of tables; None where there are no others."""
    pixels = {"in_chans": 1, "mean": (0.1,), "std": (0.3,)}
    count = {}
    for name in ("mnist5k", "digits_scenes"):
        source = held_out_source(PretrainConfig(dataset=name, **pixels), None)
        count[name] = None if source is None else len(source)
    assert count == {"mnist5k": 1000, "digits_scenes": 500}
    tables = write_splits(data, tmp_path / "tables")
    cfg = PretrainConfig(dataset="parquet", data_path=str(tables), **pixels)
    found = held_out_source(cfg, None)
    assert found is not None and len(found) == 60
    for path in [path for path in tables.rglob("*.parquet") if "train" not in path.name]:
        path.unlink()
    assert held_out_source(cfg, None) is None


def test_files_that_cannot_be_read_are_left_out(tmp_path):
    root = make_pictures(tmp_path / "digits")
    (root / "val" / CLASSES[1] / "050.png").write_bytes(b"")
    folder = pretrain_pictures(root, tmp_path / "run", *ALONE)
    log = (folder / "log.txt").read_text()
    assert f"gauges leave out {root / 'val' / CLASSES[1] / '050.png'}" in log
    assert "loss and features of 59 images" in log
    # none of them counts as a black image, and the others keep their crops and masks
    whole = pretrain_pictures(make_pictures(tmp_path / "whole"), tmp_path / "other", *ALONE)
    ours, theirs = (losses_of(path)[0]["held_out_loss"] for path in (folder, whole))
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.02)


def test_a_resumed_run_compares_with_the_observation_before(tmp_path, data):
    """The lines, and the figures, are those of a run in one go."""
    lines = {}
    for name, parts in (("once", [()]), ("twice", [("--stop_epoch", 1), ()])):
        for part in parts:
            pretrain_pictures(data, tmp_path / name, *ALONE, *part)
        log = (tmp_path / name / "log.txt").read_text()
        lines[name] = re.findall(r" monitor  (.*)  \(\d+\.\d s", log)
    assert len(lines["once"]) == 3 and "since the last" in lines["once"][-1]
    assert lines["once"] == lines["twice"]
    assert losses_of(tmp_path / "once") == losses_of(tmp_path / "twice")
