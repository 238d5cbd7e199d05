"""AdamW, Muon, parameter groups, the optimiser step and the moving average of the weights.

Decay: weights of Linear layers, of the patch projection and of a head's convolutions; nothing on
biases, norms, class tokens, mask token and positions. A group carries its `lr_scale`; `set_lr`
applies the schedule to it.
"""

from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3

DECAYING = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)  # whose weights decay
Group = dict[str, object]  # of parameters
StepFn = Callable[[torch.optim.Optimizer, GradScaler], tuple[Tensor, Tensor]]


def param_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, object]]:
    """Groups of trainable parameters with `lr_scale`, `weight_decay` and, for readers, `names`.

    lr_scale is layer_decay^(depth + 1 - i): i = 0 for patch_embed, pos_embed and cls_token, k + 1
    for blocks.k, and depth + 1 for norm, fc_norm, head and all else.

    Source: layer-wise lr decay of arXiv 2003.10555, as in MAE, appendix A.1.
    """
    decaying = {id(part.weight) for part in model.modules() if isinstance(part, DECAYING)}
    depth = len(model.blocks)  # type: ignore[arg-type]
    names: dict[tuple[float, float], list[str]] = {}  # by lr_scale and weight_decay
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = layer_decay ** (depth + 1 - _layer_index(name, depth))
            decay = weight_decay if id(parameter) in decaying else 0.0
            names.setdefault((scale, decay), []).append(name)
    return [
        {
            "params": [model.get_parameter(name) for name in of_group],
            "names": of_group,
            "lr_scale": scale,
            "weight_decay": decay,
        }
        for (scale, decay), of_group in names.items()
    ]


def _layer_index(name: str, depth: int) -> int:
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def build_adamw(groups: list[dict[str, object]], beta1: float, beta2: float) -> torch.optim.AdamW:
    """Fused AdamW (arXiv 1711.05101), eps 1e-8; the schedule sets the learning rate before each
    step."""
    return torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), fused=True)


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon for some groups of matrices and fused AdamW for others, as one optimiser with
    one list of groups and one state.

    Like a fused optimiser it neither waits for the device nor changes anything where its attribute
    `found_inf`, a scalar on the device, is 1. For that it keeps a copy of the matrices and their
    momentum during a step.
    """

    _step_supports_amp_scaling = True  # GradScaler leaves it to `step` to look at found_inf
    found_inf: Tensor

    def __init__(self, matrices: list[Group], others: list[Group], betas: tuple[float, float]):
        # "match_rms_adamw": a step as long as AdamW's, so that lr and weight_decay are as of that
        self.muon = torch.optim.Muon(matrices, lr=0.0, adjust_lr_fn="match_rms_adamw")
        self.adamw = build_adamw(others, *betas)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self._share()
        for parameter in self._matrices():
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)  # a loaded state comes in new lists
        self._share()

    def _share(self) -> None:
        count = len(self.muon.param_groups)
        self.muon.param_groups = self.param_groups[:count]
        self.adamw.param_groups = self.param_groups[count:]
        self.muon.state = self.adamw.state = self.state

    def _matrices(self) -> list[Tensor]:
        return [*chain.from_iterable(group["params"] for group in self.muon.param_groups)]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Takes the step, or none if `found_inf` is 1."""
        self.adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.adamw.step()
        matrices = self._matrices()
        changed = [*matrices, *(self.state[matrix]["momentum_buffer"] for matrix in matrices)]
        before = [tensor.clone() for tensor in changed]
        self.muon.step()
        for tensor, old in zip(changed, before, strict=True):
            tensor.copy_(torch.where(self.found_inf > 0, old, tensor))


def build_muon(groups: list[Group], beta1: float, beta2: float) -> MuonAdamW:
    """Muon for the matrices of encoder and decoder blocks (a qkv projection is one matrix), with
    momentum 0.95 and Nesterov's step; AdamW, with `beta1` and `beta2`, for all else.

    Source: Muon at AdamW's learning rate and weight decay, arXiv 2502.16982.
    """
    parts: dict[bool, list[Group]] = {True: [], False: []}
    for group in groups:
        parameters = cast(list[Tensor], group["params"])
        named = [*zip(cast(list[str], group["names"]), parameters, strict=True)]
        for is_matrix, part in parts.items():
            chosen = [
                (name, parameter)
                for name, parameter in named
                if (parameter.ndim == 2 and "blocks." in name) == is_matrix
            ]
            if chosen:
                names, params = map(list, zip(*chosen, strict=True))
                part.append({**group, "names": names, "params": params})
    return MuonAdamW(parts[True], parts[False], (beta1, beta2))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives each group `lr` (absolute) times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def optimizer_step(
    optimizer: torch.optim.Optimizer, scaler: GradScaler, clip_grad: float | None
) -> tuple[Tensor, Tensor]:
    """Clips the gradient, takes the step unless the gradient is not finite, and clears the
    gradient. Never waits for the device.

    The optimiser must be a fused one. Gradients are already the mean over processes, so one
    process's NaN is everyone's, and the norm of sharded gradients is that of all parts: all
    processes decide alike.

    Returns: scalars, the L2 norm of the gradient before clipping, and 1.0 if the step was skipped.
    """
    scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if hasattr(grad_norm, "full_tensor"):  # a sharded tensor, whose class takes long to import
        grad_norm = grad_norm.full_tensor()
    found_inf = (~grad_norm.isfinite()).float()
    if clip_grad is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_grad, grad_norm)
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    else:
        # The contract between GradScaler and fused optimisers: with found_inf 1 neither the
        # parameters nor the step count change.
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm, found_inf


def build_ema(model: nn.Module, decay: float | None) -> "ModelEmaV3 | None":
    """The moving average of a model's weights, or None if `decay` is None."""
    if decay is None:
        return None
    from timm.utils import ModelEmaV3  # here, as importing timm takes long

    return ModelEmaV3(model, decay=decay, foreach=False)


@torch.no_grad()
def update_ema(ema: "ModelEmaV3", model: nn.Module, found_inf: Tensor) -> None:
    """ema = decay * ema + (1 - decay) * model, or nothing if `found_inf` (a scalar on the device)
    is 1.

    The decay is a tensor, so that the decision never waits for the device; timm's foreach path
    takes only numbers.
    """
    decay = torch.where(found_inf > 0, 1.0, ema.decay)
    ema.apply_update_(model, decay=decay)  # type: ignore[arg-type]
