"""Fine-tuning for the classes, labels or numbers of images."""

from torch import Tensor, nn

from data.labels import LabelledSource, take_subset
from data.loader import Batch, LabelledDataset
from data.on_device import place_on_device
from data.transforms import PixelNormalizer, finetune_transform
from engine.evaluation.classification import Evaluator, Scores, open_labelled_data
from engine.evaluation.from_weights import build_finetuned
from engine.evaluation.objective import HEAD_NAMES, build_objective
from engine.mixing import BatchMixer
from engine.run.folder import Run
from models.vit import VisionTransformer
from util.settings.evaluation import FinetuneConfig


class Classification:
    """See `Task`."""

    def __init__(self, cfg: FinetuneConfig, run: Run):
        data = open_labelled_data(cfg, run)
        train = take_subset(data.train, cfg.subset, cfg.seed)
        self.cfg, self.device = cfg, run.device
        self.train: LabelledSource
        self.train, val = place_on_device(cfg, run.processes, train, data.val)
        self.objective = build_objective(cfg, data.class_names, self.train.labels, run.device)
        self.evaluator = Evaluator(cfg, run, val, self.objective)
        self.class_names = self.evaluator.class_names
        self.normalize = PixelNormalizer(cfg.mean, cfg.std, run.device)
        self.mixer = BatchMixer(cfg, self.objective, run.device)

    def build(self) -> tuple[VisionTransformer, str | None]:
        return build_finetuned(self.cfg, self.objective)

    def samples(self) -> LabelledDataset:
        return LabelledDataset(self.train, finetune_transform(self.cfg), self.cfg.seed)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, targets = self.mixer(
            self.normalize(batch.images), batch.targets.to(self.device, non_blocking=True)
        )
        return self.mixer.loss(model(images), targets)

    def evaluate(self, model: nn.Module) -> Scores:
        (scores,) = self.evaluator(model)
        return scores

    def examples(self, model: nn.Module) -> None:
        return None

    def weights(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, object]]:
        head = self.objective.head_in_unit(*map(model.get_parameter, HEAD_NAMES))
        return head, self.objective.header()
