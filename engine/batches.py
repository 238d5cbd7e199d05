"""The loaders of a run: its training batches from any step on, and every image of a source once."""

from typing import Any

from torch.utils.data import DataLoader

from data.evaluation import build_eval_loader
from data.labelled import LabelledSource
from data.loaders import LabelledDataset, PretrainDataset, build_train_loader, loader_settings
from data.packed import PackedSource
from data.sampler import StepSampler
from data.transforms import EvalTransform
from engine.run import Run
from engine.schedule import Plan


def train_batches(
    cfg: Any, run: Run, plan: Plan, dataset: PretrainDataset | LabelledDataset, start_step: int
) -> DataLoader[Any]:
    """This process's micro-batches from optimiser step `start_step` to the plan's end."""
    source = dataset.source
    if isinstance(source, PackedSource):
        source.reads_ahead = True
    sampler = StepSampler(
        len(dataset), cfg.batch_size, plan.accum_iter, run.processes.rank, run.processes.world_size, cfg.seed,
        start_step, plan.stop_step, getattr(source, "block_size", 1),
    )  # fmt: skip
    return build_train_loader(dataset, sampler, loader_settings(cfg, run.processes))


def eval_batches(cfg: Any, run: Run, source: LabelledSource, crop_pct: float | None) -> DataLoader[Any]:
    """This process's share of `source`, through the evaluation transform; `crop_pct` as `EvalTransform` takes it."""
    return build_eval_loader(
        source, EvalTransform(cfg.img_size, crop_pct), cfg.batch_size, run.processes.rank,
        run.processes.world_size, loader_settings(cfg, run.processes),
    )  # fmt: skip
