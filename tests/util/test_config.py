"""Settings: the order of their sources, the conversion of text, and what reading prints and
compares. Refusals of single values are in test_refusals.py."""

import json
import logging
import re
import sys
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
from util.settings.fields import sections
from util.settings.pretrain import PretrainConfig
from util.settings.read import changed_settings, dump_config, load_config, may_change

DIGITS = ("--dataset", "mnist5k")  # the data set that needs no data_path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Writes a YAML file and returns its path."""
    folder = tmp_path_factory.mktemp("recipes")

    def write(text: str, name: str = "recipe.yaml") -> str:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
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


@settings(deadline=None, database=None, max_examples=30)
@given(two_below=VALUES, below=VALUES, file=VALUES, line=VALUES)
def test_precedence_is_defaults_then_base_then_yaml_then_command_line(
    recipe, two_below, below, file, line
):
    """Also where a later source gives the default or null; values keep their types, and what is
    printed loads again to the same settings."""
    layers = [
        ("shared/c.yaml", two_below, {}),
        ("deep/b.yaml", below, {"base": "../shared/c.yaml"}),
        ("a.yaml", file, {"base": "deep/b.yaml"}),
    ]
    for name, values, base in layers:
        plain = {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}
        path = recipe(yaml.safe_dump(base | plain), name)
    cfg = load_config(PretrainConfig, "pretrain", [*DIGITS, "--config", path, *flags(line)])
    defaults = PretrainConfig(dataset="mnist5k", output_dir="output/pretrain/a")
    expected = dict(defaults) | two_below | below | file | line
    assert dict(cfg) == expected
    assert {n: type(v) for n, v in cfg} == {n: type(v) for n, v in expected.items()}
    again = ["--config", recipe(dump_config(cfg), "again.yaml")]
    assert load_config(PretrainConfig, "pretrain", again) == cfg


@pytest.mark.parametrize(
    "files",
    [
        {"a": "a"},
        {"a": "b", "b": "a"},
        {"a": "b", "b": "c", "c": "b"},
        {"a": "b", "b": "c", "c": "d", "d": None},  # no cycle, but longer than two
        {"a": "none"},  # no such file
        {"a": "/absolute"},
    ],
)
def test_a_chain_of_base_files_that_cannot_be_used_is_refused(recipe, files):
    paths = [
        recipe(f"base: {base}.yaml\n" if base else "seed: 1\n", f"{name}.yaml")
        for name, base in files.items()
    ]
    error = refused("--config", paths[0])
    assert error.settings == ("config",) and ".yaml" in str(error)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"lr: 1\nepochs: 20\nlr: 2\n", "'lr'"),
        (b'lr: 1\n"lr": 1\n', "'lr'"),
        (b"a: b: c\n", ""),
        (b"lr: [1, 2\n", ""),
        (b"lr: !!python/name:os.system\n", "os.system"),
        (b"lr: 1\n---\nlr: 2\n", ""),
        (b"output_dir: 2026-02-31\n", ""),  # reads as a date, and there is no such day
        (b"- lr\n- 1\n", ""),
        (b"just words\n", ""),
        (b"3: 4\n", ""),
        (b"[1, 2]: 3\n", ""),
        (b"lr: {{ x }}\n", ""),
        (b"{{ x }}: 1\n", ""),
        (b"lr: " + b"[" * 3000 + b"]" * 3000, "nested"),
        (b"# caf\xe9\nlr: 1\n", "utf-8"),
    ],
)
def test_a_file_that_is_not_flat_yaml_is_one_line_that_names_it(tmp_path, content, part):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    error = refused("--config", str(path))
    assert error.settings == ("config",)
    assert str(path) in str(error) and part in str(error) and "\n" not in str(error)


def test_a_folder_and_a_missing_file_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.yaml"):
        error = refused("--config", str(path))
        assert error.settings == ("config",) and str(path) in str(error)


