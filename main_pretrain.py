"""Masked-autoencoder pretraining (arXiv 2111.06377).

    sh run_pretrain.sh --config cfgs/pretrain/Vit-S_100E_GAP.yaml --data_path /path/to/train/data

One process needs no launcher: python main_pretrain.py --config ... The same command resumes where
it stopped. --init starts from weights in place of random ones.
"""

if __name__ == "__main__":  # before torch is imported, which takes seconds
    from engine.start import read_pretrain, start

    settings = start(read_pretrain)

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from data.images import pixel_format
from data.loader import Batch, PretrainDataset
from data.on_device import place_on_device
from data.sources import build_pretrain_source
from data.transforms import PixelNormalizer, pretrain_transform
from engine.loop import train
from engine.optim import build_adamw, build_muon, param_groups
from engine.parallel import unsharded_model
from engine.pictures.monitor import Monitor
from engine.run.batches import train_batches
from engine.run.checkpoint import save_weights, weights_path
from engine.run.folder import open_run
from engine.run.initial import build_pretrained
from engine.run.job import Job, begin
from engine.run.saving import Saver
from engine.start import read_pretrain
from models.build import build_model, mae_spec
from models.mae import MaskedAutoencoder
from models.masks import draw_orders
from util.dist import broadcast, first_process_first, from_main
from util.errors import run_cli
from util.settings.pretrain import PretrainConfig

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, cfg: PretrainConfig | None = None) -> dict[str, object]:
    """Pretrains, or goes on with a run; returns `step`, `loss` (mean of the last epoch) and
    `epoch_losses`. `cfg` are settings that have been read already."""
    cfg = cfg or read_pretrain(argv)
    with open_run(cfg) as run:
        # not the settings themselves: paths and loader processes may differ between machines
        follow, initial, sha256 = from_main(partial(build_pretrained, cfg, run.output_dir))
        cfg = cfg.model_copy(update=follow)
        with first_process_first(run.processes) if cfg.download else nullcontext():
            source = build_pretrain_source(
                cfg.dataset, cfg.data_path, pixel_format(cfg, cfg.in_chans), cfg.download
            )
        (source,) = place_on_device(cfg, run.processes, source)
        spec = mae_spec(cfg)

        def build() -> MaskedAutoencoder:
            if initial is not None:
                return initial
            torch.manual_seed(cfg.seed)
            return build_model(spec)

        def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
            build_it = build_muon if cfg.optimizer == "muon" else build_adamw
            return build_it(param_groups(model, cfg.weight_decay), cfg.beta1, cfg.beta2)

        job = begin(
            run,
            cfg,
            source,
            spec,
            build,
            build_optimizer,
            weights_path(run.output_dir),
            weights=sha256,
        )
        if job.is_finished:
            return finish(job, {})

        dataset = PretrainDataset(
            source=source,
            transform=pretrain_transform(cfg, cfg.img_size),
            draw_orders=partial(
                draw_orders, cfg.mask, spec.grid_size, spec.mask_ratio, cfg.mask_block
            ),
            shared_mask=cfg.shared_mask,
            seed=cfg.seed,
            aug_repeats=cfg.aug_repeats,
        )
        batches = train_batches(cfg, run, job.plan, dataset, job.state.step)
        normalize = PixelNormalizer(cfg.mean, cfg.std, run.device)

        def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            images = normalize(batch.images)  # (B, C, H, W) float
            ids_shuffle = batch.targets.to(run.device, non_blocking=True)  # (B, N)
            return model(images, ids_shuffle, cfg.visible_weight), {}

        model = job.state.model
        assert isinstance(model, MaskedAutoencoder)
        monitor = Monitor(cfg, run, job.plan, model, dataset)
        with Saver(job) as saver:
            if job.state.step == 0:
                monitor.observe(job.state)
            for _ in train(job, batches, loss_fn, saver):
                monitor.observe(job.state)
        return finish(job, monitor.figures)


def finish(job: Job, figures: dict[str, float]) -> dict[str, object]:
    """Writes the weights for others to use unless they are there, and returns what `main`
    returns; `figures` are the last ones of the monitor."""
    run, state = job.run, job.state
    path = weights_path(run.output_dir)
    if broadcast(not path.exists()):
        model = unsharded_model(
            state.model, torch.device("cpu" if run.processes.is_main else "meta")
        )
        if run.processes.is_main:
            logger.info("wrote %s", save_weights(path, model, job.identity))
    last = {"loss": state.epoch_losses[-1], **figures}
    run.records.write_settings({f"final/{name}": value for name, value in last.items()})
    return {
        "step": state.step,
        "loss": state.epoch_losses[-1],
        "epoch_losses": list(state.epoch_losses),
    }


if __name__ == "__main__":
    run_cli(lambda: main(cfg=settings))
