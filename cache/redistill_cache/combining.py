"""Archives made of the blocks of others: `merge`, and `skeleton`, an archive without blocks that another lab can fill.

Labs that share the work of one archive on separate disks start from one skeleton: then samples, codecs and identity are
the same, and the merged archive has the bytes, and the id, that one run would have written. Files are copied as they
are. What an archive has before its first block appears at once; after that, blocks are committed as by any writer. So a
command that was killed leaves nothing or an unfinished archive, and the same command continues.
"""

from __future__ import annotations

import glob
import itertools
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from redistill_cache import layout, limits
from redistill_cache.commits import Commits
from redistill_cache.copies import refuse_partial_copy
from redistill_cache.download import Notify, say
from redistill_cache.errors import Damaged, Refused, SpecMismatch, UsageError
from redistill_cache.journal import Record, parse_header, sha256
from redistill_cache.layout import Block, all_blocks
from redistill_cache.locks import locked
from redistill_cache.open_state import VERIFY_ADVICE, ArchiveState, committed_file, read_committed, read_state
from redistill_cache.reader import Archive
from redistill_cache.spec import TERMS, ArchiveSpec, TeacherSpec
from redistill_cache.spec_files import read_root, read_teachers
from redistill_cache.storage import LEFTOVER, LOCAL, Files, disk_trouble, read_small, refuse_full_disk
from redistill_cache.verify import verify
from redistill_cache.writer import ArchiveWriter, first_difference, shown

__all__ = ["Merge", "merge", "plan_merge", "read_stored", "skeleton"]

Progress = Callable[[int, int], None]
# `environment` is only recorded, and that of the first archive counts; an archive may lack the last views of another.
MAY_DIFFER = ("environment", "num_views")


# -- the archives that are combined -----------------------------------------------------------------------------------


class Source:
    """An archive as the blocks that are committed in it, whether it is sealed or not. It is only read."""

    def __init__(self, path: Path) -> None:
        self.path = path = path.absolute()
        self._commits = Commits(path, LOCAL)
        with disk_trouble("read", path):
            state = read_state(path, allow_partial=True)
            self.sealed = None if state.id is None else state
            # Of a sealed archive also what was committed since: views and teachers that are being added.
            self.state = state if state.id is None else read_committed(path, self._commits, settle=False)
            root = read_root(path)
            documents = read_teachers(path, self.state.teachers, root)
        root.require_writable(path)
        for document in documents.values():
            document.require_writable(path)
        self.spec, self.teachers = root.spec, self.state.teachers
        self._identities = {None: root.identity} | {name: document.identity for name, document in documents.items()}
        if self.sealed is not None:
            self._check_sealed(self.sealed)

    def _check_sealed(self, sealed: ArchiveState) -> None:
        """`Damaged` unless the commit records have every block of the manifest, with the same files."""
        for block, _ in all_blocks(sealed.spec, sealed.teachers, sealed.num_views, sealed.teacher_views):
            if not self.state.holds(block):
                raise Damaged(f"{self.path}: files of {block} are missing or cut short; {VERIFY_ADVICE}")
        for name, entry in self.state.files.items():
            if sealed.files.get(name, entry) != entry:
                raise Damaged(f"{self.path}: manifest and commit records have different hashes of {name}")

    def record(self, block: Block, files: Collection[str]) -> Record:
        """The commit record of a block that is here."""
        teacher = block.part.split("/")[1] if block.part.startswith("teachers/") else None
        with disk_trouble("read", self.path):
            return self._commits.load(block, self._identities[teacher], files)

    def copy(self, block: Block, files: Collection[str], writer: ArchiveWriter) -> None:
        """Commit a block as it is here, unless it is committed already."""
        record = self.record(block, files)
        writer.write_encoded(block, ((name, read_stored(self.state, name)) for name in files), record.stats)

    def views_of(self, part: str) -> int:
        """How many views of a part this archive has once it is finished; 0 without any block of it."""
        held = [view for name, view, _ in self.state.committed or () if name == part]
        name = part.removeprefix("teachers/")
        if held and self.sealed is not None and name in self.sealed.teachers:
            sealed = self.sealed.views_of(name)
            return sealed if max(held) < sealed else self.spec.num_views
        return self.spec.num_views if held else 0

    def terms(self) -> dict[str, str] | None:
        """Licence and citation as this archive offers them; None of an unfinished one, which has those of its spec."""
        if self.sealed is not None:
            return {name: getattr(self.sealed.spec, name) for name in TERMS}
        manifest = self.edited_terms()
        return None if manifest is None else dict(parse_header(manifest, str(self.path)).terms)

    def edited_terms(self) -> bytes | None:
        """The manifest that has the licence and the citation as they were edited, if they were."""
        for path in (self.path / layout.MANIFEST, self.path / layout.OLD_MANIFEST):
            try:
                manifest = read_small(path, limits.MAX_MANIFEST_BYTES)
            except FileNotFoundError:
                continue
            return manifest if parse_header(manifest, str(path)).terms else None
        return None


