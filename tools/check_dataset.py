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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from data.images import PixelFormat, pixel_format
from data.labels import SPLITS, ClassFolder, build_labelled_data, class_folders
from data.packs.index import INDEX
from data.packs.source import PackedSource
from data.sources import check_folder, check_format
from engine.run.faults import why_training_stops
from engine.run.records import write_log
from tools.checking.checks import equal_images, examine, format_of, other_files
from tools.checking.report import STAGES, Facts, report, spread_of
from util.dist import available_cores
from util.errors import InputError, LineParser, run_cli
from util.files import path, write_text
from util.settings.base import PixelConfig


@dataclass
class Split:
    """One split and what was found in it: `(n,)` of FINDING. No class_names if no image has a
    label."""

    source: ClassFolder | PackedSource
    class_names: list[str]
    findings: np.ndarray

    def bad(self) -> np.ndarray:
        """Indices of the images that cannot be read."""
        return np.flatnonzero(self.findings["reason"])

    def num_labelled(self, indices: np.ndarray | slice = slice(None)) -> int:
        """Number of images that an evaluation takes, of all or of those at `indices`."""
        return int((self.source.labels[indices] >= 0).sum())


def main(argv: Sequence[str] | None = None) -> Facts:
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
        "--in_chans",
        type=int,
        help="number of channels of the model's input (default: 3 for RGB and grey, else those of "
        "the first image, or of channels)",
    )
    for name in ("pixel_range", "channels", "dicom_window"):
        parser.add_argument(f"--{name}", nargs="+", help="as the setting of the stages")
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
    facts, bad = check(args, asked_format(args))
    sys.stdout.write("\n".join(report(facts, bad, args.img_size)) + "\n")
    if args.problems:  # as a run's bad_samples.jsonl
        write_log(args.problems, [{"path": name, "reason": reason} for name, reason in bad])
    if args.json:
        write_text(args.json, json.dumps(facts, indent=1) + "\n")
    return facts


def asked_format(args: argparse.Namespace) -> PixelFormat:
    """The format that the flags name, in_chans 0 if they leave it to the images. Raises: InputError
    for a wrong value."""
    names = ("pixel_range", "channels", "dicom_window")
    given = {name: getattr(args, name) for name in names if getattr(args, name)}
    try:
        cfg = PixelConfig.model_validate(given)
    except ValidationError as error:
        (wrong, *_) = error.errors()
        raise InputError(f"--{wrong['loc'][0]}: {wrong['msg']}") from error
    return pixel_format(cfg, args.in_chans or len(cfg.channels))


def check(args: argparse.Namespace, pixels: PixelFormat) -> tuple[Facts, list[tuple[str, str]]]:
    """Examines all images; returns the facts, in plain values, and path and reason of each bad
    file."""
    root, started = args.path, time.monotonic()
    folders = {name: root / name for name in SPLITS}
    is_packed = any((folder / INDEX).exists() for folder in (root, *folders.values()))
    dataset = args.dataset or ("packed" if is_packed else "folder")
    errors, num_classes, splits = {}, 0, {}
    for name, folder in folders.items() if folders["train"].is_dir() else [("all", root)]:
        try:
            source, class_names = open_split(dataset, folder)
        except InputError as error:  # of val/ the evaluations' verdict reports it
            errors["labelled" if name == "val" else "pretrain"] = str(error)
        else:
            pixels = source.pixels = format_of(source, pixels)
            findings = examine(source, args.full, args.workers, pixels)
            splits[name] = Split(source, class_names, findings)
            try:
                check_format(source)
            except InputError as error:
                errors["labelled" if name == "val" else "pretrain"] = str(error)
    try:
        num_classes = len(build_labelled_data(dataset, str(root), pixels, False, None).class_names)
    except InputError as error:
        errors["labelled"] = str(error)
    verdicts = verdicts_of(splits, errors)
    has_classes = "train" in splits and splits["train"].class_names and folders["val"].is_dir()
    asked = args.stages or ["pretrain", *(["finetune", "lincls"] if has_classes else [])]
    facts = {
        "path": str(root),
        "dataset": dataset,
        "full": args.full,
        "seconds": round(time.monotonic() - started, 1),
        "num_classes": num_classes,
        "splits": {name: split_facts(split, args) for name, split in splits.items()},
        "duplicates": duplicate_facts([*splits.values()], args),
        "verdicts": verdicts,
        "asked": asked,
        "could_start": all(verdicts[stage] is None for stage in asked),
    }
    bad = [
        (split.source.name(index), split.findings["reason"][index])
        for split in splits.values()
        for index in split.bad().tolist()
    ]
    return facts, bad


