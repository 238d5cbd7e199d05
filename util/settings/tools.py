"""Every knob of the picture tools (see `util/settings/base.py`); they read a recipe's YAML like the
stages do."""

from dataclasses import dataclass

from util.settings.base import DatasetConfig, DeviceConfig, PixelConfig, channel_problems, knob
from util.settings.evaluation import ClassifierConfig, EvalCropConfig
from util.settings.pretrain import AutoencoderConfig


@dataclass(frozen=True)
class PictureConfig(DatasetConfig, DeviceConfig):
    """Pictures"""

    num_images: int = knob(
        16, "of a folder or data set, take so many, evenly spaced", unit="images", min=1
    )


@dataclass(frozen=True)
class MaeVisConfig(AutoencoderConfig, PixelConfig, PictureConfig):
    """Reconstruction pictures"""

    model_path: str | None = knob(None, "weights of an autoencoder, of any kind that README lists")
    img_path: tuple[str, ...] = knob(
        (), "images, or folders of images; none is the data set's validation images"
    )
    save_path: str = knob("output/reconstructions", "folder to write the pictures to")
    mask: str = knob(
        "random",
        "what is removed: patches at random, large blocks, or all but one patch of every 4 (9, 16)",
        choices=("random", "block", "grid"),
    )
    mask_ratio: tuple[float, ...] = knob(
        (0.75,),
        "shares of the patches that are removed, a picture for each",
        unit="in [0, 1]",
        above=0,
        below=1,
    )
    seed: tuple[int, ...] = knob((0,), "of the masks, a picture for each", min=0, max=2**31 - 1)

    def problems(self) -> list[str]:
        """Values that are legal alone and wrong together, one line each."""
        found = channel_problems(self.in_chans, self.mean, self.std)
        found += missing("model_path", self.model_path) + no_images("img_path", self.img_path, self)
        for name, values in (("mask_ratio", self.mask_ratio), ("seed", self.seed)):
            if len({f"{value:g}" for value in values}) < len(values):  # as in the pictures' names
                found.append(
                    f"{name} names a number twice: {' '.join(f'{value:g}' for value in values)}"
                )
        return found


@dataclass(frozen=True)
class OverviewConfig(MaeVisConfig):
    """Overview"""

    save_path: str = knob("output/overview.png", "the picture")

    def problems(self) -> list[str]:
        """As for reconstructions; and it shows one image under one mask."""
        found = super().problems()
        for name in ("img_path", "mask_ratio", "seed"):
            if len(getattr(self, name)) > 1:
                found.append(
                    f"{name} names {len(getattr(self, name))}: the overview shows one image under one mask"
                )
        return found


@dataclass(frozen=True)
class ExplainConfig(ClassifierConfig, EvalCropConfig, PictureConfig):
    """Attention rollout"""

    finetune: str | None = knob(
        None,
        "weights to look into, of any kind that README lists, or the word random for an untrained model",
    )
    image_path: tuple[str, ...] = knob(
        (), "images, or folders of images; none is the data set's validation images"
    )
    save_path: str = knob("output/rollout", "folder to write the pictures and maps to")
    head_fusion: str = knob(
        "mean", "how the heads of a layer become one matrix", choices=("mean", "max", "min")
    )
    discard_ratio: float = knob(
        0.0,
        "share of each layer's matrix, its lowest entries, that is left out",
        unit="in [0, 1]",
        min=0,
        below=1,
    )
    layer_index: int | None = knob(
        None, "only this layer, counted from 0; null rolls out over all", min=0
    )
    reader: str | None = knob(
        None,
        "whose row is read, the class token's or the mean patch's; null is the class token's where there is one, "
        "and with category_index that of global_pool",
        choices=("token", "avg"),
    )
    category_index: int | None = knob(
        None,
        "what speaks for this class, counted from 0, by the gradient; needs a classifier's weights",
        min=0,
    )
    seed: int = knob(0, "of the untrained model", min=0, max=2**31 - 1)

    def problems(self) -> list[str]:
        """Values that are legal alone and wrong together, one line each."""
        found = channel_problems(self.in_chans, self.mean, self.std)
        return (
            found
            + missing("finetune", self.finetune)
            + no_images("image_path", self.image_path, self)
        )


def missing(name: str, value: object) -> list[str]:
    """That a setting without a default is given."""
    return [] if value else [f"{name} is needed: give --{name} PATH"]


def no_images(name: str, paths: tuple[str, ...], cfg: DatasetConfig) -> list[str]:
    """That there are images, named or of a data set."""
    return [] if paths or cfg.dataset == "mnist5k" or cfg.data_path else missing(name, None)
