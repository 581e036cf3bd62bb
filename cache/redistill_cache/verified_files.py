"""The user's cache folder, and in it the files of archives that were verified on this machine.

A file whose SHA-256 was checked once is not hashed again until it changes. Each archive has one small text file with a
line per verified file: its SHA-256, size, stamp and path. The stamp is its modification time, its change time and its
inode: a program can set the first back, not the second. A disk that loses bits changes none of them, so only
`verify --full`, which does not read this cache, finds that.

Lines are appended whole, and one that does not parse (after a crash or an edit) is ignored. Whoever can write to the
cache folder can make a changed file pass for a verified one: it is as trusted as the user's other files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from platformdirs import user_cache_path

from redistill_cache.journal import FileEntry

__all__ = ["HashedFile", "VerifiedFiles", "cache_folder", "stamp_of"]

LINE = re.compile(r"([0-9a-f]{64}) (\d{1,18}) (\d{1,20}\.\d{1,20}\.\d{1,20}) (\S+)")
NO_STAMP = "0.0.0"
# Path of the line that records that the sizes of all files were checked against this manifest; no file has this name.
WHOLE = "*"


def cache_folder() -> Path:
    """Where data that can be recomputed is cached: $XDG_CACHE_HOME/redistill, or ~/.cache/redistill on Linux."""
    with contextlib.suppress(RuntimeError):  # a container whose user has no home
        path = user_cache_path("redistill", appauthor=False)
        if path.is_absolute():
            return path
    return Path(os.devnull) / "redistill"  # every write fails, so nothing is cached


class HashedFile(NamedTuple):
    """A file with the size and hash that it had when it had this stamp."""

    path: str
    entry: FileEntry
    stamp: str = NO_STAMP


def stamp_of(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns}.{status.st_ctime_ns}.{status.st_ino}"


class VerifiedFiles:
    """The verified files of one archive at one path. They may be lost, so errors of the cache folder are ignored."""

    def __init__(self, archive: Path, identity: str) -> None:
        name = hashlib.sha256(f"{archive.resolve()}\n{identity}".encode()).hexdigest()
        self._path = cache_folder() / "verified" / f"{name[:40]}.txt"
        self._known: dict[str, tuple[str, int, str]] = {}
        self._read = 0  # bytes of the file
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {"_path": self._path}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self._path, self._known, self._read, self._lock = state["_path"], {}, 0, threading.Lock()

    def __contains__(self, file: HashedFile) -> bool:
        """Whether the file had this hash when it was verified, and has not changed since."""
        value = (file.entry.sha256, file.entry.size, file.stamp)
        with self._lock:
            return self._known.get(file.path) == value or self._load().get(file.path) == value

    def add(self, files: Iterable[HashedFile]) -> None:
        lines = []
        with self._lock:
            known = self._load()
            for path, entry, stamp in files:
                value = (entry.sha256, entry.size, stamp)
                if known.get(path) == value:
                    continue
                known[path] = value
                lines.append(f"{entry.sha256} {entry.size} {stamp} {path}\n")
            with contextlib.suppress(OSError):  # a full, read-only or missing home: hashed again next time
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a", encoding="ascii") as file:
                    file.write("".join(lines))

    def _load(self) -> dict[str, tuple[str, int, str]]:
        """With what other processes have added since the last time."""
        with contextlib.suppress(OSError):
            if self._path.stat().st_size == self._read:
                return self._known
            with self._path.open("rb") as file:
                file.seek(self._read)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]  # the last line may be on its way
            self._read += len(whole)
            for line in whole.decode("ascii", "replace").splitlines():
                match = LINE.fullmatch(line)
                if match:
                    self._known[match[4]] = (match[1], int(match[2]), match[3])
        return self._known
