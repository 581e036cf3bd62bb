"""Stage 1 from beginning to end: `cache_teacher(options)`.

    plan -> teacher checked, pilot, codecs -> archive -> canaries -> blocks, the first of them read back -> seal

What is there already is not done again, so the same call continues an archive that was interrupted anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from redistill_cache import ArchiveWriter
from redistill_cache.layout import Block
from redistill_cache.wording import human_bytes

from redistill.caching.encoder import BlockEncoder
from redistill.caching.estimate import Estimate, estimate, refuse_small_disk
from redistill.caching.forward import Forward
from redistill.caching.opening import Opened, declare, is_declared, is_ready, is_there, open_existing, refuse_place
from redistill.caching.options import CacheOptions
from redistill.caching.outcome import CacheResult, Run, leave_note, result, seal, warn_of_chance
from redistill.caching.parameters import is_committed, write_canaries, write_parameters
from redistill.caching.pilot import check_first_batch, fit_codecs, run_pilot
from redistill.caching.plan import Plan, make_plan
from redistill.caching.selftest import SelfTest
from redistill.caching.watcher import Silent, Watcher
from redistill.interrupts import StopRequest, stop_on_signals
from redistill.ranks import Rank

__all__ = ["cache_teacher", "estimate_cache"]


def estimate_cache(options: CacheOptions, watcher: Watcher | None = None) -> Estimate:
    """What `cache_teacher` would cost. Runs the teacher on a pilot, writes nothing."""
    watcher = watcher or Silent()
    with stop_on_signals() as stop:
        plan = make_plan(options, Rank.from_environment(), watcher.index)
        with Forward(plan, stop) as forward:
            check_first_batch(forward)
            pilot = run_pilot(forward)
        return estimate(plan, pilot, fit_codecs(plan, pilot))


def cache_teacher(options: CacheOptions, watcher: Watcher | None = None) -> CacheResult:
    """Run the teacher over all views that are missing in the archive, and seal it when nothing is."""
    run, rank = Run(), Rank.from_environment()
    watcher = watcher if watcher is not None and rank.first else Silent()
    with stop_on_signals() as stop:
        plan = planned(options, rank, watcher, stop)
        there = open_existing(plan) if is_there(options) else None
        with Forward(plan if there is None else there.plan, stop) as forward:
            if there is None or not there.codecs:
                there = declare_teacher(forward, there, run, watcher)
            write_canaries(forward, there.writer)
            try:
                write_teacher(forward, there, run, watcher)
            finally:
                leave_note(there, run)
    identity, missing = seal(there)
    return result(there, run, identity, missing)


def planned(options: CacheOptions, rank: Rank, watcher: Watcher, stop: StopRequest) -> Plan:
    """The plan. Other ranks than the first one make theirs when that one has created the archive."""

    def index(done: int, total: int) -> None:
        stop.raise_if_set()
        watcher.index(done, total)

    if not rank.first:
        rank.wait_until(lambda: is_ready(options), stop)
    elif not is_there(options):
        refuse_place(options)
    plan = make_plan(options, rank, index)
    if not rank.first:
        rank.wait_until(lambda: is_declared(plan), stop)
    return plan


def declare_teacher(forward: Forward, there: Opened | None, run: Run, watcher: Watcher) -> Opened:
    """A teacher that the archive does not have: looked at, its codecs fitted, its costs weighed, and declared."""
    plan = forward.plan
    run.check = check_first_batch(forward)
    pilot = run_pilot(forward)
    warn_of_chance(plan, pilot.right, pilot.labelled, watcher)
    choices = fit_codecs(plan, pilot)
    found = estimate(plan, pilot, choices)
    refuse_small_disk(plan.options.out, found.total_bytes if there is None else found.signal_bytes)
    for signal, choice in choices.items():
        watcher.say(f"{signal}: {choice.reason}")
    watcher.say(
        f"{found.samples:,} samples x {found.views} views: about {human_bytes(found.total_bytes)}, "
        f"{max(found.seconds / 60, 0.1):,.1f} minutes at {found.images_per_second:.0f} images/s"
    )
    forward.stop.raise_if_set()
    codecs = {signal: choice.codec for signal, choice in choices.items()}
    return declare(plan, None if there is None else there.writer, codecs)


def write_teacher(forward: Forward, there: Opened, run: Run, watcher: Watcher) -> None:
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
            watcher.advance(min(images * plan.rank.world, total), total, written.blocks, written.bytes)
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
        if is_committed(writer, block):
            continue
        for start in range(block.start, block.stop, size):
            rows = range(start, min(start + size, block.stop))
            yield (block, rows), forward.indices(block.view, rows)
