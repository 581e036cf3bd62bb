"""The inner loops of the encoder, compiled by numba: one row at a time, so that its state stays in the cache.

Only writers import this module. The first use compiles it, in some seconds; numba keeps the result on disk. The
arithmetic is that of `rounding.ArraySweeps` and of `divergence`, in float64; only the order of sums differs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from redistill_cache.codecs.divergence import COEFFICIENTS, DOUBLINGS, LARGEST_EXPONENT, SMALL
from redistill_cache.codecs.rounding import CLASSES, ESCAPE_BITS, Curvature, ShapingConstants, Swept

__all__ = ["CompiledSweeps", "divergences", "heaviest", "measure"]

# Coefficients between two updates of S**-1: the sums over a group are unrolled below.
GROUP = 4
C0, C1, C2, C3, C4, C5, C6, C7, C8, C9, C10, C11, C12, C13 = COEFFICIENTS
OPTIONS: dict[str, Any] = {
    "cache": True,
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "arcp", "nsz"},
}


class CompiledSweeps:
    """`rounding.Sweeps` on the host."""

    def forward(self, constants: ShapingConstants, of: Curvature) -> Swept:
        shape = (len(of.chosen), constants.count)
        u, g, free = np.empty((*shape, CLASSES)), np.empty((*shape, CLASSES)), np.empty(shape)
        _forward(constants.orthonormal, of.chosen, of.sharp, of.scale, u, g, free)
        return u, g, free

    def backward(
        self, constants: ShapingConstants, swept: Swept, index: np.ndarray, steps: np.ndarray, level: np.ndarray
    ) -> np.ndarray:
        k = np.empty(steps.shape)
        tables = constants.columns, constants.first_bit, constants.next_bit, constants.lowest, constants.highest
        _backward(*swept, index, steps, level, *tables, constants.bit_price, k)
        return k


@njit(**OPTIONS)
def _forward(orthonormal, chosen, sharp, scale, u, g, free):
    rows, count = free.shape
    inverse = np.empty((CLASSES, CLASSES))
    v, w = np.empty((GROUP, CLASSES)), np.empty((GROUP, CLASSES))
    centre = np.empty(count)
    for row in range(rows):
        centre[:] = 0.0
        for m in range(0, CLASSES, 4):
            p0, p1, p2, p3 = sharp[row, m], sharp[row, m + 1], sharp[row, m + 2], sharp[row, m + 3]
            q0, q1 = orthonormal[chosen[row, m]], orthonormal[chosen[row, m + 1]]
            q2, q3 = orthonormal[chosen[row, m + 2]], orthonormal[chosen[row, m + 3]]
            for j in range(count):
                centre[j] += (p0 * q0[j] + p1 * q1[j]) + (p2 * q2[j] + p3 * q3[j])
        for start in range(0, count, 8):  # in the order of the cache lines of u
            for m in range(CLASSES):
                index, factor = chosen[row, m], scale[row, m]
                for j in range(start, min(start + 8, count)):
                    u[row, j, m] = (orthonormal[index, j] - centre[j]) * factor
        for i in range(CLASSES):
            for m in range(CLASSES):
                inverse[i, m] = 0.0
            inverse[i, i] = 1.0
        for start in range(0, count, GROUP):
            size = min(GROUP, count - start)
            for j in range(size):
                x, vector = u[row, start + j], v[j]
                for m in range(CLASSES):
                    vector[m] = 0.0
                for i in range(0, CLASSES, 8):
                    a0, a1, a2, a3 = x[i], x[i + 1], x[i + 2], x[i + 3]
                    a4, a5, a6, a7 = x[i + 4], x[i + 5], x[i + 6], x[i + 7]
                    for m in range(CLASSES):
                        vector[m] += (
                            (inverse[i, m] * a0 + inverse[i + 1, m] * a1)
                            + (inverse[i + 2, m] * a2 + inverse[i + 3, m] * a3)
                        ) + (
                            (inverse[i + 4, m] * a4 + inverse[i + 5, m] * a5)
                            + (inverse[i + 6, m] * a6 + inverse[i + 7, m] * a7)
                        )
                for i in range(j):  # the rows of the group before this one
                    share = 0.0
                    for m in range(CLASSES):
                        share += w[i, m] * x[m]
                    for m in range(CLASSES):
                        vector[m] -= v[i, m] * share
                coupling = 0.0
                for m in range(CLASSES):
                    coupling += x[m] * vector[m]
                free[row, start + j] = 1.0 + coupling
                for m in range(CLASSES):
                    w[j, m] = vector[m] / (1.0 + coupling)
                    g[row, start + j, m] = w[j, m]
            if size == GROUP:  # after a shorter one nothing follows
                for i in range(CLASSES):
                    a0, a1, a2, a3 = v[0, i], v[1, i], v[2, i], v[3, i]
                    for m in range(CLASSES):
                        inverse[i, m] -= (a0 * w[0, m] + a1 * w[1, m]) + (a2 * w[2, m] + a3 * w[3, m])


@njit(**OPTIONS)
def _backward(u, g, free, index, steps, level, columns, first_bit, next_bit, lowest, highest, bit_price, k):
    count = steps.shape[1]
    carried, s = np.empty(count), np.empty(CLASSES)
    for at in range(len(index)):
        row = index[at]
        first, following = first_bit[level[at]], next_bit[level[at]]
        carried[:] = 0.0
        s[:] = 0.0
        for j in range(count - 1, -1, -1):
            pull = 0.0
            for m in range(CLASSES):
                pull += g[row, j, m] * s[m]
            scale, x = columns[j, j], steps[at, j]
            target = x - (pull + carried[j]) / scale
            price = bit_price / (2.0 * free[row, j] * scale**2)
            size = abs(target)
            nearest = np.floor(size + 0.5 - min(max(price * following[j], 0.0), 0.5))
            if nearest == 1.0 and size < 0.5 + price * first[j]:
                nearest = 0.0
            if target < 0:
                nearest = -nearest
            inside = min(max(nearest, lowest[j]), highest[j])
            if (inside - target) ** 2 - (nearest - target) ** 2 < price * (2.0 * ESCAPE_BITS):
                nearest = inside
            k[at, j] = nearest
            error = nearest - x
            y = scale * error + carried[j]
            for i in range(j):
                carried[i] += columns[j, i] * error
            for m in range(CLASSES):
                s[m] += u[row, j, m] * y


@njit(**OPTIONS)
def heaviest(rows, count):
    """The columns of the `count` largest values of every row, int64 [n, count]; of equal values, the first columns."""
    chosen = np.empty((len(rows), count), np.int64)
    values = np.empty(count, rows.dtype)
    for row in range(len(rows)):
        found = 0
        for column in range(rows.shape[1]):
            value = rows[row, column]
            if found == count and value <= values[count - 1]:
                continue
            at = min(found, count - 1)
            while at > 0 and values[at - 1] < value:
                values[at], chosen[row, at] = values[at - 1], chosen[row, at - 1]
                at -= 1
            values[at], chosen[row, at] = value, column
            found = min(found + 1, count)
    return chosen


# -- divergences ------------------------------------------------------------------------------------------------------


@njit(**OPTIONS)
def divergences(weights, total_sharp, total_soft, index, errors):
    """`divergence.Softmax.divergences`: [2, m], at T = 1 and T = 4."""
    result = np.empty((2, len(index)))
    for at in range(len(index)):
        row = index[at]
        result[0, at], result[1, at] = _divergences(weights[row], total_sharp[row], total_soft[row], errors[at])
    return result


@njit(**OPTIONS)
def measure(weights, total_sharp, total_soft, rows, top, base, index, errors):
    """`divergences` of `errors` after `base` is added to them, in place; and `stats.keeps_top1` [m].

    `top` is the first column of the largest value of every row.
    """
    result, kept = np.empty((2, len(index))), np.empty(len(index), np.bool_)
    for at in range(len(index)):
        row, e, exact, more = index[at], errors[at], rows[index[at]], base[index[at]]
        for c in range(len(e)):
            e[c] += more[c]
        first, rivals = top[row], 0
        largest = exact[first] + e[first]
        for c in range(len(e)):
            rivals += exact[c] + e[c] >= largest
        if rivals > 1:
            for c in range(len(e)):
                if exact[c] + e[c] > largest or (exact[c] + e[c] == largest and c < first):
                    first, largest = c, exact[c] + e[c]
        kept[at] = exact[first] == exact[top[row]]
        result[0, at], result[1, at] = _divergences(weights[row], total_sharp[row], total_soft[row], e)
    return result, kept


@njit(**OPTIONS)
def _divergences(weights, total_sharp, total_soft, e):
    sharp_mean, soft_mean = 0.0, 0.0
    for c in range(len(e)):
        sharp_mean += (weights[c] * weights[c]) ** 2 * e[c]
        soft_mean += weights[c] * e[c]
    sharp = _excess(weights, e, sharp_mean / total_sharp, 1.0)
    soft = _excess(weights, e, soft_mean / total_soft, 4.0)
    return np.log1p(sharp / total_sharp), np.log1p(soft / total_soft)


@njit(**OPTIONS)
def _excess(weights, e, mean, temperature):
    """The sum of w (exp(x) - 1 - x), with w**4 at T = 1."""
    total, large = 0.0, 0
    scale = 1.0 / (temperature * 2.0**DOUBLINGS)
    # A loop without branches for each temperature, and a count of the errors for which it does not hold.
    if temperature == 1.0:
        for c in range(len(e)):
            large += abs(e[c] - mean) > SMALL * temperature
            total += (weights[c] * weights[c]) ** 2 * _small_excess((e[c] - mean) * scale)
    else:
        for c in range(len(e)):
            large += abs(e[c] - mean) > SMALL * temperature
            total += weights[c] * _small_excess((e[c] - mean) * scale)
    if large == 0:
        return total
    total = 0.0
    for c in range(len(e)):
        x = (e[c] - mean) / temperature
        if abs(x) > LARGEST_EXPONENT:
            return np.nan
        weight = (weights[c] * weights[c]) ** 2 if temperature == 1.0 else weights[c]
        total += weight * (np.exp(x) - 1.0 - x if abs(x) > SMALL else _small_excess((e[c] - mean) * scale))
    return total


@njit(**OPTIONS)
def _small_excess(t):
    """exp(8 t) - 1 - 8 t for |t| <= 1/2."""
    h = C13
    h = h * t + C12
    h = h * t + C11
    h = h * t + C10
    h = h * t + C9
    h = h * t + C8
    h = h * t + C7
    h = h * t + C6
    h = h * t + C5
    h = h * t + C4
    h = h * t + C3
    h = h * t + C2
    h = h * t + C1
    h = (h * t + C0) * t * t
    h = 2.0 * h + (h + t) ** 2
    h = 2.0 * h + (h + 2.0 * t) ** 2
    return 2.0 * h + (h + 4.0 * t) ** 2
