"""Attention rollout against loops written here, its gradients against a forward pass written here,
and the tool."""

import fnmatch
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import identity
from PIL import Image
from runs import command, run
from safetensors.torch import load_file
from test_pictures import noise, places
from torch.nn import functional as F

from data.transforms import EvalTransform
from engine.pictures.drawing import CELL, enlarged, heat_over
from engine.pictures.rollout import rollout
from engine.run.checkpoint import save_weights
from models.build import build_model, classifier_spec, encoder_of, mae_spec
from tools import vit_explain
from util.errors import InputError
from util.settings.evaluation import FinetuneConfig, LinclsConfig
from util.settings.pretrain import PretrainConfig

# The mathematics, by loops over entries

FUSE = {"mean": lambda heads: math.fsum(heads) / len(heads), "max": max, "min": min}


def loops_matrix(layers, head_fusion, discard_ratio, class_tokens, image) -> np.ndarray:
    """R of one image, (T, T); `discard_ratio` is text, so that floor(ratio * T * T) is exact."""
    size = layers[0].shape[-1]
    result, entries = np.eye(size), list(np.ndindex(size, size))
    for layer in layers:
        heads = layer[image].double().numpy()
        fused = np.array([FUSE[head_fusion](list(heads[:, i, j])) for i, j in entries])
        fused = fused.reshape(size, size)
        lowest = sorted((fused[entry], *entry) for entry in entries)  # of equal ones the first goes
        for _, i, j in lowest[: math.floor(Fraction(discard_ratio) * size * size)]:
            if j >= class_tokens:
                fused[i, j] = 0.0
        rows = (fused + np.eye(size)) / 2
        result = np.array([row / math.fsum(row) for row in rows]).dot(result)
    return result


def loops_rollout(layers, head_fusion, discard_ratio, class_tokens, reader="token") -> np.ndarray:
    """The maps of all images, (B, N): the mean row of the class tokens, or of the patches."""
    of_token = class_tokens and reader == "token"
    rows = slice(0, class_tokens) if of_token else slice(class_tokens, None)
    images = range(layers[0].shape[0])
    matrices = [loops_matrix(layers, head_fusion, discard_ratio, class_tokens, i) for i in images]
    return np.stack([matrix[rows, class_tokens:].mean(axis=0) for matrix in matrices])


def attentions(layers=3, images=2, heads=3, tokens=7, seed=0, sharpness=2.0) -> list[torch.Tensor]:
    """Random softmax rows, float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (images, heads, tokens, tokens)
    drawn = [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(layers)]
    return [(sharpness * scores).softmax(dim=-1) for scores in drawn]


@pytest.mark.parametrize("head_fusion", FUSE)
@pytest.mark.parametrize("class_tokens", [1, 0, 2])
@pytest.mark.parametrize("levels", [4, 2**40])  # 5 values, so that many entries are equal, or any
@pytest.mark.parametrize(
    ("discard_ratio", "tokens"),  # 0.29 * 100 is 28.999999999999996 in floats: 29 entries go
    [("0", 7), ("0.3", 7), ("0.9", 9), ("0.29", 10), ("0.57", 10), ("0.07", 10), ("0.95", 2)],
)
def test_rollout_equals_loops_for_every_image_of_a_batch(
    head_fusion, class_tokens, levels, discard_ratio, tokens
):
    layers = [(layer * levels).round() / levels for layer in attentions(tokens=tokens)]
    expected = loops_rollout(layers, head_fusion, discard_ratio, class_tokens)
    got = rollout(layers, head_fusion, float(discard_ratio), class_tokens)
    assert got.shape == (2, tokens - class_tokens)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-9)


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
    alone = rollout(one_head(FIRST), "mean", 0.5, class_tokens=1)
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


def randomized(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def own_forward(state, images, num_heads, global_pool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits and attentions of a state dict's ViT."""

    def norm(x, name):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, 1e-6)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    if "cls_token" in state:
        x = torch.cat([state["cls_token"].expand(len(x), 1, -1), x], dim=1)
    x = x + state["pos_embed"]
    used = []
    for i in range(len(fnmatch.filter(state, "blocks.*.attn.qkv.weight"))):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        q, k, v = (
            part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1)
        )  # (B, heads, T, D / heads)
        used.append((q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1))
        x = x + linear((used[-1] @ v).transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + linear(hidden, f"blocks.{i}.mlp.fc2")
    x = norm(x, "norm") if "norm.weight" in state else x
    pooled = x[:, 0] if global_pool == "token" else x[:, int("cls_token" in state) :].mean(dim=1)
    pooled = norm(pooled, "fc_norm") if "fc_norm.weight" in state else pooled
    return (linear(pooled, "head") if "head.weight" in state else pooled), used


# The encoder of a model in training


def addresses(model: torch.nn.Module) -> dict[str, int]:
    """Where the tensors of an encoder, or of an autoencoder's encoder, are in memory."""
    state = model.state_dict().items()
    return {n: t.data_ptr() for n, t in state if not n.startswith(("decoder_", "mask_token"))}


@pytest.mark.parametrize("class_tokens", [1, 0])
def test_encoder_of_shares_the_autoencoders_tensors_and_follows_its_training(class_tokens):
    tokens = {"class_tokens": class_tokens, "decoder_class_token": bool(class_tokens)}
    mae = randomized(build_model(mae_spec(PretrainConfig(**GEOMETRY | DECODER | tokens))), 0)
    encoder = encoder_of(mae)
    assert addresses(mae) == addresses(encoder) and ("cls_token" in addresses(mae)) == class_tokens
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    assert mae.training and all(p.requires_grad for p in mae.parameters())
    images = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(2))
    features = []
    for _ in range(2):
        everything = torch.arange(mae.num_patches).expand(len(images), -1)
        latent = mae.forward_encoder(mae.patchify(images), everything)
        expected = latent[:, -mae.num_patches :].mean(dim=1)  # (B, D)
        features.append(encoder.forward_features(images))
        torch.testing.assert_close(features[-1], expected, rtol=0, atol=1e-5)
        assert torch.equal(encoder(images), features[-1])  # it has no head
        mae(images).backward()
        torch.optim.AdamW(mae.parameters(), lr=0.01).step()
    assert (features[1] - features[0]).abs().max() > 1e-2
    assert addresses(mae) == addresses(encoder)


