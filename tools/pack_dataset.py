"""Packs a folder of images into tar shards in WebDataset's format, or indexes such shards.

    python tools/pack_dataset.py SRC DST --side 256
    python tools/pack_dataset.py --index /path/to/shards/train/*.tar

SRC is a folder as training takes it: with train/ and val/ (class folders become labels), or any
folder of images. Train on the shards with --dataset packed --data_path DST. The same command
continues where a killed one stopped. SRC must not change meanwhile. With --index only the index is
written, beside the shards.
"""

import argparse
import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from data.labels import SPLITS, check_same_classes
from data.packs.index import INDEX, earlier_class_names, open_index, write_index
from data.packs.shards import index_shard
from engine.run.records import write_log
from tools.packing.packing import UNCHANGED, Listing, list_images, make_shard, shard_starts
from util.dist import available_cores
from util.errors import InputError, LineParser, run_cli
from util.files import TEMPORARY, lock, path, write_text, writing
from util.pool import in_processes
from util.settings.read import differences

PLAN, BAD_SAMPLES = "packing.json", "bad_samples.jsonl"


def main(argv: Sequence[str] | None = None) -> dict[str, int]:
    """Packs or indexes; returns the number of images by folder. Raises: InputError."""
    parser = LineParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("source", metavar="SRC", nargs="?", type=path, help="folder of images")
    parser.add_argument("target", metavar="DST", nargs="?", type=path, help="folder to pack into")
    parser.add_argument(
        "--side",
        type=int,
        choices=(0, 256, 384, 512),
        default=256,
        help="short side in pixels to which larger images are reduced if they are RGB or grey of "
        "8 bits; 0 keeps every file as it is (default 256)",
    )
    parser.add_argument(
        "--shard_mb", type=float, default=256.0, help="size of a shard in MiB (default 256)"
    )
    parser.add_argument(
        "--workers", type=int, default=available_cores(), help="processes (default: the cores)"
    )
    parser.add_argument(
        "--index", nargs="+", type=path, metavar="TAR", help="index these shards of one folder"
    )
    args = parser.parse_args(argv)
    if bool(args.index) == (args.target is not None) or (args.index and args.source):
        raise InputError("give either SRC and DST, or --index with tar files")
    if not 0 < args.shard_mb < float("inf"):
        raise InputError(f"--shard_mb must be above 0, got {args.shard_mb}")
    found = index_shards(args.index, args.workers) if args.index else pack(args)
    for folder, num_images in found.items():
        facts = json.loads((Path(folder) / INDEX).read_text(encoding="utf-8"))
        print(
            f"{folder}: {num_images} images, {facts['num_labelled']} with a label, "
            f"{facts['num_left_out']} left out"
        )
    return found


def pack(args: argparse.Namespace) -> dict[str, int]:
    """Packs train/ and val/ of a folder, or all of a folder that has no train/.

    Raises: InputError.
    """
    has_splits = (args.source / "train").is_dir()
    splits = [name for name in SPLITS if (args.source / name).is_dir()] if has_splits else [""]
    listings = {name: list_images(args.source / name, has_splits) for name in splits}
    named = {name: listing.class_names for name, listing in listings.items() if listing.class_names}
    if len(named) == len(SPLITS):  # else a label would mean another class in val/ than in train/
        check_same_classes(args.source, named)
    return {
        str(args.target / name): pack_split(listing, args.target / name, args)
        for name, listing in listings.items()
    }


def pack_split(listing: Listing, folder: Path, args: argparse.Namespace) -> int:
    """Packs one split, or the rest of it that an earlier process left; returns the number of
    images."""
    sizes, are_kept = listing.images["size"], listing.may_stay()
    starts = shard_starts(sizes, are_kept, args.side, args.shard_mb).tolist()
    ranges = map(range, starts, [*starts[1:], len(listing.images)])
    tasks = [(folder / f"shard-{n:06d}.tar", numbers) for n, numbers in enumerate(ranges)]
    with claimed(folder, listing, args):
        if (folder / INDEX).exists() and all(path.exists() for path, _ in tasks):
            return len(open_index(folder).entries)  # an earlier process was here
        made = in_processes(partial(make_shard, listing, args.side), tasks, args.workers)
        shards, bad = [], []
        for (path, _), (content, left_out, was_there) in zip(tasks, made, strict=True):
            shards.append((path.name, content))
            bad += left_out
            print(
                f"{path}: {len(shards)} of {len(tasks)}, {len(content.names)} images, "
                f"{len(left_out)} left out{', there already' if was_there else ''}",
                flush=True,
            )
        if list_images(listing.root, listing.class_names is not None).digest() != listing.digest():
            raise InputError(
                f"the images in {listing.root} changed while they were packed: {UNCHANGED}"
            )
        if bad:
            write_log(folder / BAD_SAMPLES, [entry._asdict() for entry in bad])
        return write_index(folder, shards, listing.class_names, args.side, len(bad))


@contextmanager
def claimed(folder: Path, listing: Listing, args: argparse.Namespace) -> Iterator[None]:
    """Writes down what is packed into a folder and keeps other processes out of it.

    Raises: InputError if the folder holds something else, or another process packs into it.
    """
    plan = {
        "version": 1,
        "side": args.side,
        "shard_mb": args.shard_mb,
        "num_images": len(listing.images),
        "images": listing.digest(),
    }
    plan_path = folder / PLAN
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not plan_path.exists():
            if any(entry.name != PLAN + TEMPORARY for entry in folder.iterdir()):
                raise InputError(
                    f"{folder} is not empty, and no pack was begun there: give a new folder"
                )
            write_text(plan_path, json.dumps(plan, indent=1) + "\n")
        file = plan_path.open("r+", encoding="utf-8")
    with file:
        try:
            lock(file, fcntl.flock)
            changes = differences(json.load(file), plan)
        except (BlockingIOError, json.JSONDecodeError, AttributeError) as error:  # no object
            raise InputError(
                f"another process packs into {folder}, or {plan_path} is damaged ({error}): "
                "wait for its end, or give another folder"
            ) from error
        if changes:
            raise InputError(
                f"{folder} holds a pack of other images or settings (old -> new): "
                f"{'; '.join(changes)}: give another folder"
            )
        yield


def index_shards(paths: list[Path], workers: int) -> dict[str, int]:
    """Writes the index of shards, which lie in one folder; returns the number of images by folder.

    Class names are those of an earlier index, if the labels fit them.
    """
    folder = paths[0].parent
    elsewhere = [path for path in paths if path.parent != folder]
    if elsewhere:
        raise InputError(
            f"shards of one index lie in one folder: {paths[0]} and {elsewhere[0]} do not"
        )
    paths = sorted(set(paths))
    indexed = in_processes(index_shard, paths, workers)
    shards = [(path.name, shard) for path, shard in zip(paths, indexed, strict=True)]
    highest = max(shard.entries["label"].max(initial=-1) for _, shard in shards)
    names = earlier_class_names(folder)
    they_fit = names is not None and highest == len(names) - 1
    return {str(folder): write_index(folder, shards, names if they_fit else None)}


if __name__ == "__main__":
    run_cli(main)
