"""Settings: the order of their sources, the reading of their values, and what reading prints and
compares. Refusals of single values are in test_refusals.py."""

import json
import re
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from runs import run

from models.build import VIT_SIZES, build_model, mae_config_problems, mae_spec
from models.spec import MAESpec
from util.errors import InputError
from util.settings.evaluation import STAGE_CONFIGS, KnnConfig
from util.settings.pretrain import PretrainConfig
from util.settings.read import changed_settings, dump_config, load_config

DIGITS = ("--dataset", "mnist5k")  # the data set that needs no data_path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Writes a YAML file and returns its path."""
    folder = tmp_path_factory.mktemp("recipes")

    def write(text: str, name: str = "recipe.yaml") -> str:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
        return str(path)

    return write


def load(*argv: str) -> PretrainConfig:
    return load_config(PretrainConfig, "pretrain", [*DIGITS, *argv], checks=[mae_config_problems])


def refused(*argv: str) -> InputError:
    with pytest.raises(InputError) as error:
        load(*argv)
    return error.value


# Sources

VALUES = st.fixed_dictionaries(
    {},
    optional={
        "epochs": st.integers(10, 10**9),  # not shorter than the warmup
        "lr": st.floats(1e-300, 1e300),
        "depth": st.none() | st.integers(1, 99),
        "shared_mask": st.booleans(),
        "img_size": st.integers(1, 99) | st.tuples(st.integers(1, 99), st.integers(1, 99)),
        "mean": st.tuples(*[st.floats(0, 1e9)] * 3),
        "precision": st.sampled_from(["bf16", "fp32"]),
        "data_path": st.text("abc7 ./-", min_size=1).filter(lambda text: text[0] != "-"),
    },
)


def flags(values: dict) -> list[str]:
    """Values as a command line gives them."""
    words = []
    for name, value in values.items():
        items = value if isinstance(value, tuple) else [value]
        words += [f"--{name}", *("null" if item is None else str(item) for item in items)]
    return words


@pytest.mark.parametrize(("value", "number"), [("true", 1), ("false", 0)])
def test_a_recipe_of_an_earlier_version_says_class_token(recipe, value, number):
    path = recipe(f"class_token: {value}\ndecoder_class_token: {value}")
    cfg = load_config(PretrainConfig, "pretrain", [*DIGITS, "--config", path])
    assert cfg.class_tokens == number and type(cfg.class_tokens) is int


