"""What the encoder of the linear codec promises, and how it decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from redistill_cache.codecs.checks import Config
from redistill_cache.codecs.protocol import Json
from redistill_cache.codecs.synthesis import LEVEL_MASK

__all__ = ["Policy"]

METRICS = ("kl", "relative")
ROUNDINGS = ("plain", "shaped")
# Another machine's arithmetic may differ in the last digits: pass only what passes there too.
MARGIN = 1.0 - 1e-3
# Without a certificate, a row this many times over the bound is still refined.
WILD = 10.0


@dataclass(frozen=True)
class Policy:
    """What the encoder promises and how it decides; recorded in the archive, not needed to decode."""

    metric: Literal["kl", "relative"]
    fidelity: float
    certified: bool
    level: int  # where a row starts
    keep_shift: bool
    rounding: Literal["plain", "shaped"]
    reference: float  # rows whose errors cost this much start at `level`, others where a bit buys as much
    weight: float  # of T = 1 against T = 4

    @classmethod
    def starting(cls, metric: str, fidelity: float, *, certified: bool, keep_shift: bool, shaped: bool) -> Policy:
        """Before fitting, which chooses the level, the reference and the weight."""
        kl = metric == "kl"
        return cls(
            metric="kl" if kl else "relative",
            fidelity=fidelity,
            certified=certified,
            level=0,
            keep_shift=keep_shift and kl,
            rounding="shaped" if shaped else "plain",
            reference=0.1,
            weight=1.0,
        )

    @property
    def limit(self) -> float:
        """The error above which a row gets a finer step."""
        return self.fidelity * (MARGIN if self.certified else WILD)

    def config(self) -> dict[str, Json]:
        return {
            "metric": self.metric,
            "fidelity": self.fidelity,
            "certified": self.certified,
            "level": self.level,
            "keep_shift": self.keep_shift,
            "rounding": self.rounding,
            "reference": self.reference,
            "weight": self.weight,
        }

    @classmethod
    def read(cls, reader: Config) -> Policy:
        return cls(
            metric=cast("Literal['kl', 'relative']", reader.choice("metric", METRICS)),
            fidelity=reader.number("fidelity", 1e-12, 1e3),
            certified=reader.flag("certified"),
            level=reader.integer("level", 0, LEVEL_MASK),
            keep_shift=reader.flag("keep_shift"),
            rounding=cast("Literal['plain', 'shaped']", reader.choice("rounding", ROUNDINGS)),
            reference=reader.number("reference", 1e-80, 1e80),
            weight=reader.number("weight", 1e-3, 1e3),
        )
