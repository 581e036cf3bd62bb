"""The archive of a run: a new one, or an existing one that fits the plan.

A new archive is created only after its teacher has been checked and its codecs fitted, so a refused run leaves nothing
behind. An existing one is checked completely before anything in it changes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from redistill_cache import Archive, ArchiveSpec, ArchiveWriter, TeacherSpec
from redistill_cache.commits import Commits
from redistill_cache.errors import Incomplete, Refused, SpecMismatch
from redistill_cache.layout import MANIFEST, Block, part_blocks, row_block, side_block
from redistill_cache.open_state import read_state
from redistill_cache.spec import LOGITS, TERMS
from redistill_cache.spec_files import list_teachers, read_root
from redistill_cache.storage import LOCAL, Files, disk_trouble, is_leftover
from redistill_cache.writer import refuse_difference

from redistill.caching.estimate import existing_parent, refuse_small_disk
from redistill.caching.options import CacheOptions
from redistill.caching.pilot import TeacherRunner
from redistill.caching.plan import Plan, use_stored_settings
from redistill.sources.base import streamed
from redistill.views.canaries import canary_rows, fingerprint
from redistill.views.recipe import Recipe
from redistill.views.recipe_spec import recipe_text

__all__ = [
    "archive_exists",
    "blocks_to_write",
    "check_new_path",
    "create_archive",
    "is_prepared",
    "missing_blocks",
    "open_existing",
    "teacher_is_declared",
    "write_canaries",
    "write_view_params",
]

# Of the first view, to tell views that were drawn from others.
COMPARED_ROWS = 64


def archive_exists(options: CacheOptions) -> bool:
    return (options.out / "zarr.json").exists()


def is_prepared(options: CacheOptions) -> bool:
    """Whether the archive has the requested views and a teacher, so that another process need not wait to open it."""
    if not archive_exists(options) or read_root(options.out).spec.num_views < (options.views or 1):
        return False
    names = [options.teacher_name] if options.teacher_name else list_teachers(options.out)
    return any(Commits(options.out, LOCAL).is_committed(side_block(name)) for name in names)


def teacher_is_declared(plan: Plan) -> bool:
    """Whether the archive has the specification and the side data of the part that is written."""
    return Commits(plan.options.out, LOCAL).is_committed(side_block(plan.part.name))


def check_new_path(path: Path, *, files: Files = LOCAL) -> None:
    """Refuse a path where no archive can be created, before the teacher runs."""
    parent = existing_parent(path)
    if path.is_dir() and not all(map(is_leftover, path.iterdir())) and not (path / "zarr.json").exists():
        raise Refused(f"{path} holds files and is not an archive; choose another --out")
    if not parent.is_dir():
        raise Refused(f"{parent} is a file; --out must be a new folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise Refused(f"cannot write to {parent}; check the permissions, or choose another --out")
    with disk_trouble("write to", parent):
        files.exclusive_by(parent)


def create_archive(plan: Plan) -> tuple[Plan, ArchiveWriter]:
    """A new archive, or the one that another process has created since this run looked."""
    try:
        writer = ArchiveWriter.create(plan.options.out, plan.spec)
    except Refused:
        if not archive_exists(plan.options):
            raise
        return open_existing(plan)
    write_samples(plan, writer)
    return plan, writer


def open_existing(plan: Plan) -> tuple[Plan, ArchiveWriter]:
    """The archive at `--out`, and the plan with the settings stored in it. Refused before anything in it changes."""
    options, path = plan.options, plan.options.out
    stored = read_root(path).spec
    if stored.subset_of is not None:  # the parameters of its views were drawn for other numbers of rows and views
        raise Refused(
            f"{path} is a subset of archive {stored.subset_of.id}, so no teacher or views can be added to it; add them "
            "to that archive, and take the subset again"
        )
    plan = use_stored_settings(plan, stored)
    check_same_recipe(path, stored, plan)
    check_same_terms(options, stored)
    writer = ArchiveWriter.resume(path, replace(plan.spec, num_views=stored.num_views))
    check_teacher_name(plan, writer)
    write_samples(plan, writer)
    archive = writer.read_back()
    refuse_other_views(plan, archive)
    if plan.teacher_name not in archive.teachers and options.extend_views:
        teachers = ", ".join(sorted(archive.teachers)) or "none"
        raise Refused(
            f"{path} has no teacher {plan.teacher_name!r} whose views could be extended (its teachers: {teachers}); "
            "leave out --extend-views to add this teacher"
        )
    for part in plan.parts:
        check_same_teacher(path, writer.teachers, plan.of(part))
    started = started_views(plan, writer)
    plan = replace(plan, spec=replace(plan.spec, num_views=options.views or started))
    check_views(plan, writer, started)
    remaining = sum(remaining_bytes(plan.of(part), writer, archive) for part in plan.parts)
    refuse_small_disk(path, remaining)
    if plan.spec.num_views > stored.num_views:
        writer = ArchiveWriter.extend_views(path, plan.spec.num_views)
    return plan, writer


def refuse_other_views(plan: Plan, archive: Archive) -> None:
    """The views of an imported archive are those of its source, and not drawn from the seed as they are here."""
    block = row_block(archive.spec, "views", 0, 0)
    if not archive.spec.view_arrays or not archive.state.holds(block):
        return
    rows = np.arange(min(COMPARED_ROWS, block.stop))
    stored, drawn = archive.view_params(0, rows), plan.views.params(0, rows)
    if any(not np.array_equal(stored[name], drawn[name]) for name in stored):
        raise Refused(
            f"{archive.path} has views that were not drawn from its seed but imported, so no teacher can be added to "
            "it; write a new archive"
        )


def check_same_recipe(path: Path, stored: ArchiveSpec, plan: Plan) -> None:
    if stored.recipe != plan.spec.recipe:
        old, new = Recipe.from_json(stored.recipe), plan.recipe
        raise SpecMismatch(
            f"{path} was started with --recipe {recipe_text(old)!r}, now it is {recipe_text(new)!r}; leave out "
            "--recipe and --size to use those of the archive, or start a new archive"
        )


def check_same_terms(options: CacheOptions, stored: ArchiveSpec) -> None:
    """The terms may have been edited since the archive was started."""
    path = options.out
    if (path / MANIFEST).exists():
        stored = read_state(path, allow_partial=False).spec
    for name in TERMS:
        value, current = getattr(options, name), getattr(stored, name)
        if value and value != current:
            flag = f"--{name.replace('_', '-')}"
            raise SpecMismatch(
                f"{path} has the {name} {current!r}, now it is {value!r}; leave out {flag}, or change that of the "
                f"finished archive: redistill archive edit {path} {flag} ..."
            )


def check_teacher_name(plan: Plan, writer: ArchiveWriter) -> None:
    """A second teacher changes what `train` means for an archive, so it is added on request only."""
    name, known = plan.teacher_name, sorted(name for name, spec in writer.teachers.items() if spec.adds_to is None)
    if plan.options.teacher_name is None and known and name not in known:
        raise Refused(
            f"{writer.path} holds the teacher {', '.join(known)}, and {plan.options.teacher} is another one; add "
            f"--teacher-name {name} to add it to this archive, or choose another --out"
        )


def started_views(plan: Plan, writer: ArchiveWriter) -> int:
    """The views that the teacher was started with. Signals are added to a teacher that is finished only."""
    name, declared = plan.teacher_name, writer.spec.num_views
    if writer.sealed and name in (sealed := read_state(writer.path, allow_partial=False)).teachers:
        return sealed.views_of(name)
    adds = any(part.adds_to for part in plan.parts)
    if adds and (name not in writer.teachers or writer.missing(f"teachers/{name}")):
        raise Incomplete(
            f"{writer.path}: teacher {name!r} is not finished, so nothing can be added to it; run the command that "
            "writes it again, then this one"
        )
    others = {spec.owner for spec in writer.teachers.values()} - {name}
    # A teacher that is being added may have any of the views that exist.
    return min(plan.options.views or declared, declared) if others else declared


def check_views(plan: Plan, writer: ArchiveWriter, started: int) -> None:
    """Refuse another number of views than the teacher was started with, unless they are to be extended."""
    views, where = plan.spec.num_views, f"{writer.path}: teacher {plan.teacher_name!r}"
    if plan.options.extend_views and views < started:
        raise Refused(f"{where} has {started} views; it cannot shrink to {views}")
    if not plan.options.extend_views:
        refuse_difference({"num_views": started}, {"num_views": views}, where)


def missing_blocks(plan: Plan, writer: ArchiveWriter, part: str) -> list[Block]:
    """The blocks of this run's views that no process has committed yet; the archive may have more views."""
    return [block for block in writer.missing(part) if block.view < plan.spec.num_views]


