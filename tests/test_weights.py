"""Reading everyone's weights gives their own numbers, writing them gives ours, and nothing else
gets in."""

import argparse
import importlib.util
import json
import logging
import os
import pickle
import random

import pytest
import safetensors.torch
import timm
import torch
from conftest import ROOT
from models.weights.convert import (
    FORMATS,
    classifier_args,
    complete,
    describe_weights,
    load_weights,
    mae_args,
    read_weights,
    weights_digest,
    write_weights,
)
from reference import huggingface_mae
from runs import command, run
from timm.models.vision_transformer import VisionTransformer as TimmViT
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from engine.run import checkpoint
from models.mae import MaskedAutoencoder
from models.vit import VisionTransformer
from models.weights import files as weights_file
from models.weights.adapt import load_into_classifier, load_into_mae, resize_pos_embed
from util.errors import InputError

MAE = {
    "img_size": 32,
    "patch_size": 8,
    "in_chans": 3,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 4.0,
    "class_token": True,
    "decoder_embed_dim": 64,
    "decoder_depth": 1,
    "decoder_num_heads": 1,
    "decoder_class_token": True,
    "mask_ratio": 0.75,
    "norm_pix_loss": True,
    "decoder": "self",
    "pred_ratio": None,
}
NO_TOKEN = MAE | {"class_token": False, "decoder_class_token": False}
TOKEN_LEAVES = MAE | {"decoder_class_token": False}
VIT = {
    "img_size": 32,
    "patch_size": 8,
    "in_chans": 3,
    "num_classes": 7,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 4.0,
    "class_token": True,
    "global_pool": "token",
    "fc_norm": False,
}
AVG = {"global_pool": "avg", "fc_norm": True}
READOUTS = [
    {},
    AVG,
    {"global_pool": "avg"},
    AVG | {"class_token": False},
    {"global_pool": "avg", "class_token": False},
]
STATS = {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.2]}


