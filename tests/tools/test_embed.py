"""`tools/embed.py` and `tools/predict.py`: features and predictions of any images."""

import csv
import os
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT
from packs import PACKED
from runs import CLASSES, Cut, normalised, pictures, run
from safetensors import safe_open
from safetensors.torch import load_file
from test_parquet import tables as tables  # a fixture

import hubconf
import main_finetune
import main_knn
from engine.evaluation import apply
from models.weights.own import own_bytes, read_header
from tools import embed, predict
from util.errors import InputError

CPU = ("--device", "cpu", "--precision", "fp32", "--num_workers", "0")


def embedded(weights: Path, data: Path, output: Path, *more) -> dict[str, torch.Tensor]:
    """The arrays of a run, with `names` as a list."""
    words = ["--finetune", weights, "--data_path", data, "--output_file", output, *CPU, *more]
    embed.main([str(word) for word in words])
    assert not list(output.parent.glob("*.parts*"))
    return arrays_of(output)


def arrays_of(path: Path) -> dict:
    if path.suffix == ".safetensors":
        found = load_file(path)
        return {**found, "names": bytes(found["names"].tolist()).decode().splitlines()}
    if path.suffix == ".npz":
        with np.load(path) as file:
            found = {name: file[name] for name in file.files if name != "origin"}
        return {n: v.tolist() if n == "names" else torch.from_numpy(v) for n, v in found.items()}
    columns = pyarrow.parquet.read_table(path).to_pydict()
    return {n: v if n == "names" else torch.tensor(v) for n, v in columns.items()}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys() and found["names"] == expected["names"]
    for name in found.keys() - {"names"}:
        assert found[name].dtype == torch.float32 and torch.equal(found[name], expected[name]), name


