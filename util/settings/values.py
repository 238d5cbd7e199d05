"""Converts one raw setting, from YAML or from a command-line flag, to its field's type and
range."""

import difflib
import math
import types
import typing
from dataclasses import Field
from typing import Any

WORDS = {"min": ">=", "max": "<=", "above": ">", "below": "<"}


def convert(raw: Any, annotation: Any) -> Any:
    """`raw` as the annotated type: bool, int, float, str, tuple, or a union of these with None.

    PyYAML reads `1e-3` as a string and flags are strings, so numbers may come as strings.

    Raises: ValueError saying what was expected and what came.
    """
    members = (
        typing.get_args(annotation)
        if typing.get_origin(annotation) is types.UnionType
        else (annotation,)
    )
    if types.NoneType in members and (raw is None or str(raw).lower() in ("null", "none")):
        return None
    for member in members:
        try:
            return (
                _to_tuple(raw, member)
                if typing.get_origin(member) is tuple
                else _SCALARS[member](raw)
            )
        except (ValueError, KeyError, OverflowError):
            continue
    raise ValueError(f"expected {type_name(annotation)}, got {raw!r}")


def type_name(annotation: Any) -> str:
    """How `--help` and errors name a type."""
    if typing.get_origin(annotation) is types.UnionType:
        return " or ".join(type_name(member) for member in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        args = typing.get_args(annotation)
        item = {float: "numbers", int: "whole numbers", str: "texts"}[args[0]]
        return f"a list of {item}" if Ellipsis in args else f"{len(args)} {item}"
    return {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        types.NoneType: "null",
    }[annotation]


def range_text(bounds: dict[str, float | None]) -> str:
    """The legal range in words, for example `> 0, <= 1`."""
    return ", ".join(
        f"{WORDS[name]} {bound:.10g}" for name, bound in bounds.items() if bound is not None
    )


def check_range(value: Any, f: Field[Any]) -> None:
    """Raises ValueError where a converted value is none of the field's choices or outside its
    bounds."""
    choices = f.metadata["choices"]
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"expected one of {', '.join(choices)}, got {value!r}{hint}")
    bounds = f.metadata["bounds"]
    outside = {
        "min": float.__lt__,
        "max": float.__gt__,
        "above": float.__le__,
        "below": float.__ge__,
    }
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        for name, bound in bounds.items():
            if bound is not None and outside[name](float(number), float(bound)):
                raise ValueError(f"expected {range_text(bounds)}, got {number:.10g}")


def _to_bool(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, bool):
        return value
    raise ValueError


def _to_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError
    number = int(value)
    float(number)  # a number past every range fails here, not where it is compared
    return number


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _to_str(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _to_tuple(value: Any, annotation: Any) -> tuple[Any, ...]:
    args = typing.get_args(annotation)
    items = value if isinstance(value, list) else [value]
    if not items or (Ellipsis not in args and len(items) != len(args)):
        raise ValueError
    return tuple(_SCALARS[args[0]](item) for item in items)


_SCALARS: dict[Any, Any] = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str}
