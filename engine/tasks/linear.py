"""What linear classification asks of a task, so that `main_lincls.py` reads alike for images and
for pixels.

Shapes: `B` batch, `H` probes, `C` classes, `D` width, `h` and `w` rows and columns of patches.
"""

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.annotated import AnnotatedDataset, AnnotatedSubset, open_annotated_data
from data.joint import joint_transform
from data.labels import LabelledSource, Subset, strata, stratified_choice, take_subset
from data.loader import Batch, LabelledDataset, SampleDataset
from data.on_device import place_on_device
from data.sources import ImageSource
from data.transforms import CropAndFlip, PixelNormalizer
from engine.evaluation.classification import Evaluator, Scores, open_labelled_data
from engine.evaluation.from_weights import build_frozen
from engine.evaluation.objective import build_objective
from engine.evaluation.probe import probe_loss
from engine.evaluation.segmentation import SegmentationEvaluator, pixel_loss
from engine.run.folder import Run
from engine.tasks.segmentation import masks_of
from models.build import build_model
from models.dense import DenseTransformer
from models.heads.segmentation import to_pixels
from models.spec import DenseSpec, EncoderSpec
from models.vit import VisionTransformer
from util.settings.evaluation import LinclsConfig

HELD_OUT = 0.1  # share of the training set that chooses among several learning rates


class LinearTask(Protocol):
    """One of the tasks, with its data. A frozen model, as `build` returns it, is given to the
    methods that need its features."""

    all_names: list[str]  # of the classes, labels or numbers

    @property
    def train(self) -> ImageSource:
        """The training images."""

    @property
    def class_names(self) -> list[str] | None:
        """All names if `per_class` asks for figures of each, else None."""

    def build(self) -> tuple[Any, str | None]:
        """The frozen model, in eval mode, and the sha256 of its weights, None of an untrained one.
        For the main process. Raises: InputError."""

    def samples(self) -> SampleDataset:
        """The training images with augmentation and targets."""

    def losses(self, probes: nn.Module, frozen: Any, batch: Batch) -> Tensor:
        """The mean loss of each probe on a micro-batch, `(H,)`."""

    def evaluate(self, probes: nn.Module, frozen: Any) -> dict[str, list[Scores]]:
        """The scores of each probe on the validation images, `val`, and if there are several on
        the images that choose among them, `held_out`. All processes must call, and all get them.
        Raises: DataError."""

    @property
    def evaluators(self) -> Mapping[str, object]:
        """What scores the images of each split."""

    def weights(self, weight: Tensor, bias: Tensor) -> tuple[dict[str, Tensor], dict[str, object]]:
        """For a file of the frozen model with the probe `(C, D)`, `(C,)`: the tensors of its head,
        and what the header says beside its specification."""


def open_linear_task(cfg: LinclsConfig, run: Run) -> LinearTask:
    """The task that the settings name. Raises: InputError if its data is not there or wrong."""
    return LinearSegmentation(cfg, run) if cfg.task == "segment" else LinearImages(cfg, run)


class LinearImages:
    """The classes, labels or numbers of images, from one feature of each. See `LinearTask`."""

    def __init__(self, cfg: LinclsConfig, run: Run):
        data = open_labelled_data(cfg, run)
        splits = split_training_set(take_subset(data.train, cfg.subset, cfg.seed), cfg)
        self.cfg, self.device, self.all_names = cfg, run.device, data.class_names
        self.train: LabelledSource
        self.train, val, *held_out = place_on_device(
            cfg, run.processes, splits[0], data.val, *splits[1:]
        )
        self.objective = build_objective(cfg, data.class_names, self.train.labels, run.device)
        self.evaluators = {
            name: Evaluator(cfg, run, images, self.objective)
            for name, images in zip(("val", "held_out"), (val, *held_out), strict=False)
        }
        self.class_names = self.evaluators["val"].class_names
        self.normalize = PixelNormalizer(cfg.mean, cfg.std, run.device)

    def build(self) -> tuple[VisionTransformer, str | None]:
        assert self.cfg.finetune is not None, "the config checks that there are weights"
        return build_frozen(self.cfg, self.cfg.finetune, len(self.all_names))

    def samples(self) -> LabelledDataset:
        cfg = self.cfg
        augment = CropAndFlip(cfg.img_size, cfg.crop_min, cfg.interpolation, cfg.hflip)
        return LabelledDataset(self.train, augment, cfg.seed)

    def losses(self, probes: nn.Module, frozen: VisionTransformer, batch: Batch) -> Tensor:
        with torch.no_grad():
            features = probed_features(frozen, self.normalize(batch.images))
        targets = batch.targets.to(self.device, non_blocking=True)
        return probe_loss(probes(features), targets, self.objective.losses)

    def evaluate(self, probes: nn.Module, frozen: VisionTransformer) -> dict[str, list[Scores]]:
        return {
            split: evaluator(
                lambda images: probes(probed_features(frozen, images)), len(self.cfg.lr)
            )
            for split, evaluator in self.evaluators.items()
        }

    def weights(self, weight: Tensor, bias: Tensor) -> tuple[dict[str, Tensor], dict[str, object]]:
        return self.objective.head_in_unit(weight, bias), self.objective.header()