def open_split(dataset: str, folder: Path) -> tuple[ClassFolder | PackedSource, list[str]]:
    """The images of a split with their labels, and the class names, for which shards may have to
    count; none if no image has a label. Raises: InputError if there are no images."""
    if dataset == "folder":
        class_names = class_folders(folder)
        source: ClassFolder | PackedSource = ClassFolder(folder, class_names, PixelFormat(3))
    else:
        source = PackedSource(folder, PixelFormat(3))
        class_names = source.index.class_names or [*map(str, range(source.labels.max() + 1))]
    return source, class_names if (source.labels >= 0).any() else []


def verdicts_of(splits: dict[str, Split], errors: dict[str, str]) -> dict[str, str | None]:
    """By stage the reason why it could not start or would stop, None if it could train.

    errors: why the images of `pretrain`, or those with a label (`labelled`), cannot be opened.
    """
    verdicts: dict[str, str | None] = dict.fromkeys(STAGES, errors.get("labelled"))
    verdicts["pretrain"] = errors.get("pretrain")
    if "pretrain" not in errors:
        first = next(iter(splits.values()))
        verdicts["pretrain"] = why_training_stops(len(first.bad()), len(first.source))
    if "labelled" not in errors:
        bad = {name: splits[name].num_labelled(splits[name].bad()) for name in SPLITS}
        in_train, in_val = (
            f"{count:,} bad in {split}, and evaluation leaves none out" if count else None
            for split, count in bad.items()
        )
        trained = why_training_stops(bad["train"], splits["train"].num_labelled()) or in_val
        verdicts |= {"finetune": trained, "lincls": trained, "knn": in_train or in_val}
    return verdicts


def split_facts(split: Split, args: argparse.Namespace) -> Facts:
    """The facts about one split."""
    found, source = split.findings, split.source
    reasons, good = found["reason"][split.bad()], found[found["reason"] == 0]
    others = other_files(source.root) if isinstance(source, ClassFolder) else Counter()
    facts = {
        "images": len(source),
        "kinds": counted(good["kind"]),
        "bad": len(reasons),
        "bad_by_reason": counted(reason.partition(":")[0] for reason in reasons),
        "notes": counted([*good["ending"], *good["turn"]]),
        "other_files": dict(others.most_common()),
        "bytes": int(found["num_bytes"].sum()),
        "short_side": spread_of(good["sides"][:, 0]),
        "long_side": spread_of(good["sides"][:, 1]),
        "smaller_than_crop": int((good["sides"][:, 0] < args.img_size).sum()),
    }
    if split.class_names:
        labels = source.labels[source.labels >= 0]
        counts = np.bincount(labels, minlength=len(split.class_names)).tolist()
        by_class = dict(zip(split.class_names, counts, strict=False))
        facts |= {"images_per_class": by_class, "without_class": len(source) - len(labels)}
    if args.full and (deep := found[found["extremes"].any(axis=(1, 2))]).size:
        samples = [values for values in deep["values"] if not np.isscalar(values)]
        low, high = np.percentile(np.concatenate(samples, axis=1), [1, 99], axis=1)
        lowest, highest = deep["extremes"][:, 0].min(axis=0), deep["extremes"][:, 1].max(axis=0)
        named = {"min": lowest, "1 %": low, "99 %": high, "max": highest}
        facts["values"] = {name: value.tolist() for name, value in named.items()}
    if args.full and len(good):
        mean, square = good["moments"].mean(axis=0, dtype=float)
        std = np.sqrt(np.maximum(square - mean**2, 0))
        facts |= {"mean": mean.round(4).tolist(), "std": std.round(4).tolist()}
    return facts


def duplicate_facts(splits: list[Split], args: argparse.Namespace) -> Facts:
    """The facts about groups of equal images; those in several splits come first."""
    sources, keys = [split.source for split in splits], [split.findings["key"] for split in splits]
    found = equal_images(sources, keys, args.full)
    groups = sorted(found, key=lambda group: group[0][0] == group[-1][0])
    class_names = [
        {
            splits[number].class_names[splits[number].source.labels[index]]
            for number, index in group
            if splits[number].source.labels[index] >= 0
        }
        for group in groups
    ]
    leaks = [group for group in groups if group[0][0] != group[-1][0]]
    return {
        "groups": len(groups),
        "images": sum(map(len, groups)),
        "groups_in_train_and_val": len(leaks),
        "val_images_in_train": sum(number for group in leaks for number, _ in group),
        "groups_in_several_classes": sum(len(names) > 1 for names in class_names),
        "files": [
            [os.path.relpath(sources[number].name(index), args.path) for number, index in group]
            for group in groups
        ],
    }


def counted(values: Iterable[str]) -> dict[str, int]:
    """How often each value occurs, the most frequent first; empty ones are left out."""
    return dict(Counter(filter(None, values)).most_common())


if __name__ == "__main__":
    run_cli(lambda: sys.exit(0 if main()["could_start"] else 1))
