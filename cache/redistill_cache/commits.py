"""Committing a block: which of several writers wins, and what a crash at any point leaves behind.

    1. stage    every shard is written, synced and named after its own hash:  <shard>.<sha256>.partial
    2. commit   the record, which lists these hashes, takes its name exclusively: exactly one writer succeeds
    3. settle   every staged shard is renamed to its final name

The record is a redo log: after step 2 the block is committed, and any process may run or repeat step 3. A writer that
dies before step 2 leaves partial files, which readers ignore; one that dies after it leaves a block that the next
writer settles. The files of a losing writer never get their final names, because only files with the hashes of the
winning record are renamed. No locks are used, so none can become stale; the file system only has to support hard links,
or a rename that replaces nothing (storage.py).

Between machines, on NFS: the server decides a link, whatever its clients have cached. A client may see a record late
(its folder's names and attributes are cached for seconds): it then computes a block again and loses. A record is synced
and closed before it gets its name, so whoever opens it reads all of it (close to open), and so with the files that it
lists, since they are synced before it. A reply that is lost makes a client repeat a link that has succeeded, which
fails then: the writer takes itself for the loser, finds its own record, and settles it. And whoever commits the last
block lists the folder after changing it, which makes its client ask the server: so at least one process finds nothing
missing, and seals. On SMB, a rename that replaces nothing is the server's own operation; its reply may be lost as well,
and then the record is written again and loses.
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
from redistill_cache.verified_files import stamp_of

__all__ = ["ArchiveFolders", "Commits"]

KEYS = "samples/key_bytes"  # its zarr.json depends on the keys, so it is written with them


@dataclass(frozen=True)
class ArchiveFolders:
    """The folders of an archive and its zarr.json files: created, made durable, cleaned up."""

    root: Path
    files: Files

    def write_metadata(self, spec: ArchiveSpec, teachers: Mapping[str, TeacherSpec]) -> None:
        """Create every folder and zarr.json of the specification; correct files are not rewritten."""
        for folder in (layout.BLOCKS, layout.NOTES, KEYS):
            self.files.make_directories(self.root / folder)
        for name, data in layout.expected_metadata(spec, teachers).items():
            path = self.root / name
            self.files.make_directories(path.parent)
            if not path.exists() or read_small(path, limits.MAX_METADATA_BYTES) != data:
                self.files.publish(path, data)

    def sync_folders(self, spec: ArchiveSpec, teachers: Mapping[str, TeacherSpec]) -> None:
        """Make every file name durable: a writer may have been killed between a rename and its sync."""
        names = [*layout.expected_metadata(spec, teachers), *map(layout.teacher_path, teachers)]
        folders = {Path(name).parent for name in names}
        folders |= {Path(layout.BLOCKS), Path(layout.NOTES), Path(KEYS)}
        folders |= {parent for folder in folders for parent in folder.parents}
        for folder in sorted(folders):
            self.files.sync_directory(self.root / folder)
        with contextlib.suppress(PermissionError):  # the parent folder may belong to another user
            self.files.sync_directory(self.root.parent)

    def sweep(self, finished: Collection[str] | None) -> None:
        """Remove the partial files of dead writers: of these files, whose blocks are committed, or (None) of any."""
        for name in walk_regular(self.root, most=4 * limits.MAX_FILES):
            path = self.root / name
            target = name.removesuffix(LEFTOVER).rpartition(".")[0]
            if is_leftover(path) and (finished is None or target in finished):
                with contextlib.suppress(FileNotFoundError):  # another process removed it
                    self.files.remove(path)


class Commits:
    """The commit records of one archive, and the three steps that write one."""

    def __init__(self, root: Path, files: Files) -> None:
        self._root = root
        self._files = files
        self._read: dict[Block, tuple[str, Record]] = {}  # records with the stamps of their files

    def stage(self, path: str, data: bytes) -> FileEntry:
        """Step 1 for one file."""
        entry = FileEntry(len(data), sha256(data))
        self._files.publish(self._staged(path, entry), data)
        return entry

    def commit(self, record: Record) -> bool:
        """Steps 2 and 3. False when another writer committed this block first; the archive then has its files."""
        try:
            self._files.publish(self.path(record.block), record.to_bytes(), exclusive=True)
        except FileExistsError:
            winner = self.load(record.block, record.identity, record.files)
            self.settle(winner)
            self._discard(record.files, winner.files)
            return False
        self.settle(record)
        return True

    def settle(self, record: Record) -> bool:
        """Step 3, or the rest of it. True when every file is in place and has its committed size."""
        folders = set()
        for path, entry in record.files.items():
            staged, final = self._staged(path, entry), self._root / path
            if not os.path.lexists(staged):
                continue
            try:
                self._files.rename(staged, final)
            except FileNotFoundError:
                continue  # another process renamed it in the meantime
            folders.add(final.parent)
        for folder in sorted(folders):
            self._files.sync_directory(folder)
        return self.in_place(record)

    def in_place(self, record: Record) -> bool:
        """Whether every file of a block has its final name and its size."""
        return all(self._is_final(path, entry) for path, entry in record.files.items())

    def _is_final(self, path: str, entry: FileEntry) -> bool:
        try:
            status = os.lstat(self._root / path)
        except FileNotFoundError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size == entry.size

    def path(self, block: Block) -> Path:
        """The file of the record of a block."""
        return self._root / block.record_path

    def is_committed(self, block: Block) -> bool:
        """Whether any process has committed this block by now."""
        return self.path(block).exists()

    def names(self) -> set[str]:
        """The relative paths of all records."""
        return {f"{BLOCKS}/{path.name}" for path in (self._root / BLOCKS).iterdir() if path.suffix == ".json"}

    def load(self, block: Block, identity: str, files: Collection[str]) -> Record:
        """The record of a block, which must list exactly these files. It is read again only where its file changed."""
        path = self.path(block)
        # Before it is read: if it is replaced in between, it is read once more next time.
        stamp = stamp_of(os.lstat(path))
        known, record = self._read.get(block, ("", None))
        if record is None or stamp != known or record.identity != identity:
            record = parse_record(read_small(path, limits.MAX_RECORD_BYTES), block, identity, str(path))
            self._read[block] = stamp, record
        if record.files.keys() != set(files):
            raise Damaged(f"{path}: the commit record of {block} does not list the files of its arrays; it was edited")
        return record

    def forget(self, block: Block) -> None:
        """Remove the record of a block whose files are missing, so that it is written again."""
        path = self.path(block)
        self._files.remove(path)
        self._files.sync_directory(path.parent)

    def _staged(self, path: str, entry: FileEntry) -> Path:
        return self._root / f"{path}.{entry.sha256}{LEFTOVER}"

    def _discard(self, losing: Mapping[str, FileEntry], committed: Mapping[str, FileEntry]) -> None:
        """Remove the staged files of the losing writer; those equal to committed files have been renamed."""
        for path, entry in losing.items():
            staged = self._staged(path, entry)
            if committed.get(path) != entry and os.path.lexists(staged):
                self._files.remove(staged)
