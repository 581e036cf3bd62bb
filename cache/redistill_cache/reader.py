"""Reading an archive.

    archive = open_archive("teacher.redistill.zarr")
    archive.logits(view=0, rows=[3, 1, 4])        # float32 [3, classes]

Every value that is returned was committed and checked; a missing or damaged one raises and is never filled in.
"""

from __future__ import annotations

import shlex
import threading
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from redistill_cache import layout
from redistill_cache.addresses import is_address, split_pin
from redistill_cache.arrivals import Arrivals, Origin, begin
from redistill_cache.codecs import Codec
from redistill_cache.download import Notify, say
from redistill_cache.errors import Damaged, OutOfRange, UsageError
from redistill_cache.fetching import FetchProgress, agreed, fetch_archive, keep_cached, other_archive
from redistill_cache.journal import FileEntry, sha256
from redistill_cache.keys import PackedKeys, keys_flaw
from redistill_cache.layout import Block
from redistill_cache.machine import require_memory
from redistill_cache.open_state import (
    VERIFY_ADVICE,
    ArchiveState,
    check_keys_size,
    check_metadata_on_disk,
    check_sizes_on_disk,
    read_state,
)
from redistill_cache.packed import is_packed
from redistill_cache.rows import (
    Buffers,
    PackedView,
    StoredSignal,
    ViewLoader,
    check_rows,
    check_view,
    count_rows,
    open_signal,
    opened_shard,
    read_rows,
    read_whole,
)
from redistill_cache.shards import Scratch
from redistill_cache.spec import LOGITS, ArchiveSpec, SignalSpec, TeacherSpec
from redistill_cache.storage import disk_trouble
from redistill_cache.verify import damaged_files

__all__ = ["Archive", "open_archive", "stream_archive"]


def open_archive(
    path: str | Path,
    *,
    id: str | None = None,  # noqa: A002  the archive's own word for it
    allow_partial: bool = False,
    verify: Literal["once", "full"] = "once",
) -> Archive:
    """Open an archive for reading, after checking that all its files exist and have their sizes.

    Without `allow_partial` an archive must be sealed; with it, an unsealed one offers exactly its committed blocks.
    Every file is hashed when it is first read on this machine; `verify="full"` hashes all of them now.
    An archive at an address (http(s)://, s3://, gs://, hf://), or in packed form, is fetched once, and its local copy
    is opened. With `id`, or '#sha256=ID' after the path or address, the archive must be this one. A copy that holds
    some views or teachers offers exactly these.
    """
    if verify not in ("once", "full"):
        raise UsageError(f"verify must be 'once' or 'full', found {verify!r}")
    if is_address(path) or is_packed(path):
        path = fetch_archive(str(path), id=id)
    else:
        location, pin = split_pin(str(path))
        path, id = Path(location), agreed(location, pin, id)  # noqa: A001
    path = path.absolute()  # the working folder may change, or differ in another process
    keep_cached(path)
    with disk_trouble("read", path):
        state = read_state(path, allow_partial=allow_partial)
        if id is not None and state.id != id:
            raise other_archive(str(path), id, state.id)
        check_metadata_on_disk(state)
        check_sizes_on_disk(state)
    if verify == "full":
        damaged = damaged_files(state, full=True)
        if damaged:
            raise Damaged(f"{path}: {len(damaged)} files are damaged, the first: {damaged[0]}; {VERIFY_ADVICE}")
    return Archive(state)


def stream_archive(
    location: str | Path,
    *,
    id: str | None = None,  # noqa: A002  the archive's own word for it
    progress: FetchProgress | None = None,
    notify: Notify = say,
) -> Archive:
    """Open an archive at an address, or in packed form, while its views are still fetched to the cache folder.

    It has all views; one that is not here yet is waited for when it is read, and `archive.arrivals` fetches views ahead
    of use. Where nothing is to be fetched, `archive.arrivals` is None, and this is `open_archive`. `progress` and
    `notify` are for what is fetched first: everything that is not of a view.
    """
    if not (is_address(location) or is_packed(location)):
        return open_archive(location, id=id)
    path, origin = begin(str(location), id=id, progress=progress, notify=notify)
    return open_archive(path) if origin is None else _streamed(path, origin)


