"""Reading an archive.

    archive = open_archive("teacher.redistill.zarr")
    archive.logits(view=0, rows=[3, 1, 4])        # float32 [3, classes]

What comes back is what was committed, or an error: never a fill value, never a number that was not checked.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from redistill_cache import layout
from redistill_cache.codecs import Codec, open_codec
from redistill_cache.errors import Damaged, OutOfRange, UsageError
from redistill_cache.fetching import fetch_archive, is_url
from redistill_cache.journal import FileEntry, sha256
from redistill_cache.keys import PackedKeys
from redistill_cache.layout import Block
from redistill_cache.open_state import (
    ArchiveState,
    check_keys_size,
    check_metadata_on_disk,
    check_sizes_on_disk,
    read_state,
    require_memory,
)
from redistill_cache.packed import Buffers, PackedView, ViewLoader
from redistill_cache.rows import check_rows, check_view, opened_shard, read_rows, read_whole
from redistill_cache.shards import Scratch
from redistill_cache.spec import ArchiveSpec, ArraySpec, SignalSpec, TeacherSpec
from redistill_cache.storage import disk_trouble
from redistill_cache.verify import damaged_files

__all__ = ["Archive", "open_archive"]


def open_archive(path: str | Path, *, allow_partial: bool = False, verify: Literal["once", "full"] = "once") -> Archive:
    """Open an archive for reading, after checking that it is whole.

    Without `allow_partial` an archive must be sealed; with it, an unsealed one offers exactly its committed blocks.
    Every file is hashed when it is first read on this machine; `verify="full"` hashes all of them now.
    Of an archive at a URL (http://, https://, or what fsspec opens) the verified local copy is opened, fetched once.
    """
    if verify not in ("once", "full"):
        raise UsageError(f"verify must be 'once' or 'full', found {verify!r}")
    if is_url(path):
        path = fetch_archive(str(path))
    path = Path(path).absolute()  # the process, or another one, may go on elsewhere
    with disk_trouble("read", path):
        contents = read_state(path, allow_partial=allow_partial)
        check_metadata_on_disk(contents)
        check_sizes_on_disk(contents)
    if verify == "full":
        damaged = damaged_files(contents, full=True)
        if damaged:
            raise Damaged(f"{path}: {len(damaged)} files are damaged, the first: {damaged[0]}")
    return Archive(contents)


def _reopen(path: Path, identity: str | None) -> Archive:
    archive = open_archive(path, allow_partial=identity is None)
    if archive.id != identity:
        raise Damaged(f"{path} changed while it was open: its id was {identity}, now it is {archive.id}")
    return archive


class Archive:
    """An open archive: a description in memory, and rows read on demand. Share it between threads and processes."""

    def __init__(self, contents: ArchiveState) -> None:
        """Use `open_archive`."""
        self.contents = contents
        self._codecs: dict[tuple[str, str], Codec] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.id)

    def __repr__(self) -> str:
        state = self.id[:12] if self.id else "not sealed"
        return f"<Archive {self.path.name}: {self.num_samples} samples, {self.num_views} views, {state}>"

    # -- what it is -----------------------------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        return self.contents.path

    @property
    def spec(self) -> ArchiveSpec:
        return self.contents.spec

    @property
    def id(self) -> str | None:
        """The SHA-256 of the manifest; None while the archive is not sealed."""
        return self.contents.id

    @property
    def complete(self) -> bool:
        return self.contents.id is not None

    @property
    def num_samples(self) -> int:
        return self.spec.num_samples

    @property
    def num_views(self) -> int:
        return self.contents.num_views

    @property
    def num_classes(self) -> int:
        return self.spec.num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.spec.class_names

    @property
    def teachers(self) -> Mapping[str, TeacherSpec]:
        return self.contents.teachers

    # -- samples --------------------------------------------------------------------------------------------------

    def _samples(self, name: str, key_bytes: int = 1) -> np.ndarray:
        with disk_trouble("read", self.path):
            return read_whole(self.contents, layout.sample_arrays(self.spec, key_bytes)[name])

    @cached_property
    def keys(self) -> PackedKeys:
        """The key of every row."""
        offsets = self._samples("key_offsets")
        total = int(offsets[-1])
        array = layout.sample_arrays(self.spec, max(total, 1))["key_bytes"]
        try:
            check_keys_size(self.spec, total, self.contents.files[array.shard_path(0, 0)].size)
        except UsageError as error:
            raise Damaged(f"{self.path}: {error}") from None
        metadata = array.metadata_bytes()
        if self.contents.files[array.metadata_path] != FileEntry(len(metadata), sha256(metadata)):
            raise Damaged(f"{self.path}: the sample keys do not have the {total} bytes that their offsets say")
        return PackedKeys(self._samples("key_bytes", total), offsets)

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

    # -- views ----------------------------------------------------------------------------------------------------

    def view_params(self, view: int, rows: object | None = None) -> dict[str, np.ndarray]:
        """The stored parameters of one view: one integer array per name, rows in the order asked for."""
        view, wanted = check_view(self.contents, view), check_rows(self.contents, rows)
        arrays = layout.view_arrays(self.spec)
        return {name: self._rows("views", array, view, wanted) for name, array in arrays.items()}

    def canaries(self, view: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows [K] and fingerprints [K, 8, 8, 3] of the canaries of one view."""
        view = check_view(self.contents, view)
        count = self.spec.canaries_per_view
        if not count:
            raise OutOfRange(f"{self.path} has no canaries")
        block = Block("canaries", view, 0, 0, count)
        if not self.contents.holds(block):
            raise OutOfRange(f"{self.path}: the canaries of view {view} are not written yet")
        found = {}
        for name, array in layout.canary_arrays(self.spec).items():
            found[name] = np.empty((count, *array.row_shape), array.dtype)
            with (
                disk_trouble("read", self.path),
                opened_shard(self.contents, array, array.shard_path(view, 0), count) as shard,
            ):
                shard.read_chunk(0, Scratch(), found[name])
        if int(found["row"].max()) >= self.num_samples:
            raise Damaged(f"{self.path}: a canary of view {view} is row {found['row'].max()} of {self.num_samples}")
        return found["row"], found["pixels"]

    def _rows(self, part: str, array: layout.ArrayLayout, view: int, rows: np.ndarray) -> np.ndarray:
        require_memory(len(rows) * array.row_bytes, f"{self.path}: {len(rows)} rows of {array.path}")
        out = np.empty((len(rows), *array.row_shape), array.dtype)
        with disk_trouble("read", self.path):
            read_rows(self.contents, part, array, view, rows, out)
        return out

    def rows_available(self, view: int, teacher: str | None = None) -> np.ndarray:
        """The rows of one view that are committed, with their view parameters: all of them once sealed."""
        view = check_view(self.contents, view)
        part = f"teachers/{self.teacher(teacher).name}"
        parts = [part, "views"] if self.spec.view_arrays else [part]
        here = []
        for index in range(self.spec.blocks_per_view):
            start = index * self.spec.block_rows
            stop = min(start + self.spec.block_rows, self.num_samples)
            if all(self.contents.holds(Block(part, view, index, start, stop)) for part in parts):
                here.append(np.arange(start, stop))
        return np.concatenate(here) if here else np.zeros(0, np.int64)

    # -- teachers -------------------------------------------------------------------------------------------------

    def teacher(self, name: str | None = None) -> TeacherSpec:
        """One teacher by name, or the only one."""
        known = ", ".join(self.teachers) or "none"
        if name is None:
            if len(self.teachers) != 1:
                raise OutOfRange(f"{self.path} has {len(self.teachers)} teachers; say which of: {known}")
            return next(iter(self.teachers.values()))
        if name not in self.teachers:
            raise OutOfRange(f"{self.path} has no teacher {name!r}; teachers: {known}")
        return self.teachers[name]

    def signal(self, teacher: str | None = None, signal: str = "logits") -> tuple[TeacherSpec, SignalSpec]:
        chosen = self.teacher(teacher)
        found = chosen.signal(signal)
        if found is None:
            names = ", ".join(item.name for item in chosen.signals)
            raise OutOfRange(f"teacher {chosen.name!r} of {self.path} has no signal {signal!r}; signals: {names}")
        return chosen, found

    def codec(self, teacher: str | None = None, signal: str = "logits") -> Codec:
        """What turns the stored integers of a signal back into its values."""
        chosen, found = self.signal(teacher, signal)
        with self._lock:
            codec = self._codecs.get((chosen.name, found.name))
            if codec is None:
                prefix = f"{found.name}/"
                arrays = layout.side_arrays(chosen).items()
                with disk_trouble("read", self.path):
                    side = {
                        name.removeprefix(prefix): read_whole(self.contents, array)
                        for name, array in arrays
                        if name.startswith(prefix)
                    }
                codec = open_codec(found.codec, found.width, found.config, side)
                if _shapes(codec.arrays()) != _shapes(found.arrays):
                    raise Damaged(f"{self.path}: signal {found.name!r} does not have the arrays of its codec")
                self._codecs[chosen.name, found.name] = codec
        return codec

    def logits(self, view: int, rows: object | None = None, teacher: str | None = None) -> np.ndarray:
        """float32 [n, classes]; without the constant of a row that softmax does not see, unless it was kept."""
        return self._decoded(view, rows, teacher, "logits")

    def features(self, view: int, rows: object | None = None, *, layer: str, teacher: str | None = None) -> np.ndarray:
        """float32 [n, width] of a feature layer."""
        return self._decoded(view, rows, teacher, layer)

    def _decoded(self, view: int, rows: object | None, teacher: str | None, signal: str) -> np.ndarray:
        chosen, found = self.signal(teacher, signal)
        codec = self.codec(chosen.name, signal)
        view, wanted = check_view(self.contents, view), check_rows(self.contents, rows)
        if not len(wanted):
            return np.zeros((0, found.width), np.float32)
        require_memory(4 * len(wanted) * found.width, f"{self.path}: {len(wanted)} rows of {signal}")
        part = f"teachers/{chosen.name}"
        layouts = {a.name: layout.teacher_arrays(self.spec, chosen)[f"{signal}/{a.name}"] for a in found.arrays}
        arrays = {
            name: self._rows(part, array, view, wanted) for name, array in layouts.items() if name not in codec.rare
        }
        for name, needed in codec.rows_needing(arrays).items():
            if needed.any():
                arrays[name] = self._rows(part, layouts[name], view, wanted[needed])
        return np.asarray(codec.decode(arrays))

    def load_view(
        self,
        view: int,
        teacher: str | None = None,
        signal: str = "logits",
        into: PackedView | None = None,
        buffers: Buffers = np.empty,
    ) -> PackedView:
        """The stored rows of a whole view in memory, to gather from at random; `into` lends its buffers."""
        chosen, found = self.signal(teacher, signal)
        codec = self.codec(chosen.name, signal)
        with disk_trouble("read", self.path):
            return PackedView.load(self.contents, chosen, found, codec, check_view(self.contents, view), into, buffers)

    def loader(self, teacher: str | None = None, signal: str = "logits", buffers: Buffers = np.empty) -> ViewLoader:
        """Whole views one after another, the next one loaded in the background."""
        return ViewLoader(lambda view, into: self.load_view(view, teacher, signal, into=into, buffers=buffers))


def _shapes(arrays: Sequence[ArraySpec]) -> set[tuple[str, str, tuple[int, ...]]]:
    """What a codec relies on; how rows are cut into chunks is not its business."""
    return {(array.name, array.dtype, tuple(array.row_shape)) for array in arrays}
