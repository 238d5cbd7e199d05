"""The rules of the source itself: which way imports point, what is never called, how long files and
functions are.

Each rule is a small function of a source text that returns what is wrong with it; the last part
shows that they bite.
"""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGES = ("models", "engine", "data", "util")
TESTS = ("tests", "conftest", "reference", "runs")  # never imported by the source
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.py", "tools/**/*.py", *(f"{package}/**/*.py" for package in PACKAGES))
    for path in ROOT.glob(pattern)
)
BELOW = {  # what a layer may import of this project, beside itself
    "main": {"engine", "models", "data", "util"},
    "tools": {"engine", "models", "data", "util"},
    "engine": {"engine", "models", "data", "util"},
    "models": {"models", "util"},
    "data": {"data", "util"},
    "util": {"util"},
}
MAX_FILE, MAX_FUNCTION, MAX_STORY = 250, 60, 75  # lines
STORIES = {("engine/loop.py", "train")}  # beside each entry script's main
FORBIDDEN_NAMES = {  # by their full name, however they were imported, called or handed on
    "eval",
    "exec",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "shutil.unpack_archive",
    "pandas.read_pickle",
    "torch.jit.load",
    "torch.hub.load",
    "torch.hub.load_state_dict_from_url",
    "torch.package.PackageImporter",
}
FORBIDDEN_MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
EXCUSED_IMPORTS = {
    ("models/weights/files.py", "pickle")
}  # for the one name that is harmless, an error
HARMLESS_NAMES = {"pickle", "pickle.UnpicklingError"}
NEED_WEIGHTS_ONLY = {"torch.load", "torch.serialization.load"}
FORBIDDEN_KEYWORDS = {("weights_only", False), ("shell", True), ("allow_pickle", True)}
FORBIDDEN_METHODS = {"extractall"}  # writes outside its folder when the archive says so


def layer_of(file: str) -> str:
    """The folder of a file, or "main" for an entry script."""
    folder = file.split("/")[0] if "/" in file else "main"
    assert folder in BELOW, f"{file}: the top level holds entry scripts only"
    return folder


