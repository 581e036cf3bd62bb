"""Archives and files at an address: a verified copy in the cache folder, fetched once.

The manifest identifies an archive and lists every other file with its hash. The copy is in a folder named after the
archive's id, so that an archive that replaces another at the same address gets a new copy. Files are fetched in any
order, and each gets its final name once its hash is verified; the manifest is written last, so an interrupted copy is
not an archive yet, and the next call fetches only what is missing.

    archives/ID/NAME     a copy; whole once its manifest has the hash ID
    addresses/HASH       the id of the archive that was fetched last from the address with this hash
    locks/HASH           held by the process that fetches something; says which one it is

A whole copy is used without its server: when the id is pinned, when no server may be contacted, and when it is away.
"""

from __future__ import annotations

import fcntl
import glob
import os
import re
import shutil
import socket
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from redistill_cache import layout, limits
from redistill_cache.addresses import Address, checked_id, parse_address
from redistill_cache.download import (
    POLL_S,
    FileSink,
    Notify,
    Transfer,
    Unreachable,
    download,
    is_missing,
    is_offline,
    read_address,
    say,
)
from redistill_cache.errors import Incomplete, Refused, UsageError
from redistill_cache.journal import FileEntry, parse_header, sha256
from redistill_cache.open_state import ArchiveState, read_state
from redistill_cache.storage import LEFTOVER, LOCAL, disk_trouble, read_small
from redistill_cache.verified_files import cache_folder

__all__ = ["check_id", "fetch_archive", "fetch_file", "fetched_description"]

FetchProgress = Callable[[int, int], None]

DOCUMENTS = "documents-"
WAITING_S = 60.0  # between two messages about the process that is waited for


# -- archives ---------------------------------------------------------------------------------------------------------


def fetch_archive(
    url: str,
    *,
    id: str | None = None,  # noqa: A002  the archive's own word for it
    progress: FetchProgress | None = None,
    notify: Notify = say,
) -> Path:
    """The local copy of the sealed archive at `url`; `progress(bytes done, total bytes)` while it is fetched.

    With `id`, or '#sha256=ID' after the address, the archive must be this one. `notify` is told in one line when a copy
    is used because the server is away, of a slow server, and which process is waited for.
    """
    address = parse_address(url)
    pin = agreed(address, address.pin, id)
    found = copy_or_manifest(address, pin, notify)
    if isinstance(found, Path):
        return found
    identity = sha256(found)
    path = whole_copy(identity) or _fetched(address, found, progress, notify)
    if remembered(address) != identity:
        remember(address, identity)
    return path


@contextmanager
def fetched_description(
    url: str,
    *,
    id: str | None = None,  # noqa: A002
    notify: Notify = say,
) -> Iterator[ArchiveState]:
    """The state of the archive at `url` from its metadata alone; from its copy where that is whole."""
    address = parse_address(url)
    found = copy_or_manifest(address, agreed(address, address.pin, id), notify)
    copy = found if isinstance(found, Path) else whole_copy(sha256(found))
    if copy is not None:
        yield read_state(copy, allow_partial=False)
        return
    assert isinstance(found, bytes)
    with TemporaryDirectory(prefix="redistill-") as folder, _documents(address, found, Path(folder), notify) as state:
        yield state


def copy_or_manifest(address: Address, pin: str | None, notify: Notify) -> Path | bytes:
    """The whole copy of the archive at an address where its server is not needed or not there; else its manifest."""
    known = whole_copy(pin or remembered(address))
    if known is not None and (pin is not None or is_offline()):
        return known
    if is_offline():
        raise Refused(
            f"{address} was not fetched completely to {cache_folder()} on this machine; run the command once without "
            "--offline"
        )
    try:
        manifest = _fetch_manifest(address, notify, hurried=known is not None)
    except Unreachable as error:
        if known is None:
            raise
        notify(f"{error}; using the copy that was fetched before, id {known.parent.name}")
        return known
    if pin is not None and sha256(manifest) != pin:
        raise other_archive(str(address), pin, sha256(manifest))
    return manifest


def agreed(where: object, pin: str | None, identity: str | None) -> str | None:
    """The id that an archive must have: that in its location and that of the caller, which must not differ."""
    if identity is not None and pin not in (None, checked_id(identity)):
        raise UsageError(f"{where} is pinned to the id {pin}, and the id is to be {identity}; remove one of the two")
    return identity or pin


