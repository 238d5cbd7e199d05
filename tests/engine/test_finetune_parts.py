"""Layer decay, the classifiers from weights, and what makes them fit and fast, in numbers."""

import logging
import math
from pathlib import Path

import pytest
import torch
from compare import identity, kept_for_gradient
from runs import PICTURE_STEPS, pictures, pretraining, results_of, saved_step, step_losses
from safetensors.torch import load_file
from torch import nn

import engine.parallel
import main_finetune
import main_knn
import main_lincls
import main_pretrain
from engine.evaluation.from_weights import build_finetuned, build_frozen
from engine.evaluation.objective import Objective
from engine.optim import build_adamw, param_groups, set_lr
from engine.parallel import check_speed
from engine.run.checkpoint import save_weights
from models.mae import MaskedAutoencoder
from models.vit import VisionTransformer
from models.weights.files import weights_digest
from util.dist import Processes
from util.errors import InputError, LocalInputError, run_cli
from util.settings.evaluation import FinetuneConfig, KnnConfig
from util.settings.pretrain import PretrainConfig

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
    "class_tokens": 1,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "decoder_class_token": True,
    "mask_ratio": 0.75,
    "norm_pix_loss": True,
}
NO_TOKEN = {"class_tokens": 0, "decoder_class_token": False}
STATS = {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.2]}
SETTINGS = GEOMETRY | {"size": "debug"} | {name: tuple(STATS[name]) for name in STATS}
READOUT = {"num_classes": 5, "class_tokens": 1, "global_pool": "avg", "fc_norm": True}


def vit(**changes) -> VisionTransformer:
    return VisionTransformer(**GEOMETRY | READOUT | changes)


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
    model.blocks[1].norm1.weight.requires_grad_(False)
    del expected["blocks.1.norm1.weight"]
    groups = param_groups(model, weight_decay=0.05, layer_decay=0.75)
    found = {name: (g["lr_scale"], g["weight_decay"]) for g in groups for name in g["names"]}
    assert found == expected
    for group in groups:
        named = map(model.get_parameter, group["names"])
        assert list(map(id, named)) == list(map(id, group["params"]))
    optimizer = build_adamw(groups, 0.9, 0.95)
    set_lr(optimizer, 0.4)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.4 * expected[group["names"][0]][0]


