"""The units of stored parameters: integers in the archive, fractions in the arithmetic. Part of the format."""

from __future__ import annotations

__all__ = ["BLUR_UNIT", "EDGE_UNIT", "JITTER_UNIT", "WEIGHT_UNIT", "edge_pixels"]

JITTER_UNIT = 1 << 13  # colour factors and hue shifts
BLUR_UNIT = 1 << 12  # sigma, in pixels at the recipe's size
EDGE_UNIT = 1 << 15  # edges of boxes within a view, as fractions of its side
WEIGHT_UNIT = 65535  # the share of a row's own view in a mixed one


def edge_pixels(stored: int, side: int) -> int:
    """The pixel edge at a rendered side: the nearest, ties up; gives back the drawn pixel at the drawn side."""
    return (2 * stored * side + EDGE_UNIT) // (2 * EDGE_UNIT)
