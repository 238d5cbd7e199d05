"""Loads a file's weights into a model that the settings ask for: strictly, with every excused name
on a list here.

Shapes: `N` patches, `D` width.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import Block, CrossBlock
from models.mae import DECODER_NAMES, MaskedAutoencoder
from models.vit import VisionTransformer
from models.weights.info import WeightsInfo, by
from util.errors import InputError

logger = logging.getLogger(__name__)


def load_into_classifier(
    model: VisionTransformer,
    tensors: dict[str, Tensor],
    info: WeightsInfo,
    path: str | Path,
    uses_head: bool = True,
) -> frozenset[str]:
    """Loads canonical tensors; returns the names that stayed fresh (of `fc_norm` and `head`, no
    others).

    `uses_head` False is for features alone: what becomes of the head is not worth a line then.

    Dropped: the decoder; `norm` where the model has `fc_norm`; a head for another number of
    classes. Positions of another grid are resized. All of it is logged.

    Raises: InputError naming both sides of everything that does not fit; the model is untouched
    then.
    """
    own = model.state_dict()
    has_fc_norm = isinstance(model.fc_norm, nn.LayerNorm)
    problems = _encoder_problems(model, info)
    if not has_fc_norm and info.fc_norm:
        problems.append(
            "it holds fc_norm (after the mean) and no norm, the settings' readout needs norm: only global_pool avg fits"
        )
    if problems:
        raise _misfit(path, info, problems)
    _say_found(path, info)
    tensors = {
        name: tensor for name, tensor in tensors.items() if not name.startswith(DECODER_NAMES)
    }
    if info.has_decoder:
        logger.info("decoder dropped: a classifier has none")
    if has_fc_norm and not info.fc_norm:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("norm.")}
        logger.info("norm dropped: fc_norm after the mean takes its place and starts fresh")
    num_classes = model.head.out_features
    say = logger.info if uses_head else logger.debug
    if info.num_classes is None:
        say("no head in the file: it starts fresh for %d classes", num_classes)
    elif info.num_classes != num_classes:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
        say("head of %d classes dropped: the data has %d", info.num_classes, num_classes)
    if info.grid_size != model.grid_size:
        tensors["pos_embed"] = resize_pos_embed(
            tensors["pos_embed"], info.grid_size, model.grid_size, info.class_token
        )
        logger.info(
            "positions resized from %s to %s patches", by(info.grid_size), by(model.grid_size)
        )

    fresh = frozenset(own.keys() - tensors.keys())
    assert all(name.startswith(("fc_norm.", "head.")) for name in fresh), fresh
    model.load_state_dict({name: own[name] for name in fresh} | tensors, strict=True)
    return fresh


def load_into_mae(
    model: MaskedAutoencoder, tensors: dict[str, Tensor], info: WeightsInfo, path: str | Path
) -> None:
    """Loads canonical tensors, all of them, with the file's own position tables.

    Raises: InputError naming both sides of everything that does not fit; the model is untouched
    then.
    """
    problems = _encoder_problems(model, info)
    if info.img_size != model.img_size:
        problems.append(
            f"img_size {by(info.img_size)} in the file, {by(model.img_size)} in the settings"
        )
    if not info.has_decoder:
        problems.append(
            "it holds no decoder: take a file of the whole autoencoder, as pretraining writes it"
        )
    else:
        block = model.decoder_blocks[0]
        assert isinstance(block, Block | CrossBlock)
        sides = {
            "decoder_embed_dim": (info.decoder_embed_dim, model.decoder_pos_embed.shape[-1]),
            "decoder_depth": (info.decoder_depth, len(model.decoder_blocks)),
            "decoder_num_heads": (info.decoder_num_heads, block.attn.num_heads),
            "decoder_class_token": (info.decoder_class_token, model.decoder_class_token),
            "decoder": (info.decoder, model.decoder),
        }
        problems += _differences(sides)
    if problems:
        raise _misfit(path, info, problems)
    _say_found(path, info)
    if info.norm_pix_loss not in (None, model.norm_pix_loss):
        logger.warning(
            "norm_pix_loss is %s in the file, %s in the settings: its decoder predicts another target",
            info.norm_pix_loss,
            model.norm_pix_loss,
        )
    model.load_state_dict(tensors, strict=True)


def resize_pos_embed(
    pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], class_token: bool
) -> Tensor:
    """Position table `(1, N + class_token, D)` for another grid, float32: bicubic, the class
    token's row as it is."""
    table = pos_embed.float()
    class_row, patches = table[:, :class_token], table[:, class_token:]
    planes = patches.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)  # (1, D, H, W)
    planes = F.interpolate(
        planes, size=new_grid, mode="bicubic", align_corners=False, antialias=False
    )
    return torch.cat(
        [class_row, planes.flatten(2).transpose(1, 2)], dim=1
    )  # (1, N + class_token, D)


def _encoder_problems(model: VisionTransformer | MaskedAutoencoder, info: WeightsInfo) -> list[str]:
    """Where file and model differ in what cannot be adapted, one line each."""
    embed_dim, in_chans, *patch_size = model.patch_embed.proj.weight.shape
    block = model.blocks[0]
    assert isinstance(block, Block)
    hidden_dim = block.mlp.fc1.out_features
    same_mlp = int(info.embed_dim * info.mlp_ratio) * embed_dim == hidden_dim * info.embed_dim
    return _differences(
        {
            "embed_dim": (info.embed_dim, embed_dim),
            "depth": (info.depth, len(model.blocks)),
            "num_heads": (info.num_heads, block.attn.num_heads),
            "mlp_ratio": (info.mlp_ratio, info.mlp_ratio if same_mlp else hidden_dim / embed_dim),
            "patch_size": (by(info.patch_size), by(patch_size)),
            "in_chans": (info.in_chans, in_chans),
            "class_token": (info.class_token, model.cls_token is not None),
        }
    )


def _differences(sides: Mapping[str, tuple[object, object]]) -> list[str]:
    """Names whose values in the file and in the settings differ; None in the file is unknown and
    fits."""
    return [
        f"{name} {_word(file)} in the file, {_word(settings)} in the settings"
        for name, (file, settings) in sides.items()
        if file is not None and file != settings
    ]


def _say_found(path: str | Path, info: WeightsInfo) -> None:
    logger.info("%s: %s", path, info)
    names = ("num_heads", "decoder_num_heads") if info.has_decoder else ("num_heads",)
    unknown = [name for name in names if getattr(info, name) is None]
    if unknown:
        logger.warning(
            "%s: it does not say %s: the settings' are taken", path, " and ".join(unknown)
        )


def _misfit(path: str | Path, info: WeightsInfo, problems: list[str]) -> InputError:
    return InputError(f"{path} ({info.kind}) does not fit: {'; '.join(problems)}")


def _word(value: object) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
