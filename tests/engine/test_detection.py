"""Detection: average precision against two independent computations, pasted masks against a loop,
and runs of the task."""

import contextlib
import copy
import io
import math
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import assert_same_run
from dense_runs import coco_scenes, on_scenes
from PIL import Image
from pycocotools import mask as run_lengths
from runs import launch, log_lines, results_of
from safetensors.torch import load_file

import main_finetune
from engine.evaluation import detection
from engine.evaluation.detection import (
    MAX_DETECTIONS,
    average_precision,
    coco_entries,
    paste,
    within,
)
from engine.run.folder import PROGRESS_FILES
from engine.run.records import read_log
from models.weights.own import read_header
from util.errors import DataError, InputError

SIDE = 120  # pixels of the images of hand-made cases
AREAS = {"": (0, 1e10), "_small": (0, 32**2), "_medium": (32**2, 96**2), "_large": (96**2, 1e10)}


# --- average precision


def rle(box: list[float]) -> dict[str, object]:
    """The pixels of a box, as run lengths."""
    left, top, width, height = map(round, box)
    pixels = np.zeros((SIDE, SIDE), dtype=np.uint8, order="F")
    pixels[top : top + height, left : left + width] = 1
    return run_lengths.encode(pixels)


def truth_of(objects: list[tuple], num_images: int, num_classes: int) -> dict[str, list[dict]]:
    """COCO's dict of (image, class, box, is a crowd)."""
    return {
        "images": [{"id": n, "height": SIDE, "width": SIDE} for n in range(num_images)],
        "categories": [{"id": n, "name": str(n)} for n in range(num_classes)],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": label,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": crowd,
                "segmentation": rle(box),
            }
            for number, (image, label, box, crowd) in enumerate(objects, start=1)
        ],
    }


def detected(rows: list[tuple]) -> list[dict]:
    """COCO's results of (image, class, box, score)."""
    names = ("image_id", "category_id", "bbox", "score")
    return [dict(zip(names, row, strict=True)) | {"segmentation": rle(row[2])} for row in rows]


def random_case(seed: int, num_images: int = 12, num_classes: int = 4) -> tuple[dict, list[dict]]:
    """Objects, every seventh one a crowd, and detections near many of them; scores have ties, and
    the last class has no object."""
    random = np.random.default_rng(seed)
    objects, rows = [], []
    for image in range(num_images):
        for _ in range(random.integers(0, 7)):
            label = int(random.integers(num_classes - 1))
            sides = random.integers(4, 110, size=2)
            corner = random.integers(0, SIDE - sides + 1)
            box = [*map(float, corner), *map(float, sides)]
            objects.append((image, label, box, int(random.random() < 1 / 7)))
            for _ in range(random.integers(0, 4)):
                moved = np.array(box) + random.integers(-3, 4, size=4)
                corner = moved[:2].clip(0, SIDE - 4)
                sides = moved[2:].clip(2, SIDE - corner)
                seen = label if random.random() < 0.8 else int(random.integers(num_classes))
                score = round(float(random.random()), 1)
                rows.append((image, seen, [*map(float, corner), *map(float, sides)], score))
    return truth_of(objects, num_images, num_classes), detected(rows)


def overlap(one: list[float], other: list[float], crowd: int) -> float:
    """Intersection over union of two boxes; of a crowd over the first one's area."""
    sides = [
        max(0.0, min(one[n] + one[n + 2], other[n] + other[n + 2]) - max(one[n], other[n]))
        for n in (0, 1)
    ]
    common, area = sides[0] * sides[1], one[2] * one[3]
    return common / (area if crowd else area + other[2] * other[3] - common)


