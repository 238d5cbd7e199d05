"""The settings of the evaluations: fine-tuning, linear classification and k-NN (see
`util/settings/base.py`)."""

import re
from typing import Annotated, Literal

from annotated_types import Ge, Le

from util.errors import where
from util.settings.base import (
    LARGEST,
    AdamWConfig,
    AugmentConfig,
    CheckpointingConfig,
    CompileConfig,
    Count,
    CountOrZero,
    ModelConfig,
    OpenShare,
    ParallelConfig,
    PathText,
    PixelConfig,
    Positive,
    PositiveOrZero,
    Probability,
    RunConfig,
    ScheduleConfig,
    Settings,
    Share,
    ShareBelowOne,
    Text,
    TrainRunConfig,
    setting,
)
from util.settings.dense import DenseDataConfig, DenseModelConfig
from util.settings.pretrain import PretrainConfig

Layer = Annotated[int, Ge(-LARGEST), Le(LARGEST)]
RANDOM_WEIGHTS = "random"  # the value of `finetune` for an untrained model
# What best.safetensors follows if nothing else is asked for, and by what probes are chosen.
MAIN_METRIC = {
    "multiclass": "acc1",
    "multilabel": "map",
    "regression": "rmse",
    "segment": "miou",
    "detect": "box_ap",
}
METRICS = {  # of each objective, as engine/evaluation/metrics.py defines them, or of each task
    "multiclass": ("acc1", "acc5", "balanced_acc", "f1", "kappa", "kappa_quadratic", "auroc", "ap"),
    "multilabel": ("map", "auroc", "f1"),
    "regression": ("mae", "rmse", "r2"),
    "segment": ("miou", "pixel_acc", "mean_acc"),
    "detect": ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"),
}


class ClassifierConfig(ModelConfig):
    """Classifier"""

    num_classes: Count | None = setting(
        None, "Number of classes, which must be that of the data; null counts the data's classes."
    )
    class_tokens: CountOrZero | None = setting(
        None,
        "Number of class tokens of the encoder; null follows the weights, or global_pool if there "
        "are none.",
    )
    global_pool: Literal["avg", "token"] = setting(
        "avg",
        "Input of the classifier: the mean of the patch tokens (avg) or of the class tokens "
        "(token).",
    )


class LastNormConfig(Settings):
    """Readout of a frozen encoder"""

    last_norm: bool = setting(
        True,
        "Whether the tokens that are read pass the weights' last norm, those of inner layers as "
        "well.",
    )


class EvalCropConfig(PixelConfig):
    """Evaluation crop"""

    crop_pct: Share | None = setting(
        None,
        "Side of the evaluation's centre crop, as a share of the resized image's side; null is "
        "224/256, and 1 at 32 pixels and below.",
    )


class TableConfig(Settings):
    """Labels from a table"""

    objective: Literal["multiclass", "multilabel", "regression"] = setting(
        "multiclass",
        "What is predicted: one class of an image (multiclass), yes or no for each of several "
        "labels (multilabel), or numbers (regression); the last two need labels.",
    )
    labels: PathText | None = setting(
        None,
        "Table of the images and their labels, .csv or .parquet, with names in the first row; null "
        "takes the class folders.",
        may_change=True,  # the resume compares what is used of its content instead
    )
    file_column: Text | None = setting(
        None,
        "Column of the images' paths, relative to data_path; null is the first column.",
        may_change=True,
    )
    label_columns: Text | tuple[Text, ...] | None = setting(
        None,
        "Columns of the labels: the class, 0 or 1 for each label of multilabel, or the numbers of "
        "regression; null is the first column that is left, for multilabel all that are left.",
    )
    split_column: Text | None = setting(
        None,
        "Column that says train or val; images with another value are left out. Either this or "
        "val_share.",
    )
    val_share: OpenShare | None = setting(
        None, "Share of the images that are for validation, chosen by seed with each class in it."
    )
    group: Text | None = setting(
        None,
        "Column of what must not be in both splits, such as the patient of an image; null is none.",
    )

    def problems(self) -> list[str]:
        others = ("file_column", "label_columns", "split_column", "val_share", "group")
        given = [name for name in others if getattr(self, name) is not None]
        return super().problems() + where(
            (
                self.labels is None and given,
                f"{' '.join(given[:1])} is about a table of labels: give --labels FILE as well",
            ),
            (
                self.labels is None and self.objective != "multiclass",
                f"objective {self.objective} needs a table of labels: give --labels FILE",
            ),
            (
                self.labels is not None and (self.split_column is None) == (self.val_share is None),
                "labels needs either split_column, which says train or val, or val_share",
            ),
        )


