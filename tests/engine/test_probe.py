"""Linear probes: many at once against each alone, and both optimisers against hand arithmetic."""

import math

import pytest
import torch
from torch.amp import GradScaler
from torch.nn import functional as F

from engine.evaluation.classification import Scores
from engine.evaluation.probe import (
    build_probe_optimizer,
    choose_probe,
    mean_of_finite,
    probe_loss,
    probe_step,
)
from engine.optim import set_lr
from engine.schedule import warmup_cosine
from models.heads.probe import LinearProbes
from util.settings.evaluation import LinclsConfig

NO_SCALER = GradScaler("cpu", enabled=False)
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0)  # thirteen
STEPS = 20
OPTIMIZERS = ["sgd", "lars"]


def seeded_probes(num_probes: int, embed_dim: int = 12, num_classes: int = 5) -> LinearProbes:
    return LinearProbes(embed_dim, num_classes, num_probes, torch.Generator().manual_seed(7))


def settings(lrs: tuple[float, ...], optimizer: str, **more) -> LinclsConfig:
    return LinclsConfig(lr=lrs, optimizer=optimizer, **more)


def trained(
    lrs: tuple[float, ...], optimizer: str, dtype: torch.dtype, factor: float = 1.0, **more
) -> LinearProbes:
    """Twenty steps on fixed features whose columns differ in scale, 5 of them warmup; peak lr = lr
    * factor."""
    cfg = settings(lrs, optimizer, **more)
    probes = seeded_probes(len(lrs)).to(dtype)
    steps = build_probe_optimizer(probes, cfg)
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        features = (
            torch.randn(16, 12, generator=generator, dtype=torch.float64) * torch.arange(1, 13) + 3
        )
        labels = torch.randint(5, (16,), generator=generator)
        set_lr(steps, warmup_cosine(step, STEPS, 5, cfg.base_lr * factor, 0.0))
        probe_loss(probes(features.to(dtype)), labels).sum().backward()
        probe_step(steps, NO_SCALER)
    return probes


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize(("optimizer", "factor"), [("sgd", 0.3), ("lars", 30.0)])
def test_thirteen_probes_at_once_are_thirteen_alone(optimizer, factor, weight_decay):
    """In float64, each with its own rate: weights, biases and statistics after 20 steps."""
    start = seeded_probes(1).double()
    together = trained(RATES, optimizer, torch.float64, factor, weight_decay=weight_decay)
    weights = []
    for probe, lr in enumerate(RATES):
        alone = trained((lr,), optimizer, torch.float64, factor, weight_decay=weight_decay)
        torch.testing.assert_close(together.weights[probe], alone.weights[0], rtol=0, atol=1e-9)
        torch.testing.assert_close(together.biases[probe], alone.biases[0], rtol=0, atol=1e-9)
        torch.testing.assert_close(together.bn.running_mean, alone.bn.running_mean, rtol=0, atol=0)
        torch.testing.assert_close(together.bn.running_var, alone.bn.running_var, rtol=0, atol=0)
        assert (
            alone.weights[0] - start.weights[0]
        ).abs().max() > 1e-6  # it has moved, by far more than that
        weights.append(alone.weights[0])
    assert (
        min((a - b).abs().max() for a, b in zip(weights, weights[1:], strict=False)) > 1e-6
    )  # no two alike


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_diverging_probe_leaves_the_others_bit_identical(optimizer):
    """Rates are powers of two, so that the schedule's peak (which the largest sets) rounds
    nothing."""
    healthy = trained((0.125, 0.25, 0.5), optimizer, torch.float32)
    diverged = trained((0.125, 2.0**124, 0.5), optimizer, torch.float32)
    assert not diverged.weights[1].isfinite().all() or diverged.weights[1].abs().max() > 1e30
    for probe in (0, 2):
        assert torch.equal(diverged.weights[probe], healthy.weights[probe])
        assert torch.equal(diverged.biases[probe], healthy.biases[probe])
        assert healthy.weights[probe].isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_probe_without_a_finite_gradient_waits(optimizer, bad):
    """Its weights, and what its optimiser remembers, stay; the norm that is reported is that of the
    others."""
    probes = seeded_probes(3)
    steps = build_probe_optimizer(probes, settings((0.1, 0.2, 0.4), optimizer))
    set_lr(steps, 0.4)
    for number in range(2):
        before = [p.detach().clone() for p in probes.parameters()]
        memory = {p: s["momentum_buffer"].clone() for p, s in steps.state.items()}
        for parameter in probes.parameters():
            parameter.grad = torch.zeros_like(parameter)
            parameter.grad.flatten()[0] = 3.0
        if number == 1:
            probes.biases[1].grad[2] = bad
        norm, found_inf = probe_step(steps, NO_SCALER)
        assert all(p.grad is None for p in probes.parameters())
        finite = 3 if number == 0 else 2
        assert norm.item() == pytest.approx(3 * math.sqrt(2 * finite), rel=1e-6)
        assert found_inf.item() == 0.0
    for parameter, old in zip(probes.parameters(), before, strict=True):
        waits = parameter is probes.weights[1] or parameter is probes.biases[1]
        assert torch.equal(parameter, old) == waits
        assert torch.equal(steps.state[parameter]["momentum_buffer"], memory[parameter]) == waits


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_counts_as_skipped_where_no_probe_moves(optimizer):
    probes = seeded_probes(2)
    steps = build_probe_optimizer(probes, settings((0.1, 0.2), optimizer))
    set_lr(steps, 0.2)
    for parameter in probes.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    norm, found_inf = probe_step(steps, NO_SCALER)
    assert math.isnan(norm.item()) and found_inf.item() == 1.0
    start = seeded_probes(2).parameters()
    assert all(torch.equal(p, old) for p, old in zip(probes.parameters(), start, strict=True))


