"""Reads a stage's settings: defaults < `base:` file < YAML file < command line.

The problems of all sources are reported together, before any compute. A name that no stage has is
an error that suggests the nearest valid name; a name that only another stage has is skipped with
one line, so that one YAML can serve k-NN and fine-tuning alike.
"""

import argparse
import difflib
import logging
import os
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from util.errors import InputError, LineParser
from util.files import expand_path
from util.settings.fields import Settings, expected, is_list, may_change, sections, unit

STAGES = ("pretrain", "finetune", "lincls", "knn")  # all else is a tool
MAX_BASE_FILES = 2  # a longer chain cannot be read at a glance
SettingsT = TypeVar("SettingsT", bound=Settings)
logger = logging.getLogger(__name__)


class Problem(NamedTuple):
    """What is wrong with one setting."""

    setting: str
    text: str


class Source(NamedTuple):
    """A YAML file or the command line, and the raw values that it gives."""

    name: str
    values: dict[str, Any]


def load_config(
    config_class: type[SettingsT],
    stage: str,
    argv: Sequence[str] | None = None,
    checks: Iterable[Callable[[SettingsT], list[str]]] = (),
    siblings: Iterable[type[Settings]] = (),
) -> SettingsT:
    """The settings of one stage, or of a tool, from a command line.

    `checks` return the problems that need knowledge of other packages (a model's geometry), as
    `Settings.problems` does. `siblings` are the classes of the other stages, whose settings are
    skipped. `--help` and `--print_config` print and exit with 0.

    Raises: InputError with every problem, one per line, and the names of the settings.
    """
    parser = _parser(config_class, stage)
    known, extra = parser.parse_known_args(argv)
    given = vars(known)
    path, print_config = given.pop("config"), given.pop("print_config")
    single = {n: v[0] if isinstance(v, list) and len(v) == 1 else v for n, v in given.items()}

    problems = _unknown_flags(extra, config_class)
    sources, file_problems = _read_files(path) if path is not None else ([], [])
    problems += file_problems
    elsewhere = {name for sibling in siblings for name in sibling.model_fields}
    values: dict[str, Any] = {}
    for source in (*sources, Source("command line", single)):
        _skip(source, elsewhere - config_class.model_fields.keys())
        problems += _problems_of(source, config_class)
        values |= source.values
    if not problems:
        config = config_class.model_validate(values)
        if getattr(config, "output_dir", "") is None:
            folder = f"output/{stage}/{Path(path or 'default').stem}"
            config = config.model_copy(update={"output_dir": folder})
        texts = [*config.problems(), *(text for check in checks for text in check(config))]
        problems = [Problem(text.split()[0], text) for text in texts]
    if problems:
        head = f"{len(problems)} problems in the settings:\n  " if len(problems) > 1 else ""
        raise InputError(
            head + "\n  ".join(problem.text for problem in problems),
            settings=tuple(problem.setting for problem in problems),
        )
    if print_config:
        sys.stdout.write(dump_config(config))
        parser.exit(0)
    return config


def dump_config(config: Settings) -> str:
    """The resolved settings as YAML, which `--config` reads again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The entries of `new` that differ from `old`, as `name: old -> new`."""
    return [
        f"{name}: {old.get(name)} -> {value}"
        for name, value in new.items()
        if old.get(name) != value
    ]


def changed_settings(old: dict[str, Any], config: Settings, skip: set[str]) -> list[str]:
    """The settings, less `skip`, that alter a run's result and differ from a checkpoint's, as
    `name: old -> new`."""
    free = may_change(type(config)) | skip
    return differences(old, config.model_dump(mode="json", exclude=free))


def _parser(config_class: type[Settings], stage: str) -> LineParser:
    parser = LineParser(
        prog=f"main_{stage}.py" if stage in STAGES else f"{stage}.py",
        usage="%(prog)s [--config YAML] [--SETTING VALUE ...]",
        description="Settings come from defaults, then --config's `base:`, then --config, then "
        "these flags.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", default=None, metavar="YAML", help="Recipe, see cfgs/.")
    parser.add_argument(
        "--print_config", action="store_true", default=False, help="Print the settings and exit."
    )
    for title, fields in sections(config_class):
        group = parser.add_argument_group(title)
        for name, field in fields.items():
            flags = ["-b", "--batch_size"] if name == "batch_size" else [f"--{name}"]
            group.add_argument(*flags, metavar="VALUE", help=_help(field), **_arity(field))
    return parser


