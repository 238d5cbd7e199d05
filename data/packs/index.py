"""The index of a folder of shards, by which single images are read from them.

`index.npy` holds an entry per image, `names.npy` the members' names one after the other; both are
mapped into memory. `index.json` holds the shards and the classes. It is written last: without it
there is no index.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data.packs.shards import ENTRY, ShardIndex, shard_fingerprint
from util.errors import DataError, InputError
from util.files import write_text, write_whole, writing

VERSION = 1
INDEX, ENTRIES, NAMES = "index.json", "index.npy", "names.npy"


@dataclass(frozen=True)
class PackIndex:
    """An opened index: entries `(n,)` of ENTRY, names of the shards, and `names` `(bytes,)` uint8
    of the images' members, one after the other.

    class_names: in the order of the labels, None if they are not known.
    fingerprint: of the images' names, labels and contents, however they are spread over shards.
    """

    shards: list[str]
    class_names: list[str] | None
    fingerprint: str
    entries: np.ndarray
    names: np.ndarray


def write_index(
    folder: Path,
    shards: Sequence[tuple[str, ShardIndex]],
    class_names: list[str] | None,
    side: int | None = None,
    num_left_out: int = 0,
) -> int:
    """Writes the index of shards by name, in place of an earlier one; returns the number of images.

    `side` and `num_left_out` are for people to read. Raises: InputError if there is no image or no
    space, or if a file in the way is not of an earlier index.
    """
    entries = np.concatenate([shard.entries for _, shard in shards])
    if not len(entries):
        raise InputError(f"there is no image in the shards of {folder}")
    entries["shard"] = np.repeat(np.arange(len(shards)), [len(s.entries) for _, s in shards])
    names = [name for _, shard in shards for name in shard.names]
    entries["name"] = np.cumsum([0, *map(len, names)])[:-1]
    text = b"".join(names)
    parts = [text, *(entries[part].tobytes() for part in ("name", "length", "crc32", "label"))]
    content = {
        "version": VERSION,
        "num_images": len(entries),
        "num_labelled": int((entries["label"] >= 0).sum()),
        "num_left_out": num_left_out,
        "side": side,
        "class_names": class_names,
        "fingerprint": hashlib.sha256(b"".join(parts)).hexdigest(),
        "shards": [
            {
                "name": name,
                "size": shard.size,
                "fingerprint": shard.fingerprint,
                "num_images": len(shard.entries),
            }
            for name, shard in shards
        ],
    }
    _check_replaceable(folder)
    with writing(folder / INDEX):
        (folder / INDEX).unlink(missing_ok=True)
        write_whole(folder / ENTRIES, partial(_save_array, entries))
        write_whole(folder / NAMES, partial(_save_array, np.frombuffer(text, np.uint8)))
        write_text(folder / INDEX, json.dumps(content, indent=1) + "\n")
    return len(entries)


def _save_array(array: np.ndarray, path: Path) -> None:
    with path.open("wb") as file:  # given a path, np.save would add an ending
        np.save(file, array)


def _check_replaceable(folder: Path) -> None:
    """Raises: InputError if a file that an index would replace is not of an index, complete or
    interrupted."""
    there = [folder / name for name in (INDEX, ENTRIES, NAMES) if (folder / name).exists()]
    try:
        if folder / INDEX in there:
            is_ours = "fingerprint" in json.loads((folder / INDEX).read_text(encoding="utf-8"))
        else:  # index.npy is the first to be written
            is_ours = not there or np.load(folder / ENTRIES, mmap_mode="r").dtype == ENTRY
    except (OSError, ValueError, TypeError, EOFError):
        is_ours = False
    if not is_ours:
        raise InputError(
            f"{there[0]} was not written by this program, or is damaged: move it away if it is not "
            "needed, as an index of the shards would replace it"
        )


def open_index(folder: Path) -> PackIndex:
    """The index of a folder of shards, which are still those that it was made of.

    Raises: DataError if index or shards are missing or damaged, or do not fit one another.
    """
    again = f"python tools/pack_dataset.py --index {folder}/*.tar"
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        shards = content["shards"]
        counts = [shard["num_images"] for shard in shards]
        entries, names = (
            np.load(folder / name, mmap_mode="r").view(np.ndarray) for name in (ENTRIES, NAMES)
        )
        if (
            (content["version"], entries.dtype, names.dtype) != (VERSION, ENTRY, np.uint8)
            or not len(entries) == sum(counts) > 0
            or any(Path(shard["name"]).name != shard["name"] for shard in shards)
        ):
            raise ValueError("its files do not fit one another")
        for shard, inside in zip(shards, np.split(entries, np.cumsum(counts)[:-1]), strict=True):
            with (folder / shard["name"]).open("rb") as file:
                fingerprint = shard_fingerprint(file.fileno(), inside["offset"])
            is_inside = (inside["length"] <= shard["size"] - inside["offset"]).all()
            if fingerprint != shard["fingerprint"] or not is_inside:
                raise ValueError(f"it is older than {shard['name']}, or damaged")
        return PackIndex(
            shards=[shard["name"] for shard in shards],
            class_names=content["class_names"],
            fingerprint=content["fingerprint"],
            entries=entries,
            names=names,
        )
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} has no {Path(error.filename).name}: give the command that packed it again, "
            f"or for shards from elsewhere {again}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise DataError(
            f"the index of {folder} cannot be used ({error}): index the shards again, {again}"
        ) from error


def earlier_class_names(folder: Path) -> list[str] | None:
    """The class names in a folder's index, whether or not its shards have changed; None if there
    are none."""
    try:
        return json.loads((folder / INDEX).read_text(encoding="utf-8"))["class_names"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
