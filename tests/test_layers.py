"""Inner layers of a frozen encoder, with and without its last norm, against blocks that are
listened to: k-NN and `tools/embed.py` over several, linear and attentive classification on one, and
its files."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_runs import few_scenes, on_scenes
from runs import (
    ATTENTIVE,
    CLASSES,
    launch,
    log_lines,
    normalised,
    pictures,
    pretrain_pictures,
    pretraining,
    results_of,
)
from safetensors.torch import load_file
from test_knn import brute_force

import hubconf
import main_finetune
import main_knn
import main_lincls
import main_pretrain
from engine.run.checkpoint import load_newest_checkpoint, save_checkpoint
from models.vit import VisionTransformer
from models.weights.own import read_header
from models.weights.read import read_weights
from models.weights.write import write_weights
from tools import embed, plot_run, predict, vit_explain
from util.errors import InputError

FEATURES = "features.safetensors"
KS = (1, 20)
NORMS = pytest.mark.parametrize("last_norm", [True, False])


def knn(data: Path, output: Path, weights: object, *more) -> dict:
    more = ["--finetune", weights, "--ks", *KS, *more]
    return main_knn.main(pictures(data, output, *more, training=False))


def patches_by_hooks(weights: Path, images: torch.Tensor, last_norm: bool) -> list[torch.Tensor]:
    """The patch tokens `(B, N, D)` after each block of the encoder of hubconf."""
    model = hubconf.encoder(str(weights))
    tokens: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: tokens.append(out))
    with torch.no_grad():
        model(images)
        # of the two norms it has one
        found = [model.fc_norm(model.norm(x)) if last_norm else x for x in tokens]
    return [x[:, model.class_tokens :] for x in found]


def by_hooks(weights: Path, images: torch.Tensor, last_norm: bool) -> list[torch.Tensor]:
    """The mean over the patch tokens after each block, of an encoder without `fc_norm`."""
    return [x.mean(dim=1) for x in patches_by_hooks(weights, images, last_norm)]


@NORMS
def test_knn_of_several_layers_is_that_of_each_by_one_pass(
    tmp_path, data, weights, monkeypatch, caplog, last_norm
):
    caplog.set_level(logging.INFO)
    blocks: list[int] = []
    original = VisionTransformer.iterate_tokens

    def counted(self, images):
        for tokens in original(self, images):
            blocks.append(len(tokens))
            yield tokens

    monkeypatch.setattr(VisionTransformer, "iterate_tokens", counted)
    norm = ["--last_norm", str(last_norm).lower(), "--save_path"]
    more = [*norm, tmp_path / "f", "--layer", -1, 0, 1]  # in any order, and one twice
    results = knn(data, tmp_path / "run", weights, *more)
    assert sum(blocks) == 2 * 180  # each image once through each of two blocks
    assert [row["layer"] for row in results["layers"]] == [0, 1]
    labels = np.repeat(np.arange(3), 20)
    for layer, row in enumerate(results["layers"]):
        saved = load_file(tmp_path / "f" / f"layer{layer}" / FEATURES)
        for split in ("train", "val"):
            expected = by_hooks(weights, normalised(data / split), last_norm)[layer]
            torch.testing.assert_close(saved[split], expected, rtol=0, atol=1e-5)
        train, own, val = (saved[n].numpy() for n in ("train", "train_labels", "val"))
        hits = [brute_force(train, own, val, k, 3).argmax(axis=1) == labels for k in KS]
        expected = {str(k): 100 * int(hit.sum()) / 60 for k, hit in zip(KS, hits, strict=True)}
        assert row["acc1_by_k"] == expected
        alone = knn(data, tmp_path / f"{layer}", weights, *norm, tmp_path / "g", "--layer", layer)
        assert {n: alone[n] for n in row} == row and alone["last_norm"] is last_norm
        (path,) = (tmp_path / "g").iterdir()
        torch.testing.assert_close(load_file(path)["val"], saved["val"], rtol=0, atol=1e-6)
        path.unlink()
    best = max(results["layers"], key=lambda row: row["acc1"])
    assert results["layers"][0]["acc1"] != results["layers"][1]["acc1"]
    assert {n: results[n] for n in best} == best and results_of(tmp_path / "run") == results
    assert any(f"layer  {best['layer']}" in m and "the best" in m for m in caplog.messages)
    loaded = main_knn.main(
        ["--load_path", str(tmp_path / "f" / "layer0"), "--output_dir", str(tmp_path / "l")]
        + ["--device", "cpu", "--ks", *map(str, KS)]
    )
    assert {n: loaded[n] for n in results["layers"][0]} == results["layers"][0]
    with pytest.raises(InputError, match="save_path"):  # those of another layer are there
        knn(data, tmp_path / "run", weights, *norm, tmp_path / "f" / "layer0", "--layer", 1)


@pytest.mark.long
def test_two_processes_have_the_same_table(tmp_path, data, weights):
    more = ["--finetune", weights, "--ks", *KS, "--layer", 0, 1]
    found = launch(pictures(data, tmp_path, *more, training=False), 2, "run_knn.sh")
    assert found.returncode == 0, found.stderr
    expected = knn(data, tmp_path / "one", weights, "--layer", 0, 1)
    assert results_of(tmp_path) == expected and len(expected["layers"]) == 2


def test_embedded_layers_without_the_norm_are_those_of_knn_bit_for_bit(tmp_path, data, weights):
    base = ["--last_norm", "false", "--batch_size", 32]
    knn(data, tmp_path / "run", weights, *base, "--layer", 0, "--save_path", tmp_path / "f")
    words = ["--finetune", weights, "--data_path", data, "--output_file", tmp_path / "e.npz"]
    words += ["--split", "val", "--device", "cpu", "--precision", "fp32", "--layer", 0, *base]
    embed.main([str(word) for word in words])
    expected = load_file(tmp_path / "f" / FEATURES)["val"]
    assert np.array_equal(np.load(tmp_path / "e.npz")["avg"], expected.numpy())


@NORMS
def test_a_classifier_of_an_inner_layer_is_a_shorter_model(tmp_path, data, weights, last_norm):
    """Its file has the blocks that are read, and `--eval`, `predict` and k-NN take it."""
    norm = ["--last_norm", str(last_norm).lower()]
    more = ["--finetune", weights, "--layer", -2, *norm, "--lr", 0.1, 1, "--epochs", 3]
    results = main_lincls.main(pictures(data, tmp_path / "probe", *more))
    path = tmp_path / "probe" / "model.safetensors"
    ours, source = load_file(path), load_file(weights)
    names = {n for n in ours if not n.startswith("head.")}
    assert all(torch.equal(ours[name], source[name]) for name in names)
    assert {n.split(".")[1] for n in names if n.startswith("blocks.")} == {"0"}
    assert ("norm.weight" in names, "blocks.1.attn.qkv.weight" in source) == (last_norm, True)
    fields = read_header(path)["model_args"]
    assert (fields["depth"], fields["last_norm"], fields["fc_norm"]) == (1, last_norm, False)
    shorter = ["--finetune", path, "--depth", 1]
    found = main_finetune.main(pictures(data, tmp_path / "eval", "--eval", *shorter))
    assert found["correct1"] == results["correct1"]
    with pytest.raises(InputError, match=r"depth 1 in the file, 2 in the settings"):
        main_finetune.main(pictures(data, tmp_path / "eval", "--eval", *shorter[:2]))
    model, images = hubconf.classifier(str(path)), normalised(data / "val")
    with torch.no_grad():
        feature = by_hooks(weights, images, last_norm)[0]
        expected = torch.nn.functional.linear(feature, ours["head.weight"], ours["head.bias"])
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    words = ["--finetune", path, "--data_path", data / "val", "--output_file", tmp_path / "p.csv"]
    predict.main([*map(str, words), "--device", "cpu", "--precision", "fp32"])
    rows = [line.split(",")[1] for line in (tmp_path / "p.csv").read_text().splitlines()[1:]]
    own = np.repeat(sorted(CLASSES), 20)
    assert (np.array(rows) == own).sum() == results["correct1"]
    of_file = knn(data, tmp_path / "knn", path, "--depth", 1, *norm)
    assert of_file["acc1_by_k"] == pytest.approx(
        knn(data, tmp_path / "same", weights, "--layer", 0, *norm)["acc1_by_k"]
    )
    if not last_norm:  # what needs a norm says so, and training starts a fresh one
        with pytest.raises(InputError, match="read it with last_norm false"):
            knn(data, tmp_path / "no", path, "--depth", 1)
        with pytest.raises(InputError, match="needs last_norm true"):
            write_weights(*read_weights(path), tmp_path / "timm.safetensors", "timm")
        main_finetune.main(pictures(data, tmp_path / "tuned", *shorter, "--stop_epoch", 1))
        init = ["--init", path, "--depth", 1, "--stop_epoch", 1]
        main_pretrain.main(pretraining(data, tmp_path / "again", *init))
        assert "norm.weight" in load_file(tmp_path / "again" / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "norm"), [("pretrained", "norm"), ("pretrained", None), ("tuned", "fc_norm")]
)
def test_an_attentive_probe_of_an_inner_layer_gathers_the_patches_after_it(
    tmp_path, data, weights, kind, norm
):
    """Plain lines on the tokens after the first block give the logits of its file, a shorter model
    with the probe's queries, which `--eval`, `--reader probe` and k-NN take."""
    if kind == "tuned":  # of three class tokens, none of which is gathered
        more = ["--class_tokens", 3, "--stop_epoch", 1]
        weights = pretrain_pictures(data, tmp_path / "three", *more) / "model.safetensors"
        more = ["--finetune", weights, "--stop_epoch", 1]
        main_finetune.main(pictures(data, tmp_path / "tuned", *more))
        weights = tmp_path / "tuned" / "model.safetensors"
    last_norm = ["--last_norm", str(norm is not None).lower()]
    more = ["--finetune", weights, "--layer", 0, *last_norm, *ATTENTIVE, "--lr", 0.3, 3]
    results = main_lincls.main(pictures(data, tmp_path / "probe", *more))
    path = tmp_path / "probe" / "model.safetensors"
    ours, images = load_file(path), normalised(data / "val")
    fields = read_header(path)["model_args"]
    assert (fields["depth"], fields["global_pool"]) == (1, "attentive")
    assert {n.split(".")[0] for n in ours if "norm" in n.split(".")[0]} == {norm} - {None}
    patches = patches_by_hooks(weights, images, norm is not None)[0]  # (B, N, D)
    attention = (patches @ ours["pool.queries"].T / 32**0.5).softmax(dim=1)  # (B, N, M)
    values = (patches @ ours["pool.values"].T).unflatten(2, (4, -1))  # (B, N, M, E / M)
    gathered = (attention[..., None] * values).sum(dim=1).flatten(1)  # (B, E)
    logits = torch.nn.functional.linear(gathered, ours["head.weight"], ours["head.bias"])
    with torch.no_grad():
        found = hubconf.classifier(str(path))(images)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    hits = logits.argmax(dim=1) == torch.arange(3).repeat_interleave(20)
    assert results["correct1"] == hits.sum() > 30  # 20 is chance
    shorter = ["--finetune", path, "--depth", 1]
    evaluated = main_finetune.main(pictures(data, tmp_path / "eval", "--eval", *shorter))
    assert evaluated["correct1"] == results["correct1"]
    words = [*shorter, "--image_path", data / "val" / "nought" / "040.png", "--reader", "probe"]
    words += ["--size", "debug", "--patch_size", 4, "--img_size", 28, "--in_chans", 1]
    words += ["--mean", 0.1307, "--std", 0.3081, "--device", "cpu", "--save_path", tmp_path / "x"]
    vit_explain.main([str(word) for word in words])
    (drawn,) = (tmp_path / "x").glob("*_probe.npy")
    expected = attention[0].mean(dim=1).view(7, 7).numpy()
    np.testing.assert_allclose(np.load(drawn), expected, rtol=0, atol=1e-6)
    of_file = knn(data, tmp_path / "knn", *shorter[1:], *last_norm)
    same = knn(data, tmp_path / "same", weights, "--layer", 0, *last_norm)
    assert of_file["acc1_by_k"] == same["acc1_by_k"]