def read_stored(state: ArchiveState, name: str) -> bytes:
    """A file of an archive as it was committed."""
    path, data = state.path / name, b""
    with disk_trouble("read", path), committed_file(state, name, hashing="never") as (fd, problem):
        if not problem:
            with os.fdopen(fd, "rb", closefd=False) as file:
                data = file.read(state.files[name].size)
    if problem or sha256(data) != state.files[name].sha256:
        raise Damaged(f"{path} {problem or 'does not have the SHA-256 that was committed'}; {VERIFY_ADVICE}")
    return data


# -- whether they fit together ----------------------------------------------------------------------------------------


def _refuse_unlike(first: Source, other: Source) -> None:
    """`SpecMismatch` with the first field that differs, of the archive or of a teacher that both have."""
    _refuse_difference(first, other, "", first.spec.to_json(), other.spec.to_json())
    for name in sorted(first.teachers.keys() & other.teachers.keys()):
        one, two = (source.teachers[name].to_json() for source in (first, other))
        _refuse_difference(first, other, f"teacher {name}: ", one, two)
    terms, others = first.terms(), other.terms()
    if terms is not None and others is not None:
        _refuse_difference(first, other, "", terms, others)


def _refuse_difference(
    first: Source, other: Source, where: str, one: Mapping[str, object], two: Mapping[str, object]
) -> None:
    if difference := first_difference(one, two, MAY_DIFFER):
        field, *values = difference
        raise _unlike(first, other, where + field, *map(shown, values))


def _unlike(first: Source, other: Source, field: str, one: object, two: object) -> SpecMismatch:
    return SpecMismatch(f"the archives do not fit together: {field} is {one} in {first.path}, {two} in {other.path}")


def _refuse_other_block(first: Source, other: Source, block: Block, files: Sequence[str]) -> None:
    """`SpecMismatch` unless both archives have the same bytes in this block."""
    one, two = first.record(block, files), other.record(block, files)
    if (one.files, one.stats) == (two.files, two.stats):
        return
    if block.part == "samples":
        _refuse_other_samples(first, other)
    differing = [f"bytes in {name}" for name in files if one.files[name] != two.files[name]]
    raise SpecMismatch(
        f"the archives do not fit together: {block} has other {[*differing, 'statistics'][0]} in {other.path} than in "
        f"{first.path}; let both labs start from one skeleton, and use the same versions on the same kind of device"
    )


def _refuse_other_samples(first: Source, other: Source) -> None:
    one, two = Archive(first.state), Archive(other.state)
    rows = np.arange(first.spec.num_samples)
    for row in np.flatnonzero(~one.keys.equal_at(rows, two.keys, rows))[:1].tolist():
        raise _unlike(first, other, f"the key of sample {row}", ascii(one.keys[row]), ascii(two.keys[row]))
    for name in ("digests", "labels", "sizes"):
        left, right = getattr(one, name), getattr(two, name)
        for row in np.flatnonzero((left != right).reshape(len(rows), -1).any(1))[:1].tolist():
            values = (bytes(a[row]).hex() if name == "digests" else a[row].tolist() for a in (left, right))
            raise _unlike(first, other, f"the {name.removesuffix('s')} of sample {row} ({one.keys[row]!a})", *values)