def plain_precision(truth: dict, found: list[dict], label: int, iou: float, area: tuple) -> float:
    """Average precision of a class at an IoU, by loops; NaN without an object."""
    marks, num_objects = [], 0  # (score, whether it is right)
    for image in [entry["id"] for entry in truth["images"]]:
        objects = [
            o for o in truth["annotations"] if o["image_id"] == image and o["category_id"] == label
        ]
        counts = [not o["iscrowd"] and area[0] <= o["area"] <= area[1] for o in objects]
        num_objects += sum(counts)
        taken = [False] * len(objects)
        own = [d for d in found if d["image_id"] == image and d["category_id"] == label]
        for d in sorted(own, key=lambda d: -d["score"])[:MAX_DETECTIONS]:
            best = {}  # whether the object counts -> overlap and place
            for place, o in enumerate(objects):
                if taken[place] and not o["iscrowd"]:
                    continue
                value = overlap(d["bbox"], o["bbox"], o["iscrowd"])
                # of equal ones the last
                if value >= max(iou, best.get(counts[place], (0, 0))[0]):
                    best[counts[place]] = (value, place)
            if True in best:
                taken[best[True][1]] = True
                marks.append((d["score"], True))
            elif False in best:
                taken[best[False][1]] = True
            elif area[0] <= d["bbox"][2] * d["bbox"][3] <= area[1]:
                marks.append((d["score"], False))
    if not num_objects:
        return math.nan
    marks.sort(key=lambda mark: -mark[0])
    right, precisions, recalls = 0, [], []
    for place, (_, is_right) in enumerate(marks, start=1):
        right += is_right
        precisions.append(right / place)
        recalls.append(right / num_objects)
    values = [
        max((p for p, r in zip(precisions, recalls, strict=True) if r >= recall), default=0.0)
        for recall in np.linspace(0, 1, 101)
    ]
    return 100 * sum(values) / 101


def mean(values: list[float]) -> float:
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan


def plain_figures(truth: dict, found: list[dict]) -> tuple[dict[str, float], list[float]]:
    """Figures of boxes, and of each class."""
    labels = [entry["id"] for entry in truth["categories"]]
    ious = np.linspace(0.5, 0.95, 10)
    figures, of_class = {}, []
    for name, area in AREAS.items():
        rows = [[plain_precision(truth, found, n, iou, area) for iou in ious] for n in labels]
        figures[f"ap{name}"] = mean([value for row in rows for value in row])
        if not name:
            of_class = [mean(row) for row in rows]
            figures["ap50"] = mean([row[0] for row in rows])
            figures["ap75"] = mean([row[5] for row in rows])
    return figures, of_class


def peer_figures(truth: dict, found: list[dict], kind: str) -> dict[str, float]:
    """The same by faster-coco-eval."""
    from faster_coco_eval import COCO, COCOeval_faster

    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    own = [{k: v for k, v in d.items() if kind == "box" or k != "bbox"} for d in found]
    with contextlib.redirect_stdout(io.StringIO()):
        side = COCO(copy.deepcopy(truth))
        evaluation = COCOeval_faster(
            side, side.loadRes(own), {"box": "bbox", "mask": "segm"}[kind], print_function=print
        )
        evaluation.run()
    stats = [100 * float(value) if value >= 0 else math.nan for value in evaluation.stats[:6]]
    return dict(zip(names, stats, strict=True))


HAND = [  # objects, detections and box_ap, box_ap50
    ([(0, 0, [0, 0, 10, 10], 0)], [(0, 0, [0, 0, 10, 10], 0.9)], 100.0, 100.0),
    ([(0, 0, [0, 0, 10, 10], 0)], [], 0.0, 0.0),
    ([(0, 0, [0, 0, 10, 10], 0)], [(0, 0, [0, 0, 10, 6], 0.9)], 30.0, 100.0),  # IoU 0.6
    # one of two objects: precision 1 up to a recall of 0.5, which are 51 of 101 places
    (
        [(0, 0, [0, 0, 10, 10], 0), (0, 0, [50, 50, 10, 10], 0)],
        [(0, 0, [0, 0, 10, 10], 0.9)],
        100 * 51 / 101,
        100 * 51 / 101,
    ),
    # a wrong one comes first: precision 1/2
    (
        [(0, 0, [0, 0, 10, 10], 0)],
        [(0, 0, [80, 80, 9, 9], 0.9), (0, 0, [0, 0, 10, 10], 0.8)],
        50.0,
        50.0,
    ),
    # what lies within a crowd does not count against
    (
        [(0, 0, [0, 0, 10, 10], 0), (0, 0, [40, 40, 60, 60], 1)],
        [(0, 0, [50, 50, 20, 20], 0.95), (0, 0, [0, 0, 10, 10], 0.9)],
        100.0,
        100.0,
    ),
    # the second class has an object that nobody sees, the third has none
    (
        [(0, 0, [0, 0, 10, 10], 0), (0, 1, [50, 50, 10, 10], 0)],
        [(0, 0, [0, 0, 10, 10], 0.9), (0, 2, [0, 0, 10, 10], 0.9)],
        50.0,
        50.0,
    ),
]


