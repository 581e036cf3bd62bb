"""A few views as the students saw them, with what the teacher and the students say."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from redistill_cache import Archive

from redistill.models import open_weights
from redistill.report.runs import Group
from redistill.sources.opening import open_source
from redistill.training.outcome import STUDENT
from redistill.views import ViewDataset

__all__ = ["Example", "find_examples"]

COUNT = 12
VIEW = 0


@dataclass(frozen=True)
class Example:
    """One view: a picture, the true class, and (who, class, confidence) of everybody's answer."""

    picture: str
    key: str
    label: int
    answers: tuple[tuple[str, int, float], ...]


def find_examples(archive: Archive, data: str, groups: Sequence[Group]) -> list[Example]:
    """Views spread over the archive, the first student of each group asked about them."""
    dataset = ViewDataset(open_source(data), archive)
    places = dataset.indices(VIEW)
    count = min(COUNT, len(places))
    # Steps that share no factor with the number of classes, as samples may come class after class in turn.
    chosen = places[(np.arange(count) * (len(places) // count) + np.arange(count)) % len(places)]
    items = dataset.__getitems__(chosen.tolist())
    pixels = torch.stack([item.pixels for item in items])
    rows = [item.row for item in items]
    said = [(f"teacher {name}", archive.logits(VIEW, rows, teacher=name)) for name in archive.teachers]
    for group in groups:
        student = open_weights(group.runs[0].folder / STUDENT)
        with torch.no_grad():
            said.append((group.name, student.module.eval()(student.normalise()(pixels)).numpy()))
    examples = []
    for at, item in enumerate(items):
        answers = tuple((who, *answer(logits[at])) for who, logits in said)
        examples.append(Example(picture_of(item.pixels), archive.keys[item.row], item.label, answers))
    return examples


def answer(logits: np.ndarray) -> tuple[int, float]:
    """The class and its probability."""
    p = np.exp(logits - logits.max())
    return int(logits.argmax()), float(p.max() / p.sum())


def picture_of(pixels: torch.Tensor) -> str:
    """A PNG inside the page."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
