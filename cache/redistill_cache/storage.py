"""Local files: everything that changes them, and reading those that are not trusted.

All changes that a writer makes go through `Files`, so that tests can substitute a failing disk or a simulated power cut
without changing the code under test. A file becomes visible with all of its bytes or not at all:

    write temporary -> fsync file -> rename -> fsync directory

Where one of several writers must win, the third step is a link, which fails when the name exists. File systems without
hard links (exFAT, FAT, many SMB shares) get a rename that replaces nothing, where Linux and the file system have it.
Both are one operation of the file system, so nothing is claimed that a dead process would have to give back: a process
that dies before the step leaves a temporary file, one that dies after it has won, and either step fails for a name that
the other has made. Where there is neither, writing an archive is refused: a file that is created exclusively and then
filled or replaced would show a part of itself, or block others, when its writer dies.

Files of an archive are untrusted: links and pipes are refused, and no more bytes are read than expected.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from redistill_cache import limits
from redistill_cache.errors import Damaged, Refused

__all__ = [
    "EXCLUSIVE_RENAME",
    "HARD_LINKS",
    "LOCAL",
    "Files",
    "disk_trouble",
    "file_sha256",
    "is_leftover",
    "open_regular",
    "read_if_there",
    "read_small",
    "refuse_full_disk",
    "walk_regular",
]


# -- writing ----------------------------------------------------------------------------------------------------------

LEFTOVER = ".partial"
# Each attempt fails only if another process seals the archive in the moment between two system calls; as many may as
# processes finish an archive together.
PUBLISH_ATTEMPTS = 64
# How one of several writers wins.
HARD_LINKS, EXCLUSIVE_RENAME = "hard links", "exclusive rename"
# What file systems answer that lack it (FAT, some network and FUSE mounts, Android; systems other than Linux).
LACKING = (errno.EPERM, errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EMLINK)
# Of renameat2: paths are not relative to an open folder; the new name must not exist.
AT_FDCWD, RENAME_NOREPLACE = -100, 1


class Files:
    """Operations on a local disk. Only tests subclass it."""

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
        """Give `old` a second name; FileExistsError when `new` exists, as for the loser of a race."""
        os.link(old, new, follow_symlinks=False)

    def rename_exclusively(self, old: Path, new: Path) -> None:
        """Rename; FileExistsError when `new` exists, as for the loser of a race."""
        rename_without_replacing(old, new)

    def remove(self, path: Path) -> None:
        path.unlink()

    def remove_directory(self, path: Path) -> None:
        path.rmdir()

    def make_directories(self, path: Path) -> None:
        """Create `path` and its missing parents, each made durable in its parent."""
        if path.is_dir():
            return
        self.make_directories(path.parent)
        try:
            self.make_directory(path)
        except FileExistsError:
            return  # another process created it in the meantime
        self.sync_directory(path.parent)

    def publish(self, path: Path, data: bytes | memoryview, *, exclusive: bool = False) -> None:
        """Make `path` hold `data`, durably and atomically. With `exclusive`, FileExistsError when it exists."""
        for attempts_left in reversed(range(PUBLISH_ATTEMPTS)):
            try:
                self._publish_once(path, data, exclusive)
                break
            except FileNotFoundError:  # `seal` of another process removed the temporary file as a leftover
                if not attempts_left or not path.parent.is_dir():
                    raise
        self.sync_directory(path.parent)

    def _publish_once(self, path: Path, data: bytes | memoryview, exclusive: bool) -> None:
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{LEFTOVER}")
        try:
            self.write(temporary, data)
            self.sync_file(temporary)
            if exclusive:
                if self._take_name(temporary, path) == HARD_LINKS:
                    with contextlib.suppress(FileNotFoundError):
                        self.remove(temporary)
            else:
                self.rename(temporary, path)
        except BaseException:
            self._discard(temporary)
            raise

    def exclusive_by(self, folder: Path) -> str | None:
        """How one of several writers wins in a folder: HARD_LINKS, or EXCLUSIVE_RENAME.

        `Refused` where its file system has neither, before any work is done that needs them. None if another error
        hides it, which is left to the operation that meets it: another process may sweep these files as leftovers.
        """
        first, second = (folder / f"name.{uuid.uuid4().hex}{LEFTOVER}" for _ in range(2))
        try:
            with contextlib.suppress(OSError):
                self.write(first, b"")
                return self._take_name(first, second)
            return None
        finally:
            self._discard(first)
            self._discard(second)

    def _take_name(self, old: Path, new: Path) -> str:
        """Give `old` the name `new`; FileExistsError when it exists. With HARD_LINKS, it keeps the other name too."""
        try:
            self.link(old, new)
            return HARD_LINKS
        except OSError as error:
            if error.errno not in LACKING:
                raise
            no_links = error
        try:
            self.rename_exclusively(old, new)
            return EXCLUSIVE_RENAME
        except OSError as error:
            if error.errno not in LACKING:
                raise
            raise Refused(
                f"the file system of {new.parent} supports neither hard links ({no_links.strerror}) nor a rename that "
                f"replaces nothing ({error.strerror}), and writing an archive needs one of them; choose an --out on "
                "another file system, and copy the archive when it is finished"
            ) from error

    def _discard(self, temporary: Path) -> None:
        """Best effort after a failure: readers ignore a leftover, and `seal` removes it."""
        with contextlib.suppress(OSError):
            self.remove(temporary)


def rename_without_replacing(old: Path, new: Path) -> None:
    """Linux's renameat2, which Python lacks; OSError with ENOSYS where the C library lacks it as well."""
    library = ctypes.CDLL(None, use_errno=True)
    code = errno.ENOSYS
    if hasattr(library, "renameat2"):
        if not library.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), RENAME_NOREPLACE):
            return
        code = ctypes.get_errno()
    raise OSError(code, os.strerror(code), str(old), None, str(new))


