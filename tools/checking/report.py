"""What tools/check_dataset.py says about a data set, as lines for a person."""

import os
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np

from util.files import printable

Facts = dict[str, Any]  # a JSON object
STAGES = {
    "pretrain": "pretraining",
    "finetune": "fine-tuning",
    "lincls": "linear classification",
    "knn": "k-NN",
}
REPLACES = {  # stages that train -> what they do about a bad file
    "pretrain": ", and replaces bad files",
    "finetune": ", and replaces bad files",
    # see split_training_set there
    "lincls": ", and replaces bad files (with several lr it evaluates some training images, and "
    "stops at a bad one)",
}
KINDS = {  # of data sets: what they are, and what a check without --full reads but headers
    "folder": ("a folder of images", "the ends of files"),
    "packed": ("packed shards", "checksums"),
}
SHOWN = 5  # bad files, groups of equal images
ALWAYS = ("images", "bad files")  # rows that are shown even if they are zero


def spread_of(values: np.ndarray) -> list[int]:
    """Smallest, median and largest; empty without values."""
    return [int(values.min()), int(np.median(values)), int(values.max())] if len(values) else []


def report(facts: Facts, bad: list[tuple[str, str]], img_size: int) -> Iterator[str]:
    """All lines. facts: as the tool returns them. bad: path and reason of each bad file."""
    path, splits, is_full = facts["path"], facts["splits"], facts["full"]
    what, read = KINDS[facts["dataset"]]
    total = sum(split["images"] for split in splits.values())
    yield (
        printable(
            f"{path}: {what}, {total:,} images {'decoded' if is_full else 'looked at'} in "
            f"{facts['seconds']} s"
        )
        + "\n"
    )
    if splits:
        yield from _table(splits, img_size)
    first: Facts = next(iter(splits.values()), {})
    yield from _values(first.get("values", {}))
    yield from (f"{fact}: {first[fact]}" for fact in ("mean", "std") if fact in first)
    yield from _equal_images(facts["duplicates"], "pixels" if is_full else "bytes")
    reasons = [f"{os.path.relpath(name, path)}: {reason}" for name, reason in bad]
    yield from _some("bad files:", reasons, "--problems FILE writes all")
    yield ""
    for stage, verdict in facts["verdicts"].items():
        could = "could start" + (REPLACES.get(stage, "") if first.get("bad") else "")
        yield printable(f"{STAGES[stage]}: {could if verdict is None else f'could not: {verdict}'}")
    if not is_full:
        yield f"\nOnly headers and {read} were looked at: --full decodes every image."


def _values(found: dict[str, list[float]]) -> Iterator[str]:
    """The values in deep files, a row for each channel."""
    if found:
        yield _row("values in the files", [*found])
        for channel, values in enumerate(zip(*found.values(), strict=True), 1):
            yield _row(f"  channel {channel}", [f"{value:.6g}" for value in values])
        yield ""


def _table(splits: dict[str, Facts], img_size: int) -> Iterator[str]:
    """A row for each fact, a column for each split."""
    if list(splits) != ["all"]:
        yield _row("", list(splits))
    for section in zip(*(_sections(split, img_size) for split in splits.values()), strict=True):
        for label in dict.fromkeys(chain(*section)):
            values = [cells.get(label, 0) for cells in section]
            if any(values) or label in ALWAYS:
                yield _row(label, [*map(_text, values)])


def _row(label: str, texts: list[str]) -> str:
    return f"{label:36}" + "".join(f"{text:>20}" for text in texts)


def _sections(split: Facts, img_size: int) -> list[dict[str, float | list[int]]]:
    """The table's column about a split, value by label, in parts in which another split may have
    other rows."""
    sizes = [*split.get("images_per_class", {}).values()]
    return [
        {"images": split["images"]},
        _indented(split["kinds"]),
        split["notes"],
        {"bad files": split["bad"]},
        _indented(split["bad_by_reason"]),
        {"other files": sum(split["other_files"].values())},
        _indented(split["other_files"]),
        {
            "MiB": round(split["bytes"] / 2**20, 1),
            "short side, min / median / max": split["short_side"],
            "long side": split["long_side"],
            f"short side < {img_size}": split["smaller_than_crop"],
            "class folders": len(sizes),
            "  images in each, min / median / max": spread_of(np.array(sizes)),
            "  images in none": split.get("without_class", 0),
        },
    ]


def _indented(counts: dict[str, int]) -> dict[str, float | list[int]]:
    return {f"  {key or 'without an ending'}": count for key, count in counts.items()}


def _text(value: float | list[int]) -> str:
    """A number, or several."""
    return " / ".join(f"{number:,}" for number in (value if isinstance(value, list) else [value]))


def _equal_images(facts: Facts, what: str) -> Iterator[str]:
    """About equal images, if there are any."""
    head = f"equal {what}: {facts['images']:,} images, groups: {facts['groups']:,}"
    counts = {
        "images of val that are in train, too": facts["val_images_in_train"],
        "groups in more than one class": facts["groups_in_several_classes"],
    }
    head += "".join(f"\n  {name}: {count:,}" for name, count in counts.items() if count)
    groups = [
        " = ".join([*group[:3], "..."] if len(group) > 3 else group) for group in facts["files"]
    ]
    yield from _some(head, groups, "--json FILE writes all")


def _some(head: str, lines: list[str], more: str) -> Iterator[str]:
    """A head and the first lines, if there are any."""
    if lines:
        yield from ("", head, *(f"  {printable(line)}" for line in lines[:SHOWN]))
    if len(lines) > SHOWN:
        yield f"  ... and {len(lines) - SHOWN:,} more: {more}"
