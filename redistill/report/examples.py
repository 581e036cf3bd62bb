"""A few views as the students saw them, with what the teacher and the students say."""

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
from redistill.report.markup import missing, section, text
from redistill.report.runs import Group
from redistill.signals import LOGITS
from redistill.sources.open_source import open_source
from redistill.training.run_files import STUDENT
from redistill.views import ViewDataset
from redistill.views.dataset import MixedView, RenderedView

__all__ = ["Answer", "Example", "Examples", "find_examples", "views"]

VIEW = 0
# Views that everybody is asked about; of these, so many any, and so many on which students and teacher differ most.
ASKED, ANY, FAR = 96, 6, 6
# Side of the largest picture in the page.
PICTURE = 160

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Answer:
    """What one teacher or student says of a view, and how sure it is."""

    who: str
    kind: str
    """Class of the style sheet: the colour of its group."""
    answer: int
    confidence: float


@dataclass(frozen=True)
class Example:
    """One view: a picture, what it shows (a class and its share; several where views are mixed), the answers."""

    picture: str
    key: str
    truth: tuple[tuple[int, float], ...]
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Examples:
    any: tuple[Example, ...] = ()
    far: tuple[Example, ...] = ()
    notes: tuple[str, ...] = ()
    """Who could not be asked, and why."""


def find_examples(archive: Archive, data: str, groups: Sequence[Group]) -> Examples:
    """Ask the teachers' rows and the first student of each group about views drawn from all over the archive."""
    dataset = ViewDataset(open_source(data), archive)
    indices = dataset.indices(VIEW)
    chosen = np.random.default_rng(0).permutation(len(indices))[:ASKED]
    items = dataset.__getitems__(indices[chosen].tolist())
    rows = [item.row for item in items]
    names = [name for name, teacher in archive.teachers.items() if any(s.name == LOGITS for s in teacher.signals)]
    teachers = {name: archive.logits(VIEW, rows, teacher=name) for name in names}
    students, notes = ask(groups, torch.stack([item.pixels for item in items]), archive.num_classes)
    said = [(f"teacher {name}" if len(teachers) > 1 else "teacher", "teacher", of) for name, of in teachers.items()]
    for group in groups:
        if group.name in students:
            said.append((group.short, f"ink c{group.look.colour % 8}", students[group.name]))

    def example(at: int) -> Example:
        answers = tuple(Answer(who, kind, *answer(logits[at])) for who, kind, logits in said)
        return Example(picture_of(items[at].pixels), archive.keys[rows[at]], truth(items[at]), answers)

    rest = range(ANY, len(items))
    far = sorted(rest, key=lambda at: -distance(teachers, students, at))[:FAR] if teachers and students else []
    return Examples(tuple(example(at) for at in range(min(ANY, len(items)))), tuple(map(example, far)), tuple(notes))


def ask(groups: Sequence[Group], pixels: torch.Tensor, num_classes: int) -> tuple[dict[str, Logits], list[str]]:
    """The logits of one student of each group, by name, and who could not be asked."""
    found, notes = {}, []
    for group in groups:
        try:
            student = open_weights(group.runs[0].folder / STUDENT)
        except RedistillError as error:
            notes.append(f"{group.name} was not asked: {error}")
            continue
        if student.num_classes != num_classes:
            notes.append(f"{group.name} was not asked: it knows {student.num_classes} classes, not {num_classes}")
            continue
        with torch.no_grad():
            found[group.name] = student.module.eval()(student.normalise()(pixels)).float().numpy()
    return found, notes


def distance(teachers: Mapping[str, Logits], students: Mapping[str, Logits], at: int) -> float:
    """Mean KL from the teachers' mean logits to the students, on one view."""
    teacher = log_softmax(np.mean([logits[at] for logits in teachers.values()], axis=0))
    apart = [np.exp(teacher) @ (teacher - log_softmax(logits[at])) for logits in students.values()]
    return float(np.mean(apart))


def log_softmax(logits: Logits) -> Logits:
    shifted = logits - logits.max()
    found: Logits = shifted - np.log(np.exp(shifted).sum())
    return found


def answer(logits: Logits) -> tuple[int, float]:
    """The class and its probability."""
    return int(logits.argmax()), float(np.exp(log_softmax(logits).max()))


def truth(item: RenderedView | MixedView) -> tuple[tuple[int, float], ...]:
    if isinstance(item, MixedView) and item.partner != item.row:
        share = float(item.weight)
        return (item.label, share), (item.partner_label, 1 - share)
    return ((item.label, 1.0),)


def picture_of(pixels: torch.Tensor) -> str:
    """A PNG inside the page."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.thumbnail((PICTURE, PICTURE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# -- the section ------------------------------------------------------------------------------------------------------


def views(examples: Examples | None, names: Sequence[str] | None) -> str:
    """Pictures with everybody's answers."""
    title = "What they say"
    if examples is None:
        return section(title, missing("Views with everybody's answers need --archive and --data."))
    notes = "".join(missing(note) for note in examples.notes)
    far = "<h3>Where students are furthest from their teacher</h3>" + cards(examples.far, names) if examples.far else ""
    lead = f"View {VIEW} of images drawn at random, as teacher and students saw it; one student of each group is asked."
    return section(title, f"{cards(examples.any, names)}{far}{notes}", lead)


def cards(examples: Sequence[Example], names: Sequence[str] | None) -> str:
    return f'<div class="views">{"".join(card(example, names) for example in examples)}</div>'


def card(example: Example, names: Sequence[str] | None) -> str:
    def named(k: int) -> str:
        return "no label" if k < 0 else text(k if names is None else names[k])

    known = [k for k, _ in example.truth if k >= 0]
    parts = [named(k) if share == 1 else f"{share:.0%} {named(k)}" for k, share in example.truth]
    lines = []
    for said in example.answers:
        mark = "" if not known else "✓" if said.answer in known else "✗"
        kind = "wrong" if mark == "✗" else "right"
        lines.append(
            f'<li><span class="who {said.kind}">{text(said.who)}</span>'
            f'<span class="{kind}">{mark} {named(said.answer)}</span>'
            f'<span class="sure">{100 * said.confidence:.0f}%</span>'
            f'<span class="bar {said.kind}" style="width:{100 * said.confidence:.0f}%"></span></li>'
        )
    picture = f'<img src="{example.picture}" alt="{text(example.key)}" title="{text(example.key)}">'
    return f'<figure class="view">{picture}<h4>{" + ".join(parts)}</h4><ul>{"".join(lines)}</ul></figure>'