def test_the_default_folder_is_the_stage_and_the_name_of_the_config(recipe):
    config = recipe("# nothing yet\n", "ViT-S_100E.v2.yaml")
    default = "output/pretrain/ViT-S_100E.v2"
    assert load("--config", config) == load("--output_dir", default)
    assert load("--config", config, "--output_dir", "null").output_dir == default
    assert load().output_dir == "output/pretrain/default"
    assert load("--config", config, "--output_dir", "runs/x").output_dir == "runs/x"


# Names


def test_an_unknown_key_is_refused_with_its_file_and_the_nearest_key(recipe):
    config = recipe("mask_ration: 0.5\nzzz: 1\n")
    error = refused("--config", recipe("base: recipe.yaml\n", "child.yaml"), "--epochz=3", "-x")
    assert error.settings == ("mask_ration", "zzz", "epochz", "x")
    lines = str(error).splitlines()[1:]
    assert [config in line for line in lines] == [True, True, False, False]
    hints = ["'mask_ratio'", "--help", "'epochs'", "--help"]
    assert all(hint in line for hint, line in zip(hints, lines, strict=True))


def test_all_problems_of_all_sources_come_in_one_error(recipe, tmp_path):
    recipe("depht: 3\nlr: fast\n", "base.yaml")
    config = recipe("base: base.yaml\nmask_ratio: 2\nepochs: 1.5\n")
    error = refused("stray", "--config", config, "--beta1", "1", "--tensorboard", "no")
    assert error.settings == (
        "stray",
        "depht",
        "lr",
        "mask_ratio",
        "epochs",
        "beta1",
        "tensorboard",
    )
    assert len(str(error).splitlines()) == 8
    broken = recipe("base: none.yaml\nlr: fast\n")
    assert refused("--config", broken, "--epochs", "0").settings == ("config", "lr", "epochs")


def test_a_sibling_stages_keys_are_skipped_with_one_line(recipe, caplog):
    config = recipe("layer_decay: 0.65\nmixup: 0.8\nks: [3]\n")
    argv = [*DIGITS, "--config", config, "--finetune", "random"]
    with caplog.at_level(logging.INFO):
        cfg = load_config(KnnConfig, "knn", argv, siblings=STAGE_CONFIGS)
    assert cfg.ks == (3,)
    (message,) = caplog.messages
    assert config in message and message.endswith("layer_decay, mixup")
    with pytest.raises(InputError) as error:
        load_config(KnnConfig, "knn", [*argv, "--layer_dekay", "1"], siblings=STAGE_CONFIGS)
    assert error.value.settings == ("layer_dekay",)
    with pytest.raises(InputError) as error:
        load_config(KnnConfig, "knn", argv)
    assert error.value.settings == ("layer_decay", "mixup")


# Values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("lr: 1e-3", 0.001),  # PyYAML gives text
        ("lr: 1", 1.0),
        ("tensorboard: 'False'", False),
        ("mean: [0.5, 1e-1, 0]", (0.5, 0.1, 0.0)),
        ("img_size: [32, 48]", (32, 48)),
        ("patch_size: null", None),
        ("clip_grad: ~", None),
        ("seed: 2147483647", 2**31 - 1),
        ("hflip: 1", 1.0),
    ],
)
def test_values_of_a_yaml_file(recipe, text, value):
    got = getattr(load("--config", recipe(text + "\n")), text.split(":")[0])
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--lr=1e-3"], 0.001),
        (["--lr", "1", "--lr", "2"], 2.0),  # the later one
        (["--tensorboard", "False"], False),
        (["--tensorboard", "true"], True),
        (["--shared_mask"], True),
        (["--mean", "-0.5", "0", "1e-1"], (-0.5, 0.0, 0.1)),
        (["--img_size", "32"], 32),
        (["--img_size", "32", "48"], (32, 48)),
        (["--patch_size", "null"], None),
        (["--data_path", "7"], "7"),
        (["--batch_size", "8"], 8),
    ],
)
def test_values_of_the_command_line(argv, value):
    got = getattr(load(*argv), argv[0].lstrip("-").split("=")[0])
    assert got == value and type(got) is type(value)


def test_b_is_the_batch_size():
    assert load("-b", "8").batch_size == 8


