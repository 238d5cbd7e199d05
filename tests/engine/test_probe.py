"""Linear and attentive probes: many at once against each alone, and both optimisers against hand
arithmetic."""

import itertools
import math

import pytest
import torch
from compare import class_scores
from torch import nn
from torch.amp import GradScaler
from torch.nn import functional as F

from engine.evaluation.classification import ClassScores
from engine.evaluation.probe import (
    build_probe_optimizer,
    choose_probe,
    mean_of_finite,
    probe_loss,
    probe_step,
)
from engine.optim import set_lr
from engine.schedule import Plan
from models.heads.probe import AttentiveProbes, LinearProbes
from util.settings.evaluation import LinclsConfig

NO_SCALER = GradScaler("cpu", enabled=False)
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0)  # thirteen
STEPS = 20
OPTIMIZERS = ["sgd", "lars"]
KINDS = {"linear": (16, 12), "attentive": (16, 7, 12)}  # what they read: images, (patches,) width


def seeded_probes(
    num_probes: int, embed_dim: int = 12, num_classes: int = 5, kind: str = "linear"
) -> LinearProbes:
    draws = torch.Generator().manual_seed(7)
    if kind == "linear":
        return LinearProbes(embed_dim, num_classes, num_probes, draws)
    return AttentiveProbes(
        embed_dim=embed_dim,
        dim=embed_dim // 2,
        num_queries=3,
        num_classes=num_classes,
        num_probes=num_probes,
        generator=draws,
    )


def settings(lrs: tuple[float, ...], optimizer: str, **more) -> LinclsConfig:
    return LinclsConfig(lr=lrs, optimizer=optimizer, **more)


