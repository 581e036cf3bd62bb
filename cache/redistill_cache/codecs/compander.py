"""The compander: every logit is quantized separately, on a scale on which all classes weigh equally in KL.

It has no basis and no side data.

    v = exp((z - lse_T(z)) / (2 T)) = sqrt(softmax(z / T));   q = round(v / step),   z = 2 T log(q * step)

To second order, KL at T is twice the squared error of v, so a uniform step in v makes the best scalar quantizer, and
decoding is a table lookup. For teachers so confident that most probabilities become q = 0 it takes fewer bytes than the
linear codec (bench/results/small_classes.json); for most others it takes more. A row has a level (its step is
2**(-level / 4)); values above 255 need a second byte, `q_high`; q = 0 decodes as a quarter of a step. Rows that miss
the bound at every step are stored exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from redistill_cache.codecs.backend import Array, backend_of, to_numpy
from redistill_cache.codecs.protocol import Encoded, absent, exact_rows, sparse_rows
from redistill_cache.codecs.stats import check_finite, error_names, log_softmax, rounded_up, row_errors, top1_kept
from redistill_cache.spec import ArraySpec
from redistill_cache.strict_json import Fields, Json

__all__ = ["CompanderCodec", "fit_compander"]

LEVEL_MASK, WIDE, EXACT = 0x3F, 0x40, 0x80
LEVELS_PER_OCTAVE = 4
CHUNK_ROWS = 8192
ZSTD_LEVEL = 19
SCALES = (1, 2, 4)
STEPS = np.exp2(-np.arange(LEVEL_MASK + 1) / LEVELS_PER_OCTAVE)
FIRST_LEVEL = 4
ZERO_DECODES_AS = 0.25
GRID = 2.0**-40
# The last digits of a logarithm differ between machines: accept only rows that meet the bound on all of them.
MARGIN = 1.0 - 1e-3


@dataclass(frozen=True)
class CompanderCodec:
    """The codec of this module. Decoded rows are logits less their log-sum-exp at temperature `scale`."""

    width: int
    fidelity: float
    scale: int
    name: str = "compander"

    full_rows = True
    keeps_shift = False

    @property
    def sparse(self) -> frozenset[str]:
        return frozenset({"q_high", "exact"})

    def config(self) -> dict[str, Json]:
        return {"fidelity": self.fidelity, "scale": self.scale}

    def side(self) -> dict[str, np.ndarray]:
        return {}

    def arrays(self) -> tuple[ArraySpec, ...]:
        return (
            ArraySpec("q", "uint8", (self.width,), CHUNK_ROWS, transpose=True, level=ZSTD_LEVEL),
            ArraySpec("level", "uint8", (), CHUNK_ROWS, level=ZSTD_LEVEL),
            ArraySpec("q_high", "uint8", (self.width,), CHUNK_ROWS, transpose=True, level=ZSTD_LEVEL),
            ArraySpec("exact", "float32", (self.width,)),
        )

    def rows_needing(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"q_high": (arrays["level"] & WIDE) != 0, "exact": (arrays["level"] & EXACT) != 0}

    def encode(self, rows: Array) -> Encoded:
        check_finite(rows)
        backend = backend_of(rows)
        rows = backend.cast(rows, "float32")
        search = _LevelSearch(self, rows)
        while len(active := search.next_rows()):
            search.quantize(active)
        exact = ~(search.worst() <= 1.0)
        # Rows stored exactly are zero in all other arrays.
        q = backend.where(backend.constant(~exact)[:, None], search.q, search.q * 0)
        high = q // 256
        wide = to_numpy((high > 0).any(1))
        level = np.where(exact, EXACT, search.level | np.where(wide, WIDE, 0)).astype(np.uint8)
        arrays = {
            "q": backend.cast(q % 256, "uint8"),
            "level": backend.constant(level),
            "q_high": to_numpy(high).astype(np.uint8) if wide.any() else absent(tuple(q.shape), "uint8"),
            "exact": exact_rows(rows, exact),
        }
        errors = {name: np.where(exact, 0.0, values) for name, values in search.errors.items()}
        return Encoded(arrays, errors, exact, search.top1_kept | exact)

    def errors(self, exact: Array, decoded: Array) -> dict[str, np.ndarray]:
        return row_errors(exact, decoded, "kl")

    def decode(self, arrays: Mapping[str, Array]) -> Array:
        level = arrays["level"]
        backend = backend_of(level)
        q = backend.cast(arrays["q"], "float32")
        wide, high = sparse_rows(backend, arrays, "q_high", level, WIDE)
        if wide is not None:
            q[wide] += 256.0 * backend.cast(high, "float32")
        rows = self.dequantize(q, level)
        exact, values = sparse_rows(backend, arrays, "exact", level, EXACT)
        if exact is not None:
            rows[exact] = values
        return rows

    def dequantize(self, q: Array, level: Array) -> Array:
        """Numbers of steps (float32) to logits."""
        backend = backend_of(q)
        log_steps = backend.lookup(backend.constant(np.log2(STEPS), "float32"), level & LEVEL_MASK)
        octaves = backend.log2(backend.clip(q, ZERO_DECODES_AS, None)) + log_steps[:, None]
        return octaves * np.float32(2.0 * self.scale * np.log(2.0)).item()

    @classmethod
    def open(cls, width: int, config: Fields) -> CompanderCodec:
        return cls(width, config.number("fidelity", 1e-12, 1e3), config.integer("scale", 1, 16))


class _LevelSearch:
    """From coarse to fine, the first step of every row that meets the bound."""

    def __init__(self, codec: CompanderCodec, rows: Array) -> None:
        backend = backend_of(rows)
        self.codec = codec
        self.rows = rows
        # On a grid: the last digits of an exponential differ between machines.
        self.v = backend.rint(backend.exp(log_softmax(backend, rows, float(codec.scale)) / 2) / GRID) * GRID
        self.q = backend.zeros(tuple(rows.shape), "int32")
        self.level = np.full(len(rows), -1, np.int64)
        self.errors = {name: np.full(len(rows), np.inf) for name in error_names("kl")}
        self.top1_kept = np.zeros(len(rows), bool)

    def worst(self) -> np.ndarray:
        """The larger error of every row, in units of the bound."""
        worst: np.ndarray = np.max(list(self.errors.values()), axis=0)
        return worst / (self.codec.fidelity * MARGIN)

    def next_rows(self) -> np.ndarray:
        """Rows that miss the bound and have finer steps left, after setting their next level."""
        missing = np.flatnonzero(~(self.worst() <= 1.0) & (self.level < LEVEL_MASK))
        ratio = np.clip(self.worst()[missing], 1.0, 1e6)
        jump = np.floor(np.log2(ratio) * LEVELS_PER_OCTAVE / 2).astype(np.int64)
        started = self.level[missing] >= 0
        level = np.where(started, self.level[missing] + np.maximum(jump, 1), FIRST_LEVEL)
        self.level[missing] = np.minimum(level, LEVEL_MASK)
        return missing

    def quantize(self, index: np.ndarray) -> None:
        """Quantize rows `index` at their levels and measure their errors."""
        backend = backend_of(self.rows)
        chosen, level = backend.constant(index), self.level[index]
        q = backend.rint(self.v[chosen] / backend.constant(STEPS[level])[:, None])
        decoded = self.codec.dequantize(backend.cast(q, "float32"), backend.constant(level.astype(np.uint8)))
        rows = self.rows[chosen]
        for name, values in rounded_up(row_errors(rows, decoded, "kl")).items():
            self.errors[name][index] = values
        self.top1_kept[index] = top1_kept(rows, decoded)
        self.q[chosen] = backend.cast(q, "int32")


def fit_compander(rows: np.ndarray, fidelity: float) -> CompanderCodec:
    """The scale that needs the fewest bits on these rows."""
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), 512)).astype(np.int64)]
    codecs = [CompanderCodec(int(rows.shape[1]), fidelity, scale) for scale in SCALES]
    return min(codecs, key=lambda codec: _bits(codec, rows))


def _bits(codec: CompanderCodec, rows: np.ndarray) -> float:
    encoded = codec.encode(rows)
    q = encoded.arrays["q"].astype(np.int64) + 256 * encoded.arrays["q_high"].astype(np.int64)
    return float(np.log2(1.0 + q).sum() + 32 * codec.width * encoded.exact.sum())
