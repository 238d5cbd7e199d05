r"""End-to-end fine-tuning of a pretrained encoder, or training from scratch (paper, section 4 and
table 9).

    sh run_finetune.sh --config cfgs/finetune/ViT-S_50E_GAP.yaml --data_path /path/to/data \
        --finetune /path/to/weights

Without --finetune it trains from scratch; with --eval it only evaluates the classifier that
--finetune names. The same command resumes where it stopped. A run leaves results.json,
best.safetensors and model.safetensors.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data.labels import take_subset
from data.loader import Batch, LabelledDataset
from data.transforms import PixelNormalizer, finetune_transform
from engine.evaluation.best import Best
from engine.evaluation.classification import Evaluator, open_labelled_data
from engine.evaluation.from_weights import build_finetuned
from engine.loop import train
from engine.mixing import BatchMixer
from engine.optim import build_adamw, param_groups
from engine.parallel import unsharded_model
from engine.run.batches import train_batches
from engine.run.checkpoint import save_weights, weights_path
from engine.run.folder import open_run
from engine.run.job import Job, begin
from engine.run.results import read_results
from engine.run.saving import Saver
from models.build import classifier_config_problems
from util.errors import run_cli
from util.rng import BATCH, derive_seed, seed_libraries
from util.settings.evaluation import STAGE_CONFIGS, FinetuneConfig
from util.settings.read import load_config

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Fine-tunes, goes on with a run, or evaluates; returns what it writes to results.json
    (eval.json for --eval)."""
    checks = [classifier_config_problems]
    cfg = load_config(FinetuneConfig, "finetune", argv, checks=checks, siblings=STAGE_CONFIGS)
    with open_run(cfg) as run:
        data = open_labelled_data(cfg, run)
        source = take_subset(data.train, cfg.subset, cfg.seed)
        classifier = build_finetuned(cfg, len(data.class_names))
        model = classifier.model
        evaluator = Evaluator(cfg, run, data.val, data.class_names)
        origin = {"checkpoint": cfg.finetune, "sha256": classifier.sha256, "dataset": cfg.dataset}
        if cfg.eval:
            (scores,) = evaluator(model.to(run.device).eval())
            logger.info(
                "%s: %d images, top-1 %.2f %%", cfg.finetune, scores.num_samples, scores.acc1
            )
            results = {"protocol": "evaluation", **origin, **scores.as_dict(evaluator.class_names)}
            return run.finish(results, run.output_dir / "eval.json")

        def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
            groups = param_groups(model, cfg.weight_decay, cfg.layer_decay)
            return build_adamw(groups, cfg.beta1, cfg.beta2)

        job = begin(
            run,
            cfg,
            source,
            model.spec,
            lambda: model,
            build_optimizer,
            run.results_path,
            weights=classifier.sha256,
        )
        if job.is_finished:
            return read_results(run.results_path)

        dataset = LabelledDataset(source, finetune_transform(cfg), cfg.seed)
        batches = train_batches(cfg, run, job.plan, dataset, job.state.step)
        normalize = PixelNormalizer(cfg.mean, cfg.std, run.device)
        mixer = BatchMixer(cfg, len(data.class_names), run.device)

        def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            # Mixing, erasing and drop path are pure functions of the seed and the batch's place.
            first = batch.keys[0]
            seed_libraries(derive_seed(cfg.seed, BATCH, first.epoch, first.position))
            labels = batch.targets.to(run.device, non_blocking=True)
            images, targets = mixer(normalize(batch.images), labels)
            return mixer.loss(model(images), targets), {}

        is_main, resumed = run.processes.is_main, job.state.step > 0
        best = Best(run.output_dir, job.identity, is_main, resumed)
        with Saver(job) as saver:
            for epoch in train(job, batches, loss_fn, saver):
                if epoch % cfg.eval_epochs == 0 and job.state.step < job.plan.stop_step:
                    evaluate_epoch(job, epoch, evaluator, best)
        final = evaluate_epoch(job, job.epochs_done, evaluator, best)
        trained = unsharded_model(job.state.model, torch.device("cpu"), keep=is_main)
        if is_main:
            save_weights(weights_path(run.output_dir), trained, job.identity)
        results = {"protocol": "fine-tuning" if cfg.finetune else "from scratch", **origin, **final}
        return run.finish(
            {**results, "num_train": len(source), "best_acc1": best.acc1, "best_epoch": best.epoch}
        )


def evaluate_epoch(job: Job, epoch: int, evaluator: Evaluator, best: Best) -> dict[str, Any]:
    """Evaluates the model after `epoch` epochs and, if there is one, its moving average, whose
    accuracy then decides which weights are the best.

    Records the accuracies, keeps the best weights, and returns the scores for results.json.
    """
    state = job.state
    model = unsharded_model(state.model, job.run.device)
    (scores,) = evaluator(model.eval())
    model.train()
    values = {"epoch": float(epoch), "val_loss": scores.loss, "acc1": scores.acc1}
    line = f"epoch {epoch} top-1 {scores.acc1:.2f} %  top-5 {scores.acc5:.2f} %"
    results = scores.as_dict(evaluator.class_names)
    if state.ema is not None:
        model = state.ema.module
        (scores,) = evaluator(model)
        values["ema_acc1"] = scores.acc1
        results["ema"] = scores.as_dict(evaluator.class_names)
        line += f"  moving average top-1 {scores.acc1:.2f} %"
    is_best = scores.acc1 > best.acc1
    acc1, at_epoch = (scores.acc1, epoch) if is_best else (best.acc1, best.epoch)
    line += f"  best {acc1:.2f} % after epoch {at_epoch}"
    # First the record: best.safetensors without one would be taken for somebody else's.
    job.run.records.write("val", state.step, values, line)
    best.offer(model, epoch, scores.acc1)
    return results


if __name__ == "__main__":
    run_cli(main)
