"""The certificate: what a decoded row lost, measured in float64 on the distributions a student will be trained on."""

from __future__ import annotations

import numpy as np

from redistill_cache.codecs.space import Array, Space, space_of, to_numpy
from redistill_cache.errors import Refused

__all__ = ["TEMPERATURES", "NotFinite", "check_finite", "kl_rows", "log_softmax", "relative_error", "rounded_up"]

TEMPERATURES = (1.0, 4.0)


class NotFinite(Refused):
    """A teacher said NaN or infinity. `rows` are the positions of the offending rows in what was given to encode."""

    def __init__(self, rows: list[int], width: int) -> None:
        shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        super().__init__(
            f"expected finite teacher outputs, found NaN or Inf in {len(rows)} of the rows given (row {shown} of this "
            f"batch, {width} values each); such rows are never encoded: look at the teacher's precision and the images"
        )
        self.rows = rows


def check_finite(rows: Array) -> None:
    """Raise NotFinite naming the rows that hold NaN or infinity."""
    space = space_of(rows)
    bad = ~space.isfinite(rows).all(1)
    if bool(bad.any()):
        raise NotFinite([int(i) for i in to_numpy(space.rows_where(bad))], int(rows.shape[1]))


def log_softmax(space: Space, rows: Array, temperature: float) -> Array:
    """log softmax(rows / temperature) in float64."""
    scaled = space.cast(rows, "float64") / temperature
    scaled = scaled - space.max_of_row(scaled)
    return scaled - space.log(space.exp(scaled).sum(1))[:, None]


def kl_rows(exact: Array, decoded: Array, temperature: float) -> Array:
    """KL(softmax(exact / T) || softmax(decoded / T)) of every row, float64, never below zero."""
    space = space_of(exact)
    truth = log_softmax(space, exact, temperature)
    lost = (space.exp(truth) * (truth - log_softmax(space, decoded, temperature))).sum(1)
    return space.clip(lost, 0.0, None)


def relative_error(exact: Array, decoded: Array) -> Array:
    """|decoded - exact| / |exact| in the Euclidean norm, of every row; of a zero row, the error itself."""
    space = space_of(exact)
    truth = space.cast(exact, "float64")
    # Scaled first: the square of a large float32 still fits float64, the square of a tiny one may not.
    size = space.max_of_row(space.abs(truth))
    size = space.where(size > 0, size, size * 0 + 1.0)
    lost = space.sqrt((((space.cast(decoded, "float64") - truth) / size) ** 2).sum(1))
    norm = space.sqrt(((truth / size) ** 2).sum(1))
    return lost / space.where(norm > 0, norm, norm * 0 + 1.0)


def rounded_up(errors: np.ndarray) -> np.ndarray:
    """To 11 significant bits, upward: the same on every machine, and never less than was lost."""
    mantissa, exponent = np.frexp(errors)
    up: np.ndarray = np.ldexp(np.ceil(mantissa * 2048.0) / 2048.0, exponent)
    return up
