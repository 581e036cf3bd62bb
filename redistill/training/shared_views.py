"""The packed rows of an epoch's views: in memory, in a file where there is too little, and once for a machine."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
from redistill_cache import Archive, PackedView, ViewLoader
from redistill_cache.codecs import Codec
from redistill_cache.errors import RedistillError, Refused
from redistill_cache.wording import human_bytes

from redistill.ranks import World
from redistill.signals import LOGITS

__all__ = ["SharedViews"]


class InFile(NamedTuple):
    """An array in a file, as one process tells another."""

    path: str
    dtype: str
    shape: tuple[int, ...]

    def open(self) -> np.ndarray:
        return np.memmap(self.path, self.dtype, "r", shape=self.shape)


class SharedView(NamedTuple):
    """A `PackedView` whose arrays lie in files."""

    arrays: dict[str, InFile]
    rare: dict[str, tuple[InFile, InFile]]


class FileArrays:
    """Arrays in files without a name: in memory, or on the disk for temporary files.

    Another process of this machine opens them through this one. However the processes end, nothing is left behind.
    """

    def __init__(self, *, on_disk: bool) -> None:
        self.on_disk = on_disk
        self._kept: list[tuple[np.ndarray, IO[bytes]]] = []

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        file: IO[bytes] = (
            tempfile.TemporaryFile() if self.on_disk else os.fdopen(os.memfd_create("redistill"), "r+b")  # noqa: SIM115  kept
        )
        reserve(file, math.prod(shape) * dtype.itemsize)
        array = np.memmap(file, dtype, "r+", shape=shape)
        self._kept.append((array, file))
        return array

    def where(self, array: np.ndarray) -> InFile:
        """Where another process finds one of these arrays."""
        file = next(file for kept, file in self._kept if kept is array)
        return InFile(f"/proc/{os.getpid()}/fd/{file.fileno()}", array.dtype.str, array.shape)

    def copy(self, array: np.ndarray) -> InFile:
        inside = self(array.shape, array.dtype)
        inside[...] = array
        return self.where(inside)

    def close(self) -> None:
        """Let go of all; whoever has one open keeps it."""
        for _, file in self._kept:
            file.close()
        self._kept.clear()


def reserve(file: IO[bytes], nbytes: int) -> None:
    """Take the room now: a disk that is full is said in words, not by a signal when the array is filled."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, nbytes)
        else:
            file.truncate(nbytes)
    except OSError as error:
        file.close()
        raise Refused(
            f"no room for {human_bytes(nbytes)} of the teacher's rows in {tempfile.gettempdir()}: {error.strerror}; "
            "set TMPDIR to a disk with room, or give more --cache-memory"
        ) from error


class SharedViews:
    """take(views, then) -> the packed views of every teacher: [teacher][j] is views[j].

    The views of an epoch are whole; those of the next are loaded in the background into a second set of buffers. Where
    several processes of a machine train, the first of them loads, and all of them look at the same memory.
    """

    def __init__(
        self, archive: Archive, teachers: Sequence[str], views_per_image: int, memory: float, world: World
    ) -> None:
        self.world = world
        self.codecs = [archive.codec(teacher, LOGITS) for teacher in teachers]
        self.shared = world.rank.local_world > 1 and Path("/proc/self/fd").exists()
        needed = 2 * views_per_image * archive.num_samples * sum(map(row_bytes, self.codecs))
        self.spilled = needed > memory * 2**30
        self._buffers = FileArrays(on_disk=self.spilled)
        self._passing = FileArrays(on_disk=self.spilled)
        self._opened: dict[InFile, np.ndarray] = {}
        self._loaders: list[list[ViewLoader]] = []
        if world.rank.local == 0 or not self.shared:
            buffers = self._buffers if self.shared or self.spilled else np.empty
            self._loaders = [
                [archive.loader(teacher, LOGITS, buffers=buffers) for _ in range(views_per_image)]
                for teacher in teachers
            ]

    def take(self, views: tuple[int, ...], then: tuple[int, ...] | None) -> list[list[PackedView]]:
        """All processes must ask at the same point, and the views taken before are given up by all."""
        if not self.shared:
            return self._load(views, then)
        self.world.barrier()  # nobody looks any more at the buffers that are about to be filled again
        loaded: list[list[PackedView]] = []
        told: Any = None
        if self._loaders:
            loaded, told = self._load_and_tell(views, then)
        everybody = self.world.gather(told)
        for said in everybody:
            if isinstance(said, RedistillError):
                raise said
        if not self._loaders:
            loaded = self._look(views, everybody[self.world.rank.rank - self.world.rank.local])
        self.world.barrier()
        self._passing.close()
        return loaded

    def close(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for loaders in self._loaders:
            for loader in loaders:
                loader.__exit__(kind, error, trace)
        self._buffers.close()

    def _load(self, views: tuple[int, ...], then: tuple[int, ...] | None) -> list[list[PackedView]]:
        return [
            [
                loader.take(view, None if then is None else then[j])
                for j, (loader, view) in enumerate(zip(loaders, views, strict=True))
            ]
            for loaders in self._loaders
        ]

    def _load_and_tell(
        self, views: tuple[int, ...], then: tuple[int, ...] | None
    ) -> tuple[list[list[PackedView]], Any]:
        """The views, and what the other processes must know of them: an error is for them, too."""
        try:
            loaded = self._load(views, then)
            return loaded, [[self._tell(view) for view in of_teacher] for of_teacher in loaded]
        except RedistillError as error:
            return [], error

    def _tell(self, view: PackedView) -> SharedView:
        arrays = {name: self._buffers.where(array) for name, array in view.arrays.items()}
        rare = {name: (self._passing.copy(at), self._passing.copy(rows)) for name, (at, rows) in view.rare.items()}
        return SharedView(arrays, rare)

    def _look(self, views: tuple[int, ...], told: list[list[SharedView]]) -> list[list[PackedView]]:
        """The same views through the files of the process that has loaded them."""
        return [
            [self._open(view, codec, one) for view, one in zip(views, of_teacher, strict=True)]
            for codec, of_teacher in zip(self.codecs, told, strict=True)
        ]

    def _open(self, view: int, codec: Codec, told: SharedView) -> PackedView:
        for where in told.arrays.values():  # buffers are used again and again
            if where not in self._opened:
                self._opened[where] = where.open()
        arrays = {name: self._opened[where] for name, where in told.arrays.items()}
        return PackedView(
            view, codec, arrays, {name: (at.open(), rows.open()) for name, (at, rows) in told.rare.items()}
        )


def row_bytes(codec: Codec) -> int:
    """Of a packed row in memory."""
    return sum(array.row_bytes for array in codec.arrays() if array.name not in codec.rare)
