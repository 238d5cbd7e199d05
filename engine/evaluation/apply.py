"""A model of any weights on any images, without labels: in parts that survive an interruption.

The images are cut into parts of at most 64 batches, which the processes share. A part is a file
beside the result, and names the weights, the images and the settings that it belongs to; the same
command goes on with those that are missing, also on another number of processes. In the end the
main process writes the result from them, one after the other. Batches are the same whatever the
number of processes, so the result is as well.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from data.images import BadImageError, pixel_format
from data.loader import loader_maker
from data.sources import ImageSource, check_format
from data.transforms import EvalTransform
from data.unlabelled import ReadableDataset, open_images
from engine.evaluation.features import on_pixels
from engine.parallel import spread_model
from engine.run.batches import Batches
from engine.run.folder import check_writable
from models.dense import DenseTransformer
from models.spec import DenseSpec
from models.vit import VisionTransformer
from models.weights.info import WeightsInfo, complete
from models.weights.load import load_classifier, load_dense
from models.weights.read import read_weights
from util.dist import Processes, all_gather, from_main, init_processes
from util.errors import InputError, LocalInputError, where
from util.files import printable, write_output
from util.settings.base import DataConfig
from util.settings.read import lasting_settings
from util.settings.tools import ApplyConfig, EncodeConfig, PredictConfig

PART_BATCHES, PART_BYTES = 64, 2**28  # a part has at most so many
TIMEOUT = 30.0  # minutes between two batches
KEPT = "kept"  # the tensor of a part that holds the numbers of its images
Answers = dict[str, Tensor]
CfgT = TypeVar("CfgT", bound=ApplyConfig)
EncodeT = TypeVar("EncodeT", bound=EncodeConfig)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """All parts of a result, on the main process.

    info: of the weights. source: the images. identity: the JSON that each part carries. paths: of
        the parts in order.
    """

    info: WeightsInfo
    source: ImageSource
    identity: str
    paths: list[Path]

    @cached_property
    def kept(self) -> np.ndarray:
        """The numbers `(n,)` of the images that could be read, to which the arrays' rows belong."""
        return np.concatenate([*self.chunks(KEPT)])

    def names(self) -> list[str]:
        """What the rows' images are called, with characters that a text cannot hold escaped."""
        return [printable(self.source.name(index)) for index in self.kept.tolist()]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each whole array by its name."""
        with safetensors.safe_open(self.paths[0], framework="np") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
        return {n: (len(self.kept), *shape[1:]) for n, shape in shapes.items() if n != KEPT}

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """An array's rows, part after part."""
        for path in self.paths:
            with safetensors.safe_open(path, framework="np") as file:
                yield file.get_tensor(name)


