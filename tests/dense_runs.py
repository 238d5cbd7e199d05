"""Small runs of segmentation and detection on a few scenes of digits."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from data import scenes

# 256 patches, a narrow head; fp32 so that numbers do not depend on the processor's bf16
SCENES = shlex.split("""
--dataset digits_scenes --img_size 64 --in_chans 1 --mean 0.13 --std 0.3 --size debug --patch_size 8
--embed_dim 16 --depth 1 --precision fp32 --device cpu --num_workers 0
""")
TRAINING = shlex.split("""
--batch_size 4 --epochs 2 --warmup_epochs 0.5 --lr 0.03 --log_interval 1 --tensorboard false
""")


def few_scenes(monkeypatch: pytest.MonkeyPatch, train: int = 8, val: int = 7) -> None:
    """Makes the data set small."""
    monkeypatch.setattr(scenes, "NUM_SCENES", {"train": train, "val": val})


def on_scenes(task: str, output_dir: Path, *more: Any) -> list[str]:
    """The command line of a small run; later flags win."""
    return ["--task", task, *SCENES, *TRAINING, "--output_dir", str(output_dir), *map(str, more)]
