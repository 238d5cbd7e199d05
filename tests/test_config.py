"""Settings: the order of their sources, every kind of wrong value, and the walk of a key to the
constructor."""

import dataclasses
import logging
import re
from pathlib import Path

import pytest
import torch

from models.build import VIT_SIZES, build_model, mae_config_problems, mae_spec
from models.spec import MAESpec
from util.errors import InputError, LocalInputError, run_cli
from util.settings.base import knob, sections
from util.settings.pretrain import PretrainConfig
from util.settings.read import changed_settings, dump_config, load_config, plain

DIGITS = ("--dataset", "mnist5k")  # the data set that needs no data_path


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """A stage of this test."""

    output_dir: str | None = knob(None, "folder")
    discard_ratio: float = knob(0.9, "share of the attention that is dropped", min=0, below=1)

    def problems(self) -> list[str]:
        return []


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(RolloutConfig):
    """A sibling stage of this test."""

    layer_decay: float = knob(0.75, "factor per layer", above=0)
    mixup: float = knob(0.8, "strength", min=0)


@pytest.fixture
def recipe(tmp_path):
    """Writes a YAML file and returns its path."""

    def write(text: str, name: str = "recipe.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def load(*argv: str) -> PretrainConfig:
    return load_config(PretrainConfig, "pretrain", [*DIGITS, *argv], checks=[mae_config_problems])


def refused(*argv: str, digits: bool = True) -> list[str]:
    """The problems of a command line, one string each; a list of several says how many it holds."""
    with pytest.raises(InputError) as error:
        load_config(
            PretrainConfig,
            "pretrain",
            [*(DIGITS if digits else ()), *argv],
            checks=[mae_config_problems],
        )
    head, *rest = str(error.value).split("\n  ")
    if not rest:
        return [head]
    assert head == f"{len(rest)} problems in the settings:"
    return rest


# Sources


def test_precedence_is_defaults_then_base_then_yaml_then_command_line(recipe):
    recipe("epochs: 20\nwarmup_epochs: 2\nlr: 1e-3\n", "base.yaml")
    config = recipe("base: base.yaml\nwarmup_epochs: 3\nlr: 2e-3\n")
    cfg = load("--config", config, "--lr", "3e-3")
    assert (cfg.mask_ratio, cfg.epochs, cfg.warmup_epochs, cfg.lr) == (0.75, 20, 3.0, 0.003)
    assert load("--config", config).lr == 0.002
    assert load("--config", str(Path(config).with_name("base.yaml"))).lr == 0.001
    assert load().lr == 1.5e-4


def test_the_command_line_wins_even_when_it_gives_the_default(recipe):
    config = recipe("lr: 2e-3\nshared_mask: true\npatch_size: 8\n")
    cfg = load("--config", config, "--lr", "1.5e-4", "--shared_mask", "false", "--epochs", "100")
    assert (cfg.lr, cfg.shared_mask, cfg.patch_size, cfg.epochs) == (1.5e-4, False, 8, 100)


def test_null_in_a_yaml_file_undoes_its_base(recipe):
    recipe("depth: 6\nclip_grad: 1\n", "base.yaml")
    cfg = load("--config", recipe("base: base.yaml\ndepth: null\n"))
    assert (cfg.depth, cfg.clip_grad) == (None, 1.0)


def test_base_is_relative_to_its_file_and_a_chain_of_two_is_the_longest(recipe):
    recipe("epochs: 11\nlr: 1e-3\nseed: 1\n", "shared/c.yaml")
    recipe("base: ../shared/c.yaml\nlr: 2e-3\nseed: 2\n", "deep/b.yaml")
    two = recipe("base: deep/b.yaml\nseed: 3\n", "a.yaml")
    cfg = load("--config", two)
    assert (cfg.epochs, cfg.lr, cfg.seed) == (11, 0.002, 3)
    three = recipe("base: a.yaml\n", "top.yaml")
    (problem,) = refused("--config", three)
    assert problem.endswith("shared/c.yaml: more than 2 base: files in a chain")


@pytest.mark.parametrize(
    "files", [{"a": "a"}, {"a": "b", "b": "a"}, {"a": "b", "b": "c", "c": "b"}]
)
def test_a_cycle_of_base_files_is_refused(recipe, files):
    paths = [recipe(f"base: {base}.yaml\n", f"{name}.yaml") for name, base in files.items()]
    (problem,) = refused("--config", paths[0])
    assert problem.endswith(".yaml: its chain of base: files comes back to itself")


def test_a_file_that_is_not_there_is_named(recipe, tmp_path):
    missing = tmp_path / "none.yaml"
    assert refused("--config", str(missing)) == [f"config {missing}: No such file or directory"]
    assert refused("--config", recipe("base: none.yaml\n")) == [
        f"config {missing}: No such file or directory"
    ]
    assert refused("--config", str(tmp_path)) == [f"config {tmp_path}: Is a directory"]


def test_base_must_be_a_relative_path(recipe, tmp_path):
    config = recipe("base: 3\n")
    assert refused("--config", config) == [f"{config}: base must be a relative path, got 3"]
    absolute = recipe("lr: 1e-3\n", "absolute.yaml")
    (problem,) = refused("--config", recipe(f"base: {absolute}\n"))
    assert "base must be a relative path" in problem


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("lr: 1\nepochs: 20\nlr: 2\n", "is not valid YAML: key 'lr' is given twice"),
        ('lr: 1\n"lr": 1\n', "is not valid YAML: key 'lr' is given twice"),
        ("a: b: c\n", "is not valid YAML: mapping values are not allowed here"),
        ("lr: [1, 2\n", "is not valid YAML: while parsing a flow sequence"),
        ("lr: !!python/name:os.system\n", "is not valid YAML: could not determine a constructor"),
        ("lr: 1\n---\nlr: 2\n", "is not valid YAML: expected a single document"),
        (
            "output_dir: 2026-02-31\n",
            "is not valid YAML",
        ),  # reads as a date, and there is no such day
        ("- lr\n- 1\n", "must be a flat list of `key: value` lines"),
        ("just words\n", "must be a flat list of `key: value` lines"),
        ("3: 4\n", "must be a flat list of `key: value` lines"),
    ],
)
def test_files_that_are_not_flat_yaml_are_refused(recipe, text, fragment):
    config = recipe(text)
    (problem,) = refused("--config", config)
    assert problem.startswith(f"config {config} {fragment}")


