"""Small runs of segmentation and detection on a few scenes of digits."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.mask import encode

from data import scenes
from data.images import PixelFormat

# 64 patches, narrow heads; fp32 so that numbers do not depend on the processor's bf16
SCENES = shlex.split("""
--dataset digits_scenes --img_size 64 --in_chans 1 --mean 0.13 --std 0.3 --size debug --patch_size 8
--embed_dim 16 --depth 1 --head_dim 16 --precision fp32 --device cpu
--num_workers 0
""")
TRAINING = shlex.split("""
--batch_size 4 --epochs 2 --warmup_epochs 0.5 --lr 0.03 --log_interval 1 --tensorboard false
""")


def few_scenes(monkeypatch: pytest.MonkeyPatch, train: int = 8, val: int = 7) -> None:
    """Makes the data set small."""
    monkeypatch.setattr(scenes, "NUM_SCENES", {"train": train, "val": val})


def on_scenes(task: str, output_dir: Path, *more: Any) -> list[str]:
    """The command line of a small run; later flags win."""
    of_task = ["--region_samples", "16"] * (task == "detect")
    options = [*SCENES, *of_task, *TRAINING, "--output_dir", str(output_dir), *map(str, more)]
    return ["--task", task, *options]


def coco_scenes(root: Path, train: Sequence[int], val: Sequence[int]) -> Path:
    """Writes these scenes of the training split as images with COCO's files; returns `root`."""
    source = scenes.SceneObjects("train", PixelFormat(1))
    for split, numbers in (("train", train), ("val", val)):
        (root / split).mkdir(parents=True)
        objects, images = [], []
        for place, number in enumerate(numbers):
            name = f"{place:03d}.png"
            Image.fromarray(source.read(number)[0].numpy()).save(root / split / name)
            images.append({"id": place, "file_name": name, "height": 64, "width": 64})
            found = source.annotation(number, 64, 64)
            for box, label, mask in zip(*found.values(), strict=True):
                left, top, right, bottom = box.tolist()
                runs = encode(np.asfortranarray(mask.numpy()))
                objects.append(
                    {
                        "image_id": place,
                        "category_id": int(label) + 1,
                        "bbox": [left, top, right - left, bottom - top],
                        "area": int(mask.sum()),
                        "segmentation": {**runs, "counts": runs["counts"].decode()},
                    }
                )
        names = [{"id": number + 1, "name": str(number)} for number in range(10)]
        content = {"images": images, "annotations": objects, "categories": names}
        path = root / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return root
