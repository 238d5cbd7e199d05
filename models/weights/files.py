"""Reading files of weights without running anything that they say.

A file is known by its first bytes, never by the ending of its name. Each is read once, through a
memory map from which its sha256 and its tensors come. Pickles go through `torch.load` with
`weights_only=True`, where one class beyond torch's own list is allowed: `argparse.Namespace`, a
plain record that the public MAE code and timm save beside the weights.
"""

import argparse
import hashlib
import mmap
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import safetensors.torch
import torch
from torch import Tensor

from models.weights.own import CHECKPOINT_VERSION, decoded, split_header
from util.errors import InputError

WRAPPERS = ("model", "state_dict")  # where a .pth keeps the weights, in this order
OWN_HEADER = ("model_args", "mean", "std")
FOLDER_FILES = (  # of Hugging Face's folders; large weights are split into several files
    "model.safetensors",
    "model-*-of-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
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
    found = [sorted(path.glob(pattern)) for pattern in FOLDER_FILES]
    files = next((files for files in found if files), None)
    if files is None or not (path / "config.json").is_file():
        raise InputError(
            f"{path}: a folder of weights must be a Hugging Face one, with config.json beside "
            f"{FOLDER_FILES[0]} or {FOLDER_FILES[2]}; of any other folder name the file of weights "
            f"in it"
        )
    return files


def weights_digest(path: str | Path) -> str:
    """sha256 of the file, or of the weights inside a Hugging Face folder.

    Raises: InputError if there is no such path.
    """
    digest = hashlib.sha256()
    for file in weights_files(Path(path)):
        with file.open("rb") as opened:
            hashlib.file_digest(opened, lambda: digest)  # goes on with the digest so far
    return digest.hexdigest()


def read_files(files: list[Path]) -> tuple[RawWeights, str]:
    """The content of a file, or of the parts of one, and the sha256 of their bytes.

    Raises: InputError for anything that is not a dict of tensors, or disagrees with the .sha256
    beside it.
    """
    digest = hashlib.sha256()
    parts = [_read(path, digest, alone=len(files) == 1) for path in files]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    return replace(parts[0], tensors=tensors), digest.hexdigest()


def _read(path: Path, digest: Any, alone: bool) -> RawWeights:
    """Reads one file, and updates `digest` with its bytes."""
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise InputError(f"{path}: cannot be read: {error}") from None
    with content:
        digest.update(content)
        stated = path.with_name(path.name + ".sha256")  # a flipped bit would load silently
        if alone and stated.is_file():
            text = stated.read_text(encoding="utf-8", errors="replace")
            if text.split()[:1] != [digest.hexdigest()]:
                raise InputError(f"{path}: damaged, its sha256 is not the one in {stated.name}")
        start = content[:40]
        try:
            if start[8:9] == b"{":
                return _from_safetensors(content[:])
            if start.startswith((b"PK\x03\x04", b"\x80")):
                return _from_torch(path, content)
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001 (damaged bytes raise errors of any class)
            refused = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error))
            raise InputError(
                f"{path}: asks to run or build {refused[1]}: only tensors and plain values are read"
                if refused
                else f"{path}: cannot be read, is it whole? ({type(error).__name__})"
            ) from error
    raise InputError(f"{path}: not a PyTorch or safetensors file, it begins with {start!r}")


def _from_safetensors(content: bytes) -> RawWeights:
    tensors = dict(sorted(safetensors.torch.load(content).items()))
    metadata = split_header(content)[0].get("__metadata__", {})
    if "model_args" not in metadata:
        return RawWeights(tensors, "")
    return RawWeights(tensors, "weights", decoded({name: metadata[name] for name in OWN_HEADER}))


def _from_torch(path: Path, content: mmap.mmap) -> RawWeights:
    """The weights inside what a .pth holds."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = torch.load(cast(BinaryIO, content), map_location="cpu", weights_only=True)
    outer = loaded if isinstance(loaded, dict) else {}
    source = next((name for name in WRAPPERS if isinstance(outer.get(name), dict)), "")
    tensors = outer[source] if source else outer
    strange = [
        repr(key)
        for key, value in tensors.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if strange or not tensors:
        raise InputError(
            f"{path}: expected a dict of tensors, or one under "
            f"{' or '.join(map(repr, WRAPPERS))}; got {type(loaded).__name__} with "
            f"{', '.join(strange[:5]) or 'nothing'} in it"
        )
    tensors = {name: value.detach() for name, value in tensors.items()}
    if source == "model" and "format_version" in outer:
        found = outer["format_version"]
        if found != CHECKPOINT_VERSION:
            raise InputError(f"{path} has format {found}; this version reads {CHECKPOINT_VERSION}")
        return RawWeights(tensors, "checkpoint", {name: outer.get(name) for name in OWN_HEADER})
    args = outer.get("args")
    return RawWeights(tensors, source, vars(args) if isinstance(args, argparse.Namespace) else {})
