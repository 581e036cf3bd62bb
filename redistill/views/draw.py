"""Parameters of views: what a recipe draws for (seed, view, row), as the integers that an archive stores.

Every number is a function of the seed, the view, the row and the size of the row's image, so rows can be drawn in any
order, batch or process. Arithmetic is on integers, or on IEEE-754 doubles with + - * / sqrt and rint only (exact.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from redistill_cache.errors import Refused, UsageError

from redistill.views.counter import Purpose, below, draw_words, happens, uniform
from redistill.views.exact import beta_weights, log_uniform
from redistill.views.ops import BINS, OPERATIONS, SIGNED, rand_magnitudes, wide_magnitudes
from redistill.views.recipe import (
    BLUR_UNIT,
    EDGE_UNIT,
    JITTER_UNIT,
    WEIGHT_UNIT,
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    Mixing,
    RandAugment,
    RandomCrop,
    RandomErasing,
    RandomResizedCrop,
    Recipe,
)

__all__ = ["draw_params"]

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]
Boxes = npt.NDArray[np.int64]  # [n, 4]: top, left, height, width

ATTEMPTS = 10  # as in torchvision, before RandomResizedCrop takes the central box and RandomErasing erases nothing
DRAW_ROWS = 1 << 14  # rows drawn at once: the working set fits the processor's cache


class Draws:
    """The random words of some rows of one view, separate for each purpose."""

    def __init__(self, seed: int, view: int, rows: Rows) -> None:
        self.seed, self.view, self.rows = seed, view, rows

    def __len__(self) -> int:
        return len(self.rows)

    def words(self, purpose: Purpose, index: int = 0) -> npt.NDArray[np.uint64]:
        return draw_words(self.seed, self.view, self.rows, purpose, index)

    def subset(self, positions: Array) -> Draws:
        return Draws(self.seed, self.view, self.rows[positions])


def draw_params(
    recipe: Recipe, seed: int, view: int, rows: npt.ArrayLike, sizes: npt.ArrayLike, num_samples: int
) -> dict[str, Array]:
    """The parameters of one view of `rows`: the arrays of `recipe.arrays()`, as stored under `views/` in an archive.

    `sizes` holds height and width of each row's decoded image. Mixing draws partners from all `num_samples` rows.
    """
    rows, sizes = np.asarray(rows, np.int64), np.asarray(sizes, np.int64)
    if not 0 <= seed < 2**64 or not 0 <= view < 2**32:
        raise UsageError(f"expected a seed in [0, 2**64) and a view in [0, 2**32), found seed {seed}, view {view}")
    if sizes.shape != (len(rows), 2):
        raise UsageError(f"expected one height and width for each of {len(rows)} rows, found sizes {sizes.shape}")
    if len(rows) and not 0 <= rows.min() <= rows.max() < num_samples <= 2**32:
        raise UsageError(f"expected rows in [0, {num_samples}), found {rows.min()} to {rows.max()}")
    params = {spec.name: np.empty((len(rows), *spec.row_shape), spec.dtype) for spec in recipe.arrays()}
    for start, stop in pairwise([*range(0, len(rows), DRAW_ROWS), len(rows)]):
        draws = Draws(seed, view, rows[start:stop])
        for name, values in _draw_block(recipe, draws, sizes[start:stop], num_samples):
            params[name][start:stop] = values
    return params


def _draw_block(recipe: Recipe, draws: Draws, sizes: Array, num_samples: int) -> Iterator[tuple[str, Array]]:
    yield "crop", _draw_crop(recipe, draws, sizes)
    for step in recipe.steps[1:]:
        match step:
            case Flip():
                yield "flip", _draw_flip(step, draws)
            case ColorJitter():
                yield "jitter", _draw_jitter(step, draws)
            case Grayscale():
                yield "gray", happens(draws.words(Purpose.GRAY)[0], step.p)
            case GaussianBlur():
                yield "blur", _draw_blur(step, draws)
            case RandomErasing():
                yield "erase", _draw_erasing(step, draws, recipe.size)
            case Mixing():
                arrays = _draw_mix(step, draws, recipe.size, num_samples)
                yield from zip(("mix_partner", "mix_weight", "mix_box"), arrays, strict=True)
    if recipe.augment:
        yield "ops", _draw_operations(recipe, draws)


def _draw_crop(recipe: Recipe, draws: Draws, sizes: Array) -> Boxes:
    match recipe.crop:
        case CenterCrop(crop_pct=share):
            return center_boxes(sizes, share)
        case RandomResizedCrop() as crop:
            return _draw_resized(crop, draws, sizes)
        case RandomCrop() as crop:
            return _draw_padded(crop, draws, sizes, recipe.size)


def center_boxes(sizes: Array, share: float) -> Boxes:
    """The central square of `share` of the shorter side, at least one pixel; half pixels round to the top left."""
    side = np.maximum(np.rint(sizes.min(axis=1) * share).astype(np.int64), 1)
    corner = (sizes - side[:, None]) // 2
    return np.column_stack([corner, side, side])


def _draw_resized(crop: RandomResizedCrop, draws: Draws, sizes: Array) -> Boxes:
    boxes = _central_boxes_within(sizes, crop.ratio)
    left = np.arange(len(draws))  # positions of the rows without a box yet
    sizes_left = sizes
    for attempt in range(ATTEMPTS):
        words = draws.subset(left).words(Purpose.CROP, attempt)
        candidates, fits = place_boxes(words, sizes_left, crop.scale, crop.ratio)
        boxes[left[fits]] = candidates[fits]
        left, sizes_left = left[~fits], sizes_left[~fits]
        if not len(left):
            break
    return boxes


def place_boxes(
    words: npt.NDArray[np.uint64], sizes: Array, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Boxes, npt.NDArray[np.bool_]]:
    """One attempt at boxes of random area and width / height; returns the boxes, and which of them fit their image.

    The four words decide area, ratio, top and left.
    """
    heights, widths = sizes[:, 0], sizes[:, 1]
    area = (heights * widths) * (scale[0] + (scale[1] - scale[0]) * uniform(words[0]))
    aspect = log_uniform(*ratio)[words[1] >> np.uint64(16)]
    boxes = np.empty((len(sizes), 4), np.int64)
    boxes[:, 2] = np.rint(np.sqrt(area / aspect))
    boxes[:, 3] = np.rint(np.sqrt(area * aspect))
    fits = (boxes[:, 2] > 0) & (boxes[:, 2] <= heights) & (boxes[:, 3] > 0) & (boxes[:, 3] <= widths)
    boxes[:, 0] = below(words[2], np.maximum(heights - boxes[:, 2] + 1, 1))
    boxes[:, 1] = below(words[3], np.maximum(widths - boxes[:, 3] + 1, 1))
    return boxes, fits


def _central_boxes_within(sizes: Array, ratio: tuple[float, float]) -> Boxes:
    """torchvision's fallback: the largest central box whose width / height is within `ratio`."""
    heights, widths = sizes[:, 0], sizes[:, 1]
    aspect = widths / heights
    tall = np.where(aspect < ratio[0], np.rint(widths / ratio[0]), heights).astype(np.int64)
    wide = np.where(aspect > ratio[1], np.rint(heights * ratio[1]), widths).astype(np.int64)
    tall, wide = np.clip(tall, 1, heights), np.clip(wide, 1, widths)
    return np.column_stack([(heights - tall) // 2, (widths - wide) // 2, tall, wide])


def _draw_padded(crop: RandomCrop, draws: Draws, sizes: Array, side: int) -> Boxes:
    room = sizes + 2 * crop.padding - side  # the largest top and left within the padded image
    if len(room) and room.min() < 0:
        worst = int(room.min(axis=1).argmin())
        raise Refused(
            f"row {draws.rows[worst]}: a crop of {side} pixels does not fit an image of {sizes[worst, 0]} x "
            f"{sizes[worst, 1]} padded by {crop.padding}; lower size=, raise padding= or use rrc"
        )
    if crop.padding_mode == "reflect" and len(sizes) and sizes.min() <= crop.padding:
        raise Refused(f"reflecting {crop.padding} pixels needs images larger than {sizes.min()} pixels; lower padding=")
    words = draws.words(Purpose.CROP)
    corner = np.column_stack([below(words[axis], room[:, axis] + 1) for axis in (0, 1)]) - crop.padding
    return np.column_stack([corner, np.full_like(corner, side)])


def _draw_flip(step: Flip, draws: Draws) -> Array:
    words = draws.words(Purpose.FLIP)
    return happens(words[0], step.hflip) | happens(words[1], step.vflip).astype(np.uint8) << 1


def _draw_jitter(step: ColorJitter, draws: Draws) -> Array:
    first, second = draws.words(Purpose.JITTER, 0), draws.words(Purpose.JITTER, 1)
    order = np.where(happens(first[0], step.p), below(first[1], 24), -1)
    factors = [
        _between(words, max(0.0, 1.0 - strength), 1.0 + strength)
        for words, strength in ((first[2], step.brightness), (first[3], step.contrast), (second[0], step.saturation))
    ]
    factors.append(_between(second[1], -step.hue, step.hue))
    return np.column_stack([order, *(np.rint(factor * JITTER_UNIT) for factor in factors)])


def _between(words: npt.NDArray[np.uint64], low: float, high: float) -> npt.NDArray[np.float64]:
    return low + (high - low) * uniform(words)


def _draw_operations(recipe: Recipe, draws: Draws) -> Array:
    augment = recipe.augment
    assert augment is not None
    signed = np.array([name in SIGNED for name in OPERATIONS])
    table = (rand_magnitudes if isinstance(augment, RandAugment) else wide_magnitudes)(recipe.size)
    operations = np.empty((len(draws), augment.num_ops, 2), np.int16)
    for k in range(augment.num_ops):
        words = draws.words(Purpose.OPS, k)
        number = below(words[0], len(OPERATIONS))
        strength: Any = augment.magnitude if isinstance(augment, RandAugment) else below(words[2], BINS)
        magnitude = table[number, strength]
        negative = signed[number] & happens(words[1], 0.5)
        operations[:, k, 0] = number
        operations[:, k, 1] = np.where(negative, -magnitude, magnitude)
    return operations


def _draw_blur(step: GaussianBlur, draws: Draws) -> Array:
    words = draws.words(Purpose.BLUR)
    sigma = np.rint(_between(words[1], *step.sigma) * BLUR_UNIT)
    return np.where(happens(words[0], step.p), sigma, 0)


def _draw_erasing(step: RandomErasing, draws: Draws, side: int) -> Array:
    """Edges (top, left, bottom, right) as fractions of the view's side; zeros if nothing is erased."""
    edges = np.zeros((len(draws), 4), np.int64)
    left = np.flatnonzero(happens(draws.words(Purpose.ERASE)[0], step.p))
    # torchvision's ratio is height / width here, but width / height in RandomResizedCrop.
    ratio = (1.0 / step.ratio[1], 1.0 / step.ratio[0])
    for attempt in range(1, ATTEMPTS + 1):
        words = draws.subset(left).words(Purpose.ERASE, attempt)
        sizes = np.full((len(left), 2), side)
        boxes, _ = place_boxes(words, sizes, step.scale, ratio)
        fits = (boxes[:, 2:] < side).all(axis=1)
        corners = boxes[fits, :2]
        edges[left[fits]] = np.column_stack([corners, corners + boxes[fits, 2:]])
        left = left[~fits]
    empty = (edges[:, :2] == edges[:, 2:]).any(axis=1)
    edges[empty] = 0
    fractions: Array = np.rint(edges * (EDGE_UNIT / side))
    return fractions


def _draw_mix(step: Mixing, draws: Draws, side: int, num_samples: int) -> tuple[Array, Array, Array]:
    """The partner row [n], the weight of the own view [n], and for CutMix the box filled by the partner [n, 4].

    An unmixed row is its own partner, with the full weight and no box.
    """
    rows, first, second = draws.rows, draws.words(Purpose.MIX, 0), draws.words(Purpose.MIX, 1)
    mixed = happens(first[1], step.p) & (num_samples > 1)
    others = below(first[0], max(num_samples - 1, 1))
    partner = np.where(mixed, others + (others >= rows), rows)  # uniform over the other rows
    cut = mixed & happens(first[2], _cutmix_probability(step))
    quantile = first[3] >> np.uint64(16)
    weight = np.full(len(rows), WEIGHT_UNIT)
    if step.mixup:
        weight = np.where(mixed & ~cut, beta_weights(step.mixup)[quantile], weight)
    box = np.zeros((len(rows), 4), np.int64)
    if step.cutmix:
        pixels = _cutmix_boxes(beta_weights(step.cutmix)[quantile], second, side)
        pixels[~cut | (pixels[:, :2] == pixels[:, 2:]).any(axis=1)] = 0
        area = (pixels[:, 2] - pixels[:, 0]) * (pixels[:, 3] - pixels[:, 1])
        weight = np.where(cut, np.rint((1.0 - area / (side * side)) * WEIGHT_UNIT).astype(np.int64), weight)
        box = np.rint(pixels * (EDGE_UNIT / side)).astype(np.int64)
    partner = np.where(weight == WEIGHT_UNIT, rows, partner)
    return partner, weight, box


def _cutmix_probability(step: Mixing) -> float:
    if not step.mixup:
        return 1.0
    return step.switch if step.cutmix else 0.0


def _cutmix_boxes(weights: Array, words: npt.NDArray[np.uint64], side: int) -> Array:
    """A square of area 1 - weight around a uniform pixel, clipped to the view: top, left, bottom, right in pixels."""
    half = (0.5 * np.sqrt(1.0 - weights / WEIGHT_UNIT) * side).astype(np.int64)
    x, y = below(words[0], side), below(words[1], side)
    return np.column_stack([np.clip(edge, 0, side) for edge in (y - half, x - half, y + half, x + half)])
