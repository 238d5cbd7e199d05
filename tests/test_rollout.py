"""Attention rollout against loops written here, its gradients against a forward pass written here,
and the tool."""

import math
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from runs import environment
from safetensors.torch import load_file
from test_pictures import places
from torch.nn import functional as F

from data.transforms import EvalTransform
from engine.evaluation.from_weights import build_frozen
from engine.pictures.drawing import CELL, OVERLAY, enlarged, heat_over
from engine.pictures.rollout import class_attentions, fuse_heads, rollout
from engine.run.checkpoint import save_weights
from models.build import build_model, classifier_spec, encoder_of, mae_spec
from models.vit import VisionTransformer
from tools import vit_explain
from util.errors import InputError
from util.settings.evaluation import FinetuneConfig
from util.settings.pretrain import PretrainConfig

# --- the mathematics, by loops over entries
# ---------------------------------------------------------------------------

FUSE = {"mean": lambda heads: math.fsum(heads) / len(heads), "max": max, "min": min}


def loops_matrix(layers, head_fusion, discard_ratio, class_token, image) -> np.ndarray:
    """R of one image, (T, T); `discard_ratio` is text, so that floor(ratio * T * T) is exact."""
    size = layers[0].shape[-1]
    result = np.eye(size)
    for layer in layers:
        heads = layer[image].double().numpy()
        fused = np.array(
            [[FUSE[head_fusion](list(heads[:, i, j])) for j in range(size)] for i in range(size)]
        )
        entries = sorted(
            (fused[i, j], i, j) for i in range(size) for j in range(size)
        )  # of equal ones the first goes
        for _, i, j in entries[: math.floor(Fraction(discard_ratio) * size * size)]:
            if not (class_token and j == 0):
                fused[i, j] = 0.0
        mixed = np.empty((size, size))
        for i in range(size):
            row = [(fused[i, j] + (i == j)) / 2 for j in range(size)]
            for j in range(size):
                mixed[i, j] = row[j] / math.fsum(row)
        result = mixed.dot(result)
    return result


def loops_rollout(layers, head_fusion, discard_ratio, class_token) -> np.ndarray:
    """The maps of all images, (B, N)."""
    images = range(layers[0].shape[0])
    matrices = [
        loops_matrix(layers, head_fusion, discard_ratio, class_token, image) for image in images
    ]
    return np.stack([m[0, 1:] if class_token else m.mean(axis=0) for m in matrices])


