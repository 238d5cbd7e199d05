"""Builds models from configs: the size table, and one name for a setting from YAML to constructor.

`size: small` fills the four keys of VIT_SIZES that the config leaves null; every constructor
keyword that a config carries under the same name is passed on, so nothing is renamed on the way.
"""

import inspect
from typing import Any

from models.mae import MaskedAutoencoder
from models.spec import mae_problems, vit_problems
from models.vit import VisionTransformer, readout_problems

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


def model_kwargs(model: type | Any, cfg: Any, **overrides: Any) -> dict[str, Any]:
    """The keywords that `model` (a constructor or function) takes and `cfg` carries, with `size`
    filled in.

    `overrides` are values that a config leaves open (null) and data or weights decide; they come
    before `cfg`'s.
    """
    row = VIT_SIZES[cfg.size]
    names = inspect.signature(model).parameters
    values = {name: getattr(cfg, name) for name in names if hasattr(cfg, name)} | overrides
    return {
        name: row[name] if value is None and name in row else value
        for name, value in values.items()
    }


def build_mae(cfg: Any, **overrides: Any) -> MaskedAutoencoder:
    """The autoencoder of a `PretrainConfig`. Raises: InputError for a geometry that cannot be."""
    return MaskedAutoencoder(**model_kwargs(MaskedAutoencoder, cfg, **overrides))


def build_classifier(cfg: Any, **overrides: Any) -> VisionTransformer:
    """The classifier of a config that carries `VisionTransformer`'s keywords. Raises:
    InputError."""
    return VisionTransformer(**model_kwargs(VisionTransformer, cfg, **overrides))


def mae_config_problems(cfg: Any, **overrides: Any) -> list[str]:
    """What is wrong with the geometry in a `PretrainConfig`, one line each, without building it."""
    return mae_problems(**model_kwargs(mae_problems, cfg, **overrides))


def classifier_config_problems(cfg: Any) -> list[str]:
    """What is wrong with the geometry and the readout in a classifier's config, one line each."""
    return vit_problems(**model_kwargs(vit_problems, cfg)) + readout_problems(
        cfg.global_pool, cfg.class_token
    )
