"""Is every file of an archive the one that was committed? And if not: which blocks must be made again."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from redistill_cache import layout
from redistill_cache.errors import Damaged, RedistillError, Refused
from redistill_cache.journal import FileEntry
from redistill_cache.layout import Block, all_blocks
from redistill_cache.open_state import ArchiveState, check_metadata_on_disk, read_state
from redistill_cache.storage import (
    LOCAL,
    MOST_FILES,
    Files,
    disk_trouble,
    file_sha256,
    is_leftover,
    open_regular,
    walk_regular,
)

__all__ = ["DamagedFile", "VerifyReport", "damaged_files", "quarantine", "verify"]

VerifyProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class DamagedFile:
    """A file that is not what was committed. `block` names what it belongs to, where that is known."""

    path: str
    block: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.path} {self.reason}" + (f" ({self.block})" if self.block else "")


@dataclass(frozen=True)
class VerifyReport:
    """What `redistill verify` found."""

    ok: bool
    checked_files: int
    damaged: tuple[DamagedFile, ...]
    alignment: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"damaged": [asdict(item) for item in self.damaged]}


def verify(path: str | Path, *, full: bool = False, progress: VerifyProgress | None = None) -> VerifyReport:
    """Check every file of an archive: its presence, size and SHA-256.

    A file that this machine verified before and that has not changed since is not hashed again, unless `full`.
    An archive that is not sealed is checked as far as it is committed. What cannot even be opened is one finding.
    """
    path = Path(path)
    with disk_trouble("read", path):
        try:
            contents = read_state(path, allow_partial=True)
            if contents.id is None:  # no manifest has the hashes of the metadata
                check_metadata_on_disk(contents)
        except Damaged as error:
            return VerifyReport(False, 0, (DamagedFile(str(path), None, str(error)),))
        damaged = damaged_files(contents, full=full, progress=progress)
    return VerifyReport(not damaged, len(contents.files), tuple(damaged))


def damaged_files(contents: ArchiveState, *, full: bool, progress: VerifyProgress | None = None) -> list[DamagedFile]:
    """Every file that is missing, of another size, of another hash, or that nothing accounts for."""
    owner = _owners(contents)
    damaged = []
    verified: list[tuple[str, FileEntry, int]] = []
    for done, (name, entry) in enumerate(contents.files.items()):
        reason = _problem(contents, name, entry, full, verified)
        if reason:
            damaged.append(DamagedFile(name, owner.get(name), reason))
        if progress is not None:
            progress(done + 1, len(contents.files))
    contents.stamps.remember(verified)
    return damaged + _strangers(contents)


def _problem(
    contents: ArchiveState, name: str, entry: FileEntry, full: bool, verified: list[tuple[str, FileEntry, int]]
) -> str | None:
    path = contents.path / name
    try:
        fd = open_regular(path)
    except FileNotFoundError:
        return "is missing"
    except Refused as error:
        return f"is not a file: {error}"
    try:
        found = os.fstat(fd)
        if found.st_size != entry.size:
            return f"has {found.st_size} bytes, {entry.size} were committed"
        if not full and contents.stamps.verified(name, entry, found.st_mtime_ns):
            return None
        if file_sha256(fd, entry.size, str(path)) != entry.sha256:
            return "does not have the SHA-256 that was committed"
        verified.append((name, entry, found.st_mtime_ns))
        return None
    except RedistillError as error:  # cut short while it was read
        return str(error)
    finally:
        os.close(fd)


def _owners(contents: ArchiveState) -> dict[str, str]:
    """The block of every file that belongs to one."""
    owners: dict[str, str] = {}
    for block, names in all_blocks(contents.spec, contents.teachers, contents.num_views):
        if contents.holds(block):
            owners.update((name, str(block)) for name in [block.record_path, *names])
    return owners


def _strangers(contents: ArchiveState) -> list[DamagedFile]:
    """Files in a sealed archive that its manifest does not name, and that no unfinished addition explains."""
    if contents.id is None:
        return []
    known = contents.files.keys() | {layout.MANIFEST}
    mine = tuple(f"teachers/{name}/" for name in contents.teachers)
    found = []
    for name in sorted(walk_regular(contents.path, most=MOST_FILES) - known):
        folder = name.rpartition("/")[0]
        advisory = folder in (layout.NOTES, layout.QUARANTINE) or folder.startswith(layout.QUARANTINE)
        unfinished = name.startswith(f"{layout.BLOCKS}/teachers.") or (
            name.startswith("teachers/") and not name.startswith(mine)
        )
        pending_view = contents.num_views < contents.spec.num_views  # a sealed prefix that is being continued
        if not (advisory or unfinished or pending_view or is_leftover(Path(name))):
            found.append(DamagedFile(name, None, "is not in the manifest; remove it"))
    return found


def quarantine(path: str | Path, damaged: tuple[DamagedFile, ...], *, files: Files = LOCAL) -> list[str]:
    """Move damaged blocks aside, so that the command that wrote them makes them again. Returns the blocks moved.

    The archive is unsealed first. Files that belong to no block (metadata) are made again by resuming.
    """
    path = Path(path)
    with disk_trouble("quarantine in", path):
        contents = read_state(path, allow_partial=True)
        names = {item.block for item in damaged if item.block}
        every = all_blocks(contents.spec, contents.teachers, contents.num_views)
        blocks = [(block, shards) for block, shards in every if str(block) in names]
        if contents.id is not None and blocks:
            files.remove(path / layout.MANIFEST)
            files.sync_directory(path / layout.JOURNAL)
        for block, shards in blocks:
            _set_aside(contents, block, shards, files)
    return [str(block) for block, _ in blocks]


def _set_aside(contents: ArchiveState, block: Block, shards: list[str], files: Files) -> None:
    """The record first: without it the block is not committed, whatever happens to its shards."""
    folder = contents.path / layout.QUARANTINE / Path(block.record_path).stem
    files.make_directories(folder)
    for name in [block.record_path, *shards]:
        source = contents.path / name
        if os.path.lexists(source):
            files.rename(source, folder / name.replace("/", "."))
            files.sync_directory(source.parent)
            files.sync_directory(folder)
