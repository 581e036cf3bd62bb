"""Decoding of the linear codec: row = (k * step_of_level) @ basis + offset, the integers k packed into bytes.

**Levels.** Every row has a level: its step is 2**(-level / 8) of the coarsest. Two flags in the same byte mark rare
cases: coefficients outside their digits (array `escape`), and rows that no step brings within the bound (array `exact`,
float32 bit for bit).

**Packing.** zstd codes whole bytes with Huffman tables, one table for about 128 KiB. Stored one per byte, a coefficient
that is nearly always zero would cost a bit, and columns of different spread would share a table that fits none. So:

* A coefficient is a sum of *slots*, digits of small radix: k = sum(weight * (low + digit)). Nearly always it is one
  slot; a wide coefficient has two, the weight of the second being the radix of the first.
* A *byte* holds the digits of some slots in mixed radix, number = digit_0 + radix_0 * (digit_1 + radix_1 * ...), the
  product of the radices being at most 256. Bytes are filled so that all carry about the same information.
* What is stored is the rank of the number among all numbers of that byte, the most frequent first:
  `symbols[byte, rank]` is the number. Columns of bytes then have nearly the same distribution, and one Huffman table
  fits many.

The part of a coefficient outside its digits is its escape, an int16 in units of `reach` (the product of the
coefficient's radices). Few rows need escapes, and packing never clips a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from redistill_cache.codecs.backend import Array, Backend, backend_of
from redistill_cache.codecs.protocol import sparse_rows

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


LEVEL_MASK, ESCAPED, EXACT = 0x3F, 0x40, 0x80
LEVELS_PER_OCTAVE = 8
ESCAPE_LIMIT = 32767  # of an int16


@dataclass(frozen=True, eq=False)
class Packing:
    """How `rank` coefficients are packed into `width` bytes; slots are in the order of their bytes."""

    rank: int
    coefficient: np.ndarray  # uint16 [slots]
    radix: np.ndarray  # uint16 [slots], 2 to 256
    low: np.ndarray  # int16 [slots]
    byte: np.ndarray  # uint16 [slots], from 0 in ascending order
    symbols: np.ndarray  # uint8 [width, 256]
    # Cached per device. Not an argument, so that `replace` starts with an empty cache.
    _constants: dict[str, dict[str, Array]] = field(init=False, default_factory=dict, repr=False)

    @classmethod
    def empty(cls, rank: int) -> Packing:
        """Without digits, so every nonzero coefficient escapes. Fitting starts from it."""
        none = np.zeros(0, np.uint16)
        symbols = np.arange(256, dtype=np.uint8)[None]
        return cls(rank, none, none, none.astype(np.int16), none, symbols)

    @property
    def width(self) -> int:
        return len(self.symbols)

    @cached_property
    def weight(self) -> np.ndarray:
        """The weight of a slot's digit: the product of the radices of earlier slots of the same coefficient."""
        return _running_product(self.coefficient, self.radix)

    @cached_property
    def place(self) -> np.ndarray:
        """The weight of a slot's digit in the number of its byte."""
        return _running_product(self.byte, self.radix)

    @cached_property
    def reach(self) -> np.ndarray:
        """How many values of every coefficient the digits represent."""
        reach = np.ones(self.rank, np.int64)
        np.multiply.at(reach, self.coefficient, self.radix.astype(np.int64))
        return reach

    @cached_property
    def lowest(self) -> np.ndarray:
        """The smallest value of every coefficient that needs no escape."""
        lowest = np.zeros(self.rank, np.int64)
        np.add.at(lowest, self.coefficient, self.weight * self.low)
        return lowest

    @cached_property
    def decoded_slots(self) -> np.ndarray:
        """Slots in the order in which `digits` returns them: bytes of one slot first, then of two, ..."""
        counts = np.bincount(self.byte, minlength=self.width)
        return np.argsort(counts[self.byte], kind="stable")

    def split(self, backend: Backend, k: Array) -> tuple[Array, Array]:
        """Coefficients (float64 integers [n, rank]) as (part in the digits, escape), both float64."""
        constants = self._on(backend)
        escape = backend.floor((k - constants["lowest"]) / constants["reach"])
        return k - escape * constants["reach"], escape

    def pack(self, backend: Backend, k: Array) -> Array:
        """Coefficients within reach (float64 integers [n, rank]) as bytes [n, width]."""
        constants = self._on(backend)
        shifted = backend.cast(k - constants["lowest"], "int32")[:, constants["coefficient"]]
        digits = backend.floor_divide(shifted, constants["weight"]) % constants["radix"] * constants["place"]
        sums = backend.concatenate([backend.zeros((len(k), 1), "int32"), backend.running_sum(digits)], 1)
        numbers = sums[:, constants["ends"]] - sums[:, constants["starts"]]
        return backend.lookup(constants["ranks"], numbers + constants["rows"])

    def digits(self, backend: Backend, packed: Array) -> Array:
        """Bytes [n, width] as slot values `low + digit`, float32, in the order of `decoded_slots`."""
        constants = self._on(backend)
        values = backend.lookup(constants["values"], packed + constants["rows"])
        return backend.cast(backend.columns(values.reshape(len(packed), -1), constants["valued"]), "float32")

    def _on(self, backend: Backend) -> dict[str, Array]:
        if backend.key not in self._constants:
            ranks = np.empty_like(self.symbols)
            np.put_along_axis(ranks, self.symbols.astype(np.int64), np.arange(256, dtype=np.uint8)[None], axis=1)
            ends = np.cumsum(np.bincount(self.byte, minlength=self.width))
            values, valued = self._values()
            self._constants[backend.key] = {
                "lowest": backend.constant(self.lowest, "float64"),
                "reach": backend.constant(self.reach, "float64"),
                "coefficient": backend.constant(self.coefficient, "int64"),
                "weight": backend.constant(self.weight, "int32"),
                "radix": backend.constant(self.radix, "int32"),
                "place": backend.constant(self.place, "int32"),
                "ends": backend.constant(ends, "int64"),
                "starts": backend.constant(np.concatenate([[0], ends[:-1]]), "int64"),
                "rows": backend.constant(256 * np.arange(self.width), "int32"),
                "ranks": backend.constant(ranks.reshape(-1)),
                "values": backend.constant(values),
                "valued": backend.constant(valued),
            }
        return self._constants[backend.key]

    def _values(self) -> tuple[np.ndarray, np.ndarray]:
        """Of every byte and rank, the values of its slots [width * 256, m]; and where the `decoded_slots` are in it.

        Small integers, and m a power of two: numpy looks up items of 2, 4, 8 and 16 bytes several times faster.
        """
        counts = np.bincount(self.byte, minlength=self.width)
        within = np.arange(len(self.byte)) - (np.cumsum(counts) - counts)[self.byte]
        most = 1 << int(max(counts.max() - 1, 0)).bit_length()
        digits = self.symbols[self.byte] // self.place[:, None] % self.radix.astype(np.int64)[:, None]  # [slots, 256]
        values = np.zeros((self.width, 256, most), np.int32)
        values[self.byte, :, within] = digits + self.low[:, None]
        if np.abs(values).max() < 1 << 15:
            values = values.astype(np.int16)
        return values.reshape(-1, most), (self.byte.astype(np.int64) * most + within)[self.decoded_slots]