# -- an archive before its first block --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """What an archive has before its first block: the specification, the samples, and teachers with their side data."""

    spec: ArchiveSpec
    samples: Source
    teachers: Mapping[str, Source]
    """For each teacher, an archive that has it."""
    terms: bytes | None
    """A manifest with the licence and the citation as they were edited."""

    def blocks(self) -> Iterator[tuple[Block, list[str], Source]]:
        specs = {name: source.teachers[name] for name, source in self.teachers.items()}
        for block, files in all_blocks(self.spec, specs, 0):
            yield block, files, self.teachers[block.part.split("/")[1]] if "/" in block.part else self.samples

    def write(self, out: Path, files: Files) -> None:
        """Create the archive, with everything or not at all."""
        for old in out.parent.glob(f"{glob.escape(out.name)}.{'[0-9a-f]' * 32}{LEFTOVER}"):  # of a killed process
            shutil.rmtree(old)
        folder = out.with_name(f"{out.name}.{uuid.uuid4().hex}{LEFTOVER}")
        writer = ArchiveWriter.create(folder, self.spec, files=files)
        for name, source in self.teachers.items():
            writer.declare_teacher(source.teachers[name])
        for block, names, source in self.blocks():
            source.copy(block, names, writer)
        if self.terms is not None:
            files.make_directories(folder / layout.QUARANTINE)
            files.publish(folder / layout.OLD_MANIFEST, self.terms)
        files.rename(folder, out)
        files.sync_directory(out.parent)

    def is_at(self, out: Path) -> Source | None:
        """The archive at `out`, if one with this base was begun there. `Refused` if there is anything else."""
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return None
        if not (out / "zarr.json").exists():
            raise Refused(f"{out} holds files and is not an archive; choose another path")
        existing = Source(out)
        for source in (self.samples, *self.teachers.values()):
            _refuse_unlike(source, existing)
        for block, files, source in self.blocks():
            if not existing.state.holds(block):
                raise Refused(f"{out} is another archive: it does not have the {block.part}; choose another path")
            _refuse_other_block(source, existing, block, files)
        if existing.spec.num_views != self.spec.num_views:
            raise _unlike(self.samples, existing, "num_views", self.spec.num_views, existing.spec.num_views)
        return existing


def skeleton(archive: Path, out: Path, *, notify: Notify = say, files: Files = LOCAL) -> ArchiveSpec:
    """Write an archive with the samples and the teachers of another one and without blocks, to be written elsewhere.

    Nothing is done where it exists already.
    """
    source, out = Source(archive), out.absolute()
    base = Base(source.spec, source, dict.fromkeys(source.teachers, source), source.edited_terms())
    with disk_trouble("write", out), locked(out, f"writes {out}", notify):
        if base.is_at(out) is None:
            refuse_full_disk(out, sum(source.state.files[name].size for _, names, _ in base.blocks() for name in names))
            files.make_directories(out.parent)
            base.write(out, files)
    return source.spec


# -- merging ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merge:
    """Archives that fit together, and what is left to do for one archive with the blocks of all."""

    sources: tuple[Source, ...]
    base: Base
    out: Path
    blocks: int
    """Blocks of the merged archive that an archive has."""
    missing: int
    """Blocks that none has."""
    first_missing: Block | None
    total_bytes: int
    bytes_to_copy: int

    @property
    def teachers(self) -> dict[str, TeacherSpec]:
        return {name: source.teachers[name] for name, source in self.base.teachers.items()}


