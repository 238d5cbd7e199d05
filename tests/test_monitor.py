"""`engine/pictures/monitor.py`: looks change no bit of a run, come when they are due, and their
figures are recomputed here."""

import logging
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
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
    results_of,
    step_losses,
)
from safetensors.torch import load_file
from torch import nn

import main_finetune
import main_knn
import main_lincls
import main_pretrain
from data.images import decode_image
from data.labels import LabelledArray, LabelledData, stratified_choice
from data.transforms import EvalTransform, PixelNormalizer
from engine.evaluation.from_weights import build_frozen
from engine.pictures import monitor as module
from engine.pictures.drawing import CELL, GAP, TEXT, enlarged, heat_over
from engine.pictures.monitor import PROBE_DECAY, Monitor, fit_linear
from engine.pictures.reconstruction import reconstruct
from engine.pictures.rollout import rollout
from engine.run import saving
from engine.run.state import TrainState
from models.build import build_model, encoder_of, mae_spec
from models.mae import MaskedAutoencoder
from models.masks import draw_mask
from util.dist import Processes
from util.errors import InputError
from util.rng import MONITOR, generator, seed_libraries
from util.settings.evaluation import KnnConfig
from util.settings.pretrain import PretrainConfig

CPU = torch.device("cpu")
GREY = PixelNormalizer((0.1307,), (0.3081,), CPU)
COLOUR = ("--mean", 0.1, 0.15, 0.2, "--std", 0.3, 0.35, 0.4)
LOOKING = ("--monitor_epochs", 1, "--monitor_probe")
FAST = ("--monitor_images", 1, "--monitor_knn", 0)  # where only the times of the looks count
# six of the 60 validation images, evenly spaced: 0, 12, 24, 35, 47 and 59 in the order of the files
SHOWN = (
    "nought/040.png",
    "nought/052.png",
    "one/044.png",
    "one/055.png",
    "seven/047.png",
    "seven/059.png",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def looks_of(folder: Path) -> list[dict[str, Any]]:
    """What the looks wrote into log.jsonl."""
    return [line for line in log_lines(folder) if "monitor_s" in line]


def places(folder: Path) -> list[tuple[int, float]]:
    """Step and epoch of each look."""
    return [(line["step"], line["epoch"]) for line in looks_of(folder)]


def text_of(folder: Path) -> str:
    return (folder / "log.txt").read_text()


@contextmanager
def watched(see=lambda monitor, state: None) -> Iterator[list[tuple[Monitor, Any, Any]]]:
    """Of each call of `look` inside: the monitor, and what `see` found before and after it."""
    calls = []
    look = Monitor.look

    def watching(monitor: Monitor, state: TrainState) -> None:
        before = see(monitor, state)
        look(monitor, state)
        calls.append((monitor, before, see(monitor, state)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "look", watching)
        yield calls


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A run of three epochs with a look at each, with curves: its folder, and its monitor with the
    final weights."""
    folder = tmp_path_factory.mktemp("finished")
    more = ["--epochs", 3, "--lr", 0.1, *LOOKING, "--monitor_knn", 1000, "--tensorboard", "true"]
    with watched() as calls:
        pretrain_pictures(data, folder, *more)
    return folder, calls[-1][0]


def events_of(folder: Path):
    """A run's TensorBoard files, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def steps_of(events, tag: str) -> list[int]:
    return [event.step for event in events.Images(tag)]


# --- nothing of a run changes
# -----------------------------------------------------------------------------------------


def random_states() -> tuple:
    """The states of torch's, numpy's and Python's global generators."""
    _, words, place, *_ = np.random.get_state()
    return torch.get_rng_state(), words.tolist(), place, random.getstate()


def assert_the_same_run(one: Path, other: Path, steps: tuple[int, ...]):
    """Losses, final weights and checkpoints are equal, bit for bit; only their settings differ."""
    assert (
        step_losses(one) == step_losses(other) and len(set(step_losses(one).values())) == steps[-1]
    )
    assert_same(load_file(one / "model.safetensors"), load_file(other / "model.safetensors"))
    for step in steps:
        ours, theirs = (
            torch.load(f / f"checkpoint-{step:08d}.pth", weights_only=True) for f in (one, other)
        )
        changed = {
            name for name, value in ours["config"].items() if value != theirs["config"][name]
        }
        assert changed >= {"monitor_epochs", "output_dir"}
        assert changed <= {
            "monitor_epochs",
            "monitor_images",
            "monitor_knn",
            "monitor_probe",
            "output_dir",
            "num_workers",
            "prefetch_factor",
            "tensorboard",
        }
        for saved in (ours, theirs):
            del saved["config"]
        assert_same(ours, theirs, f"checkpoint {step}")


def on_digits(folder: Path, *more: Any) -> tuple:
    """Trains on the digits; returns the random states it leaves behind."""
    seed_libraries(7)
    main_pretrain.main(digits(folder, "--log_interval", 1, "--save_epochs", 1, *more))
    return random_states()


@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    """Two epochs on the digits without a monitor."""
    folder = tmp_path_factory.mktemp("blind")
    return folder, on_digits(folder)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_on_the_digits_is_the_same_with_looks_and_without(tmp_path, blind, workers):
    more = [*LOOKING, "--monitor_knn", 200, "--num_workers", workers, "--prefetch_factor", 2]
    states = on_digits(tmp_path, *more)
    assert_same(states, blind[1])
    assert_the_same_run(tmp_path, blind[0], (STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH))
    looks = looks_of(tmp_path)
    assert [look["epoch"] for look in looks] == [0, 1, 2] and not looks_of(blind[0])
    for look in looks:
        assert look.keys() == {"step", "epoch", "knn_acc1", "probe_acc1", "psnr", "monitor_s"}
        assert (
            10 < look["knn_acc1"] < 100 and 10 < look["probe_acc1"] < 100 and 5 < look["psnr"] < 30
        )
        assert look["knn_acc1"] % 2 == 0  # of 50 validation images
    assert looks[2]["psnr"] > looks[0]["psnr"] + 0.5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_files_is_the_same_with_looks_and_without(tmp_path, data, workers):
    left = []
    for name, epochs in (("blind", 0), ("looking", 1)):
        seed_libraries(7)
        more = ["--num_workers", workers, "--monitor_probe", "--hflip", 0.5, "--clip_grad", 0.5]
        pretrain_pictures(data, tmp_path / name, "--monitor_epochs", epochs, *more)
        left.append(random_states())
    assert_same(*left)
    assert_the_same_run(
        tmp_path / "looking", tmp_path / "blind", (PICTURE_STEPS, 2 * PICTURE_STEPS)
    )
    assert len(looks_of(tmp_path / "looking")) == 3


def test_a_look_leaves_the_model_as_it_was(tmp_path, data):
    """Modes, gradients, and every tensor, by identity and by value; and it draws no random
    number."""

    def see(monitor: Monitor, state: TrainState) -> dict[str, Any]:
        assert monitor.model is state.model
        model = state.model
        return {
            "modes": [part.training for part in model.modules()],
            "tensors": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
            "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
            "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            "values": {name: value.clone() for name, value in model.state_dict().items()},
            "random": random_states(),
            "grad_mode": torch.is_grad_enabled(),
            "step": state.step,
        }

    with watched(see) as calls:
        pretrain_pictures(data, tmp_path, *LOOKING)
    assert [before["step"] for _, before, _ in calls] == [0, 10, 20]
    for _, before, after in calls:
        assert_same(before, after)
        assert all(before["modes"]) and before["grad_mode"]
        assert before["requires_grad"].count(False) == 0
    cfg = calls[0][0].cfg
    torch.manual_seed(cfg.seed)
    assert_same(
        calls[0][1]["values"], dict(build_model(mae_spec(cfg)).state_dict())
    )  # the first look is the untrained model
    assert_same(calls[2][1]["values"], load_file(tmp_path / "model.safetensors"))


# --- when it looks
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "expected"),
    [(2, [0, 2, 4, 5]), (1, [0, 1, 2, 3, 4, 5]), (5, [0, 5]), (10, [0, 5])],
)
def test_looks_come_first_every_so_many_epochs_and_last(tmp_path, data, interval, expected):
    pretrain_pictures(data, tmp_path, *FAST, "--epochs", 5, "--monitor_epochs", interval)
    assert places(tmp_path) == [(PICTURE_STEPS * epoch, epoch) for epoch in expected]
    order = [(line["step"], "monitor_s" in line) for line in log_lines(tmp_path)]
    assert order == sorted(order)  # each follows the lines of its epoch


