"""Fine-tuning for the boxes of objects and, with `instance_masks`, their masks."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from data.annotated import DetectionSource, EvalImages, SourceAnnotation
from data.coco import RunLengths
from data.loader import Batch
from engine.evaluation.detection import DetectionEvaluator, DetectionScores, coco_entries
from engine.pictures.predictions import Example
from engine.run.folder import Run
from engine.tasks.annotated import AnnotatedTask
from util.settings.evaluation import FinetuneConfig


class Detection(AnnotatedTask):
    """See `Task`."""

    def __init__(self, cfg: FinetuneConfig, run: Run):
        super().__init__(cfg, run)
        self.evaluator = DetectionEvaluator(cfg, run, cast(DetectionSource, self.val))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        losses = model(self.normalize(batch.images), batch.targets)
        return torch.stack([*losses.values()]).sum()

    def evaluate(self, model: nn.Module) -> DetectionScores:
        return self.evaluator(model)

    def example(self, model: nn.Module, index: int) -> Example:
        sample = EvalImages(self.val, self.evaluator.transform, with_targets=True)[index]
        (found,) = self.evaluator.detect(model, [sample])
        shown: SourceAnnotation = dict(found)
        if "masks" in found:
            entries = coco_entries(index, found, sample.size)
            shown["masks"] = RunLengths([entry["segmentation"] for entry in entries])
        name, image = Path(self.val.name(index)).name, self.val.read(index)
        return Example(name, image, sample.target, shown)
