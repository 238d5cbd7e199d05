"""`main_finetune.py` end to end: what it learns and leaves, --eval, exact resume, and what it
refuses."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import assert_same, assert_same_run, class_scores
from runs import (
    CLASSES,
    PICTURE_STEPS,
    Cut,
    changed_files,
    cut_after,
    files_of,
    log_lines,
    make_pictures,
    pictures,
    results_of,
    step_losses,
)
from safetensors.torch import load_file

import engine.evaluation.classification
import engine.loop
import main_finetune
import main_knn
import main_lincls
from engine.mixing import BatchMixer
from engine.run.checkpoint import load_newest_checkpoint
from engine.tasks import classification, linear
from models.vit import VisionTransformer
from models.weights.own import read_header
from util.errors import InputError

# learns: no regularisation, a full-speed schedule; chance is 33.3 %
LEARN = shlex.split("""--lr 0.1 --epochs 8 --warmup_epochs 1 --crop_min 0.8 --label_smoothing 0
--drop_path_rate 0 --clip_grad 1""")
# everything that draws random numbers, and the moving average
ALL_ON = shlex.split("""--lr 0.03 --mixup 0.8 --cutmix 1.0 --re_prob 0.5 --drop_path_rate 0.3
--hflip 0.5 --auto_augment rand-m9-mstd0.5-inc1 --ema_decay 0.8 --clip_grad 1""")
long = pytest.mark.long
RUN_FILES = {"log.txt", ".lock"}  # each start writes to them
STAGES = {"finetune": main_finetune.main, "lincls": main_lincls.main, "knn": main_knn.main}


def finetune(data: Path, output: Path, *more) -> dict:
    """Results of a run on `data`."""
    return main_finetune.main(pictures(data, output, *more))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data, weights):
    """A run that is done: its folder, command line and results."""
    folder = tmp_path_factory.mktemp("finished")
    arguments = pictures(data, folder, *LEARN, "--finetune", weights, "--per_class")
    return folder, arguments, main_finetune.main(arguments)


@pytest.fixture(scope="module")
def all_on(tmp_path_factory, data, weights):
    """An uninterrupted run with everything random on."""
    folder = tmp_path_factory.mktemp("all_on")
    finetune(data, folder, *ALL_ON, "--finetune", weights)
    return folder


def looks_like_a_result(folder: Path) -> list[str]:
    """Names in a run's folder that a reader would take for the outcome of something."""
    endings = (".pth", ".sha256", ".safetensors", ".json", ".yaml", ".tmp")
    return [path.name for path in folder.glob("**/*") if path.name.endswith(endings)]


def evaluate(data: Path, folder: Path, weights: Path, *more) -> dict:
    """`--eval` of a file of weights."""
    return finetune(data, folder, "--eval", "--finetune", weights, *more)


def evaluations(folder: Path) -> list[dict]:
    """The lines of a run's evaluations."""
    return [line for line in log_lines(folder) if "val_loss" in line]


# --- what it learns and leaves


def test_it_learns_and_its_results_say_what_and_from_where(finished, weights):
    folder, _, results = finished
    assert results_of(folder) == results
    assert results["best_acc1"] >= results["acc1"] > 65  # 33.3 is chance
    assert results["acc1"] == 100 * results["correct1"] / 60 and results["acc5"] == 100.0
    assert (results["num_samples"], results["correct5"], results["num_train"]) == (60, 60, 120)
    names = ("protocol", "checkpoint", "dataset")
    assert [results[name] for name in names] == ["fine-tuning", str(weights), "folder"]
    assert len(results["sha256"]) == 64
    # 20 validation images of each class
    assert list(results["per_class"]) == list(CLASSES)
    assert sum(results["per_class"].values()) * 20 / 100 == pytest.approx(results["correct1"])
    left = {"best.safetensors", "checkpoint-00000080.pth", "config.yaml", "log.jsonl"}
    assert left | {"model.safetensors"} < {path.name for path in folder.iterdir()}
    lines = evaluations(folder)
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60, 70, 80]
    accuracies = [line["acc1"] for line in lines]
    assert (accuracies[-1], lines[-1]["val_loss"]) == (results["acc1"], results["loss"])
    assert max(accuracies) == results["best_acc1"]
    assert accuracies.index(max(accuracies)) + 1 == results["best_epoch"]


