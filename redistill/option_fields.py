"""Options declared once, as dataclass fields: the command line, config.toml and Python callers share the definition.

    batch_size: int = field(default=128, metadata=option("Batch size over all processes.", at_least=1))

The annotation is the type: a Literal lists the choices, a tuple takes several values. The metadata hold the help text,
the limits, and how the option is spelled where that differs from the field. A field without a help text is not on the
command line.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from redistill_cache.errors import UsageError

from redistill.specs import TYPE_NAMES, did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["Option", "check_types", "check_values", "option", "options_of", "shown"]

LIMITS: Mapping[str, Callable[[Any, Any], bool]] = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}
# The Python types of a value in TOML for an option of a type, and the type's name in messages.
TYPES: Mapping[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), TYPE_NAMES[bool]),
    int: ((int,), TYPE_NAMES[int]),
    float: ((int, float), TYPE_NAMES[float]),
    str: ((str,), TYPE_NAMES[str]),
    Path: ((str, Path), "a path"),
}


def option(text: str, **details: object) -> Mapping[str, object]:
    """Field metadata of an option with this help text; `details` are the fields of Option that have defaults."""
    return {"help": text, **details}


class FieldType(NamedTuple):
    kind: type
    """bool, int, float, str or Path; of each value where there are several."""
    several: bool
    choices: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Option:
    """A field of an options dataclass, with its type and metadata."""

    field: str
    type: FieldType
    default: Any
    """MISSING where the option is required."""
    help: str = ""
    name: str = ""
    """The option's name where it is not the field's."""
    metavar: str = ""
    default_text: str = ""
    """What a default of None stands for."""
    positional: bool = False
    commas: bool = False
    """Several values are separated by commas; otherwise the option is repeated."""
    location: bool = False
    """A path or an address, which a file of others must not choose."""
    most: int = 1000
    """Of several values."""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    @property
    def flag(self) -> str:
        """The spelling on the command line."""
        name = (self.name or self.field).replace("_", "-")
        return name.upper() if self.positional else f"--{name}"

    def check(self, value: object) -> None:
        """Refuse a value outside the limits (NaN is outside any) or not among the choices."""
        if self.type.choices and value not in self.type.choices:
            raise UsageError(f"{self.flag} {shown(value)} is not known; {did_you_mean(str(value), self.type.choices)}")
        limits = {name: limit for name in LIMITS if (limit := getattr(self, name)) is not None}
        if not all(LIMITS[name](value, limit) for name, limit in limits.items()):
            expected = " and ".join(f"{name.replace('_', ' ')} {limit}" for name, limit in limits.items())
            raise UsageError(f"{self.flag} must be {expected}, found {shown(value)}")


def shown(value: object) -> str:
    """A value in an error message."""
    return f"{value!r:.80}"


@cache
def options_of(options: type) -> Mapping[str, Option]:
    """The fields of a dataclass by name, in order; those of a dataclass in it take the place of its field."""
    hints = get_type_hints(options)
    result: dict[str, Option] = {}
    for field in fields(options):
        if is_dataclass(hints[field.name]):
            result.update(options_of(hints[field.name]))
        else:
            kind = field_type(hints[field.name])
            result[field.name] = Option(field=field.name, type=kind, default=field.default, **field.metadata)
    return result


def field_type(hint: type) -> FieldType:
    """Of an annotation: a type, a Literal, a tuple of one of them, or a union that begins with one."""
    if get_origin(hint) is Literal:
        return FieldType(str, False, get_args(hint))
    if get_origin(hint) is tuple:
        return field_type(get_args(hint)[0])._replace(several=True)
    return field_type(get_args(hint)[0]) if get_args(hint) else FieldType(hint, False, ())


def check_types(values: Mapping[str, Any], options: type) -> None:
    """Refuse the first value, from TOML or the command line, of another type than its field."""
    for name, value in values.items():
        kind, several, _ = options_of(options)[name].type
        types, type_name = TYPES[kind]
        is_list = isinstance(value, list | tuple)
        items = value if is_list else [value]
        if is_list != several or not all(isinstance(i, types) and isinstance(i, bool) == (kind is bool) for i in items):
            raise UsageError(
                f"{name} must be {f'a list, each {type_name}' if several else type_name}, found {shown(value)}"
            )


def check_values(options: DataclassInstance) -> None:
    """Refuse the first value outside the limits or choices of its field."""
    known = options_of(type(options))
    for field in fields(options):
        value = getattr(options, field.name)
        if value is None or field.name not in known:
            continue
        items = value if isinstance(value, list | tuple) else (value,)
        option = known[field.name]
        if len(items) > option.most:
            raise UsageError(f"{option.flag} takes at most {option.most:,} values, found {len(items):,}")
        for item in items:
            option.check(item)
