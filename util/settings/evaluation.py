"""Every knob of the evaluations: fine-tuning, linear classification and k-NN (see
`util/settings/base.py`)."""

import re
from dataclasses import dataclass

from util.settings.base import (
    AdamWConfig,
    AugmentConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PixelConfig,
    RunConfig,
    ScheduleConfig,
    TrainRunConfig,
    data_problems,
    knob,
    schedule_problems,
)
from util.settings.pretrain import PretrainConfig

RAND_AUGMENT = re.compile(r"rand(-(m|n|p|t|mstd|mmax|inc)\d+(\.\d+)?)*")  # timm's words
RANDOM_WEIGHTS = "random"  # what `finetune` says for an untrained model


@dataclass(frozen=True)
class ClassifierConfig(ModelConfig):
    """Classifier"""

    num_classes: int | None = knob(
        None,
        "number of classes; null counts those of the data, a number is checked against them",
        min=1,
    )
    class_token: bool | None = knob(
        None,
        "the encoder has a class token; null follows the weights, or global_pool where there are none",
    )
    global_pool: str = knob(
        "avg",
        "what the classifier reads: the mean of the patch tokens, or the class token",
        choices=("avg", "token"),
    )


@dataclass(frozen=True)
class EvalCropConfig(PixelConfig):
    """Evaluation crop"""

    crop_pct: float | None = knob(
        None,
        "evaluation keeps this share of the resized image's sides; null is 224/256, and 1 at 32 pixels and below",
        above=0,
        max=1,
    )


@dataclass(frozen=True)
class LabelledDataConfig(EvalCropConfig, DataConfig):
    """Labelled data"""

    subset: int | None = knob(
        None,
        "train on so many images only: a fixed choice by seed, with each class in proportion",
        unit="images",
        min=1,
    )
    per_class: bool = knob(
        False, "write the accuracy of each class into results.json", may_change=True
    )


@dataclass(frozen=True)
class FinetuneConfig(
    AdamWConfig, ClassifierConfig, AugmentConfig, LabelledDataConfig, ParallelConfig, TrainRunConfig
):
    """Fine-tuning"""

    finetune: str | None = knob(
        None,
        "weights to start from, of any kind that README lists; null trains from scratch",
        may_change=True,
    )  # the resume compares the weights' sha256 instead
    eval: bool = knob(False, "only evaluate the classifier that finetune names", may_change=True)
    eval_epochs: int = knob(
        1, "between two evaluations; the last epoch always has one", unit="epochs", min=1
    )
    layer_decay: float = knob(
        0.75, "learning rate of each block over that of the next", above=0, max=1
    )
    drop_path_rate: float = knob(
        0.1, "stochastic depth of the last block, rising from 0", min=0, below=1
    )
    auto_augment: str | None = knob(
        None, "RandAugment in timm's words, as rand-m9-mstd0.5-inc1; null is off"
    )
    color_jitter: float = knob(
        0.0, "strength of colour jitter; has no effect beside auto_augment", min=0
    )
    re_prob: float = knob(0.0, "probability of random erasing", unit="in [0, 1]", min=0, max=1)
    re_mode: str = knob(
        "pixel", "what is painted into the erased area", choices=("const", "rand", "pixel")
    )
    re_count: int = knob(1, "largest number of erased areas", min=1)
    mixup: float = knob(0.0, "alpha of mixup; 0 is off", min=0)
    cutmix: float = knob(0.0, "alpha of cutmix; 0 is off", min=0)
    mixup_switch_prob: float = knob(
        0.5, "probability of cutmix where mixup is on too", unit="in [0, 1]", min=0, max=1
    )
    label_smoothing: float = knob(
        0.1, "share of the target spread over all classes", min=0, below=1
    )
    ema_decay: float | None = knob(
        None,
        "decay of the weights' moving average, which is evaluated too and then gives the best; null is off",
        min=0,
        below=1,
    )

    lr: float = knob(
        1e-3,
        "base learning rate; the peak is lr * total batch / 256",
        unit="per 256 images",
        above=0,
    )
    beta2: float = knob(0.999, "AdamW", min=0, below=1)
    crop_min: float = knob(
        0.08, "smallest random resized crop; the largest is 1", unit="share of area", above=0, max=1
    )
    save_epochs: int = knob(
        1, "between two checkpoints; 0 is off", unit="epochs", min=0, may_change=True
    )

    def problems(self) -> list[str]:
        """Values that are legal alone and wrong together, one line each."""
        found = data_problems(self, self.in_chans) + schedule_problems(self)
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            found.append(
                f"batch_size {self.batch_size} is odd: mixup and cutmix pair the images of a batch"
            )
        if self.auto_augment is not None and not RAND_AUGMENT.fullmatch(self.auto_augment):
            found.append(
                f"auto_augment must be like rand-m9-mstd0.5-inc1, got {self.auto_augment!r}"
            )
        if self.finetune == RANDOM_WEIGHTS:
            found.append(
                "finetune random belongs to the frozen evaluations: leave it out to train from scratch"
            )
        if self.parallel == "fsdp" and self.ema_decay is not None:
            found.append(
                "ema_decay keeps a second whole model on each process: not with parallel fsdp"
            )
        if self.eval and self.finetune is None:
            found.append("eval needs the classifier to evaluate: give --finetune PATH")
        return found


