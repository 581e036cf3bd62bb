"""Downloads of files: no more bytes than expected, no slower than stated, and redirected to no private network.

Threads receive, the caller's thread watches them. So a server that sends nothing, a byte a second or an endless header
ends the download whatever the protocol is, and Ctrl-C ends it at once. The threads are daemons: none of them keeps a
process alive.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import io
import ipaddress
import logging
import os
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from queue import Empty, SimpleQueue
from socket import SHUT_RDWR, socket
from typing import IO, BinaryIO, cast
from urllib.parse import urljoin

from redistill_cache.addresses import Address, parse_address, redact
from redistill_cache.errors import RedistillError, Refused, UsageError
from redistill_cache.journal import FileEntry
from redistill_cache.wording import human_bytes, one_line

__all__ = ["Notify", "Transfer", "Unreachable", "download", "is_offline", "read_address", "say"]

PIECE = 1 << 20
TIMEOUT_S = 60.0  # without a byte
HURRIED_S = 10.0
WAITS = (1.0, 4.0)  # seconds before another attempt
CONNECTIONS = 8
# All connections of a download together.
SLOW_BYTES_PER_S = 10 << 10
REQUEST_BYTES = 16 << 10  # what a file counts in addition: requests and the disk take time, however small it is
MINUTE_S = 60.0
SLOW_MINUTES = 5
POLL_S = 0.1
REDIRECTS = 5
REDIRECTING = (301, 302, 303, 307, 308)
# Errors of the local disk, not of the network.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
# Extras of this project that install the packages for a scheme.
EXTRAS = {"s3": "s3", "hf": "hub"}
OFFLINE = "REDISTILL_OFFLINE"

Notify = Callable[[str], None]
say: Notify = logging.getLogger("redistill_cache").warning


class Unreachable(Refused):
    """The server is away, or too slow to be of use."""


def is_offline() -> bool:
    """Whether no server may be contacted: `--offline`, or REDISTILL_OFFLINE=1."""
    return os.environ.get(OFFLINE, "0") not in ("", "0")


@dataclass(eq=False)
class Transfer:
    """One file that is received, as its thread and the watching thread see it."""

    address: Address
    file: BinaryIO
    most: int
    """Bytes that are accepted. The transfer stops one byte later, so that the caller sees that there are too many."""
    most_announced: int | None = None
    """Replaces `most` where the server announces the length."""
    hurried: bool = False
    """One attempt and a short timeout: there is something else to use."""
    result: FileEntry | None = None
    """Size and hash of the bytes received."""
    error: Exception | None = None
    received: int = 0
    """Bytes of all attempts."""
    last: float = field(default_factory=time.monotonic)
    """When the last bytes came."""
    stop: threading.Event = field(default_factory=threading.Event)
    connection: socket | None = None

    @property
    def timeout(self) -> float:
        return HURRIED_S if self.hurried else TIMEOUT_S

    def abandon(self) -> None:
        """End the transfer's thread, wherever it waits."""
        self.stop.set()
        if self.connection is not None:
            with suppress(OSError):
                self.connection.shutdown(SHUT_RDWR)


def read_address(address: Address, most: int, *, hurried: bool = False, notify: Notify = say) -> bytes:
    """The bytes of a small file: `Refused` when there are more than `most`."""
    file = io.BytesIO()
    download([Transfer(address, file, most, hurried=hurried)], notify=notify)
    if file.tell() > most:
        raise Refused(f"{address}: more than the limit of {most} bytes for this file; not read")
    return file.getvalue()