def attentions(layers=3, images=2, heads=3, tokens=7, seed=0, sharpness=2.0) -> list[torch.Tensor]:
    """Random softmax rows, float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (images, heads, tokens, tokens)
    drawn = [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(layers)]
    return [(sharpness * scores).softmax(dim=-1) for scores in drawn]


@pytest.mark.parametrize("head_fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("discard_ratio", ["0", "0.3", "0.9"])
def test_rollout_equals_loops_for_every_image_of_a_batch(head_fusion, class_token, discard_ratio):
    layers = attentions()
    expected = loops_rollout(layers, head_fusion, discard_ratio, class_token)
    got = rollout(layers, head_fusion, float(discard_ratio), class_token)
    assert got.shape == (2, 6 if class_token else 7)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-9)
    single = rollout(
        [layer.float() for layer in layers], head_fusion, float(discard_ratio), class_token
    )
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("head_fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("discard_ratio", ["0.3", "0.9"])
def test_each_image_loses_its_own_lowest_entries(head_fusion, discard_ratio):
    layers = [
        torch.cat([a, b])
        for a, b in zip(attentions(images=1), attentions(images=1, seed=5), strict=True)
    ]
    both = rollout(layers, head_fusion, float(discard_ratio), True)
    alone = [
        rollout([layer[[i]] for layer in layers], head_fusion, float(discard_ratio), True)
        for i in (0, 1)
    ]
    torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=1e-15)
    kept_whole = rollout(layers, head_fusion, 0.0, True)
    assert ((both - kept_whole).abs().amax(dim=1) > 1e-3).all()  # both images lost entries


@pytest.mark.parametrize(("class_token", "global_pool"), [(True, "token"), (False, "avg")])
@pytest.mark.parametrize("discard_ratio", ["0", "0.3", "0.9"])
def test_rollout_of_a_real_model_equals_loops(class_token, global_pool, discard_ratio):
    model = small_model(class_token, global_pool)
    layers = [layer.detach() for layer in model.attention_maps(noise_images())]
    for head_fusion in FUSE:
        got = rollout(layers, head_fusion, float(discard_ratio), class_token)
        expected = loops_rollout(layers, head_fusion, discard_ratio, class_token)
        np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("discard_ratio", ["0", "0.3", "0.9"])
def test_what_reaches_a_token_sums_to_one_whatever_was_discarded(discard_ratio):
    layers = attentions(layers=5)
    for head_fusion in FUSE:
        whole = rollout(layers, head_fusion, float(discard_ratio), class_token=False)
        assert whole.sum(dim=1).tolist() == pytest.approx(
            [1, 1], abs=1e-12
        )  # the mean of rows that sum to 1
        for image in (0, 1):  # with a class token, the rest is what it keeps of itself
            itself = loops_matrix(layers, head_fusion, discard_ratio, True, image)[0, 0]
            of_patches = (
                rollout(layers, head_fusion, float(discard_ratio), class_token=True)[image]
                .sum()
                .item()
            )
            assert of_patches == pytest.approx(1 - itself, abs=1e-12)


# A class token and two patches, one head. Half of the 9 entries is 4: of the first matrix 0.1 and
# 0.2 at the top left (counted, but the class token's column stays), 0.2 at the bottom right, and
# the first of the two 0.3; of the second 0.1 (stays), 0.2, and both 0.25.
FIRST = [[0.2, 0.5, 0.3], [0.1, 0.6, 0.3], [0.4, 0.4, 0.2]]
SECOND = [[0.1, 0.2, 0.7], [0.3, 0.3, 0.4], [0.5, 0.25, 0.25]]


def one_head(*matrices) -> list[torch.Tensor]:
    return [torch.tensor(matrix, dtype=torch.float64)[None, None] for matrix in matrices]


def test_two_layers_of_three_tokens_by_hand():
    # thinned: [.2 .5 0; .1 .6 .3; .4 .4 0]; plus I, halved: [.6 .25 0; .05 .8 .15; .2 .2 .5], rows
    # of 0.85, 1, 0.9: A_1 = [12/17 5/17 0; .05 .8 .15; 2/9 2/9 5/9]
    alone = rollout(one_head(FIRST), "mean", 0.5, class_token=True)
    assert alone.tolist() == [pytest.approx([5 / 17, 0.0], abs=1e-15)]
    # second layer, class token's row: [.1 0 .7] plus [1 0 0] over 1.8 = [11/18 0 7/18], times A_1
    expected = [11 / 18 * 5 / 17 + 7 / 18 * 2 / 9, 7 / 18 * 5 / 9]
    assert rollout(one_head(FIRST, SECOND), "mean", 0.5, True).tolist() == [
        pytest.approx(expected, abs=1e-15)
    ]
    # the other way round: row [12/17 5/17 0] times the rows of SECOND, [11/18 0 7/18] and, of [.3
    # .3 .4] plus [0 1 0] over 2, [.15 .65 .2]
    expected = [5 / 17 * 0.65, 12 / 17 * 7 / 18 + 5 / 17 * 0.2]
    assert rollout(one_head(SECOND, FIRST), "mean", 0.5, True).tolist() == [
        pytest.approx(expected, abs=1e-15)
    ]


def test_three_patches_without_a_class_token_by_hand():
    # the first column goes, too: [0 .5 0; 0 .6 .3; .4 .4 0]; plus I: [1 .5 0; 0 1.6 .3; .4 .4 1],
    # rows of 1.5, 1.9, 1.8
    expected = [(2 / 3 + 2 / 9) / 3, (1 / 3 + 16 / 19 + 2 / 9) / 3, (3 / 19 + 5 / 9) / 3]
    assert rollout(one_head(FIRST), "mean", 0.5, class_token=False).tolist() == [
        pytest.approx(expected, abs=1e-15)
    ]
    # nothing discarded: (W + I) / 2 has rows of 1, and the mean of its columns is the map
    expected = [(1.2 + 0.1 + 0.4) / 6, (0.5 + 1.6 + 0.4) / 6, (0.3 + 0.3 + 1.2) / 6]
    assert rollout(one_head(FIRST), "mean", 0.0, class_token=False).tolist() == [
        pytest.approx(expected, abs=1e-15)
    ]


def test_heads_are_fused_by_hand():
    heads = torch.tensor(
        [[[[0.1, 0.9], [0.5, 0.5]], [[0.3, 0.7], [0.8, 0.2]]]], dtype=torch.float64
    )
    assert fuse_heads(heads, "mean")[0].flatten().tolist() == pytest.approx([0.2, 0.8, 0.65, 0.35])
    assert fuse_heads(heads, "max")[0].flatten().tolist() == [0.3, 0.9, 0.8, 0.5]
    assert fuse_heads(heads, "min")[0].flatten().tolist() == [0.1, 0.7, 0.5, 0.2]


def test_layers_are_taken_from_first_to_last():
    layers = attentions()
    for class_token in (True, False):
        forth, back = (
            rollout(chosen, "mean", 0.3, class_token) for chosen in (layers, layers[::-1])
        )
        assert (forth - back).abs().max() > 1e-2
        expected = loops_rollout(layers[::-1], "mean", "0.3", class_token)
        np.testing.assert_allclose(back.numpy(), expected, rtol=0, atol=1e-9)


def test_one_layer_is_the_rollout_of_that_layer_alone():
    layers = attentions(layers=4)
    for index in range(4):
        alone = rollout([layers[index]], "max", 0.3, class_token=True)
        assert torch.equal(rollout(layers, "max", 0.3, class_token=True, layer=index), alone)
        np.testing.assert_allclose(
            alone.numpy(), loops_rollout([layers[index]], "max", "0.3", True), atol=1e-9
        )


def test_of_equal_entries_the_first_in_row_major_order_go():
    layers = [
        (layer * 4).round() / 4 for layer in attentions(tokens=9)
    ]  # five values in 81 entries
    for class_token in (True, False):
        for discard_ratio in ("0.3", "0.6", "0.9"):
            got = rollout(layers, "max", float(discard_ratio), class_token)
            expected = loops_rollout(layers, "max", discard_ratio, class_token)
            np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-9)
    # all equal: the upper half goes, and rows 0 and 1 are left to themselves; rows 2 and 3 are
    # (0.25 + I) / 2 over 1
    even = torch.full((1, 1, 4, 4), 0.25, dtype=torch.float64)
    expected = [(1 + 0.25) / 4, (1 + 0.25) / 4, 0.75 / 4, 0.75 / 4]
    assert rollout([even], "mean", 0.5, class_token=False).tolist() == [
        pytest.approx(expected, abs=1e-15)
    ]


@pytest.mark.parametrize(
    ("discard_ratio", "tokens"), [("0.29", 10), ("0.57", 10), ("0.07", 10), ("0.95", 2)]
)
def test_the_number_of_discarded_entries_is_safe_against_float_noise(discard_ratio, tokens):
    """0.29 * 100 is 28.999999999999996 in floats: 29 entries go."""
    layers = attentions(tokens=tokens)
    expected = loops_rollout(layers, "mean", discard_ratio, False)
    np.testing.assert_allclose(
        rollout(layers, "mean", float(discard_ratio), False).numpy(), expected, atol=1e-9
    )


# --- the gradient, by a forward pass of our own
# -----------------------------------------------------------------------

HEADS, DEPTH, CLASSES = 3, 3, 5


def small_model(
    class_token: bool, global_pool: str, fc_norm: bool = False, seed: int = 0
) -> VisionTransformer:
    """2 x 3 patches, all parameters random, float64, frozen and in eval mode as `build_frozen`
    leaves it."""
    model = VisionTransformer(
        img_size=(8, 18),
        patch_size=(4, 6),
        in_chans=3,
        num_classes=CLASSES,
        embed_dim=24,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=2.0,
        class_token=class_token,
        global_pool=global_pool,
        fc_norm=fc_norm,
    )
    return randomized(model, seed).double().eval().requires_grad_(False)


def randomized(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def noise_images(batch: int = 2) -> torch.Tensor:
    return torch.randn(
        batch, 3, 8, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def own_forward(
    state, images, num_heads, global_pool, offsets=None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits and attentions of a state dict's ViT; `offsets` are added to the attentions before
    they are used."""
    weight = state["patch_embed.proj.weight"]
    x = (
        F.conv2d(images, weight, state["patch_embed.proj.bias"], stride=weight.shape[2:])
        .flatten(2)
        .transpose(1, 2)
    )
    if "cls_token" in state:
        x = torch.cat([state["cls_token"].expand(len(x), 1, -1), x], dim=1)
    x = x + state["pos_embed"]
    width = x.shape[-1]

    def norm(x, name):
        return F.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    used = []
    for i in range(
        sum(name.endswith("norm1.weight") and name.startswith("blocks.") for name in state)
    ):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        outputs, weights = [], []
        for head in range(num_heads):
            span = slice(head * width // num_heads, (head + 1) * width // num_heads)
            q, k, v = (part[..., span] for part in qkv.split(width, dim=-1))
            attention = (
                torch.einsum("bqd,bkd->bqk", q, k).div(math.sqrt(width / num_heads)).softmax(dim=-1)
            )
            if offsets is not None:
                attention = attention + offsets[i][:, head]
            outputs.append(torch.einsum("bqk,bkd->bqd", attention, v))
            weights.append(attention)
        used.append(torch.stack(weights, dim=1))
        x = x + linear(torch.cat(outputs, dim=-1), f"blocks.{i}.attn.proj")
        x = x + linear(
            F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")),
            f"blocks.{i}.mlp.fc2",
        )
    x = norm(x, "norm") if "norm.weight" in state else x
    pooled = x[:, 0] if global_pool == "token" else x[:, int("cls_token" in state) :].mean(dim=1)
    pooled = norm(pooled, "fc_norm") if "fc_norm.weight" in state else pooled
    return (linear(pooled, "head") if "head.weight" in state else pooled), used


def own_gradients(
    state, images, num_heads, global_pool, category
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Attentions and, by autograd through zeros added to them, their gradients for one class."""
    _, used = own_forward(state, images, num_heads, global_pool)
    offsets = [torch.zeros_like(a, requires_grad=True) for a in used]
    own_forward(state, images, num_heads, global_pool, offsets)[0][:, category].sum().backward()
    return used, [offset.grad for offset in offsets]


READOUTS = [
    (True, "token", False),
    (False, "avg", True),
    (False, "avg", False),
    (True, "avg", True),
]


@pytest.mark.parametrize(("class_token", "global_pool", "fc_norm"), READOUTS)
def test_class_attentions_equal_a_forward_pass_of_our_own(class_token, global_pool, fc_norm):
    model, images = small_model(class_token, global_pool, fc_norm), noise_images()
    for category in (0, 4):
        logits, weighted = class_attentions(model, images, category)
        used, gradients = own_gradients(model.state_dict(), images, HEADS, global_pool, category)
        expected = [(a * g).clamp(min=0) for a, g in zip(used, gradients, strict=True)]
        assert [w.shape for w in weighted] == [(2, HEADS, 6 + class_token, 6 + class_token)] * DEPTH
        for layer, (got, right) in enumerate(zip(weighted, expected, strict=True)):
            assert right.max() > 1e-4
            torch.testing.assert_close(got, right, rtol=0, atol=1e-12)
            others = [other for place, other in enumerate(expected) if place != layer]
            assert all(
                (got - other).abs().max() > 1e-4 for other in others
            )  # each gradient with its own layer
        own_logits = own_forward(model.state_dict(), images, HEADS, global_pool)[0]
        torch.testing.assert_close(logits, own_logits, rtol=0, atol=1e-12)


def test_class_attentions_agree_with_finite_differences():
    model, images, category = small_model(True, "token"), noise_images(), 2
    state = model.state_dict()
    weighted = class_attentions(model, images, category)[1]
    used = own_forward(state, images, HEADS, "token")[1]
    chance = np.random.default_rng(0)
    positive = 0
    for _ in range(30):
        layer, image, head = (int(chance.integers(n)) for n in (DEPTH, 2, HEADS))
        query, key = (int(chance.integers(7)) for _ in range(2))
        query = (
            0 if layer == DEPTH - 1 else query
        )  # only the class token's row of the last layer is read
        sides = []
        for step in (1e-5, -1e-5):
            offsets = [torch.zeros_like(a) for a in used]
            offsets[layer][image, head, query, key] = step
            sides.append(
                own_forward(state, images, HEADS, "token", offsets)[0][image, category].item()
            )
        slope = (sides[0] - sides[1]) / 2e-5
        product = used[layer][image, head, query, key].item() * slope
        assert weighted[layer][image, head, query, key].item() == pytest.approx(
            max(0.0, product), abs=1e-8
        )
        positive += product > 1e-6
    assert 5 <= positive <= 25  # and the others are negative


def test_negative_products_count_nothing():
    model, images = small_model(False, "avg"), noise_images()
    used, gradients = own_gradients(model.state_dict(), images, HEADS, "avg", 1)
    for got, a, g in zip(class_attentions(model, images, 1)[1], used, gradients, strict=True):
        assert (a * g).min() < -1e-5
        assert got.min() == 0
        assert torch.equal(got == 0, a * g <= 0)


@pytest.mark.parametrize(("class_token", "global_pool", "fc_norm"), READOUTS)
def test_a_batch_of_two_is_each_image_alone(class_token, global_pool, fc_norm):
    model, images = small_model(class_token, global_pool, fc_norm), noise_images()
    logits, both = class_attentions(model, images, 3)
    for i in (0, 1):
        logits_alone, alone = class_attentions(model, images[[i]], 3)
        torch.testing.assert_close(logits[[i]], logits_alone, rtol=0, atol=1e-12)
        for got, right in zip(both, alone, strict=True):
            torch.testing.assert_close(got[[i]], right, rtol=0, atol=1e-12)
    assert (both[0][0] - both[0][1]).abs().max() > 1e-4


def test_asking_leaves_no_trace_and_needs_no_graph_around():
    model, images = small_model(True, "token"), noise_images()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = class_attentions(model, images, 1)[1]
    with torch.no_grad():
        logits, weighted = class_attentions(model, images, 1)
        assert not torch.is_grad_enabled()
    for got, right in zip(weighted, expected, strict=True):
        assert torch.equal(got, right)
        assert not got.requires_grad and got.max() > 0
    assert not logits.requires_grad and not images.requires_grad and images.grad is None
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and not parameter.requires_grad, name
        assert torch.equal(parameter, before[name]), name


# --- the encoder of a model in training
# -------------------------------------------------------------------------------

MAE = {
    "size": "debug",
    "img_size": (32, 48),
    "patch_size": 8,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}


def patch_feature(mae, images) -> torch.Tensor:
    """The mean of the patches that `forward_encoder` gives where nothing is removed, (B, D)."""
    everything = torch.arange(mae.num_patches).expand(len(images), -1)
    latent = mae.forward_encoder(mae.patchify(images), everything)
    return latent[:, latent.shape[1] - mae.num_patches :].mean(dim=1)


@pytest.mark.parametrize("class_token", [True, False])
def test_encoder_of_shares_the_autoencoders_tensors_and_follows_its_training(class_token):
    cfg = PretrainConfig(**MAE, class_token=class_token, decoder_class_token=class_token)
    mae = randomized(build_model(mae_spec(cfg)), 0)
    encoder = encoder_of(mae)
    own = {
        name: t
        for name, t in mae.state_dict().items()
        if not name.startswith(("decoder_", "mask_token"))
    }
    shared = {name: t for name, t in encoder.state_dict().items() if not name.startswith("head.")}
    assert own.keys() == shared.keys()
    assert {name: t.data_ptr() for name, t in own.items()} == {
        name: t.data_ptr() for name, t in shared.items()
    }
    assert ("cls_token" in own) == class_token

    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(2))
    first = encoder.forward_features(images)
    torch.testing.assert_close(first, patch_feature(mae, images), rtol=0, atol=1e-5)
    assert torch.equal(encoder(images), first)  # it has no head

    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    assert mae.training and all(p.requires_grad for p in mae.parameters())
    optimizer = torch.optim.AdamW(mae.parameters(), lr=0.01)
    mae(images).backward()
    optimizer.step()
    second = encoder.forward_features(images)
    assert (second - first).abs().max() > 1e-2
    torch.testing.assert_close(second, patch_feature(mae, images), rtol=0, atol=1e-5)
    assert {name: t.data_ptr() for name, t in encoder.state_dict().items() if name in own} == {
        name: t.data_ptr() for name, t in own.items()
    }


# --- the tool
# ---------------------------------------------------------------------------------------------------------

SIZE = (32, 48)  # 4 x 6 patches
MEAN, STD = (0.2, 0.5, 0.7), (0.3, 0.2, 0.1)
PIXELS = ["--mean", *map(str, MEAN), "--std", *map(str, STD)]
GEOMETRY = ["--size", "debug", "--img_size", "32", "48", "--patch_size", "8", "--device", "cpu"]


def saved(path: Path, config_class: type, **settings) -> Path:
    """Random weights of a model of the debug size, as a run writes them."""
    cfg = config_class(
        **{"size": "debug", "img_size": SIZE, "patch_size": 8, "mean": MEAN, "std": STD, **settings}
    )
    model = (
        build_model(mae_spec(cfg))
        if config_class is PretrainConfig
        else build_model(classifier_spec(cfg))
    )
    args = model.spec.as_dict()
    return save_weights(
        path, randomized(model, 3), {"model_args": args, "mean": cfg.mean, "std": cfg.std}
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("weights")
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    without = {"class_token": False, "decoder_class_token": False}
    token, avg = (
        {"num_classes": 5, "class_token": pool == "token", "global_pool": pool}
        for pool in ("token", "avg")
    )
    return SimpleNamespace(
        pretrained=saved(folder / "pretrained.safetensors", PretrainConfig, **decoder),
        no_token=saved(folder / "no_token.safetensors", PretrainConfig, **decoder, **without),
        classifier=saved(folder / "classifier.safetensors", FinetuneConfig, **token),
        avg_classifier=saved(folder / "avg_classifier.safetensors", FinetuneConfig, **avg),
        avg_with_token=saved(
            folder / "avg_with_token.safetensors", FinetuneConfig, **avg | {"class_token": True}
        ),
    )


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """50 rows, 71 columns, half of it noise."""
    chance = np.random.default_rng(0)
    pixels = np.full((50, 71, 3), 90, dtype=np.uint8)
    pixels[:, :40] = chance.integers(0, 256, (50, 40, 3))
    path = tmp_path_factory.mktemp("images") / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def explain(weights: Path | str, image: Path, save_path: Path, *more) -> dict:
    arguments = [
        *GEOMETRY,
        *PIXELS,
        "--finetune",
        weights,
        "--image_path",
        image,
        "--save_path",
        save_path,
        *more,
    ]
    return vit_explain.main([str(word) for word in arguments])


def model_input(image: Path, mean=MEAN, std=STD) -> torch.Tensor:
    """The image as the model takes it, (1, 3, 32, 48)."""
    pixels = torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1)
    shown = EvalTransform(SIZE, None)(pixels).float() / 255
    return ((shown - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))[None]


def expected_map(
    weights: Path, image: Path, head_fusion="mean", discard_ratio="0", layer=None, **pixels
) -> np.ndarray:
    state = load_file(weights)
    layers = own_forward(state, model_input(image, **pixels), 2, "avg")[1]
    chosen = layers if layer is None else [layers[layer]]
    return loops_rollout(chosen, head_fusion, discard_ratio, "cls_token" in state).reshape(4, 6)


@pytest.mark.parametrize("name", ["pretrained", "no_token", "classifier", "avg_classifier"])
def test_the_tool_writes_the_rollout_of_the_weights_that_it_is_given(
    name, weights, photo, tmp_path
):
    path = getattr(weights, name)
    flags = ["--global_pool", "token"] if name == "classifier" else []
    result = explain(
        path, photo, tmp_path, "--head_fusion", "max", "--discard_ratio", "0.3", *flags
    )
    written = ["photo_heads.png", "photo_rollout.npy", "photo_rollout.png", "rollouts.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == written
    assert result == {
        "grid": tmp_path / "rollouts.png",
        "overlays": [tmp_path / "photo_rollout.png"],
    }

    heat = np.load(tmp_path / "photo_rollout.npy")
    assert (heat.shape, heat.dtype) == ((4, 6), np.float32)
    expected = expected_map(path, photo, "max", "0.3")
    np.testing.assert_allclose(heat, expected, rtol=0, atol=1e-6)
    for other in (
        expected_map(path, photo, "max", "0.3", mean=(0.5,) * 3, std=(0.5,) * 3),
        expected_map(path, photo, "mean", "0.3"),
        expected_map(path, photo, "max", "0"),
        expected_map(path, photo, "max", "0.3", layer=1),
    ):
        assert np.abs(heat - other).max() > 1e-4  # each of these would be seen

    # the picture: the image six times enlarged, its seen part coloured by that map, and a bar
    # beside it
    factor = OVERLAY // 71
    pixels = np.array(Image.open(photo)).repeat(factor, axis=0).repeat(factor, axis=1)
    top, left, bottom, right = EvalTransform(SIZE, None).seen(50, 71)
    shown = heat_over(pixels, heat, (factor * top, factor * left, factor * bottom, factor * right))
    picture = np.array(Image.open(tmp_path / "photo_rollout.png"))
    assert picture.shape[0] == 50 * factor and picture.shape[1] > 71 * factor
    assert np.array_equal(picture[:, : 71 * factor], shown)
    # the grid: what the model takes, three times enlarged, and beside it the map over that
    taken = EvalTransform(SIZE, None)(
        torch.from_numpy(np.array(Image.open(photo))).permute(2, 0, 1)
    ).permute(1, 2, 0)
    grid = np.array(Image.open(tmp_path / "rollouts.png"))
    ((y0, x0),) = places(grid, enlarged(taken.numpy(), CELL))
    ((y1, x1),) = places(grid, enlarged(heat_over(taken.numpy(), heat), CELL))
    assert y0 == y1 and x0 + 3 * 48 < x1


def test_one_layer_and_its_heads(weights, photo, tmp_path):
    explain(weights.pretrained, photo, tmp_path, "--layer_index", "0", "--discard_ratio", "0.9")
    written = [
        "photo_layer0_heads.png",
        "photo_layer0_rollout.npy",
        "photo_layer0_rollout.png",
        "rollouts_layer0.png",
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == written
    heat = np.load(tmp_path / "photo_layer0_rollout.npy")
    expected = expected_map(weights.pretrained, photo, "mean", "0.9", layer=0)
    np.testing.assert_allclose(heat, expected, rtol=0, atol=1e-6)
    # two heads side by side, of 32 x 48 pixels three times enlarged: the class token's row of each
    shown = EvalTransform(SIZE, None)(
        torch.from_numpy(np.array(Image.open(photo))).permute(2, 0, 1)
    )
    attention = own_forward(load_file(weights.pretrained), model_input(photo), 2, "avg")[1][0]
    picture = np.array(Image.open(tmp_path / "photo_layer0_heads.png"))
    found = []
    for head in range(2):
        heat = attention[0, head, 0, 1:].reshape(4, 6).numpy()
        cell = heat_over(shown.permute(1, 2, 0).numpy(), heat).repeat(3, axis=0).repeat(3, axis=1)
        found += places(picture, cell, tolerance=1)
    (y0, x0), (y1, x1) = found
    assert y0 == y1 and x0 + 3 * 48 <= x1


def test_the_mean_patch_may_be_read_in_place_of_the_class_token(weights, photo, tmp_path):
    explain(weights.avg_with_token, photo, tmp_path, "--reader", "avg")
    layers = own_forward(load_file(weights.avg_with_token), model_input(photo), 2, "avg")[1]
    expected = loops_matrix(layers, "mean", "0", True, 0)[1:, 1:].mean(axis=0).reshape(4, 6)
    np.testing.assert_allclose(np.load(tmp_path / "photo_rollout.npy"), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["classifier", "avg_classifier", "avg_with_token"])
def test_what_speaks_for_a_class(name, weights, photo, tmp_path, capsys):
    path, pool = getattr(weights, name), "token" if name == "classifier" else "avg"
    capsys.readouterr()
    heats = []
    for category in (0, 3):
        explain(
            path,
            photo,
            tmp_path,
            "--category_index",
            category,
            "--global_pool",
            pool,
            "--discard_ratio",
            "0.3",
        )
        heats.append(np.load(tmp_path / f"photo_class{category}_rollout.npy"))
        state = load_file(path)
        used, gradients = own_gradients(state, model_input(photo), 2, pool, category)
        weighted = [(a * g).clamp(min=0).detach() for a, g in zip(used, gradients, strict=True)]
        if (
            name == "avg_with_token"
        ):  # the head reads the patches: their rows speak, not the class token's
            expected = (
                loops_matrix(weighted, "mean", "0.3", True, 0)[1:, 1:].mean(axis=0).reshape(4, 6)
            )
        else:
            expected = loops_rollout(weighted, "mean", "0.3", pool == "token").reshape(4, 6)
        np.testing.assert_allclose(heats[-1], expected, rtol=0, atol=1e-6)
        assert np.ptp(expected) > 1e-5
        logits = own_forward(state, model_input(photo), 2, pool)[0][0]
        share, choice = logits.softmax(dim=-1)[category].item(), logits.argmax().item()
        said = f"class {category}: {100 * share:.1f} %, the model's choice is class {choice}"
        assert said in capsys.readouterr().out.splitlines()
    assert np.abs(heats[0] - heats[1]).max() > 1e-5
    parts = ["photo_class{}_heads.png", "photo_class{}_rollout.npy", "photo_class{}_rollout.png"]
    names = {
        part.format(category) for part in [*parts, "rollouts_class{}.png"] for category in (0, 3)
    }
    assert {file.name for file in tmp_path.iterdir()} == names


def test_class_and_layer_are_both_in_the_names(weights, photo, tmp_path):
    flags = ["--category_index", "1", "--layer_index", "1", "--global_pool", "token"]
    explain(weights.classifier, photo, tmp_path, *flags)
    assert (tmp_path / "photo_class1_layer1_rollout.npy").exists()
    used, gradients = own_gradients(
        load_file(weights.classifier), model_input(photo), 2, "token", 1
    )
    weighted = (used[1] * gradients[1]).clamp(min=0).detach()
    expected = loops_rollout([weighted], "mean", "0", True).reshape(4, 6)
    np.testing.assert_allclose(
        np.load(tmp_path / "photo_class1_layer1_rollout.npy"), expected, rtol=0, atol=1e-6
    )


def test_an_untrained_model_is_decided_by_the_seed(photo, tmp_path):
    heats = []
    for seed, folder in ((0, "a"), (0, "b"), (1, "c")):
        explain("random", photo, tmp_path / folder, "--seed", seed, "--class_token", "true")
        heats.append(np.load(tmp_path / folder / "photo_rollout.npy"))
    assert np.array_equal(heats[0], heats[1])
    assert not np.array_equal(heats[0], heats[2])
    model = build_frozen(vit_config(seed=1, class_token=True), "random", num_classes=1).model
    with torch.no_grad():
        expected = loops_rollout(
            model.attention_maps(model_input(photo)), "mean", "0", True
        ).reshape(4, 6)
    np.testing.assert_allclose(heats[2], expected, rtol=0, atol=1e-6)


def vit_config(**more) -> SimpleNamespace:
    settings = {
        "size": "debug",
        "img_size": SIZE,
        "patch_size": 8,
        "mean": MEAN,
        "std": STD,
        **more,
    }
    return SimpleNamespace(**{**asdict(FinetuneConfig()), **settings})


def test_the_same_command_writes_the_same_bytes(weights, photo, tmp_path):
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        explain(
            weights.classifier, photo, folder, "--category_index", "2", "--global_pool", "token"
        )
        written.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert written[0] == written[1] and len(written[0]) == 4


def test_a_folder_and_files_in_one_go(weights, photo, tmp_path):
    chance = np.random.default_rng(1)
    folder = tmp_path / "images"
    for name in ("b.png", "sub/a.png", "c.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / name)
    result = explain(weights.no_token, folder, tmp_path / "out")
    assert [path.name for path in result["overlays"]] == [
        f"{name}_rollout.png" for name in ("b", "c", "a")
    ]
    more = vit_explain.main(
        [
            *GEOMETRY,
            *PIXELS,
            "--finetune",
            str(weights.no_token),
            "--save_path",
            str(tmp_path / "more"),
            "--num_images",
            "2",
            "--image_path",
            str(photo),
            str(folder),
            str(folder / "c.jpg"),
        ]
    )
    names = [path.name for path in more["overlays"]]
    assert names == [
        "photo_rollout.png",
        "b_rollout.png",
        "a_rollout.png",
        "c_rollout.png",
    ]  # 2 of the folder's 3
    for name in ("b", "a"):  # an image's map does not depend on those beside it
        file = folder / "sub" / "a.png" if name == "a" else folder / "b.png"
        expected = expected_map(weights.no_token, file)
        for out in ("out", "more"):
            np.testing.assert_allclose(
                np.load(tmp_path / out / f"{name}_rollout.npy"), expected, atol=1e-6
            )
    result = explain(weights.no_token, photo, tmp_path / "twice", "--image_path", photo, photo)
    assert [path.name for path in result["overlays"]] == [
        "0_photo_rollout.png",
        "1_photo_rollout.png",
    ]


def test_images_of_another_grid_from_a_data_set(tmp_path):
    """The config's size decides: the file's 2 x 2 positions are resized. Without --image_path it
    takes val/."""
    path = saved(
        tmp_path / "grey.safetensors",
        PretrainConfig,
        img_size=16,
        in_chans=1,
        mean=(0.4,),
        std=(0.2,),
        decoder_embed_dim=16,
        decoder_depth=1,
        decoder_num_heads=2,
    )
    (tmp_path / "val" / "cat").mkdir(parents=True)
    for number in range(3):
        Image.effect_noise((40, 30), 50).save(tmp_path / "val" / "cat" / f"{number}.png")
    flags = shlex.split(
        "--size debug --patch_size 8 --device cpu --in_chans 1 --mean 0.4 --std 0.2 --num_images 2"
    )
    flags += [
        "--finetune",
        str(path),
        "--data_path",
        str(tmp_path),
        "--save_path",
        str(tmp_path / "out"),
    ]
    with pytest.raises(InputError, match="patch_size 8 does not divide the image height 28"):
        vit_explain.main([*flags, "--img_size", "28"])
    result = vit_explain.main([*flags, "--img_size", "24", "40"])
    assert [path.name for path in result["overlays"]] == [
        "val_00000_rollout.png",
        "val_00002_rollout.png",
    ]
    assert np.load(tmp_path / "out" / "val_00002_rollout.npy").shape == (3, 5)


@pytest.mark.parametrize(
    ("height", "width", "crop_pct"), [(1, 5000, 1), (5000, 1, 1), (3, 900, 0.2)]
)
def test_a_thread_of_an_image_is_drawn_too(height, width, crop_pct, tmp_path):
    """What the model sees of it may be a pixel or less, between two others."""
    image = tmp_path / "thread.png"
    Image.fromarray(np.full((height, width, 3), 77, dtype=np.uint8)).save(image)
    explain("random", image, tmp_path / "out", "--crop_pct", crop_pct, "--img_size", "32")
    picture = np.array(Image.open(tmp_path / "out" / "thread_rollout.png"))
    assert picture.shape[0] == height and picture.shape[1] > width


@pytest.mark.parametrize("weights_of", ["pretrained", "no_token"])
def test_a_fine_tuning_recipe_looks_into_a_pretrained_model(
    weights_of, photo, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    settings = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    if weights_of == "no_token":
        settings |= {"class_token": False, "decoder_class_token": False}
    path = saved(
        tmp_path / "model.safetensors", PretrainConfig, img_size=224, patch_size=16, **settings
    )
    recipe = {"pretrained": "ViT-S_50E_CLS-Token.yaml", "no_token": "ViT-S_50E_GAP.yaml"}[
        weights_of
    ]
    flags = [
        "--size",
        "debug",
        "--device",
        "cpu",
        "--finetune",
        str(path),
        "--image_path",
        str(photo),
    ]
    vit_explain.main(
        ["--config", f"cfgs/finetune/{recipe}", *flags, "--save_path", str(tmp_path / "out")]
    )
    heat = np.load(tmp_path / "out" / "photo_rollout.npy")
    assert heat.shape == (14, 14) and np.ptp(heat) > 0


def test_it_needs_no_display(weights, photo, tmp_path):
    """A process of its own, without a display or a backend, in another folder than the
    repository's."""
    env = {
        name: value
        for name, value in environment().items()
        if name not in ("DISPLAY", "MPLBACKEND")
    }
    words = [
        *GEOMETRY,
        *PIXELS,
        "--finetune",
        weights.pretrained,
        "--image_path",
        photo,
        "--save_path",
        "out",
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "vit_explain.py"), *map(str, words)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"wrote {Path('out') / 'rollouts.png'}"
    here = explain(weights.pretrained, photo, tmp_path / "here")
    assert here["grid"].read_bytes() == (tmp_path / "out" / "rollouts.png").read_bytes()


# --- what a user gets wrong
# -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        (
            "pretrained",
            "--category_index 0",
            r"category_index needs a classifier, and \S+pretrained\S+ \(.+\)",
        ),
        ("pretrained", "--category_index 0", "has no head: name a fine-tuned model"),
        (
            "random",
            "--category_index 0",
            "category_index needs a classifier, and random has no head",
        ),
        (
            "classifier",
            "--global_pool token --category_index 5",
            r"5 is not one of the 5 classes of \S+classifier",
        ),
        ("classifier", "--category_index -1", "category_index: expected >= 0, got -1"),
        ("classifier", "--category_index 1", "global_pool is avg and .+ was trained with token"),
        ("pretrained", "--discard_ratio -0.1", "discard_ratio: expected >= 0, < 1, got -0.1"),
        ("pretrained", "--discard_ratio 1", "discard_ratio: expected >= 0, < 1, got 1"),
        ("pretrained", "--discard_ratio 1.5", "discard_ratio: expected >= 0, < 1, got 1.5"),
        ("pretrained", "--discard_ratio half", "discard_ratio: expected a number, got 'half'"),
        (
            "pretrained",
            "--layer_index 2",
            "layer_index 2 is not one of the 2 layers, counted from 0",
        ),
        ("pretrained", "--layer_index -1", "layer_index: expected >= 0, got -1"),
        (
            "pretrained",
            "--head_fusion maen",
            "one of mean, max, min, got 'maen', did you mean 'mean'?",
        ),
        (
            "pretrained",
            "--head_fusoin mean",
            "unknown setting 'head_fusoin', did you mean 'head_fusion'?",
        ),
        (
            "pretrained",
            "--size tiny",
            "does not fit: embed_dim 32 in the file, 192 in the settings; depth 2 in the",
        ),
        (
            "pretrained",
            "--class_token false",
            "the settings say no class token and .+ has a class token",
        ),
        (
            "no_token",
            "--class_token true",
            "the settings say a class token and .+ has no class token",
        ),
        (
            "no_token",
            "--global_pool token",
            "global_pool token reads the class token and .+ has none",
        ),
        ("pretrained", "--patch_size 16", "patch_size 8x8 in the file, 16x16 in the settings"),
        ("pretrained", "--mean 0.5", "mean has 1 values and in_chans is 3"),
        ("pretrained", "--image_path nowhere.png", "image_path nowhere.png does not exist"),
        (
            "pretrained",
            "--image_path {text}",
            r"image_path \S+text.jpg: cannot identify image file",
        ),
        (
            "pretrained",
            "--image_path {photo} {text}",
            r"image_path \S+text.jpg: cannot identify image file",
        ),
        ("pretrained", "--image_path {empty}", r"no images under \S+empty"),
        (
            "pretrained",
            "--save_path {text}",
            r"save_path \S+text.jpg cannot be written: File exists",
        ),
        (
            "pretrained",
            "--save_path {text}/deeper/still",
            "save_path .+ cannot be written: Not a directory",
        ),
        ("nowhere", "", "nowhere.safetensors"),
        ("text", "", "text.jpg"),
    ],
)
def test_mistakes_are_one_clear_message_and_nothing_is_drawn(
    name, flags, message, weights, photo, tmp_path
):
    text, empty, out = tmp_path / "text.jpg", tmp_path / "empty", tmp_path / "out"
    text.write_text("no image\n" * 50)
    empty.mkdir()
    paths = {
        "random": "random",
        "nowhere": tmp_path / "nowhere.safetensors",
        "text": text,
        **vars(weights),
    }
    before = sorted(tmp_path.rglob("*"))
    words = [word.format(text=text, empty=empty, photo=photo) for word in flags.split()]
    with pytest.raises(InputError) as error:
        explain(paths[name], photo, out, *words)
    assert re.search(message, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)
    assert [path for path in sorted(tmp_path.rglob("*")) if path != out] == before
    assert not out.exists() or not list(out.iterdir())


def test_all_that_is_missing_is_said_in_one_go():
    with pytest.raises(InputError) as error:
        vit_explain.main([*GEOMETRY, "--discard_ratio", "0.5"])
    assert str(error.value).splitlines() == [
        "2 problems in the settings:",
        "  finetune is needed: give --finetune PATH",
        "  image_path is needed: give --image_path PATH",
    ]


def test_a_mistake_at_the_command_line_is_one_line_and_exit_code_2(weights, photo, tmp_path):
    words = [
        *GEOMETRY,
        *PIXELS,
        "--finetune",
        weights.pretrained,
        "--image_path",
        photo,
        "--save_path",
        "out",
    ]
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tools" / "vit_explain.py"),
            *map(str, words),
            "--layer_index",
            "7",
        ],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2
    assert errors == ["error: layer_index 7 is not one of the 2 layers, counted from 0"]
    assert done.stderr.splitlines()[-1] == errors[0]
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert list((tmp_path / "out").iterdir()) == []
