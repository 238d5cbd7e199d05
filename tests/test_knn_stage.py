"""`main_knn.py` end to end: its numbers against another computation, saved features, folders of
checkpoints."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from runs import CLASSES, make_pictures, pictures, pretrain_pictures, results_of
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file

import main_finetune
import main_knn
from data.sources import FolderSource
from data.transforms import PixelNormalizer
from engine.evaluation.from_weights import build_frozen
from models.build import build_model, classifier_spec
from util.errors import InputError
from util.settings.evaluation import KnnConfig

KS = (1, 5, 20, 1000)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, data) -> Path:
    return pretrain_pictures(data, tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data, pretrained):
    """Results of a run, and where it saved its features."""
    folder = tmp_path_factory.mktemp("finished")
    more = ["--finetune", pretrained / "model.safetensors", "--ks", *KS, "--per_class"]
    results = main_knn.main(knn(data, folder / "run", *more, "--save_path", folder / "features"))
    return results, folder / "features", folder / "run"


def knn(data: Path, output: Path, *more) -> list[str]:
    return pictures(data, output, *more, training=False)


def facts_of(features: Path) -> dict:
    """What a file of features says it holds."""
    with safe_open(features, framework="pt") as file:
        return json.loads(file.metadata()["facts"])


def another_computation(features: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Accuracy by k, and by class for the first k, from the saved features: loops over numpy arrays
    in 64 bits."""
    saved = load_file(features / "features.safetensors")
    train, val = (saved[name].astype(np.float64) for name in ("train", "val"))
    train /= np.linalg.norm(train, axis=1, keepdims=True)
    val /= np.linalg.norm(val, axis=1, keepdims=True)
    by_k = {}
    first_hits = None
    for k in KS:
        hits = []
        for feature in val:
            similarity = (train @ feature).astype(np.float32).astype(np.float64)
            nearest = np.lexsort((np.arange(len(train)), -similarity))[:k]
            votes = np.zeros(len(CLASSES))
            for neighbour in nearest:
                votes[saved["train_labels"][neighbour]] += np.exp(similarity[neighbour] / 0.07)
            hits.append(int(np.argmax(votes)))
        right = np.array(hits) == saved["val_labels"]
        by_k[str(k)] = 100 * right.mean()
        first_hits = right if first_hits is None else first_hits
    by_class = {
        name: 100 * first_hits[saved["val_labels"] == label].mean()
        for label, name in enumerate(CLASSES)
    }
    return by_k, by_class


def test_the_numbers_equal_another_computation(finished):
    results, features, run = finished
    by_k, by_class = another_computation(features)
    assert results["acc1_by_k"] == pytest.approx(by_k, abs=1e-9)
    assert results["per_class"] == pytest.approx(by_class, abs=1e-9)
    assert len(set(by_k.values())) > 1 and len(set(by_class.values())) > 1
    assert results_of(run) == results
    assert (
        results["acc1"] == 100 * results["correct1"] / 60 == results["acc1_by_k"]["1"] > 65
    )  # 33.3 is chance
    assert (results["num_train"], results["num_samples"], results["k"], results["acc5"]) == (
        120,
        60,
        1,
        100.0,
    )


def test_saved_features_are_those_of_the_model_in_the_order_of_the_files(
    finished, data, pretrained
):
    _, folder, _ = finished
    saved = load_tensors(folder / "features.safetensors")
    cfg = KnnConfig(
        size="debug", img_size=28, patch_size=4, in_chans=1, mean=(0.1307,), std=(0.3081,)
    )
    model = build_frozen(cfg, str(pretrained / "model.safetensors"), 3).model
    normalize = PixelNormalizer((0.1307,), (0.3081,), torch.device("cpu"))
    for split, each in (("train", 40), ("val", 20)):
        source = FolderSource(str(data / split), 1, prefer_train=False)
        images = torch.stack([source.read(index) for index in range(len(source))])
        with torch.no_grad():
            expected = model.forward_features(normalize(images))
        torch.testing.assert_close(saved[split], expected, rtol=1e-4, atol=1e-5)
        labels = "val_labels" if split == "val" else "train_labels"
        assert saved[labels].tolist() == [0] * each + [1] * each + [2] * each


def test_saved_features_give_the_same_numbers_without_data_or_weights(tmp_path, finished):
    results, features, _ = finished
    more = ["--ks", *map(str, KS), "--per_class", "--device", "cpu"]
    loaded = main_knn.main(
        ["--load_path", str(features), "--output_dir", str(tmp_path / "run"), *more]
    )
    assert loaded == results == results_of(tmp_path / "run")
    file = features / "features.safetensors"
    again = main_knn.main(["--load_path", str(file), "--output_dir", str(tmp_path / "file"), *more])
    assert again == results


