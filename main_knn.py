"""k-NN classification on frozen features (arXiv 1805.01978, section 3.4): cosine similarity,
weighted votes; or segmentation by the neighbours of patches.

    sh run_knn.sh --config cfgs/finetune/ViT-S_50E_GAP.yaml --data_path /path/to/data \\
        --finetune /path/to/weights

`--finetune random` evaluates an untrained model; a folder of checkpoints gives a table over them,
and several `--layer` one over the encoder's blocks.
`--save_path` keeps the features, and `--load_path` takes them in place of computing them.
"""

if __name__ == "__main__":  # before torch is imported, which takes seconds
    from engine.start import read_knn, start

    settings = start(read_knn)

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.annotated import AnnotatedData, open_annotated_data
from data.labels import LabelledData, take_subset
from data.on_device import place_on_device
from engine.evaluation.classification import open_labelled_data, percent_by_class
from engine.evaluation.features import Features, Predictions, compute_layers
from engine.evaluation.features_file import Origin, check_folders, load_features, save_features
from engine.evaluation.from_weights import build_frozen
from engine.evaluation.knn import rank_labels
from engine.evaluation.patch_knn import build_memory, by_neighbours
from engine.evaluation.predictions import save_predictions
from engine.evaluation.segmentation import SegmentationEvaluator
from engine.parallel import compile_features, spread_model
from engine.run.folder import PREDICTIONS_FILE, Run, open_run
from engine.start import read_knn
from models.build import layers_of
from models.vit import VisionTransformer
from models.weights.files import weights_digest
from models.weights.read import read_weights
from util.dist import from_main, gather_rows
from util.errors import InputError, run_cli
from util.settings.evaluation import RANDOM_WEIGHTS, KnnConfig

WEIGHTS_ENDINGS = (".pth", ".pt", ".bin", ".safetensors")
DIGITS = re.compile(r"(\d+)")
Results = dict[str, Any]
# and what the neighbours say of each image, None if its pixels have classes
Found = tuple[Results, Predictions | None]
logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, cfg: KnnConfig | None = None) -> Results:
    """Classifies the validation images; returns what it writes to results.json.

    For a folder of checkpoints these are the results of the last one, with those of all of them
    as a list under `checkpoints`. `cfg` are settings that have been read already.
    """
    cfg = cfg or read_knn(argv)
    with open_run(cfg) as run:
        if (run.output_dir / "config.yaml").exists():  # training runs write it, this stage does not
            raise InputError(
                f"output_dir {run.output_dir} holds a training run: give k-NN another --output_dir"
            )
        run.records.track(cfg)
        if cfg.load_path is not None:
            features, origin = load_features(Path(cfg.load_path))
            check_origin(cfg, origin)
            share = features.train[run.processes.rank :: run.processes.world_size]
            found = classify(cfg, run, features._replace(train=share), origin)
            return finish(cfg, run, found, origin.class_names, None)

        assert cfg.finetune is not None, "the settings require weights"
        checkpoints, layers = list_weights(cfg.finetune), layers_of(cfg)
        folders: dict[tuple[str, int], Path] = {}
        if cfg.save_path is not None:  # several checkpoints and layers have a folder each
            folders = {
                (path, layer): Path(
                    cfg.save_path,
                    Path(path).name if len(checkpoints) > 1 else "",
                    f"layer{layer}" if len(layers) > 1 else "",
                )
                for path in checkpoints
                for layer in layers
            }
            targets = [(partial(digest_of, path), n, f) for (path, n), f in folders.items()]
            from_main(lambda: check_folders(cfg, targets))
        data = open_annotated_data(cfg) if cfg.task == "segment" else open_images(cfg, run)
        for checkpoint in checkpoints[1:]:  # finds a broken file before the others are evaluated
            from_main(partial(read_weights, checkpoint))
        table = []
        for checkpoint in checkpoints:
            results, predictions = evaluate_checkpoint(cfg, run, checkpoint, data, folders)
            table.append(results)
        if len(table) > 1:
            for row in table:
                name = row["checkpoint"]
                logger.info("%-*s  %s", max(map(len, checkpoints)), name, accuracies(row))
            results = {**results, "checkpoints": table}
        return finish(cfg, run, (results, predictions), data.class_names, data)