def _arity(field: FieldInfo) -> dict[str, Any]:
    """A boolean flag alone is true; a list takes its values one after the other: `--mean 0.5 0.5
    0.5`."""
    if field.annotation is bool:
        return {"nargs": "?", "const": True}
    return {"nargs": "+"} if is_list(field) else {}


def _help(field: FieldInfo) -> str:
    default = field.default
    values = default if isinstance(default, tuple) else [default]
    names = {None: "null", True: "true", False: "false"}
    shown = " ".join(names[v] if v is None or isinstance(v, bool) else str(v) for v in values)
    parts = [part for part in (unit(field), expected(field), f"default {shown}") if part]
    return f"{field.description} ({'; '.join(parts)})".replace("%", "%%")


def _unknown_flags(extra: list[str], config_class: type[Settings]) -> list[Problem]:
    problems = []
    after_flag = False
    for token in extra:
        is_flag = token.startswith("-")
        if is_flag:
            problems.append(_unknown("command line", token.split("=")[0].lstrip("-"), config_class))
        elif not after_flag:
            problems.append(Problem(token, f"command line: unexpected argument {token!r}"))
        after_flag = (is_flag and "=" not in token) or (after_flag and not is_flag)
    return problems


def _unknown(source: str, name: str, config_class: type[Settings]) -> Problem:
    near = difflib.get_close_matches(name, config_class.model_fields, n=1)
    hint = f", did you mean {near[0]!r}?" if near else "; see --help"
    return Problem(name, f"{source}: unknown setting {name!r}{hint}")


def _read_files(name: str) -> tuple[list[Source], list[Problem]]:
    """The YAML file and its `base:` files, the deepest base first, and what is wrong with them as
    files."""
    sources: list[Source] = []
    seen: set[str] = set()
    try:
        path = Path(expand_path(name))
        while True:
            if os.path.realpath(path) in seen:
                raise ValueError(f"{path}: its chain of base: files comes back to itself")
            if len(seen) > MAX_BASE_FILES:
                raise ValueError(f"{path}: more than {MAX_BASE_FILES} base: files in a chain")
            seen.add(os.path.realpath(path))
            values = _read_yaml(path)
            base = values.pop("base", None)
            sources.insert(0, Source(str(path), values))
            if base is None:
                return sources, []
            if not isinstance(base, str) or Path(base).is_absolute():
                raise ValueError(f"{path}: base must be a relative path, got {base!r}")
            path = path.parent / base
    except ValueError as error:
        return sources, [Problem("config", str(error))]


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    """The content of a flat YAML file. Raises: ValueError."""
    try:
        content = _StrictLoader(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise ValueError(f"config {path}: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError(f"config {path} is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"config {path} is not valid YAML: {text}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"config {path} must be a flat list of `key: value` lines")
    return content


def _skip(source: Source, names: set[str]) -> None:
    """Takes the settings of other stages out of a source, with one line that names them."""
    skipped = [name for name in source.values if name in names]
    for name in skipped:
        del source.values[name]
    if skipped and os.environ.get("RANK", "0") == "0":
        logger.warning(
            "%s: skipped settings of other stages: %s", source.name, ", ".join(skipped)
        )


def _problems_of(source: Source, config_class: type[Settings]) -> list[Problem]:
    """What is wrong with the names and the single values of a source, in its order."""
    try:
        config_class.model_validate(source.values)
    except ValidationError as error:
        # A value that fits none of several types has several errors.
        errors = {str(found["loc"][0]): found for found in error.errors(include_url=False)}
    else:
        return []
    problems = []
    for name, raw in source.values.items():
        if name not in config_class.model_fields:
            problems.append(_unknown(source.name, name, config_class))
        elif name in errors:
            own = errors[name].get("ctx", {}).get("error")  # of a validator of ours
            text = own or f"expected {expected(config_class.model_fields[name])}, got {raw!r}"
            problems.append(Problem(name, f"{source.name}: {name}: {text}"))
    return problems