def test_it_learns_from_a_pretraining_checkpoint_as_from_its_weights(
    tmp_path, data, pretrained, finished
):
    weights = pretrained / "checkpoint-00000020.pth"
    results = finetune(data, tmp_path, *LEARN, "--finetune", weights, "--stop_epoch", 1)
    assert results["sha256"] != finished[2]["sha256"]  # another file with the same tensors
    ours = step_losses(tmp_path)
    assert len(ours) == PICTURE_STEPS and ours.items() <= step_losses(finished[0]).items()


def test_it_learns_from_scratch(tmp_path, data):
    results = finetune(data, tmp_path, *LEARN, "--layer_decay", 1)
    assert results["acc1"] > 65 and "per_class" not in results
    names = ("protocol", "checkpoint", "sha256")
    assert [results[name] for name in names] == ["from scratch", None, None]


def test_a_finished_run_is_left_alone(finished):
    folder, arguments, results = finished
    before = files_of(folder)
    assert main_finetune.main(arguments) == results
    assert changed_files(folder, before) <= RUN_FILES


def test_the_moving_average_is_evaluated_and_gives_the_best(tmp_path, data, all_on):
    results = results_of(all_on)
    averages = [line["ema_acc1"] for line in evaluations(all_on)]
    assert results["ema"]["acc1"] == averages[-1]
    assert results["best_acc1"] == max(averages)
    assert results["best_epoch"] == averages.index(max(averages)) + 1
    assert results["ema"]["loss"] != results["loss"]
    assert evaluate(data, tmp_path, all_on / "best.safetensors")["acc1"] == max(averages)
    # the model itself, without its drop path
    last = evaluate(data, tmp_path, all_on / "model.safetensors")
    assert (last["acc1"], last["loss"]) == (results["acc1"], results["loss"])


def test_the_moving_average_by_hand_and_a_skipped_step_leaves_it_alone(tmp_path, data, monkeypatch):
    weights, skipped = [], []
    original = engine.loop.optimizer_step

    def watched(optimizer, scaler, clip_grad):
        if len(weights) == 4:
            optimizer.param_groups[0]["params"][0].grad.view(-1)[0] = float("nan")
        norm, found_inf = original(optimizer, scaler, clip_grad)
        names = [name for group in optimizer.param_groups for name in group["names"]]
        values = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        weights.append(dict(zip(names, values, strict=True)))
        skipped.append(bool(found_inf))
        return norm, found_inf

    monkeypatch.setattr(engine.loop, "optimizer_step", watched)
    finetune(data, tmp_path, "--ema_decay", 0.75, "--stop_epoch", 1, "--warmup_epochs", 0.1)
    assert skipped == [False] * 4 + [True] + [False] * 5
    ema = load_newest_checkpoint(tmp_path).ema
    assert ema.keys() == weights[0].keys()
    for name in weights[0]:
        # lr is 0 in the first step: these are still the initial weights, where the average starts
        average = weights[0][name]
        for of_step, is_skipped in list(zip(weights, skipped, strict=True))[1:]:
            average = average if is_skipped else 0.75 * average + 0.25 * of_step[name]
        torch.testing.assert_close(ema[name], average, rtol=1e-5, atol=1e-9)


# --- --eval


def test_the_files_that_a_run_leaves_evaluate_to_what_it_said(tmp_path, data, finished):
    folder, _, results = finished
    last = evaluate(data, tmp_path / "last", folder / "model.safetensors", "--per_class")
    assert last["protocol"] == "evaluation" and results_of(tmp_path / "last", "eval.json") == last
    for name in ("num_samples", "correct1", "correct5", "acc1", "acc5", "loss", "per_class"):
        assert last[name] == results[name], name
    best = evaluate(data, tmp_path / "best", folder / "best.safetensors")
    (line,) = [line for line in evaluations(folder) if line["epoch"] == results["best_epoch"]]
    assert (best["acc1"], best["loss"]) == (results["best_acc1"], line["val_loss"])


