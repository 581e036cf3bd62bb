"""A first look at what the teacher says: checks it, fits the codecs, and measures how fast and how large it all is.

The pilot is spread evenly over all views and rows and depends on the specification alone, so every run that starts the
same archive fits the same codecs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from redistill_cache.codecs import Codec, NotFinite, Options, explain_codec
from redistill_cache.errors import RedistillError, Refused
from torch import Tensor

from redistill.caching.forward import pixels_of, rendered
from redistill.caching.plan import Plan
from redistill.signals import LOGITS
from redistill.teacher_check import TeacherCheck, check_teacher
from redistill.wording import first_line

__all__ = ["Pilot", "check_first_batch", "fit_codecs", "run_pilot"]

ROWS_PER_CLASS = 8
PILOT_ROWS = (512, 16384)
CHECKED_IMAGES = 32
# The axes of the head may take fewer bytes than those of the logits when classes are this many times the features;
# where both are tried and weighed, it is worth a try much earlier.
HEAD_PAYS = {True: 1, False: 4}


@dataclass(frozen=True)
class Pilot:
    """Rows of every signal, and the pace at which they came."""

    rows: dict[str, np.ndarray]
    images_per_second: float
    top1: float | None
    """Of the rows that have a label."""

    def __len__(self) -> int:
        return len(self.rows[LOGITS])


def pilot_places(plan: Plan) -> np.ndarray:
    """Indices of the dataset, evenly spread over the rows of all views."""
    everything = plan.spec.num_samples * plan.spec.num_views
    low, high = PILOT_ROWS
    count = min(everything, max(low, min(ROWS_PER_CLASS * plan.spec.num_classes, high)))
    return np.arange(count) * everything // count


def check_first_batch(plan: Plan) -> TeacherCheck:
    """Refuse a teacher that cannot take these views or whose answers are not worth storing."""
    dataset = plan.dataset
    count = min(CHECKED_IMAGES, plan.options.batch_size, plan.spec.num_samples)
    pixels = pixels_of(dataset.__getitems__([dataset.index(0, row) for row in range(count)]))
    pixels = pixels.repeat(-(-4 // count), 1, 1, 1)  # a check needs neighbours to compare with
    try:
        return check_teacher(plan.teacher, pixels)
    except RedistillError:
        raise
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:  # from inside the network
        wanted = plan.teacher.model.input_size
        hint = f"--size {wanted}" if wanted not in (None, dataset.size) else "another --size or --recipe"
        raise Refused(
            f"the teacher {plan.options.teacher!r} cannot take views of {dataset.size} px: {first_line(error)}; "
            f"use {hint}"
        ) from error


def run_pilot(plan: Plan) -> Pilot:
    """Ask the teacher about the pilot's views."""
    places, size = pilot_places(plan), plan.options.batch_size

    def batches() -> Iterator[tuple[np.ndarray, list[int]]]:
        for start in range(0, len(places), size):
            some = places[start : start + size]
            yield some, some.tolist()

    found: dict[str, list[Tensor]] = {}
    labels, seen, begin, start = [], 0, time.perf_counter(), 0.0
    for some, pixels in rendered(plan, plan.dataset, batches()):
        for name, rows in plan.teacher(pixels).items():
            found.setdefault(name, []).append(rows.cpu())
        labels.append(plan.index.labels[some % plan.spec.num_samples])
        seen += len(some) if start else 0
        start = start or time.perf_counter()  # the first batch waits for workers to start and kernels to be chosen
    end = time.perf_counter()
    pace = seen / (end - start) if seen else len(places) / (end - begin)
    joined = {name: torch.cat(rows).numpy() for name, rows in found.items()}
    return Pilot(joined, pace, accuracy(joined[LOGITS], np.concatenate(labels)))


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float | None:
    here = labels >= 0
    return float((logits[here].argmax(1) == labels[here]).mean()) if here.any() else None


def fit_codecs(plan: Plan, pilot: Pilot) -> tuple[dict[str, Codec], dict[str, str]]:
    """A codec for every signal, and why it was chosen."""
    codecs, reasons = {}, {}
    for signal, rows in pilot.rows.items():
        logits = signal == LOGITS
        head = plan.teacher.head() if logits else None
        if head is not None and head.weight.shape[1] * HEAD_PAYS[plan.options.codec == "auto"] > rows.shape[1]:
            head = None
        options = Options(
            fidelity=plan.options.fidelity if logits else plan.options.feature_fidelity,
            metric="kl" if logits else "relative",
            keep_shift=logits and plan.options.keep_shift,
            head=None if head is None else (head.weight.numpy(), head.bias.numpy()),
        )
        name = plan.options.codec if logits or plan.options.codec != "compander" else "linear"
        try:
            choice = explain_codec(name, rows, options)
        except NotFinite as error:
            raise not_finite(plan, signal, error) from error
        codecs[signal], reasons[signal] = choice.codec, choice.reason
    return codecs, reasons


def not_finite(plan: Plan, signal: str, error: NotFinite) -> Refused:
    """The same error, naming the views."""
    place = int(pilot_places(plan)[error.rows[0]])
    return refuse_row(plan, signal, *divmod(place, plan.spec.num_samples))


def refuse_row(plan: Plan, signal: str, view: int, row: int) -> Refused:
    key = plan.index.keys[row]
    advice = "try --no-amp" if plan.teacher.amp is not None else "are its weights and normalisation right?"
    return Refused(
        f"the teacher's {signal} hold NaN or infinity for view {view} of row {row} ({key!r}); such rows are never "
        f"stored; {advice}"
    )
