"""Shaped rounding: coefficients are rounded jointly, so that the softmax changes as little as possible.

To second order, KL(softmax(z / T) || softmax((z + e) / T)) = e' H e / 2 with H = (diag p - p p') / T**2. Plain rounding
makes e white. Nearest-plane (Babai) rounding takes the coefficients one by one, those of least variance first, and
moves every target to compensate for the errors made so far. The exact form needs a Cholesky factor of every row's H in
the basis: r**3 / 3 operations, and r**2 * width more to form H.

The few classes with most of a row's probability determine nearly all of the shape of H, which is approximated by
base * (I + U'U): the m classes of largest weight as rows of U, and one number for all others. With an orthonormal basis
(any basis becomes one by a QR decomposition, whose triangle R joins the recursion), m dimensions are enough to compute
the compensation:

    s = sum over rounded j of u_j y_j          y = R (k - x): errors in orthonormal coordinates
    best y_j = - u_j' S_j**-1 s,               S_j = I + sum over i <= j of u_i u_i'

u_j' S_j**-1 depends on the probabilities of the row and not on its step. So there are two sweeps:

* forward, once for a row, from the first coefficient to the last: S_j**-1 is updated by rank one, and
  g_j = S_j**-1 u_j and free_j = 1 + u_j' S_(j-1)**-1 u_j are kept, about 4 r m**2 operations;
* backward, once for every step that is tried, from the last coefficient to the first: the target of a coefficient is
  x_j - (g_j's + what the triangle carries over) / R_jj, about r**2 + 4 r m operations.

free_j R_jj**2, the curvature of a coefficient after compensation by the later ones, also decides between error and
bits: a value nearer to zero is chosen where its error costs less than the bits it saves, at the price of a bit in a
uniform quantizer.

The sweeps are here for arrays of numpy and torch. `compiled` and `triton_sweeps` have the same arithmetic as one
compiled loop per row; float64 sums in another order differ by 1e-16, which changes no integer in practice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from redistill_cache.codecs.backend import Array, Backend
from redistill_cache.codecs.linear_decode import LinearDecoder, multipliers

__all__ = [
    "CLASSES",
    "ArraySweeps",
    "Bits",
    "Curvature",
    "Factors",
    "ShapingConstants",
    "Sweeps",
    "Swept",
    "curvature",
    "remaining_cost",
]

# Number of classes that represent the curvature of a row.
CLASSES = 32
# Coefficients between two updates of S**-1.
GROUP = 8
# A coefficient of smaller mean size, in steps of the usual starting level, is rounded plainly.
LEAST_SIZE = 0.02
# Rows of a matrix whose pivots differ by more than this are factored by QR, which keeps twice the digits.
LEAST_PIVOT = 1e-4
# The price of a bit in units of base * step**2; a uniform quantizer's slope is 2 ln 2 / 12 = 0.116.
BIT_PRICE = 0.12
# The cost of a coefficient outside its digits.
ESCAPE_BITS = 24.0


@dataclass(frozen=True, eq=False)
class Factors:
    """A matrix [r, width] as (orthonormal @ triangle)', and its pseudo-inverse: all on the host."""

    orthonormal: np.ndarray  # float64 [width, r]
    triangle: np.ndarray  # float64 [r, r], upper, of positive diagonal
    inverse: np.ndarray  # float64 [width, r]

    @classmethod
    def of(cls, matrix: np.ndarray) -> Factors:
        """By Cholesky factors of the Gram matrix: several times faster than QR for wide rows."""
        size = float(np.abs(matrix).max(initial=0.0)) or 1.0
        scaled = matrix / size
        gram = scaled @ scaled.T
        try:
            lower = np.linalg.cholesky(gram)
        except np.linalg.LinAlgError:
            lower = np.zeros_like(gram)
        diagonal = np.diag(lower)
        if diagonal.min() <= LEAST_PIVOT * diagonal.max():  # nearly dependent rows
            orthonormal, triangle = np.linalg.qr(scaled.T)
            sign = np.where(np.diag(triangle) < 0, -1.0, 1.0)
            inverse = (np.linalg.pinv(gram, rcond=1e-11, hermitian=True) @ scaled).T
            return cls(orthonormal * sign, triangle * (size * sign[:, None]), np.ascontiguousarray(inverse / size))
        lower_inverse = np.linalg.inv(lower)
        orthonormal = scaled.T @ lower_inverse.T
        return cls(orthonormal, lower.T * size, orthonormal @ (lower_inverse / size))