def test_the_default_is_every_ten_epochs(tmp_path, data):
    arguments = pretraining(data, tmp_path, *FAST, "--epochs", 12, "--batch_size", 120)
    place = arguments.index("--monitor_epochs")
    main_pretrain.main(arguments[:place] + arguments[place + 2 :])
    assert places(tmp_path) == [(0, 0), (10, 10), (12, 12)]


def test_zero_is_off(tmp_path, data):
    pretrain_pictures(data, tmp_path, "--monitor_epochs", 0, "--tensorboard", "true")
    assert places(tmp_path) == [] and not (tmp_path / "monitor.png").exists()
    assert "monitor" not in text_of(tmp_path)
    assert events_of(tmp_path).Tags()["images"] == []


@pytest.mark.parametrize(("stop", "expected"), [(1, [0, 1, 2, 4, 5]), (2, [0, 2, 4, 5])])
def test_a_stopped_run_goes_on_looking_and_repeats_no_look(tmp_path, data, stop, expected):
    more = [*FAST, "--epochs", 5, "--monitor_epochs", 2, "--tensorboard", "true"]
    pretrain_pictures(data, tmp_path, *more, "--stop_epoch", stop)
    next_second()
    first = looks_of(tmp_path)
    assert [look["epoch"] for look in first] == [
        0,
        stop,
    ]  # one before the first step, and one at its end
    pretrain_pictures(data, tmp_path, *more)
    steps = [PICTURE_STEPS * epoch for epoch in expected]
    assert places(tmp_path) == list(zip(steps, expected, strict=True))
    assert looks_of(tmp_path)[:2] == first
    assert steps_of(events_of(tmp_path), "monitor") == steps
    pretrain_pictures(data, tmp_path, *more)  # is finished
    assert len(places(tmp_path)) == len(expected)


def test_other_knobs_may_come_with_a_resume(tmp_path, data):
    pretrain_pictures(data, tmp_path / "whole", "--epochs", 4)
    run = ["--epochs", 4, "--monitor_images", 1]
    pretrain_pictures(data, tmp_path / "run", *run, "--stop_epoch", 1, "--monitor_epochs", 0)
    pretrain_pictures(
        data, tmp_path / "run", *run, "--stop_epoch", 2, "--monitor_epochs", 3, "--monitor_knn", 0
    )
    pretrain_pictures(
        data, tmp_path / "run", *run, *LOOKING, "--monitor_images", 0, "--monitor_knn", 40
    )
    assert [look.keys() - {"step", "monitor_s"} for look in looks_of(tmp_path / "run")] == [
        {"epoch", "psnr"},
        {"epoch", "knn_acc1", "probe_acc1"},
        {"epoch", "knn_acc1", "probe_acc1"},
    ]
    assert places(tmp_path / "run") == [(20, 2), (30, 3), (40, 4)]
    assert step_losses(tmp_path / "run") == step_losses(tmp_path / "whole")


