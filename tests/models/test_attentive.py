"""Attentive pooling and probes against plain lines, finite differences and the paper's sizes."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from engine.evaluation.probe import build_probes, probe_loss
from models.build import build_model, classifier_spec
from models.heads.attentive import AttentivePool, attention_of
from models.heads.probe import AttentiveProbes
from util.settings.evaluation import LinclsConfig


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded_probes(num_probes: int = 2, classes: int = 3) -> AttentiveProbes:
    """Float64, of width 8 with 3 queries and values of width 6; no two alike."""
    draws = torch.Generator().manual_seed(5)
    more = {"num_classes": classes, "num_probes": num_probes, "generator": draws}
    probes = AttentiveProbes(embed_dim=8, dim=6, num_queries=3, **more).double()
    for seed, parameter in enumerate(probes.parameters()):
        parameter.data += 0.5 * random(*parameter.shape, seed=seed)
    return probes


def plain_pool(tokens: np.ndarray, queries: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Efficient probing as the paper defines it, image by image and query by query: every token is
    projected by its value, and query m takes the m-th part of that."""
    found = []
    for image in tokens:
        projected = image @ values.T  # (N, E)
        parts = np.split(projected, len(queries), axis=1)
        gathered = []
        for query, part in zip(queries, parts, strict=True):
            weights = np.exp(image @ query / np.sqrt(len(query)))
            gathered.append((weights / weights.sum()) @ part)
        found.append(np.concatenate(gathered))
    return np.array(found)


@pytest.mark.parametrize(("count", "dim"), [(1, 8), (4, 8), (3, 6), (8, 24)])
def test_the_pool_equals_plain_lines(count, dim):
    pool, tokens = AttentivePool(8, dim, count).double(), random(5, 7, 8)
    pool.queries.data, pool.values.data = 3 * random(count, 8, seed=1), random(dim, 8, seed=2)
    expected = plain_pool(*(t.detach().numpy() for t in (tokens, pool.queries, pool.values)))
    np.testing.assert_allclose(pool(tokens).detach().numpy(), expected, rtol=0, atol=1e-9)
    attention = attention_of(tokens, pool.queries)  # (B, M, N)
    assert attention.shape == (5, count, 7)
    scores = np.exp(tokens[2].numpy() @ pool.queries[-1].detach().numpy() / np.sqrt(8))
    np.testing.assert_allclose(attention[2, -1].detach(), scores / scores.sum(), rtol=0, atol=1e-9)


def test_each_probes_logits_equal_plain_lines():
    probes, tokens = seeded_probes(), random(9, 7, 8, seed=20)
    logits = probes(tokens).detach().numpy()  # (H, B, C)
    for probe in range(2):
        matrix, bias, queries, values = (p.detach().numpy() for p in probes.of_each()[probe])
        pooled = plain_pool(tokens.numpy(), queries, values)
        normed = (pooled - pooled.mean(axis=0)) / np.sqrt(pooled.var(axis=0) + 1e-6)
        np.testing.assert_allclose(logits[probe], normed @ matrix.T + bias, rtol=0, atol=1e-9)


def test_gradients_equal_finite_differences():
    """Central differences, of every entry of every parameter, of the sum of the probes' losses."""
    probes, tokens, labels = seeded_probes(), random(9, 7, 8, seed=20), torch.arange(9) % 3
    step = 1e-5

    def loss() -> torch.Tensor:
        return probe_loss(probes(tokens), labels).sum()

    loss().backward()
    with torch.no_grad():
        for parameter in probes.parameters():
            flat, found = parameter.view(-1), []
            for place in range(len(flat)):
                around = []
                for sign in (1, -1):
                    flat[place] += sign * step
                    around.append(loss().item())
                    flat[place] -= sign * step
                found.append((around[0] - around[1]) / (2 * step))
            gradient = parameter.grad.flatten()
            assert gradient.abs().max() > 1e-3
            np.testing.assert_allclose(gradient.numpy(), found, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, 768 * 768 + 32 * 768 + 769 * 1000),  # fewer than the paper's 1.4 million
        ({"probe_value_ratio": 0.25, "probe_queries": 8}, 192 * 768 + 8 * 768 + 193 * 1000),
    ],
)
def test_parameters_of_the_probe_of_a_vit_b(more, expected):
    cfg = LinclsConfig(size="base", probe="attentive", **more)
    spec = classifier_spec(cfg, num_classes=1000, class_tokens=1, fc_norm=False)
    probes = build_probes(cfg, spec, 1000)
    assert sum(p.numel() for p in probes.parameters()) == expected < 1_400_000
    assert probes.queries[0].std().item() == pytest.approx(0.02, rel=0.05)
    assert not any(bias.any() for bias in probes.biases)


def test_operations_of_the_pool_of_a_vit_b():
    """Scores and averages of 196 tokens for 32 queries, and one projection of what they take: a
    tenth of the multiplications of projecting each token first."""
    with torch.device("meta"), FlopCounterMode(display=False) as counted:
        AttentivePool(768, 768, 32)(torch.empty(1, 196, 768))
    assert counted.get_total_flops() == 2 * (2 * 196 * 32 * 768 + 768 * 768)


@pytest.mark.parametrize("class_tokens", [1, 0])
@pytest.mark.parametrize("fc_norm", [True, False])
def test_a_classifier_with_the_folded_probe_gives_its_logits(class_tokens, fc_norm):
    """Of the normalised patch tokens, whichever of the two norms the encoder has; the class token
    has no say."""
    cfg = LinclsConfig(size="debug", img_size=32, probe="attentive", probe_queries=4)
    decided = {"num_classes": 5, "class_tokens": class_tokens, "fc_norm": fc_norm}
    model = build_model(classifier_spec(cfg, **decided)).double().eval()
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = 0.2 * random(*parameter.shape, seed=seed)
    probes = build_probes(cfg.model_copy(update={"lr": (0.1, 1.0)}), model.spec, 5).double()
    for seed, parameter in enumerate(probes.parameters()):
        parameter.data = 0.2 * random(*parameter.shape, seed=100 + seed)
    images = random(6, 3, 32, 32, seed=50)
    *_, tokens = model.iterate_tokens(images)  # (B, T, D)
    norm = model.fc_norm if fc_norm else model.norm
    patches = F.layer_norm(tokens, (32,), norm.weight, norm.bias, 1e-6)[:, class_tokens:]
    probes.bn.momentum = 1.0
    probes(3 * patches)  # statistics that are not those of the start
    expected = probes.eval()(patches)  # (H, B, C)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    for probe in range(2):
        weight, bias = probes.folded(probe)
        tensors = {"head.weight": weight, "head.bias": bias, **probes.pool_tensors(probe)}
        assert not model.load_state_dict(tensors, strict=False).unexpected_keys
        torch.testing.assert_close(model(images), expected[probe], rtol=0, atol=1e-9)


def test_logits_are_never_in_half_precision():
    probes, tokens = seeded_probes().float().eval(), random(4, 7, 8).float()
    nn.init.ones_(probes.bn.running_var)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = probes(tokens)
    assert logits.dtype == torch.float32 and torch.equal(logits, probes(tokens))
