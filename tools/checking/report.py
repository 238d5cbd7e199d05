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
SHOWN = 5  # bad files, groups of equal images


def spread_of(values: np.ndarray) -> list[int]:
    """Smallest, median and largest; empty without values."""
    return [int(values.min()), int(np.median(values)), int(values.max())] if len(values) else []


def report(facts: dict[str, Any], bad: list[tuple[str, str]], img_size: int) -> Iterator[str]:
    """All lines. facts: as the tool returns them. bad: path and reason of each bad file."""
    path, splits, is_full = facts["path"], facts["splits"], facts["full"]
    is_packed = facts["dataset"] == "packed"
    what = "packed shards" if is_packed else "a folder of images"
    total = sum(split["images"] for split in splits.values())
    how = "decoded" if is_full else "looked at"
    yield printable(f"{path}: {what}, {total:,} images {how} in {facts['seconds']} s")
    yield ""
    yield from _table(splits, img_size)
    first: dict[str, Any] = next(iter(splits.values()), {})
    yield from (f"{fact}: {first[fact]}" for fact in ("mean", "std") if fact in first)
    yield from _equal_images(facts["duplicates"], "pixels" if is_full else "bytes")
    names = [printable(f"  {os.path.relpath(name, path)}: {reason}") for name, reason in bad]
    yield from _some("bad files:", names, "--problems FILE writes all")
    yield ""
    yield from _verdicts(facts["verdicts"], first.get("bad", 0) > 0)
    if not is_full:
        read = "checksums" if is_packed else "the ends of files"
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
    if not splits:
        return
    rows: list[tuple[str, list[str]]] = [("", list(splits))] if list(splits) != ["all"] else []

    def add(label: str, values: list[Any], always: bool = False) -> None:
        if always or any(values):
            rows.append((label, [_cell(value) for value in values]))

    def values_of(fact: str) -> list[Any]:
        return [split.get(fact, 0) for split in splits.values()]

    def add_counts(fact: str, indent: str = "  ") -> None:
        counts = values_of(fact)
        for key in dict.fromkeys(key for of_split in counts for key in of_split):
            label = indent + (key or "without an ending")
            add(label, [of_split.get(key, 0) for of_split in counts])

    add("images", values_of("images"), always=True)
    add_counts("kinds")
    add_counts("notes", indent="")
    add("bad files", values_of("bad"), always=True)
    add_counts("bad_by_reason")
    add("other files", [sum(files.values()) for files in values_of("other_files")])
    add_counts("other_files")
    add("MiB", [round(size / 2**20, 1) for size in values_of("bytes")])
    add("short side, min / median / max", values_of("short_side"))
    add("long side", values_of("long_side"))
    add(f"short side < {img_size}", values_of("smaller_than_crop"))
    classes = [split.get("images_per_class", {}) for split in splits.values()]
    add("class folders", [len(counts) for counts in classes])
    spreads = [spread_of(np.array(list(counts.values()))) for counts in classes]
    add("  images in each, min / median / max", spreads)
    add("  images in none", values_of("without_class"))
    label_width = max(len(label) for label, _ in rows)
    widths = [max(map(len, column)) for column in zip(*(texts for _, texts in rows), strict=True)]
    for label, texts in rows:
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
