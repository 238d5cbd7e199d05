"""Features of frozen models: computed once per image, saved, and loaded again."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from data.labels import LabelledSource
from data.transforms import PixelNormalizer
from engine.evaluation.batches import complete_batches
from engine.run.batches import eval_batches
from engine.run.folder import Run, check_writable
from models.vit import VisionTransformer
from util.dist import all_gather, autocast_dtype, broadcast
from util.errors import InputError
from util.files import write_whole
from util.settings.evaluation import KnnConfig
from util.settings.pretrain import PretrainConfig

FEATURES_FILE = "features.safetensors"


@dataclass(frozen=True)
class Origin:
    """What features were computed from: the weights, the data set and how the model was read.

    sha256: of the weights' file, None for an untrained model.
    """

    checkpoint: str
    sha256: str | None
    dataset: str
    readout: str
    img_size: int | tuple[int, int]
    class_names: list[str]


class Features(NamedTuple):
    """Features `(n, D)` float32 and labels `(n,)` int64 of both splits.

    In a search `train` is one process's share of the rows (see `gather_rows`); in a file it is all
    of them.
    """

    train: Tensor
    train_labels: Tensor
    val: Tensor
    val_labels: Tensor


@torch.no_grad()
def compute_features(
    cfg: KnnConfig | PretrainConfig,
    run: Run,
    backbone: VisionTransformer,
    source: LabelledSource,
    crop_pct: float | None,
) -> Tensor:
    """The pooled, normalised features `(share, D)` float32 of this process's share of `source`, on
    the CPU: of the images rank, rank + world_size, ...

    Args:
        crop_pct: as `EvalTransform` takes it.

    Raises: InputError on all processes if a file cannot be decoded or a feature is not finite.
    """
    normalize = PixelNormalizer(cfg.mean, cfg.std, run.device)
    dtype = autocast_dtype(cfg.precision, run.device)
    share = range(run.processes.rank, len(source), run.processes.world_size)
    features = torch.empty(len(share), backbone.spec.embed_dim)
    parts = features.split(cfg.batch_size)
    batches = complete_batches(eval_batches(cfg, run, source, crop_pct))
    for batch, part in zip(batches, parts, strict=False):  # an empty share has one empty part
        with torch.autocast(run.device.type, dtype=dtype, enabled=dtype is not None):
            part.copy_(backbone.forward_features(normalize(batch.images)))  # (B, D)
    if not all(all_gather(all(bool(part.isfinite().all()) for part in parts))):
        raise InputError(
            "the features are not finite: the weights are broken, or precision fp32 is needed"
        )
    return features


def check_folders(
    run: Run, cfg: KnnConfig, digests: Iterable[Callable[[], str | None]], folders: list[Path]
) -> None:
    """Makes the folder for the features of each checkpoint, before any compute.

    Features of the same weights, read alike, are computed anew: the same command goes on.

    Args:
        digests: for each folder, what gives the sha256 of its checkpoint.

    Raises: InputError on all processes if one cannot be written or holds other features.
    """
    problem = ""
    try:
        pairs = zip(digests, folders, strict=True) if run.processes.is_main else ()
        for digest, folder in pairs:
            if (folder / FEATURES_FILE).exists() and not _is_repeated(folder, cfg, digest):
                raise InputError(
                    f"save_path: {folder / FEATURES_FILE} holds something else: remove it, or "
                    f"name another folder"
                )
            check_writable("save_path", folder)
    except InputError as error:
        problem = str(error)
    if problem := broadcast(problem):
        raise InputError(problem)


def _is_repeated(folder: Path, cfg: KnnConfig, digest: Callable[[], str | None]) -> bool:
    """Whether a folder holds features of these weights, computed with the same settings."""
    try:
        origin = load_features(folder)[1]
    except InputError:
        return False
    found = (origin.sha256, origin.dataset, origin.readout)
    return found == (digest(), cfg.dataset, cfg.global_pool)


def save_features(folder: Path, features: Features, origin: Origin) -> Path:
    """Writes `features.safetensors` into `folder`. Raises: InputError where that fails."""
    path = folder / FEATURES_FILE
    tensors = {name: tensor.contiguous() for name, tensor in features._asdict().items()}
    metadata = {"facts": json.dumps(dataclasses.asdict(origin))}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda target: safetensors.torch.save_file(tensors, target, metadata))
    except (OSError, SafetensorError) as error:
        raise InputError(f"save_path {folder} cannot be written: {error}") from error
    return path


def load_features(path: Path) -> tuple[Features, Origin]:
    """What `save_features` wrote; `path` is the folder or the file.

    The tensors are views of the file (safetensors maps it): only what is read comes into memory,
    and once for all processes of a machine.

    Raises: InputError if there is no such file, or another one.
    """
    if path.is_dir():
        path = path / FEATURES_FILE
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            origin = Origin(**json.loads((file.metadata() or {})["facts"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Features(**tensors), origin
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(
            f"load_path {path} is no complete features file of main_knn.py: {error}"
        ) from error