def check_id(path: Path, identity: str) -> None:
    """Refuse a local archive with another id."""
    try:
        manifest = read_small(path / layout.MANIFEST, limits.MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise Incomplete(f"{path} has no {layout.MANIFEST}, so it has no id yet; expected a finished archive") from None
    if sha256(manifest) != identity:
        raise other_archive(str(path), identity, sha256(manifest))


def other_archive(where: str, expected: str, found: str | None) -> Refused:
    actual = "one that is not sealed and has none" if found is None else found
    return Refused(f"{where}: expected the archive with id {expected}, found {actual}; correct the id or the place")


def whole_copy(identity: str | None) -> Path | None:
    """The copy of this archive whose manifest was published and still has the hash that is the id."""
    if identity is None:
        return None
    for manifest in sorted((cache_folder() / "archives" / identity).glob(f"*/{layout.MANIFEST}")):
        with disk_trouble("read", manifest):
            if sha256(read_small(manifest, limits.MAX_MANIFEST_BYTES)) == identity:
                return manifest.parent.parent
    return None


def _note(address: Address) -> Path:
    return cache_folder() / "addresses" / sha256(address.url.encode())[:40]


def remember(address: Address, identity: str) -> None:
    """Note which archive an address has, for when its server is away."""
    note = _note(address)
    with suppress(OSError):  # a read-only cache folder with a whole copy: it can be used, not remembered
        LOCAL.make_directories(note.parent)
        LOCAL.publish(note, identity.encode())


def remembered(address: Address) -> str | None:
    try:
        text = read_small(_note(address), 64).decode("ascii", "replace")
    except (OSError, Refused):
        return None
    return text if re.fullmatch(r"[0-9a-f]{64}", text) else None


def _fetch_manifest(address: Address, notify: Notify, *, hurried: bool) -> bytes:
    try:
        return read_address(address.child(layout.MANIFEST), limits.MAX_MANIFEST_BYTES, hurried=hurried, notify=notify)
    except Refused as error:
        if not is_missing(error.__cause__):
            raise
        raise Incomplete(
            f"{address} is not a finished archive: it has no {layout.MANIFEST}; expected the address of a folder like "
            "name.redistill.zarr that 'redistill cache-teacher' has finished"
        ) from error


def _fetched(address: Address, manifest: bytes, progress: FetchProgress | None, notify: Notify) -> Path:
    """The copy of the archive with this manifest, which is fetched unless another process did it in the meantime."""
    identity = sha256(manifest)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", address.name)[-80:].lstrip(".") or "archive"
    target = cache_folder() / "archives" / identity / name
    with disk_trouble("write", target):
        sweep()
        LOCAL.make_directories(target)
        with locked(target.parent, str(address), notify):
            copy = whole_copy(identity)
            if copy is not None:
                return copy
            sweep_unfinished(target.parent)
            try:
                with _documents(address, manifest, target.parent, notify) as state:
                    files = dict(state.files)
                _fetch_all(address, target, files, progress, notify)
            finally:
                sweep_unfinished(target.parent)
            LOCAL.make_directories(target / layout.JOURNAL)
            LOCAL.publish(target / layout.MANIFEST, manifest)
    return target


@contextmanager
def _documents(address: Address, manifest: bytes, folder: Path, notify: Notify) -> Iterator[ArchiveState]:
    """The state of an archive from its documents, which are fetched to `folder` and checked against its manifest."""
    header = parse_header(manifest, str(address.child(layout.MANIFEST)))
    with TemporaryDirectory(dir=folder, prefix=DOCUMENTS) as temporary:
        documents = Path(temporary)
        for name in ("zarr.json", *(layout.teacher_path(name) for name in header.teachers)):
            data = read_address(address.child(name), limits.MAX_METADATA_BYTES, notify=notify)
            LOCAL.make_directories((documents / name).parent)
            LOCAL.write(documents / name, data)
        LOCAL.make_directories(documents / layout.JOURNAL)
        LOCAL.write(documents / layout.MANIFEST, manifest)
        yield read_state(documents, allow_partial=False)


def _fetch_all(
    address: Address, target: Path, files: dict[str, FileEntry], progress: FetchProgress | None, notify: Notify
) -> None:
    missing = {name: entry for name, entry in files.items() if not _is_fetched(target / name, entry)}
    total = sum(entry.size for entry in files.values())
    received = total - sum(entry.size for entry in missing.values())
    free = shutil.disk_usage(target).free
    if total - received > free:
        raise Refused(
            f"{address}: needs {total - received} bytes, {free} are free at {target}; free some space, "
            "or set XDG_CACHE_HOME to a folder on a larger disk"
        )
    for folder in sorted({(target / name).parent for name in missing}):
        LOCAL.make_directories(folder)
    open_files: set[BinaryIO] = set()
    lock = threading.Lock()

    def transfer(name: str, entry: FileEntry) -> Transfer:
        file = new_partial(target / name)
        open_files.add(file)

        def arrived() -> None:
            nonlocal received
            file.close()
            publish_partial(file, target / name)
            with lock:
                received += entry.size

        return Transfer(address.child(name), FileSink(file, entry.size, expected=entry, arrived=arrived))

    def watch() -> None:
        if progress is not None:
            progress(received, total)

    try:
        download((transfer(*item) for item in missing.items()), watch=watch, notify=notify)
    finally:
        for file in open_files:
            file.close()


def _is_fetched(path: Path, entry: FileEntry) -> bool:
    """Whether a file was fetched. It got its name after its hash was verified, so checking its size is enough."""
    return path.is_file() and path.stat().st_size == entry.size


# -- files ------------------------------------------------------------------------------------------------------------


def fetch_file(
    address: Address,
    target: Path,
    check: Callable[[Path], None],
    *,
    most: int,
    notify: Notify = say,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Fetch a file to `target` if it is missing. It gets this name once `check` has accepted what was received.

    A server that does not announce the length may send `most` bytes.
    """
    with disk_trouble("write", target):
        if target.is_file():
            return
        sweep()
        LOCAL.make_directories(target.parent)
        with locked(target, str(address), notify, stopped):
            if target.is_file():  # fetched by the process that held the lock
                return
            remove_partials(target)
            free = shutil.disk_usage(target.parent).free
            try:
                with new_partial(target) as file:
                    sink = FileSink(file, min(most, free), most_announced=free)
                    download([Transfer(address, sink)], notify=notify, stopped=stopped)
                    if file.tell() > sink.most:
                        raise Refused(
                            f"{address}: more than {sink.most} bytes, and the server does not announce how many; "
                            "not kept"
                        )
                check(Path(file.name))
                publish_partial(file, target)
            finally:
                remove_partials(target)


# -- temporary files and locks ----------------------------------------------------------------------------------------


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
            if not any(folder.glob(f"*/{layout.MANIFEST}")):
                with unlocked(folder) as is_free:
                    if is_free:
                        sweep_unfinished(folder)
        for partial in (cache_folder() / "tars").glob(f"*{LEFTOVER}"):
            with unlocked(partial.with_name(partial.name.rsplit(".", 2)[0])) as is_free:
                if is_free:
                    partial.unlink(missing_ok=True)


def sweep_unfinished(folder: Path) -> None:
    """Remove temporary files and folders of an archive whose lock is held; its files that are whole stay."""
    for path in folder.glob("*"):
        if path.name.startswith((DOCUMENTS, "tmp")):
            shutil.rmtree(path, ignore_errors=True)
    for partial in folder.rglob(f"*{LEFTOVER}"):
        partial.unlink(missing_ok=True)


@contextmanager
def locked(target: Path, shown: str, notify: Notify, stopped: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """One process of this machine fetches something; the others wait for it, and say for whom."""
    with lock_file(target) as file:
        notified = time.monotonic() + 1 - WAITING_S  # not at once: a sweep holds a lock for a moment
        while not acquire(file):
            if stopped():
                raise Refused("the download was stopped")
            if time.monotonic() - notified >= WAITING_S:
                notified = time.monotonic()
                file.seek(0)
                holder = file.read(200).decode(errors="replace") or "another process"
                notify(f"waiting for {holder}, which fetches {shown}")
            time.sleep(POLL_S)
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


def acquire(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
