"""Locks between the processes of one machine, in the cache folder. The kernel releases those of a process that dies."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from redistill_cache.errors import Refused
from redistill_cache.journal import sha256
from redistill_cache.storage import LOCAL
from redistill_cache.verified_files import cache_folder

__all__ = ["locked", "unlocked"]

POLL_S = 0.1
WAITING_S = 60.0  # between two messages about the process that is waited for
LONGEST_S = 24 * 3600.0  # longer than any step that is done under a lock


@contextmanager
def locked(
    target: Path, doing: str, notify: Callable[[str], None], until: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """One process of this machine does something with `target`; the others wait for it, and say for whom.

    They wait for the lock, or `until` this is true: then the block needs no lock.
    """
    with _lock_file(target) as file:
        began = time.monotonic()
        notified = began + 1 - WAITING_S  # not at once: a lock may be held for a moment only
        while not (has_lock := _acquire(file)) and not until():
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
    """Whether no process holds the lock; none takes it within the block."""
    with _lock_file(target) as file:
        yield _acquire(file)


def _lock_file(target: Path) -> BinaryIO:
    path = cache_folder() / "locks" / sha256(str(target).encode())[:40]
    LOCAL.make_directories(path.parent)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # opening a pipe does not wait
    file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise Refused(f"{path} is not a regular file; remove it")
    return file


def _acquire(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
