"""Pairing equal values of two arrays, a million at a time."""

from __future__ import annotations

import numpy as np

__all__ = ["pair_up", "repeats"]


def pair_up(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of equal values: the k-th occurrence of a value in `left` meets its k-th occurrence in `right`.

    Each position is used once at most; pairs come in the order of `left`.
    """
    left_order, right_order = np.argsort(left, kind="stable"), np.argsort(right, kind="stable")
    left_sorted, right_sorted = left[left_order], right[right_order]
    partner = np.searchsorted(right_sorted, left_sorted, "left")
    partner += _occurrence(left_sorted)
    found = partner < len(right)
    found[found] = right_sorted[partner[found]] == left_sorted[found]
    rows, partners = left_order[found], right_order[partner[found]]
    order = np.argsort(rows)
    return rows[order], partners[order]


def repeats(values: np.ndarray) -> np.ndarray:
    """Positions whose value occurred at an earlier position already."""
    order = np.argsort(values, kind="stable")
    return np.sort(order[_occurrence(values[order]) > 0])


def _occurrence(values: np.ndarray) -> np.ndarray:
    """For each of sorted values, how many equal ones stand before it."""
    places = np.arange(len(values))
    first = np.concatenate([np.ones(min(len(values), 1), bool), values[1:] != values[:-1]])
    return places - np.maximum.accumulate(np.where(first, places, 0))
