"""Every command of the README and of the recipes' heads runs: paths replaced, the debug size and one epoch added.

`make test` is what continuous integration calls itself; eight GPUs become two gloo processes, two machines two
launchers on localhost.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image
from runs import environment, log_lines
from test_datasets import archive_of, cifar_members, publish, server  # noqa: F401  (a fixture)
from test_distributed import free_port

import main_pretrain

# eight images are one step on any number of processes up to four
SMALL = shlex.split(
    "--size debug --epochs 1 --warmup_epochs 0 --batch_size 2 --total_batch_size 8 --num_workers 0 --device cpu "
    "--precision fp32 --tensorboard false"
)


def readme_commands() -> list[str]:
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"(\w+=\S+ )*(make|sh|python|tensorboard) ", line)]


def words_of(line: str) -> tuple[dict[str, str], list[str]]:
    """The variables set before a command, and its words."""
    words = shlex.split(line)
    variables = {}
    while "=" in words[0]:
        name, value = words.pop(0).split("=", 1)
        variables[name] = value
    return variables, words


def small(words: list[str], images: Path, output: Path) -> list[str]:
    """The command's own words, then the flags that make it small (later flags win)."""
    replaced = [str(images) if word.startswith("/path/to/") else word for word in words]
    assert all(not word.startswith("/path/") for word in replaced)
    return [*replaced, *SMALL, "--output_dir", str(output)]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for index in range(8):
        Image.effect_noise((40, 40), 64).save(folder / f"{index}.jpg")
    return folder


def test_the_readme_names_only_what_is_there():
    text = (ROOT / "README.md").read_text()
    assert len(readme_commands()) >= 10
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in re.findall(r"`((?:\w+/)*[\w.-]+\.(?:py|yaml|sh|txt|md))`", text):
        assert name in ("log.txt", "config.yaml") or any(f"/{path}".endswith(f"/{name}") for path in tracked), name
    assert "make test\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.long
def test_single_machine_commands_of_the_readme(images, tmp_path):
    seen = 0
    for index, line in enumerate(readme_commands()):
        variables, words = words_of(line)
        if words[0] in ("make", "tensorboard") or "NNODES" in variables or "--download" in words:
            continue  # each has its own test
        if words[0] == "python":
            words[0] = sys.executable
        if variables.get("NGPU") == "8":
            variables["NGPU"] = "2"
        output = tmp_path / str(index)
        result = subprocess.run(
            small(words, images, output), cwd=ROOT, env=environment(**variables), capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert result.returncode == 0, f"{line}\n{result.stderr}"
        if "--help" not in words and "--print_config" not in words:
            assert log_lines(output)[-1]["step"] >= 1, line
        seen += 1
    assert seen == 6


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
            subprocess.Popen(small(words, images, tmp_path), cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
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
    arguments = small(words[2:], tmp_path / "cifar", tmp_path / "run")
    assert main_pretrain.main(arguments)["step"] == 2


@pytest.mark.long
def test_make_quickstart_works_and_works_again(tmp_path):
    for _ in range(2):
        result = subprocess.run(
            ["make", "quickstart", f"OUTPUT={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=False,
            env=environment(MAKEFLAGS=""),
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
    assert "already finished" in result.stdout
    epochs = [line["epoch_loss"] for line in log_lines(tmp_path / "pretrain") if "epoch_loss" in line]
    assert epochs[-1] < 0.6 * epochs[0]


def config_heads() -> list[Path]:
    return sorted((ROOT / "cfgs" / "pretrain").rglob("*.yaml"))


@pytest.mark.long
@pytest.mark.parametrize("config", config_heads(), ids=lambda path: path.stem)
def test_the_command_in_a_recipe_head_runs(config, images, tmp_path, monkeypatch):
    (line,) = re.findall(r"^# Command:\s+(.*)$", config.read_text(), re.M)
    _, words = words_of(line)
    assert words[:2] == ["sh", "run_pretrain.sh"]
    monkeypatch.chdir(ROOT)
    more = ["--dataset", "folder", "--download", "false"] if "--download" in words else []
    arguments = small(words[2:], images, tmp_path)
    # the decoder of a large recipe is large: its width is not what this test is about
    metrics = main_pretrain.main([*arguments, *more, "--decoder_depth", "1"])
    assert metrics["step"] == 1


@pytest.mark.long
def test_the_command_in_the_quickstart_head_runs(tmp_path, monkeypatch):
    (line,) = re.findall(r"^# Command:\s+(.*)$", (ROOT / "cfgs/quickstart/pretrain.yaml").read_text(), re.M)
    monkeypatch.chdir(ROOT)
    arguments = [*words_of(line)[1][2:], "--epochs", "1", "--warmup_epochs", "0", "--device", "cpu"]
    assert main_pretrain.main([*arguments, "--output_dir", str(tmp_path)])["step"] == 62
