"""Ranges of a loss's options: one line that names the option, what it may be, and what it was."""

from __future__ import annotations

import math

from redistill_cache.errors import UsageError

__all__ = ["at_least_one", "fraction", "positive"]


def positive(name: str, value: float) -> float:
    """A finite number above 0 (temperatures, exponents, weights that may not vanish)."""
    if not (0 < value < math.inf):
        raise UsageError(f"{name} must be a finite number above 0, found {value}")
    return value


def fraction(name: str, value: float) -> float:
    """A number in 0..1, both ends allowed."""
    if not (0 <= value <= 1):
        raise UsageError(f"{name} must be in 0..1, found {value}")
    return value


def at_least_one(name: str, value: int) -> int:
    """A count of at least 1."""
    if value < 1:
        raise UsageError(f"{name} must be at least 1, found {value}")
    return value