def next_second() -> None:
    """TensorBoard reads a run's event files in the order of their names, which begin with the
    second."""
    time.sleep(1.1)


def dying(*_):
    raise KeyboardInterrupt


def test_a_run_that_died_before_its_first_checkpoint_starts_anew_with_one_first_look(
    tmp_path, data, monkeypatch
):
    more = [*FAST, "--monitor_epochs", 1, "--tensorboard", "true"]
    for place, name in ((main_pretrain, "train"), (saving, "save_checkpoint")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place, name, dying)
            pretrain_pictures(data, tmp_path, *more)
        assert places(tmp_path) == [(0, 0)] + [(10, 1)] * (name == "save_checkpoint")
        assert not list(tmp_path.glob("checkpoint-*"))
        next_second()
    pretrain_pictures(data, tmp_path, *more)
    assert places(tmp_path) == [(0, 0), (10, 1), (20, 2)]
    events = events_of(tmp_path)
    assert steps_of(events, "monitor") == [0, 10, 20]
    assert [event.step for event in events.Scalars("monitor/psnr")] == [0, 10, 20]


def test_a_run_that_died_between_a_look_and_its_checkpoint_looks_again_and_keeps_one_line(
    tmp_path, data, monkeypatch
):
    save = saving.save_checkpoint
    more = [*FAST, "--epochs", 3, "--monitor_epochs", 1, "--tensorboard", "true"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(saving, "save_checkpoint", lambda *of: (save if of[1] < 20 else dying)(*of))
        pretrain_pictures(data, tmp_path, *more)
    assert places(tmp_path) == [
        (0, 0),
        (10, 1),
        (20, 2),
    ]  # the last one lies past the newest checkpoint
    next_second()
    pretrain_pictures(data, tmp_path, *more)
    assert places(tmp_path) == [(0, 0), (10, 1), (20, 2), (30, 3)]
    assert steps_of(events_of(tmp_path), "monitor") == [0, 10, 20, 30]


# --- the k-NN
# ---------------------------------------------------------------------------------------------------------


def test_its_knn_equals_the_evaluation_of_the_same_weights(tmp_path, data, finished):
    """Where it takes all images; at each look that has a checkpoint, and at the end."""
    folder, _ = finished
    accuracies = [look["knn_acc1"] for look in looks_of(folder)]
    assert len(set(accuracies)) > 1 and max(accuracies) < 100  # not vacuous
    for name, accuracy in zip(
        ("checkpoint-00000010.pth", "checkpoint-00000020.pth", "model.safetensors"),
        accuracies[1:],
        strict=True,
    ):
        more = ["--finetune", folder / name, "--global_pool", "avg", "--ks", 10, 20]
        results = main_knn.main(pictures(data, tmp_path, *more, training=False))
        assert (results["num_train"], results["num_samples"]) == (120, 60)
        assert results["acc1"] == accuracy, name


# at 40 pixels the evaluation crop is 224 / 256 of the sides; the smaller images are seen whole
@pytest.mark.parametrize(
    "more", [(), ("--img_size", 40), ("--class_token", "false", "--decoder_class_token", "false")]
)
def test_its_features_equal_those_of_the_evaluation(tmp_path, data, more):
    with watched() as calls:
        pretrain_pictures(
            data, tmp_path / "run", *LOOKING, *more, "--monitor_knn", 240, "--epochs", 1
        )
    monitor = calls[-1][0]
    read = [
        "--finetune",
        tmp_path / "run" / "model.safetensors",
        "-b",
        12,
        "--ks",
        10,
        "--save_path",
        tmp_path,
    ]
    size = more if "--img_size" in more else ()
    results = main_knn.main(pictures(data, tmp_path / "knn", *read, *size, training=False))
    saved = load_file(tmp_path / "features.safetensors")
    encoder = encoder_of(monitor.model)
    for split, source in (("train", monitor.train), ("val", monitor.val)):
        assert_same(monitor.features(encoder, source), saved[split], split)
        assert source.labels.tolist() == saved[f"{split}_labels"].tolist()
    assert looks_of(tmp_path / "run")[-1]["knn_acc1"] == results["acc1"]


def test_a_fixed_choice_with_each_class_in_proportion(tmp_path, data):
    """60 of 120 training images, and a quarter as many of the 60 for validation, the same ones at
    each look."""
    chosen = {}
    for seed in (0, 1):
        with watched(
            lambda monitor, _: (monitor.train.indices.copy(), monitor.val.indices.copy())
        ) as calls:
            more = [
                "--monitor_epochs",
                1,
                "--monitor_images",
                0,
                "--monitor_knn",
                60,
                "--seed",
                seed,
            ]
            pretrain_pictures(data, tmp_path / str(seed), *more)
        for _, before, after in calls:
            for ours, first in zip((*before, *after), calls[0][1] * 2, strict=True):
                assert ours.tolist() == first.tolist()
        train, val = calls[0][1]
        assert train.tolist() == stratified_choice(np.repeat([0, 1, 2], 40), 60, seed).tolist()
        assert np.bincount(train // 40).tolist() == [20, 20, 20] and np.bincount(
            val // 20
        ).tolist() == [5, 5, 5]
        chosen[seed] = train.tolist()
    assert chosen[0] != chosen[1]
    # its accuracy, in 64 bits and numpy: cosine, the 10 nearest, each with exp(similarity / 0.07)
    monitor = calls[-1][0]
    encoder = encoder_of(monitor.model)
    train, val = (
        monitor.features(encoder, source).double().numpy()
        for source in (monitor.train, monitor.val)
    )
    similarity = (val / np.linalg.norm(val, axis=1, keepdims=True)) @ (
        train / np.linalg.norm(train, axis=1)[:, None]
    ).T
    right = 0
    for row, label in zip(similarity, monitor.val.labels, strict=True):
        votes = np.zeros(3)
        for neighbour in np.argsort(-row)[:10]:
            votes[monitor.train.labels[neighbour]] += np.exp(row[neighbour] / 0.07)
        right += votes.argmax() == label
    assert looks_of(tmp_path / "1")[-1]["knn_acc1"] == 100 * right / 15


def test_ten_neighbours_vote_by_exp_of_similarity_over_7_percent(monkeypatch):
    """Four at similarity 1 against six at s: 4 exp(1 / T) = 6 exp(s / T) at 1 - s = T ln 1.5 =
    0.0284 for T = 0.07."""
    rows, labels = [], []
    for plane, s in enumerate((1 - 0.029, 1 - 0.028)):  # the four win, the six win
        for number, similarity, label in ((4, 1.0, 0), (6, s, 1), (20, 0.9, 2)):
            row = np.zeros(4)
            row[2 * plane], row[2 * plane + 1] = similarity, (1 - similarity**2) ** 0.5
            rows += [row] * number
            labels += [label] * number
    train = SimpleNamespace(labels=np.array(labels), rows=torch.tensor(np.array(rows)))
    queries = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0]], dtype=torch.float64)
    val = SimpleNamespace(labels=np.array([0, 1]), rows=queries)
    monkeypatch.setattr(module, "encoder_of", lambda *_: None)
    monkeypatch.setattr(Monitor, "features", lambda self, encoder, source: source.rows)
    run = SimpleNamespace(processes=Processes(0, 1, 0, 1, CPU), device=CPU)
    monitor = Monitor(SimpleNamespace(monitor_probe=False), run, None, None, train=train, val=val)
    assert monitor.classify(None) == {"knn_acc1": 100.0}
    val.labels = np.array([1, 0])
    assert monitor.classify(None) == {"knn_acc1": 0.0}


