"""The settings of the picture tools (see `util/settings/base.py`); they read a recipe's YAML as the
stages do."""

from typing import Literal

from util.errors import where
from util.settings.base import (
    Count,
    CountOrZero,
    DatasetConfig,
    DeviceConfig,
    OpenShare,
    PathText,
    PixelConfig,
    Seed,
    ShareBelowOne,
    ShowConfig,
    setting,
)
from util.settings.evaluation import ClassifierConfig, EvalCropConfig
from util.settings.pretrain import AutoencoderConfig


class PictureConfig(DatasetConfig, ShowConfig, DeviceConfig):
    """Pictures"""

    num_images: Count = setting(
        16, "Number of images that are taken, evenly spaced, from a folder or data set."
    )


class MaeVisConfig(AutoencoderConfig, PixelConfig, PictureConfig):
    """Reconstruction pictures"""

    model_path: PathText | None = setting(
        None, "Weights of an autoencoder, of any kind that models/README.md lists."
    )
    img_path: tuple[PathText, ...] = setting(
        (), "Images, or folders of images; none is the data set's validation images."
    )
    save_path: PathText = setting(
        "output/reconstructions", "Folder to which the pictures are written."
    )
    mask: Literal["random", "block", "grid"] = setting(
        "random",
        "Kind of mask: patches at random (random), large blocks (block), or all but one patch of "
        "every 4, 9 or 16 (grid).",
    )
    mask_ratio: tuple[OpenShare, ...] = setting(
        (0.75,), "Shares of the patches that are removed, with a picture for each."
    )
    seed: tuple[Seed, ...] = setting((0,), "Seeds of the masks, with a picture for each.")

    def problems(self) -> list[str]:
        return where(
            *self.channel_rows(self.in_chans),
            *self.show_rows(self.in_chans),
            (self.model_path is None, "model_path is needed: give --model_path PATH"),
            (
                not (self.img_path or self.data_path or self.dataset == "mnist5k"),
                "img_path is needed: give --img_path PATH",
            ),
            (
                # as they are written in the pictures' names
                len({f"{ratio:g}" for ratio in self.mask_ratio}) < len(self.mask_ratio),
                f"mask_ratio names a number twice: {' '.join(map(str, self.mask_ratio))}",
            ),
            (
                len(set(self.seed)) < len(self.seed),
                f"seed names a number twice: {' '.join(map(str, self.seed))}",
            ),
        )


class OverviewConfig(MaeVisConfig):
    """Overview"""

    save_path: PathText = setting("output/overview.png", "File to which the picture is written.")

    def problems(self) -> list[str]:
        return super().problems() + where(
            *(
                (
                    len(getattr(self, name)) > 1,
                    f"{name} has several values: the overview shows one image, masked once",
                )
                for name in ("img_path", "mask_ratio", "seed")
            )
        )


class ExplainConfig(ClassifierConfig, EvalCropConfig, PictureConfig):
    """Attention rollout"""

    finetune: PathText | None = setting(
        None,
        "Weights to explain, of any kind that models/README.md lists, or the word random for an "
        "untrained model.",
    )
    image_path: tuple[PathText, ...] = setting(
        (), "Images, or folders of images; none is the data set's validation images."
    )
    save_path: PathText = setting(
        "output/rollout", "Folder to which the pictures and maps are written."
    )
    head_fusion: Literal["mean", "max", "min"] = setting(
        "mean", "Function that makes one attention matrix of those of a layer's heads."
    )
    discard_ratio: ShareBelowOne = setting(
        0.0, "Share of each layer's attention matrix, its lowest entries, that is set to 0."
    )
    layer_index: CountOrZero | None = setting(
        None, "Layer to draw alone, counted from 0; null is the rollout over all layers."
    )
    reader: Literal["token", "avg"] | None = setting(
        None,
        "Row of the attention that is drawn: the class token's (token) or the mean over the "
        "patches' (avg); null is the class token's if there is one, and with category_index that "
        "of global_pool.",
    )
    category_index: CountOrZero | None = setting(
        None,
        "Class, counted from 0, whose gradient weights the attention; needs a classifier's "
        "weights; null does not weight it.",
    )
    seed: Seed = setting(0, "Seed of the untrained model.")

    def problems(self) -> list[str]:
        return where(
            *self.channel_rows(self.in_chans),
            *self.show_rows(self.in_chans),
            (self.finetune is None, "finetune is needed: give --finetune PATH"),
            (
                not (self.image_path or self.data_path or self.dataset == "mnist5k"),
                "image_path is needed: give --image_path PATH",
            ),
        )
