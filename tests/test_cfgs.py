"""Every shipped recipe loads and builds; the facts of the pretraining recipes; the sizes of the
models.

The facts of the evaluations' recipes are in test_cfgs_eval.py.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import ROOT

from models.build import (
    VIT_SIZES,
    build_model,
    classifier_config_problems,
    classifier_spec,
    mae_config_problems,
    mae_spec,
)
from models.vit import VisionTransformer
from util.settings.evaluation import STAGE_CONFIGS, FinetuneConfig, KnnConfig, LinclsConfig
from util.settings.pretrain import PretrainConfig
from util.settings.read import load_config

CFGS = ROOT / "cfgs"
FILES = sorted(path.relative_to(ROOT).as_posix() for path in CFGS.rglob("*.y*ml"))
HEAD = ["Source", "Command", "Hardware", "Expected"]


class Stage(NamedTuple):
    """How an entry script reads its settings, and the models that it may build from them."""

    config_class: type
    checks: list[Callable[[Any], list[str]]]
    build: Callable[[Any], list[torch.nn.Module]]


def classifiers(cfg: Any) -> list[torch.nn.Module]:
    """One model, or two where the config leaves the class token to the weights.

    Fine-tuning with avg has a fresh `fc_norm`; the frozen readouts keep the pretrained `norm`.
    """
    tokens = [cfg.class_token]
    if cfg.class_token is None:
        tokens = [True, False] if cfg.global_pool == "avg" else [True]
    fc_norm = None if isinstance(cfg, FinetuneConfig) else False
    return [
        build_model(classifier_spec(cfg, num_classes=10, class_token=token, fc_norm=fc_norm))
        for token in tokens
    ]


STAGES = {
    "pretrain": Stage(
        PretrainConfig, [mae_config_problems], lambda cfg: [build_model(mae_spec(cfg))]
    ),
    "finetune": Stage(FinetuneConfig, [classifier_config_problems], classifiers),
    "lincls": Stage(LinclsConfig, [classifier_config_problems], classifiers),
    "knn": Stage(KnnConfig, [classifier_config_problems], classifiers),
}


def stage_of(file: str) -> str:
    """cfgs/<stage>/..., and cfgs/quickstart/<stage>.yaml."""
    folder = Path(file).parts[1]
    return Path(file).stem if folder == "quickstart" else folder


def load(file: str, stage_name: str | None = None) -> Any:
    """A recipe's settings in its own stage, or in another that it serves too."""
    name = stage_name or stage_of(file)
    argv = ["--config", str(ROOT / file)]
    if "quickstart" not in file:
        argv += ["--data_path", "x"]
    if name != "pretrain":
        argv += ["--finetune", "x"]
    stage = STAGES[name]
    return load_config(stage.config_class, name, argv, checks=stage.checks, siblings=STAGE_CONFIGS)


def build(cfg: Any, stage_name: str) -> list[torch.nn.Module]:
    """The models of a recipe, without memory for their weights."""
    with torch.device("meta"):
        return STAGES[stage_name].build(cfg)


def head(file: str) -> dict[str, str]:
    """The comment lines above a recipe's first key, by their label; an unlabelled line goes on with
    the one above."""
    parts: dict[str, str] = {}
    label = "Title"
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        match = re.match(rf"# ({'|'.join(HEAD)}): +(\S.*)", line)
        label, text = match.groups() if match else (label, line[1:])
        parts[label] = f"{parts.get(label, '')} {text.strip()}".strip()
    return parts


def test_there_are_recipes():
    assert (
        len(FILES) >= 45
    )  # of the reference 12 + 7 + 7, of the paper 6 + 3 + 3, CIFAR-10 3, the quickstart 4
    assert all(file.endswith(".yaml") for file in FILES)


@pytest.mark.parametrize("file", FILES)
def test_every_recipe_loads_and_builds(file, caplog):
    cfg = load(file)
    assert caplog.messages == []  # no setting of another stage is skipped
    for model in build(cfg, stage_of(file)):
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert len(model.blocks) == (cfg.depth or VIT_SIZES[cfg.size]["depth"])