def finish(
    cfg: KnnConfig,
    run: Run,
    found: Found,
    class_names: list[str],
    data: LabelledData | AnnotatedData | None,
) -> Results:
    """Writes results and predictions, of the images of `data` if they are at hand; returns the
    results."""
    results, predictions = found
    if predictions is not None and run.processes.is_main:
        source = data.val if isinstance(data, LabelledData) else None
        save_predictions(run.output_dir / PREDICTIONS_FILE, predictions, class_names, cfg, source)
    return run.finish(results)


def open_images(cfg: KnnConfig, run: Run) -> LabelledData:
    """Both splits of the images to classify. Raises: InputError."""
    data = open_labelled_data(cfg, run)
    train, val = place_on_device(
        cfg, run.processes, take_subset(data.train, cfg.subset, cfg.seed), data.val
    )
    return replace(data, train=train, val=val)


def evaluate_checkpoint(
    cfg: KnnConfig,
    run: Run,
    checkpoint: str,
    data: LabelledData | AnnotatedData,
    folders: dict[tuple[str, int], Path],
) -> Found:
    """Results of the frozen model of `checkpoint`, of several layers those of the best, with the
    figures of all of them as a list under `layers`. Writes its features into the folder of each
    layer, if there is one."""
    model, sha256 = from_main(lambda: build_frozen(cfg, checkpoint, len(data.class_names)))
    spread_model(model, run.device)
    compile_features(model, cfg)
    layers = layers_of(cfg)
    origin = Origin(
        checkpoint=checkpoint,
        sha256=sha256,
        dataset=cfg.dataset,
        readout=cfg.global_pool,
        img_size=cfg.img_size,
        class_names=data.class_names,
        layer=layers[0],
        last_norm=cfg.last_norm,
    )
    if isinstance(data, AnnotatedData):
        return segment(cfg, run, model, data, origin), None
    results = []
    found = compute_layers(cfg, run, model, data, cfg.crop_pct, layers)
    for layer, features in zip(layers, found, strict=True):
        origin = origin._replace(layer=layer)
        if folders:
            rows = gather_rows(features.train, len(data.train), everywhere=False)  # all on rank 0
            if run.processes.is_main:
                complete = features._replace(train=rows)
                path = save_features(folders[checkpoint, layer], complete, origin)
                logger.info("wrote %s", path)
        results.append(classify(cfg, run, features, origin))
    if len(layers) == 1:
        return results[0]
    # of layers that are equally good, the first
    best, predictions = max(results, key=lambda of_layer: of_layer[0]["acc1"])
    for of_layer, _ in results:
        mark = "  the best" if of_layer is best else ""
        logger.info("layer %2d  %s%s", of_layer["layer"], accuracies(of_layer), mark)
    figures = ("layer", "correct1", "acc1", "acc5", "acc1_by_k")
    layers_found = [{name: row[name] for name in figures} for row, _ in results]
    return {**best, "layers": layers_found}, predictions


def segment(
    cfg: KnnConfig, run: Run, model: VisionTransformer, data: AnnotatedData, origin: Origin
) -> Results:
    """Results of a search among patches of the training images."""
    memory = build_memory(cfg, run, model, data.train)
    predict = by_neighbours(model, memory, cfg.ks, cfg.temperature)
    evaluator = SegmentationEvaluator(cfg, run, data.val)
    scores = dict(zip(cfg.ks, evaluator(predict, len(cfg.ks)), strict=True))
    found = scores[cfg.ks[0]].as_dict(evaluator.class_names)
    del found["loss"]  # there is none of shares
    results: Results = {
        "protocol": f"k-NN of patches, cosine, temperature {cfg.temperature:g}",
        **described(origin, "class_names", "readout"),
        "num_train": len(data.train),
        "num_patches": len(memory.features),
        "k": cfg.ks[0],
        **found,
        "miou_by_k": {str(k): of_k.scalars["miou"] for k, of_k in scores.items()},
    }
    logger.info(
        "%s: %d patches of %d training images, %d validation images  %s",
        origin.checkpoint,
        len(memory.features),
        len(data.train),
        len(data.val),
        accuracies(results),
    )
    warn_of_few(cfg, len(memory.features), "training patches")
    return results


