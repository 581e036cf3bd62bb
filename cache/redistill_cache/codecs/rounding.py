"""Rounding that keeps distributions: errors go where softmax does not look.

To second order, KL(softmax(z / T) || softmax((z + e) / T)) = e' H e / 2 with H = (diag p - p p') / T**2. Plain rounding
makes e white; nearest-plane rounding takes the coefficients one by one, the least varying first, and moves every
target by what the errors made so far should be answered with. Exactly, that is a Cholesky factor of every row's H in
the basis, r**3 / 3 operations and r**2 * width more to form it.

Nearly all of the shape of H is in the few classes a row gives weight to, so here H = base * (I + U'U): the m classes
of largest weight as rows of U, everything else as one number. With an orthonormal basis (and any basis is one after
a QR decomposition, whose triangle R joins the recursion) what is left to answer lives in m dimensions:

    s = sum over rounded j of u_j y_j          y = R (k - x): errors in orthonormal coordinates
    best y_j = - u_j' S**-1 s,                 S = I + sum over j not yet rounded of u_j u_j'

S**-1 loses one rank a coefficient; taken eight at a time, a row costs about 4 r m**2 + r**2 operations. At m = 32 this
is fifteen times cheaper than the exact form at r = 512, and as good where m classes hold all but a few percent.

The curvature left for a coefficient once the later ones are free to answer (its pivot) also weighs its bits: toward
zero is taken where it costs less than the bits it saves, at the exchange rate of a uniform quantizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from redistill_cache.codecs.checks import Config
from redistill_cache.codecs.linear_decode import LEVEL_MASK, LinearDecoder, multipliers
from redistill_cache.codecs.protocol import Json
from redistill_cache.codecs.space import Array, Space
from redistill_cache.codecs.stats import log_softmax

__all__ = ["LinearSettings", "Shaping", "cost_of_errors", "round_shaped", "weight_of_rest"]


# -- policy -----------------------------------------------------------------------------------------------------------
#
# What the encoder of the linear codec promises, and how it decides.

METRICS = ("kl", "relative")
ROUNDINGS = ("plain", "shaped")
# Another machine's arithmetic may differ in the last digits: pass only what passes there too.
MARGIN = 1.0 - 1e-3
# Without a certificate, a row this many times over the bound is still refined.
WILD = 10.0


@dataclass(frozen=True)
class LinearSettings:
    """What the encoder promises and how it decides; recorded in the archive, not needed to decode."""

    metric: Literal["kl", "relative"]
    fidelity: float
    certified: bool
    level: int  # where a row starts
    keep_shift: bool
    rounding: Literal["plain", "shaped"]
    reference: float  # rows whose errors cost this much start at `level`, others where a bit buys as much
    weight: float  # of T = 1 against T = 4

    @classmethod
    def starting(
        cls, metric: str, fidelity: float, *, certified: bool, keep_shift: bool, shaped: bool
    ) -> LinearSettings:
        """Before fitting, which chooses the level, the reference and the weight."""
        kl = metric == "kl"
        return cls(
            metric="kl" if kl else "relative",
            fidelity=fidelity,
            certified=certified,
            level=0,
            keep_shift=keep_shift and kl,
            rounding="shaped" if shaped else "plain",
            reference=0.1,
            weight=1.0,
        )

    @property
    def limit(self) -> float:
        """The error above which a row gets a finer step."""
        return self.fidelity * (MARGIN if self.certified else WILD)

    def config(self) -> dict[str, Json]:
        return {
            "metric": self.metric,
            "fidelity": self.fidelity,
            "certified": self.certified,
            "level": self.level,
            "keep_shift": self.keep_shift,
            "rounding": self.rounding,
            "reference": self.reference,
            "weight": self.weight,
        }

    @classmethod
    def read(cls, reader: Config) -> LinearSettings:
        return cls(
            metric=cast("Literal['kl', 'relative']", reader.choice("metric", METRICS)),
            fidelity=reader.number("fidelity", 1e-12, 1e3),
            certified=reader.flag("certified"),
            level=reader.integer("level", 0, LEVEL_MASK),
            keep_shift=reader.flag("keep_shift"),
            rounding=cast("Literal['plain', 'shaped']", reader.choice("rounding", ROUNDINGS)),
            reference=reader.number("reference", 1e-80, 1e80),
            weight=reader.number("weight", 1e-3, 1e3),
        )


# -- rounding ---------------------------------------------------------------------------------------------------------

# Classes a row's curvature is made of.
CLASSES = 32
# Coefficients between two updates of S**-1.
GROUP = 8
# Mean size, in steps where most rows start, below which a coefficient is not worth shaping.
QUIET = 0.02
# What a bit is worth in units of base * step**2; a uniform quantizer's slope is 2 ln 2 / 12 = 0.116.
BIT_PRICE = 0.12
# A coefficient beyond its digits costs this many bits.
ESCAPE_BITS = 24.0


@dataclass(frozen=True, eq=False)
class Shaping:
    """Constants of a synthesis on one device."""

    orthonormal: Array  # float64 [width, lively]: steps of level 0 times the basis, transposed = orthonormal @ triangle
    triangle: np.ndarray  # float64 [r, r], upper, positive diagonal
    triangle_rows: Array  # the same on the device
    first_bit: Array  # float64 [levels, r]: bits from 0 to 1
    next_bit: Array  # float64 [levels, r]: bits from n to n + 1
    lowest: np.ndarray  # within the digits
    highest: np.ndarray
    bit_price: float
    weight: float  # of T = 1 against T = 4

    @classmethod
    def of(cls, synthesis: LinearDecoder, space: Space, policy: LinearSettings) -> Shaping:
        # Coefficients that are as good as never anything but zero are rounded plainly; they come last.
        lively = synthesis.spread > QUIET * multipliers()[policy.level]
        count = int(np.flatnonzero(lively)[-1]) + 1 if lively.any() else 1
        matrix = synthesis.matrix[:count].astype(np.float64)
        orthonormal, triangle = np.linalg.qr((matrix - matrix.mean(1, keepdims=True)).T)
        sign = np.where(np.diag(triangle) < 0, -1.0, 1.0)
        triangle = triangle * sign[:, None]
        # Directions that are nothing but noise of the others are rounded plainly.
        weak = np.diag(triangle) < 1e-9 * np.abs(triangle).max(initial=1e-300)
        triangle[weak] = np.eye(len(triangle))[weak]
        orthonormal = orthonormal * sign * ~weak
        first, following = bit_costs(synthesis.spread[:count])
        lowest = synthesis.packing.lowest[:count].astype(np.float64)
        highest = lowest + synthesis.packing.reach[:count] - 1
        if not len(synthesis.packing.coefficient):  # while fitting, before there are digits to stay within
            lowest, highest = np.full_like(lowest, -np.inf), np.full_like(highest, np.inf)
        return cls(
            space.constant(orthonormal),
            triangle,
            space.constant(triangle),
            space.constant(first),
            space.constant(following),
            lowest,
            highest,
            BIT_PRICE * float(np.median(np.diag(triangle) ** 2)),
            policy.weight,
        )


def bit_costs(spread: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bits from 0 to 1 and from n to n + 1, [levels, r], for Laplacian coefficients of this mean size at level 0."""
    size = np.maximum(spread.astype(np.float64), 1e-6)[None] / multipliers()[:, None]
    decay = 1.0 / size
    zero = -np.expm1(-decay / 2)
    one = -0.5 * np.exp(-decay / 2) * np.expm1(-decay)
    first = np.log2(np.maximum(zero, 1e-300)) - np.log2(np.maximum(one, 1e-300))
    return np.clip(first, 0.0, ESCAPE_BITS), np.minimum(decay / np.log(2.0), ESCAPE_BITS)