@pytest.fixture(scope="module")
def by_knn(tmp_path_factory, data, weights) -> dict[str, torch.Tensor]:
    """Features of both splits by another program."""
    folder = tmp_path_factory.mktemp("knn")
    more = ["--finetune", weights, "--save_path", folder / "saved", "--batch_size", 32]
    main_knn.main(pictures(data, folder / "run", *more, training=False))
    return load_file(folder / "saved/features.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data, weights) -> Path:
    """A classifier."""
    folder = tmp_path_factory.mktemp("finetuned")
    more = ["--finetune", weights, "--epochs", 1, "--warmup_epochs", 0]
    main_finetune.main(pictures(data, folder, *more))
    return folder / "model.safetensors"


# --- features


@pytest.mark.parametrize("ending", ["safetensors", "npz", "parquet"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_features_are_those_of_knn_bit_for_bit(
    tmp_path, data, weights, by_knn, monkeypatch, ending, split
):
    monkeypatch.setattr(apply, "PART_BATCHES", 2)  # 2 and 1 parts of 64 images
    output = tmp_path / f"features.{ending}"
    found = embedded(weights, data, output, "--batch_size", 32, "--split", split)
    names = sorted(str(path) for path in (data / split).rglob("*.png"))
    assert_same(found, {"avg": by_knn[split], "names": names})


def test_every_kind_of_source_gives_the_same_features(
    tmp_path, data, packs, tables, weights, by_knn
):
    names = [f"{path.relative_to(data)}" for path in sorted((data / "val").rglob("*.png"))]
    (tmp_path / "in").symlink_to(data)
    (tmp_path / "list.txt").write_text("".join(f"in/{name}\r\n" for name in names))
    sources = {
        "list": ["--data_path", tmp_path / "list.txt"],
        "parquet": ["--dataset", "parquet", "--split", "val", "--data_path", tables],
        "file": ["--data_path", next((tables / "data").glob("val*"))],
        "pack": [*PACKED, "--data_path", packs, "--split", "val"],
        "known set": ["--dataset", "mnist5k", "--split", "val"],
        "image": ["--data_path", data / "val" / names[0].removeprefix("val/")],
    }
    found = {
        kind: embedded(weights, "unused", tmp_path / f"{kind}.npz", "--batch_size", 32, *more)
        for kind, more in sources.items()
    }
    for kind in ("list", "parquet", "file"):
        assert torch.equal(found[kind]["avg"], by_knn["val"]), kind
    assert found["list"]["names"] == [f"{tmp_path}/in/{name}" for name in names]
    (of_image,) = found["image"]["avg"]
    torch.testing.assert_close(of_image, by_knn["val"][0])
    order = [
        names.index(f"val/{n.rsplit('-', 1)[1].replace('_', '/')}") for n in found["pack"]["names"]
    ]
    torch.testing.assert_close(found["pack"]["avg"], by_knn["val"][order])
    assert len(found["known set"]["avg"]) == 1000
    assert found["known set"]["names"][999] == "mnist5k val[999]"


def test_layers_pools_and_patches_equal_those_by_hooks(tmp_path, data, weights):
    """Against the encoder of hubconf, whose blocks are listened to."""
    more = ["--split", "val", "--layer", "0", "-1", "--batch_size", 64]
    both = embedded(weights, data, tmp_path / "a.npz", *more, "--pool", "both")
    unit = embedded(weights, data, tmp_path / "b.npz", *more, "--normalize")
    patch = embedded(weights, data, tmp_path / "c.safetensors", *more, "--output", "patch")
    assert embedded(weights, data, tmp_path / "c.parquet", *more, "--output", "patch").keys()
    model = hubconf.encoder(str(weights))
    tokens: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: tokens.append(out))
    with torch.no_grad():
        model(normalised(data / "val"))
        for number, of_layer in enumerate(map(model.norm, tokens)):
            name = f"layer{number}"
            for found, expected in (
                (patch[f"patch_{name}"], of_layer[:, 1:]),
                (both[f"token_{name}"], of_layer[:, 0]),
                (both[f"avg_{name}"], of_layer[:, 1:].mean(dim=1)),
            ):
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            lengths = both[f"avg_{name}"].norm(dim=1, keepdim=True)
            torch.testing.assert_close(unit[f"avg_{name}"], both[f"avg_{name}"] / lengths)
    assert len(tokens) == 2 and patch.keys() == {"patch_layer0", "patch_layer1", "names"}


def test_the_same_command_goes_on_and_nothing_is_computed_twice(
    tmp_path, data, weights, by_knn, monkeypatch
):
    """Ended in the second of two parts; a part of other settings is not taken."""
    monkeypatch.setattr(apply, "PART_BATCHES", 2)
    output, more = tmp_path / "features.npz", ["--batch_size", 32, "--split", "train"]
    original, seen = apply.ReadableDataset.__getitem__, []

    def counted(self, index):
        seen.append(index)
        if len(seen) == 100:
            raise Cut
        return original(self, index)

    monkeypatch.setattr(apply.ReadableDataset, "__getitem__", counted)
    with pytest.raises(Cut):
        embedded(weights, data, output, *more)
    (part,) = (tmp_path / "features.npz.parts").iterdir()
    assert torch.equal(load_file(part)["avg"], by_knn["train"][:64])
    shutil.copytree(part.parent, tmp_path / "more/other.npz.parts")
    found = embedded(weights, data, output, *more)
    assert seen[100:] == list(range(64, 120)) and torch.equal(found["avg"], by_knn["train"])
    seen[:] = [-1] * 101
    other = embedded(weights, data, tmp_path / "more/other.npz", *more, "--pool", "token")
    assert seen[101:] == list(range(120)) and other.keys() == {"token", "names"}


@pytest.mark.long
def test_several_processes_write_the_same_file(tmp_path, data, weights):
    """Also if some of the parts are there already."""
    words = ["--finetune", weights, "--data_path", data, *CPU, "--batch_size", 16]
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import sys\nfrom engine.evaluation import apply\nfrom tools import embed\n"
        "apply.PART_BATCHES = 1\nembed.main(sys.argv[1:])\n"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    for number, start in ((1, []), (3, [*launcher, "3"])):
        output = ["--output_file", tmp_path / f"{number}.npz"]
        found = run([sys.executable, *start, str(driver), *map(str, [*words, *output])])
        assert found.returncode == 0, found.stderr
    assert_same(arrays_of(tmp_path / "1.npz"), arrays_of(tmp_path / "3.npz"))


@pytest.mark.long
def test_features_of_cifar10_are_those_of_knn_bit_for_bit(tmp_path, cifar10_jpeg):
    """60,000 JPEGs, an untrained encoder, loader processes."""
    model = hubconf.VisionTransformer(
        img_size=32,
        patch_size=8,
        in_chans=3,
        num_classes=0,
        embed_dim=64,
        depth=2,
        num_heads=2,
        mlp_ratio=4.0,
        class_tokens=0,
        global_pool="avg",
        fc_norm=False,
    )
    header = {"model_args": model.spec.as_dict(), "mean": [0.49, 0.48, 0.45], "std": [0.25] * 3}
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(own_bytes(model.state_dict(), header))
    geometry = shlex.split("--img_size 32 --patch_size 8 --embed_dim 64 --depth 2 --num_heads 2")
    pixels = ["--mean", "0.49", "0.48", "0.45", "--std", "0.25", "0.25", "0.25"]
    shared = ["--finetune", str(weights), "--data_path", str(cifar10_jpeg), "--device", "cpu"]
    saved = ["--save_path", str(tmp_path / "saved"), "--output_dir", str(tmp_path / "run")]
    main_knn.main([*shared, *geometry, *pixels, *saved, "--ks", "10"])
    expected = load_file(tmp_path / "saved/features.safetensors")
    for split, count in (("train", 50_000), ("val", 10_000)):
        output = tmp_path / f"{split}.safetensors"
        embed.main([*shared, "--split", split, "--output_file", str(output)])
        assert torch.equal(load_file(output)["avg"], expected[split])
        assert len(arrays_of(output)["names"]) == count


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--layer", "2"], "layer 2"),
        (["--output_file", "a.txt"], "output_file"),
        (["--mean", "0.5", "0.5"], "mean has 2"),
        (["--split", "test"], "split"),
        (["--data_path", "gone"], "gone"),
        (["--finetune", "gone"], "gone"),
    ],
)
def test_what_cannot_be_is_refused_before_any_compute(tmp_path, data, weights, more, named):
    with pytest.raises(InputError, match=named):
        embedded(weights, data, tmp_path / "a.npz", *more)
    assert not list(tmp_path.iterdir())


