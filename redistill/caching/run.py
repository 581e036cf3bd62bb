"""Stage 1: `cache_teacher(options)` runs a teacher once over the views of an image set, into an archive.

    plan -> check the teacher, pilot, codecs -> create the archive -> canaries -> blocks, the first one checked -> seal

Each step skips what the archive already has, so the same call resumes a run that was interrupted at any point, and
several processes with the same call share the work (`shares.py`).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from redistill_cache import ArchiveWriter, open_archive
from redistill_cache.codecs.linear_encode import triton_kernels
from redistill_cache.errors import Refused, SpecMismatch
from redistill_cache.inspect import describe
from redistill_cache.layout import Block
from redistill_cache.rows import open_signal
from redistill_cache.wording import human_bytes

from redistill.caching.encoder import BlockEncoder, RunStats
from redistill.caching.estimate import Estimate, estimate, refuse_small_disk, teacher_spec
from redistill.caching.open_archive import (
    archive_exists,
    blocks_to_write,
    check_new_path,
    create_archive,
    is_prepared,
    missing_blocks,
    open_existing,
    teacher_is_declared,
    write_canaries,
    write_view_params,
)
from redistill.caching.options import CacheOptions
from redistill.caching.pilot import (
    Computed,
    Pilot,
    TeacherRunner,
    batches_of,
    check_first_batch,
    fit_codecs,
    run_pilot,
    stack_pixels,
)
from redistill.caching.plan import Plan, make_plan
from redistill.interrupts import StopRequest, raise_on_signals, stop_on_signals
from redistill.progress import NoProgress, Progress
from redistill.shares import Share, prepared_once
from redistill.sources.base import streamed
from redistill.sources.folder import skipped_files
from redistill.sources.stream import TarsAhead
from redistill.teachers import TeacherCheck
from redistill.views import ViewDataset, join_archive

__all__ = [
    "CacheResult",
    "cache_teacher",
    "declare_teacher",
    "estimate_cache",
    "is_near_chance",
    "teacher_batches",
    "write_teacher",
]

# The first block is computed twice and compared. On a GPU the second run may use other kernels, whose rounding differs.
REPEAT_TOLERANCE = {"cpu": 1e-6, "cuda": 1e-3, "mps": 1e-3}
# An accuracy below this multiple of chance is suspicious; with few classes, where that may exceed 1, below this
# fraction of the way from chance to 1.
MIN_TIMES_CHANCE, MIN_ABOVE_CHANCE = 2.0, 0.25
MIN_LABELLED = 256
# So is an accuracy below this share of the known one: augmentation costs a good teacher less.
MIN_OF_KNOWN = 0.5
# Declaring a teacher writes its side data, of a few megabytes.
DECLARED_WITHIN_S = 60.0


@dataclass(frozen=True)
class CacheResult:
    """The archive at the end of this process. `id` is None while blocks of this run are missing."""

    path: str
    id: str | None
    samples: int
    views: int
    images: int
    """Views whose signals this process has committed; counted once for every part that was written."""
    seconds: float
    images_per_second: float | None
    total_bytes: int
    bytes_per_view: float
    teacher: str
    signals: tuple[str, ...]
    """All signals of the teacher by now."""
    teacher_top1: float | None
    """On the labelled views of this process."""
    floor: float | None
    """Largest difference between the logits of the same views in two batch compositions."""
    missing: tuple[str, ...] = ()
    """Parts with blocks that other processes have yet to write; whichever finds none missing seals the archive."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def cache_teacher(options: CacheOptions, progress: Progress | None = None) -> CacheResult:
    """Run the teacher over all views that the archive lacks, and seal the archive when it is complete."""
    runs, share = [RunStats()], Share.of(options.share)
    progress = progress if progress is not None and share.reports else NoProgress()
    with stop_on_signals() as stop, ExitStack() as preparing:
        preparing.enter_context(
            prepared_once(options.out, lambda: is_prepared(options), progress.info, stop.raise_if_set)
        )
        if not archive_exists(options):
            if options.extend_views:
                raise Refused(f"{options.out} does not exist, so it has no views to extend; leave out --extend-views")
            check_new_path(options.out)
        with raise_on_signals():
            plan = make_plan(options, share, partial(progress.advance, "index"))
        writer: ArchiveWriter | None = None
        if archive_exists(options):
            plan, writer = open_existing(plan)
        progress.settings(plan.settings_in_effect())
        tell_left_out(plan, progress)
        for part in plan.parts:
            plan = plan.of(part)
            runs += [RunStats()] if runs[-1].blocks else []
            with TeacherRunner(plan, stop) as runner:
                writer = declared_part(runner, writer, runs[-1], progress)
                preparing.close()  # the other processes of this machine find the rest in the archive
                write_part(runner, writer, runs[-1], progress)
            needed = [name for name in writer.parts() if name == plan.folder or not name.startswith("teachers/")]
            missing = tuple(name for name in needed if missing_blocks(plan, writer, name))
            identity = None if missing else writer.seal(complete=True)
    assert writer is not None
    return cache_result(plan, writer, runs, identity, missing)


