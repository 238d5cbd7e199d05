"""Several class tokens: in the models, against plain loops and transformers' own models; and in
files of other projects, whose registers are read as class tokens."""

import json
import re
from dataclasses import replace

import pytest
import torch
from reference import ENCODER, MAE, READOUTS, VIT, TimmViT, randomized
from safetensors.torch import load_file
from torch import nn
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PixioConfig,
    PixioModel,
)

import hubconf
from engine.evaluation.from_weights import build_frozen
from engine.evaluation.readers import feature_reader
from models.dense import DenseTransformer
from models.mae import MaskedAutoencoder
from models.spec import spec_from_dict
from models.vit import VisionTransformer
from models.weights.adapt import load_for_pretraining, load_into_dense
from models.weights.own import own_bytes
from models.weights.read import read_weights
from models.weights.write import write_weights
from util.errors import InputError
from util.settings.evaluation import KnnConfig
from util.settings.tools import EmbedConfig

THREE = {"class_tokens": 3}
PIXELS = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
COMMON = {  # of the small models of transformers
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}
# The keys that transformers gives, and those of the projects' own files, which facebookresearch's
# pixio/pixio.py (also as published) and dinov2 define alike but for registers and layer scale.
OWN_KEYS = {
    r"embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"embeddings\.position_embeddings": "pos_embed",
    r"embeddings\.": "",
    r"encoder\.layer\.|layers\.": "blocks.",
    r"attention\.attention\.|attention\.(?=[qkv]_)": "attn.",
    r"attention\.output\.dense|attention\.o_proj": "attn.proj",
    r"layer_scale(\d)\.lambda1": r"ls\1.gamma",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
    r"layernorm": "norm",
}


def images(size: tuple[int, int] = (32, 32), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(5), dtype=dtype)


def own_file(folder, model, **changes):
    """A file as a finished run writes it; `changes` are of the fields of the specification, None
    leaves one out."""
    fields = {n: v for n, v in (model.spec.as_dict() | changes).items() if v is not None}
    (folder / "own").write_bytes(own_bytes(model.state_dict(), {"model_args": fields, **PIXELS}))
    return folder / "own"


