"""The settings of the tools that draw, embed and predict (see `util/settings/base.py`); they read
a recipe's YAML as the stages do."""

from typing import Annotated, Literal

from annotated_types import Ge, Le

from util.errors import where
from util.settings.base import (
    BUNDLED,
    Count,
    CountOrZero,
    DatasetConfig,
    DeviceConfig,
    OpenShare,
    PathText,
    PixelConfig,
    Probability,
    Seed,
    ShareBelowOne,
    ShowConfig,
    Text,
    setting,
)
from util.settings.evaluation import ClassifierConfig, EvalCropConfig, LastNormConfig, Layer
from util.settings.pretrain import AutoencoderConfig, MaskConfig


class PictureConfig(DatasetConfig, ShowConfig, DeviceConfig):
    """Pictures"""

    num_images: Count = setting(
        16, "Number of images that are taken, evenly spaced, from a folder or data set."
    )


class MaeVisConfig(AutoencoderConfig, MaskConfig, PixelConfig, PictureConfig):
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
    mask_ratio: tuple[OpenShare, ...] = setting(
        (0.75,), "Shares of the patches that are removed, with a picture for each."
    )
    seed: tuple[Seed, ...] = setting((0,), "Seeds of the masks, with a picture for each.")
    layout: Literal["rows", "columns"] = setting(
        "rows", "What each image of grid.png is: a row, or a column of fewer pictures."
    )

    def problems(self) -> list[str]:
        return where(
            *self.channel_rows(self.in_chans),
            *self.show_rows(self.in_chans),
            (self.model_path is None, "model_path is needed: give --model_path PATH"),
            (
                not (self.img_path or self.data_path or self.dataset in BUNDLED),
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
    reader: Literal["token", "avg", "probe"] | None = setting(
        None,
        "Row of the attention that is drawn: the mean of the class tokens' (token) or of the "
        "patches' (avg); null is the class tokens' if there are any, and with category_index that "
        "of global_pool. With probe it is the attention of an attentive probe's queries, and no "
        "rollout.",
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
                not (self.image_path or self.data_path or self.dataset in BUNDLED),
                "image_path is needed: give --image_path PATH",
            ),
            *(
                (
                    self.reader == "probe" and getattr(self, name) is not None,
                    f"{name} does not go with reader probe, which draws the probe's queries alone",
                )
                for name in ("category_index", "layer_index")
            ),
        )


class FrozenConfig(EvalCropConfig, DeviceConfig):
    """Frozen model"""

    num_heads: Count | None = setting(
        None, "Number of attention heads, for weights that do not tell it."
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto",
        "Precision of the model's arithmetic, by autocast where it is bf16 or fp16; auto is bf16 "
        "on a device that computes it fast, else fp16 on CUDA, else fp32.",
    )


class EncodeConfig(FrozenConfig, DatasetConfig):
    """Weights and images"""

    finetune: PathText | None = setting(
        None,
        "Weights to apply, of any kind that models/README.md lists; what they record (img_size, "
        "mean, std) is taken where it is not stated here.",
        may_change=True,  # parts of a result record the weights' sha256 instead
    )
    data_path: PathText | None = setting(
        None,
        "Folder of images, an image, a text file with a path in each line, a parquet file or a "
        "folder of them, or a folder of shards; for CIFAR the folder of the binary version's "
        ".tar.gz.",
        may_change=True,
    )
    split: Literal["all", "train", "val"] = setting(
        "all", "Split of the data set to take; all takes every image below data_path."
    )
    img_size: Count | tuple[Count, Count] | None = setting(
        None, "Side of the images in pixels, or height and width; null is that of the weights."
    )
    batch_size: Count = setting(128, "Number of images in a batch of one process.")
    num_workers: CountOrZero | None = setting(
        None,
        "Number of loader processes per process; null is the number of cores that it can have, at "
        "most 8.",
        may_change=True,
    )

    def problems(self) -> list[str]:
        return where(
            (self.finetune is None, "finetune is needed: give --finetune PATH"),
            (
                self.data_path is None and self.dataset not in BUNDLED,
                "data_path is needed: give --data_path PATH",
            ),
        )


class SeeFeaturesConfig(LastNormConfig, ShowConfig, EncodeConfig):
    """Pictures of features"""

    beside: tuple[PathText, ...] = setting(
        (),
        "More weights, whose features are drawn on the same images; the word random is the model "
        "of finetune, untrained.",
    )
    layer: Layer = setting(
        -1, "Block whose tokens are taken, counted from 0, or from -1 backwards."
    )
    num_images: Count = setting(8, "Number of images that are shown, evenly spaced.")
    num_compared: Count = setting(
        2000,
        "Number of images, evenly spaced, among which neighbours are searched, and that map.png "
        "shows.",
    )
    num_neighbours: Count = setting(6, "Number of neighbours of each image that is shown.")
    patch: tuple[CountOrZero, CountOrZero] | None = setting(
        None,
        "Row and column, counted from 0, of the patch of the first image to which others are "
        "compared; null is the middle one.",
    )
    remove_position: bool = setting(
        False,
        "Whether patches.png and similar.png show features less the mean of their place over all "
        "images.",
    )
    save_path: PathText = setting("output/features", "Folder to which the pictures are written.")
    seed: Seed = setting(0, "Seed of random weights, clusters and UMAP.")


class ApplyConfig(EncodeConfig):
    """Result"""

    output_file: PathText | None = setting(
        None, "File to write, which must not be there yet.", may_change=True
    )
    strict: bool = setting(
        False, "Whether the exit code is 1 if an image could not be read.", may_change=True
    )

    def problems(self) -> list[str]:
        return super().problems() + where(
            (self.output_file is None, "output_file is needed: give --output_file PATH")
        )


class EmbedConfig(LastNormConfig, ApplyConfig):
    """Features"""

    output: Literal["image", "patch"] = setting(
        "image", "Features to write: one for each image, or one for each of its patches."
    )
    pool: Literal["avg", "token", "both"] = setting(
        "avg",
        "Feature of an image: the mean of the patch tokens (avg) or of the class tokens (token), "
        "or both, as two arrays.",
    )
    layer: tuple[Layer, ...] = setting(
        (-1,),
        "Blocks whose tokens are taken, counted from 0, or from -1 backwards, in one pass over the "
        "images.",
    )
    normalize: bool = setting(False, "Whether features are divided by their L2 norm.")

    def problems(self) -> list[str]:
        endings = (".safetensors", ".npz", ".parquet")
        return super().problems() + where(
            (
                self.output_file is not None and not self.output_file.endswith(endings),
                f"output_file must end in {', '.join(endings)}, got {self.output_file}",
            )
        )


class PredictConfig(ApplyConfig):
    """Predictions"""

    topk: Count | None = setting(
        None,
        "Number of most probable classes to write for a classifier; null writes the probability of "
        "every class.",
        may_change=True,
    )
    threshold: Probability = setting(
        0.5,
        "Probability from which on a class is predicted, if an image may have several, or an "
        "object is written, of weights for detection.",
        may_change=True,
    )
    eval_mode: Literal["whole", "slide"] = setting(
        "whole", "How weights for segmentation see an image: see fine-tuning's eval_mode."
    )


class DemoConfig(ShowConfig, FrozenConfig):
    """Demo page"""

    model_path: PathText = setting(
        "cifar10-tiny",
        "Weights, of any kind that models/README.md lists, or the name of weights that come with "
        "this project.",
    )
    index: PathText | None = setting(
        None,
        "Features of one kind, written by tools/embed.py from the same weights, among which "
        "neighbours are searched; images are read as they were for it.",
    )
    decoder_num_heads: Count | None = setting(
        None, "Number of the decoder's attention heads, for weights that do not tell it."
    )
    norm_pix_loss: bool | None = setting(
        None,
        "Whether the decoder predicts patches normalised by their own mean and variance, for "
        "weights that do not tell it.",
    )
    mask_block: Count = setting(
        2, "Side of the squares of mask block, in patches; it must divide the grid of patches."
    )
    share_on: Text = setting(
        "127.0.0.1",
        "Address of this machine on which the page is offered: 127.0.0.1 is for browsers of this "
        "machine alone, 0.0.0.0 for everybody who reaches it.",
    )
    port: Annotated[int, Ge(1), Le(65535)] = setting(7860, "Port of the page.")
