"""What a setting is: a typed field with a description and bounds, and how text becomes its value.

A stage's settings are one frozen pydantic class, composed by inheritance. A field is at once a YAML
key, a command-line flag and (for models) the constructor's keyword. Validation is strict, so that
`true` is never a number; but YAML reads `1e-3` as text and flags are text, so numbers, booleans and
null may come as text.
"""

import inspect
from contextlib import suppress
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from util.files import expand_path

# Not plain `str`, as pydantic refuses the file names of Linux that are no UTF-8.
Text = Annotated[InstanceOf[str], MinLen(1)]
PathText = Annotated[Text, AfterValidator(expand_path)]
Count = Annotated[int, Ge(1)]
CountOrZero = Annotated[int, Ge(0)]
Width = Annotated[int, Ge(4)]
Seed = Annotated[int, Ge(0), Le(2**31 - 1)]
Positive = Annotated[float, Gt(0)]
PositiveOrZero = Annotated[float, Ge(0)]
Probability = Annotated[float, Ge(0), Le(1)]
Share = Annotated[float, Gt(0), Le(1)]
ShareBelowOne = Annotated[float, Ge(0), Lt(1)]
OpenShare = Annotated[float, Gt(0), Lt(1)]
NOUNS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def setting(default: Any, help: str, *, may_change: bool = False) -> Any:
    """A field with its description, which names the unit.

    `may_change` marks a setting that does not alter a run's result, so that a resumed run may
    change it; all others are compared on resume.
    """
    return Field(default, description=help, json_schema_extra={"may_change": may_change})


class Settings(BaseModel):
    """The base of every class of settings."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _convert(cls, raw: Any, info: ValidationInfo) -> Any:
        """Text as the value that it spells, and a list as a tuple."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = _parts(annotation)
        if NoneType in kinds and str(raw).lower() in ("null", "none"):
            return None
        items = raw if isinstance(raw, list | tuple) else [raw]
        values = tuple(items if kinds & {str, Literal} else map(_spelled, items))
        if items is raw:
            return values or raw
        return values if get_origin(annotation) is tuple else values[0]

    def problems(self) -> list[str]:
        """Values that are legal alone and wrong together: one line each, which begins with the
        setting's name."""
        return []


def where(*rows: tuple[object, str]) -> list[str]:
    """The texts whose condition holds."""
    return [text for condition, text in rows if condition]


def is_list(field: FieldInfo) -> bool:
    """Whether a setting may have several values."""
    return tuple in _parts(field.annotation)


def expected(field: FieldInfo) -> str:
    """What a setting takes, for example `a number > 0 and <= 1, or null`."""
    return _describe(field.annotation, tuple(field.metadata))


def sections(config_class: type[Settings]) -> list[tuple[str, dict[str, FieldInfo]]]:
    """The fields of a stage grouped by the class that defines them, as (title, fields)."""
    left = dict(config_class.model_fields)
    found = []
    for cls in reversed(config_class.__mro__):  # parents first: Model, then Autoencoder
        # A stage that only gives a field another default leaves it in its parent's group.
        names = [name for name in inspect.get_annotations(cls) if name in left]
        if names:
            found.append((str(cls.__doc__), {name: left.pop(name) for name in names}))
    return found


def _parts(annotation: Any) -> set[Any]:
    """Everything that an annotation is made of, for example `tuple`, `int`, `NoneType`."""
    parts = {annotation, get_origin(annotation)}
    return parts.union(*map(_parts, get_args(annotation)))


def _spelled(raw: Any) -> Any:
    """The number or the boolean that a text spells; anything else as it is."""
    value = raw
    if isinstance(raw, str):
        for read in (int, float, {"true": True, "false": False}.__getitem__):
            with suppress(ValueError, KeyError):
                value = read(raw.lower())
                break
    is_comparable = not isinstance(value, int) or abs(value) < 2**63
    return value if is_comparable else str(raw)


def _describe(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe(arguments[0], arguments[1:])
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is tuple:
        count = "one or more values" if ... in arguments else f"{len(arguments)} values"
        return f"{count}, each {_describe(arguments[0])}"
    if arguments:
        names = [_describe(argument) for argument in arguments if argument is not NoneType]
        return ", or ".join(names + ["null"] * (NoneType in arguments))
    bounds = [
        f"{sign} {getattr(bound, word):.10g}"
        for bound in metadata
        for word, sign in SIGNS.items()
        if hasattr(bound, word)
    ]
    return f"{NOUNS[annotation]} {' and '.join(bounds)}".rstrip()
