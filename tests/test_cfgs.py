"""The shipped recipes: their resolved settings against a snapshot, the numbers that people trust
them for, and the models that they build.

A recipe that is meant to change changes tests/recipes.json as well: `python tests/test_cfgs.py`
writes it again, and its difference is what a reviewer reads.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from models.build import (
    VIT_SIZES,
    build_model,
    classifier_config_problems,
    classifier_spec,
    dense_spec,
    mae_config_problems,
    mae_spec,
)
from models.vit import VisionTransformer
from util.settings.base import Settings
from util.settings.evaluation import STAGE_CONFIGS, FinetuneConfig, KnnConfig, LinclsConfig
from util.settings.pretrain import PretrainConfig
from util.settings.read import load_config
from util.settings.tools import ExplainConfig, MaeVisConfig

SNAPSHOT = Path(__file__).with_name("recipes.json")
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "cfgs").rglob("*.y*ml"))
WEIGHTS = ["--finetune", "x"]
READERS = {
    # what each script makes of a file: its class, its checks, and what it needs beside the file
    "pretrain": (PretrainConfig, [mae_config_problems], []),
    "finetune": (FinetuneConfig, [classifier_config_problems], WEIGHTS),
    "lincls": (LinclsConfig, [classifier_config_problems], WEIGHTS),
    "knn": (KnnConfig, [classifier_config_problems], WEIGHTS),
    "run_mae_vis": (MaeVisConfig, [], ["--model_path", "x"]),
    "vit_explain": (ExplainConfig, [classifier_config_problems], WEIGHTS),
}
ALSO_READ_BY = {"pretrain": ["run_mae_vis"], "finetune": ["knn", "vit_explain"]}


def stage_of(file: str) -> str:
    """cfgs/<stage>/..., and cfgs/<quickstart or scenes>/<stage or task>.yaml."""
    folder, stem = Path(file).parts[1], Path(file).stem
    if folder not in ("quickstart", "scenes"):
        return folder
    return "finetune" if stem in ("segment", "detect") else stem


def load(file: str, reader: str = "") -> Settings:
    """A recipe's settings in its own stage, or in another script that reads it."""
    reader = reader or stage_of(file)
    config_class, checks, more = READERS[reader]
    argv = ["--config", str(ROOT / file), "--data_path", "x", *more]
    return load_config(config_class, reader, argv, checks=checks, siblings=STAGE_CONFIGS)


def readers_of(file: str) -> list[str]:
    """The scripts that read a recipe; others than its own stage read what classifies."""
    is_dense = getattr(load(file), "task", "classify") != "classify"
    return [stage_of(file), *([] if is_dense else ALSO_READ_BY.get(stage_of(file), []))]


def resolved() -> dict[str, dict[str, dict[str, object]]]:
    """By reader: all defaults, and what each recipe changes in them."""
    found = {
        reader: {"defaults": config_class().model_dump(mode="json")}
        for reader, (config_class, _, _) in READERS.items()
    }
    for file in FILES:
        for reader in readers_of(file):
            values, defaults = load(file, reader).model_dump(mode="json"), found[reader]["defaults"]
            found[reader][file] = {n: v for n, v in values.items() if v != defaults[n]}
    return found


def build(cfg: Settings) -> list[torch.nn.Module]:
    """The models of a recipe, without memory for their weights: two if the class token is left to
    the weights."""
    with torch.device("meta"):
        if isinstance(cfg, PretrainConfig):
            return [build_model(mae_spec(cfg))]
        if isinstance(cfg, FinetuneConfig) and cfg.task != "classify":
            return [build_model(dense_spec(cfg, class_tokens=t, num_classes=10)) for t in (1, 0)]
        open_token = {1, int(cfg.global_pool == "token")}
        more = {"num_classes": 10, "fc_norm": None if isinstance(cfg, FinetuneConfig) else False}
        return [
            build_model(classifier_spec(cfg, class_tokens=token, **more))
            for token in (open_token if cfg.class_tokens is None else {cfg.class_tokens})
        ]


def test_the_resolved_settings_of_every_recipe():
    assert resolved() == json.loads(SNAPSHOT.read_text())


def test_default_output_folders_never_collide():
    """Lower case, as some file systems do not tell the cases apart."""
    folders = {file: load(file).output_dir.lower() for file in FILES}
    assert len(set(folders.values())) == len(FILES)
    assert folders["cfgs/quickstart/knn.yaml"] == "output/quickstart/knn"


