"""Downloads of files: no more bytes than expected, and an end when no more of them come.

Threads receive, the caller's thread watches them. So a server that sends nothing or an endless header ends the download
whatever the protocol is, and Ctrl-C ends it at once. A slow server does not: its bytes are waited for as long as some
come. The threads are daemons: none of them keeps a process alive.

What may pass is tried again: 408, 425, 429, 5xx, a connection that breaks, bytes with another hash. The waits grow, or
are those that the server asks for with Retry-After. A file that broke off is continued where it ended, where the
server can do that.
"""

from __future__ import annotations

import email.utils
import errno
import hashlib
import http.client
import io
import logging
import os
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import BinaryIO, Protocol

from redistill_cache.addresses import Address, redact
from redistill_cache.errors import Damaged, RedistillError, Refused
from redistill_cache.journal import FileEntry
from redistill_cache.protocols import Answer, Interrupted, RemoteFile, opened, status_of
from redistill_cache.wording import human_bytes, one_line

__all__ = ["FileSink", "Notify", "Sink", "Transfer", "Unreachable", "download", "is_offline", "read_address", "say"]

PIECE = 1 << 20
BEGINNING = 64  # bytes that show whether a file is a web page
CONNECTIONS = 8
# How long a file that makes no progress is tried again: of a server that answers, and of one that never did.
PATIENCE_S, FIRST_PATIENCE_S = 300.0, 20.0
WAIT_S, LONGEST_WAIT_S = 1.0, 30.0  # before another attempt; doubled each time
# What a server may ask for with Retry-After: at once, and in all before a file makes progress again.
ASKED_S, ASKED_IN_ALL_S = 300.0, 900.0
NOTICED_S = 5.0  # a wait that the user is told of
BUCKET_ATTEMPTS = 3  # packages for buckets try again themselves
WRONG_BODIES = 3  # with another hash than expected, before a file is called damaged
MOST_TIMES = 4  # bytes of all attempts together, in sizes of the file
TOO_BUSY = (408, 425, 429)
# A rate that the user is told of: of all connections of a download together, in a minute.
SLOW_BYTES_PER_S = 10 << 10
REQUEST_BYTES = 16 << 10  # what a file counts in addition: requests and the disk take time, however small it is
MINUTE_S = 60.0
POLL_S = 0.1
# Errors of the local disk, not of the network.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
OFFLINE = "REDISTILL_OFFLINE"

Notify = Callable[[str], None]
say: Notify = logging.getLogger("redistill_cache").warning
spread = random.Random().uniform  # machines that were refused together do not come back together


class Unreachable(Refused):
    """The server is away."""


def is_offline() -> bool:
    """Whether no server may be contacted: `--offline`, or REDISTILL_OFFLINE=1."""
    return os.environ.get(OFFLINE, "0") not in ("", "0")


# -- where the bytes go -----------------------------------------------------------------------------------------------


class Sink(Protocol):
    """What takes the bytes of one file at an address. It may want some ranges of them only."""

    @property
    def done(self) -> bool: ...

    @property
    def verifies(self) -> bool:
        """Whether parts of two versions of a file would be noticed."""

    @property
    def wanted(self) -> tuple[int, int | None]:
        """The range that is wanted next; without an end, up to that of the file."""

    @property
    def end(self) -> int:
        """No byte from this position on is taken."""

    def announced(self, length: int) -> None:
        """The file has this length, says its server."""

    def restart(self) -> None:
        """The bytes come from the first one again: what is not verified yet is dropped."""

    def take(self, position: int, piece: bytes) -> None:
        """The next bytes of the file, the first one at `position`. `Damaged` when they are known to be wrong."""

    def ended(self) -> None:
        """The file has no more bytes. `Damaged` when they are not those that are expected."""


