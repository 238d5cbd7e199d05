"""The knobs that stages share; each stage adds its own in `util/settings/pretrain.py` and
`util/settings/evaluation.py`.

Settings are flat, typed, frozen dataclasses, composed by inheritance. A field is at once a YAML
key, a command-line flag and (for models) the constructor's keyword. Its metadata carry the help
text, the unit and the legal range; `util/settings/read.py` reads them. Fields marked `may_change`
do not alter a run's result, so a resumed run may change them; all others are compared on resume.
"""

from dataclasses import Field, dataclass, field, fields
from typing import Any

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def knob(
    default: Any,
    help: str,
    *,
    unit: str = "",
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    may_change: bool = False,
) -> Any:
    """A dataclass field with its documentation: `min`/`max` are inclusive bounds, `above`/`below`
    exclusive ones."""
    bounds = {"min": min, "max": max, "above": above, "below": below}
    return field(
        default=default,
        metadata={
            "help": help,
            "unit": unit,
            "bounds": bounds,
            "choices": choices,
            "may_change": may_change,
        },
    )


@dataclass(frozen=True)
class DeviceConfig:
    """Device"""

    device: str = knob(
        "auto",
        "where to compute; auto takes CUDA, then MPS, then CPU",
        choices=("auto", "cuda", "mps", "cpu"),
        may_change=True,
    )


@dataclass(frozen=True)
class RunConfig(DeviceConfig):
    """Run"""

    output_dir: str | None = knob(
        None,
        "folder of the run; null is output/<stage>/<config name>; the same command resumes there",
        may_change=True,
    )
    seed: int = knob(
        0,
        "decides the initial weights, the sample order, crops, flips and masks",
        min=0,
        max=2**31 - 1,
    )
    precision: str = knob(
        "auto",
        "bf16 and fp16 are autocast; auto is bf16 where the device has it, else fp16 on CUDA, else fp32",
        choices=("auto", "bf16", "fp16", "fp32"),
    )
    timeout: float = knob(
        30.0,
        "a run that waits longer for one of its processes, or for a step, ends and says where it was",
        unit="minutes",
        above=0,
        max=10_000,
        may_change=True,
    )


@dataclass(frozen=True)
class TrainRunConfig(RunConfig):
    """Logging and checkpoints"""

    log_interval: int = knob(
        20, "between two log lines", unit="optimiser steps", min=1, may_change=True
    )
    save_minutes: float = knob(
        30.0,
        "between two checkpoints, looked at when a line is logged; 0 is off",
        unit="minutes",
        min=0,
        may_change=True,
    )
    save_epochs: int = knob(
        10, "between two checkpoints; 0 is off", unit="epochs", min=0, may_change=True
    )
    keep_last: int = knob(
        3, "how many of the newest checkpoints stay", unit="checkpoints", min=1, may_change=True
    )
    keep_every: int = knob(
        0,
        "between two checkpoints that are saved beside those and stay for good; 0 is off",
        unit="epochs",
        min=0,
        may_change=True,
    )
    max_bad_steps: int = knob(
        10,
        "a step with a non-finite gradient is skipped; so many in a row end the run",
        unit="optimiser steps",
        min=1,
        may_change=True,
    )
    tensorboard: bool = knob(
        True, "write curves for TensorBoard into <output_dir>/tb", may_change=True
    )


@dataclass(frozen=True)
class ParallelConfig:
    """Parallelism"""

    parallel: str = knob(
        "ddp",
        "several processes each hold the whole model, its gradient and its optimiser (ddp), or one part of them "
        "each (fsdp): less memory and more communication, for huge and giant models",
        choices=("ddp", "fsdp"),
        may_change=True,
    )


@dataclass(frozen=True)
class PixelConfig:
    """Pixels"""

    mean: tuple[float, ...] = knob(
        IMAGENET_MEAN, "per channel, subtracted from pixels in [0, 1]", unit="pixel value"
    )
    std: tuple[float, ...] = knob(
        IMAGENET_STD, "per channel, divides pixels in [0, 1]", unit="pixel value", above=0
    )


@dataclass(frozen=True)
class DatasetConfig:
    """Data set"""

    dataset: str = knob(
        "folder",
        "folder of images, packed shards of them, or one of the known sets",
        choices=("folder", "packed", "mnist5k", "cifar10", "cifar100"),
    )
    data_path: str | None = knob(
        None,
        "folder of images or shards; where it has train/ and val/, training and judging read those; for CIFAR "
        "that of the binary version's .tar.gz",
        may_change=True,  # the resume compares the list of images instead
    )


@dataclass(frozen=True)
class DataConfig(DatasetConfig, PixelConfig):
    """Data"""

    download: bool = knob(
        False, "fetch CIFAR into data_path where it is not there", may_change=True
    )
    num_workers: int | None = knob(
        None,
        "loader processes per training process; null is the cores it can have, at most 8",
        min=0,
        may_change=True,
    )
    prefetch_factor: int = knob(
        4, "batches each loader process holds ready", unit="batches", min=1, may_change=True
    )