def _running_product(group: np.ndarray, radix: np.ndarray) -> np.ndarray:
    """Of every slot, the product of the radices of earlier slots of its group."""
    product = np.ones(int(group.max(initial=0)) + 1, np.int64)
    running = np.empty(len(group), np.int64)
    for index, (key, factor) in enumerate(zip(group.tolist(), radix.tolist(), strict=True)):
        running[index] = product[key]
        product[key] *= factor
    return running


def packing_flaw(packing: Packing) -> str | None:
    """A description of what makes an untrusted packing invalid, or None."""
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
    # At most eight slots, or the product could wrap around before it is compared.
    if np.bincount(packing.byte, minlength=1).max() > 8 or (packing.place * packing.radix > 256).any():
        return "a byte whose radices multiply to more than 256"
    if not (np.sort(packing.symbols, axis=1) == np.arange(256)).all():
        return "symbols that are not a permutation"
    return None


@dataclass(frozen=True, eq=False)
class LinearDecoder:
    """Side data of the codec as stored: all that decoding needs, and `spread`, which only encoding needs."""

    integers: np.ndarray  # int16 [r, width]
    scale: np.ndarray  # float32 [r]: basis = integers * scale
    step: np.ndarray  # float32 [r], of level 0
    offset: np.ndarray  # float32 [width]
    spread: np.ndarray  # float32 [r]: mean size of coefficients, in steps of level 0
    packing: Packing
    # Cached per device. Not an argument, so that `replace` starts with an empty cache.
    _constants: dict[str, dict[str, Array]] = field(init=False, default_factory=dict, repr=False)

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
        with np.errstate(over="ignore"):  # opening an archive checks that it is finite
            return (self.integers * row_scale[:, None]).astype(np.float32)

    def decode(self, arrays: Mapping[str, Array]) -> Array:
        """float32 rows from arrays q, level, shift if there is one, and escape and exact where rows need them."""
        packed, level = arrays["q"], arrays["level"]
        backend = backend_of(packed)
        constants = self._on(backend)
        multiplier = backend.lookup(constants["multiplier"], level & LEVEL_MASK)[:, None]
        digits = self.packing.digits(backend, packed)
        escaped, escape = sparse_rows(backend, arrays, "escape", level, ESCAPED)
        others = None
        if escaped is not None and escape is not None:
            escaped, others = self._add_escapes(backend, digits, escaped, escape)
        digits *= multiplier
        # By slot, not by coefficient: the rows of the matrix are in the order in which `digits` returns slots.
        rows = backend.affine(digits, constants["slots"], constants["offset"])
        if others is not None and len(others):
            rows[escaped] += (others * multiplier[escaped]) @ constants["matrix_without_slots"]
        if "shift" in arrays:
            rows += arrays["shift"][:, None]
        exact, exact_rows = sparse_rows(backend, arrays, "exact", level, EXACT)
        if exact is not None:
            rows[exact] = exact_rows
        return rows

    def _add_escapes(self, backend: Backend, digits: Array, index: Array, escape: Array) -> tuple[Array, Array]:
        """Add the escapes of rows `index` [m, rank] to the first digits of their coefficients, in place.

        Returns those of coefficients without digits [some, without], and the rows that they belong to.
        """
        constants = self._on(backend)
        if not backend.on_host:  # a GPU would be waited for to find the few coefficients that escape
            amount = backend.cast(escape, "float32") * constants["reach"]
            digits[index[:, None], constants["first_slots"]] += amount[:, constants["with_slots"]]
            return index, amount[:, constants["without_slots"]]
        row, coefficient = backend.nonzero(escape)
        amount = backend.cast(escape[row, coefficient], "float32") * constants["reach"][coefficient]
        place = constants["place"][coefficient]
        others = backend.zeros((len(index), len(constants["without_slots"])), "float32")
        if others.shape[1]:
            without = place < 0
            others[row[without], -1 - place[without]] = amount[without]
            row, place, amount = row[~without], place[~without], amount[~without]
        digits[index[row], place] += amount
        some = (others != 0).any(1)
        return index[some], others[some]

    def _on(self, backend: Backend) -> dict[str, Array]:
        """The constants of decoding on a device; copied there once."""
        if backend.key not in self._constants:
            packing = self.packing
            slots = packing.weight[:, None].astype(np.float32) * self.matrix[packing.coefficient]
            # The position of the first slot of every coefficient that has slots, in the order of `digits`.
            with_slots, first = np.unique(packing.coefficient, return_index=True)
            first_slots = np.argsort(packing.decoded_slots)[first]
            without_slots = np.setdiff1d(np.arange(self.rank), with_slots)
            # Of every coefficient, the position of its first slot; or -1 - n for the n-th of those without slots.
            place = np.empty(self.rank, np.int64)
            place[with_slots], place[without_slots] = first_slots, -1 - np.arange(len(without_slots))
            self._constants[backend.key] = {
                "slots": backend.constant(slots[packing.decoded_slots], "float32"),
                "offset": backend.constant(self.offset, "float32"),
                "multiplier": backend.constant(multipliers(), "float32"),
                "reach": backend.constant(packing.reach, "float32"),
                "with_slots": backend.constant(with_slots, "int64"),
                "first_slots": backend.constant(first_slots, "int64"),
                "place": backend.constant(place),
                "without_slots": backend.constant(without_slots, "int64"),
                "matrix_without_slots": backend.constant(self.matrix[without_slots], "float32"),
            }
        return self._constants[backend.key]


def multipliers() -> np.ndarray:
    """The step of every level in units of that of level 0."""
    return np.exp2(-np.arange(LEVEL_MASK + 1) / LEVELS_PER_OCTAVE)
