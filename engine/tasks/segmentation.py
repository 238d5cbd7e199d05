"""Fine-tuning for the class of each pixel."""

from pathlib import Path

import torch
from torch import Tensor, nn

from data.annotated import AnnotatedDataset, open_annotated_data
from data.joint import joint_transform, segment_eval
from data.loader import Batch
from data.transforms import PixelNormalizer
from engine.evaluation.classification import Scores
from engine.evaluation.features import on_pixels
from engine.evaluation.from_weights import build_dense
from engine.evaluation.segmentation import (
    SegmentationEvaluator,
    pixel_loss,
    place_logits,
    segment_image,
)
from engine.pictures.choose import spread
from engine.pictures.predictions import NUM_EXAMPLES, Example, Examples
from engine.run.folder import Run
from models.dense import DenseTransformer
from models.spec import pair
from util.settings.evaluation import FinetuneConfig


class Segmentation:
    """See `Task`."""

    def __init__(self, cfg: FinetuneConfig, run: Run):
        data = open_annotated_data(cfg)
        self.cfg, self.device, self.train = cfg, run.device, data.train
        self.evaluator = SegmentationEvaluator(cfg, run, data.val)
        self.class_names = self.evaluator.class_names
        self.normalize = PixelNormalizer(cfg.mean, cfg.std, run.device)

    def build(self) -> tuple[DenseTransformer, str | None]:
        return build_dense(self.cfg, self.train.class_names)

    def samples(self) -> AnnotatedDataset:
        return AnnotatedDataset(self.train, joint_transform(self.cfg), self.cfg.seed)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(self.normalize(batch.images))  # (B, C, H, W)
        return pixel_loss(logits, masks_of(batch, self.device), self.cfg.label_smoothing)

    def evaluate(self, model: nn.Module) -> Scores:
        assert isinstance(model, DenseTransformer)
        (scores,) = self.evaluator(place_logits(model))
        return scores

    def examples(self, model: nn.Module) -> Examples:
        assert isinstance(model, DenseTransformer)
        source = self.evaluator.source
        places = spread(len(source), NUM_EXAMPLES)
        return Examples(source.class_names, (self.example(model, place) for place in places))

    def example(self, model: DenseTransformer, index: int) -> Example:
        """The validation image at this index."""
        cfg, source = self.cfg, self.evaluator.source
        image = source.read(index)
        height, width = image.shape[-2:]
        call = on_pixels(place_logits(model), cfg, cfg.precision, self.device)
        shown = segment_eval(image, cfg.img_size, model.spec.patch_size)
        window = pair(cfg.img_size) if cfg.eval_mode == "slide" else None
        found = {"mask": segment_image(call, shown, (height, width), window)}
        name, truth = Path(source.name(index)).name, source.annotation(index, height, width)
        return Example(name, image, truth, found)

    def weights(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, object]]:
        return {}, {"class_names": self.train.class_names}


def masks_of(batch: Batch, device: torch.device) -> Tensor:
    """The masks of a batch, `(B, H, W)` int64."""
    masks = torch.stack([of_image["mask"] for of_image in batch.targets])
    return masks.to(device, non_blocking=True)
