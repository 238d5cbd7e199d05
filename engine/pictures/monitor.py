"""Observing a model while it trains: what it reconstructs, where it attends, how well its features
classify, and, without labels, its loss on held-out images and how many directions they use.

It always observes the same images under the same masks, which depend on the data and the seed
alone. It draws no number from the training's random state and changes no weight: losses are equal
bit for bit with and without it (tested).
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.images import BadImageError, pixel_format
from data.labels import LabelledData, LabelledSource, Subset, build_labelled_data, stratified_choice
from data.loader import PretrainDataset
from data.on_device import place_on_device
from data.parquet import open_parquet
from data.sources import ImageSource
from data.transforms import EvalTransform, PixelNormalizer
from engine.evaluation.features import compute_features
from engine.evaluation.gauges import dead_share, effective_rank, fixed_batches, measure
from engine.evaluation.knn import rank_labels
from engine.evaluation.logistic import fit_linear
from engine.parallel import unsharded_model
from engine.pictures.choose import spread, validation_source
from engine.pictures.drawing import MONITOR_PICTURE, draw_grid, heat_over, to_picture
from engine.pictures.history import keep_picture
from engine.pictures.reconstruction import COLUMNS, caption_of, reconstruct
from engine.pictures.rollout import rollout
from engine.run.folder import Run
from engine.run.job import TrainState
from engine.run.records import read_log
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
LOSSES = {  # key in log.jsonl -> text in log.txt
    "held_out_loss": "held-out loss",
    "seen_loss": "loss of fixed training images",
}
ATTENTION = "Attention: rollout over all layers, each map in its own range."
logger = logging.getLogger(__name__)


class Monitor:
    """Call `observe` before the first step and after each epoch; it does so when that is due.

    Args:
        dataset: of the training, from which the gauges take crops and masks.

    images: `(C, H, W)` by name, as the model takes them, on the main process. data: images of
    the k-NN, if there are labels. batches: of the gauges' images, on the main process. figures:
    what the last observation found. last: its record, also of an earlier start of the run. ended:
    when it ended.

    A part that the data cannot serve is left out with a line in the log. All processes must call.
    """

    def __init__(
        self,
        cfg: PretrainConfig,
        run: Run,
        plan: Plan,
        model: MaskedAutoencoder,
        dataset: PretrainDataset,
    ):
        self.cfg, self.run, self.plan, self.model = cfg, run, plan, model
        labelled = labelled_data(cfg) if cfg.monitor_epochs and cfg.monitor_knn else None
        self.data = None if labelled is None else knn_data(labelled, cfg, run.processes)
        is_shown = (
            cfg.monitor_epochs
            and run.processes.is_main
            and (cfg.monitor_images or cfg.monitor_gauges)
        )
        held_out = held_out_source(cfg, labelled) if is_shown else None
        source = dataset.source if held_out is None else held_out
        self.images = shown_images(cfg, source) if is_shown and cfg.monitor_images else {}
        self.loss_name = "seen_loss" if held_out is None else "held_out_loss"
        indices = spread(len(source), cfg.monitor_gauges) if is_shown else []
        self.batches = fixed_batches(dataset, source, indices)
        if self.batches:
            count = sum(len(batch.images) for batch in self.batches)
            which = "training images, as there are no others" if held_out is None else "held-out"
            logger.info("monitor: loss and features of %d images (%s)", count, which)
        records = read_log(run.output_dir / "log.jsonl") if is_shown else []
        observed = [record for record in records if record.get("kind") == "monitor"]
        self.last: dict[str, float] = observed[-1] if observed else {}
        self.figures: dict[str, float] = {}
        self.ended = time.monotonic()

    def observe(self, state: TrainState) -> None:
        """If it is due: classifies, draws, and records the figures with their cost. All processes
        must call."""
        epoch, interval = state.step // self.plan.steps_per_epoch, self.cfg.monitor_epochs
        if (
            not interval
            or (epoch % interval and state.step < self.plan.stop_step)
            or (self.data is None and not self.cfg.monitor_images and not self.cfg.monitor_gauges)
        ):
            return
        started = time.monotonic()
        model = unsharded_model(self.model, self.run.device)
        figures = {} if self.data is None else self.classify(model, self.data)
        if self.images:
            figures["psnr"] = self.draw(model, state.step)
        if self.batches:
            figures |= self.gauge(model)
        now = time.monotonic()
        cost, share = now - started, 100 * (now - started) / (now - self.ended)
        words = [text.format(figures[name]) for name, text in FIGURES.items() if name in figures]
        if self.batches:
            words.append(self.gauge_words(figures, state.epoch_losses))
        self.ended, self.figures, self.last = now, figures, figures
        since = f", {share:.1f} % of the time since the last" if state.step else ""
        line = f"epoch {epoch} monitor  {'  '.join(words)}  ({cost:.1f} s{since})"
        values = {"epoch": float(epoch), **figures, "monitor_s": cost}
        self.run.records.write("monitor", state.step, values, line)

    def gauge(self, model: MaskedAutoencoder) -> dict[str, float]:
        """The loss on the gauges' images, and the effective rank and the share of dead dimensions
        in percent of their features."""
        loss, features = measure(model, self.batches, self.cfg, self.run.device)
        rank, dead = effective_rank(features), dead_share(features)
        return {self.loss_name: loss, "effective_rank": rank, "dead_share": dead}

    def gauge_words(self, figures: dict[str, float], epoch_losses: Sequence[float]) -> str:
        """A sentence about the gauges' figures, the training loss of the last epoch beside them."""
        name, training = self.loss_name, [f"training loss {loss:.3f}" for loss in epoch_losses[-1:]]
        before = self.last.get(name)
        change = f" ({100 * (figures[name] / before - 1):+.1f} % since the last)" if before else ""
        count = sum(len(batch.images) for batch in self.batches)
        parts = [
            *training,
            f"{LOSSES[name]} {figures[name]:.3f}{change}",
            f"effective rank {figures['effective_rank']:.0f} of "
            f"{min(count, self.model.spec.embed_dim)}",
            f"dead dimensions {figures['dead_share']:.1f} %",
        ]
        return ", ".join(parts)

    @torch.no_grad()
    def draw(self, model: MaskedAutoencoder, step: int) -> float:
        """Writes the picture of reconstructions and attention; returns their mean PSNR in dB over
        the removed patches."""
        normalize = PixelNormalizer(self.cfg.mean, self.cfg.std, self.run.device)
        encoder = encoder_of(model)
        rows, labels, psnr = [], [], []
        for place, (name, image) in enumerate(self.images.items()):
            stream = generator(self.cfg.seed, MONITOR, place)
            mask = draw_mask(
                self.cfg.mask, model.grid_size, self.cfg.mask_ratio, stream, self.cfg.mask_block
            )
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
        keep_picture(self.run.output_dir, picture, step)
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


def held_out_source(cfg: PretrainConfig, labelled: LabelledData | None) -> ImageSource | None:
    """The validation images: those with labels, else those of val/ or of a known set; None if there
    are none."""
    if labelled is not None:
        return labelled.val
    pixels = pixel_format(cfg, cfg.in_chans)
    try:
        if cfg.dataset == "parquet":
            return open_parquet(cfg.data_path, pixels, ("val", "test"), strict=True)
        if cfg.dataset not in ("folder", "packed") or Path(cfg.data_path or "", "val").is_dir():
            return validation_source(cfg.dataset, cfg.data_path, pixels)
    except InputError as error:
        logger.warning("the monitor shows training images: %s", error)
    return None


def shown_images(cfg: PretrainConfig, source: ImageSource) -> dict[str, Tensor]:
    """Evenly spaced images `(C, H, W)` of `source` by name. Broken files are left out."""
    fit = EvalTransform(cfg.img_size, crop_pct=1.0)
    found = {}
    for index in spread(len(source), cfg.monitor_images):
        try:
            found[source.name(index)] = fit(source.read(index))
        except BadImageError as error:
            logger.warning("the monitor leaves out %s: %s", source.name(index), error)
    return found
