"""The bytes at an address: http(s) by the standard library, anything else (s3://, hf://, gs://) by fsspec."""

from __future__ import annotations

import errno
import hashlib
import http.client
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from redistill_cache.errors import Refused
from redistill_cache.journal import FileEntry
from redistill_cache.wording import one_line

__all__ = ["is_missing", "pull"]

PIECE = 1 << 20
TIMEOUT_S = 60
WAITS = (1.0, 4.0)  # seconds before another try
# Errors of our own disk, not of the network.
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
# Extras of this project that bring the packages of a scheme.
EXTRAS = {"s3": "s3", "hf": "hub"}


def pull(address: str, file: BinaryIO, *, most: int | None = None, stop: threading.Event | None = None) -> FileEntry:
    """Copy what lies at `address` into `file`: size and hash of what came. Of more than `most` bytes one more comes.

    What breaks off is asked for again; `Refused` when that does not help.
    """
    stop = stop or threading.Event()
    for wait in (*WAITS, None):
        try:
            file.seek(0)
            file.truncate()
            return _copy(address, file, most, stop)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, OSError) and error.errno in DISK_TROUBLE:
                raise
            if wait is None or _is_final(error):
                raise Refused(
                    f"cannot fetch {address}: {one_line(error)}; check the address and the network, and run it again"
                ) from error
            stop.wait(wait)
    raise AssertionError("the last try returns or raises")


def is_missing(error: BaseException | None) -> bool:
    return isinstance(error, FileNotFoundError) or (isinstance(error, urllib.error.HTTPError) and error.code == 404)


def _copy(address: str, file: BinaryIO, most: int | None, stop: threading.Event) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    with _stream(address) as (stream, promised):
        while not stop.is_set():
            piece = stream.read(PIECE if most is None else min(PIECE, most + 1 - size))
            if not piece:  # the end, or nothing more is wanted
                break
            digest.update(piece)
            size += file.write(piece)
    enough = stop.is_set() or (most is not None and size > most)
    if promised is not None and size != promised and not enough:
        raise ConnectionError(f"it broke off after {size} of {promised} bytes")  # http.client keeps silent about this
    return FileEntry(size, digest.hexdigest())


@contextmanager
def _stream(address: str) -> Iterator[tuple[BinaryIO, int | None]]:
    """An open stream, and how many bytes it is said to have."""
    scheme = address.partition("://")[0].lower()
    if scheme in ("http", "https"):
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT_S) as response:
                length = response.headers.get("Content-Length")
                yield response, None if length is None else int(length)
        except urllib.error.HTTPError as error:
            error.close()  # it is a response, too, and would keep its socket
            raise
        return
    try:
        import fsspec  # type: ignore[import-untyped]  # it has no types

        opened = fsspec.open(address, "rb")
    except ImportError as error:
        extra = f"; pip install 'redistill[{EXTRAS[scheme]}]'" if scheme in EXTRAS else ""
        raise Refused(
            f"{address}: {scheme}:// needs a package that is not installed: {one_line(error)}{extra}"
        ) from error
    except ValueError as error:
        raise Refused(f"{address}: {one_line(error)}; expected http(s)://, or what fsspec can open") from error
    try:
        with opened as stream:
            yield cast(BinaryIO, stream), None
    except OSError:
        raise
    except Exception as error:  # the packages for buckets have errors of their own
        raise ConnectionError(one_line(error)) from error


def _is_final(error: Exception) -> bool:
    """Whether asking again is no use."""
    refused = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500
    return refused or is_missing(error) or isinstance(error, ValueError)
