"""How good a trained student is on a set of images, and how close to its teacher: `evaluate(run_or_weights, data)`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from redistill_cache import open_archive
from redistill_cache.errors import Refused, UsageError

from redistill.devices import pick_amp, pick_device
from redistill.loading import default_workers
from redistill.metrics import Metrics
from redistill.models import OpenedModel, open_model, open_weights
from redistill.sources.index import index_source
from redistill.sources.open_source import open_source
from redistill.training.run_files import STUDENT, headline
from redistill.training.validate import Validation

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one student on one set of images."""

    weights: str
    student: str
    metrics: Metrics
    class_names: tuple[str, ...] | None
    images_per_second: float

    def to_json(self) -> dict[str, Any]:
        return {
            **headline(self.metrics),
            "images_per_second": self.images_per_second,
            "weights": self.weights,
            "student": self.student,
            "class_names": None if self.class_names is None else list(self.class_names),
            "evaluation": self.metrics.to_json(),
            "teacher": None if self.metrics.teacher is None else asdict(self.metrics.teacher),
        }


def evaluate(
    run_or_weights: Path,
    data: str | Any,  # noqa: ANN401  or any object that can be made a source
    *,
    student: str | None = None,
    archive: Path | None = None,
    teachers: Sequence[str] = (),
    size: int | None = None,
    device: str = "auto",
    amp: bool | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    allow_python: bool = False,
) -> Evaluation:
    """The student of a run folder or of a weights file, on `data`.

    `student` names the network of weights that do not say it themselves. With `archive`, one over the same images,
    the views are the archive's first and the student is also held against the teacher.
    """
    path = run_or_weights / STUDENT if run_or_weights.is_dir() else run_or_weights
    if not path.exists():
        raise Refused(f"{path} does not exist; expected the folder of a finished run, or a file of weights")
    opened = open_given(path, student, allow_python)
    names, view_size = expected_of(data, opened, archive, size)
    used = pick_device(device)
    validation = Validation.open(
        data,
        class_names=names,
        num_classes=opened.num_classes,
        size=view_size,
        archive=archive,
        teachers=teachers,
        batch_size=batch_size,
        workers=default_workers() if workers is None else workers,
    )
    network = opened.module.to(used).eval()
    start = time.perf_counter()
    (tally,) = validation.tallies([(network, opened.normalise().to(used))], used, pick_amp(used, amp))
    pace = len(validation) / (time.perf_counter() - start)
    return Evaluation(str(path), opened.portable_spec, tally.metrics(), names, pace)


def open_given(path: Path, student: str | None, allow_python: bool) -> OpenedModel:
    if student is None:
        return open_weights(path)
    if "weights=" in student:
        raise UsageError(f"{student!r} names weights, and so does {str(path)!r}; keep one")
    return open_model(f"{student}{'&' if '?' in student else '?'}weights={path}", allow_python=allow_python)


def expected_of(
    data: str | Any,  # noqa: ANN401  as above
    opened: OpenedModel,
    archive: Path | None,
    size: int | None,
) -> tuple[tuple[str, ...] | None, int]:
    """The class names that labels are held against, and the side of the views."""
    if archive is not None:
        spec = open_archive(archive).spec
        return spec.class_names, size or int(spec.recipe["size"])
    names = index_source(open_source(data)).class_names
    if names is not None and len(names) != opened.num_classes:
        raise Refused(f"the data has {len(names)} classes, the student {opened.num_classes}")
    side = size or opened.input_size
    if side is None:
        raise UsageError(f"the size of the views is not known for {opened.spec!r}; add --size")
    return names, side
