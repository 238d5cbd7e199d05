"""Training only a part of an encoder: frozen blocks, and low-rank adaptation of the attention
(LoRA, arXiv 2106.09685).

Checkpoints hold the low-rank parts beside the frozen weights; weights for others to use hold their
sum under the usual names.

Shapes: `D` width, `r` rank.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import Attention, Encoder


class LowRankLinear(nn.Linear):
    """A Linear layer W with a low-rank sum, y = (W + B A) x + b, that is W itself at first.

    `lora_a` is A `(r, in)`, random, and `lora_b` is B `(out, r)`, zero. The paper's factor
    alpha / r is 1 at every rank.
    """

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` -> `(..., out)`."""
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_lora(model: Encoder, rank: int, generator: torch.Generator) -> None:
    """Freezes all but the readout, `head` and `fc_norm`, and gives the attention of each block
    trained low-rank sums, on `qkv` and `proj`."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("head.", "fc_norm.")))
    for attention in [part for part in model.modules() if isinstance(part, Attention)]:
        attention.qkv = LowRankLinear(attention.qkv, rank, generator)
        attention.proj = LowRankLinear(attention.proj, rank, generator)


def freeze_blocks(model: Encoder, count: int) -> None:
    """Freezes the patch projection, the class tokens, the positions and the first `count` blocks,
    which then drop no paths."""
    for name, parameter in model.named_parameters():
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
            parameter.requires_grad_(False)
    for block in list(model.blocks)[:count]:
        block.requires_grad_(False)
        block.drop_path = nn.Identity()


def merged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's state with each low-rank sum in its weight, `W + B A`, so that the names are those
    of a model without."""
    tensors = model.state_dict()
    for name in [name for name in tensors if name.endswith(".lora_a")]:
        stem = name.removesuffix("lora_a")
        product = tensors.pop(f"{stem}lora_b") @ tensors.pop(name)  # (out, in)
        tensors[f"{stem}weight"] = tensors[f"{stem}weight"] + product
    return tensors