def randomized(model, seed=0):
    """All parameters and position tables random: a swapped or forgotten tensor shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model.eval()


def images(size=(32, 32), channels=3):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(5))


def same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def own_file(folder, model, kwargs, name="own.safetensors"):
    """As a finished run writes it."""
    return checkpoint.save_weights(folder / name, model, {"model_args": kwargs, **STATS})


def as_mae(path, **settings):
    """The autoencoder that a file describes, with its weights."""
    tensors, info = read_weights(path)
    model = MaskedAutoencoder(**mae_args(complete(info, **settings)))
    load_into_mae(model, tensors, info, path)
    return model.eval()


def as_classifier(path, **settings):
    """The classifier that a file describes, with its weights."""
    tensors, info = read_weights(path)
    model = VisionTransformer(**classifier_args(complete(info, **settings)))
    assert load_into_classifier(model, tensors, info, path) == set()
    return model.eval()


def refusal(call, *arguments, **keywords):
    """The one line that a user gets."""
    with pytest.raises(InputError) as error:
        call(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


# This project's own


@pytest.mark.parametrize(
    "kwargs", [MAE, NO_TOKEN, TOKEN_LEAVES, MAE | {"img_size": [16, 32], "patch_size": [4, 8]}]
)
def test_own_pretraining_files_say_everything(tmp_path, kwargs):
    model = randomized(MaskedAutoencoder(**kwargs))
    facts = {"model_args": kwargs, **STATS}
    content = {"model": model.state_dict(), "optimizer": {"state": {}}, "ema": None, **facts}
    pth = checkpoint.save_checkpoint(tmp_path, 12, content, keep_last=1)
    for path, kind in ((pth, "checkpoint"), (own_file(tmp_path, model, kwargs), "weights")):
        tensors, info = read_weights(path)
        same(tensors, model.state_dict())
        same(load_weights(path), tensors)
        assert describe_weights(str(path)) == info
        assert info.kind == f"this project's {kind} (autoencoder)"
        assert mae_args(info) == kwargs
        assert (list(info.mean), list(info.std)) == (STATS["mean"], STATS["std"])
        assert info.has_decoder and info.num_classes is None
    assert checkpoint.CHECKPOINT_VERSION is weights_file.CHECKPOINT_VERSION
    assert weights_digest(pth) == pth.with_name(pth.name + ".sha256").read_text().split()[0]


@pytest.mark.parametrize("readout", READOUTS)
def test_own_classifiers(tmp_path, readout):
    kwargs = VIT | readout | {"drop_path_rate": 0.0}
    model = randomized(VisionTransformer(**kwargs))
    path = own_file(
        tmp_path,
        model,
        {name: value for name, value in kwargs.items() if name != "fc_norm" or not value},
    )
    info = describe_weights(path)
    assert info.kind == "this project's weights (classifier)"
    assert classifier_args(info) == kwargs
    assert info.num_classes == 7 and info.fc_norm == kwargs["fc_norm"]
    assert torch.equal(as_classifier(path)(images()), model(images()))


def test_ema_in_a_fine_tuning_checkpoint_does_not_hide_the_model(tmp_path):
    model, ema = randomized(VisionTransformer(**VIT)), randomized(VisionTransformer(**VIT), seed=1)
    content = {"model": model.state_dict(), "ema": ema.state_dict(), "model_args": VIT, **STATS}
    same(
        load_weights(checkpoint.save_checkpoint(tmp_path, 1, content, keep_last=1)),
        model.state_dict(),
    )


def test_a_description_is_one_line(tmp_path):
    path = own_file(tmp_path, MaskedAutoencoder(**TOKEN_LEAVES), TOKEN_LEAVES)
    assert str(describe_weights(path)) == (
        "this project's weights (autoencoder): 32 wide, 2 deep, 2 heads, image 32x32, patch 8x8, 3 channels, "
        "class token, decoder 64 wide, 1 deep, 1 heads, without class token"
    )


# The public MAE code's


def test_public_mae_files(tmp_path):
    model = randomized(MaskedAutoencoder(**MAE))
    args = argparse.Namespace(
        norm_pix_loss=True, mask_ratio=0.5, lr=1e-3, model="mae_vit", device="cuda", dist=None
    )
    full = {
        "model": model.state_dict(),
        "optimizer": {"state": {0: torch.ones(2)}},
        "epoch": 3,
        "scaler": {},
        "args": args,
    }
    torch.save(full, tmp_path / "full.pth")
    info = describe_weights(tmp_path / "full.pth")
    assert info.kind == "MAE (autoencoder)"
    assert (info.num_heads, info.decoder_num_heads) == (
        2,
        None,
    )  # a size of the table; a decoder that nobody published
    assert (info.norm_pix_loss, info.mask_ratio, info.decoder_class_token) == (True, 0.5, True)
    assert info.mean is None
    with pytest.raises(
        InputError, match=r"MAE \(autoencoder\): the file does not say decoder_num_heads"
    ):
        mae_args(info)
    loaded = as_mae(tmp_path / "full.pth", decoder_num_heads=1)
    assert loaded.mask_ratio == 0.5
    pred, _ = loaded.reconstruct(images(), torch.arange(16).repeat(2, 1), mask_ratio=0.75)
    assert torch.equal(pred, model.reconstruct(images(), torch.arange(16).repeat(2, 1))[0])
    assert (
        argparse.Namespace not in torch.serialization.get_safe_globals()
    )  # the permission ended with the reading

    encoder = {
        name: t
        for name, t in model.state_dict().items()
        if not name.startswith(("decoder", "mask"))
    }
    torch.save({"model": encoder}, tmp_path / "encoder.pth")
    info = describe_weights(tmp_path / "encoder.pth")
    assert (info.kind, info.has_decoder, info.num_classes) == ("MAE (encoder)", False, None)
    assert (info.norm_pix_loss, info.decoder_num_heads, info.decoder_embed_dim) == (
        None,
        None,
        None,
    )

    classifier = randomized(VisionTransformer(**VIT | AVG))
    torch.save({"model": classifier.state_dict(), "args": args}, tmp_path / "finetuned.pth")
    info = describe_weights(tmp_path / "finetuned.pth")
    assert (info.kind, info.fc_norm, info.num_classes) == ("MAE (classifier)", True, 7)
    assert torch.equal(as_classifier(tmp_path / "finetuned.pth")(images()), classifier(images()))


def test_heads_of_the_published_decoder_are_known(tmp_path):
    kwargs = MAE | {"decoder_embed_dim": 512, "decoder_num_heads": 16}
    torch.save({"model": MaskedAutoencoder(**kwargs).state_dict()}, tmp_path / "a.pth")
    assert describe_weights(tmp_path / "a.pth").decoder_num_heads == 16


# The reference project's, written here from its description


def reference_blocks(tensors, ours, theirs):
    """Its blocks: no qkv bias, q_bias and v_bias instead."""
    out = {}
    for name, tensor in tensors.items():
        if not name.startswith(f"{ours}."):
            continue
        name = theirs + name.removeprefix(ours)
        if name.endswith("qkv.bias"):
            third = len(tensor) // 3
            assert not tensor[third : 2 * third].any()
            out[name.replace("qkv.bias", "q_bias")] = tensor[:third].clone()
            out[name.replace("qkv.bias", "v_bias")] = tensor[2 * third :].clone()
        else:
            out[name] = tensor
    return out


def reference_pretraining(model):
    """The state dict that it would have saved for this autoencoder."""
    ours = model.state_dict()
    theirs = {
        f"encoder.{name}": t
        for name, t in ours.items()
        if name.startswith(("cls", "pos", "patch", "norm."))
    }
    theirs |= reference_blocks(ours, "blocks", "encoder.blocks")
    theirs |= reference_blocks(ours, "decoder_blocks", "decoder.blocks")
    theirs["encoder_to_decoder.weight"] = ours["decoder_embed.weight"]
    theirs |= {name: ours[name] for name in ("mask_token", "decoder_pos_embed")}
    (p, q), c = model.patch_size, model.in_chans
    for kind in ("weight", "bias"):
        theirs[f"decoder.norm.{kind}"] = ours[f"decoder_norm.{kind}"]
        rows = torch.empty_like(ours[f"decoder_pred.{kind}"])
        for channel in range(c):
            for y in range(p):
                for x in range(q):
                    rows[(channel * p + y) * q + x] = ours[f"decoder_pred.{kind}"][
                        (y * q + x) * c + channel
                    ]
        theirs[f"decoder.head.{kind}"] = rows
    return theirs


def without_key_bias(model):
    """Such a model as the reference project can hold."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("qkv.bias"):
                tensor[len(tensor) // 3 : 2 * len(tensor) // 3] = 0
            if name == "decoder_embed.bias":
                tensor.zero_()
    return model


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
@pytest.mark.parametrize("kwargs", [NO_TOKEN, TOKEN_LEAVES])
def test_reference_pretraining(tmp_path, kwargs, wrapper):
    model = without_key_bias(randomized(MaskedAutoencoder(**kwargs)))
    content = {
        wrapper: reference_pretraining(model),
        "args": argparse.Namespace(lr=1.0),
        "arch": "a",
        "epoch": 1,
    }
    if wrapper == "state_dict":
        content["state_dict_ema"] = {name: t + 1 for name, t in content["state_dict"].items()}
    torch.save(content, tmp_path / "a.pth")
    tensors, info = read_weights(tmp_path / "a.pth")
    same(tensors, model.state_dict())  # the position tables too, as they are
    assert info.kind == "reference project (autoencoder)"
    assert (info.class_token, info.decoder_class_token) == (kwargs["class_token"], False)
    assert (info.decoder_embed_dim, info.decoder_depth, info.decoder_num_heads) == (64, 1, 1)
    loaded = as_mae(tmp_path / "a.pth", norm_pix_loss=True)
    ids = torch.stack(
        [torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    )
    assert torch.equal(loaded.reconstruct(images(), ids)[0], model.reconstruct(images(), ids)[0])


@pytest.mark.parametrize("readout", [{}, AVG | {"class_token": False}])
def test_reference_classifiers(tmp_path, readout):
    model = without_key_bias(randomized(VisionTransformer(**VIT | readout)))
    ours = model.state_dict()
    theirs = {name: t for name, t in ours.items() if not name.startswith(("blocks", "norm"))}
    theirs |= {
        f"fc_{name}": t for name, t in ours.items() if name.startswith("norm")
    }  # one name for both readouts
    torch.save({"model": theirs | reference_blocks(ours, "blocks", "blocks")}, tmp_path / "a.pth")
    info = describe_weights(tmp_path / "a.pth")
    assert (info.kind, info.num_classes) == ("reference project (classifier)", 7)
    assert info.fc_norm == (not info.class_token)
    assert torch.equal(as_classifier(tmp_path / "a.pth")(images()), model(images()))


# timm's


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("saver", ["safetensors", "pth", "saver"])
def test_timm_classifiers_give_their_own_logits_and_come_back(tmp_path, readout, saver):
    theirs = randomized(TimmViT(**VIT | readout))
    path = tmp_path / ("a.safetensors" if saver == "safetensors" else "a.pth")
    if saver == "safetensors":
        safetensors.torch.save_file(theirs.state_dict(), path)
    elif saver == "pth":
        torch.save(theirs.state_dict(), path)
    else:
        torch.save(
            {
                "state_dict": theirs.state_dict(),
                "args": argparse.Namespace(opt="sgd"),
                "metric": 1.0,
            },
            path,
        )
    tensors, info = read_weights(path)
    assert info.kind == "timm (classifier)"
    model = VisionTransformer(**VIT | readout).eval()
    assert load_into_classifier(model, tensors, info, path) == set()
    torch.testing.assert_close(model(images()), theirs(images()), rtol=0, atol=1e-5)

    write_weights(tensors, info, tmp_path / "back.safetensors", "timm")
    back = TimmViT(**VIT | readout).eval()
    back.load_state_dict(safetensors.torch.load_file(tmp_path / "back.safetensors"), strict=True)
    assert torch.equal(back(images()), theirs(images()))


def test_timm_models_by_name(tmp_path):
    theirs = randomized(timm.create_model("test_vit", img_size=32, num_classes=0))
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    tensors, info = read_weights(tmp_path / "a.pth")
    assert (info.kind, info.num_heads, info.num_classes) == ("timm (encoder)", None, None)
    write_weights(tensors, info, tmp_path / "a.safetensors", "timm")
    again = timm.create_model(
        "test_vit", img_size=32, num_classes=0, checkpoint_path=str(tmp_path / "a.safetensors")
    )
    model = VisionTransformer(
        **classifier_args(complete(info, num_heads=2)) | {"num_classes": 1}
    ).eval()
    assert load_into_classifier(model, tensors, info, "a") == {"head.weight", "head.bias"}
    assert torch.equal(again.eval()(images()), theirs(images()))
    torch.testing.assert_close(
        model.forward_features(images()), theirs(images()), rtol=0, atol=1e-5
    )


# Hugging Face's


HF = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 48,
    "mask_ratio": 0.5,
    "norm_pix_loss": True,
    "layer_norm_eps": 1e-6,
}


def published_names(key):
    """The names of the published weights, from those that the current model has in memory."""
    key = key.replace("vit.layers.", "vit.encoder.layer.").replace("mlp.fc1", "intermediate.dense")
    key = key.replace("mlp.fc2", "output.dense").replace(
        "attention.o_proj", "attention.output.dense"
    )
    for part in ("query", "key", "value"):
        key = key.replace(f"attention.{part[0]}_proj", f"attention.attention.{part}")
    return key


@pytest.mark.parametrize("names", ["saved", "in memory", "published", "sharded", "the file itself"])
def test_huggingface_autoencoders_give_their_own_loss(tmp_path, names):
    theirs = randomized(ViTMAEForPreTraining(ViTMAEConfig(**HF)))
    folder = tmp_path / "hf"
    theirs.save_pretrained(folder, **({"max_shard_size": "60KB"} if names == "sharded" else {}))
    assert (folder / "model.safetensors.index.json").exists() == (names == "sharded")
    path = folder / "model.safetensors" if names == "the file itself" else folder
    if names in ("in memory", "published"):
        (folder / "model.safetensors").unlink()
        rename = published_names if names == "published" else str
        torch.save(
            {rename(key): t for key, t in theirs.state_dict().items()}, folder / "pytorch_model.bin"
        )
    info = describe_weights(path)
    assert info.kind == "Hugging Face ViTMAE (autoencoder)"
    assert (info.num_heads, info.decoder_num_heads, info.mlp_ratio, info.layer_norm_eps) == (
        3,
        2,
        2.0,
        1e-6,
    )
    assert (info.norm_pix_loss, info.mask_ratio, info.img_size) == (True, 0.5, (32, 32))
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(3))
    loss = as_mae(path)(images(), noise.argsort(dim=1))
    assert abs(loss.item() - theirs(images(), noise=noise).loss.item()) < 1e-6
    assert len(weights_digest(path)) == 64


