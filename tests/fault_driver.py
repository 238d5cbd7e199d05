"""Runs an entry script and harms it at an exact step: `fault_driver.py main_pretrain.py ARGUMENTS`.

FAULTS is a JSON list of {"do": what, "at": "step", "save" or "validation", "step": finished steps,
"rank": which process, ...}; each happens once, and not in a process that a launcher started again.
{"at": "loss" or "gradient", "count": number of steps, ...} makes that NaN or infinite.

What is observed goes into a file per process, `<rank>.jsonl`. In the folder DIGESTS it has, per
step, a sha256 of parameters, optimiser and moving average. In the folder USED it has, per
micro-batch, the step and each sample's image, epoch, position and sha256 of mask and pixels.

PAUSE is a number of seconds per step, so that a signal from outside finds the run at work. With
SETTLED a step begins when the save before it is complete.
"""

import hashlib
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import torch  # noqa: E402
from compare import leaves  # noqa: E402

from engine.evaluation import classification  # noqa: E402
from engine.run import faults, saving  # noqa: E402
from models.vit import VisionTransformer  # noqa: E402
from util.errors import run_cli  # noqa: E402

RANK = os.environ.get("RANK", "0")
due = [
    fault
    for fault in json.loads(os.environ.get("FAULTS", "[]"))
    if str(fault.get("rank", 0)) == RANK
    and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
]
now = {"step": -1}  # finished steps
handles: list[Any] = []  # of hooks on gradients


def digest(value: Any) -> str:
    """sha256 of all tensors in nested dicts and lists, in order."""
    tensors = [leaf for leaf in leaves(value, "").values() if isinstance(leaf, torch.Tensor)]
    flat = [tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in tensors]
    return hashlib.sha256(torch.cat([torch.empty(0, dtype=torch.uint8), *flat]).numpy()).hexdigest()


def write(variable: str, entry: dict[str, Any]) -> None:
    """Appends to this process's file in the folder that the variable names."""
    with (Path(os.environ[variable]) / f"{RANK}.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def before(owner: Any, name: str, action: Any) -> None:
    """Makes `owner.name` call `action` with the same arguments first."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        action(*args)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def strike(at: str) -> None:
    """Does what is due here."""
    for fault in [f for f in due if f["at"] == at and f["step"] <= now["step"]]:
        due.remove(fault)
        if fault["do"] == "exit":
            os._exit(1)
        elif fault["do"] == "hang":
            time.sleep(fault.get("seconds", 3600))
        else:
            for _ in range(fault.get("times", 1)):
                os.kill(os.getppid() if fault["to"] == "launcher" else os.getpid(), fault["do"])
                time.sleep(0.3)


def between_steps(saver: saving.Saver) -> None:
    """Observes the state, and strikes."""
    now["step"] = saver.job.state.step
    if "DIGESTS" in os.environ:
        content = vars(saver.job.state.checkpoint(saver.job.identity, total_batch=1))
        digests = {name: digest(content[name]) for name in ("model", "optimizer", "ema")}
        write("DIGESTS", {"step": now["step"], **digests})
    if "SETTLED" in os.environ:
        saver.wait()
    strike("step")
    time.sleep(float(os.environ.get("PAUSE", "0")))


def used(_: faults.BadSamples, batch: Any) -> None:
    """Observes a micro-batch."""
    samples = [
        [key.image, key.epoch, key.position, digest(mask), digest(image)]
        for key, mask, image in zip(batch.keys, batch[1], batch.images, strict=True)
    ]
    write("USED", {"step": batch.keys[0].step + 1, "samples": samples})


def poison(model: VisionTransformer, logits: torch.Tensor) -> torch.Tensor:
    """The logits, in `count` steps from `step` on, after what a fault does to them or to one
    gradient."""
    while handles:
        handles.pop().remove()
    for fault in due:
        is_now = model.training and 0 <= now["step"] - fault["step"] < fault.get("count", 1)
        if is_now and fault["at"] == "loss":
            logits = logits * float("nan")
        elif is_now and fault["at"] == "gradient":
            bias = model.patch_embed.proj.bias
            handles.append(bias.register_hook(lambda gradient: gradient + float("inf")))
    return logits


def main() -> Any:
    before(saving.Saver, "between_steps", between_steps)
    before(saving, "save_checkpoint", lambda *_: strike("save"))
    before(classification.Evaluator, "__call__", lambda *_: strike("validation"))
    if "USED" in os.environ:
        before(faults.BadSamples, "collect", used)
    entry = importlib.import_module(sys.argv[1].removesuffix(".py"))
    forward = VisionTransformer.forward
    VisionTransformer.forward = lambda self, images: poison(self, forward(self, images))
    return entry.main(sys.argv[2:])


if __name__ == "__main__":
    run_cli(main)