def is_leftover(path: Path) -> bool:
    """Whether this is the temporary file of a writer, running or dead."""
    return path.name.endswith(LEFTOVER)


LOCAL = Files()


# -- disk errors ------------------------------------------------------------------------------------------------------

# Advice for common errors; any other gets the general one.
ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "raise the quota or free some space",
    errno.EROFS: "choose a path that can be written",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
}


@contextlib.contextmanager
def disk_trouble(action: str, path: Path, after: str = "") -> Iterator[None]:
    """Turn an OSError into `Refused`: one line with the path and what to do. `after` is added to the advice."""
    try:
        yield
    except OSError as error:
        if isinstance(error, Refused):
            raise
        where = str(error.filename or path)
        if not where.startswith(str(path)):  # a parent folder: show the path that the user passed
            where = str(path)
        reason = error.strerror or str(error)
        advice = ADVICE.get(error.errno or 0, "check the disk and the path")
        raise Refused(f"cannot {action} {where}: {reason}; {advice}{after}") from error


def refuse_full_disk(path: Path, needed: int) -> None:
    """`Refused` where fewer than `needed` bytes are free on the disk of a folder that exists or is to be created."""
    folder = path
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise Refused(f"{path}: needs {needed} bytes, {free} are free; free some space, or choose another disk")


# -- reading ----------------------------------------------------------------------------------------------------------

HASH_PIECE = 1 << 20
MOST_FILES = 2 * limits.MAX_FILES


def open_regular(path: Path) -> int:
    """Open a regular file for reading. Links and pipes are refused; opening a pipe never blocks."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Refused(f"{path} is a symbolic link; archives hold regular files only") from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Refused(f"{path} is not a regular file; expected one, not a folder, pipe or device")
    return fd


def read_small(path: Path, cap: int) -> bytes:
    """The bytes of a metadata file, refused above `cap` before they are read."""
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > cap:
            raise Refused(f"{path}: {size} bytes, more than the limit of {cap} for this file; not read")
        data = file.read(cap + 1)
    if len(data) > cap:
        raise Refused(f"{path}: grew while it was read; stop the process that is writing it")
    return data


def read_if_there(path: Path, cap: int) -> bytes | None:
    try:
        return read_small(path, cap)
    except FileNotFoundError:
        return None


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
    """Relative paths of all files below `root`. `Refused`: links, pipes, devices, and unprintable names."""
    paths: set[str] = set()
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                path = f"{folder}{entry.name}"
                if not entry.name.isprintable() or path.count("/") > limits.MAX_FOLDER_DEPTH:
                    raise Refused(f"{root}: {ascii(path)[:200]} is not a valid file name in an archive; remove it")
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path + "/")
                elif entry.is_file(follow_symlinks=False):
                    paths.add(path)
                else:
                    kind = "a symbolic link" if entry.is_symlink() else "not a regular file"
                    raise Refused(f"{root / path} is {kind}; archives hold folders and regular files only")
                if len(paths) + len(folders) > most:
                    raise Refused(f"{root}: more than {most} files, expected fewer in an archive of this size")
    return paths
