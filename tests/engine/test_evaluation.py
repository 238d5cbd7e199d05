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
from torch import multiprocessing
from torch.nn import functional as F
from torchvision.transforms import v2

from data.images import BadImageError
from data.loader import build_eval_loader
from data.sources import ArraySource
from data.transforms import EvalTransform, PixelNormalizer
from engine.evaluation.classification import Scores, evaluate
from engine.evaluation.features import (
    FEATURES_FILE,
    Features,
    Origin,
    compute_features,
    load_features,
    save_features,
)
from engine.run.folder import Run
from engine.run.records import Records, read_results, write_results
from models.vit import VisionTransformer
from tools import results_table
from tools.benchmarks.memory import LiveBytes
from util.dist import Processes, gather_rows, init_processes
from util.errors import InputError
from util.settings.evaluation import KnnConfig

CPU = torch.device("cpu")
PLAIN = PixelNormalizer((0.0,), (1 / 255,), CPU)  # leaves pixel values as they are


def identity(image: torch.Tensor) -> torch.Tensor:
    return image


def batches_of(labels: list[int], sizes: list[int]) -> list[SimpleNamespace]:
    """Image i is one pixel of value i."""
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    parts = zip(images.split(sizes), torch.tensor(labels).split(sizes), strict=True)
    return [SimpleNamespace(images=some, targets=of_some, bad=[]) for some, of_some in parts]


def scores_of(logits: torch.Tensor, labels: list[int], sizes: list[int]) -> list[Scores]:
    """`logits` `(n, C)` or `(H, n, C)` are what the classifier answers for each image."""
    heads = 1 if logits.ndim == 2 else len(logits)

    def classify(images: torch.Tensor) -> torch.Tensor:
        return logits[..., images.flatten().long(), :]

    return evaluate(classify, batches_of(labels, sizes), PLAIN, None, logits.shape[-1], heads)


def test_four_images_by_hand():
    logits = torch.tensor(
        [
            [6.0, 5.0, 4.0, 3.0, 2.0, 1.0],  # label 0: first
            [6.0, 5.0, 4.0, 3.0, 2.0, 1.0],  # label 4: the fifth counts among five
            [6.0, 5.0, 4.0, 3.0, 2.0, 1.0],  # label 5: the sixth does not
            [1.0, 1.0, 1.0, 1.0, 1.0, 9.0],  # label 5: first
        ]
    )
    (scores,) = scores_of(logits, [0, 4, 5, 5], [3, 1])
    log_sum = math.log(sum(math.exp(x) for x in range(1, 7)))
    last = math.log(5 * math.exp(1) + math.exp(9)) - 9
    assert scores.loss == pytest.approx(
        (log_sum - 6 + log_sum - 2 + log_sum - 1 + last) / 4, abs=1e-6
    )
    assert (scores.num_samples, scores.correct1, scores.correct5) == (4, 2, 3)
    assert (scores.acc1, scores.acc5) == (50.0, 75.0)
    assert scores.class_correct == [1, 0, 0, 0, 0, 1]
    assert scores.class_total == [1, 0, 0, 0, 1, 2]
    names = ("num_samples", "correct1", "correct5", "acc1", "acc5", "loss")
    assert scores.as_dict() == {name: getattr(scores, name) for name in names}
    per_class = scores.as_dict(["a", "b", "c", "d", "e", "f"])["per_class"]
    assert per_class == {"a": 100.0, "b": None, "c": None, "d": None, "e": 0.0, "f": 50.0}


def test_the_loss_is_weighted_by_image_and_not_by_batch():
    logits = torch.zeros(4, 6)
    logits[3, 2] = 1000.0  # no loss, alone in its batch
    for sizes in ([3, 1], [1, 3], [4], [1, 1, 1, 1]):
        (scores,) = scores_of(logits, [0, 1, 2, 2], sizes)
        assert scores.loss == pytest.approx(0.75 * math.log(6), abs=1e-6)  # not half of it


@pytest.mark.parametrize("num_classes", [2, 5])
def test_up_to_five_classes_are_always_among_five(num_classes):
    logits = torch.arange(float(num_classes)).expand(3, -1)  # the last is first
    (scores,) = scores_of(logits, [0, 1, num_classes - 1], [2, 1])
    assert (scores.correct1, scores.correct5) == (1 + (num_classes == 2), 3)


