"""Runs an entry script and does to it what the variable FAULTS says: `fault_driver.py
main_pretrain.py ARGUMENTS`.

FAULTS is a JSON list of {"do": what, "at": "step", "save" or "validation", "step": finished steps,
"rank": which process, ...}; each happens once, and not in a process that a launcher started again.
With DIGESTS, a folder, each process writes there a line per step: the step and a sha256 of
parameters, optimiser and moving average.
"""

import hashlib
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from engine.evaluation import classification  # noqa: E402
from engine.run import saving  # noqa: E402
from models.vit import VisionTransformer  # noqa: E402
from util.errors import run_cli  # noqa: E402

RANK = int(os.environ.get("RANK", "0"))
faults = [
    fault
    for fault in json.loads(os.environ.get("FAULTS", "[]"))
    if fault.get("rank", 0) == RANK and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
]
pause = float(
    os.environ.get("PAUSE", "0")
)  # seconds per step, so that a signal from outside finds the run at work
now = {"step": -1}  # finished steps
handles: list[Any] = []  # of hooks on gradients


def digest(value: Any) -> str:
    """sha256 of all tensors in nested dicts and lists, in order."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(
                value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
        elif isinstance(value, dict):
            for entry in value.values():
                add(entry)
        elif isinstance(value, list | tuple):
            for entry in value:
                add(entry)

    add(value)
    return found.hexdigest()


def strike(at: str) -> None:
    """Does what is due here."""
    for fault in list(faults):
        if (
            fault["at"] != at
            or now["step"] < fault["step"]
            or fault["do"] in ("nan_loss", "inf_gradient")
        ):
            continue
        faults.remove(fault)
        if fault["do"] == "exit":
            os._exit(1)
        if fault["do"] == "hang":
            time.sleep(fault.get("seconds", 3600))
            continue
        target = os.getppid() if fault["to"] == "launcher" else os.getpid()
        for _ in range(fault.get("times", 1)):
            os.kill(target, fault["do"])
            time.sleep(0.3)


def on_step(saver: saving.Saver) -> None:
    """Between two steps."""
    now["step"] = saver.job.state.step
    if "DIGESTS" in os.environ:
        content = vars(saver.job.state.checkpoint(saver.job.identity, total_batch=1))
        line = {"step": now["step"]} | {
            name: digest(content[name]) for name in ("model", "optimizer", "ema")
        }
        with (Path(os.environ["DIGESTS"]) / f"{RANK}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    strike("step")
    time.sleep(pause)


def before(owner: Any, name: str, action: Any) -> None:
    """Makes `owner.name` do `action(its first argument)` first."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        action(args[0])
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def poison(model: VisionTransformer, logits: torch.Tensor) -> torch.Tensor:
    """The logits, in steps from `step` on, `count` of them, after what a fault does to them or to
    one gradient."""
    for handle in handles:
        handle.remove()
    handles.clear()
    for fault in faults:
        if not model.training or not 0 <= now["step"] - fault["step"] < fault.get("count", 1):
            continue
        if fault["do"] == "nan_loss":
            logits = logits * float("nan")
        elif fault["do"] == "inf_gradient":
            handles.append(
                model.patch_embed.proj.bias.register_hook(lambda gradient: gradient + float("inf"))
            )
    return logits


def main() -> Any:
    before(saving.Saver, "between_steps", on_step)
    before(saving, "save_checkpoint", lambda _: strike("save"))
    before(classification.Evaluator, "__call__", lambda _: strike("validation"))
    entry = importlib.import_module(sys.argv[1].removesuffix(".py"))
    forward = VisionTransformer.forward
    VisionTransformer.forward = lambda self, images: poison(self, forward(self, images))
    return entry.main(sys.argv[2:])


if __name__ == "__main__":
    run_cli(main)
