"""What makes a run the same one, and whether a command may go on with it."""

from data.sources import ImageSource
from engine.run.checkpoint import Checkpoint, RunIdentity
from engine.run.folder import TrainConfig
from models.spec import ModelSpec
from util.dist import all_gather
from util.errors import InputError
from util.settings.read import changed_settings, differences


def run_identity(
    cfg: TrainConfig, spec: ModelSpec, source: ImageSource, weights: str | None = None
) -> RunIdentity:
    """The identity of a run; `weights` is the sha256 of the file that `finetune` names."""
    return RunIdentity(
        config=cfg.model_dump(mode="json"),
        model_args=spec.as_dict(),
        mean=list(cfg.mean),
        std=list(cfg.std),
        data={"num_images": len(source), "fingerprint": source.fingerprint()},
        weights=weights,
    )


def check_resumable(cfg: TrainConfig, saved: Checkpoint | None, identity: RunIdentity) -> None:
    """Refuses to go on with a run under settings, images or weights that change its result. All
    processes must call.

    Raises: InputError that lists every difference as `name: old -> new`, or says in what the
    processes differ from each other.
    """
    seen = all_gather((None if saved is None else saved.step, identity.data, identity.weights))
    steps, data, weights = zip(*seen, strict=True)
    if len(set(steps)) > 1:
        raise InputError(
            f"the processes see different newest checkpoints {[*steps]}: "
            f"output_dir must be a shared folder"
        )
    if any(of_one != data[0] for of_one in data):
        counts = [of_one["num_images"] for of_one in data]
        raise InputError(
            f"the processes see different lists of images, of {counts}: "
            f"data_path must hold the same ones"
        )
    if len(set(weights)) > 1:
        raise InputError("the processes see different weights in the file that finetune names")
    if saved is None:
        return
    changes = differences(saved.model_args, identity.model_args)
    changes += changed_settings(saved.config, cfg, skip={"size", *identity.model_args})
    if saved.data != identity.data:
        old, new = saved.data["num_images"], identity.data["num_images"]
        changes.append(f"images: {old} -> {new}{' others' if old == new else ''}")
    if saved.weights != identity.weights:
        changes.append(f"finetune: weights of sha256 {saved.weights} -> {identity.weights}")
    if changes:
        raise InputError(
            f"{cfg.output_dir} holds a run with other settings (old -> new):\n  "
            + "\n  ".join(changes)
            + "\nPut them back, or start a new run with another --output_dir.",
            settings=tuple(change.split(":")[0] for change in changes),
        )
