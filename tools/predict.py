"""What a fine-tuned model says about any images: of a classifier as a CSV file, of a model for
segmentation as a folder of index PNGs, of one for detection as a JSON file of COCO's results.

    python tools/predict.py --finetune output/finetune/ViT-S_50E_GAP/best.safetensors \\
        --data_path /path/to/images --output_file output/predictions.csv

A row has an image's name, the prediction, and the probability of each class, or with `--topk 3` the
three most probable classes. Where the weights say that an image may have several classes, the
prediction is all from `--threshold` on, and where they predict numbers, these are the columns.
Masks and objects are in the images' own sizes; see tools/README.md. `--data_path` takes what
tools/embed.py does; the same command goes on where a killed one stopped.
"""

import csv
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from engine.evaluation.apply import Parts, apply_model
from engine.evaluation.readers import Head, head_of, output_reader
from util.errors import run_cli
from util.settings.evaluation import STAGE_CONFIGS
from util.settings.read import load_config
from util.settings.tools import PredictConfig


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Writes the predictions; returns what `apply_model` does."""
    cfg = load_config(PredictConfig, "predict", argv, siblings=STAGE_CONFIGS)
    return apply_model(cfg, True, output_reader, partial(write_csv, cfg))


def write_csv(cfg: PredictConfig, parts: Parts, path: Path) -> None:
    """A row for each image, in UTF-8."""
    head = head_of(parts.info)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", *columns(cfg, head)])
        rows = (row for logits in parts.chunks("logits") for row in described(cfg, head, logits))
        writer.writerows([name, *row] for name, row in zip(parts.names(), rows, strict=True))


def columns(cfg: PredictConfig, head: Head) -> list[str]:
    """The titles of the columns behind the name."""
    if head.objective == "regression":
        return head.names if len(head.names) > 1 else ["prediction"]
    if cfg.topk is None:
        return ["prediction", *(f"p({name})" for name in head.names)]
    places = range(1, min(cfg.topk, len(head.names)) + 1)
    return ["prediction", *(title for k in places for title in (f"top{k}", f"p(top{k})"))]


def described(cfg: PredictConfig, head: Head, logits: np.ndarray) -> Iterator[list[str]]:
    """The columns of each row of logits `(n, classes)`."""
    if head.objective == "regression":
        for row in logits.tolist():
            yield [f"{value:.7g}" for value in row]
        return
    outputs = torch.from_numpy(logits).double()
    several = head.objective == "multilabel"
    shares = outputs.sigmoid() if several else outputs.softmax(dim=1)
    best = outputs.topk(min(cfg.topk or 1, len(head.names)), dim=1).indices.tolist()
    for row, order in zip(shares.tolist(), best, strict=True):
        chosen = [order[0]]
        if several:
            chosen = [label for label, share in enumerate(row) if share >= cfg.threshold]
        shown = [f"{share:.6g}" for share in row]
        if cfg.topk is not None:
            shown = [text for k in order for text in (head.names[k], f"{row[k]:.6g}")]
        yield ["; ".join(head.names[label] for label in chosen), *shown]


if __name__ == "__main__":
    run_cli(lambda: sys.exit(main()["exit_code"] == 1))