def blocks_to_write(plan: Plan, writer: ArchiveWriter, part: str, *, helps: bool = True) -> list[Block]:
    """The missing blocks in the order of this process. A share is one of all blocks, whichever are missing by now."""
    missing = set(missing_blocks(plan, writer, part))
    blocks = list(part_blocks(writer.spec, part, plan.spec.num_views))
    if streamed(plan.source) is None:
        ordered = plan.share.work_order(blocks, helps=helps)
    else:  # all views of the same rows in turn, so that their tars are fetched once
        starts = sorted({block.start for block in blocks})
        of_rows = [[block for block in blocks if block.start == start] for start in starts]
        ordered = [block for same_rows in plan.share.work_order(of_rows, helps=helps) for block in same_rows]
    return [block for block in ordered if block in missing]


def write_samples(plan: Plan, writer: ArchiveWriter) -> None:
    """Write the sample index. SpecMismatch where the archive has a different one."""
    index = plan.index
    writer.write_samples(index.keys, index.labels, index.digests, index.sizes)


def check_same_teacher(path: Path, declared: Mapping[str, TeacherSpec], plan: Plan) -> None:
    """Resume only with the same network and the same settings; add to a teacher only signals of the same network."""
    where = f"{path}: teacher {plan.teacher_name!r}"
    base, stored = declared.get(plan.teacher_name), declared.get(plan.part.name)
    for spec in (base, stored):
        precision = "" if spec is None else str(spec.model.get("precision"))
        if plan.teacher.precision.startswith(f"{precision}, "):
            raise SpecMismatch(
                f"{where} was started by an earlier version, which rounded its logits to {precision}; use that "
                "version, add the teacher under another --teacher-name, or start a new archive"
            )
    try:
        if base is not None:
            network = TeacherSpec(base.name, base.signals, plan.model).network
            refuse_difference(base.network, network, where)
        if stored is not None:
            free = unused_settings(plan.part.signals)
            if set(plan.part.signals).isdisjoint(plan.options.signals):  # views are added to it as it was started
                free = ["batch_size", "codec", "fidelity", "feature_fidelity", "keep_shift"]
            refuse_difference(dict(stored.model), plan.model, where, free)
    except SpecMismatch as error:
        raise SpecMismatch(f"{error}, or add it under another --teacher-name") from None
    level = plan.options.zstd_level
    levels = sorted({array.level for signal in stored.signals for array in signal.arrays}) if stored is not None else []
    if level is not None and levels not in ([], [level]):
        raise SpecMismatch(
            f"{where} was started with zstd level {' and '.join(map(str, levels))}, now it is {level}; leave out "
            "--zstd-level to use that of the archive, or start a new archive"
        )


