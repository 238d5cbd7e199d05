"""Features of frozen models in a file: saved with their origin, and loaded again."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
from safetensors import SafetensorError

from engine.evaluation.features import Features
from engine.run.folder import check_writable
from util.errors import InputError
from util.files import write_whole
from util.settings.evaluation import KnnConfig

FEATURES_FILE = "features.safetensors"


class Origin(NamedTuple):
    """What features were computed from: the weights, the data set and how the model was read.

    sha256: of the weights' file, None for an untrained model.
    layer: the block after which they were read, counted from 0; -1 is the last, in files of earlier
        versions.
    last_norm: whether they passed the weights' last norm.
    """

    checkpoint: str
    sha256: str | None
    dataset: str
    readout: str
    img_size: int | tuple[int, int]
    class_names: list[str]
    layer: int = -1
    last_norm: bool = True


def check_folders(
    cfg: KnnConfig, targets: Iterable[tuple[Callable[[], str | None], int, Path]]
) -> None:
    """Makes the folders for features, before any compute.

    Features of the same weights, read alike, are computed anew: the same command goes on.

    Args:
        targets: for each folder what gives the sha256 of its checkpoint, its layer counted from 0,
            and the folder.

    Raises: InputError if one cannot be written or holds other features.
    """
    for digest, layer, folder in targets:
        check_writable("save_path", folder)
        if (folder / FEATURES_FILE).exists():
            origin = load_features(folder, "save_path")[1]
            found = (origin.sha256, origin.dataset, origin.readout, origin.last_norm)
            is_of_layer = origin.layer == layer or (origin.layer,) == cfg.layer
            readout = (cfg.global_pool, cfg.last_norm)
            if not is_of_layer or found != (digest(), cfg.dataset, *readout):
                raise InputError(
                    f"save_path: {folder / FEATURES_FILE} holds other features: remove it, or name "
                    f"another folder"
                )


def save_features(folder: Path, features: Features, origin: Origin) -> Path:
    """Writes `features.safetensors` into `folder`. Raises: InputError where that fails."""
    path = folder / FEATURES_FILE
    tensors = {name: tensor.contiguous() for name, tensor in features._asdict().items()}
    metadata = {"facts": json.dumps(origin._asdict())}
    try:
        write_whole(path, lambda target: safetensors.torch.save_file(tensors, target, metadata))
    except (OSError, SafetensorError) as error:
        raise InputError(f"save_path {folder} cannot be written: {error}") from error
    return path


def load_features(path: Path, setting: str = "load_path") -> tuple[Features, Origin]:
    """What `save_features` wrote; `path`, which `setting` names, is the folder or the file.

    The tensors are views of the file (safetensors maps it): only what is read comes into memory,
    and once for all processes of a machine.

    Raises: InputError if there is no such file, or another one.
    """
    if path.is_dir():
        if folders := sorted(path.glob(f"layer*/{FEATURES_FILE}")):
            raise InputError(
                f"{setting}: {path} has a folder of features for each layer: name one, as "
                f"{folders[0].parent}"
            )
        path = path / FEATURES_FILE
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            origin = Origin(**json.loads((file.metadata() or {})["facts"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Features(**tensors), origin
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(
            f"{setting}: {path} is no complete features file of main_knn.py: {error}"
        ) from error
