"""The facts of the fine-tuning, linear and k-NN recipes; that they fit the pretraining recipes."""

import re
from typing import Any, NamedTuple

import pytest
import torch
from test_cfgs import (
    BASE,
    FILES,
    HUGE,
    LARGE,
    OWN,
    SMALL,
    build,
    head,
    load,
    names,
    shape,
    stage_of,
)

from util.settings.base import IMAGENET_MEAN, IMAGENET_STD

EVALUATIONS = [file for file in FILES if stage_of(file) != "pretrain"]
FINETUNE_FILES = [file for file in FILES if stage_of(file) == "finetune"]


class FinetuneFacts(NamedTuple):
    """One fine-tuning recipe: `encoder` is (width, depth, heads); the defaults are the
    reference's."""

    epochs: int
    encoder: tuple[int, int, int]
    patch: int = 16
    readout: tuple[str, bool | None] = ("avg", None)  # global_pool, class_token
    warmup: int = 10
    lr: float = 1e-3
    layer_decay: float = 0.75
    drop_path: float = 0.1
    erasing: float = 0.0
    color_jitter: float = 0.4


TOKEN = ("token", True)
PAPER: dict[str, Any] = {
    "readout": ("avg", True),
    "warmup": 5,
    "erasing": 0.25,
    "color_jitter": 0.0,
}
FINETUNE = {
    "ViT-S_50E_GAP": FinetuneFacts(50, SMALL),
    "ViT-S_100E_GAP": FinetuneFacts(100, SMALL),
    "ViT-S_150E_GAP": FinetuneFacts(150, SMALL),
    "ViT-S_50E_CLS-Token": FinetuneFacts(50, SMALL, readout=TOKEN),
    "ViT-S_50E_GAP_erasing": FinetuneFacts(50, SMALL, erasing=0.25),
    "ViT-B_100E_GAP": FinetuneFacts(100, BASE),
    "ViT-L_50E_GAP": FinetuneFacts(50, LARGE),
    "paper/ViT-B_100E": FinetuneFacts(100, BASE, lr=5e-4, layer_decay=0.65, **PAPER),
    "paper/ViT-L_50E": FinetuneFacts(50, LARGE, drop_path=0.2, **PAPER),
    "paper/ViT-H_50E": FinetuneFacts(50, HUGE, 14, drop_path=0.3, **PAPER),
}
IMAGENET = {  # of every ImageNet recipe
    "dataset": "folder",
    "img_size": 224,
    "in_chans": 3,
    "mlp_ratio": 4.0,
    "num_classes": None,
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "subset": None,
    "crop_pct": None,
    "crop_min": 0.08,
    "interpolation": "bicubic",
    "hflip": 0.5,
    "stop_epoch": None,
    "precision": "auto",
}
FINETUNE_SHARED = IMAGENET | {
    "batch_size": 128,
    "total_batch_size": 1024,
    "min_lr": 2.5e-7,
    "weight_decay": 0.05,
    "beta1": 0.9,
    "beta2": 0.999,
    "clip_grad": None,
    "ema_decay": None,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "re_mode": "pixel",
    "re_count": 1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mixup_switch_prob": 0.5,
    "label_smoothing": 0.1,
}


class LinclsFacts(NamedTuple):
    """One linear recipe: `encoder` is (width, depth, heads), `batch` (per process, total)."""

    optimizer: str
    encoder: tuple[int, int, int]
    patch: int = 16
    readout: tuple[str, bool | None] = ("avg", None)  # global_pool, class_token
    batch: tuple[int, int] = (2048, 16384)
    epochs: int = 90


SGD_BATCH = (512, 4096)
LINCLS = {
    "ViT-S_SGD_GAP": LinclsFacts("sgd", SMALL, batch=SGD_BATCH),
    "ViT-S_SGD_CLS-Token": LinclsFacts("sgd", SMALL, readout=TOKEN, batch=SGD_BATCH),
    "ViT-B_SGD_GAP": LinclsFacts("sgd", BASE, batch=SGD_BATCH),
    "ViT-S_GAP": LinclsFacts("lars", SMALL),
    "ViT-S_CLS-Token": LinclsFacts("lars", SMALL, readout=TOKEN),
    "ViT-B_GAP": LinclsFacts("lars", BASE),
    "ViT-L_GAP": LinclsFacts("lars", LARGE),
    "paper/ViT-B_90E": LinclsFacts("lars", BASE, readout=TOKEN),
    "paper/ViT-L_50E": LinclsFacts("lars", LARGE, readout=TOKEN, epochs=50),
    "paper/ViT-H_50E": LinclsFacts("lars", HUGE, 14, TOKEN, epochs=50),
}
LINCLS_SHARED = IMAGENET | {
    "lr": (0.1,),
    "min_lr": 0.0,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "warmup_epochs": 10.0,
}


