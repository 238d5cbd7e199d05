"""Models from weights, as a stage's settings ask for them: the classifiers and the models for
segmentation and detection that are fine-tuned and evaluated, and the autoencoders of pictures.
Pretraining's are in `engine/run/initial.py`."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from engine.evaluation.objective import HEAD_NAMES, Objective
from engine.run.initial import compare_pixels
from models.blocks import init_weights
from models.build import build_model, classifier_spec, dense_spec, layers_of, mae_spec
from models.dense import DenseTransformer
from models.lora import add_lora, freeze_blocks
from models.mae import MaskedAutoencoder
from models.spec import DenseSpec, EncoderSpec
from models.vit import VisionTransformer
from models.weights.adapt import TARGET, load_into_classifier, load_into_dense, load_into_mae
from models.weights.info import WeightsInfo, spelled
from models.weights.read import read_weights
from util.errors import InputError
from util.rng import HEAD, LORA, generator
from util.settings.base import PixelConfig
from util.settings.evaluation import (
    RANDOM_WEIGHTS,
    ClassifierConfig,
    FinetuneConfig,
    KnnConfig,
    LinclsConfig,
)
from util.settings.tools import ExplainConfig, MaeVisConfig

FINETUNE_HEAD_STD = 2e-5  # the public code's, for weights that were pretrained
FrozenConfig = KnnConfig | LinclsConfig | ExplainConfig
logger = logging.getLogger(__name__)


def build_finetuned(
    cfg: FinetuneConfig, objective: Objective
) -> tuple[VisionTransformer, str | None]:
    """The classifier that fine-tuning trains or evaluates: from scratch, or from its weights with a
    fresh head if they have none for so many classes and this objective. Also the sha256 of the
    weights, None from scratch.

    Raises: InputError if the weights do not fit the settings, or `eval` finds no head in them.
    """
    fc_norm, num_classes = cfg.global_pool == "avg", len(objective.names)
    readout: dict[str, object] = {}
    if cfg.finetune is None:
        return _build(cfg, num_classes, _class_tokens(cfg), fc_norm), None
    tensors, info = _read(cfg, cfg.finetune)
    if cfg.eval:  # uses the file's own readout, while training with avg starts a fresh fc_norm
        fc_norm, readout = bool(info.known("fc_norm")), readout_of(info)
        # both read the patch tokens
        pool = "avg" if "probe_queries" in readout else info.known("global_pool")
        _check_same("global_pool", cfg.global_pool, pool, cfg.finetune)
        _check_same("objective", cfg.objective, info.objective, cfg.finetune)
        _compare_names(info, objective.names)
    class_tokens = _class_tokens(cfg, cfg.finetune, info)
    model = _build(cfg, num_classes, class_tokens, fc_norm, readout)
    fresh = load_into_classifier(model, tensors, info, cfg.finetune)
    if cfg.eval and fresh:
        raise InputError(
            f"eval: {cfg.finetune} has no head for {num_classes} classes, it lacks {sorted(fresh)}"
        )
    theirs = info.objective or "multiclass"
    is_other = not cfg.eval and theirs != cfg.objective  # then its outputs have another scale
    if "head.weight" in fresh or is_other:
        weight, bias = map(model.get_parameter, HEAD_NAMES)
        nn.init.trunc_normal_(weight, std=FINETUNE_HEAD_STD, generator=generator(cfg.seed, HEAD))
        if "head.weight" not in fresh:
            nn.init.zeros_(bias)
            logger.info("head dropped: it is for objective %s", theirs)
    else:
        objective.standardise(*map(model.get_parameter, HEAD_NAMES))
    if cfg.freeze_blocks and not cfg.eval:
        freeze_blocks(model, cfg.freeze_blocks)
    if cfg.lora_rank is not None and not cfg.eval:
        add_lora(model, cfg.lora_rank, generator(cfg.seed, LORA))
    _log_frozen(model)
    return model, info.sha256


def build_dense(cfg: FinetuneConfig, class_names: list[str]) -> tuple[DenseTransformer, str | None]:
    """The model for segmentation or detection that fine-tuning trains or evaluates: from scratch,
    or from its weights, whose head is taken where it is for the same. Also the sha256 of the
    weights, None from scratch.

    Raises: InputError if the weights do not fit the settings, or with `eval` are not those of such
    a model.
    """
    torch.manual_seed(cfg.seed)
    num_classes = len(class_names)
    if cfg.finetune is None:
        class_tokens = cfg.class_tokens or 0
        spec = dense_spec(cfg, num_classes=num_classes, class_tokens=class_tokens)
        return build_model(spec), None
    tensors, info = _read(cfg, cfg.finetune)
    _check_same("class_tokens", cfg.class_tokens, info.spec.class_tokens, cfg.finetune)
    spec = dense_spec(cfg, num_classes=num_classes, class_tokens=info.spec.class_tokens)
    if cfg.eval:
        theirs = info.spec
        if not isinstance(theirs, DenseSpec) or (theirs.task, theirs.num_classes) != (
            cfg.task,
            num_classes,
        ):
            held = f" for {theirs.num_classes} classes" if isinstance(theirs, DenseSpec) else ""
            raise InputError(
                f"eval: {cfg.finetune} ({info.kind}{held}) is no model of task {cfg.task} for "
                f"{num_classes} classes"
            )
        _compare_names(info, class_names)
        # What the settings say of the encoder has to agree, and the rest is the file's.
        stated = {f.name: getattr(spec, f.name) for f in fields(EncoderSpec)}
        spec = replace(theirs, **stated)
    model = build_model(spec)
    load_into_dense(model, tensors, info, cfg.finetune)
    if cfg.freeze_blocks and not cfg.eval:
        freeze_blocks(model, cfg.freeze_blocks)
        _log_frozen(model)
    return model, info.sha256


def build_frozen(
    cfg: FrozenConfig, weights: str, num_classes: int
) -> tuple[VisionTransformer, str | None]:
    """The frozen model of `weights`, in eval mode, for its features: they pass the norm that the
    weights hold, and the head is not used. Also the sha256 of the weights. Where the settings name
    inner layers it ends after the last of them, and has no norm with `last_norm` false.

    The word random is an untrained model, as pretraining starts from, and has no sha256.

    Raises: InputError if the weights do not fit the settings.
    """
    readout: dict[str, object] = {}
    if isinstance(cfg, KnnConfig | LinclsConfig):
        readout = {"last_norm": cfg.last_norm}
    if weights == RANDOM_WEIGHTS:
        model, sha256 = _build(cfg, num_classes, _class_tokens(cfg), False, readout), None
        init_weights(model)
    else:
        tensors, info = _read(cfg, weights)
        if isinstance(cfg, ExplainConfig):
            readout = readout_of(info)
        class_tokens = _class_tokens(cfg, weights, info)
        fc_norm = bool(info.known("fc_norm") and readout.get("last_norm", True))
        model, sha256 = _build(cfg, num_classes, class_tokens, fc_norm, readout), info.sha256
        load_into_classifier(model, tensors, info, weights, uses_head=False)
    if isinstance(cfg, KnnConfig | LinclsConfig):
        _end_after(model, 1 + max(layers_of(cfg)))
    return model.eval().requires_grad_(False), sha256


def build_autoencoder(cfg: MaeVisConfig, weights: str, mask_ratio: float) -> MaskedAutoencoder:
    """The whole autoencoder of `weights`, in eval mode.

    Raises: InputError if the weights have no decoder, do not fit the settings, or predict another
    target.
    """
    tensors, info = _read(cfg, weights)
    for name in TARGET:
        _check_same(name, getattr(cfg, name), info.known(name), weights)
    # The share that is predicted matters in training only.
    model = build_model(mae_spec(cfg, mask_ratio=mask_ratio, pred_ratio=None))
    load_into_mae(model, tensors, info, weights)
    return model.eval().requires_grad_(False)


def readout_of(info: WeightsInfo) -> dict[str, object]:
    """The fields of a classifier's own readout that no setting names: whether it has a last norm,
    and those of an attentive one."""
    of_norm: dict[str, object] = {"last_norm": info.known("last_norm") is not False}
    if info.known("global_pool") != "attentive":
        return of_norm
    names = ("global_pool", "probe_queries", "probe_dim")
    return of_norm | {name: info.known(name) for name in names}


def _build(
    cfg: FinetuneConfig | FrozenConfig,
    num_classes: int,
    class_tokens: int,
    fc_norm: bool,
    readout: Mapping[str, object] | None = None,
) -> VisionTransformer:
    torch.manual_seed(cfg.seed)
    spec = classifier_spec(
        cfg, num_classes=num_classes, class_tokens=class_tokens, fc_norm=fc_norm, **(readout or {})
    )
    return build_model(spec)


def _end_after(model: VisionTransformer, depth: int) -> None:
    """Drops the blocks after the first `depth`, in place."""
    if depth < len(model.blocks):
        logger.info("blocks %d to %d dropped: they are not read", depth, len(model.blocks) - 1)
    model.blocks = model.blocks[:depth]
    model.spec = replace(model.spec, depth=depth)


def _read(cfg: PixelConfig, weights: str) -> tuple[dict[str, Tensor], WeightsInfo]:
    """Reads weights, and warns if they were trained on pixels that were made in another way."""
    tensors, info = read_weights(weights)
    compare_pixels(cfg, info)
    return tensors, info


def _class_tokens(cfg: ClassifierConfig, weights: str = "", info: WeightsInfo | None = None) -> int:
    """Number of the model's class tokens: as the weights have them, or without weights as the
    settings say, or else as `global_pool` needs them."""
    needed = cfg.global_pool == "token"
    if info is None:
        return int(needed) if cfg.class_tokens is None else cfg.class_tokens
    found = info.spec.class_tokens
    _check_same("class_tokens", cfg.class_tokens, found, weights)
    if needed and not found:
        raise InputError(
            f"global_pool token reads class tokens and {weights} has none: use --global_pool avg"
        )
    return found


def _compare_names(info: WeightsInfo, names: Sequence[str]) -> None:
    """Warns of a head whose classes have other names than the data's."""
    if info.class_names not in (None, tuple(names)):
        logger.warning(
            "the weights' classes have other names than the data's: %s and %s",
            info.class_names,
            names,
        )


def _log_frozen(model: nn.Module) -> None:
    """Says how many parameters are trained if some are not."""
    frozen = sum(part.numel() for part in model.parameters() if not part.requires_grad)
    if frozen:
        total = sum(part.numel() for part in model.parameters())
        logger.info("%d parameters are trained, %d are frozen", total - frozen, frozen)


def _check_same(name: str, ours: object, theirs: object, weights: str) -> None:
    """Raises: InputError if the settings and the weights have different values. None on
    either side agrees with anything."""
    if None not in (ours, theirs) and ours != theirs:
        raise InputError(
            f"{name} is {spelled(ours)} in the settings and {spelled(theirs)} in {weights}: set "
            f"--{name} {spelled(theirs)}, or take other weights"
        )
