"""The batches of an evaluation of segmentation or detection."""

from collections.abc import Callable

from torch import Tensor

from data.annotated import AnnotatedSource, EvalImages, build_annotated_eval_loader
from data.loader import loader_maker
from engine.run.batches import Batches
from engine.run.folder import Run, TrainConfig
from util.settings.evaluation import KnnConfig


def annotated_eval_batches(
    cfg: TrainConfig | KnnConfig,
    run: Run,
    source: AnnotatedSource,
    transform: Callable[[Tensor], Tensor],
    with_targets: bool,
) -> Batches:
    """This process's share of `source` as lists of `EvalSample`, through one of the transforms for
    evaluation of `data/joint.py`; `with_targets` as `EvalImages` takes it."""
    loader = build_annotated_eval_loader(
        EvalImages(source, transform, with_targets),
        cfg.batch_size,
        run.processes.rank,
        run.processes.world_size,
        loader_maker(cfg, run.processes),
    )
    return Batches(loader, cfg.timeout)
