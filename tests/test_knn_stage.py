"""`main_knn.py` end to end: its numbers against another computation, saved features, folders of
checkpoints."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from runs import CLASSES, files_of, make_pictures, pictures, results_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_knn import brute_force

import main_finetune
import main_knn
from data.images import PixelFormat
from data.sources import FolderSource
from data.transforms import PixelNormalizer
from engine.evaluation.from_weights import build_frozen
from models.vit import VisionTransformer
from util.errors import InputError
from util.settings.evaluation import KnnConfig

KS = (1, 5, 20, 1000)
FEATURES = "features.safetensors"


def knn(data: Path, output: Path, *more) -> dict:
    """Results of a run on `data`."""
    return main_knn.main(pictures(data, output, *more, training=False))


def loaded(features: Path, output: Path, *more) -> dict:
    """Results of saved features, without data or weights."""
    arguments = ["--load_path", features, "--output_dir", output, "--device", "cpu", *more]
    return main_knn.main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data, weights):
    """Results of a run, where it saved its features, and its folder."""
    folder = tmp_path_factory.mktemp("finished")
    more = ["--finetune", weights, "--ks", *KS, "--per_class", "--save_path", folder / "features"]
    return knn(data, folder / "run", *more), folder / "features", folder / "run"


# --- its numbers


def test_the_numbers_equal_another_computation(finished):
    results, features, run = finished
    saved = {name: tensor.numpy() for name, tensor in load_file(features / FEATURES).items()}
    hits, by_k = {}, {}
    for k in KS:
        votes = brute_force(saved["train"], saved["train_labels"], saved["val"], k, 3)
        hits[k] = votes.argmax(axis=1) == saved["val_labels"]
        by_k[str(k)] = 100 * hits[k].mean()
    of_class = {n: 100 * hits[1][saved["val_labels"] == c].mean() for c, n in enumerate(CLASSES)}
    assert results["acc1_by_k"] == pytest.approx(by_k, abs=1e-9)
    assert results["per_class"] == pytest.approx(of_class, abs=1e-9)
    assert len(set(by_k.values())) > 1 and len(set(of_class.values())) > 1
    assert results_of(run) == results
    assert results["acc1"] == 100 * results["correct1"] / 60 == by_k["1"] > 65  # 33.3 is chance
    assert results["acc5"] == results["acc1"]  # one neighbour votes for one class
    assert (results["num_train"], results["num_samples"], results["k"]) == (120, 60, 1)


@pytest.mark.parametrize(("digits", "names"), [((7,), ("seven",)), ((0, 1, 7), CLASSES)])
def test_few_images_and_few_classes(tmp_path, weights, digits, names):
    """One validation image in each class, and more neighbours asked for than there are."""
    root, count = make_pictures(tmp_path / "data", digits, 3, 1, names), 3 * len(digits)
    base = ["--finetune", weights, "-b", 1, "--ks"]
    results = knn(root, tmp_path / "run", *base, 200, 1, "--per_class")
    assert (results["num_train"], results["num_samples"]) == (count, len(digits))
    assert results["acc5"] == 100.0 and list(results["per_class"]) == sorted(names)
    assert knn(root, tmp_path / "all", *base, count)["acc1"] == results["acc1_by_k"]["200"]


def test_the_batch_size_plays_no_part(tmp_path, data, weights, finished):
    more = ["--finetune", weights, "--ks", *KS, "--per_class", "-b", 59, "--num_workers", 2]
    assert knn(data, tmp_path, *more) == finished[0]


# --- saved features


def test_saved_features_are_those_of_the_model_in_the_order_of_the_files(finished, data, weights):
    saved = load_file(finished[1] / FEATURES)
    pixels = {"mean": (0.1307,), "std": (0.3081,)}
    cfg = KnnConfig(size="debug", img_size=28, patch_size=4, in_chans=1, **pixels)
    model, _ = build_frozen(cfg, str(weights), 3)
    normalize = PixelNormalizer(**pixels, device=torch.device("cpu"))
    for split, each in (("train", 40), ("val", 20)):
        source = FolderSource(str(data / split), PixelFormat(1), prefer_train=False)
        images = torch.stack([source.read(index) for index in range(len(source))])
        with torch.no_grad():
            expected = model.forward_features(normalize(images))
        torch.testing.assert_close(saved[split], expected, rtol=1e-4, atol=1e-5)
        labels = saved["val_labels" if split == "val" else "train_labels"]
        assert labels.tolist() == [0] * each + [1] * each + [2] * each


def test_saved_features_give_the_same_numbers_without_data_or_weights(tmp_path, finished):
    results, features, _ = finished
    for path in (features, features / FEATURES):
        found = loaded(path, tmp_path / "run", "--ks", *KS, "--per_class")
        assert found == results == results_of(tmp_path / "run")
    other = loaded(features, tmp_path / "run", "--ks", 20, 5, "--temperature", 0.07)
    assert (other["k"], list(other["acc1_by_k"]), "per_class" in other) == (20, ["20", "5"], False)
    assert other["acc1"] == results["acc1_by_k"]["20"]


def test_features_of_another_model_are_refused(tmp_path, finished, pretrained, weights):
    results, features, _ = finished
    assert loaded(features, tmp_path, "--finetune", weights)["sha256"] == results["sha256"]
    (tmp_path / "results.json").unlink()
    for other in (pretrained / "checkpoint-00000010.pth", "random"):
        with pytest.raises(InputError, match=results["sha256"]) as error:
            loaded(features, tmp_path, "--finetune", other)
        assert str(weights) in str(error.value) and str(other) in str(error.value)
    with pytest.raises(InputError, match="global_pool"):
        loaded(features, tmp_path, "--finetune", weights, "--global_pool", "token")
    assert not (tmp_path / "results.json").exists()


def test_features_that_are_there_are_never_overwritten(tmp_path, data, weights, monkeypatch):
    """Of one checkpoint, and of the last of several; the folder may hold other files."""
    save = tmp_path / "features"
    for folder in (save, save / "last.safetensors"):
        folder.mkdir()
        (folder / FEATURES).write_text("somebody's")
    (tmp_path / "weights").mkdir()
    for name in ("first.safetensors", "last.safetensors"):
        shutil.copy(weights, tmp_path / "weights" / name)
    before = files_of(save)
    with monkeypatch.context() as patch:
        patch.setattr(VisionTransformer, "forward_features", None)  # a call would be a TypeError
        for finetune in (weights, tmp_path / "weights"):
            with pytest.raises(InputError, match=f"save_path.*{FEATURES}"):
                knn(data, tmp_path / "run", "--finetune", finetune, "--save_path", save)
    assert files_of(save) == before
    (save / FEATURES).rename(save / "theirs.safetensors")
    knn(data, tmp_path / "run", "--finetune", weights, "--save_path", save)
    knn(data, tmp_path / "run", "--finetune", weights, "--save_path", save)  # the same again
    with pytest.raises(InputError, match=f"save_path.*{FEATURES}"):
        knn(data, tmp_path / "run", "--finetune", "random", "--save_path", save)
    assert (save / "theirs.safetensors").read_text() == "somebody's"


def test_a_place_for_features_that_cannot_be_is_refused_before_any_compute(
    tmp_path, data, monkeypatch
):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(VisionTransformer, "forward_features", None)
    with pytest.raises(InputError, match="save_path"):
        knn(data, tmp_path / "run", "--finetune", "random", "--save_path", tmp_path / "file" / "f")


# --- a folder of checkpoints


def test_a_folder_of_checkpoints_is_a_table_in_their_order(tmp_path, data, pretrained, caplog):
    caplog.set_level(logging.INFO)
    folder, save = tmp_path / "weights", tmp_path / "features"
    folder.mkdir()
    names = ["model.pth", "model.safetensors", "step9.pth", "step10.pth"]
    sources = ["checkpoint-00000010.pth", "model.safetensors", "checkpoint-00000010.pth"]
    for source, target in zip([*sources, "checkpoint-00000020.pth"], names, strict=True):
        shutil.copy(pretrained / source, folder / target)
    (folder / "log.txt").write_text("no weights")
    results = knn(data, tmp_path / "run", "--finetune", folder, "--save_path", save)
    assert results == results_of(tmp_path / "run")
    table = results.pop("checkpoints")
    assert [Path(row["checkpoint"]).name for row in table] == names
    assert results == table[-1]
    assert len({row["sha256"] for row in table}) == 3  # two are equal files
    for row, name in zip(table, names, strict=True):  # each has its features in its own folder
        assert loaded(save / name, tmp_path / "loaded") == row
    assert knn(data, tmp_path / "alone", "--finetune", folder / "step9.pth") == table[2]
    lines = [record.getMessage() for record in caplog.records]
    assert all(sum(str(folder / name) in line for line in lines) >= 2 for name in names)


def test_which_files_of_a_folder_are_weights(tmp_path, data, pretrained, weights):
    """A run's own folder has three; one file is no table; none is an error."""
    found = main_knn.list_weights(str(pretrained))
    stems = ["checkpoint-00000010", "checkpoint-00000020", "model"]
    assert [Path(path).stem for path in found] == stems
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(InputError, match=f"finetune {tmp_path}"):
        knn(data, tmp_path / "run", "--finetune", tmp_path)
    assert not (tmp_path / "run" / "results.json").exists()
    shutil.copy(weights, tmp_path)
    results = knn(data, tmp_path / "run", "--finetune", tmp_path)
    assert "checkpoints" not in results and results["checkpoint"] == str(tmp_path / weights.name)


