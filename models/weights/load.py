"""The model that a file of weights describes, in eval mode, without any settings. What a file of
another project leaves open has to be completed before (`complete` in `info.py`).

Shapes: `B` batch, `C` channels, `H` and `W` height and width, `D` width.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from models.build import build_model
from models.dense import DenseTransformer
from models.mae import MaskedAutoencoder
from models.spec import ClassifierSpec, DenseSpec, MAESpec, encoder_spec
from models.vit import VisionTransformer
from models.weights.adapt import as_encoder, load_into_classifier, load_into_dense, load_into_mae
from models.weights.info import WeightsInfo, require_known
from util.errors import InputError


def load_classifier(
    tensors: dict[str, Tensor],
    info: WeightsInfo,
    path: str | Path,
    *,
    uses_head: bool,
    global_pool: Literal["avg", "token"] | None = None,
    img_size: int | tuple[int, int] | None = None,
) -> VisionTransformer:
    """The classifier `(B, C, H, W)` -> `(B, num_classes)`, or its encoder alone -> `(B, D)`.

    Args:
        global_pool: an encoder's readout; None is the classifier's (of an attentive one the mean
            of the patch tokens), or of any other file the class token if there is one.
        img_size: None is that of the weights.

    Raises: InputError if the file does not tell `num_heads`, or has no head although one is needed.
    """
    require_known(info, ("num_heads",))
    if uses_head and info.task != "classify":
        raise InputError(
            f"{path} ({info.kind}) holds no head of a classifier: fine-tune it, or take its encoder"
        )
    if not uses_head:
        tensors, info = as_encoder(tensors, info)
    spec = info.spec if isinstance(info.spec, ClassifierSpec) else encoder_spec(info.spec)
    spec = replace(spec, drop_path_rate=0.0, img_size=img_size or spec.img_size)
    if not uses_head:
        spec = replace(spec, num_classes=0, global_pool=global_pool or spec.global_pool)
    model = build_model(spec)
    load_into_classifier(model, tensors, info, path, uses_head)
    return model.eval()


def load_dense(tensors: dict[str, Tensor], info: WeightsInfo, path: str | Path) -> DenseTransformer:
    """The model for segmentation or detection, with its head. Raises: InputError if the file holds
    none."""
    if not isinstance(info.spec, DenseSpec):
        raise InputError(f"{path} ({info.kind}) is no model for segmentation or detection")
    model = build_model(replace(info.spec, drop_path_rate=0.0))
    load_into_dense(model, tensors, info, path)
    return model.eval()


def load_autoencoder(
    tensors: dict[str, Tensor], info: WeightsInfo, path: str | Path
) -> MaskedAutoencoder:
    """The whole autoencoder. Raises: InputError if there is no decoder, or the file does not tell
    the heads or the target."""
    if not isinstance(info.spec, MAESpec):
        raise InputError(f"{path} ({info.kind}) holds no decoder: take its encoder")
    require_known(info)
    model = build_model(info.spec)
    load_into_mae(model, tensors, info, path)
    return model.eval()
