"""The basis of the linear codec: where it comes from, and how it is stored in fewer bytes than float16.

Three sources. `svd`: the principal directions of the pilot's logits; where rows and classes are few it is completed to
all width - 1 (or width) directions, so that no row can fall outside. `head`: the rows of the teacher's last layer, when
the caller gives it; rectified features are sparse, and then their own axes beat the principal ones. Both are rows of
unit length, and both are stored as integers: row k as integer[k] * scale[k], with the scale of a row chosen by how much
the signal varies along it, so that the whole basis adds a hundredth of the noise that rounding is going to add.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Basis", "complete", "head_basis", "principal_basis", "quantize"]

MAX_COMPLETED_WIDTH = 1024
MAX_GRAM = 4096
INTEGER_LIMIT = 32767


@dataclass(frozen=True)
class Basis:
    """Unit rows [r, width], the offset they are measured from, and how much the pilot varies along each (rms)."""

    rows: np.ndarray  # float64
    offset: np.ndarray  # float64 [width]
    spread: np.ndarray  # float64 [r]


def principal_basis(rows: np.ndarray, *, shift_free: bool, max_rank: int) -> Basis:
    """Principal directions of centred rows (float64 [n, width]), largest first."""
    width = rows.shape[1]
    offset = rows.mean(0)
    centred = rows - offset
    largest = float(np.abs(centred).max(initial=0.0))
    if largest == 0.0:
        directions = np.zeros((0, width))
        spread = np.zeros(0)
    else:
        directions, spread = _principal(centred / largest)
        spread = spread * largest
    whole = width - 1 if shift_free else width
    # Twice as many rows as values show every direction that a linear head can produce; fewer may not.
    if width <= MAX_COMPLETED_WIDTH and whole <= max_rank and len(rows) < 2 * width:
        missing = complete(directions, shift_free=shift_free)
        directions = np.concatenate([directions, missing])
        spread = np.concatenate([spread, np.zeros(len(missing))])
    return Basis(directions[:max_rank], offset, spread[:max_rank])


def _principal(centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    count, width = centred.shape
    if width > MAX_GRAM and count > MAX_GRAM:
        centred = centred[np.linspace(0, count - 1, MAX_GRAM).astype(np.int64)]
        count = MAX_GRAM
    if width <= count:
        values, vectors = np.linalg.eigh(centred.T @ centred / count)
        directions = vectors.T
    else:
        values, vectors = np.linalg.eigh(centred @ centred.T / count)
        directions = vectors.T @ centred
    order = np.argsort(-values, kind="stable")
    # Half the digits of float64 survive the square; what is below is noise of the product, not of the teacher.
    order = order[values[order] > 1e-12 * values.max()]
    directions = directions[order]
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return directions, np.sqrt(values[order])


def complete(directions: np.ndarray, *, shift_free: bool) -> np.ndarray:
    """Unit rows that make orthonormal directions span everything (everything of zero mean, if shift_free)."""
    width = directions.shape[1]
    fixed = [directions]
    if shift_free:
        fixed.append(np.full((1, width), width**-0.5))
    known = np.concatenate(fixed)
    if len(known) >= width:
        return np.zeros((0, width))
    q, _ = np.linalg.qr(np.concatenate([known.T, np.eye(width)], axis=1))
    return np.ascontiguousarray(q[:, len(known) : width].T)


def head_basis(weight: np.ndarray, bias: np.ndarray, rows: np.ndarray, *, shift_free: bool) -> Basis:
    """The columns of a linear head [width, d] as unit rows; `rows` are pilot logits it produced, not centred."""
    axes = np.asarray(weight, np.float64).T
    offset = np.asarray(bias, np.float64)
    if shift_free:
        axes = axes - axes.mean(1, keepdims=True)
        offset = offset - offset.mean()
    norms = np.linalg.norm(axes, axis=1, keepdims=True)
    axes = axes[norms[:, 0] > 0] / norms[norms[:, 0] > 0]
    coefficients = np.linalg.lstsq(axes.T, (rows - offset).T, rcond=None)[0]
    spread = np.sqrt((coefficients**2).mean(1))
    order = np.argsort(-spread, kind="stable")
    return Basis(axes[order], offset, spread[order])


def quantize(basis: Basis, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Integer rows and their scales, such that coefficients of the pilot's spread err by `noise` in norm (rms)."""
    rank, width = basis.rows.shape
    largest = np.abs(basis.rows).max(1, initial=0.0)
    allowed = noise * np.sqrt(12.0 / max(rank * width, 1)) / np.maximum(basis.spread, 1e-300)
    # Never so coarse that a direction loses its shape, never finer than 16 bits.
    scale = np.clip(allowed, largest / INTEGER_LIMIT, largest / 15)
    scale = scale.astype(np.float32)
    integers = np.rint(basis.rows / scale[:, None].astype(np.float64))
    return np.clip(integers, -INTEGER_LIMIT - 1, INTEGER_LIMIT).astype(np.int16), scale
