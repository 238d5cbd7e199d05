"""Reading everyone's weights gives their own numbers, writing them gives ours, and nothing else is
read."""

import argparse
import hashlib
import json
import logging
import os
import pickle
import random
import re
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import ROOT
from PIL import Image
from reference import MAE, READOUTS, VIT, huggingface_mae, randomized, timm_vit
from runs import command, flip_bit, run
from timm.models._manipulate import adapt_input_conv
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

import hubconf
from models.mae import MaskedAutoencoder
from models.pos_embed import resize_pos_embed, sincos_pos_embed
from models.vit import VisionTransformer
from models.weights import files as weights_files
from models.weights.adapt import (
    adapt_projection,
    load_for_pretraining,
    load_into_classifier,
    load_into_mae,
)
from models.weights.files import CHECKPOINT_VERSION, weights_digest
from models.weights.info import complete
from models.weights.own import own_bytes, read_header
from models.weights.read import read_weights
from models.weights.write import FORMATS, write_weights
from tools import convert_checkpoint
from util import files
from util.errors import InputError

NO_TOKEN = MAE | {"class_tokens": 0, "decoder_class_token": False}
TOKEN_LEAVES = MAE | {"decoder_class_token": False}
CROSS = MAE | {"decoder": "cross", "pred_ratio": 0.25}
FUSED = MAE | {"decoder_fusion": 2, "target": "lowpass", "target_cutoff": 0.5}
AVG = READOUTS[1]
HALF = MAE | {"mask_ratio": 0.5}
SMALL = {"embed_dim": 32, "num_heads": 2}
PUBLISHED_DECODER = {"decoder_embed_dim": 512, "decoder_num_heads": 16}
STATS = {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.2]}
HEAD, FC_NORM = {"head.weight", "head.bias"}, {"fc_norm.weight", "fc_norm.bias"}


def built(fields, seed=0):
    """A model with random weights."""
    kind = MaskedAutoencoder if "mask_ratio" in fields else VisionTransformer
    return randomized(kind(**fields), seed)


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def order():
    return torch.rand(2, 16, generator=torch.Generator().manual_seed(3))


def same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def encoder_part(tensors):
    return {n: t for n, t in tensors.items() if not n.startswith(("decoder", "mask", "head"))}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def own_file(folder, model, name="own.safetensors", **header):
    """A file as a finished run writes it."""
    content = {"model_args": model.spec.as_dict(), **STATS, **header}
    (folder / name).write_bytes(own_bytes(model.state_dict(), content))
    return folder / name


