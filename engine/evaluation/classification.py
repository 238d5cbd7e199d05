"""What the three evaluations share: the labelled data of a stage's settings, and their scores on
it."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from data.labels import LabelledData, LabelledSource, build_labelled_data
from data.transforms import PixelNormalizer
from engine.evaluation.evaluate import Scores, evaluate
from engine.run.batches import eval_batches
from engine.run.folder import Run
from util.dist import autocast_dtype, first_process_first


def open_labelled_data(cfg: Any, run: Run) -> LabelledData:
    """Both splits of the data set that the settings name. Raises: InputError."""
    with first_process_first(run.processes) if cfg.download else nullcontext():
        return build_labelled_data(
            cfg.dataset, cfg.data_path, cfg.in_chans, cfg.download, cfg.num_classes
        )


class Evaluator:
    """Scores classifiers on one labelled source; `class_names` are those to report one by one, None
    is none."""

    def __init__(self, cfg: Any, run: Run, source: LabelledSource, class_names: list[str]):
        self.batches = eval_batches(cfg, run, source, cfg.crop_pct)
        self.normalize = PixelNormalizer(cfg.mean, cfg.std, run.device)
        self.dtype = autocast_dtype(cfg.precision, run.device)
        self.num_classes = len(class_names)
        self.class_names = class_names if cfg.per_class else None

    def __call__(self, classify: Callable[[Tensor], Tensor], num_heads: int = 1) -> list[Scores]:
        """See `evaluate`."""
        return evaluate(
            classify, self.batches, self.normalize, self.dtype, self.num_classes, num_heads
        )
