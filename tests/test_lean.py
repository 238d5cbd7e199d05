"""The CPU's bf16 layers: bit-equal to the plain ones, and less is kept for the gradient."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import blocks, lean
from models.blocks import Block, CrossBlock
from tools import benchmark
from tools.benchmarks.memory import LiveBytes


def bf16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plainly(monkeypatch):
    """From here on blocks run on torch's own layers."""
    monkeypatch.setattr(blocks, "is_lean", lambda x: False)


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 3, 5, 8)])
@pytest.mark.parametrize("with_gelu", [False, True])
@pytest.mark.parametrize("x_learns", [True, False])
def test_layers_equal_torchs_bit_by_bit(shape, with_gelu, x_learns):
    results = []
    for ours in (True, False):
        x = draw(*shape).requires_grad_(x_learns)
        weight, bias = draw(6, 8, seed=1).requires_grad_(), draw(6, seed=2).requires_grad_()
        with bf16():
            source = x.bfloat16()
            if ours:
                out = (lean.gelu_linear if with_gelu else lean.linear)(source, weight, bias)
            else:
                out = F.linear(F.gelu(source) if with_gelu else source, weight, bias)
        out.backward(draw(*out.shape, seed=3).bfloat16())
        assert (x.grad is not None) == x_learns
        results.append([out, weight.grad, bias.grad, *([x.grad] if x_learns else [])])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype and a.abs().max() > 0 and torch.equal(a, b)


@pytest.mark.parametrize("tokens", [20, blocks.WEIGHTS_AGAIN_FROM_TOKENS])
@pytest.mark.parametrize("kind", [Block, CrossBlock])
def test_blocks_equal_plain_ones_bit_by_bit(kind, tokens, monkeypatch):
    """Head width 16: its scale, 1/4, is exact, so that where it is multiplied in does not show."""
    results = []
    for step in range(2):
        torch.manual_seed(0)
        block = kind(64, 4, 4.0)
        x = draw(2, tokens, 64).requires_grad_()
        with bf16():
            out = block(x) if kind is Block else block(x, x * 0.5)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in block.parameters())])
        if step == 0:
            plainly(monkeypatch)
    for a, b in zip(*results, strict=True):
        assert a.abs().max() > 0 and torch.equal(a, b)


def kept_for_the_gradient(block, x):
    """Bytes alive after the forward pass beside its input and output."""
    with LiveBytes() as live, bf16():
        out = block(x)
    return live.live - out.untyped_storage().nbytes()


@pytest.mark.parametrize("tokens", [40, blocks.WEIGHTS_AGAIN_FROM_TOKENS])
def test_what_a_block_keeps(tokens, monkeypatch):
    """In units of one token's bf16 row: both norms' inputs (the second in fp32 is 2) and outputs,
    q, k, v, the attention's output, the GELU's input; plainly its output, a copy of q, k, v and all
    weights, too."""
    dim, heads, batch = 64, 4, 2
    block, x = Block(dim, heads, 4.0), draw(batch, tokens, 64).requires_grad_()
    row = 2 * dim * batch * tokens
    statistics = 2 * 2 * 4 * batch * tokens  # mean and deviation of two norms
    attention = 2 * batch * heads * tokens * tokens
    weights = 2 * sum(p.numel() for p in block.parameters() if p.ndim == 2)

    again = tokens >= blocks.WEIGHTS_AGAIN_FROM_TOKENS
    ours = kept_for_the_gradient(block, x)
    assert abs(ours - (12 * row + statistics + (0 if again else attention))) < 4096
    plainly(monkeypatch)
    assert kept_for_the_gradient(block, x) >= 16 * row + statistics + attention + weights


def test_they_serve_under_autocast_on_the_cpu_only():
    x = draw(2, 4)
    assert not lean.is_lean(x)
    with bf16():
        assert lean.is_lean(x) and not lean.is_lean(x.to("meta"))


def test_fp32_is_torchs_own_layer():
    layer, plain = blocks.Linear(8, 6), nn.Linear(8, 6)
    plain.load_state_dict(layer.state_dict())
    out = layer(draw(3, 8))
    assert torch.equal(out, plain(draw(3, 8))) and type(out.grad_fn).__name__ == "AddmmBackward0"


def test_a_copied_block_and_a_frozen_one_work():
    block = copy.deepcopy(Block(32, 2, 4.0)).requires_grad_(False)
    block.attn.proj.requires_grad_(True)
    with bf16():
        block(draw(2, 5, 32)).sum().backward()
    assert {n for n, p in block.named_parameters() if p.grad is not None} == {
        "attn.proj.weight",
        "attn.proj.bias",
    }


@pytest.mark.long
def test_activation_memory_of_the_base_step():
    """A count, so that it holds everywhere: at most half the peer's, a quarter with
    checkpointing."""
    shares = benchmark.main(["memory"])["base/16"]["activations_over_peer"]
    assert shares["ours bf16"] <= 0.5 and shares["ours bf16 checkpointing"] <= 0.25
