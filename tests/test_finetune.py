"""`main_finetune.py` end to end: what it learns and leaves, --eval, exact resume, and what it
refuses."""

import json
import logging
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from runs import (
    CLASSES,
    PICTURE_STEPS,
    assert_same,
    command,
    environment,
    log_lines,
    make_pictures,
    pictures,
    pretrain_pictures,
    results_of,
    run,
    step_losses,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import engine.evaluation.classification
import engine.loop
import main_finetune
import main_knn
import main_lincls
from data.labels import build_labelled_data
from engine.evaluation.classification import Scores
from engine.run.checkpoint import load_newest_checkpoint
from models.vit import VisionTransformer
from models.weights.read import read_weights
from util.errors import InputError

# learns: no regularisation, a full-speed schedule; chance is 33.3 %
LEARN = [
    "--lr",
    0.1,
    "--epochs",
    8,
    "--warmup_epochs",
    1,
    "--crop_min",
    0.8,
    "--label_smoothing",
    0,
    "--drop_path_rate",
    0,
    "--clip_grad",
    1,
]
# everything that draws random numbers, and the moving average
ALL_ON = [
    "--lr",
    0.03,
    "--mixup",
    0.8,
    "--cutmix",
    1.0,
    "--re_prob",
    0.5,
    "--drop_path_rate",
    0.3,
    "--hflip",
    0.5,
    "--auto_augment",
    "rand-m9-mstd0.5-inc1",
    "--ema_decay",
    0.8,
    "--clip_grad",
    1,
]


STAGES = {"finetune": main_finetune.main, "lincls": main_lincls.main, "knn": main_knn.main}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, data) -> Path:
    """With a class token."""
    return pretrain_pictures(data, tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="module")
def tokenless(tmp_path_factory, data) -> Path:
    """Weights without a class token."""
    folder = tmp_path_factory.mktemp("tokenless")
    pretrain_pictures(data, folder, "--class_token", "false", "--decoder_class_token", "false")
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data, pretrained):
    """A run from model.safetensors that is done: its folder, command line and results."""
    folder = tmp_path_factory.mktemp("finished")
    arguments = pictures(
        data, folder, *LEARN, "--finetune", pretrained / "model.safetensors", "--per_class"
    )
    return folder, arguments, main_finetune.main(arguments)


@pytest.fixture(scope="module")
def all_on(tmp_path_factory, data, pretrained):
    """An uninterrupted run with everything random on."""
    folder = tmp_path_factory.mktemp("all_on")
    main_finetune.main(
        pictures(data, folder, *ALL_ON, "--finetune", pretrained / "model.safetensors")
    )
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the log that each start writes to."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name not in ("log.txt", "eval.json")
    }


def looks_like_a_result(folder: Path) -> list[str]:
    """Names in a run's folder that a reader would take for the outcome of something."""
    endings = (".pth", ".sha256", ".safetensors", ".json", ".yaml", ".tmp")
    return [path.name for path in folder.glob("**/*") if path.name.endswith(endings)]


def evaluate(data: Path, folder: Path, weights: Path, *more) -> dict:
    """`--eval` of a file of weights."""
    return main_finetune.main(pictures(data, folder, "--eval", "--finetune", weights, *more))


def header(path: Path) -> dict[str, str]:
    """What a file of weights says beside its tensors."""
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def evaluations(folder: Path) -> list[dict]:
    """The lines of a run's evaluations."""
    return [line for line in log_lines(folder) if "val_loss" in line]


# --- what it learns and leaves
# ----------------------------------------------------------------------------------------


def test_it_learns_and_its_results_say_what_and_from_where(finished, pretrained):
    folder, _, results = finished
    assert results_of(folder) == results
    assert results["best_acc1"] >= results["acc1"] > 65  # 33.3 is chance
    assert results["acc1"] == 100 * results["correct1"] / 60 and results["acc5"] == 100.0
    assert (results["num_samples"], results["correct5"], results["num_train"]) == (60, 60, 120)
    weights = pretrained / "model.safetensors"
    assert (results["protocol"], results["checkpoint"], results["dataset"]) == (
        "fine-tuning",
        str(weights),
        "folder",
    )
    assert len(results["sha256"]) == 64
    # 20 validation images of each class
    assert list(results["per_class"]) == list(CLASSES)
    assert sum(results["per_class"].values()) * 20 / 100 == pytest.approx(results["correct1"])
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "best.safetensors",
        "checkpoint-00000060.pth",
        "checkpoint-00000060.pth.sha256",
        "checkpoint-00000070.pth",
        "checkpoint-00000070.pth.sha256",
        "checkpoint-00000080.pth",
        "checkpoint-00000080.pth.sha256",
        "config.yaml",
        "log.jsonl",
        "log.txt",
        "model.safetensors",
        "results.json",
    ]
    lines = evaluations(folder)
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60, 70, 80]
    accuracies = [line["acc1"] for line in lines]
    assert (accuracies[-1], lines[-1]["val_loss"]) == (results["acc1"], results["loss"])
    assert (
        max(accuracies) == results["best_acc1"]
        and accuracies.index(max(accuracies)) + 1 == results["best_epoch"]
    )


def test_it_learns_from_a_pretraining_checkpoint_as_from_its_weights(
    tmp_path, data, pretrained, finished
):
    arguments = pictures(
        data, tmp_path, *LEARN, "--finetune", pretrained / "checkpoint-00000020.pth"
    )
    results = main_finetune.main(arguments)
    assert results["sha256"] != finished[2]["sha256"]  # another file with the same tensors
    assert step_losses(tmp_path) == step_losses(finished[0])


