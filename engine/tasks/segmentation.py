"""Fine-tuning for the class of each pixel."""

from pathlib import Path

import torch
from torch import Tensor, nn

from data.joint import segment_eval
from data.loader import Batch
from engine.evaluation.classification import Scores
from engine.evaluation.features import on_pixels
from engine.evaluation.segmentation import (
    SegmentationEvaluator,
    pixel_loss,
    place_logits,
    segment_image,
)
from engine.pictures.predictions import Example
from engine.run.folder import Run
from engine.tasks.annotated import AnnotatedTask
from models.dense import DenseTransformer
from models.spec import pair
from util.settings.evaluation import FinetuneConfig


class Segmentation(AnnotatedTask):
    """See `Task`."""

    def __init__(self, cfg: FinetuneConfig, run: Run):
        super().__init__(cfg, run)
        self.evaluator = SegmentationEvaluator(cfg, run, self.val)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(self.normalize(batch.images))  # (B, C, H, W)
        return pixel_loss(logits, masks_of(batch, self.device), self.cfg.label_smoothing)

    def evaluate(self, model: nn.Module) -> Scores:
        assert isinstance(model, DenseTransformer)
        (scores,) = self.evaluator(place_logits(model))
        return scores

    def example(self, model: DenseTransformer, index: int) -> Example:
        cfg, source = self.cfg, self.val
        image = source.read(index)
        height, width = image.shape[-2:]
        call = on_pixels(place_logits(model), cfg, cfg.precision, self.device)
        shown = segment_eval(image, cfg.img_size, model.spec.patch_size)
        window = pair(cfg.img_size) if cfg.eval_mode == "slide" else None
        found = {"mask": segment_image(call, shown, (height, width), window)}
        name, truth = Path(source.name(index)).name, source.annotation(index, height, width)
        return Example(name, image, truth, found)


def masks_of(batch: Batch, device: torch.device) -> Tensor:
    """The masks of a batch, `(B, H, W)` int64."""
    masks = torch.stack([of_image["mask"] for of_image in batch.targets])
    return masks.to(device, non_blocking=True)
