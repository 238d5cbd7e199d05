"""Fine-tuning for the boxes of objects and, with `instance_masks`, their masks."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from data.annotated import (
    AnnotatedDataset,
    DetectionSource,
    EvalImages,
    SourceAnnotation,
    open_annotated_data,
)
from data.coco import RunLengths
from data.joint import joint_transform
from data.loader import Batch
from data.transforms import PixelNormalizer
from engine.evaluation.detection import DetectionEvaluator, DetectionScores, coco_entries
from engine.evaluation.from_weights import build_dense
from engine.pictures.choose import spread
from engine.pictures.predictions import NUM_EXAMPLES, Example, Examples
from engine.run.folder import Run
from models.dense import DenseTransformer
from util.settings.evaluation import FinetuneConfig


class Detection:
    """See `Task`."""

    def __init__(self, cfg: FinetuneConfig, run: Run):
        data = open_annotated_data(cfg)
        self.cfg, self.train = cfg, data.train
        self.evaluator = DetectionEvaluator(cfg, run, cast(DetectionSource, data.val))
        self.class_names = self.evaluator.class_names
        self.normalize = PixelNormalizer(cfg.mean, cfg.std, run.device)

    def build(self) -> tuple[DenseTransformer, str | None]:
        return build_dense(self.cfg, self.train.class_names)

    def samples(self) -> AnnotatedDataset:
        return AnnotatedDataset(self.train, joint_transform(self.cfg), self.cfg.seed)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        losses = model(self.normalize(batch.images), batch.targets)
        return torch.stack([*losses.values()]).sum()

    def evaluate(self, model: nn.Module) -> DetectionScores:
        return self.evaluator(model)

    def examples(self, model: nn.Module) -> Examples:
        source = self.evaluator.source
        places = spread(len(source), NUM_EXAMPLES)
        return Examples(source.class_names, (self.example(model, place) for place in places))

    def example(self, model: nn.Module, index: int) -> Example:
        """The validation image at this index."""
        source = self.evaluator.source
        sample = EvalImages(source, self.evaluator.transform, with_targets=True)[index]
        (found,) = self.evaluator.detect(model, [sample])
        shown: SourceAnnotation = dict(found)
        if "masks" in found:
            entries = coco_entries(index, found, sample.size)
            shown["masks"] = RunLengths([entry["segmentation"] for entry in entries])
        return Example(Path(source.name(index)).name, source.read(index), sample.target, shown)

    def weights(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, object]]:
        return {}, {"class_names": self.train.class_names}
