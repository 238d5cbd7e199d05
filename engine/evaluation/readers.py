"""What is read off a model for an image: the features that tools/embed.py writes, and the outputs
that tools/predict.py does.

Shapes: `B` batch, `C` channels, `H` and `W` height and width, `N` patches, `T` tokens, `D` width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.evaluation.apply import Answers
from models.spec import block_numbers
from models.vit import VisionTransformer
from models.weights.info import WeightsInfo
from util.errors import InputError
from util.files import printable
from util.settings.tools import EmbedConfig, EncodeConfig


class Head(NamedTuple):
    """What a classifier's outputs mean.

    objective: multiclass, multilabel, or regression, whose outputs are in the data's unit.
    names: of the outputs.
    """

    objective: str
    names: list[str]


def feature_reader(
    cfg: EmbedConfig, model: VisionTransformer, info: WeightsInfo
) -> tuple[Callable[[Tensor], Answers], int]:
    """What reads the features that the settings ask for off the model, and the bytes of those of
    an image. An array is called avg, token or patch, and after its layer if there are several.

    Raises: InputError for a layer or class token that the model does not have.
    """
    spec, layers = model.spec, block_numbers(cfg.layer, len(model.blocks))
    pool = "patch" if cfg.output == "patch" else cfg.pool
    kinds = ["avg", "token"] if pool == "both" else [pool]
    if "token" in kinds and (not spec.class_tokens or (spec.fc_norm and cfg.last_norm)):
        lack = "norm for it" if spec.class_tokens else "class token"
        raise InputError(f"pool {cfg.pool}: {cfg.finetune} has no {lack}, use --pool avg")
    if cfg.last_norm and not spec.last_norm:
        raise InputError(f"last_norm: {cfg.finetune} has no last norm, use --last_norm false")

    def embed(images: Tensor) -> Answers:
        """Arrays `(B, D)`, or `(B, N, D)` of patches, of normalised images `(B, C, H, W)`."""
        found = {}
        for number, tokens in zip(
            range(layers[-1] + 1), model.iterate_tokens(images), strict=False
        ):
            if number not in layers:
                continue
            if cfg.last_norm:
                tokens = model.norm(tokens)  # (B, T, D)
            patches = tokens[:, spec.class_tokens :]  # (B, N, D)
            mean = patches.mean(dim=1)  # (B, D)
            if cfg.last_norm:
                mean = model.fc_norm(mean)
            token = tokens[:, : spec.class_tokens].mean(dim=1)  # (B, D)
            features = {"patch": patches, "token": token, "avg": mean}
            for kind in kinds:
                name = f"{kind}_layer{number}" if len(layers) > 1 else kind
                feature = features[kind]
                found[name] = F.normalize(feature.float(), dim=-1) if cfg.normalize else feature
        return found

    rows = spec.num_patches if cfg.output == "patch" else 1
    return embed, 4 * spec.embed_dim * rows * len(kinds) * len(layers)


def output_reader(
    cfg: EncodeConfig, model: VisionTransformer, info: WeightsInfo
) -> tuple[Callable[[Tensor], Answers], int]:
    """What makes logits of normalised images, and the bytes of those of an image."""
    objective = head_of(info).objective  # before any compute

    def classify(images: Tensor) -> Answers:
        if objective != "regression":
            return {"logits": model(images)}
        features = model.forward_features(images).float()  # (B, D)
        # half precision would round numbers far from 0, as years are
        with torch.autocast(images.device.type, enabled=False):
            return {"logits": model.head(features)}

    return classify, 4 * model.spec.num_classes


def head_of(info: WeightsInfo) -> Head:
    """What the weights record of their outputs: this project's files do, others have classes that
    are called by their numbers.

    Raises: InputError if that does not fit the number of outputs.
    """
    num_outputs = info.known("num_classes")
    names = info.class_names or map(str, range(num_outputs))
    head = Head(info.objective or "multiclass", [printable(name) for name in names])
    if len(head.names) != num_outputs:
        raise InputError(f"finetune has {num_outputs} outputs, and its header says {head}")
    return head