def test_the_tables_cover_every_evaluation():
    assert names("finetune") == set(FINETUNE) | OWN
    assert names("lincls") == set(LINCLS) | OWN
    assert names("knn") == set()  # k-NN runs with a fine-tuning recipe


def built(cfg: Any, stage: str) -> tuple[tuple[int, int, int], int]:
    """((width, depth, heads), patch side) as built."""
    model = build(cfg, stage)[0]
    assert model.patch_size[0] == model.patch_size[1]
    return shape(model.blocks), model.patch_size[0]


@pytest.mark.parametrize("name", FINETUNE)
def test_facts_of_a_finetuning_recipe(name):
    cfg = load(f"cfgs/finetune/{name}.yaml")
    encoder, patch = built(cfg, "finetune")
    assert FINETUNE[name] == FinetuneFacts(
        epochs=cfg.epochs,
        encoder=encoder,
        patch=patch,
        readout=(cfg.global_pool, cfg.class_token),
        warmup=cfg.warmup_epochs,
        lr=cfg.lr,
        layer_decay=cfg.layer_decay,
        drop_path=cfg.drop_path_rate,
        erasing=cfg.re_prob,
        color_jitter=cfg.color_jitter,
    )
    assert {key: getattr(cfg, key) for key in FINETUNE_SHARED} == FINETUNE_SHARED
    assert cfg.min_lr * cfg.total_batch_size / 256 == pytest.approx(1e-6)


@pytest.mark.parametrize("name", LINCLS)
def test_facts_of_a_linear_recipe(name):
    cfg = load(f"cfgs/lincls/{name}.yaml")
    encoder, patch = built(cfg, "lincls")
    assert LINCLS[name] == LinclsFacts(
        optimizer=cfg.optimizer,
        encoder=encoder,
        patch=patch,
        readout=(cfg.global_pool, cfg.class_token),
        batch=(cfg.batch_size, cfg.total_batch_size),
        epochs=cfg.epochs,
    )
    assert {key: getattr(cfg, key) for key in LINCLS_SHARED} == LINCLS_SHARED


S_LINEAR = ["34.65", "36.46", "36.98", "36.88"]  # after 100, 200, 400 and 800 epochs of pretraining
PUBLISHED = {  # top-1 % of the reference's table and of the paper; the rest has none
    "finetune/ViT-S_50E_GAP": ["76.58", "76.86", "77.56", "77.93"],
    "finetune/ViT-S_100E_GAP": ["80.02", "80.87"],
    "finetune/ViT-S_150E_GAP": ["80.89", "81.11"],
    "finetune/ViT-S_50E_CLS-Token": ["75.77"],
    "finetune/ViT-B_100E_GAP": ["83.08"],
    "finetune/ViT-L_50E_GAP": ["83.51"],
    "finetune/paper/ViT-B_100E": ["83.6"],
    "finetune/paper/ViT-L_50E": ["85.9"],
    "finetune/paper/ViT-H_50E": ["86.9"],
    "lincls/ViT-S_SGD_GAP": S_LINEAR,
    "lincls/ViT-S_GAP": S_LINEAR,
    "lincls/ViT-S_SGD_CLS-Token": ["38.95"],
    "lincls/ViT-S_CLS-Token": ["38.95"],
    "lincls/ViT-L_GAP": ["58.90"],
    "lincls/paper/ViT-B_90E": ["68.0"],
    "lincls/paper/ViT-L_50E": ["75.8"],
    "lincls/paper/ViT-H_50E": ["76.6"],
}


@pytest.mark.parametrize(
    "name", [*(f"finetune/{name}" for name in FINETUNE), *(f"lincls/{name}" for name in LINCLS)]
)
def test_the_head_quotes_published_figures_as_theirs(name):
    parts = head(f"cfgs/{name}.yaml")
    paper = "/paper/" in name
    assert ("arXiv 2111.06377" if paper else "the reference project's recipe") in parts["Source"]
    assert parts["Expected"].startswith(
        f"not measured here; {'published:' if paper else 'the reference reports'}"
    )
    assert re.findall(r"\d+\.\d+", parts["Expected"]) == PUBLISHED.get(name, [])