@settings(deadline=None, database=None, max_examples=30)
@given(two_below=VALUES, below=VALUES, file=VALUES, line=VALUES)
def test_precedence_is_defaults_then_base_then_yaml_then_command_line(
    recipe, two_below, below, file, line
):
    """Also where a later source gives the default or null; values keep their types, and what is
    printed loads again to the same settings."""
    layers = {
        "shared/c.yaml": two_below,
        "deep/b.yaml": {"base": "../shared/c.yaml", **below},
        "a.yaml": {"base": "deep/b.yaml", **file},
    }
    for name, values in layers.items():
        path = recipe(yaml.safe_dump(json.loads(json.dumps(values))), name)
    cfg = load_config(PretrainConfig, "pretrain", [*DIGITS, "--config", path, *flags(line)])
    defaults = PretrainConfig(dataset="mnist5k", output_dir="output/pretrain/a")
    expected = dict(defaults) | two_below | below | file | line
    assert dict(cfg) == expected
    assert {n: type(v) for n, v in cfg} == {n: type(v) for n, v in expected.items()}
    again = ["--config", recipe(dump_config(cfg), "again.yaml")]
    assert load_config(PretrainConfig, "pretrain", again) == cfg


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ({"a.yaml": "base: a.yaml"}, "2 base: files"),
        ({"a.yaml": "base: b.yaml", "b.yaml": "base: a.yaml"}, "2 base: files"),
        (
            {
                "a.yaml": "base: b.yaml",
                "b.yaml": "base: c.yaml",
                "c.yaml": "base: d.yaml",
                "d.yaml": "seed: 1",
            },
            "c.yaml",
        ),
        ({"a.yaml": "base: none.yaml"}, "none.yaml"),
        ({"a.yaml": "base: [b, c]"}, "['b', 'c']"),
        ({"none.yaml": None}, ""),
        ({"$NOWHERE/a.yaml": None}, "$NOWHERE"),
        ({"": None}, ""),  # the folder
        ({"a.yaml": "lr: 1\nepochs: 20\nlr: 2\n"}, "'lr'"),
        ({"a.yaml": 'lr: 1\n"lr": 1\n'}, "'lr'"),
        ({"a.yaml": "a: b: c\n"}, ""),
        ({"a.yaml": "lr: [1, 2\n"}, ""),
        ({"a.yaml": "lr: !!python/name:os.system\n"}, "os.system"),
        ({"a.yaml": "lr: 1\n---\nlr: 2\n"}, ""),
        ({"a.yaml": "output_dir: 2026-02-31\n"}, ""),  # reads as a date, and there is no such day
        ({"a.yaml": "- lr\n- 1\n"}, ""),
        ({"a.yaml": "just words\n"}, ""),
        ({"a.yaml": "3: 4\n"}, "'3'"),
        ({"a.yaml": "[1, 2]: 3\n"}, ""),
        ({"a.yaml": "lr: {{ x }}\n"}, ""),
        ({"a.yaml": "{{ x }}: 1\n"}, ""),
        ({"a.yaml": "lr: " + "[" * 3000 + "]" * 3000}, "recursion"),
        ({"a.yaml": "# caf\udce9\nlr: 1\n"}, "utf-8"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_that_names_it(recipe, monkeypatch, files, part):
    monkeypatch.delenv("NOWHERE", raising=False)
    folder = Path(recipe("", "empty.yaml")).parent
    for name, text in files.items():
        if text is not None:
            recipe(text, name)
    error = refused("--config", str(folder / next(iter(files))))
    assert error.settings == ("config",)
    assert str(folder) in str(error) and part in str(error) and "\n" not in str(error)


def test_the_default_folder_is_the_stage_and_the_name_of_the_config(recipe):
    config = ("--config", recipe("# nothing yet\n", "ViT-S_100E.v2.yaml"))
    default = "output/pretrain/ViT-S_100E.v2"
    assert load(*config) == load("--output_dir", default) == load(*config, "--output_dir", "null")
    assert load().output_dir == "output/pretrain/default"
    assert load(*config, "--output_dir", "runs/x").output_dir == "runs/x"


def test_all_problems_of_all_sources_come_in_one_error(recipe):
    recipe("depht: 3\nlr: fast\nzzz: 1\nmin_lr: true\nmean: []\n", "base.yaml")
    config = recipe("base: base.yaml\nmask_ratio: 2\nepochs: 1.5\n")
    error = refused(
        "--config", config, "--beta1", "1", "--tensorboard", "maybe", "--epochz=3", "--x", "4"
    )
    parts = {
        "depht": "did you mean depth?",
        "zzz": "--help",
        "epochz": "did you mean epochs?",
        "x": "--help",
        "lr": "a number > 0, got 'fast'",
        "min_lr": "got True",
        "mean": "one or more values, each a number, got []",
        "mask_ratio": "> 0 and < 1, got 2",
        "epochs": "a whole number >= 1, got 1.5",
        "beta1": ">= 0 and < 1, got '1'",
        "tensorboard": "true or false, got 'maybe'",
    }
    lines = str(error).splitlines()[1:]
    assert sorted(error.settings) == sorted(parts) == sorted(line.split()[0] for line in lines)
    assert all(parts[line.split()[0]] in line for line in lines)
    sources = {line.split()[0]: line.rpartition("(")[2] for line in lines}
    assert sources["depht"] == f"{Path(config).with_name('base.yaml')})"
    assert (sources["epochs"], sources["beta1"]) == (f"{config})", "command line)")
    assert refused("stray").settings == ("stray",)


def test_a_sibling_stages_keys_are_skipped_with_one_line(recipe, caplog):
    config = recipe("layer_decay: 0.65\nmixup: 0.8\nks: [3]\n")
    argv = [*DIGITS, "--config", config, "--finetune", "random"]
    assert load_config(KnnConfig, "knn", argv, siblings=STAGE_CONFIGS).ks == (3,)
    (message,) = caplog.messages
    assert message.endswith("layer_decay, mixup")
    with pytest.raises(InputError) as error:
        load_config(KnnConfig, "knn", [*argv, "--layer_dekay", "1"], siblings=STAGE_CONFIGS)
    assert error.value.settings == ("layer_dekay",)


# Values


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("lr", "lr: 1e-3", 0.001),  # PyYAML gives text
        ("lr", "lr: 1", 1.0),
        ("tensorboard", "tensorboard: 'False'", False),
        ("mean", "mean: [0.5, 1e-1, 0]", (0.5, 0.1, 0.0)),
        ("img_size", "img_size: [32, 48]", (32, 48)),
        ("patch_size", "patch_size: null", None),
        ("clip_grad", "clip_grad: ~", None),
        ("seed", "seed: 2147483647", 2**31 - 1),
        ("hflip", "hflip: 1", 1.0),
        ("data_path", "data_path: 7", "7"),
        ("lr", "--lr=1e-3", 0.001),
        ("lr", "--lr 1 --lr 2", 2.0),  # the later one
        ("tensorboard", "--tensorboard False", False),
        ("tensorboard", "--tensorboard true", True),
        ("shared_mask", "--shared_mask", True),
        ("mean", "--mean -0.5 0 1e-1", (-0.5, 0.0, 0.1)),
        ("img_size", "--img_size 32", 32),
        ("img_size", "--img_size 32 48", (32, 48)),
        ("patch_size", "--patch_size null", None),
        ("data_path", "--data_path 7", "7"),
        ("batch_size", "--batch_size 8", 8),
        ("batch_size", "-b 8", 8),
    ],
)
def test_values_of_a_file_and_of_the_command_line(recipe, name, text, value):
    argv = ["--config", recipe(text)] if ":" in text else text.split()
    got = getattr(load(*argv), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("~/there/x", "{home}/there/x"),
        ("$HOME/$PLACE/x", "{home}/there/x"),
        ("${HOME}/${PLACE}/x", "{home}/there/x"),
        ("$NOWHERE/x", None),
        ("~no_such_user/x", None),
        ("price$", "price$"),
        ("a$NOWHERE", "a$NOWHERE"),  # a name that is really there is taken as it is
    ],
)
def test_home_and_variables_in_paths_are_expanded(tmp_path, monkeypatch, written, read):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "there")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a$NOWHERE").mkdir()
    (tmp_path / "r.yaml").write_text(f"data_path: {written}\n")
    for argv in ([f"--data_path={written}"], ["--config", "~/r.yaml"]):
        if read is None:
            error = refused(*argv)
            assert error.settings == ("data_path",) and written in str(error)
        else:
            assert load(*argv).data_path == read.format(home=tmp_path)


