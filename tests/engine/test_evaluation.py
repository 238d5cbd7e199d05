"""Exact evaluation: hand-made scores, every image once on any number of processes, features, and
the final table."""

import json
import math
import os
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import free_port, loading
from safetensors.torch import save_file
from test_knn import some_data
from torch import multiprocessing
from torch.nn import functional as F
from torchvision.transforms import v2

from data.images import BadImageError, PixelFormat
from data.labels import LabelledData
from data.loader import build_eval_loader
from data.sources import ArraySource
from data.transforms import EvalTransform
from engine.evaluation import knn
from engine.evaluation.classification import Evaluator, Scores
from engine.evaluation.features import Features, compute_features
from engine.evaluation.features_file import FEATURES_FILE, Origin, load_features, save_features
from engine.evaluation.objective import Objective
from engine.run.folder import Run
from engine.run.records import Records, read_results, write_results
from models.vit import VisionTransformer
from tools import results_table
from tools.benchmarks.memory import LiveBytes
from util.dist import Processes, gather_rows, init_processes
from util.errors import InputError
from util.settings.evaluation import KnnConfig, LinclsConfig

CPU = torch.device("cpu")
PIXELS = {"mean": (0.5,), "std": (0.25,), "num_workers": 0, "precision": "fp32", "crop_pct": 1.0}


def run_of(rank: int, world_size: int) -> Run:
    """What an evaluation on one of several processes needs of its run."""
    processes = Processes(rank, world_size, rank, world_size, CPU)
    return Run(Path("nowhere"), processes, Records(Path("nowhere"), is_main=False))


def scores(
    classify, source: ArraySource, num_classes: int, rank=0, world_size=1, heads=1, **more
) -> list[Scores]:
    """Of this process's share of `source`."""
    cfg = LinclsConfig(**PIXELS | {"img_size": source.images.shape[-1], "batch_size": 3} | more)
    names = [str(label) for label in range(num_classes)]
    objective = Objective("multiclass", names)
    return Evaluator(cfg, run_of(rank, world_size), source, objective)(classify, heads)


def scores_of(logits: torch.Tensor, labels: list[int], batch_size: int = 3) -> list[Scores]:
    """`logits` `(n, C)` or `(H, n, C)` are what the classifier answers for each image: image i is
    one pixel of value i."""
    images = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    source = ArraySource("numbers", images, np.array(labels), PixelFormat(1))

    def classify(images: torch.Tensor) -> torch.Tensor:
        numbers = 255 * (0.25 * images.flatten() + 0.5)
        return logits[..., numbers.round().long(), :]

    heads = 1 if logits.ndim == 2 else len(logits)
    return scores(classify, source, logits.shape[-1], heads=heads, batch_size=batch_size)


def test_four_images_by_hand():
    ranked = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    # right are the first; the fifth, which counts among five; the sixth, which does not; the first
    logits = torch.tensor([ranked, ranked, ranked, [1.0, 1.0, 1.0, 1.0, 1.0, 9.0]])
    (found,) = scores_of(logits, [0, 4, 5, 5])
    log_sum = math.log(sum(math.exp(x) for x in ranked))
    last = math.log(5 * math.exp(1) + math.exp(9)) - 9
    loss = (log_sum - 6 + log_sum - 2 + log_sum - 1 + last) / 4
    counts = {"num_samples": 4, "correct1": 2, "correct5": 3, "acc1": 50.0, "acc5": 75.0}
    results = found.as_dict()
    assert {name: results[name] for name in counts} == counts
    assert results["loss"] == pytest.approx(loss, abs=1e-6)
    assert results["balanced_acc"] == 0.5  # of classes 0, 4 and 5: 1, 0 and 1 / 2
    per_class = {"a": 100.0, "b": None, "c": None, "d": None, "e": 0.0, "f": 50.0}
    assert found.as_dict(list("abcdef"))["per_class"] == per_class


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_the_loss_is_weighted_by_image_and_not_by_batch(batch_size):
    logits = torch.zeros(4, 6)
    logits[3, 2] = 1000.0  # no loss, alone in its batch of 3
    (found,) = scores_of(logits, [0, 1, 2, 2], batch_size)
    assert found.loss == pytest.approx(0.75 * math.log(6), abs=1e-6)  # not half of it