def test_it_learns_from_scratch(tmp_path, data):
    results = main_finetune.main(pictures(data, tmp_path, *LEARN, "--layer_decay", 1))
    assert results["acc1"] > 65
    assert (results["protocol"], results["checkpoint"], results["sha256"]) == (
        "from scratch",
        None,
        None,
    )
    assert "per_class" not in results


def test_pretrained_weights_are_where_training_starts(tmp_path, data, pretrained):
    """With a learning rate that moves nothing, the file that is written is the file that was
    read."""
    more = ["--lr", 1e-30, "--weight_decay", 0, "--stop_epoch", 1]
    main_finetune.main(
        pictures(data, tmp_path, *more, "--finetune", pretrained / "model.safetensors")
    )
    source, ours = (
        load_file(pretrained / "model.safetensors"),
        load_file(tmp_path / "model.safetensors"),
    )
    shared = {name for name in source if not name.startswith(("decoder_", "mask_token", "norm."))}
    assert ours.keys() - shared == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    for name in shared:
        torch.testing.assert_close(ours[name], source[name], rtol=0, atol=1e-9, msg=name)
    assert ours["fc_norm.weight"].eq(1).all() and ours["head.bias"].abs().max() < 1e-9
    assert 1e-5 < ours["head.weight"].std() < 4e-5  # fresh, std 2e-5


def test_a_finished_run_is_left_alone(finished):
    folder, arguments, results = finished
    before = contents(folder)
    assert main_finetune.main(arguments) == results
    assert contents(folder) == before


def test_the_moving_average_is_judged_and_gives_the_best(tmp_path, data, pretrained, all_on):
    results = results_of(all_on)
    lines = evaluations(all_on)
    averages = [line["ema_acc1"] for line in lines]
    assert results["ema"]["acc1"] == averages[-1]
    assert (
        results["best_acc1"] == max(averages)
        and results["best_epoch"] == averages.index(max(averages)) + 1
    )
    assert results["ema"]["loss"] != results["loss"]
    of_best = evaluate(data, tmp_path, all_on / "best.safetensors")
    assert of_best["acc1"] == results["best_acc1"]
    if results["best_epoch"] == 3:
        assert of_best["loss"] == results["ema"]["loss"]
    last = evaluate(
        data, tmp_path, all_on / "model.safetensors"
    )  # of the model itself, without its drop path
    assert (last["acc1"], last["loss"]) == (results["acc1"], results["loss"])


def test_the_moving_average_by_hand(tmp_path, data, monkeypatch):
    heads = []
    original = main_finetune.optimizer_step

    def watched(optimizer, scaler, clip_grad):
        result = original(optimizer, scaler, clip_grad)
        named = {
            n: p
            for g in optimizer.param_groups
            for n, p in zip(g["names"], g["params"], strict=True)
        }
        heads.append(named["head.weight"].detach().clone())
        return result

    monkeypatch.setattr(main_finetune, "optimizer_step", watched)
    main_finetune.main(
        pictures(data, tmp_path, "--ema_decay", 0.75, "--stop_epoch", 1, "--warmup_epochs", 0.1)
    )
    average = heads[
        0
    ]  # lr 0 in the first step: still the initial weights, where the average starts
    for head in heads[1:]:
        average = 0.75 * average + 0.25 * head
    saved = load_newest_checkpoint(tmp_path)
    torch.testing.assert_close(saved["ema"]["head.weight"], average, rtol=1e-5, atol=1e-9)


def test_a_skipped_step_leaves_the_moving_average_alone(tmp_path, data, monkeypatch):
    moved = []
    step, update = main_finetune.optimizer_step, engine.loop.update_ema

    def spoilt(optimizer, scaler, clip_grad):
        if len(moved) == 4:
            optimizer.param_groups[0]["params"][0].grad.view(-1)[0] = float("nan")
        return step(optimizer, scaler, clip_grad)

    def watched(ema, model, found_inf):
        before = {name: tensor.clone() for name, tensor in ema.module.state_dict().items()}
        update(ema, model, found_inf)
        changed = any(
            not torch.equal(before[name], tensor)
            for name, tensor in ema.module.state_dict().items()
        )
        moved.append((bool(found_inf), changed))

    monkeypatch.setattr(main_finetune, "optimizer_step", spoilt)
    monkeypatch.setattr(engine.loop, "update_ema", watched)
    main_finetune.main(
        pictures(data, tmp_path, "--ema_decay", 0.5, "--stop_epoch", 1, "--warmup_epochs", 0)
    )
    assert moved == [(False, True)] * 4 + [(True, False)] + [(False, True)] * 5


# --- --eval
# -----------------------------------------------------------------------------------------------------------


def test_the_files_that_a_run_leaves_evaluate_to_what_it_said(tmp_path, data, finished):
    folder, _, results = finished
    last = evaluate(data, tmp_path / "last", folder / "model.safetensors", "--per_class")
    assert last["protocol"] == "evaluation" and results_of(tmp_path / "last", "eval.json") == last
    for name in ("num_samples", "correct1", "correct5", "acc1", "acc5", "loss", "per_class"):
        assert last[name] == results[name], name
    best = evaluate(data, tmp_path / "best", folder / "best.safetensors")
    assert best["acc1"] == results["best_acc1"]
    (line,) = [line for line in evaluations(folder) if line["epoch"] == results["best_epoch"]]
    assert best["loss"] == line["val_loss"]
    newest = evaluate(data, tmp_path / "newest", folder / "checkpoint-00000080.pth")
    assert (newest["correct1"], newest["loss"]) == (results["correct1"], results["loss"])


