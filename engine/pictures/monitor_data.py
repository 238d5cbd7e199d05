"""Which images the monitor of a pretraining run shows, and which its k-NN classifies: fixed choices
that depend on the data and the seed alone."""

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.images import BadImageError
from data.labels import LabelledData, LabelledSource, Subset, build_labelled_data, stratified_choice
from data.sources import ImageSource
from data.transforms import EvalTransform
from engine.pictures.choose import spread, validation_source
from util.dist import all_gather
from util.errors import InputError
from util.rng import MONITOR, generator
from util.settings.pretrain import PretrainConfig

VAL_SHARE = 4  # training images of the k-NN for each validation image
IMAGES_PER_CLASS = 20  # at least: with fewer, hardly a neighbour could be of the right class
logger = logging.getLogger(__name__)


def labelled_data(cfg: PretrainConfig) -> LabelledData | None:
    """Both splits with their labels, or None on all processes if one of them does not find any, or
    finds others."""
    found, problem = None, ""
    try:
        found = build_labelled_data(cfg.dataset, cfg.data_path, cfg.in_chans, False, None)
    except InputError as error:
        problem = str(error)
    sizes = all_gather(found and (len(found.train), len(found.val), len(found.class_names)))
    if len(set(sizes)) > 1:
        problem = f"the processes find different images and classes: {sizes}"
    if problem:
        logger.info("no k-NN while training, as it needs labels: %s", problem)
        return None
    return found


def knn_data(data: LabelledData, cfg: PretrainConfig) -> tuple[LabelledSource, LabelledSource]:
    """Training and validation images of the k-NN, both of the same classes."""
    total = len(data.class_names)
    order = torch.randperm(total, generator=generator(cfg.seed, MONITOR))
    classes = order[: max(2, cfg.monitor_knn // IMAGES_PER_CLASS)].sort().values.numpy()
    train = _choice(data.train, classes, cfg.monitor_knn, cfg.seed)
    val = _choice(data.val, classes, cfg.monitor_knn // VAL_SHARE, cfg.seed)
    logger.info(
        "monitor: k-NN of %d validation images among %d training images, of %d of the %d classes",
        len(val),
        len(train),
        len(classes),
        total,
    )
    return train, val


def shown_images(
    cfg: PretrainConfig, labelled: LabelledData | None, source: ImageSource
) -> dict[str, Tensor]:
    """Evenly spaced validation images, uint8 `(C, H, W)`, by name: those with labels, else those in
    val/, else images of `source`, which are the training images. Broken files are left out."""
    if labelled is not None:
        source = labelled.val
    elif (Path(cfg.data_path or "") / "val").is_dir():
        try:
            source = validation_source(cfg.dataset, cfg.data_path, cfg.in_chans)
        except InputError as error:
            logger.warning("the monitor shows training images: %s", error)
    fit = EvalTransform(cfg.img_size, crop_pct=1.0)
    found = {}
    for index in spread(len(source), cfg.monitor_images):
        try:
            found[source.name(index)] = fit(source.read(index))
        except BadImageError as error:
            logger.warning("the monitor leaves out %s: %s", source.name(index), error)
    return found


def _choice(source: LabelledSource, classes: np.ndarray, count: int, seed: int) -> LabelledSource:
    """About `count` images of some classes, or all of theirs if there are fewer."""
    members = np.flatnonzero(np.isin(source.labels, classes))
    if count < len(members):
        members = members[stratified_choice(source.labels[members], max(count, 1), seed)]
    return Subset(source, members)
