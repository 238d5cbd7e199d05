"""`engine/pictures/monitor.py`: it changes no bit of a run, observes when that is due, and its
figures are recomputed here."""

import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compare import assert_same_checkpoint
from PIL import Image
from runs import (
    CLASSES,
    assert_same,
    digits,
    launch,
    log_lines,
    make_pictures,
    pictures,
    pretrain_pictures,
    pretraining,
    step_losses,
)
from safetensors.torch import load_file
from test_pictures import places

import main_knn
import main_pretrain
from data.images import PixelFormat, decode_image
from data.labels import LabelledData
from data.sources import ArraySource
from data.transforms import EvalTransform, PixelNormalizer
from engine.evaluation.features import compute_features
from engine.evaluation.logistic import DECAY, fit_linear
from engine.pictures import monitor as module
from engine.pictures.drawing import CELL, enlarged, heat_over
from engine.pictures.history import drop_pictures, keep_picture, kept_pictures
from engine.pictures.monitor import Monitor, knn_data
from engine.pictures.reconstruction import reconstruct
from engine.pictures.rollout import rollout
from engine.run import saving
from engine.run.checkpoint import load_newest_checkpoint
from engine.run.job import TrainState
from models.build import build_model, encoder_of, mae_spec
from models.masks import draw_mask
from util.dist import Processes
from util.rng import MONITOR, generator, seed_libraries
from util.settings.pretrain import PretrainConfig

ON = ("--monitor_epochs", 1, "--monitor_probe")
# where only the times of observations count
FAST = ("--monitor_images", 1, "--monitor_knn", 0, "--monitor_gauges", 0)
# Six of the 60 validation images, evenly spaced: 0, 12, 24, 35, 47 and 59 in the files' order.
SHOWN = ["nought/040", "nought/052", "one/044", "one/055", "seven/047", "seven/059"]


def observations(folder: Path) -> list[dict]:
    """The monitor's records in log.jsonl."""
    return [record for record in log_lines(folder) if record.get("kind") == "monitor"]


def epoch_losses(folder: Path) -> list[float]:
    """The mean training loss of each epoch."""
    return [r["epoch_loss"] for r in log_lines(folder) if r.get("kind") == "epoch"]


def steps(folder: Path) -> list[int]:
    return [record["step"] for record in observations(folder)]


def found_keys(folder: Path) -> list[set[str]]:
    """The figures of each observation."""
    figures = {"knn_acc1", "probe_acc1", "psnr"}
    return [record.keys() & figures for record in observations(folder)]


