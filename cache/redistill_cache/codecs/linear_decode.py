"""Linear synthesis, the arithmetic of the linear codec: row = (k * step_of_level) @ basis + offset.

Every row has a level (its step is 2**(-level / 8) of the coarsest), and two flags for what hardly ever happens:
coefficients that did not fit their digits (array `escape`), and rows that no step brings within the bound (array
`exact`, float32 bit for bit).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from redistill_cache.codecs.protocol import rare_rows
from redistill_cache.codecs.space import Array, Space, space_of

__all__ = [
    "ESCAPED",
    "ESCAPE_LIMIT",
    "EXACT",
    "LEVELS_PER_OCTAVE",
    "LEVEL_MASK",
    "LinearDecoder",
    "Packing",
    "multipliers",
    "packing_flaw",
]


# -- packing ----------------------------------------------------------------------------------------------------------
#
# Small integers in bytes, several to a byte, so that zstd's order-0 coder comes close to their entropy.
#
# zstd codes whole bytes with Huffman tables, one table for about 128 KiB of them. Left alone, a coefficient that is
# nearly always zero costs a bit, and columns of different spread share a table that fits none. So:
#
# * A coefficient is a sum of *slots*, digits of small radix: k = sum(weight * (low + digit)). Nearly always it is
# one slot; a wide coefficient has two, of weights 1 and 256. * A *byte* holds the digits of some slots in mixed
# radix, number = digit_0 + radix_0 * (digit_1 + radix_1 * ...), the product of the radices being at most 256. Bytes
# are filled so that all carry about the same information. * What is stored is the rank of the number among all
# numbers of that byte, the likeliest first: `symbols[byte, rank]` is the number. Then columns of bytes have nearly
# the same distribution, and one Huffman table fits many.
#
# What lies outside the digits goes to the escape of the row, `reach` (the product of a coefficient's radices) times
# an int16 of an array that hardly any row uses: nothing is clipped by the packing.

ESCAPE_LIMIT = 32767


@dataclass(frozen=True, eq=False)
class Packing:
    """How `rank` coefficients lie in `width` bytes; slots are in the order of their bytes."""

    rank: int
    coefficient: np.ndarray  # uint16 [slots]
    radix: np.ndarray  # uint16 [slots], 2 to 256
    low: np.ndarray  # int16 [slots]
    byte: np.ndarray  # uint16 [slots], from 0 up, never down
    symbols: np.ndarray  # uint8 [width, 256]
    _constants: dict[str, dict[str, Array]] = field(default_factory=dict, repr=False)

    @classmethod
    def empty(cls, rank: int) -> Packing:
        """No digits at all: everything escapes. What fitting starts from."""
        none = np.zeros(0, np.uint16)
        symbols = np.arange(256, dtype=np.uint8)[None]
        return cls(rank, none, none, none.astype(np.int16), none, symbols)

    @property
    def width(self) -> int:
        return len(self.symbols)

    @cached_property
    def weight(self) -> np.ndarray:
        """What a slot's digit counts: the product of the radices of earlier slots of the same coefficient."""
        return _running_product(self.coefficient, self.radix)

    @cached_property
    def place(self) -> np.ndarray:
        """What a slot's digit counts in the number of its byte."""
        return _running_product(self.byte, self.radix)

    @cached_property
    def reach(self) -> np.ndarray:
        reach = np.ones(self.rank, np.int64)
        np.multiply.at(reach, self.coefficient, self.radix.astype(np.int64))
        return reach

    @cached_property
    def lowest(self) -> np.ndarray:
        """The smallest value of every coefficient without an escape."""
        lowest = np.zeros(self.rank, np.int64)
        np.add.at(lowest, self.coefficient, self.weight * self.low)
        return lowest

    @cached_property
    def decoded_slots(self) -> np.ndarray:
        """Slots in the order in which `digits` returns them: bytes of one slot first, then of two, ..."""
        counts = np.bincount(self.byte, minlength=self.width)
        return np.argsort(counts[self.byte], kind="stable")

    def split(self, space: Space, k: Array) -> tuple[Array, Array]:
        """Coefficients (float64 integers [n, rank]) as what the digits hold and the escape, both float64."""
        constants = self._on(space)
        escape = space.floor((k - constants["lowest"]) / constants["reach"])
        return k - escape * constants["reach"], escape

    def pack(self, space: Space, k: Array) -> Array:
        """Coefficients within reach (float64 integers [n, rank]) as bytes [n, width]."""
        constants = self._on(space)
        shifted = space.cast(k - constants["lowest"], "int32")[:, constants["coefficient"]]
        digits = space.floor_divide(shifted, constants["weight"]) % constants["radix"] * constants["place"]
        sums = space.concatenate([space.zeros((len(k), 1), "int32"), space.running_sum(digits)], 1)
        numbers = sums[:, constants["ends"]] - sums[:, constants["starts"]]
        return space.lookup(constants["ranks"], numbers + constants["rows"])

    def digits(self, space: Space, packed: Array) -> Array:
        """Bytes [n, width] as slot values `low + digit`, float32, in the order of `decoded_slots`."""
        pieces = []
        for columns, rows, table in self._tables(space):
            index = space.cast(packed[:, columns], "int32") + rows
            pieces.append(space.lookup(table, index).reshape(len(packed), -1))
        return space.concatenate(pieces, 1) if pieces else space.zeros((len(packed), 0), "float32")

    def unpack(self, space: Space, packed: Array) -> Array:
        """Bytes [n, width] as coefficients, float32 [n, rank], without escapes."""
        slots = np.zeros((len(self.coefficient), self.rank), np.float32)
        slots[np.arange(len(self.coefficient)), self.coefficient] = self.weight
        return self.digits(space, packed) @ space.constant(slots[self.decoded_slots])

    def _on(self, space: Space) -> dict[str, Array]:
        if space.key not in self._constants:
            ranks = np.empty_like(self.symbols)
            np.put_along_axis(ranks, self.symbols.astype(np.int64), np.arange(256, dtype=np.uint8)[None], axis=1)
            ends = np.cumsum(np.bincount(self.byte, minlength=self.width))
            self._constants[space.key] = {
                "lowest": space.constant(self.lowest, "float64"),
                "reach": space.constant(self.reach, "float64"),
                "coefficient": space.constant(self.coefficient, "int64"),
                "weight": space.constant(self.weight, "int32"),
                "radix": space.constant(self.radix, "int32"),
                "place": space.constant(self.place, "int32"),
                "ends": space.constant(ends, "int64"),
                "starts": space.constant(np.concatenate([[0], ends[:-1]]), "int64"),
                "rows": space.constant(256 * np.arange(self.width), "int32"),
                "ranks": space.constant(ranks.reshape(-1)),
            }
        return self._constants[space.key]

    def _tables(self, space: Space) -> list[tuple[Array, Array, Array]]:
        """For bytes of one slot, of two, ...: their columns, their first rows in the table, and the table of values."""
        key = "tables of " + space.key
        if key not in self._constants:
            counts = np.bincount(self.byte, minlength=self.width)
            self._constants[key] = {
                str(count): self._table(space, np.flatnonzero(counts == count))
                for count in np.unique(counts[counts > 0])
            }
        return list(self._constants[key].values())

    def _table(self, space: Space, columns: np.ndarray) -> tuple[Array, Array, Array]:
        slots = np.flatnonzero(np.isin(self.byte, columns)).reshape(len(columns), -1)
        numbers = self.symbols[columns].astype(np.int64)[:, :, None]  # [bytes, 256, 1]
        digits = numbers // self.place[slots][:, None] % self.radix[slots].astype(np.int64)[:, None]
        values = (digits + self.low[slots][:, None]).astype(np.float32)
        rows = space.constant(256 * np.arange(len(columns)), "int32")
        return space.constant(columns, "int64"), rows, space.constant(values.reshape(-1, slots.shape[1]))


