"""Reading and writing everyone's weights: this project's, the public MAE code's, the reference
project's, timm's and Hugging Face's. Whatever the file, its tensors come out under the names of the
published MAE weights, with the facts that the model is built from; the way back is `write_weights`.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.weights.files import (
    RawWeights,
    read_raw,
    safetensors_bytes,
    sha256_of,
    weights_files,
    write_file,
    write_folder,
)
from models.weights.huggingface import huggingface_config, to_huggingface
from models.weights.info import WeightsInfo, classifier_args, complete, expected_shapes, mae_args
from models.weights.recognise import recognise
from util.errors import InputError

__all__ = [
    "FORMATS",
    "WeightsInfo",
    "classifier_args",
    "complete",
    "describe_weights",
    "load_weights",
    "mae_args",
    "read_weights",
    "weights_digest",
    "write_weights",
]

logger = logging.getLogger(__name__)


def read_weights(
    path: str | Path, img_size: tuple[int, int] | None = None
) -> tuple[dict[str, Tensor], WeightsInfo]:
    """The tensors of a file or Hugging Face folder on the CPU, under canonical names, and what they
    are.

    The tensors are all that the model in `WeightsInfo` has, in its shapes and the file's dtype.
    `img_size` (H, W) is for foreign files whose images were not square; this project's files record
    it.

    Raises: InputError for anything else, naming the path and both sides. Nothing that a file says
    is ever run.
    """
    path = Path(path)
    files = weights_files(path)
    parts = [read_raw(file) for file in files]
    raw = parts[0]
    if len(parts) > 1:
        raw = RawWeights(
            {name: tensor for part in parts for name, tensor in part.tensors.items()}, ""
        )
    return recognise(raw, files[0].parent, str(path), img_size)


def load_weights(path: str | Path, img_size: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """The first half of `read_weights`: canonical, strictly loadable tensors."""
    return read_weights(path, img_size)[0]


def describe_weights(path: str | Path, img_size: tuple[int, int] | None = None) -> WeightsInfo:
    """The second half of `read_weights`: what a file holds."""
    return read_weights(path, img_size)[1]


def weights_digest(path: str | Path) -> str:
    """sha256 of the file, or of the weights inside a Hugging Face folder. Raises: InputError for no
    such path."""
    return sha256_of(weights_files(Path(path)))


def write_weights(
    tensors: dict[str, Tensor], info: WeightsInfo, path: str | Path, form: str
) -> None:
    """Writes canonical tensors in one of FORMATS, whole or not at all; never over something that is
    there.

    Raises: InputError before anything is written where the format cannot hold the model or a needed
    fact is unknown.
    """
    path = Path(path)
    if form not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, got {form!r}")
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} is already there: name another target, or remove it")
    if not path.parent.is_dir():
        raise InputError(f"{path}: its folder {path.parent} is not there")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == expected_shapes(info)
    # safetensors refuses tensors that share memory, as the parts of one file may
    FORMATS[form](
        {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, info, path
    )


def _write_mae(tensors: dict[str, Tensor], info: WeightsInfo, path: Path) -> None:
    """The public MAE code's: `{"model": tensors}`."""
    needs = {
        "it needs a class token in the encoder": info.class_token,
        "it needs the class token in the decoder": not info.has_decoder
        or bool(info.decoder_class_token),
        "it needs the standard decoder": info.decoder != "cross",
        "it needs square images": info.img_size[0] == info.img_size[1],
        "it needs square patches": info.patch_size[0] == info.patch_size[1],
    }
    if not all(needs.values()):
        unmet = "; ".join(need for need, met in needs.items() if not met)
        raise InputError(f"the public MAE format cannot hold {info.kind}: {unmet}")
    write_file(path, lambda target: torch.save({"model": tensors}, target))


def _write_timm(tensors: dict[str, Tensor], info: WeightsInfo, path: Path) -> None:
    """timm's `VisionTransformer`: the encoder, and the head where there is one."""
    dropped = [name for name in tensors if name.startswith(("decoder_", "mask_token"))]
    if dropped:
        logger.info("timm has no decoder: %d tensors dropped (decoder_*, mask_token)", len(dropped))
    kept = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    content = safetensors_bytes(kept, {"format": "pt"})
    write_file(path, lambda target: target.write_bytes(content))
    logger.info(
        "for timm: VisionTransformer(img_size=%s, patch_size=%s, in_chans=%d, embed_dim=%d, depth=%d, num_heads=%s, "
        "mlp_ratio=%g, class_token=%s, global_pool=%r, fc_norm=%s, num_classes=%d)",
        info.img_size,
        info.patch_size,
        info.in_chans,
        info.embed_dim,
        info.depth,
        info.num_heads,
        info.mlp_ratio,
        info.class_token,
        info.readout,
        info.fc_norm,
        info.num_classes or 0,
    )


def _write_huggingface(tensors: dict[str, Tensor], info: WeightsInfo, path: Path) -> None:
    """A folder for `ViTMAEForPreTraining.from_pretrained`."""
    config = huggingface_config(info)
    renamed = {name: tensor.clone() for name, tensor in to_huggingface(tensors).items()}
    contents = {
        "config.json": (json.dumps(config, indent=2) + "\n").encode(),
        "model.safetensors": safetensors_bytes(renamed, {"format": "pt"}),
    }
    write_folder(path, contents)


def _write_safetensors(tensors: dict[str, Tensor], info: WeightsInfo, path: Path) -> None:
    """This project's own, as a finished run writes it."""
    facts: dict[str, Any] = {
        "model_args": mae_args(info) if info.has_decoder else classifier_args(info),
        "mean": info.mean,
        "std": info.std,
    }
    header = {"format": "pt", **{name: json.dumps(value) for name, value in facts.items()}}
    content = safetensors_bytes(tensors, header)
    write_file(path, lambda target: target.write_bytes(content))


FORMATS: dict[str, Callable[[dict[str, Tensor], WeightsInfo, Path], None]] = {
    "mae": _write_mae,
    "timm": _write_timm,
    "huggingface": _write_huggingface,
    "safetensors": _write_safetensors,
}
