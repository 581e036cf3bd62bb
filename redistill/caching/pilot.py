"""Run the teacher on rendered views; first on a pilot, which fits the codecs and measures the throughput.

The pilot is spread evenly over all views and rows and depends only on the archive's specification, so every run that
starts the same archive fits the same codecs.
"""

from __future__ import annotations

import time
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
from redistill.loading import BatchLoader
from redistill.signals import LOGITS
from redistill.specs import first_line
from redistill.teachers import TeacherCheck, check_teacher
from redistill.views.dataset import MixedView, RenderedView

__all__ = ["Pilot", "TeacherRunner", "check_first_batch", "fit_codecs", "not_finite_error", "run_pilot", "stack_pixels"]

ROWS_PER_CLASS = 8
PILOT_ROWS = (512, 16384)  # at least, at most
# Codecs are compared on the last rows of the pilot, so any run of consecutive rows must be spread over all views too.
STRIDE = 8
CHECKED_IMAGES = 32
# A basis from the head's weights may be smaller than one fitted to the logits when there are this many times more
# classes than features. `auto` tries both and compares their sizes, so for it a much lower ratio is worth a trial.
MIN_CLASSES_PER_FEATURE, MIN_CLASSES_PER_FEATURE_AUTO = 4, 1

Tag = TypeVar("Tag")


class TeacherRunner:
    """Renders batches of views in worker processes and runs the teacher on them.

    A batch is (tag, dataset indices); the tag comes back with the result. Workers start once, for all calls.
    """

    def __init__(self, plan: Plan, stop: StopRequest) -> None:
        self.plan, self.stop, self._dataset = plan, stop, plan.dataset
        self._loader = BatchLoader(
            self._dataset,
            workers=plan.workers,
            collate=stack_pixels,
            pin=plan.teacher.device.type == "cuda",
        )

    def __enter__(self) -> TeacherRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loader.__exit__(kind, error, trace)

    def indices(self, view: int, rows: Iterable[int]) -> list[int]:
        """Dataset indices of these rows of a view."""
        return [self._dataset.index(view, row) for row in rows]

    def render(self, batches: Iterable[tuple[Tag, Sequence[int]]]) -> Iterator[tuple[Tag, Tensor]]:
        """(tag, pixels) of every batch. Raises Interrupted when a stop is requested."""
        for tag, pixels in self._loader.load(batches):
            self.stop.raise_if_set()
            yield tag, pixels

    def run(self, batches: Iterable[tuple[Tag, Sequence[int]]]) -> Iterator[tuple[Tag, Tensor, dict[str, Tensor]]]:
        """(tag, pixels, the teacher's signals on its device) of every batch."""
        for tag, pixels in self.render(batches):
            yield tag, pixels, self.plan.teacher(pixels)


def stack_pixels(items: list[RenderedView | MixedView]) -> Tensor:
    """uint8 [B, 3, size, size]"""
    return torch.stack([item.pixels for item in items])


def check_first_batch(runner: TeacherRunner) -> TeacherCheck:
    """Refuse a teacher that fails on these views, or whose outputs must not be stored."""
    plan = runner.plan
    count = min(CHECKED_IMAGES, plan.options.batch_size, plan.spec.num_samples)
    [(_, pixels)] = runner.render([(None, runner.indices(0, range(count)))])
    pixels = pixels.repeat(-(-4 // count), 1, 1, 1)  # the check needs at least four images
    try:
        return check_teacher(plan.teacher, pixels)
    except RedistillError:
        raise
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:  # from inside the network
        size, input_size = plan.recipe.size, plan.teacher.model.input_size
        hint = f"--size {input_size}" if input_size not in (None, size) else "another --size or --recipe"
        raise Refused(
            f"the teacher {plan.teacher.model.spec!r} fails on views of {size} px: {first_line(error)}; use {hint}"
        ) from error


@dataclass(frozen=True)
class Pilot:
    """The teacher's signals for the pilot's views, and how fast they were computed."""

    rows: dict[str, np.ndarray]
    """Of the signals that are stored."""
    images_per_second: float
    labelled: int
    correct: int
    """Labelled rows whose largest logit is that of the label."""

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))


def run_pilot(runner: TeacherRunner) -> Pilot:
    plan, batch_size = runner.plan, runner.plan.options.batch_size
    indices = pilot_indices(plan)
    batches = ((part, part.tolist()) for part in np.split(indices, range(batch_size, len(indices), batch_size)))
    outputs: dict[str, list[Tensor]] = {name: [] for name in (LOGITS, *plan.part.signals)}
    label_parts, start = [], time.perf_counter()
    for batch, _, signals in runner.run(batches):
        for name, parts in outputs.items():
            parts.append(signals[name].cpu())
        label_parts.append(plan.index.labels[batch % plan.spec.num_samples])
    seconds = time.perf_counter() - start
    stacked = {name: torch.cat(parts).numpy() for name, parts in outputs.items()}
    labels = np.concatenate(label_parts)
    correct = (stacked[LOGITS].argmax(1) == labels) & (labels >= 0)
    rows = {name: stacked[name] for name in plan.part.signals}
    return Pilot(rows, len(indices) / seconds, int((labels >= 0).sum()), int(correct.sum()))


def pilot_indices(plan: Plan) -> np.ndarray:
    """Dataset indices, evenly spread over the rows of all views; so is any run of consecutive ones."""
    total = plan.spec.num_samples * plan.spec.num_views
    low, high = PILOT_ROWS
    count = min(total, max(low, min(ROWS_PER_CLASS * plan.spec.num_classes, high)))
    indices = np.arange(count) * total // count
    return np.concatenate([indices[start::STRIDE] for start in range(STRIDE)])


def fit_codecs(plan: Plan, pilot: Pilot) -> dict[str, Choice]:
    """The codec of every signal, why it was chosen, and its result on some of the rows."""
    return {signal: choose_codec(plan, signal, rows) for signal, rows in pilot.rows.items()}


def choose_codec(plan: Plan, signal: str, rows: np.ndarray) -> Choice:
    options, is_logits = plan.options, signal == LOGITS
    head = plan.teacher.head() if is_logits else None
    ratio = MIN_CLASSES_PER_FEATURE_AUTO if options.codec == "auto" else MIN_CLASSES_PER_FEATURE
    if head is not None and head.weight.shape[1] * ratio > rows.shape[1]:
        head = None
    settings = CodecOptions(
        fidelity=options.fidelity if is_logits else options.feature_fidelity,
        metric="kl" if is_logits else "centred",
        keep_shift=is_logits and options.keep_shift,
        head=None if head is None else (head.weight.numpy(), head.bias.numpy()),
    )
    name = options.codec if is_logits or options.codec != "compander" else "linear"
    try:
        return explain_codec(name, rows, settings)
    except NotFinite as error:
        index = int(pilot_indices(plan)[error.rows[0]])
        raise not_finite_error(plan, signal, *divmod(index, plan.spec.num_samples)) from error


def not_finite_error(plan: Plan, signal: str, view: int, row: int) -> Refused:
    advice = "try --no-amp" if plan.teacher.amp is not None else "check its weights and normalisation"
    return Refused(
        f"the teacher's {signal} contain NaN or infinity for view {view} of row {row} ({plan.index.keys[row]!r}); such "
        f"rows cannot be stored; {advice}"
    )
