"""Masked-autoencoder pretraining (arXiv 2111.06377).

    sh run_pretrain.sh --config cfgs/pretrain/Vit-S_100E_GAP.yaml --data_path /path/to/train/data

One process needs no launcher: python main_pretrain.py --config ... The same command resumes where it stopped.
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from data.datasets import ImageSource, build_pretrain_source
from data.loaders import PretrainBatch, PretrainDataset, build_pretrain_loader, default_num_workers
from data.sampler import StepSampler
from data.transforms import PixelNormalizer, pretrain_transform
from engine.bad_samples import BadSamples
from engine.checkpoint import load_newest_checkpoint, save_weights, weights_path
from engine.loop import Saver, TrainState, train
from engine.optim import build_adamw, param_groups
from engine.run import Run, open_run
from engine.schedule import Plan, choose_accum_iter, plan_run
from models.build import build_mae, mae_config_problems, model_kwargs
from models.mae import MaskedAutoencoder
from util.config import changed_settings, differences, load_config, plain
from util.dist import all_gather, autocast_dtype, first_process_first
from util.errors import InputError, run_cli
from util.metrics import StepMeter
from util.schema import PretrainConfig

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Pretrains, or goes on with a run; returns `step`, `loss` (mean of the last epoch) and `epoch_losses`."""
    cfg = load_config(PretrainConfig, "pretrain", argv, checks=[mae_config_problems])
    with open_run(cfg) as run:
        with first_process_first(run.processes) if cfg.download else nullcontext():
            source = build_pretrain_source(cfg.dataset, cfg.data_path, cfg.in_chans, cfg.download)
        saved = load_newest_checkpoint(run.output_dir)
        facts = checkpoint_facts(cfg, source)
        check_resumable(cfg, saved, facts)
        accum_iter = choose_accum_iter(cfg, run.processes.world_size, saved)
        plan = plan_run(cfg, len(source), run.processes.world_size, accum_iter)

        torch.manual_seed(cfg.seed)
        model = build_mae(cfg).to(run.device)
        optimizer = build_adamw(param_groups(model, cfg.weight_decay), cfg.beta1, cfg.beta2)
        scaler = GradScaler(run.device.type, enabled=autocast_dtype(cfg.precision, run.device) == torch.float16)
        state = TrainState(model, optimizer, scaler, StepMeter(run.device), StepMeter(run.device))
        if saved is not None:
            state.restore(saved)
            if state.step >= plan.stop_step:
                logger.info("%s is already finished at step %d", run.output_dir, state.step)
                return finish(run, state, facts)
            logger.info("resuming %s at step %d", run.output_dir, state.step)
        run.start(cfg, state.step, plan.stop_step)
        log_start(cfg, run, plan, source, model)

        dataset = PretrainDataset(
            source,
            pretrain_transform(cfg.img_size, cfg.crop_min, cfg.interpolation, cfg.hflip),
            model.num_patches,
            cfg.shared_mask,
            cfg.seed,
        )
        sampler = StepSampler(
            len(source), cfg.batch_size, accum_iter, run.processes.rank, run.processes.world_size,
            cfg.seed, state.step, plan.stop_step,
        )  # fmt: skip
        workers = cfg.num_workers
        if workers is None:
            workers = default_num_workers(run.processes.local_world_size)
        loader = build_pretrain_loader(dataset, sampler, workers, cfg.prefetch_factor, run.device.type == "cuda")
        normalize = PixelNormalizer(cfg.mean, cfg.std, run.device)

        def loss_fn(model: nn.Module, batch: PretrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
            images = normalize(batch.images.to(run.device, non_blocking=True))  # (B, C, H, W) float
            return model(images, batch.ids_shuffle.to(run.device, non_blocking=True)), {}

        saver = Saver(run, cfg, facts)
        bad_samples = BadSamples(run.output_dir / "bad_samples.jsonl", len(source), run.processes.is_main)
        for _ in train(run, cfg, plan, state, loader, loss_fn, saver, bad_samples):
            pass
        return finish(run, state, facts)


def finish(run: Run, state: TrainState, facts: dict[str, Any]) -> dict[str, Any]:
    """Writes the weights for others to use unless they are there, and returns what `main` returns."""
    if run.processes.is_main and not weights_path(run.output_dir).exists():
        header = {name: facts[name] for name in ("model_args", "mean", "std")}
        logger.info("wrote %s", save_weights(run.output_dir, state.model.state_dict(), header))
    return {"step": state.step, "loss": state.epoch_losses[-1], "epoch_losses": list(state.epoch_losses)}


def checkpoint_facts(cfg: PretrainConfig, source: ImageSource) -> dict[str, Any]:
    """The constant entries of a run's checkpoints, beside the training state."""
    return {
        "config": plain(asdict(cfg)),
        "model_args": plain(model_kwargs(MaskedAutoencoder, cfg)),
        "mean": list(cfg.mean),
        "std": list(cfg.std),
        "data": {"num_images": len(source), "fingerprint": source.fingerprint()},
    }


def check_resumable(cfg: PretrainConfig, saved: dict[str, Any] | None, facts: dict[str, Any]) -> None:
    """Refuses to go on with a run under settings or images that change its result.

    Raises: InputError listing every difference as `name: old -> new`.
    """
    steps = all_gather(None if saved is None else saved["step"])
    if len(set(steps)) > 1:
        raise InputError(f"the processes see different newest checkpoints {steps}: output_dir must be a shared folder")
    if saved is None:
        return
    new_args = facts["model_args"]
    changes = differences(saved["model_args"], new_args)
    changes += changed_settings(saved["config"], cfg, skip={"size", *new_args})
    if saved["data"] != facts["data"]:
        old, new = saved["data"]["num_images"], facts["data"]["num_images"]
        changes.append(f"images: a list of {old} -> {'another list of ' if old == new else ''}{new}")
    if changes:
        raise InputError(
            f"{cfg.output_dir} holds a run with other settings (old -> new):\n  " + "\n  ".join(changes) + "\n"
            "Put them back, or start a new run with another --output_dir."
        )


def log_start(cfg: PretrainConfig, run: Run, plan: Plan, source: ImageSource, model: MaskedAutoencoder) -> None:
    """Says what is about to run."""
    dtype = autocast_dtype(cfg.precision, run.device)
    parameters = sum(p.numel() for p in model.parameters())
    logger.info(
        "%s: %d images, %.1f M parameters, %d processes on %s, %s",
        run.output_dir, len(source), parameters / 1e6, run.processes.world_size, run.device.type, dtype or "fp32",
    )  # fmt: skip
    logger.info(
        "total batch %d = %d x %d processes x %d accumulated; %d steps per epoch, %d in all; peak lr %.3g",
        plan.total_batch, cfg.batch_size, run.processes.world_size, plan.accum_iter, plan.steps_per_epoch,
        plan.stop_step, plan.peak_lr,
    )  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