def hand_made(optimizer: str, weight_decay: float) -> tuple[LinearProbes, torch.optim.Optimizer]:
    """One probe, weight [[3, 0], [0, 4]] of norm 5, bias [1, -1]; its rate is 2."""
    probes = seeded_probes(1, 2, 2).double()
    with torch.no_grad():
        probes.weights[0].copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        probes.biases[0].copy_(torch.tensor([1.0, -1.0]))
    steps = build_probe_optimizer(probes, settings((0.1,), optimizer, weight_decay=weight_decay))
    set_lr(steps, 2.0)
    return probes, steps


GRADIENTS = [
    (
        torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64),
        torch.tensor([0.5, 0.0], dtype=torch.float64),
    ),
    (
        torch.tensor([[2.0, 0.0], [0.0, -1.0]], dtype=torch.float64),
        torch.tensor([0.0, 1.0], dtype=torch.float64),
    ),
]


def step_with(
    probes: LinearProbes, steps: torch.optim.Optimizer, number: int
) -> tuple[list[float], list[float]]:
    probes.weights[0].grad, probes.biases[0].grad = (
        gradient.clone() for gradient in GRADIENTS[number]
    )
    probe_step(steps, NO_SCALER)
    return probes.weights[0].flatten().tolist(), probes.biases[0].tolist()


def test_lars_by_hand():
    """trust = 0.001 |w| / (|g| + 1e-8); momentum 0.9 on the adapted gradient; biases as in plain
    SGD."""
    probes, steps = hand_made("lars", 0.0)
    weight, bias = step_with(probes, steps, 0)
    assert weight == pytest.approx([3, -2 * 0.005, 0, 4], abs=1e-9)  # lr 2, trust 0.001 * 5 / 1
    assert bias == pytest.approx([1 - 2 * 0.5, -1], abs=1e-12)
    weight, bias = step_with(probes, steps, 1)
    trust = 0.001 * math.sqrt(9 + 0.01**2 + 16) / math.sqrt(5)
    # buffers: 0.9 * 0.005 at the second entry; the new gradient, times its trust, at the first and
    # last
    assert weight == pytest.approx(
        [3 - 2 * 2 * trust, -0.01 - 2 * 0.9 * 0.005, 0, 4 + 2 * trust], abs=1e-9
    )
    assert bias == pytest.approx([0 - 2 * 0.9 * 0.5, -1 - 2 * 1.0], abs=1e-12)


