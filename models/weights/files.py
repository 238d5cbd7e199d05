"""Reading files of weights without running anything that they say.

A file is known by its first bytes, never by the ending of its name. Each is read once, through a
memory map from which its sha256 and its tensors come. Pickles go through `torch.load` with
`weights_only=True`, where one class beyond torch's own list is allowed: `argparse.Namespace`, a
plain record that the public MAE code and timm save beside the weights.
"""

import argparse
import hashlib
import json
import mmap
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import safetensors.torch
import torch
from torch import Tensor

from models.weights.own import CHECKPOINT_VERSION, decoded, split_header
from util.errors import InputError

WRAPPERS = ("model", "state_dict")  # where a .pth keeps the weights, in this order
OWN_HEADER = ("model_args", "mean", "std")
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class RawWeights:
    """A file's tensors under its own names, and what else it says.

    source: "checkpoint" and "weights" are this project's; otherwise the entry of WRAPPERS that held
        the tensors, or "" if none did.
    header: of this project's files the values of OWN_HEADER, of others the arguments of the run.
    """

    tensors: dict[str, Tensor]
    source: str
    header: dict[str, Any] = field(default_factory=dict)


def weights_files(path: Path) -> list[Path]:
    """The files behind a path: itself, or the weights of a Hugging Face folder (several if they
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
            f"{path}: a folder of weights must be a Hugging Face one, with config.json beside "
            f"{FOLDER_FILES[0]} or {FOLDER_FILES[2]}; of any other folder name the file of weights "
            f"in it"
        )
    if not name.endswith(".index.json"):
        return [path / name]
    weight_map = read_json(path / name).get("weight_map")
    parts = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    strange = [part for part in parts if Path(part).name != part or not (path / part).is_file()]
    if strange or not parts:
        raise InputError(
            f"{path / name}: names no parts, or parts that are not beside it: "
            f"{', '.join(strange[:3])}"
        )
    return [path / part for part in parts]


def weights_digest(path: str | Path) -> str:
    """sha256 of the file, or of the weights inside a Hugging Face folder.

    Raises: InputError if there is no such path.
    """
    digest = hashlib.sha256()
    for file in weights_files(Path(path)):
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def read_files(files: list[Path]) -> tuple[RawWeights, str]:
    """The content of a file, or of the parts of one, and the sha256 of their bytes.

    Raises: InputError for anything that is not a dict of tensors, or disagrees with the .sha256
    beside it.
    """
    digest = hashlib.sha256()
    parts = [_read(path, digest, alone=len(files) == 1) for path in files]
    if len(parts) == 1:
        return parts[0], digest.hexdigest()
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    return RawWeights(tensors, ""), digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a dict. Raises: InputError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _read(path: Path, digest: Any, alone: bool) -> RawWeights:
    """Reads one file, and updates `digest` with its bytes."""
    try:
        if not path.stat().st_size:
            raise InputError(f"{path}: an empty file, not a PyTorch or safetensors file")
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    with content:
        digest.update(content)
        stated = path.with_name(path.name + ".sha256")  # a flipped bit would load silently
        if alone and stated.is_file():
            text = stated.read_text(encoding="utf-8", errors="replace")
            if text.split()[:1] != [digest.hexdigest()]:
                raise InputError(f"{path}: damaged, its sha256 is not the one in {stated.name}")
        start = content[:256]
        if start[8:9] == b"{":
            return _read_safetensors(path, content[:])
        if start.startswith((b"PK\x03\x04", b"\x80")):
            return _read_torch(path, content)
    raise InputError(f"{path}: {_what_it_is(start)}, not a PyTorch or safetensors file")


def _read_safetensors(path: Path, content: bytes) -> RawWeights:
    try:
        tensors = dict(sorted(safetensors.torch.load(content).items()))
        metadata = split_header(content)[0].get("__metadata__", {})
        if "model_args" not in metadata:
            return RawWeights(tensors, "")
        header = decoded({name: metadata[name] for name in OWN_HEADER})
    except Exception as error:  # noqa: BLE001 (damaged bytes raise errors of any class)
        raise InputError(
            f"{path}: cannot be read as safetensors, is it whole? {_one_line(error)}"
        ) from error
    return RawWeights(tensors, "weights", header)


def _read_torch(path: Path, content: mmap.mmap) -> RawWeights:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(cast(BinaryIO, content), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (damaged bytes raise errors of any class)
        refused = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error))
        if refused:
            raise InputError(
                f"{path}: refused, it asks to run or build {refused[1]}: only tensors and plain "
                f"values are read"
            ) from error
        raise InputError(
            f"{path}: cannot be read as a PyTorch file, is it whole? {_one_line(error)}"
        ) from error
    return _unwrapped(path, loaded)


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
        found = f"{', '.join(strange[:5])} are something else" if strange else "it is empty"
        raise InputError(
            f"{path}: expected a dict of tensors, or one under "
            f"{' or '.join(map(repr, WRAPPERS))}; {found}"
        )
    tensors = {name: value.detach() for name, value in tensors.items()}
    if source == "model" and "format_version" in content:
        found = content["format_version"]
        if found != CHECKPOINT_VERSION:
            raise InputError(f"{path} has format {found}; this version reads {CHECKPOINT_VERSION}")
        return RawWeights(tensors, "checkpoint", {name: content.get(name) for name in OWN_HEADER})
    args = content.get("args")
    return RawWeights(tensors, source, vars(args) if isinstance(args, argparse.Namespace) else {})


def _what_it_is(start: bytes) -> str:
    """A file's kind in words, from its first bytes."""
    if start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM")) or start[8:12] == b"WEBP":
        return "an image"
    if start.startswith(b"version https://git-lfs"):
        return "the placeholder of a file that git lfs has not fetched yet"
    is_text = all(byte >= 32 or byte in b"\t\n\r" for byte in start)
    return "a text file" if is_text else "a file of unknown kind"


def _one_line(error: Exception) -> str:
    """The line of an error's text that says what is wrong, shortened; torch puts advice around
    it."""
    lines = [
        line.strip().removeprefix("WeightsUnpickler error: ") for line in str(error).splitlines()
    ]
    telling = [line for line in lines if line and "weights_only" not in line]
    return f"({telling[0][:150] if telling else type(error).__name__})"