# The tool

SIZE = (32, 48)  # 4 x 6 patches
MEAN, STD = (0.2, 0.5, 0.7), (0.3, 0.2, 0.1)
GEOMETRY = {"size": "debug", "img_size": SIZE, "patch_size": 8, "mean": MEAN, "std": STD}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


def flags(settings: dict) -> list[str]:
    """Settings as words of a command line."""
    found = []
    for name, value in settings.items():
        found += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return found


def saved(path: Path, cfg: PretrainConfig | FinetuneConfig | LinclsConfig) -> Path:
    """Random weights of an autoencoder or classifier, as a run writes them."""
    model = build_model(mae_spec(cfg) if isinstance(cfg, PretrainConfig) else classifier_spec(cfg))
    of_run = identity(model_args=model.spec.as_dict(), mean=cfg.mean, std=cfg.std)
    return save_weights(path, randomized(model, 3), of_run)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    mae = GEOMETRY | DECODER
    head = GEOMETRY | {"num_classes": 5, "class_tokens": 1, "global_pool": "avg"}
    configs = {
        "pretrained": PretrainConfig(**mae),
        "no_token": PretrainConfig(**mae | {"class_tokens": 0, "decoder_class_token": False}),
        "token_head": FinetuneConfig(**head | {"global_pool": "token"}),
        "avg_head": FinetuneConfig(**head | {"class_tokens": 0}),
        "avg_head_with_token": FinetuneConfig(**head),
        "attentive": LinclsConfig(**head | {"probe": "attentive", "probe_queries": 4}),
    }
    return {name: saved(folder / f"{name}.safetensors", cfg) for name, cfg in configs.items()}


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """50 rows, 71 columns, half of it noise."""
    pixels = np.full((50, 71, 3), 90, dtype=np.uint8)
    pixels[:, :40] = np.random.default_rng(0).integers(0, 256, (50, 40, 3))
    path = tmp_path_factory.mktemp("images") / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def explain(weights: Path | str, image: Path, save_path: Path, *more) -> dict:
    places = ["--finetune", weights, "--image_path", image, "--save_path", save_path]
    words = [*flags(GEOMETRY), "--device", "cpu", *places, *more]
    return vit_explain.main([str(word) for word in words])