class FileSink:
    """A whole file, with the size and hash that are expected, or at most `most` bytes.

    One byte more is taken, so that too many are noticed. `arrived` is called once the file is right.
    """

    def __init__(
        self,
        file: BinaryIO,
        most: int,
        *,
        most_announced: int | None = None,
        expected: FileEntry | None = None,
        arrived: Callable[[], None] = lambda: None,
    ) -> None:
        self.file = file
        self.most = most
        self.most_announced = most_announced  # replaces `most` where the server announces the length
        self.expected = expected
        self.done = False
        self._arrived = arrived
        self._digest, self._size = hashlib.sha256(), 0

    @property
    def verifies(self) -> bool:
        return self.expected is not None

    @property
    def wanted(self) -> tuple[int, int | None]:
        return self._size, None

    @property
    def end(self) -> int:
        return self.most + 1

    def announced(self, length: int) -> None:
        if self.most_announced is None:
            return
        self.most = self.most_announced
        if length > self.most:
            raise Refused(f"needs {length} bytes, {self.most} are free; free some space")

    def restart(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self._digest, self._size = hashlib.sha256(), 0

    def take(self, position: int, piece: bytes) -> None:
        assert position == self._size
        self._digest.update(piece)
        self._size += self.file.write(piece)

    def ended(self) -> None:
        if self.expected is not None and FileEntry(self._size, self._digest.hexdigest()) != self.expected:
            raise Damaged("size or SHA-256 differ from the manifest; fetch it again, or contact its owner")
        self.done = True
        self._arrived()


# -- transfers --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Transfer(RemoteFile):
    """One file that is received, as its thread and the watching thread see it."""

    sink: Sink
    error: Exception | None = None
    received: int = 0
    """Bytes of all attempts."""
    last: float = field(default_factory=time.monotonic)
    """When the last bytes came."""
    waits: bool = False
    """Until another attempt."""


@dataclass(eq=False)
class Server:
    """What the transfers of a download tell each other about their server."""

    answered: bool = False
    busy_until: float = 0.0
    """When it may be asked again, as it said itself."""
    trouble: str = ""


def read_address(address: Address, most: int, *, hurried: bool = False, notify: Notify = say) -> bytes:
    """The bytes of a small file: `Refused` when there are more than `most`."""
    file = io.BytesIO()
    download([Transfer(address, FileSink(file, most), hurried=hurried)], notify=notify)
    if file.tell() > most:
        raise Refused(f"{address}: more than the limit of {most} bytes for this file; not read")
    return file.getvalue()


def download(
    transfers: Iterable[Transfer],
    *,
    watch: Callable[[], None] = lambda: None,
    notify: Notify = say,
    stopped: Callable[[], bool] = lambda: False,
    answered: bool = False,
) -> None:
    """Receive every file; `watch` is called again and again in the caller's thread, and once all are received.

    http, https and hf use the standard library, the other schemes fsspec. `Unreachable` or `Refused` when the attempts
    of a file have failed, or when nothing comes; `Damaged` when a file is not the expected one. `notify` tells of a
    server that is slow or asks to wait. `answered`: the server is known to be there, so it is waited for longer.
    """
    waiting = iter(transfers)
    running: set[Transfer] = set()
    ended: SimpleQueue[Transfer] = SimpleQueue()
    server, rate = Server(answered), Rate()
    more = True
    try:
        while more or running:
            while more and len(running) < CONNECTIONS:
                transfer = next(waiting, None)
                more = transfer is not None
                if transfer is not None:
                    if is_offline() and transfer.address.scheme != "file":
                        raise Refused(f"{transfer.address} is not on this machine, and --offline contacts no server")
                    transfer.last = time.monotonic()
                    running.add(transfer)
                    threading.Thread(target=_receive, args=(transfer, server, ended), daemon=True).start()
            try:
                transfer = ended.get(timeout=POLL_S)
            except Empty:
                transfer = None
            if transfer is not None:
                running.discard(transfer)
                rate.ended += transfer.received + REQUEST_BYTES
                if transfer.error is not None:
                    raise transfer.error
            watch()
            if stopped():
                raise Refused("the download was stopped")
            rate.watch(running, notify)
            if server.trouble:
                notify(server.trouble)
                server.trouble = ""
    finally:
        for transfer in running:
            transfer.abandon()


class Rate:
    """Bytes per minute of all connections of a download, without the time in which all of them wait."""

    def __init__(self) -> None:
        self.ended = 0  # bytes of the transfers that have ended
        self.minute_began, self.before, self.slow = time.monotonic(), 0, False
        self.seen = self.minute_began

    def watch(self, running: Iterable[Transfer], notify: Notify) -> None:
        now = time.monotonic()
        for transfer in running:
            most = 2 * transfer.timeout  # the limit of the socket was not enough
            if not transfer.waits and now - transfer.last > most:
                raise Unreachable(f"{transfer.address}: no bytes for {most:.0f} s; try again later")
        if running and all(transfer.waits for transfer in running):
            self.minute_began += now - self.seen
        self.seen = now
        if now - self.minute_began < MINUTE_S:
            return
        total = self.ended + sum(transfer.received for transfer in running)
        rate = (total - self.before) / (now - self.minute_began)
        self.minute_began, self.before = now, total
        was_slow, self.slow = self.slow, rate < SLOW_BYTES_PER_S
        if self.slow and not was_slow:
            address = next((str(transfer.address) for transfer in running), "the download")
            notify(
                f"{address}: {human_bytes(rate)}/s in the last minute; waiting as long as some bytes come, at most "
                f"{PATIENCE_S:.0f} s for the next"
            )


# -- one file, in its thread ------------------------------------------------------------------------------------------


def _receive(transfer: Transfer, server: Server, ended: SimpleQueue[Transfer]) -> None:
    try:
        _Attempts(transfer, server).run()
    except Exception as error:  # noqa: BLE001  raised in the caller's thread
        transfer.error = error
    ended.put(transfer)


class _Attempts:
    """The attempts to receive one file."""

    def __init__(self, transfer: Transfer, server: Server) -> None:
        self.transfer, self.server = transfer, server
        self.furthest = 0
        self.wrong_at, self.wrong_bodies = -1, 0
        self._progressed()

    def _progressed(self) -> None:
        self.since, self.count, self.wait, self.asked = time.monotonic(), 0, WAIT_S, 0.0

    def run(self) -> None:
        transfer = self.transfer
        while not (transfer.sink.done or transfer.stop.is_set()):
            self.asked += self._pause(self.server.busy_until - time.monotonic())
            self.count += 1
            try:
                self._once()
            except RedistillError as error:
                if not isinstance(error, Damaged) or transfer.hurried or self._is_wrong_again():
                    raise _of(transfer.address, error) from error
                transfer.version = None
                transfer.sink.restart()
            except (OSError, http.client.HTTPException, ValueError) as error:
                if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                    raise
                self._wait_or_give_up(error)

    def _once(self) -> None:
        """One request, and what it gives."""
        transfer, sink = self.transfer, self.transfer.sink
        first, last = sink.wanted
        if not transfer.ranges or not (sink.verifies or transfer.version):
            first, last = 0, None
        with opened(transfer, first, last) as answer:
            self.server.answered = True
            if answer.first < sink.wanted[0]:
                sink.restart()
            if answer.length is not None:
                sink.announced(answer.length)
            position = answer.first
            end = last if answer.is_range and last is not None else sink.end
            while position < end and not transfer.stop.is_set():
                piece = answer.read(min(PIECE, end - position))
                if position == 0:
                    piece = _whole_beginning(piece, answer, end)
                    _refuse_html(piece)
                if not piece:
                    break
                sink.take(position, piece)
                position += len(piece)
                self._count(len(piece))
        if transfer.stop.is_set() or sink.done or (answer.is_range and position == last):
            return
        if position < end and position < (position if answer.length is None else answer.length):
            # http.client does not check
            raise Interrupted(f"the connection closed after {position} of {answer.length} bytes")
        sink.ended()

    def _count(self, received: int) -> None:
        transfer = self.transfer
        transfer.received += received
        transfer.last = time.monotonic()
        position, _ = transfer.sink.wanted
        if position > self.furthest:
            self.furthest = position
            self._progressed()
        elif transfer.received > MOST_TIMES * max(transfer.sink.end, PIECE):
            raise Unreachable(
                f"sent {human_bytes(transfer.received)} in {self.count} attempts and not the whole file; try again "
                "later, or from another address"
            )

    def _is_wrong_again(self) -> bool:
        """Whether the bytes up to here were wrong too often."""
        position, _ = self.transfer.sink.wanted
        if position > self.wrong_at:
            self.wrong_at, self.wrong_bodies = position, 0
        self.wrong_bodies += 1
        return self.wrong_bodies >= WRONG_BODIES

    def _wait_or_give_up(self, error: Exception) -> None:
        transfer, now, status = self.transfer, time.monotonic(), status_of(error)
        self.server.answered |= status is not None
        if status == 416 and transfer.sink.wanted != (0, None):  # the file has become shorter, or takes no ranges
            transfer.ranges = False
        final = _is_final(error) and (status != 416 or transfer.ranges)
        wait, asked = self.wait * spread(0.75, 1.25), _retry_after(error)
        if asked is not None:
            wait = max(min(asked, ASKED_S), wait)
            self.asked += wait
        patience = PATIENCE_S if self.server.answered else FIRST_PATIENCE_S
        late = now + wait > self.since + patience + self.asked or self.asked > ASKED_IN_ALL_S
        if transfer.address.scheme not in ("http", "https", "hf"):
            late = self.count >= BUCKET_ATTEMPTS
        if final or late or transfer.hurried or transfer.stop.is_set():
            tried = f", {self.count} attempts in {now - self.since:.0f} s" if self.count > 1 else ""
            raise (Refused if final else Unreachable)(
                f"cannot fetch {transfer.address}: {redact(one_line(error))}{tried}; check the address and the "
                "network, then try again"
            ) from error
        if asked is not None:
            self.server.busy_until = max(self.server.busy_until, now + wait)
        if wait >= NOTICED_S and not self.server.trouble:
            less = f", not in the {asked:.0f} s that it asks for" if asked is not None and asked > wait else ""
            self.server.trouble = f"{transfer.address}: {redact(one_line(error))}; trying again in {wait:.0f} s{less}"
        self.wait = min(2 * self.wait, LONGEST_WAIT_S)
        self._pause(wait)

    def _pause(self, seconds: float) -> float:
        if seconds <= 0:
            return 0.0
        self.transfer.waits = True
        self.transfer.stop.wait(seconds)
        self.transfer.last = time.monotonic()
        self.transfer.waits = False
        return seconds


def _of(address: Address, error: RedistillError) -> RedistillError:
    """The error with the address in front, unless it names it."""
    return error if str(address) in str(error) else type(error)(f"{address}: {error}")


def _whole_beginning(piece: bytes, answer: Answer, end: int) -> bytes:
    """The first bytes of a file, as many as `_refuse_html` looks at, though they may come one by one."""
    while piece and len(piece) < min(BEGINNING, end):
        more = answer.read(min(BEGINNING, end) - len(piece))
        if not more:
            break
        piece += more
    return piece


def _refuse_html(piece: bytes) -> None:
    start = piece[:BEGINNING].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        raise Refused(
            "the server sent a web page instead of the file, such as a login or an error page; expected an address "
            "under which the files themselves are"
        )


def _retry_after(error: Exception) -> float | None:
    """The seconds that the server asks to wait, given as such or as a date."""
    headers = getattr(error, "headers", None) or getattr(getattr(error, "response", None), "headers", None) or {}
    text = str(headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"\d{1,9}", text):
        return float(text)
    try:
        date = email.utils.parsedate_to_datetime(text)
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _is_final(error: Exception) -> bool:
    """Whether a retry cannot help."""
    status = status_of(error)
    refused = status is not None and 400 <= status < 500 and status not in TOO_BUSY
    distrusted = isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError)
    return refused or distrusted or is_missing(error) or isinstance(error, (ValueError, PermissionError))


def is_missing(error: BaseException | None) -> bool:
    return isinstance(error, FileNotFoundError) or status_of(error) == 404
