"""Reading files of an archive that nobody has vouched for: no links, no pipes, no more bytes than asked for."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from redistill_cache import limits
from redistill_cache.errors import Damaged, Refused

__all__ = ["disk_trouble", "file_sha256", "open_regular", "read_small", "walk_regular"]

HASH_PIECE = 1 << 20

# What to do about the errors users meet; anything else gets the general advice.
ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "raise the quota or free some space",
    errno.EROFS: "choose a path that can be written",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EMLINK: "the file system lacks hard links; choose another",
    errno.EOPNOTSUPP: "the file system lacks hard links; choose another",
}


@contextlib.contextmanager
def disk_trouble(action: str, path: Path, after: str = "") -> Iterator[None]:
    """Turn an OSError into one line that names the path and the way out. `after` is what holds once it is mended."""
    try:
        yield
    except OSError as error:
        if isinstance(error, Refused):
            raise
        where = str(error.filename or path)
        if not where.startswith(str(path)):  # a folder above it: the user knows it by the archive
            where = str(path)
        reason = error.strerror or str(error)
        advice = ADVICE.get(error.errno or 0, "check the disk and the path")
        raise Refused(f"cannot {action} {where}: {reason}; {advice}{after}") from error


def open_regular(path: Path) -> int:
    """Open a regular file for reading. Links are refused, and a pipe is refused instead of waited for."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Refused(f"{path} is a symbolic link; archives hold regular files only") from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Refused(f"{path} is not a regular file; archives hold regular files only")
    return fd


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = open_regular(path)
    try:
        yield fd
    finally:
        os.close(fd)


def read_small(path: Path, cap: int) -> bytes:
    """The bytes of a metadata file, refused above `cap` before they are read."""
    with opened(path) as fd:
        size = os.fstat(fd).st_size
        if size > cap:
            raise Refused(f"{path}: {size} bytes, more than the limit of {cap} for this file; not read")
        with os.fdopen(fd, "rb", closefd=False) as file:
            data = file.read(cap + 1)
    if len(data) > cap:
        raise Refused(f"{path}: grew while it was read; something else is writing there")
    return data


def file_sha256(fd: int, size: int, where: str) -> str:
    """SHA-256 of the first `size` bytes; `Damaged` when there are fewer."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(HASH_PIECE, max(size, 1))))
    done = 0
    while done < size:
        count = os.preadv(fd, [buffer[: size - done]], done)
        if count == 0:
            raise Damaged(f"{where}: the file ends at {done} bytes, expected {size}")
        digest.update(buffer[:count])
        done += count
    return digest.hexdigest()


def walk_regular(root: Path, *, most: int) -> set[str]:
    """Paths of all files below `root`, relative. Refused: anything but folders and regular files, and odd names."""
    found: set[str] = set()
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                path = f"{folder}{entry.name}"
                if not entry.name.isprintable() or path.count("/") > limits.MAX_FOLDER_DEPTH:
                    raise Refused(f"{root}: {ascii(path)[:200]} is not a name that an archive has; remove it")
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path + "/")
                elif entry.is_file(follow_symlinks=False):
                    found.add(path)
                else:
                    kind = "a symbolic link" if entry.is_symlink() else "not a regular file"
                    raise Refused(f"{root / path} is {kind}; archives hold folders and regular files only")
                if len(found) + len(folders) > most:
                    raise Refused(f"{root}: more than {most} files, not what an archive of this size holds")
    return found


MOST_FILES = 2 * limits.MAX_FILES