@pytest.mark.parametrize("file", FILES)
def test_every_recipe_is_headed_by_its_facts(file):
    parts = head(file)
    assert list(parts) == ["Title", *HEAD]
    script, config = re.match(r"sh (\S+) --config (\S+)", parts["Command"]).groups()
    assert config == file
    assert script == f"run_{stage_of(file)}.sh"
    assert (ROOT / script).is_file()
    assert ("--data_path" in parts["Command"]) == (load(file).dataset != "mnist5k")
    assert ("--finetune" in parts["Command"]) == (script != "run_pretrain.sh")
    assert re.search(r"\d+ (GPU|CPU core)s?", parts["Hardware"])
    assert "not measured here" in parts["Expected"] or re.search(r"\d", parts["Expected"])


@pytest.mark.parametrize("file", FILES)
def test_the_command_in_the_head_loads(file):
    arguments = head(file)["Command"].split()[2:]
    arguments[1] = str(ROOT / arguments[1])
    stage = STAGES[stage_of(file)]
    assert load_config(
        stage.config_class, stage_of(file), arguments, checks=stage.checks, siblings=STAGE_CONFIGS
    )


def folders(files: list[str]) -> list[str]:
    """The default output folders; lower case, as some file systems do not tell the cases apart."""
    return [f"output/{stage_of(file)}/{Path(file).stem}".lower() for file in files]


def test_default_output_folders_never_collide():
    assert len(set(folders(FILES))) == len(FILES)
    written = {file: load(file).output_dir.lower() for file in FILES}
    for stage in STAGES:
        assert (
            written.pop(f"cfgs/quickstart/{stage}.yaml") == f"output/quickstart/{stage}"
        )  # as README says
    assert list(written.values()) == folders(list(written))
    assert len(set(folders(["cfgs/pretrain/a.yaml", "cfgs/finetune/a.yaml"]))) == 2
    assert len(set(folders(["cfgs/pretrain/a.yaml", "cfgs/pretrain/paper/A.yaml"]))) == 1


class Facts(NamedTuple):
    """One pretraining recipe: `encoder` and `decoder` are (width, depth, heads)."""

    epochs: int
    warmup: int
    encoder: tuple[int, int, int]
    patch: int
    decoder: tuple[int, int, int]
    tokens: tuple[bool, bool] = (False, False)  # class token in the encoder, in the decoder
    norm_pix_loss: bool = True