def _streamed(path: Path, origin: Origin) -> Archive:
    keep_cached(path)
    with disk_trouble("read", path):
        state = read_state(path, allow_partial=False, held_only=False)
        check_metadata_on_disk(state)
    return Archive(state, Arrivals(state, origin))


def _reopen(path: Path, identity: str | None, origin: Origin | None = None) -> Archive:
    """Unpickle an archive, which must not have changed."""
    archive = open_archive(path, allow_partial=identity is None) if origin is None else _streamed(path, origin)
    if archive.id != identity:
        raise Damaged(f"{path} changed while it was open: expected id {identity}, found {archive.id}; open it again")
    return archive


class Archive:
    """An open archive, whose rows are read on demand. Threads and processes may share it."""

    def __init__(self, state: ArchiveState, arrivals: Arrivals | None = None) -> None:
        """Use `open_archive` or `stream_archive`."""
        self.state, self.arrivals = state, arrivals
        self._signals: dict[tuple[str, str], StoredSignal] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.id, None if self.arrivals is None else self.arrivals.origin)

    def __repr__(self) -> str:
        identity = self.id[:12] if self.id else "not sealed"
        return f"<Archive {self.path.name}: {self.num_samples} samples, {self.num_views} views, {identity}>"

    # -- description --------------------------------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        return self.state.path

    @property
    def spec(self) -> ArchiveSpec:
        return self.state.spec

    @property
    def id(self) -> str | None:
        """The SHA-256 of the manifest; None while the archive is not sealed."""
        return self.state.id

    @property
    def complete(self) -> bool:
        """Whether the archive is sealed and all of it is here."""
        here = self.arrivals is None or self.arrivals.whole()
        return self.state.id is not None and not self.state.is_partial_copy and here

    @property
    def num_samples(self) -> int:
        return self.spec.num_samples

    @property
    def num_views(self) -> int:
        return self.state.num_views

    @property
    def num_classes(self) -> int:
        return self.spec.num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.spec.class_names

    @cached_property
    def teachers(self) -> Mapping[str, TeacherSpec]:
        """Every teacher, with the signals it was started with; `signals_of` has those that were added later too."""
        return {name: teacher for name, teacher in self.state.teachers.items() if teacher.adds_to is None}

    def views_of(self, teacher: str | None = None, signal: str = LOGITS) -> int:
        """The number of leading views that a signal of a teacher has: at most `num_views`."""
        return self.state.views_of(self.part_of(teacher, signal)[0].name)

    def signals_of(self, teacher: str | None = None) -> tuple[str, ...]:
        """The names of all signals of a teacher, those that were added later last."""
        return tuple(dict.fromkeys(signal.name for part in self.parts_of(teacher) for signal in part.signals))

    def parts_of(self, teacher: str | None = None) -> tuple[TeacherSpec, ...]:
        """A teacher, and the parts of the archive with signals that were added to it later, in the order of names."""
        base = self.teacher(teacher)
        added = (part for _, part in sorted(self.state.teachers.items()) if part.adds_to == base.name)
        return (base, *added)

    # -- samples ------------------------------------------------------------------------------------------------------

    def _samples(self, name: str, key_bytes: int = 1) -> np.ndarray:
        with disk_trouble("read", self.path):
            return read_whole(self.state, layout.sample_arrays(self.spec, key_bytes)[name])

    @cached_property
    def keys(self) -> PackedKeys:
        """The key of every row."""
        offsets = self._samples("key_offsets")
        total = int(offsets[-1])
        array = layout.sample_arrays(self.spec, max(total, 1))["key_bytes"]
        try:
            check_keys_size(self.spec, total, self.state.files[array.shard_path(0, 0)].size)
        except UsageError as error:
            raise Damaged(f"{self.path}: {error}") from None
        metadata = array.metadata_bytes()
        if self.state.files[array.metadata_path] != FileEntry(len(metadata), sha256(metadata)):
            raise Damaged(f"{self.path}: the sample keys do not have the {total} bytes of their offsets")
        keys = PackedKeys(self._samples("key_bytes", total), offsets)
        flaw = keys_flaw(keys)
        if flaw:
            raise Damaged(f"{self.path}: {flaw}; the archive was edited")
        return keys

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 [N]; -1 where a sample has none."""
        labels = self._samples("label")
        low, high = int(labels.min()), int(labels.max())
        if low < -1 or high >= self.num_classes:
            raise Damaged(f"{self.path}: labels from {low} to {high}, expected -1 to {self.num_classes - 1}")
        return labels

    @cached_property
    def digests(self) -> np.ndarray:
        """uint8 [N, 32]: SHA-256 of the encoded bytes of every sample."""
        return self._samples("digest")

    @cached_property
    def sizes(self) -> np.ndarray:
        """uint32 [N, 2]: height and width of every image."""
        return self._samples("size")

    # -- views --------------------------------------------------------------------------------------------------------

    def _view(self, view: int, teacher: TeacherSpec | None = None) -> int:
        """A view that the archive, or the teacher, has; once it is here."""
        view = check_view(self.state, view, teacher)
        if self.arrivals is not None:
            if teacher is not None:
                self.arrivals.also(teacher.name)
            self.arrivals.wait(view)
        return view

    def view_params(self, view: int, rows: object | None = None) -> dict[str, np.ndarray]:
        """The stored parameters of one view, an integer array per name: of all rows, or of `rows` in that order."""
        view, checked = self._view(view), check_rows(self.state, rows)
        count = count_rows(self.state, checked)
        params = {}
        for name, array in layout.view_arrays(self.spec).items():
            require_memory(count * array.row_bytes, f"{self.path}: {count} rows of {array.path}")
            params[name] = np.empty((count, *array.row_shape), array.dtype)
            with disk_trouble("read", self.path):
                read_rows(self.state, "views", array, view, checked, params[name])
        return params

    def canaries(self, view: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows [K] and fingerprints [K, 8, 8, 3] of the canaries of one view."""
        view = self._view(view)
        count = self.spec.canaries_per_view
        if not count:
            raise OutOfRange(f"{self.path} has no canaries")
        if not self.state.holds(Block("canaries", view, 0, 0, count)):
            raise OutOfRange(f"{self.path}: the canaries of view {view} are not written yet")
        arrays = {}
        for name, array in layout.canary_arrays(self.spec).items():
            arrays[name] = np.empty((count, *array.row_shape), array.dtype)
            with (
                disk_trouble("read", self.path),
                opened_shard(self.state, array, array.shard_path(view, 0), count) as shard,
            ):
                shard.read_chunk(0, Scratch(), arrays[name])
        rows, pixels = arrays["row"], arrays["pixels"]
        if int(rows.max()) >= self.num_samples:
            raise Damaged(f"{self.path}: a canary of view {view} is row {rows.max()} of {self.num_samples}")
        different = len(np.unique(rows))
        if different < count:
            raise Damaged(f"{self.path}: {count} canaries of view {view} show {different} samples, expected one each")
        return rows, pixels

    def rows_available(self, view: int, teacher: str | None = None) -> np.ndarray:
        """The rows of one view whose signals, other than those added later, and view parameters are committed.

        These are all rows once the archive is sealed.
        """
        base = self.teacher(teacher)
        view = check_view(self.state, view, base)
        part = f"teachers/{base.name}"
        parts = [part, "views"] if self.spec.view_arrays else [part]
        rows = [np.zeros(0, np.int64)]
        for index in range(self.spec.blocks_per_view):
            blocks = [layout.row_block(self.spec, part, view, index) for part in parts]
            if all(map(self.state.holds, blocks)):
                rows.append(np.arange(blocks[0].start, blocks[0].stop))
        return np.concatenate(rows)

    # -- teachers -----------------------------------------------------------------------------------------------------

    def teacher(self, name: str | None = None) -> TeacherSpec:
        """One teacher by name, or the only one."""
        known = ", ".join(self.teachers) or "none"
        if name is None:
            if len(self.teachers) != 1:
                raise OutOfRange(f"{self.path} has {len(self.teachers)} teachers; name one of: {known}")
            return next(iter(self.teachers.values()))
        if self.state.lacking.get(name) == 0:
            command = f"redistill archive fetch ADDRESS {shlex.quote(str(self.path))} --teachers {name}"
            raise OutOfRange(
                f"{self.path} is a copy without teacher {name!r} of its archive; fetch it from where the archive is: "
                f"{command}"
            )
        if name not in self.teachers:
            raise OutOfRange(f"{self.path} has no teacher {name!r}; teachers: {known}")
        return self.teachers[name]

    def signal(self, teacher: str | None = None, signal: str = LOGITS) -> tuple[TeacherSpec, SignalSpec]:
        """One signal by name, with its teacher."""
        return self.teacher(teacher), self.part_of(teacher, signal)[1]

    def part_of(self, teacher: str | None, signal: str) -> tuple[TeacherSpec, SignalSpec]:
        """A signal with the part of the archive that holds it; of two parts the first."""
        for part in self.parts_of(teacher):
            found = part.signal(signal)
            if found is not None:
                return part, found
        name, names = self.teacher(teacher).name, ", ".join(self.signals_of(teacher))
        raise OutOfRange(f"teacher {name!r} of {self.path} has no signal {signal!r}; signals: {names}")

    def codec(self, teacher: str | None = None, signal: str = LOGITS) -> Codec:
        """The codec that decodes a signal."""
        return self._stored(teacher, signal).codec

    def logits(self, view: int, rows: object | None = None, teacher: str | None = None) -> np.ndarray:
        """float32 [n, classes], up to a constant per row (softmax ignores it) unless the codec keeps it."""
        return self._decode(view, rows, teacher, LOGITS)

    def features(self, view: int, rows: object | None = None, *, layer: str, teacher: str | None = None) -> np.ndarray:
        """float32 [n, width] of a feature layer."""
        return self._decode(view, rows, teacher, layer)

    def _decode(self, view: int, rows: object | None, teacher: str | None, signal: str) -> np.ndarray:
        stored = self._stored(teacher, signal)
        view, checked = self._view(view, stored.teacher), check_rows(self.state, rows)
        with disk_trouble("read", self.path):
            return stored.decode(view, checked)

    def load_view(
        self,
        view: int,
        teacher: str | None = None,
        signal: str = LOGITS,
        into: PackedView | None = None,
        buffers: Buffers = np.empty,
    ) -> PackedView:
        """The packed rows of a whole view in memory, to gather from in any order; buffers of `into` are reused."""
        stored = self._stored(teacher, signal)
        view = self._view(view, stored.teacher)
        with disk_trouble("read", self.path):
            return stored.load(view, into, buffers)

    def loader(self, teacher: str | None = None, signal: str = LOGITS, buffers: Buffers = np.empty) -> ViewLoader:
        """Whole views one after another, the next one loaded in the background."""
        return ViewLoader(lambda view, into: self.load_view(view, teacher, signal, into=into, buffers=buffers))

    def _stored(self, teacher: str | None, signal: str) -> StoredSignal:
        part, signal_spec = self.part_of(teacher, signal)
        with self._lock:
            stored = self._signals.get((part.name, signal_spec.name))
            if stored is None:
                with disk_trouble("read", self.path):
                    stored = open_signal(self.state, part, signal_spec)
                self._signals[part.name, signal_spec.name] = stored
        return stored
