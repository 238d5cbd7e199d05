"""k-NN classification on frozen features (arXiv 1805.01978, section 3.4): cosine similarity,
weighted votes.

    sh run_knn.sh --config cfgs/finetune/ViT-S_50E_GAP.yaml --data_path /path/to/data --finetune
    /path/to/weights

--finetune random judges an untrained model, and a folder of checkpoints gives a table over them.
--save_path keeps the features, --load_path takes them in place of computing them.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.labels import LabelledData, LabelledSource, take_subset
from data.transforms import PixelNormalizer
from engine.evaluation.classification import open_labelled_data
from engine.evaluation.evaluate import percent_by_class
from engine.evaluation.features import Features, compute_features, load_features, save_features
from engine.evaluation.from_weights import build_frozen
from engine.evaluation.knn import ranks_by_k
from engine.run.batches import eval_batches
from engine.run.folder import Run, check_writable, open_run
from models.build import classifier_config_problems
from models.weights.files import weights_digest
from models.weights.read import read_weights
from util.dist import autocast_dtype, gather_rows
from util.errors import InputError, run_cli
from util.settings.evaluation import RANDOM_WEIGHTS, STAGE_CONFIGS, KnnConfig
from util.settings.read import load_config

WEIGHTS_ENDINGS = (".pth", ".pt", ".bin", ".safetensors")
logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Classifies the validation images; returns what it writes to results.json.

    For a folder of checkpoints that is a list under `checkpoints`, beside the results of the last
    one.
    """
    checks = [classifier_config_problems]
    cfg = load_config(KnnConfig, "knn", argv, checks=checks, siblings=STAGE_CONFIGS)
    with open_run(cfg) as run:
        if (run.output_dir / "config.yaml").exists():  # training runs write it, this stage does not
            raise InputError(
                f"output_dir {run.output_dir} holds a training run: give k-NN another --output_dir"
            )
        rank, world_size = run.processes.rank, run.processes.world_size
        if cfg.load_path is not None:
            features = load_features(Path(cfg.load_path))
            check_origin(cfg, features)
            return run.finish(
                classify(cfg, run, features._replace(train=features.train[rank::world_size]))
            )
        assert cfg.finetune is not None, "the config checks that there are weights"
        if cfg.save_path is not None and run.processes.is_main:
            check_writable("save_path", Path(cfg.save_path))
        data = open_labelled_data(cfg, run)
        train = take_subset(data.train, cfg.subset, cfg.seed)
        paths = list_weights(cfg.finetune)
        for path in paths[1:]:
            read_weights(path)  # a broken file is found before the others are computed
        table = []
        for weights in paths:
            folder = None
            if cfg.save_path is not None:
                folder = Path(cfg.save_path) / (Path(weights).name if len(paths) > 1 else "")
            table.append(judge(cfg, run, weights, data, train, folder))
        if len(table) == 1:
            return run.finish(table[0])
        log_table(table, cfg)
        return run.finish({**table[-1], "checkpoints": table})


def judge(
    cfg: KnnConfig,
    run: Run,
    weights: str,
    data: LabelledData,
    train: LabelledSource,
    folder: Path | None,
) -> dict[str, Any]:
    """Results of the frozen model of `weights`; its features, which are gone afterwards, are kept
    in `folder`."""
    features = features_of(cfg, run, weights, data, train)
    if folder is not None:
        keep_features(folder, run, features)
    return classify(cfg, run, features)


def keep_features(folder: Path, run: Run, features: Features) -> None:
    """Writes the features with the training rows of all processes."""
    whole = features._replace(
        train=gather_rows(features.train, len(features.train_labels), everywhere=False)
    )
    if run.processes.is_main:
        logger.info("wrote %s", save_features(folder, whole))


def features_of(
    cfg: KnnConfig, run: Run, weights: str, data: LabelledData, train: LabelledSource
) -> Features:
    """Features under the frozen model of `weights`: of this process's share of `train`, and of all
    of `data.val`."""
    classifier = build_frozen(cfg, weights, len(data.class_names))
    backbone = classifier.model.to(run.device)
    normalize = PixelNormalizer(cfg.mean, cfg.std, run.device)
    dtype = autocast_dtype(cfg.precision, run.device)
    train_rows, val_rows = (
        compute_features(backbone, eval_batches(cfg, run, source, cfg.crop_pct), normalize, dtype)
        for source in (train, data.val)
    )
    facts = {
        "checkpoint": weights,
        "sha256": classifier.sha256,
        "dataset": cfg.dataset,
        "readout": cfg.global_pool,
        "img_size": cfg.img_size,
        "class_names": data.class_names,
    }
    labels = (torch.from_numpy(source.labels) for source in (train, data.val))
    return Features(
        train_rows, next(labels), gather_rows(val_rows, len(data.val)), next(labels), facts
    )