def declared_part(
    runner: TeacherRunner, writer: ArchiveWriter | None, stats: RunStats, progress: Progress
) -> ArchiveWriter:
    """The archive with the part, which is declared now if it is new."""
    plan = runner.plan
    if writer is None or not teacher_is_declared(plan):
        return declare_teacher(runner, writer, stats, progress)
    if plan.part.name not in writer.teachers:  # another process has declared it since
        _, writer = open_existing(plan)
    if not missing_blocks(plan, writer, plan.folder):
        progress.info(f"{plan.options.out} has {', '.join(plan.part.signals)} of teacher {plan.teacher_name} already")
    return writer


def write_part(runner: TeacherRunner, writer: ArchiveWriter, stats: RunStats, progress: Progress) -> None:
    """Write what is missing of the part, and of all that teachers share."""
    write_canaries(runner, writer)
    try:
        write_teacher(runner, writer, stats, progress)
    finally:
        write_provenance(runner.plan, writer, stats)


def estimate_cache(options: CacheOptions, progress: Progress | None = None) -> Estimate:
    """The cost of `cache_teacher`. Runs the teacher on a pilot, writes nothing."""
    progress = progress or NoProgress()
    with stop_on_signals() as stop:
        plan = make_plan(options, Share.of(options.share), partial(progress.advance, "index"))
        plan = plan.of(plan.parts[-1])  # what is added, if anything is
        progress.settings(plan.settings_in_effect())
        with TeacherRunner(plan, stop) as runner:
            _, pilot = checked_pilot(runner, progress)
        return estimate(plan, pilot, fit_codecs(plan, pilot))


# -- steps, in order --------------------------------------------------------------------------------------------------


def tell_left_out(plan: Plan, progress: Progress) -> None:
    """Say which images and files of the data are not in the archive."""
    skipped, excluded = skipped_files(plan.source), plan.index.excluded
    if skipped:
        progress.info(skipped)
    if excluded:
        shown = "; ".join(f"{key}: {reason}" for key, reason in excluded[:3])
        progress.info(f"excluded images: {len(excluded):,} ({shown}{'; ...' * (len(excluded) > 3)})")