def test_eval_judges_the_weights_named_and_not_what_lies_in_the_folder(tmp_path, data, finished):
    folder, _, results = finished
    main_finetune.main(pictures(data, tmp_path / "other", *LEARN, "--seed", 1, "--stop_epoch", 2))
    elsewhere = evaluate(data, tmp_path / "elsewhere", tmp_path / "other" / "model.safetensors")
    assert elsewhere["loss"] != results["loss"]
    before = contents(folder)
    here = evaluate(data, folder, tmp_path / "other" / "model.safetensors")
    assert here == elsewhere == results_of(folder, "eval.json")
    assert contents(folder) == before
    assert here["checkpoint"] == str(tmp_path / "other" / "model.safetensors")


@pytest.mark.parametrize("batch_size", [1, 7, 60])
def test_every_validation_image_counts_once_in_any_batch(tmp_path, data, finished, batch_size):
    folder, _, results = finished
    found = evaluate(data, tmp_path, folder / "model.safetensors", "-b", batch_size)
    assert (found["num_samples"], found["correct1"]) == (60, results["correct1"])
    assert found["loss"] == pytest.approx(results["loss"], rel=1e-5)


def test_eval_needs_a_head_for_these_classes(tmp_path, data, pretrained, finished):
    with pytest.raises(
        InputError, match=r"model.safetensors is no classifier of 3 classes, it lacks .*head.weight"
    ):
        evaluate(data, tmp_path / "run", pretrained / "model.safetensors")
    two = make_pictures(tmp_path / "two", (0, 1), 2, 2, CLASSES[:2])
    with pytest.raises(
        InputError, match=r"model.safetensors is no classifier of 2 classes, it lacks .*head.weight"
    ):
        evaluate(two, tmp_path / "run", finished[0] / "model.safetensors")
    assert looks_like_a_result(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("stage", "trained", "asked"),
    [
        (stage, *readouts)
        for stage in ("finetune", "lincls")
        for readouts in (("token", "avg"), ("avg", "token"))
    ],
)
def test_eval_of_a_classifier_with_the_other_readout_is_an_error(
    tmp_path, data, pretrained, stage, trained, asked
):
    """Its head was trained on another feature: the number would be wrong without a word."""
    weights = tmp_path / "run" / "model.safetensors"
    more = [
        "--global_pool",
        trained,
        "--stop_epoch",
        1,
        "--finetune",
        pretrained / "model.safetensors",
    ]
    results = STAGES[stage](pictures(data, tmp_path / "run", *more))
    same = evaluate(data, tmp_path / "eval", weights, "--global_pool", trained)
    assert same["correct1"] == results["correct1"]
    with pytest.raises(InputError, match="global_pool|norm"):
        evaluate(data, tmp_path / "eval", weights, "--global_pool", asked)


# --- settings that shape the model and the training
# -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "grid"), [((32,), (8, 8)), ((28, 36), (7, 9)), ((36, 28), (9, 7))]
)
def test_another_image_size_resizes_the_positions_and_trains(
    tmp_path, data, pretrained, caplog, size, grid
):
    caplog.set_level(logging.INFO)
    arguments = pictures(
        data, tmp_path, *LEARN, "--stop_epoch", 4, "--finetune", pretrained / "model.safetensors"
    )
    results = main_finetune.main([*arguments, "--img_size", *map(str, size)])
    assert f"positions resized from 7x7 to {grid[0]}x{grid[1]} patches" in caplog.text
    assert load_file(tmp_path / "model.safetensors")["pos_embed"].shape == (
        1,
        grid[0] * grid[1] + 1,
        32,
    )
    losses = results_losses(tmp_path)
    assert losses[-1] < 0.9 * losses[0] and results["best_acc1"] > 45


def results_losses(folder: Path) -> list[float]:
    """Mean training loss of each epoch."""
    return [line["epoch_loss"] for line in log_lines(folder) if "epoch_loss" in line]


@pytest.mark.parametrize("has_token", [True, False])
def test_the_class_token_follows_the_weights(tmp_path, data, pretrained, tokenless, has_token):
    weights = pretrained / "model.safetensors" if has_token else tokenless
    base = ["--finetune", weights, "--stop_epoch", 1]
    main_finetune.main(pictures(data, tmp_path / "null", *base))
    assert ("cls_token" in load_file(tmp_path / "null" / "model.safetensors")) == has_token
    main_finetune.main(
        pictures(data, tmp_path / "stated", *base, "--class_token", str(has_token).lower())
    )
    assert step_losses(tmp_path / "null") == step_losses(tmp_path / "stated")
    with pytest.raises(InputError) as error:
        main_finetune.main(
            pictures(data, tmp_path / "wrong", *base, "--class_token", str(not has_token).lower())
        )
    ours, theirs = ("no", "a") if has_token else ("a", "no")
    assert (
        str(error.value)
        == f"the settings say {ours} class token and {weights} has {theirs} class token"
    )
    assert looks_like_a_result(tmp_path / "wrong") == []


