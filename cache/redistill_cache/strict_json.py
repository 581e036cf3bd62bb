"""JSON: canonical when written, strict and capped when read, and validated field by field.

Canonical: sorted keys, no white space, UTF-8 without needless escapes, finite numbers. The same value always gives the
same bytes, so that bytes can be compared and hashed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import numpy as np

from redistill_cache.errors import RedistillError, Refused, UsageError
from redistill_cache.limits import MAX_DESCRIPTION_BYTES, MAX_DESCRIPTION_DEPTH, MAX_JSON_DEPTH, MAX_JSON_VALUES

__all__ = ["Fields", "Json", "canonical", "json_copy", "parse"]

Json = Any  # None, bool, int, float, str, list[Json], dict[str, Json]; recursive aliases defeat mypy's narrowing

INT_LIMIT = 2**63


def canonical(value: Json) -> bytes:
    """The canonical bytes of a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def json_copy(value: object, where: str) -> Json:
    """A description as it will be read back (tuples become lists); UsageError when it is not JSON or too long."""
    try:
        data = canonical(_plain(value))
        _check_extent(data, MAX_DESCRIPTION_DEPTH)
    except (TypeError, ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise UsageError(f"{where} must be plain JSON with finite numbers: {error}") from None
    if len(data) > MAX_DESCRIPTION_BYTES:
        raise UsageError(f"{where} must be at most {MAX_DESCRIPTION_BYTES} bytes of JSON, found {len(data)}")
    return json.loads(data)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("a key is not a string")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def parse(data: bytes, *, cap: int, where: str) -> Json:
    """Parse untrusted JSON. `Refused` unless it is one well-formed value within the limits."""
    if len(data) > cap:
        raise Refused(f"{where}: {len(data)} bytes of JSON, more than the limit of {cap}; not read")
    try:
        _check_extent(data, MAX_JSON_DEPTH)
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_bounded,
        )
        if b"\\u" in data:
            canonical(value)  # an escape may be half of a surrogate pair, which no UTF-8 can encode
        return value
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise Refused(f"{where}: invalid JSON ({str(error)[:120]})") from None


# A JSON string, or an unterminated one. Possessive, so that no input causes backtracking.
TEXT = re.compile(rb'"(?:[^"\\]++|\\.?)*+(?:"|\Z)', re.DOTALL)
STEP = np.zeros(256, np.int8)
STEP[list(b"{[")], STEP[list(b"}]")] = 1, -1


def _check_extent(data: bytes, max_depth: int) -> None:
    """Count values and levels before any Python object is created. ValueError when there are too many."""
    if data.count(b'"') > 4 * MAX_JSON_VALUES:  # a key and a value, two quotes each
        raise ValueError(f"more than {MAX_JSON_VALUES} values, the limit")
    bare = TEXT.sub(b"", data)
    values = 1 + bare.count(b",") + bare.count(b"{") + bare.count(b"[")
    if values > MAX_JSON_VALUES:
        raise ValueError(f"{values} values, more than the limit of {MAX_JSON_VALUES}")
    depth = int(STEP[np.frombuffer(bare, np.uint8)].cumsum(dtype=np.int32).max(initial=0))
    if depth > max_depth:
        raise ValueError(f"nested {depth} deep, more than the limit of {max_depth}")


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is not finite")
    return number


def _bounded(text: str) -> int:
    if len(text) > 20 or not -INT_LIMIT <= (number := int(text)) < 2 * INT_LIMIT:
        raise ValueError("an integer does not fit 64 bits")
    return number


class Fields:
    """Typed access to an untrusted JSON object; all untrusted values are validated with it.

    An invalid field raises `error` (`Refused`, `Damaged` or `UsageError`) with its name, what was expected and what was
    found. After all expected fields have been read, `done()` refuses any others.
    """

    def __init__(self, value: Json, where: str, error: type[RedistillError] = Refused) -> None:
        self._where = where
        self._error = error
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise error(f"{where}: expected an object, found {_show(value)}")
        self._value = value
        self._read: set[str] = set()

    def _take(self, key: str, kind: type | tuple[type, ...], expected: str) -> Json:
        if key not in self._value:
            raise self._error(f"{self._where}: {key!r} is missing")
        self._read.add(key)
        value = self._value[key]
        # bool is an int to Python, not to JSON.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.refuse(key, expected)
        return value

    def refuse(self, key: str, expected: str) -> NoReturn:
        raise self._error(f"{self._where}: {key!r} must be {expected}, found {_show(self._value[key])}")

    def __contains__(self, key: str) -> bool:
        return key in self._value

    def integer(self, key: str, low: int, high: int) -> int:
        expected = f"an integer from {low} to {high}"
        value: int = self._take(key, int, expected)
        if not low <= value <= high:
            self.refuse(key, expected)
        return value

    def number(self, key: str, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number."""
        bounded = math.isfinite(low) and math.isfinite(high)
        expected = f"a number from {low:g} to {high:g}" if bounded else "a finite number"
        value = self._take(key, (int, float), expected)
        if not _is_finite(value) or not low <= value <= high:
            self.refuse(key, expected)
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of exactly `count` finite numbers."""
        expected = f"a list of {count} finite numbers"
        values = self._take(key, (list, tuple), expected)
        if len(values) != count or not all(
            isinstance(v, int | float) and not isinstance(v, bool) and _is_finite(v) for v in values
        ):
            self.refuse(key, expected)
        return tuple(float(value) for value in values)

    def choice(self, key: str, choices: Collection[str]) -> str:
        expected = " or ".join(choices)
        value: str = self._take(key, str, expected)
        if value not in choices:
            self.refuse(key, expected)
        return value

    def flag(self, key: str) -> bool:
        value: bool = self._take(key, bool, "true or false")
        return value

    def text(self, key: str, cap: int) -> str:
        value: str = self._take(key, str, "a string")
        if len(value) > cap:
            self.refuse(key, f"a string of at most {cap} characters")
        return value

    def mapping(self, key: str) -> dict[str, Json]:
        value: dict[str, Json] = self._take(key, dict, "an object")
        return value

    def items(self, key: str, cap: int) -> list[Json]:
        value: list[Json] = self._take(key, list, "a list")
        if len(value) > cap:
            self.refuse(key, f"a list of at most {cap} items")
        return value

    def texts(self, key: str, cap: int) -> tuple[str, ...]:
        values = self.items(key, cap)
        if not all(isinstance(item, str) for item in values):
            self.refuse(key, "a list of strings")
        return tuple(values)

    def integers(self, key: str, cap: int) -> tuple[int, ...]:
        values = self.items(key, cap)
        if not all(type(item) is int for item in values):
            self.refuse(key, "a list of integers")
        return tuple(values)

    def is_null(self, key: str) -> bool:
        """Whether the field exists and is null; it then counts as read."""
        if key in self._value and self._value[key] is None:
            self._read.add(key)
            return True
        return False

    def done(self, *, ignore_unknown: bool = False) -> None:
        """Refuse fields that were not read, unless a newer minor version may have added them."""
        unknown = sorted(set(self._value) - self._read)
        if unknown and not ignore_unknown:
            raise self._error(f"{self._where}: unknown field {unknown[0][:80]!r}")


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond the range of floats, which TOML allows
        return False


def _show(value: Json) -> str:
    """A short, printable form of any value."""
    if isinstance(value, dict | list):
        return f"{type(value).__name__} of {len(value)}"
    return ascii(value)[:60]