def round_shaped(space: Space, shaping: Shaping, rows: Array, x: Array, level: Array) -> Array:
    """Integers near x (float64 [n, r], in steps of each row's level) for rows [n, width]."""
    count = shaping.triangle.shape[0]
    quiet, x = space.rint(x[:, count:]), x[:, :count]
    directions = curvature(space, shaping, rows)
    groups = Groups.of(space, shaping, x, level)
    remaining = space.inverse(space.identity(directions.shape[2]) + directions.swapaxes(1, 2) @ directions)
    answered = directions[:, 0] * 0.0  # s
    for stop in range(count, 0, -GROUP):
        start = max(0, stop - GROUP)
        here = space.contiguous(directions[:, start:stop])
        seen = here @ remaining
        wanted, coupling = (seen @ answered[:, :, None])[:, :, 0], seen @ here.swapaxes(1, 2)
        rounded = groups.round(start, stop, space.contiguous(wanted.T), space.contiguous(coupling.swapaxes(0, 2)))
        y, gains, weights = (part.swapaxes(0, -1) for part in rounded)
        answered = answered + (y[:, None, :] @ here)[:, 0]
        if start:
            gained = gains @ seen
            remaining += gained.swapaxes(1, 2) @ (gained * weights[:, :, None])
    return space.concatenate([groups.k.T, quiet], 1)


