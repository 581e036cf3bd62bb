"""Stage 1 from beginning to end: `cache_teacher(options)`.

    plan -> teacher checked, pilot, codecs -> archive -> canaries -> blocks, the first of them read back -> seal

What is there already is not done again, so the same call continues an archive that was interrupted anywhere.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from redistill_cache import Archive, ArchiveWriter, open_archive
from redistill_cache.codecs import kl_rows
from redistill_cache.codecs.stats import relative_error
from redistill_cache.errors import Refused
from redistill_cache.inspect import describe
from redistill_cache.layout import Block
from redistill_cache.wording import human_bytes
from torch import Tensor

from redistill.caching.encoder import BlockEncoder, WrittenBlocks
from redistill.caching.estimate import Estimate, estimate, refuse_small_disk
from redistill.caching.open_archive import (
    OpenedArchive,
    declare,
    is_declared,
    is_ready,
    is_there,
    open_existing,
    refuse_place,
    write_canaries,
    write_parameters,
)
from redistill.caching.options import CacheOptions
from redistill.caching.pilot import Forward, check_first_batch, fit_codecs, pixels_of, run_pilot
from redistill.caching.plan import Plan, make_plan
from redistill.interrupts import StopRequest, stop_on_signals
from redistill.progress import NoProgress, Progress
from redistill.ranks import Rank
from redistill.signals import LOGITS
from redistill.teachers import TeacherCheck
from redistill.views import ArchiveViews, ViewDataset, join_archive

__all__ = [
    "CacheResult",
    "CacheRun",
    "SelfTest",
    "cache_teacher",
    "estimate_cache",
    "leave_note",
    "result",
    "seal",
    "warn_of_chance",
]


# -- selftest ---------------------------------------------------------------------------------------------------------
#
# Read the first block back before the long run goes on: the same pixels, and what the teacher said of them.

# A GPU may pick other kernels the second time; what it says then differs by rounding, not by this much.
REPEATED = {"cpu": 1e-6, "cuda": 1e-3, "mps": 1e-3}


class SelfTest:
    """Keeps the first batch it is shown. Once its block is committed, it is rendered again from the archive alone, and
    held against what workers made of it, and what is stored against what the teacher says."""

    def __init__(self, plan: Plan, writer: ArchiveWriter) -> None:
        self._plan, self._writer = plan, writer
        self._first: tuple[int, range, Tensor] | None = None
        self._passed = False

    @property
    def due(self) -> bool:
        return self._first is not None and not self._passed

    def keep(self, block: Block, rows: range, pixels: Tensor) -> None:
        if self._first is None:
            self._first = block.view, rows, pixels.clone()

    def run(self) -> None:
        assert self._first is not None
        view, rows, rendered = self._first
        archive = self._writer.read_back()
        pixels = replayed(self._plan, archive, view, rows)
        differing = int((pixels != rendered).flatten(1).any(1).sum())
        if differing:
            raise Refused(
                f"self-test: {differing} of {len(rows)} views come out differently from the archive than they were "
                "drawn; do the images change while they are read?"
            )
        name = self._plan.teacher_name
        for signal, said in self._plan.teacher(pixels).items():
            stored = archive.features(view, np.asarray(rows), layer=signal, teacher=name)
            lost = largest_error(signal, said.cpu().numpy(), stored)
            bound = archive.codec(name, signal).config().get("fidelity", 0.0) + REPEATED[self._plan.teacher.device.type]
            if lost > bound:
                raise Refused(
                    f"self-test: stored {signal} are {lost:.3g} away from what the teacher says now, {bound:.3g} is "
                    "the bound; does the teacher give the same answer twice?"
                )
        self._passed = True


def replayed(plan: Plan, archive: Archive, view: int, rows: range) -> Tensor:
    """These views as a student will see them."""
    dataset = ViewDataset(plan.source, ArchiveViews(archive, join_archive(plan.index, archive)))
    return pixels_of(dataset.__getitems__([dataset.index(view, row) for row in rows]))


def largest_error(signal: str, exact: np.ndarray, stored: np.ndarray) -> float:
    """In the measure that the fidelity of the signal bounds."""
    if signal != LOGITS:
        return float(np.max(relative_error(exact, stored)))
    return max(float(kl_rows(exact, stored, temperature).max()) for temperature in (1.0, 4.0))


# -- outcome ----------------------------------------------------------------------------------------------------------
#
# The end of stage 1: seal, leave a note, say what is there.

# Fewer right answers than this many times chance, and something is wrong with weights, preprocessing or class order;
# with few classes, where that is all of them, fewer than so much of the way up from chance.
TIMES_CHANCE, WAY_UP = 2.0, 0.25
ENOUGH_LABELS = 256


@dataclass
class CacheRun:
    """What one process did, as far as it has come."""

    began: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))
    start: float = field(default_factory=time.perf_counter)
    check: TeacherCheck | None = None
    written: WrittenBlocks = field(default_factory=WrittenBlocks)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start


@dataclass(frozen=True)
class CacheResult:
    """What is there when stage 1 ends. `id` is None where another teacher's blocks, or another rank's, are missing."""

    path: str
    id: str | None
    samples: int
    views: int
    images: int
    """Views whose answers this process has committed."""
    seconds: float
    images_per_second: float | None
    total_bytes: int
    bytes_per_view: float
    teacher: str
    teacher_top1: float | None
    """Over the labelled views of this process."""
    floor: float | None
    """Largest difference of logits between the same views in two batch compositions."""
    missing: tuple[str, ...] = ()
    """Parts that still have to be written before the archive can be sealed."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def warn_of_chance(plan: Plan, right: int, labelled: int, progress: Progress) -> None:
    """Train mode, wrong preprocessing, and classes in another order all look like this."""
    chance = 1 / plan.spec.num_classes
    enough = min(TIMES_CHANCE * chance, chance + WAY_UP * (1 - chance))
    if labelled >= ENOUGH_LABELS and right < enough * labelled:
        progress.warning(
            f"the teacher is right on {right / labelled:.1%} of {labelled:,} views, chance is {chance:.1%}: are its "
            "weights, its normalisation and the order of the classes right?"
        )


