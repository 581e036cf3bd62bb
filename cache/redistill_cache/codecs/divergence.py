"""The KL divergence of rows of logits from the errors of their decoded values, at T = 1 and T = 4.

With x = e / T less its mean under p = softmax(z / T), KL(p || softmax((z + e) / T)) = log1p(sum p (exp(x) - 1 - x)).
Every term is positive, so nothing cancels however small the errors are, and the exponentials of a row are computed once
for all of its trials: the weights w = exp((z - max) / 4) serve both temperatures, since p is proportional to w at T = 4
and to w**4 at T = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from redistill_cache.codecs.backend import Array, Backend

__all__ = ["COEFFICIENTS", "DOUBLINGS", "LARGEST_EXPONENT", "SMALL", "Softmax"]

# exp(t) - 1 - t = t**2 * polynomial(t) to the last digits of float64 for |t| <= 1/2.
COEFFICIENTS = tuple(1.0 / math.factorial(order) for order in range(2, 16))
# Errors up to SMALL are halved this many times before the polynomial.
DOUBLINGS, SMALL = 3, 4.0
# Beyond this, an exponential may overflow where the probability underflows: measured by `stats.kl_rows` instead.
LARGEST_EXPONENT = 500.0


@dataclass(frozen=True, eq=False)
class Softmax:
    """Rows of logits as unnormalised probabilities."""

    weights: Array  # float64 [n, C]: exp((z - max) / 4), so softmax(z / 4) * total_soft
    total_soft: Array  # float64 [n]
    total_sharp: Array  # float64 [n]: the sum of the fourth powers

    @classmethod
    def of(cls, backend: Backend, rows: Array) -> Softmax:
        scaled = backend.cast(rows, "float64") / 4.0
        weights = backend.exp(scaled - backend.max_of_row(scaled))
        return cls(weights, weights.sum(1), _fourth_power(weights).sum(1))

    def probabilities(self, backend: Backend, columns: Array) -> tuple[Array, Array]:
        """Of these columns [n, m], at T = 1 and T = 4."""
        soft = backend.take(self.weights, columns)
        return _fourth_power(soft) / self.total_sharp[:, None], soft / self.total_soft[:, None]

    def collisions(self) -> tuple[Array, Array]:
        """The sum of the squared probabilities of every row, at T = 1 and T = 4."""
        fourth = _fourth_power(self.weights)
        return (fourth * fourth).sum(1) / self.total_sharp**2, (self.weights**2).sum(1) / self.total_soft**2

    def divergences(self, backend: Backend, index: Array, errors: Array) -> tuple[Array, Array]:
        """KL at T = 1 and T = 4 of rows `index` with these errors (float64 [m, C]); NaN beyond LARGEST_EXPONENT."""
        weights = self.weights[index]
        soft = weights / self.total_soft[index][:, None]
        sharp = _fourth_power(weights) / self.total_sharp[index][:, None]
        return _divergence(backend, sharp, errors, 1.0), _divergence(backend, soft, errors, 4.0)


def _fourth_power(x: Array) -> Array:
    square = x * x
    return square * square


def _divergence(backend: Backend, p: Array, errors: Array, temperature: float) -> Array:
    x = (errors - (p * errors).sum(1)[:, None]) / temperature
    size = backend.abs(x)
    largest = backend.max_of_row(size)
    limited = backend.minimum(backend.maximum(x, -SMALL), SMALL)
    t = limited / 2.0**DOUBLINGS
    value = t * 0.0
    for coefficient in reversed(COEFFICIENTS):
        value = value * t + coefficient
    value = value * t * t
    for _ in range(DOUBLINGS):  # exp(2 t) - 1 - 2 t from h = exp(t) - 1 - t
        value = 2.0 * value + (value + t) ** 2
        t = 2.0 * t
    if not backend.on_host or bool((largest > SMALL).any()):  # a GPU would wait for the answer
        within = backend.minimum(backend.maximum(x, -LARGEST_EXPONENT), LARGEST_EXPONENT)
        value = backend.where(size > SMALL, backend.exp(within) - 1.0 - within, value)
    result = backend.log1p((p * value).sum(1))
    return backend.where(largest[:, 0] > LARGEST_EXPONENT, result * math.nan, result)