def classify(
    cfg: KnnConfig, run: Run, features: Features, origin: Origin
) -> tuple[Results, Predictions]:
    """Results of a search among the training features of all processes."""
    class_names, num_train = origin.class_names, len(features.train_labels)
    parts: list[Predictions] = []
    ranks = rank_labels(features, len(class_names), cfg.ks, cfg.temperature, run.processes, parts)
    labels, reported = features.val_labels, ranks[cfg.ks[0]]
    acc1 = {str(k): 100 * int((of_k == 0).sum()) / len(labels) for k, of_k in ranks.items()}
    results: Results = {
        "protocol": f"k-NN, cosine, temperature {cfg.temperature:g}",
        **described(origin, "class_names"),
        "num_train": num_train,
        "num_samples": len(labels),
        "k": cfg.ks[0],
        "correct1": int((reported == 0).sum()),
        "acc1": acc1[str(cfg.ks[0])],
        "acc5": 100 * int((reported < 5).sum()) / len(labels),
        "acc1_by_k": acc1,
    }
    if cfg.per_class:
        correct, total = (
            of_images.bincount(minlength=len(class_names)).tolist()
            for of_images in (labels[reported == 0], labels)
        )
        results["per_class"] = percent_by_class(class_names, correct, total)
    logger.info(
        "%s, layer %d: %d training and %d validation images  %s",
        origin.checkpoint,
        origin.layer,
        num_train,
        len(labels),
        accuracies(results),
    )
    warn_of_few(cfg, num_train, "training images")
    return results, Predictions(*map(torch.cat, zip(*parts, strict=True)))


def described(origin: Origin, *without: str) -> Results:
    """Where results come from, by name."""
    return {name: value for name, value in origin._asdict().items() if name not in without}


def warn_of_few(cfg: KnnConfig, number: int, of_what: str) -> None:
    """Warns of a k that is more than there are to find."""
    if max(cfg.ks) > number:
        logger.warning(
            "k %d is more than the %d %s: it takes all of them", max(cfg.ks), number, of_what
        )


def accuracies(results: Results) -> str:
    """The top-1 accuracy or mean IoU for each k, in words."""
    name = "miou" if "miou" in results else "acc1"
    title = "mIoU " if "miou" in results else ""
    by_k = results[f"{name}_by_k"].items()
    return "  ".join(f"{k}-NN {title}{value:.2f} %" for k, value in by_k)


def list_weights(finetune: str) -> list[str]:
    """The weights that `finetune` names: itself, or the files of a folder in their order.

    A folder in Hugging Face's layout, which has a config.json, is one model. Numbers in file names
    count as numbers: step9 comes before step10.

    Raises: InputError for a folder without weights.
    """
    folder = Path(finetune)
    if finetune == RANDOM_WEIGHTS or not folder.is_dir() or (folder / "config.json").exists():
        return [finetune]
    files = [path for path in folder.iterdir() if path.suffix in WEIGHTS_ENDINGS]
    if not files:
        raise InputError(
            f"finetune {finetune} is a folder without weights: none ends in "
            f"{' '.join(WEIGHTS_ENDINGS)}"
        )
    files.sort(key=lambda path: [int(t) if t.isdigit() else t for t in DIGITS.split(path.name)])
    return [str(path) for path in files]


def digest_of(weights: str) -> str | None:
    """sha256 of the weights, None for an untrained model."""
    return None if weights == RANDOM_WEIGHTS else weights_digest(weights)


def check_origin(cfg: KnnConfig, origin: Origin) -> None:
    """Raises: InputError if saved features are of other weights than the settings name, or of
    another readout."""
    if cfg.finetune is None:
        return
    sha256 = from_main(partial(digest_of, cfg.finetune))
    if (sha256, cfg.global_pool) != (origin.sha256, origin.readout):
        raise InputError(
            f"load_path {cfg.load_path} holds features of {origin.checkpoint} (sha256 "
            f"{origin.sha256}) by global_pool {origin.readout}, and finetune {cfg.finetune} has "
            f"sha256 {sha256}, global_pool {cfg.global_pool}: leave finetune out, or name its "
            f"features"
        )


if __name__ == "__main__":
    run_cli(lambda: main(cfg=settings))
