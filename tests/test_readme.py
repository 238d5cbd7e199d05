"""Every fenced command of every README, and the command in every recipe's head, runs.

Each runs in a folder of its own that looks like a clone, with what a reader has to fill in
(`/path/to/...`) put there first, at the debug size and for one epoch. Commands for one process run
in this process; eight GPUs become two gloo processes, two machines two launchers on localhost.
"""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image
from runs import environment, results_of
from test_datasets import archive_of, cifar_members, publish, server  # noqa: F401  (a fixture)
from test_distributed import free_port

import main_finetune
import main_pretrain
from tools import pack_dataset

READMES = sorted(path for path in ROOT.glob("**/README.md") if ".venv" not in path.parts)
RECIPES = sorted(path for path in ROOT.glob("cfgs/**/*.yaml") if "quickstart" not in path.parts)
CLONE = ("cfgs", "models", "engine", "data", "util", "tools", "tests", "*.py", "*.sh")

# Later flags win. Eight images are one step on any number of processes up to four.
SMALL = shlex.split("--size debug --batch_size 2 --num_workers 0 --device cpu --precision fp32")
ONE_STEP = shlex.split("--epochs 1 --warmup_epochs 0 --total_batch_size 8 --tensorboard false")
DECODER = shlex.split("--decoder_embed_dim 16 --decoder_depth 1 --decoder_num_heads 2")
SMALL_PICTURES = shlex.split("--size debug --device cpu")

# The tests that run these commands at a size that a test can have.
ELSEWHERE = {
    "make quickstart": "test_quickstart.py",
    "sbatch ": "test_slurm.py",
    "python tools/benchmark.py ": "test_benchmark.py",
    "sh tools/cifar10.sh ": "test_real_images.py",
}


