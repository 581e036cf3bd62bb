"""What this machine has hashed before: a file verified once is not hashed again while it stays the same file.

One small text file per archive under the user's cache folder, one line per verified file: its SHA-256, size,
modification time and path. A file that changed in any of them is hashed again. Lines are appended whole; a line that
cannot be read (a crash, an edit) counts as never written, so that the worst a bad stamp file can do is cost time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path

from redistill_cache.journal import FileEntry

__all__ = ["VerifiedFiles", "cache_folder"]

LINE = re.compile(r"([0-9a-f]{64}) (\d{1,18}) (\d{1,20}) (\S+)")
# Not a path of any archive: the line that says that the sizes of all files were checked against this manifest.
WHOLE = "*"


def cache_folder() -> Path:
    """Where things that can be made again are kept: $XDG_CACHE_HOME/redistill, or ~/.cache/redistill."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():  # anything else is to be ignored, says its specification
        return base / "redistill"
    try:
        return Path.home() / ".cache/redistill"
    except RuntimeError:  # a container whose user has no home: nothing can be kept
        return Path(os.devnull) / "redistill"


class VerifiedFiles:
    """The stamps of one archive at one place. Losing them is harmless, so trouble with the cache folder is ignored."""

    def __init__(self, archive: Path, identity: str) -> None:
        name = hashlib.sha256(f"{archive.resolve()}\n{identity}".encode()).hexdigest()
        self._path = cache_folder() / "verified" / f"{name[:40]}.txt"
        self._known: dict[str, tuple[str, int, int]] | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {"_path": self._path}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self._path, self._known, self._lock = state["_path"], None, threading.Lock()

    def verified(self, path: str, entry: FileEntry, mtime_ns: int) -> bool:
        """Was this file, as it is now, found to have this hash?"""
        with self._lock:
            return self._load().get(path) == (entry.sha256, entry.size, mtime_ns)

    def remember(self, found: Iterable[tuple[str, FileEntry, int]]) -> None:
        """These files have these hashes."""
        lines = []
        with self._lock:
            known = self._load()
            for path, entry, mtime_ns in found:
                stamp = (entry.sha256, entry.size, mtime_ns)
                if known.get(path) == stamp:
                    continue
                known[path] = stamp
                lines.append(f"{entry.sha256} {entry.size} {mtime_ns} {path}\n")
            with contextlib.suppress(OSError):  # a full, read-only or missing home: hash again next time
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a", encoding="ascii") as file:
                    file.write("".join(lines))

    def _load(self) -> dict[str, tuple[str, int, int]]:
        if self._known is None:
            self._known = {}
            with contextlib.suppress(OSError, UnicodeDecodeError):
                for line in self._path.read_text(encoding="ascii").splitlines():
                    match = LINE.fullmatch(line)
                    if match:
                        self._known[match[4]] = (match[1], int(match[2]), int(match[3]))
        return self._known
