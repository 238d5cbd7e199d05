"""Training on real images: the reference loss curve on CIFAR-10, and photographs at 224 pixels."""

import numpy as np
import pytest
from conftest import ROOT
from runs import command, log_lines, run

from engine.run.records import read_results

pytestmark = pytest.mark.long


def train(output, *arguments):
    """A run in a process of its own."""
    result = run(command(*map(str, arguments), "--output_dir", str(output)))
    assert result.returncode == 0, result.stderr
    return log_lines(output)


def test_photographs_are_learned(photographs, tmp_path):
    """ViT-S/16 at 224 pixels, two epochs of 250 photographs: the last five losses lie 10 % under
    the first five."""
    lines = train(
        tmp_path,
        "--config",
        ROOT / "cfgs/pretrain/Vit-S_100E_GAP.yaml",
        "--data_path",
        photographs,
        "--seed",
        0,
        "--batch_size",
        16,
        "--total_batch_size",
        16,
        "--epochs",
        2,
        "--warmup_epochs",
        0.2,
        "--lr",
        2.4e-3,
        "--log_interval",
        1,
        "--tensorboard",
        "false",
    )
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 * (250 // 16)
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5]), losses


# Mean training loss of epochs 1 to 3 of ViT-Ti_CIFAR10.yaml on the JPEG version, seed 0, bf16, 2
# CPU cores.
OURS = (0.879, 0.614, 0.530)
REFERENCE = (0.947, 0.639, 0.559)  # public MAE model, another run of another program


def test_cifar10_follows_the_loss_curve(cifar10_jpeg, tmp_path):
    """Three of 16 epochs: within 3 % of our own figures, and nowhere more than 3 % above the
    reference's."""
    lines = train(
        tmp_path,
        "--config",
        ROOT / "cfgs/pretrain/ViT-Ti_CIFAR10.yaml",
        "--dataset",
        "folder",
        "--data_path",
        cifar10_jpeg,
        "--stop_epoch",
        3,
        "--tensorboard",
        "false",
    )
    losses = [line["epoch_loss"] for line in lines if "epoch_loss" in line]
    assert losses == pytest.approx(OURS, rel=0.03)
    assert all(ours < 1.03 * reference for ours, reference in zip(losses, REFERENCE, strict=True))


@pytest.fixture(scope="module")
def few(cifar10_jpeg, tmp_path_factory):
    """2,000 training and 500 validation images of CIFAR-10."""
    few = tmp_path_factory.mktemp("few")
    for split, per_class in (("train", 200), ("val", 50)):
        for folder in sorted((cifar10_jpeg / split).iterdir()):
            (few / split / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[:per_class]:
                (few / split / folder.name / image.name).symlink_to(image)
    return few


def test_options_of_cifar10_on_2000_images(few, tmp_path):
    """The table of options in its short form, of random weights alone: its row has the figures that
    the runs of two seeds left, and the same command has nothing left to do."""
    script = ["sh", str(ROOT / "tools/cifar10_options.sh"), str(few), str(tmp_path)]
    options = {"OPTIONS": "random", "SEEDS": "0 1", "PROBE": "1", "SUBSET": "1000"}
    result = run(script, **options)
    assert result.returncode == 0, result.stderr
    name, *cells = result.stdout.splitlines()[-1].strip("| ").split(" | ")
    assert name == "random"
    for readout, cell in zip(("knn", "linear", "attentive"), cells, strict=True):
        files = [tmp_path / f"random/seed{seed}/{readout}/results.json" for seed in (0, 1)]
        zero, one = (read_results(file)["acc1"] for file in files)
        assert cell == f"{(zero + one) / 2:.2f} ({zero:.2f}, {one:.2f})"
    before = [file.stat().st_mtime_ns for file in sorted(tmp_path.rglob("results.json"))]
    assert run(script, **options).stdout.splitlines()[-1] == result.stdout.splitlines()[-1]
    assert before == [file.stat().st_mtime_ns for file in sorted(tmp_path.rglob("results.json"))]


def test_the_cifar10_benchmark_on_2000_images(few, tmp_path):
    """The README's benchmark in its short form: every stage on real images, ending in the table of
    its results."""
    benchmark = ["sh", str(ROOT / "tools/cifar10.sh"), str(few), str(tmp_path / "out")]
    result = run(benchmark, PRETRAIN_EPOCHS="8", EVAL_EPOCHS="3", SUBSET="1000")
    assert result.returncode == 0, result.stderr
    names = [
        f"{stage}{ending}"
        for stage in ("knn", "lincls", "finetune")
        for ending in ("", "_untrained")
    ]
    found = {name: read_results(tmp_path / "out" / name / "results.json") for name in names}
    assert [found[name]["num_train"] for name in names] == [2000, 2000, 1800, 1800, 1000, 1000]
    assert {found[name]["num_samples"] for name in names} == {500}
    rows = [line.split()[-5:-3] for line in result.stdout.splitlines()[-3:]]
    assert rows == [
        [f"{found[name]['acc1']:.2f}", f"{found[f'{name}_untrained']['acc1']:.2f}"]
        for name in ("knn", "lincls", "finetune")
    ]
    assert all(result["acc1"] > 14 for result in found.values())  # chance is 10
    assert all((found[name]["sha256"] is None) == name.endswith("_untrained") for name in names)
