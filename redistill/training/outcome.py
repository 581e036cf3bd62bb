"""What a run leaves when it is done: weights, and a result for machines."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from redistill_cache.files import LOCAL

from redistill.evaluation import Metrics

__all__ = ["BEST", "RESULT", "STUDENT", "Outcome", "write_result"]

RESULT = "result.json"
STUDENT = "student.safetensors"
BEST = "best.safetensors"


@dataclass(frozen=True)
class Outcome:
    """One trained student. Metrics are None without --val."""

    run: str
    student: str
    loss: str
    seed: int
    archive_id: str | None
    epochs: int
    best_epoch: int | None
    best_top1: float | None
    top1: float | None
    top5: float | None
    nll: float | None
    ece: float | None
    agreement: float | None
    images_per_second: float
    seconds: float
    parameters: int
    evaluation: dict[str, Any] | None
    """Everything about the last epoch: reliability bins, accuracy per class, beside the teacher."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def write_result(folder: Path, outcome: Outcome) -> None:
    LOCAL.publish(folder / RESULT, (json.dumps(outcome.to_json(), indent=1) + "\n").encode())


def headline(found: Metrics | None) -> dict[str, float | None]:
    """The fixed keys of `train` and `evaluate`."""
    if found is None:
        return dict.fromkeys(("top1", "top5", "nll", "ece", "agreement"))
    agreement = None if found.teacher is None else found.teacher.agreement
    return {"top1": found.top1, "top5": found.top5, "nll": found.nll, "ece": found.ece, "agreement": agreement}