@pytest.mark.parametrize(("objects", "rows", "ap", "ap50"), HAND)
def test_average_precision_of_cases_made_by_hand(objects, rows, ap, ap50):
    truth, found = truth_of(objects, 1, 3), detected(rows)
    figures = average_precision(truth, found, ("box", "mask"))
    for kind in ("box", "mask"):
        assert figures.scalars[f"{kind}_ap"] == pytest.approx(ap, abs=1e-9)
        assert figures.scalars[f"{kind}_ap50"] == pytest.approx(ap50, abs=1e-9)
        assert math.isnan(figures.per_class[f"{kind}_ap"][2])
    plain, _ = plain_figures(truth, found)
    assert plain["ap"] == pytest.approx(ap, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_equals_loops_and_another_library(seed):
    """Crowds, ties, several detections of an object, a class without one."""
    truth, found = random_case(seed)
    before = repr(truth)
    figures = average_precision(truth, found, ("box", "mask"))
    plain, of_class = plain_figures(truth, found)
    for name, value in plain.items():
        assert figures.scalars[f"box_{name}"] == pytest.approx(value, abs=1e-9), name
    assert figures.per_class["box_ap"] == pytest.approx(of_class, abs=1e-9, nan_ok=True)
    assert math.isnan(of_class[-1]) and 5 < figures.scalars["box_ap"] < 95
    for kind in ("box", "mask"):
        for name, value in peer_figures(truth, found, kind).items():
            assert figures.scalars[f"{kind}_{name}"] == pytest.approx(value, abs=1e-9), name
    assert repr(truth) == before


def test_nothing_to_find_has_no_figure():
    truth = truth_of([], 2, 2)
    for rows in ([], [(0, 0, [0, 0, 10, 10], 0.9)]):
        figures = average_precision(truth, detected(rows), ("box", "mask"))
        assert all(math.isnan(value) for value in figures.scalars.values())


# --- boxes and masks in the image's own size


def pasted_by_loops(mask: np.ndarray, box: list[float], size: tuple[int, int]) -> np.ndarray:
    """Bilinear in the mask's pixels, which lie at (n + 1/2) / 28 of the box, 0 beyond them."""
    height, width = mask.shape
    padded = np.pad(mask.astype(np.float64), 1)
    values = np.zeros(size)
    left, top, right, bottom = box
    for row in range(size[0]):
        for column in range(size[1]):
            y = (row + 0.5 - top) / (bottom - top) * height + 0.5
            x = (column + 0.5 - left) / (right - left) * width + 0.5
            if not (0 <= y < height + 1 and 0 <= x < width + 1):
                continue
            if not (top <= row + 0.5 < bottom and left <= column + 0.5 < right):
                continue
            i, j = int(y), int(x)
            a, b = y - i, x - j
            values[row, column] = (1 - a) * ((1 - b) * padded[i, j] + b * padded[i, j + 1]) + a * (
                (1 - b) * padded[i + 1, j] + b * padded[i + 1, j + 1]
            )
    return values


@pytest.mark.parametrize(
    "box",
    [
        (3.0, 5.0, 31.0, 33.0),
        (-7.3, 2.2, 20.1, 59.0),
        (30.7, 30.2, 44.0, 33.9),
        (1.2, 1.4, 1.9, 1.95),
        (35.0, -4.0, 60.0, 4.0),
    ],
)
def test_pasting_equals_a_plain_loop(box):
    torch.manual_seed(0)
    mask = torch.rand(28, 28)
    found = paste(mask, torch.tensor(box, dtype=torch.float64), (50, 40))
    expected = pasted_by_loops(mask.numpy(), list(box), (50, 40))
    near = np.abs(expected - 0.5) < 1e-5  # where float32 decides
    assert found.dtype == np.uint8 and near.mean() < 0.01
    assert (found[~near] == (expected >= 0.5)[~near]).all()
    if box[0] == 3:  # a mask's pixel is a pixel: nothing is moved
        assert (found[5:33, 3:31] == (mask >= 0.5).numpy()).all() and found.sum() > 300


def test_detections_are_scaled_back_and_those_in_the_padding_dropped():
    """An image of 100 x 51 pixels that was shown at 64 x 33 in a square of 64."""
    boxes = torch.tensor([[0.0, 0, 16, 32], [8, 8, 40, 80], [33, 0, 60, 60], [1, 1, 2, 2]])
    scores = torch.tensor([0.5, 0.9, 0.8, 0.5])
    found = within(
        {"boxes": boxes, "scores": scores, "labels": torch.arange(4)}, (64, 33), (100, 51)
    )
    assert found["labels"].tolist() == [1, 0, 3]
    x, y = 51 / 33, 100 / 64
    expected = [[8 * x, 12.5, 40 * x, 125], [0, 0, 16 * x, 50], [x, y, 2 * x, 2 * y]]
    assert found["boxes"].tolist() == expected
    entries = coco_entries(7, found, (100, 51))
    assert entries[0]["bbox"] == [8 * x, 12.5, 51 - 8 * x, 87.5] and entries[0]["image_id"] == 7
    many = {
        "boxes": boxes[:1].expand(300, 4),
        "scores": torch.linspace(0, 1, 300),
        "labels": torch.arange(300),
    }
    kept = within(many, (64, 64), (64, 64))
    assert kept["labels"].tolist() == list(range(299, 199, -1))


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def test_an_image_of_ten_thousand_objects_takes_little_memory():
    """Dense masks would be 10 GB."""
    side, boxes = 1000, [[10.0 * x, 10.0 * y, 8.0, 8.0] for x in range(100) for y in range(100)]
    runs = []
    for left, top, width, height in boxes:
        before, zeros = int(left) * side + int(top), side - int(height)
        counts = [before, *[int(height), zeros] * (int(width) - 1), int(height)]
        counts.append(side * side - sum(counts))
        runs.append(run_lengths.frPyObjects({"size": (side, side), "counts": counts}, side, side))
    truth = {
        "images": [{"id": 0, "height": side, "width": side}],
        "categories": [{"id": n, "name": str(n)} for n in range(20)],
        "annotations": [
            {
                "id": n + 1,
                "image_id": 0,
                "category_id": n % 20,
                "bbox": box,
                "area": 64,
                "iscrowd": 0,
                "segmentation": runs[n],
            }
            for n, box in enumerate(boxes)
        ],
    }
    before = peak_bytes()
    found = {
        "boxes": torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes[:20]]).double(),
        "scores": torch.linspace(1, 0.5, 20),
        "labels": torch.arange(20),
        "masks": torch.ones(20, 28, 28),
    }
    figures = average_precision(truth, coco_entries(0, found, (side, side)), ("box", "mask"))
    # 1 of the 500 objects of each class: precision 1 at the recall 0
    for kind in ("box", "mask"):
        assert figures.scalars[f"{kind}_ap"] == pytest.approx(100 / 101, abs=1e-9)
    assert peak_bytes() - before < 200e6


