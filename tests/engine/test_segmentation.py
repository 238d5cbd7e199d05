"""Segmentation: figures against loops, windows, fine-tuning, linear layers and k-NN on patches."""

import json
import math
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import assert_same_run, kept_for_gradient
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from runs import ROOT, launch, make_scenes, pictures, results_of, run, step_losses

import engine.evaluation.segmentation as segmentation
import main_finetune
import main_knn
import main_lincls
from data.annotated import IGNORED
from data.images import PixelFormat
from data.joint import segment_eval
from data.loader import collate
from data.sampler import SampleKey
from data.scenes import compose
from data.segmentation import MaskFolder, MaskValues
from data.transforms import PixelNormalizer
from engine.evaluation.from_weights import build_frozen
from engine.evaluation.patch_knn import build_memory, patches_of_images
from engine.evaluation.segmentation import (
    SegmentationEvaluator,
    averaged,
    bands,
    logits_of_windows,
    pixel_loss,
    window_starts,
)
from engine.run.checkpoint import load_newest_checkpoint
from engine.run.folder import Run
from engine.run.records import Records
from engine.start import read_knn, read_lincls
from engine.tasks.linear import LinearSegmentation
from models.heads.probe import LinearProbes
from models.heads.segmentation import to_pixels
from util.dist import Processes
from util.errors import DataError
from util.settings.evaluation import LinclsConfig

CPU = Processes(0, 1, 0, 1, torch.device("cpu"))
CLASSES = 5


# --- figures


def loops(confusion: np.ndarray) -> dict[str, float]:
    """The figures of pixels `(C, C + 1)` by class and predicted class, one class at a time."""
    ious, accuracies = [], []
    for label in range(len(confusion)):
        right = confusion[label, label]
        union = confusion[label].sum() + confusion[:, label].sum() - right
        if union:
            ious.append(right / union)
        if confusion[label].sum():
            accuracies.append(right / confusion[label].sum())
    right = sum(confusion[label, label] for label in range(len(confusion)))
    figures = np.mean(ious), right / confusion.sum(), np.mean(accuracies)
    return dict(zip(("miou", "pixel_acc", "mean_acc"), (100 * f for f in figures), strict=True))


class Numbered:
    """Images of several sizes, image i of one grey i, with masks drawn by chance: class 3 is in
    none, and image 4 has no pixel that counts."""

    class_names = [*"abcde"]
    block_size = 1

    def __len__(self) -> int:
        return 11

    def read(self, index: int) -> torch.Tensor:
        return torch.full((1, *self.size(index)), index, dtype=torch.uint8)

    def size(self, index: int) -> tuple[int, int]:
        return [(16, 16), (16, 24), (13, 37), (40, 33)][index % 4]

    def name(self, index: int) -> str:
        return str(index)

    def read_ahead(self) -> None:
        return

    def annotation(self, index: int, height: int, width: int) -> dict[str, torch.Tensor]:
        drawn = np.random.default_rng(index).choice([0, 1, 2, 4, IGNORED], (height, width))
        return {"mask": torch.from_numpy(np.full_like(drawn, IGNORED) if index == 4 else drawn)}


def logits_of(number: int, grid: tuple[int, int]) -> torch.Tensor:
    """Of two heads, `(2, C, h, w)`; image 6 has some that are not finite."""
    drawn = np.random.default_rng([number, *grid]).normal(size=(2, CLASSES, *grid))
    if number == 6:
        drawn[0, 1, 0, 0], drawn[1, :, -1, -1] = np.nan, np.inf
    return torch.from_numpy(drawn).float()


def predict(images: torch.Tensor) -> torch.Tensor:
    grid = images.shape[-2] // 8, images.shape[-1] // 8
    numbers = (255 * (0.25 * images[:, 0, 0, 0] + 0.5)).round().int().tolist()
    return torch.stack([logits_of(number, grid) for number in numbers], dim=1)