def classify(cfg: KnnConfig, run: Run, features: Features) -> dict[str, Any]:
    """Searches this process's share of the training features, merges, votes and counts."""
    num_classes, num_train = len(features.facts["class_names"]), len(features.train_labels)
    queries = features.val.to(run.device)
    ranks = ranks_by_k(
        features.train,
        features.train_labels,
        queries,
        features.val_labels,
        cfg.ks,
        cfg.temperature,
        num_classes,
        run.processes.rank,
        run.processes.world_size,
    )
    labels = features.val_labels.to(ranks[cfg.ks[0]].device)
    correct = {k: int((of_k == 0).sum()) for k, of_k in ranks.items()}
    acc1 = {k: 100 * count / len(labels) for k, count in correct.items()}
    reported = cfg.ks[0]
    results = {
        "protocol": f"k-NN, cosine, temperature {cfg.temperature:g}",
        **{name: value for name, value in features.facts.items() if name != "class_names"},
        "num_train": num_train,
        "num_samples": len(labels),
        "k": reported,
        "correct1": correct[reported],
        "acc1": acc1[reported],
        "acc5": 100 * int((ranks[reported] < 5).sum()) / len(labels),
        "acc1_by_k": {str(k): value for k, value in acc1.items()},
    }
    if cfg.per_class:
        right, total = (
            torch.bincount(of, minlength=num_classes)
            for of in (labels[ranks[reported] == 0], labels)
        )
        results["per_class"] = percent_by_class(
            features.facts["class_names"], right.tolist(), total.tolist()
        )
    line = "  ".join(f"{k}-NN {value:.2f} %" for k, value in acc1.items())
    name = features.facts["checkpoint"]
    logger.info("%s: %d training and %d validation images  %s", name, num_train, len(labels), line)
    if max(cfg.ks) > num_train:
        logger.warning(
            "k %d is more than the %d training images: it takes all of them", max(cfg.ks), num_train
        )
    return results


def list_weights(finetune: str) -> list[str]:
    """The weights behind `finetune`: itself, or the files in a folder that is no Hugging Face
    model, in their order.

    Raises: InputError for a folder without weights.
    """
    folder = Path(finetune)
    if finetune == RANDOM_WEIGHTS or not folder.is_dir() or (folder / "config.json").exists():
        return [finetune]
    files = [path for path in folder.iterdir() if path.suffix in WEIGHTS_ENDINGS]
    if not files:
        raise InputError(
            f"finetune {finetune} is a folder without weights: none ends in {' '.join(WEIGHTS_ENDINGS)}"
        )
    by_number = sorted(
        files,
        key=lambda path: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", path.name)],
    )
    return [str(path) for path in by_number]


def check_origin(cfg: KnnConfig, features: Features) -> None:
    """Raises: InputError where saved features are not those of the weights that the settings name,
    so read."""
    if cfg.finetune is None:
        return
    sha256 = None if cfg.finetune == RANDOM_WEIGHTS else weights_digest(cfg.finetune)
    if sha256 != features.facts["sha256"]:
        raise InputError(
            f"load_path {cfg.load_path} holds features of {features.facts['checkpoint']} "
            f"(sha256 {features.facts['sha256']}), finetune {cfg.finetune} has sha256 {sha256}"
        )
    if cfg.global_pool != features.facts["readout"]:
        raise InputError(
            f"load_path {cfg.load_path} holds features read by global_pool {features.facts['readout']}, "
            f"the settings say {cfg.global_pool}"
        )


def log_table(table: list[dict[str, Any]], cfg: KnnConfig) -> None:
    """A line per checkpoint."""
    width = max(len(row["checkpoint"]) for row in table)
    logger.info("%-*s  %s", width, "checkpoint", "  ".join(f"{f'{k}-NN':>7}" for k in cfg.ks))
    for row in table:
        logger.info(
            "%-*s  %s",
            width,
            row["checkpoint"],
            "  ".join(f"{v:7.2f}" for v in row["acc1_by_k"].values()),
        )


if __name__ == "__main__":
    run_cli(main)
