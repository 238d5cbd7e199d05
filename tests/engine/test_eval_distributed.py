"""The evaluations on several gloo processes under their launchers: the same counts as one process,
exact resume."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    ATTENTIVE,
    CLASSES,
    ROOT,
    assert_same,
    launch,
    log_lines,
    make_pictures,
    pictures,
    pretrain_pictures,
    results_of,
    run,
    step_losses,
)
from safetensors.torch import load_file
from sklearn import metrics
from test_metrics import mean_of, rankings

import main_finetune
import main_knn
from engine.run.checkpoint import load_newest_checkpoint

pytestmark = pytest.mark.long

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


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """53 validation images: neither 2 nor 3 processes have equal shares."""
    root = make_pictures(tmp_path_factory.mktemp("pictures"))
    for number in range(7):
        (root / "val" / "one" / f"{40 + number:03d}.png").unlink()
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory, data) -> Path:
    return pretrain_pictures(data, tmp_path_factory.mktemp("pretrained")) / "model.safetensors"


def succeed(arguments: list[str], processes: int, launcher: str) -> str:
    """Launches, and returns what was printed."""
    result = launch(arguments, processes, launcher)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("processes", [2, 3])
def test_knn_has_the_same_counts_and_features(tmp_path, data, weights, processes):
    more = ["--finetune", weights, "--ks", 1, 5, 20, 1000, "--per_class", "--save_path"]
    alone = main_knn.main(pictures(data, tmp_path / "one", *more, tmp_path / "f1", training=False))
    arguments = pictures(data, tmp_path / "many", *more, tmp_path / "f2", training=False)
    printed = succeed(arguments, processes, "run_knn.sh")
    many = results_of(tmp_path / "many")
    assert many == alone and many["num_samples"] == 53 and list(many["per_class"]) == list(CLASSES)
    assert printed.count("1-NN") == 1 and printed.count("wrote ") == 2  # only rank 0 speaks
    assert "[process" not in printed
    assert "k 1000 is more than the 120 training images" in printed
    ours, theirs = (load_file(tmp_path / name / "features.safetensors") for name in ("f2", "f1"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def two(tmp_path_factory, data, weights):
    """An uninterrupted fine-tuning on two processes: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("two")
    arguments = pictures(data, folder, *ALL_ON, "--finetune", weights, "-b", 6)
    return folder, succeed(arguments, 2, "run_finetune.sh")


@pytest.mark.parametrize("processes", [2, 3])
def test_eval_has_the_same_counts(tmp_path, data, two, processes):
    folder = two[0]
    more = ["--eval", "--finetune", folder / "model.safetensors", "--per_class"]
    alone = main_finetune.main(pictures(data, tmp_path / "one", *more))
    printed = succeed(pictures(data, tmp_path / "many", *more), processes, "run_finetune.sh")
    many = results_of(tmp_path / "many", "eval.json")
    assert many.pop("loss") == pytest.approx(alone.pop("loss"), rel=1e-6)
    assert many == alone and many["num_samples"] == 53
    assert printed.count("53 images, top-1") == 1
    # and they are what the run itself said
    assert many["correct1"] == results_of(folder)["correct1"]


def test_fine_tuning_on_two_processes_resumes_bit_for_bit(tmp_path, data, weights, two):
    whole, printed = two
    arguments = pictures(data, tmp_path, *ALL_ON, "--finetune", weights, "-b", 6)
    succeed([*arguments, "--stop_epoch", "1"], 2, "run_finetune.sh")
    assert "resuming" in succeed([*arguments, "--num_workers", "1"], 2, "run_finetune.sh")
    assert step_losses(whole) == step_losses(tmp_path)
    assert len(set(step_losses(whole).values())) == 30
    ours, theirs = load_newest_checkpoint(tmp_path), load_newest_checkpoint(whole)
    for name in ("step", "model", "ema", "optimizer", "epoch_losses", "total_batch"):
        assert_same(getattr(ours, name), getattr(theirs, name), name)
    for name in ("model.safetensors", "best.safetensors"):
        assert_same(load_file(tmp_path / name), load_file(whole / name), name)
    assert results_of(tmp_path) == results_of(whole)
    assert "12 = 6 x 2 processes x 1 accumulated" in printed
    for epoch in (1, 2, 3):
        assert printed.count(f"epoch {epoch} done") == 1  # only rank 0 speaks


