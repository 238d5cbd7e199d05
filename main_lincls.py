r"""Linear classification on frozen features (paper, section 4 and appendix A.1), with one or many
learning rates at once.

    sh run_lincls.sh --config cfgs/lincls/ViT-S_SGD_GAP.yaml --data_path /path/to/data \
        --finetune /path/to/weights

--finetune random evaluates an untrained model. Of several learning rates a held-out tenth of the
training set chooses one; the validation set has no say. The same command resumes where it stopped.
model.safetensors is the classifier with the chosen head.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from data.labels import LabelledSource, Subset, stratified_choice, take_subset
from data.loader import Batch, LabelledDataset
from data.transforms import PixelNormalizer, pretrain_transform
from engine.evaluation.classification import Evaluator, Scores, open_labelled_data
from engine.evaluation.from_weights import build_frozen
from engine.evaluation.probe import (
    average_statistics,
    build_probe_optimizer,
    choose_probe,
    mean_of_finite,
    probe_loss,
    probe_step,
)
from engine.loop import train
from engine.run.batches import train_batches
from engine.run.checkpoint import save_weights, weights_path
from engine.run.folder import open_run
from engine.run.job import Job, begin
from engine.run.results import read_results
from engine.run.saving import Saver
from models.build import classifier_config_problems
from models.heads.probe import LinearProbes
from models.vit import VisionTransformer
from util.errors import run_cli
from util.rng import HEAD, generator
from util.settings.evaluation import STAGE_CONFIGS, LinclsConfig
from util.settings.read import load_config

HELD_OUT = 0.1  # share of the training set that chooses among several learning rates
logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains linear classifiers, or goes on with a run; returns what it writes to results.json."""
    checks = [classifier_config_problems]
    cfg = load_config(LinclsConfig, "lincls", argv, checks=checks, siblings=STAGE_CONFIGS)
    assert cfg.finetune is not None, "the config checks that there are weights"
    with open_run(cfg) as run:
        data = open_labelled_data(cfg, run)
        source, held_out = split_training_set(take_subset(data.train, cfg.subset, cfg.seed), cfg)
        classifier = build_frozen(cfg, cfg.finetune, len(data.class_names))
        backbone = classifier.model.to(run.device)
        evaluators = {"val": Evaluator(cfg, run, data.val, data.class_names)}
        if held_out is not None:
            evaluators["held_out"] = Evaluator(cfg, run, held_out, data.class_names)

        probes = LinearProbes(
            backbone.spec.embed_dim, len(data.class_names), len(cfg.lr), generator(cfg.seed, HEAD)
        )
        job = begin(
            run,
            cfg,
            source,
            backbone.spec,
            lambda: probes,
            lambda _: build_probe_optimizer(probes, cfg),
            run.results_path,
            weights=classifier.sha256,
            may_diverge=len(cfg.lr) > 1,
            scale_loss=False,
        )
        if job.is_finished:
            return read_results(run.results_path)

        augment = pretrain_transform(cfg.img_size, cfg.crop_min, cfg.interpolation, cfg.hflip)
        dataset = LabelledDataset(source, augment, cfg.seed)
        batches = train_batches(cfg, run, job.plan, dataset, job.state.step)
        normalize = PixelNormalizer(cfg.mean, cfg.std, run.device)

        def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            with torch.no_grad():
                features = backbone.forward_features(normalize(batch.images))  # (B, D)
            labels = batch.targets.to(run.device, non_blocking=True)
            losses = probe_loss(model(features), labels)  # (H,)
            return losses.sum(), {"loss": mean_of_finite(losses.detach())}

        def step_fn(optimizer: torch.optim.Optimizer, scaler: GradScaler) -> tuple[Tensor, Tensor]:
            average_statistics(probes)
            return probe_step(optimizer, scaler)

        with Saver(job) as saver:
            for epoch in train(job, batches, loss_fn, saver, step_fn):
                if epoch % cfg.eval_epochs == 0 and job.state.step < job.plan.stop_step:
                    evaluate_epoch(job, epoch, backbone, evaluators, cfg.lr)
        scores = evaluate_epoch(job, job.epochs_done, backbone, evaluators, cfg.lr)
        origin = {"checkpoint": cfg.finetune, "sha256": classifier.sha256, "dataset": cfg.dataset}
        results = describe(scores, cfg.lr, evaluators["val"].class_names)
        if run.processes.is_main:
            weight, bias = probes.folded(cfg.lr.index(results["lr"]))
            backbone.head.load_state_dict({"weight": weight, "bias": bias})
            save_weights(weights_path(run.output_dir), backbone, job.identity)
        return run.finish(
            {"protocol": "linear classification", **origin, "num_train": len(source), **results}
        )


def split_training_set(
    source: LabelledSource, cfg: LinclsConfig
) -> tuple[LabelledSource, LabelledSource | None]:
    """The images that probes train on, and those that choose among several probes: a stratified
    tenth, held out by seed, or None for one probe."""
    if len(cfg.lr) == 1:
        return source, None
    held_out = stratified_choice(source.labels, max(1, round(HELD_OUT * len(source))), cfg.seed)
    return Subset(source, np.setdiff1d(np.arange(len(source)), held_out)), Subset(source, held_out)


def describe(
    scores: dict[str, list[Scores]], lrs: tuple[float, ...], class_names: list[str] | None
) -> dict[str, Any]:
    """The chosen probe's results on the validation set, and the accuracies of all probes as a curve
    over the learning rates."""
    chosen = choose_probe(scores.get("held_out", scores["val"]))
    curve = [
        {"lr": lr, **{f"{split}_acc1": of_split[probe].acc1 for split, of_split in scores.items()}}
        for probe, lr in enumerate(lrs)
    ]
    num_held_out = scores["held_out"][0].num_samples if "held_out" in scores else 0
    best = scores["val"][chosen].as_dict(class_names)
    return {**best, "lr": lrs[chosen], "num_held_out": num_held_out, "curve": curve}


def evaluate_epoch(
    job: Job,
    epoch: int,
    backbone: VisionTransformer,
    evaluators: dict[str, Evaluator],
    lrs: tuple[float, ...],
) -> dict[str, list[Scores]]:
    """Evaluates every probe on every split after `epoch` epochs; records the accuracies of the one
    that would be chosen now."""
    probes = job.state.model.eval()
    scores = {
        split: evaluator(lambda images: probes(backbone.forward_features(images)), len(lrs))
        for split, evaluator in evaluators.items()
    }
    probes.train()
    chosen = choose_probe(scores.get("held_out", scores["val"]))
    values = {"epoch": float(epoch), "val_loss": scores["val"][chosen].loss}
    values |= {f"{split}_acc1": of_split[chosen].acc1 for split, of_split in scores.items()}
    accuracies = "  ".join(
        f"{split} top-1 {of_split[chosen].acc1:.2f} %" for split, of_split in scores.items()
    )
    line = f"epoch {epoch} lr {lrs[chosen]:g}  {accuracies}"
    job.run.records.write("val", job.state.step, values, line)
    return scores


if __name__ == "__main__":
    run_cli(main)
