"""What tools/check_dataset.py says about a data set, as lines for a person."""

import os
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np

Facts = dict[str, Any]  # a JSON object
Cells = dict[str, float | list[int]]  # label of a row in the table -> value in one column
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
    how = "decoded" if is_full else "looked at"
    yield printable(f"{path}: {what}, {total:,} images {how} in {facts['seconds']} s")
    yield ""
    if splits:
        yield from _table(splits, img_size)
    first: Facts = next(iter(splits.values()), {})
    yield from (f"{fact}: {first[fact]}" for fact in ("mean", "std") if fact in first)
    yield from _equal_images(facts["duplicates"], "pixels" if is_full else "bytes")
    names = [f"{os.path.relpath(name, path)}: {reason}" for name, reason in bad]
    yield from _some("bad files:", names, "--problems FILE writes all")
    yield ""
    yield from _verdicts(facts["verdicts"], first.get("bad", 0) > 0)
    if not is_full:
        yield f"\nOnly headers and {read} were looked at: --full decodes every image."


def _table(splits: dict[str, Facts], img_size: int) -> Iterator[str]:
    """A row for each fact, a column for each split."""
    rows = [] if list(splits) == ["all"] else [("", list(splits))]
    for section in zip(*(_sections(split, img_size) for split in splits.values()), strict=True):
        for label in dict.fromkeys(chain(*section)):
            values = [cells.get(label, 0) for cells in section]
            if any(values) or label in ALWAYS:
                rows.append((label, [*map(_text, values)]))
    label_width = max(len(label) for label, _ in rows)
    widths = [max(map(len, column)) for column in zip(*(texts for _, texts in rows), strict=True)]
    for label, texts in rows:
        cells = "".join(f"   {text:>{width}}" for text, width in zip(texts, widths, strict=True))
        yield f"{label:{label_width}}{cells}"


def _sections(split: Facts, img_size: int) -> list[Cells]:
    """The table's column about a split, in parts in which another split may have other rows."""
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


def _indented(counts: dict[str, int]) -> Cells:
    return {f"  {key or 'without an ending'}": count for key, count in counts.items()}


def _text(value: float | list[int]) -> str:
    """A number, or several; equal ones once."""
    several = value if isinstance(value, list) else [value]
    shown = several if len(set(several)) > 1 else several[:1]
    return " / ".join(f"{number:,}" for number in shown)


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


def _verdicts(verdicts: dict[str, str | None], has_bad: bool) -> Iterator[str]:
    """A line for all stages with the same verdict."""
    stages: dict[str, list[str]] = {}
    for stage, name in STAGES.items():
        text = f"could not: {verdicts[stage]}"
        if verdicts[stage] is None:
            text = "could start" + (REPLACES.get(stage, "") if has_bad else "")
        stages.setdefault(text, []).append(name)
    yield from (printable(f"{', '.join(names)}: {text}") for text, names in stages.items())


def printable(text: str) -> str:
    """A text on one line: a file's name may hold line ends, or bytes that are no text."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
