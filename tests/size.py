"""Counts how much there is to read, and holds it against a budget: `python tests/size.py --check`.

The unit is the statement (`ast.stmt` without docstrings), so that nobody writes dense lines to stay
within the budget. It is no part of `make test`.
"""

import argparse
import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

MAX_LINE = 100  # characters
BUDGET = {
    "product statements": 11700,
    "test statements": 15880,
    "statements that main_pretrain imports": 5900,
    "statements that engine.optim imports": 100,
    "`cfg: Any` in product code": 0,
    "`Any` in product code": 70,
    f"lines past {MAX_LINE} characters": 0,
    "`fmt: skip`": 0,
}


def count(source: str) -> Counter[str]:
    """How much of each kind a file has. Docstrings are no statements, wherever they stand."""
    nodes = list(ast.walk(ast.parse(source)))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    configs = [node for node in nodes if isinstance(node, ast.arg) and node.arg == "cfg"]
    return Counter(
        statements=sum(isinstance(node, ast.stmt) and not _is_text(node) for node in nodes),
        uses_of_any=sum(map(_is_any, nodes)),
        untyped_settings=sum(_is_any(node.annotation) for node in configs),
        long_lines=sum(len(line) > MAX_LINE for line in source.splitlines()),
        unformatted=sum("fmt: skip" in comment for comment in comments),
    )


def _is_text(node: ast.AST) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _is_any(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Name) and node.id == "Any"


def imports(source: str) -> set[str]:
    """Dotted names of modules, and of what is imported from them, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def imported_by(name: str, sources: dict[str, str]) -> set[str]:
    """The module itself and every module of ours that it imports, directly or through others."""
    found: set[str] = set()
    waiting = {name}
    while waiting:
        found |= waiting
        imported = set().union(*(imports(sources[module]) for module in waiting))
        waiting = (imported & sources.keys()) - found
    return found


def measure(root: Path) -> dict[str, int]:
    """The numbers of `BUDGET`, in its order, for every Python file below `root` outside hidden
    folders."""
    paths = [path.relative_to(root) for path in sorted(root.rglob("*.py"))]
    sources = {
        ".".join(path.with_suffix("").parts): (root / path).read_text(encoding="utf-8")
        for path in paths
        if not any(part.startswith(".") for part in path.parts)
    }
    counts = {name: count(source) for name, source in sources.items()}
    tests = {name for name in sources if name.startswith("tests.")}
    product = sum((counts[name] for name in sources.keys() - tests), Counter())
    of_tests = sum((counts[name] for name in tests), Counter())
    pretraining, optim = (
        sum(counts[module]["statements"] for module in imported_by(name, sources) - tests)
        for name in ("main_pretrain", "engine.optim")
    )
    numbers = (
        product["statements"],
        of_tests["statements"],
        pretraining,
        optim,
        product["untyped_settings"],
        product["uses_of_any"],
        (product + of_tests)["long_lines"],
        (product + of_tests)["unformatted"],
    )
    return dict(zip(BUDGET, numbers, strict=True))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 past a budget")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    options = parser.parse_args(argv)
    found = measure(options.root)
    print(f"{'':45}{'now':>8}{'budget':>8}")
    for name, number in found.items():
        print(f"{name:45}{number:8,}{BUDGET[name]:8,}{'  too much' * (number > BUDGET[name])}")
    return int(options.check and any(found[name] > BUDGET[name] for name in BUDGET))


if __name__ == "__main__":
    sys.exit(main())