def declare_teacher(
    runner: TeacherRunner, writer: ArchiveWriter | None, stats: RunStats, progress: Progress
) -> ArchiveWriter:
    """Check a new teacher, fit its codecs, estimate the cost, and add it to the archive, which is created if needed."""
    plan = runner.plan
    stats.check, pilot = checked_pilot(runner, progress)
    start = time.perf_counter()
    choices = fit_codecs(plan, pilot)
    stats.fit_seconds = time.perf_counter() - start
    cost = estimate(plan, pilot, choices)
    refuse_small_disk(plan.options.out, cost.total_bytes if writer is None else cost.signal_bytes)
    for signal, choice in choices.items():
        progress.info(f"codec of {signal}: {choice.reason}")
    progress.info(
        f"{cost.samples:,} samples x {cost.views} view{'s' * (cost.views > 1)}: about "
        f"{human_bytes(cost.signal_bytes if plan.part.adds_to else cost.total_bytes)}, "
        f"{max(cost.seconds / 60, 0.1):,.1f} minutes at {cost.images_per_second:.0f} images/s"
    )
    runner.stop.raise_if_set()
    codecs = {signal: choice.codec for signal, choice in choices.items()}
    if writer is None:
        _, writer = create_archive(plan)
    if writer.spec.block_rows != plan.spec.block_rows:  # created by another process
        runner.kept.clear()
    try:
        writer.add_teacher(teacher_spec(plan, codecs), {name: codec.side() for name, codec in codecs.items()})
    except SpecMismatch:  # a process on another kind of machine has declared the teacher since; its codecs count
        if not declared_soon(plan, runner.stop):
            raise
        _, writer = open_existing(plan)
    return writer


def declared_soon(plan: Plan, stop: StopRequest) -> bool:
    """Whether another process has declared the teacher, or does so within a minute: it has begun."""
    end = time.monotonic() + DECLARED_WITHIN_S
    while not (declared := teacher_is_declared(plan)) and time.monotonic() < end:
        stop.raise_if_set()
        time.sleep(0.1)
    return declared


def checked_pilot(runner: TeacherRunner, progress: Progress) -> tuple[TeacherCheck, Pilot]:
    """The teacher's signals for the pilot's views, with a warning if its accuracy on them is suspicious."""
    plan = runner.plan
    check, pilot = check_first_batch(runner, before_pilot=True), run_pilot(runner)
    if not warn_of_chance_accuracy(plan, pilot.correct, pilot.labelled, progress):
        warn_of_lost_accuracy(plan, pilot.correct, pilot.labelled, progress)
    return check, pilot


def warn_of_lost_accuracy(plan: Plan, correct: int, labelled: int, progress: Progress) -> None:
    """Views of a size or a normalisation that the teacher was not trained at cost it accuracy, and raise no error."""
    known = plan.teacher.model.top1
    # Of mixed images, about half show more of their partner than of the image whose label counts.
    share = MIN_OF_KNOWN / 2 if plan.recipe.mixes else MIN_OF_KNOWN
    if known is not None and labelled >= MIN_LABELLED and correct < share * known * labelled:
        progress.warning(
            f"the teacher's accuracy is {correct / labelled:.1%} on {labelled:,} views of {plan.recipe.size} px, and "
            f"{known:.1%} where it was published or trained; check the size of the views, its normalisation and the "
            "order of its classes"
        )


def warn_of_chance_accuracy(plan: Plan, correct: int, labelled: int, progress: Progress) -> bool:
    """Train mode, wrong preprocessing and another class order all give an accuracy near chance."""
    is_low = is_near_chance(correct, labelled, plan.spec.num_classes)
    if is_low:
        progress.warning(
            f"the teacher's accuracy is {correct / labelled:.1%} on {labelled:,} views, chance is "
            f"{1 / plan.spec.num_classes:.1%}; check its weights, its normalisation and the order of its classes"
        )
    return is_low


def is_near_chance(correct: int, labelled: int, num_classes: int) -> bool:
    """Whether there are enough views to say that the accuracy is suspicious."""
    chance = 1 / num_classes
    lowest = min(MIN_TIMES_CHANCE * chance, chance + MIN_ABOVE_CHANCE * (1 - chance))
    return labelled >= MIN_LABELLED and correct < lowest * labelled


def write_teacher(runner: TeacherRunner, writer: ArchiveWriter, stats: RunStats, progress: Progress) -> None:
    """Write the teacher's missing blocks, and the view parameters that are still missing after that."""
    plan = runner.plan
    blocks = blocks_to_write(plan, writer, plan.folder, helps=not plan.options.no_help)
    if blocks:
        if stats.check is None:
            stats.check = check_first_batch(runner)
        write_blocks(runner, writer, blocks, stats, progress)
    for view in sorted({block.view for block in missing_blocks(plan, writer, "views")}):
        write_view_params(plan, writer, view)