@pytest.mark.parametrize("decoder_class_token", [True, False])
def test_loss_with_several_class_tokens_by_loops(decoder_class_token):
    """Token by token, in float64; all rows of the position tables are random."""
    fields = MAE | THREE | {"decoder_class_token": decoder_class_token, "norm_pix_loss": False}
    model = randomized(MaskedAutoencoder(**fields)).double()
    ids = torch.rand(2, 16, generator=torch.Generator().manual_seed(3)).argsort(dim=1)
    losses = []
    for image, order in zip(images(dtype=torch.float64), ids.tolist(), strict=True):
        # patches as vectors of rows of pixels, by hand
        patch = [
            image[:, 8 * (i // 4) : 8 * (i // 4) + 8, 8 * (i % 4) : 8 * (i % 4) + 8]
            for i in range(16)
        ]
        table, kept = model.pos_embed[0], order[:4]
        x = [model.cls_token[0, i] + table[i] for i in range(3)]
        for i in kept:
            weight = model.patch_embed.proj.weight.flatten(1)
            x.append(weight @ patch[i].flatten() + model.patch_embed.proj.bias + table[3 + i])
        tokens = torch.stack(x)[None]
        for block in model.blocks:
            tokens = block(tokens)
        latent = model.decoder_embed(model.norm(tokens))[0]
        table, first = model.decoder_pos_embed[0], 3 if decoder_class_token else 0
        y = [latent[i] + table[i] for i in range(first)]
        y += [latent[3 + n] + table[first + i] for n, i in enumerate(kept)]
        y += [model.mask_token[0, 0] + table[first + i] for i in order[4:]]
        tokens = torch.stack(y)[None]
        for block in model.decoder_blocks:
            tokens = block(tokens)
        pred = model.decoder_pred(model.decoder_norm(tokens))[0, first + 4 :]
        target = torch.stack([patch[i].permute(1, 2, 0).flatten() for i in order[4:]])
        losses.append(((pred - target) ** 2).mean())
    found = model(images(dtype=torch.float64), ids)
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=0, atol=1e-9)


def test_positions_of_class_tokens_are_zeros_and_stay_on_another_grid():
    model = VisionTransformer(**VIT | THREE)
    mae = MaskedAutoencoder(**MAE | THREE)
    assert [len(t[0]) for t in (model.pos_embed, mae.pos_embed, mae.decoder_pos_embed)] == [19] * 3
    for table in (model.pos_embed, mae.pos_embed, mae.decoder_pos_embed):
        assert not table[0, :3].any() and table[0, 3:].abs().sum(dim=1).min() > 0
    rows = randomized(model)._positions((2, 5))
    assert rows.shape == (1, 13, 48) and torch.equal(rows[:, :3], model.pos_embed[:, :3])
    assert model.cls_token.std(dim=1).min() > 0  # they do not start alike


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The projects' own keys, with q, k and v in one."""
    own = {}
    for name, tensor in tensors.items():
        for pattern, new in OWN_KEYS.items():
            name = re.sub(pattern, new, name)
        own[name] = tensor
    for name in [name for name in own if re.search(r"attn\.(query|q_proj)\.", name)]:
        q, k, v = ("query", "key", "value") if "query" in name else ("q_proj", "k_proj", "v_proj")
        parts = [own.pop(name.replace(q, part)) for part in (q, k, v)]
        own[name.replace(q, "qkv")] = torch.cat(parts)
    return own


@pytest.mark.parametrize("layout", ["transformers", "own"])
@pytest.mark.parametrize("project", ["Pixio", "DINOv2"])
def test_features_of_pixio_and_of_dinov2_with_registers(tmp_path, project, layout):
    if project == "Pixio":
        theirs = randomized(PixioModel(PixioConfig(**COMMON, n_cls_tokens=3)))
    else:
        config = Dinov2WithRegistersConfig(**COMMON, num_register_tokens=2)
        theirs = randomized(Dinov2WithRegistersModel(config))
    path = tmp_path
    if layout == "transformers":
        theirs.save_pretrained(path)
    else:
        path = tmp_path / "weights.pth"
        tensors = renamed(theirs.state_dict())
        assert tensors["cls_token"].shape[1] == (3 if project == "Pixio" else 1)
        assert "blocks.1.attn.qkv.bias" in tensors and "blocks.0.mlp.fc2.weight" in tensors
        torch.save(tensors, path)
    info = read_weights(path)[1]
    registers = " with registers" * (project == "DINOv2")
    assert info.kind == (
        f"Hugging Face {project} (encoder{registers})"
        if layout == "transformers"
        else f"timm (encoder{registers})"
    )
    assert (info.spec.class_tokens, info.spec.grid_size) == (3, (4, 4))
    heads = None if layout == "transformers" else 3
    with torch.no_grad():
        found = theirs(images())
    # transformers has DINOv2's class token before its registers
    tokens = found.last_hidden_state
    expected = {"avg": tokens[:, 3:].mean(dim=1), "token": tokens[:, :3].mean(dim=1)}
    for pool, feature in expected.items():
        model = hubconf.encoder(str(path), global_pool=pool, num_heads=heads)
        torch.testing.assert_close(model(images()), feature, rtol=0, atol=1e-5)
    default = hubconf.encoder(str(path), num_heads=heads)(images())
    if project == "Pixio":  # its own readout
        torch.testing.assert_close(default, found.pooler_output, rtol=0, atol=1e-5)
    else:
        torch.testing.assert_close(default, expected["avg"], rtol=0, atol=1e-5)


def timm_vit(**fields) -> TimmViT:
    """A small one that reads the mean of its patches."""
    common = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5, "global_pool": "avg"}
    return TimmViT(**common | fields)


