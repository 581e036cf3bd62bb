"""Is a confidence of 0.8 right 8 times in 10? Reliability tables and calibration errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redistill.losses.options import at_least_one

__all__ = ["BINS", "Bin", "adaptive_ece", "ece", "reliability"]

BINS = 15


@dataclass(frozen=True)
class Bin:
    """One bar of a reliability diagram: the rows whose confidence is in (low, high]."""

    low: float
    high: float
    rows: int
    confidence: float | None  # mean over the rows; None where there are none
    accuracy: float | None


def reliability(confidence: NDArray[Any], right: NDArray[np.bool_], *, bins: int = BINS) -> tuple[Bin, ...]:
    """The reliability table: equal-width bins (k/bins, (k+1)/bins] of the confidence, closed above."""
    at_least_one("bins", bins)
    wide = np.asarray(confidence, dtype=np.float64)
    place = np.clip(np.ceil(wide * bins).astype(np.int64) - 1, 0, bins - 1)
    rows = np.bincount(place, minlength=bins)
    confidences = np.bincount(place, weights=wide, minlength=bins)
    rights = np.bincount(place, weights=right, minlength=bins)
    return tuple(
        Bin(k / bins, (k + 1) / bins, int(n), float(c / n) if n else None, float(r / n) if n else None)
        for k, (n, c, r) in enumerate(zip(rows, confidences, rights, strict=True))
    )


def ece(confidence: NDArray[Any], right: NDArray[np.bool_], *, bins: int = BINS) -> float:
    """Expected calibration error (Guo et al. 2017): mean over rows of |accuracy - confidence| of the row's bin."""
    table = reliability(confidence, right, bins=bins)
    gaps = (
        b.rows * abs(b.accuracy - b.confidence) for b in table if b.accuracy is not None and b.confidence is not None
    )
    return sum(gaps) / max(len(confidence), 1)


def adaptive_ece(confidence: NDArray[Any], right: NDArray[np.bool_], *, bins: int = BINS) -> float:
    """The same over bins of equal count (give or take one row), rows sorted by confidence, wrong before right."""
    at_least_one("bins", bins)
    order = np.lexsort((right, confidence))
    gap = right[order].astype(np.float64) - confidence[order].astype(np.float64)
    return float(sum(abs(part.sum()) for part in np.array_split(gap, bins)) / max(len(gap), 1))