def download(
    transfers: Iterable[Transfer],
    *,
    done: Callable[[Transfer], None] = lambda _: None,
    notify: Notify = say,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Receive every file; `done` is called for each in the caller's thread.

    http and https use the standard library, the other schemes fsspec. `Unreachable` or `Refused` when the attempts of a
    file have failed, when nothing comes, or when too little comes for too long, of which `notify` tells before.
    """
    waiting = iter(transfers)
    running: set[Transfer] = set()
    ended: SimpleQueue[Transfer] = SimpleQueue()
    rate = Rate()
    more = True
    try:
        while more or running:
            while more and len(running) < CONNECTIONS:
                transfer = next(waiting, None)
                more = transfer is not None
                if transfer is not None:
                    if is_offline():
                        raise Refused(f"{transfer.address} is not on this machine, and --offline contacts no server")
                    transfer.last = time.monotonic()
                    running.add(transfer)
                    threading.Thread(target=_receive, args=(transfer, ended), daemon=True).start()
            try:
                transfer = ended.get(timeout=POLL_S)
            except Empty:
                transfer = None
            if transfer is not None:
                running.discard(transfer)
                rate.ended += transfer.received + REQUEST_BYTES
                if transfer.error is not None:
                    raise transfer.error
                done(transfer)
            if stopped():
                raise Refused("the download was stopped")
            rate.watch(running, notify)
    finally:
        for transfer in running:
            transfer.abandon()


class Rate:
    """Bytes per minute of all connections of a download."""

    def __init__(self) -> None:
        self.ended = 0  # bytes of the transfers that have ended
        self.minute_began, self.before, self.slow_minutes = time.monotonic(), 0, 0

    def watch(self, running: Iterable[Transfer], notify: Notify) -> None:
        now = time.monotonic()
        for transfer in running:
            most = 2 * transfer.timeout  # the limit of the socket was not enough
            if now - transfer.last > most:
                raise Unreachable(f"{transfer.address}: no bytes for {most:.0f} s; try again later")
        if now - self.minute_began < MINUTE_S:
            return
        total = self.ended + sum(transfer.received for transfer in running)
        rate = (total - self.before) / (now - self.minute_began)
        self.minute_began, self.before = now, total
        if rate >= SLOW_BYTES_PER_S:
            self.slow_minutes = 0
            return
        self.slow_minutes += 1
        address = next((str(transfer.address) for transfer in running), "the download")
        slow = f"{address}: {human_bytes(rate)}/s in the last minute, below {human_bytes(SLOW_BYTES_PER_S)}/s"
        if self.slow_minutes >= SLOW_MINUTES:
            raise Unreachable(f"{slow} for {SLOW_MINUTES} minutes; try again later, or from another address")
        notify(f"{slow}; the download ends after {SLOW_MINUTES} such minutes")


# -- one file, in its thread ------------------------------------------------------------------------------------------


def _receive(transfer: Transfer, ended: SimpleQueue[Transfer]) -> None:
    try:
        transfer.result = _attempt(transfer)
    except Exception as error:  # noqa: BLE001  raised in the caller's thread
        transfer.error = error
    ended.put(transfer)


def _attempt(transfer: Transfer) -> FileEntry:
    waits = () if transfer.hurried else WAITS
    for wait in (*waits, None):
        try:
            transfer.file.seek(0)
            transfer.file.truncate()
            return _copy(transfer)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, RedistillError) or (isinstance(error, OSError) and error.errno in DISK_ERRORS):
                raise
            final = _is_final(error) or transfer.stop.is_set()
            if final or wait is None:
                raise (Refused if final else Unreachable)(
                    f"cannot fetch {transfer.address}: {redact(one_line(error))}; check the address and the network, "
                    "then try again"
                ) from error
            transfer.stop.wait(wait)
    raise AssertionError("the last attempt returns or raises")


def _copy(transfer: Transfer) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    with _stream(transfer) as (read, length):
        if length is not None and transfer.most_announced is not None:
            transfer.most = transfer.most_announced
            if length > transfer.most:
                raise Refused(f"{transfer.address}: needs {length} bytes, {transfer.most} are free; free some space")
        most = transfer.most
        while not transfer.stop.is_set() and size <= most:
            piece = read(min(PIECE, most + 1 - size))
            if not piece:
                break
            if size == 0:
                _refuse_html(transfer.address, piece)
            digest.update(piece)
            size += transfer.file.write(piece)
            transfer.received += len(piece)
            transfer.last = time.monotonic()
    if length is not None and size < length and size <= most and not transfer.stop.is_set():
        raise ConnectionError(f"the connection closed after {size} of {length} bytes")  # http.client does not check
    return FileEntry(size, digest.hexdigest())


def _refuse_html(address: Address, piece: bytes) -> None:
    start = piece[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        raise Refused(
            f"{address}: the server sent a web page instead of the file, such as a login or an error page; expected "
            "an address under which the files themselves are"
        )


def _is_final(error: Exception) -> bool:
    """Whether a retry cannot help."""
    client_error = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500
    return client_error or is_missing(error) or isinstance(error, ValueError)


def is_missing(error: BaseException | None) -> bool:
    return isinstance(error, FileNotFoundError) or (isinstance(error, urllib.error.HTTPError) and error.code == 404)


# -- protocols --------------------------------------------------------------------------------------------------------

Read = Callable[[int], bytes]


@contextmanager
def _stream(transfer: Transfer) -> Iterator[tuple[Read, int | None]]:
    """A function that returns the next bytes, at most as many as it is asked for; and the length that was announced."""
    address = transfer.address
    if address.scheme in ("http", "https"):
        with _opened(transfer) as response:
            yield response.read1, response.length  # read would wait for all the bytes it is asked for
        return
    try:
        import fsspec  # type: ignore[import-untyped]

        opened = fsspec.open(address.url, "rb")
    except ImportError as error:
        extra = f"; pip install 'redistill[{EXTRAS[address.scheme]}]'" if address.scheme in EXTRAS else ""
        raise Refused(
            f"{address}: {address.scheme}:// needs a package that is not installed ({one_line(error)}){extra}"
        ) from error
    try:
        with opened as stream:
            yield cast("IO[bytes]", stream).read, None
    except (OSError, RedistillError):
        raise
    except Exception as error:  # packages for buckets have their own exceptions
        raise ConnectionError(redact(one_line(error))) from error


def _opened(transfer: Transfer) -> http.client.HTTPResponse:
    """The response to a request for the file, after a few redirects at most."""
    opener, address = _opener(Reach(transfer)), transfer.address
    for _ in range(REDIRECTS + 1):
        request = urllib.request.Request(address.url)
        if address.authorization is not None:
            request.add_header("Authorization", address.authorization)
        try:
            return cast("http.client.HTTPResponse", opener.open(request, timeout=transfer.timeout))
        except urllib.error.HTTPError as error:
            error.close()  # the error is also a response with an open socket
            if error.code not in REDIRECTING or "Location" not in error.headers:
                raise
            address = _redirected(address, error.headers["Location"])
    raise Refused(f"{transfer.address} is redirected more than {REDIRECTS} times; check the address")


def _redirected(address: Address, location: str) -> Address:
    """Redirects lead to http(s) only, never from https to http, and only this server gets the password again."""
    target = urljoin(address.url, location).partition("#")[0]
    try:
        new = parse_address(target, ("https",) if address.scheme == "https" else ("http", "https"))
    except UsageError as error:
        raise Refused(f"{address} is redirected to an address that is not followed: {error}") from None
    same = (new.parts.scheme, new.parts.netloc) == (address.parts.scheme, address.parts.netloc)
    return replace(new, authorization=address.authorization if same else None)


def _opener(reach: Reach) -> urllib.request.OpenerDirector:
    """http and https only, through the proxy of the environment."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        PlainHandler(reach),
        SecureHandler(reach),
    ):
        opener.add_handler(handler)
    return opener


