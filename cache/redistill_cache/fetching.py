"""Archives at a URL: a verified local copy, fetched once.

The manifest identifies the archive and lists every other file with its hash. The copy is in a folder named after the
archive's id, so that an archive that replaces another at the same address gets a new copy. Files are fetched in any
order, and each gets its final name once its hash is verified; the manifest is written last, so an interrupted copy is
not an archive yet, and the next call fetches only what is missing.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import http.client
import io
import os
import re
import shutil
import stat
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO, cast

from redistill_cache import layout, limits
from redistill_cache.errors import Damaged, Incomplete, Refused
from redistill_cache.journal import FileEntry, parse_header, sha256
from redistill_cache.open_state import read_state
from redistill_cache.storage import LEFTOVER, LOCAL, disk_trouble
from redistill_cache.verified_files import cache_folder
from redistill_cache.wording import one_line

__all__ = ["fetch_archive", "is_url", "pull"]


# -- one file ---------------------------------------------------------------------------------------------------------

PIECE = 1 << 20
TIMEOUT_S = 60
WAITS = (1.0, 4.0)  # seconds before another attempt
# Errors of the local disk, not of the network.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
# Extras of this project that install the packages for a scheme.
EXTRAS = {"s3": "s3", "hf": "hub"}


def pull(address: str, file: BinaryIO, *, most: int | None = None, stop: threading.Event | None = None) -> FileEntry:
    """Copy the bytes at `address` into `file`, and return their size and hash.

    A download stops at `most` bytes and one more, so that the caller sees that there are too many. http and https use
    the standard library, other schemes (s3, hf, gs) fsspec. A failed download is retried; `Refused` when all fail.
    """
    stop = stop or threading.Event()
    for wait in (*WAITS, None):
        try:
            file.seek(0)
            file.truncate()
            return _copy(address, file, most, stop)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            if wait is None or _is_final(error):
                raise Refused(
                    f"cannot fetch {address}: {one_line(error)}; check the address and the network, then try again"
                ) from error
            stop.wait(wait)
    raise AssertionError("the last attempt returns or raises")


def _copy(address: str, file: BinaryIO, most: int | None, stop: threading.Event) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    with _stream(address) as (stream, length):
        while not stop.is_set():
            piece = stream.read(PIECE if most is None else min(PIECE, most + 1 - size))
            if not piece:  # the end, or more than `most` bytes
                break
            digest.update(piece)
            size += file.write(piece)
    enough = stop.is_set() or (most is not None and size > most)
    if length is not None and size != length and not enough:  # http.client does not check this
        raise ConnectionError(f"the connection closed after {size} of {length} bytes")
    return FileEntry(size, digest.hexdigest())


@contextmanager
def _stream(address: str) -> Iterator[tuple[BinaryIO, int | None]]:
    """An open stream, and its announced length in bytes."""
    scheme = address.partition("://")[0].lower()
    if scheme in ("http", "https"):
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT_S) as response:
                length = response.headers.get("Content-Length")
                yield response, None if length is None else int(length)
        except urllib.error.HTTPError as error:
            error.close()  # the error is also a response with an open socket
            raise
        return
    try:
        import fsspec  # type: ignore[import-untyped]

        opened = fsspec.open(address, "rb")
    except ImportError as error:
        extra = f"; pip install 'redistill[{EXTRAS[scheme]}]'" if scheme in EXTRAS else ""
        raise Refused(
            f"{address}: {scheme}:// needs a package that is not installed ({one_line(error)}){extra}"
        ) from error
    except ValueError as error:
        raise Refused(f"{address}: {one_line(error)}; expected http(s):// or a scheme of fsspec") from error
    try:
        with opened as stream:
            yield cast(BinaryIO, stream), None
    except OSError:
        raise
    except Exception as error:  # packages for buckets have their own exceptions
        raise ConnectionError(one_line(error)) from error


def _is_final(error: Exception) -> bool:
    """Whether a retry cannot help."""
    client_error = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500
    return client_error or _is_missing(error) or isinstance(error, ValueError)


def _is_missing(error: BaseException | None) -> bool:
    return isinstance(error, FileNotFoundError) or (isinstance(error, urllib.error.HTTPError) and error.code == 404)


# -- a whole archive --------------------------------------------------------------------------------------------------

FetchProgress = Callable[[int, int], None]

CONNECTIONS = 8


def is_url(text: object) -> bool:
    return "://" in str(text)


def fetch_archive(url: str, *, progress: FetchProgress | None = None) -> Path:
    """The local copy of the sealed archive at `url`; `progress(bytes done, total bytes)` while it is fetched."""
    address = url.rstrip("/")
    try:
        manifest = _fetch_small(f"{address}/{layout.MANIFEST}", limits.MAX_MANIFEST_BYTES)
    except Refused as error:
        if not _is_missing(error.__cause__):
            raise
        raise Incomplete(
            f"{address} is not a finished archive: it has no {layout.MANIFEST}; expected the address of a folder like "
            "name.redistill.zarr that 'redistill cache-teacher' has finished"
        ) from error
    identity = sha256(manifest)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", address.rpartition("/")[2])[:80] or "archive"
    target = cache_folder() / "archives" / identity / name
    with disk_trouble("write", target):
        LOCAL.make_directories(target)
        with _locked(target.parent / "lock"):
            if not (target / layout.MANIFEST).is_file():
                _fetch_all(address, target, _files(address, manifest, target.parent), progress)
                LOCAL.make_directories(target / layout.JOURNAL)
                LOCAL.publish(target / layout.MANIFEST, manifest)
    return target


def _files(address: str, manifest: bytes, folder: Path) -> dict[str, FileEntry]:
    """The files of an archive, after checking its documents against its manifest."""
    header = parse_header(manifest, f"{address}/{layout.MANIFEST}")
    with TemporaryDirectory(dir=folder) as temporary:
        documents = Path(temporary)
        names = ["zarr.json", *(layout.teacher_path(name) for name in header.teachers)]
        for name in names:
            data = _fetch_small(f"{address}/{name}", limits.MAX_METADATA_BYTES)
            LOCAL.make_directories((documents / name).parent)
            LOCAL.write(documents / name, data)
        LOCAL.make_directories(documents / layout.JOURNAL)
        LOCAL.write(documents / layout.MANIFEST, manifest)
        return dict(read_state(documents, allow_partial=False).files)


def _fetch_all(address: str, target: Path, files: dict[str, FileEntry], progress: FetchProgress | None) -> None:
    missing = {name: entry for name, entry in files.items() if not _is_fetched(target / name, entry)}
    total = sum(entry.size for entry in files.values())
    done = total - sum(entry.size for entry in missing.values())
    free = shutil.disk_usage(target).free
    if total - done > free:
        raise Refused(
            f"{address}: needs {total - done} bytes, {free} are free at {target}; free some space, "
            "or set XDG_CACHE_HOME to a folder on a larger disk"
        )
    for folder in sorted({(target / name).parent for name in missing}):
        LOCAL.make_directories(folder)
    stop = threading.Event()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        fetched = {pool.submit(_fetch, f"{address}/{name}", target / name, e, stop): e for name, e in missing.items()}
        try:
            for future in as_completed(fetched):
                future.result()
                done += fetched[future].size
                if progress is not None:
                    progress(done, total)
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _is_fetched(path: Path, entry: FileEntry) -> bool:
    """Whether a file was fetched. It got its name after its hash was verified, so checking its size is enough."""
    return path.is_file() and path.stat().st_size == entry.size


def _fetch(address: str, target: Path, entry: FileEntry, stop: threading.Event) -> None:
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}{LEFTOVER}")
    try:
        with temporary.open("xb") as file:
            received = pull(address, file, most=entry.size, stop=stop)
        if stop.is_set():
            return
        if received != entry:
            raise Damaged(f"{address}: size or SHA-256 differ from the manifest; fetch it again, or contact its owner")
        LOCAL.sync_file(temporary)
        LOCAL.rename(temporary, target)
        LOCAL.sync_directory(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _fetch_small(address: str, cap: int) -> bytes:
    """The bytes of a document, which must be at most `cap`."""
    data = io.BytesIO()
    if pull(address, data, most=cap).size > cap:
        raise Refused(f"{address}: more than the limit of {cap} bytes for this file; not read")
    return data.getvalue()


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """One process of this machine fetches an archive; the others wait for it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # opening a pipe does not wait
    with os.fdopen(os.open(lock, flags, 0o666), "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Refused(f"{lock} is not a regular file; remove it")
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