def plan_merge(archives: Sequence[Path], out: Path) -> Merge:
    """Check that archives fit together, and what is left to do. Nothing is written.

    `SpecMismatch` names the first field in which two differ, or the block of which they have different bytes.
    """
    out = out.absolute()
    if len(archives) < 2:
        raise UsageError(f"expected at least two archives to merge, found {len(archives)}")
    if out.resolve() in [path.resolve() for path in archives]:
        raise UsageError(f"{out} is one of the archives that are merged; choose another --out")
    for path in archives:
        refuse_partial_copy(path, "merging it")
    sources = tuple(map(Source, archives))
    for one, two in itertools.combinations(sources, 2):
        _refuse_unlike(one, two)
    base = _base_of(sources)
    existing = base.is_at(out)
    plan = Merge(sources, base, out, 0, 0, None, 0, 0)
    blocks = missing = total = to_copy = 0
    first_missing = None
    views = _views_of_parts(plan)
    for block, files, holders in _blocks(plan):
        for other in holders[1:]:
            _refuse_other_block(holders[0], other, block, files)
        if holders:
            size = sum(holders[0].state.files[name].size for name in files)
            blocks, total = blocks + 1, total + size
            if existing is not None and existing.state.holds(block):
                _refuse_other_block(holders[0], existing, block, files)
            else:
                to_copy += size
        elif block.view < views.get(block.part, 1):
            missing += 1
            first_missing = first_missing or block
    return replace(
        plan,
        blocks=blocks,
        missing=missing,
        first_missing=first_missing,
        total_bytes=total,
        bytes_to_copy=to_copy,
    )


def _base_of(sources: Sequence[Source]) -> Base:
    teachers: dict[str, Source] = {}
    for source in sources:
        teachers = dict.fromkeys(source.teachers, source) | teachers
    if len(teachers) > limits.MAX_TEACHERS:
        raise Refused(f"the archives have {len(teachers)} teachers, more than the limit of {limits.MAX_TEACHERS}")
    spec = replace(sources[0].spec, num_views=max(source.spec.num_views for source in sources))
    layout.check_extent(spec, {name: source.teachers[name] for name, source in teachers.items()})
    edited = (manifest for source in sources if (manifest := source.edited_terms()) is not None)
    return Base(spec, sources[0], dict(sorted(teachers.items())), next(edited, None))


def _blocks(plan: Merge) -> Iterator[tuple[Block, list[str], list[Source]]]:
    """Every block of the merged archive with its files, and the archives that have it."""
    for block, files in all_blocks(plan.base.spec, plan.teachers, plan.base.spec.num_views):
        yield block, files, [source for source in plan.sources if source.state.holds(block)]


def _views_of_parts(plan: Merge) -> dict[str, int]:
    """How many views the merged archive has of each part: those of the archive that has the most."""
    spec, teachers = plan.base.spec, [f"teachers/{name}" for name in plan.teachers]
    views = {part: max(source.views_of(part) for source in plan.sources) or spec.num_views for part in teachers}
    shared = max(views.values(), default=spec.num_views)
    return views | dict.fromkeys(layout.parts(spec, {}), shared)


def merge(plan: Merge, *, progress: Progress | None = None, notify: Notify = say, files: Files = LOCAL) -> str | None:
    """Copy the blocks, and seal the archive if none is missing. Returns its id, or None if it is unfinished."""
    out = plan.out
    with disk_trouble("write", out), locked(out, f"merges to {out}", notify):
        refuse_full_disk(out, plan.bytes_to_copy)
        if plan.base.is_at(out) is None:
            files.make_directories(out.parent)
            plan.base.write(out, files)
        writer, done = ArchiveWriter.resume(out, plan.base.spec, files=files), 0
        for block, names, holders in _blocks(plan):
            if not holders:
                continue
            holders[0].copy(block, names, writer)
            done += sum(holders[0].state.files[name].size for name in names)
            if progress is not None:
                progress(done, plan.total_bytes)
        identity = None if plan.missing else writer.seal(complete=True)
    damaged = verify(out).damaged
    if damaged:
        raise Damaged(f"{out}: {len(damaged)} files are damaged after they were copied, the first: {damaged[0]}")
    return identity
