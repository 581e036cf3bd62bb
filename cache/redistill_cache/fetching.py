"""Archives and files at an address: a verified copy in the cache folder, or in a folder of the user's, fetched once.

The manifest identifies an archive and lists every other file with its hash. The copy in the cache folder is in a folder
named after the archive's id, so that an archive that replaces another at the same address gets a new copy. Files are
fetched in any order, and each gets its final name once its hash is verified; the manifest is written last, so an
interrupted copy is not an archive yet, and the next call fetches only what is missing. A copy may hold the first views
or some teachers only (copies.py), and get more by another call.

    archives/ID/NAME     a copy; whole once its manifest has the hash ID and nothing notes that a part is missing
    addresses/HASH       the id of the archive that was fetched last from the address with this hash
    locks/HASH           held by the process that fetches something; says which one it is

A whole copy is used without its server: when the id is pinned, when no server may be contacted, and when it is away.
An address holds an archive as it is, or in packed form (packed.py); so may a local folder.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from redistill_cache import layout, limits, packed
from redistill_cache.addresses import Address, address_of_path, checked_id, is_address, parse_address, split_pin
from redistill_cache.cached_archives import make_room
from redistill_cache.copies import Held, note_held, noted, remove_note
from redistill_cache.download import (
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
from redistill_cache.errors import Damaged, Incomplete, OutOfRange, RedistillError, Refused, UsageError
from redistill_cache.journal import FileEntry, Header, parse_files, parse_header, sha256
from redistill_cache.locks import (
    DOCUMENTS,
    keep,
    locked,
    new_partial,
    publish_partial,
    remove_partials,
    sweep,
    sweep_unfinished,
)
from redistill_cache.open_state import ArchiveState, committed_file, read_state
from redistill_cache.storage import LOCAL, disk_trouble, read_if_there, read_small
from redistill_cache.verified_files import HashedFile, VerifiedFiles, cache_folder, stamp_of
from redistill_cache.wording import one_line

__all__ = ["check_id", "fetch_archive", "fetch_file", "fetched_description", "locate"]

FetchProgress = Callable[[int, int], None]


# -- archives ---------------------------------------------------------------------------------------------------------


def locate(location: str) -> Address:
    """The address of an archive: of a server, or of a folder of this machine."""
    if is_address(location):
        return parse_address(location)
    path, pin = split_pin(location)
    return replace(address_of_path(Path(path)), pin=pin)


def fetch_archive(
    url: str,
    out: str | Path | None = None,
    *,
    views: int | None = None,
    teachers: Collection[str] | None = None,
    id: str | None = None,  # noqa: A002  the archive's own word for it
    progress: FetchProgress | None = None,
    notify: Notify = say,
) -> Path:
    """The local copy of the sealed archive at `url`, an address or a path; `progress(bytes done, total bytes)`.

    It is in the folder `out`, or in the cache folder. With `views`, it gets at least these first views; without, all.
    With `teachers`, it gets these views of them at least; without, of all. What it has, it keeps. With `id`, or
    '#sha256=ID' after the address, the archive must be this one. `notify` is told in one line when a copy is used
    because the server is away, of a slow server, and which process is waited for.
    """
    address = locate(url)
    pin = agreed(address, address.pin, id)
    waits, wanted = Waits(progress, notify), part_to_fetch(address, views, teachers)
    if out is not None:
        remote = fetch_manifest(address, pin, notify)
        copy = fetched(remote, Path(out).absolute(), wanted, waits)
        bring_signature(remote, copy, notify)
        return copy
    found = copy_or_manifest(address, pin, notify)
    path = found if isinstance(found, Path) else whole_copy(found.id)
    if path is not None and (views is not None or teachers is not None):
        wanted(read_state(path, allow_partial=False), Held(0))  # refuses what the archive does not have
    if isinstance(found, Path):
        return found
    if path is None:
        path = fetched(found, place_of(found), wanted, waits)
    bring_signature(found, path, notify)
    if remembered(address) != found.id and whole_copy(found.id) is not None:
        remember(address, found.id)
    return path


def place_of(remote: Remote) -> Path:
    """Where its copy is in the cache folder."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", remote.address.name)[-80:].lstrip(".") or "archive"
    return cache_folder() / "archives" / remote.id / (name + ".zarr" * name.endswith(".redistill"))