@dataclass(frozen=True)
class LinclsConfig(
    ScheduleConfig, ClassifierConfig, AugmentConfig, LabelledDataConfig, TrainRunConfig
):
    """Linear classification"""

    finetune: str | None = knob(
        None,
        "weights to judge, of any kind that README lists, or the word random for an untrained model",
        may_change=True,  # the resume compares the weights' sha256 instead
    )
    eval_epochs: int = knob(
        10, "between two evaluations; the last epoch always has one", unit="epochs", min=1
    )
    lr: tuple[float, ...] = knob(
        (0.1,),
        "base learning rate; of several, each trains its own probe and a held-out tenth of the training set "
        "chooses; the peak is lr * total batch / 256",
        unit="per 256 images",
        above=0,
    )
    optimizer: str = knob("sgd", "SGD with Nesterov momentum, or LARS", choices=("sgd", "lars"))
    momentum: float = knob(0.9, "of either optimiser", above=0, below=1)
    weight_decay: float = knob(0.0, "of the heads' weight matrices", min=0)

    epochs: int = knob(90, "length of the schedule", unit="epochs", min=1)
    crop_min: float = knob(
        0.08, "smallest random resized crop; the largest is 1", unit="share of area", above=0, max=1
    )

    @property
    def base_lr(self) -> float:
        return max(self.lr)

    def problems(self) -> list[str]:
        """Values that are legal alone and wrong together, one line each."""
        found = (
            data_problems(self, self.in_chans)
            + schedule_problems(self)
            + weights_problems(self.finetune)
        )
        if len(self.lr) > 1 and self.min_lr:
            found.append("min_lr must be 0 where lr is a list: each probe has its own schedule")
        if len(set(self.lr)) < len(self.lr):
            found.append(f"lr names a rate twice: {' '.join(f'{lr:g}' for lr in self.lr)}")
        return found


@dataclass(frozen=True)
class KnnConfig(ClassifierConfig, LabelledDataConfig, RunConfig):
    """k-NN"""

    finetune: str | None = knob(
        None,
        "weights to judge, of any kind that README lists, a folder of checkpoints, or the word random",
    )
    ks: tuple[int, ...] = knob(
        (10, 20, 100, 200), "numbers of neighbours; the first is the reported one", min=1
    )
    temperature: float = knob(
        0.07, "a neighbour's vote is exp(cosine similarity / temperature)", min=0.01
    )
    batch_size: int = knob(128, "per process, in computing features", unit="images", min=1)
    save_path: str | None = knob(None, "folder to write the features to")
    load_path: str | None = knob(None, "folder with such features, in place of computing them")

    def problems(self) -> list[str]:
        """Values that are legal alone and wrong together, one line each."""
        found = []
        if len(set(self.ks)) < len(self.ks):
            found.append(f"ks names a number twice: {' '.join(map(str, self.ks))}")
        if self.load_path is None:
            return found + data_problems(self, self.in_chans) + weights_problems(self.finetune)
        if self.save_path is not None:
            found.append(
                "save_path and load_path exclude each other: the features are there already"
            )
        return found


def weights_problems(finetune: str | None) -> list[str]:
    """That an evaluation of weights has weights."""
    if finetune is None:
        return [
            "finetune is needed: the weights to judge, or the word random for an untrained model"
        ]
    return []


STAGE_CONFIGS = (PretrainConfig, FinetuneConfig, LinclsConfig, KnnConfig)
