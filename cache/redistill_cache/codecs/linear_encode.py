"""The encoder of the linear codec: project, round, decode, measure, and go finer until every row is within the bound.

Encoded bytes depend on a row alone, not on the rows beside it nor on how many threads multiply: rows go through tiles
of one shape, projections are made in float64 and snapped to a grid much coarser than the differences between orders
of summation, and every decision about a row looks at that row only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

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
from redistill_cache.codecs.rounding import LinearSettings, Shaping, cost_of_errors, round_shaped, weight_of_rest
from redistill_cache.codecs.space import Array, Space, space_of, to_numpy
from redistill_cache.codecs.stats import TEMPERATURES, check_finite, kl_rows, log_softmax, relative_error, rounded_up

__all__ = ["LARGEST_VALUE", "Trial", "Trials", "encode_linear", "search_coefficients"]


# -- measure ----------------------------------------------------------------------------------------------------------
#
# One attempt at encoding rows at given levels: round, pack, decode through the real decoder, measure the loss.

# Projections, in steps of level 0, are multiples of this.
GRID = 2.0**-20
# Coefficients and values beyond these make a row one that is stored exactly.
LARGEST, LARGEST_VALUE = 2.0**36, 1e30
# Values of one float64 working array: rows of a tile shrink as they widen.
TILE_VALUES_HOST, TILE_VALUES_DEVICE = 1 << 20, 1 << 23


@dataclass
class Trial:
    """What came of some rows: integers, what was added to every value, and what was lost."""

    k: Array  # float64 [n, r]
    shift: Array  # float32 [n]
    errors: dict[str, np.ndarray]  # infinite where k is not representable
    top1_kept: np.ndarray

    def worst(self, limit: float) -> np.ndarray:
        """The largest error of every row, in units of the limit."""
        worst: np.ndarray = np.max(list(self.errors.values()), axis=0)
        return worst / limit

    def put(self, index: np.ndarray, other: Trial, chosen: np.ndarray) -> None:
        """Replace rows `index` by rows `chosen` of another attempt."""
        self.k[index] = other.k[chosen]
        self.shift[index] = other.shift[chosen]
        self.top1_kept[index] = other.top1_kept[chosen]
        for name, values in other.errors.items():
            self.errors[name][index] = values[chosen]


@dataclass(frozen=True)
class Trials:
    """The codec's arithmetic on the device of some rows."""

    synthesis: LinearDecoder
    policy: LinearSettings
    space: Space

    @property
    def tile_rows(self) -> int:
        """A power of two that depends on the codec and the kind of device only."""
        rows = self.space.tile_rows
        values = TILE_VALUES_HOST if self.space.on_host else TILE_VALUES_DEVICE
        while rows > 16 and rows * self.synthesis.width > values:
            rows //= 2
        return rows

    def project(self, rows: Array) -> tuple[Array, np.ndarray]:
        """Coefficients in steps of level 0, float64 [n, r], on a grid; and which rows are beyond all proportion.

        Those are given zeros: no arithmetic in float32 is safe with them, and they are going to be stored exactly.
        """
        offset, projection = self._projection
        parts, absurd = [], []
        for tile in self._tiles(len(rows)):
            centred = self._centred(self._padded(rows[tile])) - offset
            x = self.space.rint((centred @ projection) / GRID) * GRID
            huge = (self.space.abs(x) > LARGEST).any(1) | (self.space.abs(centred) > LARGEST_VALUE).any(1)
            count = tile.stop - tile.start
            parts.append(self.space.where(huge[:, None], x * 0.0, x)[:count])
            absurd.append(to_numpy(huge)[:count])
        return self.space.concatenate(parts), np.concatenate(absurd)

    def start_levels(self, rows: Array) -> np.ndarray:
        """Where the search of every row starts: at the level where a bit buys as much as in any other row."""
        parts = []
        for tile in self._tiles(len(rows)):
            cost = to_numpy(self._cost(self._padded(rows[tile])))[: tile.stop - tile.start]
            finer = LEVELS_PER_OCTAVE / 2 * np.log2(np.maximum(cost, 1e-30) / self.policy.reference)
            parts.append(np.rint(self.policy.level + finer))
        level: np.ndarray = np.clip(np.concatenate(parts), 0, LEVEL_MASK).astype(np.int64)
        return level

    def _cost(self, rows: Array) -> Array:
        """What an error of unit size costs each row of a tile."""
        if self.policy.metric == "relative":
            # An error may grow with the row, and its square with the square.
            return 1.0 / self.space.clip((self.space.cast(rows, "float64") ** 2).sum(1), 1e-30, None)
        if self.policy.rounding == "shaped":
            return cost_of_errors(self.space, rows, self.policy.weight)
        sharp, soft = (self.space.exp(log_softmax(self.space, rows, t)) for t in TEMPERATURES)
        return weight_of_rest(self.policy.weight, (sharp**2).sum(1), (soft**2).sum(1))

    def attempt(self, rows: Array, x: Array, level: np.ndarray, index: np.ndarray) -> Trial:
        """Rows `index` of (rows, x), at level[index]."""
        parts = []
        for tile in self._tiles(len(index)):
            chosen = self.space.constant(index[tile], "int64")
            multiplier = self.space.constant(multipliers()[level[index[tile]]], "float64")
            tile_level = self.space.constant(level[index[tile]], "uint8")
            k = self._rounded(rows[chosen], x[chosen] / multiplier[:, None], tile_level)
            parts.append(self._measured(rows[chosen], k, tile_level))
        return self._joined(parts)

    def floor_error(self, rows: Array, x: Array, index: np.ndarray) -> Trial:
        """What rows would lose without any rounding: what lies outside the basis."""
        parts = []
        for tile in self._tiles(len(index)):
            chosen = self.space.constant(index[tile], "int64")
            parts.append(self._compared(rows[chosen], x[chosen], x[chosen], None))
        return self._joined(parts)

    def _rounded(self, rows: Array, x: Array, level: Array) -> Array:
        if self.policy.rounding == "plain":
            return self.space.rint(x)
        tile = self._padded(rows), self._padded(x), self._padded(level)
        return round_shaped(self.space, self._shaping, *tile)[: len(x)]

    def _measured(self, rows: Array, k: Array, level: Array) -> Trial:
        packing = self.synthesis.packing
        within, escape = packing.split(self.space, k)
        fits = (self.space.abs(escape) <= ESCAPE_LIMIT).all(1)
        k = self.space.where(fits[:, None], k, k * 0.0)
        within, escape = packing.split(self.space, k)
        arrays = {
            "q": self._padded(packing.pack(self.space, within)),
            "level": self._padded(level | self.space.cast((escape != 0).any(1), "uint8") * ESCAPED),
            "escape": self._padded(self.space.cast(escape, "int16")),
        }
        multiplier = self.space.lookup(self._multipliers, level)[:, None]
        attempt = self._compared(rows, k, k * multiplier, self.synthesis.decode(arrays))
        for values in attempt.errors.values():
            values[~to_numpy(fits)] = np.inf
        return attempt

    def _compared(self, rows: Array, k: Array, steps: Array, decoded: Array | None) -> Trial:
        """What rows lose as `steps` of level 0 (float64), by exact arithmetic and by that of the decoder.

        What is reported is the former, a little rounded up: float32 products differ in the last digits from one
        number of threads to another. The latter has to be within the bound too.
        """
        count = len(rows)
        rows = self._padded(rows)
        ideal = self._padded(steps) @ self._matrix + self._offset
        shift = self.space.zeros((len(rows),), "float32")
        if self.policy.keep_shift:
            shift = self.space.cast((self.space.cast(rows, "float64") - ideal).mean(1), "float32")
            # As float32 adds it: a large shift leaves few digits to what it is added to.
            ideal = self.space.cast(self.space.cast(ideal, "float32") + shift[:, None], "float64")
        errors = {name: rounded_up(values) for name, values in self._errors(rows, ideal, count).items()}
        if decoded is not None:
            if self.policy.keep_shift:
                decoded = decoded + shift[:, None]
            for name, real in self._errors(rows, decoded, count).items():
                missed = ~(real <= self.policy.limit) & (errors[name] <= self.policy.limit)
                errors[name][missed] = real[missed]
        chosen = self.space.argmax_of_row(ideal)[:, None]
        kept = self.space.take(rows, chosen) == self.space.max_of_row(rows)
        return Trial(k, shift[:count], errors, np.array(to_numpy(kept[:count, 0])))

    def _errors(self, rows: Array, decoded: Array, count: int) -> dict[str, np.ndarray]:
        if self.policy.metric == "kl":
            errors = {f"kl_t{t:g}": kl_rows(rows, decoded, t) for t in TEMPERATURES}
        else:
            errors = {"relative": relative_error(rows, decoded)}
        return {name: np.array(to_numpy(values[:count])) for name, values in errors.items()}

    def _joined(self, parts: list[Trial]) -> Trial:
        if len(parts) == 1:
            return parts[0]
        return Trial(
            self.space.concatenate([part.k for part in parts]),
            self.space.concatenate([part.shift for part in parts]),
            {name: np.concatenate([part.errors[name] for part in parts]) for name in parts[0].errors},
            np.concatenate([part.top1_kept for part in parts]),
        )

    def _tiles(self, count: int) -> list[slice]:
        step = self.tile_rows
        return [slice(start, min(start + step, count)) for start in range(0, max(count, 1), step)]

    def _padded(self, x: Array) -> Array:
        return self.space.pad_rows(x, self.tile_rows)

    def _centred(self, rows: Array) -> Array:
        rows = self.space.cast(rows, "float64")
        return rows - rows.mean(1)[:, None] if self.policy.metric == "kl" else rows

    @cached_property
    def _matrix(self) -> Array:
        return self.space.constant(self.synthesis.matrix, "float64")

    @cached_property
    def _offset(self) -> Array:
        return self.space.constant(self.synthesis.offset, "float64")

    @cached_property
    def _multipliers(self) -> Array:
        return self.space.constant(multipliers(), "float64")

    @cached_property
    def _shaping(self) -> Shaping:
        return Shaping.of(self.synthesis, self.space, self.policy)

    @cached_property
    def _projection(self) -> tuple[Array, Array]:
        """The offset, and the matrix [width, r] that finds the nearest point of the span (least squares)."""
        matrix = self.synthesis.matrix.astype(np.float64)
        offset = self.synthesis.offset.astype(np.float64)
        if self.policy.metric == "kl":
            matrix, offset = matrix - matrix.mean(1, keepdims=True), offset - offset.mean()
        return self.space.constant(offset, "float64"), self.space.constant(least_squares(matrix), "float64")


