"""Reading files of weights without running anything that they say.

A file is known by its first bytes, never by the ending of its name. Each is opened once: its sha256
and its tensors come from the same bytes. The tensors are views of a memory map, so that reading
takes no memory for a copy; only old pickles, which cannot be mapped, are read as a whole. Pickles
go through `torch.load` with `weights_only=True`, where one class beyond torch's own list is
allowed: `argparse.Namespace`, a plain record that the public MAE code and timm save beside the
weights.
"""

import argparse
import hashlib
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from models.weights.own import CHECKPOINT_VERSION, PIXEL_SETTINGS, decoded, unusual_pixels
from util.errors import InputError
from util.files import pretrained

WRAPPERS = ("model", "state_dict")  # where a .pth keeps the weights, in this order
OWN_HEADER = ("model_args", "mean", "std")
SOMETIMES = ("objective", "class_names", *PIXEL_SETTINGS)  # in the headers that need them
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
    header: of this project's files OWN_HEADER and some of SOMETIMES, of others the run's
        arguments.
    """

    tensors: dict[str, Tensor]
    source: str
    header: dict[str, Any] = field(default_factory=dict)


def weights_files(path: Path) -> list[Path]:
    """The files behind a path: itself, the weights of a Hugging Face folder (several if they are
    split), or the file of pretrained weights that comes with this project under that name.

    Raises: InputError for a path that does not exist or a folder of another kind.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        known = pretrained()
        if str(path) in known:
            return [known[str(path)]]
        raise InputError(
            f"{path}: there is no such file, and the weights that come with this project are "
            f"{' '.join(known)}"
        )
    if not path.is_dir():
        raise InputError(f"{path}: not a regular file")
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
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    with file:
        hashlib.file_digest(file, lambda: digest)
        stated = path.with_name(path.name + ".sha256")  # a flipped bit would load silently
        if alone and stated.is_file():
            text = stated.read_text(encoding="utf-8", errors="replace")
            if text.split()[:1] != [digest.hexdigest()]:
                raise InputError(f"{path}: damaged, its sha256 is not the one in {stated.name}")
        file.seek(0)
        start = file.peek()[:40]
        # The file that was hashed, whatever is at `path` by now.
        opened = f"/dev/fd/{file.fileno()}"
        try:
            if start[8:9] == b"{":
                return _from_safetensors(opened)
            if start.startswith(b"PK\x03\x04"):
                return _from_torch(path, opened)
            if start.startswith(b"\x80"):
                return _from_torch(path, file)
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001 (damaged bytes raise errors of any class)
            refused = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error))
            raise InputError(
                f"{path}: asks to run or build {refused[1]}: only tensors and plain values are read"
                if refused
                else f"{path}: cannot be read, is it whole? ({type(error).__name__})"
            ) from error
    found = f"it begins with {start!r}" if start else "it is an empty file"
    raise InputError(f"{path}: not a PyTorch or safetensors file, {found}")


def _from_safetensors(opened: str) -> RawWeights:
    with safetensors.safe_open(opened, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        metadata = file.metadata() or {}
    if "model_args" not in metadata:
        return RawWeights(tensors, "")
    names = [*OWN_HEADER, *(name for name in SOMETIMES if name in metadata)]
    return RawWeights(tensors, "weights", decoded({name: metadata[name] for name in names}))


def _from_torch(path: Path, opened: str | BinaryIO) -> RawWeights:
    """The weights inside what a .pth holds, mapped where `opened` is a path."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = torch.load(
            opened, map_location="cpu", weights_only=True, mmap=isinstance(opened, str)
        )
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
        config = outer.get("config") or {}
        header = {name: outer.get(name) for name in OWN_HEADER}
        header |= {"objective": config.get("objective"), **unusual_pixels(config)}
        return RawWeights(tensors, "checkpoint", header)
    args = outer.get("args")
    return RawWeights(tensors, source, vars(args) if isinstance(args, argparse.Namespace) else {})
