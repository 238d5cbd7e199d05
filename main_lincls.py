r"""Linear classification on frozen features (paper, section 4 and appendix A.1), of images or of
their patches for segmentation, with one or many learning rates at once: by linear layers, or by
attentive probes (arXiv 2506.10178).

    sh run_lincls.sh --config cfgs/lincls/ViT-S_SGD_GAP.yaml --data_path /path/to/data \
        --finetune /path/to/weights

--finetune random evaluates an untrained model. Of several learning rates a held-out tenth of the
training set chooses one; the validation set has no say. The same command resumes where it stopped.
model.safetensors is the classifier with the chosen head. --optimizer lbfgs fits a logistic
regression to features that are computed once, in minutes.
"""

if __name__ == "__main__":  # before torch is imported, which takes seconds
    from engine.start import read_lincls, start

    settings = start(read_lincls)

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from data.loader import Batch
from engine.evaluation.classification import keep_predictions
from engine.evaluation.probe import (
    build_probe_optimizer,
    build_probes,
    choose_probe,
    mean_of_finite,
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
from engine.tasks.linear import LinearImages, LinearTask, open_linear_task
from engine.tasks.linear_fit import fit_on_features, without_schedule
from util.dist import from_main
from util.errors import run_cli
from util.settings.evaluation import MAIN_METRIC, LinclsConfig


def main(argv: Sequence[str] | None = None, cfg: LinclsConfig | None = None) -> dict[str, object]:
    """Trains linear classifiers, or goes on with a run; returns what it writes to results.json.
    `cfg` are settings that have been read already."""
    cfg = without_schedule(cfg or read_lincls(argv))
    with open_run(cfg) as run:
        task = open_linear_task(cfg, run)
        frozen, sha256 = from_main(task.build)
        spread_model(frozen, run.device)
        compile_features(frozen, cfg)
        probes = build_probes(cfg, frozen.spec, len(task.all_names))
        job = begin(
            run,
            without_schedule(cfg, len(task.train) // run.processes.world_size),
            task.train,
            frozen.spec,
            lambda: probes,
            lambda _: build_probe_optimizer(probes, cfg),
            run.results_path,
            weights=sha256,
            may_diverge=len(cfg.lr) > 1,
            scale_loss=False,
        )
        if job.is_finished:
            return read_results(run.results_path)

        fitted: dict[str, object] = {}
        if cfg.optimizer == "lbfgs":
            assert isinstance(task, LinearImages), "the config checks the task"
            fitted = fit_on_features(cfg, run, task, frozen, probes)
            with Saver(job) as saver:
                job.state.step = job.plan.stop_step  # nothing is left to train
                saver.save()
        batches = train_batches(cfg, run, job.plan, task.samples(), job.state.step)

        def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            losses = task.losses(model, frozen, batch)  # (H,)
            return losses.sum(), {"loss": mean_of_finite(losses.detach())}

        with Saver(job) as saver:
            for epoch in train(job, batches, loss_fn, saver, partial(probe_step, probes)):
                if epoch % cfg.eval_epochs == 0 and job.state.step < job.plan.stop_step:
                    evaluate_epoch(job, epoch, task, frozen, cfg)
        chosen, results = evaluate_epoch(job, job.epochs_done, task, frozen, cfg)
        if fitted:
            del results["lr"]  # a fit has none
            results |= fitted
        if run.processes.is_main:
            head, header = task.weights(*probes.folded(chosen))
            frozen.load_state_dict(head | probes.pool_tensors(chosen), strict=False)
            save_weights(weights_path(run.output_dir), frozen, job.identity, None, **header)
        return run.finish(
            {
                "protocol": "logistic regression by L-BFGS"
                if fitted
                else f"{cfg.probe} classification" + " of patches" * (cfg.task == "segment"),
                "checkpoint": cfg.finetune,
                "sha256": sha256,
                "dataset": cfg.dataset,
                "num_train": len(task.train),
                **results,
            }
        )


def evaluate_epoch(
    job: Job, epoch: int, task: LinearTask, frozen: nn.Module, cfg: LinclsConfig
) -> tuple[int, dict[str, object]]:
    """Evaluates every probe on every split after `epoch` epochs; records the figures of the one
    that would be chosen now, by the main metric.

    Returns: its place, and its results on the validation set, with the main metric of all probes as
    a curve over the learning rates.
    """
    probes, lrs = job.state.model.eval(), cfg.lr
    scores = task.evaluate(probes, frozen)
    probes.train()
    held_out = scores.get("held_out", [])
    metric = MAIN_METRIC[cfg.purpose]
    chosen = choose_probe(held_out or scores["val"], metric)
    curve = [
        {f"{split}_{metric}": of_split[probe].scalars[metric] for split, of_split in scores.items()}
        for probe in range(len(lrs))
    ]
    best = scores["val"][chosen]
    if job.state.step == job.plan.stop_step:
        keep_predictions(task.evaluators["val"], best)
    figures = {f"val_{name}": value for name, value in best.scalars.items()}
    values = {"epoch": float(epoch), "val_loss": best.loss, **figures, **curve[chosen]}
    said = "  ".join(f"{split} {found[chosen].text(metric)}" for split, found in scores.items())
    rate = "" if cfg.optimizer == "lbfgs" else f" lr {lrs[chosen]:g}"
    job.run.records.write("val", job.state.step, values, f"epoch {epoch}{rate}  {said}")
    return chosen, {
        **best.as_dict(task.class_names),
        "lr": lrs[chosen],
        "num_held_out": held_out[0].num_samples if held_out else 0,
        "curve": [{"lr": lr, **without_nan(point)} for lr, point in zip(lrs, curve, strict=True)],
    }


if __name__ == "__main__":
    run_cli(lambda: main(cfg=settings))
