"""Comparisons that tests share: nested values, and whole runs."""

import json
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file

from engine.run.checkpoint import Checkpoint, RunIdentity, load_newest_checkpoint
from engine.run.records import read_log

# Settings hold the folder's name and other things that may differ; records hold times.
MAY_DIFFER = ("config",)
TIMES = {"images_per_s", "data_wait", "eta_s", "monitor_s"}


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Nested plain values and tensors are equal, bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name, value in one.items():
            assert_same(value, other[name], f"{where}.{name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for place, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{place}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    else:
        assert one == other, where


def assert_same_checkpoint(
    one: Checkpoint | None, other: Checkpoint | None, ignore: Collection[str] = MAY_DIFFER
) -> None:
    """Two checkpoints are equal bit for bit in every field but those in `ignore`."""
    assert one is not None and other is not None
    for field in fields(Checkpoint):
        if field.name not in ignore:
            assert_same(getattr(one, field.name), getattr(other, field.name), field.name)


def assert_same_run(one: Path, other: Path, ignore: Collection[str] = MAY_DIFFER) -> None:
    """Two runs' records, newest checkpoints, weights and results are equal bit for bit, but for the
    checkpoint's fields in `ignore` and the times in the records."""
    assert records_of(one) == records_of(other)
    assert_same_checkpoint(load_newest_checkpoint(one), load_newest_checkpoint(other), ignore)
    for name in ("model.safetensors", "best.safetensors"):
        assert (one / name).exists() == (other / name).exists(), name
        if (one / name).exists():
            assert_same(load_file(one / name), load_file(other / name), name)
            assert header_of(one / name) == header_of(other / name), name
    assert results_of(one) == results_of(other)


def records_of(folder: Path) -> list[dict[str, Any]]:
    """A run's records without times; floats as hex, in which a NaN equals itself."""
    return [
        {
            name: value.hex() if isinstance(value, float) else value
            for name, value in record.items()
            if name not in TIMES
        }
        for record in read_log(folder / "log.jsonl")
    ]


def results_of(folder: Path) -> dict[str, Any] | None:
    """A run's results.json, None without one."""
    path = folder / "results.json"
    return json.loads(path.read_text()) if path.exists() else None


def header_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata()


def identity(**given: Any) -> RunIdentity:
    """The identity of a run with these fields, the others empty."""
    empty = {"config": {}, "model_args": {}, "mean": [], "std": [], "data": {}}
    return RunIdentity(**(empty | given))


def checkpoint(step: int, **given: Any) -> Checkpoint:
    """A checkpoint with these fields, the others empty."""
    names = ("model", "optimizer", "scaler", "epoch_meter", "window_meter")
    empty: dict[str, Any] = {name: {} for name in names} | vars(identity())
    empty |= {"ema": None, "epoch_losses": [], "epoch_end_pending": False}
    return Checkpoint(**(empty | {"step": step, "total_batch": 1, "samples_seen": step} | given))
