"""Observing a model while it trains: what it reconstructs, where it attends, and how well its
features classify.

It always observes the same images under the same masks, which depend on the data and the seed
alone. It draws no number from the training's random state and changes no weight: losses are equal
bit for bit with and without it (tested).
"""

import logging
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.images import BadImageError, pixel_format
from data.labels import LabelledData, LabelledSource, Subset, build_labelled_data, stratified_choice
from data.on_device import place_on_device
from data.sources import ImageSource
from data.transforms import EvalTransform, PixelNormalizer
from engine.evaluation.features import compute_features
from engine.evaluation.knn import rank_labels
from engine.evaluation.logistic import fit_linear
from engine.parallel import unsharded_model
from engine.pictures.choose import spread, validation_source
from engine.pictures.drawing import MONITOR_PICTURE, draw_grid, heat_over, to_picture
from engine.pictures.reconstruction import COLUMNS, caption_of, reconstruct
from engine.pictures.rollout import rollout
from engine.run.folder import Run
from engine.run.job import TrainState
from engine.schedule import Plan
from models.build import encoder_of
from models.mae import MaskedAutoencoder
from models.masks import draw_mask
from util.dist import Processes, all_gather, gather_rows
from util.errors import InputError
from util.rng import MONITOR, generator
from util.settings.pretrain import PretrainConfig

K, TEMPERATURE = 10, 0.07  # of the k-NN, as main_knn.py reports it
VAL_SHARE = 4  # training images of the k-NN for each validation image
IMAGES_PER_CLASS = 20  # at least: with fewer, hardly a neighbour could be of the right class
FIGURES = {  # key in log.jsonl -> text in log.txt
    "knn_acc1": f"{K}-NN {{:.2f}} %",
    "probe_acc1": "linear {:.2f} %",
    "psnr": "reconstructions PSNR {:.2f} dB",
}
ATTENTION = "Attention: rollout over all layers, each map in its own range."
logger = logging.getLogger(__name__)


class Monitor:
    """Call `observe` before the first step and after each epoch; it does so when that is due.

    images: `(C, H, W)` by name, as the model takes them, on the main process. data: images of
    the k-NN, if there are labels. figures: what the last observation found. ended: when it ended.

    A part that the data cannot serve is left out with a line in the log. All processes must call.
    """

    def __init__(
        self,
        cfg: PretrainConfig,
        run: Run,
        plan: Plan,
        model: MaskedAutoencoder,
        source: ImageSource,
    ):
        self.cfg, self.run, self.plan, self.model = cfg, run, plan, model
        labelled = labelled_data(cfg) if cfg.monitor_epochs and cfg.monitor_knn else None
        self.data = None if labelled is None else knn_data(labelled, cfg, run.processes)
        is_shown = cfg.monitor_epochs and cfg.monitor_images and run.processes.is_main
        self.images = shown_images(cfg, labelled, source) if is_shown else {}
        self.figures: dict[str, float] = {}
        self.ended = time.monotonic()

    def observe(self, state: TrainState) -> None:
        """If it is due: classifies, draws, and records the figures with their cost. All processes
        must call."""
        epoch, interval = state.step // self.plan.steps_per_epoch, self.cfg.monitor_epochs
        if (
            not interval
            or (epoch % interval and state.step < self.plan.stop_step)
            or (self.data is None and not self.cfg.monitor_images)
        ):
            return
        started = time.monotonic()
        model = unsharded_model(self.model, self.run.device)
        figures = {} if self.data is None else self.classify(model, self.data)
        if self.images:
            figures["psnr"] = self.draw(model, state.step)
        now = time.monotonic()
        cost, share = now - started, 100 * (now - started) / (now - self.ended)
        self.ended, self.figures = now, figures
        words = [text.format(figures[name]) for name, text in FIGURES.items() if name in figures]
        since = f", {share:.1f} % of the time since the last" if state.step else ""
        line = f"epoch {epoch} monitor  {'  '.join(words)}  ({cost:.1f} s{since})"
        values = {"epoch": float(epoch), **figures, "monitor_s": cost}
        self.run.records.write("monitor", state.step, values, line)

    @torch.no_grad()
    def draw(self, model: MaskedAutoencoder, step: int) -> float:
        """Writes the picture of reconstructions and attention; returns their mean PSNR in dB over
        the removed patches."""
        normalize = PixelNormalizer(self.cfg.mean, self.cfg.std, self.run.device)
        encoder = encoder_of(model)
        rows, labels, psnr = [], [], []
        for place, (name, image) in enumerate(self.images.items()):
            stream = generator(self.cfg.seed, MONITOR, place)
            mask = draw_mask("random", model.grid_size, self.cfg.mask_ratio, stream)
            found = reconstruct(model, image, mask, normalize)
            attentions = encoder.iterate_attention(normalize(image[None]))
            heat = rollout(attentions, "mean", 0.0, encoder.class_tokens)  # (1, N)
            row = [to_picture(picture, self.cfg.show_channels) for picture in found[:-1]]
            rows.append([*row, heat_over(row[0], heat.view(encoder.grid_size).cpu().numpy())])
            psnr.append(found.psnr.item())
            labels.append(f"{Path(name).name}  PSNR {psnr[-1]:.2f} dB")
        caption = f"{caption_of(model)} {ATTENTION}"
        picture = draw_grid(rows, [*COLUMNS, "attention"], labels, caption)
        self.run.records.write_picture(MONITOR_PICTURE, picture, step)
        return sum(psnr) / len(psnr)

    def classify(self, model: MaskedAutoencoder, data: LabelledData) -> dict[str, float]:
        """Top-1 accuracies in percent of the k-NN and of the linear layer; {}, and no k-NN from
        here on, if a file cannot be decoded or a feature is not finite."""
        try:
            # Not compiled: for so few images, compiling takes longer than it saves in one look.
            features = compute_features(self.cfg, self.run, encoder_of(model), data, None)
        except InputError as error:  # on all processes
            logger.warning("k-NN is off from here on: %s", error)
            self.data = None
            return {}
        labels, processes = features.val_labels, self.run.processes
        num_classes = int(torch.cat([features.train_labels, labels]).max()) + 1
        ranks = rank_labels(features, num_classes, (K,), TEMPERATURE, processes)
        accuracies = {"knn_acc1": 100 * int((ranks[K] == 0).sum()) / len(labels)}
        if self.cfg.monitor_probe:
            train = gather_rows(features.train, len(features.train_labels))
            if processes.is_main:
                predicted = fit_linear(train, features.train_labels, features.val, num_classes)
                accuracies["probe_acc1"] = 100 * int((predicted == labels).sum()) / len(labels)
        return accuracies