def test_a_token_that_is_not_there_and_a_file_that_is(tmp_path, data, tokenless):
    with pytest.raises(InputError, match="class token"):
        embedded(tokenless, data, tmp_path / "a.npz", "--pool", "both")
    (tmp_path / "b.npz").write_text("mine")
    with pytest.raises(InputError, match=r"b\.npz is there already"):
        embedded(tokenless, data, tmp_path / "b.npz")
    assert (tmp_path / "b.npz").read_text() == "mine"


# --- predictions


def predicted(weights: Path, data: Path, output: Path, *more) -> tuple[list[list[str]], dict]:
    """The rows of the file, and what the tool returns."""
    words = ["--finetune", weights, "--data_path", data, "--output_file", output, *CPU, *more]
    found = predict.main([str(word) for word in words])
    with output.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file)), found


def headed(weights: Path, path: Path, **more: object) -> Path:
    """The weights with more in their header."""
    with safe_open(weights, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    path.write_bytes(own_bytes(tensors, {**read_header(weights), **more}))
    return path


def logits_of(weights: Path, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return hubconf.classifier(str(weights))(normalised(folder)).double()


def test_classes_are_named_and_probabilities_are_those_of_the_model(tmp_path, data, trained):
    weights = headed(trained, tmp_path / "w", class_names=[*CLASSES], objective="multiclass")
    rows, _ = predicted(weights, data / "val", tmp_path / "a.csv")
    shares = logits_of(trained, data / "val").softmax(dim=1)
    assert rows[0] == ["name", "prediction", *(f"p({name})" for name in CLASSES)]
    assert [row[0] for row in rows[1:]] == sorted(map(str, (data / "val").rglob("*.png")))
    assert [row[1] for row in rows[1:]] == [CLASSES[k] for k in shares.argmax(dim=1)]
    found = torch.tensor([[float(text) for text in row[2:]] for row in rows[1:]]).double()
    torch.testing.assert_close(found, shares, rtol=0, atol=1e-5)
    rows, _ = predicted(weights, data / "val", tmp_path / "b.csv", "--topk", 2)
    order = shares.topk(2, dim=1)
    assert rows[0] == ["name", "prediction", "top1", "p(top1)", "top2", "p(top2)"]
    for row, labels, values in zip(rows[1:], order.indices, order.values, strict=True):
        assert [row[2], row[4]] == [CLASSES[k] for k in labels] and row[1] == row[2]
        assert [float(row[3]), float(row[5])] == pytest.approx(values.tolist(), abs=1e-5)
    plain, _ = predicted(
        headed(trained, tmp_path / "x", class_names=None), data, tmp_path / "c.csv"
    )
    assert plain[0] == ["name", "prediction", "p(0)", "p(1)", "p(2)"] and len(plain) == 181


def test_several_classes_and_numbers(tmp_path, data, trained):
    logits, names = logits_of(trained, data / "val"), ["a, b", 'c "d"', "caf\udce9\n"]
    weights = headed(trained, tmp_path / "w", class_names=names, objective="multilabel")
    threshold = float(logits.sigmoid().median())
    rows, _ = predicted(weights, data / "val", tmp_path / "a.csv", "--threshold", threshold)
    names[2] = "caf\\xe9\\n"
    assert rows[0][2:] == [f"p({name})" for name in names]
    for row, shares in zip(rows[1:], logits.sigmoid().tolist(), strict=True):
        assert [float(text) for text in row[2:]] == pytest.approx(shares, abs=1e-5)
        assert (
            row[1]
            == "; ".join(n for n, s in zip(names, row[2:], strict=True) if float(s) >= threshold)
            or min(abs(share - threshold) for share in shares) < 1e-5
        )
    weights = headed(trained, tmp_path / "r", class_names=["x", "y", "z"], objective="regression")
    rows, _ = predicted(weights, data / "val", tmp_path / "b.csv")
    assert rows[0] == ["name", "x", "y", "z"]
    found = torch.tensor([[float(text) for text in row[1:]] for row in rows[1:]]).double()
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)


def test_numbers_far_from_0_are_not_rounded_in_half_precision(tmp_path, data, trained):
    tensors = load_file(trained)
    tensors["head.bias"] += 2027
    header = {**read_header(trained), "class_names": [*"xyz"], "objective": "regression"}
    (tmp_path / "w").write_bytes(own_bytes(tensors, header))
    expected = logits_of(tmp_path / "w", data / "val")
    rows, _ = predicted(tmp_path / "w", data / "val", tmp_path / "a.csv", "--precision", "bf16")
    found = torch.tensor([[float(text) for text in row[1:]] for row in rows[1:]]).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


def test_weights_without_a_meaning_are_refused(tmp_path, data, trained, weights):
    checkpoint = next(trained.parent.glob("checkpoint-*.pth"))
    short = headed(trained, tmp_path / "short", class_names=["a", "b"])
    for wrong, named in (
        (weights, "no head"),
        (checkpoint, "model.safetensors"),
        (short, "3 outputs"),
    ):
        with pytest.raises(InputError, match=named):
            predicted(wrong, data, tmp_path / "a.csv")


def test_unreadable_images_are_left_out_and_listed(tmp_path, data, trained, capfd):
    """One line each, also for names that are no UTF-8; the other rows stay the same."""
    root = shutil.copytree(data / "val/one", tmp_path / "in")
    whole, _ = predicted(trained, root, tmp_path / "whole.csv")
    names = [b"\xe9.png", b"a\n,b.png", b"041.png"]
    for name in names:
        (root / os.fsdecode(name)).write_bytes(b"no")
    for strict, code in ((), 0), (["--strict"], 1):
        output = tmp_path / f"{code}.csv"
        rows, found = predicted(trained, root, output, *strict)
        assert found["exit_code"] == code and found["num_images"] == 19
        assert [row for row in whole if "041" not in row[0]] == rows
    lines = capfd.readouterr().err.splitlines()
    assert sum("/041.png " in line for line in lines) == 2
    assert any("/\\xe9.png " in line for line in lines)
    assert any("/a\\n,b.png " in line for line in lines)
    shutil.copy(data / "val/one/040.png", root / "é\t\udcff.png")
    rows, _ = predicted(trained, root, tmp_path / "odd.csv")
    assert f"{root}/é\\t\\xff.png" in [row[0] for row in rows]
    script = [
        str(ROOT / "tools/predict.py"),
        "--strict",
        *CPU,
        "--output_file",
        f"{tmp_path}/s.csv",
    ]
    ended = run([sys.executable, *script, "--finetune", str(trained), "--data_path", str(root)])
    assert ended.returncode == 1 and (tmp_path / "s.csv").exists(), ended.stderr


def test_nothing_readable_writes_nothing(tmp_path, trained):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/1.png").write_bytes(b"no")
    with pytest.raises(InputError, match="none of the 1 images"):
        predicted(trained, tmp_path / "in", tmp_path / "a.csv")
    assert not (tmp_path / "a.csv").exists()
