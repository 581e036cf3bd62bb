"""The compander: every value on its own, in a scale on which KL weighs all classes alike. No basis, no pilot.

    v = exp((z - lse_T(z)) / (2 T)) = sqrt(softmax(z / T));   q = round(v / step),   z = 2 T log(q * step)

KL at T is to second order twice the squared error of v, so a uniform step in v spends bits where they count: the best
codec that looks at one value at a time, and decoding is a table lookup. For few classes, or where no basis helps.
A row has a level (its step is 2**(-level / 4)); values past a byte use a second one, `q_high`; q = 0 stands for a
quarter of a step. What no step brings within the bound is stored exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from redistill_cache.codecs.checks import Config, check_width
from redistill_cache.codecs.protocol import Encoded, Json, absent, exact_rows, rare_rows
from redistill_cache.codecs.space import Array, space_of, to_numpy
from redistill_cache.codecs.stats import TEMPERATURES, check_finite, kl_rows, log_softmax, rounded_up
from redistill_cache.errors import Damaged
from redistill_cache.spec import ArraySpec

__all__ = ["CompanderCodec", "fit_compander"]

LEVEL_MASK, WIDE, EXACT = 0x3F, 0x40, 0x80
LEVELS_PER_OCTAVE = 4
CHUNK_ROWS = 8192
ZSTD_LEVEL = 19
SCALES = (1, 2, 4)
STEPS = np.exp2(-np.arange(LEVEL_MASK + 1) / LEVELS_PER_OCTAVE)
FIRST_LEVEL = 4
ZERO_STANDS_FOR = 0.25
GRID = 2.0**-40
# Another machine's logarithm may differ in the last digits: pass only what passes there too.
MARGIN = 1.0 - 1e-3


@dataclass(frozen=True)
class CompanderCodec:
    """See the module. Rows are decoded less their log-sum-exp at temperature `scale`."""

    width: int
    fidelity: float
    scale: int
    name: str = "compander"

    full_rows = True
    tail_rule = ""

    @property
    def rare(self) -> frozenset[str]:
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
        space = space_of(rows)
        rows = space.cast(rows, "float32")
        search = _Search(self, rows)
        while len(active := search.missing()):
            search.attempt(active)
        exact = ~(search.worst() <= 1.0)
        kept = space.constant(~exact)[:, None]
        q = space.where(kept, search.q, search.q * 0)
        high = q // 256
        wide = to_numpy((high > 0).any(1))
        level = np.where(exact, EXACT, search.level | np.where(wide, WIDE, 0)).astype(np.uint8)
        arrays = {
            "q": space.cast(q % 256, "uint8"),
            "level": space.constant(level),
            "q_high": to_numpy(high).astype(np.uint8) if wide.any() else absent(tuple(q.shape), "uint8"),
            "exact": exact_rows(rows, exact),
        }
        errors = {name: np.where(exact, 0.0, values) for name, values in search.errors.items()}
        return Encoded(arrays, errors, exact, search.top1_kept | exact)

    def decode(self, arrays: Mapping[str, Array]) -> Array:
        level = arrays["level"]
        space = space_of(level)
        q = space.cast(arrays["q"], "float32")
        wide, high = rare_rows(space, arrays, "q_high", level, WIDE)
        if wide is not None:
            q[wide] += 256.0 * space.cast(high, "float32")
        rows = self.synthesize(q, level)
        exact, values = rare_rows(space, arrays, "exact", level, EXACT)
        if exact is not None:
            rows[exact] = values
        return rows

    def synthesize(self, q: Array, level: Array) -> Array:
        """Numbers of steps (float32) to values."""
        space = space_of(q)
        steps = space.constant(np.log2(STEPS), "float32")
        octaves = space.log2(space.clip(q, ZERO_STANDS_FOR, None)) + space.lookup(steps, level & LEVEL_MASK)[:, None]
        return octaves * np.float32(2.0 * self.scale * np.log(2.0)).item()

    @classmethod
    def open(cls, width: int, config: Mapping[str, Json], side: Mapping[str, np.ndarray]) -> CompanderCodec:
        """From an archive: everything is checked."""
        reader = Config("compander", config)
        codec = cls(check_width(width), reader.number("fidelity", 1e-12, 1e3), reader.integer("scale", 1, 16))
        reader.done()
        if side:
            raise Damaged(f"expected no side data of codec compander, found {', '.join(sorted(side)[:5])}")
        return codec


class _Search:
    """The coarsest step of every row that keeps it within the bound, from coarse to fine."""

    def __init__(self, codec: CompanderCodec, rows: Array) -> None:
        space = space_of(rows)
        self.codec = codec
        self.rows = rows
        # Snapped: the last digits of an exponential are not the same everywhere.
        self.v = space.rint(space.exp(log_softmax(space, rows, float(codec.scale)) / 2) / GRID) * GRID
        self.q = space.zeros(tuple(rows.shape), "int32")
        self.level = np.full(len(rows), -1, np.int64)
        self.errors = {f"kl_t{t:g}": np.full(len(rows), np.inf) for t in TEMPERATURES}
        self.top1_kept = np.zeros(len(rows), bool)

    def worst(self) -> np.ndarray:
        worst: np.ndarray = np.max(list(self.errors.values()), axis=0)
        return worst / (self.codec.fidelity * MARGIN)

    def missing(self) -> np.ndarray:
        """Rows that miss the bound and have finer steps left; their next level is set."""
        missing = np.flatnonzero(~(self.worst() <= 1.0) & (self.level < LEVEL_MASK))
        ratio = np.clip(self.worst()[missing], 1.0, 1e6)
        jump = np.floor(np.log2(ratio) * LEVELS_PER_OCTAVE / 2).astype(np.int64)
        started = self.level[missing] >= 0
        self.level[missing] = np.where(started, self.level[missing] + np.maximum(jump, 1), FIRST_LEVEL)
        self.level[missing] = np.minimum(self.level[missing], LEVEL_MASK)
        return missing

    def attempt(self, index: np.ndarray) -> None:
        space = space_of(self.rows)
        chosen, level = space.constant(index), self.level[index]
        q = space.rint(self.v[chosen] / space.constant(STEPS[level])[:, None])
        decoded = self.codec.synthesize(space.cast(q, "float32"), space.constant(level.astype(np.uint8)))
        rows = self.rows[chosen]
        for t in TEMPERATURES:
            self.errors[f"kl_t{t:g}"][index] = rounded_up(to_numpy(kl_rows(rows, decoded, t)))
        best = space.argmax_of_row(decoded)[:, None]
        self.top1_kept[index] = to_numpy((space.take(rows, best) == space.max_of_row(rows))[:, 0])
        self.q[chosen] = space.cast(q, "int32")


def fit_compander(rows: np.ndarray, fidelity: float) -> CompanderCodec:
    """The scale that needs the fewest bits on these rows."""
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), 512)).astype(np.int64)]
    codecs = [CompanderCodec(int(rows.shape[1]), fidelity, scale) for scale in SCALES]
    return min(codecs, key=lambda codec: _bits(codec, rows))


def _bits(codec: CompanderCodec, rows: np.ndarray) -> float:
    encoded = codec.encode(rows)
    q = encoded.arrays["q"].astype(np.int64) + 256 * encoded.arrays["q_high"].astype(np.int64)
    return float(np.log2(1.0 + q).sum() + 32 * codec.width * encoded.exact.sum())
