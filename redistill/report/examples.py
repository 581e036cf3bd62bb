"""Example views on the page: the pixels as the students saw them, and the predictions of teachers and students."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from redistill_cache import Archive
from redistill_cache.errors import RedistillError

from redistill.models import open_weights
from redistill.report.runs import Group
from redistill.signals import LOGITS
from redistill.sources.base import in_any_order
from redistill.sources.open_source import open_source
from redistill.training.run_files import STUDENT
from redistill.views import ViewDataset
from redistill.views.dataset import MixedView, RenderedView

__all__ = ["VIEW", "Example", "Examples", "Prediction", "find_examples"]

VIEW = 0
# Views that are predicted. The page shows the first few, and of the rest those with the largest divergence.
CANDIDATES, RANDOM, DISAGREEING = 96, 6, 6
# Longer side of a picture, in pixels.
PICTURE = 160

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prediction:
    """The top-1 class of a teacher or student on one view."""

    model: str
    style: str
    """Classes of the style sheet."""
    label: str
    confidence: float
    correct: bool | None
    """None if the view has no label."""


@dataclass(frozen=True)
class Example:
    picture: str
    """A data: URL."""
    key: str
    truth: str
    """The class, or the classes and their shares where images are mixed."""
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True)
class Examples:
    random: tuple[Example, ...] = ()
    disagreeing: tuple[Example, ...] = ()
    notes: tuple[str, ...] = ()
    """Groups without predictions, and why."""


def find_examples(archive: Archive, data: str, groups: Sequence[Group]) -> Examples:
    """Predictions on views of random rows: by the archived teachers, and by the first student of each group."""
    dataset = ViewDataset(in_any_order(open_source(data)), archive, check=archive.spec.canaries_per_view > 0)
    indices = dataset.indices(VIEW)
    chosen = np.random.default_rng(0).permutation(len(indices))[:CANDIDATES]
    items = dataset.__getitems__(indices[chosen].tolist())
    rows = [item.row for item in items]
    names = [name for name, teacher in archive.teachers.items() if any(s.name == LOGITS for s in teacher.signals)]
    teachers = {name: archive.logits(VIEW, rows, teacher=name) for name in names}
    students, notes = student_logits(groups, torch.stack([item.pixels for item in items]), archive.num_classes)
    models = [(f"teacher {name}" if len(names) > 1 else "teacher", "teacher", teachers[name]) for name in names]
    models += [
        (group.short, f"ink {group.style.colour_class}", students[group.name])
        for group in groups
        if group.name in students
    ]

    def example(k: int) -> Example:
        shares = label_shares(items[k])
        labels = {label for label, _ in shares if label >= 0}
        predictions = tuple(
            predict(model, style, logits[k], labels, archive.class_names) for model, style, logits in models
        )
        truth = truth_text(shares, archive.class_names)
        return Example(data_url(items[k].pixels), archive.keys[rows[k]], truth, predictions)

    rest = range(RANDOM, len(items))
    far = sorted(rest, key=lambda k: -mean_kl(teachers, students, k))[:DISAGREEING] if teachers and students else []
    first = range(min(RANDOM, len(items)))
    return Examples(tuple(map(example, first)), tuple(map(example, far)), tuple(notes))


def student_logits(
    groups: Sequence[Group], pixels: torch.Tensor, num_classes: int
) -> tuple[dict[str, Logits], list[str]]:
    """The logits of one student of each group, by the group's name, and a note for every group without."""
    logits, notes = {}, []
    for group in groups:
        try:
            student = open_weights(group.runs[0].folder / STUDENT)
        except RedistillError as error:
            notes.append(f"no predictions of {group.name}: {error}")
            continue
        if student.num_classes != num_classes:
            notes.append(f"no predictions of {group.name}: expected {num_classes} classes, found {student.num_classes}")
            continue
        with torch.no_grad():
            logits[group.name] = student.module.eval()(student.normalise()(pixels)).float().numpy()
    return logits, notes


def predict(model: str, style: str, logits: Logits, labels: set[int], class_names: Sequence[str] | None) -> Prediction:
    top1, confidence = int(logits.argmax()), float(np.exp(log_softmax(logits).max()))
    return Prediction(model, style, class_label(top1, class_names), confidence, top1 in labels if labels else None)


def mean_kl(teachers: Mapping[str, Logits], students: Mapping[str, Logits], k: int) -> float:
    """Mean over students of KL(teacher || student) on view k; several teachers are one by the mean of their logits."""
    teacher = log_softmax(np.mean([logits[k] for logits in teachers.values()], axis=0))
    return float(np.mean([np.exp(teacher) @ (teacher - log_softmax(logits[k])) for logits in students.values()]))


def log_softmax(logits: Logits) -> Logits:
    shifted = logits - logits.max()
    result: Logits = shifted - np.log(np.exp(shifted).sum())
    return result


def label_shares(item: RenderedView | MixedView) -> tuple[tuple[int, float], ...]:
    if isinstance(item, MixedView) and item.partner != item.row:
        share = float(item.weight)
        return (item.label, share), (item.partner_label, 1 - share)
    return ((item.label, 1.0),)


def truth_text(shares: Sequence[tuple[int, float]], class_names: Sequence[str] | None) -> str:
    labels = [(class_label(label, class_names), share) for label, share in shares]
    return " + ".join(label if share == 1 else f"{share:.0%} {label}" for label, share in labels)


def class_label(k: int, class_names: Sequence[str] | None) -> str:
    if k < 0:
        return "no label"
    return str(k) if class_names is None else class_names[k]


def data_url(pixels: torch.Tensor) -> str:
    """The view as a PNG inside the page."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.thumbnail((PICTURE, PICTURE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