def test_eval_takes_the_weights_named_and_not_what_lies_in_the_folder(tmp_path, data, finished):
    folder, _, results = finished
    other = tmp_path / "other" / "model.safetensors"
    finetune(data, other.parent, *LEARN, "--seed", 1, "--stop_epoch", 2)
    before = files_of(folder)
    here = evaluate(data, folder, other)
    assert here["loss"] != results["loss"] and here["checkpoint"] == str(other)
    assert here == evaluate(data, tmp_path / "elsewhere", other)
    assert changed_files(folder, before) == {"log.txt", "eval.json", "eval_predictions.npz"}


# --- settings that shape the model and the training


def test_another_image_size_resizes_the_positions_and_trains(tmp_path, data, weights):
    more = [*LEARN, "--stop_epoch", 4, "--finetune", weights, "--img_size", 28, 36]
    assert finetune(data, tmp_path, *more)["best_acc1"] > 45
    found = load_file(tmp_path / "model.safetensors")["pos_embed"]
    assert found.shape == (1, 7 * 9 + 1, 32)


FREEZE = ["--freeze_blocks", 1]  # of 2
LORA = ["--lora_rank", 4]


@pytest.mark.parametrize("part", [FREEZE, LORA, [*LORA, "--compile", "--compile_backend", "eager"]])
def test_a_part_is_trained_and_the_weights_left_are_plain(tmp_path, data, weights, part):
    """It goes on bit for bit; what is frozen stays, all else learns, and the best weights are the
    moving average's."""
    base = [*ALL_ON, "--finetune", weights, *part]
    finetune(data, tmp_path / "whole", *base)
    finetune(data, tmp_path / "stopped", *base, "--stop_epoch", 1)
    finetune(data, tmp_path / "stopped", *base, "--num_workers", 1)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    source, left = load_file(weights), load_file(tmp_path / "whole" / "model.safetensors")
    model = VisionTransformer(**read_header(tmp_path / "whole" / "model.safetensors")["model_args"])
    assert left.keys() == model.state_dict().keys()
    if part is FREEZE:
        trained = {name for name in left if name.startswith("blocks.1.")}
    else:
        trained = {n for n in left if n.endswith(("qkv.weight", "proj.weight")) and "attn" in n}
    trained |= {name for name in left if name.startswith(("head", "fc_norm"))}
    changed = {name for name in left if not torch.equal(left[name], source.get(name, left[name]))}
    assert changed == {name for name in trained if name in source}
    content = load_newest_checkpoint(tmp_path / "whole").model
    assert sum("lora" in name for name in content) == (0 if part is FREEZE else 2 * 2 * 2)
    results = results_of(tmp_path / "whole")
    last = evaluate(data, tmp_path / "eval", tmp_path / "whole" / "model.safetensors")
    assert last["acc1"] == results["acc1"]
    assert last["loss"] == pytest.approx(results["loss"], abs=1e-6)
    best = evaluate(data, tmp_path / "eval", tmp_path / "whole" / "best.safetensors")
    assert best["acc1"] == results["best_acc1"]


def test_low_rank_sums_learn_and_frozen_blocks_drop_no_paths(tmp_path, data, weights):
    more = [*LEARN, "--finetune", weights, "--lora_rank", 8]
    assert finetune(data, tmp_path / "lora", *more)["best_acc1"] > 55  # 33.3 is chance
    losses = []
    for rate in (0, 0.5):
        more = ["--finetune", weights, "--freeze_blocks", 2, "--drop_path_rate", rate]
        finetune(data, tmp_path / str(rate), *more, "--stop_epoch", 1)
        losses.append(step_losses(tmp_path / str(rate)))
    assert losses[0] == losses[1]


