"""`engine/pictures/monitor.py`: it changes no bit of a run, observes when that is due, and its
figures are recomputed here."""

import logging
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import (
    CLASSES,
    PICTURE_STEPS,
    STEPS_PER_EPOCH,
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
from torch import nn

import main_knn
import main_pretrain
from data.images import decode_image
from data.labels import LabelledData
from data.sources import ArraySource
from data.transforms import EvalTransform, PixelNormalizer
from engine.evaluation.logistic import DECAY, fit_linear
from engine.pictures import monitor as module
from engine.pictures.drawing import CELL, enlarged, heat_over
from engine.pictures.monitor import Monitor
from engine.pictures.monitor_data import knn_data
from engine.pictures.reconstruction import reconstruct
from engine.pictures.rollout import rollout
from engine.run import saving
from engine.run.job import TrainState
from models.build import build_model, encoder_of, mae_spec
from models.masks import draw_mask
from util.errors import InputError
from util.rng import MONITOR, generator, seed_libraries
from util.settings.pretrain import PretrainConfig

ON = ("--monitor_epochs", 1, "--monitor_probe")
FAST = ("--monitor_images", 1, "--monitor_knn", 0)  # where only the times of observations count
# Six of the 60 validation images, evenly spaced: 0, 12, 24, 35, 47 and 59 in the files' order.
SHOWN = [
    *("nought/040.png", "nought/052.png", "one/044.png"),
    *("one/055.png", "seven/047.png", "seven/059.png"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def observations(folder: Path) -> list[dict[str, Any]]:
    """The monitor's records in log.jsonl."""
    return [record for record in log_lines(folder) if record.get("kind") == "monitor"]


def steps(folder: Path) -> list[int]:
    return [record["step"] for record in observations(folder)]


def found_keys(folder: Path) -> list[set[str]]:
    """The figures of each observation."""
    figures = {"knn_acc1", "probe_acc1", "psnr"}
    return [record.keys() & figures for record in observations(folder)]


@contextmanager
def watched(see=lambda monitor, state: None) -> Iterator[list[tuple[Monitor, Any, Any]]]:
    """Of each call of `observe` inside: the monitor, and what `see` returns before and after it."""
    calls = []
    observe = Monitor.observe

    def watching(monitor: Monitor, state: TrainState) -> None:
        before = see(monitor, state)
        observe(monitor, state)
        calls.append((monitor, before, see(monitor, state)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "observe", watching)
        yield calls


def monitored(data: Path, folder: Path, *more: Any) -> Monitor:
    """The monitor of a finished run of two epochs, with the final weights."""
    with watched() as calls:
        pretrain_pictures(data, folder, "--monitor_epochs", 1, *more)
    assert [record["epoch"] for record in observations(folder)] == [0, 1, 2]
    assert (folder / "model.safetensors").exists()
    return calls[-1][0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data) -> tuple[Path, Monitor]:
    """A run with all that a monitor does."""
    folder = tmp_path_factory.mktemp("finished")
    more = ["--lr", 0.1, "--monitor_probe", "--monitor_knn", 1000, "--tensorboard", "true"]
    return folder, monitored(data, folder, *more)


def events_of(folder: Path) -> Any:
    """A run's TensorBoard files, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


# Nothing of a run changes


def random_states() -> tuple:
    """The states of torch's, numpy's and Python's global generators."""
    _, words, place, *_ = np.random.get_state()
    return torch.get_rng_state(), words.tolist(), place, random.getstate()


def assert_same_but_settings(one: Path, other: Path):
    """Losses, final weights and checkpoints are equal, bit for bit."""
    assert step_losses(one) == step_losses(other) and len(set(step_losses(one).values())) > 10
    assert_same(load_file(one / "model.safetensors"), load_file(other / "model.safetensors"))
    names = sorted(path.name for path in one.glob("checkpoint-*.pth"))
    assert len(names) == 2
    for name in names:
        ours, theirs = (torch.load(f / name, weights_only=True) for f in (one, other))
        del ours["config"], theirs["config"]
        assert_same(ours, theirs, name)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_on_the_digits_is_the_same_with_and_without(tmp_path, workers):
    states = []
    for name, more in (("off", ()), ("on", (*ON, "--monitor_knn", 200, "--num_workers", workers))):
        seed_libraries(7)
        fast = ("--log_interval", 1, "--save_epochs", 1)
        main_pretrain.main(digits(tmp_path / name, *fast, *more))
        states.append(random_states())
    assert_same(*states)
    assert_same_but_settings(tmp_path / "on", tmp_path / "off")
    assert steps(tmp_path / "off") == []
    assert steps(tmp_path / "on") == [0, STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH]
    first, _, last = observations(tmp_path / "on")
    assert first["epoch"] == 0 and last["epoch"] == 2 and last["psnr"] > first["psnr"] + 0.5
    assert 10 < last["knn_acc1"] < 100 and 10 < last["probe_acc1"] < 100 and last["monitor_s"] > 0
    assert last["knn_acc1"] % 2 == 0  # of 50 validation images


def test_a_run_on_files_is_the_same_with_and_without(tmp_path, data):
    states = []
    for name, epochs in (("off", 0), ("on", 1)):
        seed_libraries(7)
        more = ["--num_workers", 2, "--monitor_probe", "--hflip", 0.5, "--clip_grad", 0.5]
        pretrain_pictures(data, tmp_path / name, "--monitor_epochs", epochs, *more)
        states.append(random_states())
    assert_same(*states)
    assert_same_but_settings(tmp_path / "on", tmp_path / "off")
    assert len(steps(tmp_path / "on")) == 3


def test_an_observation_leaves_the_model_as_it_was(tmp_path, data):
    """Modes, gradients, and every tensor, by identity and by value; and the random state."""

    def see(monitor: Monitor, state: TrainState) -> dict[str, Any]:
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
    assert len(calls) == 3
    for _, before, after in calls:
        assert_same(before, after)
        assert all(before["modes"]) and all(before["requires_grad"]) and before["grad_mode"]
    cfg = calls[0][0].cfg
    torch.manual_seed(cfg.seed)  # the first observation is of the untrained model
    assert_same(calls[0][1]["values"], dict(build_model(mae_spec(cfg)).state_dict()))
    assert_same(calls[2][1]["values"], load_file(tmp_path / "model.safetensors"))


# When it observes


@pytest.mark.parametrize(("interval", "epochs"), [(2, [0, 2, 4, 5]), (10, [0, 5])])
def test_it_observes_first_at_the_interval_and_last(tmp_path, data, interval, epochs):
    pretrain_pictures(data, tmp_path, *FAST, "--epochs", 5, "--monitor_epochs", interval)
    assert steps(tmp_path) == [PICTURE_STEPS * epoch for epoch in epochs]
    order = [(record["step"], "monitor_s" in record) for record in log_lines(tmp_path)]
    assert order == sorted(order)  # each follows the records of its epoch


def test_a_stopped_run_goes_on_and_repeats_no_observation(tmp_path, data):
    more = [*FAST, "--epochs", 5, "--monitor_epochs", 2, "--tensorboard", "true"]
    pretrain_pictures(data, tmp_path, *more, "--stop_epoch", 1)
    first = observations(tmp_path)
    assert steps(tmp_path) == [0, 10]
    time.sleep(1.1)  # TensorBoard orders event files by the second in their names
    for _ in range(2):  # the second run is finished already
        pretrain_pictures(data, tmp_path, *more)
        assert steps(tmp_path) == [0, 10, 20, 40, 50] and observations(tmp_path)[:2] == first
    images = events_of(tmp_path).Images("monitor")
    assert [event.step for event in images] == [0, 10, 20, 40, 50]


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

    def dying(*arguments: Any) -> Any:
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


def test_its_knn_equals_the_evaluation_of_the_same_weights(tmp_path, data, finished):
    folder, _ = finished
    accuracies = [record["knn_acc1"] for record in observations(folder)]
    assert len(set(accuracies)) > 1 and max(accuracies) < 100  # no equality by chance
    for name, accuracy in zip(
        ("checkpoint-00000010.pth", "model.safetensors"), accuracies[1:], strict=True
    ):
        more = ["--finetune", folder / name, "--global_pool", "avg", "--ks", 10, 20]
        results = main_knn.main(pictures(data, tmp_path, *more, training=False))
        assert (results["num_train"], results["num_samples"]) == (120, 60)
        assert results["acc1"] == accuracy, name


# At 40 pixels the evaluation's crop is 224 / 256 of the sides; smaller images are seen whole.
@pytest.mark.parametrize(
    "more", [("--img_size", 40), ("--class_token", "false", "--decoder_class_token", "false")]
)
def test_its_features_equal_those_of_the_evaluation(tmp_path, data, more):
    monitor = monitored(data, tmp_path / "run", *more, "--monitor_knn", 240)
    read = ["--finetune", tmp_path / "run" / "model.safetensors", "-b", 12, "--ks", 10]
    read += ["--save_path", tmp_path, *(more if "--img_size" in more else ())]
    results = main_knn.main(pictures(data, tmp_path / "knn", *read, training=False))
    saved = load_file(tmp_path / "features.safetensors")
    encoder = encoder_of(monitor.model)
    for split, source in (("train", monitor.train), ("val", monitor.val)):
        assert_same(monitor.features(encoder, source), saved[split], split)
        assert source.labels.tolist() == saved[f"{split}_labels"].tolist()
    assert observations(tmp_path / "run")[-1]["knn_acc1"] == results["acc1"]


def test_the_knns_images_are_a_fixed_choice_of_some_classes():
    """One class for every 20 images, the same ones in training and validation."""
    labels = np.repeat(np.arange(100), 30)
    source = ArraySource("many", np.zeros((3000, 1, 1, 1), np.uint8), labels, 1)
    data = LabelledData(source, source, [str(label) for label in range(100)])
    choices = []
    for seed in (0, 0, 1):
        cfg = PretrainConfig(monitor_knn=200, seed=seed, data_path="x")
        train, val = knn_data(data, cfg)
        sizes = np.bincount(train.labels, minlength=100)
        assert (len(train), len(val), np.unique(sizes).tolist()) == (200, 50, [0, 20])
        assert set(val.labels) == set(train.labels)
        choices.append(tuple(np.unique(train.labels)))
    assert choices[0] == choices[1] != choices[2] and max(choices[0]) > 50
    assert len(knn_data(data, PretrainConfig(monitor_knn=10**6, data_path="x"))[0]) == 3000


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
    found = []
    for seed in (1, 2):
        seed_libraries(seed)
        before = random_states()
        found.append(fit_linear(train, labels, val, 5))
        assert_same(random_states(), before)
    assert_same(*found)
    # A constant feature has a standard deviation of 0 and changes nothing.
    for constant in (0.0, -300.0):
        wide = [torch.cat([x, torch.full((len(x), 1), constant)], dim=1) for x in (train, val)]
        assert (fit_linear(wide[0], labels, wide[1], 5) == found[0]).double().mean() > 0.97


def test_the_linear_layers_accuracy_is_that_of_the_features(finished):
    folder, monitor = finished
    encoder = encoder_of(monitor.model)
    train, val = (monitor.features(encoder, source) for source in (monitor.train, monitor.val))
    predicted = fit_linear(train, torch.from_numpy(monitor.train.labels), val, 3).numpy()
    accuracy = 100 * (predicted == monitor.val.labels).sum() / 60
    assert observations(folder)[-1]["probe_acc1"] == accuracy > 50


# The picture


def test_tensorboard_has_each_picture_and_the_folder_the_last(finished):
    events = events_of(finished[0])
    images = events.Images("monitor")
    assert [event.step for event in images] == [0, 10, 20]
    assert len({event.encoded_image_string for event in images}) == 3
    last = decode_image(images[-1].encoded_image_string, 3).permute(1, 2, 0).numpy()
    assert (last == np.asarray(Image.open(finished[0] / "monitor.png"))).all()
    psnr = [record["psnr"] for record in observations(finished[0])]
    assert [event.value for event in events.Scalars("monitor/psnr")] == pytest.approx(psnr)


SHAPES = {
    "colour": ("--in_chans", 3, "--mean", 0.1, 0.15, 0.2, "--std", 0.3, 0.35, 0.4),
    "no class token": ("--class_token", "false", "--decoder_class_token", "false"),
    "not square": ("--img_size", 24, 40, "--patch_size", 4, 8),
    "pixels": ("--norm_pix_loss", "false", "--mask_ratio", 0.5),
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
        pixels = decode_image((data / "val" / name).read_bytes(), cfg.in_chans)
        image = EvalTransform(cfg.img_size, 1.0)(pixels)
        mask = draw_mask("random", model.grid_size, cfg.mask_ratio, generator(0, MONITOR, row))
        psnr.append(reconstruct(model, image[None], [mask], normalize).psnr.item())
        attentions = encoder_of(model).attention_maps(normalize(image[None]))
        heat = rollout(attentions, "mean", 0.0, cfg.class_token).view(model.grid_size).numpy()
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


def names_shown(monitor: Monitor) -> list[str]:
    return [Path(name).name for name in monitor.images]


def test_images_without_labels_are_shown_and_not_classified(tmp_path):
    root = make_pictures(tmp_path / "digits")
    flatten(root / "train")
    monitor = monitored(root / "train", tmp_path / "train")  # neither train/ nor val/
    assert names_shown(monitor) == [f"train{i:03d}.png" for i in (0, 24, 48, 71, 95, 119)]
    flatten(root / "val")
    monitor = monitored(root, tmp_path / "val")
    assert names_shown(monitor) == [f"val{i:03d}.png" for i in (0, 12, 24, 35, 47, 59)]
    for folder in ("train", "val"):
        assert found_keys(tmp_path / folder) == [{"psnr"}] * 3


def test_without_validation_images_training_images_are_shown(tmp_path, caplog):
    root = make_pictures(tmp_path / "digits")
    for path in (root / "val").rglob("*.png"):
        path.unlink()
    monitor = monitored(root, tmp_path / "run", "--monitor_images", 2)
    assert names_shown(monitor) == ["000.png", "039.png"]
    assert str(root / "val") in caplog.text


@pytest.mark.parametrize("broken", ["val/seven/059.png", "train/one/007.png"])
def test_a_broken_image_ends_the_knn_and_not_the_run(tmp_path, caplog, broken):
    root = make_pictures(tmp_path / "digits")
    (root / broken).write_bytes(b"")
    monitor = monitored(root, tmp_path / "run", "--monitor_probe")
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any("k-NN is off" in warning and str(root / broken) in warning for warning in warnings)
    shown = [Path(name).name for name in SHOWN]
    assert names_shown(monitor) == shown[: 5 if broken.startswith("val") else 6]
    assert found_keys(tmp_path / "run") == [{"psnr"}] * 3


def test_weights_that_are_not_numbers_end_the_knn_and_then_the_run(tmp_path, data, caplog):
    def poison(monitor: Monitor, state: TrainState) -> None:
        if state.step == 20:  # the last observation, after all of training
            nn.init.constant_(state.model.patch_embed.proj.bias, float("nan"))

    with watched(poison), pytest.raises(InputError, match="not finite"):
        pretrain_pictures(data, tmp_path, *ON)
    last = observations(tmp_path)[-1]
    assert last["step"] == 20 and last["psnr"] is None and "knn_acc1" not in last
    assert "k-NN is off" in caplog.text


def test_each_part_can_be_off(tmp_path, data):
    monitored(data, tmp_path / "knn", "--monitor_images", 0)
    monitored(flatten(make_pictures(tmp_path / "d") / "val"), tmp_path / "images", *FAST)
    assert found_keys(tmp_path / "knn") == [{"knn_acc1"}] * 3
    assert found_keys(tmp_path / "images") == [{"psnr"}] * 3
    assert not (tmp_path / "knn" / "monitor.png").exists()
    assert "k-NN" not in (tmp_path / "images" / "log.txt").read_text()  # nobody asks for labels
    off = ["--monitor_epochs", 1, "--monitor_images", 0, "--monitor_knn", 0]
    pretrain_pictures(data, tmp_path / "both", *off)
    assert steps(tmp_path / "both") == []
    with pytest.raises(InputError, match="monitor_probe"):
        pretrain_pictures(data, tmp_path / "probe", *off, "--monitor_probe")


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
    now = [1000.0]

    def pass_time(*_: Any) -> None:
        now[0] += 15  # before an observation, and after it

    def classify(*_: Any) -> dict[str, float]:
        now[0] += 10
        return {"knn_acc1": 12.5, "probe_acc1": 75.0}

    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Monitor, "classify", classify)
    monkeypatch.setattr(Monitor, "draw", lambda *_: 20.125)
    with watched(pass_time):
        pretrain_pictures(data, tmp_path, *ON, "--log_interval", 1000)
    assert [record["monitor_s"] for record in observations(tmp_path)] == [10.0] * 3
    lines = re.findall(r"epoch \d monitor .*", (tmp_path / "log.txt").read_text())
    numbers = [re.findall(r"\d+\.\d+", line) for line in lines]
    first = ["12.50", "75.00", "20.12", "10.0"]
    assert numbers == [first, [*first, "25.0"], [*first, "25.0"]]


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
    for name in ("knn_acc1", "probe_acc1"):
        assert one[0][name] == two[0][name], name  # of the untrained model
        counts = [record[name] * 57 / 100 for record in two]
        assert counts == pytest.approx([round(count) for count in counts])  # every image once
    for ours, theirs in zip(one, two, strict=True):
        assert ours["psnr"] == pytest.approx(theirs["psnr"], abs=1e-3)
    assert_same_but_settings(tmp_path / "two", tmp_path / "off")


@pytest.mark.long
def test_a_broken_image_ends_the_knn_on_both_processes(tmp_path):
    data = make_pictures(tmp_path / "digits")
    bad = data / "val" / "one" / "041.png"  # of the second process's share
    bad.write_bytes(b"")
    result = launch(pretraining(data, tmp_path / "run", *ON, "-b", 6), 2)
    assert result.returncode == 0, result.stderr
    (off,) = re.findall("k-NN is off.*", result.stdout)
    assert str(bad) in off and found_keys(tmp_path / "run") == [{"psnr"}] * 3
