"""What the demo found, for people and machines."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from redistill.training import Outcome

__all__ = ["LOSSES", "Accuracy", "Speed", "Storage", "Summary", "accuracies"]

# Under the names of their runs.
LOSSES = ("ce", "kl", "power")


@dataclass(frozen=True)
class Accuracy:
    """Top-1 on unseen images, over seeds."""

    top1_mean: float
    top1_sd: float
    n: int


@dataclass(frozen=True)
class Storage:
    """Bytes of a view of the teacher's answers: as archived, and as they are kept elsewhere."""

    archived: float
    float16: float
    top10: float
    """Ten float16 probabilities and ten int16 classes, which forget the other classes."""


@dataclass(frozen=True)
class Speed:
    """Images a second while training one student."""

    cached: float
    online: float

    @property
    def ratio(self) -> float:
        return self.cached / self.online


@dataclass(frozen=True)
class Summary:
    teacher_top1: float
    students: Mapping[str, Accuracy]
    misled: Mapping[str, Accuracy]
    """The same when a fifth of the teacher's answers is confidently wrong."""
    storage: Storage
    speed: Speed
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "teacher": {"top1": self.teacher_top1},
            "students": {name: asdict(found) for name, found in self.students.items()},
            "students_of_misled_teacher": {name: asdict(found) for name, found in self.misled.items()},
            "bytes_per_view": asdict(self.storage),
            "images_per_second": asdict(self.speed) | {"ratio": self.speed.ratio},
            "seconds": self.seconds,
        }


def accuracies(outcomes: Sequence[Outcome]) -> dict[str, Accuracy]:
    """By loss, from runs named <loss>-<seed>."""
    found: dict[str, list[float]] = {}
    for outcome in outcomes:
        assert outcome.top1 is not None, "the demo validates"
        found.setdefault(outcome.run.rpartition("-")[0], []).append(outcome.top1)
    return {
        name: Accuracy(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))
        for name, values in found.items()
    }