# --- the linear layer
# -------------------------------------------------------------------------------------------------


def test_separable_classes_are_told_apart():
    stream = torch.Generator().manual_seed(0)
    centres = torch.tensor([[5.0, 0, 0], [0, 5, 0], [0, 0, 5], [-5, -5, -5]])
    labels = torch.arange(4).repeat(25)
    train, val = (centres[labels] + torch.rand(100, 3, generator=stream) for _ in range(2))
    assert fit_linear(train, labels, val, 4).tolist() == labels.tolist()
    assert (
        fit_linear(train * 1e-3 + 7, labels, val * 1e-3 + 7, 4).tolist() == labels.tolist()
    )  # features of any scale


def noisy() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels that the features do not explain: the penalty decides much of the answer."""
    stream = torch.Generator().manual_seed(0)
    scale = torch.logspace(-2, 2, 64)
    train, val = (torch.randn(count, 64, generator=stream) * scale + 3 for count in (200, 1000))
    return train, torch.randint(0, 5, (200,), generator=stream), val


def test_it_is_the_logistic_regression_of_another_implementation():
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, labels, val = noisy()
    mean, std = train.mean(dim=0), train.std(dim=0)

    def another(decay: float) -> torch.Tensor:
        model = linear_model.LogisticRegression(C=1 / (decay * len(train)), max_iter=5000, tol=1e-8)
        model.fit(((train - mean) / std).double().numpy(), labels.numpy())
        return torch.from_numpy(model.predict(((val - mean) / std).double().numpy()))

    ours = fit_linear(train, labels, val, 5)
    agree = {
        factor: (another(factor * PROBE_DECAY) == ours).double().mean().item()
        for factor in (1, 0.5, 2)
    }
    assert agree[1] >= 0.99
    assert agree[0.5] < 0.98 > agree[2]  # the test sees another penalty


def test_it_is_a_function_of_its_arguments():
    train, labels, val = noisy()
    given = [tensor.clone() for tensor in (train, labels, val)]
    seed_libraries(1)
    before = random_states()
    first = fit_linear(train, labels, val, 5)
    assert_same(random_states(), before)
    seed_libraries(2)
    assert_same(fit_linear(train, labels, val, 5), first)
    assert_same([train, labels, val], given)
    assert (first.shape, first.dtype, first.requires_grad) == ((1000,), torch.int64, False)
    assert first.unique().tolist() == [0, 1, 2, 3, 4]


def test_a_constant_feature_changes_nothing():
    """Without care its standard deviation of 0 makes everything NaN, and each answer class 0."""
    train, labels, val = noisy()
    expected = fit_linear(train, labels, val, 5)
    for constant in (0.0, 0.1, -300.0):
        wider = [
            torch.cat([part, torch.full((len(part), 1), constant)], dim=1) for part in (train, val)
        ]
        found = fit_linear(wider[0], labels, wider[1], 5)
        assert (found == expected).double().mean() > 0.97, constant


def test_its_accuracy_is_that_of_the_features(data, finished):
    _, monitor = finished
    encoder = encoder_of(monitor.model)
    train, val = (monitor.features(encoder, source) for source in (monitor.train, monitor.val))
    predicted = fit_linear(train, torch.from_numpy(monitor.train.labels), val, 3).numpy()
    assert (
        looks_of(finished[0])[-1]["probe_acc1"]
        == 100 * (predicted == monitor.val.labels).sum() / 60
        > 50
    )


# --- the picture
# ------------------------------------------------------------------------------------------------------


def autoencoder(folder: Path) -> MaskedAutoencoder:
    """The model of a finished run, from its files."""
    saved = torch.load(sorted(folder.glob("checkpoint-*.pth"))[-1], weights_only=True)
    model = MaskedAutoencoder(**saved["model_args"])
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model.eval()


def picture_of(encoded: bytes) -> np.ndarray:
    return decode_image(encoded, 3).permute(1, 2, 0).numpy()


def cell(picture: np.ndarray, row: int, column: int, height: int, width: int) -> np.ndarray:
    """One image of a picture of looks, of the size that it is shown at."""
    top = TEXT + TEXT + row * (height + TEXT + GAP)  # the titles, then a label over each row
    left = GAP + column * (width + GAP)
    return picture[top : top + height, left : left + width]


def test_the_picture_is_there_and_is_another_at_each_look(finished):
    folder, _ = finished
    events = events_of(folder)
    images = events.Images("monitor")
    assert [event.step for event in images] == [0, 10, 20, 30]
    last = np.asarray(Image.open(folder / "monitor.png"))
    assert (last == picture_of(images[-1].encoded_image_string)).all()
    side = 28 * (CELL // 28)
    assert last.shape[1] == 5 * (side + GAP) + GAP and last.shape[2] == 3
    drawn = [picture_of(event.encoded_image_string) for event in images]
    for row, name in enumerate(SHOWN):
        file = np.asarray(Image.open(Path(finished[1].cfg.data_path) / "val" / name).convert("RGB"))
        masked = cell(drawn[0], row, 1, side, side)
        for picture in drawn:  # the same images under the same masks
            assert (cell(picture, row, 0, side, side) == enlarged(file, CELL)).all()
            assert (cell(picture, row, 1, side, side) == masked).all()
        for one, other in zip(drawn, drawn[1:], strict=False):
            for column in (2, 3, 4):  # prediction, pasted, attention
                assert (
                    cell(one, row, column, side, side) != cell(other, row, column, side, side)
                ).any()
    masks = [cell(drawn[0], row, 1, side, side) == 128 for row in range(6)]
    assert len({mask.tobytes() for mask in masks}) == 6  # each image has its own


def test_psnr_and_cells_are_those_of_the_weights(data, finished):
    folder, _ = finished
    model = autoencoder(folder)
    cfg = KnnConfig(
        size="debug", img_size=28, patch_size=4, in_chans=1, mean=(0.1307,), std=(0.3081,)
    )
    encoder = build_frozen(cfg, str(folder / "model.safetensors"), 3).model
    picture = np.asarray(Image.open(folder / "monitor.png"))
    psnr = []
    for row, name in enumerate(SHOWN):
        image = decode_image((data / "val" / name).read_bytes(), 1)[None]
        mask = draw_mask("random", (7, 7), 0.75, generator(0, MONITOR, row))
        found = reconstruct(model, image, [mask], GREY)
        psnr.append(found.psnr.item())
        attention = rollout(encoder.attention_maps(GREY(image)), "mean", 0.0, True).view(7, 7)
        shown = [
            (part[0, 0] * 255).round().byte().numpy()[..., None].repeat(3, 2) for part in found[:4]
        ]
        shown.append(heat_over(shown[0], attention.numpy()))
        for column, expected in enumerate(shown):
            assert (cell(picture, row, column, 140, 140) == enlarged(expected, CELL)).all(), (
                name,
                column,
            )
    assert looks_of(folder)[-1]["psnr"] == pytest.approx(np.mean(psnr), rel=1e-6)
    assert np.std(psnr) > 0.1


# --- curves and settings
# ----------------------------------------------------------------------------------------------


def settings_in(events) -> dict[str, Any]:
    """What TensorBoard's HParams page shows of a run."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    tags = events.PluginTagToContent("hparams")
    assert tags.keys() == {
        "_hparams_/experiment",
        "_hparams_/session_start_info",
        "_hparams_/session_end_info",
    }
    start = HParamsPluginData.FromString(tags["_hparams_/session_start_info"]).session_start_info
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}


