"""The linear codec: rows as small integers in a basis fitted to a pilot, with a bound on the error of every row."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from redistill_cache.codecs.backend import Array, Backend, backend_of, encodable, to_numpy
from redistill_cache.codecs.device_search import encode_on_device
from redistill_cache.codecs.linear_decode import ESCAPE_LIMIT, ESCAPED, EXACT, LinearDecoder, Packing, packing_flaw
from redistill_cache.codecs.linear_encode import LinearSettings, Quantizer, encode_linear
from redistill_cache.codecs.protocol import Encoded
from redistill_cache.codecs.stats import Centre, row_errors
from redistill_cache.errors import Damaged
from redistill_cache.limits import MAX_RANK
from redistill_cache.spec import ArraySpec
from redistill_cache.strict_json import Fields, Json

__all__ = ["LinearCodec"]

# Chunks of many rows, so that the 128 KiB that share a Huffman table of zstd cover few columns: with 8192 rows a
# thousand classes take 4 % fewer bytes than with 2048. zstd level 1 takes up to 1.5 % more bytes than level 19, whose
# time is spent once; levels 3 to 15 take more than level 1 (bench/codecs.py).
CHUNK_ROWS, CHUNK_BYTES = 8192, 1 << 22
ZSTD_LEVEL = 19
PREPARING = threading.Lock()


@dataclass(frozen=True)
class LinearCodec:
    """The codec of this module; `source` is the origin of its basis: "svd" or "head"."""

    decoder: LinearDecoder
    settings: LinearSettings
    source: str
    name: str = "linear"
    # Cached per device: the encoder's constants take seconds for wide rows.
    _quantizers: dict[str, Quantizer] = field(init=False, default_factory=dict, repr=False, compare=False)

    full_rows = True

    @property
    def width(self) -> int:
        return self.decoder.width

    @property
    def keeps_shift(self) -> bool:
        return self.settings.keep_shift or self.settings.metric != "kl"

    @property
    def largest(self) -> float:
        """A bound on the magnitude of every row that is not stored exactly, whatever its bytes and escapes are."""
        packing, matrix = self.decoder.packing, self.decoder.matrix
        digits = np.maximum(np.abs(packing.lowest), np.abs(packing.lowest + packing.reach - 1))
        coefficients = digits + (ESCAPE_LIMIT + 1.0) * packing.reach
        values = np.maximum(matrix.max(axis=1, initial=0.0), -matrix.min(axis=1, initial=0.0)).astype(np.float64)
        return float(coefficients @ values + np.abs(self.decoder.offset).max(initial=0.0))

    @property
    def sparse(self) -> frozenset[str]:
        return frozenset({"escape", "exact"})

    @property
    def centre(self) -> Centre | None:
        """What the errors of features are relative to; None for logits, and for features of older archives."""
        settings = self.settings
        return Centre(self.decoder.offset, settings.floor) if settings.metric == "centred" else None

    def errors(self, exact: Array, decoded: Array) -> dict[str, np.ndarray]:
        return row_errors(exact, decoded, self.settings.metric, self.centre)

    def config(self) -> dict[str, Json]:
        packing = self.decoder.packing
        sizes = {"rank": packing.rank, "slots": len(packing.coefficient), "bytes": packing.width}
        return {**sizes, "basis": self.source, **self.settings.config()}

    def side(self) -> dict[str, np.ndarray]:
        decoder = self.decoder
        packing = decoder.packing
        arrays = {
            "basis_low": (decoder.integers & 0xFF).astype(np.uint8),
            "basis_high": (decoder.integers >> 8).astype(np.int8),
            "scale": decoder.scale,
            "step": decoder.step,
            "offset": decoder.offset,
            "spread": decoder.spread,
            "slot_coefficient": packing.coefficient,
            "slot_radix": packing.radix,
            "slot_low": packing.low,
            "slot_byte": packing.byte,
            "symbols": packing.symbols,
        }
        # A teacher with constant outputs needs no digits, and an array without elements is not stored.
        return {name: array for name, array in arrays.items() if array.size}

    def arrays(self) -> tuple[ArraySpec, ...]:
        rank, packed = self.decoder.rank, self.decoder.packing.width
        shift = (ArraySpec("shift", "float32", (), CHUNK_ROWS),) if self.settings.keep_shift else ()
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
        rows = encodable(rows)
        backend = backend_of(rows)
        if backend.on_host:  # numpy is faster than torch there
            rows, backend = to_numpy(rows), Backend()
        with PREPARING:  # threads share the constants of the first one
            if backend.key not in self._quantizers:
                self._quantizers[backend.key] = Quantizer(self.decoder, self.settings, backend).prepared()
        quantizer = self._quantizers[backend.key]
        if backend.torch is None:
            return encode_linear(quantizer, rows)
        with backend.without_autocast():
            return encode_on_device(quantizer, rows, self.encode)

    def decode(self, arrays: Mapping[str, Array]) -> Array:
        with backend_of(arrays["q"]).without_autocast():
            return self.decoder.decode(arrays)

    @classmethod
    def open(cls, width: int, config: Fields, side: Mapping[str, np.ndarray]) -> LinearCodec:
        """From an archive: `config` and `side` are untrusted."""
        rank = config.integer("rank", 1, MAX_RANK)
        slots = config.integer("slots", 0, 2 * rank)
        packed = config.integer("bytes", 1, max(slots, 1))
        source = config.choice("basis", ("svd", "head"))
        settings = LinearSettings.from_fields(config)
        vectors = {name: side_array(side, name, "float32", (rank,)) for name in ("scale", "step", "spread")}
        if any((values < 0).any() for values in vectors.values()):
            raise Damaged("expected steps, scales and spreads of codec linear of at least zero, found negative ones")
        low = side_array(side, "basis_low", "uint8", (rank, width)).astype(np.int16)
        high = side_array(side, "basis_high", "int8", (rank, width)).astype(np.int16)
        packing = Packing(
            rank,
            coefficient=side_array(side, "slot_coefficient", "uint16", (slots,)),
            radix=side_array(side, "slot_radix", "uint16", (slots,)),
            low=side_array(side, "slot_low", "int16", (slots,)),
            byte=side_array(side, "slot_byte", "uint16", (slots,)),
            symbols=side_array(side, "symbols", "uint8", (packed, 256)),
        )
        flaw = packing_flaw(packing)
        if flaw:
            raise Damaged(f"expected digits of codec linear that fit their bytes, found {flaw}")
        decoder = LinearDecoder(
            integers=high * 256 + low,
            scale=vectors["scale"],
            step=vectors["step"],
            offset=side_array(side, "offset", "float32", (width,)),
            spread=vectors["spread"],
            packing=packing,
        )
        if not np.isfinite(decoder.matrix).all():
            raise Damaged("expected a finite basis of codec linear, found steps and scales whose product overflows")
        return cls(decoder, settings, source)


def side_array(side: Mapping[str, np.ndarray], name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array of side data: finite, and of exactly this dtype and shape. Arrays without elements are not stored."""
    array = side.get(name)
    if array is None and 0 in shape:
        return np.zeros(shape, dtype)
    if not isinstance(array, np.ndarray):
        raise Damaged(f"expected side array {name!r} of codec linear, found none")
    if array.dtype != np.dtype(dtype) or array.shape != shape:
        raise Damaged(
            f"expected side array {name!r} of codec linear as {dtype} {list(shape)}, "
            f"found {array.dtype} {list(array.shape)}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise Damaged(f"expected finite values in side array {name!r} of codec linear, found NaN or Inf")
    return array


def _chunk_rows(row_bytes: int) -> int:
    """Callers pass a multiple of the row size for sparse arrays: one row that needs them should not cost megabytes."""
    return max(1, min(CHUNK_ROWS, CHUNK_BYTES // row_bytes))