def test_a_subset_is_the_same_choice_for_the_same_seed_in_every_stage(
    tmp_path, data, weights, monkeypatch
):
    chosen = []

    def watched(source, count, seed, original=main_knn.take_subset):
        chosen.append(original(source, count, seed))
        return chosen[-1]

    for stage in (classification, linear, main_knn):
        monkeypatch.setattr(stage, "take_subset", watched)
    more = ["--finetune", weights, "--subset", 25]
    results = finetune(data, tmp_path / "f", *more, "--stop_epoch", 1)
    main_lincls.main(pictures(data, tmp_path / "l", *more, "--stop_epoch", 1))
    main_knn.main(pictures(data, tmp_path / "k", *more, training=False))
    finetune(data, tmp_path / "g", *more, "--stop_epoch", 1, "--seed", 1)
    assert results["num_train"] == 25 and results["num_samples"] == 60
    first, second, third, other = (subset.indices.tolist() for subset in chosen)
    assert first == second == third != other
    for subset in chosen:  # 25 of three equal classes
        assert sorted(np.bincount(subset.labels)) == [8, 8, 9]
    with pytest.raises(InputError, match="subset"):
        finetune(data, tmp_path / "h", *more, "--subset", 121)


def test_evaluations_come_every_so_many_epochs_and_at_the_end(tmp_path, data):
    finetune(data, tmp_path, "--eval_epochs", 2, "--epochs", 5, "--stop_epoch", 3)
    assert [line["epoch"] for line in evaluations(tmp_path)] == [2.0, 3.0]


OFF = shlex.split("mixup cutmix re_prob drop_path_rate label_smoothing hflip mixup_switch_prob")
OTHER = {"auto_augment": "null", "layer_decay": 1, "weight_decay": 5} | dict.fromkeys(OFF, 0)


@pytest.mark.parametrize(("setting", "value"), OTHER.items(), ids=OTHER)
def test_each_ingredient_changes_the_losses(tmp_path, data, weights, all_on, setting, value):
    more = ["--finetune", weights, "--stop_epoch", 1, f"--{setting}", value]
    finetune(data, tmp_path, *ALL_ON, *more)
    ours, theirs = step_losses(tmp_path), step_losses(all_on)
    assert sum(ours[step] != theirs[step] for step in ours) >= 2


def test_each_micro_batch_is_mixed_by_its_own_draw_and_a_repeat_by_the_same(
    tmp_path, data, monkeypatch
):
    drawn = []
    original = BatchMixer.__call__

    def watched(self, images, labels):
        images, targets = original(self, images, labels)
        drawn.append((torch.get_rng_state().sum().item(), targets[0].tolist()))
        return images, targets

    monkeypatch.setattr(BatchMixer, "__call__", watched)
    more = shlex.split("--mixup 0.8 --cutmix 1 --re_prob 0.5 --epochs 2 --warmup_epochs 0 -b 6")
    for name in "ab":
        finetune(data, tmp_path / name, *more, "--accum_iter", 2)
    first, again = drawn[:40], drawn[40:]
    assert first == again
    assert len(set(map(repr, first))) == 40  # two epochs of ten steps of two micro-batches
    # where both images are of one class, the shares say nothing
    assert len({max(shares) for _, shares in first}) > 15


# --- resume


@pytest.mark.parametrize(("before", "after"), [(0, 2), pytest.param(2, 0, marks=long)])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, data, weights, all_on, before, after):
    """Mixup, cutmix, erasing, drop path, RandAugment and the moving average on; other workers
    change nothing."""
    base = [*ALL_ON, "--finetune", weights, "--num_workers"]
    stopped = finetune(data, tmp_path, *base, before, "--stop_epoch", 1)
    assert stopped == results_of(tmp_path) and (tmp_path / "model.safetensors").exists()
    finetune(data, tmp_path, *base, after)
    assert_same_run(all_on, tmp_path)
    assert len(set(step_losses(tmp_path).values())) == 3 * PICTURE_STEPS  # not vacuous


@pytest.mark.parametrize("steps", [1, *(pytest.param(n, marks=long) for n in (9, 10)), 14])
def test_a_run_that_is_cut_within_an_epoch_goes_on_bit_for_bit(
    tmp_path, data, weights, all_on, monkeypatch, steps
):
    """After its first step, before the last of an epoch, at its end, and in the middle of the
    next."""
    base = [*ALL_ON, "--finetune", weights, "--save_minutes", 1e-9]
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_after(patch, steps)
        finetune(data, tmp_path, *base)
    assert load_newest_checkpoint(tmp_path).step == steps
    assert not (tmp_path / "results.json").exists()
    finetune(data, tmp_path, *base)
    assert_same_run(all_on, tmp_path)


