"""Counts how much there is to read, and holds it against a budget: `python tests/size.py --check`.

The unit is the statement (`ast.stmt` without docstrings), so that nobody writes dense lines to stay
within the budget. It is no part of `make test`.
"""

import argparse
import ast
import io
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

MAX_LINE = 100  # characters
BUDGET = {
    "product statements": 5900,
    "test statements": 9000,
    "statements that main_pretrain imports": 3200,
    "statements that engine.optim imports": 60,
    "`cfg: Any` in product code": 0,
    "`Any` in product code": 60,
    f"lines past {MAX_LINE} characters": 0,
    "`fmt: skip`": 0,
}


@dataclass(frozen=True)
class Module:
    """One file and what is counted in it."""

    lines: list[str]
    tree: ast.Module
    comments: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Module":
        source = path.read_text(encoding="utf-8")
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
        return cls(source.splitlines(), ast.parse(source), comments)

    def statements(self) -> int:
        """Docstrings do not count, wherever they stand."""
        nodes = [node for node in ast.walk(self.tree) if isinstance(node, ast.stmt)]
        return len([node for node in nodes if not _is_text(node)])

    def imports(self) -> set[str]:
        """Dotted names of modules, and of what is imported from them, also inside functions."""
        found = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        return found

    def uses_of_any(self) -> int:
        """How often the name `Any` is used, its imports left out."""
        return len(
            [node for node in ast.walk(self.tree) if isinstance(node, ast.Name) and _is_any(node)]
        )

    def untyped_settings(self) -> int:
        """How many parameters are declared as `cfg: Any`."""
        arguments = [node for node in ast.walk(self.tree) if isinstance(node, ast.arg)]
        return len([arg for arg in arguments if arg.arg == "cfg" and _is_any(arg.annotation)])

    def long_lines(self) -> int:
        return len([line for line in self.lines if len(line) > MAX_LINE])

    def unformatted(self) -> int:
        """How many comments switch the formatter off."""
        return len([comment for comment in self.comments if "fmt: skip" in comment])


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _is_any(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Name) and node.id == "Any"


def read_modules(root: Path) -> dict[str, Module]:
    """Dotted name -> module, for every Python file below `root` outside hidden folders."""
    paths = [path.relative_to(root) for path in sorted(root.rglob("*.py"))]
    return {
        ".".join(path.with_suffix("").parts): Module.read(root / path)
        for path in paths
        if not any(part.startswith(".") for part in path.parts)
    }


def imported_by(name: str, modules: dict[str, Module]) -> Iterator[str]:
    """The module itself and every module of ours that it imports, directly or through others."""
    seen, waiting = set(), [name]
    while waiting:
        current = waiting.pop()
        if current in modules and current not in seen:
            seen.add(current)
            waiting += modules[current].imports()
            yield current


def measure(root: Path) -> dict[str, int]:
    """The numbers of `BUDGET`, in its order."""
    modules = read_modules(root)
    tests = {name: module for name, module in modules.items() if name.startswith("tests.")}
    product = {name: module for name, module in modules.items() if name not in tests}

    def total(count: Callable[[Module], int], among: dict[str, Module]) -> int:
        return sum(count(module) for module in among.values())

    def closure(name: str) -> int:
        return sum(product[found].statements() for found in imported_by(name, product))

    numbers = (
        total(Module.statements, product),
        total(Module.statements, tests),
        closure("main_pretrain"),
        closure("engine.optim"),
        total(Module.untyped_settings, product),
        total(Module.uses_of_any, product),
        total(Module.long_lines, modules),
        total(Module.unformatted, modules),
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