def test_reading_a_class_token_that_the_weights_lack_is_an_error(tmp_path, data, tokenless):
    with pytest.raises(
        InputError,
        match=r"global_pool token reads the class token and .*model.safetensors has none",
    ):
        main_finetune.main(
            pictures(data, tmp_path, "--finetune", tokenless, "--global_pool", "token")
        )
    with pytest.raises(
        InputError, match="global_pool token reads the class token: it needs class_token true"
    ):
        main_finetune.main(
            pictures(data, tmp_path, "--global_pool", "token", "--class_token", "false")
        )
    assert looks_like_a_result(tmp_path) == []


def test_the_class_token_can_be_read(tmp_path, data, pretrained):
    arguments = [
        *LEARN,
        "--stop_epoch",
        4,
        "--global_pool",
        "token",
        "--finetune",
        pretrained / "model.safetensors",
    ]
    results = main_finetune.main(pictures(data, tmp_path, *arguments))
    weights = load_file(tmp_path / "model.safetensors")
    assert "norm.weight" in weights and "fc_norm.weight" not in weights
    assert results["best_acc1"] > 45


def test_a_head_of_another_class_count_is_dropped_and_said_so(tmp_path, data, finished, caplog):
    caplog.set_level(logging.INFO)
    two = make_pictures(tmp_path / "two", (0, 1), 12, 6, CLASSES[:2])
    weights = finished[0] / "model.safetensors"
    results = main_finetune.main(
        pictures(two, tmp_path / "run", "--stop_epoch", 1, "--finetune", weights)
    )
    assert caplog.text.count("head of 3 classes dropped: the data has 2") == 1
    assert load_file(tmp_path / "run" / "model.safetensors")["head.weight"].shape == (2, 32)
    assert results["num_samples"] == 12
    caplog.clear()
    main_finetune.main(
        pictures(data, tmp_path / "same", "--stop_epoch", 1, "--lr", 1e-30, "--finetune", weights)
    )
    assert "dropped" not in caplog.text
    torch.testing.assert_close(
        load_file(tmp_path / "same" / "model.safetensors")["head.weight"],
        load_file(weights)["head.weight"],
    )


def test_a_subset_is_the_same_choice_for_the_same_seed_in_every_stage(
    tmp_path, data, pretrained, monkeypatch
):
    chosen = []
    for stage in (main_finetune, main_lincls, main_knn):
        original = stage.take_subset

        def watched(source, count, seed, original=original):
            subset = original(source, count, seed)
            chosen.append((subset.indices.tolist(), np.bincount(subset.labels).tolist()))
            return subset

        monkeypatch.setattr(stage, "take_subset", watched)
    weights = ["--finetune", pretrained / "model.safetensors", "--subset", 25]
    results = main_finetune.main(pictures(data, tmp_path / "f", *weights, "--stop_epoch", 1))
    main_lincls.main(pictures(data, tmp_path / "l", *weights, "--stop_epoch", 1))
    main_knn.main(pictures(data, tmp_path / "k", *weights, training=False))
    main_finetune.main(pictures(data, tmp_path / "g", *weights, "--stop_epoch", 1, "--seed", 1))
    first, second, third, other = chosen
    assert results["num_train"] == 25 and results["num_samples"] == 60
    assert first == second == third and sorted(first[1]) == [8, 8, 9]  # 25 of three equal classes
    assert other[0] != first[0] and sorted(other[1]) == [8, 8, 9]
    with pytest.raises(
        InputError, match="subset 121 must lie between the 3 classes and the 120 training images"
    ):
        main_finetune.main(pictures(data, tmp_path / "h", *weights, "--subset", 121))


def test_evaluations_come_every_so_many_epochs_and_at_the_end(tmp_path, data):
    main_finetune.main(
        pictures(data, tmp_path, "--eval_epochs", 2, "--epochs", 5, "--stop_epoch", 3)
    )
    assert [line["epoch"] for line in evaluations(tmp_path)] == [2.0, 3.0]


def test_clipping_limits_the_step_and_reports_the_norm_before(tmp_path, data, monkeypatch):
    norms = []
    original = torch.nn.utils.clip_grads_with_norm_

    def watched(parameters, limit, norm):
        original(parameters, limit, norm)
        norms.append(
            (norm.item(), torch.nn.utils.get_total_norm([p.grad for p in parameters]).item())
        )

    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", watched)
    main_finetune.main(pictures(data, tmp_path, "--stop_epoch", 1, "--clip_grad", 1e-3))
    before, after = zip(*norms, strict=True)
    assert len(norms) == PICTURE_STEPS and min(before) > 1e-3
    assert after == pytest.approx([1e-3] * PICTURE_STEPS, rel=1e-3)
    logged = [line["grad_norm"] for line in log_lines(tmp_path) if "grad_norm" in line]
    assert logged == pytest.approx(before)


@pytest.mark.parametrize(
    "off",
    [
        ["--mixup", 0],
        ["--cutmix", 0],
        ["--re_prob", 0],
        ["--drop_path_rate", 0],
        ["--auto_augment", "null"],
        ["--label_smoothing", 0],
        ["--hflip", 0],
        ["--layer_decay", 1],
        ["--weight_decay", 5],
        ["--mixup_switch_prob", 0],
    ],
    ids=lambda off: off[0][2:],
)
def test_each_ingredient_changes_the_losses(tmp_path, data, pretrained, all_on, off):
    weights = ["--finetune", pretrained / "model.safetensors"]
    main_finetune.main(pictures(data, tmp_path, *ALL_ON, *weights, "--stop_epoch", 1, *off))
    ours, theirs = step_losses(tmp_path), step_losses(all_on)
    assert sum(ours[step] != theirs[step] for step in ours) >= 2


