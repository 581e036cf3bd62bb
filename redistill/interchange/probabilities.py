"""Soft labels as logits: the logarithm of probabilities, times the temperature that they were computed at.

Logits are defined up to a constant per row, so nothing is lost by this, except where a probability was rounded to 0 or
where only the largest ones were kept. Both are counted. A probability of 0 becomes half of the smallest number of its
type, since a larger one would not have been rounded to 0. The mass that the largest probabilities leave is shared
evenly by the other classes, as the programs that wrote them do.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from redistill_cache.errors import Refused

__all__ = ["check_probabilities", "check_top", "logits_of", "logits_of_top"]

# How far the sum of a row of this type may be from 1.
TOLERANCE = {"float16": 1e-2, "float32": 1e-3, "float64": 1e-3}
# The least mass of the other classes, as in codec topk.
LEAST_TAIL = 1e-12


def check_probabilities(rows: np.ndarray, where: str) -> Counter[str]:
    """Refuse rows [..., C] that are not probabilities of all classes; what they lost."""
    _check_range(rows, where)
    sums = rows.sum(-1, dtype=np.float64)
    worst = float(np.abs(sums - 1).max(initial=0))
    if worst > TOLERANCE[rows.dtype.name]:
        raise Refused(f"{where}: expected probabilities that sum to 1, found a sum that differs from it by {worst:.3g}")
    return _zeros(rows)


def check_top(ids: np.ndarray, top: np.ndarray, num_classes: int, where: str) -> Counter[str]:
    """Refuse `top` [..., k] unless they are probabilities of different classes `ids`; what they lost."""
    _check_range(top, where)
    if ids.min(initial=0) < 0 or ids.max(initial=0) >= num_classes:
        raise Refused(
            f"{where}: expected classes from 0 to {num_classes - 1}, found {ids.min()} to {ids.max()}; check --classes"
        )
    if (np.diff(np.sort(ids, -1), axis=-1) == 0).any():
        raise Refused(f"{where}: one view has two probabilities of the same class")
    sums = top.sum(-1, dtype=np.float64)
    if float(sums.max(initial=0)) > 1 + TOLERANCE[top.dtype.name]:
        raise Refused(f"{where}: expected probabilities that sum to at most 1, found {float(sums.max()):.4g}")
    counts = _zeros(top)
    if num_classes > top.shape[-1]:
        others, smallest = num_classes - top.shape[-1], top.min(-1).astype(np.float64)
        share = (1 - sums) / others
        if float(((share - smallest) * others).max(initial=0)) > TOLERANCE[top.dtype.name]:  # more than rounding leaves
            raise Refused(
                f"{where}: in one view the other {others} classes have more mass than fits below the stored ones, so "
                "these are not the largest probabilities; check --classes"
            )
        counts["views whose other classes have no mass: it was dropped, or rounded away"] = int((share <= 0).sum())
        counts["views whose other classes have more mass than fits below the stored ones; it is cut to that"] = int(
            (share > smallest).sum()
        )
    return +counts


def logits_of(rows: np.ndarray, temperature: float) -> np.ndarray:
    """float32 [n, C] of checked probabilities of all classes."""
    return (temperature * _log(rows)).astype(np.float32)


def logits_of_top(ids: np.ndarray, top: np.ndarray, num_classes: int, temperature: float) -> np.ndarray:
    """float32 [n, C] of checked probabilities [n, k] of the classes `ids`; the others share the rest evenly."""
    rows = np.empty((len(ids), num_classes))
    logs = _log(top)
    if num_classes > top.shape[1]:
        tail = np.maximum(1 - top.sum(1, dtype=np.float64), LEAST_TAIL) / (num_classes - top.shape[1])
        # Not above the smallest of the top k: rounding can leave more mass than the others can have.
        rows[:] = np.minimum(np.log(tail), logs.min(1))[:, None]
    np.put_along_axis(rows, ids, logs, axis=1)
    return (temperature * rows).astype(np.float32)


def _check_range(values: np.ndarray, where: str) -> None:
    if not np.isfinite(values).all():
        raise Refused(f"{where}: found NaN or infinity, expected probabilities")
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    if low < 0 or high > 1 + TOLERANCE[values.dtype.name]:
        raise Refused(f"{where}: expected probabilities from 0 to 1, found {low:.4g} to {high:.4g}")


def _zeros(values: np.ndarray) -> Counter[str]:
    zeros = int((values == 0).sum())
    text = f"probabilities that {values.dtype.name} rounded to 0, stored as half of its smallest number"
    return Counter({text: zeros}) if zeros else Counter()


def _log(values: np.ndarray) -> np.ndarray:
    smallest = float(np.finfo(values.dtype).smallest_subnormal)
    halves = smallest / 2 if smallest > 1e-300 else smallest  # half of the smallest float64 is 0
    wide = values.astype(np.float64)
    return np.log(np.where(wide > 0, wide, halves))
