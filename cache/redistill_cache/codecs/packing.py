"""Small integers in bytes by mixed radix, so that a coefficient with three likely values does not cost a whole byte.

A coefficient is an integer k = sum over its slots of weight * (digit - bias), plus `reach` times its escape. A slot is
a digit of some radix; consecutive slots share a byte as long as the product of their radices is at most 256:

    byte = digit_0 + radix_0 * (digit_1 + radix_1 * (digit_2 + ...)),    bias = radix // 2

zstd codes whole bytes, and never less than about a bit for a byte it does not match: packing five coefficients that are
nearly always zero into one byte is what brings the cost of each under a fifth of a bit.

A coefficient has one slot (radix 1 to 256), or two where the pilot needed more than a byte: radix 256 at weight 1, then
a smaller one at weight 256. `reach` is the product of its radices. What does not fit goes to the escape, an int16 of
an array that is all zeros but for the rows that say so: nothing is ever clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from redistill_cache.codecs.space import Array, Space

__all__ = ["ESCAPE_LIMIT", "Packing"]

ESCAPE_LIMIT = 32767


@dataclass(frozen=True)
class Packing:
    """How `len(low)` coefficients lie in `width` bytes. Radices of the first slots, and of the second (1: none)."""

    low: tuple[int, ...]
    high: tuple[int, ...]
    _tables: dict[str, list[tuple[int, int, Array]]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def covering(cls, largest: np.ndarray) -> Packing:
        """Room for every coefficient from -largest to largest."""
        need = 2 * np.asarray(largest, np.int64) + 1
        low = np.where(need > 256, 256, need)
        high = np.where(need > 256, np.minimum(2 * ((largest + 128) // 256) + 1, 255), 1)
        return cls(tuple(map(int, low)), tuple(map(int, high)))

    @cached_property
    def slots(self) -> tuple[tuple[int, int, int], ...]:
        """(coefficient, radix, weight) as stored: the second slots, then the first ones. Radix 1 takes no room."""
        first = [(k, radix, 1) for k, radix in enumerate(self.low) if radix > 1]
        second = [(k, radix, self.low[k]) for k, radix in enumerate(self.high) if radix > 1]
        return tuple(second + first)

    @cached_property
    def bytes_of_row(self) -> tuple[tuple[tuple[int, int, int], ...], ...]:
        """The slots of every byte."""
        packed: list[tuple[tuple[int, int, int], ...]] = []
        current: list[tuple[int, int, int]] = []
        product = 1
        for slot in self.slots:
            if current and product * slot[1] > 256:
                packed.append(tuple(current))
                current, product = [], 1
            current.append(slot)
            product *= slot[1]
        if current or not packed:
            packed.append(tuple(current))
        return tuple(packed)

    @property
    def width(self) -> int:
        return len(self.bytes_of_row)

    @cached_property
    def reach(self) -> np.ndarray:
        return np.asarray(self.low, np.int64) * np.asarray(self.high, np.int64)

    @cached_property
    def lowest(self) -> np.ndarray:
        """The smallest coefficient without an escape."""
        low, high = np.asarray(self.low, np.int64), np.asarray(self.high, np.int64)
        return -(low // 2) - low * (high // 2)

    def split(self, space: Space, k: Array) -> tuple[Array, Array]:
        """Coefficients (float64 integers [n, r]) as what the bytes hold and the escape, both float64."""
        lowest, reach = space.constant(self.lowest, "float64"), space.constant(self.reach, "float64")
        escape = space.floor((k - lowest) / reach)
        return k - escape * reach, escape

    def pack(self, space: Space, k: Array) -> Array:
        """Coefficients within reach (integers [n, r]) as bytes [n, width]."""
        k = space.cast(k, "int32")
        low = space.constant(np.asarray(self.low), "int32")
        shifted = k - space.constant(self.lowest, "int32")
        digits = (shifted % low, space.floor_divide(shifted, low))
        packed = space.zeros((len(k), self.width), "int32")
        for index, slots in enumerate(self.bytes_of_row):
            product = 1
            for coefficient, radix, weight in slots:
                packed[:, index] += product * digits[int(weight > 1)][:, coefficient]
                product *= radix
        return space.cast(packed, "uint8")

    def unpack(self, space: Space, packed: Array) -> Array:
        """Bytes [n, width] as coefficients, float32 [n, r], escapes not included."""
        pieces = []
        for start, stop, table in self._lookup(space):
            values = space.lookup(table, packed[:, start:stop])
            pieces.append(values.reshape(len(packed), (stop - start) * table.shape[1]))
        flat = space.concatenate(pieces, 1) if pieces else space.zeros((len(packed), 0), "float32")
        second = sum(1 for radix in self.high if radix > 1)
        first = flat[:, second:]
        if second == 0 and flat.shape[1] == len(self.low):
            return flat
        result = space.zeros((len(packed), len(self.low)), "float32")
        result[:, self._columns(space, self.low)] = first
        if second:
            columns = self._columns(space, self.high)
            result[:, columns] += 256.0 * flat[:, :second]
        return result

    def _columns(self, space: Space, radices: tuple[int, ...]) -> Array:
        return space.constant(np.flatnonzero(np.asarray(radices) > 1), "int64")

    def _lookup(self, space: Space) -> list[tuple[int, int, Array]]:
        """(first byte, end, table [256, slots]) for every run of bytes of one make."""
        if space.key not in self._tables:
            runs: list[tuple[int, int, Array]] = []
            makes = [tuple(radix for _, radix, _ in slots) for slots in self.bytes_of_row if slots]
            start = 0
            for index in range(1, len(makes) + 1):
                if index == len(makes) or makes[index] != makes[start]:
                    runs.append((start, index, space.constant(digit_table(makes[start]), "float32")))
                    start = index
            self._tables[space.key] = runs
        return self._tables[space.key]


def digit_table(radices: tuple[int, ...]) -> np.ndarray:
    """[256, slots]: the digits of every byte, less their bias; bytes past the product of the radices never occur."""
    columns = []
    rest = np.arange(256)
    for radix in radices:
        columns.append(rest % radix - radix // 2)
        rest = rest // radix
    return np.stack(columns, 1).astype(np.float32)


def packing_from_side(radices: Mapping[str, np.ndarray]) -> Packing:
    """From the side arrays radix_low and radix_high, already checked for shape and dtype."""
    return Packing(tuple(map(int, radices["radix_low"])), tuple(map(int, radices["radix_high"])))
