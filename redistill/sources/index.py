"""The index of a source: key, label, digest and size of every sample, computed once and cached.

Indexing reads every sample once: the same bytes are hashed and their header is parsed; pixels are decoded only where
bad images are to be excluded. Worker processes divide the samples among themselves. For sources made of files the
result is saved in the user's cache folder, and a sample whose file has the same size, times and inode is not read again
next time, unless `reuse=False`. Files modified less than two seconds before they were indexed are read again next
time, because a later edit might leave the same times.

`redistill index` writes the same table to a file that machines share: `folder:PATH?index=FILE`. There, size and
modification time decide, as a copy of the images has other inodes. An image that was changed in spite of that is
refused when a view of it is rendered, since its bytes no longer have the digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import multiprocessing
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from redistill_cache.errors import Damaged, Refused
from redistill_cache.keys import PackedKeys, pack_keys
from redistill_cache.machine import usable_cores
from redistill_cache.storage import LOCAL, disk_trouble
from redistill_cache.verified_files import cache_folder

from redistill.interrupts import interrupts_blocked
from redistill.sources import OnBadImage
from redistill.sources.base import ListedSource, Source, digest_of, streamed
from redistill.sources.images import BadImage, decode_array, image_size

__all__ = [
    "HEADER",
    "ImageTable",
    "SourceIndex",
    "index_source",
    "load_arrays",
    "old_enough",
    "pair_up",
    "read_chunk",
    "repeats",
    "save_arrays",
]

CHUNK = 256
# Below this many samples to read, starting processes takes longer than reading.
WORTH_PROCESSES = 4096
CACHE_VERSION = 2
CACHE_ARRAYS = ("version", "key_data", "key_offsets", "stamps", "digests", "sizes", "level")
# How far a sample has been checked: not read, header parsed, pixels decoded.
UNKNOWN, HEADER, DECODED = 0, 1, 2
SIZE_AND_MTIME = slice(0, 2)  # of a stamp

# The reason why a sample that was passed as `without` is excluded.
LISTED = "the archive excludes it"

IndexProgress = Callable[[int, int], None]
BadImages = dict[int, tuple[str, str]]  # key and reason, by sample


@dataclass(frozen=True)
class SourceIndex:
    """What identifies the samples of a source. Row r describes sample `rows[r]`; only excluded samples have no row."""

    keys: PackedKeys
    labels: np.ndarray  # [N] int64, -1 without a label
    digests: np.ndarray  # [N, 32] uint8: sha256 of the encoded bytes
    sizes: np.ndarray  # [N, 2] uint32: height and width of the upright image
    rows: np.ndarray  # [N] int64: the index of the sample in its source
    class_names: tuple[str, ...] | None
    excluded: tuple[tuple[str, str], ...] = ()  # key and reason of each bad image
    reused: int = 0  # rows taken from the cache of an earlier run

    def __len__(self) -> int:
        return len(self.rows)


def index_source(
    source: Source,
    *,
    workers: int | None = None,
    progress: IndexProgress | None = None,
    on_bad_image: OnBadImage = "fail",
    without: Collection[str] = (),
    reuse: bool = True,
    save_to: Path | None = None,
) -> SourceIndex:
    """Key, label, digest and size of every sample of `source` but those with the keys `without`.

    `workers` processes read samples (None: one per core if there is enough to read; 0: none). A script that uses
    processes needs the usual `if __name__ == "__main__":`. `progress(done, total)` is called as samples are indexed.
    With `on_bad_image="exclude"`, bad images are left out and listed, and every image is decoded to find them all: an
    archive fixes its rows before the first epoch decodes their pixels. Samples that an archive excludes are passed as
    `without`: they are left out whether they are bad or not. `save_to` is a file for `?index=`.
    """
    if save_to is not None and not isinstance(source, ListedSource):
        raise Refused(f"{source.spec} has no files whose index could be shared; expected folder:PATH or wds:PATTERN")
    level = DECODED if on_bad_image == "exclude" else HEADER
    table = ImageTable.empty(len(source))
    if isinstance(source, ListedSource):
        stamps = source.stamps()
        if reuse:
            if isinstance(source, IndexedSource):
                table = source.images.copy()
            table.fill(source, stamps, load_table(_index_file(source)))
            if source.index_file is not None:
                table.fill(source, stamps, _shared_table(source.index_file), SIZE_AND_MTIME)
    todo = np.flatnonzero(table.level < level)
    started = time.time_ns()
    tars = streamed(source)
    # Few samples of tars that are elsewhere are read without the rest of their tars.
    reader = source if tars is None or 4 * len(todo) >= len(source) else tars.by_parts()
    keys, labels, bad = _read_all(reader, todo, table, level, _processes(workers, len(todo)), progress)
    if isinstance(source, ListedSource):
        keys, labels = source.keys, source.labels
        saved = SavedTable(source.keys, stamps, table)
        if len(todo):
            save_arrays(_index_file(source), **saved.arrays(started))
    left_out = _samples_of_keys(keys, without) if without else np.zeros(0, np.int64)
    unlisted = {i: reason for i, reason in bad.items() if i not in set(left_out.tolist())} if bad else {}
    if unlisted and on_bad_image == "fail":
        raise _refusal(unlisted, len(source))
    if save_to is not None:
        with disk_trouble("write", save_to):
            LOCAL.make_directories(save_to.absolute().parent)
            tar_arrays = source.tar_arrays() if isinstance(source, IndexedSource) else {}
            LOCAL.publish(save_to.absolute(), _npz(saved.arrays(started) | tar_arrays))
    bad |= {i: (keys[i], LISTED) for i in left_out.tolist()}
    rows = np.setdiff1d(np.arange(len(source)), np.array(sorted(bad), np.int64), assume_unique=True)
    return SourceIndex(
        keys=keys if not bad else keys.take(rows),
        labels=labels[rows],
        digests=table.digests if not bad else table.digests[rows],
        sizes=table.sizes if not bad else table.sizes[rows],
        rows=rows,
        class_names=source.class_names,
        excluded=tuple(bad[i] for i in sorted(bad)),
        reused=len(source) - len(todo),
    )


def _samples_of_keys(keys: PackedKeys, wanted: Collection[str]) -> np.ndarray:
    """The samples with these keys."""
    packed = pack_keys(wanted)
    samples, partners = pair_up(keys.hashes(), packed.hashes())
    found: np.ndarray = samples[keys.equal_at(samples, packed, partners)]
    return found


@runtime_checkable
class IndexedSource(ListedSource, Protocol):
    """A source that has read all its images when it was opened."""

    images: ImageTable

    def tar_arrays(self) -> dict[str, np.ndarray]:
        """What a shared index holds in addition, so that no tar is read when the source is opened with it."""


@dataclass
class ImageTable:
    """Digest, size and level of every sample of the source, filled from the cache and by reading."""

    digests: np.ndarray
    sizes: np.ndarray
    level: np.ndarray

    @classmethod
    def empty(cls, n: int) -> ImageTable:
        return cls(np.zeros((n, 32), np.uint8), np.zeros((n, 2), np.uint32), np.zeros(n, np.uint8))

    def copy(self) -> ImageTable:
        return ImageTable(self.digests.copy(), self.sizes.copy(), self.level.copy())

    def fill(
        self, source: ListedSource, stamps: np.ndarray, saved: SavedTable | None, columns: slice = slice(None)
    ) -> None:
        """Take what is known better of the files that have the stamp, in these columns, that was saved."""
        if saved is None:
            return
        rows, old = pair_up(source.keys.hashes(), saved.keys.hashes())
        same = (stamps[rows, columns] == saved.stamps[old, columns]).all(axis=1)
        same &= self.level[rows] < saved.table.level[old]
        same &= source.keys.equal_at(rows, saved.keys, old) & (stamps[rows, 0] >= 0)
        rows, old = rows[same], old[same]
        self.digests[rows], self.sizes[rows] = saved.table.digests[old], saved.table.sizes[old]
        self.level[rows] = saved.table.level[old]


# -- reading samples --------------------------------------------------------------------------------------------------

_Chunk = tuple[np.ndarray, list[str], np.ndarray, np.ndarray, np.ndarray, BadImages]


def _read_all(
    source: Source, todo: np.ndarray, table: ImageTable, level: int, processes: int, progress: IndexProgress | None
) -> tuple[PackedKeys, np.ndarray, BadImages]:
    """Read the samples `todo` into the table; returns their keys and labels, and the bad images."""
    labels, bad = np.zeros(len(source), np.int64), {}
    done = len(source) - len(todo)

    def keys() -> Iterator[str]:
        nonlocal done
        for rows, chunk_keys, chunk_labels, digests, sizes, chunk_bad in _chunks(source, todo, level, processes):
            table.digests[rows], table.sizes[rows], labels[rows] = digests, sizes, chunk_labels
            table.level[rows] = level
            table.level[list(chunk_bad)] = UNKNOWN
            bad.update(chunk_bad)
            done += len(rows)
            if progress is not None:
                progress(done, len(source))
            yield from chunk_keys

    return pack_keys(keys()), labels, bad


def _processes(workers: int | None, todo: int) -> int:
    if workers is not None:
        return workers
    return usable_cores() if todo >= WORTH_PROCESSES else 0


def _chunks(source: Source, todo: np.ndarray, level: int, processes: int) -> Iterator[_Chunk]:
    pieces = [todo[i : i + CHUNK] for i in range(0, len(todo), CHUNK)]
    if processes < 1:
        yield from (read_chunk(source, rows, level) for rows in pieces)
        return
    # Not fork: a parent that has run torch holds locks of threads that a forked child does not have.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_process, (source,)) as pool:
        with interrupts_blocked():  # in the processes, which start here
            ahead = [pool.submit(_read_chunk_in_process, rows, level) for rows in pieces[: 4 * processes]]
        upcoming = iter(pieces[4 * processes :])
        try:
            while ahead:
                yield ahead.pop(0).result()
                rows = next(upcoming, None)
                if rows is not None:
                    ahead.append(pool.submit(_read_chunk_in_process, rows, level))
        except BrokenProcessPool as error:
            raise Refused(
                "a process that reads images died; if memory ran out, use fewer --workers; then run the same command "
                "again"
            ) from error
        finally:
            for future in ahead:
                future.cancel()


_source_of_process: Source


def _start_process(source: Source) -> None:
    global _source_of_process  # the only way to pass state to the processes of a pool
    _source_of_process = source


def _read_chunk_in_process(rows: np.ndarray, level: int) -> _Chunk:
    return read_chunk(_source_of_process, rows, level)


def read_chunk(source: Source, rows: np.ndarray, level: int) -> _Chunk:
    """The rows, their keys, labels, digests and sizes, and the bad images among them."""
    digests, sizes = np.zeros((len(rows), 32), np.uint8), np.zeros((len(rows), 2), np.uint32)
    keys, labels, bad = [], np.zeros(len(rows), np.int64), {}
    for position, i in enumerate(rows.tolist()):
        key = f"sample {i}"
        try:
            sample = source.sample(i)
            key, labels[position] = sample.key, sample.label
            digests[position] = np.frombuffer(digest_of(sample.payload, name=key), np.uint8)
            if level == DECODED and isinstance(sample.payload, bytes):
                decode_array(sample.payload, name=key, max_pixels=sample.max_pixels)
            sizes[position] = image_size(sample.payload, name=key, max_pixels=sample.max_pixels)
        except BadImage as error:
            key = error.name
            bad[i] = key, error.reason
        keys.append(key)
    return rows, keys, labels, digests, sizes, bad


def _refusal(bad: BadImages, n: int) -> Refused:
    first = sorted(bad)[:3]
    if len(bad) == 1:
        return BadImage(*bad[first[0]])
    examples = "; ".join(f"{key!r}: {reason}" for key, reason in (bad[i] for i in first))
    return Refused(f"{len(bad)} of {n} images cannot be used ({examples}); fix or remove them, or exclude bad images")


# -- the cached index -------------------------------------------------------------------------------------------------


def _index_file(source: ListedSource) -> Path:
    try:
        location = source.location.encode()
    except UnicodeEncodeError:
        raise Refused(f"the path of {source.location!r} is not UTF-8; rename its folders, or link to them") from None
    return cache_folder() / "index" / f"{hashlib.sha256(location).hexdigest()[:32]}.npz"


class SavedTable(NamedTuple):
    """The rows of a table with the keys and stamps that they were read from."""

    keys: PackedKeys
    stamps: np.ndarray
    table: ImageTable

    def arrays(self, started_ns: int) -> dict[str, np.ndarray]:
        """What is saved, if reading began at `started_ns`."""
        level = np.where(old_enough(self.stamps, started_ns), self.table.level, UNKNOWN).astype(np.uint8)
        table = {"digests": self.table.digests, "sizes": self.table.sizes, "level": level}
        keys = {"key_data": self.keys.data, "key_offsets": self.keys.offsets}
        return {"version": np.array(CACHE_VERSION), "stamps": self.stamps, **keys, **table}


def load_table(path: Path) -> SavedTable | None:
    """The table that was saved at `path`; None if there is none that can be used."""
    saved = load_arrays(path, CACHE_ARRAYS)
    if saved is None or saved["version"].tolist() != CACHE_VERSION:
        return None
    stamps, digests, sizes, level = parts = tuple(saved[name] for name in ("stamps", "digests", "sizes", "level"))
    try:
        keys = PackedKeys(saved["key_data"], saved["key_offsets"])
    except (Damaged, ValueError, TypeError):
        return None
    n = len(keys)
    if [(part.shape, part.dtype.name) for part in parts] != [
        ((n, 4), "int64"),
        ((n, 32), "uint8"),
        ((n, 2), "uint32"),
        ((n,), "uint8"),
    ]:
        return None
    return SavedTable(keys, stamps, ImageTable(digests, sizes, level))


def _shared_table(path: Path) -> SavedTable:
    saved = load_table(path)
    if saved is None:
        found = "another file, or one of another version" if path.exists() else "nothing"
        raise Refused(
            f"expected an index of images at {path}, found {found}; write it: redistill index DATA --out FILE"
        )
    return saved


# -- files in the cache folder ----------------------------------------------------------------------------------------
#
# A file that cannot be read counts as missing, and one that cannot be written is skipped: either costs only time.

# An edit within this time of another may leave the same modification time.
RACY_NS = 2_000_000_000
# What reading a damaged .npz raises.
NPZ_RAISES = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    RuntimeError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def old_enough(stamps: np.ndarray, started_ns: int) -> np.ndarray:
    """Whether any edit after `started_ns` changes these stamps [n, 4]; not those of missing files."""
    result: np.ndarray = (stamps[:, 1] < started_ns - RACY_NS) & (stamps[:, 0] >= 0)
    return result


def load_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray] | None:
    """The arrays saved under these names; None if any is missing or cannot be read."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except NPZ_RAISES:
        return None


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Save arrays for `load_arrays`, atomically."""
    with contextlib.suppress(OSError):
        LOCAL.make_directories(path.parent)
        LOCAL.publish(path, _npz(arrays))


def _npz(arrays: Mapping[str, np.ndarray]) -> memoryview:
    out = io.BytesIO()
    np.savez(out, **arrays)  # type: ignore[arg-type]
    return out.getbuffer()


# -- pairing equal values of two arrays, a million at a time ----------------------------------------------------------


def pair_up(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of equal values: the k-th occurrence of a value in `left` is paired with its k-th in `right`.

    Each position is used at most once; pairs come in the order of `left`.
    """
    left_order, right_order = np.argsort(left, kind="stable"), np.argsort(right, kind="stable")
    left_sorted, right_sorted = left[left_order], right[right_order]
    partner = np.searchsorted(right_sorted, left_sorted, "left")
    partner += _occurrence(left_sorted)
    paired = partner < len(right)
    paired[paired] = right_sorted[partner[paired]] == left_sorted[paired]
    rows, partners = left_order[paired], right_order[partner[paired]]
    order = np.argsort(rows)
    return rows[order], partners[order]


def repeats(values: np.ndarray) -> np.ndarray:
    """Positions whose value occurs at an earlier position."""
    order = np.argsort(values, kind="stable")
    return np.sort(order[_occurrence(values[order]) > 0])


def _occurrence(values: np.ndarray) -> np.ndarray:
    """For each of sorted values, the number of equal values before it."""
    positions = np.arange(len(values))
    first = np.concatenate([np.ones(min(len(values), 1), bool), values[1:] != values[:-1]])
    return positions - np.maximum.accumulate(np.where(first, positions, 0))
