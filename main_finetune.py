r"""End-to-end fine-tuning of a pretrained encoder, or training from scratch (paper, section 4 and
table 9), for one of three tasks: classification, segmentation or detection.

    sh run_finetune.sh --config cfgs/finetune/ViT-S_50E_GAP.yaml --data_path /path/to/data \
        --finetune /path/to/weights

Without --finetune it trains from scratch; with --eval it only evaluates the model that
--finetune names. The same command resumes where it stopped. A run leaves results.json,
best.safetensors and model.safetensors.
"""

if __name__ == "__main__":  # before torch is imported, which takes seconds
    from engine.start import read_finetune, start

    settings = start(read_finetune)

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from data.loader import Batch
from engine.evaluation.best import read_best
from engine.evaluation.classification import keep_predictions, said_alone
from engine.evaluation.metrics import merit
from engine.loop import train
from engine.optim import build_adamw, param_groups
from engine.parallel import spread_model, unsharded_model
from engine.pictures.predictions import write_predictions
from engine.run.batches import train_batches
from engine.run.checkpoint import best_path, save_weights, weights_path
from engine.run.folder import open_run
from engine.run.job import Job, begin
from engine.run.records import read_results
from engine.run.saving import Saver
from engine.start import read_finetune
from engine.tasks.task import Task, open_task
from util.dist import from_main
from util.errors import run_cli
from util.rng import BATCH, derive_seed, seed_libraries
from util.settings.evaluation import MAIN_METRIC, FinetuneConfig

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, cfg: FinetuneConfig | None = None) -> dict[str, object]:
    """Fine-tunes, goes on with a run, or evaluates; returns what it writes to results.json
    (eval.json for --eval). `cfg` are settings that have been read already."""
    cfg = cfg or read_finetune(argv)
    with open_run(cfg) as run:
        task = open_task(cfg, run)
        model, sha256 = from_main(task.build)
        origin = {"checkpoint": cfg.finetune, "sha256": sha256, "dataset": cfg.dataset}
        if cfg.eval:
            run.records.track(cfg)
            scores = task.evaluate(spread_model(model, run.device).eval())
            shown = ("acc1",) if "acc1" in scores.scalars else scores.shown
            keep_predictions(task.evaluator, scores)
            logger.info("%s: %d images, %s", cfg.finetune, scores.num_samples, scores.text(*shown))
            return run.finish(
                {"protocol": "evaluation", **origin, **scores.as_dict(task.class_names)},
                run.output_dir / "eval.json",
            )

        def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
            return build_adamw(
                param_groups(model, cfg.weight_decay, cfg.layer_decay), cfg.beta1, cfg.beta2
            )

        job = begin(
            run,
            cfg,
            task.train,
            model.spec,
            lambda: model,
            build_optimizer,
            run.results_path,
            weights=sha256,
        )
        if job.is_finished:
            return read_results(run.results_path)
        if job.state.step:
            # a damaged file is found before training
            from_main(lambda: read_best(run.output_dir, best_metric(cfg)))

        batches = train_batches(cfg, run, job.plan, task.samples(), job.state.step)

        def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            # Mixing, erasing and drop path are pure functions of the seed and the batch's place.
            first = batch.keys[0]
            seed_libraries(derive_seed(cfg.seed, BATCH, first.epoch, first.position))
            return task.loss(model, batch), {}

        with Saver(job) as saver:
            for epoch in train(job, batches, loss_fn, saver):
                if epoch % cfg.eval_epochs == 0 and job.state.step < job.plan.stop_step:
                    evaluate_epoch(job, epoch, task, best_metric(cfg))
        results, best = evaluate_epoch(job, job.epochs_done, task, best_metric(cfg))
        trained = unsharded_model(
            job.state.model, torch.device("cpu" if run.processes.is_main else "meta")
        )
        if run.processes.is_main:
            tensors, header = task.weights(trained)
            save_weights(weights_path(run.output_dir), trained, job.identity, tensors, **header)
        return run.finish(
            {
                "protocol": "fine-tuning" if cfg.finetune else "from scratch",
                **origin,
                **results,
                "num_train": len(task.train),
                f"best_{best_metric(cfg)}": best[0] if best[1] else None,
                "best_epoch": best[1],
            }
        )


def best_metric(cfg: FinetuneConfig) -> str:
    """The figure that decides which weights are the best."""
    return cfg.best_metric or MAIN_METRIC[cfg.purpose]


def evaluate_epoch(
    job: Job, epoch: int, task: Task, metric: str
) -> tuple[dict[str, object], tuple[float, int]]:
    """Evaluates the model after `epoch` epochs and, if there is one, its moving average, whose
    `metric` then decides which weights are the best; of equals the first stay.

    Records the figures and keeps the best weights. Returns: the scores for results.json, and
    metric and epoch of the best evaluation so far. Draws what the model says, too.
    """
    run, state = job.run, job.state
    trained = model = unsharded_model(state.model, run.device)
    scores = task.evaluate(model.eval())
    values = {"epoch": float(epoch), **scores.logged}
    line = f"epoch {epoch} {scores.text(*scores.shown, *{metric}.difference(scores.shown))}"
    results = scores.as_dict(task.class_names)
    if state.step == job.plan.stop_step:
        keep_predictions(task.evaluator, scores)
    if state.ema is not None:
        model = state.ema.module
        scores = task.evaluate(model)
        values[f"ema_{metric}"] = scores.scalars[metric]
        results["ema"] = scores.as_dict(task.class_names)
        line += f"  moving average {scores.text(metric)}"
    best = from_main(lambda: read_best(run.output_dir, metric))
    is_best = merit(metric, scores.scalars[metric]) > merit(metric, best[0])
    value, at_epoch = (scores.scalars[metric], epoch) if is_best else best
    line += f"  best {said_alone(metric, value)} after epoch {at_epoch}"
    if run.processes.is_main:
        write_predictions(run.records, task, model, scores, state.step)
    trained.train()
    # First the record: best.safetensors without one would be taken for somebody else's.
    run.records.write("val", state.step, values, line)
    if is_best and run.processes.is_main:
        tensors, header = task.weights(model)
        header |= {metric: value, "epoch": epoch}
        save_weights(best_path(run.output_dir), model, job.identity, tensors, **header)
    return results, (value, at_epoch)


if __name__ == "__main__":
    run_cli(lambda: main(cfg=settings))
