"""The encoder of the linear codec: project, round, decode, measure, and take finer steps until a row meets the bound.

The bytes of a row depend on that row alone, not on other rows or on the number of threads: products of large numbers
are made in tiles of one shape, projections are made in float64 and put on a grid much coarser than the differences
between orders of summation, and every decision about a row depends on that row only.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib import import_module
from types import ModuleType
from typing import Literal, cast

import numpy as np

from redistill_cache.codecs.backend import Array, Backend, backend_of
from redistill_cache.codecs.divergence import Softmax
from redistill_cache.codecs.linear_decode import (
    ESCAPE_LIMIT,
    ESCAPED,
    EXACT,
    LEVEL_MASK,
    LEVELS_PER_OCTAVE,
    LinearDecoder,
    multipliers,
)
from redistill_cache.codecs.protocol import Encoded, absent, exact_rows, indices_of, join_parts
from redistill_cache.codecs.rounding import (
    CLASSES,
    ArraySweeps,
    Bits,
    Factors,
    ShapingConstants,
    Sweeps,
    Swept,
    curvature,
    remaining_cost,
)
from redistill_cache.codecs.stats import METRICS, Centre, check_finite, error_names, errors_of, keeps_top1, rounded_up
from redistill_cache.strict_json import Fields, Json

__all__ = [
    "LARGEST_VALUE",
    "LEAST_FLOOR",
    "ROUNDINGS",
    "LinearSettings",
    "Quantized",
    "Quantizer",
    "encode_linear",
    "search_coefficients",
    "triton_kernels",
]

ROUNDINGS = ("plain", "shaped")
# The last digits of sums differ between machines: accept only rows that meet the bound on all of them.
CERTIFIED_MARGIN = 1.0 - 1e-3
# Of the distances that errors of features are relative to.
LEAST_FLOOR = 1e-30
# Without a certificate, a row this many times over the bound is still refined.
UNCERTIFIED_LIMIT = 10.0


@dataclass(frozen=True)
class LinearSettings:
    """The bound and the decisions of the encoder; recorded in the archive, not needed to decode."""

    metric: Literal["kl", "relative", "centred"]
    fidelity: float
    certified: bool
    level: int  # at which the search of a row starts
    keep_shift: bool
    rounding: Literal["plain", "shaped"]
    reference: float  # rows with this cost of errors start at `level`, others where a bit reduces the error equally
    weight: float  # of T = 1 relative to T = 4
    floor: float = 0.0  # metric centred: errors of rows nearer to the offset than this are relative to it

    @classmethod
    def before_fitting(
        cls, metric: str, fidelity: float, *, certified: bool, keep_shift: bool, shaped: bool
    ) -> LinearSettings:
        """Fitting then chooses the level, the reference and the weight."""
        kl = metric == "kl"
        return cls(
            metric=cast("Literal['kl', 'relative', 'centred']", metric),
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
        return {key: value for key, value in asdict(self).items() if key != "floor" or self.metric == "centred"}

    @classmethod
    def from_fields(cls, fields: Fields) -> LinearSettings:
        metric = fields.choice("metric", METRICS)
        return cls(
            metric=cast("Literal['kl', 'relative', 'centred']", metric),
            fidelity=fields.number("fidelity", 1e-12, 1e3),
            certified=fields.flag("certified"),
            level=fields.integer("level", 0, LEVEL_MASK),
            keep_shift=fields.flag("keep_shift"),
            rounding=cast("Literal['plain', 'shaped']", fields.choice("rounding", ROUNDINGS)),
            reference=fields.number("reference", 1e-80, 1e80),
            weight=fields.number("weight", 1e-3, 1e3),
            floor=fields.number("floor", LEAST_FLOOR, 1e38) if metric == "centred" else 0.0,
        )


# -- quantizing rows at chosen levels ---------------------------------------------------------------------------------

# Projections, in steps of level 0, are multiples of this.
GRID = 2.0**-20
# A row with a coefficient or value beyond these is stored exactly.
LARGEST_COEFFICIENT, LARGEST_VALUE = 2.0**36, 1e30
# Matrix products are made in tiles of one shape, so that their sums have one order for any number of rows.
TILE_ROWS_HOST, TILE_ROWS_DEVICE = 64, 1024
# Rows are searched in slabs of at most this many rows, and of about this many bytes. On a CPU, malloc returns more than
# that to the system after every slab, which takes a tenth of the time of 10,000 classes.
SLAB_ROWS_HOST, SLAB_ROWS_DEVICE = 256, 16384
SLAB_BYTES_HOST, SLAB_BYTES_DEVICE = 3 << 25, 1 << 32


@dataclass(frozen=True, eq=False)
class Rounded:
    """Coefficients of some rows."""

    k: Array  # float64 [n, r]: integers, or zeros where they cannot be packed
    values: Array  # float64 [n, r], in steps of level 0
    fits: Array  # bool [n]: they can be packed


@dataclass(frozen=True, eq=False)
class Slab:
    """Rows with all that their trials share. The errors of a trial differ from those of the first by a product."""

    rows: Array  # float32 [n, width]
    x: Array  # float64 [n, r]: coefficients in steps of level 0, on a grid
    too_large: Array  # bool [n]: for any step; their coefficients are zero, and they are stored exactly
    top: Array  # int64 [n]: the first column of the largest value
    softmax: Softmax | None  # None: the metric is not the KL divergence
    swept: Swept | None  # None: plain rounding
    start: Array  # int64 [n]: the level at which the search starts
    first: Rounded  # at that level
    errors: Array  # float64 [n, width]: of decoding `first`

    def __len__(self) -> int:
        return len(self.too_large)


@dataclass
class Quantized:
    """Quantized rows: integers, the shift added to every value, and the errors after decoding."""

    k: Array  # float64 [n, r]
    shift: Array  # float32 [n]
    errors: dict[str, Array]  # infinite where k cannot be packed; on a GPU, NaN where they are too large to measure
    top1_kept: Array

    def worst(self, limit: float) -> Array:
        """The largest error of every row, in units of the limit."""
        backend = backend_of(self.k)
        first, *others = self.errors.values()
        for other in others:
            first = backend.larger(first, other)
        return first / limit

    def replace_rows(self, index: Array, other: Quantized, better: Array) -> None:
        """Replace rows `index` by the rows of `other` that are better."""
        backend = backend_of(self.k)
        if backend.torch is None:
            index, chosen = index[better], np.flatnonzero(better)
            for mine, theirs in self._pairs(other):
                mine[index] = theirs[chosen]
            return
        for mine, theirs in self._pairs(other):  # without waiting for the number of rows that are better
            where = better.reshape(-1, *[1] * (mine.ndim - 1))
            mine[index] = backend.where(where, theirs, mine[index])

    def _pairs(self, other: Quantized) -> list[tuple[Array, Array]]:
        errors = [(values, other.errors[name]) for name, values in self.errors.items()]
        return [(self.k, other.k), (self.shift, other.shift), (self.top1_kept, other.top1_kept), *errors]


class Quantizer:
    """The arithmetic of the encoder on one device: projection, and rounding with the errors that it causes."""

    def __init__(
        self,
        decoder: LinearDecoder,
        settings: LinearSettings,
        backend: Backend,
        factors: Factors | None = None,
        *,
        fitting: bool = False,
    ) -> None:
        """`factors` are those of another quantizer with the same matrix and metric; `fitting`: it has no digits yet."""
        self.decoder, self.settings, self.backend, self._fitting = decoder, settings, backend, fitting
        if factors is not None:
            self.factors = factors
        self._loops = compiled_loops() if backend.torch is None else None
        self._sweeps: Sweeps = self._loops.CompiledSweeps() if self._loops else sweeps_of(backend)

    def prepared(self) -> Quantizer:
        """With all constants computed: they take seconds for wide rows."""
        _ = self._matrix, self._offset, self._packable, self._projection, self._multipliers
        if self.settings.rounding == "shaped":
            _ = self._shaping
        if self._centre is not None:
            _ = self._bits
        return self

    @property
    def tile_rows(self) -> int:
        return TILE_ROWS_HOST if self.backend.on_host else TILE_ROWS_DEVICE

    @property
    def slab_rows(self) -> int:
        """A multiple of `tile_rows` that depends on the codec and the kind of device only."""
        host = self.backend.on_host
        shaped = self._shaping.count if self.settings.rounding == "shaped" else 0
        row = 8 * (5 * self.decoder.width + 4 * self.decoder.rank + 2 * CLASSES * shaped)
        rows = min(
            (SLAB_BYTES_HOST if host else SLAB_BYTES_DEVICE) // row, SLAB_ROWS_HOST if host else SLAB_ROWS_DEVICE
        )
        return max(rows // self.tile_rows, 1) * self.tile_rows

    def prepare(self, rows: Array) -> Slab:
        """At most `slab_rows` rows of the backend."""
        rows = self.backend.cast(rows, "float32")
        x, too_large = self.project(rows)
        softmax = Softmax.of(self.backend, rows) if self.settings.metric == "kl" else None
        swept = None
        if softmax is None:
            cost = self._relative_cost(rows)
        elif self.settings.rounding == "plain":
            cost = remaining_cost(self.settings.weight, *softmax.collisions())
        else:
            chosen = self._heaviest(rows)
            sharp, soft = softmax.probabilities(self.backend, chosen)
            cost = remaining_cost(self.settings.weight, sharp.sum(1), soft.sum(1))
            shape = curvature(self.backend, self.settings.weight, self.decoder.width, chosen, sharp, soft)
            swept = self._sweeps.forward(self._shaping, shape)
        start = self._start_levels(cost)
        first = self._rounded(x, swept, start, self.backend.arange(len(rows)))
        errors = self._product(first.values, self._matrix) + self._offset - rows
        if softmax is not None and not self.settings.keep_shift:
            errors = errors - errors.mean(1)[:, None]
        return Slab(rows, x, too_large, self.backend.argmax_of_row(rows), softmax, swept, start, first, errors)

    def project(self, rows: Array) -> tuple[Array, Array]:
        """Coefficients in steps of level 0 on a grid, float64 [n, r]; and which rows are too large for any step.

        The latter get zeros, since float32 arithmetic would overflow; they are stored exactly.
        """
        offset, projection = self._projection
        values = self.backend.cast(rows, "float64")
        if self.settings.metric == "kl":
            values = values - values.mean(1)[:, None]
        centred = values - offset
        x = self.backend.rint(self._product(centred, projection) / GRID) * GRID
        too_large = (self.backend.abs(x) > LARGEST_COEFFICIENT).any(1)
        too_large = too_large | (self.backend.abs(centred) > LARGEST_VALUE).any(1)
        return self.backend.where(too_large[:, None], x * 0.0, x), too_large

    def _start_levels(self, cost: Array) -> Array:
        """The level at which the search of every row starts: where a bit reduces the error as much as in other rows.

        `cost` is that of an error of unit size in each row.
        """
        backend = self.backend
        finer = LEVELS_PER_OCTAVE / 2 * backend.log2(backend.maximum(cost, 1e-30) / self.settings.reference)
        return backend.cast(backend.clip(backend.rint(self.settings.level + finer), 0, LEVEL_MASK), "int64")

    def _relative_cost(self, rows: Array) -> Array:
        # The allowed error is proportional to the norm of the row, its square to the squared norm.
        if self._centre is not None:
            return 1.0 / self._centre.size(rows) ** 2
        return 1.0 / self.backend.clip((self.backend.cast(rows, "float64") ** 2).sum(1), 1e-30, None)

    @cached_property
    def _centre(self) -> Centre | None:
        return Centre(self.decoder.offset, self.settings.floor) if self.settings.metric == "centred" else None

    def first(self, slab: Slab) -> Quantized:
        """All rows of the slab, at the levels at which their search starts."""
        no_change = self.backend.zeros((len(slab), self.decoder.width), "float64")
        k = slab.first.k + 0.0  # a copy: rows of it are replaced
        return self._measured(slab, self.backend.arange(len(slab)), k, no_change, slab.first.fits)

    def quantize(self, slab: Slab, level: Array, index: Array) -> Quantized:
        """Rows `index` of the slab, each at its level; `level` (int64) has those of all rows."""
        rounded = self._rounded(slab.x, slab.swept, level, index)
        return self._measured(slab, index, rounded.k, self._change(slab, index, rounded.values), rounded.fits)

    def project_only(self, slab: Slab, index: Array) -> Quantized:
        """Rows `index` without rounding: their errors are those of the projection, which no step reduces."""
        x = slab.x[index]
        return self._measured(slab, index, x, self._change(slab, index, x), None)

    def _rounded(self, x: Array, swept: Swept | None, level: Array, index: Array) -> Rounded:
        backend, level = self.backend, self.backend.cast(level[index], "uint8")
        multiplier = backend.lookup(self._multipliers, level)[:, None]
        steps = x[index] / multiplier
        k = backend.rint(steps)
        if swept is not None:
            count = self._shaping.count
            head = backend.contiguous(steps[:, :count])
            k[:, :count] = self._sweeps.backward(self._shaping, swept, index, head, level)
        elif self._centre is not None:
            k = self._bits.nearest(backend, steps, level)
        least, most = self._packable
        fits = ((k >= least) & (k <= most)).all(1)
        k = backend.where(fits[:, None], k, k * 0.0)
        return Rounded(k, k * multiplier, fits)

    def _change(self, slab: Slab, index: Array, values: Array) -> Array:
        """By how much the errors of rows `index` with these coefficients differ from those of their first trial.

        On the host not in tiles, which would be padded for the few rows of most trials: the differences are small, so
        another order of their sums changes none of the digits that `rounded_up` keeps.
        """
        differences = values - slab.first.values[index]
        return differences @ self._matrix if self.backend.on_host else self._product(differences, self._matrix)

    def _measured(self, slab: Slab, index: Array, k: Array, change: Array, fits: Array | None) -> Quantized:
        """The exact errors of rows, rounded up a little: the last digits of sums depend on their order.

        `change` is by how much they differ from those of the first trial; it may be overwritten. They are infinite for
        rows that do not fit, if `fits` says which do.
        """
        backend = self.backend
        shift = backend.zeros((len(index),), "float32")
        if self._loops and slab.softmax is not None and not self.settings.keep_shift:
            of, errors = slab.softmax, change
            (sharp, soft), kept = self._loops.measure(
                of.weights, of.total_sharp, of.total_soft, slab.rows, slab.top, slab.errors, index, errors
            )
            measured = self._divergences(slab, index, errors, sharp, soft)
        else:
            rows, errors = slab.rows[index], change + slab.errors[index]
            if self.settings.keep_shift:
                shift = backend.cast(-errors.mean(1), "float32")
                # Added in float32 as by the decoder: a large shift leaves few digits for the logits.
                decoded = backend.cast(rows + errors, "float32") + shift[:, None]
                errors = backend.cast(decoded, "float64") - rows
            measured, kept = self._errors(slab, index, errors), keeps_top1(rows, rows + errors)
        rounded = rounded_up(measured)
        if fits is not None:
            rounded = {name: backend.where(fits, values, np.inf) for name, values in rounded.items()}
        return Quantized(k, shift, rounded, kept)

    def decoded_errors(self, slab: Slab, quantized: Quantized, index: Array, level: Array) -> dict[str, Array]:
        """The errors of rows `index` in the arithmetic of the decoder, float32 and with the digits as stored."""
        backend, packing, parts = self.backend, self.decoder.packing, []
        within, escape = packing.split(backend, quantized.k[index])
        flags = backend.cast(level[index], "uint8") | backend.cast((escape != 0).any(1), "uint8") * ESCAPED
        arrays = {"q": packing.pack(backend, within), "level": flags, "escape": backend.cast(escape, "int16")}
        # To find the rows that escape, a GPU would be waited for: all of them do, most by zero.
        every = {} if backend.on_host else {indices_of("escape"): backend.arange(self.tile_rows)}
        for tile in self._tiles(len(index)):
            padded = {name: self._padded(array[tile]) for name, array in arrays.items()} | every
            parts.append(self.decoder.decode(padded)[: tile.stop - tile.start])
        decoded = backend.concatenate(parts)
        if self.settings.keep_shift:
            decoded = decoded + quantized.shift[index][:, None]
        return self._errors(slab, index, backend.cast(decoded, "float64") - slab.rows[index])

    def _errors(self, slab: Slab, index: Array, errors: Array) -> dict[str, Array]:
        """The errors in the metric of rows `index`, whose values have these errors."""
        softmax = slab.softmax
        if softmax is None:
            rows = slab.rows[index]
            return errors_of(rows, rows + errors, self.settings.metric, self._centre)
        if self._loops:
            sharp, soft = self._loops.divergences(
                softmax.weights, softmax.total_sharp, softmax.total_soft, index, errors
            )
        else:
            sharp, soft = softmax.divergences(self.backend, index, errors)
        return self._divergences(slab, index, errors, sharp, soft)

    def _divergences(self, slab: Slab, index: Array, errors: Array, sharp: Array, soft: Array) -> dict[str, Array]:
        """Those at T = 1 and T = 4 by name. On the host, those beyond `LARGEST_EXPONENT` are measured by logarithms."""
        if self.backend.torch is None:
            beyond = np.flatnonzero(np.isnan(sharp) | np.isnan(soft))
            if len(beyond):
                rows = slab.rows[index[beyond]]
                values = errors_of(rows, rows + errors[beyond], "kl")
                sharp[beyond], soft[beyond] = (values[name] for name in error_names("kl"))
        return dict(zip(error_names("kl"), (sharp, soft), strict=True))

    def _heaviest(self, rows: Array) -> Array:
        count = min(CLASSES, self.decoder.width)
        return self._loops.heaviest(rows, count) if self._loops else self.backend.largest(rows, count)

    def _product(self, x: Array, matrix: Array) -> Array:
        return self.backend.concatenate(
            [(self._padded(x[tile]) @ matrix)[: tile.stop - tile.start] for tile in self._tiles(len(x))]
        )

    def _tiles(self, count: int) -> list[slice]:
        step = self.tile_rows
        return [slice(start, min(start + step, count)) for start in range(0, max(count, 1), step)]

    def _padded(self, x: Array) -> Array:
        return self.backend.pad_rows(x, self.tile_rows)

    @cached_property
    def _multipliers(self) -> Array:
        return self.backend.constant(multipliers(), "float64")

    @cached_property
    def _matrix(self) -> Array:
        return self.backend.constant(self.decoder.matrix, "float64")

    @cached_property
    def _offset(self) -> Array:
        return self.backend.constant(self.decoder.offset, "float64")

    @cached_property
    def _shaping(self) -> ShapingConstants:
        settings = self.settings
        return ShapingConstants.of(self.decoder, self.factors, self.backend, settings.level, settings.weight)

    @cached_property
    def _bits(self) -> Bits:
        return Bits.of(self.decoder, self.decoder.rank, self.backend)

    @cached_property
    def factors(self) -> Factors:
        matrix = self.decoder.matrix.astype(np.float64)
        return Factors.of(matrix - matrix.mean(1, keepdims=True) if self.settings.metric == "kl" else matrix)

    @cached_property
    def _packable(self) -> tuple[Array, Array]:
        """The least and the largest integer of every coefficient whose escape fits its type.

        Digits that are fitted later will reach any: without them, the large coefficients of a saturated teacher would
        fit with no step, and finer steps would be tried until all rows are stored exactly.
        """
        if self._fitting:
            return self.backend.constant(np.array(-np.inf)), self.backend.constant(np.array(np.inf))
        lowest, reach = (part.astype(np.float64) for part in (self.decoder.packing.lowest, self.decoder.packing.reach))
        least, most = lowest - ESCAPE_LIMIT * reach, lowest + (ESCAPE_LIMIT + 1) * reach - 1
        return self.backend.constant(least), self.backend.constant(most)

    @cached_property
    def _projection(self) -> tuple[Array, Array]:
        """The offset, and the matrix [width, r] that finds the nearest point of the span (least squares)."""
        offset = self.decoder.offset.astype(np.float64)
        if self.settings.metric == "kl":
            offset = offset - offset.mean()
        return self.backend.constant(offset), self.backend.constant(self.factors.inverse)


def sweeps_of(backend: Backend) -> Sweeps:
    """Triton's on CUDA where it is installed."""
    on_gpu = not backend.on_host and backend.device.type == "cuda"
    kernels = triton_kernels() if on_gpu else None
    sweeps: Sweeps = ArraySweeps(backend) if kernels is None else kernels.TritonSweeps()
    return sweeps


