"""Masked-autoencoder pretraining (arXiv 2111.06377).

    sh run_pretrain.sh --config cfgs/pretrain/Vit-S_100E_GAP.yaml --data_path /path/to/train/data

One process needs no launcher: python main_pretrain.py --config ... The same command resumes where
it stopped.
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from data.loader import PretrainBatch, PretrainDataset
from data.sources import build_pretrain_source
from data.transforms import PixelNormalizer, pretrain_transform
from engine.loop import log_start, prepare_model, train
from engine.optim import build_adamw, optimizer_step, param_groups
from engine.parallel import whole_model
from engine.pictures.monitor import Monitor
from engine.run.batches import train_batches
from engine.run.checkpoint import load_newest_checkpoint, save_weights, weights_path
from engine.run.faults import BadSamples
from engine.run.folder import Run, open_run
from engine.run.resume import plan_resumable, run_facts
from engine.run.saving import Saver
from engine.run.state import TrainState
from models.build import build_model, mae_config_problems, mae_spec
from models.masks import training_order
from util.dist import autocast_dtype, broadcast, first_process_first
from util.errors import run_cli
from util.settings.evaluation import STAGE_CONFIGS
from util.settings.pretrain import PretrainConfig
from util.settings.read import load_config

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Pretrains, or goes on with a run; returns `step`, `loss` (mean of the last epoch) and
    `epoch_losses`."""
    cfg = load_config(
        PretrainConfig, "pretrain", argv, checks=[mae_config_problems], siblings=STAGE_CONFIGS
    )
    with open_run(cfg) as run:
        with first_process_first(run.processes) if cfg.download else nullcontext():
            source = build_pretrain_source(cfg.dataset, cfg.data_path, cfg.in_chans, cfg.download)
        spec = mae_spec(cfg)
        saved = load_newest_checkpoint(run.output_dir)
        facts = run_facts(cfg, spec, source)
        plan = plan_resumable(cfg, run, len(source), saved, facts)

        torch.manual_seed(cfg.seed)
        model = prepare_model(build_model(spec), cfg, run)
        optimizer = build_adamw(param_groups(model, cfg.weight_decay), cfg.beta1, cfg.beta2)
        state = TrainState.begin(
            model, optimizer, run.device, autocast_dtype(cfg.precision, run.device)
        )
        if state.resume(saved, run, plan.stop_step) and weights_path(run.output_dir).exists():
            return finish(run, state, facts)
        del saved  # as large as the state itself
        run.start(cfg, state.step, plan.stop_step, state.owes_look)
        log_start(run, plan, len(source), model, cfg)

        dataset = PretrainDataset(
            source=source,
            transform=pretrain_transform(cfg.img_size, cfg.crop_min, cfg.interpolation, cfg.hflip),
            draw_order=partial(training_order, spec.num_patches),
            shared_mask=cfg.shared_mask,
            seed=cfg.seed,
            aug_repeats=cfg.aug_repeats,
        )
        loader = train_batches(cfg, run, plan, dataset, state.step)
        normalize = PixelNormalizer(cfg.mean, cfg.std, run.device)

        def loss_fn(model: nn.Module, batch: PretrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
            images = normalize(batch.images)  # (B, C, H, W) float
            return model(images, batch.ids_shuffle.to(run.device, non_blocking=True)), {}

        bad_samples = BadSamples(
            run.output_dir / "bad_samples.jsonl", len(source), run.processes.is_main
        )
        step_fn = partial(optimizer_step, clip_grad=cfg.clip_grad)
        monitor = Monitor.begin(cfg, run, plan, model, source)
        if state.step == 0:
            monitor.observe(state)
        with Saver(run, cfg, facts, state, plan) as saver:
            for _ in train(run, cfg, plan, state, loader, loss_fn, step_fn, saver, bad_samples):
                monitor.observe(state)
        return finish(run, state, facts, monitor.figures)


def finish(
    run: Run, state: TrainState, facts: dict[str, Any], figures: dict[str, float] | None = None
) -> dict[str, Any]:
    """Writes the weights for others to use unless they are there, and returns what `main`
    returns."""
    if broadcast(not weights_path(run.output_dir).exists()):
        model = whole_model(state.model, torch.device("cpu"), keep=run.processes.is_main)
        if run.processes.is_main:
            logger.info("wrote %s", save_weights(weights_path(run.output_dir), model, facts))
    last = {"loss": state.epoch_losses[-1], **(figures or {})}
    run.record_settings({f"final/{name}": value for name, value in last.items()})
    return {
        "step": state.step,
        "loss": state.epoch_losses[-1],
        "epoch_losses": list(state.epoch_losses),
    }


if __name__ == "__main__":
    run_cli(main)
