"""The evaluations on labels from a table: one class, several labels, numbers. The images are 180
real digits, 0, 1 and 7."""

import csv
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_run, records_of, results_of
from runs import CLASSES, normalised, pictures
from safetensors.torch import load_file

import hubconf
import main_finetune
import main_knn
import main_lincls
from engine.evaluation.metrics import regression_figures
from models.weights.own import read_header
from models.weights.read import read_weights
from tools import convert_checkpoint
from util.errors import InputError

DIGIT = dict(zip(CLASSES, (0, 1, 7), strict=True))
VALUE = dict(zip(CLASSES, (10, 24, 26), strict=True))
KINDS = {  # the settings of an objective, and its classes
    "multiclass": (["--label_columns", "kind"], list(CLASSES)),
    "multilabel": (["--label_columns", "loop", "odd"], ["loop", "odd"]),
    "regression": (["--label_columns", "value"], ["value"]),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory, data) -> Path:
    """One row for each image of `data`, in its splits; ten images have one writer."""
    path = tmp_path_factory.mktemp("table") / "labels.csv"
    write_table(path, data)
    return path


def write_table(path: Path, data: Path, **renamed: str) -> None:
    """`renamed` gives a class another name."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "kind", "loop", "odd", "value", "split", "writer"])
        for number, image in enumerate(sorted(data.rglob("*.png"))):
            name, split = image.parent.name, image.parent.parent.name
            digit = DIGIT[name]
            kind = renamed.get(name, name)
            row = [kind, int(digit == 0), digit % 2, VALUE[name], split, number // 10]
            rows.writerow([image.relative_to(data), *row])


def command(data: Path, folder: Path, table: Path, objective: str, *more: Any) -> list[str]:
    columns = ["--labels", table, "--split_column", "split", *KINDS[objective][0]]
    return pictures(data, folder, *columns, "--objective", objective, *more)


TUNED = shlex.split("""--lr 0.1 --epochs 8 --warmup_epochs 1 --crop_min 0.8 --label_smoothing 0
--drop_path_rate 0 --clip_grad 1""")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, data, table, weights):
    """By objective: the folder and the results of a fine-tuning."""
    found = {}
    for objective in KINDS:
        folder = tmp_path_factory.mktemp(objective)
        more = [*TUNED, "--finetune", weights, "--per_class"]
        found[objective] = (
            folder,
            main_finetune.main(command(data, folder, table, objective, *more)),
        )
    return found


def test_a_table_gives_what_the_folders_of_the_same_classes_give(tmp_path, data, table, weights):
    """Only the order of the images differs, and with it the training."""
    plain = pictures(data, tmp_path / "plain", "--finetune", weights, training=False)
    by_folder = main_knn.main(plain)
    columns = ["--labels", table, "--split_column", "split", "--file_column", "file"]
    by_table = main_knn.main(
        pictures(data, tmp_path / "t", "--finetune", weights, *columns, training=False)
    )
    assert by_table == by_folder and by_table["num_train"] == 120


def test_each_objective_learns_and_says_what_it_is(tuned):
    (folder, results), (_, several), (numbers, number) = (tuned[kind] for kind in KINDS)
    assert results["acc1"] > 65 and results["balanced_acc"] > 0.65  # 33.3 % is chance
    assert results["balanced_acc"] == pytest.approx(results["acc1"] / 100)  # 20 of each class
    assert results["auroc"] > 0.8 and results["per_class_auroc"].keys() == set(CLASSES)
    right = sum(row[place] for place, row in enumerate(results["confusion"]))
    assert right == results["correct1"] and sum(map(sum, results["confusion"])) == 60
    assert several["map"] > 0.8 and several["per_class_f1"].keys() == {"loop", "odd"}
    assert several["num_samples"] == 60 and "acc1" not in several
    # of 7.1, the standard deviation of the targets, by which their mean alone would miss
    assert number["rmse"] < 5 and number["r2"] > 0.5
    for objective, (folder, of_kind) in tuned.items():
        last = [record for record in records_of(folder) if record["kind"] == "val"][-1]
        metric = {"multiclass": "acc1", "multilabel": "map", "regression": "rmse"}[objective]
        assert last[metric] == of_kind[metric].hex()
        best = read_header(folder / "best.safetensors")
        assert best[metric] == of_kind[f"best_{metric}"]
        values = [
            float.fromhex(record[metric])
            for record in records_of(folder)
            if record["kind"] == "val"
        ]
        assert best[metric] == (min if objective == "regression" else max)(values)
        for name in ("model.safetensors", "best.safetensors"):
            header, info = read_header(folder / name), read_weights(folder / name)[1]
            assert header["objective"] == info.objective == objective
            assert header["class_names"] == list(info.class_names or ()) == KINDS[objective][1]


def test_a_regression_s_file_predicts_in_the_unit_of_the_data(tmp_path, data, table, tuned):
    folder, results = tuned["regression"]
    model = hubconf.classifier(str(folder / "model.safetensors"))
    found = main_finetune.main(
        command(
            data,
            tmp_path,
            table,
            "regression",
            "--eval",
            "--finetune",
            folder / "model.safetensors",
        )
    )
    for name in ("mae", "rmse", "r2", "loss"):
        assert found[name] == pytest.approx(results[name], rel=1e-4)
    with torch.no_grad():
        outputs = model(normalised(data / "val"))
    images = sorted((data / "val").rglob("*.png"))
    targets = torch.tensor([[float(VALUE[path.parent.name])] for path in images])
    figures = regression_figures(outputs.double(), targets)
    assert figures.scalars["rmse"] == pytest.approx(results["rmse"], rel=1e-4)


def test_a_regression_s_checkpoint_whose_unit_is_not_known_is_no_predictor(
    tmp_path, data, table, tuned
):
    path = max(tuned["regression"][0].glob("checkpoint-*.pth"))
    with pytest.raises(InputError, match="does not say the unit"):
        main_finetune.main(
            command(data, tmp_path, table, "regression", "--eval", "--finetune", path)
        )
    with pytest.raises(InputError, match="does not say the unit"):
        convert_checkpoint.main([str(path), str(tmp_path / "a"), "--format", "safetensors"])
    assert main_knn.main(pictures(data, tmp_path / "k", "--finetune", path, training=False))


@pytest.mark.parametrize("objective", ["multilabel", "regression"])
def test_it_goes_on_bit_for_bit(tmp_path, data, table, weights, tuned, objective):
    arguments = command(data, tmp_path, table, objective, *TUNED, "--finetune", weights)
    main_finetune.main([*arguments, "--stop_epoch", "2"])
    main_finetune.main([*arguments, "--per_class"])
    assert_same_run(tuned[objective][0], tmp_path)


def test_a_resumed_run_notices_other_labels(tmp_path, data, table, weights):
    labels, folder = tmp_path / "labels.csv", tmp_path / "run"
    labels.write_bytes(table.read_bytes())
    arguments = command(data, folder, labels, "multiclass", "--finetune", weights)
    main_finetune.main([*arguments, "--stop_epoch", "1"])
    write_table(labels, data, nought="zero")
    with pytest.raises(InputError, match="images: .*fingerprint.* -> "):
        main_finetune.main(arguments)


@pytest.mark.parametrize("objective", KINDS)
def test_probes_are_chosen_by_the_main_figure(tmp_path, data, table, weights, objective):
    more = ["--finetune", weights, "--lr", 1e-6, 0.1, 3, "--crop_min", 0.8, "--epochs", 8]
    if objective != "regression":
        more += ["--class_weights", "balanced"]
    results = main_lincls.main(command(data, tmp_path, table, objective, *more))
    metric = {"multiclass": "acc1", "multilabel": "map", "regression": "rmse"}[objective]
    assert results["num_train"] == 108 and results["num_held_out"] == 12
    best = min if objective == "regression" else max
    chosen = best(results["curve"], key=lambda point: point[f"held_out_{metric}"])
    assert results["lr"] == chosen["lr"] and results[metric] == chosen[f"val_{metric}"]
    assert len({point[f"held_out_{metric}"] for point in results["curve"]}) > 1
    evaluated = command(
        data,
        tmp_path / "e",
        table,
        objective,
        "--eval",
        "--finetune",
        tmp_path / "model.safetensors",
    )
    found = main_finetune.main(evaluated)
    assert found[metric] == pytest.approx(results[metric], rel=1e-3)


def test_the_best_weights_follow_the_figure_that_is_asked_for(tmp_path, data, table, weights):
    more = ["--finetune", weights, "--best_metric", "kappa", "--ema_decay", 0.5]
    results = main_finetune.main(command(data, tmp_path, table, "multiclass", *more))
    header = read_header(tmp_path / "best.safetensors")
    assert header["kappa"] == results["best_kappa"] and header["epoch"] == results["best_epoch"]
    records = [record for record in records_of(tmp_path) if record["kind"] == "val"]
    assert results["best_kappa"] == max(float.fromhex(record["ema_kappa"]) for record in records)


def test_a_share_by_seed_and_groups_end_in_no_split_twice(tmp_path, data, table, weights):
    columns = ["--labels", table, "--val_share", 0.25, "--group", "writer"]
    command = pictures(data, tmp_path, "--finetune", weights, *columns, training=False)
    results = main_knn.main(command)
    assert results["num_train"] % 10 == 0 and results["num_train"] + results["num_samples"] == 180
    assert 0.15 < results["num_samples"] / 180 < 0.35


def test_a_classifier_of_another_objective_is_not_evaluated(tmp_path, data, table, tuned):
    """It has two outputs, as the labels have."""
    path = tuned["multilabel"][0] / "model.safetensors"
    arguments = command(data, tmp_path, table, "regression", "--eval", "--finetune", path)
    with pytest.raises(InputError, match="objective is regression .* multilabel in"):
        main_finetune.main(arguments)


def test_the_head_of_another_objective_starts_fresh(tmp_path, data, table, tuned, caplog):
    caplog.set_level("INFO")
    start = ["--finetune", tuned["multilabel"][0] / "model.safetensors"]  # of two outputs
    more = ["--label_columns", "value", "odd", "--epochs", 1, "--warmup_epochs", 0, "--lr", 1e-6]
    results = main_finetune.main(command(data, tmp_path, table, "regression", *start, *more))
    assert "head dropped: it is for objective multilabel" in caplog.text
    assert abs(results["r2"]) < 0.01  # the mean of the targets


def test_mixing_and_weights_of_several_labels_train(tmp_path, data, table, weights):
    more = ["--mixup", 0.8, "--cutmix", 1, "--class_weights", "balanced", "--finetune", weights]
    results = main_finetune.main(command(data, tmp_path, table, "multilabel", *more))
    assert math.isfinite(results["loss"]) and results_of(tmp_path) == results
    assert load_file(tmp_path / "model.safetensors")["head.weight"].shape[0] == 2