def triton_kernels() -> ModuleType | None:
    """The sweeps in Triton; None where it is missing, as on Windows."""
    try:
        return import_module("redistill_cache.codecs.triton_sweeps")
    except ImportError:
        return None


@cache
def compiled_loops() -> ModuleType | None:
    """The loops compiled by numba; None where it is missing or does not support this Python or numpy."""
    try:
        from redistill_cache.codecs import compiled
    except (ImportError, RuntimeError):
        return None
    return compiled


# -- searching the level of every row ---------------------------------------------------------------------------------


def encode_linear(quantizer: Quantizer, rows: np.ndarray) -> Encoded:
    """Encode rows of numpy as described in the module docstring. Raises NotFinite."""
    check_finite(rows)
    size = quantizer.slab_rows
    starts = range(0, max(len(rows), 1), size)
    return join_parts([_LevelSearch(quantizer, rows[start : start + size]).encoded() for start in starts])


def search_coefficients(quantizer: Quantizer, rows: np.ndarray) -> np.ndarray:
    """The integers that encoding chooses for these rows, int64 [n, r], without the rows that are stored exactly."""
    size = quantizer.slab_rows
    searches = (_LevelSearch(quantizer, rows[start : start + size]) for start in range(0, len(rows), size))
    k: np.ndarray = np.concatenate([search.best.k[~search.exact].astype(np.int64) for search in searches])
    return k if len(k) else np.zeros((1, quantizer.decoder.rank), np.int64)