def test_huggingface_encoders_give_their_own_features(tmp_path):
    theirs = randomized(ViTMAEModel(ViTMAEConfig(**HF | {"mask_ratio": 0.0})))
    theirs.save_pretrained(tmp_path / "hf")
    tensors, info = read_weights(tmp_path / "hf")
    assert info.kind == "Hugging Face ViTMAE (encoder)"
    assert (info.has_decoder, info.num_heads, info.decoder_num_heads) == (False, 3, None)
    model = VisionTransformer(**classifier_args(info) | {"num_classes": 1}).eval()
    load_into_classifier(model, tensors, info, "hf")
    feature = theirs(images()).last_hidden_state[
        :, 0
    ]  # the class token: the order of the patches does not matter
    torch.testing.assert_close(model.forward_features(images()), feature, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("eps", "said"), [(1e-6, False), (1e-12, True)])
def test_another_layer_norm_eps_is_said(tmp_path, caplog, eps, said):
    ViTMAEModel(ViTMAEConfig(**HF | {"layer_norm_eps": eps})).save_pretrained(tmp_path / "hf")
    assert describe_weights(tmp_path / "hf").layer_norm_eps == eps
    assert ("layer_norm_eps is 1e-12 there and 1e-06 here" in caplog.text) == said


def test_huggingface_loads_what_is_written_and_gives_our_loss(tmp_path):
    kwargs = MAE | {"decoder_num_heads": 4, "mask_ratio": 0.5}
    ours = randomized(MaskedAutoencoder(**kwargs))
    tensors, info = read_weights(own_file(tmp_path, ours, kwargs))
    write_weights(tensors, info, tmp_path / "hf", "huggingface")
    theirs, report = ViTMAEForPreTraining.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.config.layer_norm_eps == 1e-6 and theirs.config.architectures == [
        "ViTMAEForPreTraining"
    ]
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(3))
    expected = theirs.eval()(images(), noise=noise).loss.item()
    assert abs(ours(images(), noise.argsort(dim=1)).item() - expected) < 1e-6
    reference = huggingface_mae(ours, kwargs).state_dict()
    same(dict(theirs.state_dict()), dict(reference))
    encoder, report = ViTMAEModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(encoder.embeddings.position_embeddings, ours.pos_embed)
    assert names_in(tmp_path / "hf") == ["config.json", "model.safetensors"]
    assert {published_names(name) for name in reference} == set(
        safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors")
    )