@long
def test_accumulated_steps_resume_bit_for_bit(tmp_path, data, weights):
    more = [*ALL_ON, "--finetune", weights, "-b", 6, "--accum_iter", 2]
    finetune(data, tmp_path / "whole", *more)
    finetune(data, tmp_path / "stopped", *more, "--stop_epoch", 2)
    finetune(data, tmp_path / "stopped", *more, "--num_workers", 2)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert load_newest_checkpoint(tmp_path / "whole").total_batch == 12
    assert len(step_losses(tmp_path / "whole")) == 3 * PICTURE_STEPS


def scripted(monkeypatch, correct: list[int]) -> None:
    """Makes evaluations say so many right of 60, one after the other."""
    says = iter(correct)

    def call(self, classify, num_heads=1):
        right = next(says)
        return [class_scores(60, [right, 0, 0], [20, 20, 20])]

    monkeypatch.setattr(engine.evaluation.classification.Evaluator, "__call__", call)


def best_of(folder: Path) -> tuple[float, int]:
    header = read_header(folder / "best.safetensors")
    return header["acc1"], header["epoch"]


def test_a_later_epoch_that_is_worse_or_equal_never_replaces_the_best(tmp_path, data, monkeypatch):
    base = ["--epochs", 5]
    scripted(monkeypatch, [40, 45])
    finetune(data, tmp_path, *base, "--stop_epoch", 2)
    assert best_of(tmp_path) == (75.0, 2)
    kept = (tmp_path / "best.safetensors").read_bytes()
    scripted(monkeypatch, [30, 45, 44])
    results = finetune(data, tmp_path, *base)
    best = (results["acc1"], results["best_acc1"], results["best_epoch"])
    assert best == (100 * 44 / 60, 75.0, 2)
    assert (tmp_path / "best.safetensors").read_bytes() == kept
    accuracies = [line["acc1"] for line in evaluations(tmp_path)]
    assert accuracies == [100 * n / 60 for n in (40, 45, 30, 45, 44)]


def test_a_best_left_by_a_run_without_a_checkpoint_is_not_believed(tmp_path, data, monkeypatch):
    scripted(monkeypatch, [50])

    def cut(*_):
        raise Cut

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(main_finetune.Saver, "save", cut)
        finetune(data, tmp_path, "--epochs", 2)
    assert best_of(tmp_path) == (100 * 50 / 60, 1)
    scripted(monkeypatch, [20, 10])
    assert finetune(data, tmp_path, "--epochs", 2)["best_acc1"] == 100 * 20 / 60
    assert best_of(tmp_path) == (100 * 20 / 60, 1)


def test_results_lost_after_the_last_checkpoint_are_found_again(tmp_path, finished):
    copy = shutil.copytree(finished[0], tmp_path / "copy")
    for name in ("results.json", "model.safetensors"):
        (copy / name).unlink()
    assert main_finetune.main([*finished[1], "--output_dir", str(copy)]) == finished[2]
    ours, theirs = (load_file(f / "model.safetensors") for f in (copy, finished[0]))
    assert_same(ours, theirs)
    assert best_of(copy) == best_of(finished[0])
    # the last one was made again, and is there once
    assert evaluations(copy) == evaluations(finished[0])


def test_equal_weights_are_equal_files(tmp_path, data, weights):
    """Results and resume tell weights apart by the sha256 of their file."""
    for name in "abc":
        finetune(data, tmp_path / name, "--finetune", weights, "--stop_epoch", 1)
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}) == 1


CHANGES = """--lr 0.2|--epochs 9|--mixup 0.8|--drop_path_rate 0.2|--ema_decay 0.9|--eval_epochs 2
--img_size 32|--global_pool token|--seed 1|--total_batch_size 24""".replace("\n", "|").split("|")


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_is_refused_on_resume(finished, change):
    folder, arguments, _ = finished
    before, (flag, value) = files_of(folder), change.split()
    with pytest.raises(InputError, match=rf"{flag[2:]}\b.*\b{value}\b"):
        main_finetune.main([*arguments, flag, value])
    assert changed_files(folder, before) <= RUN_FILES