def test_each_micro_batch_is_mixed_by_its_own_draw_and_a_repeat_by_the_same(
    tmp_path, data, monkeypatch
):
    drawn = []
    original = main_finetune.BatchMixer.__call__

    def watched(self, images, labels):
        images, targets = original(self, images, labels)
        drawn.append((torch.get_rng_state().sum().item(), targets[0].tolist()))
        return images, targets

    monkeypatch.setattr(main_finetune.BatchMixer, "__call__", watched)
    more = [
        "--mixup",
        0.8,
        "--cutmix",
        1,
        "--re_prob",
        0.5,
        "--epochs",
        2,
        "--warmup_epochs",
        0,
        "-b",
        6,
    ]
    for name in "ab":
        main_finetune.main(pictures(data, tmp_path / name, *more, "--accum_iter", 2))
    first, again = drawn[:40], drawn[40:]
    assert first == again
    assert len(set(map(repr, first))) == 40  # two epochs of ten steps of two micro-batches
    assert (
        len({max(shares) for _, shares in first}) > 15
    )  # where both images are of one class, the shares say nothing


# --- resume
# -----------------------------------------------------------------------------------------------------------


def assert_equal_runs(one: Path, other: Path) -> None:
    """Losses by float.hex, all of the newest checkpoint, the weights, the best and the results."""
    assert step_losses(one) == step_losses(other)
    ours, theirs = load_newest_checkpoint(one), load_newest_checkpoint(other)
    for name in (
        "step",
        "model",
        "ema",
        "optimizer",
        "scaler",
        "samples_seen",
        "total_batch",
        "epoch_losses",
    ):
        assert_same(ours[name], theirs[name], name)
    for name in ("model.safetensors", "best.safetensors"):
        assert_same(load_file(one / name), load_file(other / name), name)
        assert header(one / name) == header(other / name), name
    assert results_of(one) == results_of(other)
    facts = ("step", "epoch", "val_loss", "acc1", "ema_acc1")
    assert [[line[n] for n in facts] for line in evaluations(one)] == [
        [line[n] for n in facts] for line in evaluations(other)
    ]


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 2), (2, 0)])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, data, pretrained, all_on, before, after):
    """Mixup, cutmix, erasing, drop path, RandAugment and the moving average on; other workers
    change nothing."""
    base = pictures(data, tmp_path, *ALL_ON, "--finetune", pretrained / "model.safetensors")
    stopped = main_finetune.main([*base, "--stop_epoch", "1", "--num_workers", str(before)])
    assert stopped == results_of(tmp_path) and (tmp_path / "model.safetensors").exists()
    main_finetune.main([*base, "--num_workers", str(after)])
    assert_equal_runs(all_on, tmp_path)
    losses = list(step_losses(tmp_path).values())
    assert len(set(losses)) == 3 * PICTURE_STEPS  # not vacuous


class Cut(BaseException):
    """Ends a run as a kill would, without any of its own tidying up."""


def cut_after(monkeypatch, stage, name: str, steps: int) -> None:
    """Makes `stage.name`, which takes the optimiser's step, end the run in place of step `steps` +
    1."""
    original = getattr(stage, name)
    taken = []

    def counted(*args, **kwargs):
        if len(taken) == steps:
            raise Cut
        taken.append(None)
        return original(*args, **kwargs)

    monkeypatch.setattr(stage, name, counted)


@pytest.mark.parametrize("steps", [1, 9, 10, 14])
def test_a_run_that_is_cut_within_an_epoch_goes_on_bit_for_bit(
    tmp_path, data, pretrained, all_on, monkeypatch, steps
):
    """After its first step, before the last of an epoch, at its end, and in the middle of the
    next."""
    base = pictures(
        data,
        tmp_path,
        *ALL_ON,
        "--finetune",
        pretrained / "model.safetensors",
        "--save_minutes",
        1e-9,
    )
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_after(patch, main_finetune, "optimizer_step", steps)
        main_finetune.main(base)
    assert load_newest_checkpoint(tmp_path)["step"] == steps
    assert not (tmp_path / "results.json").exists()
    main_finetune.main(base)
    assert_equal_runs(all_on, tmp_path)


def test_accumulated_steps_resume_bit_for_bit(tmp_path, data, pretrained):
    more = [*ALL_ON, "--finetune", pretrained / "model.safetensors", "-b", 6, "--accum_iter", 2]
    main_finetune.main(pictures(data, tmp_path / "whole", *more))
    main_finetune.main(pictures(data, tmp_path / "stopped", *more, "--stop_epoch", 2))
    main_finetune.main(pictures(data, tmp_path / "stopped", *more, "--num_workers", 2))
    assert_equal_runs(tmp_path / "whole", tmp_path / "stopped")
    assert load_newest_checkpoint(tmp_path / "whole")["total_batch"] == 12
    assert len(step_losses(tmp_path / "whole")) == 3 * PICTURE_STEPS