def trained(
    lrs: tuple[float, ...],
    optimizer: str,
    dtype: torch.dtype,
    factor: float = 1.0,
    kind: str = "linear",
    **more,
) -> LinearProbes:
    """Twenty steps on fixed features whose columns differ in scale, 5 of them warmup; peak lr = lr
    * factor."""
    cfg = settings(lrs, optimizer, **more)
    probes = seeded_probes(len(lrs), kind=kind).to(dtype)
    steps = build_probe_optimizer(probes, cfg)
    plan = Plan(1, 16, 1, STEPS, STEPS, warmup_steps=5, peak_lr=cfg.base_lr * factor, min_lr=0.0)
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        features = torch.randn(KINDS[kind], generator=generator, dtype=torch.float64)
        features = features * torch.arange(1, 13) + 3
        labels = torch.randint(5, (16,), generator=generator)
        set_lr(steps, plan.lr(step))
        probe_loss(probes(features.to(dtype)), labels).sum().backward()
        probe_step(probes, steps, NO_SCALER)
    return probes


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize(
    ("kind", "optimizer", "factor"),
    [
        ("linear", "sgd", 0.3),
        ("linear", "lars", 30.0),
        ("attentive", "sgd", 0.03),  # at larger rates rounding grows from step to step
        ("attentive", "lars", 30.0),
    ],
)
def test_thirteen_probes_at_once_are_thirteen_alone(kind, optimizer, factor, weight_decay):
    """In float64, each with its own rate: all parameters and statistics after 20 steps."""
    start = seeded_probes(1, kind=kind).double()
    more = {"kind": kind, "weight_decay": weight_decay}
    together = trained(RATES, optimizer, torch.float64, factor, **more)
    for probe, lr in enumerate(RATES):
        alone = trained((lr,), optimizer, torch.float64, factor, **more)
        for ours, theirs in zip(together.of_each()[probe], alone.of_each()[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
        for name in ("running_mean", "running_var"):
            ours, theirs = (getattr(probes.bn, name) for probes in (together, alone))
            if kind == "attentive":  # each has its own
                ours = ours.view(len(RATES), -1)[probe]
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
            else:
                assert torch.equal(ours, theirs)
    # each has moved, and no two alike, by far more than that
    for parameters in zip(*start.of_each(), *together.of_each(), strict=True):
        pairs = itertools.combinations(parameters, 2)
        assert min((a - b).abs().max() for a, b in pairs) > 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_diverging_probe_leaves_the_others_bit_identical(optimizer, kind):
    """Rates are powers of two, so that the schedule's peak (which the largest sets) rounds
    nothing."""
    healthy = trained((0.125, 0.25, 0.5), optimizer, torch.float32, kind=kind)
    diverged = trained((0.125, 2.0**124, 0.5), optimizer, torch.float32, kind=kind)
    assert not diverged.weights[1].isfinite().all() or diverged.weights[1].abs().max() > 1e30
    for probe in (0, 2):
        for ours, theirs in zip(diverged.of_each()[probe], healthy.of_each()[probe], strict=True):
            assert torch.equal(ours, theirs) and theirs.isfinite().all()


def give(probes: LinearProbes, *gradients: float) -> None:
    """Gives each of a probe's parameters a gradient of this norm."""
    for parameters, value in zip(probes.of_each(), gradients, strict=True):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
            parameter.grad.flatten()[0] = value


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("kind", "parts"), [("linear", 2), ("attentive", 4)])
def test_a_probe_without_a_finite_gradient_waits(optimizer, bad, kind, parts):
    """Its weights, and what its optimiser remembers, stay; the norm that is reported is that of the
    others. A step counts as skipped if no probe moves."""
    probes = seeded_probes(3, kind=kind)
    steps = build_probe_optimizer(probes, settings((0.1, 0.2, 0.4), optimizer))
    set_lr(steps, 0.4)
    give(probes, 3.0, 3.0, 3.0)
    probe_step(probes, steps, NO_SCALER)
    for gradients, waiting in (((3.0, bad, 3.0), {1}), ((bad, bad, bad), {0, 1, 2})):
        before = [p.detach().clone() for p in probes.parameters()]
        memory = [steps.state[p]["momentum_buffer"].clone() for p in probes.parameters()]
        give(probes, *gradients)
        norm, found_inf = probe_step(probes, steps, NO_SCALER)
        assert all(p.grad is None for p in probes.parameters())
        expected = math.sqrt(2 * parts * 3.0**2) if waiting == {1} else math.nan
        assert norm.item() == pytest.approx(expected, rel=1e-6, nan_ok=True)
        assert found_inf.item() == (len(waiting) == 3)
        for place, parameter in enumerate(probes.parameters()):  # three of each part
            waits = place % 3 in waiting
            assert torch.equal(parameter, before[place]) == waits
            assert torch.equal(steps.state[parameter]["momentum_buffer"], memory[place]) == waits


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
    probe_step(probes, steps, NO_SCALER)
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
    more = {"weight_decay": 0.25, "momentum": 0.8}
    steps = build_probe_optimizer(seeded_probes(3), settings((0.1, 4.0, 0.5), optimizer, **more))
    set_lr(steps, 2.0)  # half way up to the peak of the largest
    found = [[group[name] for group in steps.param_groups] for name in ("lr", *more)]
    assert found[0] == pytest.approx([0.05, 0.05, 2.0, 2.0, 0.25, 0.25])
    assert found[1:] == [[0.25, 0.0] * 3, [0.8] * 6]


def test_batch_normalisation_by_hand():
    """Variance 1e-6, eps 1e-6: +-0.001 becomes +-1 / sqrt(2); there is nothing to learn in it."""
    probes = seeded_probes(1, 1, 1).double()
    assert list(probes.bn.parameters()) == []
    nn.init.ones_(probes.weights[0])
    logits = probes(torch.tensor([[5.0], [5.002]], dtype=torch.float64))  # (1, 2, 1)
    assert logits.flatten().tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)], abs=1e-6)
    assert probes.bn.running_mean.item() == pytest.approx(0.5001)  # momentum 0.1
    assert probes.bn.running_var.item() == pytest.approx(0.9 + 0.1 * 2e-6)  # unbiased


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_the_normalisation_folds_into_the_linear_layer(dtype, tolerance):
    probes = seeded_probes(3).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in probes.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    features = torch.randn(50, 32, 12, generator=generator).to(dtype) * 3 + 2
    for batch in features:  # statistics other than those at the start
        probes(batch)
    assert (probes.bn.running_mean - 2).abs().max() < 0.5
    logits = probes.eval()(features[0])
    assert logits.shape == (3, 32, 5)
    for probe in range(3):
        weight, bias = probes.folded(probe)
        assert weight.dtype == bias.dtype == dtype
        expected = F.linear(features[0], weight, bias)
        torch.testing.assert_close(logits[probe], expected, rtol=0, atol=tolerance)


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
    assert not any(bias.any() for bias in probes.biases)
    assert len({weight.data_ptr() for weight in probes.weights}) == 3


def test_the_loss_of_each_probe_and_their_mean():
    logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [2.0, 0.0]]])
    losses = probe_loss(logits, torch.tensor([1, 0]))
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-2))) / 2
    assert losses.tolist() == pytest.approx([math.log(2), expected])
    nan, inf = float("nan"), float("inf")
    assert mean_of_finite(torch.tensor([1.0, nan, 4.0, inf])).item() == 2.5
    assert math.isnan(mean_of_finite(torch.tensor([nan, inf])).item())


def scored(correct: int, loss: float = 1.0) -> ClassScores:
    return class_scores(10, [correct], [10], loss)


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
