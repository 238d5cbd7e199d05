"""`main_lincls.py` end to end: a frozen backbone, a fair choice among learning rates, exact
resume."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import assert_same, assert_same_run, class_scores
from runs import (
    CLASSES,
    Cut,
    changed_files,
    cut_after,
    files_of,
    log_lines,
    pictures,
    results_of,
    step_losses,
)
from safetensors.torch import load_file

import engine.evaluation.classification
import hubconf
import main_finetune
import main_knn
import main_lincls
from engine.run.checkpoint import load_newest_checkpoint
from engine.tasks import linear
from models.vit import VisionTransformer
from models.weights.own import own_bytes, read_header
from models.weights.read import read_weights
from models.weights.write import write_weights
from tools import predict
from util.errors import InputError

LEARN = ["--crop_min", 0.8, "--epochs", 8, "--warmup_epochs", 1]
RATES = (0.03, 0.3, 3.0)
STEPS = 9  # per epoch, of the 108 images that a held-out tenth leaves: 108 // 12


def lincls(data: Path, output: Path, *more) -> dict:
    """Results of a run on `data`."""
    return main_lincls.main(pictures(data, output, *more))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data, weights):
    """A run over three rates: its folder, command line and results."""
    folder = tmp_path_factory.mktemp("finished")
    arguments = pictures(data, folder, *LEARN, "--finetune", weights, "--lr", *RATES, "--per_class")
    return folder, arguments, main_lincls.main(arguments)


def scripted(monkeypatch, by_images: dict[int, list[int]]) -> None:
    """Makes evaluations of a split of so many images say how many each probe has right."""

    def call(self, classify, num_heads=1):
        size = len(self.source)
        assert num_heads == len(by_images[size])
        return [class_scores(size, [right, 0, 0], [size, 0, 0]) for right in by_images[size]]

    monkeypatch.setattr(engine.evaluation.classification.Evaluator, "__call__", call)


def on_features(monkeypatch, do: Callable[[VisionTransformer], None]) -> None:
    """Calls `do(model)` ahead of each forward pass of a backbone."""
    original = VisionTransformer.forward_features

    def called(self, images):
        do(self)
        return original(self, images)

    monkeypatch.setattr(VisionTransformer, "forward_features", called)


# --- what it learns and leaves


def test_it_learns_and_its_results_say_what_and_from_where(finished, weights):
    folder, _, results = finished
    assert results_of(folder) == results
    assert results["acc1"] == 100 * results["correct1"] / 60 > 65  # 33.3 is chance
    assert (results["protocol"], results["checkpoint"]) == ("linear classification", str(weights))
    assert (results["num_samples"], results["num_train"], results["num_held_out"]) == (60, 108, 12)
    assert [point["lr"] for point in results["curve"]] == list(RATES)
    assert all(point.keys() == {"lr", "val_acc1", "held_out_acc1"} for point in results["curve"])
    (chosen,) = [point for point in results["curve"] if point["lr"] == results["lr"]]
    assert chosen["val_acc1"] == results["acc1"]
    assert chosen["held_out_acc1"] == max(point["held_out_acc1"] for point in results["curve"])
    assert list(results["per_class"]) == list(CLASSES)
    assert sum(results["per_class"].values()) * 20 / 100 == pytest.approx(results["correct1"])
    left = {"checkpoint-00000072.pth", "config.yaml", "log.jsonl", "model.safetensors"}
    assert left | {"results.json"} < {path.name for path in folder.iterdir()}


def test_the_backbone_is_frozen_and_in_eval_mode_all_the_time(
    tmp_path, data, weights, finished, monkeypatch
):
    """Its parameters and buffers end as the bits that were read; drop path is off in eval mode."""
    source, ours = load_file(weights), load_file(finished[0] / "model.safetensors")
    encoder = {name for name in source if not name.startswith(("decoder_", "mask_token"))}
    assert ours.keys() - encoder == {"head.weight", "head.bias"}
    assert {"norm.weight", "pos_embed", "cls_token"} < encoder
    assert_same({name: ours[name] for name in encoder}, {name: source[name] for name in encoder})
    seen, models, before = [], [], {}

    def watch(model):
        modes = {module.training for module in model.modules()}
        learns = any(p.requires_grad for p in model.parameters())
        seen.append((modes, learns, torch.is_grad_enabled()))
        if not models:
            before.update({n: t.clone() for n, t in model.state_dict().items()})
        models.append(model)

    on_features(monkeypatch, watch)
    results = lincls(data, tmp_path, "--finetune", weights, "--eval_epochs", 1)
    assert len(seen) == 30 + 3 * 5  # 10 steps and 5 batches of evaluation in each of three epochs
    assert all(found == ({False}, False, False) for found in seen)
    after = models[-1].state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}  # which take the probe at the end
    assert results["num_train"] == 120


def test_the_written_classifier_is_the_one_that_was_scored(tmp_path, data, finished):
    """The batch normalisation is folded into the head."""
    folder, _, results = finished
    arguments = ["--eval", "--finetune", folder / "model.safetensors", "--per_class"]
    found = main_finetune.main(pictures(data, tmp_path, *arguments))
    for name in ("num_samples", "correct1", "correct5", "per_class"):
        assert found[name] == results[name], name
    assert found["loss"] == pytest.approx(results["loss"], rel=1e-5)


def test_a_finished_run_is_left_alone(finished):
    folder, arguments, results = finished
    before = files_of(folder)
    assert main_lincls.main(arguments) == results
    assert changed_files(folder, before) <= {"log.txt", ".lock"}


@pytest.mark.parametrize(("optimizer", "lr", "least"), [("sgd", 1.0, 65), ("lars", 10.0, 50)])
def test_one_rate_trains_on_all_images(tmp_path, data, weights, optimizer, lr, least):
    """LARS moves a matrix by a thousandth of its norm at a rate of 1: with so few steps it gets
    less far."""
    more = ["--finetune", weights, "--lr", lr, "--optimizer", optimizer]
    results = lincls(data, tmp_path, *LEARN, *more)
    assert (results["num_train"], results["num_held_out"], results["lr"]) == (120, 0, lr)
    assert results["curve"] == [{"lr": lr, "val_acc1": results["acc1"]}]
    assert results["acc1"] > least  # 33.3 is chance


def test_an_untrained_model_can_be_evaluated(tmp_path, data):
    more = ["--finetune", "random", "--stop_epoch", 1]
    results = lincls(data, tmp_path / "a", *more)
    assert (results["checkpoint"], results["sha256"]) == ("random", None)
    assert "cls_token" not in load_file(tmp_path / "a" / "model.safetensors")
    assert lincls(data, tmp_path / "b", *more) == results
    other = lincls(data, tmp_path / "c", *more, "--seed", 1)
    assert other["loss"] != results["loss"]


# --- several learning rates


def test_held_out_images_choose_and_validation_images_do_not(tmp_path, data, weights, monkeypatch):
    scripted(monkeypatch, {60: [50, 20, 10], 12: [3, 9, 9]})  # validation would take the first
    results = lincls(data, tmp_path, "--finetune", weights, "--lr", *RATES, "--eval_epochs", 1)
    assert (results["lr"], results["correct1"], results["acc1"]) == (0.3, 20, 100 * 20 / 60)
    accuracies = [[point["val_acc1"], point["held_out_acc1"]] for point in results["curve"]]
    assert accuracies == [
        [100 * val / 60, 100 * out / 12] for val, out in ((50, 3), (20, 9), (10, 9))
    ]
    lines = [line for line in log_lines(tmp_path) if "val_loss" in line]
    assert [[line["val_acc1"], line["held_out_acc1"]] for line in lines] == 3 * [accuracies[1]]
    # and the head that is written is the second: of equals the first
    saved = load_newest_checkpoint(tmp_path).model
    scale = (saved["bn.running_var"].double() + 1e-6).rsqrt()
    weight = saved["weights.1"].double() * scale
    written = load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(written["head.weight"].double(), weight, rtol=1e-6, atol=1e-9)
    bias = saved["biases.1"].double() - weight @ saved["bn.running_mean"].double()
    torch.testing.assert_close(written["head.bias"].double(), bias, rtol=1e-6, atol=1e-7)


def test_the_held_out_tenth_is_stratified_fixed_by_the_seed_and_never_trained_on(
    tmp_path, data, weights, monkeypatch
):
    splits = []
    original = linear.split_training_set

    def watched(source, cfg):
        parts = original(source, cfg)
        splits.append([{part.name(i) for i in range(len(part))} for part in parts])
        assert np.bincount(parts[1].labels).tolist() == [4, 4, 4]
        assert np.bincount(parts[0].labels).tolist() == [36, 36, 36]
        return parts

    monkeypatch.setattr(linear, "split_training_set", watched)
    for place, seed in enumerate((0, 0, 1)):
        more = ["--lr", *RATES, "--stop_epoch", 1, "--seed", seed]
        lincls(data, tmp_path / str(place), "--finetune", weights, *more)
    (train, held_out), (_, again), (_, other) = splits
    assert not train & held_out and len(train | held_out) == 120
    assert held_out == again != other
    assert step_losses(tmp_path / "0").keys() == set(range(1, STEPS + 1))


def test_a_rate_that_diverges_does_not_disturb_the_others(tmp_path, data, weights):
    # with weight decay a matrix grows by lr * 0.001 in each step, until it overflows
    arguments = [*LEARN, "--finetune", weights, "--epochs", 4, "--weight_decay", 1e-3, "--lr"]
    alone = lincls(data, tmp_path / "alone", *arguments, 0.1, 1.0)
    beside = lincls(data, tmp_path / "beside", *arguments, 0.1, 1.0, 1e8)
    ours, theirs = (load_newest_checkpoint(tmp_path / name).model for name in ("beside", "alone"))
    assert not ours["weights.2"].isfinite().all()  # it did diverge
    for one, other in zip(beside["curve"], alone["curve"], strict=False):
        assert one == pytest.approx(other, abs=1e-6)
    assert beside["lr"] == alone["lr"] and beside["acc1"] == pytest.approx(alone["acc1"], abs=1e-6)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    losses = [line["loss"] for line in log_lines(tmp_path / "beside") if "loss" in line]
    assert np.isfinite(losses[-1])  # the log shows the mean of those that go on


def test_when_all_rates_diverge_the_run_ends_and_leaves_no_result(tmp_path, data, weights):
    more = ["--lr", 1e8, "--weight_decay", 1e-3, "--warmup_epochs", 0]
    with pytest.raises(InputError, match=r"non-finite gradient"):
        lincls(data, tmp_path, "--finetune", weights, *more)
    assert not (tmp_path / "results.json").exists()


# --- attentive probes

ATTENTIVE = ["--probe", "attentive", "--probe_queries", 4]


@pytest.fixture(scope="module")
def attentive(tmp_path_factory, data, weights):
    """A run over three rates with attentive probes: its folder and results."""
    folder = tmp_path_factory.mktemp("attentive")
    more = ["--epochs", 24, *ATTENTIVE, "--finetune", weights, "--lr", *RATES]
    return folder, lincls(data, folder, *LEARN, *more)


def test_an_attentive_probe_learns_and_its_file_is_the_classifier_that_was_scored(
    tmp_path, data, attentive, weights
):
    folder, results = attentive
    assert results["protocol"] == "attentive classification"
    assert results["num_train"] == 108 and [p["lr"] for p in results["curve"]] == list(RATES)
    assert results["acc1"] > 80  # 33.3 is chance
    path = folder / "model.safetensors"
    tensors, info = read_weights(path)
    spec = info.spec
    assert (spec.global_pool, spec.probe_queries, spec.probe_dim) == ("attentive", 4, 32)
    source = load_file(weights)
    own = {"pool.queries", "pool.values", "head.weight", "head.bias"}
    assert_same(
        {n: t for n, t in tensors.items() if n not in own},
        {n: t for n, t in source.items() if not n.startswith(("decoder_", "mask_token"))},
    )
    # its evaluation, with the readout of the file
    arguments = ["--eval", "--finetune", path]
    found = main_finetune.main(pictures(data, tmp_path / "eval", *arguments))
    assert [found[n] for n in ("num_samples", "correct1")] == [60, results["correct1"]]
    assert found["loss"] == pytest.approx(results["loss"], rel=1e-5)
    # its predictions
    output = tmp_path / "said.csv"
    images = ["--data_path", data / "val", "--output_file", output, "--precision", "fp32"]
    predict.main([str(word) for word in ["--finetune", path, *images, "--device", "cpu"]])
    rows = [line.split(",") for line in output.read_text().splitlines()[1:]]
    assert sum(Path(row[0]).parent.name == row[1] for row in rows) == results["correct1"]
    # and written again as it is
    write_weights(tensors, info, tmp_path / "copy.safetensors", "safetensors")
    assert_same(load_file(tmp_path / "copy.safetensors"), tensors)
    images = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    models = [hubconf.classifier(str(p)) for p in (path, tmp_path / "copy.safetensors")]
    assert torch.equal(models[0](images), models[1](images))


def test_an_attentive_readout_is_dropped_where_the_file_is_an_encoder(
    tmp_path, data, attentive, weights
):
    path = attentive[0] / "model.safetensors"
    knn = [
        main_knn.main(pictures(data, tmp_path / "knn", "--finetune", p, training=False))["acc1"]
        for p in (path, weights)
    ]
    assert knn[0] == knn[1]
    images = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    encoders = [hubconf.encoder(str(p), global_pool="avg") for p in (path, weights)]
    assert torch.equal(encoders[0](images), encoders[1](images))
    assert encoders[0].pool is None
    lincls(data, tmp_path / "linear", "--finetune", path, "--stop_epoch", 1)
    assert "pool.queries" not in load_file(tmp_path / "linear" / "model.safetensors")
    more = ["--finetune", path, "--stop_epoch", 1, "--lr", 1e-12]
    main_finetune.main(pictures(data, tmp_path / "tuned", *more))
    tuned, source = load_file(tmp_path / "tuned" / "model.safetensors"), load_file(path)
    assert "pool.queries" not in tuned
    assert not torch.allclose(tuned["head.weight"], source["head.weight"])
    tensors, info = read_weights(path)
    write_weights(tensors, info, tmp_path / "timm.safetensors", "timm")
    assert not {"pool.queries", "head.weight"} & load_file(tmp_path / "timm.safetensors").keys()
    with pytest.raises(InputError, match="probe_queries"):
        write_weights(tensors, info, tmp_path / "mae.pth", "mae")


@pytest.mark.parametrize("change", [["--probe_queries", 8], ["--probe", "linear"]])
def test_another_probe_is_refused_on_resume(attentive, data, weights, change):
    more = [*LEARN, "--epochs", 24, *ATTENTIVE, "--finetune", weights, "--lr", *RATES, *change]
    with pytest.raises(InputError, match="probe"):
        lincls(data, attentive[0], *more)


@pytest.mark.parametrize("change", [{"probe_queries": 5}, {"probe_dim": None}, {"probe_dim": 64}])
def test_a_header_that_does_not_fit_its_tensors_is_refused(tmp_path, attentive, change):
    path = attentive[0] / "model.safetensors"
    tensors, header = load_file(path), read_header(path)
    header["model_args"] |= change
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_bytes(own_bytes(tensors, header))
    with pytest.raises(InputError, match=r"wrong\.safetensors.*(probe|pool)"):
        read_weights(wrong)


# --- resume


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        ("sgd", []),
        pytest.param("lars", [], marks=pytest.mark.long),
        pytest.param("lars", ATTENTIVE, marks=pytest.mark.long),
        ("sgd", ATTENTIVE),
    ],
)
def test_a_run_goes_on_bit_for_bit(tmp_path, data, weights, monkeypatch, optimizer, kind):
    """Stopped after an epoch, and cut in the middle of the next; other workers change nothing."""
    more = ["--finetune", weights, "--optimizer", optimizer, "--weight_decay", 1e-3, *kind]
    more += ["--lr", 0.1, 1, "--eval_epochs", 1]
    main_lincls.main(pictures(data, tmp_path / "whole", *more))
    base = pictures(data, tmp_path / "stopped", *more, "--save_minutes", 1e-9)
    stopped = main_lincls.main([*base, "--stop_epoch", "1"])
    assert results_of(tmp_path / "stopped") == stopped
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_after(patch, 5, main_lincls, "probe_step")
        main_lincls.main(base)
    assert load_newest_checkpoint(tmp_path / "stopped").step == STEPS + 5
    assert not (tmp_path / "stopped" / "results.json").exists()
    main_lincls.main([*base, "--num_workers", "2"])
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert len(set(step_losses(tmp_path / "whole").values())) == 3 * STEPS
    buffers = load_newest_checkpoint(tmp_path / "whole").optimizer["state"]
    assert all(
        entry["momentum_buffer"].any() for entry in buffers.values()
    )  # there was something to restore


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--lr", 0.03, 0.3], r"\blr\b.*3.0"),
        (["--optimizer", "lars"], "optimizer.*sgd.*lars"),
        (["--momentum", 0.5], "momentum.*0.9.*0.5"),
        (["--finetune", "random", "--class_tokens", "1"], "finetune.*sha256"),
    ],
)
def test_a_changed_setting_is_refused_on_resume(finished, change, named):
    folder, arguments, results = finished
    with pytest.raises(InputError, match=named):
        main_lincls.main([*arguments, *map(str, change)])
    assert results_of(folder) == results


def test_the_readout_follows_the_weights(tmp_path, data, weights):
    """Of a fine-tuned classifier the norm after the mean is kept, so the probe sees the feature its
    head saw."""
    main_finetune.main(pictures(data, tmp_path / "tuned", "--finetune", weights, "--stop_epoch", 1))
    tuned = tmp_path / "tuned" / "model.safetensors"
    lincls(data, tmp_path / "probe", "--finetune", tuned, "--stop_epoch", 1)
    source, ours = load_file(tuned), load_file(tmp_path / "probe" / "model.safetensors")
    assert ours.keys() == source.keys() and "fc_norm.weight" in ours
    changed = {name for name in ours if not torch.equal(ours[name], source[name])}
    assert changed == {"head.weight", "head.bias"}
