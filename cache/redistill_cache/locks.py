"""One process of a machine at a time prepares, fetches or packs something; and the temporary files of who holds a lock.

A lock is held by an open file in the cache folder, so that it ends with its process. It says which process that is.
The processes that use a copy in the cache folder share another lock of it, so that it is not removed meanwhile.
"""

from __future__ import annotations

import fcntl
import glob
import multiprocessing
import os
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from redistill_cache import layout
from redistill_cache.download import POLL_S, Notify
from redistill_cache.errors import Refused, UsageError
from redistill_cache.journal import sha256
from redistill_cache.storage import LEFTOVER, LOCAL
from redistill_cache.verified_files import cache_folder

__all__ = [
    "DOCUMENTS",
    "keep",
    "last_use",
    "locked",
    "new_partial",
    "publish_partial",
    "remove_partials",
    "sweep",
    "sweep_unfinished",
    "unused",
]

DOCUMENTS = "redistill-documents-"  # folders that a fetch removes
WAITING_S = 60.0  # between two messages about the process that is waited for
LONGEST_S = 24 * 3600.0  # longer than any step that is done under a lock
USED = "used"  # a file beside a copy in the cache folder, touched with every use: times of access are often not kept
USE = "use"  # of a lock that processes share


def new_partial(target: Path) -> BinaryIO:
    return target.with_name(f"{target.name}.{uuid.uuid4().hex}{LEFTOVER}").open("xb")


def publish_partial(file: BinaryIO, target: Path) -> None:
    LOCAL.sync_file(Path(file.name))
    LOCAL.rename(Path(file.name), target)
    LOCAL.sync_directory(target.parent)


def remove_partials(target: Path) -> None:
    """Of a file whose lock is held."""
    for partial in target.parent.glob(f"{glob.escape(target.name)}.*{LEFTOVER}"):
        partial.unlink(missing_ok=True)


def sweep() -> None:
    """Remove what killed fetches left in the cache folder; what a running process fetches is locked."""
    with suppress(OSError):
        for folder in (cache_folder() / "archives").glob("*"):
            manifests = folder.glob(f"*/{layout.MANIFEST}")
            if all((manifest.parent / layout.COPY_NAME).exists() for manifest in manifests):  # none is whole
                with unlocked(folder) as is_free:
                    if is_free:
                        sweep_unfinished(folder)
        for partial in (cache_folder() / "tars").glob(f"*{LEFTOVER}"):
            with unlocked(partial.with_name(partial.name.rsplit(".", 2)[0])) as is_free:
                if is_free:
                    partial.unlink(missing_ok=True)


def sweep_unfinished(folder: Path) -> None:
    """Remove temporary files and folders of an archive whose lock is held; its files that are whole stay."""
    for path in folder.glob(f"{DOCUMENTS}*"):
        shutil.rmtree(path, ignore_errors=True)
    for partial in folder.rglob(f"*{LEFTOVER}"):
        partial.unlink(missing_ok=True)


@contextmanager
def locked(target: Path, doing: str, notify: Notify, until: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """One process of this machine does something with `target`; the others wait for it, and say for whom.

    They wait for the lock, or `until` this is true: then the block needs no lock.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # it would wait for the process it helps
        raise UsageError(
            "this process was started to help with a step, and runs the whole script again; put what the script does "
            "under \"if __name__ == '__main__':\""
        )
    with lock_file(target) as file:
        began = time.monotonic()
        notified = began + 1 - WAITING_S  # not at once: a sweep holds a lock for a moment
        while not (has_lock := acquire(file)) and not until():
            now = time.monotonic()
            if now - notified >= WAITING_S:
                notified = now
                file.seek(0)
                holder = file.read(200).decode(errors="replace") or "another process"
                if now - began > LONGEST_S:
                    raise Refused(f"{holder} has been busy for {LONGEST_S / 3600:.0f} hours ({doing}); end it")
                notify(f"waiting for {holder}, which {doing}")
            time.sleep(POLL_S)
        if has_lock:
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            file.flush()
        yield


@contextmanager
def unlocked(target: Path) -> Iterator[bool]:
    """Whether no process fetches something; none begins to within the block."""
    with lock_file(target) as file:
        yield acquire(file)


def lock_file(target: Path) -> BinaryIO:
    path = cache_folder() / "locks" / sha256(str(target).encode())[:40]
    LOCAL.make_directories(path.parent)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # opening a pipe does not wait
    file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise Refused(f"{path} is not a regular file; remove it")
    return file


def acquire(file: BinaryIO, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# -- copies in use ----------------------------------------------------------------------------------------------------

_kept: dict[Path, int] = {}
"""The copies that this process uses until it ends, as whoever has an archive may read it: a descriptor of each."""


def keep(folder: Path) -> None:
    """From now on this process uses the copy in this folder of the cache folder; waits while it is being removed."""
    with suppress(OSError):  # a cache folder that cannot be written to, so nothing is removed from it either
        if folder not in _kept:
            with lock_file(folder / USE) as file:
                while not acquire(file, fcntl.LOCK_SH):
                    time.sleep(POLL_S)
                _kept[folder] = os.dup(file.fileno())  # the lock is that of both
        (folder / USED).touch()


@contextmanager
def unused(folder: Path) -> Iterator[bool]:
    """Whether no process uses or fetches the copy in this folder; none begins to within the block."""
    with unlocked(folder) as is_free, lock_file(folder / USE) as file:
        yield is_free and acquire(file)


def last_use(folder: Path) -> float:
    """In seconds since 1970."""
    stamp = folder / USED
    return (stamp if stamp.exists() else folder).stat().st_mtime
