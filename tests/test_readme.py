"""Every fenced command of every README, and the command in every recipe's head, runs.

Each runs in a folder of its own that looks like a clone, with what a reader has to fill in
(`/path/to/...`) put there first, at the debug size and for one epoch. Commands for one process run
in this process; eight GPUs become two gloo processes, and each of two machines a machine alone.
"""

import importlib
import re
import shlex
import shutil
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import ROOT
from dense_runs import coco_scenes
from runs import make_pictures, make_scenes, results_of, run
from test_datasets import cifar_rows, publish, server  # noqa: F401  (a fixture)

from tools import benchmark, pack_dataset

READMES = sorted(path for path in ROOT.glob("**/README.md") if "/.venv" not in str(path))
READMES.append(ROOT / "data/FIRST_DATASET.md")
RECIPES = sorted(path for path in ROOT.glob("cfgs/**/*.yaml") if "quickstart" not in path.parts)
CLONE = ("cfgs", "models", "engine", "data", "util", "tools", "tests", "*.py", "*.sh")

# Later flags win. Eight images are one step on any number of processes up to four.
SMALL = shlex.split("--size debug --batch_size 2 --num_workers 0 --device cpu --precision fp32")
ONE_STEP = shlex.split("--epochs 1 --warmup_epochs 0 --total_batch_size 8 --tensorboard false")
DECODER = shlex.split("--decoder_embed_dim 16 --decoder_depth 1 --decoder_num_heads 2")
SMALL_PICTURES = shlex.split("--size debug --device cpu")
SMALLER = {  # by the first pattern that is found in the script's name
    r"run_mae_vis|draw_overview": [*SMALL_PICTURES, *DECODER],
    r"vit_explain": SMALL_PICTURES,
    r"embed|predict|see_features": ["--device", "cpu", "--num_workers", "0"],
    # The width of a large recipe's decoder stays, as its weights are not read again.
    r"_pretrain\.": [*SMALL, *ONE_STEP, "--decoder_depth", "1"],
    r"_(finetune|lincls)\.": [*SMALL, *ONE_STEP],
    r"_knn\.": SMALL,
    r"": [],
}

# The stage that leaves weights of a name.
WEIGHTS = {
    r"pretrain/model(\.safetensors)?$": "pretrain",
    r"(best|finetune/model)\.safetensors$": "finetune",
}

# How a command is run: as the first kind whose pattern is found in it. `elsewhere` are tests of
# their own, which make these commands small in other ways.
KINDS = {
    "elsewhere": r"(make |tools/)(quickstart|demo)|sbatch |tools/cifar10(_options)?\.sh",
    "benchmark": r"tools/benchmark\.py",
    "download": r"--download",
    "installation": r"-m (venv|pip) ",
    "make": r"^make ",
    "package": r"^tensorboard |-m pytest ",
    "eight GPUs": r"NGPU=8 ",
    "one process": r"",
}
ELSEWHERE = ("demo", "quickstart", "slurm", "real_images")