@pytest.mark.parametrize("no_embed_class", [True, False])
@pytest.mark.parametrize(("class_token", "registers"), [(True, 2), (False, 4), (True, 0)])
@pytest.mark.parametrize("init_values", [None, 0.3])
def test_timm_with_registers(tmp_path, no_embed_class, class_token, registers, init_values):
    theirs = timm_vit(
        img_size=(32, 48),
        patch_size=8,
        class_token=class_token,
        reg_tokens=registers,
        no_embed_class=no_embed_class,
        init_values=init_values,
    )
    torch.save(randomized(theirs).state_dict(), tmp_path / "a.pth")
    model = hubconf.classifier(str(tmp_path / "a.pth"), num_heads=3, img_size=(32, 48))
    assert model.spec.class_tokens == class_token + registers
    pictures = images((32, 48))
    torch.testing.assert_close(model(pictures), theirs(pictures), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("img_size", "registers"), [(48, 8), (80, 8), (48, 4)])
def test_the_rows_of_tokens_are_found_in_a_small_table_or_asked_for(tmp_path, img_size, registers):
    """Also where the table, less the tokens, would be a square grid, too."""
    theirs = timm_vit(img_size=img_size, patch_size=16, reg_tokens=registers, no_embed_class=True)
    path = tmp_path / "a.pth"
    torch.save(theirs.state_dict(), path)
    rows = (img_size // 16) ** 2
    fitting = [n for n in (0, 1, 1 + registers) if n < rows and (rows - n) ** 0.5 % 1 == 0]
    if len(fitting) > 1:
        with pytest.raises(
            InputError, match=f"table of {rows} rows may have 0 or .* give img_size"
        ):
            read_weights(path)
    stated = (img_size, img_size) if len(fitting) > 1 else None
    tensors, info = read_weights(path, stated)
    assert info.spec.img_size == img_size
    torch.testing.assert_close(tensors["pos_embed"][:, 1 + registers :], theirs.pos_embed)


def test_constructors_know_the_earlier_keyword():
    plain = {name: value for name, value in MAE.items() if name != "class_tokens"}
    fields = plain | {"class_token": False, "decoder_class_token": False}
    assert MaskedAutoencoder(**fields).spec.class_tokens == 0
    with pytest.raises(TypeError, match="not of a ClassifierSpec"):
        VisionTransformer(**fields)


def test_layer_scale_in_half_precision_keeps_small_numbers(tmp_path):
    """1e-5 times 0.02 is below what float16 can hold well."""
    model = VisionTransformer(**VIT | {"num_classes": 0})
    scaled = {n: t.half() for n, t in model.state_dict().items()}
    scaled |= {
        f"blocks.{i}.ls{j}.gamma": torch.full((48,), 1e-5).half() for i in (0, 1) for j in (1, 2)
    }
    torch.save(scaled, tmp_path / "a.pth")
    found = read_weights(tmp_path / "a.pth")[0]["blocks.1.mlp.fc2.weight"]
    gamma = torch.tensor(1e-5).half().double()
    expected = scaled["blocks.1.mlp.fc2.weight"].double() * gamma
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("readout", [READOUTS[1], READOUTS[2]])
def test_timm_loads_several_class_tokens_as_registers_and_gives_them_back(tmp_path, readout):
    ours = randomized(VisionTransformer(**VIT | readout | THREE))
    tensors, info = read_weights(own_file(tmp_path, ours))
    write_weights(tensors, info, tmp_path / "timm", "timm")
    theirs = TimmViT(
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=2,
        num_heads=3,
        num_classes=7,
        reg_tokens=2,
        global_pool="avg",
        fc_norm=readout.get("fc_norm", False),
    ).eval()
    back, found = read_weights(tmp_path / "timm")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert found.kind == "timm (classifier with registers)"
    theirs.load_state_dict(load_file(tmp_path / "timm"))
    torch.testing.assert_close(theirs(images()), ours(images()), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "form", "named"),
    [
        (MAE, "huggingface", "one class token"),
        (MAE, "mae", "one class token"),
        (VIT, "timm", "readout token is the first one"),
    ],
)
def test_formats_that_cannot_hold_several_are_refused(tmp_path, fields, form, named):
    kind = MaskedAutoencoder if fields is MAE else VisionTransformer
    tensors, info = read_weights(own_file(tmp_path, kind(**fields | THREE)))
    with pytest.raises(InputError, match=named):
        write_weights(tensors, info, tmp_path / "there", form)
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("fields", [MAE, VIT | READOUTS[1]])
def test_older_files_that_say_class_token_are_read(tmp_path, fields, class_token):
    kind = MaskedAutoencoder if "mask_ratio" in fields else VisionTransformer
    decoder = {"decoder_class_token": class_token} if kind is MaskedAutoencoder else {}
    model = kind(**fields | decoder | {"class_tokens": int(class_token)})
    path = own_file(tmp_path, model, class_token=class_token, class_tokens=None)
    header = path.read_bytes()
    assert b"class_tokens" not in header and b"class_token" in header
    tensors, info = read_weights(path)
    assert info.spec == model.spec and type(info.spec.class_tokens) is int
    old = json.loads(json.dumps(model.spec.as_dict()))
    old["class_token"] = bool(old.pop("class_tokens"))
    assert spec_from_dict(old) == model.spec


