"""The weight of a loss term during training: linear warm-up, then constant, linear or cosine decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

from redistill_cache.errors import UsageError

from redistill.specs import did_you_mean

__all__ = ["DECAYS", "Schedule", "TrainingProgress"]

DECAYS = ("none", "linear", "cosine")


@dataclass(frozen=True)
class TrainingProgress:
    """The position in a run. `epoch` is fractional (3.5 = half-way through the fourth), `epochs` the planned total."""

    epoch: float = 0.0
    epochs: float = 1.0

    @property
    def fraction(self) -> float:
        """0 at the start, 1 at the planned end and after it."""
        return min(max(self.epoch / self.epochs, 0.0), 1.0) if self.epochs > 0 else 1.0


@dataclass(frozen=True)
class Schedule:
    """The factor of a term's weight: 0 -> 1 over `warmup` epochs, then 1 -> `floor` from `decay_from` to the end."""

    warmup: float = 0.0
    decay: str = "none"
    decay_from: float = 0.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.decay not in DECAYS:
            raise UsageError(f"unknown decay {self.decay!r}; {did_you_mean(self.decay, DECAYS)}")
        if not (0 <= self.warmup < math.inf and 0 <= self.decay_from < math.inf and 0 <= self.floor <= 1):
            raise UsageError(
                f"expected warmup >= 0, decay_from >= 0 (epochs) and floor in 0..1, "
                f"found warmup={self.warmup:g} decay_from={self.decay_from:g} floor={self.floor:g}"
            )

    def factor(self, progress: TrainingProgress) -> float:
        """The factor at `progress`, between 0 and 1."""
        warm = min(progress.epoch / self.warmup, 1.0) if self.warmup > 0 else 1.0
        return max(warm, 0.0) * self._decayed(progress)

    def _decayed(self, progress: TrainingProgress) -> float:
        if self.decay == "none" or progress.epoch <= self.decay_from:
            return 1.0
        span = progress.epochs - self.decay_from
        done = min((progress.epoch - self.decay_from) / span, 1.0) if span > 0 else 1.0
        left = 1.0 - done if self.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.floor + (1.0 - self.floor) * left
