"""The teacher's outputs for a training batch: from resident views of the archive, or from an online teacher."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from redistill_cache import Archive, PackedView, ViewLoader
from redistill_cache.codecs import Codec
from redistill_cache.errors import RedistillError, Refused
from redistill_cache.wording import human_bytes
from torch import Tensor

from redistill.cached_teacher import decode_rows
from redistill.ranks import RANK_EXITED, World
from redistill.signals import LOGITS
from redistill.teachers import Teacher
from redistill.training.feed import BatchPlan

__all__ = ["CachedTargets", "OnlineTargets", "Read", "SharedViews"]


# Rows that a teacher is judged by against their labels, and the fewest that say anything.
JUDGED_ROWS, JUDGED_VALUES, FEWEST_JUDGED = 2048, 1 << 26, 50


class Read(NamedTuple):
    """A signal of one teacher that a run reads, and its name among the rows of a batch."""

    teacher: str
    signal: str
    key: str


class CachedTargets:
    """targets(plan, pixels) -> the rows of every signal by its key, float32 on the device: {"logits": [B, C], ...}.

    Signals with one key are averaged: the logits of several teachers. The mean of logits is the geometric mean of the
    teachers' distributions, at every temperature at once.
    """

    def __init__(self, shared_views: SharedViews, device: torch.device) -> None:
        self.shared_views, self.device = shared_views, device
        self._resident: list[list[PackedView]] = []
        self._views: tuple[int, ...] = ()

    def begin_epoch(self, views: tuple[int, ...], next_views: tuple[int, ...] | None) -> None:
        """Make the views of an epoch resident, and start to load those of the next."""
        self._resident = []  # their buffers are about to be reused
        self._resident, self._views = self.shared_views.load(views, next_views), views

    def __call__(self, plan: BatchPlan, pixels: Tensor) -> dict[str, Tensor]:
        del pixels
        assert plan.views == self._views, f"views {self._views} are resident, the batch is of views {plan.views}"
        rows: dict[str, list[Tensor]] = {}
        for read, views in zip(self.shared_views.reads, self._resident, strict=True):
            rows.setdefault(read.key, []).append(self._rows_of(views, plan))
        return {key: values[0] if len(values) == 1 else torch.stack(values).mean(0) for key, values in rows.items()}

    def _rows_of(self, views: Sequence[PackedView], plan: BatchPlan) -> Tensor:
        """Of one signal, in the order of the batch: the views of an image follow each other."""
        rows = [decode_rows(view, plan.rows, self.device) for view in views]
        return rows[0] if len(rows) == 1 else torch.stack(rows, 1).flatten(0, 1)

    def at_chance(self, labels: np.ndarray) -> Iterator[str]:
        """A sentence for every teacher that does not predict the labels of the archive in the first resident view.

        By chance, predictions and labels of these frequencies agree as often as if they were independent.
        """
        of_logits = [
            (read.teacher, views[0])
            for read, views in zip(self.shared_views.reads, self._resident, strict=True)
            if read.signal == LOGITS
        ]
        for name, view in of_logits:
            rows = np.flatnonzero(labels >= 0)
            most = min(len(rows), JUDGED_ROWS, max(FEWEST_JUDGED, JUDGED_VALUES // view.codec.width))
            rows = rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]
            if len(rows) < FEWEST_JUDGED:
                return
            predicted, classes = view.decode(rows).argmax(1), view.codec.width
            counts = [np.bincount(values, minlength=classes) / len(rows) for values in (predicted, labels[rows])]
            right, chance = float((predicted == labels[rows]).mean()), float(counts[0] @ counts[1])
            if right <= chance + 3 * math.sqrt(chance * (1 - chance) / len(rows)):
                yield (
                    f"teacher {name} predicts {right:.1%} of {len(rows):,} labels in view {view.view}, no more "
                    f"than by chance ({chance:.1%}): check its weights, its classes and the labels"
                )

    def close(self) -> None:
        self._resident = []
        self.shared_views.close()


class OnlineTargets:
    """The baseline without an archive's rows: a teacher computes them from the pixels of the batch."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def begin_epoch(self, views: tuple[int, ...], next_views: tuple[int, ...] | None) -> None: ...

    def __call__(self, plan: BatchPlan, pixels: Tensor) -> dict[str, Tensor]:
        del plan
        return self.teacher(pixels)

    def close(self) -> None: ...


# -- views shared by the ranks of a machine ---------------------------------------------------------------------------


