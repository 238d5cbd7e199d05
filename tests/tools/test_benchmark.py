"""`tools/benchmark.py`: what it counts is right, and every part runs and says its figures (on tiny
shapes here)."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from models.build import build_model
from tools import benchmark, pack_dataset
from tools.benchmarks import evaluation, memory, models, step, timing
from tools.benchmarks.models import SHAPES, shape_of
from util.errors import InputError

TINY = shape_of(4, 32, 8, (32, 2, 2), (16, 1, 2))


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
    monkeypatch.setitem(SHAPES, "base/16", shape_of(4, 32, 4, (64, 4, 2), (64, 4, 2)))
    found = benchmark.main(["memory"])["base/16"]
    peaks = found["activations_mib"]
    assert set(peaks) == {"ours bf16", "ours bf16 checkpointing", "peer fp32"}
    assert peaks["ours bf16 checkpointing"] < 0.5 * peaks["ours bf16"]
    assert found["activations_over_peer"]["ours bf16"] == peaks["ours bf16"] / peaks["peer fp32"]
    assert benchmark.main(["memory"])["base/16"]["activations_mib"] == peaks


def test_variants_take_turns_and_the_first_round_does_not_count():
    order = []
    seconds = timing.interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3
    )
    assert order == ["a", "b"] * 4 and [len(s) for s in seconds.values()] == [3, 3]
    assert timing.ratio({"slow": [4.0, 9.0, 2.0], "fast": [2.0, 3.0, 2.0]}, "slow", "fast") == 2.0


def test_the_peer_is_the_same_model():
    ours, theirs = build_model(TINY.spec), models.build_peer(TINY.spec, "eager")
    count = [
        sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)
    ]
    assert count[0] == count[1]


def test_step_gives_rates_ratios_and_the_share_of_the_peak(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SHAPES, "base/16", TINY)
    monkeypatch.setattr(step, "peak_flops", lambda: 1e9)
    arguments = ["step", "--shapes", "base/16", "--rounds", "1"]
    found = benchmark.main([*arguments, "--json", str(tmp_path / "f.json")])
    assert json.loads((tmp_path / "f.json").read_text()) == found
    assert "step, base/16" in capsys.readouterr().out
    rates = found["base/16"]["images_per_s"]
    peers = {f"peer {word} {path}" for word in ("fp32", "bf16") for path in ("sdpa", "eager")}
    assert set(rates) == {"ours bf16", "ours cross bf16"} | peers
    share = rates["ours bf16"] * step.step_flops(TINY.spec) / 1e9
    assert found["base/16"]["share_of_peak"] == pytest.approx(share)
    fastest = max(rates["peer fp32 sdpa"], rates["peer fp32 eager"])
    ratio = rates["ours bf16"] / fastest  # of one round
    assert found["base/16"]["over_peer_fp32"] == pytest.approx(ratio)

    monkeypatch.setattr(step, "build_peer", lambda *_: None)  # transformers is not installed
    monkeypatch.setattr(memory, "build_peer", lambda *_: None)
    found = benchmark.main(arguments)["base/16"]
    assert set(found["images_per_s"]) == {"ours bf16", "ours cross bf16"}
    assert "over_peer_fp32" not in found
    assert "activations_over_peer" not in benchmark.main(["memory"])["base/16"]


def test_loader_compares_the_same_images(tmp_path):
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (300, 400, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    pack_dataset.main([str(tmp_path), str(tmp_path / "packed")])
    places = ["--images", str(tmp_path), "--packed", str(tmp_path / "packed")]
    found = benchmark.main(["loader", *places, "--rounds", "1"])["one core"]
    rates = found["images_per_s"]
    assert set(rates) == {"pillow", "folder", "packed"}
    for name in ("folder", "packed"):
        assert found["over_pillow"][name] == pytest.approx(rates[name] / rates["pillow"])


@pytest.mark.long
def test_two_processes_are_timed_beside_one(monkeypatch):
    monkeypatch.setitem(SHAPES, "small/16", TINY)
    found = benchmark.main(["processes", "--rounds", "1"])["small/16"]
    one, two = (found["images_per_s"][team] for team in (step.ONE, step.TWO))
    assert found["two_over_one"] == pytest.approx(two / one)  # of one round


def test_the_evaluations_are_timed():
    """Small here; one search for four numbers of neighbours beside four of them."""
    assert evaluation.benchmark_knn(3, num_train=5000, width=32)["gain"] > 1.2
    found = evaluation.benchmark_probe(1, "debug", 4)
    one, thirteen = found["images_per_s"].values()
    assert found["time_of_13_over_1"] == pytest.approx(one / thirteen)


def test_figures_that_cannot_be_written_are_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(benchmark.PARTS, "knn", lambda args: {"a": {"b": 1.0}})
    with pytest.raises(InputError, match="cannot be written"):
        benchmark.main(["knn", "--json", str(tmp_path / "nowhere" / "f.json")])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["loader"], "loader needs photographs: give --images FOLDER"),
        (["loader", "--images", "nowhere"], "nowhere: No such file"),
        (["step", "--rounds", "0"], "rounds must be 1 or more"),
        (["step", "--shapes", "huge"], "invalid choice: 'huge'"),
        (["speed"], "invalid choice: 'speed'"),
    ],
)
def test_bad_input_is_one_clear_line(flags, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=words):
        benchmark.main(flags)
