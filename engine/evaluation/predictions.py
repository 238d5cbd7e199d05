"""What a classifier says of each validation image: the most probable classes, in a file of the
run's folder from which `tools/plot_run.py` draws.

Shapes: `n` images, `K` of the most probable classes.
"""

import json
import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.images import pixel_format
from data.labels import LabelledSource
from data.tables import build_data
from engine.evaluation.features import Predictions
from util.errors import InputError
from util.files import write_output
from util.settings.base import DatasetConfig, PixelConfig
from util.settings.evaluation import (
    FinetuneConfig,
    KnnConfig,
    LabelledDataConfig,
    LinclsConfig,
    TableConfig,
)

SOURCE_SETTINGS = (  # what opens the images again
    *DatasetConfig.model_fields,
    *PixelConfig.model_fields,
    *TableConfig.model_fields,
)


class PredictionsFile(NamedTuple):
    """The content of a file: the arrays of `Predictions`, whole numbers as int32.

    names: of the images, relative to `data_path` where they are files there; none if the images
        were not at hand, as with saved features.
    settings: those of the images by name; {} likewise.
    """

    labels: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray
    of_truth: np.ndarray
    names: list[str]
    class_names: list[str]
    settings: dict[str, object]


def save_predictions(
    path: Path,
    predictions: Predictions,
    class_names: list[str],
    cfg: FinetuneConfig | LinclsConfig | KnnConfig,
    source: LabelledSource | None,
) -> None:
    """Writes the file; the same predictions give the same bytes. `source` has the images in their
    order, None if they are not at hand. Raises: LocalInputError where it cannot be written."""
    names, settings = [], {}
    if source is not None:
        names = [short_name(source.name(i), cfg.data_path) for i in range(len(source))]
        values = cfg.model_dump(mode="json")
        settings = {name: values[name] for name in (*SOURCE_SETTINGS, "in_chans", "seed")}
    arrays = {
        "labels": predictions.labels.numpy().astype(np.int32),
        "classes": predictions.classes.numpy().astype(np.int32),
        "probabilities": predictions.probabilities.numpy(),
        "of_truth": predictions.of_truth.numpy(),
        "names": np.array([os.fsencode(name) for name in names], dtype=bytes),
        "class_names": as_bytes(class_names),
        "settings": as_bytes(settings),
    }
    content = BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    write_output(path, lambda target: target.write_bytes(content.getvalue()))


def as_bytes(value: object) -> np.ndarray:
    """JSON as an array of bytes."""
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def load_predictions(path: Path) -> PredictionsFile:
    """What `save_predictions` wrote. Raises: InputError if the file is damaged, or another one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in PredictionsFile._fields}
        texts = {name: json.loads(arrays[name].tobytes()) for name in ("class_names", "settings")}
        names = [os.fsdecode(name) for name in arrays["names"].tolist()]
        return PredictionsFile(**arrays | texts | {"names": names})
    except Exception as error:  # noqa: BLE001 (damaged bytes raise errors of any class)
        raise InputError(f"{path} holds no complete predictions of a run: {error}") from error


def short_name(name: str, data_path: str | None) -> str:
    """An image's name, relative to `data_path` if it is a file there."""
    return name.removeprefix(f"{os.path.normpath(data_path)}/") if data_path else name


def open_predicted_images(settings: Mapping[str, object], names: list[str]) -> LabelledSource:
    """The validation images that were evaluated, from a file's `settings` and `names`.

    Raises: InputError if they are not there any more, or others are.
    """
    if not settings:
        raise InputError("saved features were evaluated, without the images at hand")
    common = {name: settings[name] for name in settings.keys() - {"in_chans", "seed"}}
    cfg = LabelledDataConfig(**common)  # type: ignore[arg-type]
    pixels = pixel_format(cfg, int(str(settings["in_chans"])))
    source = build_data(cfg, pixels, int(str(settings["seed"])), False, None).val
    found = [short_name(source.name(index), cfg.data_path) for index in range(len(source))]
    if found != names:
        raise InputError(f"data_path {cfg.data_path} holds other validation images by now")
    return source