def test_other_ks_and_temperatures_reuse_saved_features(tmp_path, finished):
    _, features, _ = finished
    base = ["--load_path", str(features), "--output_dir", str(tmp_path), "--device", "cpu"]
    results = main_knn.main([*base, "--ks", "20", "5"])
    assert (results["k"], list(results["acc1_by_k"])) == (20, ["20", "5"])
    assert results["acc1_by_k"]["5"] == finished[0]["acc1_by_k"]["5"]
    assert "per_class" not in results
    hot = main_knn.main([*base, "--ks", "1000", "--temperature", "100"])
    assert hot["protocol"] == "k-NN, cosine, temperature 100"


def test_features_of_another_model_are_refused(tmp_path, finished, pretrained):
    results, features, _ = finished
    base = [
        "--load_path",
        str(features),
        "--output_dir",
        str(tmp_path),
        "--device",
        "cpu",
        "--finetune",
    ]
    assert (
        main_knn.main([*base, str(pretrained / "model.safetensors")])["sha256"] == results["sha256"]
    )
    (tmp_path / "results.json").unlink()
    for other in (str(pretrained / "checkpoint-00000010.pth"), "random"):
        with pytest.raises(InputError) as error:
            main_knn.main([*base, other])
        assert (
            f"holds features of {pretrained / 'model.safetensors'} (sha256 {results['sha256']})"
            in str(error.value)
        )
        assert f"finetune {other} has sha256 " in str(error.value)
    assert not (tmp_path / "results.json").exists()


def whole(**changes) -> dict[str, torch.Tensor]:
    """What a small file of features holds."""
    tensors = {"train": torch.ones(2, 4), "val": torch.ones(3, 4)}
    labels = {
        "train_labels": torch.zeros(2, dtype=torch.int64),
        "val_labels": torch.zeros(3, dtype=torch.int64),
    }
    return {**tensors, **labels, **changes}


NO_FEATURES = "is no complete features file of main_knn.py"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_text("nothing"), NO_FEATURES),
        (lambda path: save_file({"train": torch.ones(1, 1)}, path, {"facts": "{}"}), NO_FEATURES),
        (lambda path: save_file(whole(), path), NO_FEATURES),
        (lambda path: save_file(whole(), path, {"facts": "nothing"}), NO_FEATURES),
        (lambda path: save_file(whole(more=torch.ones(1)), path, {"facts": "{}"}), NO_FEATURES),
        (lambda path: save_file(whole(), path, {"facts": "{}"}), NO_FEATURES),
        (lambda path: save_file(whole(), path, {"facts": "[]"}), NO_FEATURES),
    ],
    ids=[
        "missing",
        "text",
        "one tensor",
        "no facts",
        "no JSON",
        "one too many",
        "empty facts",
        "facts of no names",
    ],
)
def test_what_is_no_file_of_features_is_refused(tmp_path, make, message):
    make(tmp_path / "features.safetensors")
    with pytest.raises(InputError, match=message):
        main_knn.main(
            ["--load_path", str(tmp_path), "--output_dir", str(tmp_path / "run"), "--device", "cpu"]
        )
    assert not (tmp_path / "run" / "results.json").exists()


# --- a folder of checkpoints
# ------------------------------------------------------------------------------------------


def test_a_folder_of_checkpoints_is_a_table_in_their_order(tmp_path, data, pretrained, caplog):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "weights"
    folder.mkdir()
    for source, target in (
        ("checkpoint-00000010.pth", "step9.pth"),
        ("checkpoint-00000020.pth", "step10.pth"),
    ):
        shutil.copy(pretrained / source, folder / target)
    shutil.copy(pretrained / "model.safetensors", folder / "model.safetensors")
    (folder / "log.txt").write_text("no weights")
    results = main_knn.main(
        knn(data, tmp_path / "run", "--finetune", folder, "--save_path", tmp_path / "features")
    )
    table = results.pop("checkpoints")
    names = ["model.safetensors", "step9.pth", "step10.pth"]
    assert [Path(row["checkpoint"]).name for row in table] == names
    assert results == table[-1]
    assert {**results, "checkpoints": table} == results_of(tmp_path / "run")
    assert (
        table[0]["acc1_by_k"] == table[2]["acc1_by_k"] and table[0]["sha256"] != table[2]["sha256"]
    )
    kept = {
        facts_of(path)["checkpoint"]: path
        for path in (tmp_path / "features").glob("**/features.safetensors")
    }
    for row in table:  # each is what its file gives alone, and its features are kept apart
        alone = main_knn.main(knn(data, tmp_path / "alone", "--finetune", row["checkpoint"]))
        assert alone == row
        features = str(kept[row["checkpoint"]])
        arguments = [
            "--load_path",
            features,
            "--output_dir",
            str(tmp_path / "loaded"),
            "--device",
            "cpu",
        ]
        assert main_knn.main(arguments) == row
    lines = [record.getMessage() for record in caplog.records]
    head = next(place for place, line in enumerate(lines) if line.startswith("checkpoint  "))
    assert [line.split()[0] for line in lines[head + 1 : head + 4]] == [
        row["checkpoint"] for row in table
    ]


