"""Streaming: the views of an archive come to its copy in the cache folder while the archive is read.

Such a copy has what is not of a view when the archive is opened. A view is fetched when a reader waits for it, or ahead
of use when it is expected, one at a time and by one process of the machine: the others wait for it and use the same
files. A server that is away ends a wait with its error; as long as nobody waits, it is asked again and again.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

from redistill_cache import layout
from redistill_cache.addresses import Address
from redistill_cache.copies import Held
from redistill_cache.download import POLL_S, Notify, Unreachable, is_offline, say
from redistill_cache.errors import Refused
from redistill_cache.fetching import (
    FetchProgress,
    Remote,
    Waits,
    agreed,
    bring_signature,
    copy_or_manifest,
    copy_with_base,
    fetch_manifest,
    fetched,
    id_of_copy,
    locate,
    place_of,
    remember,
    remembered,
    require_room,
    whole_copy,
)
from redistill_cache.open_state import ArchiveState

__all__ = ["Arrivals", "Origin", "begin"]

AGAIN_S = 60.0  # before a view that nobody waits for is tried again
CLOSING_S = 5.0


@dataclass(frozen=True)
class Origin:
    """Where the views of a copy come from; without a `Remote`, the manifest is asked for with the first view."""

    address: Address
    remote: Remote | None = None
    teachers: frozenset[str] | None = None
    """Those whose rows are fetched; None for all."""


def begin(
    url: str,
    *,
    id: str | None = None,  # noqa: A002  the archive's own word for it
    progress: FetchProgress | None = None,
    notify: Notify = say,
) -> tuple[Path, Origin | None]:
    """The copy of an archive, with what is not of a view at least, and where its views come from if it is not whole."""
    address = locate(url)
    pin = agreed(address, address.pin, id)
    known = pin or remembered(address)
    begun = None if whole_copy(known) else copy_with_base(known)
    if begun is not None and (pin is not None or is_offline()):
        return begun, Origin(address)
    try:
        found = copy_or_manifest(address, pin, notify)
    except Unreachable as error:
        if begun is None:
            raise
        notify(f"{error}; using the views that were fetched before, of the archive with id {begun.parent.name}")
        return begun, Origin(address)
    whole = found if isinstance(found, Path) else whole_copy(found.id)
    if isinstance(whole, Path):
        return whole, None
    assert isinstance(found, Remote)
    target, identity = place_of(found), found.id
    if id_of_copy(target) != identity:  # the manifest is written once everything that is not of a view is here
        fetched(found, target, base, Waits(progress, notify, until=lambda: id_of_copy(target) == identity))
        bring_signature(found, target, notify)
    remember(address, identity)
    return target, Origin(address, found)


def base(state: ArchiveState, held: Held) -> set[str]:
    """The files that are not of a view."""
    del held
    return {name for name in state.files if layout.view_of_file(name) is None}


class Arrivals:
    """The views of a copy, as they come. Threads share it; another process makes its own from the same origin."""

    def __init__(self, state: ArchiveState, origin: Origin) -> None:
        self.path, self.id, self.files = state.path, str(state.id), state.files
        self.address, self._remote = origin.address, origin.remote
        self._of_view: dict[int, dict[str, str | None]] = {}
        for name in state.files:
            view = layout.view_of_file(name)
            if view is not None:
                self._of_view.setdefault(view, {})[name] = layout.teacher_of_file(name)
        self._teachers = origin.teachers
        self._here: set[int] = set()
        self._fetching: int | None = None
        self._expected: list[int] = []
        self._awaited: Counter[int] = Counter()
        self._failed: dict[int, tuple[float, Exception]] = {}
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self._lock, self._wake, self._stop = threading.Lock(), threading.Event(), threading.Event()
        self._notes: SimpleQueue[str] = SimpleQueue()
        self._received, self._total = 0, 0

    @property
    def origin(self) -> Origin:
        """For another process, which asks for the manifest itself."""
        return Origin(self.address, teachers=self._teachers)

    def only(self, teachers: Iterable[str]) -> None:
        """Of each view, fetch the rows of these teachers only, and of others once they are read."""
        self._choose(frozenset(teachers))

    def also(self, teacher: str) -> None:
        if self._teachers is not None and teacher not in self._teachers:
            self._choose(self._teachers | {teacher})

    def _choose(self, teachers: frozenset[str]) -> None:
        with self._lock:
            self._teachers, self._here = teachers, set()

    def _names(self, view: int) -> set[str]:
        """The files of a view that are wanted."""
        names, teachers = self._of_view.get(view, {}), self._teachers
        return {name for name, teacher in names.items() if None in (teacher, teachers) or teacher in (teachers or ())}

    def here(self, view: int) -> bool:
        """Whether what is wanted of a view is on this machine, by whichever process it was fetched."""
        return view != self._fetching and self._has_files(view)

    def whole(self) -> bool:
        """Whether everything is on this machine."""
        return all((self.path / name).is_file() for name in self.files)

    def _has_files(self, view: int) -> bool:
        here = self._here  # another one once other teachers are chosen
        if view not in here and all((self.path / name).is_file() for name in self._names(view)):
            here.add(view)
        return view in here

    def require_room(self, views: Iterable[int], notify: Notify = say) -> None:
        """Refuse now where there is no room for these views."""
        names = set().union(*map(self._names, views))
        lacking = (self.files[name].size for name in names if not (self.path / name).is_file())
        require_room(self.address, self.path, sum(lacking), notify)

    def expect(self, views: Iterable[int]) -> None:
        """Fetch these views next, in the background, when no reader waits for another one."""
        with self._lock:
            self._expected = list(views)
            self._start()

    def wait(
        self,
        view: int,
        *,
        notify: Notify = say,
        watch: FetchProgress | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Return when a view is here; `watch(bytes, of)` is called while it comes. Raises what a fetch that ended since
        then has raised, and `Refused` once the wait is stopped."""
        if self.here(view):
            return
        notify(f"waiting for view {view} of {self.address}")
        began = time.monotonic()
        with self._lock:
            self._awaited[view] += 1
            self._wake.set()
        try:
            while not self.here(view):
                if stopped() or self._stop.is_set():
                    raise Refused(f"the wait for view {view} of {self.address} was stopped")
                with self._lock:
                    failed, error = self._failed.get(view, (began, None))
                    if error is not None and failed > began:
                        raise error
                    self._start()
                self._tell(notify)
                if watch is not None and self._total:
                    watch(self._received, self._total)
                time.sleep(POLL_S)
        finally:
            with self._lock:
                self._awaited[view] -= 1

    def close(self) -> None:
        """End what is fetched in the background, and every wait."""
        self._stop.set()
        self._wake.set()
        thread = self._thread
        if thread is not None and self._process == os.getpid():
            thread.join(CLOSING_S)

    def _tell(self, notify: Notify) -> None:
        """What happened in the background is said where somebody waits."""
        while True:
            try:
                notify(self._notes.get_nowait())
            except Empty:
                return

    # -- in the background --------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._process != os.getpid():  # a forked process has none of the threads
            self._process, self._thread = os.getpid(), None
        if self._thread is None and not self._stop.is_set():
            self._thread = threading.Thread(target=self._run, name="fetch views", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while (view := self._next()) is not None:
            self._wake.clear()
            self._fetching = view
            try:
                self._fetch(view)
                self._fetching = None
            except Exception as error:  # noqa: BLE001  raised where the view is waited for
                self._fetching = None
                with self._lock:
                    self._failed[view] = time.monotonic(), error
                self._wake.wait(AGAIN_S)

    def _next(self) -> int | None:
        with self._lock:
            wanted = (*(view for view, count in self._awaited.items() if count > 0), *self._expected)
            view = None if self._stop.is_set() else next((view for view in wanted if not self.here(view)), None)
            if view is None:
                self._thread = None
            return view

    def _fetch(self, view: int) -> None:
        names = self._names(view)

        def progress(received: int, total: int) -> None:
            self._received, self._total = received, total

        def until() -> bool:
            return self._has_files(view) or self._stop.is_set()

        waits = Waits(progress, self._notes.put, until, self._stop.is_set)
        try:
            if self._remote is None:
                self._remote = fetch_manifest(self.address, self.id, self._notes.put)
            fetched(self._remote, self.path, lambda *_: names, waits)
        finally:
            self._received, self._total = 0, 0
