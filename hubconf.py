"""Pretrained models for `torch.hub.load`, from a file of weights of any kind that `models/` reads.

    model = torch.hub.load("/path/to/this/folder", "encoder", source="local", weights="a.pth")
    features = model.forward_features((images - model.mean) / model.std)  # images in [0, 1]

Each model is in eval mode. Beside its own attributes it has `mean` and `std`, `(C, 1, 1)` float32
tensors on the CPU, and `class_names` (each None if the file does not tell it), and `img_size`,
(H, W) in pixels.
"""

from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from models.dense import DenseTransformer
from models.mae import MaskedAutoencoder
from models.vit import VisionTransformer
from models.weights.info import WeightsInfo, complete, require_known
from models.weights.load import load_autoencoder, load_classifier, load_dense
from models.weights.read import read_weights
from util.errors import InputError

dependencies = ["torch", "numpy", "einops", "timm", "safetensors", "pydantic"]
ModelT = TypeVar("ModelT", bound=nn.Module)


def encoder(
    weights: str,
    *,
    global_pool: Literal["avg", "token"] | None = None,
    num_heads: int | None = None,
    img_size: tuple[int, int] | None = None,
) -> VisionTransformer:
    """The encoder, without a decoder or head: images `(B, C, H, W)` -> features `(B, D)`.

    Args:
        weights: file of weights, a Hugging Face folder, or a name as "cifar10-tiny".
        global_pool: "avg" or "token"; None is the readout of a classifier ("avg" of an attentive
            one), and for any other file the class tokens if there are any.
        num_heads: attention heads, for a file that does not tell them.
        img_size: (H, W), for a file of another project whose images were not square.

    Raises: InputError for weights that cannot be read or lack `num_heads`.
    """
    tensors, info = _read(weights, img_size, num_heads=num_heads)
    model = load_classifier(tensors, info, weights, uses_head=False, global_pool=global_pool)
    return _finished(model, info)


def autoencoder(
    weights: str,
    *,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    norm_pix_loss: bool | None = None,
    img_size: tuple[int, int] | None = None,
) -> MaskedAutoencoder:
    """The whole masked autoencoder: `reconstruct` predicts patches, `to_pixels` makes images.

    Args:
        weights: file of weights with a decoder, or a Hugging Face folder.
        num_heads, decoder_num_heads, norm_pix_loss: for a file that does not tell them.
        img_size: (H, W), for a file of another project whose images were not square.

    Raises: InputError for weights that cannot be read, have no decoder or lack one of these.
    """
    tensors, info = _read(
        weights,
        img_size,
        num_heads=num_heads,
        decoder_num_heads=decoder_num_heads,
        norm_pix_loss=norm_pix_loss,
    )
    return _finished(load_autoencoder(tensors, info, weights), info)


def classifier(
    weights: str, *, num_heads: int | None = None, img_size: tuple[int, int] | None = None
) -> VisionTransformer:
    """A trained classifier with its head: images `(B, C, H, W)` -> logits `(B, num_classes)`.

    Args: as `encoder`.

    Raises: InputError for weights that cannot be read, have no head or lack `num_heads`.
    """
    tensors, info = _read(weights, img_size, num_heads=num_heads)
    return _finished(load_classifier(tensors, info, weights, uses_head=True), info)


def dense(weights: str) -> DenseTransformer:
    """A model that this project trained for segmentation, images `(B, C, H, W)` -> logits
    `(B, num_classes, H, W)`, or for detection, see `DenseTransformer.forward`.

    Raises: InputError for weights that cannot be read or have no such head.
    """
    tensors, info = _read(weights, None)
    return _finished(load_dense(tensors, info, weights), info)


def _read(
    weights: str, img_size: tuple[int, int] | None, **given: object
) -> tuple[dict[str, Tensor], WeightsInfo]:
    """As `read_weights`, completed by what the caller gives. Raises: InputError if one of these is
    still unknown."""
    tensors, info = read_weights(weights, img_size)
    info = complete(info, **given)
    try:
        require_known(info, given)
    except InputError as error:
        raise InputError(f"{weights}: {error}, as an argument (num_heads=12)") from error
    return tensors, info


def _finished(model: ModelT, info: WeightsInfo) -> ModelT:
    model.class_names = info.class_names  # type: ignore[assignment]
    for name, values in (("mean", info.mean), ("std", info.std)):
        setattr(model, name, None if values is None else torch.tensor(values).view(-1, 1, 1))
    return model
