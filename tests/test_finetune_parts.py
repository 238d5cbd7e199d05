"""Layer decay, moving average, mixing, augmentation, the classifiers from weights and the best of
them: in numbers."""

import logging
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from models.weights.convert import weights_digest
from safetensors.torch import load_file
from test_sampler import global_states
from torch import nn
from torch.amp import GradScaler
from torch.nn import functional as F

from data.transforms import finetune_transform, pretrain_transform
from engine.ema import build_ema, update_ema
from engine.evaluation.best import Best
from engine.evaluation.from_weights import Classifier, build_finetuned, build_frozen
from engine.mixing import BatchMixer
from engine.optim import build_adamw, optimizer_step, param_groups, set_lr
from engine.run.checkpoint import best_path, save_weights, weights_header
from engine.run.folder import Run
from models.mae import MaskedAutoencoder
from models.vit import VisionTransformer
from util.dist import Processes
from util.errors import InputError
from util.rng import seed_libraries, seeded
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


def mixer(num_classes: int = 5, **changes) -> BatchMixer:
    return BatchMixer(FinetuneConfig(**{"label_smoothing": 0.0} | changes), num_classes, CPU)


def test_without_any_mixing_nothing_changes():
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 4, 2])
    found = mixer()(images, labels)
    assert found[0] is images
    assert found[1] is labels


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing_comes_as_often_as_asked_and_paints_as_asked(mode):
    """A quarter of 1,600 images: 400, standard deviation 17."""
    seed_libraries(0)
    images, labels = mixer(re_prob=0.25, re_mode=mode)(
        torch.full((1600, 3, 16, 16), 9.0), torch.zeros(1600)
    )
    erased = (images != 9.0).flatten(2).any(2).all(1)
    assert 330 < erased.sum() < 470
    assert not labels.any()
    for image in images[erased]:
        changed = (image != 9.0).all(0)  # (16, 16)
        rows, columns = changed.any(1), changed.any(0)
        assert changed.sum() == rows.sum() * columns.sum()  # one rectangle
        colours = [set(of_channel.tolist()) for of_channel in image[:, changed]]
        number = changed.sum().item()
        assert 1 <= number <= 100  # a third of 256, and rounding
        if mode == "const":
            assert colours == [{0.0}] * 3
        elif mode == "rand":
            assert [len(of_channel) for of_channel in colours] == [1] * 3
            assert len(set.union(*colours)) == 3
        else:
            assert [len(of_channel) for of_channel in colours] == [number] * 3


def test_erasing_up_to_three_areas():
    def rectangles(count: int) -> int:
        """Images whose erased part is no single rectangle."""
        seed_libraries(1)
        images, _ = mixer(re_prob=1.0, re_mode="const", re_count=count)(
            torch.ones(300, 1, 32, 32), torch.zeros(300)
        )
        changed = (images == 0).squeeze(1)
        return int((changed.sum((1, 2)) != changed.any(2).sum(1) * changed.any(1).sum(1)).sum())

    assert rectangles(1) == 0
    assert rectangles(3) > 120  # two thirds have two or three


def flat_images(count: int) -> torch.Tensor:
    """Image i is filled with i."""
    return torch.arange(float(count)).view(-1, 1, 1, 1).expand(count, 3, 20, 20).clone()