def taken(image: Path) -> torch.Tensor:
    """What the model is shown of an image, uint8 (3, 32, 48)."""
    pixels = torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1)
    return EvalTransform(SIZE, None)(pixels)


def model_input(image: Path) -> torch.Tensor:
    """The image as the model takes it, (1, 3, 32, 48)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((taken(image).float() / 255 - mean) / std)[None]


def expected_map(
    weights: Path,
    image: Path,
    head_fusion="mean",
    discard_ratio="0",
    layers=slice(None),
    reader="token",
):
    state = load_file(weights)
    chosen = own_forward(state, model_input(image), 2, "avg")[1][layers]
    has_cls = "cls_token" in state
    return loops_rollout(chosen, head_fusion, discard_ratio, has_cls, reader).reshape(4, 6)


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "pool", "reader"),
    [
        ("pretrained", "avg", "token"),
        ("no_token", "avg", "token"),
        ("token_head", "token", "token"),
        ("avg_head", "avg", "avg"),
        ("avg_head_with_token", "avg", "avg"),
    ],
)
def test_the_tool_writes_the_rollout_of_the_weights_that_it_is_given(
    name, pool, reader, weights, photo, tmp_path
):
    more = ["--head_fusion", "max", "--discard_ratio", "0.3", "--global_pool", pool]
    result = explain(weights[name], photo, tmp_path, *more, "--reader", reader)
    files = ["photo_heads.png", "photo_rollout.npy", "photo_rollout.png", "rollouts.png"]
    assert sorted(written(tmp_path)) == files
    assert result == {"grid": tmp_path / files[3], "overlays": [tmp_path / files[2]]}
    heat = np.load(tmp_path / "photo_rollout.npy")
    assert (heat.shape, heat.dtype) == ((4, 6), np.float32)
    expected = expected_map(weights[name], photo, "max", "0.3", reader=reader)
    np.testing.assert_allclose(heat, expected, rtol=0, atol=1e-6)
    for other in (("mean", "0.3"), ("max", "0"), ("max", "0.3", slice(1, 2))):  # would be seen
        other_map = expected_map(weights[name], photo, *other, reader=reader)
        assert np.abs(heat - other_map).max() > 1e-4
    # The grid shows what the model takes, and beside it the map over that.
    shown = taken(photo).permute(1, 2, 0).numpy()
    grid = np.array(Image.open(tmp_path / "rollouts.png"))
    cells = (shown, heat_over(shown, heat))
    ((y0, x0),), ((y1, x1),) = (places(grid, enlarged(cell, CELL)) for cell in cells)
    assert y0 == y1 and x0 < x1


def test_one_layer_and_its_heads(weights, photo, tmp_path):
    path = weights["pretrained"]
    explain(path, photo, tmp_path, "--layer_index", "0", "--discard_ratio", "0.9")
    heat = np.load(tmp_path / "photo_layer0_rollout.npy")
    expected = expected_map(path, photo, "mean", "0.9", slice(1))
    np.testing.assert_allclose(heat, expected, rtol=0, atol=1e-6)
    # Its heads, each by the class token's row.
    shown = taken(photo).permute(1, 2, 0).numpy()
    attention = own_forward(load_file(path), model_input(photo), 2, "avg")[1][0]
    picture = np.array(Image.open(tmp_path / "photo_layer0_heads.png"))
    cells = [heat_over(shown, attention[0, i, 0, 1:].reshape(4, 6).numpy()) for i in range(2)]
    ((y0, x0),), ((y1, x1),) = (places(picture, enlarged(cell, CELL), 1) for cell in cells)
    assert y0 == y1 and x0 < x1


def test_what_the_queries_of_an_attentive_probe_read(weights, photo, tmp_path):
    path = weights["attentive"]
    result = explain(path, photo, tmp_path, "--reader", "probe")
    files = ["photo_probe.npy", "photo_probe.png", "photo_queries.png", "probes.png"]
    assert sorted(written(tmp_path)) == files
    assert result == {"grid": tmp_path / files[3], "overlays": [tmp_path / files[1]]}
    # The encoder's tokens are those of a model without the readout, with the class token first.
    state = {n: t for n, t in load_file(path).items() if not n.startswith(("pool.", "head."))}
    plain = build_model(
        classifier_spec(FinetuneConfig(**GEOMETRY), num_classes=0, fc_norm=True, class_tokens=1)
    )
    plain.eval().load_state_dict(state, strict=True)
    with torch.no_grad():
        *_, tokens = plain.iterate_tokens(model_input(photo))
        keys = F.layer_norm(tokens, (32,), state["fc_norm.weight"], state["fc_norm.bias"], 1e-6)
    scores = load_file(path)["pool.queries"] @ keys[0, 1:].T / math.sqrt(32)
    expected = scores.softmax(dim=1).reshape(4, 4, 6)  # (M, rows, columns)
    heat = np.load(tmp_path / files[0])
    np.testing.assert_allclose(heat, expected.mean(dim=0), rtol=0, atol=1e-6)
    assert np.ptp(heat) > 1e-3 and heat.sum() == pytest.approx(1, abs=1e-5)
    shown = taken(photo).permute(1, 2, 0).numpy()
    picture = np.array(Image.open(tmp_path / files[2]))
    cells = [heat_over(shown, expected[m].numpy()) for m in range(4)]
    found = [places(picture, enlarged(cell, CELL), 1) for cell in cells]
    assert len({place for (place,) in found}) == 4


def test_rollout_of_weights_with_an_attentive_probe(weights, photo, tmp_path):
    """The rollout is the encoder's; a class is that of the probe's head."""
    path = weights["attentive"]
    explain(path, photo, tmp_path, "--discard_ratio", "0.3", "--reader", "avg")
    heat = np.load(tmp_path / "photo_rollout.npy")
    np.testing.assert_allclose(
        heat, expected_map(path, photo, "mean", "0.3", reader="avg"), rtol=0, atol=1e-6
    )
    explain(path, photo, tmp_path, "--category_index", 3)
    of_class = np.load(tmp_path / "photo_class3_rollout.npy")
    assert np.ptp(of_class) > 1e-5 and np.abs(of_class - heat).max() > 1e-4


@pytest.mark.parametrize("name", ["token_head", "avg_head", "avg_head_with_token"])
def test_what_speaks_for_a_class(name, weights, photo, tmp_path, capsys):
    path, pool = weights[name], "token" if name == "token_head" else "avg"
    for category in (0, 3):
        more = ["--category_index", category, "--global_pool", pool, "--discard_ratio", "0.3"]
        explain(path, photo, tmp_path, *more)
        heat = np.load(tmp_path / f"photo_class{category}_rollout.npy")
        images = model_input(photo).requires_grad_()
        logits, used = own_forward(load_file(path), images, 2, pool)
        gradients = torch.autograd.grad(logits[0, category], used)
        weighted = [(a * g).clamp(min=0).detach() for a, g in zip(used, gradients, strict=True)]
        # the head reads the patches, or the class token
        expected = loops_rollout(weighted, "mean", "0.3", name != "avg_head", pool).reshape(4, 6)
        np.testing.assert_allclose(heat, expected, rtol=0, atol=1e-6)
        assert np.ptp(expected) > 1e-5
        share = f"{100 * logits[0].softmax(dim=-1)[category].item():.1f} %"
        printed = capsys.readouterr().out
        assert share in printed and f"class {logits[0].argmax().item()}\n" in printed
    assert {f"rollouts_class{category}.png" for category in (0, 3)} <= written(tmp_path)


def test_an_untrained_model_is_decided_by_the_seed(photo, tmp_path):
    heats = []
    for seed, folder in ((0, "a"), (0, "b"), (1, "c")):
        explain("random", photo, tmp_path / folder, "--seed", seed, "--class_tokens", "1")
        heats.append(np.load(tmp_path / folder / "photo_rollout.npy"))
    assert np.array_equal(heats[0], heats[1]) and not np.array_equal(heats[0], heats[2])


def test_an_images_map_does_not_depend_on_those_beside_it(weights, photo, tmp_path):
    folder, path = tmp_path / "images", weights["no_token"]
    (folder / "sub").mkdir(parents=True)
    for seed, name in enumerate(("b.png", "sub/a.png", "c.jpg")):
        Image.fromarray(noise(40, 40, seed)).save(folder / name)
    more = ["--num_images", 2, "--image_path", photo, folder]
    result = explain(path, photo, tmp_path / "out", *more)
    names = [overlay.name for overlay in result["overlays"]]
    assert names == ["photo_rollout.png", "b_rollout.png", "a_rollout.png"]  # 2 of the folder's 3
    for name, file in (("photo", photo), ("b", folder / "b.png"), ("a", folder / "sub" / "a.png")):
        heat = np.load(tmp_path / "out" / f"{name}_rollout.npy")
        np.testing.assert_allclose(heat, expected_map(path, file), atol=1e-6)


def test_images_of_another_grid_from_a_data_set(tmp_path):
    """The settings decide the size: positions of the weights' 2 x 2 patches are resized."""
    grey = {"in_chans": 1, "mean": (0.4,), "std": (0.2,)}
    cfg = PretrainConfig(**GEOMETRY | DECODER | grey | {"img_size": 16})
    path = saved(tmp_path / "grey.safetensors", cfg)
    (tmp_path / "val" / "cat").mkdir(parents=True)
    for number in range(3):
        Image.effect_noise((40, 30), 50).save(tmp_path / "val" / "cat" / f"{number}.png")
    settings = {**GEOMETRY, **grey, "img_size": (24, 40), "num_images": 2, "device": "cpu"}
    places = {"finetune": path, "data_path": tmp_path, "save_path": tmp_path / "out"}
    result = vit_explain.main(flags(settings | places))
    names = [overlay.name for overlay in result["overlays"]]
    assert names == ["val_00000_rollout.png", "val_00002_rollout.png"]
    assert np.load(tmp_path / "out" / "val_00002_rollout.npy").shape == (3, 5)


