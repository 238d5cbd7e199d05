"""Segmentation and detection of any images, without annotations: the class of each pixel as index
PNGs, or objects as COCO's results.

The images are cut into batches, which the processes share. A finished batch is a JSON file beside
the result, with the objects of its images or, once their PNGs are written, without any; the same
command goes on with the batches that are missing. Batches are the same whatever the number of
processes, so the result is as well.

Shapes: `C` channels, `H` and `W` height and width of an image.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.annotated import EvalImages
from data.handover import ready_to_send
from data.images import IMAGE_ENDINGS
from data.joint import detect_eval, segment_eval
from data.loader import loader_maker
from data.sources import ImageSource
from engine.evaluation.detection import coco_entries, detect
from engine.evaluation.features import on_pixels
from engine.evaluation.segmentation import place_logits, segment_image
from engine.run.batches import Batches
from models.dense import DenseTransformer
from models.spec import pair
from util.dist import Processes, all_gather, from_main
from util.errors import InputError
from util.files import printable, write_output, write_text, writing
from util.settings.base import DataConfig
from util.settings.tools import PredictConfig

CLASSES = "classes.txt"
Entry = dict[str, Any]  # an object in COCO's words


def predict_places(
    cfg: PredictConfig,
    model: DenseTransformer,
    class_names: list[str],
    source: ImageSource,
    identity: str,
    timeout: float,
    processes: Processes,
) -> np.ndarray:
    """Writes `output_file`, a folder of PNGs with the names of the classes, or a JSON file of
    objects; returns on the main process the numbers `(n,)` of the images that could be read.

    Args:
        cfg: with the weights' `img_size`, `mean` and `std`.
        model: in eval mode, on the device.
        identity: of weights, images and settings, which the files of batches carry.
        timeout: minutes between two batches.

    Raises: InputError if two images would have one PNG, or the result cannot be written.
    """
    assert cfg.output_file is not None and cfg.img_size is not None, "they are there by now"
    output = Path(cfg.output_file)
    folder = output.with_name(f"{output.name}.parts")
    # PNGs do not say whose they are, as the files of batches do
    masks = folder / f"masks-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    is_segment = model.spec.task == "segment"
    names = relative_names(cfg, source)
    if is_segment:
        names = [
            name.with_suffix(".png")
            if name.suffix.lower() in IMAGE_ENDINGS
            else name.with_name(f"{name.name}.png")  # as of an image within a file
            for name in names
        ]
        check_pngs(names)
    with writing(folder):
        masks.mkdir(parents=True, exist_ok=True)
    batches = [
        range(start, min(start + cfg.batch_size, len(source)))
        for start in range(0, len(source), cfg.batch_size)
    ]
    paths = [folder / f"batch-{number:06d}.json" for number in range(len(batches))]
    missing = from_main(
        lambda: [number for number, path in enumerate(paths) if not read_part(path, identity)]
    )
    share = missing[processes.rank :: processes.world_size]
    call: Callable[[Tensor], Any]
    if is_segment:
        call = on_pixels(place_logits(model), cfg, cfg.precision, processes.device)
        transform = partial(segment_eval, img_size=cfg.img_size, patch_size=model.spec.patch_size)
    else:
        call = on_pixels(model, cfg, cfg.precision, processes.device)
        transform = partial(detect_eval, img_size=cfg.img_size, mean=cfg.mean)
    loader = loader_maker(DataConfig(num_workers=cfg.num_workers), processes)(
        EvalImages(source, transform, with_targets=None),
        batch_sampler=[batches[number] for number in share],
        collate_fn=ready_to_send,
    )
    with tqdm(
        total=sum(len(batches[number]) for number in share),
        unit=" images",
        dynamic_ncols=True,
        disable=None if processes.is_main else True,  # None shows it on a terminal only
    ) as bar:
        for number, batch in zip(share, Batches(loader, timeout) if share else (), strict=True):
            readable = [sample for sample in batch if not sample.bad]
            entries: list[Entry] = []
            if is_segment:
                window = pair(cfg.img_size) if cfg.eval_mode == "slide" else None
                for sample in readable:
                    mask = segment_image(call, sample.image, sample.size, window)
                    write_mask(masks / names[sample.number], mask, len(class_names))
            elif readable:
                for sample, found in zip(
                    readable, detect(call, readable, cfg.img_size), strict=True
                ):
                    name = printable(str(names[sample.number]))
                    for entry in coco_entries(name, found, sample.size):
                        entries.append(as_json(entry, class_names))
            kept = [sample.number for sample in readable]
            part = {"identity": identity, "kept": kept, "objects": entries}
            write_text(paths[number], json.dumps(part))
            bar.update(len(batch))
    all_gather(None)
    if not processes.is_main:
        return np.empty(0, dtype=np.int64)
    parts = [read_part(path, identity) for path in paths]
    if not all(parts):
        raise InputError(f"{folder} lacks parts: all processes must see the same folder")
    numbers = np.array([number for part in parts for number in part["kept"]], dtype=np.int64)
    if len(numbers) and is_segment:
        text = "".join(f"{printable(name)}\n" for name in class_names)
        write_text(masks / CLASSES, text)
        with writing(output):
            masks.rename(output)
    elif len(numbers):
        objects = [entry for part in parts for entry in part["objects"]]
        lines = [json.dumps(entry) for entry in objects if entry["score"] >= cfg.threshold]
        text = "[" + ",\n".join(lines) + "]\n"
        write_output(output, partial(Path.write_text, data=text, encoding="utf-8"))
    for path in folder.glob("masks-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("batch-*.json"):
        path.unlink()
    with suppress(OSError):  # somebody else's files may be in it
        folder.rmdir()
    return numbers


def relative_names(cfg: PredictConfig, source: ImageSource) -> list[Path]:
    """What the images are called, relative to `data_path` or, of a list, to its folder."""
    root = Path(cfg.data_path or "")
    root = root / cfg.split if cfg.split != "all" else root
    base = root.parent if root.is_file() else root
    found = []
    for index in range(len(source)):
        path = Path(source.name(index))
        path = path.relative_to(base) if path.is_relative_to(base) else path
        found.append(Path(*(part for part in path.parts if part not in ("..", path.anchor))))
    return found


def check_pngs(names: list[Path]) -> None:
    """Raises: InputError if two images have one PNG."""
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise InputError(
            f"{count} images would be written to {printable(str(name))}: give them other names, or "
            "predict for one folder at a time"
        )


def write_mask(path: Path, mask: Tensor, num_classes: int) -> None:
    """A mask `(H, W)` as a PNG of 8 bits, or of 16 for more than 256 classes."""
    pixels = mask.numpy().astype(np.uint8 if num_classes <= 256 else np.uint16)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_output(path, lambda target: Image.fromarray(pixels).save(target, format="PNG"))


def as_json(entry: Entry, class_names: list[str]) -> Entry:
    """A detection as JSON holds it, with the name of its class."""
    entry = {**entry, "category_name": class_names[entry["category_id"]]}
    if "segmentation" in entry:
        runs = entry["segmentation"]
        entry["segmentation"] = {"size": list(runs["size"]), "counts": runs["counts"].decode()}
    return entry


def read_part(path: Path, identity: str) -> dict[str, Any]:
    """What a finished batch of this result holds, {} if there is none."""
    try:
        part = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return part if part["identity"] == identity else {}
