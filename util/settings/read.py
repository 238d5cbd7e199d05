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
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from util.errors import InputError, LineParser
from util.files import expand_path
from util.settings.fields import Settings, expected, is_list, sections

STAGES = ("pretrain", "finetune", "lincls", "knn")  # all else is a tool
MAX_BASE_FILES = 2  # a longer chain cannot be read at a glance
Values = dict[str, Any]  # of a source, by the settings' names
Problem = tuple[str, str]  # (name of the setting, text)
SettingsT = TypeVar("SettingsT", bound=Settings)
logger = logging.getLogger(__name__)


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
    flags = {token.split("=")[0].lstrip("-"): None for token in extra if token.startswith("-")}
    flags |= vars(known)
    path, print_config = flags.pop("config"), flags.pop("print_config")
    problems: list[Problem] = []
    if extra and not extra[0].startswith("-"):
        problems = [(extra[0], f"command line: unexpected argument {extra[0]!r}")]
    sources: dict[str, Values] = {}
    try:
        if path is not None:
            _read_file(Path(expand_path(path)), sources)
    except ValueError as error:
        problems.append(("config", str(error)))
    sources["command line"] = {
        name: value[0] if isinstance(value, list) and len(value) == 1 else value
        for name, value in flags.items()
    }
    elsewhere = {name for sibling in siblings for name in sibling.model_fields}
    values: Values = {}
    for source, content in sources.items():
        own = _without(source, content, elsewhere - config_class.model_fields.keys())
        problems += _problems(source, own, config_class)
        values |= own
    if not problems:
        config = config_class.model_validate(values)
        if getattr(config, "output_dir", "") is None:
            folder = f"output/{stage}/{Path(path or 'default').stem}"
            config = config.model_copy(update={"output_dir": folder})
        together = [*config.problems(), *(text for check in checks for text in check(config))]
        problems = [(text.split()[0], text) for text in together]
    if problems:
        names, texts = zip(*problems, strict=True)
        head = f"{len(texts)} problems in the settings:\n  " if len(texts) > 1 else ""
        raise InputError(head + "\n  ".join(texts), settings=names)
    if print_config:
        sys.stdout.write(dump_config(config))
        parser.exit(0)
    return config


def dump_config(config: Settings) -> str:
    """The resolved settings as YAML, which `--config` reads again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differences(old: Values, new: Values) -> list[str]:
    """The entries of `new` that differ from `old`, as `name: old -> new`."""
    return [
        f"{name}: {old.get(name)} -> {value}"
        for name, value in new.items()
        if old.get(name) != value
    ]


def may_change(config_class: type[Settings]) -> set[str]:
    """The names of the settings that a resumed run may change."""
    extras = {name: field.json_schema_extra for name, field in config_class.model_fields.items()}
    return {name for name, extra in extras.items() if extra == {"may_change": True}}


def changed_settings(old: Values, config: Settings, skip: set[str]) -> list[str]:
    """The settings, less `skip`, that alter a run's result and differ from a checkpoint's, as
    `name: old -> new`."""
    exclude = may_change(type(config)) | skip
    return differences(old, config.model_dump(mode="json", exclude=exclude))


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
            # A boolean flag alone is true; a list takes its values one after the other.
            nargs = "?" if field.annotation is bool else "+" if is_list(field) else None
            const = True if field.annotation is bool else None
            group.add_argument(*flags, nargs=nargs, const=const, metavar="VALUE", help=_help(field))
    return parser


def _help(field: FieldInfo) -> str:
    values = field.default if isinstance(field.default, tuple) else [field.default]
    words = {"None": "null", "True": "true", "False": "false"}  # as YAML spells them
    default = " ".join(words.get(str(value), str(value)) for value in values)
    return f"{field.description} ({expected(field)}; default {default})".replace("%", "%%")


def _read_file(path: Path, sources: dict[str, Values]) -> None:
    """Adds a YAML file's content to `sources`, after that of its chain of `base:` files.

    Raises: ValueError for a file that cannot be used; those that name it are still added.
    """
    chain: dict[str, Values] = {}
    try:
        while str(path) not in chain:
            if len(chain) > MAX_BASE_FILES:
                raise ValueError(f"{path}: more than {MAX_BASE_FILES} base: files in a chain")
            content = chain[str(path)] = _read_yaml(path)
            base = content.pop("base", None)
            if base is None:
                return
            if not isinstance(base, str) or Path(base).is_absolute():
                raise ValueError(f"{path}: base must be a relative path, got {base!r}")
            path = path.parent / base
        raise ValueError(f"{path}: its chain of base: files comes back to itself")
    finally:
        sources.update(reversed(chain.items()))


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                text = f"key {key!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, text, node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> Values:
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


def _without(source: str, content: Values, names: set[str]) -> Values:
    """The values of a source without those of other stages, which one line names."""
    skipped = [name for name in content if name in names]
    if skipped and os.environ.get("RANK", "0") == "0":
        logger.warning("%s: skipped settings of other stages: %s", source, ", ".join(skipped))
    return {name: value for name, value in content.items() if name not in names}


def _problems(source: str, content: Values, config_class: type[Settings]) -> list[Problem]:
    """What is wrong with the names and the single values of a source, in its order."""
    errors = {}
    try:
        config_class.model_validate(content)
    except ValidationError as error:
        errors = {str(found["loc"][0]): found for found in error.errors(include_url=False)}
    problems = []
    for name in [name for name in content if name in errors]:
        if field := config_class.model_fields.get(name):
            own = errors[name].get("ctx", {}).get("error")  # raised by a validator of ours
            text = f"{name}: {own or f'expected {expected(field)}, got {content[name]!r}'}"
        else:
            near = difflib.get_close_matches(name, config_class.model_fields, n=1)
            hint = f", did you mean {near[0]!r}?" if near else "; see --help"
            text = f"unknown setting {name!r}{hint}"
        problems.append((name, f"{source}: {text}"))
    return problems
