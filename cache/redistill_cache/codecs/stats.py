"""Fidelity statistics that add: one small record per block, merged for the archive."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from redistill_cache.codecs.protocol import Encoded
from redistill_cache.codecs.space import Array, Space, space_of, to_numpy
from redistill_cache.errors import Damaged, Refused
from redistill_cache.spec import TeacherSpec
from redistill_cache.strict_json import Json

__all__ = [
    "TEMPERATURES",
    "BlockStats",
    "ErrorStats",
    "NotFinite",
    "check_finite",
    "kl_rows",
    "log_softmax",
    "merge_stats",
    "relative_error",
    "rounded_up",
    "summarise",
]


# -- certify ----------------------------------------------------------------------------------------------------------
#
# The certificate: what a decoded row lost, measured in float64 on the distributions a student will be trained on.

TEMPERATURES = (1.0, 4.0)


class NotFinite(Refused):
    """A teacher said NaN or infinity. `rows` are the positions of the offending rows in what was given to encode."""

    def __init__(self, rows: list[int], width: int) -> None:
        shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        super().__init__(
            f"expected finite teacher outputs, found NaN or Inf in {len(rows)} of the rows given (row {shown} of this "
            f"batch, {width} values each); such rows are never encoded: look at the teacher's precision and the images"
        )
        self.rows = rows


def check_finite(rows: Array) -> None:
    """Raise NotFinite naming the rows that hold NaN or infinity."""
    space = space_of(rows)
    bad = ~space.isfinite(rows).all(1)
    if bool(bad.any()):
        raise NotFinite([int(i) for i in to_numpy(space.rows_where(bad))], int(rows.shape[1]))


def log_softmax(space: Space, rows: Array, temperature: float) -> Array:
    """log softmax(rows / temperature) in float64."""
    scaled = space.cast(rows, "float64") / temperature
    scaled = scaled - space.max_of_row(scaled)
    return scaled - space.log(space.exp(scaled).sum(1))[:, None]


def kl_rows(exact: Array, decoded: Array, temperature: float) -> Array:
    """KL(softmax(exact / T) || softmax(decoded / T)) of every row, float64, never below zero."""
    space = space_of(exact)
    truth = log_softmax(space, exact, temperature)
    lost = (space.exp(truth) * (truth - log_softmax(space, decoded, temperature))).sum(1)
    return space.clip(lost, 0.0, None)


def relative_error(exact: Array, decoded: Array) -> Array:
    """|decoded - exact| / |exact| in the Euclidean norm, of every row; of a zero row, the error itself."""
    space = space_of(exact)
    truth = space.cast(exact, "float64")
    # Scaled first: the square of a large float32 still fits float64, the square of a tiny one may not.
    size = space.max_of_row(space.abs(truth))
    size = space.where(size > 0, size, size * 0 + 1.0)
    lost = space.sqrt((((space.cast(decoded, "float64") - truth) / size) ** 2).sum(1))
    norm = space.sqrt(((truth / size) ** 2).sum(1))
    return lost / space.where(norm > 0, norm, norm * 0 + 1.0)


def rounded_up(errors: np.ndarray) -> np.ndarray:
    """To 11 significant bits, upward: the same on every machine, and never less than was lost."""
    mantissa, exponent = np.frexp(errors)
    up: np.ndarray = np.ldexp(np.ceil(mantissa * 2048.0) / 2048.0, exponent)
    return up


# -- stats ------------------------------------------------------------------------------------------------------------

# Log histogram: 8 bins an octave from 2**-60 up; bin 0 is everything below. A quantile is right to 9 %, rounded up.
BINS_PER_OCTAVE = 8
LOWEST_OCTAVE = -60
MAX_BIN = BINS_PER_OCTAVE * (-LOWEST_OCTAVE + 64)


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
        bins, counts = np.unique(_bins(values), return_counts=True)
        # fsum is exact, so the record does not depend on how the block was batched.
        histogram = {int(b): int(c) for b, c in zip(bins, counts, strict=True)}
        return cls(math.fsum(values.tolist()), float(values.max()), histogram)

    def quantile(self, fraction: float) -> float:
        """The upper edge of the bin in which the quantile lies, at most the maximum."""
        rows = sum(self.histogram.values())
        seen = 0
        for index in sorted(self.histogram):
            seen += self.histogram[index]
            if seen >= fraction * rows:
                return float(min(self.worst, 2.0 ** (LOWEST_OCTAVE + index / BINS_PER_OCTAVE)))
        return self.worst


@dataclass(frozen=True)
class BlockStats:
    """What the encoded rows of one block, or of a whole archive, lost."""

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
        """The statistics of all parts together; the order of the parts does not matter."""
        parts = list(parts)
        names = sorted({name for part in parts for name in part.errors})
        return cls(
            rows=sum(part.rows for part in parts),
            exact_rows=sum(part.exact_rows for part in parts),
            top1_kept=sum(part.top1_kept for part in parts),
            errors={name: _merge([part.errors[name] for part in parts if name in part.errors]) for name in names},
        )

    def summary(self) -> dict[str, float]:
        """mean, p99 and max of every error (`mean_kl_t1`, ...), the share of rows kept exactly and of top-1 kept."""
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
        errors = {
            name: {
                "sum": stats.total,
                "max": stats.worst,
                "histogram": [[index, stats.histogram[index]] for index in sorted(stats.histogram)],
            }
            for name, stats in self.errors.items()
        }
        return {
            "rows": self.rows,
            "exact_rows": self.exact_rows,
            "top1_kept": self.top1_kept,
            "errors": errors,
        }

    @classmethod
    def from_json(cls, value: object) -> BlockStats:
        """From a commit record, which is untrusted: anything unexpected is Damaged."""
        record = _record(value, {"rows", "exact_rows", "top1_kept", "errors"})
        rows = _count(record["rows"])
        errors = record["errors"]
        if not isinstance(errors, dict) or len(errors) > 8 or not all(isinstance(name, str) for name in errors):
            raise Damaged("expected at most 8 kinds of error in fidelity statistics, found something else")
        return cls(
            rows=rows,
            exact_rows=_count(record["exact_rows"], rows),
            top1_kept=_count(record["top1_kept"], rows),
            errors={name: _error_stats(item) for name, item in errors.items()},
        )


def _bins(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        octaves = np.log2(values) - LOWEST_OCTAVE
    bins: np.ndarray = np.clip(np.ceil(octaves * BINS_PER_OCTAVE), 0, MAX_BIN).astype(np.int64)
    return bins


def _merge(parts: list[ErrorStats]) -> ErrorStats:
    histogram: dict[int, int] = {}
    for part in parts:
        for index, count in part.histogram.items():
            histogram[index] = histogram.get(index, 0) + count
    total = math.fsum(part.total for part in parts)
    return ErrorStats(total, max((part.worst for part in parts), default=0.0), histogram)


def _record(value: object, keys: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != keys:
        raise Damaged(f"expected fidelity statistics with {', '.join(sorted(keys))}, found {str(value)[:80]!r}")
    return value


def _count(value: object, limit: int = 2**48) -> int:
    if type(value) is not int or not 0 <= value <= limit:
        raise Damaged(f"expected a count of at most {limit} in fidelity statistics, found {str(value)[:40]!r}")
    return value


def _error_stats(value: object) -> ErrorStats:
    record = _record(value, {"sum", "max", "histogram"})
    for key in ("sum", "max"):
        number = record[key]
        if type(number) not in (int, float) or not 0 <= number < math.inf:
            raise Damaged(f"expected a finite {key} of errors, found {str(number)[:40]!r}")
    histogram = record["histogram"]
    if not isinstance(histogram, list) or len(histogram) > MAX_BIN + 1:
        raise Damaged("expected a histogram of errors as a list of [bin, count], found something else")
    bins: dict[int, int] = {}
    for item in histogram:
        if not isinstance(item, list) or len(item) != 2:
            raise Damaged(f"expected [bin, count] in a histogram of errors, found {str(item)[:40]!r}")
        bins[_count(item[0], MAX_BIN)] = _count(item[1])
    return ErrorStats(float(record["sum"]), float(record["max"]), bins)


# -- fidelity ---------------------------------------------------------------------------------------------------------
#
# What the codecs lost, merged over blocks.


def merge_stats(teacher: TeacherSpec, stats: Sequence[Mapping[str, Json] | None]) -> dict[str, Json]:
    """Per signal, the statistics of all blocks together; nothing for a signal that some block did not measure."""
    merged: dict[str, Json] = {}
    for signal in teacher.signals:
        parts = [item[signal.name] for item in stats if item is not None and signal.name in item]
        if parts and len(parts) == len(stats):
            try:
                merged[signal.name] = BlockStats.merge(BlockStats.from_json(part) for part in parts).to_json()
            except OverflowError:
                raise Damaged(f"fidelity statistics of signal {signal.name!r}: errors add up to infinity") from None
    return merged


def summarise(stats: Json) -> dict[str, float]:
    """The figures a reader of `inspect` wants."""
    try:
        return BlockStats.from_json(stats).summary()
    except Damaged as error:
        raise Damaged(f"fidelity statistics of the manifest: {error}") from None