def names_in(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, wherever it stands; relative ones start with a dot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            yield node.lineno, ast.unparse(node.args[0]).strip("'\"")


def wrong_imports(source: str, layer: str, tools: frozenset[str] = frozenset()) -> list[str]:
    """Imports that point up, sideways, or out of sight; `tools` are the module names of tools/."""
    own = {*BELOW, *TESTS, *tools}
    found = []
    for line, module in names_in(source):
        top = module.split(".")[0]
        is_ours = module.startswith(".") or top in own or top.startswith(("main_", "test_"))
        if is_ours and top not in BELOW[layer]:
            found.append(f"line {line}: {layer} imports {module}")
    return found


def star_imports(source: str) -> list[str]:
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return [
        f"line {node.lineno}: from {node.module} import *"
        for node in nodes
        if node.names[0].name == "*"
    ]


def imported_names(tree: ast.AST) -> dict[str, str]:
    """What the names stand for that a source imports: p for `import pickle as p`, load for `from
    torch import load`."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            found |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
    return found


def forbidden(source: str, file: str = "") -> list[str]:
    """What runs or unpacks what a file says."""
    tree = ast.parse(source)
    imported, found, safe = imported_names(tree), [], set()

    def full_name(node: ast.expr) -> str:
        first, dot, rest = ast.unparse(node).partition(".")
        return imported.get(first, first) + dot + rest

    for line, module in names_in(source):
        if module.split(".")[0] in FORBIDDEN_MODULES and (file, module) not in EXCUSED_IMPORTS:
            found.append(f"line {line}: import of {module}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):  # comes before its parts
            keywords = {
                (k.arg, k.value.value) for k in node.keywords if isinstance(k.value, ast.Constant)
            }
            if (
                full_name(node.func).split(".")[-1] in FORBIDDEN_METHODS
                or keywords & FORBIDDEN_KEYWORDS
            ):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
            if ("weights_only", True) in keywords:
                safe.add(node.func)
        if isinstance(node, ast.ImportFrom):
            found += [
                f"line {node.lineno}: {name}"
                for name in imported_names(node).values()
                if name in FORBIDDEN_NAMES
            ]
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            name = full_name(node)
            is_pickle = name.split(".")[0] in FORBIDDEN_MODULES and name not in HARMLESS_NAMES
            if (
                name in FORBIDDEN_NAMES
                or is_pickle
                or (name in NEED_WEIGHTS_ONLY and node not in safe)
            ):
                found.append(f"line {node.lineno}: {name}")
    return found


def prints(source: str) -> list[str]:
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in calls
        if ast.unparse(node.func) == "print"
    ]


def too_long(source: str, file: str) -> list[str]:
    """A file above 250 lines, a function above 60, a story (an entry's main, the training loop)
    above 75."""
    lines = len(source.splitlines())
    found = [f"{lines} lines"] if lines > MAX_FILE else []
    stories = {name for path, name in STORIES if path == file} | (
        {"main"} if layer_of(file) == "main" else set()
    )
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            is_story = node.name in stories and node in tree.body
            if length > (MAX_STORY if is_story else MAX_FUNCTION):
                found.append(f"{node.name}: {length} lines")
    return found


def unlisted_packages(folders: set[str], pyproject: str) -> set[str]:
    """Packages that exist and are not listed, or are listed and do not exist."""
    return folders ^ set(tomllib.loads(pyproject)["tool"]["setuptools"]["packages"])


def read(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


def test_the_source_is_found():
    assert {layer_of(file) for file in SOURCES} >= {"main", *PACKAGES}
    assert [file for file in SOURCES if "/" not in file and not file.startswith("main_")] == []
    assert all(file in SOURCES for file, _ in STORIES)


@pytest.mark.parametrize("file", SOURCES)
def test_imports_point_down(file):
    tools = frozenset(path.stem for path in (ROOT / "tools").rglob("*.py"))
    assert wrong_imports(read(file), layer_of(file), tools) == []
    assert star_imports(read(file)) == []


@pytest.mark.parametrize("file", SOURCES)
def test_nothing_forbidden_is_called(file):
    assert forbidden(read(file), file) == []


@pytest.mark.parametrize("file", [file for file in SOURCES if layer_of(file) != "tools"])
def test_packages_and_entry_scripts_log_and_stay_short(file):
    assert prints(read(file)) == []
    assert too_long(read(file), file) == []


def test_packages_are_empty_at_the_top_and_listed():
    inits = [
        path
        for path in ROOT.glob("*/**/__init__.py")
        if path.relative_to(ROOT).parts[0] in PACKAGES
    ]
    assert [path.relative_to(ROOT).as_posix() for path in inits if path.read_bytes()] == []
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in inits}
    holding = {
        Path(file).parent.as_posix().replace("/", ".")
        for file in SOURCES
        if layer_of(file) in PACKAGES
    }
    assert holding == folders  # a folder of modules without __init__.py would not be installed
    assert unlisted_packages(folders, read("pyproject.toml")) == set()
    assert not (ROOT / "tools" / "__init__.py").exists()  # tools are scripts


# The rules bite


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        ("util", "from models.vit import Block"),
        ("util", "import engine.run.folder"),
        ("util", "def f():\n    from data import sampler"),
        ("models", "import data.sampler"),
        ("models", "from engine.optim import param_groups"),
        ("data", "from models import vit as v"),
        ("data", "if TYPE_CHECKING:\n    import engine"),
        ("engine", "from main_pretrain import main"),
        ("engine", "import os, tools.convert"),
        ("main", "import main_knn"),
        ("main", "from tools.vit_explain import main"),
        ("main", "from tests.runs import run"),
        ("tools", "import run_mae_vis"),
        ("tools", "from main_pretrain import main"),
        ("tools", "from . import run_mae_vis"),
        ("models", "from .vit import Block"),
        ("data", "import importlib\nimportlib.import_module('engine.run.folder')"),
        ("util", "from conftest import ROOT"),
    ],
)
def test_an_arrow_that_points_up_or_sideways_is_found(layer, line):
    assert len(wrong_imports(line, layer, frozenset({"run_mae_vis"}))) == 1


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        (
            "main",
            "import torch\nfrom engine.run.folder import Run\nfrom models.mae import x\nfrom data.loader import y",
        ),
        ("tools", "from util.errors import run_cli\nimport engine.evaluation.knn"),
        (
            "engine",
            "from data.loader import PretrainBatch\nfrom models import build\nimport engine.run.folder",
        ),
        (
            "models",
            "from models.vit import Block\nfrom util.errors import InputError\nfrom timm.data import Mixup",
        ),
        (
            "data",
            "from torch.utils.data import Dataset\nimport mlxtend.data\nfrom data.known_sets import read_cifar",
        ),
        ("util", "import torch.utils.data\nfrom util import dist"),
    ],
)
def test_arrows_that_point_down_are_left_alone(layer, line):
    assert wrong_imports(line, layer, frozenset({"run_mae_vis"})) == []


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(f)",
        "import pickle",
        "import pickle as p\np.load(file)",
        "from pickle import load\nload(file)",
        "from pickle import Unpickler as Reader",
        "pickle.Unpickler(file)",
        "import dill",
        "importlib.import_module('pickle')",
        "from torch import load\nload(path)",
        "import torch as t\nt.load(path)",
        "from torch import jit\njit.load(path)",
        "torch.jit.load(path)",
        "read = torch.load",
        "partial(torch.load, map_location='cpu')",
        "map(eval, lines)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, map_location='cpu')",
        "load_file(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "from yaml import unsafe_load",
        "x = eval('1 + 1')",
        "exec(code)",
        "subprocess.run(line, shell=True)",
        "os.system('ls')",
        "archive.extractall(folder)",
        "tarfile.open(path).extractall()",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_forbidden_calls_are_found(line):
    assert forbidden(line) != []


@pytest.mark.parametrize(
    "line",
    [
        "model.eval()",
        "class Config:\n    eval: bool = False",
        "torch.load(path, map_location='cpu', weights_only=True)",
        "from torch import load\nload(path, weights_only=True)",
        "from safetensors.torch import load_file\nload_file(path)",
        "json.load(file)",
        "yaml.safe_load(text)",
        "archive.extractfile(member)",
        "subprocess.run(['ls'], shell=False)",
        "'pickle.load(f) and eval(x) in a string'",
        "except_pickle = pickle.UnpicklingError",
    ],
)
def test_harmless_calls_are_left_alone(line):
    assert forbidden(line) == []


def test_an_excused_import_excuses_no_call():
    file = "models/weights/files.py"
    assert forbidden("import pickle\nraise pickle.UnpicklingError", file) == []
    assert forbidden("import pickle\npickle.load(stream)", file) == ["line 2: pickle.load"]
    assert forbidden("from pickle import load", "models/vit.py") != []
    assert all(f"import {module}" in read(file) for file, module in EXCUSED_IMPORTS)


def test_a_print_and_a_star_import_are_found():
    assert prints("def f():\n    print('x', file=sys.stderr)") == [
        "line 2: print('x', file=sys.stderr)"
    ]
    assert prints("pprint(x)\nparser.print_help()\n'print(x)'") == []
    assert star_imports("from models.vit import *") == ["line 1: from models.vit import *"]
    assert star_imports("from models.vit import Block") == []


def function(name: str, lines: int, indent: str = "") -> str:
    return f"{indent}def {name}():\n" + f"{indent}    pass\n" * (lines - 1)


def test_lengths_are_counted():
    assert too_long("pass\n" * 250, "util/a.py") == []
    assert too_long("pass\n" * 251, "util/a.py") == ["251 lines"]
    assert too_long(function("f", 60), "util/a.py") == []
    assert too_long(function("f", 61), "util/a.py") == ["f: 61 lines"]
    assert too_long("async " + function("f", 61), "util/a.py") == ["f: 61 lines"]
    assert too_long("class A:\n" + function("f", 61, "    "), "util/a.py") == ["f: 61 lines"]


def test_only_the_stories_may_be_longer():
    assert too_long(function("main", 75), "main_knn.py") == []
    assert too_long(function("main", 76), "main_knn.py") == ["main: 76 lines"]
    assert too_long(function("other", 61), "main_knn.py") == ["other: 61 lines"]
    assert too_long(function("main", 61), "util/a.py") == ["main: 61 lines"]
    assert too_long("class A:\n" + function("main", 61, "    "), "main_knn.py") == [
        "main: 61 lines"
    ]
    assert too_long(function("train", 75), "engine/loop.py") == []
    assert too_long(function("train", 61), "engine/evaluation/probe.py") == ["train: 61 lines"]


def test_a_package_that_is_not_listed_is_found():
    pyproject = '[tool.setuptools]\npackages = ["models", "util"]'
    assert unlisted_packages({"models", "util"}, pyproject) == set()
    assert unlisted_packages({"models", "util", "util.text"}, pyproject) == {"util.text"}
    assert unlisted_packages({"models"}, pyproject) == {"util"}


def test_a_strange_file_at_the_top_level_is_found():
    with pytest.raises(AssertionError, match="the top level holds entry scripts only"):
        layer_of("scripts/a.py")