def shares(labels: torch.Tensor, lam: float, num_classes: int, smoothing: float) -> torch.Tensor:
    """What an image and its partner, the one as far from the other end, give their classes."""
    on, off = 1 - smoothing + smoothing / num_classes, smoothing / num_classes
    own = torch.full((len(labels), num_classes), off)
    own[torch.arange(len(labels)), labels] = on
    return lam * own + (1 - lam) * own.flip(0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_shares_labels_as_it_shares_pixels(smoothing):
    labels, found = torch.tensor([0, 1, 2, 3, 4, 1]), set()
    for seed in range(20):
        seed_libraries(seed)
        images, targets = mixer(mixup=0.8, label_smoothing=smoothing)(flat_images(6), labels)
        lam = 1 - images[0, 0, 0, 0].item() / 5  # image 0 is lam * 0 + (1 - lam) * 5
        expected = lam * torch.arange(6.0) + (1 - lam) * torch.arange(6.0).flip(0)
        torch.testing.assert_close(
            images, expected.view(6, 1, 1, 1).expand(6, 3, 20, 20), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(targets, shares(labels, lam, 5, smoothing), rtol=0, atol=1e-5)
        torch.testing.assert_close(targets.sum(1), torch.ones(6), rtol=0, atol=1e-6)
        found.add(round(lam, 6))
    assert len(found) == 20
    assert all(0 <= lam <= 1 for lam in found)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cutmix_shares_labels_as_it_shares_the_area(smoothing):
    labels = torch.tensor([0, 1, 2, 3, 4, 1])
    for seed in range(20):
        seed_libraries(seed)
        images, targets = mixer(cutmix=1.0, label_smoothing=smoothing)(flat_images(6), labels)
        for number, image in enumerate(images):
            assert set(image.unique().tolist()) <= {float(number), float(5 - number)}
        lam = (images[0] == 0).float().mean().item()
        torch.testing.assert_close(targets, shares(labels, lam, 5, smoothing), rtol=0, atol=1e-5)
        torch.testing.assert_close(targets.sum(1), torch.ones(6), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("switch", "low", "high"), [(0.0, 0, 0), (0.5, 160, 240), (0.9, 330, 390), (1.0, 400, 400)]
)
def test_cutmix_takes_the_place_of_mixup_as_often_as_asked(switch, low, high):
    both, cut = mixer(mixup=0.8, cutmix=1.0, mixup_switch_prob=switch), 0
    for seed in range(400):
        seed_libraries(seed)
        images, _ = both(flat_images(2), torch.tensor([0, 1]))
        cut += set(images.unique().tolist()) <= {0.0, 1.0}  # mixup gives other values
    assert low <= cut <= high


@pytest.mark.parametrize(
    "changes", [{"re_prob": 0.5}, {"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}]
)
def test_mixing_is_a_function_of_the_seed(changes):
    def made(seed: int) -> tuple[bytes, bytes]:
        seed_libraries(seed)
        images, targets = mixer(**changes)(flat_images(8) + 1, torch.arange(8) % 5)
        return images.numpy().tobytes(), targets.numpy().tobytes()

    first = [made(seed) for seed in range(6)]
    assert [made(seed) for seed in reversed(range(6))] == first[::-1]
    assert len({images for images, _ in first}) == 6


def test_smoothing_without_mixing_by_hand():
    """C = 4, s = 0.1: the right class has 1 - s + s/C = 0.925, each other 0.025."""
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    log_sum = math.log(sum(math.exp(x) for x in (1, 2, 3, 4)))
    of_first = -(0.025 * (1 + 2 + 3) + 0.925 * 4 - log_sum)
    smooth = mixer(4, label_smoothing=0.1)
    assert smooth.loss(logits, torch.tensor([3, 0])).item() == pytest.approx(
        (of_first + math.log(4)) / 2, abs=1e-6
    )
    plain = mixer(4).loss(logits, torch.tensor([3, 0])).item()
    assert plain == pytest.approx((log_sum - 4 + math.log(4)) / 2, abs=1e-6)


def test_smoothing_is_not_applied_a_second_time_to_mixed_labels():
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    targets = torch.tensor([[0.7, 0.1, 0.0, 0.2]])
    log_sum = math.log(sum(math.exp(x) for x in (1, 2, 3, 4)))
    expected = log_sum - (0.7 * 1 + 0.1 * 2 + 0.2 * 4)
    for changes in ({"mixup": 0.8}, {"cutmix": 1.0}):
        found = mixer(4, label_smoothing=0.1, **changes).loss(logits, targets)
        assert found.item() == pytest.approx(expected, abs=1e-6)
    # the whole way: images 0 and 1 mixed by lam, logits as above
    mixing = mixer(4, label_smoothing=0.1, mixup=0.8)
    seed_libraries(0)
    images, mixed = mixing(flat_images(2), torch.tensor([3, 0]))
    lam = 1 - images[0, 0, 0, 0].item()
    log_p = F.log_softmax(logits[0], dim=0)
    smooth = {label: 0.9 * log_p[label] + 0.1 * log_p.mean() for label in (3, 0)}
    expected = (
        -(lam * smooth[3] + (1 - lam) * smooth[0] + lam * smooth[0] + (1 - lam) * smooth[3]) / 2
    )
    assert mixing.loss(logits.expand(2, -1), mixed).item() == pytest.approx(
        expected.item(), abs=1e-6
    )


def picture(channels: int = 3, height: int = 40, width: int = 36) -> torch.Tensor:
    """A smooth picture: brightness and colour run across it."""
    ramp = torch.linspace(0, 255, width).expand(height, -1)
    other = torch.linspace(255, 30, height)[:, None].expand(-1, width)
    return torch.stack([ramp, other, (ramp + other) / 2][:channels]).round().to(torch.uint8)


def augmentation(
    channels: int = 3, auto_augment: str | None = RAND_AUGMENT, **changes
) -> nn.Module:
    mean, std = (
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if channels == 3 else ((0.13,), (0.31,))
    )
    settings = {
        "img_size": 24,
        "in_chans": channels,
        "mean": mean,
        "std": std,
        "auto_augment": auto_augment,
    }
    return finetune_transform(FinetuneConfig(**settings | changes))


@pytest.mark.parametrize(
    "auto_augment", [RAND_AUGMENT, "rand-m10-inc1", "rand-m10", "rand-m9-mstd0.5"]
)
@pytest.mark.parametrize("channels", [3, 1])
def test_rand_augment_takes_every_image(channels, auto_augment):
    """300 images; magnitude 10 is where posterising keeps 0 bits."""
    augment, image = augmentation(channels, auto_augment), picture(channels)
    results = []
    for seed in range(300):
        with seeded(seed, libraries=True):
            results.append(augment(image))
    assert {(result.dtype, tuple(result.shape)) for result in results} == {
        (torch.uint8, (channels, 24, 24))
    }
    assert len({result.numpy().tobytes() for result in results}) > 200
    assert torch.equal(image, picture(channels))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"auto_augment": None},
        {"auto_augment": None, "color_jitter": 0.4},
        {"img_size": (16, 32)},
    ],
)
def test_augmentation_is_a_function_of_the_seed_and_leaves_the_global_states_alone(changes):
    augment, image = augmentation(**changes), picture()

    def made(seed: int) -> bytes:
        with seeded(seed, libraries=True):
            return augment(image).numpy().tobytes()

    before = global_states()
    first = [made(seed) for seed in range(40)]
    assert global_states() == before
    seed_libraries(99)
    assert [made(seed) for seed in reversed(range(40))] == first[::-1]
    assert len(set(first)) == 40


def test_libraries_are_put_back_even_after_an_error():
    before = global_states()
    with pytest.raises(KeyError), seeded(5, libraries=True):
        seed_libraries(3)
        raise KeyError
    assert global_states() == before


def test_without_augmentation_it_is_the_crop_of_pretraining():
    settings = {"auto_augment": None, "crop_min": 0.3, "interpolation": "bilinear", "hflip": 0.7}
    plain, expected = augmentation(**settings), pretrain_transform(24, 0.3, "bilinear", 0.7)
    for seed in range(20):
        with seeded(seed, libraries=True):
            found = plain(picture())
        with seeded(seed):
            assert torch.equal(found, expected(picture()))


def test_rand_augment_crops_and_flips_as_asked():
    """With every operation off (none is chosen), what is left is the crop of the whole picture, or
    its mirror."""
    image, seen = picture(3, 24, 24), Counter()
    whole = augmentation(auto_augment="rand-n0", crop_min=0.9999, hflip=0.5)
    for seed in range(200):
        with seeded(seed, libraries=True):
            result = whole(image)
        seen[
            "same"
            if torch.equal(result, image)
            else "mirrored"
            if torch.equal(result, image.flip(-1))
            else "other"
        ] += 1
    assert seen["other"] == 0
    assert 70 < seen["mirrored"] < 130


def save(
    folder: Path, model: nn.Module, kwargs: dict, name: str = "own.safetensors", **stats
) -> str:
    """As a finished run writes it; all its parameters are random, so that a swapped or forgotten
    tensor shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return str(save_weights(folder / name, model, {"model_args": kwargs, **STATS, **stats}))


def pretrained(folder: Path, **changes) -> str:
    kwargs = MAE | changes
    return save(folder, MaskedAutoencoder(**kwargs), kwargs)


def classifier(folder: Path, **changes) -> str:
    kwargs = {
        **GEOMETRY,
        "num_classes": 5,
        "class_token": True,
        "global_pool": "avg",
        "fc_norm": True,
        **changes,
    }
    return save(folder, VisionTransformer(**kwargs), kwargs)


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
def test_an_untrained_model_starts_as_pretraining_does(class_token):
    """Xavier-uniform: bound sqrt(6 / (in + out)), which is far from a truncated normal of 0.02."""
    found = build_frozen(knn(class_token=class_token, embed_dim=64), "random", 7)
    model = found.model
    bounds = {
        model.blocks[0].attn.qkv.weight: math.sqrt(6 / (64 + 192)),
        model.blocks[2].mlp.fc1.weight: math.sqrt(6 / (64 + 256)),
        model.blocks[1].attn.proj.weight: math.sqrt(6 / (64 + 64)),
        model.patch_embed.proj.weight: math.sqrt(6 / (64 + 192)),
    }
    for weight, bound in bounds.items():
        assert 0.98 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    assert (model.cls_token is not None) == bool(class_token)  # null follows the readout, avg
    if model.cls_token is not None:
        assert 0.01 < model.cls_token.std() < 0.03
    assert not has_fc_norm(model)
    assert_frozen(found)
    assert found.sha256 is None
    assert found.model.spec.fc_norm is False
    assert found.model.spec.num_classes == 7
    again = build_frozen(knn(class_token=class_token, embed_dim=64), "random", 7).model
    other = build_frozen(knn(class_token=class_token, embed_dim=64, seed=1), "random", 7).model
    assert torch.equal(model(images()), again(images()))
    assert not torch.equal(model(images()), other(images()))


def test_an_untrained_model_read_by_its_class_token_has_one():
    found = build_frozen(knn(global_pool="token"), "random", 7)
    assert found.model.cls_token is not None
    assert found.model.spec.class_token is True


@pytest.mark.parametrize("global_pool", ["avg", "token"])
def test_a_pretrained_encoder_is_read_through_its_own_norm(tmp_path, global_pool):
    path = pretrained(tmp_path)
    found = build_frozen(knn(global_pool=global_pool), path, 7)
    assert not has_fc_norm(found.model)
    assert_frozen(found)
    assert found.sha256 == weights_digest(path)
    mae = MaskedAutoencoder(**MAE)
    mae.load_state_dict(load_file(path))
    tokens = encoded(mae, images())
    expected = tokens[:, 0] if global_pool == "token" else tokens[:, 1:].mean(dim=1)
    torch.testing.assert_close(
        found.model.forward_features(images()), expected.detach(), rtol=0, atol=1e-5
    )


def encoded(mae: MaskedAutoencoder, pixels: torch.Tensor) -> torch.Tensor:
    """The encoder's normalised tokens of all patches, from its parts."""
    patches = (
        pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    )  # (B, N, C, P, P)
    x = (
        torch.einsum("bncpq,dcpq->bnd", patches, mae.patch_embed.proj.weight)
        + mae.patch_embed.proj.bias
    )
    x = torch.cat([mae.cls_token.expand(len(x), -1, -1), x], dim=1) + mae.pos_embed
    for block in mae.blocks:
        x = block(x)
    return mae.norm(x)


def test_a_classifier_is_judged_through_the_norm_that_it_holds(tmp_path):
    path = classifier(tmp_path)
    source = vit()
    source.load_state_dict(load_file(path))
    found = build_frozen(knn(), path, 5)
    assert has_fc_norm(found.model)
    assert torch.equal(
        found.model.forward_features(images()), source.eval().forward_features(images())
    )
    path = classifier(tmp_path, fc_norm=False)
    found = build_frozen(knn(), path, 5)
    assert not has_fc_norm(found.model)
    assert torch.equal(found.model.norm.weight, load_file(path)["norm.weight"])


BUILDERS = {
    "frozen": lambda path, **changes: build_frozen(knn(**changes), path, 5),
    "fine-tuned": lambda path, **changes: build_finetuned(finetuning(finetune=path, **changes), 5),
}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_the_class_token_follows_the_weights(tmp_path, build):
    with_token = pretrained(tmp_path)
    assert build(with_token).model.cls_token is not None
    assert build(with_token, class_token=True, global_pool="token").model.cls_token is not None
    with pytest.raises(InputError) as error:
        build(with_token, class_token=False)
    assert str(error.value) == f"the settings say no class token and {with_token} has a class token"
    without = pretrained(tmp_path, **NO_TOKEN)
    assert build(without).model.cls_token is None
    assert build(without).model.spec.class_token is False
    with pytest.raises(InputError) as error:
        build(without, class_token=True)
    assert str(error.value) == f"the settings say a class token and {without} has no class token"
    with pytest.raises(InputError) as error:
        build(without, global_pool="token")
    expected = (
        f"global_pool token reads the class token and {without} has none: use --global_pool avg"
    )
    assert str(error.value) == expected


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_other_pixel_statistics_are_worth_a_warning(tmp_path, caplog, build):
    path = pretrained(tmp_path)
    build(path)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    build(path, mean=(0.5, 0.4, 0.2), std=(0.3, 0.2, 0.2))
    assert [
        record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
    ] == [
        "the weights were trained with mean (0.5, 0.4, 0.3) and the settings say (0.5, 0.4, 0.2)",
        "the weights were trained with std (0.25, 0.2, 0.2) and the settings say (0.3, 0.2, 0.2)",
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
    head = {
        seed: build_finetuned(finetuning(finetune=path, seed=seed), 1000).model.head.weight
        for seed in (0, 1)
    }
    assert torch.equal(head[0], model.head.weight)
    assert not torch.equal(head[0], head[1])


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
    path = pretrained(tmp_path)
    with pytest.raises(InputError) as error:
        build_finetuned(finetuning(finetune=path, eval=True, global_pool="token"), 5)
    expected = f"eval: {path} is no classifier of 5 classes, it lacks ['head.bias', 'head.weight']"
    assert str(error.value) == expected
    path = classifier(tmp_path)
    with pytest.raises(InputError) as error:
        build_finetuned(finetuning(finetune=path, eval=True), 6)
    assert (
        str(error.value)
        == f"eval: {path} is no classifier of 6 classes, it lacks ['head.bias', 'head.weight']"
    )


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


def run_in(folder: Path, rank: int = 0) -> Run:
    return Run(FinetuneConfig(output_dir=str(folder)), Processes(rank, 2, rank, 2, CPU))


def filled(value: float) -> nn.Module:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.fill_(value)
    return model


FACTS = {"model_args": {"depth": 3}, **STATS, "data": {"num_images": 9}}


def kept(folder: Path) -> tuple[float, dict]:
    """The weight that was kept, and what the header says."""
    return load_file(best_path(folder))["weight"][0, 0].item(), weights_header(best_path(folder))


def test_the_best_evaluation_is_kept_and_of_equals_the_first(tmp_path):
    best = Best(run_in(tmp_path), FACTS, resumed=False)
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
    Best(run_in(tmp_path), FACTS, resumed=False).offer(filled(1), 4, third)
    best = Best(run_in(tmp_path), FACTS, resumed=True)
    assert (best.acc1, best.epoch) == (third, 4)  # every bit of the number
    best.offer(filled(2), 5, third)
    assert kept(tmp_path)[0] == 1.0
    best.offer(filled(3), 6, math.nextafter(third, 100))
    assert kept(tmp_path)[0] == 3.0
    assert (best.epoch, kept(tmp_path)[1]["epoch"]) == (6, 6)


def test_a_fresh_start_takes_no_best_from_an_earlier_run(tmp_path):
    Best(run_in(tmp_path), FACTS, resumed=False).offer(filled(1), 4, 90.0)
    best = Best(run_in(tmp_path), FACTS, resumed=False)
    assert not best_path(tmp_path).exists()
    best.offer(filled(2), 1, 10.0)
    assert kept(tmp_path)[0] == 2.0
    empty = Best(
        run_in(tmp_path / "elsewhere"), FACTS, resumed=True
    )  # stopped before its first evaluation
    assert (empty.acc1, empty.epoch) == (-1.0, 0)


def test_only_the_main_process_touches_the_best(tmp_path):
    Best(run_in(tmp_path), FACTS, resumed=False).offer(filled(1), 1, 20.0)
    other = Best(run_in(tmp_path, rank=1), FACTS, resumed=False)
    assert best_path(tmp_path).exists()
    other.offer(filled(2), 2, 80.0)
    assert kept(tmp_path)[0] == 1.0
    assert (other.acc1, other.epoch) == (80.0, 2)
    assert Best(run_in(tmp_path, rank=1), FACTS, resumed=True).acc1 == 20.0
