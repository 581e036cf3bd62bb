"""The operations of RandAugment and TrivialAugmentWide: their numbers, their integer magnitudes, their pixels.

`rand_augment@1` and `trivial_augment_wide@1` are the tables below, equal to those of torchvision 0.15 to 0.29. An
operation is stored as (number, signed magnitude in the operation's unit), so a reader needs neither the tables of
magnitudes nor their number of bins.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

__all__ = ["BINS", "OPERATIONS", "RANGES", "apply_operation", "rand_magnitudes", "wide_magnitudes"]

# The position is the number in the archive.
OPERATIONS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast"),
    *("sharpness", "posterize", "solarize", "autocontrast", "equalize"),
)
BINS = 31  # torchvision's num_magnitude_bins
SIGNED = OPERATIONS[1:10]
FRACTION = 1 << 14  # shears, enhancements, and shifts as fractions of the view's side
ANGLE = 1 << 7  # degrees
LEVEL = 1 << 7  # solarize thresholds, in grey levels
# Accepted range of each stored magnitude, within what torchvision's functions accept.
RANGES = {
    **dict.fromkeys(OPERATIONS, (-FRACTION, FRACTION)),
    "rotate": (-180 * ANGLE, 180 * ANGLE),
    "posterize": (0, 8),
    "solarize": (0, 255 * LEVEL),
}
WIDE_SHIFT = 32  # pixels at the recipe's size

Table = npt.NDArray[np.int16]  # [operations, bins], unsigned magnitudes


def _table(size: int, *, shear: float, angle: int, enhance: float, posterize: int, shifts: list[int]) -> Table:
    steps = np.arange(BINS)
    table = np.zeros((len(OPERATIONS), BINS))
    table[1:3] = shear * steps / 30 * FRACTION
    table[3:5] = np.minimum(shifts, size) * (FRACTION / size)
    table[5] = angle * steps / 30 * ANGLE
    table[6:10] = enhance * steps / 30 * FRACTION
    table[10] = 8 - np.rint(posterize * steps / 30)
    table[11] = 8.5 * (30 - steps) * LEVEL
    return np.rint(table).astype(np.int16)


@lru_cache(maxsize=16)
def rand_magnitudes(size: int) -> Table:
    """The magnitudes of RandAugment: shifts up to 150/331 of the side, in whole pixels of the recipe's size."""
    shifts = [150 * size * m // (331 * 30) for m in range(BINS)]
    return _table(size, shear=0.3, angle=30, enhance=0.9, posterize=4, shifts=shifts)


@lru_cache(maxsize=16)
def wide_magnitudes(size: int) -> Table:
    """The magnitudes of TrivialAugmentWide: shifts up to 32 pixels at the recipe's size."""
    shifts = [WIDE_SHIFT * m // 30 for m in range(BINS)]
    return _table(size, shear=0.99, angle=135, enhance=0.99, posterize=6, shifts=shifts)


def apply_operation(image: torch.Tensor, number: int, stored: int, mode: InterpolationMode) -> torch.Tensor:
    """One operation on a square uint8 view; shifts scale with the side the view is rendered at."""
    side = image.shape[-1]
    result: torch.Tensor
    match OPERATIONS[number]:
        case "shear_x" | "shear_y" as name:
            degrees = math.degrees(math.atan(stored / FRACTION))
            shear = [degrees, 0.0] if name == "shear_x" else [0.0, degrees]
            result = F.affine_image(image, 0.0, [0, 0], 1.0, shear, interpolation=mode, center=[0, 0])
        case "translate_x" | "translate_y" as name:
            shift = round(stored * side / FRACTION)
            translate = [shift, 0] if name == "translate_x" else [0, shift]
            result = F.affine_image(image, 0.0, translate, 1.0, [0.0, 0.0], interpolation=mode)
        case "rotate":
            result = F.rotate_image(image, stored / ANGLE, interpolation=mode)
        case "posterize":
            result = F.posterize_image(image, stored)
        case "solarize":
            result = F.solarize_image(image, stored / LEVEL)
        case "identity":
            result = image
        case "autocontrast":
            result = F.autocontrast_image(image)
        case "equalize":
            result = F.equalize_image(image)
        case name:
            result = ENHANCEMENTS[name](image, 1.0 + stored / FRACTION)
    return result


ENHANCEMENTS = {
    "brightness": F.adjust_brightness_image,
    "color": F.adjust_saturation_image,
    "contrast": F.adjust_contrast_image,
    "sharpness": F.adjust_sharpness_image,
}
