"""Check every file of an archive, and move damaged blocks aside so that they can be rewritten."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from redistill_cache import layout
from redistill_cache.codecs.stats import check_stats, merge_stats
from redistill_cache.commits import Commits
from redistill_cache.copies import refuse_partial_copy
from redistill_cache.errors import Damaged, RedistillError
from redistill_cache.layout import Block, all_blocks
from redistill_cache.open_state import ArchiveState, check_metadata_on_disk, committed_file, read_state
from redistill_cache.rows import open_signal
from redistill_cache.spec_files import read_root, read_teachers
from redistill_cache.storage import LOCAL, MOST_FILES, Files, disk_trouble, is_leftover, walk_regular
from redistill_cache.verified_files import HashedFile

__all__ = ["DamagedFile", "VerifyReport", "damaged_files", "quarantine", "verify"]

VerifyProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class DamagedFile:
    """A file that differs from the committed one. `block` is the block that it belongs to, if any."""

    path: str
    block: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.path} {self.reason}" + (f" ({self.block})" if self.block else "")


@dataclass(frozen=True)
class VerifyReport:
    """The result of `redistill verify`; `ok` of an archive that is sealed and whole."""

    ok: bool
    checked_files: int
    damaged: tuple[DamagedFile, ...]
    hashed_files: int = 0
    """Of the checked files, those that were hashed now: all of them with `full`."""
    hashed_bytes: int = 0
    missing_blocks: int | None = None
    """Blocks that an unfinished archive still lacks, so 0 before it is sealed; None for a sealed archive."""
    canaries_per_view: int | None = None
    """0: no images can be compared with the archive; None if it could not be opened."""
    views: int | None = None
    """Those that are here; None if the archive could not be opened."""
    sealed_views: int | None = None
    """Those of the archive: more for a copy that holds some views only. None for an unfinished archive."""
    lacking: Mapping[str, int] = field(default_factory=dict)
    """Of a copy that holds some teachers only: the views of those with fewer than others, 0 where none is here."""
    has_signature: bool | None = None
    """Whether a file that says to be a signature of it lies beside its manifest; None for an unfinished archive."""
    alignment: dict[str, Any] | None = None

    @property
    def is_partial_copy(self) -> bool:
        return bool((self.views or 0) < (self.sealed_views or 0) or self.lacking)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"damaged": [asdict(item) for item in self.damaged]}


def verify(path: str | Path, *, full: bool = False, progress: VerifyProgress | None = None) -> VerifyReport:
    """Check the presence, size and SHA-256 of every file of an archive.

    A file that was verified on this machine and has not changed since is not hashed again, unless `full`, which also
    decodes every row of every teacher once. Of an unsealed archive the committed blocks are checked. An archive that
    cannot be opened is reported as one damaged file.
    """
    path = Path(path)
    with disk_trouble("read", path):
        try:
            state = read_state(path, allow_partial=True)
            if state.id is None:  # only a manifest has the hashes of the metadata
                check_metadata_on_disk(state)
        except Damaged as error:
            return VerifyReport(False, 0, (DamagedFile(str(path), None, str(error)),))
        hashed: list[HashedFile] = []
        damaged = damaged_files(state, full=full, progress=progress, hashed=hashed)
        damaged = damaged or _damaged_stats(state)
        if full and not damaged:
            damaged = _damaged_rows(state, progress)
    missing = None if state.id is not None else _missing_blocks(state)
    return VerifyReport(
        ok=not damaged and missing is None,
        checked_files=len(state.files),
        damaged=tuple(damaged),
        hashed_files=len(hashed),
        hashed_bytes=sum(file.entry.size for file in hashed),
        missing_blocks=missing,
        canaries_per_view=state.spec.canaries_per_view,
        views=state.num_views,
        sealed_views=state.sealed_views or None,
        lacking=state.lacking,
        has_signature=None if state.id is None else (path / layout.SIGNATURE).is_file(),
    )


def _damaged_stats(state: ArchiveState) -> list[DamagedFile]:
    """The manifest, if its statistics are not those of the commit records together."""
    if state.id is None:
        return []
    commits, root = Commits(state.path, LOCAL), read_root(state.path)
    for name, document in read_teachers(state.path, list(state.teachers), root).items():
        arrays = layout.teacher_arrays(state.spec, document.spec).values()
        try:
            records = []
            for block in layout.part_blocks(state.spec, f"teachers/{name}", state.views_of(name)):
                files = [array.shard_path(block.view, block.index) for array in arrays]
                records.append(commits.load(block, document.identity, files))
                check_stats(document.spec, records[-1].stats or {}, len(block.rows))
            merged = merge_stats(document.spec, [record.stats for record in records])
        except Damaged as error:
            return [DamagedFile(layout.BLOCKS, None, f"has a record that does not agree with its block: {error}")]
        if merged != state.stats[name] and not state.is_partial_copy:
            reason = f"does not state the statistics of teacher {name!r} that its commit records add up to"
            return [DamagedFile(layout.MANIFEST, None, reason)]
    return []


def _damaged_rows(state: ArchiveState, progress: VerifyProgress | None) -> list[DamagedFile]:
    """Blocks of teachers that cannot be decoded, or that decode to values that no teacher has."""
    damaged = []
    for teacher in state.teachers.values():
        part = f"teachers/{teacher.name}"
        held = list(filter(state.holds, layout.part_blocks(state.spec, part, state.views_of(teacher.name))))
        for signal in teacher.signals:
            stored = None
            for done, block in enumerate(held, start=1):
                try:
                    stored = stored or open_signal(state, teacher, signal)
                    stored.check(block)
                except Damaged as error:
                    damaged.append(DamagedFile(f"{part}/{signal.name}", str(block), f"cannot be used: {error}"))
                    if stored is None:
                        break
                if progress is not None:
                    progress(done, len(held))
    return damaged


def _missing_blocks(state: ArchiveState) -> int:
    return sum(not state.holds(block) for block, _ in all_blocks(state.spec, state.teachers, state.num_views))


def damaged_files(
    state: ArchiveState,
    *,
    full: bool,
    progress: VerifyProgress | None = None,
    hashed: list[HashedFile] | None = None,
) -> list[DamagedFile]:
    """Every file that is missing, differs in size or hash from the committed one, or does not belong to the archive.

    Files that were hashed and match are appended to `hashed`.
    """
    blocks = _blocks_by_file(state)
    damaged = []
    hashed = [] if hashed is None else hashed
    for done, name in enumerate(state.files, start=1):
        try:
            with committed_file(state, name, hashing="always" if full else "once", hashed=hashed) as (_, problem):
                reason = problem
        except RedistillError as error:  # a link, or a file cut short while it was read
            reason = str(error)
        if reason:
            damaged.append(DamagedFile(name, blocks.get(name), reason))
        if progress is not None:
            progress(done, len(state.files))
    state.verified_files.add(hashed)
    return damaged + _extra_files(state)


def _blocks_by_file(state: ArchiveState) -> dict[str, str]:
    """The block of every file that belongs to one."""
    blocks: dict[str, str] = {}
    for block, names in all_blocks(state.spec, state.teachers, state.num_views, state.teacher_views):
        if state.holds(block):
            blocks.update((name, str(block)) for name in [block.record_path, *names])
    return blocks


def _extra_files(state: ArchiveState) -> list[DamagedFile]:
    """Files of a sealed archive that are neither in its manifest nor part of an unfinished addition."""
    if state.id is None:
        return []
    known = state.listed.keys() | {layout.MANIFEST, layout.SIGNATURE}
    if state.is_partial_copy:
        known = known | {layout.COPY}
    sealed = tuple(f"teachers/{name}/" for name in state.stats)
    extra = []
    for name in sorted(walk_regular(state.path, most=MOST_FILES) - known):
        folder = name.rpartition("/")[0]
        advisory = folder in (layout.NOTES, layout.QUARANTINE) or folder.startswith(layout.QUARANTINE)
        unfinished = name.startswith(f"{layout.BLOCKS}/teachers.") or (
            name.startswith("teachers/") and not name.startswith(sealed)
        )
        # views, or views of a teacher, that are being added
        pending_view = state.num_views < state.spec.num_views or bool(state.extended or state.teacher_views)
        if not (advisory or unfinished or pending_view or is_leftover(Path(name))):
            extra.append(DamagedFile(name, None, "is not in the manifest; remove it"))
    return extra


def quarantine(path: str | Path, damaged: tuple[DamagedFile, ...], *, files: Files = LOCAL) -> list[str]:
    """Move damaged blocks aside, so that running the command again rewrites them. Returns the names of the blocks.

    The archive is unsealed first. Files that belong to no block (metadata) are rewritten when the archive is resumed.
    """
    path = Path(path)
    with disk_trouble("quarantine in", path):
        refuse_partial_copy(path, "moving damaged blocks aside")
        state = read_state(path, allow_partial=True)
        names = {file.block for file in damaged if file.block}
        every_block = all_blocks(state.spec, state.teachers, state.num_views, state.teacher_views)
        blocks = [(block, shards) for block, shards in every_block if str(block) in names]
        if state.id is not None and blocks:
            files.make_directories(path / layout.QUARANTINE)
            files.rename(path / layout.MANIFEST, path / layout.OLD_MANIFEST)  # it has the licence and the citation
            files.sync_directory(path / layout.QUARANTINE)
            files.sync_directory(path / layout.JOURNAL)
        for block, shards in blocks:
            _set_aside(state, block, shards, files)
    return [str(block) for block, _ in blocks]


def _set_aside(state: ArchiveState, block: Block, shards: list[str], files: Files) -> None:
    """Move the files of a block. The record is moved first: without it the block is not committed."""
    folder = state.path / layout.QUARANTINE / Path(block.record_path).stem
    files.make_directories(folder)
    for name in [block.record_path, *shards]:
        source = state.path / name
        if os.path.lexists(source):
            files.rename(source, folder / name.replace("/", "."))
            files.sync_directory(source.parent)
            files.sync_directory(folder)
