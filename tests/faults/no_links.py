"""A disk without hard links, such as exFAT; and one that has no exclusive rename either, such as a bucket."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from redistill_cache.storage import Files

__all__ = ["NoLinks"]


class NoLinks(Files):
    def __init__(self, code: int = errno.EPERM, *, renames: bool = True) -> None:
        self.code, self.renames = code, renames

    def link(self, old: Path, new: Path) -> None:
        raise OSError(self.code, os.strerror(self.code), str(old), None, str(new))

    def rename_exclusively(self, old: Path, new: Path) -> None:
        if not self.renames:  # as renameat2 answers where a file system does not know the flag
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(old), None, str(new))
        super().rename_exclusively(old, new)
