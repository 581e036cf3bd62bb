"""Codecs by name: opened from an archive, or fitted to a pilot. "auto" tries several and chooses the smallest."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numcodecs.zstd import Zstd  # type: ignore[import-untyped]

from redistill_cache import limits
from redistill_cache.codecs.backend import Array, to_numpy
from redistill_cache.codecs.compander import CompanderCodec, fit_compander
from redistill_cache.codecs.floats import Float16Codec, Float32Codec
from redistill_cache.codecs.linear import LinearCodec
from redistill_cache.codecs.linear_encode import ROUNDINGS, LinearSettings
from redistill_cache.codecs.linear_fit import fit_linear, spans
from redistill_cache.codecs.protocol import Codec, Encoded, is_absent
from redistill_cache.codecs.stats import METRICS, BlockStats, check_finite
from redistill_cache.codecs.topk import TopKCodec
from redistill_cache.errors import Damaged, Refused, UsageError
from redistill_cache.spec import CODECS
from redistill_cache.strict_json import Fields, Json

__all__ = [
    "Choice",
    "CodecOptions",
    "CodecTrial",
    "compressed_size",
    "explain_codec",
    "fit_codec",
    "open_codec",
]

WITHOUT_SIDE_DATA: Mapping[str, type[Float16Codec | Float32Codec | CompanderCodec | TopKCodec]] = {
    "float16": Float16Codec,
    "float32": Float32Codec,
    "compander": CompanderCodec,
    "topk": TopKCodec,
}
# Above this many classes the compander, which encodes every logit separately, is not worth trying.
MAX_COMPANDER_WIDTH = 256


def open_codec(name: str, width: int, config: Mapping[str, Json], side: Mapping[str, np.ndarray]) -> Codec:
    """The codec of an archive. All arguments are untrusted: Damaged or Refused if they do not fit together."""
    if name not in CODECS:
        raise Damaged(f"expected codec {', '.join(CODECS[:-1])} or {CODECS[-1]}, found {str(name)[:40]!r}")
    _check_width(width)
    fields = Fields(config, f"config of codec {name}", Damaged)
    codec: Codec
    if name == "linear":
        codec = LinearCodec.open(width, fields, side)
    elif side:
        raise Damaged(f"expected no side data of codec {name}, found {', '.join(sorted(side)[:5])}")
    else:
        codec = WITHOUT_SIDE_DATA[name].open(width, fields)
    fields.done()
    return codec


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
        for key, choices in (("metric", METRICS), ("rounding", ROUNDINGS)):
            if getattr(self, key) not in choices:
                raise UsageError(f"expected {key} {' or '.join(choices)}, found {getattr(self, key)!r}")


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
    """A codec for rows like the pilot's (float32 [n, width]; a few times as many rows as values, or all rows).

    `fidelity` bounds KL(exact || decoded) at T = 1 and at T = 4 (metric "kl", for logits), or the Euclidean error
    relative to the row less the mean row (metric "centred", for features; float16 knows no mean row, so its error is
    relative to the row, as with metric "relative"): of every row if `certified`, else in the mean.
    `keep_shift` also stores the mean of a row of logits, which softmax does not depend on (for losses on raw logits).
    `rounding` is "shaped" (fewer bytes) or "plain" (about ten times faster; bench/codecs.py).
    `head` is (weight [width, d], bias [width]) of the linear layer that outputs the logits, if known.
    `k` is for topk. The name "auto" tries several codecs; `explain_codec` also reports the reason of the choice.
    """
    options = CodecOptions(fidelity, certified, metric, keep_shift, rounding, head, k)
    if name == "auto":
        return explain_codec(name, pilot_rows, options).codec
    return _fit(name, _checked_pilot(pilot_rows), options, options.head)


def explain_codec(name: str, pilot_rows: Array, options: CodecOptions) -> Choice:
    """The fitted codec, with its results on the pilot and, for "auto", the other codecs that were tried."""
    rows = _checked_pilot(pilot_rows)
    if name == "auto":
        return _smallest([_try_codec(codec, label, rows) for label, codec in _candidates(rows, options)])
    return _smallest([_try_codec(_fit(name, rows, options, options.head), name, rows)])


def _checked_pilot(pilot_rows: Array) -> np.ndarray:
    rows = to_numpy(pilot_rows).astype(np.float32, copy=False)
    if rows.ndim != 2 or len(rows) == 0:
        raise Refused(f"expected pilot rows as [n, width] with n > 0, found shape {list(rows.shape)}")
    _check_width(int(rows.shape[1]))
    check_finite(rows)
    return rows


def _check_width(width: object) -> None:
    if type(width) is not int or not 1 <= width <= limits.MAX_WIDTH:
        raise Refused(f"expected a signal of 1 to {limits.MAX_WIDTH} values per row, found {str(width)[:40]!r}")


def _candidates(rows: np.ndarray, options: CodecOptions) -> Iterator[tuple[str, Codec]]:
    """The codecs that "auto" tries, the simplest first. Of features, only one bounds what `centred` means."""
    if options.metric == "centred":
        yield "linear", _fit("linear", rows, options, None)
        return
    yield "float16", _fit("float16", rows, options, None)
    if options.metric == "kl" and not options.keep_shift and rows.shape[1] <= MAX_COMPANDER_WIDTH:
        yield "compander", _fit("compander", rows, options, None)
    # A basis of few rows is completed to all directions, which takes more side data and time than that of the head.
    if options.head is None or spans(rows):
        yield "linear", _fit("linear", rows, options, None)
    if options.head is not None:
        yield "linear in the axes of the head", _fit("linear", rows, options, options.head)


def _fit(name: str, rows: np.ndarray, options: CodecOptions, head: tuple[Array, Array] | None) -> Codec:
    width = int(rows.shape[1])
    kl = options.metric == "kl"
    if name == "float32":
        return Float32Codec(width, "kl" if kl else "relative")
    if name == "float16":
        return Float16Codec(width, "kl" if kl else "relative", options.fidelity, options.keep_shift and kl)
    if name == "linear":
        settings = LinearSettings.before_fitting(
            options.metric,
            options.fidelity,
            certified=options.certified,
            keep_shift=options.keep_shift,
            shaped=options.rounding == "shaped",
        )
        return fit_linear(rows, settings, None if head is None else _checked_head(head, width))
    if name in ("compander", "topk") and not kl:
        raise UsageError(f"expected a codec for features (linear, float16, float32), found {name}")
    if name == "compander":
        return fit_compander(rows, options.fidelity)
    if name == "topk":
        return TopKCodec(width, min(options.k, width))
    raise UsageError(f"expected codec auto, {', '.join(CODECS[:-1])} or {CODECS[-1]}, found {name!r}")


def _checked_head(head: tuple[Array, Array], width: int) -> tuple[np.ndarray, np.ndarray]:
    weight, bias = map(to_numpy, head)
    if weight.ndim != 2 or len(weight) != width or bias.shape != (width,):
        shapes = f"{list(weight.shape)} and {list(bias.shape)}"
        raise Refused(f"expected a head of weight [{width}, d] and bias [{width}], found {shapes}")
    check_finite(weight)
    check_finite(bias[None])
    return weight, bias


# -- choosing by trial ------------------------------------------------------------------------------------------------

TRIAL_ROWS = 2048
# Side data is stored once, and counted as if about this many rows shared it.
SIDE_DATA_VIEWS = 1_000_000
# A simpler codec is chosen if it takes at most this factor more bytes.
SIMPLER_FACTOR = 1.05


@dataclass(frozen=True)
class CodecTrial:
    """A codec with its size and errors on part of the pilot."""

    codec: Codec
    label: str
    bytes_per_row: float
    cpu_seconds_per_row: float
    """To encode a row, without compressing it."""
    stats: Mapping[str, float]
    encoded: Encoded
    """The last rows of the pilot, `TRIAL_ROWS` at most."""


@dataclass(frozen=True)
class Choice:
    """The chosen codec, and the reason as a sentence for the user."""

    best: CodecTrial
    reason: str

    @property
    def codec(self) -> Codec:
        return self.best.codec


def _try_codec(codec: Codec, label: str, rows: np.ndarray) -> CodecTrial:
    start = time.process_time()
    encoded = codec.encode(rows[-TRIAL_ROWS:])
    seconds = (time.process_time() - start) / len(encoded)
    return CodecTrial(codec, label, compressed_size(codec, encoded), seconds, BlockStats.of(encoded).summary(), encoded)


def compressed_size(codec: Codec, encoded: Encoded) -> float:
    """Bytes per row in an archive, with a share of the side data."""
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
    return total / len(encoded) + side / SIDE_DATA_VIEWS


def _smallest(trials: list[CodecTrial]) -> Choice:
    """The trial with the fewest bytes; of nearly equal ones the first, which is the simplest."""
    least = min(trial.bytes_per_row for trial in trials)
    best = next(trial for trial in trials if trial.bytes_per_row <= SIMPLER_FACTOR * least)
    sizes = ", ".join(f"{trial.label} {trial.bytes_per_row:.1f}" for trial in trials)
    worst = max((v for name, v in best.stats.items() if name.startswith("max_")), default=math.nan)
    return Choice(
        best, f"{best.label}: {best.bytes_per_row:.1f} bytes per row, errors of at most {worst:.2g} (tried: {sizes})"
    )