# Scores fixed outputs of 53 images, image i being one pixel of value i, and writes the figures.
SCORE = """
import json, sys
from pathlib import Path
import numpy as np, torch
from data.images import PixelFormat
from data.sources import ArraySource
from engine.evaluation.classification import Evaluator
from engine.evaluation.objective import Objective
from engine.run.folder import Run
from engine.run.records import Records
from util.dist import init_processes
from util.settings.evaluation import LinclsConfig
given = np.load(sys.argv[1])
found = {}
with init_processes("cpu", 5) as processes:
    for name in ("multiclass", "multilabel", "regression"):
        labels, logits = given[name], torch.from_numpy(given["outputs"])
        if name == "regression":
            logits = logits[..., :2]
        pixels = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
        source = ArraySource("numbers", pixels, labels, PixelFormat(1))
        cfg = LinclsConfig(mean=(0.5,), std=(0.25,), num_workers=0, precision="fp32", crop_pct=1.0,
                           img_size=1, batch_size=5)
        run = Run(Path("nowhere"), processes, Records(Path("nowhere"), is_main=False))
        stats = (torch.tensor([3.0, 1.0]), torch.tensor([2.0, 5.0]))
        objective = Objective(name, [*"abcde"][:logits.shape[-1]], None,
                              *(stats if name == "regression" else ()))
        def classify(images):
            return logits[:, (255 * (0.25 * images.flatten() + 0.5)).round().long()]
        found[name] = [scores.as_dict(objective.names) for scores in
                       Evaluator(cfg, run, source, objective)(classify, len(logits))]
    Path(f"{sys.argv[2]}{processes.rank}.json").write_text(json.dumps(found))
"""