def test_several_heads_score_as_each_alone():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 50, 7, generator=generator)
    labels = torch.randint(7, (50,), generator=generator).tolist()
    together = scores_of(logits, labels, [20, 20, 10])
    assert together == [scores_of(of_head, labels, [20, 20, 10])[0] for of_head in logits]
    assert len({scores.correct1 for scores in together}) > 1
    for scores, of_head in zip(together, logits, strict=True):
        assert scores.correct1 == (of_head.argmax(1) == torch.tensor(labels)).sum()
        ranks = (of_head > of_head.gather(1, torch.tensor(labels)[:, None])).sum(1)
        assert scores.correct5 == (ranks < 5).sum()
        assert scores.loss == pytest.approx(
            F.cross_entropy(of_head, torch.tensor(labels)).item(), rel=1e-6
        )
        assert (sum(scores.class_correct), sum(scores.class_total)) == (scores.correct1, 50)


def test_a_diverged_head_has_no_loss_and_spoils_no_other():
    logits = torch.zeros(2, 4, 3)
    logits[0, 2, 2] = float("nan")  # which topk takes for the largest, and 2 is the right class
    diverged, healthy = scores_of(logits, [0, 1, 2, 0], [2, 2])
    assert (diverged.class_correct[2], diverged.correct5, healthy.correct5) == (0, 3, 4)
    assert math.isnan(diverged.loss)
    assert diverged.as_dict()["loss"] is None
    assert healthy.as_dict()["loss"] == pytest.approx(math.log(3))
    json.dumps(diverged.as_dict(), allow_nan=False)


def test_autocast_and_no_gradient():
    weight = torch.ones(1, 3, requires_grad=True)
    seen = []

    def classify(images: torch.Tensor) -> torch.Tensor:
        logits = F.linear(images.flatten(1), weight.T)
        seen.append((logits.dtype, logits.requires_grad))
        return logits

    evaluate(classify, batches_of([0, 1], [2]), PLAIN, torch.bfloat16, 3)
    evaluate(classify, batches_of([0, 1], [2]), PLAIN, None, 3)
    assert seen == [(torch.bfloat16, False), (torch.float32, False)]


class Photographs(ArraySource):
    """Noise of four classes, of which the images `broken` cannot be decoded."""

    def __init__(self, count: int, broken: tuple[int, ...] = ()):
        chance = np.random.default_rng(count)
        images = chance.integers(0, 256, (count, 1, 4, 4), dtype=np.uint8)
        super().__init__("noise", images, chance.integers(0, 9, count), 1)
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
    source, seen = Photographs(count), 0
    for rank in range(world_size):
        share = torch.tensor(range(rank, count, world_size), dtype=torch.long)
        loader = build_eval_loader(source, identity, batch_size, rank, world_size, loading(0))
        assert len(loader) == math.ceil(len(share) / batch_size)
        for batch, expected in zip(loader, share.split(batch_size), strict=bool(len(share))):
            assert (batch.images.dtype, batch.bad) == (torch.uint8, [])
            assert torch.equal(batch.images, torch.as_tensor(source.images)[expected])
            assert batch.targets.tolist() == source.labels[expected.numpy()].tolist()
            seen += len(expected)
    assert seen == count


def answers(images: torch.Tensor) -> torch.Tensor:
    """Two fixed linear classifiers of nine classes, `(2, B, 9)`."""
    weights = torch.randn(2, 16, 9, generator=torch.Generator().manual_seed(1))
    return images.flatten(1) / 255 @ weights


