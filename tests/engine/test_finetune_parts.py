"""Layer decay, moving average, mixing, augmentation, the classifiers from weights and the best of
them: in numbers."""

import logging
import math
from pathlib import Path

import pytest
import torch
from compare import identity
from safetensors.torch import load_file
from torch import nn
from torch.amp import GradScaler

from engine.evaluation.best import Best
from engine.evaluation.from_weights import Classifier, build_finetuned, build_frozen
from engine.optim import build_adamw, build_ema, optimizer_step, param_groups, set_lr, update_ema
from engine.run.checkpoint import best_path, save_weights
from models.mae import MaskedAutoencoder
from models.vit import VisionTransformer
from models.weights.files import weights_digest
from models.weights.own import read_header
from util.errors import InputError
from util.settings.evaluation import FinetuneConfig, KnnConfig

CPU = torch.device("cpu")
NO_SCALER = GradScaler("cpu", enabled=False)
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
GEOMETRY = {
    "img_size": 16,
    "patch_size": 8,
    "in_chans": 3,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "mlp_ratio": 4.0,
}
MAE = GEOMETRY | {
    "class_token": True,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "decoder_class_token": True,
    "mask_ratio": 0.75,
    "norm_pix_loss": True,
}
NO_TOKEN = {"class_token": False, "decoder_class_token": False}
STATS = {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.2]}


def vit(**changes) -> VisionTransformer:
    settings = {"num_classes": 5, "class_token": True, "global_pool": "avg", "fc_norm": True}
    return VisionTransformer(**GEOMETRY | settings | changes)


BLOCK = {  # decay of each parameter of a block
    "norm1.weight": 0.0,
    "norm1.bias": 0.0,
    "attn.qkv.weight": 0.05,
    "attn.qkv.bias": 0.0,
    "attn.proj.weight": 0.05,
    "attn.proj.bias": 0.0,
    "norm2.weight": 0.0,
    "norm2.bias": 0.0,
    "mlp.fc1.weight": 0.05,
    "mlp.fc1.bias": 0.0,
    "mlp.fc2.weight": 0.05,
    "mlp.fc2.bias": 0.0,
}


@pytest.mark.parametrize(
    ("norm", "readout"),
    [
        ("fc_norm", {}),
        ("norm", {"fc_norm": False}),
        ("norm", {"global_pool": "token", "fc_norm": False}),
    ],
)
def test_scale_and_decay_of_every_parameter_by_hand(norm, readout):
    """Layer decay 0.75, three blocks: 0.75^4 below them, 0.75^3 to 0.75^1 in them, 1 above."""
    expected = {
        "cls_token": (0.31640625, 0.0),
        "pos_embed": (0.31640625, 0.0),
        "patch_embed.proj.weight": (0.31640625, 0.05),
        "patch_embed.proj.bias": (0.31640625, 0.0),
        f"{norm}.weight": (1.0, 0.0),
        f"{norm}.bias": (1.0, 0.0),
        "head.weight": (1.0, 0.05),
        "head.bias": (1.0, 0.0),
    }
    for block, scale in enumerate((0.421875, 0.5625, 0.75)):
        expected |= {f"blocks.{block}.{name}": (scale, decay) for name, decay in BLOCK.items()}
    model = vit(**readout)
    groups = param_groups(model, weight_decay=0.05, layer_decay=0.75)
    found = {
        name: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for name in group["names"]
    }
    assert found == expected
    assert (
        sum(len(group["params"]) for group in groups)
        == len(expected)
        == len(list(model.parameters()))
    )
    named = dict(model.named_parameters())
    for group in groups:
        assert all(
            named[name] is p for name, p in zip(group["names"], group["params"], strict=True)
        )