@dataclass(frozen=True, eq=False)
class Bits:
    """What the values of the first coefficients of a decoder cost, on one device."""

    first: Array  # float64 [levels, count]: bits from 0 to 1
    following: Array  # float64 [levels, count]: bits from n to n + 1
    lowest: Array  # float64 [count]: the range of the digits, infinite before they are fitted
    highest: Array

    @classmethod
    def of(cls, decoder: LinearDecoder, count: int, backend: Backend) -> Bits:
        first, following = bit_costs(decoder.spread[:count])
        lowest = decoder.packing.lowest[:count].astype(np.float64)
        highest = lowest + decoder.packing.reach[:count] - 1
        if not len(decoder.packing.coefficient):  # while fitting, before digits are assigned
            lowest, highest = np.full_like(lowest, -np.inf), np.full_like(highest, np.inf)
        return cls(*(backend.constant(part) for part in (first, following, lowest, highest)))

    def nearest(self, backend: Backend, steps: Array, level: Array) -> Array:
        """The integers of least squared distance plus bits, in steps of their levels, in an orthonormal basis."""
        first, following = (backend.lookup(table, level) for table in (self.first, self.following))
        return nearest(backend, steps, BIT_PRICE / 2.0, first, following, self.lowest, self.highest)


@dataclass(frozen=True, eq=False)
class ShapingConstants:
    """Constants of shaped rounding for one decoder on one device."""

    orthonormal: Array  # float64 [width, shaped]: steps of level 0 times the basis, transposed = orthonormal @ triangle
    columns: Array  # float64 [shaped, shaped]: the columns of the upper triangle, whose diagonal is positive
    diagonal: np.ndarray  # of the triangle
    first_bit: Array  # float64 [levels, shaped]: bits from 0 to 1
    next_bit: Array  # float64 [levels, shaped]: bits from n to n + 1
    lowest: Array  # float64 [shaped]: the range of the digits, infinite before they are fitted
    highest: Array
    bit_price: float
    weight: float  # of T = 1 relative to T = 4

    @property
    def count(self) -> int:
        """Coefficients that are rounded jointly; those after them are rounded plainly."""
        return len(self.diagonal)

    @classmethod
    def of(
        cls, decoder: LinearDecoder, factors: Factors, backend: Backend, level: int, weight: float
    ) -> ShapingConstants:
        """For rows that start at `level`; `factors` are those of the decoder's matrix, centred."""
        # Coefficients that are nearly always zero are rounded plainly; they come last.
        large = decoder.spread > LEAST_SIZE * multipliers()[level]
        count = int(np.flatnonzero(large)[-1]) + 1 if large.any() else 1
        orthonormal, triangle = factors.orthonormal[:, :count], factors.triangle[:count, :count].copy()
        # Directions that are linear combinations of the others, up to noise, are rounded plainly.
        weak = np.diag(triangle) < 1e-9 * np.abs(triangle).max(initial=1e-300)
        triangle[weak] = np.eye(len(triangle))[weak]
        orthonormal = orthonormal * ~weak
        bits = Bits.of(decoder, count, backend)
        return cls(
            backend.constant(orthonormal),
            backend.constant(triangle.T),
            np.diag(triangle).copy(),
            bits.first,
            bits.following,
            bits.lowest,
            bits.highest,
            BIT_PRICE * float(np.median(np.diag(triangle) ** 2)),
            weight,
        )