# There and back


@pytest.mark.parametrize("form", ["mae", "huggingface", "safetensors", "timm"])
def test_an_autoencoder_goes_there_and_back_bit_for_bit(tmp_path, form, caplog):
    caplog.set_level(logging.INFO)
    source = own_file(tmp_path, randomized(MaskedAutoencoder(**MAE)), MAE)
    tensors, info = read_weights(source)
    write_weights(tensors, info, tmp_path / "there", form)
    back, found = read_weights(tmp_path / "there")
    kept = {
        n: t
        for n, t in tensors.items()
        if form != "timm" or not n.startswith(("decoder", "mask_token"))
    }
    same(back, kept)
    assert ("timm has no decoder: 20 tensors dropped" in caplog.text) == (form == "timm")
    geometry = (
        "embed_dim",
        "depth",
        "num_heads",
        "img_size",
        "patch_size",
        "class_token",
        "in_chans",
        "mlp_ratio",
    )
    assert [getattr(found, name) for name in geometry] == [getattr(info, name) for name in geometry]
    assert names_in(tmp_path) == ["own.safetensors", "there"]  # no leftovers
    if form == "safetensors":
        assert found == info
        assert checkpoint.weights_header(tmp_path / "there") == checkpoint.weights_header(source)


@pytest.mark.parametrize(
    ("form", "readout"),
    [(form, readout) for form in ("safetensors", "timm") for readout in READOUTS]
    + [("mae", readout) for readout in READOUTS[:3]],  # that format needs a class token
)
def test_a_classifier_goes_there_and_back_bit_for_bit(tmp_path, form, readout):
    kwargs = VIT | readout
    tensors, info = read_weights(
        own_file(tmp_path, randomized(VisionTransformer(**kwargs)), kwargs)
    )
    write_weights(tensors, info, tmp_path / "there", form)
    back, found = read_weights(tmp_path / "there")
    same(back, tensors)
    assert (found.num_classes, found.fc_norm, found.class_token) == (
        7,
        kwargs["fc_norm"],
        kwargs["class_token"],
    )
    if form == "safetensors":
        assert found == info


def test_a_foreign_encoder_becomes_a_file_that_records_its_grid(tmp_path):
    model = randomized(VisionTransformer(**VIT | {"img_size": (16, 48)}))
    encoder = {name: t for name, t in model.state_dict().items() if not name.startswith("head")}
    torch.save({"model": encoder}, tmp_path / "a.pth")
    message = refusal(read_weights, tmp_path / "a.pth")
    assert "12 patches of 8x8 make no square image" in message and "--img_size H W" in message
    message = refusal(read_weights, tmp_path / "a.pth", (16, 32))
    assert "images of 16x32 do not have 12 patches of 8x8" in message
    tensors, info = read_weights(tmp_path / "a.pth", (16, 48))
    write_weights(tensors, info, tmp_path / "b.safetensors", "safetensors")
    back, found = read_weights(tmp_path / "b.safetensors")
    same(back, encoder)
    assert (found.kind, found.num_classes) == ("this project's weights (encoder)", None)
    assert (found.img_size, found.mean) == ((16, 48), None)
    message = refusal(read_weights, tmp_path / "b.safetensors", (32, 24))
    assert "its images are 16x48, img_size 32x24 was given" in message


def test_half_precision_stays(tmp_path):
    model = randomized(VisionTransformer(**VIT)).half()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    tensors, info = read_weights(tmp_path / "a.pth")
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    write_weights(tensors, info, tmp_path / "b", "safetensors")
    same(load_weights(tmp_path / "b"), tensors)


# What a format cannot hold


@pytest.mark.parametrize(
    ("kwargs", "form", "reasons"),
    [
        (NO_TOKEN, "huggingface", ["class token in the encoder", "class token in the decoder"]),
        (TOKEN_LEAVES, "huggingface", ["needs the class token in the decoder"]),
        (MAE | {"img_size": (16, 32)}, "huggingface", ["needs square images"]),
        (MAE | {"patch_size": (4, 8)}, "huggingface", ["needs square patches"]),
        (VIT, "huggingface", ["needs a decoder", "has no head"]),
        (NO_TOKEN, "mae", ["class token in the encoder", "class token in the decoder"]),
        (TOKEN_LEAVES, "mae", ["needs the class token in the decoder"]),
        (
            MAE | {"img_size": (16, 32), "patch_size": (4, 8)},
            "mae",
            ["needs square images", "needs square patches"],
        ),
        (MAE, "onnx", ["format must be one of mae, timm, huggingface, safetensors, got 'onnx'"]),
    ],
)
def test_a_format_that_cannot_hold_a_model_is_refused_before_anything_is_written(
    tmp_path, kwargs, form, reasons
):
    model = (MaskedAutoencoder if "mask_ratio" in kwargs else VisionTransformer)(**kwargs)
    tensors, info = read_weights(own_file(tmp_path, model, kwargs))
    message = refusal(write_weights, tensors, info, tmp_path / "there", form)
    assert all(reason in message for reason in reasons), message
    assert names_in(tmp_path) == ["own.safetensors"]