def test_an_adamw_step_with_layer_decay_by_hand():
    """Peak lr 0.1: a matrix of block 0 (scale 0.75^3, decays) and the head's bias (scale 1, does
    not)."""
    model = vit()
    optimizer = build_adamw(param_groups(model, weight_decay=0.05, layer_decay=0.75), 0.9, 0.999)
    set_lr(optimizer, 0.1)
    matrix, bias = model.blocks[0].mlp.fc1.weight, model.head.bias
    before = matrix.detach().clone()
    for step, (of_matrix, of_bias) in enumerate([(2.0, -3.0), (-1.0, 1.0)]):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        matrix.grad.fill_(of_matrix)
        bias.grad.fill_(of_bias)
        optimizer_step(optimizer, NO_SCALER, clip_grad=None)
        lr = 0.1 * 0.421875
        if step == 0:  # the first step of Adam is lr * sign(gradient)
            expected = before * (1 - lr * 0.05) - lr
            expected_bias = 0.1
        else:  # moments 0.9 m + 0.1 g and 0.999 v + 0.001 g^2, over 1 - 0.9^2 and 1 - 0.999^2
            change = (0.9 * 0.2 - 0.1) / 0.19 / math.sqrt((0.999 * 0.004 + 0.001) / 0.001999)
            expected = expected * (1 - lr * 0.05) - lr * change
            change = (0.9 * -0.3 + 0.1) / 0.19 / math.sqrt((0.999 * 0.009 + 0.001) / 0.001999)
            expected_bias = 0.1 - 0.1 * change
        torch.testing.assert_close(matrix.detach(), expected, rtol=0, atol=1e-6)
        assert bias.tolist() == pytest.approx([expected_bias] * 5, abs=1e-6)


def test_the_moving_average_by_hand():
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(-2.0)
    ema = build_ema(model, 0.9)
    expected_weight, expected_bias = 1.0, -2.0
    for weight, bias in ((2.0, 0.0), (5.0, 10.0), (-3.0, 1.0)):
        with torch.no_grad():
            model.weight.fill_(weight)
            model.bias.fill_(bias)
        update_ema(ema, model, torch.tensor(0.0))
        expected_weight = 0.9 * expected_weight + 0.1 * weight
        expected_bias = 0.9 * expected_bias + 0.1 * bias
        assert ema.module.weight.item() == pytest.approx(expected_weight, abs=1e-6)
        assert ema.module.bias.item() == pytest.approx(expected_bias, abs=1e-6)
    assert expected_weight == pytest.approx(1.041)  # 0.729 + 0.081 * 2 + 0.09 * 5 - 0.1 * 3
    assert not ema.module.training
    assert all(not p.requires_grad or p.grad is None for p in ema.module.parameters())
    assert build_ema(model, None) is None


def test_a_skipped_step_leaves_the_moving_average_bit_identical():
    torch.manual_seed(0)
    model = vit()
    ema = build_ema(model, 0.99)
    for found_inf, moves in ((0.0, True), (1.0, False), (0.0, True)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape))
        before = {name: tensor.clone() for name, tensor in ema.module.state_dict().items()}
        update_ema(ema, model, torch.tensor(found_inf))
        for name, tensor in ema.module.state_dict().items():
            assert torch.equal(tensor, before[name]) != moves, name
    assert ema.module.state_dict().keys() == model.state_dict().keys()