def own_checkpoint(folder, trained, **content):
    """A file as a run writes it while it trains, with its checksum."""
    path = folder / "checkpoint-00000012.pth"
    own = {"model": trained.state_dict(), "model_args": trained.spec.as_dict(), **STATS}
    torch.save({"format_version": CHECKPOINT_VERSION} | own | content, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(path.name + ".sha256").write_text(f"{digest}  {path.name}\n")
    return path


def saved(folder, content, name="a.pth"):
    torch.save(content, folder / name)
    return folder / name


def own_read(folder, fields):
    return read_weights(own_file(folder, built(fields)))


def refusal(call, *arguments, **keywords):
    """The one line that a user gets."""
    with pytest.raises(InputError) as error:
        call(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_named(message, *words):
    assert [word for word in words if str(word) not in message] == [], message


# This project's own


@pytest.mark.parametrize(
    "fields",
    [MAE, NO_TOKEN, TOKEN_LEAVES, CROSS, FUSED, CROSS | {"decoder_fusion": 2}]
    + [MAE | {"img_size": (16, 32), "patch_size": (4, 8)}]
    + [VIT | readout | {"drop_path_rate": 0.25} for readout in READOUTS]
    + [VIT | {"last_norm": False}],
)
@pytest.mark.parametrize("kind", ["checkpoint", "weights"])
def test_own_files_say_everything(tmp_path, fields, kind):
    model = built(fields)
    ema = {"ema": built(fields, seed=1).state_dict()}
    path = (
        own_file(tmp_path, model) if kind == "weights" else own_checkpoint(tmp_path, model, **ema)
    )
    tensors, info = read_weights(path)
    same(tensors, model.state_dict())
    assert (info.spec, info.unknown) == (model.spec, frozenset())
    assert (list(info.mean), list(info.std)) == (STATS["mean"], STATS["std"])
    assert info.sha256 == weights_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"this project's {kind}" in str(info) and "\n" not in str(info)


OPENED_ONCE = {
    "weights": lambda folder, model: own_file(folder, model),
    "checkpoint": lambda folder, model: own_checkpoint(folder, model),
    "foreign": lambda folder, model: saved(folder, model.state_dict()),
    "split folder": lambda folder, model: [
        huggingface_mae(model).save_pretrained(folder, max_shard_size="60KB"),
        folder,
    ][1],
}


@pytest.mark.parametrize("write", OPENED_ONCE.values(), ids=OPENED_ONCE)
def test_the_tensors_are_those_of_the_bytes_that_were_hashed(tmp_path, monkeypatch, write):
    """Each file is gone after that; the checksum beside one is compared all the same."""
    model = built(MAE)
    path = write(tmp_path, model)
    expected, real = weights_digest(path), hashlib.file_digest
    remaining = iter(weights_files.weights_files(path))

    def hashed(*arguments):
        digest = real(*arguments)
        next(remaining).unlink()
        return digest

    monkeypatch.setattr(weights_files.hashlib, "file_digest", hashed)
    tensors, info = read_weights(path)
    same(tensors, model.state_dict())
    assert info.sha256 == expected


def test_own_files_with_equal_content_have_equal_bytes(tmp_path):
    header = {"model_args": {"depth": 2}, "acc1": 100 / 3, "epoch": 5, **STATS}
    tensors = built(VIT).state_dict()
    content = own_bytes(tensors, header)
    assert own_bytes(tensors, dict(reversed(header.items()))) == content
    (tmp_path / "a").write_bytes(content)
    assert read_header(tmp_path / "a") == header
    same(safetensors.torch.load(content), tensors)


# Other projects'


def public_mae(model):
    """What the public MAE code saves in training."""
    return {
        "model": model.state_dict(),
        "optimizer": {"state": {0: torch.ones(2)}},
        "epoch": 3,
        "scaler": {},
        "args": argparse.Namespace(
            norm_pix_loss=True, mask_ratio=0.5, lr=1e-3, device="cuda", dist=None
        ),
    }


def timm_checkpoint(model):
    """What timm's training script saves, with the names that timm gives."""
    args = argparse.Namespace(opt="sgd")
    return {"state_dict": timm_vit(model).state_dict(), "args": args, "metric": 1.0}


def reference_project(model):
    """What the reference project would have saved, written from its description; `model` loses the
    biases that it does not have."""
    theirs = {}
    for key, tensor in model.state_dict().items():
        name = key
        for pattern, new in REFERENCE_NAMES[type(model)]:
            name = re.sub(pattern, new, name)
        if key.endswith("qkv.bias"):
            q, k, v = tensor.chunk(3)
            k.zero_()
            theirs[name.replace("qkv.bias", "q_bias")] = q.clone()
            theirs[name.replace("qkv.bias", "v_bias")] = v.clone()
        elif key == "decoder_embed.bias":
            tensor.zero_()
        elif key.startswith("decoder_pred"):  # (8 * 8 * 3, ...), pixels in (p, p, c) order
            theirs[name] = tensor.unflatten(0, (64, 3)).transpose(0, 1).flatten(0, 1)
        else:
            theirs[name] = tensor
    ema = {name: tensor + 1 for name, tensor in theirs.items()}
    return {"state_dict": theirs, "state_dict_ema": ema, "arch": "a", "epoch": 1}


REFERENCE_NAMES = {
    MaskedAutoencoder: [
        (r"^decoder_(blocks|norm)", r"decoder.\1"),
        (r"^decoder_pred", "decoder.head"),
        (r"^decoder_embed", "encoder_to_decoder"),
        (r"^(cls|pos|patch|blocks|norm)", r"encoder.\1"),
    ],
    VisionTransformer: [(r"^norm", "fc_norm")],  # one name for both readouts
}
ONE_HEAD = {"decoder_embed_dim": 64, "decoder_num_heads": 1}
AUTOENCODER, CLASSIFIER = {"num_heads", "norm_pix_loss"}, {"num_heads", "global_pool"}


@pytest.mark.parametrize(
    ("fields", "content", "kind", "unknown"),
    [
        # the heads of sizes in the tables, and the arguments of the run
        (HALF | SMALL, public_mae, "MAE (autoencoder)", {"decoder_num_heads"}),
        (HALF | PUBLISHED_DECODER, public_mae, "MAE (autoencoder)", {"num_heads"}),
        (
            HALF | PUBLISHED_DECODER | {"class_tokens": 8},
            public_mae,
            "MAE (autoencoder)",
            {"num_heads"},
        ),
        (VIT | {"num_classes": 0}, public_mae, "MAE (encoder)", CLASSIFIER),
        (VIT | AVG, public_mae, "MAE (classifier)", CLASSIFIER),
        (NO_TOKEN | ONE_HEAD, reference_project, "reference project (autoencoder)", AUTOENCODER),
        (
            TOKEN_LEAVES | ONE_HEAD,
            reference_project,
            "reference project (autoencoder)",
            AUTOENCODER,
        ),
        (VIT, reference_project, "reference project (classifier)", CLASSIFIER),
        (VIT | READOUTS[3], reference_project, "reference project (classifier)", CLASSIFIER),
        (VIT | {"num_classes": 0}, timm_checkpoint, "timm (encoder)", CLASSIFIER),
    ]
    + [(VIT | readout, timm_checkpoint, "timm (classifier)", CLASSIFIER) for readout in READOUTS],
)
def test_other_projects_files_give_their_tensors_and_what_they_tell(
    tmp_path, fields, content, kind, unknown
):
    model = built(fields)
    path = saved(tmp_path, content(model))
    tensors, info = read_weights(path)
    same(tensors, model.state_dict())  # with the position tables as they are
    assert (info.kind, info.unknown, info.mean) == (kind, unknown, None)
    given = {name: getattr(model.spec, name) for name in unknown}
    assert complete(info, **given).spec == model.spec
    # The permission ended with the reading.
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


# timm's


@pytest.mark.parametrize("num_classes", [0, 5])
def test_timm_loads_what_is_written_by_name(tmp_path, num_classes):
    create = {"img_size": 32, "num_classes": num_classes}
    theirs = randomized(timm.create_model("test_vit", **create))
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "theirs")
    write_weights(*read_weights(tmp_path / "theirs"), tmp_path / "a.safetensors", "timm")
    again = timm.create_model("test_vit", **create, checkpoint_path=tmp_path / "a.safetensors")
    assert torch.equal(again.eval()(images()), theirs(images()))
    read = hubconf.classifier if num_classes else hubconf.encoder
    model = read(str(tmp_path / "a.safetensors"), num_heads=2)
    torch.testing.assert_close(model(images()), theirs(images()), rtol=0, atol=1e-5)


# Hugging Face's


HF = ViTMAEConfig(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=96,
    image_size=32,
    patch_size=8,
    decoder_hidden_size=24,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=48,
    mask_ratio=0.5,
    norm_pix_loss=True,
    layer_norm_eps=1e-6,
)


@pytest.mark.parametrize("names", ["saved", "in memory", "sharded", "the file itself"])
def test_huggingface_autoencoders_give_their_tensors_and_settings(tmp_path, names):
    model = built(MAE | {"mlp_ratio": 2.0, "mask_ratio": 0.5})
    theirs = huggingface_mae(model)
    theirs.save_pretrained(tmp_path, max_shard_size="60KB" if names == "sharded" else "1GB")
    if names == "in memory":
        (tmp_path / "model.safetensors").unlink()
        saved(tmp_path, theirs.state_dict(), "pytorch_model.bin")
    path = tmp_path / "model.safetensors" if names == "the file itself" else tmp_path
    tensors, info = read_weights(path)
    same(tensors, model.state_dict())
    assert (info.kind, info.unknown) == ("Hugging Face ViTMAE (autoencoder)", frozenset())
    assert info.spec == model.spec


@pytest.mark.parametrize("eps", [1e-6, 1e-12])
def test_huggingface_encoders_give_their_own_features(tmp_path, caplog, eps):
    config = ViTMAEConfig(**HF.to_dict() | {"mask_ratio": 0.0, "layer_norm_eps": eps})
    theirs = randomized(ViTMAEModel(config))
    theirs.save_pretrained(tmp_path)
    info = read_weights(tmp_path)[1]
    assert (info.kind, info.known("num_heads")) == ("Hugging Face ViTMAE (encoder)", 3)
    # The class token's feature, on which the order of the patches has no influence.
    feature = theirs(images()).last_hidden_state[:, 0]
    torch.testing.assert_close(hubconf.encoder(str(tmp_path))(images()), feature, rtol=0, atol=1e-4)
    assert ("layer_norm_eps is 1e-12 there and 1e-06 here" in caplog.text) == (eps == 1e-12)


def test_huggingface_loads_what_is_written_and_gives_our_loss(tmp_path):
    ours = built(HALF)
    write_weights(*read_weights(own_file(tmp_path, ours)), tmp_path / "hf", "huggingface")
    theirs, report = ViTMAEForPreTraining.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.config.architectures == ["ViTMAEForPreTraining"]
    expected = theirs(images(), noise=order()).loss.item()
    assert abs(ours(images(), order().argsort(dim=1)).item() - expected) < 1e-6
    assert not ViTMAEModel.from_pretrained(tmp_path / "hf", output_loading_info=True)[1][
        "missing_keys"
    ]
    assert names_in(tmp_path / "hf") == ["config.json", "model.safetensors"]
    written = safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors")
    assert "vit.encoder.layer.1.attention.attention.query.weight" in written  # as published


# There and back


@pytest.mark.parametrize(
    ("form", "fields"),
    [(form, MAE) for form in FORMATS]
    + [(form, VIT | readout) for form in ("safetensors", "timm") for readout in READOUTS]
    + [("mae", VIT | readout) for readout in READOUTS[:3]]  # that format needs a class token
    + [("safetensors", CROSS), ("safetensors", FUSED)],
)
def test_weights_go_there_and_back_bit_for_bit(tmp_path, form, fields):
    source = own_file(tmp_path, built(fields))
    tensors, info = read_weights(source)
    write_weights(tensors, info, tmp_path / "there", form)
    back, found = read_weights(tmp_path / "there")
    has_decoder = "mask_token" in tensors
    same(back, encoder_part(tensors) if form == "timm" and has_decoder else tensors)
    for name, value in found.spec.as_dict().items():
        if name not in found.unknown and hasattr(info.spec, name):
            assert value == info.spec.as_dict()[name], name
    assert names_in(tmp_path) == ["own.safetensors", "there"]  # no leftovers
    if form == "safetensors":
        assert (tmp_path / "there").read_bytes() == source.read_bytes()


def test_a_foreign_encoder_becomes_a_file_that_records_its_grid(tmp_path):
    encoder = encoder_part(built(VIT | {"img_size": (16, 48)}).half().state_dict())
    path = saved(tmp_path, {"model": encoder})
    assert_named(refusal(read_weights, path), path, "12 patches", "8x8", "--img_size")
    assert_named(refusal(read_weights, path, (16, 32)), path, "16x32", "12 patches")
    assert_named(refusal(read_weights, path, (12, 64)), path, "12x64", "12 patches")
    info = convert(
        path, tmp_path / "b", "--format", "safetensors", "--img_size", 16, 48, "--num_heads", 3
    )
    back, found = read_weights(tmp_path / "b")
    same(back, encoder)  # in half precision, as they were
    assert (found.kind, found.spec) == ("this project's weights (encoder)", info.spec)
    assert found.mean is None
    assert_named(refusal(read_weights, tmp_path / "b", (32, 24)), "16x48", "32x24")


# What a format cannot hold


@pytest.mark.parametrize(
    ("fields", "form", "named"),
    [
        (NO_TOKEN, "huggingface", ["class token in the encoder", "class token in the decoder"]),
        (TOKEN_LEAVES, "huggingface", ["class token in the decoder"]),
        (MAE | {"img_size": (16, 32)}, "huggingface", ["square images"]),
        (MAE | {"patch_size": (4, 8)}, "huggingface", ["square patches"]),
        (CROSS, "huggingface", ["decoder self"]),
        (VIT, "huggingface", ["needs a decoder", "has no head"]),
        (NO_TOKEN, "mae", ["class token in the encoder", "class token in the decoder"]),
        (TOKEN_LEAVES, "mae", ["class token in the decoder"]),
        (MAE | {"img_size": (16, 32), "patch_size": (4, 8)}, "mae", ["images", "patches"]),
        (CROSS, "mae", ["decoder self"]),
        (FUSED, "mae", ["decoder_fusion 0"]),
        (FUSED, "huggingface", ["decoder_fusion 0"]),
        (VIT | {"last_norm": False}, "timm", ["last_norm true"]),
        (MAE, "onnx", ["mae, timm, huggingface, safetensors", "'onnx'"]),
    ],
)
def test_a_format_that_cannot_hold_a_model_is_refused_before_anything_is_written(
    tmp_path, fields, form, named
):
    content = own_read(tmp_path, fields)
    assert_named(refusal(write_weights, *content, tmp_path / "there", form), *named)
    assert names_in(tmp_path) == ["own.safetensors"]


@pytest.mark.parametrize("form", FORMATS)
def test_writing_never_replaces_anything_and_leaves_nothing_where_it_fails(tmp_path, form):
    content = own_read(tmp_path, MAE)
    (tmp_path / "there").write_text("precious")
    for target in (tmp_path / "there", tmp_path / "none" / "there"):
        assert_named(refusal(write_weights, *content, target, form), target)
    assert (tmp_path / "there").read_text() == "precious"
    (tmp_path / "there").unlink()

    with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")):
        message = refusal(write_weights, *content, tmp_path / "there", form)
    assert_named(message, tmp_path / "there", "No space left")
    assert names_in(tmp_path) == ["own.safetensors"]


def test_what_the_file_cannot_tell_is_asked_for(tmp_path):
    model = built(MAE | {"norm_pix_loss": False})
    tensors, info = read_weights(saved(tmp_path, {"model": model.state_dict()}))
    missing = {"num_heads": 3, "decoder_num_heads": 2, "norm_pix_loss": False}
    assert info.unknown == missing.keys()
    for form in ("huggingface", "safetensors"):
        assert_named(refusal(write_weights, tensors, info, tmp_path / "b", form), *missing)
    assert names_in(tmp_path) == ["a.pth"]
    flags = [word for name, value in missing.items() for word in (f"--{name}", str(value).lower())]
    convert(tmp_path / "a.pth", tmp_path / "b", "--format", "safetensors", *flags)
    known = read_weights(tmp_path / "b")[1]
    assert known.spec == model.spec
    assert_named(refusal(complete, info, decoder_num_heads=0), "decoder_num_heads 0")
    assert_named(refusal(complete, info, num_heads=5), "embed_dim 48", "num_heads 5")
    assert_named(
        refusal(complete, known, num_heads=4, norm_pix_loss=None), "3 in the file, 4 given"
    )


# Into a classifier


def load(fields, tensors, info):
    model = VisionTransformer(**VIT | fields)
    return model, load_into_classifier(model, tensors, info, "the path")


@pytest.mark.parametrize("readout", READOUTS)
def test_pretraining_into_each_readout(tmp_path, caplog, readout):
    caplog.set_level(logging.INFO)
    has_norm = bool(readout.get("fc_norm"))
    tensors, info = own_read(tmp_path, MAE if readout.get("class_tokens", True) else NO_TOKEN)
    model, fresh = load(readout, tensors, info)
    own = model.state_dict()
    assert fresh == (HEAD | FC_NORM if has_norm else HEAD)
    same({n: own[n] for n in own.keys() - fresh}, {n: tensors[n] for n in own.keys() - fresh})
    assert_named(caplog.text, "the path: this project's", "decoder dropped", "7 outputs")
    assert ("norm dropped" in caplog.text) == has_norm and "resized" not in caplog.text
    assert not has_norm or torch.equal(model.fc_norm.weight, torch.ones(48))


def test_a_fine_tuned_classifier_keeps_its_fc_norm_and_its_head(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tensors, info = own_read(tmp_path, VIT | AVG)
    model, fresh = load(AVG, tensors, info)
    assert fresh == set() and "dropped" not in caplog.text
    same(model.state_dict(), tensors)
    model, fresh = load(AVG | {"num_classes": 5}, tensors, info)
    assert fresh == HEAD and "head of 7 classes dropped: the data has 5" in caplog.text
    assert torch.equal(model.fc_norm.weight, tensors["fc_norm.weight"])
    for readout in READOUTS[:1] + READOUTS[2:3]:
        assert_named(refusal(load, readout, tensors, info), "fc_norm", "global_pool avg")


# The cubic kernel with a = -0.75 at the distances 1.75, 0.75, 0.25 and 1.25.
BICUBIC_TAPS = (-0.03515625, 0.26171875, 0.87890625, -0.10546875)


def test_positions_on_a_2_by_3_grid_become_4_by_6():
    """Bicubic in numbers: twice as many samples, each at a quarter between two old ones."""
    table = torch.randn(1, 7, 2, dtype=torch.float16, generator=torch.Generator().manual_seed(0))

    def matrix(n):
        """Interpolation from n samples to 2 n, with the ends repeated."""
        weights = torch.zeros(2 * n, n, dtype=torch.float64)
        for i in range(n):
            for offset, tap in zip((-2, -1, 0, 1), BICUBIC_TAPS, strict=True):
                weights[2 * i, min(max(i + offset, 0), n - 1)] += tap
                weights[2 * i + 1, min(max(i - offset, 0), n - 1)] += tap
        return weights

    resized = resize_pos_embed(table, (2, 3), (4, 6), class_tokens=1)
    assert resized.shape == (1, 25, 2) and resized.dtype == torch.float32
    assert torch.equal(resized[0, 0], table[0, 0].float())
    for channel in range(2):
        expected = matrix(2) @ table[0, 1:, channel].double().reshape(2, 3) @ matrix(3).T
        found = resized[0, 1:, channel].double().reshape(4, 6)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("img_size", "grid"), [((32, 48), (4, 6)), ((24, 16), (3, 2))])
def test_another_grid_resizes_the_positions_and_says_so(tmp_path, caplog, img_size, grid):
    caplog.set_level(logging.INFO)
    tensors, info = own_read(tmp_path, MAE | {"img_size": (16, 24)})
    model, _ = load({"img_size": img_size}, tensors, info)
    assert_named(caplog.text, "2x3", "x".join(map(str, grid)))
    expected = resize_pos_embed(tensors["pos_embed"], (2, 3), grid, class_tokens=1)
    assert torch.equal(model.pos_embed, expected)
    assert tensors["pos_embed"].shape == (1, 7, 48)  # the caller's are left alone


@pytest.mark.parametrize(
    ("fields", "changes", "said"),
    [
        (VIT | READOUTS[2], {"patch_size": (8, 4)}, {"patch_size": ("8", "8x4")}),
        (VIT | READOUTS[2], {"in_chans": 1}, {"in_chans": ("3", "1")}),
        (VIT | READOUTS[2], {"class_tokens": 0}, {"class_tokens": ("1", "0")}),
        (
            VIT | READOUTS[2],
            {"embed_dim": 24, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0, "img_size": 64},
            {
                "embed_dim": ("48", "24"),
                "depth": ("2", "3"),
                "num_heads": ("3", "4"),
                "mlp_ratio": ("4", "2"),
            },
        ),
        (MAE, {"img_size": 64}, {"img_size": ("32", "64")}),
        (MAE, {"embed_dim": 24}, {"embed_dim": ("48", "24")}),
        (MAE, {"num_heads": 4}, {"num_heads": ("3", "4")}),
        (MAE, {"mlp_ratio": 2.0}, {"mlp_ratio": ("4", "2")}),
        (MAE, {"decoder_embed_dim": 32}, {"decoder_embed_dim": ("24", "32")}),
        (MAE, {"decoder_depth": 1}, {"decoder_depth": ("2", "1")}),
        (MAE, {"decoder_num_heads": 3}, {"decoder_num_heads": ("2", "3")}),
        (MAE, {"decoder": "cross"}, {"decoder": ("self", "cross")}),
        (MAE, {"decoder_fusion": 2}, {"decoder_fusion": ("0", "2")}),
        (
            MAE,
            {"class_tokens": 0, "decoder_class_token": False},
            {"class_tokens": ("1", "0"), "decoder_class_token": ("true", "false")},
        ),
    ],
)
def test_another_model_is_refused_with_both_sides_of_every_difference(
    tmp_path, fields, changes, said
):
    tensors, info = own_read(tmp_path, MAE)
    model = built(fields | changes)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    load_into = load_into_mae if fields is MAE else load_into_classifier
    message = refusal(load_into, model, tensors, info, "the path")
    lines = [f"{n} {file} in the file, {ours} in the settings" for n, (file, ours) in said.items()]
    assert_named(message, "the path", info.kind, *lines)
    assert message.count("in the file") == len(lines)
    same(model.state_dict(), before)


def test_of_a_foreign_file_the_mlp_width_counts_and_the_heads_are_those_of_the_settings(
    tmp_path, caplog
):
    """27 hidden units are int(24 * 1.15), and foreign files tell the width only."""
    changes = {"embed_dim": 24, "mlp_ratio": 1.15}
    model = built(VIT | changes)
    tensors, info = read_weights(saved(tmp_path, model.state_dict()))
    assert info.spec.mlp_ratio == 1.125
    found, fresh = load(changes, tensors, info)
    assert fresh == set() and torch.equal(found.eval()(images()), model(images()))
    assert_named(caplog.text, "the path", "num_heads")


# Into an autoencoder


def test_an_autoencoder_needs_a_decoder_and_takes_the_files_positions(tmp_path, caplog):
    tensors, info = own_read(tmp_path, MAE)
    changes = {"norm_pix_loss": False, "mask_ratio": 0.5, "target": "lowpass"}
    model = MaskedAutoencoder(**MAE | changes)
    load_into_mae(model, tensors, info, "the path")
    same(model.state_dict(), tensors)
    assert_named(
        caplog.text,
        "norm_pix_loss is True in the file, False in the settings",
        "target is pixels in the file, lowpass in the settings",
    )
    encoder = read_weights(saved(tmp_path, {"model": encoder_part(tensors)}))
    message = refusal(load_into_mae, model, *encoder, "the path")
    assert_named(message, "the path (MAE (encoder))", "no decoder")


# Into an autoencoder that goes on with pretraining


def huggingface_folder(folder, model):
    huggingface_mae(model).save_pretrained(folder)
    return folder


def start_from(path, fields):
    """A model with other weights, started from a file, and what it had before."""
    model = built(fields, seed=1)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    load_for_pretraining(model, *read_weights(path), path)
    return model, before


@pytest.mark.parametrize(
    ("fields", "write"),
    [
        (MAE, own_file),
        (CROSS, own_file),
        (FUSED, own_file),
        (TOKEN_LEAVES, own_checkpoint),
        (MAE, huggingface_folder),
    ]
    + [(HALF | SMALL, lambda f, m: saved(f, public_mae(m)))]
    + [(x | ONE_HEAD, lambda f, m: saved(f, reference_project(m))) for x in (NO_TOKEN, MAE)],
)
def test_pretraining_goes_on_at_the_loss_of_the_weights(tmp_path, caplog, fields, write):
    source = built(fields)
    path = write(tmp_path, source)
    expected = source(images(), order().argsort(dim=1)).item()
    if write is huggingface_folder:
        theirs = ViTMAEForPreTraining.from_pretrained(path).eval()
        expected = theirs(images(), noise=order()).loss.item()
    caplog.set_level(logging.INFO)
    model, _ = start_from(path, fields)
    assert abs(model(images(), order().argsort(dim=1)).item() - expected) < 1e-5
    assert_named(caplog.text, "fresh: nothing", "dropped: nothing")


@pytest.mark.parametrize(
    ("fields", "content", "fresh"),
    [
        (VIT, lambda model: {"model": model.state_dict()}, set()),
        (VIT | {"num_classes": 0}, timm_checkpoint, set()),
        (VIT, timm_checkpoint, set()),
        (VIT | READOUTS[3], timm_checkpoint, {"norm.weight", "norm.bias", "cls_token"}),
        (VIT, reference_project, set()),
    ],
)
def test_pretraining_goes_on_with_an_encoder_and_a_fresh_decoder(
    tmp_path, caplog, fields, content, fresh
):
    source = built(fields)
    path = saved(tmp_path, content(source))
    caplog.set_level(logging.INFO)
    model, before = start_from(path, MAE)
    own, theirs = model.state_dict(), source.state_dict()
    assert_named(caplog.text, "no decoder in the file")
    fresh = fresh | {name for name in own if name.startswith(("decoder", "mask"))}
    same({n: own[n] for n in fresh}, {n: before[n] for n in fresh})
    taken = own.keys() - fresh - {"pos_embed"}
    same({n: own[n] for n in taken}, {n: theirs[n] for n in taken})
    assert torch.equal(own["pos_embed"][:, 1:], theirs["pos_embed"][:, -16:])
    if not {"norm.weight", "cls_token"} & fresh:  # timm itself gives the feature, unmasked
        latent = model.forward_encoder(model.patchify(images()), torch.arange(16).repeat(2, 1))
        feature = timm_vit(source).forward_features(images())
        torch.testing.assert_close(latent, feature, rtol=0, atol=1e-5)


def test_a_class_token_that_only_the_file_has_is_dropped(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    model, before = start_from(own_file(tmp_path, source := built(MAE)), NO_TOKEN)
    assert torch.equal(model.pos_embed, source.pos_embed[:, 1:])
    assert torch.equal(model.mask_token, before["mask_token"])
    assert_named(caplog.text, "decoder_class_token true in the file", "dropped: cls_token, dec")


@pytest.mark.parametrize("is_learned", [False, True])
def test_on_another_grid_learned_positions_are_resized_and_fixed_ones_computed(
    tmp_path, caplog, is_learned
):
    caplog.set_level(logging.INFO)
    source = built(MAE)
    if not is_learned:
        for name, width in (("pos_embed", 48), ("decoder_pos_embed", 24)):
            getattr(source, name).copy_(sincos_pos_embed(width, (4, 4), 1).half().float())
    model, _ = start_from(own_file(tmp_path, source), MAE | {"img_size": (48, 32)})
    for name, width in (("pos_embed", 48), ("decoder_pos_embed", 24)):
        resized = resize_pos_embed(getattr(source, name), (4, 4), (6, 4), class_tokens=1)
        expected = resized if is_learned else sincos_pos_embed(width, (6, 4), 1)
        assert torch.equal(getattr(model, name), expected)
    how = "resized" if is_learned else "recomputed"
    assert_named(caplog.text, f"pos_embed {how} from 4x4 to 6x4 patches")
    assert torch.equal(model.decoder_pred.weight, source.decoder_pred.weight)


@pytest.mark.parametrize("patch_size", [(4, 4), (16, 16), (7, 10)])
def test_another_patch_size_gives_what_the_old_one_gave_for_the_resized_patch(patch_size):
    """Resized by Pillow's rule, which torchvision and the data path follow."""
    weight = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    patch = torch.rand(3, *patch_size, generator=torch.Generator().manual_seed(1))
    resized = torch.stack(
        [
            torch.from_numpy(
                np.array(Image.fromarray(c.numpy()).resize((8, 8), Image.Resampling.BICUBIC))
            )
            for c in patch
        ]
    )
    found = (adapt_projection(weight, 3, patch_size) * patch).sum(dim=(1, 2, 3))
    expected = (weight * resized).sum(dim=(1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert torch.equal(adapt_projection(weight, 3, (8, 8)), weight)


@pytest.mark.parametrize("in_chans", [1, 2, 4, 6])
def test_another_number_of_channels_is_adapted_as_timm_does(in_chans):
    weight = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = adapt_input_conv(in_chans, weight)
    torch.testing.assert_close(adapt_projection(weight, in_chans, (8, 8)), expected)


def test_of_other_patches_and_channels_the_prediction_starts_fresh(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    source = built(MAE)
    path = own_file(tmp_path, source)
    model, before = start_from(path, MAE | {"patch_size": 16, "img_size": 64, "in_chans": 1})
    own, theirs = model.state_dict(), source.state_dict()
    fresh = {"decoder_pred.weight", "decoder_pred.bias"}
    same({n: own[n] for n in fresh}, {n: before[n] for n in fresh})
    taken = own.keys() - fresh - {"patch_embed.proj.weight"}
    same({n: own[n] for n in taken}, {n: theirs[n] for n in taken})
    assert_named(caplog.text, "3 to 1 channels", "8x8 to 16x16 pixels", "fresh: decoder_pred")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"embed_dim": 24}, ["embed_dim 48 in the file, 24 in the settings"]),
        ({"depth": 3}, ["depth 2 in the file, 3 in the settings"]),
        ({"num_heads": 4}, ["num_heads 3 in the file, 4 in the settings"]),
        ({"mlp_ratio": 2.0, "depth": 1}, ["mlp_ratio 4 in the file, 2 in", "depth 2 in the file"]),
    ],
)
def test_another_encoder_is_refused_and_another_decoder_starts_fresh(
    tmp_path, caplog, changes, said
):
    path = own_file(tmp_path, built(MAE))
    assert_named(refusal(start_from, path, MAE | changes), path, *said)
    caplog.set_level(logging.INFO)
    model, before = start_from(path, MAE | {"decoder_depth": 1})
    assert_named(caplog.text, "decoder_depth 2 in the file, 1 in the settings")
    assert torch.equal(model.decoder_pred.weight, before["decoder_pred.weight"])


# Files that are something else


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "hf/pytorch_model.bin"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle 2", "pickle 4", "in args"])
def test_a_malicious_pickle_leaves_no_trace(tmp_path, name, form):
    marker, path = tmp_path / "marker", tmp_path / name
    path.parent.mkdir(exist_ok=True)
    (path.parent / "config.json").write_text(json.dumps({"model_type": "vit_mae"}))
    bomb = Bomb(marker)
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps({"model": bomb}, protocol=int(form[-1])))
    else:
        content = {"model": {"patch_embed.proj.weight": torch.ones(1), "x": bomb}}
        if form == "in args":
            content = {"model": {"a": torch.ones(1)}, "args": argparse.Namespace(x=bomb)}
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    message = refusal(read_weights, path.parent if "/" in name else path)
    assert_named(message, path, *([] if form == "pickle 4" else ["posix.mkdir"]))
    assert not marker.exists()
    assert names_in(path.parent) == sorted([path.name, "config.json"])
    pickle.loads(pickle.dumps(bomb))  # it would have gone off
    assert marker.is_dir()