def test_a_duplicate_key_in_a_base_file_names_that_file(recipe, tmp_path):
    recipe("seed: 1\nseed: 1\n", "base.yaml")
    (problem,) = refused("--config", recipe("base: base.yaml\n"))
    assert problem.startswith(
        f"config {tmp_path / 'base.yaml'} is not valid YAML: key 'seed' is given twice"
    )


def test_an_empty_file_changes_nothing_but_the_folder(recipe):
    config = recipe("# nothing yet\n", "empty.yaml")
    assert load("--config", config) == dataclasses.replace(
        load(), output_dir="output/pretrain/empty"
    )


def test_the_default_folder_is_the_stage_and_the_name_of_the_config(recipe):
    config = recipe("seed: 1\n", "ViT-S_100E.v2.yaml")
    assert load("--config", config).output_dir == "output/pretrain/ViT-S_100E.v2"
    assert load().output_dir == "output/pretrain/default"
    assert (
        load("--config", config, "--output_dir", "null").output_dir
        == "output/pretrain/ViT-S_100E.v2"
    )
    assert load("--config", config, "--output_dir", "runs/x").output_dir == "runs/x"
    assert load_config(
        RolloutConfig, "rollout", ["--config", config], siblings=[PretrainConfig]
    ).output_dir == ("output/rollout/ViT-S_100E.v2")


