"""Codecs by name: fitted to a pilot, or opened from an archive."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd  # type: ignore[import-untyped]

from redistill_cache.codecs.checks import check_width
from redistill_cache.codecs.compander import CompanderCodec, fit_compander
from redistill_cache.codecs.floats import Float16Codec, Float32Codec
from redistill_cache.codecs.linear import LinearCodec
from redistill_cache.codecs.linear_fit import fit_linear
from redistill_cache.codecs.protocol import Codec, Encoded, Json, is_absent
from redistill_cache.codecs.rounding import LinearSettings
from redistill_cache.codecs.space import Array, to_numpy
from redistill_cache.codecs.stats import BlockStats, check_finite
from redistill_cache.codecs.topk import TopKCodec
from redistill_cache.errors import Damaged, Refused, UsageError
from redistill_cache.spec import CODECS

__all__ = [
    "CODECS",
    "Choice",
    "CodecOptions",
    "CodecTrial",
    "choose",
    "compressed_size",
    "explain_codec",
    "fit_codec",
    "open_codec",
    "try_codec",
]


# -- auto -------------------------------------------------------------------------------------------------------------
#
# Choosing a codec by trying: encode part of the pilot with each that could serve, and weigh what it writes.

TRIAL_ROWS = 2048
# Side data is written once; archives are written for about this many views.
SPREAD_OVER = 1_000_000
# A simpler codec is taken if it costs at most this much more.
WORTH_IT = 1.05


@dataclass(frozen=True)
class CodecTrial:
    """What one codec did on the trial rows."""

    codec: Codec
    label: str
    bytes_per_row: float
    stats: Mapping[str, float]
    encoded: Encoded
    """The last rows of the pilot, `TRIAL_ROWS` at most."""


@dataclass(frozen=True)
class Choice:
    """The codec that was chosen, and why, for a person to read."""

    best: CodecTrial
    reason: str
    trials: tuple[CodecTrial, ...]

    @property
    def codec(self) -> Codec:
        return self.best.codec


def try_codec(codec: Codec, label: str, rows: np.ndarray) -> CodecTrial:
    """Encode some of the rows and weigh the result."""
    rows = rows[-TRIAL_ROWS:]
    encoded = codec.encode(rows)
    return CodecTrial(codec, label, compressed_size(codec, encoded), BlockStats.of(encoded).summary(), encoded)


def compressed_size(codec: Codec, encoded: Encoded) -> float:
    """Bytes a row as an archive would write them, side data included."""
    total = 0
    for spec in codec.arrays():
        array = to_numpy(encoded.arrays[spec.name])
        if is_absent(array):
            continue
        size = spec.chunk_rows or max(1, (1 << 20) // spec.row_bytes)
        for start in range(0, len(array), size):
            chunk = array[start : start + size]
            raw = np.ascontiguousarray(chunk.T if spec.transpose else chunk)
            total += len(Zstd(level=spec.level).encode(raw.view(np.uint8)))
    side = sum(len(Zstd(level=3).encode(np.ascontiguousarray(array).view(np.uint8))) for array in codec.side().values())
    return total / len(encoded) + side / SPREAD_OVER


def choose(trials: list[CodecTrial]) -> Choice:
    """The fewest bytes; of nearly equal ones the first, which is the simplest."""
    least = min(trial.bytes_per_row for trial in trials)
    best = next(trial for trial in trials if trial.bytes_per_row <= WORTH_IT * least)
    described = ", ".join(f"{trial.label} {trial.bytes_per_row:.1f}" for trial in trials)
    worst = max((v for name, v in best.stats.items() if name.startswith("max_")), default=math.nan)
    reason = (
        f"{best.label}: {best.bytes_per_row:.1f} bytes a row with errors of at most {worst:.2g} (tried: {described})"
    )
    return Choice(best, reason, tuple(trials))


# -- catalogue --------------------------------------------------------------------------------------------------------

OPENERS: Mapping[str, Any] = {
    "linear": LinearCodec.open,
    "float16": Float16Codec.open,
    "float32": Float32Codec.open,
    "compander": CompanderCodec.open,
    "topk": TopKCodec.open,
}
# Beyond this many classes looking at one value at a time is hopeless.
MOST_COMPANDED = 256


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
    k: int = 10,
) -> Codec:
    """A codec for rows like the pilot's (float32 [n, width]; a few times as many rows as values, or all there are).

    `fidelity` bounds KL(exact || decoded) at T = 1 and at T = 4 (metric "kl", for logits), or the relative Euclidean
    error (metric "relative", for features): of every row if `certified`, else in the mean.
    `keep_shift` also keeps what softmax does not see, the mean of a row of logits (for losses on raw logits).
    `rounding` is "shaped" (fewer bytes) or "plain" (a hundred times less work).
    `head` is (weight [width, d], bias [width]) of the linear layer the logits come from, where it is known.
    The name "auto" tries what could serve; `explain_codec` also says why.
    """
    options = CodecOptions(fidelity, certified, metric, keep_shift, rounding, head, k)
    rows = _pilot(pilot_rows)
    if name == "auto":
        return explain_codec(name, rows, options).codec
    return _fitted(name, rows, options, options.head)


@dataclass(frozen=True)
class CodecOptions:
    """The options of `fit_codec`."""

    fidelity: float = 1e-3
    certified: bool = True
    metric: str = "kl"
    keep_shift: bool = False
    rounding: str = "shaped"
    head: tuple[Array, Array] | None = None
    k: int = 10

    def __post_init__(self) -> None:
        if not 1e-9 <= self.fidelity <= 1.0:
            raise UsageError(f"expected a fidelity from 1e-9 to 1, found {self.fidelity:g}")
        for key, choices in (("metric", ("kl", "relative")), ("rounding", ("shaped", "plain"))):
            if getattr(self, key) not in choices:
                raise UsageError(f"expected {key} {' or '.join(choices)}, found {getattr(self, key)!r}")


def explain_codec(name: str, pilot_rows: Array, options: CodecOptions) -> Choice:
    """The codec, with what it does to the pilot and, for "auto", what else was tried."""
    rows = _pilot(pilot_rows)
    if name == "auto":
        return choose([try_codec(codec, label, rows) for label, codec in _candidates(rows, options)])
    return choose([try_codec(_fitted(name, rows, options, options.head), name, rows)])


def _pilot(pilot_rows: Array) -> np.ndarray:
    rows = to_numpy(pilot_rows).astype(np.float32, copy=False)
    if rows.ndim != 2 or len(rows) == 0:
        raise Refused(f"expected pilot rows as [n, width] with n > 0, found shape {list(rows.shape)}")
    check_width(int(rows.shape[1]))
    check_finite(rows)
    return rows


def _candidates(rows: np.ndarray, options: CodecOptions) -> Iterator[tuple[str, Codec]]:
    """The simplest first."""
    yield "float16", _fitted("float16", rows, options, None)
    if options.metric == "kl" and not options.keep_shift and rows.shape[1] <= MOST_COMPANDED:
        yield "compander", _fitted("compander", rows, options, None)
    yield "linear", _fitted("linear", rows, options, None)
    if options.head is not None:
        yield "linear in the axes of the head", _fitted("linear", rows, options, options.head)


def _fitted(name: str, rows: np.ndarray, options: CodecOptions, head: tuple[Array, Array] | None) -> Codec:
    width = int(rows.shape[1])
    kl = options.metric == "kl"
    if name == "float32":
        return Float32Codec(width, options.metric)
    if name == "float16":
        return Float16Codec(width, options.metric, options.fidelity, options.keep_shift and kl)
    if name == "linear":
        policy = LinearSettings.starting(
            options.metric,
            options.fidelity,
            certified=options.certified,
            keep_shift=options.keep_shift,
            shaped=options.rounding == "shaped" and kl,
        )
        return fit_linear(rows, policy, None if head is None else _checked_head(head, width))
    if name in ("compander", "topk") and not kl:
        raise UsageError(f"expected a codec for features (linear, float16, float32), found {name}")
    if name == "compander":
        return fit_compander(rows, options.fidelity)
    if name == "topk":
        return TopKCodec(width, min(options.k, width))
    raise UsageError(f"expected a codec out of auto, {', '.join(CODECS)}, found {name!r}")


def _checked_head(head: tuple[Array, Array], width: int) -> tuple[np.ndarray, np.ndarray]:
    weight, bias = (to_numpy(part).astype(np.float64) for part in head)
    if weight.ndim != 2 or len(weight) != width or bias.shape != (width,):
        found = f"{list(weight.shape)} and {list(bias.shape)}"
        raise Refused(f"expected a head of weight [{width}, d] and bias [{width}], found {found}")
    check_finite(weight)
    check_finite(bias[None])
    return weight, bias