@contextmanager
def watched(see=lambda state: None) -> Iterator[list[tuple[Monitor, object, object]]]:
    """Of each call of `observe` inside: the monitor, and what `see` returns before and after it."""
    calls, observe = [], Monitor.observe

    def watching(monitor: Monitor, state: TrainState) -> None:
        before = see(state)
        observe(monitor, state)
        calls.append((monitor, before, see(state)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "observe", watching)
        yield calls


def monitored(data: Path, folder: Path, *more: object) -> Monitor:
    """The monitor of a finished run of two epochs, with the final weights."""
    with watched() as calls:
        pretrain_pictures(data, folder, "--monitor_epochs", 1, *more)
    assert [record["epoch"] for record in observations(folder)] == [0, 1, 2]
    return calls[-1][0]


# Nothing of a run changes


def random_states() -> tuple:
    """The states of torch's, numpy's and Python's global generators."""
    _, words, place, *_ = np.random.get_state()
    return torch.get_rng_state(), words.tolist(), place, random.getstate()


def assert_same_but_settings(one: Path, other: Path):
    """Losses, final weights and states are equal, bit for bit."""
    assert step_losses(one) == step_losses(other) and len(set(step_losses(one).values())) > 10
    assert_same(load_file(one / "model.safetensors"), load_file(other / "model.safetensors"))
    assert_same_checkpoint(*map(load_newest_checkpoint, (one, other)))


@pytest.mark.parametrize(
    ("kind", "workers"),
    [("digits", 0), pytest.param("digits", 2, marks=pytest.mark.long), ("files", 2)],
)
def test_a_run_is_the_same_with_and_without(tmp_path, data, kind, workers):
    arguments = digits if kind == "digits" else partial(pretraining, data)
    more = ["--log_interval", 1, "--save_epochs", 1, "--hflip", 0.5, "--clip_grad", 0.5]
    states = []
    for name, monitoring in (("off", ()), ("on", (*ON, "--num_workers", workers))):
        seed_libraries(7)
        main_pretrain.main(arguments(tmp_path / name, *more, "--monitor_knn", 200, *monitoring))
        states.append(random_states())
    assert_same(*states)
    assert_same_but_settings(tmp_path / "on", tmp_path / "off")
    assert steps(tmp_path / "off") == []
    first, _, last = observations(tmp_path / "on")
    assert (first["epoch"], first["step"], last["epoch"]) == (0, 0, 2)
    assert last["psnr"] > first["psnr"] and last["monitor_s"] > 0


def test_an_observation_leaves_the_model_as_it_was(tmp_path, data):
    """Modes, gradients, and every tensor, by identity and by value; and the random state."""

    def see(state: TrainState) -> dict:
        model = state.model
        return {
            "modes": [part.training for part in model.modules()],
            "tensors": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
            "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
            "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            "values": {name: value.clone() for name, value in model.state_dict().items()},
            "random": random_states(),
            "grad_mode": torch.is_grad_enabled(),
        }

    with watched(see) as calls:
        pretrain_pictures(data, tmp_path, *ON)
    for _, before, after in calls:
        assert_same(before, after)
        assert all(before["modes"]) and all(before["requires_grad"]) and before["grad_mode"]
    untrained, _, trained = (before["values"] for _, before, _ in calls)
    cfg = calls[0][0].cfg
    torch.manual_seed(cfg.seed)
    assert_same(untrained, dict(build_model(mae_spec(cfg)).state_dict()))
    assert_same(trained, load_file(tmp_path / "model.safetensors"))


# When it observes


@pytest.mark.parametrize(("interval", "epochs"), [(2, [0, 2, 4, 5]), (10, [0, 5])])
def test_it_observes_first_at_the_interval_and_last(tmp_path, data, interval, epochs):
    pretrain_pictures(data, tmp_path, *FAST, "--epochs", 5, "--monitor_epochs", interval)
    assert steps(tmp_path) == [10 * epoch for epoch in epochs]
    order = [(record["step"], "monitor_s" in record) for record in log_lines(tmp_path)]
    assert order == sorted(order)  # each follows the records of its epoch


def test_a_stopped_run_goes_on_and_repeats_no_observation(tmp_path, data):
    """TensorBoard has each picture, and the folder the last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = [*FAST, "--epochs", 5, "--monitor_epochs", 2, "--tensorboard", "true"]
    pretrain_pictures(data, tmp_path, *more, "--stop_epoch", 1)
    first = observations(tmp_path)
    assert steps(tmp_path) == [0, 10]
    time.sleep(1.1)  # TensorBoard orders event files by the second in their names
    for _ in range(2):  # the second run is finished already
        pretrain_pictures(data, tmp_path, *more)
        assert steps(tmp_path) == [0, 10, 20, 40, 50] and observations(tmp_path)[:2] == first
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"images": 0, "scalars": 0})
    images = events.Reload().Images("monitor")
    assert [event.step for event in images] == [0, 10, 20, 40, 50]
    last = decode_image(images[-1].encoded_image_string, PixelFormat(3)).permute(1, 2, 0).numpy()
    assert (last == np.asarray(Image.open(tmp_path / "monitor.png"))).all()
    kept = kept_pictures(tmp_path)  # for the slider of the run's page, nearly the same pixels
    assert [*kept] == [0, 10, 20, 40, 50]
    assert np.abs(last.astype(int) - np.asarray(Image.open(kept[50]))).mean() < 8
    psnr = [record["psnr"] for record in observations(tmp_path)]
    assert [event.value for event in events.Scalars("monitor/psnr")] == pytest.approx(psnr)
    assert len({event.encoded_image_string for event in images}) == len(set(psnr)) == 5


def test_its_settings_may_change_with_a_resume(tmp_path, data):
    pretrain_pictures(data, tmp_path / "whole", "--epochs", 4)
    for more in (
        ("--stop_epoch", 1, "--monitor_epochs", 0),
        ("--stop_epoch", 2, "--monitor_epochs", 3, *FAST),
        (*ON, "--monitor_images", 0, "--monitor_knn", 40),
    ):
        pretrain_pictures(data, tmp_path / "run", "--epochs", 4, *more)
    classified = {"knn_acc1", "probe_acc1"}
    assert found_keys(tmp_path / "run") == [{"psnr"}, classified, classified]
    assert steps(tmp_path / "run") == [20, 30, 40]
    assert step_losses(tmp_path / "run") == step_losses(tmp_path / "whole")


@pytest.mark.parametrize("last_saved", [0, 10])
def test_a_run_that_died_after_an_observation_keeps_one_record_of_it(
    tmp_path, data, monkeypatch, last_saved
):
    """It dies before the checkpoint that would hold the epoch of its last observation."""
    save = saving.save_checkpoint

    def dying(*arguments: object) -> object:
        if arguments[1].step > last_saved:
            raise KeyboardInterrupt
        return save(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(saving, "save_checkpoint", dying)
        pretrain_pictures(data, tmp_path, *FAST, "--monitor_epochs", 1)
    assert steps(tmp_path)[-1] == last_saved + 10
    pretrain_pictures(data, tmp_path, *FAST, "--monitor_epochs", 1)
    assert steps(tmp_path) == [0, 10, 20]


# The k-NN and the linear layer


# At 40 pixels the evaluation's crop is 224 / 256 of the sides; smaller images are seen whole.
@pytest.mark.parametrize(
    ("more", "both"),
    [((), ("--img_size", 40)), (("--class_tokens", "0", "--decoder_class_token", "false"), ())],
)
def test_its_figures_equal_an_evaluation_of_the_same_weights(tmp_path, data, more, both):
    more = (*more, *both, "--monitor_knn", 240, "--monitor_probe", "--lr", 0.1)
    monitor, records = monitored(data, tmp_path, *more), observations(tmp_path)
    read = ["--save_path", tmp_path, "-b", 12, "--ks", 10, 20, *both]
    names = ("checkpoint-00000010.pth", "model.safetensors")
    for name, record in zip(names, records[1:], strict=True):
        arguments = [*read, "--finetune", tmp_path / name]
        (tmp_path / "features.safetensors").unlink(missing_ok=True)
        results = main_knn.main(pictures(data, tmp_path / "knn", *arguments, training=False))
        assert results["acc1"] == record["knn_acc1"] < 100, name
    saved = load_file(tmp_path / "features.safetensors")
    encoder = encoder_of(monitor.model)
    features = compute_features(monitor.cfg, monitor.run, encoder, monitor.data, None)
    assert_same(features._asdict(), saved)
    predicted = fit_linear(features.train, features.train_labels, features.val, 3)
    accuracy = 100 * int((predicted == features.val_labels).sum()) / 60
    assert records[-1]["probe_acc1"] == accuracy > 50


def test_the_knns_images_are_a_fixed_choice_of_some_classes():
    """One class for every 20 images, the same ones in training and validation."""
    labels = np.repeat(np.arange(100), 30)
    source = ArraySource("many", np.zeros((3000, 1, 1, 1), np.uint8), labels, PixelFormat(1))
    data = LabelledData(source, source, [str(label) for label in range(100)])
    choices, alone = [], Processes(0, 1, 0, 1, torch.device("cpu"))
    for seed in (0, 0, 1):
        chosen = knn_data(data, PretrainConfig(monitor_knn=200, seed=seed, data_path="x"), alone)
        sizes = np.bincount(chosen.train.labels, minlength=100)
        assert (sizes.sum(), len(chosen.val), np.unique(sizes).tolist()) == (200, 50, [0, 20])
        assert set(chosen.val.labels) == set(chosen.train.labels)
        choices.append(tuple(np.flatnonzero(sizes)))
    assert choices[0] == choices[1] != choices[2] and max(choices[0]) > 50
    everything = PretrainConfig(monitor_knn=10**6, data_path="x")
    assert len(knn_data(data, everything, alone).train) == 3000


def noisy() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels that the features do not explain: the penalty decides much of the answer."""
    stream = torch.Generator().manual_seed(0)
    scale = torch.logspace(-2, 2, 64)
    train, val = (torch.randn(count, 64, generator=stream) * scale + 3 for count in (200, 1000))
    return train, torch.randint(0, 5, (200,), generator=stream), val


def test_the_linear_layer_is_the_logistic_regression_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, labels, val = noisy()
    mean, std = train.mean(dim=0), train.std(dim=0)
    inputs, queries = (((part - mean) / std).double().numpy() for part in (train, val))
    ours = fit_linear(train, labels, val, 5).numpy()
    agree = {}
    for factor in (1, 0.5, 2):
        model = linear_model.LogisticRegression(C=1 / (factor * DECAY * 200), max_iter=5000)
        agree[factor] = (model.fit(inputs, labels.numpy()).predict(queries) == ours).mean()
    assert agree[1] >= 0.99 and agree[0.5] < 0.98 > agree[2]  # another penalty would show


def test_the_linear_layer_is_a_function_of_its_arguments():
    train, labels, val = noisy()
    before = random_states()
    found = fit_linear(train, labels, val, 5)
    assert_same(random_states(), before)
    seed_libraries(1)
    assert_same(fit_linear(train, labels, val, 5), found)
    # A constant feature has a standard deviation of 0 and changes nothing.
    for constant in (0.0, -300.0):
        wide = [torch.cat([x, torch.full((len(x), 1), constant)], dim=1) for x in (train, val)]
        assert (fit_linear(wide[0], labels, wide[1], 5) == found).double().mean() > 0.97


# The picture


SHAPES = {
    "colour": ("--in_chans", 3, "--mean", 0.1, 0.15, 0.2, "--std", 0.3, 0.35, 0.4),
    "no class token": ("--class_tokens", "0", "--decoder_class_token", "false"),
    "not square": ("--img_size", 24, 40, "--patch_size", 4, 8, "--class_tokens", 3),
    "pixels": ("--norm_pix_loss", "false", "--mask_ratio", 0.5),
    "mixed layers, low frequencies": ("--decoder_fusion", 2, "--target", "lowpass"),
}


@pytest.mark.parametrize("more", SHAPES.values(), ids=SHAPES.keys())
def test_psnr_and_attention_are_those_of_the_weights(tmp_path, data, more):
    monitor = monitored(data, tmp_path, "--monitor_images", 2, *more)
    cfg, model = monitor.cfg, build_model(mae_spec(monitor.cfg)).eval()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    normalize = PixelNormalizer(cfg.mean, cfg.std, torch.device("cpu"))
    picture = np.asarray(Image.open(tmp_path / "monitor.png"))
    psnr = []
    for row, name in enumerate((SHOWN[0], SHOWN[-1])):
        pixels = decode_image(
            (data / "val" / f"{name}.png").read_bytes(), PixelFormat(cfg.in_chans)
        )
        image = EvalTransform(cfg.img_size, 1.0)(pixels)
        mask = draw_mask("random", model.grid_size, cfg.mask_ratio, generator(0, MONITOR, row))
        psnr.append(reconstruct(model, image, mask, normalize).psnr.item())
        attentions = encoder_of(model).attention_maps(normalize(image[None]))
        heat = rollout(attentions, "mean", 0.0, cfg.class_tokens).view(model.grid_size).numpy()
        original = image.expand(3, -1, -1).permute(1, 2, 0).numpy()
        for cell in (original, heat_over(original, heat)):
            assert len(places(picture, enlarged(cell, CELL))) == 1
    last = observations(tmp_path)[-1]
    assert last["psnr"] == pytest.approx(np.mean(psnr), rel=1e-6)
    assert last["knn_acc1"] > 50  # 33.3 is chance


# What the data cannot give


def flatten(split: Path) -> Path:
    """Takes the images of a split out of their class folders, in their order."""
    for number, path in enumerate(sorted(split.rglob("*.png"))):
        path.rename(split / f"{split.name}{number:03d}.png")
    for name in CLASSES:
        (split / name).rmdir()
    return split


def shown(monitor: Monitor) -> list[str]:
    """The images, by their folder and stem."""
    return [f"{Path(name).parent.name}/{Path(name).stem}" for name in monitor.images]


def test_images_without_labels_are_shown_and_not_classified(tmp_path):
    root = make_pictures(tmp_path / "digits")
    flatten(root / "train")
    monitor = monitored(root / "train", tmp_path / "1")  # neither train/ nor val/
    assert shown(monitor) == [f"train/train{i:03d}" for i in (0, 24, 48, 71, 95, 119)]
    flatten(root / "val")
    monitor = monitored(root, tmp_path / "2")
    assert shown(monitor) == [f"val/val{i:03d}" for i in (0, 12, 24, 35, 47, 59)]
    assert found_keys(tmp_path / "1") == found_keys(tmp_path / "2") == [{"psnr"}] * 3


def test_without_validation_images_training_images_are_shown(tmp_path, caplog):
    root = make_pictures(tmp_path / "digits")
    for path in (root / "val").rglob("*.png"):
        path.unlink()
    monitor = monitored(root, tmp_path / "run", "--monitor_images", 2)
    assert shown(monitor) == ["nought/000", "seven/039"]
    assert str(root / "val") in caplog.text


@pytest.mark.parametrize("broken", ["val/seven/059.png", "train/one/007.png"])
def test_a_broken_image_ends_the_knn_and_not_the_run(tmp_path, caplog, broken):
    root = make_pictures(tmp_path / "digits")
    (root / broken).write_bytes(b"")
    monitor = monitored(root, tmp_path / "run", "--monitor_probe")
    (warning,) = (line for line in caplog.messages if "k-NN is off" in line)
    assert str(root / broken) in warning
    assert shown(monitor) == SHOWN[: 5 if broken.startswith("val") else 6]
    assert found_keys(tmp_path / "run") == [{"psnr"}] * 3


def test_each_part_can_be_off(tmp_path, data):
    monitored(data, tmp_path / "knn", "--monitor_images", 0)
    monitored(flatten(make_pictures(tmp_path / "d") / "val"), tmp_path / "images", *FAST)
    assert found_keys(tmp_path / "knn") == [{"knn_acc1"}] * 3
    assert found_keys(tmp_path / "images") == [{"psnr"}] * 3
    assert not (tmp_path / "knn" / "monitor.png").exists()
    assert "k-NN" not in (tmp_path / "images" / "log.txt").read_text()  # nobody asks for labels
    off = ["--monitor_epochs", 1, "--monitor_images", 0, "--monitor_knn", 0]
    pretrain_pictures(data, tmp_path / "gauges", *off)
    assert all("effective_rank" in record for record in observations(tmp_path / "gauges"))
    assert steps(tmp_path / "gauges") == [0, 10, 20]
    pretrain_pictures(data, tmp_path / "all", *off, "--monitor_gauges", 0)
    assert steps(tmp_path / "all") == []


def test_fewer_chosen_images_than_classes_are_no_error(tmp_path):
    """The last class is the rarest in training and the largest in validation."""
    root = make_pictures(tmp_path / "digits")
    for number in range(10):
        (root / "train" / "seven" / f"{number:03d}.png").unlink()
        (root / "val" / "one" / f"{40 + number:03d}.png").unlink()
    for wanted in (1, 4):
        folder = tmp_path / str(wanted)
        monitored(root, folder, "--monitor_probe", "--monitor_images", 0, "--monitor_knn", wanted)
        assert all(0 <= record["knn_acc1"] <= 100 for record in observations(folder))


# What it costs


def test_each_observation_says_what_it_cost(tmp_path, data, monkeypatch):
    """An observation of 10 seconds, 30 seconds after the last, is a quarter of the time since."""
    times = iter([0.0, 30.0, 40.0, 70.0, 80.0, 110.0, 120.0])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=partial(next, times)))
    pretrain_pictures(data, tmp_path, *ON, "--log_interval", 1000)
    lines = re.findall(r"epoch \d monitor .*", (tmp_path / "log.txt").read_text())
    before, losses = None, epoch_losses(tmp_path)
    for record, line, share in zip(observations(tmp_path), lines, ("", 25, 25), strict=True):
        assert record["monitor_s"] == 10
        figures = [f"{record[name]:.2f}" for name in ("knn_acc1", "probe_acc1", "psnr")]
        if before:
            figures.append(f"{losses[int(record['epoch']) - 1]:.3f}")
        figures.append(f"{record['held_out_loss']:.3f}")
        if before:
            figures.append(f"{100 * (record['held_out_loss'] / before - 1):.1f}".lstrip("-"))
        before = record["held_out_loss"]
        figures.append(f"{record['dead_share']:.1f}")
        shares = [f"{share:.1f}"] if share else []
        assert re.findall(r"\d+\.\d+", line) == [*figures, "10.0", *shares]
        assert f"effective rank {record['effective_rank']:.0f} of 32, " in line
    assert re.search(r"held-out loss 0\.\d{3} \(-\d+\.\d % since the last\)", lines[-1])