# Names


def test_an_unknown_key_names_its_file_itself_and_the_nearest_key(recipe):
    config = recipe("mask_ration: 0.5\n")
    assert refused("--config", config) == [
        f"{config}: unknown setting 'mask_ration', did you mean 'mask_ratio'?"
    ]
    config = recipe("zzz: 1\n")
    assert refused("--config", config) == [f"{config}: unknown setting 'zzz'; see --help"]
    child = recipe("base: recipe.yaml\nseed: 1\n", "child.yaml")
    assert refused("--config", child) == [
        f"{config}: unknown setting 'zzz'; see --help"
    ]  # the base's name


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--mask_ration", "0.5"], ["unknown setting 'mask_ration', did you mean 'mask_ratio'?"]),
        (["--mask_ration=0.5"], ["unknown setting 'mask_ration', did you mean 'mask_ratio'?"]),
        (
            ["--mask_rat", "0.5"],
            ["unknown setting 'mask_rat', did you mean 'mask_ratio'?"],
        ),  # no abbreviations
        (["--epoch", "3"], ["unknown setting 'epoch', did you mean 'epochs'?"]),
        (["--no-shared_mask"], ["unknown setting 'no-shared_mask', did you mean 'shared_mask'?"]),
        (["-x"], ["unknown setting 'x'; see --help"]),
        (
            ["--zzz", "1", "--local-rank=0"],
            ["unknown setting 'zzz'; see --help", "unknown setting 'local-rank'"],
        ),
        (["stray"], ["unexpected argument 'stray'"]),
        (["--lr", "1e-3", "1e-4"], ["unexpected argument '1e-4'"]),
    ],
)
def test_unknown_flags_and_stray_arguments(argv, expected):
    problems = refused(*argv)
    assert len(problems) == len(expected)
    for problem, start in zip(problems, expected, strict=True):
        assert problem.startswith(f"command line: {start}")


def test_all_problems_of_all_sources_come_in_one_error(recipe, tmp_path):
    recipe("depht: 3\nlr: fast\n", "base.yaml")
    config = recipe("base: base.yaml\nmask_ratio: 2\nzzz: 1\nepochs: 1.5\n")
    problems = refused(
        "stray", "--config", config, "--epochz", "3", "--beta1", "1", "--tensorboard", "no"
    )
    assert problems == [
        "command line: unexpected argument 'stray'",
        "command line: unknown setting 'epochz', did you mean 'epochs'?",
        f"{tmp_path}/base.yaml: unknown setting 'depht', did you mean 'depth'?",
        f"{tmp_path}/base.yaml: lr: expected a number, got 'fast'",
        f"{config}: mask_ratio: expected > 0, < 1, got 2",
        f"{config}: unknown setting 'zzz'; see --help",
        f"{config}: epochs: expected a whole number, got 1.5",
        "command line: beta1: expected >= 0, < 1, got 1",
        "command line: tensorboard: expected true or false, got 'no'",
    ]


def test_a_broken_file_does_not_hide_the_problems_of_the_others(recipe, tmp_path):
    config = recipe("base: none.yaml\nlr: fast\n")
    assert refused("--config", config, "--epochs", "0") == [
        f"config {tmp_path}/none.yaml: No such file or directory",
        f"{config}: lr: expected a number, got 'fast'",
        "command line: epochs: expected >= 1, got 0",
    ]


def test_a_sibling_stages_keys_are_skipped_with_one_line(recipe, caplog):
    config = recipe("layer_decay: 0.65\nmixup: 0.8\ndiscard_ratio: 0.5\n")
    with caplog.at_level(logging.INFO):
        cfg = load_config(RolloutConfig, "rollout", ["--config", config], siblings=[FinetuneConfig])
    assert cfg == RolloutConfig(output_dir="output/rollout/recipe", discard_ratio=0.5)
    assert caplog.messages == [f"{config}: skipped settings of other stages: layer_decay, mixup"]
    with pytest.raises(InputError, match="2 problems"):
        load_config(RolloutConfig, "rollout", ["--config", config])


