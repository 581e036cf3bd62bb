"""Choosing a codec by trying: encode part of the pilot with each that could serve, and weigh what it writes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numcodecs.zstd import Zstd  # type: ignore[import-untyped]

from redistill_cache.codecs.protocol import Codec, Encoded, is_absent
from redistill_cache.codecs.space import to_numpy
from redistill_cache.codecs.stats import BlockStats

__all__ = ["Choice", "Trial", "choose", "compressed_size", "try_codec"]

TRIAL_ROWS = 2048
# Side data is written once; archives are written for about this many views.
SPREAD_OVER = 1_000_000
# A simpler codec is taken if it costs at most this much more.
WORTH_IT = 1.05


@dataclass(frozen=True)
class Trial:
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

    best: Trial
    reason: str
    trials: tuple[Trial, ...]

    @property
    def codec(self) -> Codec:
        return self.best.codec


def try_codec(codec: Codec, label: str, rows: np.ndarray) -> Trial:
    """Encode some of the rows and weigh the result."""
    rows = rows[-TRIAL_ROWS:]
    encoded = codec.encode(rows)
    return Trial(codec, label, compressed_size(codec, encoded), BlockStats.of(encoded).summary(), encoded)


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


def choose(trials: list[Trial]) -> Choice:
    """The fewest bytes; of nearly equal ones the first, which is the simplest."""
    least = min(trial.bytes_per_row for trial in trials)
    best = next(trial for trial in trials if trial.bytes_per_row <= WORTH_IT * least)
    described = ", ".join(f"{trial.label} {trial.bytes_per_row:.1f}" for trial in trials)
    worst = max((v for name, v in best.stats.items() if name.startswith("max_")), default=math.nan)
    reason = (
        f"{best.label}: {best.bytes_per_row:.1f} bytes a row with errors of at most {worst:.2g} (tried: {described})"
    )
    return Choice(best, reason, tuple(trials))
