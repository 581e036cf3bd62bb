"""The archive of a run: a new one, or an existing one that fits the plan.

A new archive is created only after its teacher has been checked and its codecs fitted, so a refused run leaves nothing
behind. An existing one is checked completely before anything in it changes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from redistill_cache import Archive, ArchiveWriter, TeacherSpec
from redistill_cache.commits import Commits
from redistill_cache.errors import Refused, SpecMismatch
from redistill_cache.layout import Block, side_block
from redistill_cache.spec_files import read_root
from redistill_cache.storage import LOCAL, is_leftover
from redistill_cache.writer import refuse_difference

from redistill.caching.estimate import existing_parent, refuse_small_disk
from redistill.caching.options import CacheOptions
from redistill.caching.pilot import TeacherRunner
from redistill.caching.plan import Plan, use_stored_settings
from redistill.views.canaries import canary_rows, fingerprint

__all__ = [
    "archive_exists",
    "check_new_path",
    "create_archive",
    "has_all_views",
    "open_existing",
    "teacher_is_declared",
    "write_canaries",
    "write_view_params",
]


def archive_exists(options: CacheOptions) -> bool:
    return (options.out / "zarr.json").exists()


def has_all_views(options: CacheOptions) -> bool:
    """Whether the archive exists with all requested views: the ranks other than the first wait for this."""
    return archive_exists(options) and (
        not options.extend_views or read_root(options.out).spec.num_views >= options.views
    )


def teacher_is_declared(plan: Plan) -> bool:
    """Whether the archive has the teacher's specification and side data."""
    return Commits(plan.options.out, LOCAL).is_committed(side_block(plan.teacher_name))


def check_new_path(options: CacheOptions) -> None:
    """Refuse a path where no archive can be created, before the teacher runs."""
    path, parent = options.out, existing_parent(options.out)
    if options.extend_views:
        raise Refused(f"{path} does not exist, so it has no views to extend; leave out --extend-views")
    if path.is_dir() and not all(map(is_leftover, path.iterdir())):
        raise Refused(f"{path} holds files and is not an archive; choose another --out")
    if not parent.is_dir():
        raise Refused(f"{parent} is a file; --out must be a new folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise Refused(f"cannot write to {parent}; check the permissions, or choose another --out")


def create_archive(plan: Plan) -> ArchiveWriter:
    writer = ArchiveWriter.create(plan.options.out, plan.spec)
    write_samples(plan, writer)
    return writer


def open_existing(plan: Plan) -> tuple[Plan, ArchiveWriter]:
    """The archive at `--out`, and the plan with the settings stored in it. Refused before anything in it changes."""
    options, path = plan.options, plan.options.out
    plan = use_stored_settings(plan, read_root(path).spec)
    writer = ArchiveWriter.resume(path, plan.spec)
    write_samples(plan, writer)
    archive = writer.read_back()
    teacher = archive.teachers.get(plan.teacher_name)
    if teacher is None and options.extend_views:
        teachers = ", ".join(sorted(archive.teachers)) or "none"
        raise Refused(
            f"{path} has no teacher {plan.teacher_name!r} whose views could be extended (its teachers: {teachers}); "
            "extend the views of one of those, then add this teacher"
        )
    if teacher is None:
        return plan, writer
    check_same_teacher(path, teacher, plan)
    if options.extend_views:
        plan = replace(plan, spec=replace(plan.spec, num_views=options.views))
    refuse_small_disk(path, remaining_bytes(plan, writer, archive))
    if options.extend_views:
        writer = ArchiveWriter.extend_views(path, options.views)
    return plan, writer


def write_samples(plan: Plan, writer: ArchiveWriter) -> None:
    """Write the sample index. SpecMismatch where the archive has a different one."""
    index = plan.index
    writer.write_samples(index.keys, index.labels, index.digests, index.sizes)


def check_same_teacher(path: Path, teacher: TeacherSpec, plan: Plan) -> None:
    """Resume only with the same network and the same settings."""
    try:
        refuse_difference(dict(teacher.model), plan.model, f"{path}: teacher {teacher.name!r}")
    except SpecMismatch as error:
        raise SpecMismatch(f"{error}, or add it under another --teacher-name") from None


def remaining_bytes(plan: Plan, writer: ArchiveWriter, archive: Archive) -> int:
    """The size of the teacher's missing blocks, if they are like the written ones; 0 when none is written."""
    written = sum(entry.size for name, entry in archive.state.files.items() if name.startswith(f"{plan.part}/"))
    missing, per_view = len(writer.missing(plan.part)), writer.spec.blocks_per_view
    done = writer.spec.num_views * per_view - missing
    remaining = missing + (plan.spec.num_views - writer.spec.num_views) * per_view
    return written * remaining // done if done else 0


# -- view parameters and canaries -------------------------------------------------------------------------------------


def write_view_params(plan: Plan, writer: ArchiveWriter, view: int) -> None:
    """Write the parameters of every row of a view: a mixed row needs those of its partner, which may be any row."""
    missing = [block for block in writer.missing("views") if block.view == view]
    for block in plan.rank.work_order(missing):
        if not writer.is_committed(block):
            writer.write(block, plan.views.params(view, np.arange(block.start, block.stop)))


def write_canaries(runner: TeacherRunner, writer: ArchiveWriter) -> None:
    """Write pixel fingerprints of a few rows of every view, before the teacher runs on all of them."""
    plan = runner.plan

    def batches() -> Iterator[tuple[tuple[Block, np.ndarray], list[int]]]:
        for block in plan.rank.work_order(writer.missing("canaries")):
            if not writer.is_committed(block):
                rows = canary_rows(plan.spec.seed, block.view, plan.spec.num_samples, plan.spec.canaries_per_view)
                yield (block, rows), runner.indices(block.view, rows.tolist())

    for (block, rows), pixels in runner.render(batches()):
        writer.write(block, {"row": rows, "pixels": fingerprint(pixels)})