def assert_settings_are_those_of_the_run(folder: Path, events):
    found = settings_in(events)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert found.keys() == config.keys()
    for name, value in config.items():
        assert found[name] == (
            value if isinstance(value, bool | int | float | str) else str(value)
        ), name


GROUPS = {
    "train": ("loss", "lr", "grad_norm", "images_per_s", "data_wait"),
    "epoch": ("epoch_loss",),
    "monitor": ("knn_acc1", "probe_acc1", "psnr", "monitor_s"),
}


def test_tensorboard_has_every_curve_in_its_group(finished):
    folder, _ = finished
    events = events_of(folder)
    names = {f"{group}/{name}" for group, members in GROUPS.items() for name in members}
    assert set(events.Tags()["scalars"]) == names | {"train/eta_s"} | {
        f"final/{name}" for name in ("loss", "knn_acc1", "probe_acc1", "psnr")
    }
    facts = {"train": "lr", "epoch": "epoch_loss", "monitor": "monitor_s"}
    for group, members in GROUPS.items():
        lines = [line for line in log_lines(folder) if facts[group] in line]
        assert len(lines) == {"train": 30, "epoch": 3, "monitor": 4}[group]
        for name in members:
            curve = events.Scalars(f"{group}/{name}")
            assert [event.step for event in curve] == [line["step"] for line in lines]
            assert [event.value for event in curve] == pytest.approx([line[name] for line in lines])
    (final,) = events.Scalars("final/loss")
    assert (final.step, final.value) == (
        30,
        pytest.approx(events.Scalars("epoch/epoch_loss")[-1].value),
    )