@pytest.mark.parametrize("num_classes", [2, 5])
def test_up_to_five_classes_are_always_among_five(num_classes):
    logits = torch.arange(float(num_classes)).expand(3, -1)  # the last is first
    (found,) = scores_of(logits, [0, 1, num_classes - 1])
    assert (found.correct1, found.correct5) == (1 + (num_classes == 2), 3)


def test_several_heads_score_as_each_alone():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 50, 7, generator=generator)
    labels = torch.randint(7, (50,), generator=generator)
    together = scores_of(logits, labels.tolist(), 20)
    assert len({found.correct1 for found in together}) > 1
    for found, of_head in zip(together, logits, strict=True):
        ranks = (of_head > of_head.gather(1, labels[:, None])).sum(1)
        assert (found.correct1, found.correct5) == ((ranks == 0).sum(), (ranks < 5).sum())
        assert found.loss == pytest.approx(F.cross_entropy(of_head, labels).item(), rel=1e-6)
        assert found.class_total == labels.bincount(minlength=7).tolist()
        assert found.class_correct == labels[ranks == 0].bincount(minlength=7).tolist()


def test_a_diverged_head_has_no_loss_and_spoils_no_other():
    logits = torch.zeros(2, 4, 3)
    logits[0, 2, 2] = float("nan")  # which topk takes for the largest, and 2 is the right class
    diverged, healthy = scores_of(logits, [0, 1, 2, 0])
    assert (diverged.class_correct[2], diverged.correct5, healthy.correct5) == (0, 3, 4)
    assert math.isnan(diverged.loss)
    assert diverged.as_dict()["loss"] is None
    assert healthy.as_dict()["loss"] == pytest.approx(math.log(3))


class Photographs(ArraySource):
    """Noise of nine classes, of which the images `broken` cannot be decoded."""

    def __init__(self, count: int, broken: tuple[int, ...] = ()):
        chance = np.random.default_rng(count)
        images = chance.integers(0, 256, (count, 1, 4, 4), dtype=np.uint8)
        super().__init__("noise", images, chance.integers(0, 9, count), PixelFormat(1))
        self.broken = broken
        self.reads: list[int] = []

    def read(self, index: int) -> torch.Tensor:
        self.reads.append(index)
        if index in self.broken:
            raise BadImageError("cannot be decoded: it is torn")
        return super().read(index)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize(("count", "batch_size"), [(1, 3), (7, 1), (7, 200), (100, 3)])
def test_processes_share_every_image_out_once(count, batch_size, world_size):
    for rank in range(world_size):
        source, share = Photographs(count), list(range(rank, count, world_size))
        transform = EvalTransform(4, 1.0)
        loader = build_eval_loader(source, transform, batch_size, rank, world_size, loading(0))
        batches = list(loader)
        assert source.reads == share and len(batches) == math.ceil(len(share) / batch_size)
        found = [
            pair for batch in batches for pair in zip(batch.images, batch.targets, strict=True)
        ]
        for (image, label), index in zip(found, share, strict=True):
            assert torch.equal(image, source.images[index]) and label == source.labels[index]


def answers(images: torch.Tensor) -> torch.Tensor:
    """Two fixed linear classifiers of nine classes, `(2, B, 9)`."""
    weights = torch.randn(2, 16, 9, generator=torch.Generator().manual_seed(1))
    return images.flatten(1) @ weights


def test_a_file_that_cannot_be_decoded_stops_the_evaluation():
    source = Photographs(10, broken=(4,))
    with pytest.raises(InputError, match=r"noise\[4\]"):
        scores(answers, source, 9, heads=2, batch_size=2)
    assert source.reads == [0, 1, 2, 3, 4, 5]  # no replacement is read
    with pytest.raises(InputError, match=r"noise\[4\]"):
        features_of(source)


COUNTS = (1, 7, 100)


def errors_of(rank: int, world_size: int, broken: tuple[int, ...]) -> str:
    try:
        scores(answers, Photographs(7, broken), 9, rank, world_size, heads=2, batch_size=2)
    except InputError as error:
        return str(error)
    return ""