def test_a_key_that_no_stage_knows_stays_an_error_beside_siblings(recipe):
    config = recipe("layer_decay: 0.65\nlayer_dekay: 0.65\n")
    with pytest.raises(InputError, match="unknown setting 'layer_dekay'"):
        load_config(RolloutConfig, "rollout", ["--config", config], siblings=[FinetuneConfig])


# Values


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("lr: 1e-3", "lr", 0.001),  # PyYAML gives a string
        ("lr: 1.5e-4", "lr", 0.00015),
        ("lr: 1", "lr", 1.0),
        ("warmup_epochs: 0.5", "warmup_epochs", 0.5),
        ("epochs: 300", "epochs", 300),
        ("tensorboard: false", "tensorboard", False),
        ("tensorboard: 'False'", "tensorboard", False),
        ("mean: [0.5, 1e-1, 0]", "mean", (0.5, 0.1, 0.0)),
        ("img_size: 32", "img_size", 32),
        ("img_size: [32, 48]", "img_size", (32, 48)),
        ("patch_size: [8, 16]", "patch_size", (8, 16)),
        ("patch_size: null", "patch_size", None),
        ("clip_grad: ~", "clip_grad", None),
        ("num_workers: 0", "num_workers", 0),
        ("data_path: some/folder", "data_path", "some/folder"),
    ],
)
def test_values_of_a_yaml_file(recipe, text, name, value):
    got = getattr(load("--config", recipe(text + "\n")), name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--lr", "1e-3"], "lr", 0.001),
        (["--lr=1e-3"], "lr", 0.001),
        (["--lr", "1", "--lr", "2"], "lr", 2.0),  # the later one
        (["--tensorboard", "False"], "tensorboard", False),
        (["--tensorboard", "false"], "tensorboard", False),
        (["--tensorboard", "true"], "tensorboard", True),
        (["--shared_mask"], "shared_mask", True),
        (["--mean", "0.5", "0.5", "0.5"], "mean", (0.5, 0.5, 0.5)),
        (["--mean", "-0.5", "0", "1e-1"], "mean", (-0.5, 0.0, 0.1)),
        (["--img_size", "32"], "img_size", 32),
        (["--img_size", "32", "48"], "img_size", (32, 48)),
        (["--patch_size", "null"], "patch_size", None),
        (["--depth", "null"], "depth", None),
        (["--data_path", "some folder"], "data_path", "some folder"),
        (["--data_path", "7"], "data_path", "7"),
        (["-b", "8"], "batch_size", 8),
        (["--batch_size", "8"], "batch_size", 8),
    ],
)
def test_values_of_the_command_line(argv, name, value):
    got = getattr(load(*argv), name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # types
        ("lr: fast", "lr: expected a number, got 'fast'"),
        ("lr: true", "lr: expected a number, got True"),
        ("lr: [1, 2]", "lr: expected a number, got [1, 2]"),
        ("lr: {a: 1}", "lr: expected a number, got {'a': 1}"),
        ("lr: null", "lr: expected a number, got None"),
        ("clip_grad: x", "clip_grad: expected a number or null, got 'x'"),
        ("epochs: 1.5", "epochs: expected a whole number, got 1.5"),
        ("epochs: 1e2", "epochs: expected a whole number, got '1e2'"),
        ("epochs: true", "epochs: expected a whole number, got True"),
        ("depth: x", "depth: expected a whole number or null, got 'x'"),
        ("tensorboard: 1", "tensorboard: expected true or false, got 1"),
        ("tensorboard: maybe", "tensorboard: expected true or false, got 'maybe'"),
        ("data_path: 3", "data_path: expected text or null, got 3"),
        ("data_path: ''", "data_path: expected text or null, got ''"),
        (
            "img_size: [1, 2, 3]",
            "img_size: expected a whole number or 2 whole numbers, got [1, 2, 3]",
        ),
        ("img_size: []", "img_size: expected a whole number or 2 whole numbers, got []"),
        (
            "patch_size: 3.5",
            "patch_size: expected a whole number or 2 whole numbers or null, got 3.5",
        ),
        ("mean: [a, b, c]", "mean: expected a list of numbers, got ['a', 'b', 'c']"),
        (
            "mean: [[0.5], [0.5], [0.5]]",
            "mean: expected a list of numbers, got [[0.5], [0.5], [0.5]]",
        ),
        # not finite
        ("lr: .nan", "lr: expected a number, got nan"),
        ("lr: .inf", "lr: expected a number, got inf"),
        ("lr: nan", "lr: expected a number, got 'nan'"),
        ("lr: -inf", "lr: expected a number, got '-inf'"),
        ("lr: 1e999", "lr: expected a number, got '1e999'"),
        ("std: [1, 1, .inf]", "std: expected a list of numbers, got [1, 1, inf]"),
        # ranges: inclusive and exclusive bounds, and each item of a list
        ("lr: 0", "lr: expected > 0, got 0"),
        ("min_lr: -1e-9", "min_lr: expected >= 0, got -1e-09"),
        ("mask_ratio: 0", "mask_ratio: expected > 0, < 1, got 0"),
        ("mask_ratio: 1", "mask_ratio: expected > 0, < 1, got 1"),
        ("beta2: 1", "beta2: expected >= 0, < 1, got 1"),
        ("hflip: 1.01", "hflip: expected >= 0, <= 1, got 1.01"),
        ("crop_min: 0", "crop_min: expected <= 1, > 0, got 0"),
        ("epochs: 0", "epochs: expected >= 1, got 0"),
        ("num_workers: -1", "num_workers: expected >= 0, got -1"),
        ("patch_size: [16, 0]", "patch_size: expected >= 1, got 0"),
        ("std: [1, 0, 1]", "std: expected > 0, got 0"),
        ("seed: 2147483648", "seed: expected >= 0, <= 2147483647, got 2147483648"),
        # choices
        (
            "size: smal",
            "size: expected one of debug, tiny, small, base, large, huge, giant, got 'smal', did you mean "
            "'small'?",
        ),
        ("precision: int3", "precision: expected one of auto, bf16, fp16, fp32, got 'int3'"),
        ("device: 0", "device: expected text, got 0"),
    ],
)
def test_wrong_types_and_ranges(recipe, text, message):
    config = recipe(text + "\n")
    (problem,) = refused("--config", config)
    assert problem.startswith(f"{config}: {message}")