def test_the_settings_of_a_finished_run_are_beside_its_figures(finished):
    folder, _ = finished
    assert_settings_are_those_of_the_run(folder, events_of(folder))


@pytest.mark.parametrize("stage", [main_finetune, main_lincls])
def test_the_settings_of_a_finished_evaluation_are_beside_its_accuracy(
    tmp_path, data, finished, stage
):
    more = ["--finetune", finished[0] / "model.safetensors", "--tensorboard", "true", "--epochs", 1]
    results = stage.main(pictures(data, tmp_path, *more))
    assert results == results_of(tmp_path)
    events = events_of(tmp_path)
    assert_settings_are_those_of_the_run(tmp_path, events)
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/lr", "epoch/epoch_loss"} < tags and any(
        tag.startswith("val/") for tag in tags
    )
    assert not any(tag.startswith("monitor") for tag in tags)
    (final,) = events.Scalars("final/acc1")
    assert (final.step, final.value) == (PICTURE_STEPS, pytest.approx(results["acc1"]))


# --- what the data cannot give
# ----------------------------------------------------------------------------------------


def look_at(data: Path, folder: Path, *more: Any) -> Monitor:
    """Trains for two epochs with a look at each, to its end; the monitor."""
    with watched() as calls:
        pretrain_pictures(data, folder, "--monitor_epochs", 1, *more)
    assert places(folder) == [(0, 0), (10, 1), (20, 2)] and (folder / "model.safetensors").exists()
    return calls[-1][0]


def flatten(split: Path) -> Path:
    """Takes the images of a split out of their class folders, in their order; returns the split."""
    for number, path in enumerate(sorted(split.rglob("*.png"))):
        path.rename(split / f"{split.name}{number:03d}.png")
    for name in CLASSES:
        (split / name).rmdir()
    return split


def reasons(folder: Path) -> list[str]:
    """Why there is no k-NN."""
    return re.findall(r"no k-NN while training, as it needs labels: (.*)", text_of(folder))


def shown_by(monitor: Monitor) -> list[tuple[str, torch.Tensor]]:
    """File names and pixels of the images that a monitor draws."""
    return [(Path(name).name, image) for name, image in monitor.images.items()]


def names_shown(monitor: Monitor) -> list[str]:
    return [name for name, _ in shown_by(monitor)]


WITHOUT_LABELS = {"step", "epoch", "psnr", "monitor_s"}


def test_images_without_classes_are_shown_and_not_classified(tmp_path):
    images = flatten(make_pictures(tmp_path / "digits") / "train")
    monitor = look_at(images, tmp_path / "run")
    assert reasons(tmp_path / "run") == [
        f"data_path {images} has no train/: it must hold train/ and val/, with a folder per class"
    ]
    # of 120 training images, evenly spaced
    assert names_shown(monitor) == [f"train{number:03d}.png" for number in (0, 24, 48, 71, 95, 119)]
    assert all(look.keys() == WITHOUT_LABELS for look in looks_of(tmp_path / "run"))


def test_validation_images_without_classes_are_the_ones_that_are_shown(tmp_path):
    root = make_pictures(tmp_path / "digits")
    for split in ("train", "val"):
        flatten(root / split)
    monitor = look_at(root, tmp_path / "run")
    (reason,) = reasons(tmp_path / "run")
    assert reason.startswith(f"{root / 'train'} has no class folders")
    assert names_shown(monitor) == [f"val{number:03d}.png" for number in (0, 12, 24, 35, 47, 59)]
    assert all(look.keys() == WITHOUT_LABELS for look in looks_of(tmp_path / "run"))


def test_without_validation_images_training_images_are_shown(tmp_path, caplog):
    root = make_pictures(tmp_path / "digits")
    for path in (root / "val").rglob("*.png"):
        path.unlink()
    monitor = look_at(root, tmp_path / "run", "--monitor_images", 2)
    (reason,) = reasons(tmp_path / "run")
    assert reason.startswith(f"no images under {root / 'val'}")
    assert f"the monitor shows training images: {reason}" in caplog.text
    expected = [
        decode_image((root / "train" / name).read_bytes(), 1)
        for name in ("nought/000.png", "seven/039.png")
    ]
    assert_same(shown_by(monitor), [("000.png", expected[0]), ("039.png", expected[1])])


@pytest.mark.parametrize("broken", ["val/seven/059.png", "train/one/007.png"])
def test_a_broken_image_ends_the_knn_and_not_the_run(tmp_path, caplog, broken):
    root = make_pictures(tmp_path / "digits")
    (root / broken).write_bytes(b"")
    monitor = look_at(root, tmp_path / "run", "--monitor_probe")
    warnings = [
        record.getMessage() for record in caplog.records if record.levelno == logging.WARNING
    ]
    (off,) = [
        warning for warning in warnings if "k-NN is off from here on: " in warning
    ]  # said once
    assert str(root / broken) in off and "the file is empty" in off
    shown = list(SHOWN)
    if broken.startswith("val"):
        shown.remove("seven/059.png")
        assert f"not shown by the monitor: {root / broken} the file is empty" in warnings
    assert names_shown(monitor) == [Path(name).name for name in shown]
    assert all(look.keys() == WITHOUT_LABELS for look in looks_of(tmp_path / "run"))