def fenced(readme: Path, language: str = "") -> list[str]:
    """The fenced blocks of a README in a language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", readme.read_text(), re.S | re.M)
    return [block for written_in, block in blocks if written_in == language]


def is_command(line: str) -> bool:
    programs = r"(make|sh|sbatch|tensorboard|(\.venv/bin/)?python3?)"
    return re.match(rf"(\w+=\S+ )*{programs} \S", line) is not None


COMMANDS = [
    (f"{readme.parent.name if readme.parent != ROOT else 'top'}-{number}", line)
    for readme in READMES
    for number, line in enumerate(
        line for block in fenced(readme) for line in block.splitlines() if is_command(line)
    )
]


def variables_and_words(line: str) -> tuple[dict[str, str], list[str]]:
    """The variables set before a command, and its words."""
    words = shlex.split(line)
    variables = {}
    while "=" in words[0]:
        name, value = words.pop(0).split("=", 1)
        variables[name] = value
    return variables, words


def runs_here(line: str) -> bool:
    """Whether one process of Python runs a command, which this one can be."""
    variables, words = variables_and_words(line)
    script = re.fullmatch(r"(run_\w+\.sh|(main_|tools/|tests/)\w+\.py)", words[1])
    return script is not None and variables.get("NGPU", "1") == "1"


def is_elsewhere(line: str) -> bool:
    return line.startswith(tuple(ELSEWHERE)) or "NNODES" in line or "--download" in line


def parametrised(commands: list[tuple[str, str]]):
    return pytest.mark.parametrize("line", [pytest.param(line, id=name) for name, line in commands])


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


@pytest.fixture
def clone(images, tmp_path, monkeypatch) -> Path:
    """A folder to run commands in: links to the project's files, images under the READMEs'
    names."""
    for pattern in CLONE:
        for path in ROOT.glob(pattern):
            (tmp_path / path.name).symlink_to(path)
    for name in ("train/data", "data", "imagenet", "images", "cifar10"):
        (tmp_path / "path" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "path" / name).symlink_to(images)
    shutil.copyfile(images / "val" / "cat" / "0.jpg", tmp_path / "path" / "image")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def given(line: str, images: Path, clone: Path) -> list[str]:
    """Puts the files that a command reads where it looks for them; returns its words with the
    places of those that a reader has to fill in."""
    words = shlex.split(line.replace("/path/to/", f"{clone}/path/"))
    recipe = words[words.index("--config") + 1] if "--config" in words else None
    for word in words:
        if word.endswith(("path/pretrain/model", "pretrain/model.safetensors")):
            put(pretrained(recipe, images, clone) / "model.safetensors", clone / word)
        elif word.endswith(("best.safetensors", "finetune/model.safetensors")):
            put(fine_tuned(recipe, images, clone) / "model.safetensors", clone / word)
    if "path/runs" in line.replace("/path/to", "path"):
        put(pretrained(None, images, clone), clone / "path" / "runs" / "one")
    if "/path/to/packed" in line and "pack_dataset" not in line or "/path/to/shards" in line:
        pack_dataset.main([str(images), str(clone / "packed"), "--workers", "1"])
        put(clone / "packed", clone / "path" / ("packed" if "packed " in line else "shards"))
    return [name for word in words for name in (expanded(word) if "*" in word else [word])]


def put(source: Path, target: Path) -> None:
    if source != target:
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)


def expanded(pattern: str) -> list[str]:
    """What a shell makes of a word."""
    path = Path(pattern)
    return sorted(map(str, path.parent.glob(path.name)))


def pretrained(recipe: str | None, images: Path, clone: Path) -> Path:
    """The folder of one step of pretraining with the geometry of a recipe, of whatever stage."""
    config = [] if recipe is None else ["--config", recipe]
    places = ["--data_path", str(images), "--dataset", "folder", "--download", "false"]
    folder = clone / "pretrained"
    main_pretrain.main([*config, *places, *SMALL, *DECODER, *ONE_STEP, "--output_dir", str(folder)])
    return folder


def fine_tuned(recipe: str, images: Path, clone: Path) -> Path:
    """The folder of one step of a fine-tuning recipe, from scratch."""
    places = ["--data_path", str(images), "--dataset", "folder", "--download", "false"]
    folder = clone / "fine_tuned"
    arguments = ["--config", recipe, *places, *SMALL, *ONE_STEP]
    main_finetune.main([*arguments, "--output_dir", str(folder)])
    return folder


def small(words: list[str]) -> list[str]:
    """The flags that make a command small."""
    stage = re.search(r"(?:run|main)_(pretrain|finetune|lincls|knn)\.", words[1])
    if words[1] in ("tools/run_mae_vis.py", "tools/draw_overview.py"):
        return [*SMALL_PICTURES, *DECODER]
    if words[1] == "tools/vit_explain.py":
        return SMALL_PICTURES
    return [] if stage is None else SMALL if stage[1] == "knn" else [*SMALL, *ONE_STEP]


def run_here(words: list[str]) -> object:
    """Runs a command for one process; returns what its `main` returns."""
    script = re.sub(r"run_(\w+)\.sh", r"main_\1.py", words[1]).removeprefix("tests/")
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    try:
        return module.main([*words[2:], *small(words)])
    except SystemExit as end:
        assert not end.code
        return None


def assert_done(line: str, clone: Path, printed: str) -> None:
    """The command has left what the READMEs promise."""
    found = {path.name for path in clone.rglob("*") if path.is_file() and not path.is_symlink()}
    if re.search(r"--help|--print_config|--describe|check_dataset|size\.py", line):
        assert len(printed.splitlines()) > 3
    elif "--eval" in line or re.search(r"run_(finetune|lincls|knn)", line):
        name = "eval.json" if "--eval" in line else "results.json"
        (path,) = clone.glob(f"output/*/*/{name}")
        assert results_of(path.parent, name)["num_samples"] == 4
    elif "pretrain." in line:
        assert "model.safetensors" in found
    elif "pack_dataset" in line:
        assert "index.json" in found
    elif "convert_checkpoint" in line:
        assert (clone / "path" / "converted").exists()
    elif "plot_run" in line:
        assert {"curves.png", "report.html"} <= found
    else:
        assert list(clone.glob("output/**/*.png"))


@parametrised(
    [(name, line) for name, line in COMMANDS if runs_here(line) and not is_elsewhere(line)]
)
@pytest.mark.long
def test_commands_for_one_process(line, images, clone, capsys):
    words = given(line, images, clone)
    while "=" in words[0]:
        words.pop(0)
    run_here(words)
    assert_done(line, clone, capsys.readouterr().out)


@parametrised([(name, line) for name, line in COMMANDS if "NGPU=8 sh" in line])
@pytest.mark.long
def test_commands_for_eight_gpus(line, images, clone):
    words = given(line, images, clone)[1:]
    result = subprocess.run(
        [*words, *small(words)],
        env=environment(NGPU="2"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert_done(line, clone, result.stdout)


@pytest.mark.long
def test_commands_for_two_machines(images, clone):
    lines = [line for _, line in COMMANDS if "NNODES=2" in line]
    ranks = [variables_and_words(line)[0]["NODE_RANK"] for line in lines]
    assert ranks == ["0", "1"]
    place = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    nodes = []
    for rank, line in zip(ranks, lines, strict=True):
        words = [word for word in given(line, images, clone) if not re.match(r"[A-Z_]+=", word)]
        env = environment(**place, NODE_RANK=rank, NGPU="2")
        command = [*words, *small(words)]
        nodes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    for node in nodes:
        _, stderr = node.communicate(timeout=300)
        assert node.returncode == 0, stderr
    assert_done(lines[0], clone, "")


def test_the_command_that_downloads(tmp_path, monkeypatch, server):  # noqa: F811
    """The archive comes from a server on localhost."""
    (line,) = [line for _, line in COMMANDS if "--download" in line]
    content = archive_of(cifar_members("cifar10"))  # 20 images
    name = publish(monkeypatch, "cifar10", f"{server}/cifar-10-binary.tar.gz", content)
    (tmp_path / "served" / name).write_bytes(content)
    monkeypatch.chdir(ROOT)
    _, words = variables_and_words(line.replace("/path/to/cifar10", str(tmp_path / "cifar")))
    output = ["--output_dir", str(tmp_path / "run")]
    assert main_pretrain.main([*words[2:], *small(words), *output])["step"] == 2


def test_commands_that_install(tmp_path):
    lines = [line for _, line in COMMANDS if "-m venv" in line or "-m pip" in line]
    make = ["make", "--dry-run", "--always-make", ".venv/.run"]
    printed = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert len(lines) == 2 and all(line in printed for line in lines)


@parametrised([(name, line) for name, line in COMMANDS if line.startswith("make ")])
def test_targets_of_make(line):
    """`.ci/run` calls them."""
    result = subprocess.run(
        [*line.split(), "--dry-run"], cwd=ROOT, capture_output=True, check=False
    )
    assert result.returncode == 0
    assert line == "make quickstart" or line.replace("-all", "") in (ROOT / ".ci/run").read_text()


@pytest.mark.long
@parametrised(
    [(name, line) for name, line in COMMANDS if re.match("tensorboard|.* -m pytest", line)]
)
def test_commands_of_packages(line, images, clone):
    words = line.replace("python", sys.executable).split()
    if words[0] == "tensorboard":
        put(pretrained(None, images, clone), clone / "output" / "run")
        words = [sys.executable, "-m", "tensorboard.main", *words[1:], "--inspect"]
    cwd = ROOT if "pytest" in line else clone
    assert subprocess.run(words, cwd=cwd, env=environment(), check=False).returncode == 0


def test_every_command_is_run():
    names = (
        [name for name, line in COMMANDS if runs_here(line) or is_elsewhere(line)]
        + [name for name, line in COMMANDS if "NGPU=8 sh" in line or "-m venv" in line]
        + [name for name, line in COMMANDS if "-m pip" in line or line.startswith("make ")]
        + [name for name, line in COMMANDS if re.match("tensorboard|.* -m pytest", line)]
    )
    assert {name for name, _ in COMMANDS} == set(names)
    assert len(COMMANDS) >= 40
    assert all((ROOT / "tests" / name).exists() for name in ELSEWHERE.values())


@pytest.mark.long
def test_the_lines_of_python(images, clone, monkeypatch):
    (block,) = [block for readme in READMES for block in fenced(readme, "python")]
    (weights,) = re.findall(r'weights="([^"]+)"', block)
    put(
        pretrained("cfgs/quickstart/pretrain.yaml", images, clone) / "model.safetensors",
        clone / weights,
    )
    monkeypatch.syspath_prepend(str(clone))
    found: dict[str, torch.Tensor] = {}
    exec(compile(block, "README.md", "exec"), found)  # noqa: S102
    assert found["features"].shape == (8, 128)


def unbroken(recipe: Path) -> str:
    """The text of a recipe with the lines of its command joined."""
    return re.sub(r"\\\n# +", "", recipe.read_text())


@pytest.mark.long
@pytest.mark.parametrize(
    "recipe", RECIPES, ids=lambda path: "-".join(path.relative_to(ROOT / "cfgs").parts)
)
def test_the_command_in_a_recipes_head(recipe, images, clone):
    (line,) = re.findall(r"^# Command:\s+(.*)$", unbroken(recipe), re.M)
    line = line.replace("--download", "--dataset folder --download false")
    words = given(line, images, clone)
    assert words[words.index("--config") + 1] == str(recipe.relative_to(ROOT))
    # The width of a large recipe's decoder is not what this test is about.
    found = run_here([*words, "--decoder_depth", "1"] if "pretrain" in words[1] else words)
    if "pretrain" in words[1]:
        assert found["step"] == 1
    else:
        num_train = found["num_train"] + found.get("num_held_out", 0)
        assert (num_train, found["num_samples"]) == (10, 4)


@pytest.mark.long
def test_the_command_in_the_quickstarts_head(clone):
    """`make quickstart` runs those of the evaluations."""
    recipe = unbroken(ROOT / "cfgs/quickstart/pretrain.yaml")
    (line,) = re.findall(r"^# Command:\s+(.*)$", recipe, re.M)
    short = ["--epochs", "1", "--warmup_epochs", "0", "--device", "cpu"]
    assert main_pretrain.main([*shlex.split(line)[2:], *short])["step"] == 62


def test_the_readmes_name_only_what_is_there():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [f"/{path}" for path in printed.split()]
    written = {"log.txt", "config.yaml"}  # by a run
    for readme in READMES:
        text = readme.read_text()
        for name in re.findall(r"`(?:\.\./)*((?:\w+/)*[\w.-]+\.(?:py|yaml|sh|txt|md))`", text):
            assert name in written or any(path.endswith(f"/{name}") for path in files), name
        for target in re.findall(r"\]\((?!https?:)([^)#]*)", text):
            assert (readme.parent / target).exists(), f"{readme}: {target}"
        for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", text):
            linked = (readme.parent / target if target else readme).read_text()
            headings = re.findall(r"^#+ (.*)$", linked, re.M)
            names = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings]
            assert heading in names, f"{readme}: {target}#{heading}"
