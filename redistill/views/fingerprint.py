"""Fingerprints of views, and how far two of them may lie apart: arithmetic on small arrays, no images.

A fingerprint is the view's own pixels, RGB, at the centres of an 8 x 8 grid. Averages over the cells would be blind to
what matters: a bicubic view, a crop one pixel off and a JPEG at quality 50 all have the averages of the right one.
Single pixels see them, and what decoders do to JPEG differs from them in kind: another chroma upsampling leaves luma
alone, another inverse DCT adds small noise around a constant. So luma is judged finely, after its constant, and chroma
coarsely; and where a wrong rendering can be named, its direction is looked for in the difference (`explained`).
The limits were set by bench/canaries.py, which prints the cases on both sides of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

__all__ = ["GRID", "Distance", "distance", "explained", "grid_positions"]

Floats = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]  # [n, 8, 8, 3]

GRID = 8
LUMA = np.array([0.299, 0.587, 0.114])
# Of the 64 differences of a view the largest eighth is left out: operations such as solarize turn a drift of one level
# into a jump, but only in the few pixels that lie at a threshold.
KEPT = 56

# Means over all canaries, in grey levels; behind each limit the worst decoder measured.
LUMA_LIMIT = 0.85  # 0.65; views of images saved again at quality 50 start at 0.94
DETAIL_LIMIT = 1.25  # of luma + chroma / 3: 1.04; quality 50 starts at 1.56
CONSTANT_LIMIT = 1.5  # 0.51
CHROMA_LIMIT = 3.0  # 2.2, where 32-pixel images with quartered chroma are not resized; else 0.95
# By how much contrast and colour are multiplied.
CONTRAST_LIMIT = 0.03  # 0.006
COLOUR_LIMIT = 0.08  # 0.038
# One canary alone: 5; views of another image start at 27 on average.
ROW_LIMIT = 12.0
# One canary in fifty may be off: an image nearly without contrast, equalized, shows any drift hugely.
ROWS_OFF = 0.02
# A suspect that changes the canaries by less than this (root mean square) cannot be told from another decoder, and
# does no more harm than one. Decoders follow no suspect by more than 0.1, the right suspect scores 1.
VISIBLE = 0.15
EXPLAINED = 0.5
OUTLIER = 16.0


def grid_positions(size: int) -> npt.NDArray[np.int64]:
    """The rows (and columns) of a view of this size that the fingerprint takes: the centres of eight equal parts."""
    return (2 * np.arange(GRID) + 1) * size // (2 * GRID)


@dataclass(frozen=True)
class Distance:
    """How far two sets of fingerprints lie apart: per canary, in grey levels."""

    luma: Floats
    """[n] mean size of the luma differences around their median."""
    constant: Floats
    """[n] the median of the luma differences."""
    chroma: Floats
    """[n] mean size of the differences of R - Y and B - Y."""
    strictness: float
    """By what the limits of luma and detail are divided."""
    contrast_gain: float = 0.0
    """By how much the differences follow the luma they are differences of: mean over canaries, without sign."""
    colour_gain: float = 0.0
    """The same of chroma: saturation and hue."""

    @property
    def rows(self) -> Floats:
        """One number per canary, to rank them by."""
        return np.maximum(self.luma, np.maximum(np.abs(self.constant), self.chroma / 2))

    @property
    def hopeless(self) -> bool:
        """Most canaries show something else altogether: no rendering of the right image explains that."""
        return bool((self.rows > ROW_LIMIT).mean() > 0.5)

    @property
    def drift(self) -> float:
        """The mean luma difference, constant included."""
        return float(np.mean(self.luma + np.abs(self.constant)))

    def misfit(self) -> str | None:
        """What is too far apart, in words; None when it is within the limits of another decoder."""
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
                return f"{name} differs by {mean:.2f} grey levels, more than the {limit:.2f} of other decoders"
        for name, gain, limit in (
            ("contrast", self.contrast_gain, CONTRAST_LIMIT),
            ("saturation or hue", self.colour_gain, COLOUR_LIMIT),
        ):
            if gain > limit:
                return f"{name} differs by {gain:.1%}, more than the {limit:.0%} of other decoders"
        return None


def distance(stored: Pixels, here: Pixels, *, reduction: float = 1.0) -> Distance:
    """How far the archive's fingerprints lie from those made here.

    `reduction` is by how much views are smaller than what they show (a median): averaging over more pixels leaves
    less of a decoder's noise, so less of it is tolerated.
    """
    difference = _flat(stored) - _flat(here)
    luma = difference @ LUMA
    constant = np.median(luma, axis=1)
    chroma = np.stack([difference[..., 0] - luma, difference[..., 2] - luma])
    base = _flat(here)
    base_luma = base @ LUMA
    base_chroma = np.stack([base[..., 0] - base_luma, base[..., 2] - base_luma])
    apart = Distance(
        luma=_trimmed(luma - constant[:, None]),
        constant=constant,
        chroma=_trimmed(chroma).mean(axis=0),
        strictness=float(np.sqrt(np.clip(reduction, 1.0, 4.0))),
    )
    fits = apart.rows <= ROW_LIMIT  # of a canary that shows something else, contrast means nothing
    return replace(
        apart,
        contrast_gain=_gain(luma[None, fits], base_luma[None, fits]),
        colour_gain=_gain(chroma[:, fits], base_chroma[:, fits]),
    )


def explained(stored: Pixels, here: Pixels, suspects: Mapping[str, Pixels], *, share: float = 0.0) -> str | None:
    """The suspect whose change of the canaries the archive's difference follows best, if it follows one at all.

    A suspect is what the canaries would look like, made here, under another rendering; either sign counts, since a
    crop can be a pixel off both ways. `share` is how much of the difference it must account for.
    """
    difference = _centred(stored, here)
    best, best_share = None, share
    for name, pixels in suspects.items():
        change = _centred(pixels, here)
        both, power = float(np.mean(difference * change)), float(np.mean(change**2))
        if power <= VISIBLE**2 or not EXPLAINED <= abs(both) / power <= 1 / EXPLAINED:
            continue
        accounted = both**2 / (power * float(np.mean(difference**2)))
        if accounted > best_share:
            best, best_share = name, accounted
    return best


def _gain(change: Floats, base: Floats) -> float:
    """Of [channels, n, 64]: how far each canary's change is a multiple of the canary, weighted by its power."""
    change = change - change.mean(axis=-1, keepdims=True)
    base = base - base.mean(axis=-1, keepdims=True)
    power = float((base**2).sum())
    return float(np.abs((change * base).sum(axis=(0, 2))).sum() / power) if power else 0.0


def _flat(pixels: Pixels) -> Floats:
    return pixels.reshape(len(pixels), GRID * GRID, 3).astype(np.float64)


def _trimmed(values: Floats) -> Floats:
    """The mean size along the last axis without the largest eighth."""
    means: Floats = np.sort(np.abs(values), axis=-1)[..., :KEPT].mean(axis=-1)
    return means


def _centred(pixels: Pixels, here: Pixels) -> Floats:
    """Luma changes around their mean in each canary, with outliers held down."""
    luma = np.clip((_flat(pixels) - _flat(here)) @ LUMA, -OUTLIER, OUTLIER)
    centred: Floats = luma - luma.mean(axis=1, keepdims=True)
    return centred