def test_targets_that_exist_or_have_no_folder_are_refused(tmp_path):
    tensors, info = read_weights(own_file(tmp_path, MaskedAutoencoder(**MAE), MAE))
    (tmp_path / "there").write_text("precious")
    for form in ("mae", "timm", "huggingface", "safetensors"):
        assert "is already there" in refusal(write_weights, tensors, info, tmp_path / "there", form)
        assert "its folder" in refusal(
            write_weights, tensors, info, tmp_path / "no" / "there", form
        )
    assert (tmp_path / "there").read_text() == "precious"


@pytest.mark.parametrize("form", ["mae", "timm", "huggingface", "safetensors"])
def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch, form):
    tensors, info = read_weights(own_file(tmp_path, MaskedAutoencoder(**MAE), MAE))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert "cannot be written" in refusal(write_weights, tensors, info, tmp_path / "there", form)
    assert names_in(tmp_path) == ["own.safetensors"]


def test_facts_that_the_file_cannot_tell_are_asked_for(tmp_path):
    kwargs = MAE | {"embed_dim": 48, "num_heads": 3}
    torch.save({"model": MaskedAutoencoder(**kwargs).state_dict()}, tmp_path / "a.pth")
    tensors, info = read_weights(tmp_path / "a.pth")
    assert info.num_heads is None
    for form in ("huggingface", "safetensors"):
        message = refusal(write_weights, tensors, info, tmp_path / "there", form)
        assert "does not say num_heads, decoder_num_heads, norm_pix_loss" in message
    assert not (tmp_path / "there").exists()
    facts = {"num_heads": 3, "decoder_num_heads": 1, "norm_pix_loss": False}
    write_weights(tensors, complete(info, **facts), tmp_path / "there", "safetensors")
    assert mae_args(describe_weights(tmp_path / "there")) == kwargs | {"norm_pix_loss": False}
    known = describe_weights(tmp_path / "there")
    assert "decoder_num_heads must be 1 or more, got 0" in refusal(
        complete, info, decoder_num_heads=0
    )
    wrong = complete(info, **facts | {"num_heads": 5})
    assert "not divisible by num_heads 5" in refusal(
        write_weights, tensors, wrong, tmp_path / "b", "safetensors"
    )
    assert "num_heads 3 in the file, 4 given" in refusal(
        complete, known, num_heads=4, norm_pix_loss=None
    )


# Into a classifier


def load(kwargs, tensors, info):
    model = VisionTransformer(**VIT | kwargs)
    return model, load_into_classifier(model, tensors, info, "the path")


@pytest.mark.parametrize("class_token", [True, False])
def test_pretraining_into_each_readout(tmp_path, caplog, class_token):
    caplog.set_level(logging.INFO)
    kwargs = MAE if class_token else NO_TOKEN
    tensors, info = read_weights(
        own_file(tmp_path, randomized(MaskedAutoencoder(**kwargs)), kwargs)
    )
    head, fc_norm = {"head.weight", "head.bias"}, {"fc_norm.weight", "fc_norm.bias"}
    model, fresh = load(AVG | {"class_token": class_token}, tensors, info)
    assert fresh == head | fc_norm
    assert torch.equal(model.fc_norm.weight, torch.ones(32))
    assert "the path: this project's weights (autoencoder): 32 wide" in caplog.text
    for said in (
        "decoder dropped",
        "norm dropped: fc_norm",
        "no head in the file: it starts fresh for 7 classes",
    ):
        assert said in caplog.text
    for readout in READOUTS[2:3] + READOUTS[:1] if class_token else READOUTS[4:]:
        model, fresh = load(readout | {"class_token": class_token}, tensors, info)
        assert fresh == head
        loaded = model.state_dict()
        same(
            {n: loaded[n] for n in loaded if n not in head},
            {n: tensors[n] for n in loaded if n not in head},
        )