def save(folder: Path, model: nn.Module, kwargs: dict, name: str = "own.safetensors") -> str:
    """As a finished run writes it; all its parameters are random, so that a swapped or forgotten
    tensor shows."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return str(save_weights(folder / name, model, identity(model_args=kwargs, **STATS)))


def pretrained(folder: Path, **changes) -> str:
    return save(folder, MaskedAutoencoder(**MAE | changes), MAE | changes)


def classifier(folder: Path, name: str = "own.safetensors", **changes) -> str:
    return save(folder, vit(**changes), GEOMETRY | READOUT | changes, name)


def frozen(weights: str, num_classes: int = 5, **changes) -> tuple[VisionTransformer, str | None]:
    return build_frozen(KnnConfig(**SETTINGS | changes), weights, num_classes)


def finetuned(
    weights: str | None, num_classes: int = 5, **changes
) -> tuple[VisionTransformer, str | None]:
    cfg = FinetuneConfig(finetune=weights, drop_path_rate=0.0, **SETTINGS | changes)
    return build_finetuned(cfg, Objective("multiclass", list(map(str, range(num_classes)))))


def images() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def norm_of(model: VisionTransformer) -> set[str]:
    """The one norm that the feature passes."""
    return {"norm.weight", "fc_norm.weight"} & model.state_dict().keys()


def assert_frozen(model: VisionTransformer) -> None:
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


READOUTS = [("avg", 1), ("avg", 0), ("avg", None), ("token", 1), ("token", None)]


@pytest.mark.parametrize(("global_pool", "class_tokens"), READOUTS)
def test_an_untrained_model_starts_as_pretraining_does(global_pool, class_tokens):
    """Xavier-uniform: bound sqrt(6 / (in + out)), which is far from a truncated normal of 0.02."""
    changes = {"class_tokens": class_tokens, "global_pool": global_pool, "embed_dim": 64}
    model, sha256 = frozen("random", 7, **changes)
    for weight, fan in (
        (model.blocks[0].attn.qkv.weight, 64 + 192),
        (model.blocks[2].mlp.fc1.weight, 64 + 256),
        (model.patch_embed.proj.weight, 64 + 192),
    ):
        bound = math.sqrt(6 / fan)
        assert 0.98 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    # A null class_tokens follows the readout.
    has_token = bool(class_tokens) or global_pool == "token"
    assert (model.cls_token is not None) == model.spec.class_tokens == has_token
    assert norm_of(model) == {"norm.weight"} and sha256 is None
    assert_frozen(model)
    for seed in (0, 1):
        again = frozen("random", 7, **changes, seed=seed)[0]
        assert torch.equal(model(images()), again(images())) == (seed == 0)


@pytest.mark.parametrize("global_pool", ["avg", "token"])
def test_a_pretrained_encoder_is_read_through_its_own_norm(tmp_path, global_pool):
    path = pretrained(tmp_path)
    model, sha256 = frozen(path, global_pool=global_pool)
    assert norm_of(model) == {"norm.weight"} and sha256 == weights_digest(path)
    assert_frozen(model)
    mae = MaskedAutoencoder(**MAE)
    mae.load_state_dict(load_file(path))
    tokens = mae.forward_encoder(mae.patchify(images()), torch.arange(4).expand(4, -1)).detach()
    expected = tokens[:, 0] if global_pool == "token" else tokens[:, 1:].mean(dim=1)
    torch.testing.assert_close(model.forward_features(images()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "readout",
    [{}, {"fc_norm": False}, {"global_pool": "token", "fc_norm": False}, {"class_tokens": 0}],
)
def test_a_classifier_is_frozen_or_evaluated_as_it_is(tmp_path, readout):
    """Every bit of it, the norm included: averaging with `norm` is not given a fresh `fc_norm`.

    An evaluation by another readout than the head was trained with would only show as a bad
    accuracy.
    """
    path, source = classifier(tmp_path, **readout), vit(**readout).eval()
    source.load_state_dict(load_file(path))
    global_pool = source.spec.global_pool
    features = frozen(path, global_pool=global_pool)[0].forward_features(images())
    assert torch.equal(features, source.forward_features(images()))
    evaluated, _ = finetuned(path, eval=True, global_pool=global_pool)
    assert torch.equal(evaluated.eval()(images()), source(images()))
    other = "avg" if global_pool == "token" else "token"
    with pytest.raises(InputError, match=f"global_pool is {other} .*{global_pool} in {path}"):
        finetuned(path, eval=True, global_pool=other)


@pytest.mark.parametrize("build", [frozen, finetuned])
@pytest.mark.parametrize("has_token", [True, False])
def test_the_class_token_follows_the_weights(tmp_path, build, has_token):
    path = pretrained(tmp_path, **({} if has_token else NO_TOKEN))
    token_is_read = {"global_pool": "token"}
    for changes in ({}, {"class_tokens": int(has_token)}, *([token_is_read] * has_token)):
        model, _ = build(path, **changes)
        assert (model.cls_token is not None) == model.spec.class_tokens == has_token
    for changes in ({"class_tokens": int(not has_token)}, *([token_is_read] * (not has_token))):
        with pytest.raises(InputError, match=f"class_tokens is .*{path}|{path} has none"):
            build(path, **changes)


@pytest.mark.parametrize("build", [frozen, finetuned])
def test_other_pixel_statistics_are_worth_a_warning(tmp_path, caplog, build):
    path = pretrained(tmp_path)
    for std in (0.25, 0.3):
        build(path, mean=(0.5, 0.4, 0.3), std=(std, 0.2, 0.2))
    (warned,) = [record.args for record in caplog.records if record.levelno >= logging.WARNING]
    assert warned == ("std", "(0.25, 0.2, 0.2)", "(0.3, 0.2, 0.2)")


@pytest.mark.parametrize("global_pool", ["avg", "token"])
def test_fine_tuning_starts_with_a_small_fresh_head(tmp_path, global_pool):
    path = pretrained(tmp_path)
    model, sha256 = finetuned(path, 1000, global_pool=global_pool)
    tensors, own = load_file(path), model.state_dict()
    head, fresh = own["head.weight"], {"head.weight", "head.bias"}
    assert head.std().item() == pytest.approx(2e-5, rel=0.02)  # 32,000 values
    assert head.abs().max() < 2e-4 and not own["head.bias"].any()
    if global_pool == "avg":
        fresh |= {"fc_norm.weight", "fc_norm.bias"}
        assert (own["fc_norm.weight"] == 1).all() and not own["fc_norm.bias"].any()
    assert all(torch.equal(own[name], tensors[name]) for name in own.keys() - fresh)
    assert norm_of(model) == {"fc_norm.weight" if global_pool == "avg" else "norm.weight"}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert sha256 == weights_digest(path)
    for seed in (0, 1):
        again, _ = finetuned(path, 1000, global_pool=global_pool, seed=seed)
        assert torch.equal(again.head.weight, head) == (seed == 0)


@pytest.mark.parametrize(
    ("global_pool", "class_tokens"), [("avg", None), ("avg", 1), ("token", None)]
)
def test_training_from_scratch_starts_with_a_truncated_normal(global_pool, class_tokens):
    model, sha256 = finetuned(None, 1000, global_pool=global_pool, class_tokens=class_tokens)
    for layer in (model.head, model.blocks[0].attn.qkv, model.blocks[2].mlp.fc2):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not layer.bias.any()
    assert norm_of(model) == {"fc_norm.weight" if global_pool == "avg" else "norm.weight"}
    assert (model.cls_token is not None) == (class_tokens == 1 or global_pool == "token")
    assert sha256 is None and model.spec.fc_norm == (global_pool == "avg")


def test_a_head_for_the_same_classes_is_kept_and_another_is_replaced(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = classifier(tmp_path)
    tensors, kept = load_file(path), finetuned(path)[0].state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in tensors.items())
    assert "dropped" not in caplog.text
    replaced, _ = finetuned(path, 6)
    assert replaced.head.weight.shape == (6, 32) and replaced.head.weight.abs().max() < 2e-4
    assert torch.equal(replaced.fc_norm.weight, tensors["fc_norm.weight"])
    assert sum("head" in line and "dropped" in line for line in caplog.messages) == 1


def test_evaluation_needs_a_head(tmp_path):
    for path, global_pool, num_classes in (
        (pretrained(tmp_path), "token", 5),
        (classifier(tmp_path, name="classifier"), "avg", 6),
    ):
        with pytest.raises(InputError, match=f"eval: {path} .*{num_classes} classes.*head.weight"):
            finetuned(path, num_classes, eval=True, global_pool=global_pool)


# Activation checkpointing, compiling, and memory


def test_checkpointing_with_stochastic_depth_gives_the_same_gradients_from_less_memory():
    """Computed again, a block must drop the paths that it dropped before."""
    model = vit(depth=6, drop_path_rate=0.5)
    kept, found = [], []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        torch.manual_seed(3)
        loss, size = kept_for_gradient(lambda: model(images()).square().sum())
        kept.append(size)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append([loss, *gradients, torch.rand(1)])  # later draws are the same, too
    assert kept[1] < 0.5 * kept[0]
    assert all(map(torch.equal, *found))


def note_graphs(monkeypatch, backend: str = "eager") -> list[object]:
    """The graphs that `compile` makes, as they come."""
    graphs: list[object] = []

    def noting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    options = engine.parallel.compile_options
    monkeypatch.setattr(
        engine.parallel, "compile_options", lambda cfg: options(cfg) | {"backend": noting}
    )
    return graphs


# 15 training batches of 8 per epoch; of the 60 validation images a last batch of 4
COMPILED = ("--compile", "--compile_backend", "eager", "--batch_size", 8)


@pytest.mark.long
def test_fine_tuning_compiles_one_graph_for_training_and_one_for_evaluation(
    data, weights, tmp_path, monkeypatch
):
    """Over epochs, last batches of another size, stochastic depth and checkpointing."""
    graphs, runs = note_graphs(monkeypatch, "aot_eager"), {}
    for name, more in {
        "eager": COMPILED[3:],
        "compiled": COMPILED,
        "both": (*COMPILED, "--checkpointing"),
    }.items():
        torch.compiler.reset()
        graphs.clear()
        flags = ("--drop_path_rate", 0.3, "--lr", 0.03, "--finetune", weights, *more)
        main_finetune.main(pictures(data, tmp_path / name, *flags))
        losses = [float.fromhex(loss) for loss in step_losses(tmp_path / name).values()]
        runs[name] = losses, results_of(tmp_path / name)["correct1"]
        assert len(graphs) == (0 if name == "eager" else 2)
    assert len(runs["eager"][0]) == 45
    for name in ("compiled", "both"):
        torch.testing.assert_close(runs[name][0], runs["eager"][0], rtol=0, atol=1e-4)
        assert runs[name][1] == runs["eager"][1]


@pytest.mark.long
def test_features_of_frozen_models_take_one_graph(data, pretrained, weights, tmp_path, monkeypatch):
    """In linear classification for training and both evaluations, in k-NN for both splits of every
    checkpoint; each image counts as it does without compiling."""
    graphs, found = note_graphs(monkeypatch), {}
    for name, more in {"eager": COMPILED[3:], "compiled": COMPILED}.items():
        torch.compiler.reset()
        flags = ("--lr", 0.1, 1.0, "--finetune", weights, *more)
        lincls = main_lincls.main(pictures(data, tmp_path / f"lincls {name}", *flags))
        assert len(graphs) == (name == "compiled")
        torch.compiler.reset()
        graphs.clear()
        flags = ("--ks", 5, "--finetune", pretrained, *more)
        knn = main_knn.main(pictures(data, tmp_path / f"knn {name}", *flags, training=False))
        assert len(graphs) == (name == "compiled")
        found[name] = lincls["correct1"], [row["correct1"] for row in knn["checkpoints"]]
    assert found["compiled"] == found["eager"] and len(found["eager"][1]) > 1


@pytest.mark.parametrize("stage", [main_finetune, main_lincls, main_knn])
def test_compiling_needs_a_compiler_before_anything_is_read(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(engine.parallel.shutil, "which", lambda _: None)
    flags = ("--finetune", tmp_path / "absent", "--compile")
    with pytest.raises(InputError, match="compiler"):
        stage.main(pictures(tmp_path / "absent", tmp_path / "run", *flags, training=False))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", [PretrainConfig, FinetuneConfig])
def test_fp16_does_not_go_with_a_sharded_model(config):
    processes = Processes(0, 2, 0, 2, torch.device("cpu"))
    with pytest.raises(InputError, match="fp16"):
        check_speed(config(parallel="fsdp", precision="fp16", dataset="mnist5k"), processes)


def host_is_full():
    return torch.empty(2**50)


def cuda_is_full():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.mark.parametrize(
    ("failure", "checkpointing"), [(host_is_full, False), (cuda_is_full, True)]
)
def test_a_lack_of_memory_is_one_line_and_costs_no_saved_step(
    data, tmp_path, monkeypatch, capsys, failure, checkpointing
):
    """In the sixth step of the second epoch."""
    arguments = pretraining(data, tmp_path, *["--checkpointing"] * checkpointing)
    forward, calls = MaskedAutoencoder.forward, []

    def failing(*args):
        calls.append(args)
        return failure() if len(calls) == PICTURE_STEPS + 6 else forward(*args)

    with monkeypatch.context() as patch:
        patch.setattr(MaskedAutoencoder, "forward", failing)
        with pytest.raises(SystemExit) as ended:
            run_cli(lambda: main_pretrain.main(arguments))
    assert ended.value.code == 2
    error = ended.value.__context__
    assert isinstance(error, LocalInputError)
    named = {"batch_size"} if checkpointing else {"batch_size", "checkpointing"}
    assert set(error.settings) == named
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and " -b " in said[0]
    assert ("--checkpointing" in said[0]) == (not checkpointing)
    assert saved_step(tmp_path) == PICTURE_STEPS
    assert main_pretrain.main(arguments)["step"] == 2 * PICTURE_STEPS


def test_another_error_of_the_arithmetic_stays_as_it_is(data, tmp_path, monkeypatch):
    monkeypatch.setattr(MaskedAutoencoder, "forward", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        main_pretrain.main(pretraining(data, tmp_path))
