"""Codecs by name: fitted to a pilot, or opened from an archive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from redistill_cache.codecs.certify import check_finite
from redistill_cache.codecs.checks import check_width
from redistill_cache.codecs.floats import Float16Codec, Float32Codec
from redistill_cache.codecs.linear import LinearCodec
from redistill_cache.codecs.linear_fit import fit_linear
from redistill_cache.codecs.policy import Policy
from redistill_cache.codecs.protocol import Codec, Json
from redistill_cache.codecs.space import Array, to_numpy
from redistill_cache.errors import Damaged, Refused, UsageError

__all__ = ["CODECS", "fit_codec", "open_codec"]

OPENERS: Mapping[str, Any] = {
    "linear": LinearCodec.open,
    "float16": Float16Codec.open,
    "float32": Float32Codec.open,
}
CODECS = tuple(OPENERS)


def open_codec(name: str, width: int, config: Mapping[str, Json], side: Mapping[str, np.ndarray]) -> Codec:
    """The codec of an archive. Everything is untrusted: what does not fit raises Damaged or Refused."""
    opener = OPENERS.get(name)
    if opener is None:
        raise Damaged(f"expected a codec out of {', '.join(CODECS)}, found {str(name)[:40]!r}")
    codec: Codec = opener(width, config, side)
    return codec


def fit_codec(
    name: str,
    pilot_rows: Array,
    *,
    fidelity: float = 1e-3,
    certified: bool = True,
    metric: str = "kl",
    keep_shift: bool = False,
    rounding: str = "shaped",
    head: tuple[Array, Array] | None = None,
) -> Codec:
    """A codec for rows like the pilot's (float32 [n, width]; a few times as many rows as values, or all there are).

    `fidelity` bounds KL(exact || decoded) at T = 1 and at T = 4 (metric "kl", for logits), or the relative Euclidean
    error (metric "relative", for features): of every row if `certified`, else in the mean.
    `keep_shift` also keeps what softmax does not see, the mean of a row of logits (for losses on raw logits).
    `head` is (weight [width, d], bias [width]) of the linear layer the logits come from, where it is known.
    """
    rows = to_numpy(pilot_rows).astype(np.float32, copy=False)
    if rows.ndim != 2 or len(rows) == 0:
        raise Refused(f"expected pilot rows as [n, width] with n > 0, found shape {list(rows.shape)}")
    check_width(int(rows.shape[1]))
    check_finite(rows)
    if not 1e-9 <= fidelity <= 1.0:
        raise UsageError(f"expected a fidelity from 1e-9 to 1, found {fidelity:g}")
    if metric not in ("kl", "relative"):
        raise UsageError(f"expected the metric kl or relative, found {metric!r}")
    width = rows.shape[1]
    if name == "float32":
        return Float32Codec(width, metric)
    if name == "float16":
        return Float16Codec(width, metric, fidelity, keep_shift and metric == "kl")
    if name == "linear":
        shaped = rounding == "shaped" and metric == "kl"
        policy = Policy.starting(metric, fidelity, certified=certified, keep_shift=keep_shift, shaped=shaped)
        return fit_linear(rows, policy, None if head is None else (to_numpy(head[0]), to_numpy(head[1])))
    raise UsageError(f"expected a codec out of {', '.join(CODECS)}, found {name!r}")
