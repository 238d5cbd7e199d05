"""This project's own files of weights: safetensors whose header holds, as JSON, the model's
specification (`model_args`), `mean` and `std`, and what else a run records.

Files with equal content have equal bytes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

# Settings of how files became pixels, with their defaults; those that differ are in the header.
PIXEL_SETTINGS: dict[str, list[str | int]] = {
    "pixel_range": ["auto"],
    "channels": [],
    "dicom_window": ["file"],
}
CHECKPOINT_VERSION = 2  # of checkpoint-*.pth files, which engine/run/checkpoint.py writes


def own_bytes(tensors: Mapping[str, Tensor], header: Mapping[str, object]) -> bytes:
    """The content of a file with these tensors and a header of plain values, which is written in a
    fixed order (the library's is random)."""
    metadata = {"format": "pt"} | {name: json.dumps(value) for name, value in header.items()}
    content = safetensors.torch.save(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata
    )
    whole, end = split_header(content)
    whole["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode().ljust(end - 8)
    assert len(text) == end - 8, "the same JSON in another order has the same length"
    return b"".join((content[:8], text, memoryview(content)[end:]))  # one copy, not two


def unusual_pixels(config: Mapping[str, Any]) -> dict[str, object]:
    """Those of PIXEL_SETTINGS in a run's settings, as JSON has them, that differ from the
    defaults."""
    return {n: config[n] for n, usual in PIXEL_SETTINGS.items() if config.get(n, usual) != usual}


def read_header(path: Path) -> dict[str, Any]:
    """The header of one of this project's safetensors files. A damaged file may raise an error of
    any class."""
    # by its descriptor, as the library takes no path that is no UTF-8
    with (
        path.open("rb") as opened,
        safetensors.safe_open(f"/dev/fd/{opened.fileno()}", framework="pt") as file,
    ):
        return decoded(file.metadata())


def decoded(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The plain values of a header. Raises: ValueError for text that is not JSON."""
    return {name: json.loads(value) for name, value in metadata.items() if name != "format"}


def split_header(content: bytes) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, and where its tensors begin.

    The file begins with the header's length (8 bytes, little-endian) and the header (JSON, padded
    with spaces).
    """
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), end
