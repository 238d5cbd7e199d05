"""What a setting is, how its value is read, and the settings that stages share; each stage adds its
own in `util/settings/pretrain.py` and `util/settings/evaluation.py`.

A stage's settings are one frozen pydantic class, composed by inheritance, in which the docstring of
a class is the heading of its settings in `--help`. A field is at once a YAML key, a command-line
flag and (for models) the constructor's keyword.
"""

import math
from importlib.util import find_spec
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
BUNDLED = ("mnist5k", "digits_scenes")  # data sets that come with the installed packages
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


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) of a setting that is the side of a square or height and width."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def word_or_pair(value: tuple[str, ...]) -> str | tuple[float, float]:
    """What `_interval` has checked, as a word or as two numbers."""
    return value[0] if len(value) == 1 else (float(value[0]), float(value[1]))


def _interval(*words: str, of_width: bool = False) -> AfterValidator:
    """A validator of one of `words` or two numbers, a lower and a higher one or any one and a
    width, which come back as Python spells them."""

    def check(value: tuple[str, ...]) -> tuple[str, ...]:
        if len(value) == 1 and value[0] in words:
            return value
        try:
            first, second = map(float, value)
        except ValueError:
            first = second = float("nan")
        if not (math.isfinite(first) and math.isfinite(second) and second > first * (not of_width)):
            pair = (
                "CENTER WIDTH, the width above 0" if of_width else "LOW HIGH, the higher one last"
            )
            raise ValueError(f"must be {' or '.join(words)}, or {pair}, got {' '.join(value)}")
        return str(first), str(second)

    return AfterValidator(check)


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
        field = cls.model_fields[str(info.field_name)]
        if get_origin(field.annotation) is tuple:
            return texts or (None if field.default else ())  # empty is no value, or the default
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
    track: Literal["wandb", "mlflow"] | None = setting(
        None,
        "Service that gets the run's scalars, settings and name, besides log.jsonl and "
        "TensorBoard: Weights & Biases or MLflow; none is off.",
        may_change=True,
    )

    def problems(self) -> list[str]:
        # without a file it is a folder that happens to have the name
        is_absent = self.track and getattr(find_spec(self.track), "origin", None) is None
        return super().problems() + where(
            (is_absent, f"track {self.track} is not installed: pip install -e .[{self.track}]")
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

    pixel_range: Annotated[tuple[Text, ...], _interval("auto", "per_channel")] = setting(
        ("auto",),
        "Values that become 0 and 1, those outside being clipped: auto takes the usual ones of 8 "
        "and 16 bits (0 to 255, 0 to 65535) and refuses others; LOW HIGH are in the files' unit; "
        "per_channel takes the lowest and highest value of each channel of each image.",
    )
    channels: tuple[Count, ...] = setting(
        (),
        "Channels of the files that are taken, in this order, counted from 1; without it all are, "
        "and in_chans 1 and 3 also turn RGB into grey and grey into RGB.",
    )
    dicom_window: Annotated[tuple[Text, ...], _interval("file", "full", of_width=True)] = setting(
        ("file",),
        "Window of DICOM files that are not in colour: the one that the file names (file), all "
        "values that its depth allows (full), or CENTER WIDTH in the unit after rescaling. A "
        "pixel_range that is not auto takes the place of the window.",
    )
    dicom_frames: Literal["first", "all"] = setting(
        "first", "Whether the first frame of a DICOM file in a folder is an image, or each of them."
    )

    def channel_rows(self, in_chans: int) -> list[tuple[object, str]]:
        """For `where`: whether mean, std or channels has another number of values than
        `in_chans`."""
        counts = {"mean": len(self.mean), "std": len(self.std)}
        if self.channels:
            counts["channels"] = len(self.channels)
        return [
            (
                count != in_chans,
                f"{name} has {count} values and in_chans is {in_chans}: they must agree",
            )
            for name, count in counts.items()
        ]


class ShowConfig(Settings):
    """Pictures of many channels"""

    show_channels: tuple[Count, ...] = setting(
        (),
        "One or three channels that pictures show, counted from 1 among those of in_chans; "
        "without it the first three, or the first of one or two.",
        may_change=True,
    )

    def show_rows(self, in_chans: int) -> list[tuple[object, str]]:
        """For `where`: whether pictures cannot show the channels."""
        shown = self.show_channels
        return [
            (
                len(shown) not in (0, 1, 3) or max(shown, default=1) > in_chans,
                f"show_channels must be one or three numbers up to in_chans {in_chans}, got "
                f"{' '.join(map(str, shown))}",
            )
        ]


class DatasetConfig(Settings):
    """Data set"""

    dataset: Literal[
        "folder", "packed", "parquet", "mnist5k", "digits_scenes", "cifar10", "cifar100"
    ] = setting(
        "folder",
        "Kind of data set: a folder of images, packed shards of them, parquet files as the library "
        "datasets writes them, or a known set; digits_scenes are several digits in an image, with "
        "masks and boxes.",
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
                self.dataset not in BUNDLED and self.data_path is None,
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
    in_chans: Count = setting(3, "Number of image channels: 3 reads photographs as RGB, 1 as grey.")
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