def test_one_batch_equals_accumulated_micro_batches(tmp_path, data, pretrained):
    more = [
        "--drop_path_rate",
        0,
        "--finetune",
        pretrained / "model.safetensors",
        "--stop_epoch",
        1,
    ]
    main_finetune.main(pictures(data, tmp_path / "once", *more))
    main_finetune.main(pictures(data, tmp_path / "twice", *more, "-b", 6, "--total_batch_size", 12))
    for one, other in zip(log_lines(tmp_path / "once"), log_lines(tmp_path / "twice"), strict=True):
        if "grad_norm" in one:
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def scripted(monkeypatch, correct: list[int]) -> None:
    """Makes evaluations say so many right of 60, one after the other."""
    says = iter(correct)

    def call(self, classify, num_heads=1):
        right = next(says)
        return [Scores(60, right, 60, 1.0, [right, 0, 0], [20, 20, 20])]

    monkeypatch.setattr(engine.evaluation.classification.Evaluator, "__call__", call)


def best_of(folder: Path) -> tuple[float, int]:
    facts = header(folder / "best.safetensors")
    return json.loads(facts["acc1"]), json.loads(facts["epoch"])


def test_a_later_epoch_that_is_worse_or_equal_never_replaces_the_best(tmp_path, data, monkeypatch):
    base = pictures(data, tmp_path, "--epochs", 5)
    scripted(monkeypatch, [40, 45])
    main_finetune.main([*base, "--stop_epoch", "2"])
    assert best_of(tmp_path) == (75.0, 2)
    kept = (tmp_path / "best.safetensors").read_bytes()
    scripted(monkeypatch, [30, 45, 44])
    results = main_finetune.main(base)
    assert (results["acc1"], results["best_acc1"], results["best_epoch"]) == (
        100 * 44 / 60,
        75.0,
        2,
    )
    assert (tmp_path / "best.safetensors").read_bytes() == kept
    assert [line["acc1"] for line in evaluations(tmp_path)] == [
        100 * n / 60 for n in (40, 45, 30, 45, 44)
    ]


def test_a_best_left_by_a_run_without_a_checkpoint_is_not_believed(tmp_path, data, monkeypatch):
    base = pictures(data, tmp_path, "--epochs", 2)
    scripted(monkeypatch, [50])
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(main_finetune.Saver, "save", lambda *_: (_ for _ in ()).throw(Cut()))
        main_finetune.main(base)
    assert best_of(tmp_path) == (100 * 50 / 60, 1)
    scripted(monkeypatch, [20, 10])
    assert main_finetune.main(base)["best_acc1"] == 100 * 20 / 60
    assert best_of(tmp_path) == (100 * 20 / 60, 1)


def test_results_lost_after_the_last_checkpoint_are_found_again(tmp_path, data, finished):
    shutil.copytree(finished[0], tmp_path / "copy")
    arguments = [str(tmp_path / "copy") if a == str(finished[0]) else a for a in finished[1]]
    (tmp_path / "copy" / "results.json").unlink()
    (tmp_path / "copy" / "model.safetensors").unlink()
    assert main_finetune.main(arguments) == finished[2]
    assert_same(
        load_file(tmp_path / "copy" / "model.safetensors"),
        load_file(finished[0] / "model.safetensors"),
    )
    assert best_of(tmp_path / "copy") == best_of(finished[0])
    assert evaluations(tmp_path / "copy") == evaluations(
        finished[0]
    )  # the last one was made again, and is there once


def test_equal_weights_are_equal_files(tmp_path, data, pretrained):
    """Results and resume tell weights apart by the sha256 of their file."""
    for name in "abcd":
        arguments = ["--finetune", pretrained / "model.safetensors", "--stop_epoch", 1]
        main_finetune.main(pictures(data, tmp_path / name, *arguments))
    files = {(tmp_path / name / "model.safetensors").read_bytes() for name in "abcd"}
    assert len(files) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--lr", 0.2], "lr: 0.1 -> 0.2"),
        (["--epochs", 9], "epochs: 8 -> 9"),
        (["--mixup", 0.8], "mixup: 0.0 -> 0.8"),
        (["--drop_path_rate", 0.2], "drop_path_rate: 0.0 -> 0.2"),
        (["--ema_decay", 0.9], "ema_decay: None -> 0.9"),
        (["--subset", 60], "images: "),
        (["--eval_epochs", 2], "eval_epochs: 1 -> 2"),
        (["--img_size", 32], "img_size: 28 -> 32"),
        (["--global_pool", "token"], "global_pool: avg -> token"),
        (["--seed", 1], "seed: 0 -> 1"),
        (
            ["-b", 24],
            "the run's total batch so far, 12 is not a multiple of batch_size 24 x 1 processes = 24",
        ),
        (["--total_batch_size", 24], "total_batch_size is now 24 and the run so far has 12"),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, list) else "",
)
def test_a_changed_setting_is_refused_on_resume(finished, change, message):
    folder, arguments, _ = finished
    before = contents(folder)
    with pytest.raises(InputError) as error:
        main_finetune.main([*arguments, *map(str, change)])
    assert message in str(error.value)
    assert contents(folder) == before


def test_other_weights_are_refused_on_resume_and_moved_ones_are_not(
    tmp_path, data, pretrained, finished
):
    folder, arguments, results = finished
    moved = shutil.copy(pretrained / "model.safetensors", tmp_path / "moved.safetensors")
    assert main_finetune.main([*arguments, "--finetune", str(moved)]) == results
    other = pretrained / "checkpoint-00000010.pth"
    with pytest.raises(
        InputError, match=f"finetune: weights of sha256 {results['sha256']} -> [0-9a-f]{{64}}"
    ):
        main_finetune.main([*arguments, "--finetune", str(other)])
    with pytest.raises(
        InputError, match=f"finetune: weights of sha256 {results['sha256']} -> None"
    ):
        main_finetune.main([*arguments, "--finetune", "null", "--class_token", "true"])
    assert results_of(folder) == results