def work(processes: Processes) -> dict:
    """Everything that crosses processes, by name; all processes must come to the same, but for the
    predictions, which only the main one has."""
    rank, world_size, found = processes.rank, processes.world_size, {}
    for count in COUNTS:
        for head, of_head in enumerate(
            scores(answers, Photographs(count), 9, rank, world_size, heads=2)
        ):
            found[f"scores of {count} by {head}"] = {
                **vars(of_head),
                "loss": None,
                "predictions": None,
            }
            found[f"losses of {count} by {head}"] = of_head.loss
            if processes.is_main:  # the others have none of their content
                labels, classes, *shares = [rows.tolist() for rows in of_head.predictions]
                found.setdefault("predictions", []).append([labels, classes])
                found.setdefault("probabilities", []).extend(shares)
        numbers = torch.arange(count)
        found[f"numbers of {count}"] = gather_rows(numbers[rank::world_size], count).tolist()
    found["errors"] = [
        errors_of(rank, world_size, broken) for broken in ((0,), (5,), (3, 5), (0, 1, 2), ())
    ]
    train, labels, test = map(torch.from_numpy, some_data(True, 5, 1001, 600, 8, 6))
    share = train[rank::world_size]
    ranks = knn.rank_labels(
        Features(share, labels, test, torch.arange(600) % 6), 6, (1, 50, 1001), 0.07, processes
    )
    found["ranks"] = {k: of_k.tolist() for k, of_k in ranks.items()}
    for everywhere in (True, False):
        with LiveBytes() as live:
            rows = gather_rows(share, 1001, everywhere)
        assert torch.equal(rows, train if everywhere or processes.is_main else train[:0])
        # its own share and that of one other
        assert live.peak <= rows.nbytes + 2 * train[::world_size].nbytes
    return json.loads(json.dumps(found))


def process(rank: int, world_size: int, port: int, folder: str) -> None:
    """One of several, which search and gather in many turns."""
    torch.set_num_threads(1)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = (rank, world_size, rank, world_size, "127.0.0.1", port)
    os.environ |= dict(zip(names, map(str, values), strict=True))
    knn.QUERIES, knn.ROWS = 70, 90
    with init_processes("cpu") as processes:
        found = work(processes)
    Path(f"{folder}/{rank}.json").write_text(json.dumps(found))


@pytest.mark.long
@pytest.mark.parametrize("world_size", [2, 3])
def test_gloo_processes_come_to_the_same_as_one(tmp_path, world_size):
    """With 1, 7 and 100 images: fewer than processes, and shares of unequal length."""
    expected = work(Processes(0, 1, 0, 1, CPU))
    multiprocessing.spawn(process, (world_size, free_port(), str(tmp_path)), nprocs=world_size)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world_size)]
    assert ranks[0].pop("predictions") == expected["predictions"]
    for ours, theirs in zip(ranks[0].pop("probabilities"), expected["probabilities"], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)  # of batches of another size
    assert ranks == [ranks[0]] * world_size  # all stop for the same reason, too
    errors = ranks[0].pop("errors")
    assert all("noise[" in text for text in errors[:-1]) and errors[-1] == ""
    assert "noise[5]" in errors[1]
    for name, value in ranks[0].items():  # losses are sums of floats, in another order
        exact = not name.startswith("losses")
        assert value == (expected[name] if exact else pytest.approx(expected[name], rel=1e-6))


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("channels", [1, 3])
def test_any_size_of_image_is_resized_and_cut_as_by_torchvision(channels):
    """The public code's long side is rounded down: 640 x 427 becomes 383 x 256."""
    resize = v2.Resize(256, v2.InterpolationMode.BICUBIC, antialias=True)
    expected = v2.Compose([resize, v2.CenterCrop(224)])
    chance = random.Random(channels)
    sizes = [(427, 640), (640, 427), (333, 500), (256, 256), (224, 224), (150, 200), (256, 301)]
    for size in sizes + [(chance.randint(100, 400), chance.randint(100, 400)) for _ in range(10)]:
        image = noise(*size, channels)
        assert torch.equal(EvalTransform(224, None)(image), expected(image)), size


