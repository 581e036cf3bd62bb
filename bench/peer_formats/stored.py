"""What the formats store of a row: all logits in float16, or the k largest probabilities."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

FULL = "all logits, float16"


def full(logits: np.ndarray) -> np.ndarray:
    return logits.astype(np.float16)


def dense_full(values: Mapping[str, np.ndarray]) -> np.ndarray:
    return values["logits"].astype(np.float32)


def top(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes and probabilities (T = 1) of the k largest, the largest first."""
    index = np.argpartition(-logits, k - 1, axis=1)[:, :k]
    value = np.take_along_axis(logits, index, 1)
    order = np.argsort(-value, axis=1, kind="stable")
    index, value = np.take_along_axis(index, order, 1), np.take_along_axis(value, order, 1)
    largest = value[:, :1]
    return index, np.exp(value - largest) / np.exp(logits - largest).sum(1, keepdims=True)


def dense_top(values: Mapping[str, np.ndarray], classes: int) -> np.ndarray:
    """Log-probabilities; what is left of the mass goes to the other classes alike, as all of these systems do."""
    index, probability = values["index"].astype(np.int64), values["probability"].astype(np.float32)
    left = np.clip(1 - probability.sum(1, keepdims=True), 1e-6, None) / (classes - index.shape[1])
    rows = np.repeat(np.log(left), classes, axis=1)
    np.put_along_axis(rows, index, np.log(np.maximum(probability, 1e-8)), 1)
    return rows
