"""A first look at what the teacher says: checks it, fits the codecs, and measures how fast and how large it all is.

The pilot is spread evenly over all views and rows and depends on the specification alone, so every run that starts the
same archive fits the same codecs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import numpy as np
import torch
from redistill_cache.codecs import CodecOptions, NotFinite, explain_codec
from redistill_cache.codecs.catalogue import Choice
from redistill_cache.errors import RedistillError, Refused
from torch import Tensor

from redistill.caching.plan import Plan
from redistill.interrupts import StopRequest
from redistill.loading import batch_loader
from redistill.signals import LOGITS
from redistill.specs import first_line
from redistill.teachers import TeacherCheck, check_teacher
from redistill.views.dataset import MixedView, RenderedView

__all__ = ["Forward", "Pilot", "check_first_batch", "fit_codecs", "pixels_of", "refuse_row", "run_pilot"]


# -- forward ----------------------------------------------------------------------------------------------------------
#
# Views through the teacher: rendered by worker processes, batch after batch, in order.

Tag = TypeVar("Tag")


def pixels_of(items: list[RenderedView | MixedView]) -> Tensor:
    """uint8 [B, 3, size, size]"""
    return torch.stack([item.pixels for item in items])


class Forward:
    """The teacher and the processes that render for it: started once, for the first look as for the last block.

    Batches are (tag, indices of the dataset); they are read a few ahead, and their tags come back with the results.
    """

    def __init__(self, plan: Plan, stop: StopRequest) -> None:
        self.plan, self.dataset, self.stop = plan, plan.dataset, stop
        self._upcoming = Upcoming()
        pin = plan.teacher.device.type == "cuda"
        self._batches = batch_loader(
            self.dataset, self._upcoming, workers=plan.workers, collate=pixels_of, pin=pin, keep=plan.workers > 0
        )

    def __enter__(self) -> Forward:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._batches.close()

    def indices(self, view: int, rows: Iterable[int]) -> list[int]:
        """Where these rows of a view are in the dataset."""
        return [self.dataset.index(view, row) for row in rows]

    def rendered(self, batches: Iterable[tuple[Tag, Sequence[int]]]) -> Iterator[tuple[Tag, Tensor]]:
        """(tag, pixels) of every batch, until somebody asks to stop."""
        tags: deque[Tag] = deque()

        def upcoming() -> Iterator[Sequence[int]]:
            for tag, indices in batches:
                tags.append(tag)
                yield indices

        self._upcoming.batches = upcoming()
        for pixels in self._batches:
            self.stop.raise_if_set()
            yield tags.popleft(), pixels

    def answers(self, batches: Iterable[tuple[Tag, Sequence[int]]]) -> Iterator[tuple[Tag, Tensor, dict[str, Tensor]]]:
        """(tag, pixels, what the teacher says of them, on its device)."""
        for tag, pixels in self.rendered(batches):
            yield tag, pixels, self.plan.teacher(pixels)


class Upcoming:
    """What a loader that is kept reads next: every iteration of it has batches of its own."""

    def __init__(self) -> None:
        self.batches: Iterator[Sequence[int]] = iter(())

    def __iter__(self) -> Iterator[Sequence[int]]:
        return self.batches


# -- pilot ------------------------------------------------------------------------------------------------------------

ROWS_PER_CLASS = 8
PILOT_ROWS = (512, 16384)
# Codecs are weighed by the last rows of a pilot, so these are spread as evenly as all.
SPREAD = 8
CHECKED_IMAGES = 32
# The axes of the head may take fewer bytes than those of the logits when classes are this many times the features;
# where both are tried and weighed, it is worth a try much earlier.
HEAD_PAYS = {True: 1, False: 4}


@dataclass(frozen=True)
class Pilot:
    """Rows of every signal, and the pace at which they came."""

    rows: dict[str, np.ndarray]
    images_per_second: float
    labelled: int
    right: int
    """Labelled rows of which the teacher's first guess is the label."""

    def __len__(self) -> int:
        return len(self.rows[LOGITS])