class SharedViews:
    """load(views, next_views) -> the packed views of every signal that is read: [read][j] is views[j].

    They are in memory, or in a temporary file if too large. Several ranks of a machine share one copy: the first of
    them loads the views into unnamed files, and the others map these files. The views of the next epoch are
    loaded in the background into a second set of buffers.
    """

    def __init__(
        self, archive: Archive, reads: Sequence[Read], views_per_image: int, memory_gib: float, world: World
    ) -> None:
        self.world = world
        self.reads = tuple(reads)
        self.codecs = [archive.codec(read.teacher, read.signal) for read in reads]
        self.shared = world.rank.local_world_size > 1 and Path("/proc/self/fd").exists()
        self.needed_bytes = 2 * views_per_image * archive.num_samples * sum(map(row_bytes, self.codecs))
        self.spilled = self.needed_bytes > memory_gib * 2**30
        self._buffers = FileArrays(on_disk=self.spilled)
        # Copies of arrays that the loader allocates itself; needed until the other ranks have mapped them.
        self._sparse = FileArrays(on_disk=self.spilled)
        self._mapped: dict[FileArray, np.ndarray] = {}
        self._loaders: list[list[ViewLoader]] = []
        self._stack = ExitStack()
        self._stack.callback(self._buffers.close)
        if world.rank.local_rank == 0 or not self.shared:
            buffers = self._buffers if self.shared or self.spilled else np.empty
            self._loaders = [
                [
                    self._stack.enter_context(archive.loader(read.teacher, read.signal, buffers=buffers))
                    for _ in range(views_per_image)
                ]
                for read in reads
            ]

    def load(self, views: tuple[int, ...], next_views: tuple[int, ...] | None) -> list[list[PackedView]]:
        """All ranks must call this at the same step; the views returned before become invalid."""
        if not self.shared:
            return self._load(views, next_views)
        self.world.barrier()  # until no rank reads the buffers that are about to be filled again
        loaded: list[list[PackedView]] = []
        exported: Any = None
        if self._loaders:
            loaded, exported = self._load_and_export(views, next_views)
        of_ranks = self.world.gather(exported)
        for result in of_ranks:
            if isinstance(result, RedistillError):
                raise result
        if not self._loaders:
            loaded = self._map(views, of_ranks[self.world.rank.rank - self.world.rank.local_rank])
        self.world.barrier()
        self._sparse.close()
        return loaded

    def close(self) -> None:
        self._stack.close()

    def _load(self, views: tuple[int, ...], next_views: tuple[int, ...] | None) -> list[list[PackedView]]:
        return [
            [
                loader.take(view, None if next_views is None else next_views[j])
                for j, (loader, view) in enumerate(zip(loaders, views, strict=True))
            ]
            for loaders in self._loaders
        ]

    def _load_and_export(
        self, views: tuple[int, ...], next_views: tuple[int, ...] | None
    ) -> tuple[list[list[PackedView]], list[list[FileView]] | RedistillError]:
        """The views, and the same for other ranks. An error is sent to all of them, so that none waits forever."""
        try:
            loaded = self._load(views, next_views)
            return loaded, [[self._export(view) for view in of_read] for of_read in loaded]
        except RedistillError as error:
            return [], error

    def _export(self, view: PackedView) -> FileView:
        arrays = {name: self._buffers.file_of(array) for name, array in view.arrays.items()}
        sparse = {name: (self._sparse.copy(at), self._sparse.copy(rows)) for name, (at, rows) in view.sparse.items()}
        return FileView(arrays, sparse)

    def _map(self, views: tuple[int, ...], exported: list[list[FileView]]) -> list[list[PackedView]]:
        return [
            [self._map_view(view, codec, files) for view, files in zip(views, of_read, strict=True)]
            for codec, of_read in zip(self.codecs, exported, strict=True)
        ]

    def _map_view(self, view: int, codec: Codec, files: FileView) -> PackedView:
        for file in files.arrays.values():  # buffers are reused, so each is mapped once
            if file not in self._mapped:
                self._mapped[file] = file.open()
        arrays = {name: self._mapped[file] for name, file in files.arrays.items()}
        return PackedView(
            view, codec, arrays, {name: (at.open(), rows.open()) for name, (at, rows) in files.sparse.items()}
        )


def row_bytes(codec: Codec) -> int:
    """Size of a packed row in memory."""
    return sum(array.row_bytes for array in codec.arrays() if array.name not in codec.sparse)


class FileArray(NamedTuple):
    """An array in a file that other processes can open."""

    path: str
    dtype: str
    shape: tuple[int, ...]

    def open(self) -> np.ndarray:
        try:
            return np.memmap(self.path, self.dtype, "r", shape=self.shape)
        except (FileNotFoundError, ProcessLookupError) as error:  # the files of a process end with it
            raise Refused(RANK_EXITED) from error


class FileView(NamedTuple):
    """A `PackedView` whose arrays are in files."""

    arrays: dict[str, FileArray]
    sparse: dict[str, tuple[FileArray, FileArray]]


class FileArrays:
    """Allocates arrays in unnamed files: in memory, or in the directory for temporary files.

    Other processes on this machine open them through /proc. However the processes end, no file remains.
    """

    def __init__(self, *, on_disk: bool) -> None:
        self.on_disk = on_disk
        self._open: list[tuple[np.ndarray, IO[bytes]]] = []

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        file: IO[bytes] = (
            tempfile.TemporaryFile() if self.on_disk else os.fdopen(os.memfd_create("redistill"), "r+b")  # noqa: SIM115  closed by `close`
        )
        reserve(file, math.prod(shape) * dtype.itemsize)
        array = np.memmap(file, dtype, "r+", shape=shape)
        self._open.append((array, file))
        return array

    def file_of(self, array: np.ndarray) -> FileArray:
        """The file of an array that was allocated here, for another process."""
        file = next(file for allocated, file in self._open if allocated is array)
        return FileArray(f"/proc/{os.getpid()}/fd/{file.fileno()}", array.dtype.str, array.shape)

    def copy(self, array: np.ndarray) -> FileArray:
        allocated = self(array.shape, array.dtype)
        allocated[...] = array
        return self.file_of(allocated)

    def close(self) -> None:
        """Close the files. Arrays that are still mapped, here or in another process, stay valid."""
        for _, file in self._open:
            file.close()
        self._open.clear()


def reserve(file: IO[bytes], nbytes: int) -> None:
    """Allocate the space now: without it, a full disk kills the process with a signal when the array is filled."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, nbytes)
        else:
            file.truncate(nbytes)
    except OSError as error:
        file.close()
        raise Refused(
            f"no room for {human_bytes(nbytes)} of teacher rows in {tempfile.gettempdir()}: {error.strerror}; "
            "set TMPDIR to a disk with room, or raise --cache-memory"
        ) from error