@pytest.mark.parametrize("file", FILES)
def test_the_command_in_a_recipes_head_reads_that_recipe(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    (command,) = re.findall(r"^# Command:  sh (.*)", re.sub(r"\\\n# +", "", text), re.MULTILINE)
    script, *arguments = command.split()
    stage = stage_of(file)
    assert (script, arguments[:2]) == (f"run_{stage}.sh", ["--config", file])
    config_class, checks, _ = READERS[stage]
    arguments[1] = str(ROOT / file)
    load_config(config_class, stage, arguments, checks=checks)  # without keys of another stage


# arXiv 2111.06377, section 4 and the tables of its appendix A.
PAPER = {
    "pretrain": {
        "total_batch_size": 4096,
        "lr": 1.5e-4,
        "beta2": 0.95,
        "weight_decay": 0.05,
        "warmup_epochs": 40,
        "mask_ratio": 0.75,
        "decoder_embed_dim": 512,
        "decoder_depth": 8,
        "decoder_num_heads": 16,
        "class_tokens": 1,
        "decoder_class_token": True,
        "norm_pix_loss": True,
        "crop_min": 0.2,
        "clip_grad": None,
    },
    "finetune": {
        "total_batch_size": 1024,
        "beta2": 0.999,
        "weight_decay": 0.05,
        "warmup_epochs": 5,
        "mixup": 0.8,
        "cutmix": 1.0,
        "label_smoothing": 0.1,
        "re_prob": 0.25,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "global_pool": "avg",
    },
    "lincls": {
        "optimizer": "lars",
        "total_batch_size": 16384,
        "lr": (0.1,),
        "weight_decay": 0.0,
        "warmup_epochs": 10,
        "global_pool": "token",
    },
}
PAPER_RECIPES = {
    **{
        f"pretrain/paper/ViT-{letter}_{epochs}E": {"size": size, "epochs": epochs}
        for letter, size in (("B", "base"), ("L", "large"), ("H", "huge"))
        for epochs in (800, 1600)
    },
    "finetune/paper/ViT-B_100E": {
        "epochs": 100,
        "lr": 5e-4,
        "layer_decay": 0.65,
        "drop_path_rate": 0.1,
    },
    "finetune/paper/ViT-L_50E": {
        "epochs": 50,
        "lr": 1e-3,
        "layer_decay": 0.75,
        "drop_path_rate": 0.2,
    },
    "finetune/paper/ViT-H_50E": {
        "epochs": 50,
        "lr": 1e-3,
        "layer_decay": 0.75,
        "drop_path_rate": 0.3,
    },
    "lincls/paper/ViT-B_90E": {"size": "base", "epochs": 90},
    "lincls/paper/ViT-L_50E": {"size": "large", "epochs": 50},
    "lincls/paper/ViT-H_50E": {"size": "huge", "epochs": 50},
}


def test_the_papers_recipes_have_the_papers_values():
    files = {file for file in FILES if "/paper/" in file}
    assert files == {f"cfgs/{name}.yaml" for name in PAPER_RECIPES}
    for name, own in PAPER_RECIPES.items():
        expected = PAPER[name.split("/")[0]] | own
        cfg = load(f"cfgs/{name}.yaml")
        assert {key: getattr(cfg, key) for key in expected} == expected, name


def test_the_cifar10_recipe_is_the_setting_of_the_reference_loss_curve():
    """195 steps per epoch, 312 of warmup, peak lr 1.2e-3."""
    cfg = load("cfgs/pretrain/ViT-Ti_CIFAR10.yaml")
    assert 50_000 // cfg.total_batch_size == 195
    assert cfg.warmup_epochs * 195 == pytest.approx(312)
    assert cfg.lr * cfg.total_batch_size / 256 == pytest.approx(1.2e-3)


def shape(blocks: torch.nn.ModuleList) -> tuple[int, int, int]:
    """(width, depth, heads) of a stack of blocks."""
    return blocks[0].norm1.normalized_shape[0], len(blocks), blocks[0].attn.num_heads


def images_and_encoder(cfg: Settings, model: torch.nn.Module) -> tuple[object, ...]:
    """What weights fix: the images that the model was given and the encoder's shape."""
    images = (cfg.dataset, cfg.img_size, cfg.in_chans, cfg.mean, cfg.std)
    has_token = model.cls_token is not None
    return (*images, model.patch_size, shape(model.blocks), cfg.mlp_ratio, has_token)


@pytest.fixture(scope="module")
def pretrained() -> set[tuple[object, ...]]:
    """What the models of all pretraining recipes fix."""
    recipes = [load(file) for file in FILES if stage_of(file) == "pretrain"]
    return {images_and_encoder(cfg, model) for cfg in recipes for model in build(cfg)}


@pytest.mark.parametrize("file", [file for file in FILES if stage_of(file) != "pretrain"])
def test_every_evaluation_fits_a_pretraining_recipe(file, pretrained):
    """An open class token fits with one of its two values at least, a stated one as it stands; k-NN
    builds the same encoder from a fine-tuning recipe."""
    cfg = load(file)
    encoders = [images_and_encoder(cfg, model) for model in build(cfg)]
    # segmentation and detection see other images in another size
    first = 0 if getattr(cfg, "task", "classify") == "classify" else 2
    fits = [encoder[first:] in {of_one[first:] for of_one in pretrained} for encoder in encoders]
    assert any(fits) and (all(fits) or cfg.class_tokens is None)
    if "knn" in readers_of(file):
        knn = load(file, "knn")
        assert {images_and_encoder(knn, model) for model in build(knn)} >= {*encoders}


@pytest.mark.parametrize(
    ("size", "millions", "exact"),
    [
        # DeiT-Ti/16 and DeiT-S/16: arXiv 2012.12877, table 1, and the published weights
        ("tiny", 5.7, 5_717_416),
        ("small", 22, 22_050_664),
        # ViT-B/16 and ViT-H/14: arXiv 2010.11929, table 1; ViT-L/16: the public MAE code
        ("base", 86, 86_567_656),
        ("large", 304, 304_326_632),
        ("huge", 632, 632_045_800),
        # the reference project's own, with MLP ratio 4: nobody published it
        ("giant", 1599, 1_599_000_168),
    ],
)
def test_parameters_of_a_224_pixel_classifier(size, millions, exact):
    common = {"img_size": 224, "in_chans": 3, "mlp_ratio": 4.0, "num_classes": 1000}
    with torch.device("meta"):
        model = VisionTransformer(class_tokens=1, global_pool="token", **common, **VIT_SIZES[size])
    assert sum(p.numel() for p in model.parameters()) == exact
    assert exact / 1e6 == pytest.approx(millions, rel=0.01)


if __name__ == "__main__":
    lines = [
        f' "{reader}": {{\n'
        + ",\n".join(f'  "{file}": {json.dumps(values)}' for file, values in files.items())
        + "\n }"
        for reader, files in resolved().items()
    ]
    SNAPSHOT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
