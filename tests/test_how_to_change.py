"""The diffs of "How to change" in engine/README.md apply, and do what their text says."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from data.known_sets import read_mnist5k

PROJECT = ("main_*.py", "models", "engine", "data", "util", "tools")
TEXT = (ROOT / "engine/README.md").read_text(encoding="utf-8")
DIFFS = dict(re.findall(r"\*\*Another ([a-z]+).*?```diff\n(.*?)```", TEXT, re.DOTALL))
SMALL = (
    *("--dataset", "mnist5k", "--img_size", "28", "--in_chans", "1", "--patch_size", "7"),
    *("--mean", "0.13", "--std", "0.31", "--size", "debug", "--batch_size", "50", "--hflip", "0"),
    *("--epochs", "1", "--warmup_epochs", "0", "--num_workers", "0", "--device", "cpu"),
    *("--precision", "fp32", "--tensorboard", "false"),
)
DECODER = ("--decoder_embed_dim", "16", "--decoder_depth", "1", "--decoder_num_heads", "2")
PRETRAIN = ("main_pretrain.py", *SMALL, *DECODER, "--monitor_epochs", "0")


@pytest.fixture
def changed(tmp_path):
    """Applies a diff to a copy of the project, and returns what runs an entry script of it on 200
    digits and gives the folder of the run."""
    for pattern in PROJECT:
        for path in ROOT.glob(pattern):
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, tmp_path / path.name)

    def apply(name: str):
        change = subprocess.run(
            ["git", "apply", "-"], input=DIFFS[name], text=True, cwd=tmp_path, capture_output=True
        )
        assert change.returncode == 0, change.stderr

        def start(*arguments: str) -> Path:
            command = [sys.executable, *arguments, "--subset", "200", "--output_dir", "out"]
            result = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
            assert result.returncode == 0, result.stderr
            return tmp_path / "out"

        return start

    return apply


def final_loss(folder: Path) -> float:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["epoch_loss"]


def test_every_example_is_tested():
    assert sorted(DIFFS) == ["figure", "kind", "loss", "source"]
    assert TEXT.count("```diff") == len(DIFFS)


def test_loss(changed):
    """Of errors below 1 smooth L1 is half the square, above less; targets have a variance of 1."""
    assert 0.2 < final_loss(changed("loss")(*PRETRAIN)) < 0.5


def test_mask(changed, tmp_path):
    """Whole columns are kept, each as often as any other, and training goes on with them."""
    folder = changed("kind")(*PRETRAIN, "--mask", "columns", "--mask_ratio", "0.5")
    assert 0.5 < final_loss(folder) < 1.2
    code = (
        "import torch; from models.masks import draw_orders\n"
        "streams = [torch.Generator().manual_seed(seed) for seed in range(400)]\n"
        "kept = draw_orders('columns', (4, 4), 0.5, 2, streams)[:, :8] % 4\n"
        "counts = torch.nn.functional.one_hot(kept, 4).sum(dim=1)\n"
        "print(sorted(counts.unique().tolist()), (counts == 4).float().mean(dim=0).tolist())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, check=True
    )
    assert result.stdout.startswith("[0, 4] ")
    shares = json.loads(result.stdout.removeprefix("[0, 4] "))
    assert shares == pytest.approx([0.5] * 4, abs=0.08)  # three standard deviations


def test_figure(changed):
    folder = changed("figure")(
        "main_finetune.py",
        *SMALL,
        "--global_pool",
        "avg",
        "--best_metric",
        "lowest_recall",
        "--per_class",
    )
    found = json.loads((folder / "results.json").read_text())
    confusion = np.array(found["confusion"])
    recalls = confusion.diagonal() / confusion.sum(axis=1)
    assert found["lowest_recall"] == pytest.approx(recalls.min(), abs=1e-12)
    assert (folder / "best.safetensors").is_file()


def test_source(changed, tmp_path):
    for split in ("train", "val"):
        images, labels = read_mnist5k(split == "train")
        np.savez(tmp_path / f"{split}.npz", images=images, labels=labels)
    start = changed("source")
    known = final_loss(start(*PRETRAIN))
    shutil.rmtree(tmp_path / "out")
    assert final_loss(start(*PRETRAIN, "--dataset", "npz", "--data_path", ".")) == known
