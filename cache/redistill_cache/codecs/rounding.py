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
    best y_j = - u_j' S**-1 s,                 S = I + sum over j not yet rounded of u_j u_j'

S**-1 is updated by rank one per coefficient; in groups of eight, a row costs about 4 r m**2 + r**2 operations. At
m = 32 this is fifteen times cheaper than the exact form at r = 512, and as good where m classes hold all but a few
percent of the probability.

The curvature of a coefficient after compensation by the later ones (its pivot) also decides between error and bits: a
value nearer to zero is chosen where its error costs less than the bits it saves, at the price of a bit in a uniform
quantizer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from redistill_cache.codecs.backend import Array, Backend
from redistill_cache.codecs.linear_decode import LinearDecoder, multipliers
from redistill_cache.codecs.stats import TEMPERATURES, log_softmax

__all__ = ["ShapingConstants", "remaining_cost", "round_shaped", "row_cost"]

# Number of classes that represent the curvature of a row.
CLASSES = 32
# Coefficients between two updates of S**-1.
GROUP = 8
# A coefficient of smaller mean size, in steps of the usual starting level, is rounded plainly.
LEAST_SIZE = 0.02
# The price of a bit in units of base * step**2; a uniform quantizer's slope is 2 ln 2 / 12 = 0.116.
BIT_PRICE = 0.12
# The cost of a coefficient outside its digits.
ESCAPE_BITS = 24.0