@pytest.mark.parametrize(
    ("img_size", "crop_pct", "cover"),
    [
        (224, None, (256, 256)),
        (32, None, (32, 32)),  # 1 at 32 pixels and below
        (28, None, (28, 28)),
        (33, None, (37, 37)),
        (224, 1.0, (224, 224)),
        (224, 0.5, (448, 448)),
        ((32, 224), None, (36, 256)),
        ((24, 32), None, (24, 32)),
        ((32, 48), 0.5, (64, 96)),
    ],
)
def test_what_is_covered_and_what_is_cut(img_size, crop_pct, cover):
    transform = EvalTransform(img_size, crop_pct)
    assert transform.cover == cover
    size = [img_size, img_size] if isinstance(img_size, int) else list(img_size)
    # an image of the covered size is only cut, one of twice its size is halved
    image = noise(*cover)
    assert torch.equal(transform(image), v2.functional.center_crop(image, size))
    flat = torch.full((1, 2 * cover[0], 2 * cover[1]), 77, dtype=torch.uint8)
    assert torch.equal(transform(flat), torch.full((1, *size), 77, dtype=torch.uint8))


@pytest.mark.parametrize("target", [224, 32, (32, 64), (64, 32)])
@pytest.mark.parametrize("source", [(1, 1), (1, 5000), (5000, 1), (2, 3), (31, 33), (100, 99)])
def test_the_size_is_always_that_of_the_model(source, target):
    size = (target, target) if isinstance(target, int) else target
    cut = EvalTransform(target, None)(noise(*source))
    assert (cut.shape, cut.dtype) == ((3, *size), torch.uint8)


def test_the_centre_of_a_long_image_is_what_counts():
    image = torch.zeros(1, 10, 5000, dtype=torch.uint8)
    image[..., 2495:2505] = 200
    assert (EvalTransform(10, 1.0)(image) == 200).all()
    assert (EvalTransform(10, 1.0)(image.transpose(1, 2)) == 200).all()


def tiny_vit(num_classes: int = 3) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=4,
        patch_size=2,
        in_chans=1,
        num_classes=num_classes,
        embed_dim=8,
        depth=1,
        num_heads=2,
        mlp_ratio=4.0,
        class_tokens=0,
        global_pool="avg",
    ).eval()


def features_of(
    source: ArraySource, rank: int = 0, world_size: int = 1, backbone=None, **more
) -> torch.Tensor:
    """Features of this process's share by `tiny_vit`, or by another backbone."""
    cfg = KnnConfig(**PIXELS | {"img_size": 4, "batch_size": 3} | more)
    data = LabelledData(source, source, [])
    found = compute_features(cfg, run_of(rank, world_size), backbone or tiny_vit(), data, 1.0)
    return found.train


def test_features_are_those_that_the_head_sees():
    source = Photographs(10)
    found = features_of(source, rank=1, world_size=2)
    expected = tiny_vit().forward_features((source.images[1::2].float() / 255 - 0.5) / 0.25)
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-5)
    assert (found.shape, found.dtype, found.requires_grad) == ((5, 8), torch.float32, False)
    half = features_of(source, rank=1, world_size=2, precision="bf16")
    assert half.dtype == torch.float32 and not torch.equal(half, found)
    assert features_of(source, rank=10, world_size=11).shape == (0, 8)  # it has no image


class Pixels(torch.nn.Module):
    """A backbone whose features are the pixels."""

    spec = SimpleNamespace(embed_dim=16)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def test_computed_features_are_in_memory_once():
    with LiveBytes() as live:
        found = features_of(Photographs(1001), backbone=Pixels(), batch_size=16)
    assert live.peak <= 2 * found.nbytes + 10 * 16 * 16 * 4  # of both splits, and some batches


ORIGIN = Origin("w.pth", None, "folder", "avg", 28, ["ä", "b"])


def some_features() -> Features:
    """Slices of larger tensors, as gathering them leaves."""
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    return Features(rows[:5], torch.arange(5), rows[5:8], torch.tensor([1, 0, 1]))


