"""What a setting is, how its value is read, and the settings that stages share; each stage adds its
own in `util/settings/pretrain.py` and `util/settings/evaluation.py`.

A stage's settings are one frozen pydantic class, composed by inheritance, in which the docstring of
a class is the heading of its settings in `--help`. A field is at once a YAML key, a command-line
flag and (for models) the constructor's keyword.
"""

from typing import Annotated, Literal, TypeVar, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    ValidationInfo,
    field_validator,
)

from util.errors import where
from util.files import expand_path

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Value = TypeVar("Value")
LARGEST = 2**53  # of whole numbers: up to here they are exact as floats, too
# Not plain `str`, as pydantic refuses the file names of Linux that are no UTF-8.
Text = Annotated[InstanceOf[str], MinLen(1)]
PathText = Annotated[Text, AfterValidator(expand_path)]
Count = Annotated[int, Ge(1), Le(LARGEST)]
CountOrZero = Annotated[int, Ge(0), Le(LARGEST)]
Width = Annotated[int, Ge(4), Le(LARGEST)]
Seed = Annotated[int, Ge(0), Le(2**31 - 1)]
Positive = Annotated[float, Gt(0)]
PositiveOrZero = Annotated[float, Ge(0)]
Probability = Annotated[float, Ge(0), Le(1)]
Share = Annotated[float, Gt(0), Le(1)]
ShareBelowOne = Annotated[float, Ge(0), Lt(1)]
OpenShare = Annotated[float, Gt(0), Lt(1)]


def setting(default: Value, help: str, *, may_change: bool = False) -> Value:
    """A field with its description, which names the unit.

    `may_change` marks a setting that does not alter a run's result, so that a resumed run may
    change it; all others are compared on resume.
    """
    return Field(default, description=help, json_schema_extra={"may_change": may_change})


class Settings(BaseModel):
    """The base of every class of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    @field_validator("*", mode="before")
    @classmethod
    def _as_text(cls, raw: object, info: ValidationInfo) -> object:
        """A value as the text that spells it, which pydantic reads as the field's type.

        YAML reads `1e-3` as text and flags are text, so that all values can be read alike; and as
        text `true` is never a number. A single value and a list of one are the same.
        """
        items = raw if isinstance(raw, list | tuple) else [raw]
        texts = [None if str(item).lower() in ("null", "none") else str(item) for item in items]
        if get_origin(cls.model_fields[str(info.field_name)].annotation) is tuple:
            return texts or None  # an empty list is no value
        return texts[0] if len(texts) == 1 else texts

    def problems(self) -> list[str]:
        """Values that are legal alone and wrong together: one line each, which begins with the
        setting's name."""
        return []


class DeviceConfig(Settings):
    """Device"""

    device: Literal["auto", "cuda", "mps", "cpu"] = setting(
        "auto", "Device to compute on; auto takes CUDA, then MPS, then the CPU.", may_change=True
    )


class RunConfig(DeviceConfig):
    """Run"""

    output_dir: PathText | None = setting(
        None,
        "Folder of the run, in which the same command resumes it; null is output/<stage>/<config "
        "name>.",
        may_change=True,
    )
    seed: Seed = setting(
        0, "Seed of the initial weights, the sample order, the crops, the flips and the masks."
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto",
        "Precision of the model's arithmetic, by autocast where it is bf16 or fp16; auto is bf16 "
        "on a device that computes it fast, else fp16 on CUDA, else fp32.",
    )
    timeout: Annotated[float, Gt(0), Le(10_000)] = setting(
        30.0,
        "Longest wait for another process or for a step, after which the run ends and says what it "
        "was doing, in minutes.",
        may_change=True,
    )