# --- runs

EVERYTHING = ["--ema_decay", 0.5, "--drop_path_rate", 0.3, "--depth", 2]


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    """Eight training and three validation images."""
    return coco_scenes(tmp_path_factory.mktemp("coco"), range(8), range(3))


def on_coco(root: Path, output_dir: Path, *more) -> list[str]:
    return on_scenes("detect", output_dir, "--dataset", "folder", "--data_path", root, *more)


def test_a_run_resumes_bit_for_bit_and_draws_what_it_predicts(tmp_path, coco):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    results = main_finetune.main(on_coco(coco, whole, *EVERYTHING, "--per_class"))
    arguments = on_coco(coco, resumed, *EVERYTHING, "--per_class")
    main_finetune.main([*arguments, "--stop_epoch", "1"])
    main_finetune.main([*arguments, "--num_workers", "1", "--checkpointing"])
    assert_same_run(whole, resumed)
    assert len(log_lines(whole)) == 4 + 2 + 2  # steps, epochs, evaluations
    assert "loss" not in results and results["ema"].keys() >= {"box_ap", "mask_ap_small"}
    assert list(results["per_class_mask_ap"]) == [str(number) for number in range(10)]
    header = read_header(whole / "best.safetensors")
    assert header["model_args"]["task"] == "detect"
    assert header["class_names"] == [str(number) for number in range(10)]
    for name in ("predictions.png", "per_class.png"):
        assert Image.open(whole / name).size[0] > 300
    assert set(PROGRESS_FILES) >= {"predictions.png", "per_class.png"}
    evaluated = main_finetune.main(
        on_coco(coco, tmp_path / "eval", "--eval", "--finetune", whole / "model.safetensors")
        + ["--depth", "2"]
    )
    assert all(evaluated[name] == results[name] for name in ("box_ap", "mask_ap50"))
    more = ["--finetune", whole / "model.safetensors", "--freeze_blocks", 1, "--depth", 2]
    main_finetune.main(on_coco(coco, tmp_path / "frozen", *more, "--epochs", 1))
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "frozen"))
    same = {name for name, values in before.items() if torch.equal(values, after[name])}
    kept = {name for name in before if name.startswith(("blocks.0.", "patch_embed.", "pos_embed"))}
    assert kept <= same and not any(name.startswith("blocks.1.mlp") for name in same)


