"""The settings of pretraining (see `util/settings/base.py`)."""

from typing import Literal

from util.errors import where
from util.settings.base import (
    AdamWConfig,
    AugmentConfig,
    CheckpointingConfig,
    CompileConfig,
    Count,
    CountOrZero,
    DataConfig,
    ModelConfig,
    OpenShare,
    ParallelConfig,
    PathText,
    PositiveOrZero,
    Settings,
    Share,
    ShowConfig,
    TrainRunConfig,
    Width,
    pair,
    setting,
)

SIMPLE_PADDING = 4  # pixels that `crop: simple` mirrors beyond each edge of an image


class AutoencoderConfig(ModelConfig):
    """Autoencoder"""

    class_tokens: CountOrZero = setting(
        1, "Number of class tokens that go through the encoder with the patches."
    )
    decoder_embed_dim: Width = setting(512, "Width of the decoder.")
    decoder_depth: Count = setting(8, "Number of decoder blocks.")
    decoder_num_heads: Count = setting(16, "Number of attention heads of a decoder block.")
    decoder_class_token: bool = setting(
        True, "Whether the class tokens go on through the decoder; needs class_tokens 1 or more."
    )
    decoder: Literal["self", "cross"] = setting(
        "self",
        "Kind of decoder: the paper's, whose tokens attend to one another (self), or a cheaper "
        "one, whose mask tokens attend only to the encoder's output (cross).",
    )
    pred_ratio: Share | None = setting(
        None,
        "Share of all patches that decoder cross predicts, drawn among the removed ones; null is "
        "all removed ones.",
    )
    norm_pix_loss: bool = setting(
        True, "Whether the target is each patch's pixels normalised by their own mean and variance."
    )
    decoder_fusion: CountOrZero = setting(
        0,
        "Number of encoder layers, evenly spaced, that the decoder reads a learned mix of, with "
        "decoder cross another one in each of its blocks; 0 reads the last layer alone.",
    )
    target: Literal["pixels", "lowpass"] = setting(
        "pixels",
        "What is predicted: the pixels as they are, or those of the image without its high "
        "frequencies (lowpass). norm_pix_loss holds for both.",
    )
    target_cutoff: Share | None = setting(
        None,
        "Highest frequency that stays in target lowpass, as a share of half the sampling rate; "
        "null is 0.357, which is 40 periods in 224 pixels.",
    )


class MaskConfig(Settings):
    """Kind of mask"""

    mask: Literal["random", "block", "grid", "green", "blockwise"] = setting(
        "random",
        "Kind of mask: patches at random (random); squares of mask_block x mask_block patches at "
        "random (block); all but one patch of every 4, 9 or 16 (grid); band-pass filtered noise "
        "(green); or large rectangles, as in BEiT (blockwise).",
    )
    mask_block: Count = setting(
        2, "Side of the squares of mask block, in patches; it must divide the grid of patches."
    )


class MAEConfig(AutoencoderConfig, MaskConfig):
    """Masking"""

    mask_ratio: OpenShare = setting(0.75, "Share of the patches that is removed.")
    shared_mask: bool = setting(
        False, "Whether all images of an optimiser step have the same mask, not one each."
    )


class LossConfig(Settings):
    """Loss"""

    visible_weight: PositiveOrZero = setting(
        0.0,
        "Weight of the visible patches' error, which is added to that of the predicted ones; 0 "
        "does not predict them.",
    )


class CropConfig(AugmentConfig):
    """Augmentation"""

    crop: Literal["resized", "simple"] = setting(
        "resized",
        "Kind of crop: a part of random area and aspect, resized (resized), or the image resized "
        "to cover img_size, mirrored 4 pixels beyond each edge, and cut at a random place "
        "(simple), without crop_min.",
    )


class MatrixConfig(AdamWConfig):
    """Optimiser"""

    optimizer: Literal["adamw", "muon"] = setting(
        "adamw",
        "What updates the matrices of the blocks, at the same lr and weight_decay: AdamW, as all "
        "else, or Muon (momentum 0.95), for which a lr of AdamW is a good start.",
    )


class MonitorConfig(ShowConfig):
    """Monitoring"""

    monitor_epochs: CountOrZero = setting(
        10,
        "Epochs between two monitorings, beside one before the first step and one at the end; 0 is "
        "off.",
        may_change=True,
    )
    monitor_images: CountOrZero = setting(
        6,
        "Number of validation images, or of training images if there are none, whose "
        "reconstruction and attention are drawn; 0 is off.",
        may_change=True,
    )
    monitor_knn: CountOrZero = setting(
        2000,
        "Number of labelled training images of the monitor's k-NN, which classifies a quarter as "
        "many validation images. Fewer than 20 per class leave classes out; 0 is off.",
        may_change=True,
    )
    monitor_probe: bool = setting(
        False,
        "Whether a linear layer, fitted to the features of the k-NN's images, classifies as well.",
        may_change=True,
    )
    monitor_gauges: CountOrZero = setting(
        500,
        "Number of validation images, or of training images if there are none, on which the "
        "monitor measures the loss, the effective rank of the features and their dead dimensions, "
        "without labels; 0 is off, others are at least 2.",
        may_change=True,
    )


class RepeatsConfig(Settings):
    """Repeated augmentation"""

    aug_repeats: Count = setting(
        1,
        "Number of samples (crop, flip and mask) of each decoded image, all in one batch, to "
        "decode less (arXiv 1901.09335); an epoch has as many steps and decodes 1/aug_repeats of "
        "the images.",
    )


class InitConfig(Settings):
    """Initial weights"""

    init: PathText | None = setting(
        None,
        "Weights to start from, of any kind that models/README.md lists, with or without a "
        "decoder, whose mean and std count unless they are stated; null starts from random "
        "weights, and a run that goes on from its own.",
        may_change=True,
    )


class PretrainConfig(
    MatrixConfig,
    MAEConfig,
    LossConfig,
    InitConfig,
    CropConfig,
    DataConfig,
    MonitorConfig,
    RepeatsConfig,
    CheckpointingConfig,
    CompileConfig,
    ParallelConfig,
    TrainRunConfig,
):
    """All settings of `main_pretrain.py`."""

    def problems(self) -> list[str]:
        # Those of the weights, which are read later, count where none are stated.
        follow = {"mean", "std"} - self.model_fields_set if self.init else set()
        of_pixels = self.channel_rows(self.in_chans)
        return super().problems() + where(
            *self.show_rows(self.in_chans),
            *(row for row in of_pixels if row[1].split()[0] not in follow),
            (
                self.batch_size % self.aug_repeats,
                f"batch_size {self.batch_size} is not a multiple of aug_repeats "
                f"{self.aug_repeats}: all samples of an image are in one batch of one process",
            ),
            (
                self.optimizer == "muon" and self.parallel == "fsdp",
                "optimizer muon needs complete matrices and parallel fsdp shares them among the "
                "processes: use parallel ddp, or optimizer adamw",
            ),
            (
                self.crop == "simple" and min(pair(self.img_size)) <= SIMPLE_PADDING,
                f"crop simple mirrors {SIMPLE_PADDING} pixels, and img_size {self.img_size} has no "
                "more",
            ),
            (
                self.monitor_gauges == 1,
                "monitor_gauges must be 0 or at least 2: one image's features differ from none",
            ),
            (
                self.monitor_probe and not self.monitor_knn,
                "monitor_probe fits a layer to the features of monitor_knn's images, and "
                "monitor_knn is 0",
            ),
        )