@torch.no_grad()
def apply_model(
    cfg: CfgT,
    uses_head: bool,
    prepare: Callable[
        [CfgT, VisionTransformer, WeightsInfo], tuple[Callable[[Tensor], Answers], int]
    ],
    write: Callable[[Parts, Path], object],
) -> dict[str, object]:
    """Writes `output_file`; returns the number of images in it, name and reason of each that is
    `unreadable`, and the tool's `exit_code`.

    Args:
        uses_head: whether the weights must be a classifier's.
        prepare: returns what makes arrays `(B, ...)` of normalised images `(B, C, H, W)`, and the
            bytes that it makes of an image.
        write: writes a file from all parts.

    Raises: InputError for weights or images that are not there or do not fit, answers that are not
    finite, or a result that cannot be written.
    """
    assert cfg.output_file is not None, "the config checks that there is one"
    output = Path(cfg.output_file)
    folder = output.with_name(f"{output.name}.parts")
    with init_processes(cfg.device, TIMEOUT) as processes:
        level = logging.INFO if processes.is_main else logging.WARNING
        logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
        if from_main(output.exists):
            raise InputError(
                f"output_file {output} is there already: remove it, or give another name"
            )
        from_main(partial(check_writable, "output_file", output.parent))
        model, info = from_main(partial(load_model, cfg, uses_head))
        cfg = with_weights(cfg, info)
        in_chans = info.spec.in_chans
        source = check_format(open_images(cfg, pixel_format(cfg, in_chans)))
        model = spread_model(model, processes.device).eval()
        identity = identity_of(cfg, info, source)
        if isinstance(model, DenseTransformer):
            from engine.evaluation.apply_dense import predict_places  # the rest does not need it

            assert isinstance(cfg, PredictConfig), "features come from encoders"
            names = info.class_names or map(str, range(model.spec.num_classes))
            kept = predict_places(cfg, model, [*names], source, identity, TIMEOUT, processes)
            return summary(cfg, output, source, kept) if processes.is_main else {"exit_code": 0}
        answer, row_bytes = prepare(cfg, model, info)
        batches = min(PART_BATCHES, max(1, PART_BYTES // (row_bytes * cfg.batch_size)))
        size = batches * cfg.batch_size
        parts = [
            (folder / f"part-{start // size:06d}.safetensors", range(start, end))
            for start in range(0, len(source), size)
            for end in [min(start + size, len(source))]
        ]
        from_main(partial(check_writable, "output_file", folder))
        # those that are missing are shared anew, so that no process waits long for another
        missing = from_main(lambda: [part for part in parts if read_identity(part[0]) != identity])
        share = missing[processes.rank :: processes.world_size]
        compute_parts(cfg, share, source, in_chans, answer, identity, processes)
        all_gather(None)
        if not processes.is_main:
            return {"exit_code": 0}
        if any(read_identity(path) != identity for path, _ in parts):
            raise InputError(f"{folder} lacks parts: all processes must see the same folder")
        result = Parts(info, source, identity, [path for path, _ in parts])
        if len(result.kept):
            write_output(output, partial(write, result))
        for path in folder.glob("part-*.safetensors*"):
            path.unlink()
        with suppress(OSError):  # somebody else's files may be in it
            folder.rmdir()
    return summary(cfg, output, source, result.kept)


def summary(
    cfg: ApplyConfig, output: Path, source: ImageSource, kept: np.ndarray
) -> dict[str, object]:
    """What `apply_model` returns, if the result has the images `kept`, which it also prints.
    Raises: InputError if there are none."""
    unreadable = list_unreadable(source, kept)
    if not len(kept):
        raise InputError(f"none of the {len(source)} images could be read: nothing was written")
    logger.info("wrote %s: %d images", output, len(kept))
    return {
        "num_images": len(kept),
        "unreadable": unreadable,
        "exit_code": int(cfg.strict and bool(unreadable)),
    }


def load_model(
    cfg: EncodeConfig, uses_head: bool
) -> tuple[VisionTransformer | DenseTransformer, WeightsInfo]:
    """The model of a file of weights, as that describes it, for the images' size of the settings.

    Raises: InputError for weights that cannot be read, lack `num_heads`, or have no head although
    one is needed; for an images' size that cannot be.
    """
    assert cfg.finetune is not None, "the config checks that there are weights"
    tensors, info = read_weights(cfg.finetune)
    info = complete(info, num_heads=cfg.num_heads)
    if uses_head and info.kind.startswith("this project's checkpoint"):
        raise InputError(
            f"finetune {cfg.finetune} does not say what its outputs mean: name the "
            "model.safetensors or best.safetensors of its run"
        )
    if uses_head and isinstance(info.spec, DenseSpec):
        replace(info.spec, img_size=cfg.img_size or info.spec.img_size).checked()
        return load_dense(tensors, info, f"finetune {cfg.finetune}"), info
    model = load_classifier(
        tensors, info, f"finetune {cfg.finetune}", uses_head=uses_head, img_size=cfg.img_size
    )
    return model, info


def with_weights(cfg: EncodeT, info: WeightsInfo) -> EncodeT:
    """The settings, with what the weights record where nothing is stated. Raises: InputError if
    mean or std do not fit the weights' channels."""
    recorded = {"mean": info.mean, "std": info.std, "img_size": info.spec.img_size, **info.pixels}
    follow = {
        name: value
        for name, value in recorded.items()
        if value is not None and (name not in cfg.model_fields_set or getattr(cfg, name) is None)
    }
    for name in sorted(info.pixels.keys() & follow.keys()):
        if follow[name] != getattr(cfg, name):
            logger.info("%s follows the weights: %s", name, " ".join(map(str, info.pixels[name])))
    cfg = cfg.model_copy(update=follow)
    if info.mean is None and "mean" not in cfg.model_fields_set:
        logger.warning(
            "the weights do not say mean and std: %s and %s are taken", cfg.mean, cfg.std
        )
    if problems := where(*cfg.channel_rows(info.spec.in_chans)):
        raise InputError("; ".join(problems))
    return cfg


def identity_of(cfg: ApplyConfig, info: WeightsInfo, source: ImageSource) -> str:
    """The JSON that tells which result a part belongs to."""
    origin = {
        "weights": info.sha256,
        "images": source.fingerprint(),
        "num_images": len(source),
        **lasting_settings(cfg),
    }
    return json.dumps(origin, sort_keys=True)


def read_identity(path: Path) -> str | None:
    """The identity in a part, None if there is no complete one."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return (file.metadata() or {}).get("identity")
    except (OSError, SafetensorError):
        return None


def compute_parts(
    cfg: ApplyConfig,
    parts: list[tuple[Path, range]],
    source: ImageSource,
    in_chans: int,
    answer: Callable[[Tensor], Answers],
    identity: str,
    processes: Processes,
) -> None:
    """Writes this process's share of the parts.

    Raises: LocalInputError if an answer is not finite.
    """
    assert cfg.img_size is not None, "the weights have one"
    ends = {images.stop: path for path, images in parts}
    batches = [
        images[at : at + cfg.batch_size]
        for _, images in parts
        for at in range(0, len(images), cfg.batch_size)
    ]
    if not batches:
        return
    dataset = ReadableDataset(source, EvalTransform(cfg.img_size, cfg.crop_pct), in_chans)
    make_loader = loader_maker(DataConfig(num_workers=cfg.num_workers), processes)
    call = on_pixels(answer, cfg, cfg.precision, processes.device)
    rows: list[Answers] = []
    with tqdm(
        total=sum(map(len, batches)),
        unit=" images",
        dynamic_ncols=True,
        disable=None if processes.is_main else True,  # None shows it on a terminal only
    ) as bar:
        loader = make_loader(dataset, batch_sampler=batches)
        for images, batch in zip(batches, Batches(loader, TIMEOUT), strict=True):
            readable = batch.targets.bool()
            found = {
                name: values.float().cpu()[readable] for name, values in call(batch.images).items()
            }
            if not all(values.isfinite().all() for values in found.values()):
                raise LocalInputError(
                    "the model's answers are not finite: the weights are broken, or precision fp32 "
                    "is needed"
                )
            rows.append({**found, KEPT: torch.tensor(images)[readable]})
            bar.update(len(images))
            if images.stop in ends:
                tensors = {n: torch.cat([of_batch[n] for of_batch in rows]) for n in rows[0]}
                save = partial(
                    safetensors.torch.save_file, tensors, metadata={"identity": identity}
                )
                write_output(ends[images.stop], save)
                rows = []


def list_unreadable(source: ImageSource, kept: np.ndarray) -> list[tuple[str, str]]:
    """Name and reason of the images that are not among the `kept` ones, which it also prints."""
    found = []
    for index in np.setdiff1d(np.arange(len(source)), kept).tolist():
        try:
            source.read(index)
            reason = "could not be read"  # but now it can
        except BadImageError as error:
            reason = str(error)
        found.append((printable(source.name(index)), reason))
    if found:
        lines = [f"{len(found)} of {len(source)} images could not be read and are left out:"]
        sys.stderr.write("\n".join([*lines, *(f"  {name} {reason}" for name, reason in found), ""]))
    return found
