"""Run the teacher on rendered views; first on a pilot, which fits the codecs and measures the throughput.

The pilot is spread evenly over all views and rows and depends only on the archive's specification, so every run that
starts the same archive fits the same codecs.
"""

from __future__ import annotations

import itertools
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
from redistill_cache.layout import part_blocks
from torch import Tensor

from redistill.caching.plan import Plan
from redistill.interrupts import StopRequest
from redistill.loading import BatchLoader
from redistill.signals import LOGITS
from redistill.sources.stream import StreamSource
from redistill.specs import first_line
from redistill.teachers import TeacherCheck, check_teacher
from redistill.views import ViewDataset
from redistill.views.dataset import MixedView, RenderedView

__all__ = [
    "Computed",
    "Pilot",
    "TeacherRunner",
    "batches_of",
    "check_first_batch",
    "fit_codecs",
    "not_finite_error",
    "run_pilot",
    "stack_pixels",
]

ROWS_PER_CLASS = 8
PILOT_ROWS = (512, 16384)  # at least, at most
# Where features are stored: a basis that is fitted to fewer than twice as many rows as values misses some directions.
FEATURE_PILOT_ROWS = 4096
# The signals of a pilot of all views are kept up to this many values, on the teacher's device.
MAX_KEPT_VALUES = 1 << 26
# Codecs are compared on the last rows of the pilot, so any run of consecutive rows must be spread over all views too.
STRIDE = 8
# A check of the first batch, which is not kept, needs few images, and at least so many.
CHECKED_IMAGES, LEAST_CHECKED = 32, 4
# A pilot of at least one in so many images reads whole tars.
MOSTLY = 4
# A basis from the head's weights may be smaller than one fitted to the logits when there are this many times more
# classes than features. `auto` tries both and compares their sizes, so for it a much lower ratio is worth a trial.
MIN_CLASSES_PER_FEATURE, MIN_CLASSES_PER_FEATURE_AUTO = 4, 1

Tag = TypeVar("Tag")


@dataclass(frozen=True)
class Computed:
    """A whole batch of a block, whose signals are known before the archive exists."""

    signals: dict[str, Tensor]
    """On the teacher's device."""
    pixels: Tensor | None = None
    """Of the batch that the teacher was checked with."""


class TeacherRunner:
    """Renders batches of views in worker processes and runs the teacher on them.

    A batch is (tag, dataset indices); the tag comes back with the result. Workers start once, for all calls.
    """

    kept: dict[tuple[int, int], Computed]
    """What the check and the pilot computed of a small archive, by view and first row."""

    def __init__(self, plan: Plan, stop: StopRequest) -> None:
        self.plan, self.stop, self._dataset, self.kept = plan, stop, plan.dataset, {}
        self._loader = self._new_loader(self._dataset.by_parts())

    def _new_loader(self, dataset: ViewDataset) -> BatchLoader:
        return BatchLoader(
            dataset,
            workers=self.plan.workers,
            collate=stack_pixels,
            pin=self.plan.teacher.device.type == "cuda",
        )

    def read_whole_tars(self) -> None:
        """From now on, rows are read in order: of streamed tars, whole ones. Before, single images of any tar."""
        if isinstance(self._dataset.source, StreamSource):
            self._loader.close()
            self._loader = self._new_loader(self._dataset)

    def __enter__(self) -> TeacherRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loader.close()

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