# --- settings and weights


def test_a_finetuning_yaml_serves_and_its_other_keys_are_named_in_one_line(
    tmp_path, data, pretrained, finished, caplog
):
    recipe = ROOT / "cfgs" / "finetune" / "ViT-S_50E_GAP.yaml"
    weights = pretrained / "checkpoint-00000020.pth"
    results = knn(data, tmp_path, "--config", recipe, "--finetune", weights, "--ks", *KS)
    assert results["acc1_by_k"] == finished[0]["acc1_by_k"]
    (skipped,) = (line for line in caplog.messages if "skipped settings" in line)
    named = set(skipped.rpartition(": ")[2].split(", "))
    assert {"mixup", "layer_decay", "epochs", "drop_path_rate"} < named
    assert named < set(yaml.safe_load(recipe.read_text())) - {"size", "global_pool"}


def test_an_untrained_model_can_be_evaluated(tmp_path, data):
    base = ["--finetune", "random", "--save_path"]
    results = knn(data, tmp_path / "a", *base, tmp_path / "fa")
    assert (results["checkpoint"], results["sha256"]) == ("random", None)
    assert knn(data, tmp_path / "b", *base, tmp_path / "fb") == results
    knn(data, tmp_path / "c", *base, tmp_path / "fc", "--seed", 1)
    a, b, c = (load_file(tmp_path / name / FEATURES)["val"] for name in ("fa", "fb", "fc"))
    assert torch.equal(a, b) and not torch.equal(a, c)
    with pytest.raises(InputError, match="finetune"):
        knn(data, tmp_path / "d")


