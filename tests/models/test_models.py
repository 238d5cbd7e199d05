"""Models in numbers: parity with independent implementations, shapes, masks, and the frozen
state-dict keys."""

import math

import pytest
import timm.layers
import torch
from reference import MAE, READOUTS, VIT, huggingface_mae, randomized, timm_vit
from torch._subclasses.fake_tensor import FakeTensorMode

from models.blocks import DropPath
from models.lora import add_lora, merged_tensors
from models.mae import MaskedAutoencoder
from models.pos_embed import sincos_pos_embed
from models.spec import num_kept
from models.vit import VisionTransformer, draw_normal
from models.weights.huggingface import from_huggingface
from util.errors import InputError

NO_TOKEN = {"class_tokens": 0, "decoder_class_token": False}


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    """Normal values in float64, the same ones each time."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_and_every_gradient_equal_transformers_in_float64(norm_pix_loss):
    ours = randomized(MaskedAutoencoder(**MAE | {"norm_pix_loss": norm_pix_loss})).double()
    reference = huggingface_mae(ours)
    images, order = noise(4, 3, 32, 32), noise(4, 16)
    loss, expected = ours(images, order.argsort(dim=1)), reference(images, noise=order)
    loss.backward()
    expected.loss.backward()

    assert abs(loss.item() - expected.loss.item()) < 1e-9
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    theirs = from_huggingface({name: p.grad for name, p in reference.named_parameters()})
    same = {name: theirs[name] for name in gradients}
    torch.testing.assert_close(gradients, same, rtol=0, atol=1e-9)
    assert all(gradient.any() for gradient in gradients.values())
    pred, mask = ours.reconstruct(images, order.argsort(dim=1))
    torch.testing.assert_close(pred, expected.logits, rtol=0, atol=1e-9)
    assert torch.equal(mask, expected.mask.double())


@pytest.mark.parametrize("fused_from", [512, 0])  # tokens: explicit and fused attention
@pytest.mark.parametrize(
    "readout",
    [
        *READOUTS,
        {"num_classes": 0},
        {"last_norm": False},
        {"last_norm": False, "global_pool": "avg", "fc_norm": None},
    ],
)
def test_logits_and_features_equal_timm_in_float64_for_each_readout(
    monkeypatch, readout, fused_from
):
    monkeypatch.setattr("models.blocks.CPU_FUSED_FROM_TOKENS", fused_from)
    geometry = {"in_chans": 5, "img_size": (32, 48), "patch_size": (8, 16)}
    ours = randomized(VisionTransformer(**VIT | readout | geometry)).double()
    reference = timm_vit(ours)
    images = noise(2, 5, 32, 48)
    torch.testing.assert_close(ours(images), reference(images), rtol=0, atol=1e-9)
    feature = reference.forward_head(reference.forward_features(images), pre_logits=True)
    torch.testing.assert_close(ours.forward_features(images), feature, rtol=0, atol=1e-9)


def test_drop_path_rises_linearly_and_only_acts_in_training():
    model = randomized(VisionTransformer(**VIT | {"depth": 3, "drop_path_rate": 0.2}))
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
    images = torch.randn(8, 3, 32, 32)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


@pytest.mark.parametrize("drop_prob", [0.1, 0.5])
def test_drop_path_and_initial_weights_are_timms_number_by_number(drop_prob):
    ours, theirs = DropPath(drop_prob), timm.layers.DropPath(drop_prob)
    for x in (torch.randn(64, 5, 3), torch.randn(64, 2, dtype=torch.bfloat16)):
        torch.manual_seed(1)
        found = ours(x)
        torch.manual_seed(1)
        assert torch.equal(found, theirs(x))
        assert not torch.equal(found, x) and torch.equal(ours.eval()(x), x)
        ours.train()
    torch.manual_seed(2)
    draw_normal(found := torch.empty(300, 100))
    torch.manual_seed(2)
    assert torch.equal(found, timm.layers.trunc_normal_(torch.empty(300, 100), std=0.02))


def test_attention_maps_are_the_softmax_that_the_forward_pass_uses():
    model = randomized(VisionTransformer(**VIT)).double()
    images = noise(2, 3, 32, 32)
    logits, maps = model.forward_with_attention(images)
    torch.testing.assert_close(logits, model(images), rtol=0, atol=1e-12)
    assert [m.shape for m in maps] == [(2, 3, 17, 17)] * 2
    assert all(map(torch.equal, maps, model.attention_maps(images)))
    # By hand from the first block's qkv: softmax(q k / sqrt(16)).
    tokens = model.blocks[0].norm1(model._embed(images))
    q, k, _ = model.blocks[0].attn.qkv(tokens).chunk(3, dim=-1)
    head0 = (q[..., :16] @ k[..., :16].transpose(1, 2) / 4.0).softmax(-1)
    torch.testing.assert_close(maps[0][:, 0], head0, rtol=0, atol=1e-12)
    maps[0].sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad is not None


def test_positions_on_a_2_by_3_grid_by_hand():
    """Width 8: two frequencies per axis, 10000^0 = 1 and 10000^(-1/2) = 0.01; the column first,
    then the row; sines, then cosines."""
    table = sincos_pos_embed(8, (2, 3), class_tokens=1)
    assert table.shape == (1, 7, 8)
    assert table[0, 0].tolist() == [0.0] * 8  # the class token's row
    for row in range(2):
        for column in range(3):
            expected = [
                f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in (1.0, 0.01)
            ]
            assert table[0, 1 + row * 3 + column].tolist() == pytest.approx(expected, abs=1e-7)


def test_patch_vectors_are_row_major_and_channels_last():
    geometry = {"img_size": (4, 6), "patch_size": (2, 3), "in_chans": 2, "mask_ratio": 0.5}
    model = MaskedAutoencoder(**MAE | geometry)
    images = torch.arange(2 * 4 * 6, dtype=torch.float32).reshape(1, 2, 4, 6)
    patches = model.patchify(images)
    assert patches.shape == (1, 4, 12)
    # Second patch: rows 0-1, columns 3-5; channel 0 holds 6 * row + column, channel 1 adds 24.
    expected = [6 * r + c + 24 * ch for r in (0, 1) for c in (3, 4, 5) for ch in (0, 1)]
    assert patches[0, 1].tolist() == expected
    assert torch.equal(model.unpatchify(patches), images)


def test_loss_by_hand_from_reconstruct():
    """The training loss, which predicts only removed patches, equals the paper's definition over
    all of them."""
    model = randomized(MaskedAutoencoder(**MAE)).double()
    images, ids = noise(2, 3, 32, 32), noise(2, 16).argsort(dim=1)
    pred, mask = model.reconstruct(images, ids)
    patches = model.patchify(images)
    mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    error = (pred - (patches - mean) / (var + 1e-6).sqrt()).square().mean(-1)
    expected = (error * mask).sum() / mask.sum()
    assert model(images, ids).item() == pytest.approx(expected.item(), abs=1e-12)
    assert mask.gather(1, ids).tolist() == [[0.0] * 4 + [1.0] * 12] * 2


def test_without_an_order_each_image_of_a_batch_gets_a_mask_of_its_own():
    model = MaskedAutoencoder(**MAE)
    images = torch.randn(64, 3, 32, 32)
    torch.manual_seed(0)
    _, masks = model.reconstruct(images)
    assert masks.sum(dim=1).tolist() == [12] * 64
    assert len(masks.unique(dim=0)) > 50
    torch.manual_seed(0)  # the loss draws its masks in the same way
    orders = torch.rand(64, 16).argsort(dim=1)
    torch.manual_seed(0)
    assert torch.equal(model(images), model(images, orders))


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_to_pixels_undoes_the_target(norm_pix_loss):
    model = MaskedAutoencoder(**MAE | {"norm_pix_loss": norm_pix_loss})
    images = noise(2, 3, 32, 32)
    found = model.to_pixels(model.target(model.patchify(images)), images)
    torch.testing.assert_close(found, images, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        NO_TOKEN,
        {"decoder_class_token": False},
        {"class_tokens": 3},
        {"img_size": (16, 40), "patch_size": (8, 4), "in_chans": 1},
        {"in_chans": 7, "norm_pix_loss": False, "mask_ratio": 0.5},
        {"decoder": "cross", "pred_ratio": 0.25},
    ],
)
def test_every_variant_trains_all_its_parameters(changes):
    model = MaskedAutoencoder(**MAE | changes)
    model(torch.randn(2, model.in_chans, *model.img_size)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_removed_pixels_never_reach_the_encoder():
    model = randomized(MaskedAutoencoder(**MAE))
    images, ids = torch.randn(1, 3, 32, 32), torch.arange(16)[None]
    pred, _ = model.reconstruct(images, ids)
    patches = model.patchify(images).clone()
    patches[0, 4:] = 9.0  # patches 0 to 3 are kept
    assert torch.equal(model.reconstruct(model.unpatchify(patches), ids)[0], pred)


@pytest.mark.parametrize(
    ("num_patches", "ratio", "kept"),
    [(196, 0.75, 49), (49, 0.75, 12), (10, 0.9, 1), (5, 0.5, 2), (100, 0.15, 85)],
)
def test_number_of_kept_patches(num_patches, ratio, kept):
    assert num_kept(num_patches, ratio) == kept


def test_initialisation():
    torch.manual_seed(0)
    model = MaskedAutoencoder(**MAE | {"embed_dim": 192, "decoder_embed_dim": 96})
    for weight, fan_out in (
        (model.patch_embed.proj.weight, 192),  # fan in 3 * 8 * 8 = 192
        (model.blocks[0].attn.qkv.weight, 576),
    ):
        bound = math.sqrt(6 / (192 + fan_out))  # xavier-uniform
        assert 0.98 * bound < weight.abs().max().item() <= bound
    for token in (model.mask_token, model.cls_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.2)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def keys(*names: str, stack: str = "", depth: int = 2) -> list[str]:
    """`name.weight` and `name.bias` of each, in each block of the stack if one is named."""
    prefixes = [f"{stack}.{i}." for i in range(depth)] if stack else [""]
    return [f"{p}{name}.{kind}" for p in prefixes for name in names for kind in ("weight", "bias")]


PARTS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
CROSS_PARTS = ("norm1", "attn.q", "attn.kv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
ENCODER_KEYS = ["pos_embed", *keys("patch_embed.proj"), *keys(*PARTS, stack="blocks")]
TOKEN_KEYS = [*ENCODER_KEYS, "cls_token", *keys("norm")]
DECODER_KEYS = ["mask_token", "decoder_pos_embed"]
DECODER_KEYS += keys("decoder_embed", "decoder_norm", "decoder_pred")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (MAE, TOKEN_KEYS + DECODER_KEYS + keys(*PARTS, stack="decoder_blocks")),
        (
            MAE | {"decoder": "cross"},
            TOKEN_KEYS + DECODER_KEYS + keys(*CROSS_PARTS, stack="decoder_blocks"),
        ),
        (VIT, TOKEN_KEYS + keys("head")),
        (VIT | READOUTS[3], ENCODER_KEYS + keys("fc_norm", "head")),
    ],
)
def test_state_dict_keys_are_those_of_the_published_weights(fields, expected):
    model = (MaskedAutoencoder if "decoder_depth" in fields else VisionTransformer)(**fields)
    assert sorted(model.state_dict()) == sorted(expected)
    assert ("pos_embed" in dict(model.named_parameters())) == isinstance(model, VisionTransformer)
    if "decoder_pos_embed" in expected:  # one row less without the class token
        without = MaskedAutoencoder(**fields | {"decoder_class_token": False})
        assert without.pos_embed.shape == (1, 17, 48)
        assert without.decoder_pos_embed.shape == (1, 16, 24)


@pytest.mark.skipif(torch.__version__ < "2.11", reason="fake tensors of torch 2.9 need a driver")
def test_no_tensor_is_left_on_the_cpu_when_the_model_is_on_cuda():
    """Fake tensors, which need no GPU, raise when an operation mixes devices."""
    with FakeTensorMode(), torch.device("cuda"):
        images = torch.rand(2, 3, 32, 32)
        for changes in ({}, NO_TOKEN, {"decoder_class_token": False}):
            model = MaskedAutoencoder(**MAE | changes)
            pred, mask = model.reconstruct(images)
            losses = [model(images), model(images, torch.rand(2, 16).argsort(dim=1))]
            found = [*losses, pred, mask, model.to_pixels(pred, images)]
            assert {tensor.device.type for tensor in found} == {"cuda"}
        classifier = VisionTransformer(**VIT)
        assert classifier(images).device.type == "cuda"
        assert classifier.attention_maps(images)[0].device.type == "cuda"


ATTENTIVE = {"global_pool": "attentive", "probe_queries": 4, "probe_dim": 8}


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        (MAE, {"patch_size": 7}, ["patch_size 7", "img_size 32"]),
        (MAE, {"num_heads": 5}, ["embed_dim 48", "num_heads 5"]),
        (MAE, {"num_heads": 0}, ["num_heads 0", "embed_dim 48"]),
        (MAE, {"embed_dim": 50, "num_heads": 5}, ["embed_dim 50"]),
        (MAE, {"decoder_num_heads": 7}, ["decoder_embed_dim 24", "decoder_num_heads 7"]),
        (MAE, {"mask_ratio": 0.99}, ["mask_ratio 0.99", "0 of 16"]),
        (MAE, {"mask_ratio": 0.0}, ["mask_ratio 0", "16 of 16"]),
        (MAE, {"class_tokens": 0}, ["decoder_class_token", "class_tokens 1"]),
        (MAE, {"decoder": "crss"}, ["decoder", "self or cross", "'crss'"]),
        (MAE, {"pred_ratio": 0.25}, ["pred_ratio", "decoder cross"]),
        (MAE, {"decoder": "cross", "pred_ratio": 0.8}, ["pred_ratio 0.8", "mask_ratio 0.75"]),
        (MAE, {"decoder": "cross", "pred_ratio": 0.0}, ["pred_ratio 0.0", "16 patches"]),
        (MAE, {"decoder": "cross", "pred_ratio": 0.01}, ["pred_ratio 0.01", "16 patches"]),
        (MAE, {"decoder_fusion": 3}, ["decoder_fusion 3", "2 to 2"]),
        (MAE, {"decoder_fusion": 1}, ["decoder_fusion 1", "2 to 2"]),
        (MAE, {"target": "low"}, ["pixels or lowpass", "'low'"]),
        (MAE, {"target_cutoff": 0.5}, ["target_cutoff", "target lowpass"]),
        (MAE, {"target": "lowpass", "target_cutoff": 1.5}, ["target_cutoff", "1.5"]),
        (VIT, {"class_tokens": 0}, ["global_pool token", "class_tokens"]),
        (VIT, {"global_pool": "max"}, ["global_pool", "avg, token or attentive", "'max'"]),
        (VIT, {"fc_norm": True}, ["fc_norm", "global_pool token"]),
        (VIT, {"global_pool": "attentive"}, ["probe_queries", "probe_dim", "None"]),
        (VIT, {"probe_queries": 4, "probe_dim": 8}, ["probe_queries", "4 and 8 with token"]),
        (VIT | ATTENTIVE, {"probe_dim": 9}, ["probe_queries 4", "9"]),
        (VIT | ATTENTIVE, {"probe_queries": 0}, ["probe_queries 0", "8"]),
    ],
)
def test_models_that_cannot_be_are_refused_with_their_fields(kind, changes, named):
    with pytest.raises(InputError) as error:
        (MaskedAutoencoder if kind is MAE else VisionTransformer)(**kind | changes)
    assert [words for words in named if words not in str(error.value)] == []


def test_images_of_another_size_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(B, 3, 32, 32\).*\(2, 3, 64, 64\)"):
        MaskedAutoencoder(**MAE)(torch.rand(2, 3, 64, 64))


def test_low_rank_sums_by_hand_and_merged():
    """y = W x + b + B (A x), which is W's at first; alone they and the readout are trained."""
    model = randomized(VisionTransformer(**VIT | READOUTS[1]))
    images, before = torch.randn(2, 3, 32, 32), model.state_dict()
    expected = model(images)
    add_lora(model, 5, torch.Generator().manual_seed(0))
    assert torch.equal(model(images), expected)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    readout = {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    layers = [f"blocks.{i}.attn.{part}" for i in (0, 1) for part in ("qkv", "proj")]
    assert trained == readout | {f"{n}.lora_{part}" for n in layers for part in "ab"}
    for name in layers:
        layer = model.get_submodule(name)
        assert layer.lora_a.shape == (5, 48) and layer.lora_a.std() > 0.05
        torch.nn.init.normal_(layer.lora_b, std=0.1)
    x, layer = torch.randn(3, 48), model.blocks[1].attn.qkv
    by_hand = x @ layer.weight.T + layer.bias + (x @ layer.lora_a.T) @ layer.lora_b.T
    torch.testing.assert_close(layer(x), by_hand)
    merged = merged_tensors(model)
    assert merged.keys() == before.keys()
    plain = VisionTransformer(**VIT | READOUTS[1])
    plain.load_state_dict(merged)
    assert not torch.allclose(model(images), expected)
    torch.testing.assert_close(plain(images), model(images), rtol=0, atol=1e-5)