def check_first_batch(runner: TeacherRunner, *, before_pilot: bool = False) -> TeacherCheck:
    """Refuse a teacher that fails on these views, or whose outputs must not be stored.

    The batch is the first one that this process would write. Before a pilot of all views it is kept as a part of it.
    """
    plan = runner.plan
    block = plan.share.work_order(list(part_blocks(plan.spec, plan.folder, plan.spec.num_views)))[0]
    rows = next(batches_of(block.rows, plan.batch_size))
    keep = before_pilot and pilot_is_whole(plan)
    # The speed is measured on the rest; what is checked of a compiled network is the one that was compiled.
    keep = keep and LEAST_CHECKED <= len(rows) < plan.spec.num_samples * plan.spec.num_views
    keep = keep and not plan.options.compile
    rows = rows if keep else rows[:CHECKED_IMAGES]
    [(_, pixels)] = runner.render([(None, runner.indices(block.view, rows))])
    copies = -(-LEAST_CHECKED // len(rows))
    try:
        check, signals = check_teacher(plan.teacher, pixels.repeat(copies, 1, 1, 1))
    except RedistillError:
        raise
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:  # from inside the network
        size, input_size = plan.recipe.size, plan.teacher.model.input_size
        hint = f"--size {input_size}" if input_size not in (None, size) else "another --size or --recipe"
        raise Refused(
            f"the teacher {plan.teacher.model.spec!r} fails on views of {size} px: {first_line(error)}; use {hint}"
        ) from error
    if keep:
        runner.kept[block.view, rows.start] = Computed(signals, pixels)
    return check


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
    """Of few views, the pilot is all of them: their batches are those of the blocks, and their signals are kept."""
    plan, samples = runner.plan, runner.plan.spec.num_samples
    indices, names = pilot_indices(plan), (LOGITS, *plan.part.signals)
    whole = pilot_is_whole(plan)
    if whole:
        batches = [np.array(runner.indices(view, rows)) for view, rows in block_batches(plan)]
    else:
        batches = np.split(indices, range(plan.batch_size, len(indices), plan.batch_size))
    if MOSTLY * len(indices) >= samples:
        runner.read_whole_tars()
    known = {int(runner.indices(view, [row])[0]): batch for (view, row), batch in runner.kept.items()}
    to_run = [batch for batch in batches if int(batch[0]) not in known]
    order: list[np.ndarray] = [batch for batch in batches if int(batch[0]) in known]
    outputs = {name: [known[int(batch[0])].signals[name].cpu() for batch in order] for name in names}
    values = sum(rows.numel() for batch in known.values() for rows in batch.signals.values())
    start = time.perf_counter()
    for batch, _, signals in runner.run((batch, batch.tolist()) for batch in to_run):
        order.append(batch)
        for name, parts in outputs.items():
            parts.append(signals[name].cpu())
        values += sum(rows.numel() for rows in signals.values())
        if whole and values <= MAX_KEPT_VALUES:
            view, row = divmod(int(batch[0]), samples)
            runner.kept[view, row] = Computed(signals)
    seconds = time.perf_counter() - start
    if values > MAX_KEPT_VALUES:
        runner.kept.clear()
    computed = np.concatenate(order)
    places = np.argsort(computed)[indices] if whole else slice(None)
    stacked = {name: torch.cat(parts).numpy()[places] for name, parts in outputs.items()}
    labels = plan.index.labels[indices % samples]
    correct = (stacked[LOGITS].argmax(1) == labels) & (labels >= 0)
    rows = {name: stacked[name] for name in plan.part.signals}
    speed = sum(map(len, to_run)) / seconds
    return Pilot(rows, speed, int((labels >= 0).sum()), int(correct.sum()))


def pilot_is_whole(plan: Plan) -> bool:
    """Whether the pilot is all views."""
    return len(pilot_indices(plan)) == plan.spec.num_samples * plan.spec.num_views


def block_batches(plan: Plan) -> Iterator[tuple[int, range]]:
    """(view, rows) of every batch of every block."""
    spec = plan.spec
    for view, start in itertools.product(range(spec.num_views), range(0, spec.num_samples, spec.block_rows)):
        for rows in batches_of(range(start, min(start + spec.block_rows, spec.num_samples)), plan.batch_size):
            yield view, rows


def batches_of(rows: range, batch_size: int) -> Iterator[range]:
    """The batches of a block depend on the block alone, so its bytes do too."""
    for start in range(rows.start, rows.stop, batch_size):
        yield range(start, min(start + batch_size, rows.stop))


def pilot_indices(plan: Plan) -> np.ndarray:
    """Dataset indices, evenly spread over the rows of all views; so is any run of consecutive ones."""
    total = plan.spec.num_samples * plan.spec.num_views
    low, high = PILOT_ROWS
    low = low if plan.part.signals == (LOGITS,) else FEATURE_PILOT_ROWS
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
