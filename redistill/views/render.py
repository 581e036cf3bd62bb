"""The pixels of a view, from an image and the stored parameters: pure functions, torchvision's operations on uint8.

At another size than the recipe's, boxes inside the view, shifts and the width of a blur scale with the size, so that
both sizes show the same content.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy.typing as npt
import torch
from redistill_cache.errors import Damaged, UsageError
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from redistill.views.ops import OPERATIONS, RANGES, apply_operation
from redistill.views.recipe import (
    BLUR_UNIT,
    EDGE_UNIT,
    JITTER_UNIT,
    MAX_SIZE,
    WEIGHT_UNIT,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    Mixing,
    RandAugment,
    RandomCrop,
    RandomErasing,
    Recipe,
    Step,
    TrivialAugmentWide,
    edge_pixels,
)

__all__ = ["Partner", "RowParams", "render_view", "render_views", "row_params"]

RowParams = Mapping[str, npt.NDArray[Any]]
Partner = tuple[torch.Tensor, RowParams]

ORDERS = tuple(permutations(range(4)))  # of brightness, contrast, saturation, hue; lexicographic


def row_params(params: Mapping[str, npt.NDArray[Any]], position: int) -> RowParams:
    """The parameters of one of several rows."""
    return {name: values[position] for name, values in params.items()}


def render_view(
    image: torch.Tensor, params: RowParams, recipe: Recipe, size: int | None = None, partner: Partner | None = None
) -> torch.Tensor:
    """The view [3, size, size] that `params` describe of a decoded image [3, H, W], both uint8.

    `partner` is the decoded image and the parameters of the row to mix in; not needed for a row that is not mixed.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise UsageError(f"expected a uint8 image [3, H, W], found {image.dtype} {list(image.shape)}")
    size = recipe.size if size is None else size
    if not 1 <= size <= MAX_SIZE:
        raise UsageError(f"expected a size in [1, {MAX_SIZE}], found {size}")
    view = _render_alone(image, params, recipe, size)
    if recipe.mixes and int(params["mix_weight"]) != WEIGHT_UNIT:
        if partner is None:
            raise UsageError(f"the view mixes in row {int(params['mix_partner'])}; its image and parameters are needed")
        view = _mix(view, _render_alone(*partner, recipe, size), params)
    if view.untyped_storage().data_ptr() == image.untyped_storage().data_ptr():
        return view.clone(memory_format=torch.contiguous_format)  # the caller may write to the view, not to the image
    return view.contiguous()


def render_views(
    image: torch.Tensor, params: Sequence[RowParams], recipe: Recipe, size: int | None = None
) -> torch.Tensor:
    """Several unmixed views [n, 3, size, size] of one decoded image."""
    return torch.stack([render_view(image, one, recipe, size) for one in params])


def _render_alone(image: torch.Tensor, params: RowParams, recipe: Recipe, size: int) -> torch.Tensor:
    view = _crop(image, params["crop"], recipe, size)
    for step in recipe.steps[1:]:
        view = _apply(step, view, params, recipe)
    return view


def _crop(image: torch.Tensor, stored: npt.NDArray[Any], recipe: Recipe, size: int) -> torch.Tensor:
    top, left, height, width = (int(number) for number in stored)
    image_height, image_width = image.shape[-2:]
    crop = recipe.crop
    margin = crop.padding if isinstance(crop, RandomCrop) else 0
    inside = -margin <= top and top + height <= image_height + margin
    inside = inside and -margin <= left and left + width <= image_width + margin
    if not inside or height < 1 or width < 1:
        raise Damaged(
            f"crop {top},{left},{height},{width} (top, left, height, width) does not fit an image of "
            f"{image_height} x {image_width}; the image or the archive has changed"
        )
    if margin and isinstance(crop, RandomCrop) and crop.padding_mode == "reflect":
        image = F.pad_image(image, [margin], padding_mode="reflect")
        top, left = top + margin, left + margin
    box = F.crop_image(image, top, left, height, width)
    mode = InterpolationMode(recipe.interpolation)
    view: torch.Tensor = F.resize_image(box, [size, size], interpolation=mode, antialias=recipe.antialias)
    return view