@pytest.mark.parametrize(("of_file", "of_settings"), [(1, 3), (3, 1), (0, 3), (3, 3), (3, 0)])
def test_pretraining_starts_from_another_number_of_class_tokens(
    tmp_path, caplog, of_file, of_settings
):
    caplog.set_level("INFO")
    source = randomized(
        MaskedAutoencoder(**MAE | {"class_tokens": of_file, "decoder_class_token": of_file > 0})
    )
    fields = MAE | {"class_tokens": of_settings, "decoder_class_token": of_settings > 0}
    model = MaskedAutoencoder(**fields)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_for_pretraining(model, *read_weights(own_file(tmp_path, source)), "the path")
    first = source.pos_embed if of_file == of_settings else before["pos_embed"]
    assert torch.equal(model.pos_embed[:, of_settings:], source.pos_embed[:, of_file:])
    assert torch.equal(model.pos_embed[:, :of_settings], first[:, :of_settings])
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    if of_settings:
        token = source.cls_token if of_file == of_settings else before["cls_token"]
        assert torch.equal(model.cls_token, token)
    if of_file and of_settings:  # the decoder is taken, with rows of its own
        rows = model.decoder_pos_embed
        assert torch.equal(rows[:, of_settings:], source.decoder_pos_embed[:, of_file:])
        assert torch.equal(model.mask_token, source.mask_token)


def test_evaluation_follows_the_number_in_the_weights_and_refuses_another(tmp_path):
    source = randomized(MaskedAutoencoder(**MAE | THREE))
    path = str(own_file(tmp_path, source))
    geometry = {n: MAE[n] for n in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    cfg = KnnConfig(**geometry, **PIXELS, finetune=path, global_pool="token", dataset="mnist5k")
    model, _ = build_frozen(cfg, path, 1)
    assert isinstance(model.norm, nn.LayerNorm)
    ids = torch.arange(16).expand(2, -1)
    latent = source.forward_encoder(source.patchify(images()), ids)  # (B, 3 + N, D)
    found = model.forward_features(images())
    torch.testing.assert_close(found, latent[:, :3].mean(dim=1), rtol=0, atol=1e-5)
    dense = DenseTransformer(**ENCODER | THREE | {"task": "segment", "num_classes": 2}).eval()
    assert load_into_dense(dense, *read_weights(path), path) <= {*dense.state_dict()}
    maps = latent[:, 3:].mT.unflatten(2, (4, 4))
    torch.testing.assert_close(dense.forward_map(images()), maps, rtol=0, atol=1e-5)
    embed_cfg = EmbedConfig(finetune=path, data_path="x", output_file="a.npz", pool="both")
    written = feature_reader(embed_cfg, model, read_weights(path)[1])[0](images())
    features = {"token": latent[:, :3].mean(dim=1), "avg": latent[:, 3:].mean(dim=1)}
    torch.testing.assert_close(written, features, rtol=0, atol=1e-5)
    other = cfg.model_copy(update={"class_tokens": 1})
    with pytest.raises(InputError, match="class_tokens is 1 in the settings and 3 in"):
        build_frozen(other, path, 1)


def test_a_negative_number_is_refused():
    spec = VisionTransformer(**VIT | THREE).spec
    assert replace(spec, class_tokens=-1).problems() == ["class_tokens must be 0 or more, got -1"]