def test_a_fine_tuned_classifier_keeps_its_fc_norm_and_its_head(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    source = randomized(VisionTransformer(**VIT | AVG))
    tensors, info = read_weights(own_file(tmp_path, source, VIT | AVG))
    model, fresh = load(AVG, tensors, info)
    assert fresh == set()
    same(model.state_dict(), source.state_dict())
    assert "dropped" not in caplog.text
    model, fresh = load(AVG | {"num_classes": 5}, tensors, info)
    assert fresh == {"head.weight", "head.bias"}
    assert "head of 7 classes dropped: the data has 5" in caplog.text
    assert torch.equal(model.fc_norm.weight, source.fc_norm.weight)
    for readout in READOUTS[:1] + READOUTS[2:3]:
        with pytest.raises(
            InputError, match="it holds fc_norm .* readout needs norm: .* global_pool avg fits"
        ):
            load(readout, tensors, info)


def test_positions_on_a_2_by_3_grid_become_4_by_6():
    """Bicubic in numbers: twice as many samples, each at a quarter between two old ones, kernel a =
    -0.75."""
    table = torch.randn(1, 7, 2, dtype=torch.float16, generator=torch.Generator().manual_seed(0))

    def kernel(x):
        x = abs(x)
        if x <= 1:
            return 1.25 * x**3 - 2.25 * x**2 + 1
        return -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3 if x < 2 else 0.0

    def along(values):
        n = len(values)
        out = []
        for i in range(2 * n):
            at = (i + 0.5) / 2 - 0.5
            taps = range(int(at // 1) - 1, int(at // 1) + 3)
            out.append(sum(kernel(at - k) * values[min(max(k, 0), n - 1)] for k in taps))
        return out

    resized = resize_pos_embed(table, (2, 3), (4, 6), class_token=True)
    assert resized.shape == (1, 25, 2) and resized.dtype == torch.float32
    assert torch.equal(resized[0, 0], table[0, 0].float())
    for channel in range(2):
        rows = table[0, 1:, channel].double().reshape(2, 3).tolist()
        wide = [along(row) for row in rows]  # 2 x 6
        expected = [
            list(column)
            for column in zip(*[along(column) for column in zip(*wide, strict=True)], strict=True)
        ]
        torch.testing.assert_close(
            resized[0, 1:, channel].double().reshape(4, 6),
            torch.tensor(expected, dtype=torch.float64),
            rtol=0,
            atol=1e-6,
        )


def test_another_image_size_resizes_the_positions_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    kwargs = MAE | {"img_size": [16, 24]}
    source = randomized(MaskedAutoencoder(**kwargs))
    tensors, info = read_weights(own_file(tmp_path, source, kwargs))
    model, _ = load({"img_size": (32, 48)}, tensors, info)
    assert "positions resized from 2x3 to 4x6 patches" in caplog.text
    assert torch.equal(
        model.pos_embed, resize_pos_embed(source.pos_embed, (2, 3), (4, 6), class_token=True)
    )
    caplog.clear()
    model, _ = load({"img_size": (24, 16)}, tensors, info)  # as many patches, laid out otherwise
    assert "positions resized from 2x3 to 3x2 patches" in caplog.text
    assert tensors["pos_embed"].shape == (1, 7, 32)  # the caller's are left alone
    caplog.clear()
    model, _ = load({"img_size": (16, 24)}, tensors, info)
    assert torch.equal(model.pos_embed, source.pos_embed) and "resized" not in caplog.text


def test_everything_that_does_not_fit_a_classifier_is_said_at_once(tmp_path):
    tensors, info = read_weights(own_file(tmp_path, MaskedAutoencoder(**NO_TOKEN), NO_TOKEN))
    model = VisionTransformer(
        **VIT
        | {
            "embed_dim": 48,
            "depth": 3,
            "num_heads": 3,
            "patch_size": (8, 4),
            "in_chans": 1,
            "mlp_ratio": 2.0,
        }
    )
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert refusal(load_into_classifier, model, tensors, info, "the path") == (
        "the path (this project's weights (autoencoder)) does not fit: embed_dim 32 in the file, 48 in the settings; "
        "depth 2 in the file, 3 in the settings; num_heads 2 in the file, 3 in the settings; "
        "mlp_ratio 4 in the file, 2 in the settings; patch_size 8x8 in the file, 8x4 in the settings; "
        "in_chans 3 in the file, 1 in the settings; class_token false in the file, true in the settings"
    )
    same(model.state_dict(), before)


def test_unknown_heads_are_taken_from_the_settings_and_said(tmp_path, caplog):
    model = randomized(VisionTransformer(**VIT | {"embed_dim": 48, "num_heads": 3}))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    tensors, info = read_weights(tmp_path / "a.pth")
    loaded, _ = load({"embed_dim": 48, "num_heads": 3}, tensors, info)
    assert "the path: it does not say num_heads: the settings' are taken" in caplog.text
    assert torch.equal(loaded.eval()(images()), model(images()))


# Into an autoencoder


def test_an_encoder_alone_does_not_make_an_autoencoder(tmp_path):
    encoder = {
        n: t
        for n, t in MaskedAutoencoder(**MAE).state_dict().items()
        if not n.startswith(("decoder", "mask"))
    }
    torch.save({"model": encoder}, tmp_path / "a.pth")
    tensors, info = read_weights(tmp_path / "a.pth")
    message = refusal(load_into_mae, MaskedAutoencoder(**MAE), tensors, info, "the path")
    assert "the path (MAE (encoder)) does not fit: it holds no decoder" in message
    assert "holds no decoder" in refusal(mae_args, info)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_size": 64}, "img_size 32x32 in the file, 64x64 in the settings"),
        ({"embed_dim": 48}, "embed_dim 32 in the file, 48 in the settings"),
        ({"num_heads": 4}, "num_heads 2 in the file, 4 in the settings"),
        ({"mlp_ratio": 2.0}, "mlp_ratio 4 in the file, 2 in the settings"),
        ({"decoder_embed_dim": 32}, "decoder_embed_dim 64 in the file, 32 in the settings"),
        ({"decoder_depth": 2}, "decoder_depth 1 in the file, 2 in the settings"),
        ({"decoder_num_heads": 2}, "decoder_num_heads 1 in the file, 2 in the settings"),
        (
            {"decoder_class_token": False},
            "decoder_class_token true in the file, false in the settings",
        ),
        (
            {"class_token": False, "decoder_class_token": False},
            "class_token true in the file, false in the settings; decoder_class_token true in the file, false in",
        ),
    ],
)
def test_another_autoencoder_is_refused_with_both_sides(tmp_path, change, message):
    tensors, info = read_weights(own_file(tmp_path, MaskedAutoencoder(**MAE), MAE))
    assert message in refusal(
        load_into_mae, MaskedAutoencoder(**MAE | change), tensors, info, "the path"
    )


def test_an_autoencoder_takes_the_files_positions_and_another_target_is_said(tmp_path, caplog):
    source = randomized(MaskedAutoencoder(**MAE))
    tensors, info = read_weights(own_file(tmp_path, source, MAE))
    model = MaskedAutoencoder(**MAE | {"norm_pix_loss": False})
    load_into_mae(model, tensors, info, "the path")
    same(model.state_dict(), source.state_dict())
    assert "norm_pix_loss is True in the file, False in the settings" in caplog.text


# Files that are something else


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize(
    "name", ["a.pth", "a.safetensors", "a.bin", "hf/pytorch_model.bin", "hf/model.safetensors"]
)
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle 2", "pickle 4", "in args"])
def test_a_malicious_pickle_leaves_no_trace(tmp_path, name, form):
    marker = tmp_path / "marker"
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    (path.parent / "config.json").write_text(json.dumps({"model_type": "vit_mae"}))
    content = {"model": {"patch_embed.proj.weight": torch.ones(1), "x": Bomb(marker)}}
    if form == "in args":
        content = {
            "model": {"pos_embed": torch.ones(1)},
            "args": argparse.Namespace(x=Bomb(marker)),
        }
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps({"model": Bomb(marker)}, protocol=int(form[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    message = refusal(read_weights, path.parent if "/" in name else path)
    assert str(path) in message
    if form != "pickle 4":
        assert (
            "it asks to run or build posix.mkdir: only tensors and plain values are read" in message
        )
    assert not marker.exists()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "hf") == sorted(
        [] if "/" in name else [name, "config.json"]
    )


def test_the_bomb_would_go_off(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker")))
    assert (tmp_path / "marker").is_dir()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"weights: none\n" * 9, "a text file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs has not fetched"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "an image"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "an image"),
        (bytes(40), "a file of unknown kind"),
        (b"PK\x03\x04" + bytes(40), "cannot be read as a PyTorch file"),
        (b"\x80\x02}q\x00.", "cannot be read as a PyTorch file"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}" + bytes(14), "cannot be read as safetensors"),
    ],
)
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_files_of_another_kind(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    message = refusal(read_weights, tmp_path / name)
    assert message.startswith(f"{tmp_path / name}: ") and words in message


def test_paths_that_are_not_there_and_folders_of_another_kind(tmp_path):
    assert "there is no such file" in refusal(read_weights, tmp_path / "none.pth")
    assert "there is no such file" in refusal(weights_digest, tmp_path / "none.pth")
    message = refusal(read_weights, tmp_path)
    assert (
        "must be a Hugging Face one, with config.json beside model.safetensors or pytorch_model.bin"
        in message
    )
    own_file(tmp_path, MaskedAutoencoder(**MAE), MAE, "model.safetensors")
    assert "name the file of weights in it" in refusal(read_weights, tmp_path)
    os.mkfifo(tmp_path / "fifo")
    assert "not a regular file" in refusal(read_weights, tmp_path / "fifo")


def test_huggingface_folders_that_cannot_be_read(tmp_path):
    ViTMAEModel(ViTMAEConfig(**HF)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"model_type": "vit"}, "only model_type 'vit_mae' is read, got 'vit'"),
        ({"hidden_act": "relu"}, "only hidden_act 'gelu' is read, got 'relu'"),
        ({"image_size": "big"}, "a setting has the wrong type"),
        ({"image_size": 48}, "images of 48x48 do not have 16 patches of 8x8"),
        ({"num_attention_heads": 5}, "embed_dim 48 is not divisible by num_heads 5"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        assert message in refusal(read_weights, tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read as JSON" in refusal(read_weights, tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "elsewhere.json")
    assert "need their config.json beside them" in refusal(
        read_weights, tmp_path / "model.safetensors"
    )
    (tmp_path / "elsewhere.json").rename(tmp_path / "config.json")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path.parent / "outside.safetensors").write_bytes(b"")
    for weight_map in ({"a": "../outside.safetensors"}, {"a": "missing.safetensors"}, {}, None):
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": weight_map})
        )
        assert "names no parts, or parts that are not beside it" in refusal(read_weights, tmp_path)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_damaged_files_are_one_clear_error_or_still_whole(tmp_path, form):
    """Cut or flipped anywhere: never another exception. (A flip among a tensor's numbers cannot be
    seen.)"""
    tensors = VisionTransformer(**VIT).state_dict()
    whole = tmp_path / "whole"
    if form == "safetensors":
        safetensors.torch.save_file(tensors, whole)
    else:
        torch.save({"model": tensors}, whole, _use_new_zipfile_serialization=form == "zip")
    content = whole.read_bytes()
    path = tmp_path / "damaged"
    generator = random.Random(0)
    for cut in [1, 9, 100, 5000, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:cut])
        assert str(path) in refusal(read_weights, path)
    refused = 0
    for i in range(150):
        at = generator.randrange(4000) if i % 2 else generator.randrange(len(content))
        path.write_bytes(
            content[:at] + bytes([content[at] ^ (1 << generator.randrange(8))]) + content[at + 1 :]
        )
        try:
            read_weights(path)
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 10


