"""Every command of the README and of the recipes' heads runs: paths replaced, the debug size and
one epoch added.

`make test` is what continuous integration calls itself; eight GPUs become two gloo processes, two
machines two launchers on localhost.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from runs import environment, log_lines
from test_datasets import archive_of, cifar_members, publish, server  # noqa: F401  (a fixture)
from test_distributed import free_port

import main_finetune
import main_lincls
import main_pretrain
from data.sources import ArraySource
from engine.run.checkpoint import save_weights
from engine.run.results import read_results
from engine.run.resume import run_identity
from models.build import build_model, classifier_spec, mae_spec
from tools import pack_dataset
from util.settings.evaluation import STAGE_CONFIGS as ALL
from util.settings.evaluation import FinetuneConfig, LinclsConfig
from util.settings.pretrain import PretrainConfig
from util.settings.read import load_config

MAINS = {"pretrain": main_pretrain.main, "finetune": main_finetune.main, "lincls": main_lincls.main}

# eight images are one step on any number of processes up to four
TRAINING = shlex.split("--epochs 1 --warmup_epochs 0 --total_batch_size 8 --tensorboard false")
SMALL = shlex.split("--size debug --batch_size 2 --num_workers 0 --device cpu --precision fp32")

DECODER = shlex.split("--decoder_embed_dim 16 --decoder_depth 1 --decoder_num_heads 2")
SMALLEST = ["--size", "debug", "--device", "cpu"]
PICTURE_TOOLS = {
    "tools/run_mae_vis.py": SMALLEST + DECODER,
    "tools/draw_overview.py": SMALLEST + DECODER,
    "tools/vit_explain.py": SMALLEST,
}


def readme_commands() -> list[str]:
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"(\w+=\S+ )*(make|sh|python|tensorboard) ", line)]


def single_machine_commands() -> list[str]:
    """All but those that have a test of their own."""
    others = (
        "make ",
        "tensorboard ",
        "NNODES",
        "--download",
        "cifar10.sh",
        "results_table.py",
        "benchmark.py",
        "sbatch",
    )
    return [line for line in readme_commands() if not any(other in line for other in others)]


def words_of(line: str) -> tuple[dict[str, str], list[str]]:
    """The variables set before a command, and its words."""
    words = shlex.split(line)
    variables = {}
    while "=" in words[0]:
        name, value = words.pop(0).split("=", 1)
        variables[name] = value
    return variables, words


def small(words: list[str], images: Path, output: Path) -> list[str]:
    """The command's own words with its paths replaced, then the flags that make it small (later
    flags win)."""
    stage = re.search(r"(?:run|main)_(pretrain|finetune|lincls|knn)\.", " ".join(words))
    replaced = [path for word in words for path in replaced_paths(word, images, output, words)]
    if words[1] in PICTURE_TOOLS:
        place = [] if "--save_path" in words else ["--save_path", str(output)]
        return [*replaced, *PICTURE_TOOLS[words[1]], *place]
    if stage is None:
        return replaced
    return [
        *replaced,
        *SMALL,
        *([] if stage[1] == "knn" else TRAINING),
        "--output_dir",
        str(output),
    ]


def replaced_paths(word: str, images: Path, output: Path, words: list[str]) -> list[str]:
    """As `replaced_path`; the shell would make several words of a pattern."""
    if "*" not in word:
        return [replaced_path(word, images, output, words)]
    return [str(path) for path in sorted((packed_for(images) / "train").glob(Path(word).name))]


def replaced_path(word: str, images: Path, output: Path, words: list[str]) -> str:
    """`word`, or what stands in for a path that a reader has to fill in or that an earlier command
    has written."""
    if word == "/path/to/pretrain/model" or re.search(
        r"(pretrain|finetune)/model.safetensors$", word
    ):
        return str(weights_for(words, images.parent))
    if word.endswith("best.safetensors"):
        return str(classifier_for(images.parent))
    if word in ("/path/to/save/result", "/path/to/converted"):
        return str(output / "saved")
    if word == "/path/to/image":
        return str(images / "val" / "cat" / "0.jpg")
    if word == "/path/to/packed":
        return str(output / "packed" if "pack_dataset" in words[1] else packed_for(images))
    if word == "/path/to/runs":
        return str(runs_for(images))
    if words[1].startswith("tools/") and word.startswith("output/"):
        return str(output / Path(word).name)
    if word.startswith("/path/to/"):
        return str(images)
    return word


def weights_for(words: list[str], folder: Path) -> Path:
    """Untrained weights of a debug-size autoencoder with the geometry of a command's recipe."""
    config = ROOT / words[words.index("--config") + 1] if "--config" in words else None
    small = {"size": "debug", "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    if config is None:
        cfg = PretrainConfig(**small, mean=(0.5,), std=(0.5,))
    elif "pretrain" in config.parts:
        flags = ["--config", str(config), "--data_path", "x", *SMALLEST, *DECODER]
        cfg = load_config(PretrainConfig, "pretrain", flags, siblings=ALL)
    else:
        stage = LinclsConfig if "lincls" in config.parts else FinetuneConfig
        arguments = ["--config", str(config), "--data_path", "x", "--finetune", "y"]
        read = load_config(stage, "evaluation", arguments, siblings=ALL)
        names = (
            "img_size",
            "patch_size",
            "in_chans",
            "embed_dim",
            "depth",
            "num_heads",
            "mean",
            "std",
        )
        geometry = {name: getattr(read, name) for name in names}
        cfg = PretrainConfig(
            **small, **{name: value for name, value in geometry.items() if value is not None}
        )
    path = (
        folder / f"{config.stem if config else 'model'}-{len(list(folder.iterdir()))}.safetensors"
    )
    facts = run_identity(cfg, mae_spec(cfg), ArraySource("none", np.zeros((1, 1, 1, 1)), 1))
    return save_weights(path, build_model(mae_spec(cfg)), facts)


def packed_for(images: Path) -> Path:
    """The images in shards."""
    folder = images.parent / "packed"
    if not folder.exists():
        pack_dataset.main([str(images), str(folder), "--workers", "1"])
    return folder


def runs_for(images: Path) -> Path:
    """A folder with a small pretraining run."""
    folder = images.parent / "runs"
    arguments = [
        "--data_path",
        str(images),
        *SMALL,
        *DECODER,
        *TRAINING,
        "--output_dir",
        str(folder / "one"),
    ]
    main_pretrain.main(arguments)
    return folder


def classifier_for(folder: Path) -> Path:
    """An untrained classifier of the two classes, for commands that only evaluate."""
    cfg = FinetuneConfig(size="debug", num_classes=2, class_token=True)
    facts = run_identity(cfg, classifier_spec(cfg), ArraySource("none", np.zeros((1, 1, 1, 1)), 1))
    return save_weights(folder / "classifier.safetensors", build_model(classifier_spec(cfg)), facts)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Ten training images, of which a tenth can be held out, and four validation images, in two
    classes."""
    folder = tmp_path_factory.mktemp("readme") / "images"
    for split, count in (("train", 5), ("val", 2)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                Image.effect_noise((40, 40), 64).save(folder / split / name / f"{index}.jpg")
    return folder


def test_the_readme_names_only_what_is_there():
    text = (ROOT / "README.md").read_text()
    assert len(readme_commands()) >= 29
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in re.findall(r"`((?:\w+/)*[\w.-]+\.(?:py|yaml|sh|txt|md))`", text):
        assert name in ("log.txt", "config.yaml") or any(
            f"/{path}".endswith(f"/{name}") for path in tracked
        ), name
    assert "make test\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.long
def test_single_machine_commands_of_the_readme(images, tmp_path):
    seen = 0
    for index, line in enumerate(single_machine_commands()):
        variables, words = words_of(line)
        if words[0] == "python":
            words[0] = sys.executable
        if variables.get("NGPU") == "8":
            variables["NGPU"] = "2"
        output = tmp_path / str(index)
        output.mkdir()  # the converter writes into a folder that is there
        result = subprocess.run(
            small(words, images, output),
            cwd=ROOT,
            env=environment(**variables),
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{line}\n{result.stderr}"
        if "pretrain." in line and "--help" not in words and "--print_config" not in words:
            assert log_lines(output)[-1]["step"] >= 1, line
        elif "--eval" in words:
            assert read_results(output / "eval.json")["num_samples"] == 4, line
        elif re.search(r"run_(finetune|lincls|knn)", line):
            assert read_results(output / "results.json")["num_samples"] == 4, line
        elif words[1] in PICTURE_TOOLS:
            assert list(output.rglob("*.png")), line
        elif "pack_dataset" in line:
            assert list(
                (packed_for(images) if "--index" in words else output / "packed").rglob(
                    "index.json"
                )
            ), line
        elif "plot_run" in line:
            assert (images.parent / "runs" / "one" / "report.html").exists()
        seen += 1
    assert seen == len(single_machine_commands())


@pytest.mark.long
def test_two_machine_commands_of_the_readme(images, tmp_path):
    lines = [line for line in readme_commands() if "NNODES=2" in line]
    assert [words_of(line)[0]["NODE_RANK"] for line in lines] == ["0", "1"]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NGPU": "2"}
    nodes = []
    for line in lines:
        variables, words = words_of(line)
        assert variables.keys() == {"NGPU", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"}
        env = environment(**{**variables, **place})
        nodes.append(
            subprocess.Popen(
                small(words, images, tmp_path), cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
            )
        )
    for node in nodes:
        _, stderr = node.communicate(timeout=300)
        assert node.returncode == 0, stderr
    assert log_lines(tmp_path)[-1]["step"] == 1


def test_the_cifar_command_of_the_readme(tmp_path, monkeypatch, server):  # noqa: F811
    """In this process, as the archive comes from a server on localhost."""
    (line,) = [line for line in readme_commands() if "--download" in line]
    content = archive_of(cifar_members("cifar10"))  # 20 images
    name = publish(monkeypatch, "cifar10", f"{server}/cifar-10-binary.tar.gz", content)
    (tmp_path / "served" / name).write_bytes(content)
    _, words = words_of(line)
    monkeypatch.chdir(ROOT)
    arguments = small(words, tmp_path / "cifar", tmp_path / "run")[2:]
    assert main_pretrain.main(arguments)["step"] == 2


def unbroken(config: Path) -> str:
    """A recipe's text with the lines of its command joined."""
    return re.sub(r"\\\n# +", "", config.read_text())


def config_heads() -> list[Path]:
    return [
        path for path in sorted((ROOT / "cfgs").rglob("*.yaml")) if "quickstart" not in path.parts
    ]


@pytest.mark.long
@pytest.mark.parametrize(
    "config", config_heads(), ids=lambda path: "-".join(path.relative_to(ROOT / "cfgs").parts)
)
def test_the_command_in_a_recipe_head_runs(config, images, tmp_path, monkeypatch):
    (line,) = re.findall(r"^# Command:\s+(.*)$", unbroken(config), re.M)
    _, words = words_of(line)
    stage = re.fullmatch(r"run_(\w+)\.sh", words[1])[1]
    monkeypatch.chdir(ROOT)
    arguments = small(words, images, tmp_path)[2:]
    if "--download" in words:
        arguments += ["--dataset", "folder", "--download", "false"]
    if stage == "pretrain":
        # the decoder of a large recipe is large: its width is not what this test is about
        assert MAINS[stage]([*arguments, "--decoder_depth", "1"])["step"] == 1
    else:
        results = MAINS[stage](arguments)
        assert (results["num_train"] + results.get("num_held_out", 0), results["num_samples"]) == (
            10,
            4,
        )


@pytest.mark.long
def test_the_command_in_the_quickstart_head_runs(tmp_path, monkeypatch):
    """The evaluations' heads are run by `make quickstart`, with other folders."""
    (line,) = re.findall(
        r"^# Command:\s+(.*)$", unbroken(ROOT / "cfgs/quickstart/pretrain.yaml"), re.M
    )
    monkeypatch.chdir(ROOT)
    arguments = [*words_of(line)[1][2:], "--epochs", "1", "--warmup_epochs", "0", "--device", "cpu"]
    assert main_pretrain.main([*arguments, "--output_dir", str(tmp_path)])["step"] == 62
