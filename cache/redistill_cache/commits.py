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

import os
import stat
from collections.abc import Collection, Mapping
from pathlib import Path

from redistill_cache import limits
from redistill_cache.errors import Damaged
from redistill_cache.files import LEFTOVER, Files
from redistill_cache.journal import FileEntry, Record, parse_record, sha256
from redistill_cache.layout import BLOCKS, Block
from redistill_cache.storage import read_small

__all__ = ["Commits"]


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