def test_lars_with_weight_decay_by_hand():
    """trust = 0.001 |w| / (|g| + decay |w| + 1e-8), times (g + decay w)."""
    probes, steps = hand_made("lars", 0.1)
    weight, bias = step_with(probes, steps, 0)
    trust = 0.001 * 5 / (1 + 0.1 * 5 + 1e-8)
    assert weight == pytest.approx(
        [3 - 2 * trust * 0.3, -2 * trust, 0, 4 - 2 * trust * 0.4], abs=1e-14
    )
    assert bias == pytest.approx([0, -1], abs=1e-12)  # no decay


def test_lars_has_its_own_trust_for_each_probe():
    probes = seeded_probes(2, 2, 2)
    with torch.no_grad():
        probes.weights[0].fill_(1.0)
        probes.weights[1].fill_(10.0)
    steps = build_probe_optimizer(probes, settings((0.1, 0.1), "lars"))
    set_lr(steps, 1.0)
    for parameter in probes.parameters():
        parameter.grad = torch.ones_like(parameter)
    probe_step(steps, NO_SCALER)
    assert probes.weights[0].flatten().tolist() == pytest.approx([1 - 0.001] * 4, abs=1e-6)
    assert probes.weights[1].flatten().tolist() == pytest.approx([10 - 0.01] * 4, abs=1e-6)


def test_nesterov_by_hand():
    """buffer = 0.9 buffer + g; step = lr (g + 0.9 buffer); lr is 2, gradients are GRADIENTS."""
    probes, steps = hand_made("sgd", 0.0)
    step_with(probes, steps, 0)
    weight, bias = step_with(probes, steps, 1)
    expected = [3 - 2 * 1.9 * 2, -2 * 1.9 - 2 * 0.81, 0, 4 + 2 * 1.9]
    assert weight == pytest.approx(expected, abs=1e-12)
    expected = [1 - 2 * 1.9 * 0.5 - 2 * 0.81 * 0.5, -1 - 2 * 1.9]
    assert bias == pytest.approx(expected, abs=1e-12)
    probes, steps = hand_made("sgd", 0.1)  # the decay of the matrix counts as gradient
    weight, bias = step_with(probes, steps, 0)
    assert weight == pytest.approx([3 - 2 * 1.9 * 0.3, -2 * 1.9, 0, 4 - 2 * 1.9 * 0.4], abs=1e-12)
    assert bias == pytest.approx([1 - 2 * 1.9 * 0.5, -1], abs=1e-12)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_probe_has_the_rate_it_would_have_alone(optimizer):
    probes = seeded_probes(3)
    steps = build_probe_optimizer(
        probes, settings((0.1, 4.0, 0.5), optimizer, weight_decay=0.25, momentum=0.8)
    )
    set_lr(steps, 2.0)  # half way up to the peak of the largest
    assert [group["lr"] for group in steps.param_groups] == pytest.approx(
        [0.05, 0.05, 2.0, 2.0, 0.25, 0.25]
    )
    assert [group["weight_decay"] for group in steps.param_groups] == [0.25, 0.0] * 3
    assert {group["momentum"] for group in steps.param_groups} == {0.8}
    pairs = zip(probes.weights, probes.biases, strict=True)
    parameters = [p for group in steps.param_groups for p in group["params"]]
    assert list(map(id, parameters)) == [id(p) for pair in pairs for p in pair]


