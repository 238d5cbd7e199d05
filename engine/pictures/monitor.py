"""A look at a model in training: what it paints, where it attends, and what its features know
already.

Always the same images under the same masks. Nothing here draws from the training's random state or
changes a weight: losses are equal bit for bit with and without (tested).
"""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.images import BadImageError
from data.labels import LabelledData, LabelledSource, Subset, build_labelled_data, stratified_choice
from data.sources import ImageSource
from data.transforms import EvalTransform, PixelNormalizer
from engine.evaluation.features import Features, compute_features
from engine.evaluation.knn import rank_labels
from engine.parallel import whole_model
from engine.pictures.choose import spread, validation_source
from engine.pictures.drawing import draw_grid, heat_over, to_picture
from engine.pictures.reconstruction import COLUMNS, reconstruct, target_caption
from engine.pictures.rollout import rollout
from engine.run.folder import Run
from engine.run.state import TrainState
from engine.schedule import Plan
from models.build import encoder_of
from models.mae import MaskedAutoencoder
from models.masks import draw_mask
from util.dist import all_gather, gather_rows
from util.errors import InputError
from util.rng import MONITOR, generator
from util.settings.pretrain import PretrainConfig

K, TEMPERATURE = 10, 0.07  # of the k-NN, as main_knn.py reports it
VAL_SHARE = 4  # training images of the k-NN for each validation image
PROBE_STEPS, PROBE_DECAY = (
    50,
    1e-3,
)  # L-BFGS iterations; L2 penalty of the standardised features' weights
IMAGES_PER_CLASS = (
    20  # at least, of the k-NN: with fewer, hardly a neighbour could be of the right class
)
FIGURES = ("knn_acc1", "probe_acc1", "psnr")
PICTURE = "monitor.png"
ATTENTION = "Attention: rollout over all layers, each map in its own range."
logger = logging.getLogger(__name__)


@dataclass
class Monitor:
    """Call `look` before the first step and after each epoch; it looks when a look is due."""

    cfg: PretrainConfig
    run: Run
    plan: Plan
    model: MaskedAutoencoder
    images: dict[str, Tensor] = field(
        default_factory=dict
    )  # uint8 (C, H, W) by name, as the model takes them
    train: LabelledSource | None = None
    val: LabelledSource | None = None
    ended: float = field(default_factory=time.monotonic)  # when the last look ended
    facts: dict[str, float] = field(default_factory=dict)  # what it found

    @classmethod
    def begin(
        cls,
        cfg: PretrainConfig,
        run: Run,
        plan: Plan,
        model: MaskedAutoencoder,
        source: ImageSource,
    ) -> "Monitor":
        """Chooses the images; what the data cannot give is left out and said so. All processes must
        call."""
        monitor = cls(cfg, run, plan, model)
        if not cfg.monitor_epochs:
            return monitor
        labelled = _labelled_data(cfg) if cfg.monitor_knn else None
        if labelled is not None:
            monitor.train, monitor.val = _choose(labelled, cfg)
        if cfg.monitor_images and run.processes.is_main:
            monitor.images = _pictures(
                labelled.val if labelled is not None else _unlabelled(cfg, source), cfg
            )
        monitor.ended = time.monotonic()
        return monitor

    def look(self, state: TrainState) -> None:
        """Where one is due: draws, classifies, records, and says what it cost. All processes must
        call."""
        epoch = state.step // self.plan.steps_per_epoch
        interval = self.cfg.monitor_epochs
        if not interval or (epoch % interval and state.step < self.plan.stop_step):
            return
        if not self.cfg.monitor_images and self.train is None:
            return
        started = time.monotonic()
        facts: dict[str, Any] = {"step": state.step, "epoch": float(epoch)}
        model = whole_model(self.model, self.run.device)
        facts |= self.classify(model)
        words = [
            f"{name} {facts[key]:.2f} %"
            for name, key in ((f"{K}-NN", "knn_acc1"), ("linear", "probe_acc1"))
            if key in facts
        ]
        if self.images and self.run.processes.is_main:
            facts["psnr"] = self.draw(model, state.step)
            words.append(f"reconstructions PSNR {facts['psnr']:.2f} dB")
        now = time.monotonic()
        facts["monitor_s"] = now - started
        share = 100 * facts["monitor_s"] / (now - self.ended)
        since = f", {share:.1f} % of the time since the last" if state.step else ""
        self.ended, self.facts = now, {name: facts[name] for name in FIGURES if name in facts}
        words.append(f"({facts['monitor_s']:.1f} s{since})")
        self.run.record(facts, f"epoch {epoch} monitor  {'  '.join(words)}", to_terminal=True)

    def draw(self, model: MaskedAutoencoder, step: int) -> float:
        """Writes the picture of reconstructions and attention; returns their mean PSNR in dB over
        removed patches."""
        normalize = PixelNormalizer(self.cfg.mean, self.cfg.std, self.run.device)
        encoder = encoder_of(model)
        rows, labels, psnr = [], [], []
        for place, (name, image) in enumerate(self.images.items()):
            stream = generator(self.cfg.seed, MONITOR, place)
            mask = draw_mask("random", model.grid_size, self.cfg.mask_ratio, stream)
            found = reconstruct(model, image[None], [mask], normalize)
            with torch.no_grad():
                attentions = encoder.iterate_attention(normalize(image[None]))
                heat = rollout(attentions, "mean", 0.0, encoder.cls_token is not None).view(
                    encoder.grid_size
                )
            row = [to_picture(getattr(found, column)[0]) for column in COLUMNS]
            rows.append([*row, heat_over(row[0], heat.cpu().numpy())])
            psnr.append(float(found.psnr[0]))
            labels.append(f"{Path(name).name}  PSNR {psnr[-1]:.2f} dB")
        caption = f"{target_caption(model)} {ATTENTION}"
        self.run.record_picture(
            PICTURE, draw_grid(rows, [*COLUMNS, "attention"], labels, caption), step
        )
        return sum(psnr) / len(psnr)

    def classify(self, model: MaskedAutoencoder) -> dict[str, float]:
        """Top-1 accuracies in percent of the k-NN and the linear layer; {} where there are no
        labels."""
        if self.train is None or self.val is None:
            return {}
        encoder = encoder_of(model)
        try:
            train, val = (
                self.features(encoder, source) for source in (self.train, self.val)
            )  # this process's shares
        except InputError as error:
            logger.warning("k-NN is off from here on: %s", error)
            self.train = self.val = None
            return {}
        train_labels, val_labels = (
            torch.from_numpy(source.labels) for source in (self.train, self.val)
        )
        val = gather_rows(val, len(val_labels))
        num_classes = (
            int(max(train_labels.max(), val_labels.max())) + 1
        )  # a small choice may lack some
        features = Features(train, train_labels, val, val_labels)
        ranks = rank_labels(features, num_classes, (K,), TEMPERATURE, self.run.processes)
        accuracies = {"knn_acc1": 100 * int((ranks[K] == 0).sum()) / len(val_labels)}
        if self.cfg.monitor_probe:
            train = gather_rows(train, len(train_labels))
            if self.run.processes.is_main:
                predicted = fit_linear(train, train_labels, val, num_classes)
                accuracies["probe_acc1"] = (
                    100 * int((predicted == val_labels).sum()) / len(val_labels)
                )
        return accuracies

    def features(self, encoder: Any, source: LabelledSource) -> Tensor:
        """Features `(share, D)` of this process's share of a source."""
        return compute_features(self.cfg, self.run, encoder, source, None)