def score(processes: Processes, rows: int) -> list[dict[str, object]]:
    """The evaluator's scores of the two heads."""
    segmentation.MOST_LOGITS = rows
    cfg = LinclsConfig(
        task="segment",
        dataset="digits_scenes",
        mean=(0.5,),
        std=(0.25,),
        in_chans=1,
        num_workers=0,
        precision="fp32",
        img_size=16,
        patch_size=8,
        batch_size=3,
        finetune="random",
    )
    stage = Run(Path("nowhere"), processes, Records(Path("nowhere"), is_main=False))
    evaluator = SegmentationEvaluator(cfg, stage, Numbered())
    return [of_head.as_dict(Numbered.class_names) for of_head in evaluator(predict, 2)]


def expected(head: int) -> tuple[np.ndarray, float]:
    """The confusion and the loss, one pixel at a time."""
    source, confusion, total = Numbered(), np.zeros((CLASSES, CLASSES + 1), dtype=int), 0.0
    for number in range(len(source)):
        height, width = source.size(number)
        mask = source.annotation(number, height, width)["mask"].numpy()
        shown = segment_eval(source.read(number), 16, 8).shape[-2:]
        logits = logits_of(number, (shown[0] // 8, shown[1] // 8))[head, None]
        pixels = to_pixels(to_pixels(logits, shown), (height, width))[0].double().numpy()
        for row in range(height):
            for column in range(width):
                label, values = mask[row, column], pixels[:, row, column]
                if label == IGNORED:
                    continue
                finite = np.isfinite(values).all()
                confusion[label, values.argmax() if finite else CLASSES] += 1
                total += math.log(np.exp(values).sum()) - values[label] if finite else math.nan
    return confusion, total / confusion.sum()


def check_scores(found: list[dict[str, object]]) -> None:
    for head, of_head in enumerate(found):
        confusion, _ = expected(head)
        assert of_head["confusion"] == confusion[:, :CLASSES].tolist()
        assert confusion[3].sum() == 0 < confusion[:, 3].sum() and confusion[:, CLASSES].sum() > 0
        assert {n: of_head[n] for n in loops(confusion)} == pytest.approx(
            loops(confusion), abs=1e-9
        )
        assert of_head["num_samples"] == 11 and of_head["per_class_iou"]["d"] == 0
        assert of_head["per_class_acc"]["d"] is None and of_head["loss"] is None


@pytest.mark.parametrize("rows", [1, 2**26])
def test_figures_are_those_of_loops_over_the_pixels(rows, monkeypatch):
    """Images of several sizes, no pixel that counts, a class that no mask has, and logits that are
    not finite; in bands of one row as well."""
    monkeypatch.setattr(segmentation, "MOST_LOGITS", rows)
    check_scores(score(CPU, rows))
    monkeypatch.setattr(sys.modules[__name__], "logits_of", finite_logits)
    for head, found in enumerate(score(CPU, rows)):
        assert found["loss"] == pytest.approx(expected(head)[1], rel=1e-6)


def finite_logits(number: int, grid: tuple[int, int], original=logits_of) -> torch.Tensor:
    return original(number, grid).nan_to_num(0, 0, 0)


SCORE = """
import json, sys
from pathlib import Path
from test_segmentation import score
from util.dist import init_processes
with init_processes("cpu", 5) as processes:
    Path(f"{sys.argv[1]}{processes.rank}.json").write_text(json.dumps(score(processes, 2**26)))
"""


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 3])
def test_figures_are_the_same_on_several_processes(tmp_path, processes):
    (tmp_path / "score.py").write_text(SCORE)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    paths = ":".join(str(ROOT / folder) for folder in (".", "tests", "tests/engine"))
    started = [sys.executable, *launcher, str(tmp_path / "score.py"), f"{tmp_path}/found"]
    result = run(started, PYTHONPATH=paths)
    assert result.returncode == 0, result.stderr
    alone = json.loads(json.dumps(score(CPU, 2**26)))
    for rank in range(processes):
        assert json.loads((tmp_path / f"found{rank}.json").read_text()) == alone


