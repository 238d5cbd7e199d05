"""Models from settings: the table of sizes, and the specification that a stage's settings ask for.

`size: small` fills the four keys of VIT_SIZES that the settings leave null. Settings are checked
here before torch is imported, so only building imports it.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar, overload

from models.spec import (
    ClassifierSpec,
    DenseSpec,
    EncoderSpec,
    MAESpec,
    ModelSpec,
    block_numbers,
    encoder_spec,
    kind_problems,
)
from util.errors import where
from util.settings.base import ModelConfig
from util.settings.evaluation import ClassifierConfig, FinetuneConfig, KnnConfig, LinclsConfig
from util.settings.pretrain import AutoencoderConfig, MaskConfig

if TYPE_CHECKING:
    from models.dense import DenseTransformer
    from models.mae import MaskedAutoencoder
    from models.vit import VisionTransformer

# tiny and debug: DeiT (arXiv 2012.12877, table 1) and a size for tests. small: DeiT. base, large,
# huge: ViT (arXiv 2010.11929, table 1). giant: 1664 wide, 48 deep as in arXiv 2106.04560, table 2,
# but with MLP ratio 4.
VIT_SIZES: dict[str, dict[str, int]] = {
    "debug": {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16},
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3, "patch_size": 16},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6, "patch_size": 16},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12, "patch_size": 16},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "patch_size": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14},
    "giant": {"embed_dim": 1664, "depth": 48, "num_heads": 16, "patch_size": 14},
}
SpecT = TypeVar("SpecT", bound=EncoderSpec)


def mae_spec(cfg: AutoencoderConfig, **decided: object) -> MAESpec:
    """The autoencoder that settings ask for; `decided` are fields that come before theirs."""
    return _spec(MAESpec, cfg, decided)


def classifier_spec(cfg: ClassifierConfig, **decided: object) -> ClassifierSpec:
    """The classifier that settings ask for; `decided` are the fields that data and weights decide:
    `num_classes`, `class_tokens`, `fc_norm`, and the readout of a file with an attentive one."""
    spec = _spec(ClassifierSpec, cfg, {"probe_queries": None, **decided})
    if isinstance(cfg, LinclsConfig) and cfg.probe == "attentive":
        dim = int(spec.embed_dim * cfg.probe_value_ratio + 1e-6)
        queries = cfg.probe_queries
        spec = replace(spec, global_pool="attentive", probe_queries=queries, probe_dim=dim)
    return spec


def dense_spec(cfg: FinetuneConfig, **decided: object) -> DenseSpec:
    """The model for segmentation or detection that settings ask for; `decided` are the fields that
    data and weights decide: `num_classes`, `class_tokens`."""
    return _spec(DenseSpec, cfg, decided)


@overload
def build_model(spec: MAESpec) -> "MaskedAutoencoder": ...
@overload
def build_model(spec: ClassifierSpec) -> "VisionTransformer": ...
@overload
def build_model(spec: DenseSpec) -> "DenseTransformer": ...
def build_model(spec: ModelSpec) -> "MaskedAutoencoder | VisionTransformer | DenseTransformer":
    """The freshly initialised model of a specification.

    Raises: InputError for a model that cannot be.
    """
    if isinstance(spec, DenseSpec):
        from models.dense import DenseTransformer

        return DenseTransformer(**vars(spec))
    from models.mae import MaskedAutoencoder
    from models.vit import VisionTransformer

    if isinstance(spec, MAESpec):
        return MaskedAutoencoder(**vars(spec))
    return VisionTransformer(**vars(spec))


def encoder_of(model: "MaskedAutoencoder") -> "VisionTransformer":
    """The encoder of a model in training as a frozen model without a head; its feature is the mean
    of the normalised patch tokens.

    It shares the model's tensors: nothing is copied, and what training changes shows here.
    """
    import torch

    from models.mae import DECODER_NAMES

    with torch.device("meta"):
        encoder = build_model(encoder_spec(model.spec, "avg"))
    tensors = {n: t for n, t in model.state_dict().items() if not n.startswith(DECODER_NAMES)}
    encoder.load_state_dict(tensors, strict=True, assign=True)
    return encoder.eval().requires_grad_(False)


def layers_of(cfg: LinclsConfig | KnnConfig) -> list[int]:
    """The blocks, counted from 0, whose tokens a frozen evaluation reads, in their order."""
    named = cfg.layer if isinstance(cfg, KnnConfig) else (cfg.layer,)
    return block_numbers(named, VIT_SIZES[cfg.size]["depth"] if cfg.depth is None else cfg.depth)


def mae_config_problems(cfg: AutoencoderConfig, **decided: object) -> list[str]:
    """What is wrong with the autoencoder that settings ask for, one line each."""
    spec = mae_spec(cfg, **decided)
    of_kind = []
    if isinstance(cfg, MaskConfig):
        of_kind = kind_problems(cfg.mask, spec.grid_size, spec.mask_ratio, cfg.mask_block)
    return spec.problems() + of_kind


def classifier_config_problems(cfg: ClassifierConfig) -> list[str]:
    """What is wrong with the classifier that settings ask for, one line each."""
    # Data and weights decide the rest, and one class token where the settings are silent.
    decided = {
        "num_classes": 1,
        "class_tokens": 1 if cfg.class_tokens is None else cfg.class_tokens,
    }
    spec: EncoderSpec = classifier_spec(cfg, **decided)
    if isinstance(cfg, FinetuneConfig) and cfg.task != "classify":
        spec = dense_spec(cfg, **decided)
    freeze, rank = (
        (cfg.freeze_blocks, cfg.lora_rank or 0) if isinstance(cfg, FinetuneConfig) else (0, 0)
    )
    if isinstance(cfg, LinclsConfig | KnnConfig):
        layers_of(cfg)
    return spec.problems() + where(
        (
            freeze > spec.depth,
            f"freeze_blocks {freeze} is more than the encoder's depth {spec.depth}",
        ),
        (
            rank > spec.embed_dim,
            f"lora_rank {rank} is more than the encoder's width, embed_dim {spec.embed_dim}",
        ),
    )


def _spec(kind: type[SpecT], cfg: ModelConfig, decided: Mapping[str, object]) -> SpecT:
    stated = {f.name: getattr(cfg, f.name, None) for f in fields(kind)}
    given = {name: value for name, value in stated.items() if value is not None}
    values: dict[str, Any] = {**VIT_SIZES[cfg.size], **given, **decided}
    return kind(**values)
