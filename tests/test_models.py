"""Model parity with independent implementations, shapes, masking, and the frozen state-dict
keys."""

import math
from functools import partial

import pytest
import torch
from reference import huggingface_mae, timm_vit, to_huggingface
from timm.models.vision_transformer import Block as TimmBlock
from torch._subclasses.fake_tensor import FakeTensorMode

from models.blocks import Attention, Block
from models.mae import MaskedAutoencoder
from models.pos_embed import sincos_pos_embed
from models.spec import num_kept
from models.vit import VisionTransformer
from util.errors import InputError

MAE = {
    "img_size": 32,
    "patch_size": 8,
    "in_chans": 3,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "mlp_ratio": 4.0,
    "class_token": True,
    "decoder_embed_dim": 24,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
    "decoder_class_token": True,
    "mask_ratio": 0.75,
    "norm_pix_loss": True,
}
VIT = {
    "img_size": 32,
    "patch_size": 8,
    "in_chans": 3,
    "num_classes": 7,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "mlp_ratio": 4.0,
    "class_token": True,
    "global_pool": "token",
    "fc_norm": False,
}


def randomized(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """All parameters random: with zero biases and unit norms a swapped tensor would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_and_every_gradient_equal_transformers_in_float64(norm_pix_loss):
    kwargs = MAE | {"norm_pix_loss": norm_pix_loss}
    ours = randomized(MaskedAutoencoder(**kwargs)).double()
    reference = huggingface_mae(ours, kwargs).double()
    reference.load_state_dict(to_huggingface(ours.state_dict()))  # in float64
    images = torch.randn(
        4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    noise = torch.rand(4, 16, generator=torch.Generator().manual_seed(2))

    loss = ours(images, noise.argsort(dim=1))
    expected = reference(images, noise=noise).loss
    loss.backward()
    expected.backward()

    assert abs(loss.item() - expected.item()) < 1e-9
    gradients = to_huggingface({name: p.grad for name, p in ours.named_parameters()})
    reference_gradients = {
        name: p.grad for name, p in reference.named_parameters() if p.requires_grad
    }
    assert gradients.keys() == reference_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, reference_gradients[name], rtol=0, atol=1e-9, msg=name)


def test_reconstruction_and_mask_equal_transformers():
    ours = randomized(MaskedAutoencoder(**MAE)).double()
    reference = huggingface_mae(ours, MAE).double()
    reference.load_state_dict(to_huggingface(ours.state_dict()))
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    noise = torch.rand(3, 16)
    pred, mask = ours.reconstruct(images, noise.argsort(dim=1))
    expected = reference(images, noise=noise)
    torch.testing.assert_close(pred, expected.logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(mask, expected.mask.double(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("class_token", "global_pool", "fc_norm"),
    [
        (True, "token", False),
        (True, "avg", True),
        (True, "avg", False),
        (False, "avg", True),
        (False, "avg", False),
    ],
)
def test_logits_and_features_equal_timm_for_each_readout(class_token, global_pool, fc_norm):
    kwargs = VIT | {
        "class_token": class_token,
        "global_pool": global_pool,
        "fc_norm": fc_norm,
        "in_chans": 5,
    }
    kwargs |= {"img_size": (32, 48), "patch_size": (8, 16)}
    ours = randomized(VisionTransformer(**kwargs)).eval()
    reference = timm_vit(ours, kwargs).eval()
    images = torch.randn(2, 5, 32, 48)
    torch.testing.assert_close(ours(images), reference(images), rtol=0, atol=1e-5)
    feature = reference.forward_head(reference.forward_features(images), pre_logits=True)
    torch.testing.assert_close(ours.forward_features(images), feature, rtol=0, atol=1e-5)


def test_block_equals_timm_block():
    ours = randomized(Block(48, 3, 4.0))
    reference = TimmBlock(
        48, 3, 4.0, qkv_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6)
    )
    reference.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 9, 48)
    torch.testing.assert_close(ours(x), reference(x), rtol=0, atol=1e-5)


def test_drop_path_rises_linearly_and_only_acts_in_training():
    model = randomized(VisionTransformer(**VIT | {"depth": 3, "drop_path_rate": 0.2}))
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
    images = torch.randn(8, 3, 32, 32)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_fused_and_explicit_attention_agree(monkeypatch):
    attention = randomized(Attention(48, 3)).double()
    x = torch.randn(2, 17, 48, dtype=torch.float64)
    explicit = attention(x)
    monkeypatch.setattr("models.blocks.CPU_FUSED_FROM_TOKENS", 0)
    torch.testing.assert_close(attention(x), explicit, rtol=0, atol=1e-12)


def test_attention_maps_are_the_softmax_that_the_forward_pass_uses():
    model = randomized(VisionTransformer(**VIT)).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    logits, maps = model.forward_with_attention(images)
    torch.testing.assert_close(logits, model(images), rtol=0, atol=1e-12)
    assert [m.shape for m in maps] == [(2, 3, 17, 17)] * 2
    torch.testing.assert_close(
        maps[0].sum(-1), torch.ones(2, 3, 17, dtype=torch.float64), rtol=0, atol=1e-12
    )
    # by hand from the first block's qkv: softmax(q k / sqrt(16))
    tokens = model.blocks[0].norm1(model._embed(images))
    q, k, _ = model.blocks[0].attn.qkv(tokens).chunk(3, dim=-1)
    head0 = (q[..., :16] @ k[..., :16].transpose(1, 2) / 4.0).softmax(-1)
    torch.testing.assert_close(maps[0][:, 0], head0, rtol=0, atol=1e-12)
    maps[0].sum().backward()  # rows sum to 1, so the graph is there even if the gradient is small
    assert model.blocks[0].attn.qkv.weight.grad is not None


def test_positions_on_a_2_by_3_grid_by_hand():
    table = sincos_pos_embed(8, (2, 3), class_token=True)
    assert table.shape == (1, 7, 8)
    assert table[0, 0].tolist() == [0.0] * 8  # the class token's row
    # width 8: two frequencies per axis, 10000^0 = 1 and 10000^(-1/2) = 0.01; column first, then
    # row; sin, then cos
    for row in range(2):
        for column in range(3):
            expected = [
                f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in (1.0, 0.01)
            ]
            assert table[0, 1 + row * 3 + column].tolist() == pytest.approx(expected, abs=1e-7)


def test_patch_vectors_are_row_major_and_channels_last():
    model = MaskedAutoencoder(
        **MAE | {"img_size": (4, 6), "patch_size": (2, 3), "in_chans": 2, "mask_ratio": 0.5}
    )
    images = torch.arange(2 * 4 * 6, dtype=torch.float32).reshape(1, 2, 4, 6)
    patches = model.patchify(images)
    assert patches.shape == (1, 4, 12)
    # second patch: rows 0-1, columns 3-5; channel 0 holds 6 * row + column, channel 1 adds 24
    expected = [6 * r + c + 24 * ch for r in (0, 1) for c in (3, 4, 5) for ch in (0, 1)]
    assert patches[0, 1].tolist() == expected
    assert torch.equal(model.unpatchify(patches), images)


def test_loss_by_hand_from_reconstruct():
    """The training loss, which predicts only removed patches, equals the paper's definition over
    all of them."""
    model = randomized(MaskedAutoencoder(**MAE)).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ids = torch.rand(2, 16).argsort(dim=1)
    pred, mask = model.reconstruct(images, ids)
    patches = model.patchify(images)
    mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    error = (pred - (patches - mean) / (var + 1e-6).sqrt()).square().mean(-1)
    assert model(images, ids).item() == pytest.approx(
        ((error * mask).sum() / mask.sum()).item(), abs=1e-12
    )
    for b in range(2):
        assert mask[b, ids[b, :4]].tolist() == [0.0] * 4
        assert mask[b, ids[b, 4:]].tolist() == [1.0] * 12


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_to_pixels_undoes_the_target(norm_pix_loss):
    model = MaskedAutoencoder(**MAE | {"norm_pix_loss": norm_pix_loss})
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        model.to_pixels(model.target(model.patchify(images)), images), images, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"class_token": False, "decoder_class_token": False},
        {"decoder_class_token": False},
        {"img_size": (16, 40), "patch_size": (8, 4), "in_chans": 1},
        {"in_chans": 7, "norm_pix_loss": False, "mask_ratio": 0.5},
    ],
)
def test_every_variant_trains_all_its_parameters(changes):
    kwargs = MAE | changes
    model = MaskedAutoencoder(**kwargs)
    height, width = model.img_size
    loss = model(torch.randn(2, kwargs["in_chans"], height, width))
    loss.backward()
    dead = [
        name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0
    ]
    assert dead == []


def test_removed_pixels_never_reach_the_encoder():
    model = randomized(MaskedAutoencoder(**MAE))
    images = torch.randn(1, 3, 32, 32)
    ids = torch.arange(16)[None]
    pred, mask = model.reconstruct(images, ids)
    patches = model.patchify(images).clone()
    patches[0, 4:] = 9.0  # patches 0 to 3 are kept
    changed, _ = model.reconstruct(model.unpatchify(patches), ids)
    assert torch.equal(pred, changed)
    assert mask[0].tolist() == [0.0] * 4 + [1.0] * 12


@pytest.mark.parametrize(
    ("num_patches", "ratio", "kept"),
    [
        (196, 0.75, 49),
        (49, 0.75, 12),
        (10, 0.9, 1),
        (64, 0.75, 16),
        (256, 0.75, 64),
        (5, 0.5, 2),
        (100, 0.15, 85),
    ],
)
def test_number_of_kept_patches(num_patches, ratio, kept):
    assert num_kept(num_patches, ratio) == kept


def test_initialisation():
    torch.manual_seed(0)
    model = MaskedAutoencoder(**MAE | {"embed_dim": 192, "decoder_embed_dim": 96})
    weight = model.patch_embed.proj.weight.view(192, -1)
    bound = math.sqrt(6 / (192 + 192))  # xavier-uniform: fan in 3 * 8 * 8, fan out 192
    assert 0.98 * bound < weight.abs().max().item() <= bound
    qkv = model.blocks[0].attn.qkv
    assert (
        0.98 * math.sqrt(6 / (192 + 576))
        < qkv.weight.abs().max().item()
        <= math.sqrt(6 / (192 + 576))
    )
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert all(p.abs().max() == 0 for name, p in model.named_parameters() if name.endswith("bias"))


BLOCK_KEYS = [
    f"{name}.{kind}"
    for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
]


def stack_keys(prefix: str, depth: int) -> list[str]:
    return [f"{prefix}.{i}.{key}" for i in range(depth) for key in BLOCK_KEYS]


def test_state_dict_keys_are_those_of_the_published_weights():
    keys = [
        "cls_token",
        "pos_embed",
        "mask_token",
        "decoder_pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        *stack_keys("blocks", 2),
        "norm.weight",
        "norm.bias",
        "decoder_embed.weight",
        "decoder_embed.bias",
        *stack_keys("decoder_blocks", 2),
        "decoder_norm.weight",
        "decoder_norm.bias",
        "decoder_pred.weight",
        "decoder_pred.bias",
    ]
    mae = MaskedAutoencoder(**MAE)
    assert sorted(mae.state_dict()) == sorted(keys)
    assert {name for name, _ in mae.named_buffers()} == {"pos_embed", "decoder_pos_embed"}
    assert mae.pos_embed.shape == (1, 17, 48)
    without = MaskedAutoencoder(**MAE | {"decoder_class_token": False})
    assert without.pos_embed.shape == (1, 17, 48)
    assert without.decoder_pos_embed.shape == (1, 16, 24)

    encoder = [
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        *stack_keys("blocks", 2),
    ]
    encoder += ["head.weight", "head.bias"]
    token = VisionTransformer(**VIT)
    assert sorted(token.state_dict()) == sorted([*encoder, "cls_token", "norm.weight", "norm.bias"])
    avg = VisionTransformer(**VIT | {"global_pool": "avg", "class_token": False, "fc_norm": None})
    assert sorted(avg.state_dict()) == sorted([*encoder, "fc_norm.weight", "fc_norm.bias"])
    assert "pos_embed" in dict(avg.named_parameters())


def test_no_tensor_is_left_on_the_cpu_when_the_model_is_on_cuda():
    """There is no GPU here: fake tensors raise when an operation mixes devices."""
    with FakeTensorMode(), torch.device("cuda"):
        for changes in (
            {},
            {"class_token": False, "decoder_class_token": False},
            {"decoder_class_token": False},
        ):
            model = MaskedAutoencoder(**MAE | changes)
            images = torch.rand(2, 3, 32, 32)
            assert model(images).device.type == "cuda"
            assert model(images, torch.rand(2, 16).argsort(dim=1)).device.type == "cuda"
            pred, mask = model.reconstruct(images)
            assert {
                pred.device.type,
                mask.device.type,
                model.to_pixels(pred, images).device.type,
            } == {"cuda"}
        classifier = VisionTransformer(**VIT)
        assert classifier(torch.rand(2, 3, 32, 32)).device.type == "cuda"
        assert classifier.attention_maps(torch.rand(2, 3, 32, 32))[0].device.type == "cuda"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"patch_size": 7},
            "patch_size 7 does not divide the image height 32; patch_size 7 does not divide",
        ),
        ({"num_heads": 5}, "embed_dim 48 is not divisible by num_heads 5"),
        ({"embed_dim": 50, "num_heads": 5}, "embed_dim 50 is not divisible by 4"),
        ({"decoder_num_heads": 7}, "decoder_embed_dim 24 is not divisible by decoder_num_heads 7"),
        ({"mask_ratio": 0.99}, "mask_ratio 0.99 keeps 0 of 16 patches"),
        ({"mask_ratio": 0.0}, "mask_ratio 0 keeps 16 of 16 patches"),
        ({"class_token": False}, "decoder_class_token true needs class_token true"),
    ],
)
def test_impossible_autoencoders_are_refused(changes, message):
    with pytest.raises(InputError) as error:
        MaskedAutoencoder(**MAE | changes)
    assert message in str(error.value)


def test_impossible_readouts_and_images_are_refused():
    with pytest.raises(InputError, match="needs class_token true"):
        VisionTransformer(**VIT | {"class_token": False})
    with pytest.raises(InputError, match="avg or token, got 'max'"):
        VisionTransformer(**VIT | {"global_pool": "max"})
    with pytest.raises(ValueError, match=r"expected images \(B, 3, 32, 32\), got \(2, 3, 64, 64\)"):
        MaskedAutoencoder(**MAE)(torch.rand(2, 3, 64, 64))
