"""The file layer: the only place of this package that changes a disk.

Everything the writer does to a file system goes through one small object, so that tests can put a failing disk
or a simulated power cut in its place and the code under test stays exactly the code that ships.

A file becomes visible whole or not at all:

    write temporary -> fsync file -> rename (or link, to lose against an earlier writer) -> fsync directory
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

__all__ = ["LOCAL", "Files", "is_leftover"]

LEFTOVER = ".partial"


class Files:
    """Primitive operations on a local disk. Tests subclass it; nothing else does."""

    def make_directory(self, path: Path) -> None:
        path.mkdir()

    def write(self, path: Path, data: bytes | memoryview) -> None:
        """Create `path` with `data`. O_EXCL and O_NOFOLLOW: never through a link, never over a file."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o666), "wb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]

    def sync_file(self, path: Path) -> None:
        self._sync(path, os.O_RDONLY)

    def sync_directory(self, path: Path) -> None:
        self._sync(path, os.O_RDONLY | os.O_DIRECTORY)

    @staticmethod
    def _sync(path: Path, flags: int) -> None:
        fd = os.open(path, flags | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        """Replace `new` atomically."""
        old.replace(new)

    def link(self, old: Path, new: Path) -> None:
        """Give `old` a second name; FileExistsError when `new` is taken: the loser of a race learns it here."""
        os.link(old, new, follow_symlinks=False)

    def remove(self, path: Path) -> None:
        path.unlink()

    # -- compositions -------------------------------------------------------------------------------------------

    def make_directories(self, path: Path) -> None:
        """Create `path` and its missing parents, each made durable in its parent."""
        if path.is_dir():
            return
        self.make_directories(path.parent)
        try:
            self.make_directory(path)
        except FileExistsError:
            return  # another process made it between the two lines
        self.sync_directory(path.parent)

    def publish(self, path: Path, data: bytes | memoryview, *, exclusive: bool = False) -> None:
        """Make `path` hold `data`, durably and atomically. With `exclusive`, FileExistsError when it exists."""
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{LEFTOVER}")
        try:
            self.write(temporary, data)
            self.sync_file(temporary)
            if exclusive:
                self.link(temporary, path)
                self.remove(temporary)
            else:
                self.rename(temporary, path)
        except BaseException:
            self._discard(temporary)
            raise
        self.sync_directory(path.parent)

    def _discard(self, temporary: Path) -> None:
        """Best effort after a failure: a leftover is ignored by readers and swept by the next writer."""
        try:
            self.remove(temporary)
        except OSError:
            return


def is_leftover(path: Path) -> bool:
    """Is this the temporary file of a writer that died?"""
    return path.name.endswith(LEFTOVER)


LOCAL = Files()