def test_a_runs_own_folder_is_such_a_folder(tmp_path, data, pretrained):
    results = main_knn.main(knn(data, tmp_path / "run", "--finetune", pretrained))
    assert [Path(row["checkpoint"]).name for row in results["checkpoints"]] == [
        "checkpoint-00000010.pth",
        "checkpoint-00000020.pth",
        "model.safetensors",
    ]


def test_a_folder_with_one_file_is_that_file(tmp_path, data, pretrained):
    (tmp_path / "one").mkdir()
    shutil.copy(pretrained / "model.safetensors", tmp_path / "one")
    results = main_knn.main(knn(data, tmp_path / "run", "--finetune", tmp_path / "one"))
    assert "checkpoints" not in results and results["checkpoint"] == str(
        tmp_path / "one" / "model.safetensors"
    )


def test_a_folder_without_weights_is_refused(tmp_path, data):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("none")
    with pytest.raises(InputError) as error:
        main_knn.main(knn(data, tmp_path / "run", "--finetune", tmp_path / "empty"))
    assert str(error.value) == (
        f"finetune {tmp_path / 'empty'} is a folder without weights: none ends in .pth .pt .bin .safetensors"
    )
    assert not (tmp_path / "run" / "results.json").exists()


def test_two_files_of_one_stem_do_not_share_their_features(tmp_path, data, pretrained):
    folder = tmp_path / "weights"
    folder.mkdir()
    shutil.copy(pretrained / "checkpoint-00000010.pth", folder / "model.pth")
    shutil.copy(pretrained / "model.safetensors", folder / "model.safetensors")
    main_knn.main(
        knn(data, tmp_path / "run", "--finetune", folder, "--save_path", tmp_path / "features")
    )
    assert len(list((tmp_path / "features").glob("**/features.safetensors"))) == 2


# --- few images, many neighbours
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("digits", "names", "val"),
    [((0, 1), CLASSES[:2], 1), ((7,), ("seven",), 1), ((0, 1, 7), CLASSES, 2)],
)
def test_few_images_and_few_classes(tmp_path, pretrained, caplog, digits, names, val):
    """One validation image in each class, and more neighbours asked for than there are."""
    root = make_pictures(tmp_path / "data", digits, 3, val, names)
    more = ["--finetune", pretrained / "model.safetensors", "--ks", 1, 200, "--per_class"]
    results = main_knn.main(knn(root, tmp_path / "run", *more, "-b", 1))
    count = len(digits)
    assert (results["num_train"], results["num_samples"]) == (3 * count, val * count)
    assert results["acc5"] == 100.0 and list(results["per_class"]) == sorted(names)
    assert (
        f"k 200 is more than the {3 * count} training images: it takes all of them" in caplog.text
    )
    all_of_them = main_knn.main(knn(root, tmp_path / "all", *more[:2], "--ks", 3 * count, "-b", 1))
    assert all_of_them["acc1"] == results["acc1_by_k"]["200"]


def test_the_batch_size_plays_no_part(tmp_path, data, pretrained, finished):
    for batch_size in (7, 59):
        more = [
            "--finetune",
            pretrained / "model.safetensors",
            "--ks",
            *KS,
            "--per_class",
            "-b",
            batch_size,
        ]
        assert main_knn.main(knn(data, tmp_path, *more, "--num_workers", 2)) == finished[0]


# --- settings
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["checkpoint-00000020.pth", "model.safetensors"])
def test_a_finetuning_yaml_serves_and_its_other_keys_are_named_in_one_line(
    tmp_path, data, pretrained, finished, caplog, file
):
    recipe = ROOT / "cfgs" / "finetune" / "ViT-S_50E_GAP.yaml"
    more = ["--finetune", pretrained / file, "--ks", *KS, "--per_class"]
    results = main_knn.main(["--config", str(recipe), *knn(data, tmp_path, *more)])
    for name in ("acc1_by_k", "correct1", "per_class"):
        assert results[name] == finished[0][name]
    skipped = [
        record.getMessage()
        for record in caplog.records
        if "skipped settings" in record.getMessage()
    ]
    ours = {field.name for field in dataclasses.fields(KnnConfig)}
    expected = [name for name in yaml.safe_load(recipe.read_text()) if name not in ours]
    assert skipped == [f"{recipe}: skipped settings of other stages: {', '.join(expected)}"]
    assert {"mixup", "layer_decay", "epochs", "drop_path_rate"} < set(expected)


