"""Stage 1 from beginning to end: `cache_teacher(options)`.

    plan -> archive -> teacher checked, pilot, codecs -> views and canaries -> first block, self-test -> blocks -> seal

What is there already is not done again, so the same call continues an archive that was interrupted anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from redistill_cache import ArchiveWriter, TeacherSpec
from redistill_cache.codecs import Codec
from redistill_cache.errors import Refused, SpecMismatch
from redistill_cache.layout import Block
from redistill_cache.preconditions import refuse_difference

from redistill.caching.encoder import BlockEncoder, Written
from redistill.caching.estimate import Estimate, estimate, refuse_small_disk, teacher_spec
from redistill.caching.forward import answers
from redistill.caching.options import CacheOptions
from redistill.caching.outcome import CacheResult, finish, result, warn_of_chance
from redistill.caching.pilot import check_first_batch, fit_codecs, run_pilot
from redistill.caching.plan import Plan, make_plan, with_views
from redistill.caching.ranks import Rank
from redistill.caching.selftest import self_test
from redistill.caching.watcher import Silent, Watcher
from redistill.interrupts import StopRequest, stop_on_signals
from redistill.teacher_check import TeacherCheck
from redistill.views.canaries import make_canaries

__all__ = ["cache_teacher", "estimate_cache"]

AGAIN = "run the same command again to continue: committed blocks are kept"


def estimate_cache(options: CacheOptions, watcher: Watcher | None = None) -> Estimate:
    """What `cache_teacher` would cost. Runs the teacher on a pilot, writes nothing."""
    plan = make_plan(options, Rank.from_environment(), (watcher or Silent()).index)
    check_first_batch(plan)
    pilot = run_pilot(plan)
    return estimate(plan, pilot, *fit_codecs(plan, pilot))


def cache_teacher(options: CacheOptions, watcher: Watcher | None = None) -> CacheResult:
    """Run the teacher over all views that are missing in the archive, and seal it when nothing is."""
    watcher, rank, start = watcher or Silent(), Rank.from_environment(), time.perf_counter()
    if not rank.first:
        watcher = Silent()
    with stop_on_signals() as stop:
        if not rank.first:
            rank.wait_for(lambda: (options.out / "zarr.json").exists() or None, stop, AGAIN)
        plan = make_plan(options, rank, watcher.index)
        writer, plan = open_writer(plan)
        codecs, check = declare_teacher(plan, writer, watcher, stop)
        write_views(plan, writer, stop)
        written = write_teacher(plan, writer, codecs, watcher, stop)
    seconds = time.perf_counter() - start
    identity, missing = finish(plan, writer, written, check, seconds)
    warn_of_chance(plan, written, watcher)
    return result(plan, writer, written, check, seconds, identity, missing)


# -- the archive ------------------------------------------------------------------------------------------------------


def open_writer(plan: Plan) -> tuple[ArchiveWriter, Plan]:
    """Create the archive, continue it, or extend it. The plan follows the archive in what only a first run decides."""
    options, path = plan.options, plan.options.out
    if not (path / "zarr.json").exists():
        if options.extend_views:
            raise Refused(f"{path} does not exist, so there is nothing to extend; leave out --extend-views")
        writer = ArchiveWriter.create(path, plan.spec)
    else:
        stored = ArchiveWriter.resume(path).spec
        plan = with_views(plan, stored.num_views if options.extend_views else plan.spec.num_views)
        if options.block_rows is None:
            plan = replace(plan, spec=replace(plan.spec, block_rows=stored.block_rows))
        writer = ArchiveWriter.resume(path, plan.spec)
        if options.extend_views:
            writer = ArchiveWriter.extend_views(path, options.views)
            plan = with_views(plan, options.views)
    if plan.rank.first:
        index = plan.index
        writer.write_samples(index.keys, index.labels, index.digests, index.sizes)
    return writer, plan


def declare_teacher(
    plan: Plan, writer: ArchiveWriter, watcher: Watcher, stop: StopRequest
) -> tuple[dict[str, Codec], TeacherCheck | None]:
    """The codecs of the teacher: those it was declared with, or new ones, fitted to a pilot by the first rank."""

    def declared() -> dict[str, Codec] | None:
        archive = writer.read_back()
        teacher = archive.teachers.get(plan.teacher_name)
        if teacher is None:
            return None
        refuse_other_teacher(plan, teacher)
        return {signal.name: archive.codec(teacher.name, signal.name) for signal in teacher.signals}

    codecs = declared() if plan.rank.first else plan.rank.wait_for(declared, stop, AGAIN)
    if codecs is not None:
        if not plan.rank.first:
            writer.teachers.update(ArchiveWriter.resume(writer.path).teachers)
        check = check_first_batch(plan) if writer.missing(plan.part) else None
        return codecs, check
    check = check_first_batch(plan)
    pilot = run_pilot(plan)
    stop.raise_if_set(AGAIN)
    codecs, reasons = fit_codecs(plan, pilot)
    found = estimate(plan, pilot, codecs, reasons)
    refuse_small_disk(found, writer.path, 0)
    for signal, reason in reasons.items():
        watcher.say(f"{signal}: {reason}")
    watcher.say(
        f"{found.samples:,} samples x {found.views} views: about {found.total_bytes / 2**20:.1f} MiB, "
        f"{found.seconds / 60:.1f} minutes at {found.images_per_second:.0f} images/s"
    )
    writer.add_teacher(teacher_spec(plan, codecs), {name: codec.side() for name, codec in codecs.items()})
    return codecs, check


def refuse_other_teacher(plan: Plan, teacher: TeacherSpec) -> None:
    """An archive goes on only with the very teacher, asked in the very way, that it was begun with."""
    try:
        refuse_difference(dict(teacher.model), plan.model, f"{plan.options.out}: teacher {teacher.name!r}")
    except SpecMismatch as error:
        raise SpecMismatch(f"{error}, or add it under another --teacher-name") from None


# -- its parts --------------------------------------------------------------------------------------------------------


def write_views(plan: Plan, writer: ArchiveWriter, stop: StopRequest) -> None:
    """View parameters and canaries: little work, and what the self-test and any reader need first."""
    views = plan.views
    for block in plan.rank.order(writer.missing("views")):
        stop.raise_if_set(AGAIN)
        if not committed(writer, block):
            writer.write(block, views.params(block.view, np.arange(block.start, block.stop)))
    count = plan.spec.canaries_per_view
    for block in plan.rank.order(writer.missing("canaries")):
        stop.raise_if_set(AGAIN)
        if not committed(writer, block):
            rows, pixels = make_canaries(plan.source, views, plan.spec.seed, block.view, count)
            writer.write(block, {"row": rows, "pixels": pixels})


def committed(writer: ArchiveWriter, block: Block) -> bool:
    """Whether another rank has been here since we looked."""
    return (writer.path / block.record_path).exists()


def write_teacher(
    plan: Plan, writer: ArchiveWriter, codecs: dict[str, Codec], watcher: Watcher, stop: StopRequest
) -> list[Written]:
    """Every missing block of the teacher; the first one alone, and then read back."""
    blocks = plan.rank.order(writer.missing(plan.part))
    total = sum(len(block.rows) for block in blocks)
    written: list[Written] = []
    for some in (blocks[:1], blocks[1:]):
        if some:
            done = sum(w.rows for w in written)
            report = lambda images, blocks, done=done: watcher.advance(done + images, total, blocks)  # noqa: E731
            written.append(write_blocks(plan, writer, codecs, some, report, stop))
        if some == blocks[:1] and written:
            self_test(plan, writer, some[0])
            watcher.say("self-test: the first block reads back as the teacher said it, from the same pixels")
    return written


def write_blocks(
    plan: Plan,
    writer: ArchiveWriter,
    codecs: dict[str, Codec],
    blocks: Sequence[Block],
    report: Callable[[int, int], None],
    stop: StopRequest,
) -> Written:
    """Render, ask, encode and write. Batches are a function of the block, so that its bytes are."""
    dataset, size = plan.dataset, plan.options.batch_size
    images = 0

    def batches() -> Iterator[tuple[tuple[Block, range], list[int]]]:
        for block in blocks:
            if committed(writer, block):
                continue
            for start in range(block.start, block.stop, size):
                rows = range(start, min(start + size, block.stop))
                yield (block, rows), [dataset.index(block.view, row) for row in rows]

    with BlockEncoder(plan, writer, codecs) as encoder:
        for (block, rows), said in answers(plan, dataset, batches()):
            encoder.add(block, rows, said)
            images += len(rows)
            report(images, encoder.written.blocks)
            stop.raise_if_set(AGAIN)
    return encoder.written
