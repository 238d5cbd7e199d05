"""Observing a model while it trains: what it reconstructs, where it attends, and how well its
features classify.

It always observes the same images under the same masks. It draws no number from the training's
random state and changes no weight: losses are equal bit for bit with and without it (tested).
"""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from data.labels import LabelledSource
from data.sources import ImageSource
from data.transforms import PixelNormalizer
from engine.evaluation.features import Features, compute_features
from engine.evaluation.knn import rank_labels
from engine.evaluation.logistic import fit_linear
from engine.parallel import unsharded_model
from engine.pictures.drawing import draw_grid, heat_over, to_picture
from engine.pictures.monitor_data import knn_data, labelled_data, shown_images
from engine.pictures.output import MONITOR_PICTURE
from engine.pictures.reconstruction import COLUMNS, reconstruct, target_caption
from engine.pictures.rollout import rollout
from engine.run.folder import Run
from engine.run.job import TrainState
from engine.schedule import Plan
from models.build import encoder_of
from models.mae import MaskedAutoencoder
from models.masks import draw_mask
from models.vit import VisionTransformer
from util.dist import gather_rows
from util.errors import InputError, LocalInputError
from util.rng import MONITOR, generator
from util.settings.pretrain import PretrainConfig

K, TEMPERATURE = 10, 0.07  # of the k-NN, as main_knn.py reports it
FIGURES = {  # key in log.jsonl -> text in log.txt
    "knn_acc1": f"{K}-NN {{:.2f}} %",
    "probe_acc1": "linear {:.2f} %",
    "psnr": "reconstructions PSNR {:.2f} dB",
}
ATTENTION = "Attention: rollout over all layers, each map in its own range."
logger = logging.getLogger(__name__)


@dataclass
class Monitor:
    """Call `observe` before the first step and after each epoch; it does so when that is due.

    images: uint8 `(C, H, W)` by name, as the model takes them. train, val: images of the k-NN, if
    there are labels. ended: time at which the last observation ended. figures: what it found.
    """

    cfg: PretrainConfig
    run: Run
    plan: Plan
    model: MaskedAutoencoder
    images: dict[str, Tensor] = field(default_factory=dict)
    train: LabelledSource | None = None
    val: LabelledSource | None = None
    ended: float = field(default_factory=time.monotonic)
    figures: dict[str, float] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        cfg: PretrainConfig,
        run: Run,
        plan: Plan,
        model: MaskedAutoencoder,
        source: ImageSource,
    ) -> "Monitor":
        """Chooses the images; a part that the data cannot serve is left out with a line in the log.
        All processes must call."""
        monitor = cls(cfg, run, plan, model)
        if not cfg.monitor_epochs:
            return monitor
        labelled = labelled_data(cfg) if cfg.monitor_knn else None
        if labelled is not None:
            monitor.train, monitor.val = knn_data(labelled, cfg)
        if cfg.monitor_images and run.processes.is_main:
            monitor.images = shown_images(cfg, labelled, source)
        monitor.ended = time.monotonic()
        return monitor

    def observe(self, state: TrainState) -> None:
        """If it is due: classifies, draws, and records the figures with their cost. All processes
        must call."""
        epoch = state.step // self.plan.steps_per_epoch
        interval = self.cfg.monitor_epochs
        if not interval or (epoch % interval and state.step < self.plan.stop_step):
            return
        if not self.cfg.monitor_images and self.train is None:
            return
        started = time.monotonic()
        model = unsharded_model(self.model, self.run.device)
        figures = self.classify(model)
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

    def draw(self, model: MaskedAutoencoder, step: int) -> float:
        """Writes the picture of reconstructions and attention; returns their mean PSNR in dB over
        the removed patches."""
        normalize = PixelNormalizer(self.cfg.mean, self.cfg.std, self.run.device)
        encoder = encoder_of(model)
        rows, labels, psnr = [], [], []
        for place, (name, image) in enumerate(self.images.items()):
            stream = generator(self.cfg.seed, MONITOR, place)
            mask = draw_mask("random", model.grid_size, self.cfg.mask_ratio, stream)
            found = reconstruct(model, image[None], [mask], normalize)
            with torch.no_grad():
                attentions = encoder.iterate_attention(normalize(image[None]))
                heat = rollout(attentions, "mean", 0.0, encoder.cls_token is not None)
            heat = heat.view(encoder.grid_size).cpu()  # (rows, columns)
            row = [to_picture(getattr(found, column)[0]) for column in COLUMNS]
            rows.append([*row, heat_over(row[0], heat.numpy())])
            psnr.append(float(found.psnr[0]))
            labels.append(f"{Path(name).name}  PSNR {psnr[-1]:.2f} dB")
        caption = f"{target_caption(model)} {ATTENTION}"
        picture = draw_grid(rows, [*COLUMNS, "attention"], labels, caption)
        self.run.records.write_picture(MONITOR_PICTURE, picture, step)
        return sum(psnr) / len(psnr)

    def classify(self, model: MaskedAutoencoder) -> dict[str, float]:
        """Top-1 accuracies in percent of the k-NN and of the linear layer; {} without labels."""
        if self.train is None or self.val is None:
            return {}
        encoder, processes = encoder_of(model), self.run.processes
        try:  # each process computes a share of the rows
            train, val = (self.features(encoder, source) for source in (self.train, self.val))
        except LocalInputError:  # the other processes do not know of it
            raise
        except InputError as error:
            logger.warning("k-NN is off from here on: %s", error)
            self.train = self.val = None
            return {}
        train_labels = torch.from_numpy(self.train.labels)
        labels = torch.from_numpy(self.val.labels)
        val = gather_rows(val, len(labels))
        num_classes = int(torch.cat([train_labels, labels]).max()) + 1
        features = Features(train, train_labels, val, labels)
        ranks = rank_labels(features, num_classes, (K,), TEMPERATURE, processes)
        accuracies = {"knn_acc1": 100 * int((ranks[K] == 0).sum()) / len(labels)}
        if self.cfg.monitor_probe:
            train = gather_rows(train, len(train_labels))
            if processes.is_main:
                predicted = fit_linear(train, train_labels, val, num_classes)
                accuracies["probe_acc1"] = 100 * int((predicted == labels).sum()) / len(labels)
        return accuracies

    def features(self, encoder: VisionTransformer, source: LabelledSource) -> Tensor:
        """Features `(share, D)` of this process's share of a source."""
        return compute_features(self.cfg, self.run, encoder, source, None)