def save(
    folder: Path, model: nn.Module, kwargs: dict, name: str = "own.safetensors", **stats
) -> str:
    """As a finished run writes it; all its parameters are random, so that a swapped or forgotten
    tensor shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return str(save_weights(folder / name, model, identity(model_args=kwargs, **(STATS | stats))))


def pretrained(folder: Path, **changes) -> str:
    kwargs = MAE | changes
    return save(folder, MaskedAutoencoder(**kwargs), kwargs)


def classifier(folder: Path, name: str = "own.safetensors", **changes) -> str:
    kwargs = {
        **GEOMETRY,
        "num_classes": 5,
        "class_token": True,
        "global_pool": "avg",
        "fc_norm": True,
        **changes,
    }
    return save(folder, VisionTransformer(**kwargs), kwargs, name)


def knn(**changes) -> KnnConfig:
    return KnnConfig(
        size="debug", **{**GEOMETRY, "mean": (0.5, 0.4, 0.3), "std": (0.25, 0.2, 0.2), **changes}
    )


def finetuning(**changes) -> FinetuneConfig:
    return FinetuneConfig(
        size="debug",
        drop_path_rate=0.0,
        **{**GEOMETRY, "mean": (0.5, 0.4, 0.3), "std": (0.25, 0.2, 0.2), **changes},
    )


def images() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def has_fc_norm(model: VisionTransformer) -> bool:
    names = model.state_dict().keys()
    assert ("fc_norm.weight" in names) != ("norm.weight" in names)
    return "fc_norm.weight" in names


def assert_frozen(found: Classifier) -> None:
    assert not any(module.training for module in found.model.modules())
    assert not any(parameter.requires_grad for parameter in found.model.parameters())


@pytest.mark.parametrize("class_token", [True, False, None])
@pytest.mark.parametrize("global_pool", ["avg", "token"])
def test_an_untrained_model_starts_as_pretraining_does(class_token, global_pool):
    """Xavier-uniform: bound sqrt(6 / (in + out)), which is far from a truncated normal of 0.02."""
    if (class_token, global_pool) == (False, "token"):
        return  # there is no such model
    changes = {"class_token": class_token, "global_pool": global_pool, "embed_dim": 64}
    found = build_frozen(knn(**changes), "random", 7)
    model = found.model
    for weight, fan in (
        (model.blocks[0].attn.qkv.weight, 64 + 192),
        (model.blocks[2].mlp.fc1.weight, 64 + 256),
        (model.patch_embed.proj.weight, 64 + 192),
    ):
        bound = math.sqrt(6 / fan)
        assert 0.98 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    # A null class_token follows the readout.
    assert model.spec.class_token == (class_token or global_pool == "token")
    assert (model.cls_token is not None) == model.spec.class_token
    assert not has_fc_norm(model) and found.sha256 is None
    assert_frozen(found)
    again = build_frozen(knn(**changes), "random", 7).model
    other = build_frozen(knn(**changes, seed=1), "random", 7).model
    assert torch.equal(model(images()), again(images()))
    assert not torch.equal(model(images()), other(images()))


@pytest.mark.parametrize("global_pool", ["avg", "token"])
def test_a_pretrained_encoder_is_read_through_its_own_norm(tmp_path, global_pool):
    path = pretrained(tmp_path)
    found = build_frozen(knn(global_pool=global_pool), path, 7)
    assert not has_fc_norm(found.model)
    assert_frozen(found)
    assert found.sha256 == weights_digest(path)
    mae = MaskedAutoencoder(**MAE)
    mae.load_state_dict(load_file(path))
    tokens = mae.forward_encoder(mae.patchify(images()), torch.arange(4).expand(4, -1))
    expected = tokens[:, 0] if global_pool == "token" else tokens[:, 1:].mean(dim=1)
    torch.testing.assert_close(
        found.model.forward_features(images()), expected.detach(), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("fc_norm", [True, False])
def test_a_frozen_classifier_is_read_through_the_norm_that_it_holds(tmp_path, fc_norm):
    path = classifier(tmp_path, fc_norm=fc_norm)
    source = vit(fc_norm=fc_norm).eval()
    source.load_state_dict(load_file(path))
    found = build_frozen(knn(), path, 5).model
    assert has_fc_norm(found) == fc_norm
    assert torch.equal(found.forward_features(images()), source.forward_features(images()))


BUILDERS = {
    "frozen": lambda path, **changes: build_frozen(knn(**changes), path, 5),
    "fine-tuned": lambda path, **changes: build_finetuned(finetuning(finetune=path, **changes), 5),
}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize("has_token", [True, False])
def test_the_class_token_follows_the_weights(tmp_path, build, has_token):
    path = pretrained(tmp_path, **({} if has_token else NO_TOKEN))
    for changes in ({}, {"class_token": has_token}, *([{"global_pool": "token"}] * has_token)):
        model = build(path, **changes).model
        assert (model.cls_token is not None) == model.spec.class_token == has_token
    for changes in (
        {"class_token": not has_token},
        *([{"global_pool": "token"}] * (not has_token)),
    ):
        with pytest.raises(InputError, match=f"class_token is .*{path}|{path} has none"):
            build(path, **changes)


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_other_pixel_statistics_are_worth_a_warning(tmp_path, caplog, build):
    path = pretrained(tmp_path)
    build(path)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    build(path, mean=(0.5, 0.4, 0.2), std=(0.3, 0.2, 0.2))
    warned = [record.args for record in caplog.records if record.levelno >= logging.WARNING]
    assert warned == [
        ("mean", (0.5, 0.4, 0.3), (0.5, 0.4, 0.2)),
        ("std", (0.25, 0.2, 0.2), (0.3, 0.2, 0.2)),
    ]


@pytest.mark.parametrize("global_pool", ["avg", "token"])
def test_fine_tuning_starts_with_a_small_fresh_head(tmp_path, global_pool):
    path = pretrained(tmp_path)
    found = build_finetuned(finetuning(finetune=path, global_pool=global_pool), 1000)
    model, tensors = found.model, load_file(path)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.02)  # 32,000 values
    assert model.head.weight.abs().max() < 2e-4
    assert not model.head.bias.any()
    own = model.state_dict()
    for name in own.keys() - {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}:
        assert torch.equal(own[name], tensors[name]), name
    assert has_fc_norm(model) == (global_pool == "avg")
    if global_pool == "avg":
        assert (model.fc_norm.weight == 1).all()
        assert not model.fc_norm.bias.any()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert found.sha256 == weights_digest(path)
    for seed in (0, 1):
        again = build_finetuned(finetuning(finetune=path, seed=seed), 1000).model
        assert torch.equal(again.head.weight, model.head.weight) == (seed == 0)


@pytest.mark.parametrize(
    ("global_pool", "class_token"), [("avg", None), ("avg", True), ("token", None)]
)
def test_training_from_scratch_starts_with_a_truncated_normal(global_pool, class_token):
    found = build_finetuned(finetuning(global_pool=global_pool, class_token=class_token), 1000)
    model = found.model
    for layer in (model.head, model.blocks[0].attn.qkv, model.blocks[2].mlp.fc2):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not layer.bias.any()
    assert has_fc_norm(model) == (global_pool == "avg")
    assert (model.cls_token is not None) == (class_token is True or global_pool == "token")
    assert found.sha256 is None
    assert found.model.spec.fc_norm == (global_pool == "avg")


def test_a_head_for_the_same_classes_is_kept_and_another_is_replaced(tmp_path):
    path = classifier(tmp_path)
    tensors = load_file(path)
    kept = build_finetuned(finetuning(finetune=path), 5).model.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in tensors.items())
    replaced = build_finetuned(finetuning(finetune=path), 6).model
    assert replaced.head.weight.shape == (6, 32)
    assert replaced.head.weight.abs().max() < 2e-4
    assert torch.equal(replaced.fc_norm.weight, tensors["fc_norm.weight"])


def test_evaluation_needs_a_head(tmp_path):
    for path, changes, num_classes in (
        (pretrained(tmp_path), {"global_pool": "token"}, 5),
        (classifier(tmp_path, name="classifier"), {}, 6),
    ):
        with pytest.raises(InputError, match=f"eval: {path} .*{num_classes} classes.*head.weight"):
            build_finetuned(finetuning(finetune=path, eval=True, **changes), num_classes)


@pytest.mark.parametrize(
    "readout",
    [{}, {"fc_norm": False}, {"global_pool": "token", "fc_norm": False}, {"class_token": False}],
)
def test_evaluation_takes_a_classifier_as_it_is(tmp_path, readout):
    """Every bit of it, the norm included: averaging with `norm` is not given a fresh `fc_norm`."""
    path = classifier(tmp_path, **readout)
    source = vit(**readout)
    source.load_state_dict(load_file(path))
    found = build_finetuned(
        finetuning(finetune=path, eval=True, global_pool=readout.get("global_pool", "avg")), 5
    )
    assert torch.equal(found.model.eval()(images()), source.eval()(images()))


@pytest.mark.parametrize(
    ("of_file", "of_settings"),
    [
        ({"global_pool": "token", "fc_norm": False}, "avg"),
        ({"global_pool": "avg", "fc_norm": False}, "token"),
    ],
)
def test_evaluation_refuses_another_readout_than_the_head_was_trained_with(
    tmp_path, of_file, of_settings
):
    """It would only show as a bad accuracy."""
    path = classifier(tmp_path, **of_file)
    with pytest.raises(InputError, match="global_pool"):
        build_finetuned(finetuning(finetune=path, eval=True, global_pool=of_settings), 5)


def best_in(folder: Path, is_main: bool = True, resumed: bool = False) -> Best:
    folder.mkdir(exist_ok=True)
    return Best(folder, identity(model_args={"depth": 3}, **STATS), is_main, resumed)


def filled(value: float) -> nn.Module:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.fill_(value)
    return model


def kept(folder: Path) -> tuple[float, dict]:
    """The weight that was kept, and what the header says."""
    return load_file(best_path(folder))["weight"][0, 0].item(), read_header(best_path(folder))


def test_the_best_evaluation_is_kept_and_of_equals_the_first(tmp_path):
    best = best_in(tmp_path)
    assert (best.acc1, best.epoch) == (-1.0, 0)
    for epoch, acc1, winner in (
        (1, 0.0, 1),
        (2, 50.0, 2),
        (3, 50.0, 2),
        (4, 49.9, 2),
        (5, 50.1, 5),
        (6, 0.0, 5),
    ):
        best.offer(filled(epoch), epoch, acc1)
        assert best.epoch == winner
        weight, header = kept(tmp_path)
        assert (weight, header["epoch"]) == (winner, winner)
    assert best.acc1 == 50.1
    assert header == {"model_args": {"depth": 3}, **STATS, "acc1": 50.1, "epoch": 5}


def test_the_best_is_found_again_by_its_header(tmp_path):
    third = 100 / 3
    best_in(tmp_path).offer(filled(1), 4, third)
    best = best_in(tmp_path, resumed=True)
    assert (best.acc1, best.epoch) == (third, 4)  # every bit of the number
    best.offer(filled(2), 5, third)
    assert kept(tmp_path)[0] == 1.0
    best.offer(filled(3), 6, math.nextafter(third, 100))
    assert kept(tmp_path)[0] == 3.0
    assert (best.epoch, kept(tmp_path)[1]["epoch"]) == (6, 6)


def test_a_fresh_start_takes_no_best_from_an_earlier_run(tmp_path):
    best_in(tmp_path).offer(filled(1), 4, 90.0)
    best = best_in(tmp_path)
    best.offer(filled(2), 1, 10.0)
    assert kept(tmp_path)[0] == 2.0
    empty = best_in(tmp_path / "elsewhere", resumed=True)  # stopped before its first evaluation
    assert (empty.acc1, empty.epoch) == (-1.0, 0)


def test_only_the_main_process_touches_the_best(tmp_path):
    best_in(tmp_path).offer(filled(1), 1, 20.0)
    other = best_in(tmp_path, is_main=False)
    assert best_path(tmp_path).exists()
    other.offer(filled(2), 2, 80.0)
    assert kept(tmp_path)[0] == 1.0
    assert (other.acc1, other.epoch) == (80.0, 2)
    assert best_in(tmp_path, is_main=False, resumed=True).acc1 == 20.0