class Reach:
    """What a redirect may reach: hosts at most as private as the one whose address was given.

    A server on the internet must not make this machine talk to itself or to its own network. What counts is the address
    that a connection has, as a name may stand for another one each time it is looked up.
    """

    def __init__(self, transfer: Transfer) -> None:
        self.transfer = transfer
        self.given: int | None = None

    def connected(self, connection: http.client.HTTPConnection, *, proxied: bool) -> None:
        self.transfer.connection = connection.sock
        host = connection.sock.getpeername()[0]
        privacy = 0 if proxied else how_private(host)
        self.given = privacy if self.given is None else self.given
        if self.transfer.stop.is_set():  # abandoned while it connected
            connection.close()
            raise Refused("the download was stopped")
        if privacy > self.given:
            connection.close()
            raise Refused(
                f"{self.transfer.address} is redirected to {connection.host} ({host}), in a more private network than "
                "its own; if that is intended, give the address there itself"
            )


def how_private(host: str) -> int:
    """0: a host on the internet, 1: in a private network, 2: this machine or its link."""
    ip = ipaddress.ip_address(host.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return 2 if ip.is_loopback or ip.is_link_local or ip.is_unspecified else 0 if ip.is_global else 1


def _watched(
    kind: type[http.client.HTTPConnection], reach: Reach, *, proxied: bool
) -> Callable[..., http.client.HTTPConnection]:
    class Watched(kind):  # type: ignore[misc, valid-type]  # a class of a variable
        def connect(self) -> None:
            super().connect()
            reach.connected(self, proxied=proxied)

    return Watched


class PlainHandler(urllib.request.HTTPHandler):
    def __init__(self, reach: Reach) -> None:
        super().__init__()
        self.reach = reach

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_watched(http.client.HTTPConnection, self.reach, proxied=req.has_proxy()), req)


class SecureHandler(urllib.request.HTTPSHandler):
    def __init__(self, reach: Reach) -> None:
        super().__init__()
        self.reach = reach

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        proxied = req._tunnel_host is not None  # type: ignore[attr-defined]  # the host behind the proxy
        kind = _watched(http.client.HTTPSConnection, self.reach, proxied=proxied)
        return self.do_open(kind, req, context=tls())


@cache
def tls() -> ssl.SSLContext:
    return ssl.create_default_context()  # reads all certificates