SMALL, BASE, LARGE, HUGE, GIANT = (
    (384, 12, 6),
    (768, 12, 12),
    (1024, 24, 16),
    (1280, 32, 16),
    (1664, 48, 16),
)
REF_192, REF_384, REF_512 = (
    (192, 4, 3),
    (384, 4, 6),
    (512, 8, 8),
)  # the reference: heads are width / 64
PAPER = (512, 8, 16)
BOTH = (True, True)
PRETRAIN = {
    "baseline_small/ViT-S_100E_Norm_GAP": Facts(100, 10, SMALL, 16, REF_192),
    "baseline_small/ViT-S_100E_Norm_CLS-Token": Facts(100, 10, SMALL, 16, REF_192, (True, False)),
    "baseline_small/ViT-S_200E_Norm_GAP": Facts(200, 20, SMALL, 16, REF_192),
    "baseline_small/ViT-S_400E_Norm_GAP": Facts(400, 40, SMALL, 16, REF_192),
    "baseline_small/ViT-S_800E_Norm_GAP": Facts(800, 40, SMALL, 16, REF_192),
    "baseline_small/ViT-S_1600E_Norm_GAP": Facts(1600, 40, SMALL, 16, REF_192),
    "Vit-S_100E_GAP": Facts(100, 10, SMALL, 16, REF_192),
    "ViT-B_400E_Norm_GAP": Facts(400, 40, BASE, 16, REF_384),
    "ViT-L_100E_Norm_GAP": Facts(100, 10, LARGE, 16, REF_512),
    "ViT-L_100E_Norm_GAP_wo_norm": Facts(100, 10, LARGE, 16, REF_512, norm_pix_loss=False),
    "ViT-H_100E_Norm_GAP": Facts(100, 10, HUGE, 14, REF_512),
    "ViT-G_100E_Norm_GAP": Facts(100, 10, GIANT, 14, REF_512),
    "paper/ViT-B_800E": Facts(800, 40, BASE, 16, PAPER, BOTH),
    "paper/ViT-B_1600E": Facts(1600, 40, BASE, 16, PAPER, BOTH),
    "paper/ViT-L_800E": Facts(800, 40, LARGE, 16, PAPER, BOTH),
    "paper/ViT-L_1600E": Facts(1600, 40, LARGE, 16, PAPER, BOTH),
    "paper/ViT-H_800E": Facts(800, 40, HUGE, 14, PAPER, BOTH),
    "paper/ViT-H_1600E": Facts(1600, 40, HUGE, 14, PAPER, BOTH),
}
OWN = {"ViT-Ti_CIFAR10"}  # tested below
SHARED = {  # of every ImageNet recipe
    "dataset": "folder",
    "img_size": 224,
    "in_chans": 3,
    "mlp_ratio": 4.0,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "mask_ratio": 0.75,
    "shared_mask": False,
    "batch_size": 512,
    "total_batch_size": 4096,
    "lr": 1.5e-4,
    "min_lr": 0.0,
    "weight_decay": 0.05,
    "beta1": 0.9,
    "beta2": 0.95,
    "clip_grad": None,
    "crop_min": 0.2,
    "interpolation": "bicubic",
    "hflip": 0.5,
    "stop_epoch": None,
    "precision": "auto",
}


def names(folder: str) -> set[str]:
    """The recipes below cfgs/<folder>, as the tables name them."""
    return {
        file.removeprefix(f"cfgs/{folder}/").removesuffix(".yaml")
        for file in FILES
        if f"/{folder}/" in file
    }


def test_the_table_covers_every_pretraining_file():
    assert names("pretrain") == set(PRETRAIN) | OWN


def shape(blocks: torch.nn.ModuleList) -> tuple[int, int, int]:
    """(width, depth, heads) of a stack as built."""
    return blocks[0].norm1.normalized_shape[0], len(blocks), blocks[0].attn.num_heads


@pytest.mark.parametrize("name", PRETRAIN)
def test_facts_of_a_pretraining_recipe(name):
    facts = PRETRAIN[name]
    cfg = load(f"cfgs/pretrain/{name}.yaml")
    (model,) = build(cfg, "pretrain")
    built = Facts(
        epochs=cfg.epochs,
        warmup=cfg.warmup_epochs,
        encoder=shape(model.blocks),
        patch=model.patch_size[0],
        decoder=shape(model.decoder_blocks),
        tokens=(model.cls_token is not None, model.decoder_class_token),
        norm_pix_loss=model.norm_pix_loss,
    )
    assert built == facts
    assert model.patch_size == (facts.patch, facts.patch)
    assert {key: getattr(cfg, key) for key in SHARED} == SHARED


@pytest.mark.parametrize("name", PRETRAIN)
def test_the_head_names_the_source_and_what_differs_from_it(name):
    source = head(f"cfgs/pretrain/{name}.yaml")["Source"]
    if name.startswith("paper/"):
        assert "arXiv 2111.06377" in source
    else:  # the reference's published numbers used other masks and crops
        for change in ("shared_mask: true", "crop_min: 0.08", "interpolation: bilinear"):
            assert change in source


