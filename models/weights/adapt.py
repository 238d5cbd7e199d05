"""Loads a file's weights into a model that the settings ask for: strictly, with every exception
named here.

Shapes: `N` patches, `D` width, `C` channels, `P` patch side.
"""

import logging
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from models.dense import DenseTransformer
from models.mae import DECODER_NAMES, MaskedAutoencoder
from models.pos_embed import resize_pos_embed, sincos_pos_embed
from models.spec import (
    ClassifierSpec,
    DenseSpec,
    EncoderSpec,
    MAESpec,
    ModelSpec,
    encoder_spec,
    pair,
)
from models.vit import VisionTransformer
from models.weights.info import WeightsInfo, spelled
from util.errors import InputError

# Fields in which file and settings may differ. A classifier's positions are resized and its readout
# and head replaced; an autoencoder's weights do not depend on how it is trained.
ADAPTED = (
    "img_size",
    "num_classes",
    "global_pool",
    "fc_norm",
    "drop_path_rate",
    "probe_queries",
    "probe_dim",
    "last_norm",
)
TARGET = ("norm_pix_loss", "target", "target_cutoff")  # what the decoder predicts
TRAINING_ONLY = ("mask_ratio", "pred_ratio", *TARGET)
# Pretraining that starts from weights also adapts the patch projection and the class tokens.
STARTED_FROM = ("img_size", "patch_size", "in_chans", "class_tokens", *TRAINING_ONLY)
SINCOS_ERROR = 1e-3  # of a table in half precision; a table that was learned is further away
logger = logging.getLogger(__name__)


def load_into_classifier(
    model: VisionTransformer,
    tensors: dict[str, Tensor],
    info: WeightsInfo,
    path: str | Path,
    uses_head: bool = True,
) -> frozenset[str]:
    """Loads canonical tensors; returns the names that stayed fresh (of `fc_norm`, `pool` and
    `head`, no others).

    `uses_head` False is for features alone: what becomes of the head is only logged for debugging.

    Dropped: the decoder; `norm` where the model has `fc_norm`; a head for another number of
    classes, or for segmentation or detection; an attentive readout and its head, unless the model
    has the same. Positions of another grid are resized. All of it is logged.

    Raises: InputError naming both sides of everything that does not fit; the model is untouched
    then.
    """
    spec, own = model.spec, model.state_dict()
    theirs = info.spec
    if not isinstance(theirs, ClassifierSpec) or (
        (theirs.probe_queries, theirs.probe_dim) != (spec.probe_queries, spec.probe_dim)
    ):
        tensors, info = as_encoder(tensors, info)
    problems = _differences(info, spec, ADAPTED)
    needs_norm = spec.last_norm and not spec.fc_norm
    if needs_norm and info.known("last_norm") is False:
        problems.append(
            "it has no last norm: read it with last_norm false (k-NN, linear classification), or "
            "fine-tune it with global_pool avg"
        )
    if info.known("fc_norm") and needs_norm:
        problems.append(
            "it was trained with global_pool avg: it holds fc_norm, which follows the mean, and no "
            "norm, which the settings' readout needs; set global_pool avg"
        )
    if uses_head and info.head_problem and info.known("num_classes") == spec.num_classes:
        problems.append(info.head_problem)
    _refuse_or_log(path, info, problems)
    dropped: tuple[str, ...] = ()  # beginnings of names
    if isinstance(info.spec, MAESpec):
        dropped += DECODER_NAMES
        logger.info("decoder dropped: a classifier has none")
    if spec.fc_norm and not info.known("fc_norm"):
        dropped += ("norm.",)
        logger.info("norm dropped: fc_norm after the mean takes its place and starts fresh")
    if not spec.last_norm and info.known("last_norm") is not False:
        dropped += ("norm.", "fc_norm.")
        logger.info("last norm dropped: the readout takes the tokens without it")
    num_classes = info.known("num_classes") or 0
    log_head = logger.info if uses_head else logger.debug
    if not num_classes:
        log_head("no head in the file: it starts fresh for %d outputs", spec.num_classes)
    elif num_classes != spec.num_classes:
        dropped += ("head.",)
        log_head("head of %d classes dropped: the data has %d", num_classes, spec.num_classes)
    tensors = {name: t for name, t in tensors.items() if not name.startswith(dropped)}
    tensors["pos_embed"] = _resized(tensors["pos_embed"], info.spec, spec)
    fresh = frozenset(own.keys() - tensors.keys())
    assert all(name.startswith(("fc_norm.", "pool.", "head.")) for name in fresh), fresh
    model.load_state_dict({name: own[name] for name in fresh} | tensors, strict=True)
    return fresh


