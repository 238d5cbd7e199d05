"""Writes weights in the formats of other projects or in this project's own; `read_weights` reads
each of them back.

A file or folder appears whole or not at all.
"""

import io
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from models.mae import DECODER_NAMES
from models.spec import ClassifierSpec, DenseSpec, MAESpec, ModelSpec, encoder_spec
from models.weights.adapt import as_encoder
from models.weights.huggingface import huggingface_config, to_huggingface
from models.weights.info import WeightsInfo, require_known, spelled
from models.weights.own import own_bytes, unusual_pixels
from util.errors import InputError
from util.files import write_whole

Contents = bytes | dict[str, bytes]  # of a file, or of the files of a folder by their names
# Fields of which the tensors do not depend, or which their names show.
NOT_IN_WEIGHTS = ("pred_ratio", "fc_norm", "drop_path_rate", "target", "target_cutoff")
# Fields that timm does not have, or says in other words.
NOT_IN_TIMM = ("drop_path_rate", "probe_queries", "probe_dim", "class_tokens", "last_norm")
logger = logging.getLogger(__name__)


def write_weights(
    tensors: dict[str, Tensor], info: WeightsInfo, path: str | Path, form: str
) -> None:
    """Writes canonical tensors in one of FORMATS; never over something that is there.

    Raises: InputError before anything is written where the format cannot hold the model, or where
    it needs a field of the specification that is unknown.
    """
    path = Path(path)
    if form not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, got {form!r}")
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} is already there: name another target, or remove it")
    if info.head_problem:
        raise InputError(f"{path} is not written: {info.head_problem}")
    # safetensors refuses tensors that share memory, as the parts of one file may
    separate = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    contents = FORMATS[form](separate, info)
    try:
        if isinstance(contents, bytes):
            write_whole(path, partial(Path.write_bytes, data=contents))
        else:
            _write_folder(path, contents)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error}") from error


def _mae(tensors: dict[str, Tensor], info: WeightsInfo) -> Contents:
    """The public MAE code's: `{"model": tensors}`."""
    _require("the public MAE format", info, _unpublished(info.spec))
    file = io.BytesIO()
    torch.save({"model": tensors}, file)
    return file.getvalue()


def _timm(tensors: dict[str, Tensor], info: WeightsInfo) -> Contents:
    """timm's `VisionTransformer`: the encoder, and the head if there is one. Class tokens after the
    first are its registers."""
    tensors, info = as_encoder(tensors, info)
    kept = {name: t for name, t in tensors.items() if not name.startswith(DECODER_NAMES)}
    if dropped := len(tensors) - len(kept):
        logger.info("timm has no decoder: %d tensors dropped (decoder_*, mask_token)", dropped)
    several = info.spec.class_tokens > 1
    is_mae = isinstance(info.spec, MAESpec)
    spec = encoder_spec(info.spec, "avg" if several else None) if is_mae else info.spec
    if info.known("last_norm") is False:
        _require("timm's VisionTransformer", info, ["it needs last_norm true"])
    if several:
        if getattr(spec, "global_pool", None) == "token":
            _require("timm", info, ["its readout token is the first one, not the mean of several"])
        tokens = kept["cls_token"]  # (1, class tokens, D)
        kept |= {"cls_token": tokens[:, :1].clone(), "reg_token": tokens[:, 1:].clone()}
    keywords = [
        f"{f.name}={'?' if f.name in info.unknown else repr(getattr(spec, f.name))}"
        for f in fields(ClassifierSpec)
        if f.name not in NOT_IN_TIMM
    ]
    keywords.append(f"class_token={spec.class_tokens > 0}")
    keywords += [f"reg_tokens={spec.class_tokens - 1}"] if several else []
    logger.info("for timm: VisionTransformer(%s)", ", ".join(keywords))
    return own_bytes(kept, {})


def _huggingface(tensors: dict[str, Tensor], info: WeightsInfo) -> Contents:
    """A folder for `ViTMAEForPreTraining.from_pretrained`."""
    spec, problems = info.spec, _unpublished(info.spec)
    if not isinstance(spec, MAESpec):
        problems += ["it needs a decoder"] + ["it has no head"] * (info.task == "classify")
    _require("Hugging Face's ViTMAE", info, problems)
    require_known(info)
    assert isinstance(spec, MAESpec)
    config = json.dumps(huggingface_config(spec), indent=2) + "\n"
    content = own_bytes(to_huggingface(tensors), {})
    return {"config.json": config.encode(), "model.safetensors": content}


def _safetensors(tensors: dict[str, Tensor], info: WeightsInfo) -> Contents:
    """This project's own, as a finished run writes it."""
    require_known(info)
    header: dict[str, object] = {"model_args": info.spec.checked().as_dict()}
    pixels = {name: list(value) for name, value in info.pixels.items()}
    header |= {"mean": info.mean, "std": info.std, **unusual_pixels(pixels)}
    outputs = {"objective": info.objective, "class_names": info.class_names}
    header |= {name: value for name, value in outputs.items() if value is not None}
    return own_bytes(tensors, header)


FORMATS: dict[str, Callable[[dict[str, Tensor], WeightsInfo], Contents]] = {
    "mae": _mae,
    "timm": _timm,
    "huggingface": _huggingface,
    "safetensors": _safetensors,
}


def _unpublished(spec: ModelSpec) -> list[str]:
    """What the published MAE models do not have, one line each."""
    if isinstance(spec, DenseSpec):
        return [f"it has no head for task {spec.task}"]
    needs = {
        "it needs one class token in the encoder": spec.class_tokens == 1,
        "it needs the class token in the decoder": getattr(spec, "decoder_class_token", True),
        "it needs square images": isinstance(spec.img_size, int),
        "it needs square patches": isinstance(spec.patch_size, int),
    }
    needs |= {
        f"it needs {f.name} {spelled(f.default)}": getattr(spec, f.name) == f.default
        for f in fields(spec)
        if f.default is not MISSING and f.name not in NOT_IN_WEIGHTS
    }
    return [need for need, met in needs.items() if not met]


def _require(target: str, info: WeightsInfo, problems: list[str]) -> None:
    if problems:
        raise InputError(f"{target} cannot hold {info.kind}: {'; '.join(problems)}")


def _write_folder(path: Path, contents: dict[str, bytes]) -> None:
    """A folder of files that appears whole or not at all. Raises: OSError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        for name, content in contents.items():
            write_whole(temporary / name, partial(Path.write_bytes, data=content))
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
