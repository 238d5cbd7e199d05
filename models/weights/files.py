"""Files of weights, read without running anything that they say and written whole or not at all.

A file is known by its first bytes, never by the ending of its name. Pickles go through `torch.load`
with `weights_only=True`, where one class beyond torch's own list is let in: `argparse.Namespace`, a
plain record that the public MAE code and timm save beside the weights.
"""

import argparse
import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from util.errors import InputError
from util.files import write_whole

CHECKPOINT_VERSION = 2  # of this project's .pth files, which engine/run/checkpoint.py writes
WRAPPERS = ("model", "state_dict")  # where a .pth keeps the weights, in this order
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What torch and safetensors raise for bytes that are not what they should be (found by cutting and
# flipping them).
DAMAGE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    AssertionError,
    pickle.UnpicklingError,
    safetensors.SafetensorError,
)


@dataclass(frozen=True)
class RawWeights:
    """A file's tensors under its own names, and what else it says."""

    tensors: dict[str, Tensor]
    source: str  # "checkpoint" and "weights" are this project's; else one of WRAPPERS, or "" for bare tensors
    facts: dict[str, Any] = field(
        default_factory=dict
    )  # own: model_args, mean, std; foreign: entries of its args


def weights_files(path: Path) -> list[Path]:
    """The files behind a path: itself, or the weights of a Hugging Face folder (several where they
    are split).

    Raises: InputError for a path that does not exist or a folder of another kind.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(
            f"{path}: {'not a regular file' if path.exists() else 'there is no such file'}"
        )
    name = next((name for name in FOLDER_FILES if (path / name).is_file()), None)
    if name is None or not (path / "config.json").is_file():
        raise InputError(
            f"{path}: a folder of weights must be a Hugging Face one, with config.json beside {FOLDER_FILES[0]} or "
            f"{FOLDER_FILES[2]}; of any other folder name the file of weights in it"
        )
    if not name.endswith(".index.json"):
        return [path / name]
    weight_map = read_json(path / name).get("weight_map")
    parts = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    strange = [part for part in parts if Path(part).name != part or not (path / part).is_file()]
    if strange or not parts:
        raise InputError(
            f"{path / name}: names no parts, or parts that are not beside it: {', '.join(strange[:3])}"
        )
    return [path / part for part in parts]


def sha256_of(files: list[Path]) -> str:
    """The sha256 of a file; of several, of their bytes one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def read_raw(path: Path) -> RawWeights:
    """Reads one file, of this project or another.

    Raises: InputError for anything that is not a dict of tensors, or disagrees with the .sha256
    beside it.
    """
    try:
        with path.open("rb") as file:
            start = file.read(256)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    digest = path.with_name(path.name + ".sha256")  # a flipped bit would load silently
    if digest.is_file() and digest.read_text(encoding="utf-8", errors="replace").split()[:1] != [
        sha256_of([path])
    ]:
        raise InputError(f"{path}: damaged, its sha256 is not the one in {digest.name}")
    if start[8:9] == b"{":
        return _read_safetensors(path)
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return _read_torch(path)
    raise InputError(f"{path}: {_what_it_is(start)}, not a PyTorch or safetensors file")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a dict. Raises: InputError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def safetensors_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file; equal for equal content, as the library's random order of the metadata is
    made a fixed one.

    The file begins with its header's length (8 bytes, little-endian) and the header (JSON, padded
    with spaces).
    """
    content = safetensors.torch.save(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata
    )
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    assert len(text) == size, "the same JSON in another order is as long"
    return content[:8] + text + content[8 + size :]


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """`write_whole` for a user's path. Raises: InputError where the system refuses."""
    try:
        write_whole(path, write)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: cannot be written: {error}") from None


def write_folder(path: Path, contents: Mapping[str, bytes]) -> None:
    """As `write_file`, for a folder of files that appears whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        for name, content in contents.items():
            with (temporary / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_safetensors(path: Path) -> RawWeights:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if "model_args" not in header:
            return RawWeights(tensors, "")
        facts = {name: json.loads(header[name]) for name in ("model_args", "mean", "std")}
    except DAMAGE as error:
        raise InputError(
            f"{path}: cannot be read as safetensors, is it whole? {_one_line(error)}"
        ) from None
    return RawWeights(tensors, "weights", facts)


def _read_torch(path: Path) -> RawWeights:
    try:
        # an open file: torch would go by the ending of a name
        with path.open("rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        refused = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error))
        if refused:
            raise InputError(
                f"{path}: refused, it asks to run or build {refused[1]}: only tensors and plain values are read"
            ) from None
        raise InputError(
            f"{path}: cannot be read as a PyTorch file, is it whole? {_one_line(error)}"
        ) from None
    return _unwrapped(path, content)


def _unwrapped(path: Path, content: Any) -> RawWeights:
    """The weights inside what a .pth holds."""
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a dict of tensors, got {type(content).__name__}")
    source = next((name for name in WRAPPERS if isinstance(content.get(name), dict)), "")
    tensors = content[source] if source else content
    strange = [
        repr(key)
        for key, value in tensors.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if strange or not tensors:
        raise InputError(
            f"{path}: expected a dict of tensors, or one under {' or '.join(map(repr, WRAPPERS))}; "
            + (f"{', '.join(strange[:5])} are something else" if strange else "it is empty")
        )
    tensors = {name: value.detach() for name, value in tensors.items()}
    if source == "model" and "format_version" in content:
        if content["format_version"] != CHECKPOINT_VERSION:
            raise InputError(
                f"{path} has format {content['format_version']}, this version reads {CHECKPOINT_VERSION}"
            )
        return RawWeights(
            tensors,
            "checkpoint",
            {name: content.get(name) for name in ("model_args", "mean", "std")},
        )
    args = content.get("args")
    return RawWeights(tensors, source, vars(args) if isinstance(args, argparse.Namespace) else {})


def _what_it_is(start: bytes) -> str:
    """A file's kind in words, from its first bytes."""
    if not start:
        return "an empty file"
    if start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM")) or start[8:12] == b"WEBP":
        return "an image"
    if start.startswith(b"version https://git-lfs"):
        return "the placeholder of a file that git lfs has not fetched yet"
    is_text = all(byte >= 32 or byte in b"\t\n\r" for byte in start)
    return "a text file" if is_text else "a file of unknown kind"


def _one_line(error: BaseException) -> str:
    """The line of an error's text that says what is wrong, shortened; torch puts advice around
    it."""
    lines = [
        line.strip().removeprefix("WeightsUnpickler error: ") for line in str(error).splitlines()
    ]
    telling = [line for line in lines if line and "weights_only" not in line]
    return f"({telling[0][:150] if telling else type(error).__name__})"
