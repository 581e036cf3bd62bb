"""The encoder of the linear codec: project, round, decode, measure, and take finer steps until a row meets the bound.

The bytes of a row depend on that row alone, not on other rows or on the number of threads: rows are processed in tiles
of one shape, projections are made in float64 and put on a grid much coarser than the differences between orders of
summation, and every decision about a row depends on that row only.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal, cast

import numpy as np

from redistill_cache.codecs.backend import Array, Backend, backend_of, to_numpy
from redistill_cache.codecs.linear_decode import (
    ESCAPE_LIMIT,
    ESCAPED,
    EXACT,
    LEVEL_MASK,
    LEVELS_PER_OCTAVE,
    LinearDecoder,
    multipliers,
)
from redistill_cache.codecs.protocol import Encoded, absent, exact_rows, join_parts
from redistill_cache.codecs.rounding import ShapingConstants, remaining_cost, round_shaped, row_cost
from redistill_cache.codecs.stats import (
    METRICS,
    TEMPERATURES,
    check_finite,
    log_softmax,
    rounded_up,
    row_errors,
    top1_kept,
)
from redistill_cache.strict_json import Fields, Json

__all__ = [
    "LARGEST_VALUE",
    "ROUNDINGS",
    "LinearSettings",
    "Quantized",
    "Quantizer",
    "encode_linear",
    "search_coefficients",
]

ROUNDINGS = ("plain", "shaped")
# The last digits of sums differ between machines: accept only rows that meet the bound on all of them.
CERTIFIED_MARGIN = 1.0 - 1e-3
# Without a certificate, a row this many times over the bound is still refined.
UNCERTIFIED_LIMIT = 10.0


@dataclass(frozen=True)
class LinearSettings:
    """The bound and the decisions of the encoder; recorded in the archive, not needed to decode."""

    metric: Literal["kl", "relative"]
    fidelity: float
    certified: bool
    level: int  # at which the search of a row starts
    keep_shift: bool
    rounding: Literal["plain", "shaped"]
    reference: float  # rows with this cost of errors start at `level`, others where a bit reduces the error equally
    weight: float  # of T = 1 relative to T = 4

    @classmethod
    def before_fitting(
        cls, metric: str, fidelity: float, *, certified: bool, keep_shift: bool, shaped: bool
    ) -> LinearSettings:
        """Fitting then chooses the level, the reference and the weight."""
        kl = metric == "kl"
        return cls(
            metric="kl" if kl else "relative",
            fidelity=fidelity,
            certified=certified,
            level=0,
            keep_shift=keep_shift and kl,
            rounding="shaped" if shaped and kl else "plain",
            reference=0.1,
            weight=1.0,
        )

    @property
    def limit(self) -> float:
        """The error above which a row gets a finer step."""
        return self.fidelity * (CERTIFIED_MARGIN if self.certified else UNCERTIFIED_LIMIT)

    def config(self) -> dict[str, Json]:
        return asdict(self)

    @classmethod
    def from_fields(cls, fields: Fields) -> LinearSettings:
        return cls(
            metric=cast("Literal['kl', 'relative']", fields.choice("metric", METRICS)),
            fidelity=fields.number("fidelity", 1e-12, 1e3),
            certified=fields.flag("certified"),
            level=fields.integer("level", 0, LEVEL_MASK),
            keep_shift=fields.flag("keep_shift"),
            rounding=cast("Literal['plain', 'shaped']", fields.choice("rounding", ROUNDINGS)),
            reference=fields.number("reference", 1e-80, 1e80),
            weight=fields.number("weight", 1e-3, 1e3),
        )


# -- quantizing rows at chosen levels ---------------------------------------------------------------------------------

# Projections, in steps of level 0, are multiples of this.
GRID = 2.0**-20
# A row with a coefficient or value beyond these is stored exactly.
LARGEST_COEFFICIENT, LARGEST_VALUE = 2.0**36, 1e30
# Values of one float64 working array: tiles of wide rows have fewer rows.
TILE_VALUES_HOST, TILE_VALUES_DEVICE = 1 << 20, 1 << 23


@dataclass
class Quantized:
    """Quantized rows: integers, the shift added to every value, and the errors after decoding."""

    k: Array  # float64 [n, r]
    shift: Array  # float32 [n]
    errors: dict[str, np.ndarray]  # infinite where k cannot be packed
    top1_kept: np.ndarray

    def worst(self, limit: float) -> np.ndarray:
        """The largest error of every row, in units of the limit."""
        worst: np.ndarray = np.max(list(self.errors.values()), axis=0)
        return worst / limit

    def replace_rows(self, index: np.ndarray, other: Quantized, chosen: np.ndarray) -> None:
        """Replace rows `index` by rows `chosen` of `other`."""
        self.k[index] = other.k[chosen]
        self.shift[index] = other.shift[chosen]
        self.top1_kept[index] = other.top1_kept[chosen]
        for name, values in other.errors.items():
            self.errors[name][index] = values[chosen]


@dataclass(frozen=True)
class Quantizer:
    """The arithmetic of the encoder on one device: projection, and rounding with the errors that it causes."""

    decoder: LinearDecoder
    settings: LinearSettings
    backend: Backend

    @property
    def tile_rows(self) -> int:
        """A power of two that depends on the codec and the kind of device only."""
        rows = self.backend.tile_rows
        values = TILE_VALUES_HOST if self.backend.on_host else TILE_VALUES_DEVICE
        while rows > 16 and rows * self.decoder.width > values:
            rows //= 2
        return rows

    def project(self, rows: Array) -> tuple[Array, np.ndarray]:
        """Coefficients in steps of level 0 on a grid, float64 [n, r]; and which rows are too large for any step.

        The latter get zeros, since float32 arithmetic would overflow; they are stored exactly.
        """
        offset, projection = self._projection
        parts, flags = [], []
        for tile in self._tiles(len(rows)):
            centred = self._centred(self._padded(rows[tile])) - offset
            x = self.backend.rint((centred @ projection) / GRID) * GRID
            too_large = (self.backend.abs(x) > LARGEST_COEFFICIENT).any(1)
            too_large = too_large | (self.backend.abs(centred) > LARGEST_VALUE).any(1)
            count = tile.stop - tile.start
            parts.append(self.backend.where(too_large[:, None], x * 0.0, x)[:count])
            flags.append(to_numpy(too_large)[:count])
        return self.backend.concatenate(parts), np.concatenate(flags)

    def start_levels(self, rows: Array) -> np.ndarray:
        """The level at which the search of every row starts: where a bit reduces the error as much as in other rows."""
        parts = []
        for tile in self._tiles(len(rows)):
            cost = to_numpy(self._cost(self._padded(rows[tile])))[: tile.stop - tile.start]
            finer = LEVELS_PER_OCTAVE / 2 * np.log2(np.maximum(cost, 1e-30) / self.settings.reference)
            parts.append(np.rint(self.settings.level + finer))
        level: np.ndarray = np.clip(np.concatenate(parts), 0, LEVEL_MASK).astype(np.int64)
        return level

    def _cost(self, rows: Array) -> Array:
        """The cost of an error of unit size in each row of a tile."""
        if self.settings.metric == "relative":
            # The allowed error is proportional to the norm of the row, its square to the squared norm.
            return 1.0 / self.backend.clip((self.backend.cast(rows, "float64") ** 2).sum(1), 1e-30, None)
        if self.settings.rounding == "shaped":
            return row_cost(self.backend, rows, self.settings.weight)
        sharp, soft = (self.backend.exp(log_softmax(self.backend, rows, t)) for t in TEMPERATURES)
        return remaining_cost(self.settings.weight, (sharp**2).sum(1), (soft**2).sum(1))

    def quantize(self, rows: Array, x: Array, level: np.ndarray, index: np.ndarray) -> Quantized:
        """Rows `index` of (rows, projections x), each at its level."""
        parts = []
        for tile in self._tiles(len(index)):
            chosen = self.backend.constant(index[tile], "int64")
            multiplier = self.backend.constant(multipliers()[level[index[tile]]], "float64")
            tile_level = self.backend.constant(level[index[tile]], "uint8")
            tile_rows, steps = rows[chosen], x[chosen] / multiplier[:, None]
            if self.settings.rounding == "plain":
                k = self.backend.rint(steps)
            else:
                padded = self._padded(tile_rows), self._padded(steps), self._padded(tile_level)
                k = round_shaped(self.backend, self._shaping, *padded)[: len(steps)]
            parts.append(self._decode_and_measure(tile_rows, k, tile_level))
        return self._joined(parts)

    def project_only(self, rows: Array, x: Array, index: np.ndarray) -> Quantized:
        """Rows `index` without rounding: their errors are those of the projection, which no step reduces."""
        parts = []
        for tile in self._tiles(len(index)):
            chosen = self.backend.constant(index[tile], "int64")
            parts.append(self._measured(rows[chosen], x[chosen], x[chosen], None))
        return self._joined(parts)

    def _decode_and_measure(self, rows: Array, k: Array, level: Array) -> Quantized:
        packing = self.decoder.packing
        _, escape = packing.split(self.backend, k)
        fits = (self.backend.abs(escape) <= ESCAPE_LIMIT).all(1)
        k = self.backend.where(fits[:, None], k, k * 0.0)
        within, escape = packing.split(self.backend, k)
        arrays = {
            "q": self._padded(packing.pack(self.backend, within)),
            "level": self._padded(level | self.backend.cast((escape != 0).any(1), "uint8") * ESCAPED),
            "escape": self._padded(self.backend.cast(escape, "int16")),
        }
        multiplier = self.backend.lookup(self._multipliers, level)[:, None]
        quantized = self._measured(rows, k, k * multiplier, self.decoder.decode(arrays))
        for values in quantized.errors.values():
            values[~to_numpy(fits)] = np.inf
        return quantized

    def _measured(self, rows: Array, k: Array, steps: Array, decoded: Array | None) -> Quantized:
        """The errors of rows decoded from `steps` of level 0 (float64), exactly and in the arithmetic of the decoder.

        The former are reported, rounded up a little: the last digits of float32 products depend on the number of
        threads. The latter must be within the limit too.
        """
        count = len(rows)
        rows = self._padded(rows)
        ideal = self._padded(steps) @ self._matrix + self._offset
        shift = self.backend.zeros((len(rows),), "float32")
        if self.settings.keep_shift:
            shift = self.backend.cast((self.backend.cast(rows, "float64") - ideal).mean(1), "float32")
            # Added in float32 as by the decoder: a large shift leaves few digits for the logits.
            ideal = self.backend.cast(self.backend.cast(ideal, "float32") + shift[:, None], "float64")
        errors = rounded_up(self._errors(rows, ideal, count))
        if decoded is not None:
            if self.settings.keep_shift:
                decoded = decoded + shift[:, None]
            for name, values in self._errors(rows, decoded, count).items():
                missed = ~(values <= self.settings.limit) & (errors[name] <= self.settings.limit)
                errors[name][missed] = values[missed]
        return Quantized(k, shift[:count], errors, top1_kept(rows, ideal)[:count])

    def _errors(self, rows: Array, decoded: Array, count: int) -> dict[str, np.ndarray]:
        return {name: values[:count] for name, values in row_errors(rows, decoded, self.settings.metric).items()}

    def _joined(self, parts: list[Quantized]) -> Quantized:
        if len(parts) == 1:
            return parts[0]
        return Quantized(
            self.backend.concatenate([part.k for part in parts]),
            self.backend.concatenate([part.shift for part in parts]),
            {name: np.concatenate([part.errors[name] for part in parts]) for name in parts[0].errors},
            np.concatenate([part.top1_kept for part in parts]),
        )

    def _tiles(self, count: int) -> list[slice]:
        step = self.tile_rows
        return [slice(start, min(start + step, count)) for start in range(0, max(count, 1), step)]

    def _padded(self, x: Array) -> Array:
        return self.backend.pad_rows(x, self.tile_rows)

    def _centred(self, rows: Array) -> Array:
        rows = self.backend.cast(rows, "float64")
        return rows - rows.mean(1)[:, None] if self.settings.metric == "kl" else rows

    @cached_property
    def _matrix(self) -> Array:
        return self.backend.constant(self.decoder.matrix, "float64")

    @cached_property
    def _offset(self) -> Array:
        return self.backend.constant(self.decoder.offset, "float64")

    @cached_property
    def _multipliers(self) -> Array:
        return self.backend.constant(multipliers(), "float64")

    @cached_property
    def _shaping(self) -> ShapingConstants:
        return ShapingConstants.of(self.decoder, self.backend, self.settings.level, self.settings.weight)

    @cached_property
    def _projection(self) -> tuple[Array, Array]:
        """The offset, and the matrix [width, r] that finds the nearest point of the span (least squares)."""
        matrix = self.decoder.matrix.astype(np.float64)
        offset = self.decoder.offset.astype(np.float64)
        if self.settings.metric == "kl":
            matrix, offset = matrix - matrix.mean(1, keepdims=True), offset - offset.mean()
        return self.backend.constant(offset, "float64"), self.backend.constant(least_squares(matrix), "float64")


def least_squares(matrix: np.ndarray) -> np.ndarray:
    """The pseudo-inverse [width, r] of nearly orthogonal rows [r, width]."""
    size = np.abs(matrix).max(initial=0.0)
    if size == 0.0:
        return np.zeros(matrix.T.shape)
    scaled = matrix / size
    return np.ascontiguousarray((np.linalg.pinv(scaled @ scaled.T, rcond=1e-11, hermitian=True) @ scaled).T / size)


# -- searching the level of every row ---------------------------------------------------------------------------------

# The rows of a slab are searched together, so that tiles of the rows that still need another step stay full.
TILES_OF_SLAB = 16
# Trials of a coarser step for rows that passed. The second saves little at a loose bound, and more at a tight one.
COARSER_TRIALS = 2


def encode_linear(decoder: LinearDecoder, settings: LinearSettings, rows: Array) -> Encoded:
    """Encode rows as described in the module docstring. Raises NotFinite."""
    check_finite(rows)
    quantizer = Quantizer(decoder, settings, backend_of(rows))
    size = quantizer.tile_rows * TILES_OF_SLAB
    starts = range(0, max(len(rows), 1), size)
    return join_parts([_LevelSearch(quantizer, rows[start : start + size]).encoded() for start in starts])


def search_coefficients(decoder: LinearDecoder, settings: LinearSettings, rows: np.ndarray) -> np.ndarray:
    """The integers that encoding chooses for these rows, int64 [n, r], without the rows that are stored exactly."""
    search = _LevelSearch(Quantizer(decoder, settings, backend_of(rows)), rows)
    k: np.ndarray = search.best.k[~search.exact].astype(np.int64)
    return k if len(k) else np.zeros((1, decoder.rank), np.int64)


class _LevelSearch:
    """For every row of a slab, the coarsest level within the limit, and the row quantized at that level."""

    def __init__(self, quantizer: Quantizer, rows: Array) -> None:
        self.quantizer = quantizer
        self.limit = quantizer.settings.limit
        self.rows = quantizer.backend.cast(rows, "float32")
        self.x, self.exact = quantizer.project(self.rows)
        self.level = quantizer.start_levels(self.rows)
        self.finest_failed = np.full(len(rows), -1)
        self.best = quantizer.quantize(self.rows, self.x, self.level, np.arange(len(rows)))
        if len(rows):
            self._refine()
            if quantizer.settings.certified:
                self._coarsen()

    def _failing(self) -> np.ndarray:
        return np.flatnonzero(~(self.best.worst(self.limit) <= 1.0) & ~self.exact)

    def _refine(self) -> None:
        """Take finer steps until rows pass or are stored exactly."""
        active = self._failing()
        if not len(active):
            return
        projected = self.quantizer.project_only(self.rows, self.x, active)
        self.exact[active[~(projected.worst(self.limit) <= 1.0)]] = True
        while len(active := self._failing()):
            ratio = self.best.worst(self.limit)[active]
            self.finest_failed[active] = self.level[active]
            hopeless = (self.level[active] >= LEVEL_MASK) | ~np.isfinite(ratio)
            self.exact[active[hopeless]] = True
            active, ratio = active[~hopeless], ratio[~hopeless]
            self.level[active] = np.minimum(self.level[active] + levels_of(ratio, up=True), LEVEL_MASK)
            if len(active):
                quantized = self.quantizer.quantize(self.rows, self.x, self.level, active)
                self.best.replace_rows(active, quantized, np.arange(len(active)))

    def _coarsen(self) -> None:
        """Try a coarser step for rows far below the limit, and take it where they pass."""
        for _ in range(COARSER_TRIALS):
            down = levels_of(1.0 / np.maximum(self.best.worst(self.limit), 1e-12), up=False)
            target = np.maximum(self.level - down, self.finest_failed + 1)
            active = np.flatnonzero(~self.exact & (target < self.level))
            if not len(active):
                return
            quantized = self.quantizer.quantize(self.rows, self.x, target, active)
            passed = quantized.worst(self.limit) <= 1.0
            better, worse = active[passed], active[~passed]
            self.best.replace_rows(better, quantized, np.flatnonzero(passed))
            self.level[better] = target[better]
            self.finest_failed[worse] = target[worse]

    def encoded(self) -> Encoded:
        backend, packing, exact = self.quantizer.backend, self.quantizer.decoder.packing, self.exact
        # Rows stored exactly are zero in all other arrays.
        packed_rows = backend.constant(~exact)
        k = backend.where(packed_rows[:, None], self.best.k, self.best.k * 0.0)
        within, escape = packing.split(backend, k)
        escaped = to_numpy((escape != 0).any(1))
        level = np.where(exact, EXACT, self.level | np.where(escaped, ESCAPED, 0)).astype(np.uint8)
        arrays = {
            "q": packing.pack(backend, within),
            "level": backend.constant(level),
            "escape": to_numpy(escape).astype(np.int16) if escaped.any() else absent(tuple(k.shape), "int16"),
            "exact": exact_rows(self.rows, exact),
        }
        if self.quantizer.settings.keep_shift:
            arrays["shift"] = backend.where(packed_rows, self.best.shift, self.best.shift * 0.0)
        errors = {name: np.where(exact, 0.0, values) for name, values in self.best.errors.items()}
        return Encoded(arrays=arrays, errors=errors, exact=exact, top1_kept=self.best.top1_kept | exact)


def levels_of(ratio: np.ndarray, *, up: bool) -> np.ndarray:
    """How many levels change the error by this factor (the error grows with the square of the step); at least one."""
    levels = np.log2(np.clip(ratio, 1e-30, 1e30)) * (LEVELS_PER_OCTAVE / 2)
    whole: np.ndarray = np.maximum(np.ceil(levels) if up else np.floor(levels), 1).astype(np.int64)
    return whole