class _LevelSearch:
    """For every row of a slab, the coarsest level within the limit, and the row quantized at that level."""

    def __init__(self, quantizer: Quantizer, rows: np.ndarray) -> None:
        self.quantizer = quantizer
        self.limit = quantizer.settings.limit
        self.slab = quantizer.prepare(rows)
        self.exact = self.slab.too_large.copy()
        self.level = self.slab.start.copy()
        self.best = quantizer.first(self.slab)
        if len(rows):
            self._refine()
            if quantizer.settings.certified:
                self._coarsen()
            self._check_decoded(np.flatnonzero(~self.exact))

    def _failing(self) -> np.ndarray:
        return np.flatnonzero(~(self.best.worst(self.limit) <= 1.0) & ~self.exact)

    def _refine(self) -> np.ndarray:
        """Take finer steps until rows pass or are stored exactly; returns the rows that got another step."""
        failed = active = self._failing()
        if not len(active):
            return active
        projected = self.quantizer.project_only(self.slab, active)
        self.exact[active[~(projected.worst(self.limit) <= 1.0)]] = True
        while len(active := self._failing()):
            ratio = self.best.worst(self.limit)[active]
            hopeless = (self.level[active] >= LEVEL_MASK) | ~np.isfinite(ratio)
            self.exact[active[hopeless]] = True
            active, ratio = active[~hopeless], ratio[~hopeless]
            self.level[active] = np.minimum(self.level[active] + levels_of(ratio, up=True), LEVEL_MASK)
            if len(active):
                quantized = self.quantizer.quantize(self.slab, self.level, active)
                self.best.replace_rows(active, quantized, np.ones(len(active), bool))
        again: np.ndarray = failed[~self.exact[failed]]
        return again

    def _coarsen(self) -> None:
        """Try the expected coarser step, then the finest other one.

        Errors change with the step by chance as well, so a coarser step may pass where a finer one failed.
        """
        expected = self.level - levels_of(1.0 / np.maximum(self.best.worst(self.limit), 1e-12), up=False)
        before = self.level.copy()
        self._try_coarser(np.maximum(expected, 0))
        self._try_coarser(np.where((self.level == before) & (expected == before - 1), before - 2, self.level - 1))

    def _try_coarser(self, target: np.ndarray) -> None:
        """Take these levels where they are coarser and pass."""
        active = np.flatnonzero(~self.exact & (target < self.level) & (target >= 0))
        quantized = self.quantizer.quantize(self.slab, target, active)
        passed = quantized.worst(self.limit) <= 1.0
        self.best.replace_rows(active, quantized, passed)
        self.level[active[passed]] = target[active[passed]]

    def _check_decoded(self, index: np.ndarray) -> None:
        """Rows must be within the limit in the arithmetic of the decoder too; the others get a finer step."""
        while len(index):
            for name, values in self.quantizer.decoded_errors(self.slab, self.best, index, self.level).items():
                missed = ~(values <= self.limit)
                self.best.errors[name][index[missed]] = values[missed]
            index = self._refine()

    def encoded(self) -> Encoded:
        exact = self.exact
        arrays = stored_arrays(self.quantizer, self.best, self.level, exact)
        escaped = arrays["level"] & ESCAPED
        arrays["escape"] = arrays["escape"] if escaped.any() else absent(arrays["escape"].shape, "int16")
        arrays["exact"] = exact_rows(self.slab.rows, exact)
        errors = {name: np.where(exact, 0.0, values) for name, values in self.best.errors.items()}
        return Encoded(arrays=arrays, errors=errors, exact=exact, top1_kept=self.best.top1_kept | exact)


def stored_arrays(quantizer: Quantizer, best: Quantized, level: Array, exact: Array) -> dict[str, Array]:
    """The arrays of the archive but `exact`. Rows stored exactly are zero in all of them."""
    backend, packing = quantizer.backend, quantizer.decoder.packing
    k = backend.where(exact[:, None], best.k * 0.0, best.k)
    within, escape = packing.split(backend, k)
    flags = backend.cast((escape != 0).any(1), "uint8") * ESCAPED
    level = backend.where(exact, backend.cast(exact, "uint8") * EXACT, backend.cast(level, "uint8") | flags)
    arrays = {"q": packing.pack(backend, within), "level": level, "escape": backend.cast(escape, "int16")}
    if quantizer.settings.keep_shift:
        arrays["shift"] = backend.where(exact, best.shift * 0.0, best.shift)
    return arrays


def levels_of(ratio: Array, *, up: bool) -> Array:
    """How many levels change the error by this factor (the error grows with the square of the step); at least one."""
    backend = backend_of(ratio)
    levels = backend.log2(backend.clip(ratio, 1e-30, 1e30)) * (LEVELS_PER_OCTAVE / 2)
    return backend.cast(backend.clip(-backend.floor(-levels) if up else backend.floor(levels), 1, None), "int64")
