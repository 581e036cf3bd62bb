"""A disk whose Nth operation fails, once or permanently, so that every error path is reached (as in SQLite's tests)."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from redistill_cache.storage import Files

__all__ = ["FAILURES", "FailingDisk", "Failure"]


@dataclass(frozen=True)
class Failure:
    """How the Nth operation fails."""

    code: int
    persistent: bool = False  # every later operation fails as well: the disk was removed or became read-only
    late: bool = False  # the operation was performed, but an error was returned: a lost reply

    def __str__(self) -> str:
        extent = "from-then-on" if self.persistent else "once"
        return f"{errno.errorcode[self.code]}-{'late-' if self.late else ''}{extent}"


FAILURES = (
    Failure(errno.ENOSPC),
    Failure(errno.ENOSPC, persistent=True),
    Failure(errno.EIO),
    Failure(errno.EIO, persistent=True),
    Failure(errno.EIO, late=True),
)


class FailingDisk(Files):
    """Fails operation number `nth` (from 1). `operations` counts all calls, `failed` those that failed."""

    def __init__(self, nth: int, failure: Failure) -> None:
        self.nth = nth
        self.failure = failure
        self.operations = 0
        self.failed = 0

    def _do(self, path: Path, operation: Callable[[], None], half: Callable[[], None] | None = None) -> None:
        """Run `operation`, or fail; a failing operation first runs `half`, if any, to leave partial data behind."""
        self.operations += 1
        fails = self.operations >= self.nth if self.failure.persistent else self.operations == self.nth
        if not fails:
            return operation()
        self.failed += 1
        if self.failure.late:
            operation()
        elif half is not None:
            half()
        raise OSError(self.failure.code, os.strerror(self.failure.code), str(path))

    def make_directory(self, path: Path) -> None:
        self._do(path, lambda: super(FailingDisk, self).make_directory(path))

    def write(self, path: Path, data: bytes | memoryview) -> None:
        whole = super().write
        prefix = memoryview(data)[: len(data) // 2]
        self._do(path, lambda: whole(path, data), half=lambda: whole(path, prefix))

    def sync_file(self, path: Path) -> None:
        self._do(path, lambda: super(FailingDisk, self).sync_file(path))

    def sync_directory(self, path: Path) -> None:
        self._do(path, lambda: super(FailingDisk, self).sync_directory(path))

    def rename(self, old: Path, new: Path) -> None:
        self._do(old, lambda: super(FailingDisk, self).rename(old, new))

    def link(self, old: Path, new: Path) -> None:
        self._do(old, lambda: super(FailingDisk, self).link(old, new))

    def rename_exclusively(self, old: Path, new: Path) -> None:
        self._do(old, lambda: super(FailingDisk, self).rename_exclusively(old, new))

    def remove(self, path: Path) -> None:
        self._do(path, lambda: super(FailingDisk, self).remove(path))

    def remove_directory(self, path: Path) -> None:
        self._do(path, lambda: super(FailingDisk, self).remove_directory(path))