def curvature(space: Space, shaping: Shaping, rows: Array) -> Array:
    """U of every row, [n, r, m], of curvature base * (I + U'U) at T = 1 and T = 4 together."""
    classes = min(CLASSES, rows.shape[1])
    sharp, soft = (space.exp(log_softmax(space, rows, t)) for t in (1.0, 4.0))
    chosen = space.largest(shaping.weight * sharp + soft / 16.0, classes)
    sharp, soft = space.take(sharp, chosen), space.take(soft, chosen)
    rest = space.clip(weight_of_rest(shaping.weight, sharp.sum(1), soft.sum(1)), 0.0, None)
    base = (rest / max(rows.shape[1] - classes, 1) + 1e-9)[:, None]
    extra = space.clip(shaping.weight * sharp + soft / 16.0 - base, 0.0, None)
    vectors = shaping.orthonormal[chosen]  # [n, m, r]
    centre = (sharp[:, None, :] @ vectors)[:, 0]
    return ((vectors - centre[:, None]) * space.sqrt(extra / base)[:, :, None]).swapaxes(1, 2)


def weight_of_rest(weight: float, sharp: Array, soft: Array) -> Array:
    """What errors cost outside of classes that hold these shares of the probability at T = 1 and at T = 4."""
    return weight * (1.0 - sharp) + (1.0 - soft) / 16.0


def cost_of_errors(space: Space, rows: Array, weight: float) -> Array:
    """What errors of a row cost outside of the classes that its curvature is made of."""
    sharp, soft = (space.exp(log_softmax(space, rows, t)) for t in (1.0, 4.0))
    chosen = space.largest(weight * sharp + soft / 16.0, min(CLASSES, rows.shape[1]))
    return weight_of_rest(weight, space.take(sharp, chosen).sum(1), space.take(soft, chosen).sum(1))


@dataclass
class Groups:
    """Rounding a few coefficients at a time, the last ones first.

    Everything here is [..., n], one number a row of the tile beside those of its neighbours: that is how the small
    steps of every coefficient run at the speed of long vectors.
    """

    space: Space
    shaping: Shaping
    x: Array
    first_bit: Array
    next_bit: Array
    k: Array
    errors: Array

    @classmethod
    def of(cls, space: Space, shaping: Shaping, x: Array, level: Array) -> Groups:
        first, following = (space.lookup(table, level) for table in (shaping.first_bit, shaping.next_bit))
        x, first, following = (space.contiguous(part.T) for part in (x, first, following))
        return cls(space, shaping, x, first, following, x * 0.0, x * 0.0)

    def round(self, start: int, stop: int, wanted: Array, coupling: Array) -> tuple[Array, Array, Array]:
        """Round coefficients start to stop; returns their errors y in orthonormal coordinates, and what S**-1 gains.

        `wanted` is u_j' S**-1 s of each, `coupling` u_i' S**-1 u_j; both follow the rounding of every coefficient,
        and are overwritten. Gains G [j, i, n] and weights w [i, n] are those of (1 - coupling)**-1 = G diag(w) G'.
        """
        triangle, rows = self.shaping.triangle, self.shaping.triangle_rows
        # The triangle's share of y that comes from coefficients rounded before.
        carried = rows[start:stop, stop:] @ self.errors[stop:]
        y = wanted * 0.0
        weights = wanted * 0.0
        gains = coupling * 0.0
        for j in range(stop - start):
            gains[j, j] += 1.0
        for j in range(stop - start - 1, -1, -1):
            at = start + j
            weights[j] = free = 1.0 / (1.0 - coupling[j, j])
            scale = float(triangle[at, at])
            target = self.x[at] - (wanted[j] + carried[j]) / scale
            k = self._nearest(at, target, free * scale**2)
            error = k - self.x[at]
            self.k[at], self.errors[at] = k, error
            y[j] = scale * error + carried[j]
            if j:
                carried[:j] += rows[start:at, at][:, None] * error
                column = coupling[:j, j]
                answer = column * free
                wanted[:j] += column * (y[j] + free * (wanted[j] + coupling[j, j] * y[j]))
                coupling[:j, :j] += column[:, None] * answer
                gains[:, :j] += gains[:, j, None] * answer
        return y, gains, weights

    def _nearest(self, at: int, target: Array, pivot: Array) -> Array:
        """The integer of least cost: squared distance times the pivot, and bits."""
        space, shaping = self.space, self.shaping
        price = shaping.bit_price / (2.0 * pivot)
        size = space.abs(target)
        k = space.floor(size + 0.5 - space.clip(price * self.next_bit[at], 0.0, 0.5))
        k = space.where((k == 1.0) & (size < 0.5 + price * self.first_bit[at]), k * 0.0, k)
        k = space.where(target < 0, -k, k)
        low, high = float(shaping.lowest[at]), float(shaping.highest[at])
        if low == -np.inf:
            return k
        inside = space.clip(k, low, high)
        dearer = (inside - target) ** 2 - (k - target) ** 2
        return space.where(dearer < price * (2.0 * ESCAPE_BITS), inside, k)
