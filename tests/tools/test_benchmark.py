"""`tools/benchmark.py`: what it counts is right, and every part runs and says its figures (on tiny
shapes here)."""

import json

import pytest
import torch
from conftest import ROOT
from packs import pack

from models.build import build_model, mae_spec
from tools import benchmark
from tools.benchmarks import evaluation, memory, step, timing
from tools.benchmarks.step import SHAPES, Shape
from util.errors import InputError
from util.settings.pretrain import MAEConfig

SMALL = {"size": "debug", "img_size": 32, "decoder_embed_dim": 16, "decoder_num_heads": 2}
TINY = Shape(4, mae_spec(MAEConfig(patch_size=8, decoder_depth=1, **SMALL)))
DEEP = Shape(4, mae_spec(MAEConfig(patch_size=4, decoder_depth=4, depth=4, **SMALL)))


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


def test_activations_fall_with_checkpointing_and_are_the_same_every_time(monkeypatch):
    monkeypatch.setitem(SHAPES, "base/16", DEEP)
    found = benchmark.main(["memory"])["base/16"]
    peaks = found["activations_mib"]
    assert set(peaks) == {"ours bf16", "ours bf16 checkpointing", "peer fp32"}
    assert peaks["ours bf16 checkpointing"] < 0.5 * peaks["ours bf16"]
    assert found["activations_over_peer"]["ours bf16"] == peaks["ours bf16"] / peaks["peer fp32"]
    assert benchmark.main(["memory"])["base/16"]["activations_mib"] == peaks


def test_variants_take_turns_and_the_first_round_does_not_count():
    order = []
    variants = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = timing.interleaved(variants, 3)
    assert order == ["a", "b"] * 4 and [len(s) for s in seconds.values()] == [3, 3]
    assert timing.ratio({"slow": [4.0, 9.0, 2.0], "fast": [2.0, 3.0, 2.0]}, "slow", "fast") == 2.0


def test_the_peer_is_the_same_model():
    models = [build_model(TINY.spec), *step.build_peers(TINY.spec, {"peer": "eager"}).values()]
    ours, theirs = (
        sum(p.numel() for p in model.parameters() if p.requires_grad) for model in models
    )
    assert ours == theirs


def test_step_gives_rates_ratios_and_the_share_of_the_peak(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SHAPES, "base/16", TINY)
    arguments = ["step", "--shapes", "base/16", "--rounds", "1"]
    found = benchmark.main([*arguments, "--json", str(tmp_path / "f.json")])
    written = (tmp_path / "f.json").read_text()
    assert json.loads(written) == found and written in capsys.readouterr().out
    found, ours = found["base/16"], {"ours bf16", "ours cross bf16"}
    rates = found["images_per_s"]
    assert set(rates) == ours | set(step.PEERS) and len(step.PEERS) == 4
    share = rates["ours bf16"] * step.step_flops(TINY.spec) / found["peak_gflops"] / 1e9
    assert found["share_of_peak"] == pytest.approx(share)
    fastest = max(rates["peer fp32 sdpa"], rates["peer fp32 eager"])
    assert found["over_peer_fp32"] == pytest.approx(rates["ours bf16"] / fastest)  # of one round

    monkeypatch.setattr(step, "build_peers", lambda *_: {})  # transformers is not installed
    found = benchmark.main(arguments)["base/16"]
    assert set(found["images_per_s"]) == ours and "over_peer_fp32" not in found
    assert benchmark.main(["memory"])["base/16"]["activations_over_peer"] == {}


def test_loader_compares_the_same_images(tmp_path, data):
    places = ["--images", str(data), "--packed", str(pack(data, tmp_path / "packed"))]
    found = benchmark.main(["loader", *places, "--rounds", "1"])["one core"]
    pillow = found["images_per_s"].pop("pillow")
    over = {name: rate / pillow for name, rate in found["images_per_s"].items()}
    assert set(over) == {"folder", "packed"} and found["over_pillow"] == pytest.approx(over)


@pytest.mark.long
def test_two_processes_are_timed_beside_one(monkeypatch):
    monkeypatch.setitem(SHAPES, "small/16", TINY)
    found = benchmark.main(["processes", "--rounds", "1"])["small/16"]
    one, two = found["images_per_s"].values()
    assert found["two_over_one"] == pytest.approx(two / one)  # of one round


def test_the_evaluations_are_timed():
    """Small here; one search for four numbers of neighbours beside four of them."""
    assert evaluation.benchmark_knn(3, num_train=5000, width=32)["gain"] > 1.2
    found = evaluation.benchmark_probe(1, "debug", 4)
    one, thirteen = found["images_per_s"].values()
    assert found["time_of_13_over_1"] == pytest.approx(one / thirteen)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["loader"], "loader needs photographs: give --images FOLDER"),
        (["loader", "--images", "nowhere"], "nowhere: No such file"),
        (["step", "--rounds", "0"], "rounds must be 1 or more"),
        (["step", "--shapes", "huge"], "invalid choice: 'huge'"),
        (["speed"], "invalid choice: 'speed'"),
        (["knn", "--json", "nowhere/f.json"], "cannot be written"),
    ],
)
def test_bad_input_is_one_clear_line(flags, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(benchmark.PARTS, "knn", lambda args: {"a": {"b": 1.0}})
    with pytest.raises(InputError, match=words):
        benchmark.main(flags)
