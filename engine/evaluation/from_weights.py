"""Models from weights: the classifiers that evaluations judge, and the autoencoders that pictures
are made with."""

import logging
from typing import Any, NamedTuple

import torch
from torch import nn

from models.blocks import init_for_pretraining
from models.build import build_model, classifier_spec, mae_spec
from models.mae import MaskedAutoencoder
from models.vit import VisionTransformer
from models.weights.adapt import load_into_classifier, load_into_mae
from models.weights.convert import WeightsInfo, read_weights, weights_digest
from util.errors import InputError
from util.rng import HEAD, generator
from util.settings.evaluation import RANDOM_WEIGHTS

FINETUNE_HEAD_STD = 2e-5  # the public code's, for weights that were pretrained
logger = logging.getLogger(__name__)


class Classifier(NamedTuple):
    """A model, and the sha256 of the weights it came from (None: none)."""

    model: VisionTransformer
    sha256: str | None


def build_finetuned(cfg: Any, num_classes: int) -> Classifier:
    """The classifier of a `FinetuneConfig`, from scratch or from its weights with a fresh head
    where they have none.

    Raises: InputError where the weights do not fit the settings, or `eval` finds no head in them.
    """
    fc_norm = cfg.global_pool == "avg"
    if cfg.finetune is None:
        return _build(cfg, num_classes, _class_token(cfg), fc_norm)
    tensors, info = read_weights(cfg.finetune)
    if cfg.eval:  # judges the file's own readout; training with avg starts a fresh fc_norm
        fc_norm = info.fc_norm
        if info.global_pool not in (None, cfg.global_pool):
            raise InputError(
                f"eval: global_pool is {cfg.global_pool} and {cfg.finetune} was trained with {info.global_pool}"
            )
    sha256 = weights_digest(cfg.finetune)
    classifier = _build(cfg, num_classes, _class_token(cfg, cfg.finetune, info), fc_norm, sha256)
    fresh = load_into_classifier(classifier.model, tensors, info, cfg.finetune)
    _compare_pixels(cfg, info)
    if cfg.eval and fresh:
        raise InputError(
            f"eval: {cfg.finetune} is no classifier of {num_classes} classes, it lacks {sorted(fresh)}"
        )
    if "head.weight" in fresh:
        head = classifier.model.head.weight
        nn.init.trunc_normal_(head, std=FINETUNE_HEAD_STD, generator=generator(cfg.seed, HEAD))
    return classifier


def build_frozen(cfg: Any, weights: str, num_classes: int) -> Classifier:
    """The frozen model of `weights`, in eval mode: features through the norm that the weights hold;
    the head is idle.

    The word random is an untrained model, as pretraining starts from.

    Raises: InputError where the weights do not fit the settings.
    """
    if weights == RANDOM_WEIGHTS:
        classifier = _build(cfg, num_classes, _class_token(cfg), fc_norm=False)
        init_for_pretraining(classifier.model)
    else:
        tensors, info = read_weights(weights)
        sha256 = weights_digest(weights)
        classifier = _build(
            cfg, num_classes, _class_token(cfg, weights, info), info.fc_norm, sha256
        )
        load_into_classifier(classifier.model, tensors, info, weights, uses_head=False)
        _compare_pixels(cfg, info)
    classifier.model.eval().requires_grad_(False)
    return classifier


def build_autoencoder(cfg: Any, weights: str, mask_ratio: float) -> MaskedAutoencoder:
    """The whole autoencoder of `weights`, in eval mode.

    Raises: InputError where the weights have no decoder, do not fit the settings, or predict
    another target.
    """
    tensors, info = read_weights(weights)
    if info.norm_pix_loss not in (None, cfg.norm_pix_loss):
        stated, found = (str(value).lower() for value in (cfg.norm_pix_loss, info.norm_pix_loss))
        raise InputError(f"norm_pix_loss is {stated} in the settings and {found} in {weights}")
    # The share that is predicted matters in training only.
    model = build_model(mae_spec(cfg, mask_ratio=mask_ratio, pred_ratio=None))
    load_into_mae(model, tensors, info, weights)
    _compare_pixels(cfg, info)
    return model.eval().requires_grad_(False)


def _build(
    cfg: Any, num_classes: int, class_token: bool, fc_norm: bool, sha256: str | None = None
) -> Classifier:
    torch.manual_seed(cfg.seed)
    spec = classifier_spec(cfg, num_classes=num_classes, class_token=class_token, fc_norm=fc_norm)
    return Classifier(build_model(spec), sha256)


def _class_token(cfg: Any, weights: str | None = None, info: WeightsInfo | None = None) -> bool:
    """Whether the model has a class token: as the settings say, else as the weights have it, else
    as it is read."""
    if info is None:
        return cfg.global_pool == "token" if cfg.class_token is None else cfg.class_token
    if cfg.class_token not in (None, info.class_token):
        stated, found = ("a" if has else "no" for has in (cfg.class_token, info.class_token))
        raise InputError(
            f"the settings say {stated} class token and {weights} has {found} class token"
        )
    if cfg.global_pool == "token" and not info.class_token:
        raise InputError(
            f"global_pool token reads the class token and {weights} has none: use --global_pool avg"
        )
    return info.class_token


def _compare_pixels(cfg: Any, info: WeightsInfo) -> None:
    for name in ("mean", "std"):
        ours, theirs = getattr(cfg, name), getattr(info, name)
        if theirs is not None and tuple(theirs) != tuple(ours):
            logger.warning(
                "the weights were trained with %s %s and the settings say %s", name, theirs, ours
            )