class LabelledDataConfig(TableConfig, EvalCropConfig, DenseDataConfig):
    """Labelled data"""

    task: str = setting("classify", "What is predicted of an image.")
    subset: Count | None = setting(
        None,
        "Number of training images to use, chosen by seed with each class in proportion; null is "
        "all.",
    )
    per_class: bool = setting(
        False,
        "Whether results.json gives the figures of each class, too, and the confusion matrix.",
        may_change=True,
    )

    @property
    def purpose(self) -> str:
        """What decides how the outputs are judged: the objective of a classifier, or the task."""
        return self.objective if self.task == "classify" else self.task

    def problems(self) -> list[str]:
        return super().problems() + where(
            (
                self.labels is not None and self.dataset != "folder",
                f"labels name files, so they go with dataset folder, not {self.dataset}",
            )
        )


class LossConfig(LabelledDataConfig):
    """Loss"""

    class_weights: Literal["balanced"] | None = setting(
        None,
        "Weights of the classes in training: balanced is n / (C * n_c), n_c of all n images being "
        "of this one of C classes, and for multilabel negatives / positives, on the positives; "
        "null is none.",
    )

    def problems(self) -> list[str]:
        return super().problems() + where(
            (
                self.objective == "regression" and self.class_weights is not None,
                "class_weights balanced needs classes: leave it out for objective regression",
            )
        )


