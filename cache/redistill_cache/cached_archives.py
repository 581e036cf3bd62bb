"""The archives in the cache folder: what they take, when they were used last, and the removal of those used least.

REDISTILL_CACHE_LIMIT, such as 200GB, is the most that they may take together. Before an archive is fetched, those that
were used least are removed as far as it needs their room; whole ones, and none that a process uses or fetches. Without
it, nothing is removed unless the user does.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from redistill_cache import layout, limits
from redistill_cache.copies import Held, noted
from redistill_cache.download import Notify
from redistill_cache.errors import RedistillError, Refused, UsageError
from redistill_cache.journal import parse_header, sha256
from redistill_cache.locks import last_use, unused
from redistill_cache.storage import LOCAL, disk_trouble, read_small
from redistill_cache.verified_files import cache_folder
from redistill_cache.wording import human_bytes

__all__ = [
    "LIMIT",
    "CachedArchive",
    "cache_limit",
    "cached_archives",
    "make_room",
    "parse_bytes",
    "remove",
    "to_remove",
]

LIMIT = "REDISTILL_CACHE_LIMIT"
UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?) ?([KMGT]?)(I?)B?", re.IGNORECASE)


@dataclass(frozen=True)
class CachedArchive:
    """A copy in the cache folder."""

    folder: Path
    """Named after the id."""
    name: str
    held: Held | None
    """What is here; None if the copy is not finished."""
    views: int | None
    nbytes: int
    used: float
    """When, in seconds since 1970."""
    in_use: bool

    @property
    def id(self) -> str:
        return self.folder.name


def cached_archives() -> list[CachedArchive]:
    """All of them, the least used first."""
    root = cache_folder() / "archives"
    with disk_trouble("read", root):
        folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        found: list[CachedArchive] = []
        for folder in folders:
            with suppress(FileNotFoundError):  # another process removed it meanwhile
                found.append(_describe(folder))
    return sorted(found, key=lambda archive: (archive.used, archive.id))


def _describe(folder: Path) -> CachedArchive:
    copies = sorted(path for path in folder.iterdir() if path.is_dir())
    held = views = None
    for copy in copies:
        try:
            manifest = read_small(copy / layout.MANIFEST, limits.MAX_MANIFEST_BYTES)
            if sha256(manifest) == folder.name:
                header = parse_header(manifest, str(copy))
                views = header.views
                held = noted(copy, folder.name, views, header.views_by_teacher) or Held(views)
        except (OSError, RedistillError):  # not finished, or damaged: `redistill verify` tells
            continue
    with unused(folder) as is_free:
        in_use = not is_free
    name = copies[0].name if copies else ""
    return CachedArchive(folder, name, held, views, size_of(folder), last_use(folder), in_use)


def size_of(folder: Path) -> int:
    """The bytes of its files; of one that is removed meanwhile, none."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += Path(path, name).lstat().st_size
    return total


def parse_bytes(text: str, what: str) -> int:
    """A size such as 200GB or 1.5TiB."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{what}: expected a size such as 200GB or 1.5TiB, found {text[:40]!r}")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** UNITS[match[2].upper()])


def cache_limit() -> int | None:
    """What REDISTILL_CACHE_LIMIT says."""
    text = os.environ.get(LIMIT, "")
    return parse_bytes(text, LIMIT) if text else None


def to_remove(archives: Iterable[CachedArchive], excess: int) -> list[CachedArchive]:
    """The least used archives that take so many bytes, or all that are not in use."""
    chosen: list[CachedArchive] = []
    for archive in archives:
        if excess > 0 and not archive.in_use:
            chosen.append(archive)
            excess -= archive.nbytes
    return chosen


def remove(archive: CachedArchive) -> bool:
    """Remove an archive, unless a process uses or fetches it by now; whether it is gone."""
    with disk_trouble("remove", archive.folder), unused(archive.folder) as is_free:
        if is_free:
            for manifest in archive.folder.glob(f"*/{layout.MANIFEST}"):  # first: what is left is no archive
                LOCAL.remove(manifest)
            if archive.folder.exists():  # another process may have removed it
                shutil.rmtree(archive.folder)
        return is_free


def make_room(needed: int, folder: Path, what: str, notify: Notify) -> None:
    """Remove what was used least, so that `needed` more bytes in `folder` are within the limit.

    `Refused` if they are not even then, and nothing is removed.
    """
    most = cache_limit()
    if most is None or not needed:
        return
    archives = cached_archives()
    excess = sum(archive.nbytes for archive in archives) + needed - most
    others = [archive for archive in archives if archive.folder != folder]
    chosen = to_remove(others, excess)
    if sum(archive.nbytes for archive in chosen) < excess:
        kept = sum(archive.nbytes for archive in archives if archive not in chosen)
        raise Refused(
            f"{what}: needs {human_bytes(needed)} more, {LIMIT} is {human_bytes(most)}, and what is in use takes "
            f"{human_bytes(kept)} of it; raise it, or fetch to a folder of your own"
        )
    for archive in chosen:
        if remove(archive):
            size = human_bytes(archive.nbytes)
            notify(f"removed {archive.name} ({size}) from the cache folder, as {LIMIT} is {human_bytes(most)}")