@dataclass(frozen=True)
class ModelConfig:
    """Model"""

    size: str = knob(
        "base",
        "row of the size table in models/build.py; gives the four keys below that are null",
        choices=("debug", "tiny", "small", "base", "large", "huge", "giant"),
    )
    img_size: int | tuple[int, int] = knob(224, "side, or height and width", unit="pixels", min=1)
    patch_size: int | tuple[int, int] | None = knob(
        None, "side, or height and width", unit="pixels", min=1
    )
    in_chans: int = knob(3, "3 reads images as RGB, 1 as grey", unit="channels", min=1)
    embed_dim: int | None = knob(None, "width of the encoder", min=4)
    depth: int | None = knob(None, "encoder blocks", min=1)
    num_heads: int | None = knob(None, "encoder attention heads", min=1)
    mlp_ratio: float = knob(4.0, "MLP width over embed_dim", above=0)


@dataclass(frozen=True)
class ScheduleConfig:
    """Batch and schedule"""

    batch_size: int = knob(64, "per process and micro-batch", unit="images", min=1, may_change=True)
    accum_iter: int = knob(1, "micro-batches per optimiser step", min=1, may_change=True)
    total_batch_size: int | None = knob(
        None,
        "images per optimiser step over all processes; when set, accum_iter follows from it",
        unit="images",
        min=1,
        may_change=True,  # the resume compares the resulting total instead
    )
    epochs: int = knob(100, "length of the schedule", unit="epochs", min=1)
    stop_epoch: int | None = knob(
        None, "end here on the full schedule; null is epochs", unit="epochs", min=1, may_change=True
    )
    warmup_epochs: float = knob(
        10.0, "linear rise of the learning rate from 0", unit="epochs", min=0
    )
    min_lr: float = knob(0.0, "end of the cosine", unit="per 256 images", min=0)

    @property
    def base_lr(self) -> float:
        """What the schedule peaks at, per 256 images; parameter groups scale it."""
        raise NotImplementedError


@dataclass(frozen=True)
class AdamWConfig(ScheduleConfig):
    """Optimiser"""

    lr: float = knob(
        1.5e-4,
        "base learning rate; the peak is lr * total batch / 256",
        unit="per 256 images",
        above=0,
    )
    weight_decay: float = knob(
        0.05, "of Linear and patch-projection weights; nothing else decays", min=0
    )
    beta1: float = knob(0.9, "AdamW", min=0, below=1)
    beta2: float = knob(0.95, "AdamW", min=0, below=1)
    clip_grad: float | None = knob(None, "largest L2 norm of the gradient; null is off", above=0)

    @property
    def base_lr(self) -> float:
        return self.lr


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation"""

    crop_min: float = knob(
        0.2, "smallest random resized crop; the largest is 1", unit="share of area", above=0, max=1
    )
    interpolation: str = knob("bicubic", "of the resized crop", choices=("bicubic", "bilinear"))
    hflip: float = knob(0.5, "probability of a horizontal flip", unit="in [0, 1]", min=0, max=1)


def data_problems(cfg: DataConfig, in_chans: int) -> list[str]:
    """What does not fit together in where the images come from and how they are normalised."""
    found = channel_problems(in_chans, cfg.mean, cfg.std)
    if cfg.dataset != "mnist5k" and cfg.data_path is None:
        found.append(f"data_path is needed for dataset {cfg.dataset}: give --data_path FOLDER")
    if cfg.download and not cfg.dataset.startswith("cifar"):
        found.append(f"download fetches cifar10 and cifar100 only, not dataset {cfg.dataset}")
    return found


def schedule_problems(cfg: ScheduleConfig) -> list[str]:
    """What does not fit together in the schedule."""
    found = []
    if cfg.warmup_epochs > cfg.epochs:
        found.append(f"warmup_epochs {cfg.warmup_epochs:g} is longer than epochs {cfg.epochs}")
    if cfg.stop_epoch is not None and cfg.stop_epoch > cfg.epochs:
        found.append(f"stop_epoch {cfg.stop_epoch} is past epochs {cfg.epochs}")
    if cfg.min_lr > cfg.base_lr:
        found.append(f"min_lr {cfg.min_lr:g} is above lr {cfg.base_lr:g}")
    return found


def channel_problems(in_chans: int, mean: tuple[float, ...], std: tuple[float, ...]) -> list[str]:
    """Checks that the data path can read `in_chans` channels and that mean and std have as many
    values."""
    found = []
    if in_chans not in (1, 3):
        found.append(f"in_chans must be 1 (grey) or 3 (RGB) for the data path, got {in_chans}")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != in_chans:
            found.append(
                f"{name} has {len(values)} values and in_chans is {in_chans}: give one value per channel"
            )
    return found


def sections(config_class: type) -> list[tuple[str, list[Field[Any]]]]:
    """The fields of a stage's dataclass grouped by the class that defines them, as (title,
    fields)."""
    by_name = {f.name: f for f in fields(config_class)}
    found = []
    for cls in reversed(config_class.__mro__):  # parents first: Model, then Masked autoencoder
        # a stage that only gives a field another default leaves it in its parent's group: each is
        # popped once
        section = [
            by_name.pop(name) for name in vars(cls).get("__annotations__", {}) if name in by_name
        ]
        if section:
            found.append(((cls.__doc__ or "").strip(), section))
    return found
