"""What a checkpoint records beside the training state, and whether a run may go on with it."""

from typing import Any

from data.sources import ImageSource
from engine.run.folder import Run
from engine.schedule import Plan, choose_accum_iter, plan_run
from models.spec import ModelSpec
from util.dist import all_gather
from util.errors import InputError
from util.settings.read import changed_settings, differences


def run_facts(
    cfg: Any, spec: ModelSpec, source: ImageSource, weights: str | None = None
) -> dict[str, Any]:
    """The constant entries of a run's checkpoints: `weights` is the sha256 of what `finetune`
    names."""
    facts = {
        "config": cfg.model_dump(mode="json"),
        "model_args": spec.as_dict(),
        "mean": list(cfg.mean),
        "std": list(cfg.std),
        "data": {"num_images": len(source), "fingerprint": source.fingerprint()},
    }
    return facts if weights is None else {**facts, "weights": weights}


def plan_resumable(
    cfg: Any, run: Run, num_images: int, saved: dict[str, Any] | None, facts: dict[str, Any]
) -> Plan:
    """The plan of a run, new or gone on with from the checkpoint `saved`. Raises: InputError, see
    below."""
    check_resumable(cfg, saved, facts)
    world_size = run.processes.world_size
    return plan_run(cfg, num_images, world_size, choose_accum_iter(cfg, world_size, saved))


def check_resumable(cfg: Any, saved: dict[str, Any] | None, facts: dict[str, Any]) -> None:
    """Refuses to go on with a run under settings, images or weights that change its result.

    Raises: InputError listing every difference as `name: old -> new`.
    """
    seen = all_gather(
        (None if saved is None else saved["step"], facts["data"], facts.get("weights"))
    )
    steps, lists, weights = zip(*seen, strict=True)
    if len(set(steps)) > 1:
        raise InputError(
            f"the processes see different newest checkpoints {[*steps]}: output_dir must be a shared folder"
        )
    if any(of_one != lists[0] for of_one in lists):
        counts = [of_one["num_images"] for of_one in lists]
        raise InputError(
            f"the processes see different lists of images, of {counts}: data_path must hold the same ones"
        )
    if len(set(weights)) > 1:
        raise InputError("the processes see different weights in the file that finetune names")
    if saved is None:
        return
    new_args = facts["model_args"]
    changes = differences(saved["model_args"], new_args)
    changes += changed_settings(saved["config"], cfg, skip={"size", *new_args})
    if saved["data"] != facts["data"]:
        old, new = saved["data"]["num_images"], facts["data"]["num_images"]
        changes.append(
            f"images: a list of {old} -> {'another list of ' if old == new else ''}{new}"
        )
    if saved.get("weights") != facts.get("weights"):
        changes.append(
            f"finetune: weights of sha256 {saved.get('weights')} -> {facts.get('weights')}"
        )
    if changes:
        raise InputError(
            f"{cfg.output_dir} holds a run with other settings (old -> new):\n  "
            + "\n  ".join(changes)
            + "\n"
            "Put them back, or start a new run with another --output_dir."
        )