def test_boxes_alone(tmp_path, coco):
    more = ["--instance_masks", "false", "--epochs", 1]
    results = main_finetune.main(on_coco(coco, tmp_path / "run", *more))
    assert "box_ap" in results and not any(name.startswith("mask") for name in results)
    with pytest.raises(InputError, match="best_metric mask_ap") as caught:
        main_finetune.main(on_coco(coco, tmp_path / "no", *more, "--best_metric", "mask_ap"))
    assert "best_metric" in caught.value.settings


def test_bad_images_are_replaced_in_training_and_an_error_in_evaluation(tmp_path):
    root = coco_scenes(tmp_path / "coco", range(8), range(3))
    (root / "train" / "003.png").write_bytes(b"no image")
    main_finetune.main(on_coco(root, tmp_path / "run", "--epochs", 1))
    (bad,) = read_log(tmp_path / "run" / "bad_samples.jsonl")
    assert bad["path"].endswith("train/003.png")
    (root / "val" / "001.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"val/001\.png"):
        main_finetune.main(on_coco(root, tmp_path / "other", "--epochs", 1))


def test_a_model_that_finds_nothing_has_figures_of_0(tmp_path, coco, monkeypatch):
    """As one has that is not finite."""

    def nothing(call, samples, img_size):
        empty = {
            "boxes": torch.zeros(0, 4),
            "scores": torch.zeros(0),
            "masks": torch.zeros(0, 9, 9),
        }
        return [{**empty, "labels": torch.zeros(0, dtype=torch.int64)} for _ in samples]

    monkeypatch.setattr(detection, "detect", nothing)
    results = main_finetune.main(on_coco(coco, tmp_path, "--epochs", 1))
    assert results["box_ap"] == results["mask_ap50"] == 0 and results["best_epoch"] == 1


# --- a model that has learnt

LEARNING = [
    "--batch_size",
    2,
    "--region_samples",
    64,
    "--embed_dim",
    64,
    "--depth",
    2,
    "--num_heads",
    4,
    "--head_dim",
    64,
]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory) -> tuple[Path, Path]:
    """A folder of five validation images, the first of which is all of the training, and weights
    that were trained on it."""
    folder = tmp_path_factory.mktemp("learnt")
    root = coco_scenes(folder / "coco", [0, 0], range(5))
    schedule = ["--epochs", 300, "--warmup_epochs", 10, "--lr", 0.256, "--eval_epochs", 300]
    still = ["--hflip", 0, "--scale_min", 1, "--scale_max", 1, "--drop_path_rate", 0]
    quiet = ["--save_epochs", 0, "--log_interval", 300]
    main_finetune.main(on_coco(root, folder / "run", *LEARNING, *schedule, *still, *quiet))
    return root, folder / "run" / "model.safetensors"


@pytest.mark.long
def test_one_scene_is_learnt_by_heart(tmp_path, learnt):
    """Boxes and masks of the image that it was trained on; of others it knows nothing."""
    root = coco_scenes(tmp_path / "coco", [0], [0])
    more = [*LEARNING, "--eval", "--finetune", learnt[1]]
    results = main_finetune.main(on_coco(root, tmp_path / "eval", *more))
    assert results["box_ap"] > 90 and results["mask_ap50"] > 50
    others = main_finetune.main(on_coco(learnt[0], tmp_path / "others", *more))
    assert 5 < others["box_ap"] < 60


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 3])
def test_figures_are_the_same_on_several_processes(tmp_path, learnt, processes):
    root, weights = learnt
    more = [*LEARNING, "--eval", "--finetune", weights, "--per_class"]
    alone = main_finetune.main(on_coco(root, tmp_path / "one", *more))
    printed = launch(on_coco(root, tmp_path / "many", *more), processes, "run_finetune.sh")
    assert printed.returncode == 0, printed.stderr
    assert results_of(tmp_path / "many", "eval.json") == alone and alone["box_ap"] > 5


@pytest.mark.long
def test_two_processes_resume_bit_for_bit_and_agree_with_one(tmp_path, coco):
    more = ["--batch_size", 2, "--drop_path_rate", 0]
    for folder, extra in (("whole", []), ("part", ["--stop_epoch", "1"]), ("part", [])):
        done = launch(on_coco(coco, tmp_path / folder, *more) + extra, 2, "run_finetune.sh")
        assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "part")
    main_finetune.main(on_coco(coco, tmp_path / "one", "--drop_path_rate", 0))
    ours, theirs = (
        [line["loss"] for line in log_lines(tmp_path / n) if "loss" in line]
        for n in ("one", "whole")
    )
    assert ours[0] == pytest.approx(theirs[0], rel=0.2)  # each process draws its regions