# Several processes


@pytest.mark.long
def test_two_processes_see_what_one_sees(tmp_path):
    """57 validation images: the processes have unequal shares."""
    data = make_pictures(tmp_path / "digits")
    for name in CLASSES:
        (data / "val" / name / "050.png").unlink()
    for folder, size, more in (("one", 12, ON), ("two", 6, ON), ("off", 6, ())):
        arguments = pretraining(data, tmp_path / folder, *more, "--num_workers", 0, "-b", size)
        result = launch(arguments, 12 // size)
        assert result.returncode == 0, result.stderr
    one, two = observations(tmp_path / "one"), observations(tmp_path / "two")
    assert [record["step"] for record in two] == [0, 10, 20]
    for name in ("held_out_loss", "effective_rank", "dead_share"):
        assert one[0][name] == two[0][name], name  # of the untrained model, bit for bit
    for name in ("knn_acc1", "probe_acc1"):
        assert one[0][name] == two[0][name], name
        counts = [record[name] * 57 / 100 for record in two]
        assert counts == pytest.approx([round(count) for count in counts])  # every image once
    for ours, theirs in zip(one, two, strict=True):
        assert ours["psnr"] == pytest.approx(theirs["psnr"], abs=1e-3)
        assert ours["held_out_loss"] == pytest.approx(theirs["held_out_loss"], rel=1e-5)
    assert_same_but_settings(tmp_path / "two", tmp_path / "off")


def test_pictures_past_a_step_are_dropped_but_no_files_of_others(tmp_path):
    picture = np.zeros((4, 4, 3), np.uint8)
    (tmp_path / "monitor").mkdir()
    for name in ("mine.webp", "1.webp", "99999999.txt"):
        (tmp_path / "monitor" / name).write_bytes(b"mine")
    for step in (0, 5, 500, 505):
        keep_picture(tmp_path, picture, step)
    (tmp_path / "monitor" / "00000005.webp.tmp").touch()
    drop_pictures(tmp_path, 500)
    assert [*kept_pictures(tmp_path)] == [0, 5, 500]
    found = {path.name for path in (tmp_path / "monitor").iterdir()}
    others = found - {f"{step:08d}.webp" for step in (0, 5, 500)}
    assert others == {"mine.webp", "1.webp", "99999999.txt"}