def leave_note(there: OpenedArchive, run: CacheRun) -> None:
    """How it went, for whoever wonders; a run that commits nothing leaves none. No part of the archive's identity."""
    plan, written, check = there.plan, run.written, run.check
    if not written.blocks:
        return
    note = {
        "began": run.began.isoformat(timespec="seconds"),
        "command": plan.options.command,
        "device": device_name(plan.teacher.device),
        "environment": dict(plan.spec.environment),
        "rank": plan.rank.rank,
        "processes": plan.rank.world,
        "seconds": round(run.seconds, 3),
        "images_per_second": round(written.rows / run.seconds, 3),
        "blocks": written.blocks,
        "images": written.rows,
        "bytes": written.bytes,
        "labelled": written.labelled,
        "right": written.right,
        "teacher_top1": written.top1,
        "floor": None if check is None else check.floor,
        "relative_floor": None if check is None else check.relative_floor,
    }
    with contextlib.suppress(Refused):  # a disk that is full must not hide why the run ends
        there.writer.note(f"{plan.teacher_name}-{run.began:%Y%m%dt%H%M%S}-{plan.rank.rank}", note)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def seal(there: OpenedArchive) -> tuple[str | None, tuple[str, ...]]:
    """The archive's id, or what is missing for one. The first rank seals."""
    writer = there.writer
    if not there.plan.rank.first:
        return None, ()
    missing = tuple(part for part in writer.parts() if writer.missing(part))
    return (None if missing else writer.seal()), missing


def result(there: OpenedArchive, run: CacheRun, identity: str | None, missing: tuple[str, ...]) -> CacheResult:
    """All of it in a few numbers."""
    plan, written, seconds = there.plan, run.written, run.seconds
    found = describe(there.writer.read_back() if identity is None else open_archive(there.writer.path))
    return CacheResult(
        path=str(plan.options.out),
        id=identity,
        samples=plan.spec.num_samples,
        views=plan.spec.num_views,
        images=written.rows,
        seconds=seconds,
        images_per_second=written.rows / seconds if written.rows else None,
        total_bytes=found["total_bytes"],
        bytes_per_view=sum(signal["bytes_per_view"] for signal in found["teachers"][plan.teacher_name].values()),
        teacher=plan.teacher_name,
        teacher_top1=written.top1,
        floor=None if run.check is None else run.check.floor,
        missing=missing,
    )


# -- run --------------------------------------------------------------------------------------------------------------