@contextmanager
def fetched_description(
    url: str,
    *,
    id: str | None = None,  # noqa: A002
    notify: Notify = say,
) -> Iterator[ArchiveState]:
    """The state of the archive at `url` from its metadata alone; from its copy where that is whole."""
    address = locate(url)
    found = copy_or_manifest(address, agreed(address, address.pin, id), notify)
    copy = found if isinstance(found, Path) else whole_copy(found.id)
    if copy is not None:
        yield read_state(copy, allow_partial=False)
        return
    assert isinstance(found, Remote)
    with TemporaryDirectory(prefix="redistill-") as folder, _documents(found, Path(folder), notify) as state:
        yield state


def copy_or_manifest(address: Address, pin: str | None, notify: Notify) -> Path | Remote:
    """The whole copy of the archive at an address where its server is not needed or not there; else its manifest."""
    if address.scheme == "file":
        return fetch_manifest(address, pin, notify)
    known = whole_copy(pin or remembered(address))
    if known is not None and (pin is not None or is_offline()):
        return known
    if is_offline():
        raise Refused(
            f"{address} was not fetched completely to {cache_folder()} on this machine; run the command once without "
            "--offline"
        )
    try:
        return fetch_manifest(address, pin, notify, hurried=known is not None)
    except Unreachable as error:
        if known is None:
            raise
        notify(f"{error}; using the copy that was fetched before, id {known.parent.name}")
        return known


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
    keep_cached(cache_folder() / "archives" / identity / "any")
    for manifest in sorted((cache_folder() / "archives" / identity).glob(f"*/{layout.MANIFEST}")):
        if (manifest.parent / layout.COPY_NAME).exists():
            continue
        with disk_trouble("read", manifest):
            if sha256(read_small(manifest, limits.MAX_MANIFEST_BYTES)) == identity:
                return manifest.parent.parent
    return None


def keep_cached(copy: Path) -> None:
    """A copy in the cache folder is not removed from it until this process ends."""
    if copy.parent.parent == cache_folder() / "archives" and copy.parent.is_dir():
        keep(copy.parent)


def copy_with_base(identity: str | None) -> Path | None:
    """The copy of this archive in the cache folder that has what is not of a view, and maybe views."""
    if identity is None:
        return None
    keep_cached(cache_folder() / "archives" / identity / "any")
    manifests = sorted((cache_folder() / "archives" / identity).glob(f"*/{layout.MANIFEST}"))
    copies = (manifest.parent.parent for manifest in manifests)
    return next((copy for copy in copies if id_of_copy(copy) == identity), None)


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


# -- what an address holds --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remote:
    """A sealed archive at an address, in either form."""

    address: Address
    manifest: bytes
    packed: bool

    @property
    def id(self) -> str:
        return sha256(self.manifest)

    @property
    def header(self) -> Header:
        return parse_header(self.manifest, str(self.address))

    @property
    def signature(self) -> Address:
        """Where its author puts one."""
        return self.address.child(packed.SIGNATURE if self.packed else layout.SIGNATURE)

    def transfers(
        self, files: Mapping[str, FileEntry], wanted: AbstractSet[str], open_file: Callable[[str], FileSink]
    ) -> Iterator[Transfer]:
        """Receive the files that are wanted, view by view; `open_file` gives the place for each."""
        if not self.packed:
            for name in sorted(wanted, key=lambda name: (-1 if (v := layout.view_of_file(name)) is None else v, name)):
                yield Transfer(self.address.child(name), open_file(name))
            return
        for tar, names in packed.contents(files, self.header.views).items():
            if not wanted.isdisjoint(names):
                yield Transfer(self.address.child(tar), packed.TarSink(files, names, wanted, open_file))


