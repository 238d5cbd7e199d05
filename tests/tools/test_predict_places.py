"""`tools/predict.py` with weights for segmentation and detection, on images without annotations."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_runs import coco_scenes, few_scenes, on_scenes
from PIL import Image
from pycocotools import mask as run_lengths
from runs import Cut, driven, files_of, run
from test_parquet import tables as tables  # a fixture

import main_finetune
from data.images import PixelFormat
from data.scenes import Scenes
from engine.evaluation import apply_dense
from models.weights.load import load_dense
from models.weights.read import read_weights
from tools import predict
from util.errors import InputError

CPU = ["--device", "cpu", "--precision", "fp32", "--num_workers", "0", "--batch_size", "2"]
SIZES = [(64, 64), (64, 64), (40, 70), (64, 64), (90, 33)]  # heights and widths


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Scenes in several sizes and folders, and a file that is no image."""
    root = tmp_path_factory.mktemp("images")
    scenes = Scenes("val", PixelFormat(1))
    for number, (height, width) in enumerate(SIZES):
        image = Image.fromarray(scenes.read(number)[0].numpy())
        path = root / "ab"[number % 2] / f"{number}.jpg.png"
        path.parent.mkdir(exist_ok=True)
        image.resize((width, height)).save(path)
    (root / "a" / "bad.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, Path]:
    """Of a model for each task, hardly trained."""
    folder = tmp_path_factory.mktemp("weights")
    root = coco_scenes(folder / "coco", range(8), range(2))
    detect = ["--dataset", "folder", "--data_path", root]
    main_finetune.main(on_scenes("detect", folder / "detect", "--epochs", 1, *detect))
    with pytest.MonkeyPatch.context() as patch:
        few_scenes(patch)
        main_finetune.main(on_scenes("segment", folder / "segment", "--epochs", 1))
    return {task: folder / task / "model.safetensors" for task in ("segment", "detect")}


def predicted(weights: Path, images: Path, output: Path, *more) -> dict[str, object]:
    words = ["--finetune", weights, "--data_path", images, "--output_file", output, *CPU, *more]
    found = predict.main([str(word) for word in words])
    assert not list(output.parent.glob("*.parts*"))
    return found


def model_of(weights: Path) -> torch.nn.Module:
    tensors, info = read_weights(str(weights))
    return load_dense(tensors, info, weights)


def test_masks_are_what_the_model_says(tmp_path, images, weights, capsys):
    """In the images' own sizes; of those in the model's size pixel by pixel."""
    found = predicted(weights["segment"], images, tmp_path / "masks")
    assert found["num_images"] == 5 and "bad.png" in capsys.readouterr().err
    (bad,) = found["unreadable"]
    assert bad[0].endswith("a/bad.png")
    names = {path.relative_to(tmp_path / "masks").as_posix() for path in files_below(tmp_path)}
    assert names == {*(f"{'ab'[n % 2]}/{n}.jpg.png" for n in range(5)), "classes.txt"}
    classes = (tmp_path / "masks" / "classes.txt").read_text().splitlines()
    assert classes == ["background", *map(str, range(10))]
    model = model_of(weights["segment"])
    for number, (height, width) in enumerate(SIZES):
        name = f"{'ab'[number % 2]}/{number}.jpg.png"
        image = Image.open(tmp_path / "masks" / name)
        assert image.mode == "L" and image.size == (width, height)
        if (height, width) == (64, 64):
            pixels = np.asarray(Image.open(images / name), dtype=np.float32)
            logits = model(torch.from_numpy((pixels / 255 - 0.13) / 0.3)[None, None])
            top = logits[0].topk(2, dim=0)
            sure = (top.values[0] - top.values[1] > 1e-5).numpy()
            assert sure.mean() > 0.99
            assert (np.asarray(image) == top.indices[0].numpy())[sure].all()
    wide = tmp_path / "slide"
    predicted(weights["segment"], images, wide, "--eval_mode", "slide", "--img_size", 32)
    assert np.asarray(Image.open(wide / "a/0.jpg.png")).shape == (64, 64)


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_objects_are_what_the_model_says(tmp_path, images, weights):
    every = tmp_path / "all.json"
    found = predicted(weights["detect"], images, every, "--threshold", 0)
    assert found["num_images"] == 5
    entries = json.loads(every.read_text())
    assert {entry["image_id"] for entry in entries} <= {
        f"{'ab'[n % 2]}/{n}.jpg.png" for n in range(5)
    }
    pixels = np.asarray(Image.open(images / "a/0.jpg.png"), dtype=np.float32)
    model = model_of(weights["detect"])
    with torch.no_grad():
        (answer,) = model(torch.from_numpy((pixels / 255 - 0.13) / 0.3)[None, None])
    own = [entry for entry in entries if entry["image_id"] == "a/0.jpg.png"]
    assert len(own) == len(answer["scores"]) > 0
    left, top, right, bottom = answer["boxes"].double().unbind(dim=1)
    boxes = torch.stack([left, top, right - left, bottom - top], dim=1)
    for entry, score, label, box in zip(
        own, answer["scores"], answer["labels"], boxes, strict=True
    ):
        assert entry["score"] == pytest.approx(score.item(), abs=1e-5)
        assert (entry["category_id"], entry["category_name"]) == (label, str(label.item()))
        assert entry["bbox"] == pytest.approx(box.tolist(), abs=1e-3)
    for entry in entries:
        height, width = SIZES[int(entry["image_id"][2])]
        x, y, w, h = entry["bbox"]
        assert x >= 0 and y >= 0 and x + w <= width + 1e-6 and y + h <= height + 1e-6
        rows, columns = np.nonzero(run_lengths.decode(entry["segmentation"]))
        assert entry["segmentation"]["size"] == [height, width]
        if len(rows):  # the mask lies within the box
            assert x - 1 < columns.min() and columns.max() < x + w + 1
            assert y - 1 < rows.min() and rows.max() < y + h + 1
    scores = sorted(entry["score"] for entry in entries)
    middle = scores[len(scores) // 2]
    predicted(weights["detect"], images, tmp_path / "some.json", "--threshold", middle)
    some = json.loads((tmp_path / "some.json").read_text())
    assert some == [entry for entry in entries if entry["score"] >= middle]


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_the_same_command_goes_on_after_a_kill(tmp_path, images, weights, task, monkeypatch):
    """And gives the same bytes; nothing that is finished is computed again."""
    more = ["--threshold", 0.01]
    name = "segment_image" if task == "segment" else "detect"
    predicted(weights[task], images, tmp_path / "whole" / "out", *more)
    original, calls = getattr(apply_dense, name), []

    def counted(*arguments):
        calls.append(None)
        if len(calls) == 3:
            raise Cut
        return original(*arguments)

    monkeypatch.setattr(apply_dense, name, counted)
    with pytest.raises(Cut):
        predicted(weights[task], images, tmp_path / "part" / "out", *more)
    assert not (tmp_path / "part" / "out").exists()
    predicted(weights[task], images, tmp_path / "part" / "out", *more)
    whole, part = (files_of(tmp_path / n) for n in ("whole", "part"))
    assert {n: content for n, (_, content) in whole.items()} == {
        n: content for n, (_, content) in part.items()
    }
    batches = 3 if task == "detect" else 5  # of two images, or one by one
    # two batches were finished, or one and a half
    assert len(calls) == 3 + (batches - 2)
    with pytest.raises(InputError, match="is there already"):
        predicted(weights[task], images, tmp_path / "part" / "out", *more)


def test_masks_of_other_images_are_not_taken_over(tmp_path, images, weights, monkeypatch):
    """What a killed command left is not in the result of another one."""
    output, original = tmp_path / "out" / "masks", apply_dense.write_text
    output.parent.mkdir()

    def cut(path: Path, text: str) -> None:
        raise Cut

    monkeypatch.setattr(apply_dense, "write_text", cut)
    with pytest.raises(Cut):
        predicted(weights["segment"], images, output)
    monkeypatch.setattr(apply_dense, "write_text", original)
    predicted(weights["segment"], images / "b", output)
    names = {path.relative_to(output).as_posix() for path in files_below(output)}
    assert names == {"1.jpg.png", "3.jpg.png", "classes.txt"}


def test_two_images_of_one_name_are_refused(tmp_path, images, weights):
    shutil.copytree(images, tmp_path / "images")
    shutil.copy(images / "a/0.jpg.png", tmp_path / "images/a/0.jpg.bmp")
    with pytest.raises(InputError, match="2 images would be written to a/0.jpg.png"):
        predicted(weights["segment"], tmp_path / "images", tmp_path / "out")


def test_images_of_parquet_files_have_a_png_each(tmp_path, weights, tables):
    more = ["--dataset", "parquet", "--split", "val"]
    found = predicted(weights["segment"], tables, tmp_path / "out", *more)
    assert len([*(tmp_path / "out").rglob("*.png")]) == found["num_images"] == 60


@pytest.mark.long
@pytest.mark.parametrize("task", ["segment", "detect"])
def test_two_processes_write_the_same_bytes(tmp_path, images, weights, task):
    predicted(weights[task], images, tmp_path / "one" / "out")
    words = ["--finetune", weights[task], "--data_path", images, *CPU]
    words += ["--output_file", tmp_path / "two" / "out"]
    (tmp_path / "two").mkdir()
    tool = "../tools/predict.py"
    done = run(driven(*map(str, words), processes=2, driver=tool))
    assert done.returncode == 0, done.stderr
    one, two = (files_of(tmp_path / n) for n in ("one", "two"))
    assert {n: c for n, (_, c) in one.items()} == {n: c for n, (_, c) in two.items()}