def _apply(step: Step, view: torch.Tensor, params: RowParams, recipe: Recipe) -> torch.Tensor:
    match step:
        case Flip():
            return _flip(view, int(params["flip"]))
        case ColorJitter():
            return _jitter(step, view, params["jitter"])
        case RandAugment() | TrivialAugmentWide():
            return _operate(step, view, params["ops"])
        case Grayscale():
            if params["gray"]:
                view = F.rgb_to_grayscale_image(view, num_output_channels=3)
            return view
        case GaussianBlur():
            return _blur(step, view, int(params["blur"]), recipe.size)
        case RandomErasing():
            return _erase(step, view, params["erase"])
    assert isinstance(step, Mixing)  # mixing needs two views; render_view does it
    return view


def _flip(view: torch.Tensor, bits: int) -> torch.Tensor:
    if bits & 1:
        view = F.horizontal_flip_image(view)
    if bits & 2:
        view = F.vertical_flip_image(view)
    return view


def _jitter(step: ColorJitter, view: torch.Tensor, stored: npt.NDArray[Any]) -> torch.Tensor:
    order = int(stored[0])
    if order < 0:
        return view
    factors = [int(factor) / JITTER_UNIT for factor in stored[1:]]
    if order >= len(ORDERS) or min(factors[:3]) < 0 or abs(factors[3]) > 0.5:
        expected = f"an order up to {len(ORDERS) - 1}, factors of 0 or more, a hue shift of at most half a turn"
        raise Damaged(f"colour jitter is {stored.tolist()}; expected {expected}")
    strengths = (step.brightness, step.contrast, step.saturation, step.hue)
    for part in ORDERS[order]:
        if strengths[part]:
            view = ADJUSTMENTS[part](view, factors[part])
    return view


ADJUSTMENTS = (
    F.adjust_brightness_image,
    F.adjust_contrast_image,
    F.adjust_saturation_image,
    F.adjust_hue_image,
)


def _operate(step: RandAugment | TrivialAugmentWide, view: torch.Tensor, stored: npt.NDArray[Any]) -> torch.Tensor:
    mode = InterpolationMode(step.interpolation)
    for number, magnitude in stored.tolist():
        if not 0 <= number < len(OPERATIONS):
            raise Damaged(f"operation {number} is not one of the {len(OPERATIONS)} of {step.name}")
        low, high = RANGES[OPERATIONS[number]]
        if not low <= magnitude <= high:
            raise Damaged(f"{OPERATIONS[number]} has the magnitude {magnitude}; expected {low} to {high}")
        view = apply_operation(view, number, magnitude, mode)
    return view


def _blur(step: GaussianBlur, view: torch.Tensor, stored: int, recipe_size: int) -> torch.Tensor:
    if stored == 0:
        return view
    side = view.shape[-1]
    sigma = stored / BLUR_UNIT * side / recipe_size
    # The radius of the kernel scales as well; reflection at the border allows at most the side of the view.
    radius = min(round((step.kernel_size - 1) / 2 * side / recipe_size), side - 1)
    blurred: torch.Tensor = F.gaussian_blur_image(view, [2 * radius + 1] * 2, [sigma, sigma])
    return blurred


def _box(stored: npt.NDArray[Any], side: int) -> tuple[slice, slice] | None:
    """A box inside a view as slices of its rows and columns; None for the empty box."""
    top, left, bottom, right = (int(edge) for edge in stored)
    if not (0 <= top <= bottom <= EDGE_UNIT and 0 <= left <= right <= EDGE_UNIT):
        raise Damaged(f"a box with the edges {top},{left},{bottom},{right} does not lie inside a view")
    if bottom == 0 or right == 0:
        return None
    top, left, bottom, right = (edge_pixels(edge, side) for edge in (top, left, bottom, right))
    return slice(top, bottom), slice(left, right)


def _erase(step: RandomErasing, view: torch.Tensor, stored: npt.NDArray[Any]) -> torch.Tensor:
    box = _box(stored, view.shape[-1])
    if box is None:
        return view
    rows, columns = box
    height, width = rows.stop - rows.start, columns.stop - columns.start
    colour = torch.tensor(step.value, dtype=torch.uint8)[:, None, None]
    erased: torch.Tensor = F.erase_image(view, rows.start, columns.start, height, width, colour)
    return erased


def _mix(view: torch.Tensor, other: torch.Tensor, params: RowParams) -> torch.Tensor:
    box = _box(params["mix_box"], view.shape[-1])
    if box is not None:
        mixed = view.clone()
        mixed[:, box[0], box[1]] = other[:, box[0], box[1]]
        return mixed
    weight = int(params["mix_weight"])
    total = view.to(torch.int32) * weight + other.to(torch.int32) * (WEIGHT_UNIT - weight)
    return ((total + WEIGHT_UNIT // 2) // WEIGHT_UNIT).to(torch.uint8)