def fetch_manifest(address: Address, pin: str | None, notify: Notify, *, hurried: bool = False) -> Remote:
    """The manifest of the archive at an address, where it has one in the place of either form."""
    forms = [(layout.MANIFEST, False), (packed.MANIFEST, True)]
    missing: Refused | None = None
    for name, is_packed in sorted(forms, key=lambda form: form[1] != address.name.endswith(".redistill")):
        try:
            data = read_address(address.child(name), limits.MAX_MANIFEST_BYTES, hurried=hurried, notify=notify)
        except Refused as error:
            if not is_missing(error.__cause__):
                raise
            missing = error
            continue
        if pin is not None and sha256(data) != pin:
            raise other_archive(str(address), pin, sha256(data))
        return Remote(address, data, is_packed)
    raise Incomplete(
        f"{address} is not a finished archive: it has no {layout.MANIFEST} and no {packed.MANIFEST}; expected the "
        "address of a folder like name.redistill.zarr that 'redistill cache-teacher' has finished, or its packed form"
    ) from missing


# -- a copy -----------------------------------------------------------------------------------------------------------


def id_of_copy(path: Path) -> str | None:
    """The id in its manifest; None before it has one."""
    try:
        return sha256(read_small(path / layout.MANIFEST, limits.MAX_MANIFEST_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return None


Wanted = Callable[[ArchiveState, Held], AbstractSet[str]]
"""(state of the whole archive, what the copy holds of it) -> the files that the copy is to have."""


@dataclass(frozen=True)
class Waits:
    """What a fetch tells while it waits, and what ends it."""

    progress: FetchProgress | None = None
    notify: Notify = say
    until: Callable[[], bool] = lambda: False
    """Nothing is to be fetched any more: another process has done it."""
    stopped: Callable[[], bool] = lambda: False


def part_to_fetch(where: Address, views: int | None, teachers: Collection[str] | None) -> Wanted:
    """The files of the first views, or of all, of some teachers, or of all; with what is here, so that none is lost."""
    if teachers is not None and (not teachers or len(set(teachers)) < len(teachers)):
        raise UsageError(f"expected the names of teachers, each once, found {','.join(teachers) or 'none'}")

    def wanted(state: ArchiveState, held: Held) -> AbstractSet[str]:
        if views is not None and not 1 <= views <= state.num_views:
            raise OutOfRange(f"{where} has {state.num_views} views, {views} are asked for")
        known = sorted(name for name, spec in state.teachers.items() if spec.adds_to is None)
        for name in teachers or ():
            if name not in known:
                raise OutOfRange(f"{where} has no teacher {name!r}; teachers: {', '.join(known) or 'none'}")
        most, others = state.num_views if views is None else views, {}
        if teachers is not None:
            others = {name: 0 for name, spec in state.teachers.items() if spec.owner not in teachers}
            most = min(most, max(map(state.views_of, state.teachers.keys() - others.keys())))
        return {*Held(most, others).files(state.files), *held.files(state.files)}

    return wanted


def fetched(remote: Remote, target: Path, wanted: Wanted, waits: Waits) -> Path:
    """The copy of an archive at `target`, with these files at least."""
    cached = target.is_relative_to(cache_folder())
    folder = target.parent if cached else target
    with disk_trouble("write", target):
        sweep()
        if cached:
            keep(folder)
        with locked(folder, f"fetches {remote.address}", waits.notify, waits.until):
            if whole_copy(remote.id) == target or waits.until():  # another process fetched it in the meantime
                return target
            LOCAL.make_directories(target)
            if not cached:
                _refuse_other_folder(target, remote)
            sweep_unfinished(folder)
            try:
                with _whole_state(remote, target, folder, waits.notify) as state:
                    _complete(remote, state, target, wanted, waits)
            finally:
                sweep_unfinished(folder)
                with suppress(OSError):  # not empty, unless it was refused
                    target.rmdir()
                    folder.rmdir()
    return target


@contextmanager
def _whole_state(remote: Remote, target: Path, folder: Path, notify: Notify) -> Iterator[ArchiveState]:
    """The state of the whole archive, from the documents of the copy where these are right."""
    state = None
    if id_of_copy(target) == remote.id:
        with suppress(RedistillError):
            state = read_state(target, allow_partial=False, held_only=False)
    if state is not None:
        yield state
        return
    with _documents(remote, folder, notify) as state:
        yield state


def _refuse_other_folder(target: Path, remote: Remote) -> None:
    """Refuse to fetch to a folder of the user's with anything but a copy of this archive, or the beginning of one."""
    held, header = id_of_copy(target), remote.header
    is_noted = noted(target, remote.id, header.views, header.views_by_teacher) is not None
    begun = is_noted or all(map(_is_of_a_fetch, target.iterdir()))
    if held not in (None, remote.id) or (held is None and not begun):
        found = "other files" if held is None else f"the archive with id {held}"
        raise Refused(f"{target} holds {found}, and the archive {remote.id} is to be fetched; choose another folder")


def _is_of_a_fetch(path: Path) -> bool:
    """Whether a fetch that was killed before it had its note left this in an empty folder."""
    if path.name == layout.JOURNAL and path.is_dir():
        return all(inner.name.startswith(layout.COPY_NAME) for inner in path.iterdir())
    return path.name.startswith(DOCUMENTS)


@contextmanager
def _documents(remote: Remote, folder: Path, notify: Notify) -> Iterator[ArchiveState]:
    """The state of an archive from its documents, which are fetched to `folder` and checked against its manifest."""
    where = str(remote.address)
    header = parse_header(remote.manifest, where)
    names = ["zarr.json", *(layout.teacher_path(name) for name in header.teachers)]
    with TemporaryDirectory(dir=folder, prefix=DOCUMENTS) as temporary:
        documents = Path(temporary) / "documents"  # one folder down, where no copy is looked for
        if remote.packed:
            files = parse_files(remote.manifest, header, where)
            for name in names:
                if name not in files or files[name].size > limits.MAX_ROOT_BYTES:
                    raise Damaged(f"{where}: the manifest lacks {name}, or lists it as too large; it was edited")
            _receive(remote, files, set(names), documents, Waits(notify=notify))
        else:
            for name in names:  # while views are added, zarr.json is not the one in the manifest, and can be read
                data = read_address(remote.address.child(name), limits.MAX_ROOT_BYTES, notify=notify)
                LOCAL.make_directories((documents / name).parent)
                LOCAL.write(documents / name, data)
        LOCAL.make_directories(documents / layout.JOURNAL)
        LOCAL.write(documents / layout.MANIFEST, remote.manifest)
        yield read_state(documents, allow_partial=False)


def _complete(remote: Remote, state: ArchiveState, target: Path, wanted: Wanted, waits: Waits) -> None:
    """Fetch what a copy lacks of these files."""
    begun = id_of_copy(target) != remote.id
    whole = Held(state.num_views)
    note = noted(target, remote.id, whole.views, {name: state.views_of(name) for name in state.teachers})
    before = Held(0) if begun else note or whole
    names = wanted(state, before)
    files = {name: state.files[name] for name in names}
    verified = VerifiedFiles(target, remote.id)
    here = replace(state, path=target, verified_files=verified, extended={})
    missing = {name for name in files if not _is_here(here, name)}
    total = sum(entry.size for entry in files.values())
    received = total - sum(files[name].size for name in missing)
    require_room(remote.address, target, total - received, waits.notify)
    if begun:
        note_held(target, remote.id, Held(0))
    for name in sorted(missing):  # its documents were read already
        if state.path != target and (state.path / name).is_file() and _is_here(state, name):
            LOCAL.make_directories((target / name).parent)
            LOCAL.publish(target / name, read_small(state.path / name, limits.MAX_ROOT_BYTES))
            missing.discard(name)
            received += files[name].size
    lock = threading.Lock()

    def arrived(name: str) -> None:
        nonlocal received
        with lock:
            received += files[name].size
        verified.add([HashedFile(name, files[name], stamp_of((target / name).stat()))])

    def watch() -> None:
        if waits.progress is not None:
            waits.progress(received, total)

    _receive(remote, state.files, missing, target, waits, arrived=arrived, watch=watch)
    held = part_here(here, before)
    if held != whole:
        note_held(target, remote.id, held)
    if begun:
        LOCAL.publish(target / layout.MANIFEST, remote.manifest)
    if held == whole:
        remove_note(target)


def bring_signature(remote: Remote, target: Path, notify: Notify) -> None:
    """Copy the file beside the manifest at an address, if there is one. It is checked by 'redistill verify' only.

    It is of the manifest, which a copy with a part of the archive has as well.
    """
    try:
        signature = read_address(remote.signature, limits.MAX_RECORD_BYTES, notify=notify)
        if read_if_there(target / layout.SIGNATURE, limits.MAX_RECORD_BYTES) != signature:
            LOCAL.publish(target / layout.SIGNATURE, signature)
    except (OSError, Refused) as error:  # such as a cache folder that is read-only; the archive is whole without it
        if not is_missing(error.__cause__):
            notify(f"{target} has no signature from {remote.address}: {one_line(error)}")


def require_room(address: Address, target: Path, needed: int, notify: Notify) -> None:
    """Refuse now what the disk or the limit of the cache folder has no room for."""
    if target.is_relative_to(cache_folder()):
        make_room(needed, target.parent, str(address), notify)
    free = shutil.disk_usage(target).free
    if needed > free:
        raise Refused(
            f"{address}: needs {needed} bytes, {free} are free at {target}; free some space, "
            "or set XDG_CACHE_HOME to a folder on a larger disk"
        )


def part_here(state: ArchiveState, before: Held) -> Held:
    """What a copy of the archive with this state holds by now. A file has its name only once its hash was verified.

    View parameters count as far as there are rows of a teacher.
    """
    whole: dict[str | None, int] = {None: state.num_views} | {name: state.views_of(name) for name in state.teachers}
    here = dict(whole)
    for name in state.files:
        view = layout.view_of_file(name)
        if view is not None and not (state.path / name).is_file():
            teacher = layout.teacher_of_file(name)
            here[teacher] = min(here[teacher], view)
    here = {name: max(count, min(whole[name], before.views_of(name))) for name, count in here.items()}
    rows = {name: here[name] for name in state.teachers}
    is_whole = all(count == whole[name] for name, count in rows.items())
    views = here[None] if is_whole else min(here[None], max(rows.values()))
    return Held(views, {name: count for name, count in rows.items() if count < min(views, whole[name])})


def _is_here(state: ArchiveState, name: str) -> bool:
    with committed_file(state, name) as (_, problem):
        return problem is None


def _receive(
    remote: Remote,
    files: Mapping[str, FileEntry],
    wanted: AbstractSet[str],
    target: Path,
    waits: Waits,
    *,
    arrived: Callable[[str], None] = lambda _: None,
    watch: Callable[[], None] = lambda: None,
) -> None:
    """Receive files to `target`; each gets its name once its hash is verified."""
    for folder in sorted({(target / name).parent for name in wanted}):
        LOCAL.make_directories(folder)
    unfinished: set[BinaryIO] = set()
    over, lock = False, threading.Lock()

    def open_file(name: str) -> FileSink:
        with lock:
            if over:  # in the thread of a transfer that was abandoned
                raise Refused("the download was stopped")
            file = new_partial(target / name)
            unfinished.add(file)

        def publish() -> None:
            with disk_trouble("write", target / name):
                file.close()
                publish_partial(file, target / name)
                arrived(name)
            with lock:
                unfinished.discard(file)

        return FileSink(file, files[name].size, expected=files[name], arrived=publish)

    try:
        transfers = remote.transfers(files, wanted, open_file)
        download(transfers, watch=watch, notify=waits.notify, stopped=waits.stopped, answered=True)
    finally:
        with lock:
            over = True
            for file in unfinished:
                file.close()


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

        def refuse_if_stopped() -> bool:
            if stopped():
                raise Refused("the download was stopped")
            return False

        with locked(target, f"fetches {address}", notify, refuse_if_stopped):
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