class TrainRunConfig(RunConfig):
    """Logging and checkpoints"""

    log_interval: Count = setting(20, "Optimiser steps between two log lines.", may_change=True)
    save_minutes: PositiveOrZero = setting(
        30.0,
        "Minutes between two checkpoints, counted when a line is logged; 0 is off.",
        may_change=True,
    )
    save_epochs: CountOrZero = setting(
        10, "Epochs between two checkpoints; 0 is off.", may_change=True
    )
    keep_last: Count = setting(3, "Number of newest checkpoints that are kept.", may_change=True)
    keep_every: CountOrZero = setting(
        0, "Epochs between two checkpoints that are never deleted; 0 is off.", may_change=True
    )
    max_bad_steps: Count = setting(
        10,
        "Number of steps in a row with a non-finite gradient that ends the run; each of them is "
        "skipped.",
        may_change=True,
    )
    tensorboard: bool = setting(
        True, "Whether curves for TensorBoard are written to <output_dir>/tb.", may_change=True
    )


class ParallelConfig(Settings):
    """Parallelism"""

    parallel: Literal["ddp", "fsdp"] = setting(
        "ddp",
        "What each of several processes holds: the complete model, gradient and optimiser state "
        "(ddp), or a share of them (fsdp), which takes less memory and more communication and is "
        "for huge and giant models.",
        may_change=True,
    )


class CompileConfig(Settings):
    """Compiling"""

    compile: bool = setting(
        False,
        "Whether torch.compile compiles the model, for speed on GPUs; the first step and the first "
        "evaluation take longer.",
        may_change=True,
    )
    compile_backend: Literal["inductor", "aot_eager", "eager"] = setting(
        "inductor",
        "Backend of torch.compile; aot_eager and eager are for finding faults.",
        may_change=True,
    )


class CheckpointingConfig(Settings):
    """Activation memory"""

    checkpointing: bool = setting(
        False,
        "Whether activations are computed again for the gradient, not kept: less memory, a third "
        "more work.",
        may_change=True,
    )


class PixelConfig(Settings):
    """Pixels"""

    mean: tuple[float, ...] = setting(
        IMAGENET_MEAN, "Mean of each channel, which is subtracted from pixels in [0, 1]."
    )
    std: tuple[Positive, ...] = setting(
        IMAGENET_STD, "Standard deviation of each channel, by which pixels in [0, 1] are divided."
    )

    def channel_rows(self, in_chans: int) -> list[tuple[object, str]]:
        """For `where`: whether the data path cannot read `in_chans` channels, or mean or std has
        another number of values."""
        return [
            (
                in_chans not in (1, 3),
                f"in_chans must be 1 or 3, as images are read as grey or RGB, got {in_chans}",
            ),
            (
                len(self.mean) != in_chans,
                f"mean has {len(self.mean)} values and in_chans is {in_chans}: they must agree",
            ),
            (
                len(self.std) != in_chans,
                f"std has {len(self.std)} values and in_chans is {in_chans}: they must agree",
            ),
        ]


class DatasetConfig(Settings):
    """Data set"""

    dataset: Literal["folder", "packed", "parquet", "mnist5k", "cifar10", "cifar100"] = setting(
        "folder",
        "Kind of data set: a folder of images, packed shards of them, parquet files as the library "
        "datasets writes them, or a known set.",
    )
    data_path: PathText | None = setting(
        None,
        "Folder of images, shards or parquet files, whose train/ and val/ are used where it has "
        "them; for CIFAR the folder of the binary version's .tar.gz.",
        may_change=True,  # the resume compares the list of images instead
    )


class DataConfig(DatasetConfig, PixelConfig):
    """Data"""

    download: bool = setting(
        False, "Whether CIFAR is downloaded to data_path if it is not there.", may_change=True
    )
    num_workers: CountOrZero | None = setting(
        None,
        "Number of loader processes per training process; null is the number of cores that it can "
        "have, at most 8.",
        may_change=True,
    )
    prefetch_factor: Count = setting(
        4, "Number of batches that each loader process holds ready.", may_change=True
    )
    data_on_device: bool = setting(
        False,
        "Whether all images are decoded once, into the memory of the device (of the host if that "
        "is the CPU), where batches are cropped and flipped without loader processes: for images "
        "of one size that fit. Each of several processes holds all of them.",
    )

    def problems(self) -> list[str]:
        return super().problems() + where(
            (
                self.dataset != "mnist5k" and self.data_path is None,
                f"data_path is needed for dataset {self.dataset}: give --data_path FOLDER",
            ),
            (
                self.download and not self.dataset.startswith("cifar"),
                f"download fetches cifar10 and cifar100 only, not dataset {self.dataset}",
            ),
        )


