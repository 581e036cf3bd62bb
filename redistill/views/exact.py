"""Quantile tables computed with correctly rounded operations only, so that every platform gets the same bits.

exp, log and pow of the C library differ in the last place between platforms; + - * / and sqrt of IEEE-754 doubles do
not. A power x**a is the product of repeated square roots chosen by the bits of a; the tables follow from it.
"""

from __future__ import annotations

from functools import lru_cache
from math import floor

import numpy as np
import numpy.typing as npt

from redistill.views.recipe import WEIGHT_UNIT

__all__ = ["ENTRIES", "beta_weights", "log_uniform", "power"]

Floats = npt.NDArray[np.float64]

ENTRIES = 1 << 16
EXPONENT_BITS = 24  # exponents are rounded to the nearest 2**-24
SERIES_TERMS = 90  # x <= 1/2: the terms fall at least as fast as 2**-n once n passes the exponent


def power(base: Floats, exponent: float) -> Floats:
    """base ** exponent for base >= 0 and exponent >= 0, by multiplications and square roots only."""
    whole = floor(exponent)
    fraction = round((exponent - whole) * 2**EXPONENT_BITS)
    result = np.ones_like(base)
    for _ in range(whole):
        result = result * base
    root = base
    for bit in reversed(range(EXPONENT_BITS + 1)):  # bit 24 is the carry of a fraction that rounded up to one
        if fraction >> bit & 1:
            result = result * root
        root = np.sqrt(root)
    return result


@lru_cache(maxsize=16)
def log_uniform(low: float, high: float) -> Floats:
    """The quantiles of a log-uniform variable on [low, high]: low * (high / low) ** ((j + 1/2) / 65536)."""
    half_steps = 2 * np.arange(ENTRIES) + 1
    root = np.float64(high) / np.float64(low)
    table = np.full(ENTRIES, low, np.float64)
    for bit in reversed(range(17)):
        root = np.sqrt(root)
        table = np.where(half_steps >> bit & 1, table * root, table)
    table.setflags(write=False)
    return table


@lru_cache(maxsize=16)
def beta_weights(alpha: float) -> npt.NDArray[np.int64]:
    """The quantiles of Beta(alpha, alpha), as weights in units of 1/65535, one for each of 65536 equal chances."""
    edges = (np.arange(WEIGHT_UNIT) + 0.5) / WEIGHT_UNIT  # between neighbouring weights
    cumulative = _symmetric_beta_cdf(edges, alpha)
    chances = (np.arange(ENTRIES) + 0.5) / ENTRIES
    table = np.searchsorted(cumulative, chances, side="left").astype(np.int64)
    table.setflags(write=False)
    return table


def _symmetric_beta_cdf(x: Floats, alpha: float) -> Floats:
    """I_x(alpha, alpha) by its power series below 1/2 and by symmetry above; I_1/2 = 1/2 gives the constant."""
    near = np.append(np.minimum(x, 1.0 - x), 0.5)
    term = np.ones_like(near)
    total = term / alpha
    for n in range(1, SERIES_TERMS):
        term = term * near * ((n - alpha) / n)
        total = total + term / (alpha + n)
    unscaled = power(near, alpha) * total
    lower = unscaled[:-1] * (0.5 / unscaled[-1])
    cumulative: Floats = np.where(x <= 0.5, lower, 1.0 - lower)
    return cumulative
