"""Reads a stage's settings: dataclass defaults < `base:` file < YAML file < command line.

Every problem of every source is collected and reported in one go, before any compute. Names that no
stage knows are errors with the nearest valid name; names that only another stage knows are skipped
with one line, so that one YAML can serve k-NN and fine-tuning alike.
"""

import argparse
import dataclasses
import difflib
import logging
import os
import sys
import typing
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import yaml

from util.errors import InputError, LineParser
from util.settings.base import sections
from util.settings.values import check_range, convert, range_text

PROGRAMS = {
    stage: f"main_{stage}.py" for stage in ("pretrain", "finetune", "lincls", "knn")
}  # all else is a tool
MAX_BASE_HOPS = 2  # a longer chain cannot be read at a glance
logger = logging.getLogger(__name__)


class StageConfig(Protocol):
    """What `load_config` needs of a stage's dataclass."""

    __dataclass_fields__: typing.ClassVar[dict[str, dataclasses.Field[Any]]]

    def problems(self) -> list[str]: ...


ConfigT = TypeVar("ConfigT", bound=StageConfig)


def load_config(
    config_class: type[ConfigT],
    stage: str,
    argv: Sequence[str] | None = None,
    checks: Iterable[Callable[[ConfigT], list[str]]] = (),
    siblings: Iterable[type] = (),
) -> ConfigT:
    """Builds the frozen config of one stage, or of a tool, from a command line.

    `checks` return the problems that need knowledge of other packages (model geometry); `siblings`
    are the config classes of the other stages, whose keys are skipped. `--help` and
    `--print_config` print and exit with 0.

    Raises: InputError with every problem found, one per line.
    """
    parser = _parser(config_class, stage)
    known, extra = parser.parse_known_args(argv)
    given = {
        name: value[0] if isinstance(value, list) and len(value) == 1 else value
        for name, value in vars(known).items()
        if name not in ("config", "print_config")
    }
    problems = _unknown_flags(extra, config_class)
    layers: list[tuple[str, dict[str, Any]]] = []
    if known.config is not None:
        layers, file_problems = _read_layers(Path(known.config))
        problems += file_problems
    values: dict[str, Any] = {}
    if "output_dir" in config_class.__dataclass_fields__:
        values["output_dir"] = f"output/{stage}/{Path(known.config or 'default').stem}"
    sibling_names = {f.name for sibling in siblings for f in dataclasses.fields(sibling)}
    for source, content in [*layers, ("command line", given)]:
        problems += _merge(values, config_class, source, content, sibling_names)
    config = None
    if not problems:
        config = config_class(**values)
        problems = config.problems() + [problem for check in checks for problem in check(config)]
    if config is None or problems:
        head = f"{len(problems)} problems in the settings:\n  " if len(problems) > 1 else ""
        raise InputError(head + "\n  ".join(problems))
    if known.print_config:
        sys.stdout.write(dump_config(config))
        parser.exit(0)
    return config


def dump_config(config: StageConfig) -> str:
    """The resolved settings as YAML, loadable again with `--config`."""
    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False)


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Tuples as lists: plain values, as YAML and checkpoints hold them."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The entries of `new` that differ from `old`, as `name: old -> new`."""
    return [
        f"{name}: {old.get(name)} -> {value}"
        for name, value in new.items()
        if old.get(name) != value
    ]


def changed_settings(old: dict[str, Any], config: StageConfig, skip: set[str]) -> list[str]:
    """The settings, less `skip`, that alter a run's result and differ from a checkpoint's, as
    `name: old -> new`."""
    free = {f.name for f in dataclasses.fields(config) if f.metadata["may_change"]} | skip
    new = plain(dataclasses.asdict(config))
    return differences(
        with_defaults(old, config), {name: value for name, value in new.items() if name not in free}
    )


def with_defaults(old: dict[str, Any], config: StageConfig) -> dict[str, Any]:
    """An older run's settings, with those that did not exist then at their defaults."""
    return plain({f.name: f.default for f in dataclasses.fields(config)}) | old