def load_into_dense(
    model: DenseTransformer, tensors: dict[str, Tensor], info: WeightsInfo, path: str | Path
) -> frozenset[str]:
    """Loads canonical tensors; returns the names that stayed fresh (of `norm` and `head`, no
    others).

    Dropped: the decoder, `fc_norm`, and a head for something else. Positions of another grid are
    resized. All of it is logged.

    Raises: InputError naming both sides of everything that does not fit; the model is untouched
    then.
    """
    spec, own = model.spec, model.state_dict()
    encoder = replace(info, spec=encoder_spec(info.spec))
    _refuse_or_log(path, info, _differences(encoder, encoder_spec(spec), ADAPTED))
    has_head = isinstance(info.spec, DenseSpec) and info.spec.head_fields == spec.head_fields
    taken = {
        n: t for n, t in tensors.items() if n in own and (has_head or not n.startswith("head."))
    }
    taken["pos_embed"] = _resized(taken["pos_embed"], info.spec, spec)
    fresh = frozenset(own.keys() - taken.keys())
    assert all(name.startswith(("norm.", "head.")) for name in fresh), fresh
    logger.info("fresh: %s", ", ".join(_parts(fresh)) or "nothing")
    logger.info("dropped: %s", ", ".join(_parts(tensors.keys() - taken.keys())) or "nothing")
    model.load_state_dict({name: own[name] for name in fresh} | taken, strict=True)
    return fresh


def as_encoder(
    tensors: dict[str, Tensor], info: WeightsInfo
) -> tuple[dict[str, Tensor], WeightsInfo]:
    """A model for segmentation or detection without its head, and one with an attentive readout
    without that and its head; all else as it is."""
    spec: ModelSpec
    if isinstance(info.spec, DenseSpec):
        logger.info("head dropped: it is for task %s", info.spec.task)
        spec = encoder_spec(info.spec)
    elif isinstance(info.spec, ClassifierSpec) and info.spec.global_pool == "attentive":
        logger.info("attentive readout and head dropped")
        spec = replace(
            info.spec, num_classes=0, global_pool="avg", probe_queries=None, probe_dim=None
        )
    else:
        return tensors, info
    encoder = {name: t for name, t in tensors.items() if not name.startswith(("head.", "pool."))}
    return encoder, replace(info, spec=spec)


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
    _compare_targets(info, model.spec)
    model.load_state_dict(tensors, strict=True)


def load_for_pretraining(
    model: MaskedAutoencoder, tensors: dict[str, Tensor], info: WeightsInfo, path: str | Path
) -> None:
    """Loads canonical tensors, with or without a decoder, to go on with pretraining.

    Fresh: a decoder that the file has not, or of another geometry; its `decoder_pred` for patches
    of another size or number of channels; a `norm` that the file has not; class tokens if it has
    another number of them. Adapted: the patch projection and the positions. Dropped: a head,
    `fc_norm`, and such class tokens. All of it is logged.

    Raises: InputError naming both sides of an encoder that does not fit; the model is untouched
    then.
    """
    tensors, info = as_encoder(tensors, info)
    spec, theirs, own = model.spec, info.spec, model.state_dict()
    differences = _differences(info, spec, STARTED_FROM)
    of_decoder = [line for line in differences if line.startswith("decoder")]
    _refuse_or_log(path, info, [line for line in differences if line not in of_decoder])
    dropped: tuple[str, ...] = ()  # beginnings of names
    if not isinstance(theirs, MAESpec):
        logger.info("no decoder in the file: it starts fresh")
    elif of_decoder:
        dropped += DECODER_NAMES
        logger.info("decoder dropped, a fresh one starts: %s", "; ".join(of_decoder))
    else:
        _compare_targets(info, spec)
    if theirs.class_tokens != spec.class_tokens:
        dropped += ("cls_token",)
    sizes = [(s.in_chans, pair(s.patch_size)) for s in (theirs, spec)]
    if sizes[0] != sizes[1]:
        dropped += ("decoder_pred.",)
    taken = {n: t for n, t in tensors.items() if n in own and not n.startswith(dropped)}
    name = "patch_embed.proj.weight"
    taken[name] = adapt_projection(taken[name], *sizes[1])
    for name in [name for name in ("pos_embed", "decoder_pos_embed") if name in taken]:
        field = "class_tokens" if name == "pos_embed" else "decoder_class_tokens"
        old_tokens, new_tokens = getattr(theirs, field), getattr(spec, field)
        first = taken[name] if old_tokens == new_tokens else own[name]
        patches = taken[name][:, old_tokens:]  # (1, N, D)
        table = torch.cat([first[:, :new_tokens], patches], dim=1)  # (1, N + new_tokens, D)
        taken[name] = _positions_for(table, theirs.grid_size, spec.grid_size, new_tokens, name)
    fresh = own.keys() - taken.keys()
    lost = tensors.keys() - taken.keys()
    logger.info("taken from %s: %d of the model's %d tensors", path, len(taken), len(own))
    logger.info("fresh: %s", ", ".join(_parts(fresh)) or "nothing")
    logger.info("dropped: %s", ", ".join(_parts(lost)) or "nothing")
    model.load_state_dict({name: own[name] for name in fresh} | taken, strict=True)