class FinetuneConfig(
    AdamWConfig,
    DenseModelConfig,
    ClassifierConfig,
    AugmentConfig,
    LossConfig,
    CheckpointingConfig,
    CompileConfig,
    ParallelConfig,
    TrainRunConfig,
):
    """Fine-tuning"""

    task: Literal["classify", "segment", "detect"] = setting(
        "classify",
        "What is predicted: the class of an image (classify), the class of each pixel (segment), "
        "or boxes and masks of objects (detect).",
    )
    finetune: PathText | None = setting(
        None,
        "Weights to start from, of any kind that models/README.md lists; null trains from scratch.",
        may_change=True,  # the resume compares the weights' sha256 instead
    )
    eval: bool = setting(
        False, "Whether to evaluate the model that finetune names and stop.", may_change=True
    )
    eval_epochs: Count = setting(
        1, "Epochs between two evaluations; the last epoch always has one."
    )
    layer_decay: Share = setting(
        0.75, "Learning rate of a block, as a share of the learning rate of the next block."
    )
    drop_path_rate: ShareBelowOne = setting(
        0.1, "Rate of stochastic depth in the last block, to which it rises from 0 in the first."
    )
    auto_augment: Text | None = setting(
        None, "RandAugment in timm's notation, for example rand-m9-mstd0.5-inc1; null is off."
    )
    color_jitter: PositiveOrZero = setting(
        0.0, "Strength of colour jitter, which has no effect beside auto_augment."
    )
    re_prob: Probability = setting(0.0, "Probability of random erasing.")
    re_mode: Literal["const", "rand", "pixel"] = setting(
        "pixel",
        "Filling of an erased area: the mean pixel (const), one random colour (rand), or random "
        "pixels (pixel).",
    )
    re_count: Count = setting(1, "Largest number of erased areas in an image.")
    mixup: PositiveOrZero = setting(0.0, "Alpha of mixup; 0 is off.")
    cutmix: PositiveOrZero = setting(0.0, "Alpha of cutmix; 0 is off.")
    mixup_switch_prob: Probability = setting(0.5, "Probability of cutmix when mixup is on as well.")
    label_smoothing: ShareBelowOne = setting(
        0.1,
        "Share of the target that is spread over all classes, in multilabel over yes and no; "
        "regression and task detect have none.",
    )
    ema_decay: ShareBelowOne | None = setting(
        None,
        "Decay of the weights' moving average, which is evaluated as well and then decides which "
        "epoch is best; null is off.",
    )
    best_metric: Text | None = setting(
        None,
        "Figure by which best.safetensors is chosen: for multiclass "
        f"{', '.join(METRICS['multiclass'])}, for multilabel {', '.join(METRICS['multilabel'])}, "
        f"for regression {', '.join(METRICS['regression'])}, for task segment "
        f"{', '.join(METRICS['segment'])}, for detect {', '.join(METRICS['detect'])}; null is "
        f"{', '.join(MAIN_METRIC.values())}.",
    )
    freeze_blocks: CountOrZero = setting(
        0,
        "Number of first blocks that are not trained, nor are the patch projection, the class "
        "token and the positions then; 0 trains all.",
    )
    lora_rank: Count | None = setting(
        None,
        "Rank of trained sums on the attention's qkv and proj (LoRA, arXiv 2106.09685), beside "
        "which only the head and fc_norm are trained; null trains the weights themselves.",
    )

    lr: Positive = setting(
        1e-3, "Base learning rate per 256 images; the schedule's peak is lr * total batch / 256."
    )
    beta2: ShareBelowOne = setting(0.999, "AdamW's decay of the squared gradient's moving average.")
    crop_min: Share = setting(
        0.08,
        "Smallest area of a random resized crop, as a share of the image's area; the largest is 1.",
    )
    save_epochs: CountOrZero = setting(
        1, "Epochs between two checkpoints; 0 is off.", may_change=True
    )

    @property
    def needs_8_bits(self) -> bool:
        """Whether Pillow augments the images, which it does in 8 bits."""
        return self.auto_augment is not None or self.color_jitter > 0

    def problems(self) -> list[str]:
        return super().problems() + where(
            *self.channel_rows(self.in_chans),
            (
                (self.mixup or self.cutmix) and self.batch_size % 2,
                f"batch_size {self.batch_size} is odd: mixup and cutmix pair the images of a batch",
            ),
            (
                self.objective == "regression" and (self.mixup or self.cutmix),
                "objective regression has no shares of classes: leave mixup and cutmix out",
            ),
            (
                self.best_metric not in (None, *METRICS[self.purpose]),
                f"best_metric must be one of {', '.join(METRICS[self.purpose])} for "
                f"{self.purpose}, got {self.best_metric!r}",
            ),
            (
                self.auto_augment is not None
                # timm's words
                and not re.fullmatch(
                    r"rand(-(m|n|p|t|mstd|mmax|inc)\d+(\.\d+)?)*", self.auto_augment
                ),
                f"auto_augment must be like rand-m9-mstd0.5-inc1, got {self.auto_augment!r}",
            ),
            (
                self.needs_8_bits
                and (self.in_chans not in (1, 3) or self.pixel_range != ("auto",)),
                "auto_augment and color_jitter change photographs of 8 bits: leave them out with "
                "an in_chans other than 1 and 3, and with pixel_range",
            ),
            (
                self.data_on_device and self.needs_8_bits,
                "data_on_device crops and flips only: leave auto_augment and color_jitter out, or "
                "data_on_device",
            ),
            (
                not self.instance_masks and (self.best_metric or "").startswith("mask_"),
                f"best_metric {self.best_metric} needs instance_masks true: without them it is one "
                "of box_ap, box_ap50 and box_ap75",
            ),
            (
                self.finetune == RANDOM_WEIGHTS,
                "finetune random is for the evaluations of frozen weights: leave it out to train "
                "from scratch",
            ),
            (
                self.parallel == "fsdp" and self.ema_decay is not None,
                "ema_decay keeps a second complete model on each process: not with parallel fsdp",
            ),
            (
                self.parallel == "fsdp" and self.lora_rank is not None,
                "lora_rank needs little memory for gradients: not with parallel fsdp",
            ),
            (
                self.finetune is None and (self.lora_rank or self.freeze_blocks),
                "finetune is needed by freeze_blocks and lora_rank: without weights there is "
                "nothing to keep",
            ),
            (
                self.freeze_blocks and self.lora_rank is not None,
                "freeze_blocks and lora_rank exclude each other: with lora_rank all blocks are "
                "frozen but for their sums",
            ),
            (
                self.eval and self.finetune is None,
                "finetune is needed by eval: give the model as --finetune PATH",
            ),
        )


