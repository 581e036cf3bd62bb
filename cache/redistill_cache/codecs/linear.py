"""The linear codec: rows as small integers in a basis, fitted to a pilot, with a bound on what every row loses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from redistill_cache.codecs.checks import MAX_RANK, Config, check_width, side_array
from redistill_cache.codecs.linear_decode import ESCAPED, EXACT, LinearDecoder, Packing, packing_flaw
from redistill_cache.codecs.linear_encode import encode_linear
from redistill_cache.codecs.protocol import Encoded, Json
from redistill_cache.codecs.rounding import LinearSettings
from redistill_cache.codecs.space import Array
from redistill_cache.errors import Damaged
from redistill_cache.spec import ArraySpec

__all__ = ["LinearCodec"]

# Many rows to a chunk, so that the 128 KiB that share one Huffman table of zstd are few columns: at 8192 rows a
# thousand classes take 4 % less than at 2048. Level 3 takes 2 % more than level 19, which is paid once.
CHUNK_ROWS, CHUNK_BYTES = 8192, 1 << 22
ZSTD_LEVEL = 19


@dataclass(frozen=True)
class LinearCodec:
    """`synthesis` is what decodes, `policy` is how the encoder decides."""

    synthesis: LinearDecoder
    policy: LinearSettings
    source: str
    name: str = "linear"

    full_rows = True
    tail_rule = ""

    @property
    def width(self) -> int:
        return self.synthesis.width

    @property
    def rare(self) -> frozenset[str]:
        return frozenset({"escape", "exact"})

    def config(self) -> dict[str, Json]:
        packing = self.synthesis.packing
        sizes = {"rank": packing.rank, "slots": len(packing.coefficient), "bytes": packing.width}
        return {**sizes, "basis": self.source, **self.policy.config()}

    def side(self) -> dict[str, np.ndarray]:
        synthesis = self.synthesis
        packing = synthesis.packing
        arrays = {
            "basis_low": (synthesis.integers & 0xFF).astype(np.uint8),
            "basis_high": (synthesis.integers >> 8).astype(np.int8),
            "scale": synthesis.scale,
            "step": synthesis.step,
            "offset": synthesis.offset,
            "spread": synthesis.spread,
            "slot_coefficient": packing.coefficient,
            "slot_radix": packing.radix,
            "slot_low": packing.low,
            "slot_byte": packing.byte,
            "symbols": packing.symbols,
        }
        # A teacher that always says the same needs no digits, and no array is stored without elements.
        return {name: array for name, array in arrays.items() if array.size}

    def arrays(self) -> tuple[ArraySpec, ...]:
        rank, packed = self.synthesis.rank, self.synthesis.packing.width
        shift = (ArraySpec("shift", "float32", (), CHUNK_ROWS),) if self.policy.keep_shift else ()
        return (
            ArraySpec("q", "uint8", (packed,), _chunk_rows(packed), transpose=True, level=ZSTD_LEVEL),
            ArraySpec("level", "uint8", (), CHUNK_ROWS, level=ZSTD_LEVEL),
            *shift,
            ArraySpec("escape", "int16", (rank,), _chunk_rows(8 * rank), level=ZSTD_LEVEL),
            ArraySpec("exact", "float32", (self.width,), _chunk_rows(16 * self.width)),
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
        slots = reader.integer("slots", 0, 2 * rank)
        width_of_packed = reader.integer("bytes", 1, max(slots, 1))
        source = reader.choice("basis", ("svd", "head"))
        policy = LinearSettings.read(reader)
        reader.done()
        vectors = {name: side_array("linear", side, name, "float32", (rank,)) for name in ("scale", "step", "spread")}
        if any((values < 0).any() for values in vectors.values()):
            raise Damaged("expected steps, scales and spreads of codec linear of at least zero, found negative ones")
        low = side_array("linear", side, "basis_low", "uint8", (rank, width)).astype(np.int16)
        high = side_array("linear", side, "basis_high", "int8", (rank, width)).astype(np.int16)
        synthesis = LinearDecoder(
            integers=high * 256 + low,
            scale=vectors["scale"],
            step=vectors["step"],
            offset=side_array("linear", side, "offset", "float32", (width,)),
            spread=vectors["spread"],
            packing=_open_packing(rank, slots, width_of_packed, side),
        )
        if not np.isfinite(synthesis.matrix).all():
            raise Damaged("expected a finite basis of codec linear, found steps and scales whose product overflows")
        return cls(synthesis, policy, source)


def _open_packing(rank: int, slots: int, width: int, side: Mapping[str, np.ndarray]) -> Packing:
    packing = Packing(
        rank,
        coefficient=side_array("linear", side, "slot_coefficient", "uint16", (slots,)),
        radix=side_array("linear", side, "slot_radix", "uint16", (slots,)),
        low=side_array("linear", side, "slot_low", "int16", (slots,)),
        byte=side_array("linear", side, "slot_byte", "uint16", (slots,)),
        symbols=side_array("linear", side, "symbols", "uint8", (width, 256)),
    )
    flaw = packing_flaw(packing)
    if flaw:
        raise Damaged(f"expected digits of codec linear that fit their bytes, found {flaw}")
    return packing


def _chunk_rows(row_bytes: int) -> int:
    """For rare arrays more bytes are claimed than there are: one row that needs them should not cost megabytes."""
    return max(1, min(CHUNK_ROWS, CHUNK_BYTES // row_bytes))
