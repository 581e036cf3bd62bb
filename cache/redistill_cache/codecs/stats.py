"""Errors of encoded rows, and their statistics: measured per row, summed per block, merged for the archive."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from redistill_cache.codecs.backend import Array, Backend, backend_of, to_numpy
from redistill_cache.codecs.protocol import Encoded
from redistill_cache.errors import Damaged, Refused
from redistill_cache.spec import SignalSpec, TeacherSpec
from redistill_cache.strict_json import Fields, Json

__all__ = [
    "BINS_PER_OCTAVE",
    "LOWEST_OCTAVE",
    "METRICS",
    "TEMPERATURES",
    "BlockStats",
    "Centre",
    "ErrorStats",
    "NotFinite",
    "certified_bound",
    "check_finite",
    "check_stats",
    "error_names",
    "errors_of",
    "keeps_top1",
    "kl_rows",
    "log_softmax",
    "merge_stats",
    "relative_error",
    "rounded_up",
    "row_errors",
    "summarise",
    "top1_kept",
]

# -- errors per row ---------------------------------------------------------------------------------------------------

# Of logits; of features before version 1.1 of a teacher's specification; of features.
METRICS = ("kl", "relative", "centred")
TEMPERATURES = (1.0, 4.0)


class NotFinite(Refused):
    """The teacher output NaN or infinity. `rows` are the positions of these rows in the batch."""

    def __init__(self, rows: list[int], width: int) -> None:
        shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        super().__init__(
            f"expected finite teacher outputs, found NaN or Inf in {len(rows)} rows of the batch (row {shown}; {width} "
            "values each); such rows are never encoded: check the teacher's precision and the images"
        )
        self.rows = rows


def check_finite(rows: Array) -> None:
    """Raise NotFinite if a row holds NaN or infinity."""
    backend = backend_of(rows)
    bad = ~backend.isfinite(rows).all(1)
    if bool(bad.any()):
        raise NotFinite([int(i) for i in to_numpy(backend.rows_where(bad))], int(rows.shape[1]))


def log_softmax(backend: Backend, rows: Array, temperature: float) -> Array:
    """log softmax(rows / temperature) in float64."""
    scaled = backend.cast(rows, "float64") / temperature
    scaled = scaled - backend.max_of_row(scaled)
    return scaled - backend.log(backend.exp(scaled).sum(1))[:, None]


def kl_rows(exact: Array, decoded: Array, temperature: float) -> Array:
    """KL(softmax(exact / T) || softmax(decoded / T)) of every row, float64, never below zero."""
    backend = backend_of(exact)
    log_p = log_softmax(backend, exact, temperature)
    divergence = (backend.exp(log_p) * (log_p - log_softmax(backend, decoded, temperature))).sum(1)
    return backend.clip(divergence, 0.0, None)


def relative_error(exact: Array, decoded: Array) -> Array:
    """|decoded - exact| / |exact| in the Euclidean norm, of every row; for a row of zeros, |decoded|."""
    backend = backend_of(exact)
    values = backend.cast(exact, "float64")
    # Scaled first: the square of a large float32 still fits float64, the square of a tiny one may not.
    size = backend.max_of_row(backend.abs(values))
    size = backend.where(size > 0, size, size * 0 + 1.0)
    error = backend.sqrt((((backend.cast(decoded, "float64") - values) / size) ** 2).sum(1))
    norm = backend.sqrt(((values / size) ** 2).sum(1))
    return error / backend.where(norm > 0, norm, norm * 0 + 1.0)


@dataclass(frozen=True, eq=False)
class Centre:
    """What errors of metric "centred" are relative to: the distance from `offset`, or `floor` if that is larger."""

    offset: np.ndarray  # float32 [width]
    floor: float

    def size(self, rows: Array) -> Array:
        """max(|row - offset|, floor) of every row, float64."""
        backend = backend_of(rows)
        centred = backend.cast(rows, "float64") - backend.constant(self.offset, "float64")
        return backend.clip(euclidean(centred), self.floor, None)


def euclidean(values: Array) -> Array:
    """The norm of every row, float64; scaled, so that the square of a large or of a tiny value is no matter."""
    backend = backend_of(values)
    largest = backend.max_of_row(backend.abs(values))
    largest = backend.where(largest > 0, largest, largest * 0 + 1.0)
    return backend.sqrt(((values / largest) ** 2).sum(1)) * largest[:, 0]


def error_names(metric: str) -> tuple[str, ...]:
    """The kinds of error that `row_errors` measures."""
    return tuple(f"kl_t{t:g}" for t in TEMPERATURES) if metric == "kl" else (metric,)


def row_errors(exact: Array, decoded: Array, metric: str, centre: Centre | None = None) -> dict[str, np.ndarray]:
    """The errors of every row by name, float64 on the host; `centre` is needed for metric "centred"."""
    return {name: np.array(to_numpy(values)) for name, values in errors_of(exact, decoded, metric, centre).items()}


def errors_of(exact: Array, decoded: Array, metric: str, centre: Centre | None = None) -> dict[str, Array]:
    """The same, where the rows are."""
    if centre is not None:
        difference = backend_of(exact).cast(decoded, "float64") - exact
        return {metric: euclidean(difference) / centre.size(exact)}
    if metric == "relative":
        return {"relative": relative_error(exact, decoded)}
    return {f"kl_t{t:g}": kl_rows(exact, decoded, t) for t in TEMPERATURES}


# Of the 52 bits of a float64 that `rounded_up` drops.
DROPPED = (1 << 42) - 1


def rounded_up(errors: Mapping[str, Array]) -> dict[str, Array]:
    """Rounded up to 11 significant bits: the same on every machine, and never below the measured error."""
    result = {}
    for name, values in errors.items():
        backend = backend_of(values)
        result[name] = backend.view(backend.view(values, "int64") + DROPPED & ~DROPPED, "float64")
    return result


def top1_kept(exact: Array, decoded: Array) -> np.ndarray:
    """Whether the largest decoded value of every row is at a maximum of the exact row."""
    return np.array(to_numpy(keeps_top1(exact, decoded)))


def keeps_top1(exact: Array, decoded: Array) -> Array:
    """The same, on the device."""
    backend = backend_of(exact)
    best = backend.argmax_of_row(decoded)[:, None]
    return (backend.take(exact, best) == backend.max_of_row(exact))[:, 0]


# -- statistics of a block --------------------------------------------------------------------------------------------

# Log histogram: 8 bins per octave from 2**-60 up; bin 0 is everything below. A quantile is rounded up by at most 9 %.
BINS_PER_OCTAVE = 8
LOWEST_OCTAVE = -60
MAX_BIN = BINS_PER_OCTAVE * (-LOWEST_OCTAVE + 64)
MAX_COUNT = 2**48
MAX_ERROR_KINDS = 8
# Sums and logarithms are rounded; other than by that, statistics must agree with each other.
ROUNDING = 1e-9


@dataclass(frozen=True)
class ErrorStats:
    """Sum, maximum and histogram of one kind of error."""

    total: float = 0.0
    worst: float = 0.0
    histogram: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, values: np.ndarray) -> ErrorStats:
        if not len(values):
            return cls()
        with np.errstate(divide="ignore"):
            octaves = np.log2(values) - LOWEST_OCTAVE
        bins = np.clip(np.ceil(octaves * BINS_PER_OCTAVE), 0, MAX_BIN).astype(np.int64)
        histogram = {int(b): int(c) for b, c in zip(*np.unique(bins, return_counts=True), strict=True)}
        # fsum is exact, so the sum does not depend on the batches of the block.
        return cls(math.fsum(values.tolist()), float(values.max()), histogram)

    @classmethod
    def merge(cls, parts: Sequence[ErrorStats]) -> ErrorStats:
        histogram: dict[int, int] = {}
        for part in parts:
            for index, count in part.histogram.items():
                histogram[index] = histogram.get(index, 0) + count
        total = math.fsum(part.total for part in parts)
        return cls(total, max((part.worst for part in parts), default=0.0), histogram)

    def quantile(self, fraction: float) -> float:
        """The upper edge of the bin of the quantile, at most the maximum."""
        rows = sum(self.histogram.values())
        seen = 0
        for index in sorted(self.histogram):
            seen += self.histogram[index]
            if seen >= fraction * rows:
                return float(min(self.worst, 2.0 ** (LOWEST_OCTAVE + index / BINS_PER_OCTAVE)))
        return self.worst

    def is_of(self, rows: int) -> bool:
        """Whether this many errors can have this sum, maximum and histogram."""
        if sum(self.histogram.values()) != rows:
            return False
        used = [index for index, count in self.histogram.items() if count]
        lowest = sum(_lower_edge(index) * self.histogram[index] for index in used)
        last = max(used, default=0)
        in_last_bin = _lower_edge(last) * (1 - ROUNDING) <= self.worst <= _upper_edge(last) * (1 + ROUNDING)
        return in_last_bin and lowest * (1 - ROUNDING) <= self.total <= self.worst * rows * (1 + ROUNDING)

    def to_json(self) -> dict[str, Any]:
        histogram = [[index, self.histogram[index]] for index in sorted(self.histogram)]
        return {"sum": self.total, "max": self.worst, "histogram": histogram}

    @classmethod
    def from_json(cls, value: Json) -> ErrorStats:
        fields = Fields(value, "fidelity statistics of one error", Damaged)
        total, worst = (fields.number(key, 0.0, sys.float_info.max) for key in ("sum", "max"))
        histogram: dict[int, int] = {}
        for item in fields.items("histogram", MAX_BIN + 1):
            whole = isinstance(item, list) and len(item) == 2 and all(type(number) is int for number in item)
            if not whole or not (0 <= item[0] <= MAX_BIN and 0 <= item[1] <= MAX_COUNT):
                fields.refuse("histogram", f"a list of [bin from 0 to {MAX_BIN}, count from 0 to {MAX_COUNT}]")
            histogram[item[0]] = item[1]
        fields.done()
        return cls(total, worst, histogram)


def _upper_edge(index: int) -> float:
    return math.inf if index == MAX_BIN else 2.0 ** (LOWEST_OCTAVE + index / BINS_PER_OCTAVE)


def _lower_edge(index: int) -> float:
    return 0.0 if index == 0 else 2.0 ** (LOWEST_OCTAVE + (index - 1) / BINS_PER_OCTAVE)


@dataclass(frozen=True)
class BlockStats:
    """Errors of the encoded rows of one block or, merged, of a whole archive."""

    rows: int = 0
    exact_rows: int = 0
    top1_kept: int = 0
    errors: Mapping[str, ErrorStats] = field(default_factory=dict)

    @classmethod
    def of(cls, encoded: Encoded) -> BlockStats:
        return cls(
            rows=len(encoded),
            exact_rows=int(encoded.exact.sum()),
            top1_kept=int(encoded.top1_kept.sum()),
            errors={name: ErrorStats.of(values) for name, values in encoded.errors.items()},
        )

    @classmethod
    def merge(cls, parts: Iterable[BlockStats]) -> BlockStats:
        """The statistics of all parts together, in any order."""
        parts = list(parts)
        names = sorted({name for part in parts for name in part.errors})
        return cls(
            rows=sum(part.rows for part in parts),
            exact_rows=sum(part.exact_rows for part in parts),
            top1_kept=sum(part.top1_kept for part in parts),
            errors={
                name: ErrorStats.merge([part.errors[name] for part in parts if name in part.errors]) for name in names
            },
        )

    def summary(self) -> dict[str, float]:
        """Mean, p99 and maximum of every error (`mean_kl_t1`, ...), the number of exact rows, the top-1 agreement."""
        rows = max(self.rows, 1)
        result: dict[str, float] = {}
        for name, stats in self.errors.items():
            result[f"mean_{name}"] = stats.total / rows
            result[f"p99_{name}"] = stats.quantile(0.99)
            result[f"max_{name}"] = stats.worst
        result["exact_rows"] = self.exact_rows
        result["top1_agreement"] = self.top1_kept / rows
        return result

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "exact_rows": self.exact_rows,
            "top1_kept": self.top1_kept,
            "errors": {name: stats.to_json() for name, stats in self.errors.items()},
        }

    @classmethod
    def from_json(cls, value: Json) -> BlockStats:
        """From a commit record or a manifest, which are untrusted: anything unexpected is Damaged."""
        fields = Fields(value, "fidelity statistics", Damaged)
        rows = fields.integer("rows", 0, MAX_COUNT)
        errors = fields.mapping("errors")
        if len(errors) > MAX_ERROR_KINDS:
            fields.refuse("errors", f"an object of at most {MAX_ERROR_KINDS} kinds of error")
        stats = cls(
            rows=rows,
            exact_rows=fields.integer("exact_rows", 0, rows),
            top1_kept=fields.integer("top1_kept", 0, rows),
            errors={name: ErrorStats.from_json(item) for name, item in errors.items()},
        )
        fields.done()
        for name, errors_of_kind in stats.errors.items():
            if not errors_of_kind.is_of(rows):
                raise Damaged(
                    f"fidelity statistics: sum, maximum and histogram of {name!a:.40} contradict each other, or are "
                    f"not of {rows} rows"
                )
        return stats


# -- statistics of an archive -----------------------------------------------------------------------------------------


def merge_stats(teacher: TeacherSpec, stats: Sequence[Mapping[str, Json] | None]) -> dict[str, Json]:
    """The statistics of all blocks together, by signal; none for a signal that some block did not measure."""
    merged: dict[str, Json] = {}
    for signal in teacher.signals:
        parts = [item[signal.name] for item in stats if item is not None and signal.name in item]
        if parts and len(parts) == len(stats):
            try:
                merged[signal.name] = BlockStats.merge(BlockStats.from_json(part) for part in parts).to_json()
            except OverflowError:
                raise Damaged(f"fidelity statistics of signal {signal.name!r}: errors add up to infinity") from None
    return merged


def check_stats(teacher: TeacherSpec, stats: Mapping[str, Json], rows: int) -> None:
    """`Damaged` unless these can be the statistics of a teacher's signals over this many rows.

    They remain the writer's word: without the teacher, a reader cannot measure them.
    """
    signals = {signal.name: signal for signal in teacher.signals}
    for name, value in stats.items():
        if name not in signals:
            raise Damaged(f"fidelity statistics of {name!a:.40}, a signal that teacher {teacher.name!r} does not have")
        found, bound = BlockStats.from_json(value), certified_bound(signals[name])
        where = f"fidelity statistics of teacher {teacher.name!r}, signal {name!r}"
        if found.rows != rows:
            raise Damaged(f"{where}: expected those of {rows} rows, found {found.rows}")
        worst = max((errors.worst for errors in found.errors.values()), default=0.0)
        if bound is not None and worst > bound:
            raise Damaged(f"{where}: expected errors up to the certified bound of {bound:g}, found {worst:g}")


def certified_bound(signal: SignalSpec) -> float | None:
    """The bound on the error of every row that the codec certifies; None if it certifies none."""
    fidelity = signal.config.get("fidelity")
    certifies = signal.codec in ("float16", "compander") or (
        signal.codec == "linear" and signal.config.get("certified") is True
    )
    return float(fidelity) if certifies and isinstance(fidelity, int | float) else None


def summarise(stats: Json) -> dict[str, float]:
    """`BlockStats.summary` of the statistics in a manifest."""
    try:
        return BlockStats.from_json(stats).summary()
    except Damaged as error:
        raise Damaged(f"manifest: {error}") from None
