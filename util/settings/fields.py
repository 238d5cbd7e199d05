"""What a setting is: a typed field with a description, a unit and bounds, and how text becomes its
value.

A stage's settings are one frozen pydantic class, composed by inheritance. A field is at once a YAML
key, a command-line flag and (for models) the constructor's keyword. Validation is strict, so that
`true` is never a number, but YAML reads `1e-3` as text and flags are text, so numbers, booleans and
null may come as text.
"""

import inspect
import types
import typing
from contextlib import suppress
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from util.files import expand_path

Text = Annotated[str, MinLen(1)]
PathText = Annotated[Text, AfterValidator(expand_path)]
Count = Annotated[int, Ge(1)]
Width = Annotated[int, Ge(4)]
CountOrZero = Annotated[int, Ge(0)]
Seed = Annotated[int, Ge(0), Le(2**31 - 1)]
Positive = Annotated[float, Gt(0)]
PositiveOrZero = Annotated[float, Ge(0)]
Probability = Annotated[float, Ge(0), Le(1)]
Share = Annotated[float, Gt(0), Le(1)]
ShareBelowOne = Annotated[float, Ge(0), Lt(1)]
OpenShare = Annotated[float, Gt(0), Lt(1)]
NOUNS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def setting(default: Any, help: str, *, unit: str = "", may_change: bool = False) -> Any:
    """A field with its description.

    `may_change` marks a setting that does not alter a run's result, so that a resumed run may
    change it; all others are compared on resume.
    """
    return Field(
        default, description=help, json_schema_extra={"unit": unit, "may_change": may_change}
    )


class Settings(BaseModel):
    """The base of every class of settings."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _convert(cls, raw: Any, info: ValidationInfo) -> Any:
        """Text as the value that it spells, and a list as a tuple."""
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        kinds = _kinds(annotation)
        if types.NoneType in kinds and str(raw).lower() in ("null", "none"):
            return None
        items = raw if isinstance(raw, list | tuple) else [raw]
        values = tuple(items if str in kinds else map(_spelled, items))
        if items is raw:
            return values or raw
        return values if typing.get_origin(annotation) is tuple else values[0]

    def problems(self) -> list[str]:
        """Values that are legal alone and wrong together: one line each, which begins with the
        setting's name."""
        return []


def is_list(field: FieldInfo) -> bool:
    """Whether a setting may have several values."""
    return tuple in _kinds(field.annotation)


def may_change(config_class: type[Settings]) -> set[str]:
    """The names of the settings that a resumed run may change."""
    return {name for name, field in config_class.model_fields.items() if _extra(field)["may_change"]}


def unit(field: FieldInfo) -> str:
    """The unit of a setting, empty for most."""
    return str(_extra(field)["unit"])


def expected(field: FieldInfo) -> str:
    """What a setting takes, for example `a number > 0 and <= 1, or null`."""
    return _describe(field.annotation, field.metadata)


def sections(config_class: type[Settings]) -> list[tuple[str, dict[str, FieldInfo]]]:
    """The fields of a stage grouped by the class that defines them, as (title, fields)."""
    left = dict(config_class.model_fields)
    found = []
    for cls in reversed(config_class.__mro__):  # parents first: Model, then Masked autoencoder
        # A stage that only gives a field another default leaves it in its parent's group.
        names = [name for name in inspect.get_annotations(cls) if name in left]
        if names:
            found.append((inspect.cleandoc(cls.__doc__ or ""), {n: left.pop(n) for n in names}))
    return found


def _extra(field: FieldInfo) -> dict[str, Any]:
    return typing.cast(dict[str, Any], field.json_schema_extra)


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that an annotation is made of, for example {int, tuple, NoneType}."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is None:
        return {annotation} - {...}
    if origin is Literal:
        return {str}
    if origin is Annotated:
        return _kinds(arguments[0])
    own = {tuple} if origin is tuple else set()
    return own.union(*map(_kinds, arguments))


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


def _describe(annotation: Any, metadata: typing.Sequence[Any] = ()) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _describe(arguments[0], arguments[1:])
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is tuple:
        count = "a list" if Ellipsis in arguments else f"{len(arguments)} values"
        return f"{count} of which each is {_describe(arguments[0])}"
    if arguments:
        names = [_describe(argument) for argument in arguments if argument is not types.NoneType]
        return ", or ".join([*names, "null"] if types.NoneType in arguments else names)
    bounds = [
        f"{sign} {getattr(bound, word):.10g}"
        for bound in metadata
        for word, sign in SIGNS.items()
        if hasattr(bound, word)
    ]
    return " ".join([NOUNS[annotation], " and ".join(bounds)]).rstrip()
