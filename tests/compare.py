"""Comparisons that tests share: nested values, whole runs, and memory kept for a gradient."""

from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.evaluation.classification import ClassScores
from engine.run.checkpoint import Checkpoint, RunIdentity, load_newest_checkpoint
from engine.run.records import read_log, read_results

# Settings hold the folder's name and other things that may differ; records hold times.
MAY_DIFFER = ("config",)
TIMES = {"images_per_s", "data_wait", "eta_s", "monitor_s", "memory_gb"}


def leaves(value: Any, where: str) -> dict[str, Any]:
    """The tensors and plain values in nested dicts and lists by their place."""
    if isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, list | tuple):
        entries = enumerate(value)
    else:
        return {where: value}
    found = [leaves(entry, f"{where}.{name}") for name, entry in entries]
    return {place: leaf for of_entry in found for place, leaf in of_entry.items()}


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Nested plain values and tensors are equal, bit for bit."""
    ours, theirs = leaves(one, where), leaves(other, where)
    assert ours.keys() == theirs.keys(), where
    for place, leaf in ours.items():
        assert type(leaf) is type(theirs[place]), place
        if isinstance(leaf, torch.Tensor):
            assert leaf.dtype == theirs[place].dtype and torch.equal(leaf, theirs[place]), place
        else:
            assert leaf == theirs[place], place


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
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
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


def results_of(folder: Path, name: str = "results.json") -> Any:
    """What an evaluation wrote, None if it wrote nothing."""
    return read_results(folder / name) if (folder / name).exists() else None


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


def class_scores(size: int, correct: list[int], total: list[int], loss: float = 1.0) -> ClassScores:
    """Scores with so many images right of each class, and no other figures."""
    return ClassScores(
        size, loss, correct1=sum(correct), correct5=size, class_correct=correct, class_total=total
    )


def kept_for_gradient(compute: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """A loss, and the bytes of the tensors that it keeps for its gradient."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = compute()
    return loss, sum(sizes.values())
