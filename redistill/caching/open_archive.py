"""The archive of a run: a new one, or one that is there and fits, with the codecs of its teacher.

A new archive is created only when its teacher has been checked and its codecs are known, so that a refusal leaves
nothing behind; one that is there is looked at from all sides before anything of it changes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from redistill_cache import Archive, ArchiveWriter, TeacherSpec
from redistill_cache.codecs import Codec
from redistill_cache.commits import Commits
from redistill_cache.errors import Refused, SpecMismatch
from redistill_cache.layout import Block, side_block
from redistill_cache.spec_files import read_root
from redistill_cache.storage import LOCAL, is_leftover
from redistill_cache.writer import refuse_difference

from redistill.caching.estimate import existing_parent, refuse_small_disk, teacher_spec
from redistill.caching.options import CacheOptions
from redistill.caching.pilot import Forward
from redistill.caching.plan import Plan, following, with_views
from redistill.views.canaries import canary_rows, fingerprint

__all__ = [
    "OpenedArchive",
    "declare",
    "is_declared",
    "is_ready",
    "is_there",
    "open_existing",
    "refuse_place",
    "write_canaries",
    "write_parameters",
]


# -- parameters -------------------------------------------------------------------------------------------------------
#
# What an archive holds of its views beside the teacher's answers: their parameters, and canaries.


def write_parameters(plan: Plan, writer: ArchiveWriter, view: int) -> None:
    """The parameters of every row of a view: a mixed image needs those of a partner, which may be any."""
    missing = [block for block in writer.missing("views") if block.view == view]
    for block in plan.rank.order(missing):
        if not writer.is_committed(block):
            writer.write(block, plan.views.params(view, np.arange(block.start, block.stop)))


def write_canaries(forward: Forward, writer: ArchiveWriter) -> None:
    """Fingerprints of a few views of every kind, before the teacher is asked about the rest."""
    plan = forward.plan

    def batches() -> Iterator[tuple[tuple[Block, np.ndarray], list[int]]]:
        for block in plan.rank.order(writer.missing("canaries")):
            if not writer.is_committed(block):
                rows = canary_rows(plan.spec.seed, block.view, plan.spec.num_samples, plan.spec.canaries_per_view)
                yield (block, rows), forward.indices(block.view, rows.tolist())

    for (block, rows), pixels in forward.rendered(batches()):
        writer.write(block, {"row": rows, "pixels": fingerprint(pixels)})


# -- opening ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenedArchive:
    """An archive to write to. The plan follows it in what only a first run decides."""

    plan: Plan
    writer: ArchiveWriter
    codecs: dict[str, Codec]
    """Those its teacher was declared with; none where it does not have this teacher yet."""


def is_there(options: CacheOptions) -> bool:
    return (options.out / "zarr.json").exists()


def is_ready(options: CacheOptions) -> bool:
    """Whether the archive is there with all the views that are asked for: others than the first rank wait for that."""
    return is_there(options) and (not options.extend_views or read_root(options.out).spec.num_views >= options.views)


def is_declared(plan: Plan) -> bool:
    """Whether the teacher has its place in the archive, with its side data."""
    return Commits(plan.options.out, LOCAL).is_committed(side_block(plan.teacher_name))


def refuse_place(options: CacheOptions) -> None:
    """A path that cannot become an archive is refused before the teacher is asked anything."""
    path, above = options.out, existing_parent(options.out)
    if options.extend_views:
        raise Refused(f"{path} does not exist, so there is nothing to extend; leave out --extend-views")
    if path.is_dir() and not all(map(is_leftover, path.iterdir())):
        raise Refused(f"{path} holds files that are no archive; choose another --out")
    if not above.is_dir():
        raise Refused(f"{above} is a file; --out is a folder that does not exist yet")
    if not os.access(above, os.W_OK | os.X_OK):
        raise Refused(f"cannot write to {above}; check the permissions, or choose another --out")


def open_existing(plan: Plan) -> OpenedArchive:
    """The archive that is there. Refused unless all of it fits, before anything of it changes."""
    options, path = plan.options, plan.options.out
    plan = following(plan, read_root(path).spec)
    writer = ArchiveWriter.resume(path, plan.spec)
    write_samples(plan, writer)
    archive = writer.read_back()
    teacher = archive.teachers.get(plan.teacher_name)
    if teacher is None and options.extend_views:
        known = ", ".join(sorted(archive.teachers)) or "none"
        raise Refused(
            f"{path} has no teacher {plan.teacher_name!r} whose views could be extended (it has: {known}); extend it "
            "with a teacher it has, then add this one"
        )
    if teacher is None:
        return OpenedArchive(plan, writer, {})
    refuse_other_teacher(path, teacher, plan)
    codecs = {signal.name: archive.codec(teacher.name, signal.name) for signal in teacher.signals}
    if options.extend_views:
        plan = with_views(plan, options.views)
    refuse_small_disk(path, bytes_to_come(plan, writer, archive))
    if options.extend_views:
        writer = ArchiveWriter.extend_views(path, options.views)
    return OpenedArchive(plan, writer, codecs)


def declare(plan: Plan, writer: ArchiveWriter | None, codecs: dict[str, Codec]) -> OpenedArchive:
    """Give the teacher its place, in a new archive where there is none."""
    if writer is None:
        writer = ArchiveWriter.create(plan.options.out, plan.spec)
        write_samples(plan, writer)
    writer.add_teacher(teacher_spec(plan, codecs), {name: codec.side() for name, codec in codecs.items()})
    return OpenedArchive(plan, writer, codecs)


def write_samples(plan: Plan, writer: ArchiveWriter) -> None:
    """The sample index; refused where the archive has another one."""
    index = plan.index
    writer.write_samples(index.keys, index.labels, index.digests, index.sizes)


def refuse_other_teacher(path: Path, teacher: TeacherSpec, plan: Plan) -> None:
    """An archive goes on only with the very teacher, asked in the very way, that it was begun with."""
    try:
        refuse_difference(dict(teacher.model), plan.model, f"{path}: teacher {teacher.name!r}")
    except SpecMismatch as error:
        raise SpecMismatch(f"{error}, or add it under another --teacher-name") from None


def bytes_to_come(plan: Plan, writer: ArchiveWriter, archive: Archive) -> int:
    """What the missing blocks of the teacher will take, if they are like those that are there."""
    there = sum(entry.size for name, entry in archive.state.files.items() if name.startswith(f"{plan.part}/"))
    missing, per_view = len(writer.missing(plan.part)), writer.spec.blocks_per_view
    done = writer.spec.num_views * per_view - missing
    more = missing + (plan.spec.num_views - writer.spec.num_views) * per_view
    return there * more // done if done else 0