@pytest.mark.parametrize(
    ("confusion", "miou", "pixel", "mean"),
    [
        # 2 of 3 and 1 of 2; unions 4 and 3; class 2 neither in masks nor predicted
        ([[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], (1 / 2 + 1 / 3) / 2, 3 / 5, 7 / 12),
        # class 1 only predicted: it has a union and no recall
        ([[3, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], (3 / 4 + 0) / 2, 3 / 4, 3 / 4),
        # one pixel of no class counts as wrong
        ([[3, 0, 0, 1], [0, 2, 0, 0], [0, 0, 0, 0]], (3 / 4 + 1) / 2, 5 / 6, 7 / 8),
        ([[0] * 4] * 3, math.nan, math.nan, math.nan),
    ],
)
def test_figures_by_hand(confusion, miou, pixel, mean):
    found = segmentation.segmentation_figures(torch.tensor(confusion)).scalars
    exact = [100 * value for value in (miou, pixel, mean)]
    assert list(found.values()) == pytest.approx(exact, abs=1e-9, nan_ok=True)


# --- windows and bands


@given(st.integers(1, 300), st.integers(1, 100))
def test_windows_cover_a_side_and_overlap_by_a_third(length, window):
    window = min(length, window)
    starts = window_starts(length, window)
    assert starts[0] == 0 and starts[-1] == length - window
    steps = np.diff(starts)
    assert (steps > 0).all() and (steps <= max(1, 2 * window // 3)).all()
    assert len(starts) == math.ceil((length - window) / max(1, 2 * window // 3)) + 1


def test_sliding_windows_are_those_of_a_loop():
    images = torch.randn(2, 3, 40, 64)

    def classify(window: torch.Tensor) -> torch.Tensor:
        """What a window's patches are depends on the window around them, too."""
        means = torch.nn.functional.avg_pool2d(window, 8)
        return torch.stack([means, means * window.mean(dim=(1, 2, 3), keepdim=True)])

    windows = logits_of_windows(classify, images, (24, 32))
    for image in range(2):
        for head in range(2):
            total, count = np.zeros((3, 40, 64)), np.zeros((40, 64))
            for top in (0, 16):
                for left in (0, 21, 32):
                    part = images[image : image + 1, :, top : top + 24, left : left + 32]
                    logits = to_pixels(classify(part)[head], (24, 32))[0].double().numpy()
                    total[:, top : top + 24, left : left + 32] += logits
                    count[top : top + 24, left : left + 32] += 1
            of_image = [part._replace(logits=part.logits[:, image]) for part in windows]
            found = averaged(of_image, head, (40, 64)).numpy()
            np.testing.assert_allclose(found, total / count, rtol=0, atol=1e-6)


def test_a_window_that_covers_the_image_is_the_whole_image():
    images = torch.randn(1, 3, 16, 24)
    whole, covered = (logits_of_windows(lambda x: x, images, size) for size in (None, (16, 40)))
    for (part,) in (whole, covered):
        assert (part.rows, part.columns) == (slice(0, 16), slice(0, 24))
        torch.testing.assert_close(part.logits[0], images, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(7, 5), (64, 48), (65, 131)])
def test_bands_are_the_rows_of_the_whole_image(size, monkeypatch):
    monkeypatch.setattr(segmentation, "MOST_LOGITS", 4 * 3 * size[1])
    logits = torch.randn(3, 12, 20)
    found = [part for _, part in bands(logits, size)]
    assert [part.shape[1] for part in found[:-1]] == [4] * (len(found) - 1)
    torch.testing.assert_close(torch.cat(found, dim=1), to_pixels(logits[None], size)[0])


def test_the_loss_is_that_of_the_pixels_that_count():
    logits = torch.randn(2, CLASSES, 6, 7, dtype=torch.float64, requires_grad=True)
    masks = torch.from_numpy(np.random.default_rng(0).choice([0, 1, 4, IGNORED], (2, 6, 7)))
    losses = []
    for image, row, column in np.argwhere(masks.numpy() != IGNORED):
        log_shares = logits[image, :, row, column].log_softmax(dim=0)
        own = log_shares[masks[image, row, column]]
        losses.append(-(0.9 * own + 0.1 * log_shares.mean()))
    torch.testing.assert_close(pixel_loss(logits, masks, 0.1), torch.stack(losses).mean())
    none = pixel_loss(logits, torch.full_like(masks, IGNORED))
    none.backward()
    assert none == 0 and not logits.grad.any()


# --- the stages, on 24 + 9 small scenes in files

SCENES = shlex.split("""
--task segment --dataset folder --num_classes 11 --img_size 32 --in_chans 1 --mean 0.1307
--std 0.3081 --size debug --patch_size 8 --precision fp32 --device cpu --num_workers 0
""")
TRAINING = shlex.split("""
--batch_size 6 --epochs 3 --warmup_epochs 0.5 --hflip 0.5 --log_interval 1 --tensorboard false
""")
FINETUNING = [*TRAINING, "--lr", "0.1", "--dense_head", "linear", "--drop_path_rate", "0.2"]


def scenes(scenery: Path, output: Path, *more: object) -> list[str]:
    return [*SCENES, "--data_path", str(scenery), "--output_dir", str(output), *map(str, more)]


@pytest.fixture(scope="module")
def scenery(tmp_path_factory) -> Path:
    """Every third scene is lower than the others; 24 for training and 9 for validation."""
    return make_scenes(tmp_path_factory.mktemp("scenes"))


def mask_folder(scenery: Path, split: str) -> MaskFolder:
    return MaskFolder(
        scenery / "images" / split,
        scenery / "masks" / split,
        names=[path.name for path in sorted((scenery / "images" / split).iterdir())],
        class_names=[*map(str, range(11))],
        values=MaskValues(11, 255, False),
        pixels=PixelFormat(1),
    )


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, scenery) -> tuple[Path, dict]:
    """A fine-tuning from scratch with a moving average: its folder and results."""
    folder = tmp_path_factory.mktemp("tuned")
    more = [*FINETUNING, "--ema_decay", 0.5, "--per_class"]
    return folder, main_finetune.main(scenes(scenery, folder, *more))


def test_fine_tuning_leaves_a_model_that_evaluates_the_same(tmp_path, scenery, tuned):
    folder, results = tuned
    assert (results["protocol"], results["num_train"], results["num_samples"]) == (
        "from scratch",
        24,
        9,
    )
    assert results["best_miou"] >= results["ema"]["miou"] and len(results["per_class_iou"]) == 11
    # 3 scenes of 48 rows and 6 of 64, of which 2 do not count
    assert sum(map(sum, results["confusion"])) == 64 * (3 * 46 + 6 * 62)
    more = ["--finetune", folder / "model.safetensors", "--eval", "--per_class"]
    evaluated = main_finetune.main(scenes(scenery, tmp_path, *more))
    same = ("miou", "pixel_acc", "mean_acc", "loss", "per_class_iou", "confusion")
    assert {name: evaluated[name] for name in same} == {name: results[name] for name in same}
    slid = main_finetune.main(scenes(scenery, tmp_path / "slide", *more, "--eval_mode", "slide"))
    # 32 x 43 pixels become 32 x 48, of two windows
    assert slid["confusion"] != evaluated["confusion"]
    assert sum(map(sum, slid["confusion"])) == sum(map(sum, evaluated["confusion"]))


@pytest.mark.parametrize(
    "more",
    [
        ["--ema_decay", 0.5, "--checkpointing", "true"],
        ["--freeze_blocks", 1, "--dense_head", "fpn"],
    ],
)
def test_a_resumed_fine_tuning_is_the_uninterrupted_one(tmp_path, scenery, tuned, more):
    arguments = [*FINETUNING, "--finetune", tuned[0] / "model.safetensors", *more]
    main_finetune.main(scenes(scenery, tmp_path / "whole", *arguments))
    main_finetune.main(scenes(scenery, tmp_path / "cut", *arguments, "--stop_epoch", 1))
    main_finetune.main(scenes(scenery, tmp_path / "cut", *arguments))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert len(set(step_losses(tmp_path / "whole").values())) == 12


def test_a_bad_mask_is_replaced_in_training_and_an_error_in_an_evaluation(tmp_path, scenery):
    copied = tmp_path / "data"
    for path in scenery.rglob("*.png"):
        target = copied / path.relative_to(scenery)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    Image.new("L", (9, 9)).save(copied / "masks/train/05.png")
    results = main_finetune.main(scenes(copied, tmp_path / "run", *FINETUNING))
    (entry,) = (tmp_path / "run/bad_samples.jsonl").read_text().splitlines()
    assert entry.count("05.png") >= 2 and results["miou"] >= 0  # the image and its mask
    Image.new("L", (9, 9)).save(copied / "masks/val/03.png")
    (copied / "masks/train/05.png").write_bytes((scenery / "masks/train/05.png").read_bytes())
    for stage, more in (
        (main_finetune, FINETUNING),
        (main_knn, ["--finetune", "random"]),
        (main_lincls, [*TRAINING, "--finetune", "random"]),
    ):
        with pytest.raises(DataError, match=r"leaves no image out.*masks/val/03\.png"):
            stage.main(scenes(copied, tmp_path / stage.__name__, *more))


# --- linear layers on patches


RATES = (0.1, 1.0, 5.0)
PROBING = [*TRAINING, "--eval_epochs", "3"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, data) -> Path:
    """Weights whose only norm is one after the mean."""
    folder = tmp_path_factory.mktemp("classifier")
    main_finetune.main(pictures(data, folder, "--epochs", 1))
    return folder / "model.safetensors"


@pytest.mark.parametrize("weights", ["random", "classifier", "tuned"])
def test_the_chosen_linear_layer_is_a_model_for_fine_tuning(
    tmp_path, scenery, tuned, classifier, weights
):
    path = {"random": "random", "tuned": tuned[0] / "model.safetensors", "classifier": classifier}
    size = ["--patch_size", 4 if weights == "classifier" else 8]
    more = [*PROBING, "--finetune", path[weights], "--per_class", *size, "--lr", *RATES]
    results = main_lincls.main(scenes(scenery, tmp_path / "linear", *more))
    assert (results["num_train"], results["num_held_out"]) == (22, 2)
    best = max(results["curve"], key=lambda point: point["held_out_miou"])
    assert results["lr"] == best["lr"] and results["miou"] == best["val_miou"]
    written = tmp_path / "linear/model.safetensors"
    more = ["--eval", "--per_class", "--finetune", written, *size]
    evaluated = main_finetune.main(scenes(scenery, tmp_path / "eval", *more))
    ours, theirs = (np.array(of["confusion"]) for of in (evaluated, results))
    # the batch normalisation is in the weights: rounding moves a pixel at most
    assert np.abs(ours - theirs).sum() <= 4 and ours.sum() == theirs.sum()
    assert evaluated["loss"] == pytest.approx(results["loss"], rel=1e-5)


def test_many_rates_at_once_are_each_alone(tmp_path, scenery):
    """Also beside one that diverges, and with those that it shares its images with."""
    more = ["--finetune", "random", *PROBING, "--weight_decay", 1e-3, "--lr"]
    alone = main_lincls.main(scenes(scenery, tmp_path / "alone", *more, 0.1, 1.0))
    beside = main_lincls.main(scenes(scenery, tmp_path / "beside", *more, 0.1, 1.0, 1e9))
    ours, theirs = (load_newest_checkpoint(tmp_path / n).model for n in ("beside", "alone"))
    assert ours["weights.2"].abs().max() > 1e6 or not ours["weights.2"].isfinite().all()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    for ours, theirs in zip(beside["curve"], alone["curve"], strict=False):
        assert ours == pytest.approx(theirs, abs=1e-6)
    assert beside["lr"] == alone["lr"] and beside["miou"] == pytest.approx(alone["miou"], abs=1e-6)


def linear_task(scenery: Path, output: Path) -> LinearSegmentation:
    arguments = scenes(scenery, output, *PROBING, "--finetune", "random", "--lr", *RATES)
    cfg = read_lincls(arguments)
    return LinearSegmentation(cfg, Run(output, CPU, Records(output, is_main=False)))


def test_the_loss_of_each_rate_and_its_memory(tmp_path, scenery):
    """Each is that of the pixels between the patches; its gradient keeps no logits of pixels."""
    task = linear_task(scenery, tmp_path)
    frozen, _ = task.build()
    samples = task.samples()
    batch = collate([samples[SampleKey(number, 0, number, 0)] for number in range(4)])
    probes = LinearProbes(32, 11, 3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for weight in probes.weights:
            weight.normal_()
    losses, kept = [], []
    for module in (probes, probes.eval()):
        found, size = kept_for_gradient(
            lambda module=module: task.losses(module, frozen, batch).sum()
        )
        losses.append(found)
        kept.append(size)
    assert max(kept) < 4 * 11 * 32 * 32 * 4  # bytes of the pixels' logits of one rate
    found = task.losses(probes, frozen, batch)
    masks = torch.stack([target["mask"] for target in batch.targets])
    for rate in range(3):
        weight, bias = probes.folded(rate)
        head = torch.nn.functional.conv2d(
            frozen.forward_map(PixelNormalizer((0.1307,), (0.3081,), CPU.device)(batch.images)),
            weight[:, :, None, None],
            bias,
        )
        alone = pixel_loss(to_pixels(head, (32, 32)), masks)
        torch.testing.assert_close(found[rate], alone, rtol=1e-5, atol=1e-6)
    assert len(set(found.tolist())) == 3


# --- k-NN on patches


def features_and_masks(scenery: Path, split: str):
    """Of each image `(h, w, D)` float64, the mask as the model sees it, and the mask itself."""
    cfg = read_knn(scenes(scenery, scenery / "x", "--finetune", "random"))
    model, _ = build_frozen(cfg, "random", 11)
    normalize = PixelNormalizer(cfg.mean, cfg.std, CPU.device)
    source = mask_folder(scenery, split)
    for index in range(len(source)):
        image = source.read(index)
        mask = source.annotation(index, *image.shape[-2:])["mask"].numpy()
        shown = segment_eval(image, 32, 8)
        with torch.no_grad():
            features = model.forward_map(normalize(shown[None]))[0].permute(1, 2, 0)
        rows, columns = (
            ((np.arange(new) + 0.5) * old / new).astype(int)
            for old, new in zip(mask.shape, shown.shape[-2:], strict=True)
        )
        yield features.double().numpy(), mask[rows][:, columns], mask


def test_neighbours_are_those_of_a_search_one_by_one(tmp_path, scenery):
    """The memory holds all patches but those of which no pixel counts."""
    more = ["--finetune", "random", "--ks", 1, 9, 700, "--temperature", 0.05, "--per_class"]
    results = main_knn.main(scenes(scenery, tmp_path, *more))
    memory, shares = [], []
    for features, mask, _ in features_and_masks(scenery, "train"):
        for row, column in np.ndindex(*features.shape[:2]):
            part = mask[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            counts = np.bincount(part[part != IGNORED], minlength=11)
            if counts.sum():
                memory.append(features[row, column] / np.linalg.norm(features[row, column]))
                shares.append(counts / counts.sum())
    memory, shares = np.array(memory), np.array(shares)
    assert results["num_patches"] == len(memory) and results["num_train"] == 24
    found = {}
    for k in (1, 9, 700):
        confusion = np.zeros((11, 12), dtype=int)
        for features, seen, mask in features_and_masks(scenery, "val"):
            averages = np.zeros((11, *features.shape[:2]))
            for row, column in np.ndindex(*features.shape[:2]):
                query = features[row, column] / np.linalg.norm(features[row, column])
                similarities = np.round(memory @ query * 2**18) / 2**18
                nearest = np.argsort(-similarities, kind="stable")[:k]
                votes = np.exp(similarities[nearest] / 0.05)
                averages[:, row, column] = votes @ shares[nearest] / votes.sum()
            pixels = to_pixels(torch.from_numpy(averages)[None], seen.shape)
            predicted = to_pixels(pixels, mask.shape)[0].argmax(dim=0).numpy()
            np.add.at(confusion, (mask[mask != IGNORED], predicted[mask != IGNORED]), 1)
        found[k] = confusion
    # similarities that rounding brings to the other side of a step move a pixel at most
    assert np.abs(np.array(results["confusion"]) - found[1][:, :11]).sum() <= 4
    by_k = [results["miou_by_k"][str(k)] for k in found]
    assert by_k == pytest.approx([loops(of_k)["miou"] for of_k in found.values()], abs=0.02)
    assert results["miou"] == by_k[0] and len({f"{value:.3f}" for value in by_k}) > 1


def test_the_memory_takes_as_many_patches_of_each_image(tmp_path, scenery):
    arguments = scenes(scenery, tmp_path, "--finetune", "random", "--memory_patches")

    def memory(patches: int, seed: int = 0):
        cfg = read_knn([*arguments, str(patches), "--seed", str(seed)])
        model, _ = build_frozen(cfg.model_copy(update={"seed": 0}), "random", 11)
        stage = Run(tmp_path, CPU, Records(tmp_path, is_main=False))
        return build_memory(cfg, stage, model, mask_folder(scenery, "train"))

    whole, some = memory(10**6), memory(53)
    assert len(some.features) == 53
    rows = [int((whole.features - row).abs().sum(dim=1).argmin()) for row in some.features]
    torch.testing.assert_close(whole.features[rows], some.features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.shares[rows], some.shares)
    torch.testing.assert_close(some.shares.sum(dim=1), torch.ones(53))
    assert torch.equal(memory(53).features, some.features)
    assert not torch.equal(memory(53, seed=1).features, some.features)
    assert sorted(patches_of_images(24, 53, 0).tolist()) == [2] * 19 + [3] * 5
    assert sorted(patches_of_images(24, 5, 0).tolist()) == [0] * 19 + [1] * 5
    assert len(memory(5).features) == 5


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_find_the_same(tmp_path, scenery, tuned, processes):
    weights = ["--finetune", tuned[0] / "model.safetensors", "--per_class", "--batch_size", 2]
    for name, stage, more in (
        ("knn", main_knn, [*weights, "--memory_patches", 100]),
        ("finetune", main_finetune, [*weights, "--eval"]),
    ):
        alone = stage.main(scenes(scenery, tmp_path / f"{name}1", *more))
        arguments = scenes(scenery, tmp_path / name, *more)
        result = launch(arguments, processes, f"run_{name}.sh")
        assert result.returncode == 0, result.stderr
        file = "results.json" if name == "knn" else "eval.json"
        many = results_of(tmp_path / name, file)
        if name == "finetune":
            assert many.pop("loss") == pytest.approx(alone.pop("loss"), rel=1e-6)
        assert many == alone, name


@pytest.mark.long
@pytest.mark.parametrize("stage", ["finetune", "lincls"])
def test_training_on_two_processes_resumes_bit_for_bit(tmp_path, scenery, stage):
    more = {
        "finetune": [*FINETUNING, "--ema_decay", 0.5],
        "lincls": [*TRAINING, "--eval_epochs", 1, "--finetune", "random", "--lr", 0.1, 1],
    }[stage]
    for name, stops in (("whole", [[]]), ("cut", [["--stop_epoch", 1], []])):
        for stop in stops:
            arguments = scenes(scenery, tmp_path / name, *more, "--batch_size", 3, *stop)
            result = launch(arguments, 2, f"run_{stage}.sh")
            assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert len(step_losses(tmp_path / "whole")) >= 9


@pytest.mark.long
def test_fine_tuning_overfits_one_scene(tmp_path):
    root = tmp_path / "data"
    scene = compose(True, 3)
    mask = ((scene.labels + 1)[:, None, None] * scene.masks).sum(axis=0).astype(np.uint8)
    for split in ("train", "val"):
        for name, values in (("images", scene.image), ("masks", mask)):
            (root / name / split).mkdir(parents=True)
            Image.fromarray(values).save(root / name / split / "scene.png")
    more = shlex.split("""
    --img_size 64 --patch_size 4 --embed_dim 64 --depth 4 --num_heads 4 --hflip 0 --scale_min 1
    --scale_max 1 --batch_size 1 --epochs 300 --eval_epochs 300 --save_epochs 0 --warmup_epochs 20
    --lr 0.5 --layer_decay 1 --label_smoothing 0 --drop_path_rate 0 --tensorboard false
    --weight_decay 0
    """)
    results = main_finetune.main(scenes(root, tmp_path / "run", *more, "--per_class"))
    ious = [v for v in results["per_class_iou"].values() if v is not None]
    assert len(ious) == 1 + len(set(scene.labels)) and min(ious) > 95 and results["miou"] > 95
