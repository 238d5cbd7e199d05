"""Runs main_pretrain.py and writes into the folder WATCH what it saw: `sharding_driver.py
ARGUMENTS`.

`restored.pth`, by the main process: the training state before this process's first step, as a
checkpoint would hold it; not with MEMORY set, as it takes memory. `<rank>.json`, by each: the most
bytes of parameters, gradients and moments that it held at the end of a step, the most blocks with
whole parameters that it held in one, and its peak memory in bytes beyond that of its imports,
before its first step and at its end. After NAN_LOSS steps the loss of process 1 is not finite once;
after NAN_PART steps one value of its part of the parameters is not. Process 1 has the further
arguments OF_PROCESS_1.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

import main_pretrain  # noqa: E402
from engine import loop  # noqa: E402
from engine.parallel import blocks_of, own_part  # noqa: E402
from engine.run import saving  # noqa: E402
from engine.run.saving import on_host  # noqa: E402
from models.mae import MaskedAutoencoder  # noqa: E402
from util.errors import run_cli  # noqa: E402

RANK = int(os.environ.get("RANK", "0"))
WATCH = Path(os.environ["WATCH"])
now = {"step": -1, "bytes": 0, "whole_blocks": 0, "start_peak": 0, "peak": 0}


def memory(field: str) -> int:
    """Bytes, of a field of Linux's account of this process: VmRSS, or VmHWM for its maximum."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


torch.compiler.reset()  # imports what DistributedDataParallel imports later
imports = memory("VmRSS")


def is_due(fault: str) -> bool:
    return RANK == 1 and now["step"] == int(os.environ.get(fault, "-2"))


def held(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of memory behind parameters, gradients and moments; a view counts with all of what it
    is a view of."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    tensors = parameters + [p.grad for p in parameters if p.grad is not None]
    tensors += [value for entry in optimizer.state.values() for value in entry.values()]
    storages = [own_part(tensor.detach()).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def watched_step(
    optimizer: torch.optim.Optimizer, *args: Any, original: Any = loop.optimizer_step, **more: Any
) -> Any:
    now["bytes"] = max(now["bytes"], held(optimizer))
    return original(optimizer, *args, **more)


def watched_step_end(saver: saving.Saver, original: Any = saving.Saver.between_steps) -> None:
    state = saver.job.state
    if now["step"] < 0:
        now["start_peak"] = memory("VmHWM") - imports
    if now["step"] < 0 and "MEMORY" not in os.environ:
        content = on_host(vars(state.checkpoint(saver.job.identity, total_batch=12)), RANK == 0, [])
        if RANK == 0:
            torch.save(content, WATCH / "restored.pth")
    now["step"] = state.step
    if is_due("NAN_PART"):
        own_part(state.model.norm.bias.data)[0] = float("nan")
    original(saver)


def watched_forward(
    self: MaskedAutoencoder, *args: Any, original: Any = MaskedAutoencoder.forward, **named: Any
) -> torch.Tensor:
    if not torch.is_grad_enabled():  # the monitor's, of a whole copy
        return original(self, *args, **named)
    if now["step"] == 0 and "--compile" not in sys.argv:  # a compiler would trace the hooks, too
        for block in blocks_of(self):
            block.register_forward_pre_hook(lambda *_: count_whole_blocks(self))
    return original(self, *args, **named) * (float("nan") if is_due("NAN_LOSS") else 1.0)


def count_whole_blocks(model: MaskedAutoencoder) -> None:
    is_whole = [
        not any(isinstance(p, DTensor) for p in block.parameters()) for block in blocks_of(model)
    ]
    now["whole_blocks"] = max(now["whole_blocks"], sum(is_whole))


def main() -> Any:
    WATCH.mkdir(parents=True, exist_ok=True)
    if RANK == 1:
        sys.argv += os.environ.get("OF_PROCESS_1", "").split()
    loop.optimizer_step = watched_step
    saving.Saver.between_steps = watched_step_end
    MaskedAutoencoder.forward = watched_forward
    found = main_pretrain.main(sys.argv[1:])
    now["peak"] = memory("VmHWM") - imports
    (WATCH / f"{RANK}.json").write_text(json.dumps(now))
    return found


if __name__ == "__main__":
    run_cli(main)