# What the settings print


def test_help_gives_every_settings_description_range_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # nothing is broken in two
    with pytest.raises(SystemExit) as stop:
        load("--lr", "fast", "--help")  # needs no legal settings
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "\nMasking:\n" in text and "\nOptimiser:\n" in text
    for name, field in PretrainConfig.model_fields.items():
        assert re.search(
            rf"--{name} .*\s+{re.escape(str(field.description))} \(.*; default .+\)", text
        )
    assert "> 0 and < 1; default 0.75" in text and "bf16, fp16, fp32; default auto" in text


def test_print_config_is_the_settings_in_order_and_nothing_else(capsys):
    with pytest.raises(SystemExit) as stop:
        load("--img_size", "32", "48", "--print_config")
    printed = capsys.readouterr()
    content = yaml.safe_load(printed.out)
    assert (stop.value.code, printed.err) == (0, "")
    assert list(content) == list(PretrainConfig.model_fields)
    assert content == load("--img_size", "32", "48").model_dump(mode="json")
    assert refused("--print_config", "--lr", "0").settings == ("lr",)


# The settings as an object


def test_settings_are_frozen():
    with pytest.raises(ValidationError):
        load().lr = 1.0


def test_every_setting_of_every_stage_has_a_description():
    fields = [field for stage in STAGE_CONFIGS for field in stage.model_fields.items()]
    assert [name for name, field in fields if not str(field.description).endswith(".")] == []


