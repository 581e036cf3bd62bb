"""Values that came as text, from a TOML file above all, against the types of the options they are for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from redistill_cache.errors import UsageError

__all__ = ["check_types"]

WORDS: Mapping[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
}


def check_types(given: Mapping[str, Any], options: type) -> None:
    """Refuse the first value that its field in the dataclass `options` cannot hold."""
    hints = type_hints(options)
    for name, value in given.items():
        if name in hints and not fits(value, hints[name]):
            raise UsageError(f"{name} must be {' or '.join(words(hints[name]))}, found {value!r}")


@cache
def type_hints(options: type) -> dict[str, Any]:
    return get_type_hints(options)


def fits(value: object, hint: Any) -> bool:  # noqa: ANN401  a type, a union or a tuple of one
    if hint is Any:  # an object, which comes from code and not from text
        return False
    if get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(fits(item, get_args(hint)[0]) for item in value)
    if get_args(hint):
        return any(fits(value, one) for one in get_args(hint))
    wider = {float: int | float, Path: str | Path}.get(hint, hint)
    return isinstance(value, wider) and (hint is bool or not isinstance(value, bool))


def words(hint: Any) -> list[str]:  # noqa: ANN401  as above
    if get_origin(hint) is tuple:
        return [f"a list, each {' or '.join(words(get_args(hint)[0]))}"]
    return [found for one in get_args(hint) or (hint,) if one in WORDS for found in (WORDS[one],)]
