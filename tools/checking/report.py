"""What tools/check_dataset.py says of a data set, as lines for a person."""

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
    """Smallest, median and largest; empty where there are none."""
    return [int(values.min()), int(np.median(values)), int(values.max())] if len(values) else []


def report(facts: dict[str, Any], bad: list[tuple[str, str]], img_size: int) -> Iterator[str]:
    """All lines: `facts` as the tool returns them, `bad` the path and reason of each bad file."""
    total = sum(split["images"] for split in facts["splits"].values())
    what = "packed shards" if facts["dataset"] == "packed" else "a folder of images"
    how = "decoded" if facts["full"] else "looked at"
    yield printable(f"{facts['path']}: {what}, {total:,} images {how} in {facts['seconds']} s")
    yield ""
    if facts["splits"]:
        yield from table(facts["splits"], img_size)
    for fact in ("mean", "std"):  # as a config takes them
        for values in [split[fact] for split in facts["splits"].values() if fact in split][:1]:
            yield f"{fact}: {values}"
    yield from equal_lines(facts["duplicates"], facts["full"])
    yield from bad_lines(facts["path"], bad)
    yield ""
    yield from verdict_lines(facts)
    if not facts["full"]:
        looked = "and checksums" if facts["dataset"] == "packed" else "and the ends of files"
        yield f"\nOnly headers {looked} were looked at: --full decodes every image."


def verdict_lines(facts: dict[str, Any]) -> Iterator[str]:
    """A line for all stages of which the same is to be said."""
    splits = list(facts["splits"].values())
    has_bad = bool(splits) and splits[0]["bad"] > 0
    stages: dict[str, list[str]] = {}
    for stage, name in STAGES.items():
        reason = facts["verdicts"][stage]
        text = "could start" if reason is None else f"could not: {reason}"
        if reason is None and has_bad and stage != "knn":
            text += ", and replaces bad files"
            if stage == "lincls":  # see split_training_set there
                text += (
                    " (with several lr it evaluates some training images, and stops at a bad one)"
                )
        stages.setdefault(text, []).append(name)
    for text, names in stages.items():
        yield printable(f"{', '.join(names)}: {text}")


def table(splits: dict[str, dict[str, Any]], img_size: int) -> Iterator[str]:
    """A row for each fact, a column for each split."""
    rows: list[tuple[str, list[str]]] = [("", list(splits))] if list(splits) != ["all"] else []

    def add(label: str, values: list[Any], always: bool = False) -> None:
        if always or any(values):
            rows.append((label, [cell(value) for value in values]))

    def add_all(fact: str, indent: str = "  ") -> None:
        for key in dict.fromkeys(key for split in splits.values() for key in split[fact]):
            add(
                indent + (key or "without an ending"),
                [split[fact].get(key, 0) for split in splits.values()],
            )

    def of(fact: str) -> list[Any]:
        return [split.get(fact, 0) for split in splits.values()]

    add("images", of("images"), always=True)
    add_all("kinds")
    add_all("notes", indent="")
    add("bad files", of("bad"), always=True)
    add_all("bad_by_reason")
    add("other files", [sum(files.values()) for files in of("other_files")])
    add_all("other_files")
    add("MiB", [round(size / 2**20, 1) for size in of("bytes")])
    add("short side, min / median / max", of("short_side"))
    add("long side", of("long_side"))
    add(f"short side < {img_size}", of("smaller_than_crop"))
    classes = [split.get("images_per_class", {}) for split in splits.values()]
    add("class folders", [len(counts) for counts in classes])
    add(
        "  images in each, min / median / max",
        [spread_of(np.array(list(counts.values()))) for counts in classes],
    )
    add("  images in none", of("without_class"))
    label_width = max(len(label) for label, _ in rows)
    widths = [max(map(len, column)) for column in zip(*(texts for _, texts in rows), strict=True)]
    for label, texts in rows:
        cells = "".join(f"   {text:>{width}}" for text, width in zip(texts, widths, strict=True))
        yield f"{label:{label_width}}{cells}"


def cell(value: float | list[float]) -> str:
    """A number, or several; equal ones once."""
    several = value if isinstance(value, list) else [value]
    return (
        f"{several[0]:,}"
        if len(set(several)) == 1
        else " / ".join(f"{number:,}" for number in several)
    )


def equal_lines(facts: dict[str, Any], full: bool) -> Iterator[str]:
    """About equal images, where there are any."""
    if not facts["groups"]:
        return
    yield ""
    yield f"equal {'pixels' if full else 'bytes'}: {facts['images']:,} images, groups: {facts['groups']:,}"
    if facts["groups_in_train_and_val"]:
        yield f"  images of val that are in train, too: {facts['val_images_in_train']:,}"
    if facts["groups_in_several_classes"]:
        yield f"  groups in more than one class: {facts['groups_in_several_classes']:,}"
    for group in facts["files"][:SHOWN]:
        yield "  " + printable(" = ".join(group[:3]) + (" = ..." if len(group) > 3 else ""))
    if facts["groups"] > SHOWN:
        yield f"  ... and {facts['groups'] - SHOWN:,} more: --json FILE writes all"


def bad_lines(path: str, bad: list[tuple[str, str]]) -> Iterator[str]:
    """The first bad files, where there are any."""
    if bad:
        yield ""
        yield "bad files:"
    for name, reason in bad[:SHOWN]:
        yield printable(f"  {os.path.relpath(name, path)}: {reason}")
    if len(bad) > SHOWN:
        yield f"  ... and {len(bad) - SHOWN:,} more: --problems FILE writes all"


def printable(text: str) -> str:
    """A file's name may hold line ends, or bytes that are no text."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