def _running_product(group: np.ndarray, radix: np.ndarray) -> np.ndarray:
    """Of every slot, the product of the radices of earlier slots of its group."""
    product = np.ones(int(group.max(initial=0)) + 1, np.int64)
    running = np.empty(len(group), np.int64)
    for index, (key, factor) in enumerate(zip(group.tolist(), radix.tolist(), strict=True)):
        running[index] = product[key]
        product[key] *= factor
    return running


def packing_flaw(packing: Packing) -> str | None:
    """What is wrong with a packing that was read from somewhere, if anything."""
    slots = len(packing.coefficient)
    if slots and int(packing.coefficient.max()) >= packing.rank:
        return "a digit of a coefficient that does not exist"
    if slots and (int(packing.radix.min()) < 2 or int(packing.radix.max()) > 256):
        return "a radix that is not 2 to 256"
    if np.bincount(packing.coefficient, minlength=1).max() > 2:
        return "a coefficient of more than two digits"
    steps = np.diff(packing.byte.astype(np.int64), prepend=0)
    if slots and (int(packing.byte[0]) != 0 or (steps < 0).any() or (steps > 1).any()):
        return "digits that are not in the order of their bytes"
    if slots and int(packing.byte[-1]) != packing.width - 1:
        return "bytes without digits"
    # Of eight slots at most, or the product could wrap around before it is looked at.
    if np.bincount(packing.byte, minlength=1).max() > 8 or (packing.place * packing.radix > 256).any():
        return "a byte whose radices multiply to more than 256"
    if not (np.sort(packing.symbols, axis=1) == np.arange(256)).all():
        return "symbols that are not a permutation"
    return None