@pytest.mark.parametrize("number", ["1" + "0" * 400, "nan", "inf", "-1"])
def test_numbers_that_are_too_large_not_finite_or_negative_are_refused_wherever_they_come_from(
    recipe, number
):
    (problem,) = refused(f"--lr={number}")
    assert problem.startswith("command line: lr: expected ")
    (problem,) = refused("--config", recipe(f"lr: {number}\n"))
    assert ": lr: expected " in problem
    (problem,) = refused(f"--epochs={number}")
    assert problem.startswith("command line: epochs: expected ")


def test_the_largest_seed_and_the_inclusive_bounds_are_legal():
    cfg = load(
        "--seed",
        "2147483647",
        "--hflip",
        "1",
        "--crop_min",
        "1",
        "--min_lr",
        "0",
        "--epochs",
        "1",
        "--warmup_epochs",
        "0",
    )
    assert (cfg.seed, cfg.hflip, cfg.crop_min, cfg.min_lr, cfg.epochs) == (
        2**31 - 1,
        1.0,
        1.0,
        0.0,
        1,
    )


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], ["data_path is needed for dataset folder: give --data_path FOLDER"]),
        (
            ["--dataset", "cifar10"],
            ["data_path is needed for dataset cifar10: give --data_path FOLDER"],
        ),
        (
            ["--data_path", "x", "--download"],
            ["download fetches cifar10 and cifar100 only, not dataset folder"],
        ),
        (
            [*DIGITS, "--download"],
            ["download fetches cifar10 and cifar100 only, not dataset mnist5k"],
        ),
        ([*DIGITS, "--epochs", "9"], ["warmup_epochs 10 is longer than epochs 9"]),
        ([*DIGITS, "--stop_epoch", "101"], ["stop_epoch 101 is past epochs 100"]),
        ([*DIGITS, "--min_lr", "2e-4"], ["min_lr 0.0002 is above lr 0.00015"]),
        (
            [*DIGITS, "--mean", "0.5"],
            ["mean has 1 values and in_chans is 3: give one value per channel"],
        ),
        (
            [*DIGITS, "--std", "1", "1"],
            ["std has 2 values and in_chans is 3: give one value per channel"],
        ),
        (
            [*DIGITS, "--in_chans", "2", "--mean", "0", "0", "--std", "1", "1"],
            ["in_chans must be 1 (grey) or 3 (RGB) for the data path, got 2"],
        ),
        (
            [*DIGITS, "--img_size", "224", "230"],
            ["patch_size 16 does not divide the image width 230"],
        ),
        ([*DIGITS, "--num_heads", "5"], ["embed_dim 768 is not divisible by num_heads 5"]),
        (
            [*DIGITS, "--class_token", "false"],
            ["decoder_class_token true needs class_token true: there is no class token to pass on"],
        ),
    ],
)
def test_values_that_are_wrong_together(argv, expected):
    assert refused(*argv, digits=False) == expected