def adapt_projection(weight: Tensor, in_chans: int, patch_size: tuple[int, int]) -> Tensor:
    """A patch projection `(D, C, P, P)` for other channels and patches, and a log line for each.

    What it gives for a patch is what the old one gave for the patch resized to the old size, by
    antialiased bicubic interpolation, so that the scale stays. One channel gets the sum over the
    old ones, so that a grey image gives what it gave as RGB; of several each gets the next of the
    old ones, times old over new number.

    Source of the latter: timm's `adapt_input_conv`.
    """
    old_chans, old_size = weight.shape[1], (weight.shape[2], weight.shape[3])
    if in_chans != old_chans:
        weight = weight.float()
        if in_chans == 1:
            weight = weight.sum(dim=1, keepdim=True)  # (D, 1, P, P)
        else:
            order = torch.arange(in_chans) % old_chans
            weight = weight[:, order] * (old_chans / in_chans)  # (D, C, P, P)
        logger.info("patch projection adapted from %d to %d channels", old_chans, in_chans)
    if patch_size != old_size:
        count = patch_size[0] * patch_size[1]
        pixels = torch.eye(count).view(count, 1, *patch_size)  # an image for each new pixel
        resized = F.interpolate(pixels, old_size, mode="bicubic", antialias=True).flatten(1)
        weight = weight.float().flatten(2) @ resized.T  # (D, C, P*P)
        weight = weight.view(-1, in_chans, *patch_size)  # (D, C, P, P)
        logger.info(
            "patch projection resized from %s to %s pixels", spelled(old_size), spelled(patch_size)
        )
    return weight


def _resized(table: Tensor, theirs: EncoderSpec, spec: EncoderSpec) -> Tensor:
    """A position table `(1, N + class_tokens, D)` for the grid of another model, and a log line if
    that differs."""
    old, new = theirs.grid_size, spec.grid_size
    if old == new:
        return table
    logger.info("positions resized from %s to %s patches", spelled(old), spelled(new))
    return resize_pos_embed(table, old, new, spec.class_tokens)


def _positions_for(
    table: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    class_tokens: int,
    name: str,
) -> Tensor:
    """A position table `(1, N + class_tokens, D)` for another grid: the sine-cosine one is computed
    anew, a learned one resized. The class tokens' rows stay as they are."""
    if old_grid == new_grid:
        return table
    width = table.shape[-1]
    fixed = sincos_pos_embed(width, old_grid, 0)
    is_fixed = torch.allclose(table[:, class_tokens:].float(), fixed, rtol=0, atol=SINCOS_ERROR)
    how, old, new = "recomputed" if is_fixed else "resized", spelled(old_grid), spelled(new_grid)
    logger.info("%s %s from %s to %s patches", name, how, old, new)
    if is_fixed:
        fixed = sincos_pos_embed(width, new_grid, 0)
        return torch.cat([table[:, :class_tokens].float(), fixed], dim=1)
    return resize_pos_embed(table, old_grid, new_grid, class_tokens)


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


def _parts(names: Collection[str]) -> list[str]:
    """Names of tensors without their endings, the numbers of blocks, and the parts of a head, each
    once."""
    return sorted({re.sub(r"\.(weight|bias)$|\.\d+\..*|(?<=^head)\..*", "", n) for n in names})


def _compare_targets(info: WeightsInfo, spec: MAESpec) -> None:
    """Warns of a decoder that was trained for another target."""
    for name in TARGET:
        theirs, ours = info.known(name), getattr(spec, name)
        if name not in info.unknown and theirs != ours:
            logger.warning(
                "%s is %s in the file, %s in the settings: its decoder predicts another target",
                name,
                theirs,
                ours,
            )


def _refuse_or_log(path: str | Path, info: WeightsInfo, problems: list[str]) -> None:
    """Raises: InputError if there are problems; otherwise says what the file holds."""
    if problems:
        raise InputError(f"{path} ({info.kind}) does not fit: {'; '.join(problems)}")
    logger.info("%s: %s", path, info)
    if missing := sorted(name for name in info.unknown if name.endswith("num_heads")):
        logger.warning(
            "%s does not say %s; the values of the settings are taken", path, " and ".join(missing)
        )
