"""Mixing parameters: a partner row, the weight of the row's own view, and for CutMix the box that is the partner's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from redistill.views.counter import Purpose, below, happens
from redistill.views.exact import beta_weights
from redistill.views.steps import Mix
from redistill.views.units import EDGE_UNIT, WEIGHT_UNIT

__all__ = ["draw_mix"]

Array = npt.NDArray[Any]
DrawWords = Callable[[Purpose, int], npt.NDArray[np.uint64]]


def draw_mix(step: Mix, rows: Array, words: DrawWords, side: int, num_samples: int) -> tuple[Array, Array, Array]:
    """Partner [n], weight [n] and box [n, 4]; an unmixed row is its own partner, with the full weight and no box."""
    first, second = words(Purpose.MIX, 0), words(Purpose.MIX, 1)
    mixed = happens(first[1], step.p) & (num_samples > 1)
    others = below(first[0], max(num_samples - 1, 1))
    partner = np.where(mixed, others + (others >= rows), rows)  # uniform over the other rows
    cut = mixed & happens(first[2], _cutmix_chance(step))
    chance = first[3] >> np.uint64(16)
    weight = np.full(len(rows), WEIGHT_UNIT)
    if step.mixup:
        weight = np.where(mixed & ~cut, beta_weights(step.mixup)[chance], weight)
    box = np.zeros((len(rows), 4), np.int64)
    if step.cutmix:
        pixels = _cutmix_boxes(beta_weights(step.cutmix)[chance], second, side)
        pixels[~cut | (pixels[:, :2] == pixels[:, 2:]).any(axis=1)] = 0
        area = (pixels[:, 2] - pixels[:, 0]) * (pixels[:, 3] - pixels[:, 1])
        weight = np.where(cut, np.rint((1.0 - area / (side * side)) * WEIGHT_UNIT).astype(np.int64), weight)
        box = np.rint(pixels * (EDGE_UNIT / side)).astype(np.int64)
    partner = np.where(weight == WEIGHT_UNIT, rows, partner)
    return partner, weight, box


def _cutmix_chance(step: Mix) -> float:
    if not step.mixup:
        return 1.0
    return step.switch if step.cutmix else 0.0


def _cutmix_boxes(weights: Array, words: npt.NDArray[np.uint64], side: int) -> Array:
    """A square of share 1 - weight around a uniform pixel, clipped to the view: top, left, bottom, right in pixels."""
    half = (0.5 * np.sqrt(1.0 - weights / WEIGHT_UNIT) * side).astype(np.int64)
    x, y = below(words[0], side), below(words[1], side)
    return np.column_stack([np.clip(edge, 0, side) for edge in (y - half, x - half, y + half, x + half)])