def test_values_at_the_edge_of_wrong_together_are_legal():
    cfg = load(
        "--epochs",
        "10",
        "--stop_epoch",
        "10",
        "--min_lr",
        "1.5e-4",
        "--in_chans",
        "1",
        "--mean",
        "0",
        "--std",
        "1",
    )
    assert cfg.problems() == []
    assert load_config(
        PretrainConfig, "pretrain", ["--dataset", "cifar100", "--data_path", "x", "--download"]
    ).download


def test_geometry_comes_together_with_the_other_problems():
    assert refused(
        "--in_chans", "2", "--img_size", "230", "--warmup_epochs", "200", digits=False
    ) == [
        "in_chans must be 1 (grey) or 3 (RGB) for the data path, got 2",
        "mean has 3 values and in_chans is 2: give one value per channel",
        "std has 3 values and in_chans is 2: give one value per channel",
        "data_path is needed for dataset folder: give --data_path FOLDER",
        "warmup_epochs 200 is longer than epochs 100",
        "patch_size 16 does not divide the image height 230",
        "patch_size 16 does not divide the image width 230",
    ]


# What the settings print


def help_text(capsys, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", "400")  # nothing is broken in two
    with pytest.raises(SystemExit) as stop:
        load("--help")
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_setting_with_its_section_unit_and_default(capsys, monkeypatch):
    bodies = dict(
        re.findall(r"^(\S[^\n]*):\n((?: +[^\n]*\n)+)", help_text(capsys, monkeypatch), re.MULTILINE)
    )
    groups = dict(sections(PretrainConfig))
    assert list(groups) == [
        "Device",
        "Run",
        "Logging and checkpoints",
        "Parallelism",
        "Speed and memory",
        "Monitoring",
        "Pixels",
        "Data set",
        "Data",
        "Augmentation",
        "Model",
        "Autoencoder",
        "Masking",
        "Batch and schedule",
        "Optimiser",
    ]
    assert sum(map(len, groups.values())) == len(dataclasses.fields(PretrainConfig))
    for title, group in groups.items():
        entries = re.split(r"^  (?=-)", bodies[title], flags=re.MULTILINE)[1:]
        assert len(entries) == len(group)
        for f, entry in zip(group, entries, strict=True):
            assert re.search(rf"--{f.name} ", entry)
            assert f.metadata["help"] in entry
            assert f.metadata["unit"] in entry
            assert re.search(r"default [^;)]+\)$", entry.strip())


@pytest.mark.parametrize(
    "line",
    [
        "--mask_ratio VALUE share of the patches that is removed (in [0, 1]; > 0, < 1; default 0.75)",
        "subtracted from pixels in [0, 1] (pixel value; default 0.485 0.456 0.406)",
        "--patch_size VALUE [VALUE ...] side, or height and width (pixels; >= 1; default null)",
        "--tensorboard [VALUE] write curves for TensorBoard into <output_dir>/tb (default true)",
        "-b VALUE, --batch_size VALUE per process and micro-batch (images; >= 1; default 64)",
        "(per 256 images; > 0; default 0.00015)",
        "(auto, bf16, fp16, fp32; default auto)",
        "(>= 0, <= 2147483647; default 0)",
    ],
)
def test_help_gives_unit_range_choices_and_default(capsys, monkeypatch, line):
    assert line in " ".join(help_text(capsys, monkeypatch).split())


def test_help_needs_no_legal_settings(capsys):
    with pytest.raises(SystemExit) as stop:
        load("--lr", "fast", "--help")
    assert stop.value.code == 0
    assert "--mask_ratio" in capsys.readouterr().out


def test_print_config_goes_to_stdout_and_loads_again_to_an_equal_config(recipe, capsys):
    config = recipe("base: base.yaml\nimg_size: [32, 48]\nlr: 1e-3\nclip_grad: null\n")
    recipe("seed: 5\nmean: [0.5, 0.25, 1e-5]\nstd: [1, 2, 3]\n", "base.yaml")
    argv = ["--config", config, "--shared_mask", "--data_path", "7", "--weight_decay", "1e-7"]
    with pytest.raises(SystemExit) as stop:
        load(*argv, "--print_config")
    printed = capsys.readouterr()
    assert stop.value.code == 0
    assert printed.err == ""
    assert load_config(
        PretrainConfig, "pretrain", ["--config", recipe(printed.out, "again.yaml")]
    ) == load(*argv)


def test_every_setting_survives_its_own_dump(recipe):
    cfg = load()
    again = load_config(PretrainConfig, "pretrain", ["--config", recipe(dump_config(cfg))])
    assert again == cfg
    names = [f.name for f in dataclasses.fields(PretrainConfig)]
    assert list(plain(dataclasses.asdict(cfg))) == names
    assert [
        line.split(":")[0] for line in dump_config(cfg).splitlines() if line[0] != "-"
    ] == names  # the same order
    assert plain(dataclasses.asdict(cfg))["mean"] == [0.485, 0.456, 0.406]  # plain values only


def test_print_config_reports_problems_instead():
    assert refused("--print_config", "--lr", "0") == ["command line: lr: expected > 0, got 0"]


def test_a_users_mistake_is_one_line_and_exit_code_2(capsys, monkeypatch):
    def fail_with(error: Exception) -> str:
        def main() -> None:
            raise error

        with pytest.raises(SystemExit) as stop:
            run_cli(main)
        assert stop.value.code == 2
        return capsys.readouterr().err

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert fail_with(InputError("no such folder")) == "error: no such folder\n"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert fail_with(InputError("no such folder")) == ""  # the first process of the machine says it
    assert fail_with(LocalInputError("my own disk")) == "error: my own disk\n"
    with pytest.raises(ZeroDivisionError):  # our own mistakes keep their traceback
        run_cli(lambda: 1 / 0)


# The config as an object


def test_configs_are_frozen():
    cfg = load()
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.lr = 1.0
    parts = [cls for cls in PretrainConfig.__mro__ if dataclasses.is_dataclass(cls)]
    assert len(parts) == 16
    assert all(cls.__dataclass_params__.frozen for cls in parts)


def test_every_field_has_help_and_every_number_a_range():
    for f in dataclasses.fields(PretrainConfig):
        assert f.metadata["help"], f.name
        bounded = any(bound is not None for bound in f.metadata["bounds"].values())
        assert (
            bounded == any(word in str(f.type) for word in ("int", "float")) or f.name == "mean"
        ), f.name


def test_choices_of_size_are_the_rows_of_the_size_table():
    (size,) = [f for f in dataclasses.fields(PretrainConfig) if f.name == "size"]
    assert size.metadata["choices"] == tuple(VIT_SIZES)


def test_fields_carry_the_constructors_keyword_names():
    parameters = {f.name for f in dataclasses.fields(MAESpec)}
    assert len(parameters) == 16
    assert parameters - {f.name for f in dataclasses.fields(PretrainConfig)} == set()


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
    lines = [
        f"{name}: {str(list(v) if isinstance(v, tuple) else v).lower()}"
        for name, v in given.items()
    ]
    cfg = load("--config", recipe("\n".join([*lines, "mean: [0.5]", "std: [0.5]", ""])))
    assert mae_spec(cfg) == MAESpec(**given)
    with torch.device("meta"):
        model = build_model(mae_spec(cfg))
    assert (model.img_size, model.patch_size, model.in_chans) == ((32, 48), (8, 16), 1)
    assert (model.mask_ratio, model.norm_pix_loss, model.decoder_class_token) == (0.5, False, False)
    assert (model.pos_embed.shape, len(model.blocks), len(model.decoder_blocks)) == (
        (1, 13, 24),
        3,
        1,
    )


def test_size_fills_only_the_keys_that_are_null():
    spec = mae_spec(load("--size", "small", "--depth", "6"))
    assert [getattr(spec, name) for name in ("embed_dim", "depth", "num_heads", "patch_size")] == [
        384,
        6,
        6,
        16,
    ]


def test_changed_settings_lists_what_alters_the_result_as_old_and_new():
    cfg = load(
        "--epochs",
        "200",
        "--lr",
        "1e-3",
        "--mean",
        "0.5",
        "0.5",
        "0.5",
        "--num_workers",
        "2",
        "-b",
        "8",
    )
    assert changed_settings(plain(dataclasses.asdict(load())), cfg, skip=set()) == [
        "mean: [0.485, 0.456, 0.406] -> [0.5, 0.5, 0.5]",
        "epochs: 100 -> 200",
        "lr: 0.00015 -> 0.001",
    ]
    assert changed_settings(plain(dataclasses.asdict(load())), cfg, skip={"mean", "lr"}) == [
        "epochs: 100 -> 200"
    ]
    assert changed_settings(plain(dataclasses.asdict(cfg)), cfg, skip=set()) == []
    older = {
        name: value
        for name, value in plain(dataclasses.asdict(cfg)).items()
        if name != "shared_mask"
    }
    assert changed_settings(older, cfg, skip=set()) == []  # it came later, and is at its default
    shared = dataclasses.replace(cfg, shared_mask=True)
    assert changed_settings(older, shared, skip=set()) == ["shared_mask: False -> True"]


def test_the_settings_that_a_resumed_run_may_change():
    free = {f.name for f in dataclasses.fields(PretrainConfig) if f.metadata["may_change"]}
    assert free == {
        "output_dir",
        "device",
        "timeout",
        "log_interval",
        "save_minutes",
        "save_epochs",
        "keep_last",
        "keep_every",
        "max_bad_steps",
        "tensorboard",
        "data_path",
        "download",
        "num_workers",
        "prefetch_factor",
        "batch_size",
        "accum_iter",
        "total_batch_size",  # the resulting total is compared instead
        "stop_epoch",
        "monitor_epochs",
        "monitor_images",
        "monitor_knn",
        "monitor_probe",
        "compile",
        "compile_backend",
        "checkpointing",
        "parallel",
    }