def labelled_data(cfg: PretrainConfig) -> LabelledData | None:
    """Both splits with their labels, or None on all processes if one of them does not find any, or
    finds others."""
    try:
        found = build_labelled_data(
            cfg.dataset, cfg.data_path, pixel_format(cfg, cfg.in_chans), False, None
        )
        text = f"{len(found.train)} + {len(found.val)} images of {len(found.class_names)} classes"
    except InputError as error:
        found, text = None, str(error)
    texts = set(all_gather(text))
    if found is None or len(texts) > 1:
        logger.info(
            "no k-NN while training, as it needs labels: %s",
            "; the processes differ: ".join(sorted(texts)),
        )
        return None
    return found


def knn_data(data: LabelledData, cfg: PretrainConfig, processes: Processes) -> LabelledData:
    """Training and validation images of the k-NN, both of the same classes."""
    order = torch.randperm(len(data.class_names), generator=generator(cfg.seed, MONITOR))
    classes = order[: max(2, cfg.monitor_knn // IMAGES_PER_CLASS)].sort().values.numpy()
    train, val = place_on_device(
        cfg,
        processes,
        _choice(data.train, classes, cfg.monitor_knn, cfg.seed),
        _choice(data.val, classes, cfg.monitor_knn // VAL_SHARE, cfg.seed),
    )
    logger.info(
        "monitor: k-NN of %d validation images among %d training images, of %d of the %d classes",
        len(val),
        len(train),
        len(classes),
        len(order),
    )
    return LabelledData(train, val, data.class_names)


def _choice(source: LabelledSource, classes: np.ndarray, count: int, seed: int) -> LabelledSource:
    """About `count` images of some classes, or all of theirs if there are fewer."""
    members = np.flatnonzero(np.isin(source.labels, classes))
    chosen = stratified_choice(source.labels[members], min(max(count, 1), len(members)), seed)
    return Subset(source, members[chosen])


def shown_images(
    cfg: PretrainConfig, labelled: LabelledData | None, source: ImageSource
) -> dict[str, Tensor]:
    """Evenly spaced validation images `(C, H, W)` by name: those with labels, else those in
    val/, else images of `source`, which are the training images. Broken files are left out."""
    if labelled is not None:
        source = labelled.val
    elif (Path(cfg.data_path or "") / "val").is_dir():
        try:
            source = validation_source(cfg.dataset, cfg.data_path, pixel_format(cfg, cfg.in_chans))
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
