"""Fingerprints of views and the distance between them: arithmetic on small arrays, no images.

A fingerprint is the view's RGB pixels at the centres of an 8 x 8 grid. Averages over the cells would not show a bicubic
resize, a crop that is off by a pixel or a JPEG at quality 50; single pixels do. Differences between JPEG decoders are
of another kind: another chroma upsampling leaves luma unchanged, another inverse DCT adds small noise around a
constant. So the limits are tight for luma less its median and loose for chroma; and the difference is compared with
what wrong renderings, such as another interpolation, would have caused (`best_explanation`).
The limits were set with bench/canaries.py, which prints the cases on both sides of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

__all__ = ["GRID", "Distance", "best_explanation", "distance", "grid_positions"]

Floats = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]  # [n, 8, 8, 3]

GRID = 8
LUMA = np.array([0.299, 0.587, 0.114])
# The largest eighth of a view's 64 differences is left out: operations such as solarize turn a drift of one level into
# a jump, but only in the few pixels at a threshold.
TRIMMED = 56

# Limits on means over all canaries, in grey levels; beside each limit, the largest value measured for a decoder.
LUMA_LIMIT = 0.85  # 0.65; images saved again at quality 50 start at 0.94
DETAIL_LIMIT = 1.25  # of luma + chroma / 3: 1.04; quality 50 starts at 1.56
CONSTANT_LIMIT = 1.5  # 0.51
CHROMA_LIMIT = 3.0  # 2.2, where 32-pixel images with quartered chroma are not resized; else 0.95
# Limits on the relative change of contrast and colour.
CONTRAST_LIMIT = 0.03  # 0.006
COLOUR_LIMIT = 0.08  # 0.038
# Limit on a single canary: decoders reach 5, views of another image start at 27 on average.
ROW_LIMIT = 12.0
# One canary in fifty may exceed it: equalizing an image almost without contrast magnifies any drift.
ROWS_OFF = 0.02
# A wrong rendering that changes the canaries by less than VISIBLE (root mean square) cannot be distinguished from
# another decoder, and does no more harm. The projection of a decoder's difference on the change that a rendering
# causes is at most 0.1; that of the rendering itself is 1.
VISIBLE = 0.15
EXPLAINED = 0.5
OUTLIER = 16.0


def grid_positions(size: int) -> npt.NDArray[np.int64]:
    """The rows (and columns) of the fingerprint in a view of this size: the centres of eight equal parts."""
    return (2 * np.arange(GRID) + 1) * size // (2 * GRID)


@dataclass(frozen=True)
class Distance:
    """The distance between two sets of fingerprints: per canary, in grey levels."""

    luma: Floats
    """[n] mean absolute luma difference, less its median."""
    constant: Floats
    """[n] median luma difference."""
    chroma: Floats
    """[n] mean absolute difference of R - Y and B - Y."""
    strictness: float
    """Divides the limits of luma and detail."""
    contrast_gain: float = 0.0
    """Relative change of luma contrast: mean absolute value over canaries."""
    colour_gain: float = 0.0
    """The same for chroma: saturation and hue."""

    @property
    def rows(self) -> Floats:
        """One number per canary, to rank them by."""
        return np.maximum(self.luma, np.maximum(np.abs(self.constant), self.chroma / 2))

    @property
    def other_content(self) -> bool:
        """Whether most canaries show other content, which no rendering of the right image explains."""
        return bool((self.rows > ROW_LIMIT).mean() > 0.5)

    @property
    def drift(self) -> float:
        """The mean luma difference, constant included."""
        return float(np.mean(self.luma + np.abs(self.constant)))

    def mismatch(self) -> str | None:
        """The first limit that is exceeded, as text; None when all are within those of another decoder."""
        off = self.rows > ROW_LIMIT
        if off.mean() > ROWS_OFF:
            return f"{off.sum()} of {len(off)} canaries show other content"
        for name, values, limit in (
            ("detail", self.luma, LUMA_LIMIT / self.strictness),
            ("detail", self.luma + self.chroma / 3, DETAIL_LIMIT / self.strictness),
            ("brightness", np.abs(self.constant), CONSTANT_LIMIT),
            ("colour", self.chroma, CHROMA_LIMIT),
        ):
            mean = np.minimum(values, ROW_LIMIT).mean()
            if mean > limit:
                return f"{name} differs by {mean:.2f} grey levels, more than the {limit:.2f} between decoders"
        for name, gain, limit in (
            ("contrast", self.contrast_gain, CONTRAST_LIMIT),
            ("saturation or hue", self.colour_gain, COLOUR_LIMIT),
        ):
            if gain > limit:
                return f"{name} differs by {gain:.1%}, more than the {limit:.0%} between decoders"
        return None


def distance(stored: Pixels, rendered: Pixels, *, reduction: float = 1.0) -> Distance:
    """The distance between an archive's fingerprints and those rendered from the reader's images.

    `reduction` is the median number of source pixels per pixel of a view, along an axis: resizing averages the noise
    of a decoder, so that less of it is tolerated.
    """
    difference = _flat(stored) - _flat(rendered)
    luma = difference @ LUMA
    constant = np.median(luma, axis=1)
    chroma = np.stack([difference[..., 0] - luma, difference[..., 2] - luma])
    base = _flat(rendered)
    base_luma = base @ LUMA
    base_chroma = np.stack([base[..., 0] - base_luma, base[..., 2] - base_luma])
    result = Distance(
        luma=_trimmed(luma - constant[:, None]),
        constant=constant,
        chroma=_trimmed(chroma).mean(axis=0),
        strictness=float(np.sqrt(np.clip(reduction, 1.0, 4.0))),
    )
    fits = result.rows <= ROW_LIMIT  # the contrast of canaries with other content means nothing
    return replace(
        result,
        contrast_gain=_gain(luma[None, fits], base_luma[None, fits]),
        colour_gain=_gain(chroma[:, fits], base_chroma[:, fits]),
    )


def best_explanation(
    stored: Pixels, rendered: Pixels, candidates: Mapping[str, Pixels], *, share: float = 0.0
) -> str | None:
    """The name of the wrong rendering that accounts best for the difference to the archive, if any does.

    `candidates` holds the reader's canaries under each wrong rendering. Either sign counts, since a crop can be off by
    a pixel both ways. `share` is the part of the difference that the rendering must account for at least.
    """
    difference = _centred(stored, rendered)
    best, best_share = None, share
    for name, pixels in candidates.items():
        change = _centred(pixels, rendered)
        both, power = float(np.mean(difference * change)), float(np.mean(change**2))
        if power <= VISIBLE**2 or not EXPLAINED <= abs(both) / power <= 1 / EXPLAINED:
            continue
        accounted = both**2 / (power * float(np.mean(difference**2)))
        if accounted > best_share:
            best, best_share = name, accounted
    return best


def _gain(change: Floats, base: Floats) -> float:
    """How much of each canary [channels, n, 64] its change is a multiple of: absolute factors, weighted by power."""
    change = change - change.mean(axis=-1, keepdims=True)
    base = base - base.mean(axis=-1, keepdims=True)
    power = float((base**2).sum())
    return float(np.abs((change * base).sum(axis=(0, 2))).sum() / power) if power else 0.0


def _flat(pixels: Pixels) -> Floats:
    return pixels.reshape(len(pixels), GRID * GRID, 3).astype(np.float64)


def _trimmed(values: Floats) -> Floats:
    """The mean absolute value along the last axis, without the largest eighth."""
    means: Floats = np.sort(np.abs(values), axis=-1)[..., :TRIMMED].mean(axis=-1)
    return means


def _centred(pixels: Pixels, rendered: Pixels) -> Floats:
    """Luma differences, clipped, less their mean in each canary."""
    luma = np.clip((_flat(pixels) - _flat(rendered)) @ LUMA, -OUTLIER, OUTLIER)
    centred: Floats = luma - luma.mean(axis=1, keepdims=True)
    return centred
