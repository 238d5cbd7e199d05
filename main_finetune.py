"""End-to-end fine-tuning of a pretrained encoder, or training from scratch (paper, section 4 and
table 9).

    sh run_finetune.sh --config cfgs/finetune/ViT-S_50E_GAP.yaml --data_path /path/to/data
    --finetune /path/to/weights

Without --finetune it trains from scratch; with --eval it only evaluates the classifier that
--finetune names. The same command resumes where it stopped. results.json, best.safetensors and
model.safetensors are what a run leaves.
"""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from data.labels import take_subset
from data.loader import LabelledBatch, LabelledDataset
from data.transforms import PixelNormalizer, finetune_transform
from engine.ema import build_ema
from engine.evaluation.best import Best
from engine.evaluation.classification import Evaluator, open_labelled_data
from engine.evaluation.from_weights import build_finetuned
from engine.loop import log_start, train
from engine.mixing import BatchMixer
from engine.optim import build_adamw, optimizer_step, param_groups
from engine.parallel import to_device, whole_model
from engine.run.batches import train_batches
from engine.run.checkpoint import load_newest_checkpoint, save_weights, weights_path
from engine.run.faults import BadSamples
from engine.run.folder import Run, open_run
from engine.run.results import read_results
from engine.run.resume import plan_resumable, run_facts
from engine.run.saving import Saver
from engine.run.state import TrainState
from models.build import classifier_config_problems
from util.dist import autocast_dtype
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

        saved = load_newest_checkpoint(run.output_dir)
        facts = run_facts(cfg, model.spec, source, classifier.sha256)
        plan = plan_resumable(cfg, run, len(source), saved, facts)
        to_device(model, cfg, run)
        optimizer = build_adamw(
            param_groups(model, cfg.weight_decay, cfg.layer_decay), cfg.beta1, cfg.beta2
        )
        ema = build_ema(model, cfg.ema_decay)
        state = TrainState.begin(
            model, optimizer, run.device, autocast_dtype(cfg.precision, run.device), ema
        )
        if state.resume(saved, run, plan.stop_step) and run.results_path.exists():
            return read_results(run.results_path)
        del saved  # as large as the state itself
        run.start(cfg, state.step, plan.stop_step, state.owes_look)
        log_start(run, plan, len(source), model, cfg)

        dataset = LabelledDataset(source, finetune_transform(cfg), cfg.seed)
        loader = train_batches(cfg, run, plan, dataset, state.step)
        normalize = PixelNormalizer(cfg.mean, cfg.std, run.device)
        mixer = BatchMixer(cfg, len(data.class_names), run.device)

        def loss_fn(model: nn.Module, batch: LabelledBatch) -> tuple[Tensor, dict[str, Tensor]]:
            first = batch.keys[
                0
            ]  # mixing, erasing and drop path are pure functions of (seed, place of the batch)
            seed_libraries(derive_seed(cfg.seed, BATCH, first.epoch, first.position))
            labels = batch.labels.to(run.device, non_blocking=True)
            images, targets = mixer(normalize(batch.images), labels)
            return mixer.loss(model(images), targets), {}

        best = Best(run, facts, resumed=state.step > 0)
        step_fn = partial(optimizer_step, clip_grad=cfg.clip_grad)
        bad_samples = BadSamples(
            run.output_dir / "bad_samples.jsonl", len(source), run.processes.is_main
        )
        with Saver(run, cfg, facts, state, plan) as saver:
            for epoch in train(run, cfg, plan, state, loader, loss_fn, step_fn, saver, bad_samples):
                if epoch % cfg.eval_epochs == 0 and state.step < plan.stop_step:
                    judge(run, state, epoch, evaluator, best)
        final = judge(run, state, state.step // plan.steps_per_epoch, evaluator, best)
        trained = whole_model(state.model, torch.device("cpu"), keep=run.processes.is_main)
        if run.processes.is_main:
            save_weights(weights_path(run.output_dir), trained, facts)
        results = {"protocol": "fine-tuning" if cfg.finetune else "from scratch", **origin, **final}
        return run.finish(
            {**results, "num_train": len(source), "best_acc1": best.acc1, "best_epoch": best.epoch}
        )


def judge(
    run: Run, state: TrainState, epoch: int, evaluator: Evaluator, best: Best
) -> dict[str, Any]:
    """Evaluates the model after `epoch` epochs, and its moving average where there is one, which
    then decides.

    Logs the accuracies, keeps the best weights, and returns them for results.json.
    """
    model = whole_model(state.model, run.device)
    (scores,) = evaluator(model.eval())
    model.train()
    facts = {
        "step": state.step,
        "epoch": float(epoch),
        "val_loss": scores.loss,
        "acc1": scores.acc1,
    }
    line = f"epoch {epoch} top-1 {scores.acc1:.2f} %  top-5 {scores.acc5:.2f} %"
    results = scores.as_dict(evaluator.class_names)
    if state.ema is not None:
        model = state.ema.module
        (scores,) = evaluator(model)
        facts["ema_acc1"] = scores.acc1
        results["ema"] = scores.as_dict(evaluator.class_names)
        line += f"  moving average top-1 {scores.acc1:.2f} %"
    best.offer(model, epoch, scores.acc1)
    run.record(facts, f"{line}  best {best.acc1:.2f} % after epoch {best.epoch}", to_terminal=True)
    return results


if __name__ == "__main__":
    run_cli(main)