class LinearSegmentation:
    """The class of each pixel, from logits between those of the patches. See `LinearTask`."""

    def __init__(self, cfg: LinclsConfig, run: Run):
        data = open_annotated_data(cfg)
        self.cfg, self.device, self.all_names = cfg, run.device, data.class_names
        splits = {"val": data.val}
        self.train = data.train
        if len(cfg.lr) > 1:
            kinds = np.zeros(len(data.train), dtype=np.int64)  # all are alike
            self.train, splits["held_out"] = (
                AnnotatedSubset(data.train, part) for part in hold_out(kinds, cfg.seed)
            )
        self.evaluators = {
            name: SegmentationEvaluator(cfg, run, images) for name, images in splits.items()
        }
        self.class_names = self.evaluators["val"].class_names
        self.normalize = PixelNormalizer(cfg.mean, cfg.std, run.device)

    def build(self) -> tuple[DenseTransformer, str | None]:
        assert self.cfg.finetune is not None, "the config checks that there are weights"
        model, sha256 = build_frozen(self.cfg, self.cfg.finetune, len(self.all_names))
        return with_linear_head(model, len(self.all_names)), sha256

    def samples(self) -> AnnotatedDataset:
        return AnnotatedDataset(self.train, joint_transform(self.cfg), self.cfg.seed)

    def losses(self, probes: nn.Module, frozen: DenseTransformer, batch: Batch) -> Tensor:
        with torch.no_grad():
            features = frozen.forward_map(self.normalize(batch.images))
        masks = masks_of(batch, self.device)

        def loss(logits: Tensor) -> Tensor:
            return pixel_loss(to_pixels(logits, masks.shape[-2:]), masks)

        # of the logits of pixels, those of one probe at a time are in memory
        keep_none = partial(checkpoint, loss, use_reentrant=False)
        return torch.stack([keep_none(logits) for logits in patch_logits(probes, features)])

    def evaluate(self, probes: nn.Module, frozen: DenseTransformer) -> dict[str, list[Scores]]:
        return {
            split: evaluator(
                lambda images: patch_logits(probes, frozen.forward_map(images)), len(self.cfg.lr)
            )
            for split, evaluator in self.evaluators.items()
        }

    def weights(self, weight: Tensor, bias: Tensor) -> tuple[dict[str, Tensor], dict[str, object]]:
        head = {"head.classify.weight": weight[:, :, None, None], "head.classify.bias": bias}
        return head, {"class_names": self.all_names}


def probed_features(frozen: VisionTransformer, images: Tensor) -> Tensor:
    """What probes read: the feature of an image, `(B, D)`, or for attentive probes the normalised
    feature of each patch, `(B, N, D)`."""
    if frozen.pool is None:
        return frozen.forward_features(images)
    return rearrange(frozen.forward_map(images), "b d h w -> b (h w) d")


def patch_logits(probes: nn.Module, features: Tensor) -> Tensor:
    """The logits of each probe for each patch, `(B, D, h, w)` -> `(H, B, C, h, w)`."""
    height, width = features.shape[-2:]
    logits = probes(rearrange(features, "b d h w -> (b h w) d"))
    return rearrange(logits, "p (b h w) c -> p b c h w", h=height, w=width)


def with_linear_head(encoder: VisionTransformer, num_classes: int) -> DenseTransformer:
    """A frozen encoder as a model for segmentation whose head is a linear layer on each patch, in
    eval mode. The norm of its features is the one that `forward_map` passes."""
    of_encoder = {field.name: getattr(encoder.spec, field.name) for field in fields(EncoderSpec)}
    model = build_model(
        DenseSpec(**of_encoder, task="segment", num_classes=num_classes, dense_head="linear")
    )
    tensors = {
        name.replace("fc_norm.", "norm."): tensor
        for name, tensor in encoder.state_dict().items()
        if not name.startswith("head.")
    }
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and all(name.startswith("head.") for name in missing), missing
    return model.eval().requires_grad_(False)


def split_training_set(source: LabelledSource, cfg: LinclsConfig) -> tuple[LabelledSource, ...]:
    """The images that probes train on, and for several probes those that choose among them: a
    stratified tenth, held out by seed."""
    if len(cfg.lr) == 1:
        return (source,)
    train, held_out = hold_out(strata(source.labels), cfg.seed)
    return Subset(source, train), Subset(source, held_out)


def hold_out(kinds: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices of nine tenths of the images, which train, and of a tenth with each of `kinds` in
    proportion."""
    held_out = stratified_choice(kinds, max(1, round(HELD_OUT * len(kinds))), seed)
    return np.setdiff1d(np.arange(len(kinds)), held_out), held_out