def test_weights_that_are_not_numbers_end_the_knn_and_then_the_run(tmp_path, data, caplog):
    def poison(monitor: Monitor, state: TrainState) -> None:
        if state.step == 20:  # the last look, after all of training
            nn.init.constant_(state.model.patch_embed.proj.bias, float("nan"))

    with (
        watched(poison),
        pytest.raises(
            InputError, match="the model state is not finite after step 20, so it is not"
        ),
    ):
        pretrain_pictures(data, tmp_path, *LOOKING)
    assert [look.get("psnr") is None for look in looks_of(tmp_path)] == [False, False, True]
    assert ["knn_acc1" in look for look in looks_of(tmp_path)] == [True, True, False]
    assert "k-NN is off from here on: the features are not finite" in caplog.text


def test_each_part_can_be_off(tmp_path, data):
    for name, more, facts in (
        ("images", ("--monitor_images", 0), {"knn_acc1"}),
        ("knn", ("--monitor_knn", 0), {"psnr"}),
    ):
        folder = tmp_path / name
        look_at(data, folder, *more)
        assert all(
            look.keys() == {"step", "epoch", "monitor_s"} | facts for look in looks_of(folder)
        )
        assert (folder / "monitor.png").exists() == ("psnr" in facts)
        assert reasons(folder) == [] and "WARNING" not in text_of(folder)
    pretrain_pictures(
        data, tmp_path / "both", "--monitor_epochs", 1, "--monitor_images", 0, "--monitor_knn", 0
    )
    assert looks_of(tmp_path / "both") == []  # nothing to look at
    with pytest.raises(
        InputError, match="monitor_probe fits a layer to the features of monitor_knn's images"
    ):
        pretrain_pictures(data, tmp_path / "probe", "--monitor_knn", 0, "--monitor_probe")


def test_many_classes_are_thinned_to_a_choice_that_neighbours_can_belong_to(tmp_path):
    """One class for every 20 images, the same ones in training and validation, and not the first
    ones."""
    labels = np.repeat(np.arange(100), 30)
    source = LabelledArray("many", np.zeros((3000, 1, 1, 1), np.uint8), labels, 1)
    data = LabelledData(source, source, [str(label) for label in range(100)])
    choices = []
    for seed in (0, 0, 1):
        train, val = module._choose(data, PretrainConfig(monitor_knn=200, seed=seed, data_path="x"))
        sizes = np.bincount(train.labels, minlength=100)
        assert (len(train), len(val), np.unique(sizes).tolist()) == (200, 50, [0, 20])
        assert set(val.labels) == set(train.labels) and len(set(val.labels)) == 10
        choices.append(tuple(np.unique(train.labels)))
    assert choices[0] == choices[1] != choices[2] and max(choices[0]) > 50


def test_without_knn_nobody_asks_for_labels(tmp_path):
    look_at(
        flatten(make_pictures(tmp_path / "digits") / "train"), tmp_path / "run", "--monitor_knn", 0
    )
    assert reasons(tmp_path / "run") == [] and "k-NN" not in text_of(tmp_path / "run")


def test_fewer_images_than_asked_for_are_all_taken(tmp_path):
    root = make_pictures(tmp_path / "digits", val=1)
    for name in CLASSES:
        (root / "val" / name / "040.png").rename(root / "val" / name / f"{name}.png")
    monitor = look_at(root, tmp_path / "run", "--monitor_images", 100, "--monitor_knn", 10**6)
    assert names_shown(monitor) == ["nought.png", "one.png", "seven.png"]
    assert (len(monitor.train), len(monitor.val)) == (120, 3)
    assert {look["knn_acc1"] for look in looks_of(tmp_path / "run")} <= {
        0.0,
        100 / 3,
        200 / 3,
        100.0,
    }


def test_images_of_one_name_are_all_shown(tmp_path):
    root = make_pictures(tmp_path / "digits", val=1)
    pretrain_pictures(root, tmp_path / "run", "--monitor_epochs", 1)
    picture = np.asarray(Image.open(tmp_path / "run" / "monitor.png"))
    for row, name in enumerate(CLASSES):
        file = np.asarray(Image.open(root / "val" / name / "040.png").convert("RGB"))
        assert cell(picture, row, 0, 140, 140).tolist() == enlarged(file, CELL).tolist()


def test_fewer_chosen_images_than_classes_are_no_error(tmp_path):
    """The last class is the rarest in training and the largest in validation."""
    root = make_pictures(tmp_path / "digits")
    for number in range(10):
        (root / "train" / "seven" / f"{number:03d}.png").unlink()
        (root / "val" / "one" / f"{40 + number:03d}.png").unlink()
        (root / "val" / "nought" / f"{40 + number:03d}.png").unlink()
    for wanted in (1, 2, 4):
        folder = tmp_path / str(wanted)
        pretrain_pictures(root, folder, *LOOKING, "--monitor_images", 0, "--monitor_knn", wanted)
        assert (
            all(0 <= look.get("knn_acc1", 0) <= 100 for look in looks_of(folder))
            and len(looks_of(folder)) == 3
        )


SHAPES = {
    "rgb": ("--in_chans", 3, *COLOUR),
    "no class token": ("--class_token", "false", "--decoder_class_token", "false"),
    "not square": ("--img_size", 24, 40, "--patch_size", 4, 8),
    "pixels": ("--norm_pix_loss", "false", "--mask_ratio", 0.5),
}


