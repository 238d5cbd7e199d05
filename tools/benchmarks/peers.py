"""The models that users would train otherwise, each of a given specification: transformers' ViTMAE,
and the public code of the paper's authors from a checkout that the user names."""

import importlib
import sys
from functools import partial
from pathlib import Path

from torch import nn

import util
from models.spec import MAESpec
from util.errors import InputError


def build_transformers(spec: MAESpec, attention: str) -> nn.Module:
    """`transformers.ViTMAEForPreTraining` with a kind of attention, sdpa or eager.

    Raises: ImportError if transformers is not installed.
    """
    from transformers import AutoModelForPreTraining, ViTMAEConfig

    config = ViTMAEConfig(
        hidden_size=spec.embed_dim,
        num_hidden_layers=spec.depth,
        num_attention_heads=spec.num_heads,
        intermediate_size=4 * spec.embed_dim,
        image_size=spec.img_size,
        patch_size=spec.patch_size,
        decoder_hidden_size=spec.decoder_embed_dim,
        decoder_num_hidden_layers=spec.decoder_depth,
        decoder_num_attention_heads=spec.decoder_num_heads,
        decoder_intermediate_size=4 * spec.decoder_embed_dim,
        mask_ratio=spec.mask_ratio,
        norm_pix_loss=spec.norm_pix_loss,
    )
    model: nn.Module = AutoModelForPreTraining.from_config(config, attn_implementation=attention)
    return model


def build_public(spec: MAESpec, folder: Path) -> nn.Module:
    """`MaskedAutoencoderViT` of `models_mae.py` in a checkout, which is imported.

    Raises: InputError if there is no such file, or if it does not go with the installed packages.
    """
    if not (folder / "models_mae.py").is_file():
        raise InputError(
            f"public_mae {folder} is no checkout of the public MAE code: it has no models_mae.py"
        )
    sys.path.append(str(folder))
    util.__path__.append(str(folder / "util"))  # theirs has the name of ours, and other modules
    try:
        model: nn.Module = importlib.import_module("models_mae").MaskedAutoencoderViT(
            img_size=spec.img_size,
            patch_size=spec.patch_size,
            in_chans=spec.in_chans,
            embed_dim=spec.embed_dim,
            depth=spec.depth,
            num_heads=spec.num_heads,
            decoder_embed_dim=spec.decoder_embed_dim,
            decoder_depth=spec.decoder_depth,
            decoder_num_heads=spec.decoder_num_heads,
            mlp_ratio=spec.mlp_ratio,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            norm_pix_loss=spec.norm_pix_loss,
        )
    except Exception as error:  # whatever somebody else's file raises
        raise InputError(
            f"public_mae {folder} does not go with the installed packages: models_mae.py, which "
            f"was written for an older timm, ends in {type(error).__name__}: {error}"
        ) from error
    return model
