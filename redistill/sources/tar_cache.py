"""Tars of servers in the cache folder, at most a stated number of bytes together, and parts of tars without a copy.

A tar is fetched as a whole and removed when the room is needed, the one that was used least recently first. A file in
the folder `streamed` is a whole tar, or a `.partial` that has the size of its tar from the beginning. So the sizes of
all files, of all processes of this machine together, are never more than the limit; those of a killed process are
removed by the next one that needs the room.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

from redistill_cache.addresses import Address
from redistill_cache.download import Transfer, download, say
from redistill_cache.errors import Refused
from redistill_cache.locks import locked, new_partial, remove_partials, unlocked
from redistill_cache.storage import LEFTOVER, LOCAL, disk_trouble
from redistill_cache.verified_files import cache_folder
from redistill_cache.wording import human_bytes

__all__ = ["FETCH_THREADS", "FetchThreads", "NoRoom", "Part", "TarCache", "TarChanged", "name_of"]

FETCH_THREADS = 4
STEP = 64 << 20  # reserved at a time for a tar whose server does not announce its length
POLL_S = 0.05


class NoRoom(Refused):
    """The tars that are in use take all the bytes that are allowed."""


class TarChanged(Refused):
    """A tar on a server is not the one that was indexed."""


class Part(NamedTuple):
    """Bytes of a tar at an address; `tar_bytes` is the size that the tar must have."""

    address: Address
    tar_bytes: int
    offset: int
    size: int


def name_of(address: Address) -> str:
    """A file name for what is at an address."""
    digest = hashlib.sha256(address.url.encode()).hexdigest()[:32]
    return f"{digest}-{PurePosixPath(address.name).name[-100:]}"


class TarCache:
    """The folder, with the limit of this process."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._forget_state()

    def _forget_state(self) -> None:
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.limit = state["limit"]
        self._forget_state()

    @property
    def folder(self) -> Path:
        return cache_folder() / "streamed"

    def path(self, address: Address) -> Path:
        """Where the tar is, if it is here."""
        return self.folder / name_of(address)

    def fetch(
        self,
        address: Address,
        size: int | None = None,
        *,
        keep: Callable[[], AbstractSet[str]] = frozenset,
        waits: bool = True,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Path:
        """The tar, fetched unless it is here. Where its size is known, it must have it.

        Tars with a name in `keep()` are not removed for it. Where there is no room now, it `waits`, or raises `NoRoom`.
        A request to stop does not end it: a run that stops at a safe point needs its images up to there.
        """
        target = self.path(address)

        def refuse_if_stopped() -> bool:
            if stopped():
                raise Refused("the download was stopped")
            return False

        with disk_trouble("write", target):
            if is_whole(target, size):
                return target
            LOCAL.make_directories(self.folder)
            with locked(target, f"fetches {address}", say, refuse_if_stopped):
                if is_whole(target, size):  # fetched by the process that held the lock
                    return target
                refuse_if_stopped()
                remove_partials(target)
                try:
                    with new_partial(target) as file:
                        sink = _TarSink(file, size, lambda total: self._reserve(file, total, keep, waits, sink))
                        sink.transfer = Transfer(address, sink)
                        download([sink.transfer], stopped=stopped)
                        file.truncate(sink.received)
                    # Not synced, since most tars are removed soon: every image is compared with its digest.
                    _touch(Path(file.name))
                    with self._room():  # who counts the files meanwhile would find neither of the two names
                        LOCAL.rename(Path(file.name), target)
                finally:
                    remove_partials(target)
        return target

    @contextmanager
    def holding(self, address: Address, stopped: Callable[[], bool]) -> Iterator[Path]:
        """The tar, which no thread of this process removes within the block."""
        name = name_of(address)
        with self._lock:
            self._held[name] += 1
        try:
            yield self.fetch(address, stopped=stopped)
        finally:
            with self._lock:
                self._held -= Counter([name])  # keeps what is above zero

    def touch(self, addresses: Sequence[Address]) -> None:
        """These are used now."""
        for address in addresses:
            with suppress(OSError):
                _touch(self.path(address))

    def remove(self, address: Address) -> None:
        with suppress(OSError):
            self.path(address).unlink()

    def read(self, parts: Sequence[Part]) -> list[bytes]:
        """The bytes of parts of tars that need not be here, several at a time."""
        sinks = [_PartSink(part) for part in parts]
        transfers = (Transfer(part.address, sink) for part, sink in zip(parts, sinks, strict=True))
        download(transfers)
        return [bytes(sink.data) for sink in sinks]

    # -- room ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def _room(self) -> Iterator[None]:
        """One thread of this machine at a time counts the files, or changes what their sizes add up to."""
        with self._lock, locked(self.folder, "makes room for a tar", say):
            yield

    def _reserve(
        self, file: BinaryIO, total: int, keep: Callable[[], AbstractSet[str]], waits: bool, sink: _TarSink
    ) -> None:
        """Let the unfinished file have this size."""
        if total > self.limit:
            raise NoRoom(
                f"a tar of at least {human_bytes(total)}, and --stream-cache is {human_bytes(self.limit)}; allow more"
            )
        while not self._has_room(file, total, keep):
            if not waits or sink.transfer.stop.is_set():
                raise NoRoom(f"--stream-cache {human_bytes(self.limit)} is full of tars in use; allow more")
            sink.transfer.waits, sink.transfer.last = True, time.monotonic()
            time.sleep(POLL_S)
        sink.transfer.waits, sink.transfer.last = False, time.monotonic()

    def _has_room(self, file: BinaryIO, total: int, keep: Callable[[], AbstractSet[str]]) -> bool:
        own = Path(file.name).name
        with self._room():
            in_use = keep() | self._held.keys()
            whole, used = [], total
            for path in self.folder.iterdir():
                if path.name == own or (path.name.endswith(LEFTOVER) and not _is_alive(path)):
                    continue
                with suppress(FileNotFoundError):
                    status = path.stat()
                    used += status.st_size
                    if not path.name.endswith(LEFTOVER) and path.name not in in_use:
                        whole.append((status.st_mtime_ns, status.st_size, path))
            for _, size, path in sorted(whole):
                if used <= self.limit:
                    break
                path.unlink(missing_ok=True)
                used -= size
            if used > self.limit:
                return False
            file.flush()
            os.truncate(file.fileno(), total)
            return True


def _touch(path: Path) -> None:
    """Of two files, the one that was touched later has the later time: the clock of the file system is too coarse."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def is_whole(target: Path, size: int | None) -> bool:
    try:
        found = target.stat().st_size
    except FileNotFoundError:
        return False
    if size in (None, found):
        return True
    target.unlink(missing_ok=True)
    return False


def _is_alive(partial: Path) -> bool:
    """Whether a process fetches it; if none does, it is removed."""
    with unlocked(partial.with_name(partial.name.rsplit(".", 2)[0])) as is_free:
        if is_free:
            partial.unlink(missing_ok=True)
        return not is_free


class FetchThreads:
    """Threads that fetch tars; at the end of the context, what they fetch is abandoned."""

    def __init__(self, count: int) -> None:
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(count, "tars")

    def submit(self, work: Callable[..., None], *arguments: object) -> Future[None]:
        return self._pool.submit(work, *arguments)

    def stopped(self) -> bool:
        return self._stop.is_set()

    def __enter__(self) -> FetchThreads:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)


class _TarSink:
    """A whole tar, of the size that is expected, in a file whose room is reserved before it is written."""

    verifies = False
    transfer: Transfer

    def __init__(self, file: BinaryIO, size: int | None, reserve: Callable[[int], None]) -> None:
        self.file, self.size, self.reserve = file, size, reserve
        self.done, self.received, self.reserved = False, 0, 0

    @property
    def wanted(self) -> tuple[int, int | None]:
        return self.received, None

    @property
    def end(self) -> int:
        return (1 << 62) if self.size is None else self.size + 1

    def announced(self, length: int) -> None:
        if self.size is not None and length != self.size:
            raise TarChanged(f"now has {length} bytes, and had {self.size} when it was indexed")
        self._make_room(length)

    def _make_room(self, total: int) -> None:
        if total > self.reserved:
            self.reserve(total)
            self.reserved = total

    def restart(self) -> None:
        self.file.seek(0)
        self.received = 0

    def take(self, position: int, piece: bytes) -> None:
        assert position == self.received
        end = position + len(piece)
        if self.size is not None and end > self.size:
            raise TarChanged(f"now has more than the {self.size} bytes that it had when it was indexed")
        if end > self.reserved:
            self._make_room(self.size or end + STEP)
        self.file.write(piece)
        self.received = end

    def ended(self) -> None:
        if self.size is not None and self.received != self.size:
            raise TarChanged(f"now has {self.received} bytes, and had {self.size} when it was indexed")
        self.done = True


class _PartSink:
    """Some bytes of a tar. Their digests are known, so parts of two versions are noticed."""

    verifies = True

    def __init__(self, part: Part) -> None:
        self.part, self.data, self.done = part, bytearray(), part.size == 0

    @property
    def wanted(self) -> tuple[int, int | None]:
        return self.part.offset + len(self.data), self.end

    @property
    def end(self) -> int:
        return self.part.offset + self.part.size

    def announced(self, length: int) -> None:
        if length != self.part.tar_bytes:
            raise TarChanged(f"now has {length} bytes, and had {self.part.tar_bytes} when it was indexed")

    def restart(self) -> None:
        self.data.clear()

    def take(self, position: int, piece: bytes) -> None:
        start = self.part.offset + len(self.data)
        self.data += piece[max(0, start - position) : max(0, self.end - position)]
        self.done = len(self.data) == self.part.size

    def ended(self) -> None:
        if not self.done:
            raise TarChanged("ends before an image that it had when it was indexed")