def expected_figures(kind: str, labels: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
    """scikit-learn's, of one head; class 3 has no image."""
    if kind == "regression":
        predicted = outputs.astype(np.float64) * [2, 5] + [3, 1]
        return {
            "mae": metrics.mean_absolute_error(labels, predicted),
            "rmse": metrics.root_mean_squared_error(labels, predicted),
            "r2": metrics.r2_score(labels, predicted),
        }
    logits = torch.from_numpy(outputs).double()
    one_hot = np.eye(5, dtype=int)[labels] if kind == "multiclass" else labels
    scores = (logits.softmax(1) if kind == "multiclass" else logits.sigmoid()).numpy()
    auroc, ap = map(mean_of, rankings(one_hot, scores))
    if kind == "multilabel":
        f1 = metrics.f1_score(labels, outputs > 0, average="macro")
        return {"map": ap, "auroc": auroc, "f1": f1}
    predicted = outputs.argmax(axis=1)
    return {
        "acc1": 100 * metrics.accuracy_score(labels, predicted),
        "balanced_acc": metrics.balanced_accuracy_score(labels, predicted),
        "f1": metrics.f1_score(labels, predicted, average="macro"),
        "kappa": metrics.cohen_kappa_score(labels, predicted),
        "kappa_quadratic": metrics.cohen_kappa_score(labels, predicted, weights="quadratic"),
        "auroc": auroc,
        "ap": ap,
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_figures_are_those_of_scikit_learn_on_any_number_of_processes(tmp_path, processes):
    chance = np.random.default_rng(0)
    # images with equal outputs, but none with two largest ones, of which either may be chosen
    outputs = (chance.normal(size=(2, 53, 5)).round(1) + 0.01 * np.arange(5)).astype(np.float32)
    given = {
        "multiclass": chance.choice([0, 1, 2, 4], 53),
        "multilabel": chance.integers(0, 2, (53, 5)),
        "regression": chance.normal(3, 2, (53, 2)).astype(np.float32),
    }
    np.savez(tmp_path / "given.npz", outputs=outputs, **given)
    (tmp_path / "score.py").write_text(SCORE)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    script = [str(tmp_path / "score.py"), str(tmp_path / "given.npz"), f"{tmp_path}/found"]
    result = run([sys.executable, *launcher, *script], PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    found, *others = (
        json.loads((tmp_path / f"found{rank}.json").read_text()) for rank in range(processes)
    )
    assert all(other == found for other in others)
    for kind, labels in given.items():
        for head in range(2):
            of_head = outputs[head, :, : 2 if kind == "regression" else 5]
            expected = expected_figures(kind, labels, of_head)
            ours = {name: found[kind][head][name] for name in expected}
            assert ours == pytest.approx(expected, rel=1e-12, abs=1e-12), (kind, head)
            assert found[kind][head]["num_samples"] == 53
    assert found["multiclass"][0]["per_class_auroc"]["d"] is None
    assert np.sum(found["multiclass"][0]["confusion"]) == 53


# Runs a linear classification and keeps what each process holds after its last evaluation.
KEEP_STATES = """
import os, sys
import torch
import main_lincls
evaluate_epoch = main_lincls.evaluate_epoch
def keep(job, *more):
    found = evaluate_epoch(job, *more)
    state = {"model": job.state.model.state_dict(), "curve": found[1]["curve"]}
    torch.save(state, f"{sys.argv[1]}/state{os.environ['RANK']}.pt")
    return found
main_lincls.evaluate_epoch = keep
main_lincls.main(sys.argv[2:])
"""


@pytest.mark.parametrize("kind", [[], pytest.param(ATTENTIVE, marks=pytest.mark.long)])
def test_probes_end_alike_on_both_processes(tmp_path, data, weights, kind):
    more = ["--finetune", weights, "--lr", 0.1, 1, "-b", 6, "--per_class", *kind]
    script = tmp_path / "keep_states.py"
    script.write_text(KEEP_STATES)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [str(tmp_path), *pictures(data, tmp_path / "run", *more)]
    started = [sys.executable, *launcher, str(script), *arguments]
    result = run(started, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    one, other = (torch.load(tmp_path / f"state{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same(one, other)
    assert one["model"]["bn.num_batches_tracked"] == 27 and one["model"]["bn.running_mean"].any()
    assert_same(dict(one["model"]), load_newest_checkpoint(tmp_path / "run").model)
    results = results_of(tmp_path / "run")
    assert len(results["curve"]) == 2 and results["num_held_out"] == 12
    # stopped and gone on with through the launcher, it ends there too
    stopped = pictures(data, tmp_path / "stopped", *more)
    succeed([*stopped, "--stop_epoch", "2"], 2, "run_lincls.sh")
    printed = succeed(stopped, 2, "run_lincls.sh")
    assert step_losses(tmp_path / "stopped") == step_losses(tmp_path / "run")
    assert_same(load_newest_checkpoint(tmp_path / "stopped").model, dict(one["model"]))
    assert results_of(tmp_path / "stopped") == results
    assert printed.count("epoch 3 lr") == 1 and "[process" not in printed


def test_the_statistics_are_those_of_all_processes(tmp_path, data, weights):
    """Two processes of 6 see the same images as one of 12: equal means, and each step's loss is
    near."""
    more = ["--finetune", weights, "--lr", 0.1, "--stop_epoch", 1]
    succeed(pictures(data, tmp_path / "one", *more), 1, "run_lincls.sh")
    succeed(pictures(data, tmp_path / "two", *more, "-b", 6), 2, "run_lincls.sh")
    one, other = (load_newest_checkpoint(tmp_path / name).model for name in ("one", "two"))
    torch.testing.assert_close(
        one["bn.running_mean"], other["bn.running_mean"], rtol=1e-4, atol=1e-5
    )
    losses = [
        [line["loss"] for line in log_lines(tmp_path / name) if "loss" in line]
        for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=0.1)


@pytest.mark.parametrize("launcher", ["run_finetune.sh", "run_lincls.sh"])
def test_a_total_that_does_not_divide_is_one_error(tmp_path, data, weights, launcher):
    arguments = pictures(data, tmp_path, "--finetune", weights, "-b", 8, "--total_batch_size", 24)
    result = launch(arguments, 2, launcher)
    assert result.returncode != 0
    errors = re.findall("^error: .*", result.stderr, re.MULTILINE)
    assert errors == [
        "error: total_batch_size 24 is not a multiple of batch_size 8 x 2 processes = 16, "
        "so accum_iter is not whole"
    ]