@pytest.mark.parametrize("name", ["data_path", "output_dir"])
def test_home_and_variables_in_paths_are_expanded(recipe, tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "there")
    monkeypatch.delenv("NOWHERE", raising=False)
    for written in ("~/there/x", "$HOME/$PLACE/x", "${HOME}/${PLACE}/x"):
        for argv in ([f"--{name}={written}"], ["--config", recipe(f"{name}: {written}\n")]):
            assert getattr(load(*argv), name) == f"{tmp_path}/there/x"
    (tmp_path / "r.yaml").write_text("seed: 4\n")
    assert load("--config", "~/r.yaml").seed == 4
    for written in ("$NOWHERE/x", "~no_such_user/x"):
        error = refused(f"--{name}={written}")
        assert error.settings == (name,) and written in str(error)
    assert refused("--config", "$NOWHERE/r.yaml").settings == ("config",)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "price$").mkdir()
    (tmp_path / "a$NOWHERE").mkdir()  # a name that is really there is taken as it is
    assert load(f"--{name}=a$NOWHERE").model_dump()[name] == "a$NOWHERE"
    assert load(f"--{name}=price$").model_dump()[name] == "price$"


# What the settings print


def test_help_gives_every_settings_description_range_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # nothing is broken in two
    with pytest.raises(SystemExit) as stop:
        load("--lr", "fast", "--help")  # needs no legal settings
    assert stop.value.code == 0
    text = capsys.readouterr().out
    bodies = dict(re.findall(r"^(\S[^\n]*):\n((?: +[^\n]*\n)+)", text, re.MULTILINE))
    groups = dict(sections(PretrainConfig))
    assert [name for fields in groups.values() for name in fields] == list(
        PretrainConfig.model_fields
    )
    for title, fields in groups.items():
        entries = re.split(r"^  (?=-)", bodies[title], flags=re.MULTILINE)[1:]
        for (name, field), entry in zip(fields.items(), entries, strict=True):
            assert f"--{name} " in entry and str(field.description) in entry
            assert re.search(r"default [^;)]+\)$", entry.strip()), entry
    for part in ("> 0 and < 1; default 0.75", "auto, bf16, fp16, fp32; default auto"):
        assert part in " ".join(text.split())


def test_print_config_is_the_settings_in_order_and_nothing_else(capsys):
    with pytest.raises(SystemExit) as stop:
        load("--img_size", "32", "48", "--print_config")
    assert stop.value.code == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    content = yaml.safe_load(printed.out)
    assert list(content) == list(PretrainConfig.model_fields)
    assert content == load("--img_size", "32", "48").model_dump(mode="json")
    assert refused("--print_config", "--lr", "0").settings == ("lr",)


# The settings as an object


def test_settings_are_frozen():
    with pytest.raises(ValidationError):
        load().lr = 1.0


def test_every_setting_of_every_stage_has_a_description():
    for config_class in STAGE_CONFIGS:
        for name, field in config_class.model_fields.items():
            assert str(field.description).endswith("."), name


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
        "class_token": True,
        "decoder_embed_dim": 16,
        "decoder_depth": 1,
        "decoder_num_heads": 4,
        "decoder_class_token": False,
        "mask_ratio": 0.5,
        "norm_pix_loss": False,
        "decoder": "cross",
        "pred_ratio": 0.25,
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
    assert changed_settings(cfg.model_dump(mode="json"), cfg, skip=set()) == []


def test_the_settings_that_a_resumed_run_may_change():
    free = """
    device timeout output_dir data_path download parallel log_interval save_minutes save_epochs
    keep_last keep_every tensorboard max_bad_steps num_workers prefetch_factor batch_size accum_iter
    total_batch_size stop_epoch monitor_epochs monitor_images monitor_knn monitor_probe compile
    compile_backend checkpointing
    """
    assert may_change(PretrainConfig) == set(free.split())


def test_importing_the_settings_does_not_import_torch():
    code = "import sys, util.settings.read, util.settings.tools; print('torch' in sys.modules)"
    assert run([sys.executable, "-c", code]).stdout == "False\n"