def unused_settings(signals: Sequence[str]) -> list[str]:
    """The recorded settings that these signals do not depend on."""
    of_logits = [] if LOGITS in signals else ["fidelity", "keep_shift"]
    return of_logits + ([] if set(signals) - {LOGITS} else ["feature_fidelity"])


def remaining_bytes(plan: Plan, writer: ArchiveWriter, archive: Archive) -> int:
    """The size of the part's missing blocks, if they are like the written ones; 0 when none is written."""
    written = sum(entry.size for name, entry in archive.state.files.items() if name.startswith(f"{plan.folder}/"))
    done = sum(part == plan.folder for part, _, _ in archive.state.committed or ())
    remaining = plan.spec.num_views * writer.spec.blocks_per_view - done
    return written * max(0, remaining) // done if done else 0


# -- view parameters and canaries -------------------------------------------------------------------------------------


def write_view_params(plan: Plan, writer: ArchiveWriter, view: int) -> None:
    """Write the parameters of every row of a view: a mixed row needs those of its partner, which may be any row."""
    for block in blocks_to_write(plan, writer, "views"):
        if block.view == view and not writer.is_committed(block):
            writer.write(block, plan.views.params(view, np.arange(block.start, block.stop)))


def write_canaries(runner: TeacherRunner, writer: ArchiveWriter) -> None:
    """Write pixel fingerprints of a few rows of every view, before the teacher runs on all of them."""
    plan = runner.plan

    def batches() -> Iterator[tuple[tuple[Block, np.ndarray], list[int]]]:
        for block in blocks_to_write(plan, writer, "canaries"):
            if not writer.is_committed(block):
                rows = canary_rows(plan.spec.seed, block.view, plan.spec.num_samples, plan.spec.canaries_per_view)
                yield (block, rows), runner.indices(block.view, rows.tolist())

    for (block, rows), pixels in runner.render(batches()):
        writer.write(block, {"row": rows, "pixels": fingerprint(pixels)})