def write_blocks(
    runner: TeacherRunner, writer: ArchiveWriter, blocks: Sequence[Block], stats: RunStats, progress: Progress
) -> None:
    """Run the teacher and write its blocks. The first block is checked while the next ones are computed."""
    plan = runner.plan
    total, images = sum(len(block.rows) for block in blocks), 0
    unchecked: tuple[int, range, Computed] | None = None
    run_again = not runner.kept
    tell_slow_encoder(plan, writer, progress)
    runner.read_whole_tars()
    with BlockEncoder(plan, writer, stats) as encoder, TarsAhead(plan.source, tars_of_rows(plan, blocks)) as ahead:
        numbers = {start: number for number, start in enumerate(dict.fromkeys(block.start for block in blocks))}
        for (block, rows), batch in computed_batches(runner, teacher_batches(runner, writer, blocks)):
            ahead.enter(numbers[block.start])
            encoder.add(block, rows, batch.signals)
            if images == 0:
                unchecked = block.view, rows, batch
            images += len(rows)
            # This process sees only its own progress, and assumes that the others are as fast.
            progress.advance(
                "teacher",
                min(images * plan.share.count, total),
                total,
                blocks=stats.blocks,
                written=human_bytes(stats.bytes),
            )
            if unchecked is not None and stats.blocks:
                check_stored_batch(plan, writer, *unchecked, run_again=run_again)
                unchecked = None
    if unchecked is not None:
        check_stored_batch(plan, writer, *unchecked, run_again=run_again)


def tars_of_rows(plan: Plan, blocks: Sequence[Block]) -> Iterator[list[int]]:
    """The tars of the rows of the blocks, in the order of their use; blocks of several views have the same rows."""
    tars = streamed(plan.source)
    assert tars is not None
    for start, stop in dict.fromkeys((block.start, block.stop) for block in blocks):
        yield np.unique(tars.tar_of[plan.index.rows[start:stop]]).tolist()


def tell_slow_encoder(plan: Plan, writer: ArchiveWriter, progress: Progress) -> None:
    codecs = {signal.codec for signal in writer.teachers[plan.teacher_name].signals}
    if plan.teacher.device.type == "cuda" and "linear" in codecs and triton_kernels() is None:
        progress.info(
            f"Triton is not installed, so encoding on {plan.teacher.device} runs in plain operations of torch, many "
            "times slower; pip install triton"
        )


def teacher_batches(
    runner: TeacherRunner, writer: ArchiveWriter, blocks: Sequence[Block]
) -> Iterator[tuple[tuple[Block, range], list[int]]]:
    """The batches of the blocks, without blocks that other processes have committed."""
    for block in blocks:
        if writer.is_committed(block):
            continue
        for rows in batches_of(block.rows, runner.plan.batch_size):
            yield (block, rows), runner.indices(block.view, rows)


def computed_batches(
    runner: TeacherRunner, batches: Iterator[tuple[tuple[Block, range], list[int]]]
) -> Iterator[tuple[tuple[Block, range], Computed]]:
    """The signals of every batch, from the pilot if it computed them; with pixels, at least those of the first one."""
    if not runner.kept:
        yield from ((tag, Computed(signals, pixels)) for tag, pixels, signals in runner.run(batches))
        return
    is_first = True
    for (block, rows), indices in batches:
        runner.stop.raise_if_set()
        batch = runner.kept.pop((block.view, rows.start))
        if is_first and batch.pixels is None:  # another process has written the block that was checked
            [(_, pixels)] = runner.render([(None, indices)])
            batch = Computed(batch.signals, pixels)
        is_first = False
        yield (block, rows), batch


