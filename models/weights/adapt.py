"""Loads a file's weights into a model that the settings ask for: strictly, with every exception
named here.

Shapes: `N` patches, `D` width.
"""

import logging
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from models.mae import DECODER_NAMES, MaskedAutoencoder
from models.spec import MAESpec, ModelSpec
from models.vit import VisionTransformer
from models.weights.info import WeightsInfo, spelled
from util.errors import InputError

# Fields in which file and settings may differ. A classifier's positions are resized and its readout
# and head replaced; an autoencoder's weights do not depend on how it is trained.
ADAPTED = ("img_size", "num_classes", "global_pool", "fc_norm", "drop_path_rate")
TRAINING_ONLY = ("mask_ratio", "pred_ratio", "norm_pix_loss")
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

    `uses_head` False is for features alone: what becomes of the head is only logged for debugging.

    Dropped: the decoder; `norm` where the model has `fc_norm`; a head for another number of
    classes. Positions of another grid are resized. All of it is logged.

    Raises: InputError naming both sides of everything that does not fit; the model is untouched
    then.
    """
    spec, own = model.spec, model.state_dict()
    problems = _differences(info, spec, ADAPTED)
    if info.known("fc_norm") and not spec.fc_norm:
        problems.append(
            "it was trained with global_pool avg: it holds fc_norm, which follows the mean, and no "
            "norm, which the settings' readout needs; set global_pool avg"
        )
    _refuse_or_log(path, info, problems)
    dropped: tuple[str, ...] = ()  # beginnings of names
    if isinstance(info.spec, MAESpec):
        dropped += DECODER_NAMES
        logger.info("decoder dropped: a classifier has none")
    if spec.fc_norm and not info.known("fc_norm"):
        dropped += ("norm.",)
        logger.info("norm dropped: fc_norm after the mean takes its place and starts fresh")
    num_classes = info.known("num_classes") or 0
    log_head = logger.info if uses_head else logger.debug
    if not num_classes:
        log_head("no head in the file: it starts fresh for %d classes", spec.num_classes)
    elif num_classes != spec.num_classes:
        dropped += ("head.",)
        log_head("head of %d classes dropped: the data has %d", num_classes, spec.num_classes)
    tensors = {name: t for name, t in tensors.items() if not name.startswith(dropped)}
    old, new = info.spec.grid_size, spec.grid_size
    if old != new:
        tensors["pos_embed"] = resize_pos_embed(tensors["pos_embed"], old, new, spec.class_token)
        logger.info("positions resized from %s to %s patches", spelled(old), spelled(new))
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
    problems = _differences(info, model.spec, TRAINING_ONLY)
    if not isinstance(info.spec, MAESpec):
        problems.append(
            "it holds no decoder: take a file of the whole autoencoder, as pretraining writes it"
        )
    _refuse_or_log(path, info, problems)
    target = info.known("norm_pix_loss")
    if target not in (None, model.norm_pix_loss):
        logger.warning(
            "norm_pix_loss is %s in the file, %s in the settings: its decoder predicts another "
            "target",
            target,
            model.norm_pix_loss,
        )
    model.load_state_dict(tensors, strict=True)


def resize_pos_embed(
    pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], class_token: bool
) -> Tensor:
    """Position table `(1, N + class_token, D)` for another grid, float32: bicubic; the class
    token's row stays as it is."""
    table = pos_embed.float()
    class_row, patches = table[:, :class_token], table[:, class_token:]
    planes = patches.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)  # (1, D, H, W)
    planes = F.interpolate(
        planes, size=new_grid, mode="bicubic", align_corners=False, antialias=False
    )
    rows = planes.flatten(2).transpose(1, 2)  # (1, N, D)
    return torch.cat([class_row, rows], dim=1)  # (1, N + class_token, D)


def _differences(info: WeightsInfo, spec: ModelSpec, ignored: Collection[str]) -> list[str]:
    """Which of the fields that both have differ between the file and the settings, one line each;
    not those in `ignored`."""
    theirs, ours = vars(info.spec), vars(spec)
    names = [name for name in ours if name in theirs and name not in {*ignored, *info.unknown}]
    # Different ratios may give the same width of the MLP.
    if info.spec.mlp_dim * spec.embed_dim == spec.mlp_dim * info.spec.embed_dim:
        names.remove("mlp_ratio")
    return [
        f"{name} {spelled(theirs[name])} in the file, {spelled(ours[name])} in the settings"
        for name in names
        if theirs[name] != ours[name]
    ]


def _refuse_or_log(path: str | Path, info: WeightsInfo, problems: list[str]) -> None:
    """Raises: InputError if there are problems; otherwise says what the file holds."""
    if problems:
        raise InputError(f"{path} ({info.kind}) does not fit: {'; '.join(problems)}")
    logger.info("%s: %s", path, info)
    if missing := sorted(name for name in info.unknown if name.endswith("num_heads")):
        logger.warning(
            "%s does not say %s; the values of the settings are taken", path, " and ".join(missing)
        )