def estimate_cache(options: CacheOptions, progress: Progress | None = None) -> Estimate:
    """What `cache_teacher` would cost. Runs the teacher on a pilot, writes nothing."""
    progress = progress or NoProgress()
    with stop_on_signals() as stop:
        plan = make_plan(options, Rank.from_environment(), partial(progress.advance, "index"))
        with Forward(plan, stop) as forward:
            check_first_batch(forward)
            pilot = run_pilot(forward)
        return estimate(plan, pilot, fit_codecs(plan, pilot))


def cache_teacher(options: CacheOptions, progress: Progress | None = None) -> CacheResult:
    """Run the teacher over all views that are missing in the archive, and seal it when nothing is."""
    run, rank = CacheRun(), Rank.from_environment()
    progress = progress if progress is not None and rank.first else NoProgress()
    with stop_on_signals() as stop:
        plan = planned(options, rank, progress, stop)
        there = open_existing(plan) if is_there(options) else None
        with Forward(plan if there is None else there.plan, stop) as forward:
            if there is None or not there.codecs:
                there = declare_teacher(forward, there, run, progress)
            write_canaries(forward, there.writer)
            try:
                write_teacher(forward, there, run, progress)
            finally:
                leave_note(there, run)
    identity, missing = seal(there)
    return result(there, run, identity, missing)


def planned(options: CacheOptions, rank: Rank, progress: Progress, stop: StopRequest) -> Plan:
    """The plan. Other ranks than the first one make theirs when that one has created the archive."""

    def index(done: int, total: int) -> None:
        stop.raise_if_set()
        progress.advance("index", done, total)

    if not rank.first:
        rank.wait_until(lambda: is_ready(options), stop)
    elif not is_there(options):
        refuse_place(options)
    plan = make_plan(options, rank, index)
    if not rank.first:
        rank.wait_until(lambda: is_declared(plan), stop)
    return plan


def declare_teacher(forward: Forward, there: OpenedArchive | None, run: CacheRun, progress: Progress) -> OpenedArchive:
    """A teacher that the archive does not have: looked at, its codecs fitted, its costs weighed, and declared."""
    plan = forward.plan
    run.check = check_first_batch(forward)
    pilot = run_pilot(forward)
    warn_of_chance(plan, pilot.right, pilot.labelled, progress)
    choices = fit_codecs(plan, pilot)
    found = estimate(plan, pilot, choices)
    refuse_small_disk(plan.options.out, found.total_bytes if there is None else found.signal_bytes)
    for signal, choice in choices.items():
        progress.info(f"{signal}: {choice.reason}")
    progress.info(
        f"{found.samples:,} samples x {found.views} views: about {human_bytes(found.total_bytes)}, "
        f"{max(found.seconds / 60, 0.1):,.1f} minutes at {found.images_per_second:.0f} images/s"
    )
    forward.stop.raise_if_set()
    codecs = {signal: choice.codec for signal, choice in choices.items()}
    return declare(plan, None if there is None else there.writer, codecs)


def write_teacher(forward: Forward, there: OpenedArchive, run: CacheRun, progress: Progress) -> None:
    """Every missing block of the teacher. The first one is read back while the next ones are on their way."""
    plan, writer, written = there.plan, there.writer, run.written
    blocks = plan.rank.order(writer.missing(plan.part))
    if blocks and run.check is None:
        run.check = check_first_batch(forward)
    total, images = sum(len(block.rows) for block in blocks), 0
    test = SelfTest(plan, writer)
    with BlockEncoder(there, written) as encoder:
        for (block, rows), pixels, said in forward.answers(batches(forward, writer, blocks)):
            encoder.add(block, rows, said)
            images += len(rows)
            # Of the other processes we know that they do their share.
            progress.advance(
                "teacher",
                min(images * plan.rank.world, total),
                total,
                blocks=written.blocks,
                written=human_bytes(written.bytes),
            )
            test.keep(block, rows, pixels)
            if test.due and written.blocks:
                test.run()
    if test.due:
        test.run()
    for view in sorted({block.view for block in writer.missing("views")}):
        write_parameters(plan, writer, view)


def batches(
    forward: Forward, writer: ArchiveWriter, blocks: Sequence[Block]
) -> Iterator[tuple[tuple[Block, range], list[int]]]:
    """Batches are a function of the block, so that its bytes are. Blocks that others have committed are left out."""
    size = forward.plan.options.batch_size
    for block in blocks:
        if writer.is_committed(block):
            continue
        for start in range(block.start, block.stop, size):
            rows = range(start, min(start + size, block.stop))
            yield (block, rows), forward.indices(block.view, rows)