@pytest.mark.long
def test_killed_runs_resume_bit_for_bit(tmp_path, data, pretrained, all_on):
    """SIGKILL at several steps, in processes of their own with two loader processes."""
    base = pictures(data, tmp_path, *ALL_ON, "--finetune", pretrained / "model.safetensors")
    arguments = [*base, "--save_minutes", "1e-9", "--num_workers", "2"]
    for step in (1, 12, 20):
        process = subprocess.Popen(
            command(*arguments, script="main_finetune.py"),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if any(int(path.name[11:19]) >= step for path in tmp_path.glob("checkpoint-*.sha256")):
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        assert process.wait() == -signal.SIGKILL, "the run must be killed before it ends by itself"
    assert not (tmp_path / "results.json").exists()
    result = run(command(*arguments, script="main_finetune.py"))
    assert result.returncode == 0, result.stderr
    assert "resuming" in result.stdout
    assert_equal_runs(all_on, tmp_path)


# --- refused, with one clear line, before any compute
# -----------------------------------------------------------------


def missing(tmp_path: Path) -> tuple[Path, str]:
    return tmp_path / "none.pth", "none.pth: there is no such file"


def text(tmp_path: Path) -> tuple[Path, str]:
    (tmp_path / "notes.pth").write_text("not weights\n" * 20)
    return tmp_path / "notes.pth", "notes.pth: a text file, not a PyTorch or safetensors file"


def image(tmp_path: Path) -> tuple[Path, str]:
    Image.new("L", (28, 28)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png", "picture.png: an image, not a PyTorch or safetensors file"


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def bomb(tmp_path: Path) -> tuple[Path, str]:
    torch.save({"model": {"x": Bomb(tmp_path / "marker")}}, tmp_path / "bomb.pth")
    return (
        tmp_path / "bomb.pth",
        "bomb.pth: refused, it asks to run or build posix.mkdir: only tensors and plain",
    )


def damaged(tmp_path: Path) -> tuple[Path, str]:
    torch.save({"model": {"pos_embed": torch.ones(1, 50, 32)}}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:400])
    return tmp_path / "cut.pth", "cut.pth: cannot be read as a PyTorch file"


def arguments_of(stage: str, data: Path, output: Path, *more) -> list[str]:
    return pictures(data, output, *more, training=stage != "knn")


@pytest.fixture
def no_compute(monkeypatch):
    def forbidden(*_):
        raise AssertionError("reached the model")

    monkeypatch.setattr(VisionTransformer, "forward_features", forbidden)


@pytest.mark.parametrize(
    "make", [missing, text, image, bomb, damaged], ids=lambda make: make.__name__
)
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_no_weights_is_refused_before_any_compute(tmp_path, data, no_compute, stage, make):
    weights, message = make(tmp_path)
    with pytest.raises(InputError) as error:
        STAGES[stage](arguments_of(stage, data, tmp_path / "run", "--finetune", weights))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert looks_like_a_result(tmp_path / "run") == []
    assert not (tmp_path / "marker").exists()


def test_the_bomb_would_go_off(tmp_path):
    bomb(tmp_path)
    torch.load(tmp_path / "bomb.pth", weights_only=False)
    assert (tmp_path / "marker").is_dir()


@pytest.mark.parametrize("change", [["--embed_dim", 48], ["--depth", 3], ["--patch_size", 7]])
@pytest.mark.parametrize("stage", STAGES)
def test_weights_of_another_shape_are_refused_with_both_sides(
    tmp_path, data, pretrained, no_compute, stage, change
):
    weights = ["--finetune", pretrained / "model.safetensors"]
    with pytest.raises(InputError) as error:
        STAGES[stage](arguments_of(stage, data, tmp_path / "run", *weights, *change))
    name = change[0].lstrip("-")
    theirs, ours = {"embed_dim": (32, 48), "depth": (2, 3), "patch_size": ("4x4", "7x7")}[name]
    assert f"{name} {theirs} in the file, {ours} in the settings" in str(error.value)
    assert looks_like_a_result(tmp_path / "run") == []


def without_a_class(root: Path) -> str:
    shutil.rmtree(root / "val" / "one")
    return f"1 class folders are in {root / 'train'} and not in val/: one"


def with_an_empty_class(root: Path) -> str:
    for path in (root / "train" / "seven").iterdir():
        path.unlink()
    return f"1 class folders in {root / 'train'} hold no image: seven"


def without_val(root: Path) -> str:
    shutil.rmtree(root / "val")
    return f"data_path {root} has no val/: it must hold train/ and val/, with a folder per class"


@pytest.mark.parametrize(
    "spoil", [without_a_class, with_an_empty_class, without_val], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("stage", STAGES)
def test_folders_that_would_only_show_as_a_bad_accuracy(
    tmp_path, pretrained, no_compute, stage, spoil
):
    root = make_pictures(tmp_path / "data", train=2, val=2)
    message = spoil(root)
    weights = ["--finetune", pretrained / "model.safetensors"]
    with pytest.raises(InputError) as error:
        STAGES[stage](arguments_of(stage, root, tmp_path / "run", *weights))
    assert str(error.value) == message
    assert looks_like_a_result(tmp_path / "run") == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_wrong_number_of_classes_is_refused(tmp_path, data, no_compute, stage):
    random = [] if stage == "finetune" else ["--finetune", "random"]
    with pytest.raises(
        InputError, match="num_classes is 10 and the data has 3 classes: leave num_classes out"
    ):
        STAGES[stage](arguments_of(stage, data, tmp_path / "run", *random, "--num_classes", 10))


@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_validation_image_fails_the_evaluation_and_names_the_file(
    tmp_path, pretrained, stage
):
    root = make_pictures(tmp_path / "data", train=12, val=4)
    bad = root / "val" / "one" / "013.png"
    bad.write_bytes(bad.read_bytes()[:60])
    weights = ["--finetune", pretrained / "model.safetensors"]
    with pytest.raises(InputError, match=str(bad)):
        STAGES[stage](arguments_of(stage, root, tmp_path / "run", *weights))
    assert not {"results.json", "model.safetensors", "best.safetensors"} & set(
        looks_like_a_result(tmp_path / "run")
    )


@pytest.mark.parametrize("stage", ["finetune", "lincls"])
def test_a_bad_training_image_is_replaced_and_written_down(tmp_path, pretrained, stage):
    root = make_pictures(tmp_path / "data", train=12, val=4)
    bad = root / "train" / "one" / "003.png"
    bad.write_bytes(b"")
    weights = ["--finetune", pretrained / "model.safetensors"]
    results = STAGES[stage](arguments_of(stage, root, tmp_path / "run", *weights))
    entries = [
        json.loads(line)
        for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    ]
    assert entries == [{"path": str(bad), "reason": "the file is empty"}]
    assert results["num_train"] == 36 and results["num_samples"] == 12
    assert [line["bad_files"] for line in log_lines(tmp_path / "run") if "bad_files" in line][
        -1
    ] == 1


REFUSED = {
    "odd batch with mixup": (
        ["--mixup", 0.8, "-b", 15],
        "batch_size 15 is odd: mixup and cutmix pair the images of a batch",
    ),
    "odd batch with cutmix": (
        ["--cutmix", 1, "-b", 15],
        "batch_size 15 is odd: mixup and cutmix pair the images of a batch",
    ),
    "augmentation": (
        ["--auto_augment", "rand-m9-typo2"],
        "auto_augment must be like rand-m9-mstd0.5-inc1, got 'rand-m9-typo2'",
    ),
    "another augmentation": (
        ["--auto_augment", "v0"],
        "auto_augment must be like rand-m9-mstd0.5-inc1, got 'v0'",
    ),
    "random": (["--finetune", "random"], "finetune random belongs to the frozen evaluations"),
    "eval of nothing": (["--eval"], "eval needs the classifier to evaluate: give --finetune PATH"),
    "too few images": (["-b", 128], "the data set has 120 images and one optimiser step takes 128"),
    "accumulation": (
        ["--total_batch_size", 20],
        "total_batch_size 20 is not a multiple of batch_size 12",
    ),
}


@pytest.mark.parametrize(("more", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_settings_that_do_not_go_together_are_refused(tmp_path, data, no_compute, more, message):
    with pytest.raises(InputError) as error:
        main_finetune.main(pictures(data, tmp_path / "run", *more))
    assert message in str(error.value)
    assert looks_like_a_result(tmp_path / "run") == []


@pytest.mark.parametrize("poisoned", [True, False])
def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_no_result(
    tmp_path, data, pretrained, poisoned
):
    more = ["--lr", 1e9, "--warmup_epochs", 0]
    if poisoned:
        tensors = load_file(pretrained / "model.safetensors")
        tensors["blocks.0.mlp.fc1.bias"][0] = float("nan")
        save_file(
            tensors, tmp_path / "poisoned.safetensors", header(pretrained / "model.safetensors")
        )
        more = ["--finetune", tmp_path / "poisoned.safetensors", "--lr", 1e-3]
    with pytest.raises(
        InputError, match=r"steps in a row up to step \d+ had a non-finite gradient"
    ):
        main_finetune.main(pictures(data, tmp_path / "run", *more))
    assert not {"results.json", "model.safetensors"} & set(looks_like_a_result(tmp_path / "run"))


def test_the_command_line_user_sees_lines_and_no_traceback(tmp_path, data):
    arguments = pictures(data, tmp_path / "run", "--mixup", 0.8, "-b", 15, "--auto_augment", "typo")
    result = run(command(*arguments, script="main_finetune.py"))
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: 2 problems in the settings:",
        "  batch_size 15 is odd: mixup and cutmix pair the images of a batch",
        "  auto_augment must be like rand-m9-mstd0.5-inc1, got 'typo'",
    ]
    assert result.stdout == ""
    assert not (tmp_path / "run").exists()


def test_the_written_config_repeats_the_run(finished, tmp_path):
    folder = finished[0]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["lr"], config["img_size"], config["num_classes"]) == (0.1, 28, None)
    main_finetune.main(["--config", str(folder / "config.yaml"), "--output_dir", str(tmp_path)])
    assert step_losses(tmp_path) == step_losses(folder)
    assert results_of(tmp_path) == results_of(folder)


def test_the_weights_that_are_read_are_those_named(pretrained, data):
    """The fixtures are what the tests take them for."""
    assert (
        read_weights(pretrained / "checkpoint-00000020.pth")[0].keys()
        == read_weights(pretrained / "model.safetensors")[0].keys()
    )
    found = build_labelled_data("folder", str(data), 1, False, None)
    assert (len(found.train), len(found.val), found.class_names) == (120, 60, list(CLASSES))
