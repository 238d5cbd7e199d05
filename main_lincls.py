r"""Linear classification on frozen features (paper, section 4 and appendix A.1), with one or many
learning rates at once.

    sh run_lincls.sh --config cfgs/lincls/ViT-S_SGD_GAP.yaml --data_path /path/to/data \
        --finetune /path/to/weights

--finetune random evaluates an untrained model. Of several learning rates a held-out tenth of the
training set chooses one; the validation set has no say. The same command resumes where it stopped.
model.safetensors is the classifier with the chosen head.
"""

if __name__ == "__main__":  # before torch is imported, which takes seconds
    from engine.start import read_lincls, start

    settings = start(read_lincls)

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from data.labels import LabelledSource, Subset, strata, stratified_choice, take_subset
from data.loader import Batch, LabelledDataset
from data.on_device import place_on_device
from data.transforms import CropAndFlip, PixelNormalizer
from engine.evaluation.classification import Evaluator, open_labelled_data
from engine.evaluation.from_weights import build_frozen
from engine.evaluation.objective import build_objective
from engine.evaluation.probe import (
    build_probe_optimizer,
    choose_probe,
    mean_of_finite,
    probe_loss,
    probe_step,
)
from engine.loop import train
from engine.parallel import compile_features, spread_model
from engine.run.batches import train_batches
from engine.run.checkpoint import save_weights, weights_path
from engine.run.folder import open_run
from engine.run.job import Job, begin
from engine.run.records import read_results, without_nan
from engine.run.saving import Saver
from engine.start import read_lincls
from models.heads.probe import LinearProbes
from models.vit import VisionTransformer
from util.dist import from_main
from util.errors import run_cli
from util.rng import HEAD, generator
from util.settings.evaluation import MAIN_METRIC, LinclsConfig

HELD_OUT = 0.1  # share of the training set that chooses among several learning rates


def main(argv: Sequence[str] | None = None, cfg: LinclsConfig | None = None) -> dict[str, object]:
    """Trains linear classifiers, or goes on with a run; returns what it writes to results.json.
    `cfg` are settings that have been read already."""
    cfg = cfg or read_lincls(argv)
    assert cfg.finetune is not None, "the config checks that there are weights"
    with open_run(cfg) as run:
        data = open_labelled_data(cfg, run)
        splits = split_training_set(take_subset(data.train, cfg.subset, cfg.seed), cfg)
        source, val, *held_out = place_on_device(
            cfg, run.processes, splits[0], data.val, *splits[1:]
        )
        backbone, sha256 = from_main(
            partial(build_frozen, cfg, cfg.finetune, len(data.class_names))
        )
        spread_model(backbone, run.device)
        compile_features(backbone, cfg)
        objective = build_objective(cfg, data.class_names, source.labels, run.device)
        evaluators = {
            name: Evaluator(cfg, run, images, objective)
            for name, images in zip(("val", "held_out"), (val, *held_out), strict=False)
        }

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
            weights=sha256,
            may_diverge=len(cfg.lr) > 1,
            scale_loss=False,
        )
        if job.is_finished:
            return read_results(run.results_path)

        augment = CropAndFlip(cfg.img_size, cfg.crop_min, cfg.interpolation, cfg.hflip)
        batches = train_batches(
            cfg, run, job.plan, LabelledDataset(source, augment, cfg.seed), job.state.step
        )
        normalize = PixelNormalizer(cfg.mean, cfg.std, run.device)

        def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            with torch.no_grad():
                features = backbone.forward_features(normalize(batch.images))  # (B, D)
            targets = batch.targets.to(run.device, non_blocking=True)
            losses = probe_loss(model(features), targets, objective.losses)  # (H,)
            return losses.sum(), {"loss": mean_of_finite(losses.detach())}

        with Saver(job) as saver:
            for epoch in train(job, batches, loss_fn, saver, partial(probe_step, probes)):
                if epoch % cfg.eval_epochs == 0 and job.state.step < job.plan.stop_step:
                    evaluate_epoch(job, epoch, backbone, evaluators, cfg.lr)
        chosen, results = evaluate_epoch(job, job.epochs_done, backbone, evaluators, cfg.lr)
        if run.processes.is_main:
            head = objective.head_in_unit(*probes.folded(chosen))
            backbone.load_state_dict(head, strict=False)
            save_weights(
                weights_path(run.output_dir), backbone, job.identity, None, **objective.header()
            )
        return run.finish(
            {
                "protocol": "linear classification",
                "checkpoint": cfg.finetune,
                "sha256": sha256,
                "dataset": cfg.dataset,
                "num_train": len(source),
                **results,
            }
        )


def split_training_set(source: LabelledSource, cfg: LinclsConfig) -> tuple[LabelledSource, ...]:
    """The images that probes train on, and for several probes those that choose among them: a
    stratified tenth, held out by seed."""
    if len(cfg.lr) == 1:
        return (source,)
    count = max(1, round(HELD_OUT * len(source)))
    held_out = stratified_choice(strata(source.labels), count, cfg.seed)
    return Subset(source, np.setdiff1d(np.arange(len(source)), held_out)), Subset(source, held_out)


def evaluate_epoch(
    job: Job,
    epoch: int,
    backbone: VisionTransformer,
    evaluators: dict[str, Evaluator],
    lrs: tuple[float, ...],
) -> tuple[int, dict[str, object]]:
    """Evaluates every probe on every split after `epoch` epochs; records the figures of the one
    that would be chosen now, by the objective's main metric.

    Returns: its place, and its results on the validation set, with the main metric of all probes as
    a curve over the learning rates.
    """
    probes = job.state.model.eval()
    scores = {
        split: evaluator(lambda images: probes(backbone.forward_features(images)), len(lrs))
        for split, evaluator in evaluators.items()
    }
    probes.train()
    held_out = scores.get("held_out", [])
    metric = MAIN_METRIC[evaluators["val"].objective.name]
    chosen = choose_probe(held_out or scores["val"], metric)
    curve = [
        {f"{split}_{metric}": of_split[probe].scalars[metric] for split, of_split in scores.items()}
        for probe in range(len(lrs))
    ]
    best = scores["val"][chosen]
    figures = {f"val_{name}": value for name, value in best.scalars.items()}
    values = {"epoch": float(epoch), "val_loss": best.loss, **figures, **curve[chosen]}
    said = "  ".join(f"{split} {found[chosen].text(metric)}" for split, found in scores.items())
    job.run.records.write(
        "val", job.state.step, values, f"epoch {epoch} lr {lrs[chosen]:g}  {said}"
    )
    return chosen, {
        **best.as_dict(evaluators["val"].class_names),
        "lr": lrs[chosen],
        "num_held_out": held_out[0].num_samples if held_out else 0,
        "curve": [{"lr": lr, **without_nan(point)} for lr, point in zip(lrs, curve, strict=True)],
    }


if __name__ == "__main__":
    run_cli(lambda: main(cfg=settings))