def fit_linear(train: Tensor, labels: Tensor, val: Tensor, num_classes: int) -> Tensor:
    """Classes `(m,)` that logistic regression on standardised features `(n, D)` gives to `(m, D)`,
    on the CPU.

    Starts from zero and draws nothing: a function of its arguments.
    """
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0) + 1e-6
    inputs = (train - mean) / std
    weight = torch.zeros(num_classes, train.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=PROBE_STEPS, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (
            F.cross_entropy(F.linear(inputs, weight, bias), labels)
            + PROBE_DECAY * weight.square().sum() / 2
        )
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return F.linear((val - mean) / std, weight, bias).argmax(dim=1)


def _labelled_data(cfg: PretrainConfig) -> LabelledData | None:
    """Both splits, or None on all processes where one of them does not find them, or finds
    others."""
    found, problem = None, ""
    try:
        found = build_labelled_data(cfg.dataset, cfg.data_path, cfg.in_chans, False, None)
    except InputError as error:
        problem = str(error)
    sizes = all_gather(
        None if found is None else (len(found.train), len(found.val), len(found.class_names))
    )
    if len(set(sizes)) > 1:
        problem = f"the processes find different images and classes: {sizes}"
    if problem:
        logger.info("no k-NN while training, as it needs labels: %s", problem)
        return None
    return found


def _choose(data: LabelledData, cfg: PretrainConfig) -> tuple[LabelledSource, LabelledSource]:
    """Training and validation images of the k-NN, each of the same classes: a fixed choice by
    seed."""
    total = len(data.class_names)
    order = torch.randperm(total, generator=generator(cfg.seed, MONITOR))
    classes = order[: max(2, cfg.monitor_knn // IMAGES_PER_CLASS)].sort().values.numpy()
    train = _choice(data.train, classes, cfg.monitor_knn, cfg.seed)
    val = _choice(data.val, classes, cfg.monitor_knn // VAL_SHARE, cfg.seed)
    logger.info(
        "monitor: %d-NN among %d images of %d of the %d classes, for %d validation images",
        K,
        len(train),
        len(classes),
        total,
        len(val),
    )
    return train, val


def _unlabelled(cfg: PretrainConfig, source: ImageSource) -> ImageSource:
    """The images of a folder's val/, or the training images where it has none."""
    if not (Path(cfg.data_path or "") / "val").is_dir():
        return source
    try:
        return validation_source(cfg.dataset, cfg.data_path, cfg.in_chans)
    except InputError as error:
        logger.warning("the monitor shows training images: %s", error)
        return source


def _pictures(source: ImageSource, cfg: PretrainConfig) -> dict[str, Tensor]:
    """Evenly spaced images of a source by name, broken ones left out."""
    fit = EvalTransform(cfg.img_size, crop_pct=1.0)
    found = {}
    for index in spread(len(source), cfg.monitor_images):
        try:
            found[source.name(index)] = fit(source.read(index))
        except BadImageError as error:
            logger.warning("not shown by the monitor: %s %s", source.name(index), error)
    return found


def _choice(source: LabelledSource, classes: np.ndarray, count: int, seed: int) -> LabelledSource:
    """About `count` images of some classes, all of theirs where there are no more."""
    members = np.flatnonzero(np.isin(source.labels, classes))
    if count < len(members):
        members = members[stratified_choice(source.labels[members], max(count, 1), seed)]
    return Subset(source, members)
