"""The quality of a layer for distillation, Q = S + sqrt(I E), after Cooper et al. (arXiv 2511.14981).

    S, separation    how much more alike rows of one class are than rows of two classes, by |cos|
    I, information   how far and in how many directions the rows of a class spread
    E, efficiency    the distance from a class to the nearest row of another one, relative to the length of rows

All three follow from the inner products of the rows, which are computed once, in float64. They do not change when all
rows are scaled or rotated, and depend on the number of images and classes: compare layers, not teachers or data sets.

Where this differs from the authors' code: a row is not compared with itself; no singular value is cut off; squares do
not underflow; the factor (N / pi)^(1 / D) of E, which is within 2 % of 1, is left out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Quality", "layer_quality"]

Matrix = npt.NDArray[np.float64]

# The unit of the entropy of a class, as published: five singular values of the same size have the entropy ln 5.
ENTROPY_UNIT = np.log(5.0)
# Rows are multiplied in pieces of this many columns, so that only a piece is converted to float64.
COLUMNS = 8192


class Quality(NamedTuple):
    separation: float
    information: float
    efficiency: float

    @property
    def q(self) -> float:
        return self.separation + float(np.sqrt(self.information * self.efficiency))


def layer_quality(rows: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> Quality:
    """Quality of `rows` [n, D], at least two of each of at least two classes. The cosine with a row of zeros is 0."""
    order = np.argsort(labels, kind="stable")
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    products = inner_products(rows[order])
    lengths = np.sqrt(np.diag(products))
    classes = len(starts)
    similarity = np.empty((classes, classes))  # mean |cos| of the rows of two classes
    least, entropy, nearest = np.empty(classes), np.empty(classes), np.empty(classes)
    for k, (start, count) in enumerate(zip(starts, counts, strict=True)):
        own = slice(start, start + count)
        cosines = absolute_cosines(products[own], lengths[own], lengths)
        pairs = cosines[:, own][~np.eye(count, dtype=bool)]
        similarity[k] = np.add.reduceat(cosines.sum(0), starts) / (count * counts)
        similarity[k, k] = pairs.mean()
        least[k] = pairs.min()
        entropy[k] = spectral_entropy(products[own, own])
        squares = lengths[own, None] ** 2 + lengths**2 - 2 * products[own]
        squares[:, own] = np.inf
        nearest[k] = np.sqrt(max(squares.min(), 0.0))
    within, between = np.diag(similarity).mean(), similarity[~np.eye(classes, dtype=bool)].mean()
    length = lengths.mean()
    return Quality(
        separation=float(within - between),
        information=float((1 - least.mean()) * entropy.mean() / ENTROPY_UNIT),
        efficiency=float(2 * nearest.mean() / length) if length > 0 else 0.0,
    )


def inner_products(rows: npt.NDArray[np.float32]) -> Matrix:
    products = np.zeros((len(rows), len(rows)))
    for start in range(0, rows.shape[1], COLUMNS):
        piece = rows[:, start : start + COLUMNS].astype(np.float64)
        products += piece @ piece.T
    return products


def absolute_cosines(products: Matrix, lengths: Matrix, others: Matrix) -> Matrix:
    scale = np.outer(lengths, others)
    return np.abs(np.divide(products, scale, out=np.zeros_like(products), where=scale > 0))


def spectral_entropy(products: Matrix) -> float:
    """Entropy in nats of the squared singular values of the centred rows, as shares of their sum."""
    centred = products - products.mean(0) - products.mean(1, keepdims=True) + products.mean()
    squares = np.clip(np.linalg.eigvalsh(centred), 0.0, None)
    # What is left of equal rows by rounding has no direction.
    if squares.sum() <= 1e-12 * np.trace(products):
        return 0.0
    shares = squares[squares > 0] / squares.sum()
    return float(-(shares * np.log(shares)).sum())
