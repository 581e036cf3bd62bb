"""Archives at a URL: a verified copy on this machine, fetched once.

The manifest says which archive it is, and what every other file of it must be; its copy lies in a folder named after
its id, so that an archive that is replaced at its address becomes another copy and never a mixture. Files come in any
order, each under its final name only once its hash is right; the manifest comes last, so a copy that was interrupted is
no archive yet, and the next call fetches what is missing.
"""

from __future__ import annotations

import fcntl
import io
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from redistill_cache import layout, limits
from redistill_cache.contents import read_contents
from redistill_cache.downloads import is_missing, pull
from redistill_cache.errors import Damaged, Incomplete, Refused
from redistill_cache.files import LEFTOVER, LOCAL
from redistill_cache.journal import FileEntry, parse_header, sha256
from redistill_cache.stamps import cache_folder
from redistill_cache.storage import disk_trouble

__all__ = ["fetch_archive", "is_url"]

Progress = Callable[[int, int], None]

AT_ONCE = 8


def is_url(text: object) -> bool:
    return "://" in str(text)


def fetch_archive(url: str, *, progress: Progress | None = None) -> Path:
    """The local copy of the sealed archive at `url`; `progress(bytes done, bytes in all)` while it is fetched."""
    address = url.rstrip("/")
    try:
        manifest = _small(f"{address}/{layout.MANIFEST}", limits.MAX_MANIFEST_BYTES)
    except Refused as error:
        if not is_missing(error.__cause__):
            raise
        raise Incomplete(
            f"{address} is no finished archive: it has no {layout.MANIFEST}; expected the address of a folder like "
            "name.redistill.zarr that 'redistill cache-teacher' has finished"
        ) from error
    identity = sha256(manifest)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", address.rpartition("/")[2])[:80] or "archive"
    target = cache_folder() / "archives" / identity / name
    with disk_trouble("write", target):
        LOCAL.make_directories(target)
        with _alone(target.parent / "lock"):
            if not (target / layout.MANIFEST).is_file():
                _fetch_all(address, target, _files(address, manifest, target.parent), progress)
                LOCAL.make_directories(target / layout.JOURNAL)
                LOCAL.publish(target / layout.MANIFEST, manifest)
    return target


def _files(address: str, manifest: bytes, folder: Path) -> dict[str, FileEntry]:
    """What the archive consists of, once its documents have been found to agree with its manifest."""
    header = parse_header(manifest, f"{address}/{layout.MANIFEST}")
    with TemporaryDirectory(dir=folder) as temporary:
        documents = Path(temporary)
        names = ["zarr.json", *(layout.teacher_path(name) for name in header.teachers)]
        for name in names:
            data = _small(f"{address}/{name}", limits.MAX_METADATA_BYTES)
            LOCAL.make_directories((documents / name).parent)
            LOCAL.write(documents / name, data)
        LOCAL.make_directories(documents / layout.JOURNAL)
        LOCAL.write(documents / layout.MANIFEST, manifest)
        return dict(read_contents(documents, allow_partial=False).files)


def _fetch_all(address: str, target: Path, files: dict[str, FileEntry], progress: Progress | None) -> None:
    missing = {name: entry for name, entry in files.items() if not _there(target / name, entry)}
    total = sum(entry.size for entry in files.values())
    done = total - sum(entry.size for entry in missing.values())
    free = shutil.disk_usage(target).free
    if total - done > free:
        raise Refused(
            f"{address}: {total - done} bytes are to be fetched, {free} are free at {target}; free some space, "
            "or set XDG_CACHE_HOME to a larger disk"
        )
    for folder in sorted({(target / name).parent for name in missing}):
        LOCAL.make_directories(folder)
    stop = threading.Event()
    with ThreadPoolExecutor(AT_ONCE) as pool:
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


def _there(path: Path, entry: FileEntry) -> bool:
    """Files get their names after their hash was right; a reader hashes them once more."""
    return path.is_file() and path.stat().st_size == entry.size


def _fetch(address: str, target: Path, entry: FileEntry, stop: threading.Event) -> None:
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}{LEFTOVER}")
    try:
        with temporary.open("xb") as file:
            found = pull(address, file, most=entry.size, stop=stop)
        if stop.is_set():
            return
        if found != entry:
            raise Damaged(f"{address}: not the bytes that the manifest promises; fetch it again, or ask its owner")
        LOCAL.sync_file(temporary)
        LOCAL.rename(temporary, target)
        LOCAL.sync_directory(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _small(address: str, cap: int) -> bytes:
    """A document, refused above `cap`."""
    data = io.BytesIO()
    if pull(address, data, most=cap).size > cap:
        raise Refused(f"{address}: more than the limit of {cap} bytes for this file; not read")
    return data.getvalue()


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process of this machine fetches; the others find it done."""
    with lock.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