def pilot_places(plan: Plan) -> np.ndarray:
    """Indices of the dataset, evenly spread over the rows of all views; so is every eighth of them."""
    everything = plan.spec.num_samples * plan.spec.num_views
    low, high = PILOT_ROWS
    count = min(everything, max(low, min(ROWS_PER_CLASS * plan.spec.num_classes, high)))
    places = np.arange(count) * everything // count
    return np.concatenate([places[start::SPREAD] for start in range(SPREAD)])


def check_first_batch(forward: Forward) -> TeacherCheck:
    """Refuse a teacher that cannot take these views or whose answers are not worth storing."""
    plan = forward.plan
    count = min(CHECKED_IMAGES, plan.options.batch_size, plan.spec.num_samples)
    [(_, pixels)] = forward.rendered([(None, forward.indices(0, range(count)))])
    pixels = pixels.repeat(-(-4 // count), 1, 1, 1)  # a check needs neighbours to compare with
    try:
        return check_teacher(plan.teacher, pixels)
    except RedistillError:
        raise
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:  # from inside the network
        size, wanted = plan.recipe.size, plan.teacher.model.input_size
        hint = f"--size {wanted}" if wanted not in (None, size) else "another --size or --recipe"
        raise Refused(
            f"the teacher {plan.options.teacher!r} cannot take views of {size} px: {first_line(error)}; use {hint}"
        ) from error


def run_pilot(forward: Forward) -> Pilot:
    """Ask the teacher about the pilot's views."""
    plan = forward.plan
    places, size = pilot_places(plan), plan.options.batch_size

    def batches() -> Iterator[tuple[np.ndarray, list[int]]]:
        for start in range(0, len(places), size):
            some = places[start : start + size]
            yield some, some.tolist()

    found: dict[str, list[Tensor]] = {}
    labels, start = [], time.perf_counter()
    for some, _, said in forward.answers(batches()):
        for name, answers in said.items():
            found.setdefault(name, []).append(answers.cpu())
        labels.append(plan.index.labels[some % plan.spec.num_samples])
    seconds = time.perf_counter() - start
    rows = {name: torch.cat(parts).numpy() for name, parts in found.items()}
    truth = np.concatenate(labels)
    right = (rows[LOGITS].argmax(1) == truth) & (truth >= 0)
    return Pilot(rows, len(places) / seconds, int((truth >= 0).sum()), int(right.sum()))


def fit_codecs(plan: Plan, pilot: Pilot) -> dict[str, Choice]:
    """A codec for every signal, why it was chosen, and what it made of some of the rows."""
    return {signal: fit_codec(plan, signal, rows) for signal, rows in pilot.rows.items()}


def fit_codec(plan: Plan, signal: str, rows: np.ndarray) -> Choice:
    options, logits = plan.options, signal == LOGITS
    head = plan.teacher.head() if logits else None
    if head is not None and head.weight.shape[1] * HEAD_PAYS[options.codec == "auto"] > rows.shape[1]:
        head = None
    settings = CodecOptions(
        fidelity=options.fidelity if logits else options.feature_fidelity,
        metric="kl" if logits else "relative",
        keep_shift=logits and options.keep_shift,
        head=None if head is None else (head.weight.numpy(), head.bias.numpy()),
    )
    name = options.codec if logits or options.codec != "compander" else "linear"
    try:
        return explain_codec(name, rows, settings)
    except NotFinite as error:
        place = int(pilot_places(plan)[error.rows[0]])
        raise refuse_row(plan, signal, *divmod(place, plan.spec.num_samples)) from error


def refuse_row(plan: Plan, signal: str, view: int, row: int) -> Refused:
    """The error of a row that is no numbers."""
    advice = "try --no-amp" if plan.teacher.amp is not None else "are its weights and normalisation right?"
    return Refused(
        f"the teacher's {signal} hold NaN or infinity for view {view} of row {row} ({plan.index.keys[row]!r}); such "
        f"rows are never stored; {advice}"
    )
