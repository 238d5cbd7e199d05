"""`optimizer: muon`: which parameters it updates, its step by hand, and steps that are skipped."""

import copy

import numpy as np
import pytest
import torch
from reference import MAE, randomized

from engine.optim import MuonAdamW, build_adamw, build_muon, optimizer_step, param_groups, set_lr
from models.mae import MaskedAutoencoder

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
LR, DECAY = 0.01, 0.05


def build(**changes) -> tuple[MaskedAutoencoder, MuonAdamW]:
    torch.manual_seed(0)
    model = MaskedAutoencoder(**MAE | changes)
    optimizer = build_muon(param_groups(model, DECAY), 0.9, 0.95)
    set_lr(optimizer, LR)
    return model, optimizer


def backward(model: MaskedAutoencoder, seed: int = 1, scaler=NO_SCALER, factor=1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 3, 32, 32, generator=generator)
    loss = model(images, torch.rand(4, 16, generator=generator).argsort(dim=1))
    scaler.scale(factor * loss).backward()


def snapshot(model: MaskedAutoencoder, optimizer: MuonAdamW) -> dict[str, torch.Tensor]:
    """Copies of all tensors that a step may change, but for those of a state that is not there."""
    found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for index, entry in optimizer.state_dict()["state"].items():
        found |= {f"{index}.{name}": value.clone() for name, value in entry.items()}
    return found


def test_matrices_of_blocks_go_to_muon_and_all_else_to_adamw():
    model, optimizer = build(decoder_fusion=2)
    names = [
        [n for g in part.param_groups for n in g["names"]]
        for part in (optimizer.muon, optimizer.adamw)
    ]
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    blocks = [f"{stack}.{i}" for stack in ("blocks", "decoder_blocks") for i in (0, 1)]
    assert sorted(names[0]) == sorted(f"{b}.{layer}.weight" for b in blocks for layer in layers)
    assert sorted(names[0] + names[1]) == sorted(name for name, _ in model.named_parameters())
    parameters = dict(model.named_parameters())
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert parameters[name] is parameter
            decays = (
                name.endswith("weight") and "norm" not in name and name != ("decoder_fusion.weight")
            )
            assert group["weight_decay"] == (DECAY if decays else 0.0), name


def orthogonalised(matrix: np.ndarray) -> np.ndarray:
    """Five steps of Newton-Schulz with Muon's published coefficients, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        product = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
        poly = b * product + c * product @ product
        x = a * x + (poly @ x if x.shape[0] <= x.shape[1] else x @ poly)
    return x


@pytest.mark.parametrize("layer", ["blocks.1.attn.qkv", "blocks.0.attn.proj", "blocks.1.mlp.fc2"])
def test_two_steps_of_a_matrix_by_hand(layer):
    """momentum = 0.95 momentum + 0.05 gradient; the step is along 0.05 gradient + 0.95 momentum,
    made orthogonal, 0.2 sqrt(longer side) long per singular value; what decays is lr * decay.
    torch computes it in bf16, so that the directions agree to about a hundredth."""
    model, optimizer = build()
    weight = model.get_parameter(f"{layer}.weight")
    expected, momentum = weight.detach().double().numpy().copy(), np.zeros(tuple(weight.shape))
    for _ in range(2):
        for parameter in model.parameters():  # of full rank, as bf16 loses small singular values
            parameter.grad = torch.randn_like(parameter)
        gradient = weight.grad.double().numpy().copy()
        before = weight.detach().double().numpy().copy()
        optimizer_step(optimizer, NO_SCALER, None)
        momentum = 0.95 * momentum + 0.05 * gradient
        direction = orthogonalised(0.05 * gradient + 0.95 * momentum)
        size = 0.2 * max(weight.shape) ** 0.5
        expected = before * (1 - LR * DECAY) - LR * size * direction
        change, ours = expected - before, weight.detach().numpy() - before
        assert np.linalg.norm(ours - change) < 0.03 * np.linalg.norm(change)
        singular = np.linalg.svd(direction, compute_uv=False)
        assert np.median(singular) > 0.7 and singular.max() < 1.3
    found = optimizer.state[weight]["momentum_buffer"].numpy()
    np.testing.assert_allclose(found, momentum, rtol=1e-4, atol=1e-9)


def test_all_else_takes_the_step_of_adamw_alone():
    model, optimizer = build()
    twin = copy.deepcopy(model)
    theirs = build_adamw(param_groups(twin, DECAY), 0.9, 0.95)
    set_lr(theirs, LR)
    backward(model)
    backward(twin)
    for each in (optimizer, theirs):
        optimizer_step(each, NO_SCALER, clip_grad=0.1)
    others = [name for group in optimizer.adamw.param_groups for name in group["names"]]
    assert len(others) > 20
    for name in others:
        assert torch.equal(model.get_parameter(name), twin.get_parameter(name)), name


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_step_that_is_not_finite_changes_nothing(precision, steps_before):
    model, optimizer = build()
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16", init_scale=8.0)
    for seed in range(steps_before):
        backward(model, seed, scaler)
        optimizer_step(optimizer, scaler, 0.5)
    before = snapshot(model, optimizer)
    backward(model, 9, scaler, float("nan"))
    _, found_inf = optimizer_step(optimizer, scaler, 0.5)
    after = snapshot(model, optimizer)
    assert found_inf.item() == 1.0
    for name, value in after.items():
        assert torch.equal(value, before.get(name, torch.zeros_like(value))), name
    assert scaler.get_scale() == (4.0 if precision == "fp16" else 1.0)
    # and the next step is that of a run without it
    backward(model, 7, scaler)
    optimizer_step(optimizer, scaler, 0.5)
    twin, theirs = build()
    for seed in (*range(steps_before), 7):
        backward(twin, seed)
        optimizer_step(theirs, NO_SCALER, 0.5)
    for name, value in snapshot(twin, theirs).items():
        torch.testing.assert_close(snapshot(model, optimizer)[name], value, rtol=1e-6, atol=1e-9)


def test_a_loaded_state_goes_on_bit_for_bit_and_its_groups_follow_the_schedule():
    model, optimizer = build()
    for seed in (1, 2):
        backward(model, seed)
        optimizer_step(optimizer, NO_SCALER, None)
    twin, theirs = build()
    twin = randomized(twin)
    twin.load_state_dict(model.state_dict())
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, of_model in ((optimizer, model), (theirs, twin)):
        set_lr(each, LR / 2)
        assert {group["lr"] for group in each.muon.param_groups} == {LR / 2}
        backward(of_model, 3)
        optimizer_step(each, NO_SCALER, None)
    ours, others = snapshot(model, optimizer), snapshot(twin, theirs)
    assert ours.keys() == others.keys()
    assert all(torch.equal(ours[name], others[name]) for name in ours)
