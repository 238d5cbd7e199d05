"""Features of frozen models: computed once per image, saved, and loaded again."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader

from data.loader import BadSample
from data.transforms import PixelNormalizer
from engine.evaluation.evaluate import raise_bad, until_bad
from engine.run.batches import Batches
from models.vit import VisionTransformer
from util.dist import all_gather
from util.errors import InputError
from util.files import write_whole

FEATURES_FILE = "features.safetensors"


class Features(NamedTuple):
    """Features `(n, D)` float32 and labels `(n,)` int64 of both splits; `facts` say of what, in
    plain values.

    In use, `train` is one process's share of the rows (see `gather_rows`); in a file it is all of
    them.
    """

    train: Tensor
    train_labels: Tensor
    val: Tensor
    val_labels: Tensor
    facts: dict[str, Any]


@torch.no_grad()
def compute_features(
    backbone: VisionTransformer,
    batches: Batches | DataLoader[Any],
    normalize: PixelNormalizer,
    dtype: torch.dtype | None,
) -> Tensor:
    """The pooled, normalised features of this process's share of the images, `(share, D)` float32,
    on the CPU.

    Args:
        batches: of `eval_batches`, the first of which is the largest.

    Raises: InputError on all processes where a file cannot be decoded or a feature is not finite.
    """
    device = normalize.device
    features = torch.empty(0, backbone.spec.embed_dim)
    count, all_finite = 0, True
    bad: list[BadSample] = []
    for batch in until_bad(batches, bad):
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            found = backbone.forward_features(normalize(batch.images)).float().cpu()  # (B, D)
        if not count:  # room for all of them: joining them at the end would need it twice
            features = torch.empty(len(batches) * len(found), found.shape[1])
        features[count : count + len(found)] = found
        count += len(found)
        all_finite &= bool(found.isfinite().all())
    raise_bad(bad)
    if not all(all_gather(all_finite)):
        raise InputError(
            "the features are not finite: the weights are broken, or precision fp32 is needed"
        )
    return features[:count]


def save_features(folder: Path, features: Features) -> Path:
    """Writes `features.safetensors` into `folder`. Raises: InputError where that is not
    possible."""
    path = folder / FEATURES_FILE
    tensors = {
        name: value.contiguous() for name, value in features._asdict().items() if name != "facts"
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"facts": json.dumps(features.facts)}
        write_whole(path, lambda target: safetensors.torch.save_file(tensors, target, facts))
    except (OSError, SafetensorError) as error:
        raise InputError(f"save_path {folder} cannot be written: {error}") from error
    return path


def load_features(path: Path) -> Features:
    """What `save_features` wrote; `path` is the folder or the file. Raises: InputError for anything
    else.

    The tensors are views of the file (safetensors maps it): only what is read comes into memory,
    and once for all processes of a machine.
    """
    if path.is_dir():
        path = path / FEATURES_FILE
    if not path.is_file():
        raise InputError(f"load_path {path} does not exist")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        if (
            not isinstance(facts, dict)
            or not {"checkpoint", "sha256", "readout", "class_names"} <= facts.keys()
        ):
            raise KeyError("facts")
        return Features(**tensors, facts=facts)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(
            f"load_path {path} is no complete features file of main_knn.py: {error}"
        ) from error