def test_facts_of_the_cifar10_recipes():
    """The setting of the reference's fine-tuning on 10,000 images, and its model under a linear
    classifier."""
    tuned, linear = (
        load("cfgs/finetune/ViT-Ti_CIFAR10.yaml"),
        load("cfgs/lincls/ViT-Ti_CIFAR10.yaml"),
    )
    assert (tuned.epochs, tuned.warmup_epochs, tuned.batch_size, tuned.total_batch_size) == (
        10,
        1.0,
        128,
        128,
    )
    assert tuned.lr * tuned.total_batch_size / 256 == pytest.approx(1e-3)
    assert (tuned.beta1, tuned.beta2, tuned.weight_decay, tuned.min_lr) == (0.9, 0.999, 0.05, 0.0)
    assert (tuned.layer_decay, tuned.drop_path_rate, tuned.label_smoothing) == (0.75, 0.0, 0.1)
    assert (tuned.auto_augment, tuned.color_jitter, tuned.re_prob, tuned.mixup, tuned.cutmix) == (
        None,
        0,
        0,
        0,
        0,
    )
    assert (linear.epochs, linear.warmup_epochs, linear.batch_size, linear.total_batch_size) == (
        10,
        1.0,
        256,
        256,
    )
    assert (linear.optimizer, linear.momentum, linear.weight_decay, linear.min_lr) == (
        "sgd",
        0.9,
        0.0,
        0.0,
    )
    assert len(linear.lr) == 5
    for cfg in (tuned, linear):
        assert (cfg.dataset, cfg.global_pool, cfg.class_token, cfg.num_classes) == (
            "cifar10",
            "avg",
            None,
            None,
        )
        assert (cfg.hflip, cfg.subset) == (0.5, None)
    quoted = head("cfgs/finetune/ViT-Ti_CIFAR10.yaml")["Expected"]
    assert re.findall(r"\d+\.\d+", quoted) == ["63.77", "51.00", "65.5", "48.9"]
    assert "--subset 10000" in quoted


def test_facts_of_the_quickstarts_evaluations():
    tuned, linear, knn = (
        load(f"cfgs/quickstart/{stage}.yaml") for stage in ("finetune", "lincls", "knn")
    )
    for stage, cfg in (("finetune", tuned), ("lincls", linear), ("knn", knn)):
        assert (cfg.dataset, cfg.data_path, cfg.download) == (
            "mnist5k",
            None,
            False,
        )  # needs no network
        assert (cfg.global_pool, cfg.class_token) == ("avg", None)
        pretrained = load("cfgs/quickstart/pretrain.yaml").output_dir
        assert (
            f"--finetune {pretrained}/model.safetensors"
            in head(f"cfgs/quickstart/{stage}.yaml")["Command"]
        )
    assert (tuned.hflip, linear.hflip) == (0.0, 0.0)  # a mirrored digit is another sign
    assert (tuned.crop_min, linear.crop_min) == (0.5, 0.5)
    assert (tuned.epochs, tuned.batch_size, tuned.warmup_epochs) == (5, 64, 1.0)
    assert (tuned.layer_decay, tuned.drop_path_rate, tuned.label_smoothing) == (0.75, 0.0, 0.1)
    assert (linear.optimizer, linear.epochs, linear.batch_size, len(linear.lr)) == (
        "sgd",
        10,
        128,
        5,
    )
    assert (knn.ks, knn.batch_size) == ((10, 20, 100), 128)


def images_and_encoder(cfg: Any, model: torch.nn.Module) -> tuple[Any, ...]:
    """What weights fix: the images that the model was given and the encoder's shape."""
    images = (cfg.dataset, cfg.img_size, cfg.in_chans, cfg.mean, cfg.std)
    return (*images, model.patch_size, shape(model.blocks), cfg.mlp_ratio)


@pytest.fixture(scope="module")
def pretrained() -> set[tuple[Any, ...]]:
    """The models of all pretraining recipes, each with whether it has a class token."""
    found = set()
    for file in set(FILES) - set(EVALUATIONS):
        cfg = load(file)
        (model,) = build(cfg, "pretrain")
        found.add((*images_and_encoder(cfg, model), cfg.class_token))
    return found


@pytest.mark.parametrize("file", EVALUATIONS)
def test_every_evaluation_fits_a_pretraining_recipe(file, pretrained):
    """An open class token fits with one of its two values at least, a stated one as it stands."""
    cfg = load(file)
    fits = [
        images_and_encoder(cfg, model) + (model.cls_token is not None,) in pretrained
        for model in build(cfg, stage_of(file))
    ]
    assert any(fits)
    assert all(fits) or cfg.class_token is None


@pytest.mark.parametrize("file", FINETUNE_FILES)
def test_knn_runs_with_every_finetuning_recipe(file, caplog):
    tuned, cfg = load(file), load(file, "knn")
    assert "skipped settings of other stages: " in caplog.messages[-1]
    for skipped in ("drop_path_rate", "lr", "epochs", "label_smoothing"):
        assert any(re.search(rf"\b{skipped}\b", message) for message in caplog.messages)
    for tuned_model, model in zip(build(tuned, "finetune"), build(cfg, "knn"), strict=True):
        assert images_and_encoder(cfg, model) == images_and_encoder(tuned, tuned_model)
        assert isinstance(model.norm, torch.nn.LayerNorm)  # the pretrained one, for either readout
    assert (cfg.global_pool, cfg.class_token) == (tuned.global_pool, tuned.class_token)
    assert cfg.ks[0] == 10  # the reported one
