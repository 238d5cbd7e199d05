"""`tools/benchmark.py`: what it counts is right, and every part runs and says its figures (on tiny
shapes here)."""

import json
import sys
from unittest.mock import Mock

import pytest
import torch
from packs import pack
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import util
from engine.optim import optimizer_step
from models.build import build_model, mae_spec
from tools import benchmark
from tools.benchmarks import evaluation, loader, memory, step, timing
from tools.benchmarks.step import SHAPES, Shape
from util.errors import InputError
from util.settings.pretrain import MAEConfig

# A checkout of the public MAE code as far as the benchmark uses it, with its own `util`.
PUBLIC_MAE = """
from util.public_positions import cosines
from models.mae import MaskedAutoencoder
from torch import nn


class MaskedAutoencoderViT(nn.Module):
    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=1024, depth=24,
                 num_heads=16, decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16,
                 mlp_ratio=4., norm_layer=nn.LayerNorm, norm_pix_loss=False):
        super().__init__()
        assert cosines() == 1 and norm_layer(4).eps == 1e-6
        self.model = MaskedAutoencoder(
            img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim,
            depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, class_tokens=1,
            decoder_embed_dim=decoder_embed_dim, decoder_depth=decoder_depth,
            decoder_num_heads=decoder_num_heads, decoder_class_token=True, mask_ratio=0.75,
            norm_pix_loss=norm_pix_loss,
        )

    def forward(self, imgs, mask_ratio=0.75):
        assert mask_ratio == 0.75
        return self.model(imgs), None, None
"""
SMALL = {"size": "debug", "img_size": 32, "decoder_embed_dim": 16, "decoder_num_heads": 2}
TINY = Shape(mae_spec(MAEConfig(patch_size=8, decoder_depth=1, **SMALL)), 4, 4)
DEEP = Shape(mae_spec(MAEConfig(patch_size=4, decoder_depth=4, depth=4, **SMALL)), 4, 4)


@pytest.fixture
def small_shapes(monkeypatch):
    """The table of shapes, to put small ones in; products are small and rounds short, too."""
    monkeypatch.setattr(step, "SIDES", {"cpu": (32, 64)})
    monkeypatch.setattr(step, "LEAST", 0.0)
    monkeypatch.setattr(benchmark, "SHAPES", dict(SHAPES))
    return benchmark.SHAPES


@pytest.fixture
def public_mae(tmp_path, monkeypatch):
    """A checkout of the public MAE code, whose imports leave nothing behind."""
    folder = tmp_path / "public_mae"
    (folder / "util").mkdir(parents=True)
    (folder / "models_mae.py").write_text(PUBLIC_MAE)
    (folder / "util/public_positions.py").write_text("def cosines(): return 1\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(util, "__path__", [*util.__path__])
    yield folder
    for name in ("models_mae", "util.public_positions"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "gflops"), [("small/16", 9.2), ("base/16", 57.8), ("192/4 at 32", 0.65)]
)
def test_flops_of_the_three_steps(name, gflops):
    """Forward and backward of one image, as counted by hand."""
    assert abs(step.step_flops(SHAPES[name].spec) / 1e9 / gflops - 1) < 0.03


def test_live_bytes_are_those_of_tensors_alive_at_once():
    kept = torch.zeros(1000)  # made before: not counted
    with memory.LiveBytes() as live:
        a = torch.ones(100)  # 400 bytes
        view = a[:50]  # none
        b = a + kept[:100]  # 800
        del a, view
        c = torch.cat([b, b])  # 400 + 800
        del b
        c.add_(1)
        kept.add_(1)
    assert (live.peak, live.live) == (1200, 800)
    del c
    assert live.live == 0


def test_activations_fall_with_checkpointing_and_are_the_same_every_time(small_shapes):
    small_shapes["base/16"] = DEEP
    tables = benchmark.main(["memory", "--device", "cpu", "--batch", "3"])
    assert set(tables) <= {"base/16, fp32", "base/16, bf16"}
    table = tables["base/16, fp32"]
    assert set(table) == {"ours", "ours checkpointing", *step.TRANSFORMERS}
    held = {name: row["activations_mib"] for name, row in table.items()}
    assert {row["batch"] for row in table.values()} == {3}
    assert held["ours checkpointing"] < 0.5 * held["ours"]
    for name, row in table.items():
        assert row["over_ours"] == held[name] / held["ours"]
    again = benchmark.main(["memory", "--device", "cpu", "--batch", "3", "--precision", "fp32"])
    assert again == {"base/16, fp32": table}


def test_variants_take_turns_and_the_first_round_does_not_count():
    order = []
    variants = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = timing.interleaved(variants, 3)
    assert order == ["a", "b"] * 4 and [len(s) for s in seconds.values()] == [3, 3]
    assert timing.ratio({"slow": [4.0, 9.0, 2.0], "fast": [2.0, 3.0, 2.0]}, "slow", "fast") == 2.0


