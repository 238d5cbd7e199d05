"""What segmentation and detection share as tasks of fine-tuning."""

from typing import Any

from torch import Tensor, nn

from data.annotated import AnnotatedDataset, open_annotated_data
from data.joint import joint_transform
from data.transforms import PixelNormalizer
from engine.evaluation.from_weights import build_dense
from engine.pictures.choose import spread
from engine.pictures.predictions import NUM_EXAMPLES, Example, Examples
from engine.run.folder import Run
from models.dense import DenseTransformer
from util.settings.evaluation import FinetuneConfig


class AnnotatedTask:
    """All of a `Task` but for the loss and the evaluation.

    val: the validation images, with their annotations.
    """

    def __init__(self, cfg: FinetuneConfig, run: Run):
        data = open_annotated_data(cfg)
        self.cfg, self.device = cfg, run.device
        self.train, self.val = data.train, data.val
        self.class_names = data.class_names if cfg.per_class else None
        self.normalize = PixelNormalizer(cfg.mean, cfg.std, run.device)

    def build(self) -> tuple[DenseTransformer, str | None]:
        return build_dense(self.cfg, self.train.class_names)

    def samples(self) -> AnnotatedDataset:
        return AnnotatedDataset(self.train, joint_transform(self.cfg), self.cfg.seed)

    def examples(self, model: nn.Module) -> Examples:
        places = spread(len(self.val), NUM_EXAMPLES)
        return Examples(self.train.class_names, (self.example(model, place) for place in places))

    def example(self, model: Any, index: int) -> Example:
        """The validation image at this index, with what a model says of it."""
        raise NotImplementedError

    def weights(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, object]]:
        return {}, {"class_names": self.train.class_names}