def test_batch_normalisation_by_hand():
    """Variance 1e-6, eps 1e-6: +-0.001 becomes +-1 / sqrt(2); there is nothing to learn in it."""
    probes = seeded_probes(1, 1, 2).double()
    assert list(probes.bn.parameters()) == []
    with torch.no_grad():
        probes.weights[0].copy_(torch.tensor([[1.0], [2.0]]))
        probes.biases[0].copy_(torch.tensor([0.0, 0.5]))
    logits = probes(torch.tensor([[5.0], [5.002]], dtype=torch.float64))
    half = math.sqrt(0.5)
    expected = torch.tensor(
        [[[-half, 0.5 - 2 * half], [half, 0.5 + 2 * half]]], dtype=torch.float64
    )
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    assert probes.bn.running_mean.item() == pytest.approx(0.5001)  # momentum 0.1
    assert probes.bn.running_var.item() == pytest.approx(0.9 + 0.1 * 2e-6)  # unbiased
    probes.eval()
    single = probes(torch.tensor([[0.5001]], dtype=torch.float64))
    torch.testing.assert_close(
        single, torch.tensor([[[0.0, 0.5]]], dtype=torch.float64), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_the_normalisation_folds_into_the_linear_layer(dtype, tolerance):
    probes = seeded_probes(3).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in probes.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for _ in range(50):  # statistics other than those at the start
            probes(torch.randn(32, 12, generator=generator).to(dtype) * 3 + 2)
    probes.eval()
    features = torch.randn(20, 12, generator=generator).to(dtype) * 3 + 2
    logits = probes(features)
    assert logits.shape == (3, 20, 5)
    for probe in range(3):
        weight, bias = probes.folded(probe)
        assert (weight.shape, bias.shape) == ((5, 12), (5,))
        assert weight.dtype == bias.dtype == dtype
        torch.testing.assert_close(
            F.linear(features, weight, bias), logits[probe], rtol=0, atol=tolerance
        )
    assert (probes.bn.running_mean - 2).abs().max() < 0.5


def test_logits_are_never_in_half_precision():
    probes = seeded_probes(2).eval()
    features = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = probes(features)
        from_half = probes(features.bfloat16())
    assert logits.dtype == from_half.dtype == torch.float32
    assert torch.equal(logits, probes(features))


def test_all_probes_start_alike():
    generator = torch.Generator().manual_seed(3)
    probes = LinearProbes(400, 1000, 3, generator)
    first = probes.weights[0]
    assert first.mean().item() == pytest.approx(
        0, abs=1e-4
    )  # 400,000 values: standard error 1.6e-5
    assert first.std().item() == pytest.approx(0.01, rel=0.01)
    assert first.abs().max() > 0.04  # not cut off
    assert all(torch.equal(weight, first) for weight in probes.weights)
    assert all(not bias.any() for bias in probes.biases)
    assert len({weight.data_ptr() for weight in probes.weights}) == 3
    alone = LinearProbes(400, 1000, 1, torch.Generator().manual_seed(3))
    assert torch.equal(alone.weights[0], first)


def test_the_loss_of_each_probe_and_their_mean():
    logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [2.0, 0.0]]])
    losses = probe_loss(logits, torch.tensor([1, 0]))
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-2))) / 2
    assert losses.tolist() == pytest.approx([math.log(2), expected])
    nan, inf = float("nan"), float("inf")
    assert mean_of_finite(torch.tensor([1.0, nan, 4.0, inf])).item() == 2.5
    assert math.isnan(mean_of_finite(torch.tensor([nan, inf])).item())


def scored(correct: int, loss: float = 1.0) -> Scores:
    return Scores(10, correct, 10, loss, [correct], [10])


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ([scored(3), scored(7), scored(5)], 1),
        ([scored(3), scored(7), scored(7)], 1),  # of equals the first
        ([scored(5), scored(5), scored(5, loss=0.1)], 0),  # whatever the loss
        ([scored(9, math.nan), scored(1), scored(2)], 2),  # none that has diverged
        ([scored(9, math.inf), scored(0)], 1),
        ([scored(1, math.nan), scored(1, math.nan)], 0),  # unless all have
        ([scored(4)], 0),
    ],
)
def test_the_probe_with_the_most_correct_images_is_chosen(scores, chosen):
    assert choose_probe(scores) == chosen