@pytest.mark.parametrize("name", ["photo_rollout.npy", "photo_heads.png", "rollouts.png"])
def test_only_the_tools_own_files_are_replaced(weights, photo, tmp_path, name):
    for _ in range(2):
        explain(weights["pretrained"], photo, tmp_path)
    (tmp_path / name).write_bytes(b"the user's own")
    with pytest.raises(InputError, match=name):
        explain(weights["pretrained"], photo, tmp_path)
    assert (tmp_path / name).read_bytes() == b"the user's own"


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("pretrained", "--category_index 0", "category_index"),  # no head
        ("random", "--category_index 0", "category_index"),
        ("token_head", "--global_pool token --category_index 5", "category_index"),
        ("token_head", "--category_index 1", "global_pool"),  # of avg
        ("no_token", "--global_pool token", "global_pool"),
        ("avg_head", "--num_classes 7", "num_classes"),
        ("avg_head", "--reader probe", "reader probe"),
        ("attentive", "--global_pool token", "global_pool"),
        ("pretrained", "--discard_ratio 1", "discard_ratio"),
        ("pretrained", "--layer_index 2", "layer_index"),
        ("pretrained", "--head_fusion maen", "head_fusion"),
        ("pretrained", "--size tiny", "embed_dim"),
        ("pretrained", "--class_tokens 0", "class_tokens"),
        ("pretrained", "--img_size 32 44", "patch_size"),
        ("pretrained", "--mean 0.5", "mean"),
        ("pretrained", "--image_path nowhere.png", "nowhere.png"),
        ("pretrained", "--save_path {photo}", "save_path"),
        ("photo", "", "photo.png"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_drawn(
    name, arguments, named, weights, photo, tmp_path
):
    path = {"random": "random", "photo": photo, **weights}[name]
    with pytest.raises(InputError, match=named) as error:
        explain(path, photo, tmp_path, *arguments.format(photo=photo).split())
    assert "\n" not in str(error.value) and written(tmp_path) == set()


@pytest.mark.long
@pytest.mark.parametrize(("layer", "status"), [("1", 0), ("7", 2)])
def test_the_command_needs_no_display_and_says_one_line(weights, photo, tmp_path, layer, status):
    places = ["--finetune", str(weights["pretrained"]), "--image_path", str(photo)]
    words = [*flags(GEOMETRY), "--device", "cpu", *places, "--layer_index", layer]
    done = run(command(*words, script="tools/vit_explain.py"), cwd=tmp_path, DISPLAY="")
    assert done.returncode == status and "Traceback" not in done.stderr
    assert (done.stdout == "") == done.stderr.splitlines()[-1].startswith("error: layer_index")


def test_names_as_long_as_the_system_takes(weights, photo, tmp_path):
    long = tmp_path / f"{'a' * 246}.png"
    long.write_bytes(photo.read_bytes())
    model = next(iter(weights.values()))
    explain(model, long, tmp_path / "out", "--layer_index", 0)
    assert len(written(tmp_path / "out")) == 4