def test_a_file_that_cannot_be_decoded_stops_the_evaluation():
    source, sizes = Photographs(10, broken=(4,)), []

    def classify(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return answers(images)

    with pytest.raises(InputError, match=r"noise\[4\]"):
        evaluate(
            classify, build_eval_loader(source, identity, 2, 0, 1, loading(0)), PLAIN, None, 9, 2
        )
    assert sizes == [2, 2]
    assert source.reads == [0, 1, 2, 3, 4, 5]  # no replacement is read
    with pytest.raises(InputError, match=r"noise\[4\]"):
        features_of(source, batch_size=2)


COUNTS = (1, 7, 100)


def errors_of(rank: int, world_size: int, broken: tuple[int, ...]) -> str:
    loader = build_eval_loader(Photographs(7, broken), identity, 2, rank, world_size, loading(0))
    try:
        evaluate(answers, loader, PLAIN, None, 9, 2)
    except InputError as error:
        return str(error)
    return ""


def work(rank: int, world_size: int) -> dict:
    """Everything that crosses processes, by name; all processes must come to the same."""
    found = {}
    for count in COUNTS:
        loader = build_eval_loader(Photographs(count), identity, 3, rank, world_size, loading(0))
        scores = evaluate(answers, loader, PLAIN, None, 9, 2)
        found[f"scores of {count}"] = [
            (s.correct1, s.correct5, s.class_correct, s.class_total) for s in scores
        ]
        found[f"losses of {count}"] = [s.loss for s in scores]
        rows = torch.randn(count, 3, 2, generator=torch.Generator().manual_seed(count))
        for name, of_all in (("rows", rows), ("numbers", torch.arange(count))):
            found[f"{name} of {count}"] = gather_rows(of_all[rank::world_size], count).tolist()
    found["errors"] = [
        errors_of(rank, world_size, broken) for broken in ((0,), (5,), (3, 5), (0, 1, 2), ())
    ]
    return found


def process(rank: int, world_size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = (rank, world_size, rank, world_size, "127.0.0.1", port)
    os.environ |= dict(zip(names, map(str, values), strict=True))
    with init_processes("cpu") as processes:
        found = work(processes.rank, processes.world_size)
    Path(f"{folder}/{rank}.json").write_text(json.dumps(found))


@pytest.mark.long
@pytest.mark.parametrize("world_size", [2, 3])
def test_gloo_processes_come_to_the_same_as_one(tmp_path, world_size):
    """With 1, 7 and 100 images: fewer than processes, and shares of unequal length."""
    expected = json.loads(json.dumps(work(0, 1)))
    multiprocessing.spawn(process, (world_size, free_port(), str(tmp_path)), nprocs=world_size)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world_size)]
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


def imagenet_transform() -> v2.Compose:
    return v2.Compose(
        [v2.Resize(256, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(224)]
    )


def test_any_size_of_image_is_resized_and_cut_as_by_torchvision():
    """The public code's long side is rounded down: 640 x 427 becomes 383 x 256."""
    chance = random.Random(0)
    sizes = [(427, 640), (640, 427), (333, 500), (256, 256), (224, 224), (150, 200), (256, 301)]
    sizes += [(chance.randint(100, 400), chance.randint(100, 400)) for _ in range(20)]
    for size in sizes:
        image = noise(*size, channels=1 + 2 * (size[0] % 2))
        assert torch.equal(EvalTransform(224, None)(image), imagenet_transform()(image)), size


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
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    # an image of the covered size is only cut, one of twice its size is halved
    image = noise(*cover)
    assert torch.equal(transform(image), v2.functional.center_crop(image, list(size)))
    flat = torch.full((1, 2 * cover[0], 2 * cover[1]), 77, dtype=torch.uint8)
    assert torch.equal(transform(flat), torch.full((1, *size), 77, dtype=torch.uint8))


@pytest.mark.parametrize("target", [224, 32, (32, 64), (64, 32)])
@pytest.mark.parametrize("source", [(1, 1), (1, 5000), (5000, 1), (2, 3), (31, 33), (100, 99)])
def test_the_size_is_always_that_of_the_model(source, target):
    size = (target, target) if isinstance(target, int) else target
    for channels in (1, 3):
        cut = EvalTransform(target, None)(noise(*source, channels=channels))
        assert (cut.shape, cut.dtype) == ((channels, *size), torch.uint8)


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
        class_token=False,
        global_pool="avg",
    ).eval()