@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_features_survive_the_round_trip_unless_the_file_is_cut_off(tmp_path, kept):
    saved = some_features()
    path = save_features(tmp_path, saved, ORIGIN)
    for where in (path, tmp_path):
        loaded, origin = load_features(where)
        assert origin == ORIGIN
        assert all(torch.equal(one, other) for one, other in zip(loaded, saved, strict=True))
    assert list(tmp_path.iterdir()) == [path]
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    for where in (path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=f"load_path: {where}"):
            load_features(where)


FACTS = json.dumps(ORIGIN._asdict())
BROKEN = {  # tensors less or more than those of features, and metadata
    "one tensor missing": (["val"], [], {"facts": FACTS}),
    "one tensor too many": ([], ["head"], {"facts": FACTS}),
    "no metadata": ([], [], None),
    "metadata of others": ([], [], {"format": "pt"}),
    "no JSON": ([], [], {"facts": "{"}),
    "an empty origin": ([], [], {"facts": "{}"}),
    "an origin that is a list": ([], [], {"facts": "[]"}),
}


@pytest.mark.parametrize(("less", "more", "metadata"), BROKEN.values(), ids=BROKEN)
def test_other_files_are_no_features(tmp_path, less, more, metadata):
    names = (set(Features._fields) | set(more)) - set(less)
    path = tmp_path / FEATURES_FILE
    save_file({name: torch.zeros(1, 2) for name in names}, path, metadata)
    with pytest.raises(InputError, match=f"load_path: {path}"):
        load_features(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    # as a full disk, an error of the file and not of the folder
    (tmp_path / f"{FEATURES_FILE}.tmp").mkdir()
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=f"save_path {folder}"):
            save_features(folder, some_features(), ORIGIN)


PROBE = {"protocol": "attentive classification", "num_train": 3600, "num_samples": 1000}
RESULTS = {
    "knn": {"acc1": 97.45, "k": 10, "num_train": 4000, "num_samples": 1000},
    "knn_untrained": {"acc1": 8.0, "k": 10, "num_train": 4000, "num_samples": 1000},
    "lincls": PROBE | {"acc1": 93.333, "lr": 0.1},
    "lincls_untrained": PROBE | {"acc1": 60.5, "lr": 3.0},
    "finetune": {"acc1": 100.0, "num_train": 4000, "num_samples": 1000},
    "finetune_untrained": {"acc1": 91.254, "num_train": 4000, "num_samples": 1000},
}


def test_results_are_json_for_people_and_written_whole(tmp_path):
    path = tmp_path / "results.json"
    results = {"acc1": 97.45, "loss": None, "per_class": {"ä": 1.0}, "curve": [1, 2]}
    for _ in range(2):  # the second one over an older one
        write_results(path, results)
    text = path.read_text(encoding="utf-8")
    assert text.startswith('{\n  "acc1": 97.45,\n') and '"ä"' in text
    assert read_results(path) == results and list(tmp_path.iterdir()) == [path]


def test_the_table_of_results(tmp_path, capsys):
    for name, results in RESULTS.items():
        (tmp_path / name).mkdir()
        write_results(tmp_path / name / "results.json", results)
    table = results_table.main([str(tmp_path)])
    assert table == {
        "knn": {"pretrained": 97.45, "untrained": 8.0},
        "lincls": {"pretrained": 93.333, "untrained": 60.5},
        "finetune": {"pretrained": 100.0, "untrained": 91.254},
    }
    lines = capsys.readouterr().out.splitlines()
    assert "93.33" in lines[2] and "3,600 / 1,000" in lines[2] and len(lines) == 4
    assert lines[2].startswith("attentive, lr 0.1, top-1 ")
    fit = {name: value for name, value in RESULTS["lincls"].items() if name != "lr"}
    fit["protocol"] = "logistic regression by L-BFGS"
    write_results(tmp_path / "lincls" / "results.json", fit)
    results_table.main([str(tmp_path)])
    assert "logistic regression by L-BFGS, top-1" in capsys.readouterr().out
    (tmp_path / "lincls_untrained" / "results.json").unlink()
    with pytest.raises(InputError, match=f"{tmp_path}/lincls_untrained/results.json"):
        results_table.main([str(tmp_path)])
    assert capsys.readouterr().out == ""