def test_the_readout_can_be_the_class_token(tmp_path, data, weights, finished):
    more = ["--finetune", weights, "--global_pool", "token", "--save_path", tmp_path / "features"]
    assert knn(data, tmp_path / "run", *more)["readout"] == "token"
    assert finished[0]["readout"] == "avg"
    ours, theirs = (load_file(f / FEATURES)["val"] for f in (tmp_path / "features", finished[1]))
    assert not torch.allclose(ours, theirs, atol=0.1)


def test_features_that_are_not_numbers_are_an_error(tmp_path, data, weights):
    """Their order is arbitrary: a wrong accuracy without a word."""
    tensors = load_file(weights)
    tensors["blocks.0.mlp.fc1.bias"][0] = float("nan")
    with safe_open(weights, framework="pt") as file:
        assert json.loads(file.metadata()["model_args"])["class_tokens"] == 1
        save_file(tensors, tmp_path / "poisoned.safetensors", file.metadata())
    with pytest.raises(InputError, match="not( all)? finite"):
        knn(data, tmp_path / "run", "--finetune", tmp_path / "poisoned.safetensors")
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_finetuning_runs_results_are_not_overwritten(tmp_path, data, weights):
    """A fine-tuning YAML serves k-NN too, and may name the folder where the fine-tuned run lies."""
    results = main_finetune.main(pictures(data, tmp_path, "--finetune", weights, "--stop_epoch", 1))
    with pytest.raises(InputError, match="output_dir"):
        knn(data, tmp_path, "--finetune", weights)
    assert results_of(tmp_path) == results