@dataclass(frozen=True, eq=False)
class ShapingConstants:
    """Constants of shaped rounding for one decoder on one device."""

    orthonormal: Array  # float64 [width, shaped]: steps of level 0 times the basis, transposed = orthonormal @ triangle
    triangle: np.ndarray  # float64 [shaped, shaped], upper, positive diagonal
    triangle_rows: Array  # the same on the device
    first_bit: Array  # float64 [levels, shaped]: bits from 0 to 1
    next_bit: Array  # float64 [levels, shaped]: bits from n to n + 1
    lowest: np.ndarray  # the range of the digits
    highest: np.ndarray
    bit_price: float
    weight: float  # of T = 1 relative to T = 4

    @classmethod
    def of(cls, decoder: LinearDecoder, backend: Backend, level: int, weight: float) -> ShapingConstants:
        """For rows that start at `level`."""
        # Coefficients that are nearly always zero are rounded plainly; they come last.
        large = decoder.spread > LEAST_SIZE * multipliers()[level]
        count = int(np.flatnonzero(large)[-1]) + 1 if large.any() else 1
        matrix = decoder.matrix[:count].astype(np.float64)
        orthonormal, triangle = np.linalg.qr((matrix - matrix.mean(1, keepdims=True)).T)
        sign = np.where(np.diag(triangle) < 0, -1.0, 1.0)
        triangle = triangle * sign[:, None]
        # Directions that are linear combinations of the others, up to noise, are rounded plainly.
        weak = np.diag(triangle) < 1e-9 * np.abs(triangle).max(initial=1e-300)
        triangle[weak] = np.eye(len(triangle))[weak]
        orthonormal = orthonormal * sign * ~weak
        first_bit, next_bit = bit_costs(decoder.spread[:count])
        lowest = decoder.packing.lowest[:count].astype(np.float64)
        highest = lowest + decoder.packing.reach[:count] - 1
        if not len(decoder.packing.coefficient):  # while fitting, before digits are assigned
            lowest, highest = np.full_like(lowest, -np.inf), np.full_like(highest, np.inf)
        return cls(
            backend.constant(orthonormal),
            triangle,
            backend.constant(triangle),
            backend.constant(first_bit),
            backend.constant(next_bit),
            lowest,
            highest,
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


def round_shaped(backend: Backend, constants: ShapingConstants, rows: Array, x: Array, level: Array) -> Array:
    """Integers near x (float64 [n, r], in steps of each row's level) for rows [n, width]."""
    count = constants.triangle.shape[0]
    plain, x = backend.rint(x[:, count:]), x[:, :count]
    directions = curvature(backend, constants, rows)
    rounder = GroupRounder.of(backend, constants, x, level)
    inverse = backend.inverse(backend.identity(directions.shape[2]) + directions.swapaxes(1, 2) @ directions)  # S**-1
    s = directions[:, 0] * 0.0
    for stop in range(count, 0, -GROUP):
        start = max(0, stop - GROUP)
        group = backend.contiguous(directions[:, start:stop])
        weighted = group @ inverse
        pull, coupling = (weighted @ s[:, :, None])[:, :, 0], weighted @ group.swapaxes(1, 2)
        rounded = rounder.round(start, stop, backend.contiguous(pull.T), backend.contiguous(coupling.swapaxes(0, 2)))
        y, gains, weights = (part.swapaxes(0, -1) for part in rounded)
        s = s + (y[:, None, :] @ group)[:, 0]
        if start:
            update = gains @ weighted
            inverse += update.swapaxes(1, 2) @ (update * weights[:, :, None])
    return backend.concatenate([rounder.k.T, plain], 1)


def curvature(backend: Backend, constants: ShapingConstants, rows: Array) -> Array:
    """U of every row, [n, r, m], of curvature base * (I + U'U) at T = 1 and T = 4 together."""
    weight, width = constants.weight, rows.shape[1]
    chosen, sharp, soft = heaviest_classes(backend, rows, weight)
    rest = backend.clip(remaining_cost(weight, sharp.sum(1), soft.sum(1)), 0.0, None)
    base = (rest / max(width - min(CLASSES, width), 1) + 1e-9)[:, None]
    extra = backend.clip(class_weight(weight, sharp, soft) - base, 0.0, None)
    vectors = constants.orthonormal[chosen]  # [n, m, r]
    centre = (sharp[:, None, :] @ vectors)[:, 0]
    return ((vectors - centre[:, None]) * backend.sqrt(extra / base)[:, :, None]).swapaxes(1, 2)


def heaviest_classes(backend: Backend, rows: Array, weight: float) -> tuple[Array, Array, Array]:
    """The classes of largest weight of every row, with their probabilities at T = 1 and T = 4, each [n, m]."""
    sharp, soft = (backend.exp(log_softmax(backend, rows, t)) for t in TEMPERATURES)
    chosen = backend.largest(class_weight(weight, sharp, soft), min(CLASSES, rows.shape[1]))
    return chosen, backend.take(sharp, chosen), backend.take(soft, chosen)


def class_weight(weight: float, sharp: Array, soft: Array) -> Array:
    """The diagonal of the curvature at classes of these probabilities at T = 1 and T = 4."""
    return weight * sharp + soft / 16.0


def remaining_cost(weight: float, sharp: Array, soft: Array) -> Array:
    """The cost of errors outside of classes that hold these shares of the probability at T = 1 and T = 4."""
    return weight * (1.0 - sharp) + (1.0 - soft) / 16.0


def row_cost(backend: Backend, rows: Array, weight: float) -> Array:
    """The cost of errors of every row outside of its heaviest classes."""
    _, sharp, soft = heaviest_classes(backend, rows, weight)
    return remaining_cost(weight, sharp.sum(1), soft.sum(1))


@dataclass
class GroupRounder:
    """Rounds a group of coefficients at a time, the last ones first.

    Arrays are [..., n], a row of the tile in each column: the few operations per coefficient run on long vectors.
    """

    backend: Backend
    constants: ShapingConstants
    x: Array
    first_bit: Array
    next_bit: Array
    k: Array
    errors: Array

    @classmethod
    def of(cls, backend: Backend, constants: ShapingConstants, x: Array, level: Array) -> GroupRounder:
        tables = constants.first_bit, constants.next_bit
        first_bit, next_bit = (backend.contiguous(backend.lookup(table, level).T) for table in tables)
        x = backend.contiguous(x.T)
        return cls(backend, constants, x, first_bit, next_bit, x * 0.0, x * 0.0)

    def round(self, start: int, stop: int, pull: Array, coupling: Array) -> tuple[Array, Array, Array]:
        """Round coefficients start to stop; returns their errors y in orthonormal coordinates, and the update of S**-1.

        `pull` is u_j' S**-1 s of each, `coupling` u_i' S**-1 u_j; both are updated in place after every coefficient.
        The update is gains G [j, i, n] and weights w [i, n] of (1 - coupling)**-1 = G diag(w) G'.
        """
        triangle, rows = self.constants.triangle, self.constants.triangle_rows
        # The part of y that the triangle carries over from coefficients rounded before.
        carried = rows[start:stop, stop:] @ self.errors[stop:]
        y = pull * 0.0
        weights = pull * 0.0
        gains = coupling * 0.0
        for j in range(stop - start):
            gains[j, j] += 1.0
        for j in range(stop - start - 1, -1, -1):
            at = start + j
            weights[j] = free = 1.0 / (1.0 - coupling[j, j])
            scale = float(triangle[at, at])
            target = self.x[at] - (pull[j] + carried[j]) / scale
            k = self._nearest(at, target, free * scale**2)
            error = k - self.x[at]
            self.k[at], self.errors[at] = k, error
            y[j] = scale * error + carried[j]
            if j:
                carried[:j] += rows[start:at, at][:, None] * error
                column = coupling[:j, j]
                scaled = column * free
                pull[:j] += column * (y[j] + free * (pull[j] + coupling[j, j] * y[j]))
                coupling[:j, :j] += column[:, None] * scaled
                gains[:, :j] += gains[:, j, None] * scaled
        return y, gains, weights

    def _nearest(self, at: int, target: Array, pivot: Array) -> Array:
        """The integer of least cost: squared distance times the pivot, plus bits."""
        backend, constants = self.backend, self.constants
        price = constants.bit_price / (2.0 * pivot)
        size = backend.abs(target)
        k = backend.floor(size + 0.5 - backend.clip(price * self.next_bit[at], 0.0, 0.5))
        k = backend.where((k == 1.0) & (size < 0.5 + price * self.first_bit[at]), k * 0.0, k)
        k = backend.where(target < 0, -k, k)
        low, high = float(constants.lowest[at]), float(constants.highest[at])
        if low == -np.inf:
            return k
        inside = backend.clip(k, low, high)
        extra = (inside - target) ** 2 - (k - target) ** 2
        return backend.where(extra < price * (2.0 * ESCAPE_BITS), inside, k)