class ModelConfig(Settings):
    """Model"""

    size: Literal["debug", "tiny", "small", "base", "large", "huge", "giant"] = setting(
        "base",
        "Row of the size table in models/build.py, which gives patch_size, embed_dim, depth and "
        "num_heads where they are null.",
    )
    img_size: Count | tuple[Count, Count] = setting(
        224, "Side of the images in pixels, or height and width."
    )
    patch_size: Count | tuple[Count, Count] | None = setting(
        None, "Side of the patches in pixels, or height and width."
    )
    in_chans: Count = setting(3, "Number of image channels: 3 reads images as RGB, 1 as grey.")
    embed_dim: Width | None = setting(None, "Width of the encoder.")
    depth: Count | None = setting(None, "Number of encoder blocks.")
    num_heads: Count | None = setting(None, "Number of attention heads of an encoder block.")
    mlp_ratio: Positive = setting(4.0, "Width of a block's MLP, as a multiple of embed_dim.")


class ScheduleConfig(Settings):
    """Batch and schedule"""

    batch_size: Count = setting(
        64, "Number of images in a micro-batch of one process.", may_change=True
    )
    accum_iter: Count = setting(
        1, "Number of micro-batches whose gradients make one optimiser step.", may_change=True
    )
    total_batch_size: Count | None = setting(
        None,
        "Number of images in an optimiser step, over all processes, from which accum_iter follows; "
        "null leaves accum_iter as it is.",
        may_change=True,  # the resume compares the resulting total instead
    )
    epochs: Count = setting(100, "Length of the schedule in epochs.")
    stop_epoch: Count | None = setting(
        None,
        "Epoch after which the run stops, on the schedule of all epochs; null is epochs.",
        may_change=True,
    )
    warmup_epochs: PositiveOrZero = setting(
        10.0, "Length of the learning rate's linear rise from 0, in epochs."
    )
    min_lr: PositiveOrZero = setting(0.0, "Learning rate at the end of the cosine, per 256 images.")

    @property
    def base_lr(self) -> float:
        """The peak of the schedule, per 256 images; parameter groups scale it."""
        lr = self.model_dump(include={"lr"})["lr"]  # of a subclass: a rate, or several
        return float(max(lr) if isinstance(lr, tuple) else lr)

    def problems(self) -> list[str]:
        return super().problems() + where(
            (
                self.warmup_epochs > self.epochs,
                f"warmup_epochs {self.warmup_epochs:g} is longer than epochs {self.epochs}",
            ),
            (
                self.stop_epoch is not None and self.stop_epoch > self.epochs,
                f"stop_epoch {self.stop_epoch} is past epochs {self.epochs}",
            ),
            (self.min_lr > self.base_lr, f"min_lr {self.min_lr:g} is above lr {self.base_lr:g}"),
        )


class AdamWConfig(ScheduleConfig):
    """Optimiser"""

    lr: Positive = setting(
        1.5e-4, "Base learning rate per 256 images; the schedule's peak is lr * total batch / 256."
    )
    weight_decay: PositiveOrZero = setting(
        0.05, "Weight decay of linear layers and of the patch projection; nothing else decays."
    )
    beta1: ShareBelowOne = setting(0.9, "AdamW's decay of the gradient's moving average.")
    beta2: ShareBelowOne = setting(0.95, "AdamW's decay of the squared gradient's moving average.")
    clip_grad: Positive | None = setting(
        None, "Largest L2 norm of the gradient, to which longer ones are scaled; null is off."
    )


class AugmentConfig(Settings):
    """Augmentation"""

    crop_min: Share = setting(
        0.2,
        "Smallest area of a random resized crop, as a share of the image's area; the largest is 1.",
    )
    interpolation: Literal["bicubic", "bilinear"] = setting(
        "bicubic", "Interpolation of the random resized crop."
    )
    hflip: Probability = setting(0.5, "Probability of a horizontal flip.")
