"""Checks a data set before training reads it: kinds, sizes, bad files, classes, equal images in
train and val.

    python tools/check_dataset.py PATH
    python tools/check_dataset.py PATH --full --problems bad.jsonl

PATH is what --data_path takes: a folder of images, with train/ and val/ or without, or the shards
of pack_dataset.py. Headers and the ends of files are read, which finds what is no image or was cut
off; --full decodes every image. Images are listed and read by the code that training uses. Exit
code: 0 if the stages in question could start and would not stop for bad files, 1 if one would not,
2 for a wrong command.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
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
from tools.checking.checks import PART, Findings, Source, examine, joined, other_files
from tools.checking.duplicates import equal_images
from tools.checking.report import STAGES, report, spread_of
from util.dist import available_cores
from util.errors import InputError, LineParser, run_cli
from util.files import path, write_text


@dataclass
class Split:
    """One split and what was found in it. labels `(n,)` int64, -1 for an image without one; no
    class_names if no image has a label."""

    source: Source
    findings: Findings
    labels: np.ndarray
    class_names: list[str]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Checks and reports; returns the facts that --json writes.

    Raises: InputError for a wrong command.
    """
    parser = LineParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "path", metavar="PATH", type=path, help="folder of images, or of packed shards"
    )
    parser.add_argument("--full", action="store_true", help="decode every image")
    parser.add_argument(
        "--for",
        dest="stages",
        nargs="+",
        choices=STAGES,
        metavar="STAGE",
        help=f"{', '.join(STAGES)}: stages that must be able to start for exit code 0 (default: "
        "pretrain; with class folders in train/ and a val/ also finetune and lincls)",
    )
    parser.add_argument(
        "--dataset",
        choices=("folder", "packed"),
        help="kind of data set (default: packed if there is an index.json)",
    )
    parser.add_argument(
        "--img_size",
        type=int,
        default=224,
        help="side of the crop to compare sizes with, in pixels (default 224)",
    )
    parser.add_argument(
        "--problems",
        type=path,
        metavar="FILE",
        help="write path and reason of every bad file, as JSONL",
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="write all facts as JSON")
    parser.add_argument(
        "--workers", type=int, default=available_cores(), help="processes (default: the cores)"
    )
    args = parser.parse_args(argv)
    check_folder(args.path)
    facts, bad = check(args)
    sys.stdout.write("\n".join(report(facts, bad, args.img_size)) + "\n")
    if args.problems:  # as a run's bad_samples.jsonl
        lines = [json.dumps({"path": name, "reason": reason}) + "\n" for name, reason in bad]
        write_text(args.problems, "".join(lines))
    if args.json:
        write_text(args.json, json.dumps(facts, indent=1) + "\n")
    return facts


