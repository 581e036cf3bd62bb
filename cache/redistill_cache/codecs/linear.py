"""The linear codec: rows as small integers in a basis, fitted to a pilot, with a bound on what every row loses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from redistill_cache.arrays import ArraySpec
from redistill_cache.codecs.checks import MAX_RANK, Config, check_width, side_array
from redistill_cache.codecs.linear_encode import Policy, encode_linear
from redistill_cache.codecs.packing import Packing, packing_from_side
from redistill_cache.codecs.protocol import Encoded, Json
from redistill_cache.codecs.space import Array
from redistill_cache.codecs.synthesis import ESCAPED, EXACT, Synthesis
from redistill_cache.errors import Damaged

__all__ = ["LinearCodec"]

# Measured by bench/codecs.py: "Signal codecs" in FORMAT.md.
CHUNK_ROWS = 2048
ZSTD_LEVEL = 19


@dataclass(frozen=True)
class LinearCodec:
    """`synthesis` is what decodes, `policy` is how the encoder decides."""

    synthesis: Synthesis
    policy: Policy
    source: str
    name: str = "linear"

    @property
    def width(self) -> int:
        return self.synthesis.width

    @property
    def rare(self) -> frozenset[str]:
        return frozenset({"escape", "exact"})

    def config(self) -> dict[str, Json]:
        return {"rank": self.synthesis.rank, "basis": self.source, **self.policy.config()}

    def side(self) -> dict[str, np.ndarray]:
        synthesis = self.synthesis
        return {
            "basis_low": (synthesis.integers & 0xFF).astype(np.uint8),
            "basis_high": (synthesis.integers >> 8).astype(np.int8),
            "scale": synthesis.scale,
            "step": synthesis.step,
            "offset": synthesis.offset,
            "radix_low": np.asarray(synthesis.packing.low, np.uint16),
            "radix_high": np.asarray(synthesis.packing.high, np.uint16),
        }

    def arrays(self) -> tuple[ArraySpec, ...]:
        packed = self.synthesis.packing.width
        shift = (ArraySpec("shift", "float32", (), CHUNK_ROWS),) if self.policy.keep_shift else ()
        return (
            ArraySpec("q", "uint8", (packed,), CHUNK_ROWS, transpose=True, level=ZSTD_LEVEL),
            ArraySpec("level", "uint8", (), CHUNK_ROWS, level=ZSTD_LEVEL),
            *shift,
            ArraySpec("escape", "int16", (self.synthesis.rank,), CHUNK_ROWS),
            ArraySpec("exact", "float32", (self.width,), _rare_chunk_rows(self.width)),
        )

    def rows_needing(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        level = arrays["level"]
        return {"escape": (level & ESCAPED) != 0, "exact": (level & EXACT) != 0}

    def encode(self, rows: Array) -> Encoded:
        return encode_linear(self.synthesis, self.policy, rows)

    def decode(self, arrays: Mapping[str, Array]) -> Array:
        return self.synthesis.decode(arrays)

    @classmethod
    def open(cls, width: int, config: Mapping[str, Json], side: Mapping[str, np.ndarray]) -> LinearCodec:
        """From an archive: everything is checked."""
        check_width(width)
        reader = Config("linear", config)
        rank = reader.integer("rank", 1, MAX_RANK)
        source = reader.choice("basis", ("svd", "head"))
        policy = Policy.read(reader)
        reader.done()
        scale, step = (side_array("linear", side, name, "float32", (rank,)) for name in ("scale", "step"))
        if (scale < 0).any() or (step < 0).any():
            raise Damaged("expected steps and scales of codec linear to be at least zero, found negative ones")
        low = side_array("linear", side, "basis_low", "uint8", (rank, width)).astype(np.int16)
        high = side_array("linear", side, "basis_high", "int8", (rank, width)).astype(np.int16)
        offset = side_array("linear", side, "offset", "float32", (width,))
        synthesis = Synthesis(high * 256 + low, scale, step, offset, _open_packing(rank, side))
        if not np.isfinite(synthesis.matrix).all():
            raise Damaged("expected a finite basis of codec linear, found steps and scales whose product overflows")
        return cls(synthesis, policy, source)


def _open_packing(rank: int, side: Mapping[str, np.ndarray]) -> Packing:
    radices = {name: side_array("linear", side, name, "uint16", (rank,)) for name in ("radix_low", "radix_high")}
    low, high = radices["radix_low"], radices["radix_high"]
    if ((low < 1) | (low > 256) | (high < 1) | (high > 255) | ((high > 1) & (low != 256))).any():
        raise Damaged("expected radices of codec linear from 1 to 256, the second only above 256, found others")
    return packing_from_side(radices)


def _rare_chunk_rows(width: int) -> int:
    """Small enough that one exact row does not cost decoding many megabytes of zeros."""
    return max(1, min(CHUNK_ROWS, (1 << 20) // (4 * width)))