def features_of(
    source: ArraySource, batch_size: int = 3, rank: int = 0, world_size: int = 1, **more
) -> torch.Tensor:
    """Features of this process's share by `tiny_vit`, or by another `backbone`."""
    backbone = more.pop("backbone", None) or tiny_vit()
    pixels = {"mean": (0.5,), "std": (0.25,), "img_size": 4, "num_workers": 0}
    cfg = KnnConfig(**{"batch_size": batch_size, "output_dir": "nowhere", **pixels, **more})
    processes = Processes(rank, world_size, rank, world_size, CPU)
    run = Run(Path("nowhere"), processes, Records(Path("nowhere"), is_main=False))
    return compute_features(cfg, run, backbone, source, 1.0)


def test_features_are_those_that_the_head_sees():
    source = Photographs(10)
    found = features_of(source, rank=1, world_size=2, precision="fp32")
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
        found = features_of(Photographs(1001), 16, backbone=Pixels(), precision="fp32")
    assert live.peak <= found.nbytes + 10 * 16 * 16 * 4  # and some batches


def test_features_that_are_not_finite_are_refused():
    """Neighbours among NaNs are meaningless, and nothing in the accuracy would say so."""
    model = tiny_vit()
    with torch.no_grad():
        model.fc_norm.bias[3] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        features_of(Photographs(5), backbone=model)


ORIGIN = Origin("w.pth", None, "folder", "avg", 28, ["ä", "b"])


def some_features() -> Features:
    """Slices of larger tensors, as gathering them leaves."""
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    return Features(rows[:5], torch.arange(5), rows[5:8], torch.tensor([1, 0, 1]))


def test_features_survive_the_round_trip(tmp_path):
    saved = some_features()
    path = save_features(tmp_path / "new/folder", saved, ORIGIN)
    for where in (path, path.parent):
        loaded, origin = load_features(where)
        assert origin == ORIGIN
        assert all(torch.equal(one, other) for one, other in zip(loaded, saved, strict=True))
    assert [file.name for file in path.parent.iterdir()] == [FEATURES_FILE]


FACTS = json.dumps(vars(ORIGIN))
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
    with pytest.raises(InputError, match=f"load_path {path}"):
        load_features(tmp_path)


@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_no_features(tmp_path, kept):
    path = save_features(tmp_path, some_features(), ORIGIN)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(InputError, match=f"load_path {path}"):
        load_features(path)
    with pytest.raises(InputError, match="load_path .*nowhere"):
        load_features(tmp_path / "nowhere")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    blocked = tmp_path / "blocked"
    # as a full disk, an error of the file and not of the folder
    (blocked / f"{FEATURES_FILE}.tmp").mkdir(parents=True)
    for folder in (tmp_path / "file", blocked):
        with pytest.raises(InputError, match=f"save_path {folder}"):
            save_features(folder, some_features(), ORIGIN)


RESULTS = {
    "knn": {"acc1": 97.45, "k": 10, "num_train": 4000, "num_samples": 1000},
    "knn_untrained": {"acc1": 8.0, "k": 10, "num_train": 4000, "num_samples": 1000},
    "lincls": {"acc1": 93.333, "lr": 0.1, "num_train": 3600, "num_samples": 1000},
    "lincls_untrained": {"acc1": 60.5, "lr": 3.0, "num_train": 3600, "num_samples": 1000},
    "finetune": {"acc1": 100.0, "num_train": 4000, "num_samples": 1000},
    "finetune_untrained": {"acc1": 91.254, "num_train": 4000, "num_samples": 1000},
}


def test_results_are_json_for_people_and_written_whole(tmp_path):
    path = tmp_path / "results.json"
    results = {"acc1": 97.45, "loss": None, "per_class": {"ä": 1.0}, "curve": [1, 2]}
    write_results(path, results)
    write_results(path, results)  # over an older one
    assert read_results(path) == results
    assert path.read_text(encoding="utf-8").startswith('{\n  "acc1": 97.45,\n')
    assert '"ä"' in path.read_text(encoding="utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


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
    (tmp_path / "lincls_untrained" / "results.json").unlink()
    with pytest.raises(InputError, match=f"{tmp_path}/lincls_untrained/results.json"):
        results_table.main([str(tmp_path)])
    assert capsys.readouterr().out == ""