class LinclsConfig(
    ScheduleConfig,
    ClassifierConfig,
    LastNormConfig,
    AugmentConfig,
    LossConfig,
    CompileConfig,
    TrainRunConfig,
):
    """Linear classification"""

    task: Literal["classify", "segment"] = setting(
        "classify",
        "What is classified: images (classify), or each patch, upsampled to the pixels (segment).",
    )
    finetune: PathText | None = setting(
        None,
        "Weights to evaluate, of any kind that models/README.md lists, or the word random for an "
        "untrained model.",
        may_change=True,  # the resume compares the weights' sha256 instead
    )
    layer: Layer = setting(
        -1,
        "Block whose tokens are read, counted from 0, or from -1 backwards; the later ones are "
        "dropped.",
    )
    eval_epochs: Count = setting(
        10, "Epochs between two evaluations; the last epoch always has one."
    )
    lr: tuple[Positive, ...] = setting(
        (0.1,),
        "Base learning rate per 256 images; if there are several, each trains its own classifier, "
        "and a tenth of the training set, held out, decides between them; a schedule's peak is lr "
        "* total batch / 256.",
    )
    probe: Literal["linear", "attentive"] = setting(
        "linear",
        "Classifier on the frozen encoder: a linear layer on the feature that global_pool names "
        "(linear), or on what learned queries gather from the patch tokens (attentive, arXiv "
        "2506.10178).",
    )
    probe_queries: Count = setting(32, "Number of learned queries of an attentive probe.")
    probe_value_ratio: Share = setting(
        1.0,
        "Width of what the queries of an attentive probe gather together, as a share of the "
        "encoder's width; less trains fewer parameters.",
    )
    optimizer: Literal["sgd", "lars", "lbfgs"] = setting(
        "sgd",
        "Optimiser: SGD with Nesterov momentum, LARS, or L-BFGS, which fits a logistic regression "
        "to features that are computed once, without augmentation; no setting of the schedule "
        "matters then.",
    )
    lbfgs_c: tuple[Positive, ...] = setting(
        (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0),
        "Inverse L2 penalties of optimizer lbfgs (scikit-learn's C, on standardised features); of "
        "several, a tenth of the training set, held out, chooses one, with which all training "
        "images are fitted.",
    )
    momentum: OpenShare = setting(0.9, "Momentum of either optimiser.")
    weight_decay: PositiveOrZero = setting(0.0, "Weight decay of the classifiers' weight matrices.")

    epochs: Count = setting(90, "Length of the schedule in epochs.")
    crop_min: Share = setting(
        0.08,
        "Smallest area of a random resized crop, as a share of the image's area; the largest is 1.",
    )

    def problems(self) -> list[str]:
        return super().problems() + where(
            *self.channel_rows(self.in_chans),
            (
                self.finetune is None,
                "finetune is needed: the weights to evaluate, or the word random",
            ),
            (
                len(self.lr) > 1 and self.min_lr,
                "min_lr must be 0 if lr is a list: each classifier has its own schedule",
            ),
            (
                self.probe == "attentive" and self.task == "segment",
                "probe attentive gathers the patches of an image for its class: leave it out for "
                "task segment, which classifies each patch",
            ),
            (
                self.probe == "attentive" and self.global_pool == "token",
                "probe attentive reads the patch tokens in place of the class token: set "
                "global_pool avg",
            ),
            (
                self.probe == "attentive" and self.optimizer == "lbfgs",
                "probe attentive learns what it gathers from the patches, step by step: optimizer "
                "lbfgs, which fits one feature of each image, is for probe linear",
            ),
            (
                len(set(self.lr)) < len(self.lr),
                f"lr names a rate twice: {' '.join(f'{lr:g}' for lr in self.lr)}",
            ),
            (
                len(set(self.lbfgs_c)) < len(self.lbfgs_c),
                f"lbfgs_c names a number twice: {' '.join(f'{c:g}' for c in self.lbfgs_c)}",
            ),
            (
                self.optimizer == "lbfgs" and self.purpose != "multiclass",
                "optimizer lbfgs fits one class to each image: not with task segment, and "
                f"objective multiclass alone, got {self.purpose}",
            ),
            (
                self.task == "segment" and not self.last_norm,
                "last_norm false goes with task classify: the model of task segment, which is "
                "written in the end, has a norm",
            ),
        )