@pytest.mark.parametrize(
    ("change", "named"), [(["--subset", 60], "images"), (["-b", 24], "batch_size 24")]
)
def test_other_images_or_another_total_batch_are_refused_on_resume(finished, change, named):
    with pytest.raises(InputError, match=named):
        main_finetune.main([*finished[1], *map(str, change)])


def test_other_weights_are_refused_on_resume_and_moved_ones_are_not(
    tmp_path, pretrained, weights, finished
):
    folder, arguments, results = finished
    moved = shutil.copy(weights, tmp_path / "moved.safetensors")
    assert main_finetune.main([*arguments, "--finetune", str(moved)]) == results
    for other in (str(pretrained / "checkpoint-00000010.pth"), "null"):
        with pytest.raises(InputError, match=f"finetune.*{results['sha256']}"):
            main_finetune.main([*arguments, "--finetune", other, "--class_tokens", "1"])
    assert results_of(folder) == results


# --- refused, with one clear line, before any compute


def arguments_of(stage: str, data: Path, output: Path, *more) -> list[str]:
    return pictures(data, output, *more, training=stage != "knn")


REFUSED = {
    "no weights": (CLASSES, "--finetune /nowhere/none.pth", "none.pth"),
    "another shape": (
        CLASSES,
        "--embed_dim 48 --depth 3",
        "embed_dim 32.*48.*depth|depth.*embed_dim 32.*48",
    ),
    "another number of classes": (CLASSES, "--num_classes 10", r"num_classes.*\b10\b.*\b3\b"),
    "other classes in val": (CLASSES[:2], "", "train.*seven"),
}


@pytest.mark.parametrize(("val", "more", "named"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("stage", STAGES)
def test_what_would_only_show_as_a_bad_accuracy_is_refused_before_any_compute(
    tmp_path, weights, monkeypatch, stage, val, more, named
):
    monkeypatch.setattr(VisionTransformer, "forward_features", None)  # a call would be a TypeError
    root = make_pictures(tmp_path / "data", train=2, val=2)
    for name in set(CLASSES) - set(val):
        shutil.rmtree(root / "val" / name)
    arguments = arguments_of(stage, root, tmp_path / "run", "--finetune", weights, *more.split())
    with pytest.raises(InputError, match=named):
        STAGES[stage](arguments)
    assert looks_like_a_result(tmp_path / "run") == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_validation_image_fails_the_evaluation_and_names_the_file(tmp_path, weights, stage):
    root = make_pictures(tmp_path / "data", train=12, val=4)
    bad = root / "val" / "one" / "013.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(InputError, match=str(bad)):
        STAGES[stage](arguments_of(stage, root, tmp_path / "run", "--finetune", weights))
    results = {"results.json", "model.safetensors", "best.safetensors"}
    assert not results & set(looks_like_a_result(tmp_path / "run"))


@pytest.mark.parametrize("stage", ["finetune", "lincls"])
def test_a_bad_training_image_is_replaced_and_written_down(tmp_path, weights, stage):
    root = make_pictures(tmp_path / "data", train=12, val=4)
    bad = root / "train" / "one" / "003.png"
    bad.write_bytes(b"")
    arguments = arguments_of(stage, root, tmp_path / "run", "--finetune", weights)
    results = STAGES[stage](arguments)
    (entry,) = (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(entry)["path"] == str(bad)
    assert results["num_train"] == 36 and results["num_samples"] == 12
    counts = [line["bad_files"] for line in log_lines(tmp_path / "run") if "bad_files" in line]
    assert counts[-1] == 1


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_no_result(tmp_path, data):
    with pytest.raises(InputError, match=r"non-finite gradient"):
        finetune(data, tmp_path / "run", "--lr", 1e9, "--warmup_epochs", 0)
    assert not {"results.json", "model.safetensors"} & set(looks_like_a_result(tmp_path / "run"))