def check(args: argparse.Namespace) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Examines all images; returns the facts, in plain values, and path and reason of each bad
    file."""
    root, started = args.path, time.monotonic()
    is_packed = any((folder / INDEX).exists() for folder in (root, root / "train", root / "val"))
    dataset = args.dataset or ("packed" if is_packed else "folder")
    sources: dict[str, Source] = {}
    errors, num_classes = {}, 0
    try:
        sources = open_splits(dataset, root)
    except InputError as error:
        errors["pretrain"] = str(error)
    try:
        num_classes = len(build_labelled_data(dataset, str(root), 3, False, None).class_names)
    except InputError as error:
        errors["labelled"] = str(error)
    splits = {name: check_split(source, args) for name, source in sources.items()}
    keys = [split.findings.keys for split in splits.values()]
    groups = equal_images(list(sources.values()), keys, args.full, args.workers)
    verdicts = verdicts_of(splits, errors)
    has_classes = "train" in splits and splits["train"].class_names and (root / "val").is_dir()
    asked = args.stages or ["pretrain", *(["finetune", "lincls"] if has_classes else [])]
    facts = {
        "path": str(root),
        "dataset": dataset,
        "full": args.full,
        "seconds": round(time.monotonic() - started, 1),
        "num_classes": num_classes,
        "splits": {name: split_facts(split, args) for name, split in splits.items()},
        "duplicates": duplicate_facts(groups, list(splits.values()), root),
        "verdicts": verdicts,
        "asked": asked,
        "could_start": all(verdicts[stage] is None for stage in asked),
    }
    bad = [
        (split.source.name(index), reason)
        for split in splits.values()
        for index, reason in split.findings.bad.items()
    ]
    return facts, bad


def open_splits(dataset: str, root: Path) -> dict[str, Source]:
    """The images that pretraining takes, first, and those of a val/ beside train/, if it has
    any."""
    first = build_pretrain_source(dataset, str(root), 3, False)
    assert isinstance(first, FolderSource | PackedSource)
    has_train = (root / "train").is_dir()
    sources: dict[str, Source] = {"train" if has_train else "all": first}
    if has_train and (root / "val").is_dir():
        with suppress(InputError):  # the evaluations' verdict reports it
            sources["val"] = (
                open_pack(str(root), 3, ("val",))
                if dataset == "packed"
                else FolderSource(str(root / "val"), 3, prefer_train=False)
            )
    return sources


def check_split(source: Source, args: argparse.Namespace) -> Split:
    """Examines the images of one split, with a progress bar on a terminal."""
    parts = tqdm(
        examine(source, args.full, args.workers),
        total=-(-len(source) // PART),
        unit=f" x {PART} images",
        dynamic_ncols=True,
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    if isinstance(source, PackedSource):
        labels = source.labels
        class_names = source.index.class_names or [str(label) for label in range(labels.max() + 1)]
    else:
        class_names = class_folders(source.root)
        labels = folder_labels(source.names, class_names)
    return Split(source, joined(parts), labels, class_names if (labels >= 0).any() else [])


def verdicts_of(splits: dict[str, Split], errors: dict[str, str]) -> dict[str, str | None]:
    """By stage the reason why it could not start or would stop, None if it could train."""
    verdicts: dict[str, str | None] = dict.fromkeys(STAGES, errors.get("labelled"))
    verdicts["pretrain"] = errors.get("pretrain")
    if splits:
        first = next(iter(splits.values()))
        verdicts["pretrain"] = why_training_stops(len(first.findings.bad), len(first.source))
    if "labelled" not in errors:
        bad = {name: num_labelled(splits[name], [*splits[name].findings.bad]) for name in SPLITS}
        in_train, in_val = (
            f"{count:,} bad in {split}, and evaluation leaves none out" if count else None
            for split, count in bad.items()
        )
        trained = why_training_stops(bad["train"], num_labelled(splits["train"])) or in_val
        verdicts |= {"finetune": trained, "lincls": trained, "knn": in_train or in_val}
    return verdicts


def num_labelled(split: Split, indices: list[int] | slice = slice(None)) -> int:
    """Number of images that an evaluation takes, of all or of those at `indices`."""
    return int((split.labels[indices] >= 0).sum())


def split_facts(split: Split, args: argparse.Namespace) -> dict[str, Any]:
    """The facts about one split."""
    found, source = split.findings, split.source
    good = found.sides[found.sides[:, 0] > 0]
    reasons = Counter(reason.partition(":")[0] for reason in found.bad.values())
    others = other_files(source.root) if isinstance(source, FolderSource) else Counter[str]()
    facts: dict[str, Any] = {
        "images": len(source),
        "kinds": dict(found.kinds.most_common()),
        "bad": len(found.bad),
        "bad_by_reason": dict(reasons.most_common()),
        "notes": dict(found.notes.most_common()),
        "other_files": dict(others.most_common()),
        "bytes": found.num_bytes,
        "short_side": spread_of(good[:, 0]),
        "long_side": spread_of(good[:, 1]),
        "smaller_than_crop": int((good[:, 0] < args.img_size).sum()),
    }
    if split.class_names:
        counts = np.bincount(split.labels[split.labels >= 0], minlength=len(split.class_names))
        facts["images_per_class"] = dict(zip(split.class_names, counts.tolist(), strict=False))
        facts["without_class"] = len(source) - num_labelled(split)
    if args.full and len(good):
        mean, square = found.sums / len(good)
        facts["mean"] = mean.round(4).tolist()
        facts["std"] = np.sqrt(np.maximum(square - mean**2, 0)).round(4).tolist()
    return facts


def duplicate_facts(
    groups: list[list[tuple[int, int]]], splits: list[Split], root: Path
) -> dict[str, Any]:
    """The facts about groups of equal images, each by the number of its split and its index."""
    leaks = [group for group in groups if len({number for number, _ in group}) > 1]
    others = [group for group in groups if len({number for number, _ in group}) == 1]
    class_names = [
        {
            splits[number].class_names[splits[number].labels[index]]
            for number, index in group
            if splits[number].labels[index] >= 0
        }
        for group in groups
    ]
    return {
        "groups": len(groups),
        "images": sum(map(len, groups)),
        "groups_in_train_and_val": len(leaks),
        "val_images_in_train": sum(number for group in leaks for number, _ in group),
        "groups_in_several_classes": sum(len(names) > 1 for names in class_names),
        "files": [
            [os.path.relpath(splits[number].source.name(index), root) for number, index in group]
            for group in leaks + others
        ],
    }


if __name__ == "__main__":
    run_cli(lambda: sys.exit(0 if main()["could_start"] else 1))