def test_a_checkpoint_that_disagrees_with_its_sha256_is_refused(tmp_path):
    content = {"model": MaskedAutoencoder(**MAE).state_dict(), "model_args": MAE, **STATS}
    path = checkpoint.save_checkpoint(tmp_path, 1, content, keep_last=1)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    assert "damaged, its sha256 is not the one in checkpoint-00000001.pth.sha256" in refusal(
        read_weights, path
    )


def saved(folder, change, wrapper="model"):
    """A classifier's file, altered."""
    tensors = dict(VisionTransformer(**VIT).state_dict())
    change(tensors)
    torch.save({wrapper: tensors}, folder / "a.pth")
    return folder / "a.pth"


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("blocks.0.ls1.gamma", (32,), "it has layer scale"),
        ("blocks.1.gamma_1", (32,), "it has layer scale"),
        ("reg_token", (1, 4, 32), "it has register tokens"),
        ("dist_token", (1, 1, 32), "it has a distillation token"),
        ("blocks.0.attn.q_norm.weight", (16,), "it has normalised queries and keys"),
        ("fc_norm.running_mean", (32,), "it has BatchNorm, as a linear probe's head has"),
        ("head.0.running_mean", (32,), "it has BatchNorm, as a linear probe's head has"),
        ("something.else", (3,), "not the weights of a ViT that this project has: "),
        ("fc_norm.weight", (32,), "unexpected norm.weight, norm.bias; missing fc_norm.bias"),
    ],
)
def test_parts_of_other_vits_are_named(tmp_path, name, shape, words):
    message = refusal(
        read_weights, saved(tmp_path, lambda tensors: tensors.update({name: torch.ones(shape)}))
    )
    assert words in message
    assert name in message or name == "fc_norm.weight"


