"""Reading a signal of a view: rows as they are stored ("packed"), decoded, or a whole view kept in memory.

An epoch loads one view, and gathers rows from it in random order at the speed of numpy indexing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np

from redistill_cache import layout
from redistill_cache.codecs import Codec
from redistill_cache.machine import require_memory
from redistill_cache.open_state import ArchiveState
from redistill_cache.rows import Rows, count_rows, read_rows
from redistill_cache.spec import SignalSpec, TeacherSpec

__all__ = ["Buffers", "LoadView", "PackedView", "StoredSignal", "ViewLoader"]

Buffers = Callable[[tuple[int, ...], np.dtype[Any]], np.ndarray]
"""(shape, dtype) -> an array to fill: by default a new one, or memory that its owner provides."""
LoadView = Callable[[int, "PackedView | None"], "PackedView"]
"""(view, earlier view whose buffers may be reused) -> the view in memory."""


@dataclass(frozen=True)
class PackedView:
    """The packed rows of one signal of one view.

    `arrays` are whole, [N, ...]. `rare` has, for each array that few rows need, the position of every row (-1: the row
    does not need it) and the rows at these positions.
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
        """The packed rows [n, ...] of these rows, ready for `codec.decode`, on the host or on a device."""
        gathered = {name: array.take(rows, axis=0) for name, array in self.arrays.items()}  # thrice as fast as [rows]
        for name, (positions, values) in self.rare.items():
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
        arrays, rare = self._read(view, rows, lambda _, shape, dtype: np.empty(shape, dtype))
        return np.asarray(self.codec.decode(arrays | {name: values for name, (_, values) in rare.items()}))

    def load(self, view: int, into: PackedView | None = None, buffers: Buffers = np.empty) -> PackedView:
        """A whole view; buffers of `into` that fit are reused, and `into` must not be used afterwards."""

        def buffer(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
            old = None if into is None else into.arrays.get(name)
            return old if old is not None and old.shape == shape and old.dtype == dtype else buffers(shape, dtype)

        arrays, rare = self._read(view, None, buffer)
        located = {}
        for name, (needing, values) in rare.items():
            positions = np.full(self.state.spec.num_samples, -1, np.int32)
            positions[needing] = np.arange(len(needing), dtype=np.int32)
            located[name] = positions, values
        return PackedView(view, self.codec, arrays, located)

    def _read(
        self, view: int, rows: Rows, buffer: Callable[[str, tuple[int, ...], np.dtype[Any]], np.ndarray]
    ) -> tuple[dict[str, np.ndarray], dict[str, tuple[np.ndarray, np.ndarray]]]:
        """The packed rows in arrays of `buffer(name, shape, dtype)`, and what they need of rare arrays.

        That is, for each rare array which any of the n rows need: their indices in [0, n), and its rows for them.
        """
        part, name = f"teachers/{self.teacher.name}", self.signal.name
        of_teacher = layout.teacher_arrays(self.state.spec, self.teacher)
        layouts = {array.name: of_teacher[f"{name}/{array.name}"] for array in self.signal.arrays}
        common = {key: array for key, array in layouts.items() if key not in self.codec.rare}
        count = count_rows(self.state, rows)
        row_bytes = sum(array.row_bytes for array in common.values())
        require_memory(count * row_bytes, f"{self.state.path}: {count} rows of {name}")
        arrays = {}
        for key, array in common.items():
            arrays[key] = buffer(key, (count, *array.row_shape), np.dtype(array.dtype))
            read_rows(self.state, part, array, view, rows, arrays[key])
        rare = {}
        for key, needed in self.codec.rows_needing(arrays).items():
            if needed.any():
                array, needing = layouts[key], np.flatnonzero(needed)
                require_memory(len(needing) * array.row_bytes, f"{self.state.path}: {key} of {name}")
                values = np.empty((len(needing), *array.row_shape), array.dtype)
                read_rows(self.state, part, array, view, needing if rows is None else rows[needing], values)
                rare[key] = needing, values
        return arrays, rare


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
    """Views one after another: a thread loads the next one while this one is used. Two sets of buffers take turns.

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
        """Return view number `view` and start to load `then`. The view taken before must not be used any more."""
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
