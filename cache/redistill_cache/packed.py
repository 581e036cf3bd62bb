"""A whole view in memory as it is stored: an epoch gathers rows from it at random, at the speed of numpy indexing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np

from redistill_cache import layout
from redistill_cache.codecs import Codec
from redistill_cache.open_state import ArchiveState, require_memory
from redistill_cache.rows import opened_shard, read_rows, row_block
from redistill_cache.shards import Scratch
from redistill_cache.spec import SignalSpec, TeacherSpec

__all__ = ["Buffers", "LoadView", "PackedView", "ViewLoader"]

Buffers = Callable[[tuple[int, ...], np.dtype[Any]], np.ndarray]
"""(shape, dtype) -> an array to fill: in memory, or where its owner wants it."""
LoadView = Callable[[int, "PackedView | None"], "PackedView"]
"""(view, earlier view whose buffers may be reused) -> the view in memory."""


@dataclass(frozen=True)
class PackedView:
    """The packed rows of one signal of one view.

    `arrays` are whole, [N, ...]. `rare` holds, for arrays that few rows need, where row i is kept (-1: not needed)
    and the rows that are.
    """

    view: int
    codec: Codec = field(repr=False)
    arrays: Mapping[str, np.ndarray] = field(repr=False)
    rare: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(repr=False)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays.values()) + sum(p.nbytes + v.nbytes for p, v in self.rare.values())

    def gather(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The packed rows [n, ...] of these rows, ready for `codec.decode`, here or on a device."""
        gathered = {name: array.take(rows, axis=0) for name, array in self.arrays.items()}  # thrice as fast as [rows]
        for name, (places, values) in self.rare.items():
            here = places.take(rows)
            here = here[here >= 0]
            if len(here):
                gathered[name] = values.take(here, axis=0)
        return gathered

    def decode(self, rows: np.ndarray) -> np.ndarray:
        """float32 [n, width] of these rows."""
        return np.asarray(self.codec.decode(self.gather(rows)))

    @classmethod
    def load(
        cls,
        contents: ArchiveState,
        teacher: TeacherSpec,
        signal: SignalSpec,
        codec: Codec,
        view: int,
        into: PackedView | None = None,
        buffers: Buffers = np.empty,
    ) -> PackedView:
        """Read a view; buffers of `into` that fit are used again, and `into` must not be used afterwards."""
        all_arrays = layout.teacher_arrays(contents.spec, teacher)
        layouts = {array.name: all_arrays[f"{signal.name}/{array.name}"] for array in signal.arrays}
        count = contents.spec.num_samples
        plenty = sum(array.row_bytes for name, array in layouts.items() if name not in codec.rare)
        require_memory(count * plenty, f"{contents.path}: a view of {signal.name}")
        arrays: dict[str, np.ndarray] = {}
        for name, array in layouts.items():
            if name in codec.rare:
                continue
            buffer = None if into is None else into.arrays.get(name)
            shape = (count, *array.row_shape)
            if buffer is None or buffer.shape != shape or buffer.dtype != array.dtype:
                buffer = buffers(shape, np.dtype(array.dtype))
            _read_view(contents, f"teachers/{teacher.name}", array, view, buffer)
            arrays[name] = buffer
        rare = {}
        for name, needed in codec.rows_needing(arrays).items():
            if needed.any():
                rows = np.flatnonzero(needed)
                require_memory(len(rows) * layouts[name].row_bytes, f"{contents.path}: {name} of {signal.name}")
                values = np.empty((len(rows), *layouts[name].row_shape), layouts[name].dtype)
                read_rows(contents, f"teachers/{teacher.name}", layouts[name], view, rows, values)
                places = np.full(count, -1, np.int32)
                places[rows] = np.arange(len(rows), dtype=np.int32)
                rare[name] = (places, values)
        return cls(view, codec, arrays, rare)


def _read_view(contents: ArchiveState, part: str, array: layout.ArrayLayout, view: int, out: np.ndarray) -> None:
    """All rows of a view, chunk after chunk straight into their place."""
    scratch = Scratch()
    for index in range(contents.spec.blocks_per_view):
        block = row_block(contents, part, view, index)
        path = array.shard_path(view, index)
        with opened_shard(contents, array, path, block.stop - block.start) as shard:
            for start in range(block.start, block.stop, array.chunk_rows):
                stop = min(start + array.chunk_rows, block.stop)
                shard.read_chunk((start - block.start) // array.chunk_rows, scratch, out[start:stop])


class _Load(threading.Thread):
    """One view on its way into memory."""

    def __init__(self, view: int, load: Callable[[], PackedView]) -> None:
        super().__init__(name=f"load view {view}", daemon=True)
        self.view = view
        self._load = load
        self._loaded: PackedView | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._loaded = self._load()
        except BaseException as error:  # noqa: BLE001  raised again by the thread that asks for the view
            self._error = error

    def result(self) -> PackedView:
        self.join()
        if self._error is not None:
            raise self._error
        assert self._loaded is not None
        return self._loaded

    def leftover(self) -> PackedView | None:
        """What was loaded and nobody wants: its buffers can be used again."""
        self.join()
        return self._loaded


class ViewLoader:
    """Views one after another, the next one loaded by a thread while this one is in use; two sets of buffers in turn.

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
        """View number `view`, loaded by now or now, while `then` is loaded next. The view taken before is given up."""
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
        """Loading a view into buffers that are free: those of the view before, or of one that nobody came for."""
        if self._next is not None:
            self._spare = self._next.leftover() or self._spare
            self._next = None
        spare, self._spare = self._spare, None
        return lambda: self._load(view, spare)