def _parser(config_class: type, stage: str) -> LineParser:
    parser = LineParser(
        prog=PROGRAMS.get(stage, f"{stage}.py"),
        usage="%(prog)s [--config YAML] [--SETTING VALUE ...]",
        description="Settings come from defaults, then --config's `base:`, then --config, then these flags.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", default=None, metavar="YAML", help="recipe, see cfgs/")
    parser.add_argument(
        "--print_config", action="store_true", default=False, help="print the settings and exit"
    )
    hints = typing.get_type_hints(config_class)
    for title, section in sections(config_class):
        group = parser.add_argument_group(title)
        for f in section:
            names = ["-b", "--batch_size"] if f.name == "batch_size" else [f"--{f.name}"]
            group.add_argument(*names, metavar="VALUE", help=_help(f), **_arity(hints[f.name]))
    return parser


def _arity(annotation: Any) -> dict[str, Any]:
    """A boolean flag alone is true; a list takes its values one after the other: `--mean 0.5 0.5
    0.5`."""
    if annotation is bool:
        return {"nargs": "?", "const": True}
    members = typing.get_args(annotation) or (annotation,)
    is_list = typing.get_origin(annotation) is tuple or any(
        typing.get_origin(member) is tuple for member in members
    )
    return {"nargs": "+"} if is_list else {}


def _help(f: dataclasses.Field[Any]) -> str:
    meta = f.metadata
    default = (
        "null"
        if f.default is None
        else str(f.default).lower()
        if isinstance(f.default, bool)
        else f.default
    )
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    facts = [
        ", ".join(meta["choices"]),
        meta["unit"],
        range_text(meta["bounds"]),
        f"default {default}",
    ]
    return f"{meta['help']} ({'; '.join(fact for fact in facts if fact)})".replace("%", "%%")


def _unknown_flags(extra: list[str], config_class: type) -> list[str]:
    problems = []
    after_flag = False
    for token in extra:
        is_flag = token.startswith("-")
        if is_flag:
            problems.append(_unknown("command line", token.split("=")[0].lstrip("-"), config_class))
        elif not after_flag:
            problems.append(f"command line: unexpected argument {token!r}")
        after_flag = (is_flag and "=" not in token) or (after_flag and not is_flag)
    return problems


def _unknown(source: str, name: str, config_class: type) -> str:
    names = [f.name for f in dataclasses.fields(config_class)]
    near = difflib.get_close_matches(name, names, n=1)
    return f"{source}: unknown setting {name!r}" + (
        f", did you mean {near[0]!r}?" if near else "; see --help"
    )


def _read_layers(path: Path) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """The YAML file and its `base:` files, deepest base first, as (file name, content)."""
    layers: list[tuple[str, dict[str, Any]]] = []
    seen: list[Path] = []
    while True:
        if path.resolve() in seen:
            return layers, [f"{path}: its chain of base: files comes back to itself"]
        seen.append(path.resolve())
        if len(seen) > MAX_BASE_HOPS + 1:
            return layers, [f"{path}: more than {MAX_BASE_HOPS} base: files in a chain"]
        content, problem = _read_yaml(path)
        if problem:
            return layers, [problem]
        base = content.pop("base", None)
        layers.insert(0, (str(path), content))
        if base is None:
            return layers, []
        if not isinstance(base, str) or Path(base).is_absolute():
            return layers, [f"{path}: base must be a relative path, got {base!r}"]
        path = path.parent / base


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> tuple[dict[str, Any], str]:
    try:
        content = _StrictLoader(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        return {}, f"config {path}: {error.strerror}"
    except (yaml.YAMLError, ValueError) as error:
        return {}, f"config {path} is not valid YAML: {' '.join(str(error).split())}"
    if content is None:
        return {}, ""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        return {}, f"config {path} must be a flat list of `key: value` lines"
    return content, ""


def _merge(
    values: dict[str, Any],
    config_class: type,
    source: str,
    content: dict[str, Any],
    sibling_names: set[str],
) -> list[str]:
    """Converts one source's raw values into `values`; returns its problems."""
    problems = []
    skipped = []
    hints = typing.get_type_hints(config_class)
    by_name = {f.name: f for f in dataclasses.fields(config_class)}
    for name, raw in content.items():
        if name not in by_name:
            if name in sibling_names:
                skipped.append(name)
            else:
                problems.append(_unknown(source, name, config_class))
            continue
        try:
            value = convert(raw, hints[name])
            check_range(value, by_name[name])
        except ValueError as error:
            problems.append(f"{source}: {name}: {error}")
            continue
        if name != "output_dir" or value is not None:  # null keeps the default path
            values[name] = value
    if skipped and os.environ.get("RANK", "0") == "0":
        logger.warning("%s: skipped settings of other stages: %s", source, ", ".join(skipped))
    return problems
