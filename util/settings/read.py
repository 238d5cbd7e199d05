"""Reads a stage's settings: defaults < `base:` file < YAML file < command line.

The problems of all settings are reported together, before any compute. A name that no stage has is
an error that suggests the nearest valid name; a name that only another stage has is skipped with
one line, so that one YAML can serve k-NN and fine-tuning alike.
"""

import argparse
import difflib
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from util.errors import InputError, LineParser
from util.files import expand_path
from util.settings.base import LARGEST, Settings

MAX_BASE_FILES = 2  # a longer chain cannot be read at a glance
NOUNS = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "null": "null",
}
SIGNS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
Values = dict[str, object]  # by the settings' names
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
    schemas = config_class.model_json_schema()["properties"]
    parser = _parser(config_class, schemas)
    known, extra = parser.parse_known_args(argv)
    flags = vars(known)
    path, print_config = flags.pop("config"), flags.pop("print_config")
    unknown = [token for token in extra if token.startswith("-")] or extra  # without their values
    flags |= {token.split("=")[0].lstrip("-") or token: None for token in unknown}
    sources = ({} if path is None else _read_file(path)) | {"command line": flags}
    values = {name: value for content in sources.values() for name, value in content.items()}
    origin = {name: source for source, content in sources.items() for name in content}

    elsewhere = {name for sibling in siblings for name in sibling.model_fields}
    skipped = [name for name in values if name in elsewhere - config_class.model_fields.keys()]
    if skipped and os.environ.get("RANK", "0") == "0":
        logger.warning("skipped settings of other stages: %s", ", ".join(skipped))
    try:
        config = config_class.model_validate(
            {name: value for name, value in values.items() if name not in skipped}
        )
        problems = [*config.problems(), *(text for check in checks for text in check(config))]
    except ValidationError as error:
        # By name, as each way in which a value could be legal has an error of its own.
        wrong = {str(found["loc"][0]): found.get("ctx", {}) for found in error.errors()}
        problems = [
            f"{name} {_explanation(schemas, name, values[name], context.get('error'))}"
            f" ({origin[name]})"
            for name, context in wrong.items()
        ]
    if problems:
        head = f"{len(problems)} problems in the settings:\n  " if len(problems) > 1 else ""
        raise InputError(
            head + "\n  ".join(problems), settings=tuple(text.split()[0] for text in problems)
        )
    if getattr(config, "output_dir", "") is None:
        config = config.model_copy(
            update={"output_dir": f"output/{stage}/{Path(path or 'default').stem}"}
        )
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


def changed_settings(old: Values, config: Settings, skip: set[str]) -> list[str]:
    """The settings, less `skip`, that alter a run's result and differ from a checkpoint's, as
    `name: old -> new`. A setting that the checkpoint lacks, as it is older, had its default."""
    schemas = config.model_json_schema()["properties"]
    old = {name: schema["default"] for name, schema in schemas.items()} | old
    return differences(old, lasting_settings(config, skip))


def lasting_settings(config: Settings, skip: Collection[str] = ()) -> Values:
    """The settings, less `skip`, that alter a result, as JSON has them."""
    schemas = config.model_json_schema()["properties"]
    harmless = {name for name, schema in schemas.items() if schema["may_change"]}
    return config.model_dump(mode="json", exclude={*harmless, *skip})


def _parser(config_class: type[Settings], schemas: dict[str, dict[str, Any]]) -> LineParser:
    parser = LineParser(
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
    # The heading of a setting is that of the class which defines it first: a stage that only gives
    # it another default leaves it there.
    titles = {
        name: cls.__doc__ for cls in config_class.__mro__ for name in inspect.get_annotations(cls)
    }
    for title, settings in groupby(schemas.items(), lambda item: titles[item[0]]):
        group = parser.add_argument_group(title)
        for name, schema in settings:
            # as YAML spells it, but for the commas and quotes
            default = json.dumps(schema["default"], separators=(" ", "")).replace('"', "")
            default = default.strip("[]") or "empty"
            text = f"{schema['description']} ({_expected(schema)}; default {default})"
            is_switch = schema.get("type") == "boolean"
            group.add_argument(
                *(["-b"] if name == "batch_size" else []),
                f"--{name}",
                # A boolean flag alone is true; a list takes its values one after the other.
                nargs="?" if is_switch else "+" if "'array'" in str(schema) else None,
                const=True if is_switch else None,
                metavar="VALUE",
                help=text.replace("%", "%%"),
            )
    return parser


def _expected(schema: dict[str, Any]) -> str:
    """What a setting takes, for example `a number > 0 and <= 1, or null`."""
    if "anyOf" in schema:
        return ", or ".join(map(_expected, schema["anyOf"]))
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if schema["type"] == "array":
        count = f"{schema['maxItems']} values" if "maxItems" in schema else "one or more values"
        return f"{count}, each {_expected(schema.get('items') or schema['prefixItems'][0])}"
    bounds = [
        f"{sign} {schema[word]:.10g}"
        for word, sign in SIGNS.items()
        if abs(schema.get(word, LARGEST)) != LARGEST
    ]
    return f"{NOUNS[schema['type']]} {' and '.join(bounds)}".rstrip()


def _explanation(
    schemas: dict[str, dict[str, Any]], name: str, value: object, reason: object
) -> str:
    """What is wrong with a value, or with a name that is none; `reason` is that of a validator of
    ours."""
    if name not in schemas:
        near = difflib.get_close_matches(name, schemas, n=1)
        return f"is no setting, did you mean {near[0]}?" if near else "is no setting, see --help"
    return str(reason or f"must be {_expected(schemas[name])}, got {value!r}")


def _read_file(name: str, num_more: int = MAX_BASE_FILES) -> dict[str, Values]:
    """The contents of a flat YAML file and its chain of at most `num_more` `base:` files by their
    paths, the file itself last. Raises: InputError."""
    try:
        path = Path(expand_path(name))
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        content = {} if node is None else loader.construct_document(node)
        keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        wrong = {key for key in keys if keys.count(key) > 1 or key not in content}
        if wrong or not isinstance(content, dict):
            raise ValueError(
                f"expected a flat list of `key: value`, each key once, got {wrong or content}"
            )
        if "base" in content and not num_more:
            raise ValueError(f"it is one of more than {MAX_BASE_FILES} base: files in a chain")
    except (OSError, ValueError, LookupError, RecursionError, yaml.YAMLError) as error:
        raise InputError(
            f"config {name} cannot be read: {' '.join(str(error).split())}", settings=("config",)
        ) from error
    if isinstance(content.get("class_token"), bool):  # of an earlier version
        content.setdefault("class_tokens", int(content.pop("class_token")))
    base = content.pop("base", None)
    below = {} if base is None else _read_file(str(path.parent / str(base)), num_more - 1)
    return below | {str(path): content}
