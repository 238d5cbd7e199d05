"""What pretraining starts from if its settings name weights: the model, and how its pixels are
normalised."""

import logging
from pathlib import Path

import torch
import yaml

from engine.run.checkpoint import checkpoint_seen, checkpoint_steps
from models.build import build_model, mae_spec
from models.mae import MaskedAutoencoder
from models.weights.adapt import load_for_pretraining
from models.weights.info import WeightsInfo
from models.weights.read import read_weights
from util.errors import InputError, where
from util.settings.base import PixelConfig
from util.settings.pretrain import PretrainConfig

logger = logging.getLogger(__name__)


def build_pretrained(
    cfg: PretrainConfig, folder: Path
) -> tuple[dict[str, object], MaskedAutoencoder | None, str | None]:
    """What pretraining starts from: changes of its settings, as `mean` and `std` follow the weights
    unless they were stated, the autoencoder of `init`, and the sha256 of those weights.

    A run that goes on in `folder` ignores `init`: its settings take over `init`, `mean` and `std`
    from its config.yaml, and there is no model.

    Raises: InputError if the weights do not fit the settings.
    """
    path = folder / "config.yaml"
    # not of a checksum alone, as a first save that was interrupted leaves it
    if any(checkpoint_seen(folder, step) for step in checkpoint_steps(folder)):
        recorded = yaml.safe_load(path.read_text()) if path.exists() else {}
        if cfg.init is not None:
            logger.info("init is ignored: this run goes on from its checkpoint")
        if recorded.get("init") is None:
            return {"init": None}, None, None
        pixels = {n: tuple(recorded[n]) for n in ("mean", "std") if n not in cfg.model_fields_set}
        return {"init": recorded["init"], **pixels}, None, None
    if cfg.init is None:
        return {}, None, None
    tensors, info = read_weights(cfg.init)
    torch.manual_seed(cfg.seed)  # of what the file has not
    model = build_model(mae_spec(cfg))
    load_for_pretraining(model, tensors, info, cfg.init)
    follow: dict[str, object] = {}
    for name, theirs in (("mean", info.mean), ("std", info.std)):
        if name not in cfg.model_fields_set and theirs and len(theirs) == cfg.in_chans:
            follow[name] = theirs
            logger.info("%s follows the weights: %s", name, theirs)
    cfg = cfg.model_copy(update=follow)
    compare_pixels(cfg, info)
    if problems := where(*cfg.channel_rows(cfg.in_chans)):
        raise InputError(f"{'; '.join(problems)}, and {cfg.init} has no others")
    return follow, model, info.sha256


def compare_pixels(cfg: PixelConfig, info: WeightsInfo) -> None:
    """Warns of weights that were trained on pixels that were made in another way."""
    for name, theirs in {"mean": info.mean, "std": info.std, **info.pixels}.items():
        if theirs not in (None, ours := getattr(cfg, name)):
            said = [f"({', '.join(map(str, of))})" for of in (theirs, ours)]
            logger.warning(
                "the weights were trained with %s %s and the settings say %s", name, *said
            )
