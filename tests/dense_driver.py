"""Two steps of a model for segmentation or detection on each process, under torch's launcher:
`dense_driver.py TASK PARALLEL OUT`.

In the first step one image of process 1 has no objects, in the second none of its images has any.
The main process writes the losses of both, the norms of the gradients, and the parameters after
them to OUT.
"""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

from engine.optim import build_adamw, optimizer_step, param_groups, set_lr  # noqa: E402
from engine.parallel import full_tensor, place_model, unsharded_model, wrap_model  # noqa: E402
from models.dense import DenseTransformer  # noqa: E402
from util.dist import from_main, init_processes  # noqa: E402
from util.settings.evaluation import FinetuneConfig  # noqa: E402

FIELDS = {
    "img_size": 32,
    "patch_size": 8,
    "in_chans": 3,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "class_tokens": 1,
    "num_classes": 3,
    "window_size": 3,
    "global_blocks": 1,
    "head_dim": 32,
    "region_samples": 64,
}


def annotation(count: int) -> dict[str, torch.Tensor]:
    """Objects in a row."""
    masks = torch.zeros(count, 32, 32, dtype=torch.uint8)
    for number, mask in enumerate(masks):
        mask[4:24, 8 * number : 8 * number + 14] = 1
    boxes = [(8 * number, 4, 8 * number + 14, 24) for number in range(count)]
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "labels": torch.arange(count),
        "masks": masks,
    }


def loss_of(model: Any, task: str, rank: int, step: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(10 * step + rank)
    images = torch.randn(2, 3, 32, 32, generator=draws)
    torch.manual_seed(step)  # the boxes that the losses are taken of
    if task == "detect":
        counts = [(2, 1), (0, 1 - step)][rank]
        return sum(model(images, [annotation(count) for count in counts]).values())
    target = torch.randint(0, 3, (2, 32, 32), generator=draws)
    return torch.nn.functional.cross_entropy(model(images), target)


def main(task: str, parallel: str, out: str) -> None:
    cfg = FinetuneConfig(parallel=parallel, precision="fp32", checkpointing=True)
    found = []
    with init_processes("cpu") as processes:
        torch.manual_seed(0)
        model = from_main(lambda: DenseTransformer(**FIELDS, task=task))
        place_model(model, model.state_dict(), cfg, processes)
        optimizer = build_adamw(param_groups(model, 0.1, 0.8), 0.9, 0.999)
        set_lr(optimizer, 1e-3)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        wrapped = wrap_model(model, processes.device, 1, processes.world_size).train()
        for step in (0, 1):
            loss = loss_of(wrapped, task, processes.rank, step)
            loss.backward()
            gradients = [full_tensor(p.grad).clone() for p in model.parameters()]
            norm, _ = optimizer_step(optimizer, scaler, 0.5)
            torch.distributed.all_reduce(loss.detach())
            found.append((loss.item(), norm.item(), gradients))
        whole = unsharded_model(model, torch.device("cpu"))
        whole.eval()(torch.randn(1, 3, 32, 40))  # by all processes, as an evaluation does
        if processes.is_main:
            torch.save({"steps": found, "state": whole.state_dict()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
