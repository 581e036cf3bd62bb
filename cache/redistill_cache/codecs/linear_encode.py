"""The encoder of the linear codec: project, round, decode, measure, and go finer until every row is within the bound.

Encoded bytes depend on a row alone, not on the rows beside it nor on how many threads multiply: rows go through tiles
of one shape, projections are made in float64 and snapped to a grid much coarser than the differences between orders
of summation, and every decision about a row looks at that row only.
"""

from __future__ import annotations

import numpy as np

from redistill_cache.codecs.certify import check_finite
from redistill_cache.codecs.measure import Attempt, Measure
from redistill_cache.codecs.policy import Policy
from redistill_cache.codecs.protocol import Encoded, absent, exact_rows, join_parts
from redistill_cache.codecs.space import Array, space_of, to_numpy
from redistill_cache.codecs.synthesis import ESCAPED, EXACT, LEVEL_MASK, LEVELS_PER_OCTAVE, Synthesis

__all__ = ["encode_linear", "search_coefficients"]

# Rows of a slab are searched together: tiles of rows that still need another step stay full.
TILES_OF_SLAB = 16
# Attempts at a coarser step for rows that passed. The second saves little at a loose bound, and pays at a tight one.
COARSER_TRIES = 2


def encode_linear(synthesis: Synthesis, policy: Policy, rows: Array) -> Encoded:
    """See the module."""
    check_finite(rows)
    measure = Measure(synthesis, policy, space_of(rows))
    size = measure.tile_rows * TILES_OF_SLAB
    starts = range(0, max(len(rows), 1), size)
    return join_parts([Search(measure, policy, rows[start : start + size]).encoded() for start in starts])


def search_coefficients(synthesis: Synthesis, policy: Policy, rows: np.ndarray) -> np.ndarray:
    """The integers the encoder would choose for these rows, int64 [n, r]; rows it would store exactly are left out."""
    measure = Measure(synthesis, policy, space_of(rows))
    search = Search(measure, policy, rows)
    search.run()
    k: np.ndarray = search.best.k[~search.exact].astype(np.int64)
    return k if len(k) else np.zeros((1, synthesis.rank), np.int64)


class Search:
    """The search for the step of every row of a slab: the coarsest that keeps the row within the limit."""

    def __init__(self, measure: Measure, policy: Policy, rows: Array) -> None:
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

    def _attempt(self, level: np.ndarray, index: np.ndarray) -> Attempt:
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