def check_stored_batch(
    plan: Plan, writer: ArchiveWriter, view: int, rows: range, computed: Computed, *, run_again: bool
) -> None:
    """Self-test before the long part of the run: render a batch from the archive alone, as in training, and compare
    its pixels with those that workers rendered, and the stored signals with the teacher's.

    With `run_again`, the teacher computes them again, as it may have changed since its check. Signals that a pilot of
    all views computed are all there are, so nothing can change any more.
    """
    assert computed.pixels is not None
    archive = writer.read_back()
    dataset = ViewDataset(plan.source, archive, joined=join_archive(plan.index, archive), check=False)
    pixels = stack_pixels(dataset.__getitems__([dataset.index(view, row) for row in rows]))
    differing = int((pixels != computed.pixels).flatten(1).any(1).sum())
    if differing:
        raise Refused(
            f"self-test: {differing} of {len(rows)} views rendered from the archive differ from the teacher's input; "
            "check whether the images are changing during the run"
        )
    outputs = plan.teacher(pixels) if run_again else computed.signals
    part = archive.state.teachers[plan.part.name]
    for spec in part.signals:
        signal, stored = spec.name, open_signal(archive.state, part, spec)
        decoded, exact = stored.decode(view, np.asarray(rows)), outputs[spec.name].cpu().numpy()
        error = max(float(errors.max()) for errors in stored.codec.errors(exact, decoded).values())
        fidelity = stored.codec.config().get("fidelity", 0.0)
        bound = fidelity + REPEAT_TOLERANCE[plan.teacher.device.type]
        if error > bound:
            raise Refused(
                f"self-test: the error of the stored {signal} is {error:.3g}, expected at most {bound:.3g}; check "
                "whether the teacher is deterministic"
            )


def write_provenance(plan: Plan, writer: ArchiveWriter, stats: RunStats) -> None:
    """Record the device, speed and accuracy of a run that committed anything. Not part of the archive's identity."""
    if not stats.blocks:
        return
    check = stats.check
    note = {
        "began": stats.began.isoformat(timespec="seconds"),
        "command": plan.options.command,
        "device": device_name(plan.teacher.device),
        "environment": dict(plan.spec.environment),
        "share": f"{plan.share.index}/{plan.share.count}",
        "seconds": round(stats.seconds, 3),
        "images_per_second": round(stats.rows / stats.seconds, 3),
        "blocks": stats.blocks,
        "images": stats.rows,
        "bytes": stats.bytes,
        "labelled": stats.labelled,
        "right": stats.correct,
        "teacher_top1": stats.top1,
        "floor": None if check is None else check.batch_difference,
        "fit_seconds": None if stats.fit_seconds is None else round(stats.fit_seconds, 3),
        "relative_floor": None if check is None else check.relative_batch_difference,
    }
    with contextlib.suppress(Refused):  # a full disk must not hide the error that ended the run
        writer.note(f"{plan.part.name}-{stats.began:%Y%m%dt%H%M%S}-{plan.share.index}-{os.getpid()}", note)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cache_result(
    plan: Plan, writer: ArchiveWriter, runs: Sequence[RunStats], identity: str | None, missing: tuple[str, ...]
) -> CacheResult:
    seconds, images, stats = runs[0].seconds, sum(run.rows for run in runs), runs[-1]
    description = describe(writer.read_back() if identity is None else open_archive(writer.path))
    signals = description["teachers"][plan.teacher_name].values()
    return CacheResult(
        path=str(plan.options.out),
        id=identity,
        samples=plan.spec.num_samples,
        views=plan.spec.num_views,
        images=images,
        seconds=seconds,
        images_per_second=images / seconds if images else None,
        total_bytes=description["total_bytes"],
        bytes_per_view=sum(signal["bytes_per_view"] for signal in signals),
        teacher=plan.teacher_name,
        signals=tuple(description["teachers"][plan.teacher_name]),
        teacher_top1=stats.top1,
        floor=None if stats.check is None else stats.check.batch_difference,
        missing=missing,
    )
