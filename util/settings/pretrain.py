"""Every knob of pretraining (see `util/settings/base.py`)."""

from dataclasses import dataclass

from util.settings.base import (
    AdamWConfig,
    AugmentConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    TrainRunConfig,
    data_problems,
    knob,
    schedule_problems,
)


@dataclass(frozen=True)
class AutoencoderConfig(ModelConfig):
    """Autoencoder"""

    class_token: bool = knob(True, "a class token goes through the encoder")
    decoder_embed_dim: int = knob(512, "width of the decoder", min=4)
    decoder_depth: int = knob(8, "decoder blocks", min=1)
    decoder_num_heads: int = knob(16, "decoder attention heads", min=1)
    decoder_class_token: bool = knob(
        True, "the class token goes on through the decoder; needs class_token"
    )
    decoder: str = knob(
        "self",
        "the paper's, or the cheaper one whose queries attend to the encoder's output only",
        choices=("self", "cross"),
    )
    pred_ratio: float | None = knob(
        None,
        "decoder cross: share of all patches that is predicted, drawn among the removed; null is all of those",
        unit="in [0, 1]",
        above=0,
        max=1,
    )
    norm_pix_loss: bool = knob(
        True, "the target is each patch's pixels, normalised by their own mean and variance"
    )


@dataclass(frozen=True)
class MAEConfig(AutoencoderConfig):
    """Masking"""

    mask_ratio: float = knob(
        0.75, "share of the patches that is removed", unit="in [0, 1]", above=0, below=1
    )
    shared_mask: bool = knob(
        False, "one mask per optimiser step for all images, instead of one per image"
    )


@dataclass(frozen=True)
class MonitorConfig:
    """Monitoring"""

    monitor_epochs: int = knob(
        10,
        "between two looks; one comes before the first step and one at the end; 0 is off",
        unit="epochs",
        min=0,
        may_change=True,
    )
    monitor_images: int = knob(
        6,
        "fixed validation images (training images where there are none) whose reconstruction and attention are "
        "drawn; 0 is off",
        unit="images",
        min=0,
        may_change=True,
    )
    monitor_knn: int = knob(
        2000,
        "k-NN among a fixed choice of so many labelled training images, for a quarter as many validation images, "
        "of one class for every 20 images at most; 0 is off",
        unit="images",
        min=0,
        may_change=True,
    )
    monitor_probe: bool = knob(
        False,
        "also classify with a linear layer fitted to the features of the k-NN's images",
        may_change=True,
    )


@dataclass(frozen=True)
class SpeedConfig:
    """Speed and memory"""

    compile: bool = knob(
        False, "compile the model with torch.compile, for speed on GPUs", may_change=True
    )
    compile_backend: str = knob(
        "inductor",
        "of compile; aot_eager and eager are for finding faults",
        choices=("inductor", "aot_eager", "eager"),
        may_change=True,
    )
    checkpointing: bool = knob(
        False,
        "compute activations again for the gradient instead of keeping them: less memory, a third more work",
        may_change=True,
    )
    aug_repeats: int = knob(
        1,
        "samples (crop, flip, mask) of each decoded image, all in one batch, to decode less (arXiv 1901.09335); "
        "epochs count samples: as many steps, and each decodes 1/aug_repeats of the images",
        unit="samples per image",
        min=1,
    )


@dataclass(frozen=True)
class PretrainConfig(
    AdamWConfig,
    MAEConfig,
    AugmentConfig,
    DataConfig,
    MonitorConfig,
    SpeedConfig,
    ParallelConfig,
    TrainRunConfig,
):
    """Everything `main_pretrain.py` takes."""

    def problems(self) -> list[str]:
        """Values that are legal alone and wrong together, one line each."""
        found = data_problems(self, self.in_chans) + schedule_problems(self)
        if self.batch_size % self.aug_repeats:
            found.append(
                f"batch_size {self.batch_size} is not a multiple of aug_repeats {self.aug_repeats}: all samples of an "
                "image are in one batch of one process"
            )
        if self.monitor_probe and not self.monitor_knn:
            found.append(
                "monitor_probe fits a layer to the features of monitor_knn's images, and monitor_knn is 0"
            )
        return found