def bit_costs(spread: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bits from 0 to 1 and from n to n + 1, [levels, r], for Laplacian coefficients of this mean size at level 0."""
    size = np.maximum(spread.astype(np.float64), 1e-6)[None] / multipliers()[:, None]
    decay = 1.0 / size
    zero = -np.expm1(-decay / 2)
    one = -0.5 * np.exp(-decay / 2) * np.expm1(-decay)
    first = np.log2(np.maximum(zero, 1e-300)) - np.log2(np.maximum(one, 1e-300))
    return np.clip(first, 0.0, ESCAPE_BITS), np.minimum(decay / np.log(2.0), ESCAPE_BITS)


# -- the curvature of a row -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Curvature:
    """The heaviest classes of every row: U of the row is (their rows of the basis - `sharp`-weighted sum) * `scale`."""

    chosen: Array  # int64 [n, CLASSES]
    sharp: Array  # float64, their probabilities at T = 1
    scale: Array  # float64


def remaining_cost(weight: float, sharp: Array, soft: Array) -> Array:
    """The cost of errors outside of classes that hold these shares of the probability at T = 1 and T = 4."""
    return weight * (1.0 - sharp) + (1.0 - soft) / 16.0


def curvature(backend: Backend, weight: float, width: int, chosen: Array, sharp: Array, soft: Array) -> Curvature:
    """Of rows with these heaviest classes and probabilities [n, m]; base * (I + U'U) at T = 1 and T = 4 together."""
    rest = backend.clip(remaining_cost(weight, sharp.sum(1), soft.sum(1)), 0.0, None)
    base = (rest / max(width - sharp.shape[1], 1) + 1e-9)[:, None]
    extra = backend.clip(weight * sharp + soft / 16.0 - base, 0.0, None)
    scale = backend.sqrt(extra / base)
    missing = CLASSES - sharp.shape[1]
    if missing:  # few classes: the others get no weight, so every array has one shape
        nothing = backend.zeros((len(sharp), missing), "float64")
        chosen = backend.concatenate([chosen, backend.zeros((len(sharp), missing), "int64")], 1)
        sharp, scale = (backend.concatenate([part, nothing], 1) for part in (sharp, scale))
    return Curvature(chosen, sharp, scale)


# -- the sweeps -------------------------------------------------------------------------------------------------------

# u, g and free of many rows, in the layout of the form that made them.
Swept = tuple[Array, Array, Array]


class Sweeps(Protocol):
    """The two sweeps on one device."""

    def forward(self, constants: ShapingConstants, of: Curvature) -> Swept:
        """What `backward` needs of every row, whatever its step."""

    def backward(self, constants: ShapingConstants, swept: Swept, index: Array, steps: Array, level: Array) -> Array:
        """Integers near `steps` (float64 [m, count], in steps of each row's level) for rows `index` of `swept`."""


@dataclass(frozen=True)
class ArraySweeps:
    """The sweeps of many rows at once by operations on arrays, [..., n]: few of them, on long vectors."""

    backend: Backend

    def forward(self, constants: ShapingConstants, of: Curvature) -> Swept:
        """U and G [count, n, m], free [count, n]."""
        backend, count, rows = self.backend, constants.count, len(of.chosen)
        vectors = constants.orthonormal[of.chosen]  # [n, m, count]
        centre = (of.sharp[:, None, :] @ vectors)[:, 0]
        directions = (vectors - centre[:, None]) * of.scale[:, :, None]
        inverse = backend.zeros((rows, CLASSES, CLASSES), "float64") + backend.identity(CLASSES)
        u = backend.contiguous(directions.swapaxes(1, 2))  # [n, count, m]
        g = backend.zeros((count, rows, CLASSES), "float64")
        free = backend.zeros((count, rows), "float64")
        for start in range(0, count, GROUP):
            stop = min(start + GROUP, count)
            group = backend.contiguous(u[:, start:stop])
            weighted = group @ inverse  # of S before the group; corrected below for the rows of the group itself
            coupling = backend.contiguous((weighted @ group.swapaxes(1, 2)).swapaxes(0, 2))  # [j, i, n], symmetric
            parts = backend.contiguous(weighted.swapaxes(0, 1))  # [j, n, m]
            for j in range(stop - start):
                free[start + j] = 1.0 + coupling[j, j]
                g[start + j] = parts[j] / free[start + j][:, None]
                for i in range(j + 1, stop - start):
                    share = coupling[i, j] / free[start + j]
                    parts[i] -= parts[j] * share[:, None]
                    coupling[i, j + 1 : i + 1] -= coupling[j + 1 : i + 1, j] * share
            inverse = inverse - backend.contiguous(parts.swapaxes(0, 1)).swapaxes(1, 2) @ backend.contiguous(
                g[start:stop].swapaxes(0, 1)
            )
        return backend.contiguous(u.swapaxes(0, 1)), g, free

    def backward(self, constants: ShapingConstants, swept: Swept, index: Array, steps: Array, level: Array) -> Array:
        backend, count = self.backend, constants.count
        u, g, free = (part[:, index] for part in swept)
        x = backend.contiguous(steps.swapaxes(0, 1))
        tables = (constants.first_bit, constants.next_bit)
        first, following = (backend.contiguous(backend.lookup(table, level).swapaxes(0, 1)) for table in tables)
        k, errors = x * 0.0, x * 0.0
        s = u[0] * 0.0
        for stop in range(count, 0, -GROUP):
            start = max(0, stop - GROUP)
            # What the triangle carries over from coefficients rounded before.
            carried = constants.columns[stop:, start:stop].swapaxes(0, 1) @ errors[stop:]
            for at in range(stop - 1, start - 1, -1):
                scale = float(constants.diagonal[at])
                target = x[at] - ((g[at] * s).sum(1) + carried[at - start]) / scale
                price = constants.bit_price / (2.0 * free[at] * scale**2)
                low, high = constants.lowest[at], constants.highest[at]
                k[at] = nearest(backend, target, price, first[at], following[at], low, high)
                errors[at] = k[at] - x[at]
                s = s + u[at] * (scale * errors[at] + carried[at - start])[:, None]
                carried[: at - start] += constants.columns[at, start:at][:, None] * errors[at]
        return backend.contiguous(k.swapaxes(0, 1))


def nearest(
    backend: Backend, target: Array, price: Array | float, first: Array, following: Array, low: Array, high: Array
) -> Array:
    """The integer of least cost: squared distance times the pivot, plus bits."""
    size = backend.abs(target)
    k = backend.floor(size + 0.5 - backend.clip(price * following, 0.0, 0.5))
    k = backend.where((k == 1.0) & (size < 0.5 + price * first), k * 0.0, k)
    k = backend.where(target < 0, -k, k)
    inside = backend.minimum(backend.maximum(k, low), high)
    extra = (inside - target) ** 2 - (k - target) ** 2
    return backend.where(extra < price * (2.0 * ESCAPE_BITS), inside, k)