def test_an_untrained_model_can_be_judged(tmp_path, data):
    results = main_knn.main(knn(data, tmp_path / "a", "--finetune", "random"))
    assert (results["checkpoint"], results["sha256"], results["num_samples"]) == (
        "random",
        None,
        60,
    )
    assert main_knn.main(knn(data, tmp_path / "b", "--finetune", "random")) == results
    features = tmp_path / "features"
    main_knn.main(
        knn(data, tmp_path / "c", "--finetune", "random", "--seed", 1, "--save_path", features)
    )
    main_knn.main(
        knn(data, tmp_path / "d", "--finetune", "random", "--save_path", tmp_path / "of_seed_0")
    )
    one, other = (
        load_tensors(f / "features.safetensors")["val"] for f in (features, tmp_path / "of_seed_0")
    )
    assert not torch.equal(one, other)
    with pytest.raises(
        InputError, match="finetune is needed: the weights to judge, or the word random"
    ):
        main_knn.main(knn(data, tmp_path / "e"))


def test_the_readout_can_be_the_class_token(tmp_path, data, pretrained, finished):
    more = ["--finetune", pretrained / "model.safetensors", "--ks", *KS, "--global_pool", "token"]
    results = main_knn.main(
        knn(data, tmp_path / "run", *more, "--save_path", tmp_path / "features")
    )
    assert (results["readout"], finished[0]["readout"]) == ("token", "avg")
    ours, theirs = (
        load_tensors(f / "features.safetensors")["val"]
        for f in (tmp_path / "features", finished[1])
    )
    assert not torch.allclose(ours, theirs, atol=0.1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ks", 5, 5], "ks names a number twice: 5 5"),
        (["--ks", 0], "ks: expected >= 1, got 0"),
        (["--temperature", 0], "temperature: expected >= 0.01, got 0"),
        (["--save_path", "a", "--load_path", "b"], "save_path and load_path exclude each other"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, data, more, message):
    with pytest.raises(InputError) as error:
        main_knn.main(knn(data, tmp_path / "run", "--finetune", "random", *more))
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_place_for_features_that_cannot_be_is_refused_before_any_compute(
    tmp_path, data, monkeypatch
):
    (tmp_path / "file").write_text("in the way")

    def forbidden(*_):
        raise AssertionError("reached the model")

    monkeypatch.setattr(main_knn, "compute_features", forbidden)
    with pytest.raises(InputError, match="cannot be written"):
        arguments = knn(
            data,
            tmp_path / "run",
            "--finetune",
            "random",
            "--save_path",
            tmp_path / "file" / "features",
        )
        main_knn.main(arguments)


def test_features_that_are_not_numbers_are_an_error(tmp_path, data, pretrained):
    """Their order is arbitrary: a wrong accuracy without a word."""
    tensors = load_tensors(pretrained / "model.safetensors")
    tensors["blocks.0.mlp.fc1.bias"][0] = float("nan")
    with safe_open(pretrained / "model.safetensors", framework="pt") as file:
        save_file(tensors, tmp_path / "poisoned.safetensors", file.metadata())
    with pytest.raises(InputError, match="not( all)? finite"):
        main_knn.main(knn(data, tmp_path / "run", "--finetune", tmp_path / "poisoned.safetensors"))
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_finetuning_runs_results_are_not_overwritten(tmp_path, data, pretrained):
    """A fine-tuning YAML serves k-NN too, and may name the folder where the fine-tuned run lies."""
    weights = ["--finetune", pretrained / "model.safetensors"]
    results = main_finetune.main(pictures(data, tmp_path, *weights, "--stop_epoch", 1))
    with pytest.raises(InputError, match="output_dir"):
        main_knn.main(knn(data, tmp_path, *weights))
    assert results_of(tmp_path) == results


def test_the_model_of_a_file_is_the_one_that_is_built(pretrained):
    """The fixtures are what the tests take them for."""
    with safe_open(pretrained / "model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["model_args"])["class_token"] is True
    cfg = KnnConfig(size="debug", img_size=28, patch_size=4, in_chans=1)
    assert build_model(
        classifier_spec(cfg, num_classes=3, class_token=True, fc_norm=False)
    ).pos_embed.shape == (1, 50, 32)