@pytest.mark.parametrize("more", SHAPES.values(), ids=SHAPES.keys())
def test_models_of_every_shape_are_looked_at(tmp_path, data, more):
    monitor = look_at(data, tmp_path, "--monitor_images", 2, "--monitor_probe", *more)
    cfg = monitor.cfg
    height, width = (cfg.img_size, cfg.img_size) if isinstance(cfg.img_size, int) else cfg.img_size
    factor = CELL // max(height, width)
    picture = np.asarray(Image.open(tmp_path / "monitor.png"))
    assert picture.shape[1] == 5 * (factor * width + GAP) + GAP
    normalize = PixelNormalizer(cfg.mean, cfg.std, CPU)
    model = autoencoder(tmp_path)
    encoder = encoder_of(model)
    psnr = []
    for row, name in enumerate((SHOWN[0], SHOWN[-1])):
        image = EvalTransform(cfg.img_size, 1.0)(
            decode_image((data / "val" / name).read_bytes(), cfg.in_chans)
        )
        original = image.expand(3, -1, -1).permute(1, 2, 0).numpy()
        mask = draw_mask("random", model.grid_size, cfg.mask_ratio, generator(0, MONITOR, row))
        psnr.append(reconstruct(model, image[None], [mask], normalize).psnr.item())
        attentions = encoder.attention_maps(normalize(image[None]))
        heat = rollout(attentions, "mean", 0.0, cfg.class_token).view(model.grid_size).numpy()
        shown = {0: original, 4: heat_over(original, heat)}
        for column, expected in shown.items():
            found = cell(picture, row, column, factor * height, factor * width)
            assert (found == enlarged(expected, CELL)).all(), (name, column)
    looks = looks_of(tmp_path)
    assert looks[-1]["psnr"] == pytest.approx(np.mean(psnr), rel=1e-6)
    assert all(
        look["knn_acc1"] > 50 and look["probe_acc1"] > 50 for look in looks
    )  # 33.3 is chance


# --- what it costs
# ----------------------------------------------------------------------------------------------------


def test_each_look_says_what_it_found_and_what_it_cost(tmp_path, data, monkeypatch):
    """A look of 10 seconds, 30 seconds after the last one ended, is a quarter of the time since
    then."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def costly(*_) -> dict[str, float]:
        now[0] += 10
        return {"knn_acc1": 12.5, "probe_acc1": 75.0}

    monkeypatch.setattr(Monitor, "classify", costly)
    monkeypatch.setattr(Monitor, "draw", lambda *_: 20.125)

    def pass_time(monitor: Monitor, state: TrainState) -> None:
        now[0] += 15  # before a look, and after it

    with watched(pass_time):
        pretrain_pictures(data, tmp_path, *LOOKING, "--log_interval", 1000)
    assert [look["monitor_s"] for look in looks_of(tmp_path)] == [10.0] * 3
    found = "10-NN 12.50 %  linear 75.00 %  reconstructions PSNR 20.12 dB"
    assert re.findall(r"epoch \d monitor .*", text_of(tmp_path)) == [
        f"epoch 0 monitor  {found}  (10.0 s)",
        f"epoch 1 monitor  {found}  (10.0 s, 25.0 % of the time since the last)",
        f"epoch 2 monitor  {found}  (10.0 s, 25.0 % of the time since the last)",
    ]


def test_the_line_and_the_log_agree(finished):
    lines = re.findall(r"epoch (\d) monitor  (.*)", text_of(finished[0]))
    looks = looks_of(finished[0])
    assert [int(epoch) for epoch, _ in lines] == [look["epoch"] for look in looks] == [0, 1, 2, 3]
    for (_, line), look in zip(lines, looks, strict=True):
        assert line.startswith(
            f"10-NN {look['knn_acc1']:.2f} %  linear {look['probe_acc1']:.2f} %  "
            f"reconstructions PSNR {look['psnr']:.2f} dB  ({look['monitor_s']:.1f} s"
        )
        share = re.search(r"s, (.*) % of the time since the last\)$", line)
        assert (share is None) == (look["step"] == 0)
        assert share is None or 0 < float(share[1]) <= 100
        assert 0 < look["monitor_s"] < 60


# --- several processes
# ------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_two_processes_see_what_one_sees(tmp_path):
    """57 validation images: the processes have unequal shares."""
    data = make_pictures(tmp_path / "digits")
    for name in CLASSES:
        (data / "val" / name / "050.png").unlink()
    more = ["--num_workers", 0]
    for folder, size, looking in (("one", 12, LOOKING), ("two", 6, LOOKING), ("blind", 6, ())):
        arguments = pretraining(data, tmp_path / folder, *looking, *more, "-b", size)
        result = launch(arguments, 12 // size)
        assert result.returncode == 0, result.stderr
        assert len(re.findall("monitor  10-NN", result.stdout)) == (
            3 if looking else 0
        )  # only rank 0 speaks
    one, two = looks_of(tmp_path / "one"), looks_of(tmp_path / "two")
    for name in ("step", "epoch", "knn_acc1", "probe_acc1"):
        assert one[0][name] == two[0][name], name  # the untrained model
    counts = [look[name] * 57 / 100 for look in two for name in ("knn_acc1", "probe_acc1")]
    assert counts == pytest.approx([round(count) for count in counts])  # every image once
    for ours, theirs in zip(one, two, strict=True):
        assert ours["psnr"] == pytest.approx(theirs["psnr"], abs=1e-3)
    assert_the_same_run(tmp_path / "two", tmp_path / "blind", (10, 20))


@pytest.mark.long
def test_a_broken_image_ends_the_knn_on_both_processes(tmp_path):
    data = make_pictures(tmp_path / "digits")
    bad = data / "val" / "one" / "041.png"  # of the second process's share
    bad.write_bytes(b"")
    result = launch(pretraining(data, tmp_path / "run", *LOOKING, "-b", 6), 2)
    assert result.returncode == 0, result.stderr
    (off,) = re.findall("k-NN is off from here on: .*", result.stdout)
    assert str(bad) in off
    assert [look.keys() for look in looks_of(tmp_path / "run")] == [WITHOUT_LABELS] * 3
