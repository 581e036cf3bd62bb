"""The quality of a layer against a slow reference in float64, and what must not change it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from redistill.caching.layer_quality import layer_quality

LABELS = np.array([0, 1, 1, 0, 2, 2, 2, 0, 1, 1, 0, 4, 4], np.int64)


def random_rows(dimensions: int, *, shift: float = 0.5, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal((len(LABELS), dimensions))
    return (noise + shift * LABELS[:, None]).astype(np.float32)


def reference(rows: np.ndarray, labels: np.ndarray) -> tuple[float, float, float]:
    """S, I and E, pair by pair, with the singular values of the rows themselves."""
    rows = rows.astype(np.float64)
    n, classes = len(rows), sorted(set(labels.tolist()))

    def cosine(i: int, j: int) -> float:
        return abs(float(rows[i] @ rows[j]) / (math.sqrt(rows[i] @ rows[i]) * math.sqrt(rows[j] @ rows[j])))

    members = {c: [i for i in range(n) if labels[i] == c] for c in classes}
    within, least, entropies, nearest, between = [], [], [], [], []
    for c in classes:
        cosines = [cosine(i, j) for i in members[c] for j in members[c] if i != j]
        within.append(sum(cosines) / len(cosines))
        least.append(min(cosines))
        centred = rows[members[c]] - rows[members[c]].mean(0)
        squares = np.linalg.svd(centred, compute_uv=False) ** 2
        entropies.append(-sum(p * math.log(p) for p in squares / squares.sum() if p > 0))
        others = [i for i in range(n) if labels[i] != c]
        nearest.append(min(math.dist(rows[i], rows[j]) for i in members[c] for j in others))
        for d in classes:
            if d != c:
                pairs = [cosine(i, j) for i in members[c] for j in members[d]]
                between.append(sum(pairs) / len(pairs))
    separation = sum(within) / len(within) - sum(between) / len(between)
    information = (1 - sum(least) / len(least)) * (sum(entropies) / len(entropies)) / math.log(5)
    length = sum(math.sqrt(row @ row) for row in rows) / n
    return separation, information, 2 * (sum(nearest) / len(nearest)) / length


@pytest.mark.parametrize("dimensions", [1, 3, 40, 9000])
def test_quality_equals_the_reference(dimensions: int):
    rows = random_rows(dimensions)
    quality = layer_quality(rows, LABELS)
    expected = reference(rows, LABELS)
    assert tuple(quality) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert quality.q == pytest.approx(expected[0] + math.sqrt(expected[1] * expected[2]), rel=1e-9)


def test_the_order_of_rows_the_numbers_of_classes_and_rotations_do_not_change_it():
    rows = random_rows(20)
    expected = pytest.approx(tuple(layer_quality(rows, LABELS)), rel=1e-5)
    order = np.random.default_rng(1).permutation(len(rows))
    assert tuple(layer_quality(rows[order], LABELS[order])) == expected
    assert tuple(layer_quality(rows, 100 - 7 * LABELS)) == expected
    rotation, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((20, 20)))
    assert tuple(layer_quality((rows @ rotation).astype(np.float32), LABELS)) == expected


@pytest.mark.parametrize("scale", [2.0**-100, 1e-3, 1e4, 2.0**100])
def test_the_scale_of_rows_does_not_change_it(scale: float):
    """The squares of the smallest and the largest values are no float32 numbers."""
    rows = random_rows(20)
    scaled = (rows * np.float32(scale)).astype(np.float32)
    assert tuple(layer_quality(scaled, LABELS)) == pytest.approx(tuple(layer_quality(rows, LABELS)), rel=1e-5)


def test_a_row_is_not_compared_with_itself():
    """Orthogonal rows of one class are not alike at all."""
    quality = layer_quality(np.eye(4, dtype=np.float32), np.array([0, 0, 1, 1]))
    assert quality.separation == 0
    # One singular value in each class has no entropy.
    assert quality.information == 0
    assert quality.efficiency == pytest.approx(2 * math.sqrt(2))


def test_equal_rows_and_rows_of_zeros_have_a_quality():
    labels = np.array([0, 0, 0, 1, 1, 1])
    equal = np.repeat(random_rows(30)[[0, 3]], 3, axis=0)
    assert layer_quality(equal, labels).information == 0
    assert layer_quality(equal, labels).q > 0
    assert tuple(layer_quality(np.zeros((6, 4), np.float32), labels)) == (0, 0, 0)
    one_zero = random_rows(30)[:6].copy()
    one_zero[2] = 0
    assert np.isfinite(layer_quality(one_zero, labels)).all()
