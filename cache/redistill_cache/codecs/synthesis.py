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

from redistill_cache.codecs.packing import Packing
from redistill_cache.codecs.rare import rare_rows
from redistill_cache.codecs.space import Array, Space, space_of

__all__ = ["ESCAPED", "EXACT", "LEVELS_PER_OCTAVE", "LEVEL_MASK", "Synthesis", "multipliers"]

LEVEL_MASK, ESCAPED, EXACT = 0x3F, 0x40, 0x80
LEVELS_PER_OCTAVE = 8


@dataclass(frozen=True, eq=False)
class Synthesis:
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
