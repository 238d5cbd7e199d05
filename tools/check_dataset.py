"""Looks through a data set before training does: kinds, sizes, bad files, classes, equal images in
train and val.

    python tools/check_dataset.py PATH
    python tools/check_dataset.py PATH --full --problems bad.jsonl

PATH is what --data_path takes: a folder of images, with train/ and val/ or without, or the shards
of pack_dataset.py. Headers and the ends of files are read, which finds what is no image or was cut
off; --full decodes every image. Images are listed and judged by the code that training uses. Exit
code: 0 where the stages in question could start and would not stop for bad files, 1 where one would
not, 2 for a wrong command.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.labels import SPLITS, build_labelled_data, class_folders, folder_labels
from data.packs.index import INDEX
from data.packs.source import PackedSource, open_pack
from data.sources import FolderSource, build_pretrain_source, check_folder
from engine.run.faults import why_training_stops
from tools.checking.checks import Looks, Source, joined, look_at, passed_over
from tools.checking.duplicates import equal_images
from tools.checking.report import STAGES, report, spread_of
from util.errors import InputError, LineParser, run_cli
from util.files import write_output
from util.pool import available_cores


@dataclass
class Split:
    """One split and what was found in it. labels `(n,)` int64, -1 where an image has none; None
    without any."""

    source: Source
    looks: Looks
    labels: np.ndarray | None
    class_names: list[str]

    def num_labelled(self) -> int:
        """Images that an evaluation takes."""
        return 0 if self.labels is None else int((self.labels >= 0).sum())

    def num_bad_labelled(self) -> int:
        """Bad ones among them."""
        return 0 if self.labels is None else int((self.labels[list(self.looks.bad)] >= 0).sum())

    def class_of(self, index: int) -> str | None:
        """The name of an image's class."""
        return (
            None
            if self.labels is None or self.labels[index] < 0
            else self.class_names[self.labels[index]]
        )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Looks and reports; returns the facts that --json writes. Raises: InputError for a wrong
    command."""
    parser = LineParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "path", metavar="PATH", type=Path, help="folder of images, or of packed shards"
    )
    parser.add_argument("--full", action="store_true", help="decode every image")
    parser.add_argument(
        "--for",
        dest="stages",
        nargs="+",
        choices=STAGES,
        metavar="STAGE",
        help=f"{', '.join(STAGES)}: which must be able to start for exit code 0 (default: pretrain; with class folders "
        "in train/ and a val/ also finetune and lincls)",
    )
    parser.add_argument(
        "--dataset",
        choices=("folder", "packed"),
        help="default: packed where there is an index.json",
    )
    parser.add_argument(
        "--img_size",
        type=int,
        default=224,
        help="crop to compare sizes with, in pixels (default 224)",
    )
    parser.add_argument(
        "--problems",
        type=Path,
        metavar="FILE",
        help="write path and reason of every bad file, as JSONL",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all facts")
    parser.add_argument(
        "--workers", type=int, default=available_cores(), help="processes (default: the cores)"
    )
    args = parser.parse_args(argv)
    check_folder(args.path)
    facts, splits = check(args)
    bad = bad_files(splits)
    sys.stdout.write("\n".join(report(facts, bad, args.img_size)) + "\n")
    if args.problems:  # as a run's bad_samples.jsonl
        lines = "".join(json.dumps({"path": path, "reason": reason}) + "\n" for path, reason in bad)
        write_output(args.problems, lambda target: target.write_text(lines, encoding="utf-8"))
    if args.json:
        text = json.dumps(facts, indent=1) + "\n"
        write_output(args.json, lambda target: target.write_text(text, encoding="utf-8"))
    return facts


def check(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Split]]:
    """Looks at all images; returns the facts, in plain values, and the splits by name."""
    path, started = args.path, time.monotonic()
    is_packed = any(
        (folder / INDEX).exists() for folder in (path, *(path / split for split in SPLITS))
    )
    dataset = args.dataset or ("packed" if is_packed else "folder")
    errors = {}
    try:
        sources: dict[str, Source] = open_splits(dataset, path)
    except InputError as error:
        sources, errors["pretrain"] = {}, str(error)
    try:
        num_classes = len(build_labelled_data(dataset, str(path), 3, False, None).class_names)
    except InputError as error:
        num_classes, errors["labelled"] = 0, str(error)
    total = sum(map(len, sources.values()))
    with tqdm(
        total=total, unit="image", dynamic_ncols=True, leave=False, disable=not sys.stderr.isatty()
    ) as bar:
        splits = {name: look_at_split(source, args, bar) for name, source in sources.items()}
        groups = equal_images(
            list(sources.values()),
            [split.looks.keys for split in splits.values()],
            args.full,
            args.workers,
        )
    verdicts = judge(splits, errors)
    has_classes = (
        "train" in splits and splits["train"].labels is not None and (path / "val").is_dir()
    )
    asked = args.stages or ["pretrain", *(["finetune", "lincls"] if has_classes else [])]
    facts = {
        "path": str(path),
        "dataset": dataset,
        "full": args.full,
        "seconds": round(time.monotonic() - started, 1),
        "num_classes": num_classes,
        "splits": {name: describe(split, args) for name, split in splits.items()},
        "duplicates": describe_groups(groups, splits, path),
        "verdicts": verdicts,
        "asked": asked,
        "could_start": all(verdicts[stage] is None for stage in asked),
    }
    return facts, splits


def open_splits(dataset: str, path: Path) -> dict[str, Source]:
    """The images that pretraining takes, first, and beside a train/ those of val/, where it has
    any."""
    first = build_pretrain_source(dataset, str(path), 3, False)
    assert isinstance(first, FolderSource | PackedSource)
    if not (path / "train").is_dir():
        return {"all": first}
    sources: dict[str, Source] = {"train": first}
    val = path / "val"
    with suppress(InputError):  # where this matters, the evaluations' verdict says it
        if val.is_dir():
            sources["val"] = (
                open_pack(str(path), 3, ("val",))
                if dataset == "packed"
                else FolderSource(str(val), 3, False)
            )
    return sources


def look_at_split(source: Source, args: argparse.Namespace, bar: Any) -> Split:
    """Looks at the images of one split, and moves the progress bar."""

    def parts() -> Iterator[Looks]:
        for part in look_at(source, args.full, args.workers):
            bar.update(len(part.keys))
            yield part

    looks = joined(parts())
    if isinstance(source, PackedSource):
        labels: np.ndarray | None = source.index.entries["label"].astype(np.int64)
        class_names = source.index.class_names
    else:
        class_names = class_folders(source.root) or None
        labels = folder_labels(source.names, class_names) if class_names else None
    if labels is None or (labels < 0).all():
        return Split(source, looks, None, [])
    return Split(
        source, looks, labels, class_names or [str(label) for label in range(labels.max() + 1)]
    )


def judge(splits: dict[str, Split], errors: dict[str, str]) -> dict[str, str | None]:
    """By stage why it could not start, or would stop; None where it could."""
    verdicts: dict[str, str | None] = dict.fromkeys(STAGES, errors.get("labelled"))
    verdicts["pretrain"] = errors.get("pretrain")
    if splits:
        first = next(iter(splits.values()))
        verdicts["pretrain"] = why_training_stops(len(first.looks.bad), len(first.source))
    if "labelled" not in errors:
        train, val = splits["train"], splits["val"]
        num_train, num_val = train.num_bad_labelled(), val.num_bad_labelled()
        leaves_none = "and evaluation leaves none out"
        in_val = f"{num_val:,} bad in val, {leaves_none}" if num_val else None
        trained = why_training_stops(num_train, train.num_labelled()) or in_val
        in_train = f"{num_train:,} bad in train, {leaves_none}" if num_train else None
        verdicts |= {"finetune": trained, "lincls": trained, "knn": in_train or in_val}
    return verdicts


def describe(split: Split, args: argparse.Namespace) -> dict[str, Any]:
    """The facts about one split."""
    looks = split.looks
    good = looks.sides[looks.sides[:, 0] > 0]
    facts: dict[str, Any] = {
        "images": len(split.source),
        "kinds": dict(looks.kinds.most_common()),
        "bad": len(looks.bad),
        "bad_by_reason": dict(
            Counter(reason.partition(":")[0] for reason in looks.bad.values()).most_common()
        ),
        "notes": dict(looks.notes.most_common()),
        "other_files": {}
        if isinstance(split.source, PackedSource)
        else dict(passed_over(split.source.root).most_common()),
        "bytes": looks.num_bytes,
        "short_side": spread_of(good[:, 0]),
        "long_side": spread_of(good[:, 1]),
        "smaller_than_crop": int((good[:, 0] < args.img_size).sum()),
    }
    if split.labels is not None:
        counts = np.bincount(split.labels[split.labels >= 0], minlength=len(split.class_names))
        facts["images_per_class"] = dict(zip(split.class_names, counts.tolist(), strict=False))
        facts["without_class"] = int((split.labels < 0).sum())
    if args.full and len(good):
        mean, square = looks.sums / len(good)
        facts["mean"] = mean.round(4).tolist()
        facts["std"] = np.sqrt(np.maximum(square - mean**2, 0)).round(4).tolist()
    return facts


def describe_groups(
    groups: list[list[int]], splits: dict[str, Split], path: Path
) -> dict[str, Any]:
    """The facts about equal images, whose indices go through all splits."""
    in_order = list(splits.values())
    starts = np.cumsum([0, *(len(split.source) for split in in_order)])
    leaks: list[list[str]] = []
    others: list[list[str]] = []
    num_val, classes_differ = 0, 0
    for group in groups:
        numbers = (np.searchsorted(starts, group, side="right") - 1).tolist()  # of the splits
        members = [
            (in_order[n], index - int(starts[n])) for n, index in zip(numbers, group, strict=True)
        ]
        names = [os.path.relpath(split.source.name(index), path) for split, index in members]
        is_leak = len(set(numbers)) > 1
        (leaks if is_leak else others).append(names)
        num_val += sum(numbers) if is_leak else 0
        classes_differ += len({split.class_of(index) for split, index in members} - {None}) > 1
    return {
        "groups": len(groups),
        "images": sum(map(len, groups)),
        "groups_in_train_and_val": len(leaks),
        "val_images_in_train": num_val,
        "groups_in_several_classes": classes_differ,
        "files": leaks + others,
    }


def bad_files(splits: dict[str, Split]) -> list[tuple[str, str]]:
    """Path and reason of each."""
    return [
        (split.source.name(index), reason)
        for split in splits.values()
        for index, reason in split.looks.bad.items()
    ]


if __name__ == "__main__":
    run_cli(lambda: sys.exit(0 if main()["could_start"] else 1))