# -- synthesis --------------------------------------------------------------------------------------------------------

LEVEL_MASK, ESCAPED, EXACT = 0x3F, 0x40, 0x80
LEVELS_PER_OCTAVE = 8


@dataclass(frozen=True, eq=False)
class LinearDecoder:
    """Everything that decoding needs, as it is stored; and `spread`, which only the encoder looks at."""

    integers: np.ndarray  # int16 [r, width]
    scale: np.ndarray  # float32 [r]: basis = integers * scale
    step: np.ndarray  # float32 [r], of level 0
    offset: np.ndarray  # float32 [width]
    spread: np.ndarray  # float32 [r]: mean size of coefficients, in steps of level 0
    packing: Packing
    _constants: dict[str, dict[str, Array]] = field(default_factory=dict, repr=False)

    @property
    def rank(self) -> int:
        return len(self.step)

    @property
    def width(self) -> int:
        return len(self.offset)

    @cached_property
    def matrix(self) -> np.ndarray:
        """float32 [r, width]: steps of level 0 times the basis."""
        row_scale = self.scale.astype(np.float64) * self.step.astype(np.float64)
        with np.errstate(over="ignore"):  # whoever opens an archive checks that it is finite
            return (self.integers * row_scale[:, None]).astype(np.float32)

    def decode(self, arrays: Mapping[str, Array]) -> Array:
        """Arrays q, level (and shift; and where rows need them, escape and exact) to float32 rows."""
        packed, level = arrays["q"], arrays["level"]
        space = space_of(packed)
        constants = self.constants(space)
        multiplier = space.lookup(constants["multiplier"], level & LEVEL_MASK)[:, None]
        digits = self.packing.digits(space, packed)
        digits *= multiplier
        # Slots instead of coefficients: their rows of the matrix are in the order in which they come out of the bytes.
        rows = digits @ constants["slots"]
        escaped, escapes = rare_rows(space, arrays, "escape", level, ESCAPED)
        if escaped is not None:
            beyond = space.cast(escapes, "float32") * constants["reach"] * multiplier[escaped]
            rows[escaped] += beyond @ constants["matrix"]
        rows += constants["offset"]
        if "shift" in arrays:
            rows += arrays["shift"][:, None]
        exact, exact_rows = rare_rows(space, arrays, "exact", level, EXACT)
        if exact is not None:
            rows[exact] = exact_rows
        return rows

    def constants(self, space: Space) -> dict[str, Array]:
        """What decoding multiplies with, on the device of the space; copied there once."""
        if space.key not in self._constants:
            packing = self.packing
            slots = packing.weight[:, None].astype(np.float32) * self.matrix[packing.coefficient]
            self._constants[space.key] = {
                "matrix": space.constant(self.matrix, "float32"),
                "slots": space.constant(slots[packing.decoded_slots], "float32"),
                "offset": space.constant(self.offset, "float32"),
                "multiplier": space.constant(multipliers(), "float32"),
                "reach": space.constant(packing.reach, "float32"),
            }
        return self._constants[space.key]


def multipliers() -> np.ndarray:
    """The step of every level, relative to level 0."""
    return np.exp2(-np.arange(LEVEL_MASK + 1) / LEVELS_PER_OCTAVE)
