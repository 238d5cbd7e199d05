"""What evaluations leave of each validation image: `predictions.npz`, from which the reports are
drawn."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import ATTENTIVE, CLASSES, launch, make_pictures, pictures, results_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import main_finetune
import main_knn
import main_lincls
from engine.evaluation.features import Predictions
from engine.evaluation.knn import predicted_by, rank_of_label
from engine.evaluation.predictions import load_predictions, open_predicted_images, save_predictions
from util.errors import InputError
from util.settings.evaluation import KnnConfig

KNN = ["--ks", 5, 20]
LBFGS = ["--optimizer", "lbfgs", "--lbfgs_c", 0.01, 1]
STAGES = {
    "finetune": (main_finetune, "run_finetune.sh", []),
    "linear": (main_lincls, "run_lincls.sh", ["--lr", 0.01, 0.1]),
    "attentive": (main_lincls, "run_lincls.sh", [*ATTENTIVE, "--lr", 0.05]),
    "lbfgs": (main_lincls, "run_lincls.sh", LBFGS),
    "knn": (main_knn, "run_knn.sh", KNN),
}


def arguments(stage: str, data: Path, output: Path, weights: Path, *more) -> list[str]:
    flags = [*STAGES[stage][2], "--finetune", weights, *more]
    return pictures(data, output, *flags, training=stage != "knn")


@pytest.mark.parametrize("stage", STAGES)
def test_stored_predictions_give_the_accuracy_exactly(stage, tmp_path, data, weights):
    results = STAGES[stage][0].main(arguments(stage, data, tmp_path / "run", weights))
    found = load_predictions(tmp_path / "run" / "predictions.npz")
    labels = np.repeat(np.arange(3), 20)
    assert (found.labels == labels).all() and found.class_names == sorted(CLASSES)
    is_right = found.classes[:, 0] == found.labels
    assert 100 * int(is_right.sum()) / 60 == results["acc1"]
    # most probable first, each class once, and nothing beside them
    assert found.classes.shape == (60, 3) and (np.diff(found.probabilities) <= 0).all()
    named = found.classes < 3
    assert (found.probabilities[~named] == 0).all() and (stage == "knn" or named.all())
    assert found.probabilities.sum(axis=1) == pytest.approx(np.ones(60), abs=1e-5)
    own = np.where(found.classes == labels[:, None], found.probabilities, 0).sum(axis=1)
    assert found.of_truth == pytest.approx(own, abs=1e-6)
    source = open_predicted_images(found.settings, found.names)
    assert (source.labels == labels).all() and found.names[0] == "val/nought/040.png"
    if stage == "finetune":  # the written weights say the same; beside a run, eval has its own file
        before = (tmp_path / "run" / "predictions.npz").read_bytes()
        model = tmp_path / "run" / "model.safetensors"
        shutil.copy(model, tmp_path / "copy.safetensors")
        more = ["--eval", "--finetune", tmp_path / "copy.safetensors"]
        main_finetune.main(pictures(data, tmp_path / "run", *more))
        again = (tmp_path / "run" / "eval_predictions.npz").read_bytes()
        assert again == before == (tmp_path / "run" / "predictions.npz").read_bytes()


def test_votes_are_shares_and_equal_ones_go_to_the_lower_label():
    votes = torch.tensor([[0, 3, 0, 3, 1, 0.5, 0.25], [0, 0, 0, 0, 0, 0, 2]], dtype=torch.float64)
    labels = torch.tensor([3, 0])
    found = predicted_by(votes, labels)
    assert found.classes.tolist() == [[1, 3, 4, 5, 6], [6, 7, 7, 7, 7]]
    assert found.probabilities[0] == pytest.approx(np.array([3, 3, 1, 0.5, 0.25]) / 7.75)
    assert found.of_truth == pytest.approx([3 / 7.75, 0]) and found.probabilities[1, 0] == 1
    ranks = rank_of_label(votes, labels)
    assert ((found.classes[:, 0] == labels) == (ranks == 0)).all()


def test_logits_that_are_not_finite_name_no_class(tmp_path, data, weights):
    """And count as wrong, as in results.json."""
    main_finetune.main(arguments("finetune", data, tmp_path / "run", weights, "--epochs", 1))
    path = tmp_path / "run" / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["head.bias"][0] = float("inf")
    save_file(tensors, tmp_path / "broken.safetensors", metadata)
    more = ["--eval", "--finetune", tmp_path / "broken.safetensors"]
    results = main_finetune.main(pictures(data, tmp_path / "eval", *more))
    found = load_predictions(tmp_path / "eval" / "eval_predictions.npz")
    assert (found.classes == 3).all() and results["acc1"] == 0
    assert not found.probabilities.any() and not found.of_truth.any()


def test_images_that_are_not_at_hand_are_said_to_be(tmp_path, data, weights):
    own = Path(shutil.copytree(data, tmp_path / "own"))
    more = ["--save_path", tmp_path / "features"]
    main_knn.main(arguments("knn", own, tmp_path / "run", weights, *more))
    found = load_predictions(tmp_path / "run" / "predictions.npz")
    (own / "val" / "one" / "045.png").rename(own / "val" / "one" / "999.png")
    with pytest.raises(InputError, match="other validation images"):
        open_predicted_images(found.settings, found.names)
    loaded = ["--load_path", tmp_path / "features", *KNN, "--output_dir", tmp_path / "loaded"]
    main_knn.main(list(map(str, loaded)))
    without = load_predictions(tmp_path / "loaded" / "predictions.npz")
    assert without.names == [] and without.settings == {}
    assert (without.classes == found.classes).all()


@pytest.mark.parametrize("stage", ["finetune", "knn"])
def test_predictions_of_others_are_not_overwritten(stage, tmp_path, data, weights):
    name = "predictions.npz" if stage == "knn" else "eval_predictions.npz"
    more = ["--eval"] if stage == "finetune" else []
    path = tmp_path / "run" / name
    path.parent.mkdir()
    np.savez(path, mine=np.zeros(3))
    before = path.read_bytes()
    with pytest.raises(InputError, match=name):
        STAGES[stage][0].main(arguments(stage, data, path.parent, weights, *more))
    assert path.read_bytes() == before
    with pytest.raises(InputError, match=name):
        load_predictions(path)


def test_a_damaged_file_is_one_line(tmp_path):
    """Wherever a bit of it flips, it is read or refused."""
    path, count = tmp_path / "predictions.npz", 20
    classes = torch.arange(5).repeat(count, 1)
    predictions = Predictions(
        torch.arange(count) % 7, classes, torch.rand(count, 5), torch.rand(count)
    )
    save_predictions(path, predictions, [*"abcdefg"], KnnConfig(), None)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            load_predictions(path)
        except InputError:
            refused += 1
    assert refused > len(whole) / 7 / 2


def test_the_file_is_small_and_holds_names_that_are_no_text(tmp_path):
    """As many images and classes as ImageNet has for validation."""
    count = 50_000
    rng = torch.Generator().manual_seed(0)
    probabilities = torch.rand(count, 5, generator=rng).sort(dim=1, descending=True).values
    classes = torch.randint(1000, (count, 5), generator=rng)
    labels = torch.arange(count) // 50

    class Source:
        labels = np.zeros(count)

        def __len__(self) -> int:
            return count

        def name(self, index: int) -> str:
            return f"/data/val/n{index // 50:08d}/caf\udce9_{index:08d}.JPEG"

    cfg = KnnConfig(data_path="/data")
    predictions = Predictions(labels, classes, probabilities, probabilities[:, 0])
    for name in ("one.npz", "two.npz"):
        names = [f"n{label:08d}" for label in range(1000)]
        save_predictions(tmp_path / name, predictions, names, cfg, Source())
    content = (tmp_path / "one.npz").read_bytes()
    assert content == (tmp_path / "two.npz").read_bytes() and len(content) < 2.5e6
    assert (
        load_predictions(tmp_path / "one.npz").names[-1] == "val/n00000999/caf\udce9_00049999.JPEG"
    )


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_write_the_same_bytes(stage, tmp_path, weights):
    """In batches of one image, in which the arithmetic of an image does not depend on the others.
    Training adds up in another order on two processes, so its model is one that both evaluate."""
    data = make_pictures(tmp_path / "pictures", val=19)  # 57 images: unequal shares
    module, script, _ = STAGES[stage]
    more = {"finetune": ["--eval", "--batch_size", 1], "knn": ["--batch_size", 1]}.get(stage, [])
    if stage == "finetune":
        module.main(arguments(stage, data, tmp_path / "model", weights, "--epochs", 1))
        weights = tmp_path / "model" / "model.safetensors"
    module.main(arguments(stage, data, tmp_path / "one", weights, *more))
    launched = launch(arguments(stage, data, tmp_path / "two", weights, *more), 2, script)
    assert launched.returncode == 0, launched.stderr
    (one,), (two,) = (sorted((tmp_path / name).glob("*predictions.npz")) for name in ("one", "two"))
    ours, theirs = load_predictions(one), load_predictions(two)
    assert ours.names == theirs.names and len(ours.names) == 57
    assert (ours.labels == theirs.labels).all()
    results = results_of(tmp_path / "two", "eval.json" if stage == "finetune" else "results.json")
    assert 100 * int((theirs.classes[:, 0] == theirs.labels).sum()) / 57 == results["acc1"]
    if stage in ("finetune", "knn"):
        assert one.read_bytes() == two.read_bytes()