def test_missing_tensors_and_wrong_shapes_are_listed(tmp_path):
    message = refusal(
        read_weights, saved(tmp_path, lambda t: [t.pop(n) for n in list(t) if "blocks.1.mlp" in n])
    )
    assert (
        "missing blocks.1.mlp.fc1.weight, blocks.1.mlp.fc1.bias, blocks.1.mlp.fc2.weight" in message
    )
    message = refusal(
        read_weights, saved(tmp_path, lambda t: t.update({"blocks.0.norm1.bias": torch.ones(9)}))
    )
    assert "unfit blocks.0.norm1.bias is (9,), expected (32,)" in message
    message = refusal(
        read_weights, saved(tmp_path, lambda t: t.update({"norm.bias": torch.ones(32).int()}))
    )
    assert "norm.bias is torch.int32 on cpu, expected floating point" in message
    message = refusal(
        read_weights,
        saved(tmp_path, lambda t: t.update({"blocks.9000000.norm1.bias": torch.ones(32)})),
    )
    assert "unexpected blocks.9000000.norm1.bias; missing" in message
    message = refusal(
        read_weights, saved(tmp_path, lambda t: t.update({"pos_embed": torch.ones(17, 32)}))
    )
    assert "pos_embed is (17, 32), expected 3 dimensions" in message
    message = refusal(
        read_weights, saved(tmp_path, lambda t: t.update({"pos_embed": torch.ones(1, 16, 32)}))
    )
    assert "15 patches of 8x8 make no square image" in message  # timm's no_embed_class


def test_another_network_shows_both_sides(tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "a.pth")
    message = refusal(read_weights, tmp_path / "a.pth")
    assert (
        "not the weights of a ViT" in message
        and "in all); missing patch_embed.proj.weight, pos_embed" in message
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.ones(3), "expected a dict of tensors, got Tensor"),
        ({"model": {}}, "it is empty"),
        ({"model": {"a": torch.ones(1), "b": 3}}, "'b' are something else"),
        (
            {"epoch": 3, 4: 5},
            "expected a dict of tensors, or one under 'model' or 'state_dict'; 'epoch', 4 are",
        ),
    ],
)
def test_contents_that_are_not_weights(tmp_path, content, words):
    torch.save(content, tmp_path / "a.pth")
    assert words in refusal(read_weights, tmp_path / "a.pth")


def test_own_files_that_lie_about_themselves(tmp_path):
    model = MaskedAutoencoder(**MAE)
    for change, words in (
        ({"depth": 3}, "its depth is 3, but it holds 2 blocks.*"),
        ({"embed_dim": 64}, "blocks.0.attn.qkv.weight is (96, 32), expected (192, 64)"),
        ({"embed_dim": "wide"}, "a geometry that cannot be"),
        ({"patch_size": 0}, "a geometry that cannot be"),
        ({"num_heads": 0}, "a geometry that cannot be"),
        ({"img_size": None}, "has the wrong type"),
        ({"colour": 1}, "lack, or should not have: colour"),
    ):
        assert words in refusal(read_weights, own_file(tmp_path, model, MAE | change))
    path = own_file(
        tmp_path, model, {name: value for name, value in MAE.items() if name != "in_chans"}
    )
    assert "lack, or should not have: in_chans" in refusal(read_weights, path)
    torch.save(
        {"model": model.state_dict(), "model_args": MAE, "format_version": 99, **STATS},
        tmp_path / "a.pth",
    )
    assert "has format 99, this version reads 1" in refusal(read_weights, tmp_path / "a.pth")


def test_an_own_linear_probe_is_sent_to_its_weights(tmp_path):
    content = {
        "model": {"bn.running_mean": torch.ones(3), "weights.0": torch.ones(2, 3)},
        "model_args": VIT,
        **STATS,
    }
    path = checkpoint.save_checkpoint(tmp_path, 3, content, keep_last=1)
    message = refusal(read_weights, path)
    assert "holds only bn.running_mean, weights.0" in message
    assert "name the model.safetensors that its run wrote at the end" in message


# The tool


TOOL = "tools/convert_checkpoint.py"


@pytest.fixture(scope="module")
def convert():
    spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


def test_the_tool_describes_and_converts(tmp_path, convert, capsys):
    model = randomized(MaskedAutoencoder(**MAE))
    source = own_file(tmp_path, model, MAE)
    assert convert(source, "--describe") == describe_weights(source)
    assert capsys.readouterr().out == f"{describe_weights(source)}\n"
    for form in FORMATS:
        convert(source, tmp_path / form, "--format", form)
        assert capsys.readouterr().out.endswith(f"wrote {tmp_path / form}\n")
        back = load_weights(tmp_path / form)
        same(back, {name: t for name, t in model.state_dict().items() if name in back})
    facts = ("--decoder_num_heads", 1, "--norm_pix_loss", "false")
    arguments = (tmp_path / "mae", tmp_path / "a", "--format", "huggingface")
    assert "does not say decoder_num_heads" in refusal(convert, *arguments)
    convert(*arguments, *facts)
    assert describe_weights(tmp_path / "a").norm_pix_loss is False


def test_the_tool_takes_the_size_of_images_that_are_not_square(tmp_path, convert):
    torch.save(VisionTransformer(**VIT | {"img_size": (16, 48)}).state_dict(), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "b", "--format", "safetensors", "--img_size", 16, 48)
    assert describe_weights(tmp_path / "b").img_size == (16, 48)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "give either --describe, or DST and --format"),
        (["a", "b"], "give either --describe, or DST and --format"),
        (
            ["a", "b", "--format", "mae", "--describe"],
            "give either --describe, or DST and --format",
        ),
        (["a", "b", "--format", "onnx"], "invalid choice: 'onnx'"),
        (["none", "--describe"], "none: there is no such file"),
        ([], "SRC"),
    ],
)
def test_the_tool_refuses_in_one_line(convert, arguments, message):
    assert message in refusal(convert, *arguments)


def test_the_tool_as_a_user_runs_it(tmp_path):
    torch.save({"model": MaskedAutoencoder(**MAE).state_dict()}, tmp_path / "a.pth")
    good = run(command(str(tmp_path / "a.pth"), "--describe", script=TOOL))
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.startswith("MAE (autoencoder): 32 wide, 2 deep, 2 heads")
    bad = run(
        command(str(tmp_path / "a.pth"), str(tmp_path / "a.pth"), "--format", "mae", script=TOOL)
    )
    assert bad.returncode == 2
    assert (
        bad.stderr
        == f"error: {tmp_path / 'a.pth'} is already there: name another target, or remove it\n"
    )