def least_squares(matrix: np.ndarray) -> np.ndarray:
    """The pseudo-inverse [width, r] of nearly orthogonal rows [r, width]."""
    size = np.abs(matrix).max(initial=0.0)
    if size == 0.0:
        return np.zeros(matrix.T.shape)
    scaled = matrix / size
    return np.ascontiguousarray((np.linalg.pinv(scaled @ scaled.T, rcond=1e-11, hermitian=True) @ scaled).T / size)


# -- linear encode ----------------------------------------------------------------------------------------------------

# Rows of a slab are searched together: tiles of rows that still need another step stay full.
TILES_OF_SLAB = 16
# Attempts at a coarser step for rows that passed. The second saves little at a loose bound, and pays at a tight one.
COARSER_TRIES = 2


def encode_linear(synthesis: LinearDecoder, policy: LinearSettings, rows: Array) -> Encoded:
    """See the module."""
    check_finite(rows)
    measure = Trials(synthesis, policy, space_of(rows))
    size = measure.tile_rows * TILES_OF_SLAB
    starts = range(0, max(len(rows), 1), size)
    return join_parts([Search(measure, policy, rows[start : start + size]).encoded() for start in starts])


def search_coefficients(synthesis: LinearDecoder, policy: LinearSettings, rows: np.ndarray) -> np.ndarray:
    """The integers the encoder would choose for these rows, int64 [n, r]; rows it would store exactly are left out."""
    measure = Trials(synthesis, policy, space_of(rows))
    search = Search(measure, policy, rows)
    search.run()
    k: np.ndarray = search.best.k[~search.exact].astype(np.int64)
    return k if len(k) else np.zeros((1, synthesis.rank), np.int64)