@pytest.mark.parametrize("stage", [main_knn, main_lincls])
def test_patches_of_an_inner_layer(tmp_path, monkeypatch, stage):
    """Segmentation reads patches of the same shorter model: its figures are those of a file that
    ends there."""
    few_scenes(monkeypatch)
    more = ["--depth", 2, "--finetune", "random"]
    found = stage.main(on_scenes("segment", tmp_path / "inner", *more, "--layer", 0))
    last = stage.main(on_scenes("segment", tmp_path / "last", *more))
    assert found["miou"] != last["miou"]
    if stage is main_lincls:
        assert read_header(tmp_path / "inner" / "model.safetensors")["model_args"]["depth"] == 1
        assert log_lines(tmp_path / "inner")[-1]["val_miou"] == found["miou"]
    else:
        assert (found["layer"], last["layer"]) == (0, 1)


def test_a_depth_that_the_weights_do_not_have_is_refused_although_it_is_cut(
    tmp_path, data, weights
):
    with pytest.raises(InputError, match=r"depth 2 in the file, 3 in the settings"):
        knn(data, tmp_path, weights, "--depth", 3, "--layer", 0)


def test_a_run_of_an_earlier_version_goes_on(tmp_path, data, weights):
    """Its checkpoint knows neither the settings nor the model's field, which had the defaults."""
    arguments = pictures(data, tmp_path, "--finetune", weights, "--stop_epoch", 1)
    results = main_lincls.main(arguments)
    saved = load_newest_checkpoint(tmp_path)
    del saved.model_args["last_norm"], saved.config["last_norm"], saved.config["layer"]
    save_checkpoint(tmp_path, saved, 1, 0)
    assert main_lincls.main(arguments) == results
    with pytest.raises(InputError, match="last_norm: True -> False"):
        main_lincls.main([*arguments, "--last_norm", "false"])


def test_the_page_of_a_run_has_a_curve_over_layers(tmp_path, data, weights, pretrained):
    log = tmp_path / "output" / "pretrain"
    log.mkdir(parents=True)
    for name in ("log.jsonl", "model.safetensors", "config.yaml"):
        (log / name).write_bytes((pretrained / name).read_bytes())
    results = knn(data, log.parent / "knn", weights, "--layer", 0, 1)
    ((*_, points),) = plot_run.evaluations_of(log)
    assert points == [(row["layer"], row["acc1"]) for row in results["layers"]]
    page = plot_run.main([str(log)])["reports"][0].read_text()
    assert 'id="layers"><svg' in page
    knn(data, log.parent / "knn", weights)
    assert 'id="layers"' not in plot_run.main([str(log)])["reports"][0].read_text()
