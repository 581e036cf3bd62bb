"""Reading rows of an archive, as they are stored ("packed") or decoded, and loading whole views into memory.

No file stays open between calls, so an archive can be pickled, forked and shared by threads. A file is checked before
every use: it must have its committed size, and its SHA-256 must have been checked once on this machine. An epoch of
training loads one view, and gathers rows from it in random order at the speed of numpy indexing.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np

from redistill_cache import layout, limits
from redistill_cache.codecs import Codec, open_codec
from redistill_cache.codecs.linear import LinearCodec
from redistill_cache.errors import Damaged, Incomplete, OutOfRange, UsageError
from redistill_cache.layout import ArrayLayout, Block
from redistill_cache.machine import require_memory
from redistill_cache.open_state import VERIFY_ADVICE, ArchiveState, committed_file
from redistill_cache.shards import Scratch, ShardReader
from redistill_cache.spec import ArraySpec, SignalSpec, TeacherSpec

__all__ = [
    "Buffers",
    "LoadView",
    "PackedView",
    "Rows",
    "StoredSignal",
    "ViewLoader",
    "check_rows",
    "check_view",
    "codec_out_of_range",
    "count_rows",
    "open_signal",
    "opened_shard",
    "read_rows",
    "read_whole",
    "row_out_of_range",
]


# -- from row numbers to chunks ---------------------------------------------------------------------------------------

Rows = np.ndarray | None
"""Row numbers, int64 [n]; None: every row."""


def check_view(state: ArchiveState, view: int, teacher: TeacherSpec | None = None) -> int:
    """A view of the archive, or one of those that a teacher, or a part with signals added to one, has."""
    try:
        view = operator.index(view)
    except TypeError:
        raise UsageError(f"a view is an integer, found {view!a:.80}") from None
    count = state.num_views if teacher is None else state.views_of(teacher.name)
    if not 0 <= view < count:
        whose = "" if teacher is None or count == state.num_views else f" of {_names_of(teacher)}"
        raise OutOfRange(f"{state.path} has views 0 to {count - 1}{whose}, requested view {view}")
    return view


def _names_of(teacher: TeacherSpec) -> str:
    added = "" if teacher.adds_to is None else f", {', '.join(signal.name for signal in teacher.signals)}"
    return f"teacher {teacher.owner}{added}"


def check_rows(state: ArchiveState, rows: object | None) -> Rows:
    if rows is None:
        return None
    array = np.asarray(rows)
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UsageError(f"rows must be a list of integers, found {array.dtype} of shape {list(array.shape)}")
    low, high, count = int(array.min()), int(array.max()), state.spec.num_samples
    if low < 0 or high >= count:
        raise OutOfRange(f"{state.path} has rows 0 to {count - 1}, requested row {low if low < 0 else high}")
    return array.astype(np.int64)


def count_rows(state: ArchiveState, rows: Rows) -> int:
    return state.spec.num_samples if rows is None else len(rows)


@contextmanager
def opened_shard(state: ArchiveState, array: ArrayLayout, path: str, rows: int) -> Iterator[ShardReader]:
    """A shard whose bytes are the committed ones; its first `rows` rows are data."""
    with committed_file(state, path) as (fd, problem):
        if problem:
            raise Damaged(f"{state.path / path} {problem}; {VERIFY_ADVICE}")
        yield ShardReader(fd, state.files[path].size, array, rows, str(state.path / path))


def read_rows(state: ArchiveState, part: str, array: ArrayLayout, view: int, rows: Rows, out: np.ndarray) -> None:
    """out[i] = row rows[i] of one view of an array. Every chunk that is needed is decoded once."""
    if rows is None:
        _read_view(state, part, array, view, out)
    elif len(rows):
        _read_some(state, part, array, view, rows, out)


def _read_view(state: ArchiveState, part: str, array: ArrayLayout, view: int, out: np.ndarray) -> None:
    """Decode every chunk directly into `out`."""
    scratch = Scratch()
    for index in range(state.spec.blocks_per_view):
        with _opened_block(state, part, array, view, index) as (block, shard):
            for start in range(block.start, block.stop, array.chunk_rows):
                stop = min(start + array.chunk_rows, block.stop)
                shard.read_chunk((start - block.start) // array.chunk_rows, scratch, out[start:stop])


def _read_some(
    state: ArchiveState, part: str, array: ArrayLayout, view: int, rows: np.ndarray, out: np.ndarray
) -> None:
    order = None if np.all(rows[1:] >= rows[:-1]) else np.argsort(rows, kind="stable")
    rising = rows if order is None else rows[order]
    scratch = Scratch()
    for index, in_block in _runs(rising // state.spec.block_rows):
        with _opened_block(state, part, array, view, index) as (block, shard):
            for chunk, in_chunk in _runs((rising[in_block] - block.start) // array.chunk_rows):
                start = block.start + chunk * array.chunk_rows
                count = min(array.chunk_rows, block.stop - start)
                span = slice(in_block.start + in_chunk.start, in_block.start + in_chunk.stop)
                needed = rising[span]
                if order is None and len(needed) == count and np.array_equal(needed, np.arange(start, start + count)):
                    shard.read_chunk(chunk, scratch, out[span])  # a whole chunk in order needs no second copy
                    continue
                piece = scratch.take("piece", count * array.row_bytes).view(array.dtype)
                piece = piece.reshape(count, *array.row_shape)
                shard.read_chunk(chunk, scratch, piece)
                if order is None:
                    piece.take(needed - start, axis=0, out=out[span], mode="clip")  # other modes copy
                else:
                    out[order[span]] = piece.take(needed - start, axis=0)


@contextmanager
def _opened_block(
    state: ArchiveState, part: str, array: ArrayLayout, view: int, index: int
) -> Iterator[tuple[Block, ShardReader]]:
    """The shard of an array in one block; `Incomplete` where the block is not committed."""
    block = layout.row_block(state.spec, part, view, index)
    if not state.holds(block):
        raise Incomplete(
            f"{state.path}: rows {block.start} to {block.stop - 1} of view {view} are not cached yet; "
            "run the command that writes the archive again, or request only rows_available()"
        )
    with opened_shard(state, array, array.shard_path(view, index), block.stop - block.start) as shard:
        yield block, shard


def _runs(numbers: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Each number of a rising array, and the slice it fills."""
    ends = [*(np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist(), len(numbers)]
    start = 0
    for end in ends:
        yield int(numbers[start]), slice(start, end)
        start = end


def read_whole(state: ArchiveState, array: ArrayLayout) -> np.ndarray:
    """An array without views (the sample index, side data), which is one shard."""
    require_memory(array.nbytes, f"{state.path}: {array.path}")
    out = np.empty(array.shape, array.dtype)
    scratch = Scratch()
    with opened_shard(state, array, array.shard_path(0, 0), len(out)) as shard:
        for start in range(0, len(out), array.chunk_rows):
            shard.read_chunk(start // array.chunk_rows, scratch, out[start : start + array.chunk_rows])
    return out


# -- values that a decoded row may have -------------------------------------------------------------------------------

SCANNED_BYTES = 1 << 20  # stays in the cache of a processor while it is read twice
DECODED_BYTES = 32 << 20  # of float32 rows that a check decodes at once


def row_out_of_range(array: np.ndarray) -> int | None:
    """The first row that holds NaN, infinity or a magnitude above the limit; None if there is none."""
    if array.dtype.kind != "f":
        return None
    step = max(1, SCANNED_BYTES // (array.dtype.itemsize * max(1, array[:1].size)))
    for start in range(0, len(array), step):
        part = array[start : start + step]
        if not _in_range(part):
            fits = np.abs(part.reshape(len(part), -1).astype(np.float64)) <= limits.MAX_VALUE
            return start + int(np.argmin(fits.all(axis=1)))
    return None


def codec_out_of_range(codec: Codec) -> str | None:
    """Why rows that are no floats may exceed the limit with this side data, or None. Other codecs have no such rows."""
    if not isinstance(codec, LinearCodec) or codec.largest <= limits.MAX_VALUE:
        return None
    return (
        "expected rows of codec linear of at most 2^100 in magnitude, found steps, scales and offsets that reach "
        f"{codec.largest:.2g}"
    )


def _in_range(values: np.ndarray) -> bool:
    """NaN is propagated by `min` and `max`, and then compares as out of range."""
    if values.dtype.itemsize == 2:  # numpy has no fast `min` of float16, none of whose finite values is too large
        bits = np.ascontiguousarray(values).view(np.uint16)
        return int((bits & 0x7FFF).max(initial=0)) < 0x7C00
    return bool(values.min(initial=0.0) >= -limits.MAX_VALUE and values.max(initial=0.0) <= limits.MAX_VALUE)


# -- packed rows of a signal ------------------------------------------------------------------------------------------

Buffers = Callable[[tuple[int, ...], np.dtype[Any]], np.ndarray]
"""(shape, dtype) -> an array to fill: by default a new one, or memory that the caller provides."""
LoadView = Callable[[int, "PackedView | None"], "PackedView"]
"""(view, earlier view whose buffers may be reused) -> the view in memory."""


@dataclass(frozen=True)
class PackedView:
    """The packed rows of one signal of one view.

    `arrays` hold all rows, [N, ...]. `sparse` has, for each sparse array, the position of every row (-1: the row does
    not need it) and the rows at these positions.
    """

    view: int
    codec: Codec = field(repr=False)
    arrays: Mapping[str, np.ndarray] = field(repr=False)
    sparse: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(repr=False)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays.values()) + sum(p.nbytes + v.nbytes for p, v in self.sparse.values())

    def gather(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The packed rows [n, ...] of these rows, ready for `codec.decode`, on the host or on a device."""
        # `take`, because it is faster than [rows]; bench/archive.py compares the two.
        gathered = {name: array.take(rows, axis=0) for name, array in self.arrays.items()}
        for name, (positions, values) in self.sparse.items():
            needed = positions.take(rows)
            needed = needed[needed >= 0]
            if len(needed):
                gathered[name] = values.take(needed, axis=0)
        return gathered

    def decode(self, rows: np.ndarray) -> np.ndarray:
        """float32 [n, width] of these rows."""
        return np.asarray(self.codec.decode(self.gather(rows)))


@dataclass(frozen=True)
class StoredSignal:
    """One signal of a teacher in an archive, and the codec that decodes it."""

    state: ArchiveState
    teacher: TeacherSpec
    signal: SignalSpec
    codec: Codec

    def decode(self, view: int, rows: Rows) -> np.ndarray:
        """float32 [n, width] of these rows of a view."""
        count = count_rows(self.state, rows)
        if not count:
            return np.zeros((0, self.signal.width), np.float32)
        require_memory(4 * count * self.signal.width, f"{self.state.path}: {count} rows of {self.signal.name}")
        arrays, sparse = self._read(view, rows, _new_array)
        decoded = np.asarray(self.codec.decode(arrays | {name: values for name, (_, values) in sparse.items()}))
        self._refuse_out_of_range(view, rows, decoded)
        return decoded

    def check(self, block: Block) -> None:
        """Decode every row of a block once; `Damaged` for one whose values are out of range."""
        rows = np.arange(block.start, block.stop)
        arrays, sparse = self._read(block.view, rows, _new_array)
        packed = PackedView(block.view, self.codec, arrays, _located(len(rows), sparse))
        step = max(1, DECODED_BYTES // (4 * self.signal.width))
        for start in range(0, len(rows), step):
            part = np.arange(start, min(start + step, len(rows)))
            self._refuse_out_of_range(block.view, rows[part], packed.decode(part))

    def _refuse_out_of_range(self, view: int, rows: Rows, values: np.ndarray) -> None:
        at = row_out_of_range(values)
        if at is not None:
            row = at if rows is None else int(rows[at])
            raise Damaged(
                f"{self.state.path}: teacher {self.teacher.owner!r}, signal {self.signal.name!r}, view {view}, "
                f"row {row}: expected finite values of at most 2^100 in magnitude, found {_worst(values[at])}; "
                "the archive was written so, do not use it"
            )

    def load(self, view: int, into: PackedView | None = None, buffers: Buffers = np.empty) -> PackedView:
        """A whole view; buffers of `into` that fit are reused, and `into` must not be used afterwards.

        Floats are checked here, so that no batch has to be, on no device: rows of integers are within the range
        because of what `open_signal` checked.
        """

        def buffer(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
            old = None if into is None else into.arrays.get(name)
            return old if old is not None and old.shape == shape and old.dtype == dtype else buffers(shape, dtype)

        arrays, sparse = self._read(view, None, buffer)
        for array in arrays.values():
            self._refuse_out_of_range(view, None, array)
        for needing, values in sparse.values():
            self._refuse_out_of_range(view, needing, values)
        return PackedView(view, self.codec, arrays, _located(self.state.spec.num_samples, sparse))

    def _read(
        self, view: int, rows: Rows, buffer: Callable[[str, tuple[int, ...], np.dtype[Any]], np.ndarray]
    ) -> tuple[dict[str, np.ndarray], dict[str, tuple[np.ndarray, np.ndarray]]]:
        """The packed rows in arrays of `buffer(name, shape, dtype)`, and the rows of sparse arrays that they need.

        The latter are, for each sparse array that any of the n rows need, the indices of these rows and its values.
        """
        part, name = f"teachers/{self.teacher.name}", self.signal.name
        teacher_layouts = layout.teacher_arrays(self.state.spec, self.teacher)
        layouts = {array.name: teacher_layouts[f"{name}/{array.name}"] for array in self.signal.arrays}
        common = {key: array for key, array in layouts.items() if key not in self.codec.sparse}
        count = count_rows(self.state, rows)
        row_bytes = sum(array.row_bytes for array in common.values())
        require_memory(count * row_bytes, f"{self.state.path}: {count} rows of {name}")
        arrays = {}
        for key, array in common.items():
            arrays[key] = buffer(key, (count, *array.row_shape), np.dtype(array.dtype))
            read_rows(self.state, part, array, view, rows, arrays[key])
        sparse = {}
        for key, needed in self.codec.rows_needing(arrays).items():
            if needed.any():
                array, needing = layouts[key], np.flatnonzero(needed)
                require_memory(len(needing) * array.row_bytes, f"{self.state.path}: {key} of {name}")
                values = np.empty((len(needing), *array.row_shape), array.dtype)
                read_rows(self.state, part, array, view, needing if rows is None else rows[needing], values)
                sparse[key] = needing, values
        return arrays, sparse


def open_signal(state: ArchiveState, teacher: TeacherSpec, signal: SignalSpec) -> StoredSignal:
    """A signal with the codec that its side data defines."""
    prefix = f"{signal.name}/"
    side = {
        name.removeprefix(prefix): read_whole(state, array)
        for name, array in layout.side_arrays(teacher).items()
        if name.startswith(prefix)
    }
    codec = open_codec(signal.codec, signal.width, signal.config, side)
    if _shapes(codec.arrays()) != _shapes(signal.arrays):
        raise Damaged(f"{state.path}: signal {signal.name!r} does not have the arrays of its codec")
    problem = codec_out_of_range(codec)
    if problem:
        raise Damaged(f"{state.path}: teacher {teacher.owner!r}, signal {signal.name!r}: {problem}")
    return StoredSignal(state, teacher, signal, codec)


def _shapes(arrays: Sequence[ArraySpec]) -> set[tuple[str, str, tuple[int, ...]]]:
    """What a codec relies on; how rows are cut into chunks is left to the writer."""
    return {(array.name, array.dtype, tuple(array.row_shape)) for array in arrays}


def _new_array(_: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    return np.empty(shape, dtype)


def _located(count: int, sparse: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Sparse arrays of `PackedView` from the rows that need them."""
    located = {}
    for name, (needing, values) in sparse.items():
        positions = np.full(count, -1, np.int32)
        positions[needing] = np.arange(len(needing), dtype=np.int32)
        located[name] = positions, values
    return located


def _worst(row: np.ndarray) -> float:
    """The value of a row that is furthest out of range: NaN, or that of the largest magnitude."""
    return float(np.ravel(row)[np.argmax(np.abs(np.ravel(row).astype(np.float64)))])


# -- views one after another ------------------------------------------------------------------------------------------


class _Load(threading.Thread):
    """A thread that loads one view."""

    def __init__(self, view: int, load: Callable[[], PackedView]) -> None:
        super().__init__(name=f"load view {view}", daemon=True)
        self.view = view
        self._load = load
        self._loaded: PackedView | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._loaded = self._load()
        except BaseException as error:  # noqa: BLE001  raised again by `result`, in the thread that takes the view
            self._error = error

    def result(self) -> PackedView:
        self.join()
        if self._error is not None:
            raise self._error
        assert self._loaded is not None
        return self._loaded

    def unused(self) -> PackedView | None:
        """A view that will not be taken, so that its buffers can be reused."""
        self.join()
        return self._loaded


class ViewLoader:
    """Views one after another: a thread loads the next one while this one is used. They share two sets of buffers.

    with archive.loader() as loader:
        view = loader.take(0, then=1)
    """

    def __init__(self, load: LoadView) -> None:
        self._load = load
        self._current: PackedView | None = None
        self._spare: PackedView | None = None
        self._next: _Load | None = None

    def __enter__(self) -> ViewLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._next is not None:
            self._next.join()
            self._next = None

    def take(self, view: int, then: int | None = None) -> PackedView:
        """Return view number `view` and start to load `then`. The view taken before must not be used afterwards."""
        if self._current is None or self._current.view != view:
            self._spare, self._current = self._current, self._finish(view)
        if then is not None and then != view and (self._next is None or self._next.view != then):
            self._next = _Load(then, self._job(then))
            self._next.start()
        return self._current

    def _finish(self, view: int) -> PackedView:
        if self._next is not None and self._next.view == view:
            started, self._next = self._next, None
            return started.result()
        return self._job(view)()

    def _job(self, view: int) -> Callable[[], PackedView]:
        """A call that loads a view into free buffers: those of the view before, or of one that was not taken."""
        if self._next is not None:
            self._spare = self._next.unused() or self._spare
            self._next = None
        spare, self._spare = self._spare, None
        return lambda: self._load(view, spare)
