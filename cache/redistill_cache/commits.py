"""Committing a block: which of several writers wins, and what a crash at any moment leaves behind.

    1. stage    every shard is written, synced and named after its own hash:  <shard>.<sha256>.partial
    2. commit   the record, which names these hashes, is linked into place: exactly one writer succeeds
    3. settle   every staged shard is renamed to its final name

The record is a redo log: from step 2 on the block is committed, and step 3 can be done, or finished, by anybody and any
number of times. A writer that dies before step 2 leaves partial files that nobody believes; one that dies after it
leaves a block that the next writer settles. A loser's bytes never reach a final name, because only files with the
hashes of the winning record are renamed. No locks, hence no stale ones; hard links are the only thing asked of the
file system.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from redistill_cache import layout, limits
from redistill_cache.errors import Damaged
from redistill_cache.journal import FileEntry, Record, parse_record, sha256
from redistill_cache.layout import BLOCKS, Block
from redistill_cache.spec import ArchiveSpec, TeacherSpec
from redistill_cache.storage import LEFTOVER, Files, is_leftover, read_small, walk_regular

__all__ = ["ArchiveFolders", "Commits"]


# -- tree -------------------------------------------------------------------------------------------------------------
#
# The folders of an archive as its writers keep them: complete, durable, swept.

KEYS = "samples/key_bytes"  # its zarr.json depends on what is written


@dataclass(frozen=True)
class ArchiveFolders:
    """The tree of one archive on one disk."""

    root: Path
    files: Files

    def write_metadata(self, spec: ArchiveSpec, teachers: Mapping[str, TeacherSpec]) -> None:
        """Make every folder and zarr.json what the specification says; files that are right are left alone."""
        for folder in (layout.BLOCKS, layout.NOTES, KEYS):
            self.files.make_directories(self.root / folder)
        for name, data in layout.expected_metadata(spec, dict(teachers)).items():
            path = self.root / name
            self.files.make_directories(path.parent)
            if not path.exists() or read_small(path, limits.MAX_METADATA_BYTES) != data:
                self.files.publish(path, data)

    def sync_folders(self, spec: ArchiveSpec, teachers: Mapping[str, TeacherSpec]) -> None:
        """Make every name durable: a writer killed between a rename and its sync has left names that only look so."""
        names = [*layout.expected_metadata(spec, dict(teachers)), *map(layout.teacher_path, teachers)]
        folders = {Path(name).parent for name in names}
        folders |= {Path(layout.BLOCKS), Path(layout.NOTES), Path(KEYS)}
        folders |= {parent for folder in folders for parent in folder.parents}
        for folder in sorted(folders):
            self.files.sync_directory(self.root / folder)
        with contextlib.suppress(PermissionError):  # the archive's own name; its folder may be somebody else's
            self.files.sync_directory(self.root.parent)

    def sweep(self) -> None:
        """Remove what dead writers left half-written; for when every block is committed, so that nobody needs it."""
        for name in walk_regular(self.root, most=4 * limits.MAX_FILES):
            path = self.root / name
            if is_leftover(path):
                with contextlib.suppress(FileNotFoundError):  # another process sweeps as well
                    self.files.remove(path)


# -- commits ----------------------------------------------------------------------------------------------------------


class Commits:
    """The commit records of one archive, and the three steps that make one."""

    def __init__(self, root: Path, files: Files) -> None:
        self._root = root
        self._files = files

    def stage(self, path: str, data: bytes) -> FileEntry:
        """Step 1 for one file."""
        entry = FileEntry(len(data), sha256(data))
        self._files.publish(self._staged(path, entry), data)
        return entry

    def commit(self, record: Record) -> bool:
        """Steps 2 and 3. False when another writer committed this block first; its files are then the block."""
        try:
            self._files.publish(self._root / record.block.record_path, record.to_bytes(), exclusive=True)
        except FileExistsError:
            winner = self.load(record.block, record.identity, record.files)
            self.settle(winner)
            self._discard(record.files, winner.files)
            return False
        self.settle(record)
        return True

    def settle(self, record: Record) -> bool:
        """Step 3, from wherever it was left. True when every file is in place with its size."""
        folders = set()
        for path, entry in record.files.items():
            staged, final = self._staged(path, entry), self._root / path
            if not os.path.lexists(staged):
                continue
            try:
                self._files.rename(staged, final)
            except FileNotFoundError:
                continue  # another process settled it between the two lines
            folders.add(final.parent)
        for folder in sorted(folders):
            self._files.sync_directory(folder)
        return self.in_place(record)

    def in_place(self, record: Record) -> bool:
        """Whether every file of a block has its final name, and its size."""
        return all(self._is_final(path, entry) for path, entry in record.files.items())

    def _is_final(self, path: str, entry: FileEntry) -> bool:
        try:
            found = os.lstat(self._root / path)
        except FileNotFoundError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == entry.size

    def names(self) -> set[str]:
        """Paths of all records there are now."""
        return {f"{BLOCKS}/{path.name}" for path in (self._root / BLOCKS).iterdir() if path.suffix == ".json"}

    def load(self, block: Block, identity: str, files: Collection[str]) -> Record:
        """The record of a block that has exactly these files."""
        path = self._root / block.record_path
        record = parse_record(read_small(path, limits.MAX_RECORD_BYTES), block, identity, str(path))
        if record.files.keys() != set(files):
            raise Damaged(f"{path}: the commit record of {block} does not list the files of its arrays; it was edited")
        return record

    def forget(self, block: Block) -> None:
        """Undo the commit of a block whose files are gone, so that it is written again."""
        path = self._root / block.record_path
        self._files.remove(path)
        self._files.sync_directory(path.parent)

    def _staged(self, path: str, entry: FileEntry) -> Path:
        return self._root / f"{path}.{entry.sha256}{LEFTOVER}"

    def _discard(self, mine: Mapping[str, FileEntry], winners: Mapping[str, FileEntry]) -> None:
        """Remove what this loser staged; files equal to the winner's are settled by now."""
        for path, entry in mine.items():
            staged = self._staged(path, entry)
            if winners.get(path) != entry and os.path.lexists(staged):
                self._files.remove(staged)