class KnnConfig(ClassifierConfig, LastNormConfig, LabelledDataConfig, CompileConfig, RunConfig):
    """k-NN"""

    task: Literal["classify", "segment"] = setting(
        "classify",
        "What is classified: images (classify), or each patch, upsampled to the pixels (segment).",
    )
    memory_patches: Count = setting(
        100_000,
        "Number of training patches, chosen by seed, that task segment looks for neighbours among.",
    )
    finetune: PathText | None = setting(
        None,
        "Weights to evaluate, of any kind that models/README.md lists, a folder of checkpoints, or "
        "the word random for an untrained model.",
    )
    ks: tuple[Count, ...] = setting(
        (10, 20, 100, 200), "Numbers of neighbours, of which the first is the reported one."
    )
    layer: tuple[Layer, ...] = setting(
        (-1,),
        "Blocks whose tokens are read, counted from 0, or from -1 backwards, all in one pass over "
        "the images; the later ones are dropped.",
    )
    temperature: Annotated[float, Ge(0.01)] = setting(
        0.07, "Temperature of a neighbour's vote, exp(cosine similarity / temperature)."
    )
    batch_size: Count = setting(
        128, "Number of images in a batch of one process, to compute features."
    )
    save_path: PathText | None = setting(
        None, "Folder to which the features are written; null is none."
    )
    load_path: PathText | None = setting(
        None, "Folder of features that an earlier run wrote; null computes them."
    )

    def problems(self) -> list[str]:
        of_images = (
            super().problems() + where(*self.channel_rows(self.in_chans))
            if self.load_path is None
            else []
        )
        return of_images + where(
            (
                self.objective != "multiclass",
                f"objective {self.objective} is for fine-tuning and linear classification: "
                "neighbours vote for a class",
            ),
            (
                len(set(self.ks)) < len(self.ks),
                f"ks names a number twice: {' '.join(map(str, self.ks))}",
            ),
            (
                self.finetune is None and self.load_path is None,
                "finetune is needed: the weights to evaluate, or the word random",
            ),
            (
                self.save_path is not None and self.load_path is not None,
                "save_path and load_path exclude each other: the features are there already",
            ),
            (
                self.load_path is not None and (self.layer != (-1,) or not self.last_norm),
                "load_path holds features of one readout: leave layer and last_norm out",
            ),
            (
                self.task == "segment" and len(self.layer) > 1,
                f"layer names {len(self.layer)} blocks, and task segment reads one",
            ),
            (not self.layer, "layer is empty: name a block, the last one is -1"),
        )


STAGE_CONFIGS = (PretrainConfig, FinetuneConfig, LinclsConfig, KnnConfig)