def test_a_short_variant_runs_several_times_in_a_round(monkeypatch):
    """Here the clock shows what the device has done, of which it does a second when it is waited
    for."""
    clock = {"queued": 0, "done": 0}

    def work():
        clock["queued"] += 1

    def synchronize():
        clock["done"], clock["queued"] = clock["done"] + clock["queued"], 0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock["done"] / 10)
    assert timing.interleaved({"a": work}, 2, 0.25, synchronize) == {"a": pytest.approx([0.1] * 2)}
    assert clock["done"] == 1 + 2 * 3


def flops_and_loss(model, masks):
    """Of a step of a model on one batch, in fp32."""
    images, ids_shuffle = step.draw_inputs(TINY.spec, 2)
    loss_of = step.loss_fn_of(model, images, masks or ids_shuffle, "fp32")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = loss_of()
        loss.backward()
    return counter.get_total_flops(), loss.item()


def test_the_peers_are_the_same_model(public_mae):
    """They have as many parameters, and need as many FLOPs but for what we spare: the embedding of
    removed patches, and the head on kept ones."""
    builders = step.builders_of(TINY.spec, public_mae)
    assert list(builders) == ["ours", *step.TRANSFORMERS, "public code"]
    sizes, found = {}, {}
    for name, build in builders.items():
        model = build()
        sizes[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found[name] = flops_and_loss(model, 0.75 if name == "public code" else None)
    assert len(set(sizes.values())) == 1
    for flops, loss in found.values():
        assert 1 <= flops / found["ours"][0] < 1.4
        assert 0.5 < loss < 3  # of a normalised target


def test_a_step_is_that_of_training(monkeypatch):
    """A fused optimiser with decay takes the gradient of the loss, and it is gone afterwards."""
    model, taken = build_model(TINY.spec), {}
    images, ids_shuffle = step.draw_inputs(TINY.spec, 4)
    loss_of = step.loss_fn_of(model, images, ids_shuffle, "bf16")
    (right,) = torch.autograd.grad(loss_of(), model.cls_token)

    def take(optimizer, scaler, clip_grad):
        taken.update(optimizer.defaults, grad=model.cls_token.grad, clip_grad=clip_grad)
        return optimizer_step(optimizer, scaler, clip_grad)

    monkeypatch.setattr(step, "optimizer_step", take)
    step.step_of(model, loss_of)()
    assert taken["grad"].equal(right) and taken["fused"] and taken["clip_grad"] is None
    assert model.cls_token.grad is None


def test_step_gives_rates_ratios_and_the_share_of_the_peak(
    small_shapes, monkeypatch, public_mae, tmp_path, capsys
):
    small_shapes["192/4 at 32"] = TINY
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    arguments = ["step", "--shapes", "192/4 at 32", "--rounds", "1", "--device", "cpu"]
    file = tmp_path / "f.json"
    tables = benchmark.main([*arguments, "--public_mae", str(public_mae), "--json", str(file)])
    printed = capsys.readouterr()
    record = json.loads(file.read_text())
    assert record["figures"] == tables and torch.__version__ in record["machine"]
    assert list(tables) == ["192/4 at 32, fp32", "192/4 at 32, bf16"]
    peers = (*step.TRANSFORMERS, "public code")
    for title, table in tables.items():
        assert set(table) == {"ours", "ours cross", *peers, "matrix product"}
        assert title in printed.out
        peak = table["matrix product"]["gflops"]
        rates = {name: row["images_per_s"] for name, row in table.items() if "batch" in row}
        for name, rate in rates.items():
            assert printed.err.count(f"\n{name}: the first step took") == len(tables)
            row = table[name]
            assert row["batch"] == TINY.batch
            assert row["share_of_peak"] == pytest.approx(rate * row["gflop_per_image"] / peak)
        assert table["ours"]["gflop_per_image"] == step.step_flops(TINY.spec) / 1e9
        # of one round, and of this table alone
        fastest = max(rates[name] for name in step.TRANSFORMERS)
        assert table["ours"]["over_transformers"] == pytest.approx(rates["ours"] / fastest)
        assert table["ours"]["over_public_code"] == pytest.approx(
            rates["ours"] / rates["public code"]
        )
        assert table["ours cross"]["over_ours"] == pytest.approx(
            rates["ours cross"] / rates["ours"]
        )
    of_ours = [line for line in printed.out.splitlines() if line.startswith("ours ")]
    assert f"{tables['192/4 at 32, fp32']['ours']['over_transformers']:,.2f}" in of_ours[0]


def test_what_cannot_be_measured_is_left_out_with_a_line(small_shapes, monkeypatch, capsys):
    """bf16 where a CPU is slow at it, a model that needs too much memory, transformers that are not
    installed."""
    small_shapes["base/16"] = TINY
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    monkeypatch.setattr(step.importlib.util, "find_spec", lambda _: None)
    placed = step.placed

    def placed_or_not(build, *args, **kwargs):
        if build.args[0].decoder == "cross":
            raise torch.OutOfMemoryError("17 GiB are asked for\nand more")
        return placed(build, *args, **kwargs)

    monkeypatch.setattr(step, "placed", placed_or_not)
    tables = benchmark.main(["step", "--shapes", "base/16", "--rounds", "1", "--device", "cpu"])
    assert list(tables) == ["base/16, fp32"]
    assert set(tables["base/16, fp32"]) == {"ours", "matrix product"}
    said = capsys.readouterr().err.splitlines()
    assert "base/16, bf16 is left out: this cpu is slow at it" in said
    assert "ours cross is left out: OutOfMemoryError: 17 GiB are asked for" in said


@pytest.mark.long
def test_compiled_models_are_compared_with_compiled_ones(small_shapes):
    small_shapes["base/16"] = TINY
    arguments = ["--shapes", "base/16", "--rounds", "1", "--device", "cpu", "--precision", "fp32"]
    table = benchmark.main(["step", *arguments, "--compiled"])["base/16, fp32"]
    rates = {name: row["images_per_s"] for name, row in table.items() if "batch" in row}
    eager = ["ours", "ours cross", *step.TRANSFORMERS]
    assert set(rates) == {*eager, *(f"{name} compiled" for name in eager)}
    fastest = max(rates[f"{name} compiled"] for name in step.TRANSFORMERS)
    over = table["ours compiled"]["over_transformers"]
    assert over == pytest.approx(rates["ours compiled"] / fastest)


def test_loader_compares_the_same_images(tmp_path, data, monkeypatch):
    places = ["--images", str(data), "--packed", str(pack(data, tmp_path / "packed"))]
    monkeypatch.setattr(loader, "BATCHES", 1)
    monkeypatch.setattr(loader, "available_cores", lambda: 2)
    tables = benchmark.main(["loader", *places, "--rounds", "1"])
    assert list(tables) == ["one core", "2 processes"]
    for table in tables.values():
        assert set(table) == {"pillow", "folder", "packed"}
        pillow = table["pillow"]["images_per_s"]
        for name in ("folder", "packed"):
            assert table[name]["over_pillow"] == pytest.approx(table[name]["images_per_s"] / pillow)


@pytest.mark.long
def test_two_processes_are_timed_beside_one(monkeypatch):
    monkeypatch.setitem(SHAPES, "small/16", TINY)
    (table,) = benchmark.main(["processes", "--rounds", "1"]).values()
    one, two = table.values()
    over = two["images_per_s"] / one["images_per_s"]
    assert two["over_one"] == pytest.approx(over)  # of one round


def test_the_evaluations_are_timed():
    """Small here; one search for four numbers of neighbours beside four of them."""
    together, _ = evaluation.benchmark_knn(3, num_train=5000, width=32).values()
    assert together["over_apart"] > 1.2
    table = evaluation.benchmark_probe(1, "debug", 4)
    for kind in ("linear", "attentive"):
        one, thirteen = table[f"{kind}, 1 rate"], table[f"{kind}, 13 rates"]
        over = one["images_per_s"] / thirteen["images_per_s"]
        assert thirteen["time_over_1_rate"] == pytest.approx(over)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["step", "--device", "cuda"], "device cuda was asked for and this machine has 0 of them"),
        (["step", "--public_mae", "nowhere"], "nowhere is no checkout of the public MAE code"),
        (
            ["memory", "--public_mae", "old"],
            "ImportError: cannot import name 'Nothing' from 'timm'",
        ),
        (["step", "--batch", "0"], "batch must be 1 or more"),
        (["step", "--precision", "fp64"], "invalid choice: 'fp64'"),
        (["loader"], "loader needs photographs: give --images FOLDER"),
        (["loader", "--images", "nowhere"], "nowhere: No such file"),
        (["step", "--rounds", "0"], "rounds must be 1 or more"),
        (["step", "--shapes", "huge"], "invalid choice: 'huge'"),
        (["speed"], "invalid choice: 'speed'"),
        (["knn", "--json", "nowhere/f.json"], "cannot be written"),
    ],
)
def test_bad_input_is_one_clear_line_before_anything_is_measured(
    flags, words, monkeypatch, tmp_path
):
    """`old` is a checkout that does not go with the installed timm."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old/models_mae.py").write_text("from timm import Nothing")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for part in ("step", "memory", "knn"):
        monkeypatch.setattr(benchmark, f"benchmark_{part}", Mock(side_effect=AssertionError))
    with pytest.raises(InputError, match=words):
        benchmark.main(flags)