class Search:
    """The search for the step of every row of a slab: the coarsest that keeps the row within the limit."""

    def __init__(self, measure: Trials, policy: LinearSettings, rows: Array) -> None:
        self.measure = measure
        self.policy = policy
        count = len(rows)
        self.rows = measure.space.cast(rows, "float32")
        self.x, absurd = measure.project(self.rows)
        self.level = measure.start_levels(self.rows)
        self.failed = np.full(count, -1)  # the finest level known to miss
        self.exact = absurd
        self.best = self._attempt(self.level, np.arange(count))

    def run(self) -> None:
        if len(self.level):
            self._refine()
            if self.policy.certified:
                self._coarsen()

    def encoded(self) -> Encoded:
        self.run()
        return self._assembled()

    def _attempt(self, level: np.ndarray, index: np.ndarray) -> Trial:
        return self.measure.attempt(self.rows, self.x, level, index)

    def _misses(self) -> np.ndarray:
        return np.flatnonzero(~(self.best.worst(self.policy.limit) <= 1.0) & ~self.exact)

    def _refine(self) -> None:
        """Finer and finer, until rows pass or are given up as exact."""
        active = self._misses()
        if not len(active):
            return
        floor = self.measure.floor_error(self.rows, self.x, active)
        self.exact[active[~(floor.worst(self.policy.limit) <= 1.0)]] = True
        while len(active := self._misses()):
            ratio = self.best.worst(self.policy.limit)[active]
            self.failed[active] = self.level[active]
            spent = (self.level[active] >= LEVEL_MASK) | ~np.isfinite(ratio)
            self.exact[active[spent]] = True
            active, ratio = active[~spent], ratio[~spent]
            finer = self.level[active] + levels_of(ratio, up=True)
            self.level[active] = np.minimum(finer, LEVEL_MASK)
            if len(active):
                trial = self._attempt(self.level, active)
                self.best.put(active, trial, np.arange(len(active)))

    def _coarsen(self) -> None:
        """Rows that lose much less than they may get a coarser step, if they pass with it."""
        for _ in range(COARSER_TRIES):
            down = levels_of(1.0 / np.maximum(self.best.worst(self.policy.limit), 1e-12), up=False)
            target = np.maximum(self.level - down, self.failed + 1)
            active = np.flatnonzero(~self.exact & (target < self.level))
            if not len(active):
                return
            trial = self._attempt(target, active)
            passed = trial.worst(self.policy.limit) <= 1.0
            better, worse = active[passed], active[~passed]
            self.best.put(better, trial, np.flatnonzero(passed))
            self.level[better] = target[better]
            self.failed[worse] = target[worse]

    def _assembled(self) -> Encoded:
        space, packing, exact = self.measure.space, self.measure.synthesis.packing, self.exact
        # An exact row holds nothing else.
        kept = space.constant(~exact)
        k = space.where(kept[:, None], self.best.k, self.best.k * 0.0)
        within, escape = packing.split(space, k)
        escaped = to_numpy((escape != 0).any(1))
        level = np.where(exact, EXACT, self.level | np.where(escaped, ESCAPED, 0)).astype(np.uint8)
        arrays = {
            "q": packing.pack(space, within),
            "level": space.constant(level),
            "escape": to_numpy(escape).astype(np.int16) if escaped.any() else absent(tuple(k.shape), "int16"),
            "exact": exact_rows(self.rows, exact),
        }
        if self.policy.keep_shift:
            arrays["shift"] = space.where(kept, self.best.shift, self.best.shift * 0.0)
        errors = {name: np.where(exact, 0.0, values) for name, values in self.best.errors.items()}
        return Encoded(arrays=arrays, errors=errors, exact=exact, top1_kept=self.best.top1_kept | exact)


def levels_of(ratio: np.ndarray, *, up: bool) -> np.ndarray:
    """How many levels change the error by this factor, which goes with the square of the step; at least one."""
    levels = np.log2(np.clip(ratio, 1e-30, 1e30)) * (LEVELS_PER_OCTAVE / 2)
    whole: np.ndarray = np.maximum(np.ceil(levels) if up else np.floor(levels), 1).astype(np.int64)
    return whole
