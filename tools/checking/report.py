"""What tools/check_dataset.py says about a data set, as lines for a person."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

STAGES = {
    "pretrain": "pretraining",
    "finetune": "fine-tuning",
    "lincls": "linear classification",
    "knn": "k-NN",
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


def report(facts: dict[str, Any], bad: list[tuple[str, str]], img_size: int) -> Iterator[str]:
    """All lines. facts: as the tool returns them. bad: path and reason of each bad file."""
    path, splits, is_full = facts["path"], facts["splits"], facts["full"]
    what, read = KINDS[facts["dataset"]]
    total = sum(split["images"] for split in splits.values())
    how = "decoded" if is_full else "looked at"
    yield printable(f"{path}: {what}, {total:,} images {how} in {facts['seconds']} s")
    yield ""
    if splits:
        yield from _table(splits, img_size)
    first: dict[str, Any] = next(iter(splits.values()), {})
    yield from (f"{fact}: {first[fact]}" for fact in ("mean", "std") if fact in first)
    yield from _equal_images(facts["duplicates"], "pixels" if is_full else "bytes")
    names = [printable(f"  {os.path.relpath(name, path)}: {reason}") for name, reason in bad]
    yield from _some("bad files:", names, "--problems FILE writes all")
    yield ""
    yield from _verdicts(facts["verdicts"], first.get("bad", 0) > 0)
    if not is_full:
        yield f"\nOnly headers and {read} were looked at: --full decodes every image."


def _verdicts(verdicts: dict[str, str | None], has_bad: bool) -> Iterator[str]:
    """A line for all stages with the same verdict."""
    stages: dict[str, list[str]] = {}
    for stage, name in STAGES.items():
        text = "could start" if verdicts[stage] is None else f"could not: {verdicts[stage]}"
        if verdicts[stage] is None and has_bad and stage != "knn":
            text += ", and replaces bad files"
            if stage == "lincls":  # see split_training_set there
                text += (
                    " (with several lr it evaluates some training images, and stops at a bad one)"
                )
        stages.setdefault(text, []).append(name)
    yield from (printable(f"{', '.join(names)}: {text}") for text, names in stages.items())


def _table(splits: dict[str, dict[str, Any]], img_size: int) -> Iterator[str]:
    """A row for each fact, a column for each split."""

    def values(fact: str) -> list[Any]:
        return [split.get(fact, 0) for split in splits.values()]

    def counts(fact: str, indent: str = "  ") -> list[tuple[str, list[int]]]:
        keys = dict.fromkeys(key for of_split in values(fact) for key in of_split)
        return [
            (
                indent + (key or "without an ending"),
                [of_split.get(key, 0) for of_split in values(fact)],
            )
            for key in keys
        ]

    class_sizes = [list(split.get("images_per_class", {}).values()) for split in splits.values()]
    spreads = [spread_of(np.array(sizes)) for sizes in class_sizes]
    rows: list[tuple[str, list[Any]]] = [
        ("images", values("images")),
        *counts("kinds"),
        *counts("notes", indent=""),
        ("bad files", values("bad")),
        *counts("bad_by_reason"),
        ("other files", [sum(files.values()) for files in values("other_files")]),
        *counts("other_files"),
        ("MiB", [round(size / 2**20, 1) for size in values("bytes")]),
        ("short side, min / median / max", values("short_side")),
        ("long side", values("long_side")),
        (f"short side < {img_size}", values("smaller_than_crop")),
        ("class folders", [len(sizes) for sizes in class_sizes]),
        ("  images in each, min / median / max", spreads),
        ("  images in none", values("without_class")),
    ]
    shown = [(label, [*map(_cell, row)]) for label, row in rows if any(row) or label in ALWAYS]
    if list(splits) != ["all"]:
        shown.insert(0, ("", list(splits)))
    label_width = max(len(label) for label, _ in shown)
    widths = [max(map(len, column)) for column in zip(*(texts for _, texts in shown), strict=True)]
    for label, texts in shown:
        cells = "".join(f"   {text:>{width}}" for text, width in zip(texts, widths, strict=True))
        yield f"{label:{label_width}}{cells}"


def _cell(value: float | list[float]) -> str:
    """A number, or several; equal ones once."""
    several = value if isinstance(value, list) else [value]
    return " / ".join(
        f"{number:,}" for number in (several if len(set(several)) > 1 else several[:1])
    )


def _equal_images(facts: dict[str, Any], what: str) -> Iterator[str]:
    """About equal images, if there are any."""
    head = f"equal {what}: {facts['images']:,} images, groups: {facts['groups']:,}"
    if facts["groups_in_train_and_val"]:
        head += f"\n  images of val that are in train, too: {facts['val_images_in_train']:,}"
    if facts["groups_in_several_classes"]:
        head += f"\n  groups in more than one class: {facts['groups_in_several_classes']:,}"
    groups = [
        "  " + printable(" = ".join([*group[:3], "..."] if len(group) > 3 else group))
        for group in facts["files"]
    ]
    yield from _some(head, groups, "--json FILE writes all")


def _some(head: str, lines: list[str], more: str) -> Iterator[str]:
    """A head and the first lines, if there are any."""
    if lines:
        yield ""
        yield head
        yield from lines[:SHOWN]
    if len(lines) > SHOWN:
        yield f"  ... and {len(lines) - SHOWN:,} more: {more}"


def printable(text: str) -> str:
    """A text on one line: a file's name may hold line ends, or bytes that are no text."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