def test_facts_of_the_cifar10_recipe():
    """The setting of the reference loss curve: 195 steps per epoch, 312 of warmup, peak lr 1.2e-3
    at batch 256."""
    cfg = load("cfgs/pretrain/ViT-Ti_CIFAR10.yaml")
    (model,) = build(cfg, "pretrain")
    assert (shape(model.blocks), shape(model.decoder_blocks)) == ((192, 6, 3), (96, 2, 3))
    assert (model.img_size, model.patch_size) == ((32, 32), (4, 4))
    assert (cfg.class_token, cfg.decoder_class_token, cfg.norm_pix_loss, cfg.mask_ratio) == (
        True,
        True,
        True,
        0.75,
    )
    assert (cfg.crop_min, cfg.interpolation, cfg.hflip) == (0.2, "bicubic", 0.5)
    assert (cfg.beta1, cfg.beta2, cfg.weight_decay, cfg.min_lr, cfg.clip_grad) == (
        0.9,
        0.95,
        0.05,
        0.0,
        None,
    )
    assert (cfg.batch_size, cfg.total_batch_size, cfg.epochs, 50_000 // cfg.total_batch_size) == (
        256,
        256,
        16,
        195,
    )
    assert cfg.warmup_epochs * 195 == pytest.approx(312)
    assert cfg.lr * cfg.total_batch_size / 256 == pytest.approx(1.2e-3)
    assert (cfg.mean, cfg.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_facts_of_the_quickstarts_pretraining():
    cfg = load("cfgs/quickstart/pretrain.yaml")
    assert (cfg.dataset, cfg.data_path, cfg.download) == (
        "mnist5k",
        None,
        False,
    )  # needs no network
    assert (cfg.in_chans, cfg.img_size, cfg.hflip) == (
        1,
        28,
        0.0,
    )  # a mirrored digit is another sign


@pytest.mark.parametrize(
    ("size", "millions", "exact"),
    [
        (
            "tiny",
            5.7,
            5_717_416,
        ),  # DeiT-Ti/16: arXiv 2012.12877, table 1 (5M), and its published weights
        ("small", 22, 22_050_664),  # DeiT-S/16: the same
        ("base", 86, 86_567_656),  # ViT-B/16: arXiv 2010.11929, table 1; DeiT-B's published weights
        ("large", 304, 304_326_632),  # ViT-L/16: the public MAE code's classifier
        (
            "huge",
            632,
            632_045_800,
        ),  # ViT-H/14: arXiv 2010.11929, table 1; the public MAE code's classifier
        (
            "giant",
            1599,
            1_599_000_168,
        ),  # the reference's own, with MLP ratio 4: nobody published it; by hand only
    ],
)
def test_parameters_of_a_224_pixel_classifier(size, millions, exact):
    row = VIT_SIZES[size]
    with torch.device("meta"):
        model = VisionTransformer(
            img_size=224,
            in_chans=3,
            num_classes=1000,
            mlp_ratio=4.0,
            class_token=True,
            global_pool="token",
            **row,
        )
    width, patch = row["embed_dim"], row["patch_size"]
    block = (
        12 * width**2 + 13 * width
    )  # qkv, proj, fc1, fc2: weights 3 + 1 + 4 + 4, biases 3 + 1 + 4 + 1; two norms
    positions = (224 // patch) ** 2 + 1
    embedding = (
        (3 * patch**2 + 1) * width + width + positions * width
    )  # patches, class token, positions
    by_hand = row["depth"] * block + embedding + 2 * width + 1000 * (width + 1)  # norm, head
    assert sum(p.numel() for p in model.parameters()) == exact == by_hand
    assert exact / 1e6 == pytest.approx(millions, rel=0.01)


def test_the_size_table():
    assert list(VIT_SIZES) == ["debug", "tiny", "small", "base", "large", "huge", "giant"]
    assert VIT_SIZES["debug"]["embed_dim"] <= 64
    assert VIT_SIZES["debug"]["depth"] <= 2
    for row in VIT_SIZES.values():
        assert set(row) == {"embed_dim", "depth", "num_heads", "patch_size"}