def write_refused(folder, kind, what):
    """A file or folder that cannot be read, made of `what`."""
    path = folder / "a.safetensors"
    if kind == "bytes":
        path.write_bytes(what)
    elif kind == "content":
        torch.save(what, path)
    elif kind == "tensors":  # of a classifier's file, changed; None is left out
        tensors = dict(built(VIT).state_dict()) | what
        torch.save({"model": {n: t for n, t in tensors.items() if t is not None}}, path)
    elif kind == "header":  # of an own file, changed; None is left out
        fields = MaskedAutoencoder(**MAE).spec.as_dict() | what
        stated = {n: value for n, value in fields.items() if value is not None}
        own_file(folder, built(MAE), path.name, model_args=stated)
    elif kind == "checkpoint":
        return own_checkpoint(folder, built(VIT), **what)
    else:  # of a Hugging Face folder, config.json changed
        ViTMAEModel(HF).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | what))
        return folder
    return path


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
ONES = torch.ones


@pytest.mark.parametrize(
    ("kind", "what", "named"),
    [
        ("bytes", b"", ["empty file"]),
        ("bytes", b"weights: none\n" * 9, ["weights: none"]),
        ("bytes", LFS, ["git-lfs"]),
        ("bytes", b"\x89PNG\r\n\x1a\n" + bytes(40), ["not a PyTorch or safetensors file", "PNG"]),
        ("bytes", b"PK\x03\x04" + bytes(40), ["is it whole?"]),
        ("bytes", b"\x80\x02}q\x00.", ["is it whole?"]),
        ("bytes", b"\x10" + bytes(7) + b"{}" + bytes(14), ["is it whole?"]),
        ("content", ONES(3), ["dict of tensors", "Tensor"]),
        ("content", {"model": {}}, ["nothing"]),
        ("content", {"model": {"a": ONES(1), "b": 3}}, ["'b'"]),
        ("content", {"epoch": 3, 4: 5}, ["'epoch', 4", "'state_dict'"]),
        (
            "content",
            {f"layer{i}.0.conv1.weight": ONES(1) for i in range(9)},  # a ResNet's
            ["9 in all)", "missing patch_embed.proj.weight, pos_embed"],
        ),
        ("tensors", {"blocks.1.gamma_1": ONES(48)}, ["blocks.1.gamma_1", "layer scale"]),
        ("tensors", {"reg_token": ONES(4, 48)}, ["reg_token is (4, 48)", "3 dimensions"]),
        ("tensors", {"storage_tokens": ONES(1, 4, 48)}, ["storage_tokens", "register tokens"]),
        ("tensors", {"dist_token": ONES(1, 1, 48)}, ["dist_token", "distillation token"]),
        ("tensors", {"blocks.0.attn.q_norm.weight": ONES(16)}, ["normalised queries and keys"]),
        ("tensors", {"fc_norm.running_mean": ONES(48)}, ["fc_norm.running_mean", "BatchNorm"]),
        ("tensors", {"something.else": ONES(3)}, ["unexpected something.else"]),
        ("tensors", {"fc_norm.weight": ONES(48)}, ["norm.weight, norm.bias", "fc_norm.bias"]),
        ("tensors", {"blocks.1.mlp.fc1.bias": None}, ["missing blocks.1.mlp.fc1.bias"]),
        ("tensors", {"blocks.0.norm1.bias": ONES(9)}, ["blocks.0.norm1.bias is (9,)", "(48,)"]),
        ("tensors", {"norm.bias": ONES(48).int()}, ["norm.bias", "int32", "floating point"]),
        ("tensors", {"blocks.9000000.norm1.bias": ONES(48)}, ["blocks.9000000.norm1.bias"]),
        ("tensors", {"pos_embed": ONES(17, 48)}, ["pos_embed is (17, 48)", "3 dimensions"]),
        ("tensors", {"pos_embed": ONES(1, 15, 48)}, ["14 patches of 8x8"]),
        ("header", {"depth": 3}, ["missing blocks.2.norm1.weight"]),
        ("header", {"depth": 9000000}, ["9000002 blocks", "62 tensors"]),
        ("header", {"decoder_depth": 3}, ["missing decoder_blocks.2.norm1.weight"]),
        ("header", {"embed_dim": 96}, ["blocks.0.attn.proj.bias is (48,)", "expected (96,)"]),
        ("header", {"embed_dim": "wide"}, ["model that cannot be"]),
        ("header", {"patch_size": 0}, ["model that cannot be"]),
        ("header", {"num_heads": 0}, ["num_heads"]),
        ("header", {"img_size": []}, ["model that cannot be"]),
        ("header", {"colour": 1}, ["colour"]),
        ("header", {"in_chans": None}, ["in_chans"]),
        ("checkpoint", {"model_args": 3}, ["model that cannot be"]),
        ("checkpoint", {"format_version": 99}, ["99", str(CHECKPOINT_VERSION)]),
        ("checkpoint", {"model": {"weights.0": ONES(2, 3)}}, ["weights.0", "model.safetensors"]),
        ("config", {"model_type": "vit"}, ["model_type 'vit_mae' or", "'vit'"]),
        ("config", {"hidden_act": "relu"}, ["hidden_act 'gelu'", "'relu'"]),
        ("config", {"image_size": "big"}, ["config.json", "b"]),
        ("config", {"image_size": 48}, ["48x48", "16 patches of 8x8"]),
        ("config", {"num_attention_heads": 5}, ["embed_dim 48", "num_heads 5"]),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_path_and_the_reason(tmp_path, kind, what, named):
    (tmp_path / "weights").mkdir()
    path = write_refused(tmp_path / "weights", kind, what)
    assert_named(refusal(read_weights, path), path, *named)


def test_paths_without_weights_are_refused(tmp_path):
    for call in (read_weights, weights_digest):
        assert_named(refusal(call, tmp_path / "none"), tmp_path / "none", "no such file")
    os.mkfifo(tmp_path / "fifo")
    assert_named(refusal(read_weights, tmp_path / "fifo"), "not a regular file")
    own = own_file(tmp_path, built(MAE), "model.safetensors")
    assert_named(refusal(read_weights, tmp_path), tmp_path, "config.json", own.name)
    theirs = write_refused(tmp_path, "config", {}) / "model.safetensors"
    (tmp_path / "config.json").unlink()
    assert_named(refusal(read_weights, theirs), theirs, "config.json")


def test_a_checkpoint_that_disagrees_with_its_sha256_is_refused(tmp_path):
    path = own_checkpoint(tmp_path, built(MAE))
    flip_bit(path)
    assert_named(refusal(read_weights, path), path, "damaged", f"{path.name}.sha256")


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_damaged_files_are_one_clear_error_or_still_whole(tmp_path, form):
    """Cut or flipped anywhere: never another exception. (A flip among a tensor's numbers cannot be
    seen.)"""
    tensors, path = built(VIT).state_dict(), tmp_path / "damaged"
    if form == "safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save({"model": tensors}, path, _use_new_zipfile_serialization=form == "zip")
    content, generator = path.read_bytes(), random.Random(0)
    for size in (1, 9, 100, 5000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert_named(refusal(read_weights, path), path)
    refused = 0
    for i in range(150):
        damaged = bytearray(content)
        damaged[generator.randrange(4000 if i % 2 else len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            read_weights(path)
        except InputError as error:
            assert_named(str(error), path)
            refused += 1
    assert refused > 10


def test_weights_that_come_with_the_project_have_names(tmp_path, monkeypatch):
    (tmp_path / "pretrained").mkdir()
    own = own_file(tmp_path / "pretrained", built(MAE), "tiny.safetensors")
    monkeypatch.setattr(files, "PRETRAINED", own.parent)
    monkeypatch.chdir(tmp_path)
    assert read_weights("tiny")[1] == read_weights(own)[1] and weights_digest("tiny")
    assert hub("autoencoder", "tiny").spec == built(MAE).spec
    assert_named(refusal(read_weights, "tina"), "tina: there is no such file", "tiny")
    (tmp_path / "tiny").touch()  # a file of the user's own comes first
    assert_named(refusal(read_weights, "tiny"), "tiny: not a", "an empty file")


# The tool


def convert(*arguments):
    return convert_checkpoint.main([str(argument) for argument in arguments])


def test_the_tool_describes_and_converts(tmp_path, capsys):
    source, target = own_file(tmp_path, built(MAE)), tmp_path / "there"
    info = read_weights(source)[1]
    assert convert(source, "--describe") == info
    assert capsys.readouterr().out == f"{info}\n"
    convert(source, target, "--format", "mae")
    assert capsys.readouterr().out == f"{info}\nwrote {target}\n"
    assert read_weights(target)[1].kind == "MAE (autoencoder)"


def test_half_of_the_bytes_are_the_same_model_rounded_once(tmp_path):
    source, target = own_file(tmp_path, built(MAE)), tmp_path / "half"
    convert(source, target, "--format", "safetensors", "--half")
    (whole, of_whole), (half, of_half) = read_weights(source), read_weights(target)
    same(half, {name: tensor.half() for name, tensor in whole.items()})
    assert replace(of_half, sha256=of_whole.sha256) == of_whole
    model = hub("autoencoder", target)
    same(dict(model.state_dict()), {name: tensor.float() for name, tensor in half.items()})
    large = built(MAE)
    large.blocks[0].mlp.fc1.weight.data.mul_(1e6)
    source = own_file(tmp_path, large, "large.safetensors")
    said = refusal(convert, source, tmp_path / "none", "--format", "safetensors", "--half")
    assert_named(said, "65504", "blocks.0.mlp.fc1.weight")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["a"], ["--describe", "--format"]),
        (["a", "b"], ["--describe", "--format"]),
        (["a", "b", "--format", "mae", "--describe"], ["--describe", "--format"]),
        (["a", "b", "--format", "keras"], ["'keras'"]),
        (["a", "b", "--format", "onnx", "--half"], ["--half", "safetensors"]),
        (["none", "--describe"], ["none", "no such file"]),
        ([], ["SRC"]),
    ],
)
def test_the_tool_refuses_in_one_line(arguments, named):
    assert_named(refusal(convert, *arguments), *named)


@pytest.mark.long
def test_the_tool_as_a_user_runs_it(tmp_path):
    path = saved(tmp_path, {"model": built(MAE).state_dict()})
    script, env = "tools/convert_checkpoint.py", {"PYTHONPATH": str(ROOT)}
    good = run(command(str(path), "--describe", script=script), **env)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout == f"{read_weights(path)[1]}\n"
    bad = run(command(str(path), str(path), "--format", "mae", script=script), **env)
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)
    assert_named(bad.stderr, "error: ", path)


# torch.hub


def hub(entry, weights, **keywords):
    return torch.hub.load(str(ROOT), entry, source="local", weights=str(weights), **keywords)


def test_torch_hub_gives_models_in_eval_mode_with_their_pixels(tmp_path):
    mae, vit = built(MAE), built(VIT | AVG | {"drop_path_rate": 0.5})
    pretrained = own_file(tmp_path, mae)
    finetuned = own_file(tmp_path, vit, "classifier.safetensors")
    found = {
        "encoder": hub("encoder", pretrained),
        "autoencoder": hub("autoencoder", pretrained),
        "classifier": hub("classifier", finetuned),
    }
    for model in found.values():
        assert not any(module.training for module in model.modules())
        assert (model.img_size, model.mean.shape) == ((32, 32), (3, 1, 1))
        assert model.std.flatten().tolist() == pytest.approx(STATS["std"])
    everything = torch.arange(16).repeat(2, 1)
    tokens = mae.forward_encoder(mae.patchify(images()), everything)
    for encoder, expected in (
        (found["encoder"], tokens[:, 0]),
        (hub("encoder", pretrained, global_pool="avg"), tokens[:, 1:].mean(dim=1)),
    ):
        torch.testing.assert_close(encoder.forward_features(images()), expected, rtol=0, atol=1e-5)
    ids = order().argsort(dim=1)
    assert torch.equal(found["autoencoder"](images(), ids), mae(images(), ids))
    assert torch.equal(found["classifier"](images()), vit(images()))
    assert torch.equal(hub("encoder", finetuned)(images()), vit.forward_features(images()))


def test_torch_hub_asks_for_what_a_foreign_file_does_not_say(tmp_path):
    vit = built(VIT)
    path = saved(tmp_path, vit.state_dict())
    for entry in ("encoder", "classifier"):
        assert_named(refusal(hub, entry, path), "num_heads")
    model = hub("classifier", path, num_heads=3)
    assert torch.equal(model(images()), vit(images())) and model.mean is None
    assert_named(refusal(hub, "autoencoder", path, num_heads=3), path, "no decoder")
    encoder = saved(tmp_path, encoder_part(vit.state_dict()), "encoder.pth")
    assert_named(refusal(hub, "classifier", encoder, num_heads=3), encoder, "no head")
