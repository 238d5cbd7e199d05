"""What fine-tuning asks of a task, so that `main_finetune.py` reads alike for all of them.

`classification.py`, `segmentation.py` and `detection.py` answer; a task opens its data when it is
made.
"""

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from data.loader import Batch, SampleDataset
from data.sources import ImageSource
from engine.evaluation.classification import Scores
from engine.run.folder import Run
from util.settings.evaluation import FinetuneConfig

if TYPE_CHECKING:
    from engine.pictures.predictions import Examples


class Task(Protocol):
    """One of the tasks, with its data."""

    @property
    def train(self) -> ImageSource:
        """The training images."""

    @property
    def class_names(self) -> list[str] | None:
        """Those of the outputs if `per_class` asks for figures of each, else None."""

    def build(self) -> tuple[Any, str | None]:
        """The model that is trained or evaluated, an encoder with its head, and the sha256 of its
        weights, None from scratch. For the main process. Raises: InputError."""

    def samples(self) -> SampleDataset:
        """The training images with augmentation and targets."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a micro-batch, a scalar. All libraries are seeded for it."""

    def evaluate(self, model: nn.Module) -> Scores:
        """The figures on the validation images of a model in eval mode. All processes must call,
        and all get them. Raises: DataError if an image or what belongs to it cannot be read."""

    @property
    def evaluator(self) -> object:
        """What scores the validation images."""

    def examples(self, model: nn.Module) -> "Examples | None":
        """Some validation images with the truth and what a model in eval mode says of them, for
        `engine/pictures/predictions.py`; None has no picture. For the main process."""

    def weights(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, object]]:
        """For a file of the model's weights: tensors that take the place of the model's own, and
        what the header says beside its specification."""


def open_task(cfg: FinetuneConfig, run: Run) -> Task:
    """The task that the settings name. Raises: InputError if its data is not there or wrong."""
    if cfg.task == "segment":
        from engine.tasks.segmentation import Segmentation

        return Segmentation(cfg, run)
    if cfg.task == "detect":
        from engine.tasks.detection import Detection

        return Detection(cfg, run)
    from engine.tasks.classification import Classification

    return Classification(cfg, run)