def test_choices_of_size_are_the_rows_of_the_size_table():
    assert get_args(PretrainConfig.model_fields["size"].annotation) == tuple(VIT_SIZES)


def test_every_model_key_of_a_file_reaches_the_constructor_unchanged(recipe):
    given = {
        "img_size": (32, 48),
        "patch_size": (8, 16),
        "in_chans": 1,
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 2,
        "mlp_ratio": 2.0,
        "class_tokens": 1,
        "decoder_embed_dim": 16,
        "decoder_depth": 1,
        "decoder_num_heads": 4,
        "decoder_class_token": False,
        "mask_ratio": 0.5,
        "norm_pix_loss": False,
        "decoder": "cross",
        "pred_ratio": 0.25,
        "decoder_fusion": 2,
        "target": "lowpass",
        "target_cutoff": 0.5,
    }
    assert MAESpec.__dataclass_fields__.keys() == given.keys()
    cfg = load("--config", recipe(json.dumps(given | {"mean": [0.5], "std": [0.5]})))
    assert mae_spec(cfg) == MAESpec(**given)
    with torch.device("meta"):
        model = build_model(mae_spec(cfg))
    assert (model.img_size, model.patch_size, model.in_chans) == ((32, 48), (8, 16), 1)
    assert model.pos_embed.shape == (1, 13, 24)
    assert (len(model.blocks), len(model.decoder_blocks)) == (3, 1)


def test_size_fills_only_the_keys_that_are_null():
    spec = mae_spec(load("--size", "small", "--depth", "6"))
    assert (spec.embed_dim, spec.depth, spec.num_heads, spec.patch_size) == (384, 6, 6, 16)


def test_changed_settings_lists_what_alters_the_result_as_old_and_new():
    old = load().model_dump(mode="json")
    cfg = load("--epochs", "200", "--mean", "0.5", "0.5", "0.5", "--num_workers", "2", "-b", "8")
    mean, epochs = "mean: [0.485, 0.456, 0.406] -> [0.5, 0.5, 0.5]", "epochs: 100 -> 200"
    assert changed_settings(old, cfg, skip=set()) == [mean, epochs]
    assert changed_settings(old, cfg, skip={"mean"}) == [epochs]
    del old["hflip"], old["mask_ratio"]  # a checkpoint of a version that did not have them
    assert changed_settings(old, cfg, skip={"mean"}) == [epochs]
    newer = cfg.model_copy(update={"hflip": 0.2})
    assert changed_settings(old, newer, skip={"mean", "epochs"}) == ["hflip: 0.5 -> 0.2"]


def test_the_settings_that_a_resumed_run_may_change():
    free = """
    device timeout output_dir data_path download parallel log_interval save_minutes save_epochs
    keep_last keep_every tensorboard max_bad_steps num_workers prefetch_factor batch_size accum_iter
    total_batch_size stop_epoch monitor_epochs monitor_images monitor_knn monitor_probe
    monitor_gauges track compile compile_backend checkpointing init show_channels monitor_gauges
    """
    others = dict.fromkeys(PretrainConfig.model_fields, "another value")
    changed = {text.split(":")[0] for text in changed_settings(others, load(), skip=set())}
    assert others.keys() - changed == set(free.split())


def test_importing_the_settings_does_not_import_torch():
    code = "import sys, util.settings.read, util.settings.tools; print('torch' in sys.modules)"
    assert run([sys.executable, "-c", code]).stdout == "False\n"
