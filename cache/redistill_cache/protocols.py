"""How a file at an address is asked for: over http(s) and from the hub, on this machine, through packages for buckets.

A request asks for the file or for a range of it, with the token of its server. It is redirected to http(s) only, and to
no network that is more private than that of its address.
"""

from __future__ import annotations

import http.client
import ipaddress
import os
import re
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from socket import SHUT_RDWR, socket
from typing import IO, cast
from urllib.parse import urljoin

from redistill_cache.addresses import Address, parse_address, redact
from redistill_cache.errors import RedistillError, Refused, UsageError
from redistill_cache.storage import open_regular
from redistill_cache.tokens import on_the_hub, token_of
from redistill_cache.wording import one_line

__all__ = ["Answer", "Interrupted", "RemoteFile", "opened", "status_of"]

TIMEOUT_S = 60.0  # without a byte
HURRIED_S = 10.0
READ_AHEAD = 8 << 20  # of a file in a bucket; by default s3fs reads 50 MiB ahead, of each of eight files
REDIRECTS = 5
REDIRECTING = (301, 302, 303, 307, 308)
# Extras of this project that install the packages for a scheme.
EXTRAS = {"s3": "s3"}
CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")


class Interrupted(ConnectionError):
    """An answer that another attempt may complete."""


@dataclass(eq=False)
class RemoteFile:
    """A file at an address, and what is known of it and of the connection to its server."""

    address: Address
    hurried: bool = field(default=False, kw_only=True)
    """One attempt and a short timeout: there is something else to use."""
    stop: threading.Event = field(default_factory=threading.Event, kw_only=True)
    connection: socket | None = field(default=None, kw_only=True)
    ranges: bool = field(default=True, kw_only=True)
    """Whether the server is asked for a part of the file."""
    version: str | None = field(default=None, kw_only=True)
    """ETag or time of the file of which a beginning was received."""

    @property
    def timeout(self) -> float:
        return HURRIED_S if self.hurried else TIMEOUT_S

    def abandon(self) -> None:
        """End what its thread does with it, wherever that waits."""
        self.stop.set()
        if self.connection is not None:
            with suppress(OSError):
                self.connection.shutdown(SHUT_RDWR)


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status of an error of the standard library, or of a package for buckets."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


@dataclass(frozen=True)
class Answer:
    """What a request gives: the bytes of the file from `first` on, which may be before those that were asked for."""

    read: Callable[[int], bytes]
    """The next bytes, at most as many as it is asked for."""
    first: int
    is_range: bool
    length: int | None
    """Of the whole file, where the server says it."""


@contextmanager
def opened(file: RemoteFile, first: int, last: int | None) -> Iterator[Answer]:
    address = file.address
    if address.scheme in ("http", "https", "hf"):
        with _requested(file, first, last) as response:
            yield _answer(file, response, first)
        return
    if address.scheme == "file":
        with os.fdopen(open_regular(address.local), "rb") as local:
            local.seek(first)
            yield Answer(cast("Callable[[int], bytes]", local.read), first, True, os.fstat(local.fileno()).st_size)
        return
    try:
        import fsspec  # type: ignore[import-untyped]

        files, path = fsspec.url_to_fs(address.url)
    except ImportError as error:
        extra = f"; pip install 'redistill[{EXTRAS[address.scheme]}]'" if address.scheme in EXTRAS else ""
        raise Refused(
            f"{address}: {address.scheme}:// needs a package that is not installed ({one_line(error)}){extra}"
        ) from error
    try:
        is_small = last is not None and last - first <= READ_AHEAD  # such a part is read without what follows it
        ahead = {"cache_type": "none"} if is_small else {"block_size": READ_AHEAD}
        with files.open(path, "rb", **ahead) as stream:
            remote, length = cast("IO[bytes]", stream), getattr(stream, "size", None)
            if first:
                remote.seek(first)
            yield Answer(remote.read, first, True, length if isinstance(length, int) else None)
    except (OSError, RedistillError):
        raise
    except Exception as error:  # packages for buckets have their own exceptions
        raise ConnectionError(redact(one_line(error))) from error


def _answer(file: RemoteFile, response: http.client.HTTPResponse, first: int) -> Answer:
    tag = response.headers.get("ETag", "W/")
    version = response.headers.get("Last-Modified") if tag.startswith("W/") else tag
    read = response.read1  # read would wait for all the bytes it is asked for
    if response.status != 206:
        file.version = version
        return Answer(read, 0, False, response.length)
    match = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match is None or int(match[1]) != first:
        file.ranges = False
        raise Interrupted("the server sent another part of the file than it was asked for")
    file.version = file.version or version
    return Answer(read, first, True, None if match[3] == "*" else int(match[3]))


def _requested(file: RemoteFile, first: int, last: int | None) -> http.client.HTTPResponse:
    """The response to a request for the file, after a few redirects at most."""
    opener, address = _opener(Reach(file)), file.address
    address = on_the_hub(address) if address.scheme == "hf" else address
    address = replace(address, authorization=address.authorization or token_of(address))
    for _ in range(REDIRECTS + 1):
        request = urllib.request.Request(address.url)
        if address.authorization is not None:
            request.add_header("Authorization", address.authorization)
        if first or last is not None:
            request.add_header("Range", f"bytes={first}-{'' if last is None else last - 1}")
            if file.version is not None:
                request.add_header("If-Range", file.version)
        try:
            return cast("http.client.HTTPResponse", opener.open(request, timeout=file.timeout))
        except urllib.error.HTTPError as error:
            error.close()  # the error is also a response with an open socket
            if error.code not in REDIRECTING or "Location" not in error.headers:
                raise
            address = _redirected(address, error.headers["Location"])
    raise Refused(f"{file.address} is redirected more than {REDIRECTS} times; check the address")


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

    def __init__(self, file: RemoteFile) -> None:
        self.file = file
        self.given: int | None = None

    def connected(self, connection: http.client.HTTPConnection, *, proxied: bool) -> None:
        self.file.connection = connection.sock
        host = connection.sock.getpeername()[0]
        privacy = 0 if proxied else how_private(host)
        self.given = privacy if self.given is None else self.given
        if self.file.stop.is_set():  # abandoned while it connected
            connection.close()
            raise Refused("the download was stopped")
        if privacy > self.given:
            connection.close()
            raise Refused(
                f"{self.file.address} is redirected to {connection.host} ({host}), in a more private network than "
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
