"""Strict reading of a codec's config and side data, which come from archives that strangers wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from redistill_cache.codecs.protocol import Json
from redistill_cache.errors import Damaged, Refused

__all__ = ["MAX_RANK", "MAX_WIDTH", "Config", "check_width", "side_array"]

MAX_WIDTH = 1 << 20
MAX_RANK = 1 << 13


def check_width(width: object) -> int:
    if type(width) is not int or not 1 <= width <= MAX_WIDTH:
        raise Refused(f"expected a signal of 1 to {MAX_WIDTH} values a row, found {str(width)[:40]!r}")
    return width


class Config:
    """A config being read: every key must be asked for once, and none may be left."""

    def __init__(self, codec: str, values: Mapping[str, Json]) -> None:
        if not isinstance(values, Mapping):
            raise Damaged(f"expected the config of codec {codec} to be an object, found {type(values).__name__}")
        self.codec = codec
        self.left = dict(values)

    def _take(self, key: str) -> Json:
        if key not in self.left:
            raise Damaged(f"expected {key!r} in the config of codec {self.codec}, found none")
        return self.left.pop(key)

    def integer(self, key: str, low: int, high: int) -> int:
        value = self._take(key)
        if type(value) is not int or not low <= value <= high:
            raise self._bad(key, f"an integer from {low} to {high}", value)
        return value

    def number(self, key: str, low: float, high: float) -> float:
        value = self._take(key)
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            raise self._bad(key, f"a number from {low:g} to {high:g}", value)
        return float(value)

    def flag(self, key: str) -> bool:
        value = self._take(key)
        if type(value) is not bool:
            raise self._bad(key, "true or false", value)
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        value = self._take(key)
        if not isinstance(value, str) or value not in choices:
            raise self._bad(key, " or ".join(choices), value)
        return value

    def done(self) -> None:
        if self.left:
            names = ", ".join(sorted(str(key)[:40] for key in self.left)[:5])
            raise Damaged(f"expected no further keys in the config of codec {self.codec}, found {names}")

    def _bad(self, key: str, expected: str, value: object) -> Damaged:
        found = repr(value)[:60]
        return Damaged(f"expected {key!r} of codec {self.codec} to be {expected}, found {found}")


def side_array(codec: str, side: Mapping[str, np.ndarray], name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """One array of side data, with exactly this dtype and shape, and finite. One without elements is not stored."""
    array = side.get(name)
    if array is None and 0 in shape:
        return np.zeros(shape, dtype)
    if not isinstance(array, np.ndarray):
        raise Damaged(f"expected side array {name!r} of codec {codec}, found none")
    if array.dtype != np.dtype(dtype) or array.shape != shape:
        raise Damaged(
            f"expected side array {name!r} of codec {codec} as {dtype} {list(shape)}, "
            f"found {array.dtype} {list(array.shape)}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise Damaged(f"expected finite values in side array {name!r} of codec {codec}, found NaN or Inf")
    return array
