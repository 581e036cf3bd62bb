"""Metrics of a trained student on a set of images, and its agreement with its teacher."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from redistill_cache import open_archive
from redistill_cache.errors import Refused, UsageError

from redistill.devices import pick_amp, pick_device
from redistill.loading import default_workers
from redistill.metrics import Metrics
from redistill.models import OpenedModel, open_model, open_weights
from redistill.models.open_model import quoted
from redistill.sources import OnBadImage
from redistill.training.run_files import STUDENT, headline
from redistill.training.validate import Validation
from redistill.views import archive_recipe

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
    on_bad_image: OnBadImage = "fail",
    device: str = "auto",
    amp: bool | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    allow_python: bool = False,
) -> Evaluation:
    """Evaluate the student of a run folder or of a weights file on `data`.

    `student` names the network if the weights file does not. Images are cropped to the size the student was trained
    at, and classes are matched by name, as in the validation of `train`. With `archive`, an archive of the same images,
    the archive's view 0 is rendered and the student is also compared with the teacher.
    """
    path = run_or_weights / STUDENT if run_or_weights.is_dir() else run_or_weights
    if not path.exists():
        raise Refused(f"{path} does not exist; expected the folder of a finished run, or a weights file")
    model = open_student(path, student, allow_python)
    teacher = None if archive is None else open_archive(archive)
    if size is None:
        size = model.trained_size or (None if teacher is None else archive_recipe(teacher).size)
    if size is None and run_or_weights.is_dir():
        raise UsageError(
            f"{run_or_weights} is a run of an earlier version that did not record the size of its views; add --size N, "
            "as shown by redistill inspect for its archive"
        )
    if size is None:
        size = model.input_size
    if size is None:
        raise UsageError(f"the size of the views is not known for {model.spec!r}; add --size")
    torch_device = pick_device(device)
    validation = Validation.open(
        data,
        class_names=model.class_names if teacher is None else teacher.class_names,
        num_classes=model.num_classes,
        size=size,
        archive=teacher,
        teachers=teachers,
        on_bad_image=on_bad_image,
        batch_size=batch_size,
        workers=default_workers() if workers is None else workers,
    )
    names = validation.class_names
    if teacher is None and names is not None and len(names) != model.num_classes:
        raise Refused(f"the data has {len(names)} classes, the student {model.num_classes}")
    network = model.module.to(torch_device).eval()
    start = time.perf_counter()
    with closing(validation):
        (sums,) = validation.metric_sums(
            [(network, model.normalise().to(torch_device))], torch_device, pick_amp(torch_device, amp)
        )
    images_per_second = len(validation) / (time.perf_counter() - start)
    return Evaluation(str(path), model.portable_spec, sums.metrics(), names, images_per_second)


def open_student(path: Path, student: str | None, allow_python: bool) -> OpenedModel:
    if student is None:
        return open_weights(path)
    if "weights=" in student:
        raise UsageError(f"{student!r} and {str(path)!r} both name weights; use only one of them")
    return open_model(f"{student}{'&' if '?' in student else '?'}weights={quoted(path)}", allow_python=allow_python)