def fenced(readme: Path, language: str = "") -> list[str]:
    """The fenced blocks of a README in a language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", readme.read_text(), re.S | re.M)
    return [block for written_in, block in blocks if written_in == language]


def commands_of(file: Path) -> list[str]:
    """The commands of a README, or the one in the head of a recipe, on a folder of images."""
    if file.suffix == ".yaml":
        text = re.sub(r"\\\n# +", "", file.read_text()).replace("--download", "--dataset folder")
        return re.findall(r"^# Command:\s+(.*)$", text, re.M)
    programs = r"(make|sh|sbatch|tensorboard|(\.venv/bin/)?python3?)"
    lines = [line for block in fenced(file) for line in block.splitlines()]
    return [line for line in lines if re.match(rf"(\w+=\S+ )*{programs} \S", line)]


COMMANDS = {
    f"{'-'.join(file.relative_to(ROOT).parts)}-{number}": line
    for file in [*READMES, *RECIPES]
    for number, line in enumerate(commands_of(file))
}


def commands(kind: str) -> dict[str, str]:
    """The commands of a kind by their place."""
    return {
        name: line
        for name, line in COMMANDS.items()
        if kind == next(name for name, pattern in KINDS.items() if re.search(pattern, line))
    }


def each(kind: str) -> pytest.MarkDecorator:
    """A test for each command of a kind."""
    return pytest.mark.parametrize("line", commands(kind).values(), ids=commands(kind))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """15 training and 6 validation images in three classes."""
    return make_pictures(tmp_path_factory.mktemp("readme") / "images", train=5, val=2)


@pytest.fixture
def clone(images, tmp_path, monkeypatch) -> Path:
    """A folder to run commands in: links to the project's files, images under the READMEs'
    names."""
    for pattern in CLONE:
        for path in ROOT.glob(pattern):
            (tmp_path / path.name).symlink_to(path)
    for name in ("train/data", "data", "imagenet", "images", "cifar10", "photographs"):
        (tmp_path / "path" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "path" / name).symlink_to(images)
    training, validation = (
        (split, f"images/{folder}", f"annotations/{folder}")
        for split, folder in (("train", "training"), ("val", "validation"))
    )
    make_scenes(tmp_path / "path" / "ade20k", 9, 6, (training, validation))
    coco_scenes(tmp_path / "path" / "coco", range(9), range(6))
    shutil.copyfile(images / "val" / "one" / "005.png", tmp_path / "path" / "image")
    rows = ["file,effusion,nodule,split"]
    for number, image in enumerate(sorted(images.rglob("*.png"))):
        labels = f"{number % 2},{number // 2 % 2},{image.parent.parent.name}"
        rows.append(f"{image.relative_to(images)},{labels}")
    (tmp_path / "path" / "labels.csv").write_text("\n".join(rows))
    monkeypatch.setattr("data.scenes.NUM_SCENES", {"train": 200, "val": 6})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def given(line: str, images: Path, clone: Path) -> list[str]:
    """Puts the files that a command reads where it looks for them; returns its words, without the
    variables before it, and with places for those that a reader has to fill in."""
    command = re.sub(r"^([A-Z_]+=\S+ )*", "", line)
    words = shlex.split(command.replace("/path/to", f"{clone}/path"))
    recipe = words[words.index("--config") + 1] if "--config" in words else None
    for word in words:
        for pattern, stage in WEIGHTS.items():
            if re.search(pattern, word):
                put(trained(stage, recipe, images, clone) / "model.safetensors", clone / word)
        if word.endswith("path/runs"):
            put(trained("pretrain", None, images, clone), Path(word) / "one")
        elif word.endswith("photographs/pretrain") and "plot_run" in line:
            put(trained("pretrain", None, images, clone), Path(word))
        elif word == "output/photographs":  # of all runs of that page
            put(trained("pretrain", None, images, clone), Path(word) / "pretrain")
        elif word == "cifar10-tiny":  # in its place a model of the size that is tested
            put(trained("pretrain", recipe, images, clone) / "model.safetensors", clone / word)
        elif word.endswith(("/packed", "/train/*.tar")) and "--side" not in words:
            folder = Path(word) if word.endswith("packed") else Path(word).parent.parent
            pack_dataset.main([str(images), str(folder), "--workers", "1"])
    return [name for word in words for name in (expanded(word) if "*" in word else [word])]


def put(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


def expanded(pattern: str) -> list[str]:
    """What a shell makes of a pattern."""
    path = Path(pattern)
    return sorted(map(str, path.parent.glob(path.name)))


def trained(stage: str, recipe: str | None, images: Path, clone: Path) -> Path:
    """The folder of one step of training with the geometry of a recipe, of whatever stage."""
    same_name = Path("cfgs/pretrain") / Path(recipe or "none").name
    beside = Path(recipe or "none").with_name("pretrain.yaml")
    for path in (same_name, beside):
        if stage == "pretrain" and path.exists():
            recipe = str(path)
    config = [] if recipe is None else ["--config", recipe]
    data = ["--data_path", str(images), "--dataset", "folder", "--download", "false"]
    more = ["--output_dir", str(clone / "trained")]
    if stage == "pretrain":  # a recipe of linear classification names an optimiser of its own
        more += [*DECODER, "--optimizer", "adamw"]
    main = importlib.import_module(f"main_{stage}").main
    main([*config, *data, *SMALL, *ONE_STEP, *more, *smaller_images(config)])
    return clone / "trained"


def small(words: list[str]) -> list[str]:
    """The flags that make a command small."""
    flags = next(flags for pattern, flags in SMALLER.items() if re.search(pattern, words[1]))
    heads = shlex.split("--head_dim 16 --region_samples 16 --global_blocks 1")
    is_detector = any("/detect/" in word for word in words)
    return [*flags, *smaller_images(words), *(heads if is_detector else [])]


def smaller_images(words: list[str]) -> list[str]:
    """Of recipes whose images are large, and of commands that state a size: that of the weights."""
    if "--img_size" in words:
        return ["--img_size", "32"]
    is_large = any(re.search("/(segment|detect)/", word) for word in words)
    return ["--img_size", "64"] if is_large else []


def run_here(words: list[str]) -> object:
    """Runs a command for one process; returns what its `main` returns."""
    script = re.sub(r"run_(\w+)\.sh", r"main_\1.py", words[1]).removeprefix("tests/")
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    try:
        return module.main([*words[2:], *small(words)])
    except SystemExit as end:
        assert not end.code
        return None


# What a command leaves, by the first pattern that is found in it; "" is that it prints a few lines.
LEAVES = {
    r"--help|--print_config|--describe|check_dataset|size\.py": "",
    r"--eval": "output/*/*/eval.json",
    r"run_(finetune|lincls|knn)": "output/*/*/results.json",
    r"pretrain\.": "**/model.safetensors",
    r"pack_dataset": "**/index.json",
    r"convert_checkpoint": "path/converted*",
    r"embed": "output/features.npz",
    r"predict": "output/predictions.csv",
    r"plot_run.*--compare": "**/compare.html",
    r"plot_run": "**/report.html",
    r"": "output/**/*.png",
}


def assert_done(line: str, clone: Path, printed: str) -> None:
    """The command has left what the READMEs promise."""
    left = next(left for pattern, left in LEAVES.items() if re.search(pattern, line))
    paths = list(clone.glob(left)) if left else printed.splitlines()[3:]
    assert paths
    if left.endswith(("eval.json", "results.json")):
        assert results_of(paths[0].parent, paths[0].name)["num_samples"] == 6


@pytest.mark.long
@each("one process")
def test_commands_for_one_process(line, images, clone, capsys):
    run_here(given(line, images, clone))
    assert_done(line, clone, capsys.readouterr().out)


def test_commands_of_the_benchmark(monkeypatch):
    """They name every part; `test_benchmark.py` runs the parts themselves."""
    parts = {part: Mock(return_value=[(part, {"a": {"b": 1.0}})]) for part in benchmark.PARTS}
    monkeypatch.setattr(benchmark, "PARTS", parts)
    for line in commands("benchmark").values():
        assert benchmark.main(line.split()[2:])
    assert all(part.call_count == 1 for part in parts.values())


@pytest.mark.long
@each("eight GPUs")
def test_commands_for_eight_gpus(line, images, clone):
    words = given(line, images, clone)
    result = run([*words, *small(words)], cwd=clone, NGPU="2")
    assert result.returncode == 0, result.stderr
    assert_done(line, clone, result.stdout)


def test_commands_for_two_machines_say_which_one_each_is():
    """They run as those of eight GPUs; `test_nodes.py` runs two machines."""
    lines = [line for line in COMMANDS.values() if "NNODES=2 " in line]
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        assert f"NODE_RANK={rank} MASTER_ADDR=node0 MASTER_PORT=" in line and "NGPU=8 " in line


def test_the_command_that_downloads(images, clone, monkeypatch, server):  # noqa: F811
    """The archive comes from a server on localhost."""
    (line,) = commands("download").values()
    rows = {name: rows[:20] for name, rows in cifar_rows("cifar10").items()}  # 5 files to train on
    publish(monkeypatch, clone / "served", "cifar10", rows, server)
    line = line.replace("/path/to/cifar10", "fetched")
    assert run_here(given(line, images, clone))["step"] == 5 * 20 // 8


def test_commands_that_install():
    make = ["make", "--dry-run", "--always-make", ".venv/.run"]
    printed = run(make, PYTHON="python3").stdout.splitlines()
    lines = commands("installation").values()
    assert len(lines) == 2 and set(lines) <= set(printed)


@each("make")
def test_targets_of_make(line):
    """Continuous integration makes them."""
    assert line.replace("-all", "") in (ROOT / ".ci/run").read_text().splitlines()
    assert run([*line.split(), "--dry-run"]).returncode == 0


@pytest.mark.long
@each("package")
def test_commands_of_packages(line, images, clone):
    words = line.replace("python", sys.executable).split()
    if words[0] == "tensorboard":
        put(trained("pretrain", None, images, clone), clone / "output" / "run")
        words = [sys.executable, "-m", "tensorboard.main", *words[1:], "--inspect"]
    result = run(words, cwd=clone if "tensorboard" in line else ROOT)
    assert result.returncode == 0, result.stderr


def test_no_command_is_forgotten():
    assert len(COMMANDS) >= 40 + len(RECIPES) and len(commands("elsewhere")) >= 3
    assert all([*(ROOT / "tests").rglob(f"test_{name}.py")] for name in ELSEWHERE)


def test_the_lines_that_lay_out_a_folder(tmp_path):
    """Every fifth image is held out, below the same folders, whatever its name."""
    (block,) = [block for readme in READMES for block in fenced(readme, "sh")]
    for name in ("animals/old ones", "things"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(10):
            (tmp_path / name / f" {number}.jpg").touch()
    run(["sh", "-euc", block.replace("/path/to/photographs", shlex.quote(str(tmp_path)))])
    left = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.jpg")]
    assert Counter(str(path.parent) for path in left) == {
        "train/animals/old ones": 8,
        "val/animals/old ones": 2,
        "train/things": 8,
        "val/things": 2,
    }


PYTHON = {"features": (8, 128), "probabilities": (8, 3), "painted": (8, 1, 28, 28)}


@pytest.mark.long
@pytest.mark.parametrize("result", PYTHON)
def test_the_lines_of_python(result, images, clone, tmp_path_factory):
    """In a process of its own that knows no more than the project's path, from another folder."""
    blocks = [block for readme in READMES for block in fenced(readme, "python")]
    assert len(blocks) == len(PYTHON)
    (block,) = [block for block in blocks if result in block]
    assert len(block.split("\n\n")[-1].splitlines()) <= 5
    (stage,) = re.findall(r'weights="(\w+)\.safetensors"', block)
    folder = trained(stage, f"cfgs/quickstart/{stage}.yaml", images, clone)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    put(folder / "model.safetensors", elsewhere / f"{stage}.safetensors")
    lines = [block.replace("../mae", str(ROOT)), f"print(tuple({result}.shape))"]
    found = run([sys.executable, "-c", "\n".join(lines)], cwd=elsewhere, PYTHONPATH="")
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == str(PYTHON[result])


def test_the_readmes_name_only_what_is_there():
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"]).stdout
    files = [f"/{path}" for path in listed.split()]
    written = {"log.txt", "config.yaml", "classes.txt"}  # by a run, or by predict.py
    written |= {"models_mae.py", "util/pos_embed.py"}  # of the public code
    for readme in READMES:
        text = readme.read_text()
        for name in re.findall(r"`(?:\.\./)*((?:\w+/)*[\w.-]+\.(?:py|yaml|sh|txt|md))`", text):
            assert name in written or any(path.endswith(f"/{name}") for path in files), name
        for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
            linked = readme.parent / target if target else readme
            assert linked.exists(), f"{readme}: {target}"
            titles = re.findall(r"^#+ (.*)$", linked.read_text() if heading else "", re.M)
            names = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not heading or heading in names, f"{readme}: {target}#{heading}"
