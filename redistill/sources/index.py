"""The index of a source: key, label, digest and size of every sample, made once and kept.

Making it reads every sample once: the same bytes are hashed and their header parsed; pixels are not decoded (but see
`check`). Worker processes share the rows. For sources made of files the result is kept under the user's cache folder
and taken up again next time: a sample whose file still has the size and modification time it had is not read again.
A file edited without changing either is not noticed here; pass `fresh=True`. (Files modified within two seconds
before they were indexed are read again next time, because a later edit might carry the same time.)
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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from redistill_cache.errors import Damaged, Refused
from redistill_cache.keys import PackedKeys, pack_keys
from redistill_cache.machine import usable_cores
from redistill_cache.storage import LOCAL
from redistill_cache.verified_files import cache_folder

from redistill.sources.base import ListedSource, Source, digest_of
from redistill.sources.images import BadImage, decode_array, image_size

__all__ = ["SourceIndex", "index_source", "keep", "pair_up", "repeats", "settled", "take_up"]


# -- pairing ----------------------------------------------------------------------------------------------------------
#
# Pairing equal values of two arrays, a million at a time.


def pair_up(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of equal values: the k-th occurrence of a value in `left` meets its k-th occurrence in `right`.

    Each position is used once at most; pairs come in the order of `left`.
    """
    left_order, right_order = np.argsort(left, kind="stable"), np.argsort(right, kind="stable")
    left_sorted, right_sorted = left[left_order], right[right_order]
    partner = np.searchsorted(right_sorted, left_sorted, "left")
    partner += _occurrence(left_sorted)
    found = partner < len(right)
    found[found] = right_sorted[partner[found]] == left_sorted[found]
    rows, partners = left_order[found], right_order[partner[found]]
    order = np.argsort(rows)
    return rows[order], partners[order]


def repeats(values: np.ndarray) -> np.ndarray:
    """Positions whose value occurred at an earlier position already."""
    order = np.argsort(values, kind="stable")
    return np.sort(order[_occurrence(values[order]) > 0])


def _occurrence(values: np.ndarray) -> np.ndarray:
    """For each of sorted values, how many equal ones stand before it."""
    places = np.arange(len(values))
    first = np.concatenate([np.ones(min(len(values), 1), bool), values[1:] != values[:-1]])
    return places - np.maximum.accumulate(np.where(first, places, 0))


# -- keeping ----------------------------------------------------------------------------------------------------------
#
# What is expensive to find out about a user's files is kept in the user's cache folder, as .npz.
#
# A cache that cannot be read is as good as none, and one that cannot be written costs the time it would have saved.

# An edit within this time of another may carry the same modification time.
RACY_NS = 2_000_000_000
# What reading a damaged .npz raises: zipfile has many words for it.
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


def settled(stamps: np.ndarray, started_ns: int) -> np.ndarray:
    """For stamps [n, 2] (size, modification time; -1 unknown): whether a later edit would have to change them."""
    quiet: np.ndarray = (stamps[:, 1] < started_ns - RACY_NS) & (stamps[:, 0] >= 0)
    return quiet


def take_up(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray] | None:
    """The arrays that were kept under these names; None if any is not there."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            return {name: kept[name] for name in names}
    except NPZ_RAISES:
        return None


def keep(path: Path, **arrays: np.ndarray) -> None:
    """Publish the arrays for `take_up`."""
    out = io.BytesIO()
    np.savez(out, **arrays)  # type: ignore[arg-type]
    with contextlib.suppress(OSError):
        LOCAL.make_directories(path.parent)
        LOCAL.publish(path, out.getbuffer())


# -- index ------------------------------------------------------------------------------------------------------------

CHUNK = 256
# Below this many samples to read, starting processes takes longer than reading.
WORTH_PROCESSES = 4096
CACHE_VERSION = 1
KEPT = ("version", "key_data", "key_offsets", "stamps", "digests", "sizes", "level")
IndexProgress = Callable[[int, int], None]
Check = Literal["header", "full"]


@dataclass(frozen=True)
class SourceIndex:
    """What identifies the samples of a source: row r describes sample `rows[r]`. Only excluded ones have no row."""

    keys: PackedKeys
    labels: np.ndarray  # [N] int64, -1 without a label
    digests: np.ndarray  # [N, 32] uint8: sha256 of the encoded bytes
    sizes: np.ndarray  # [N, 2] uint32: height and width of the upright image
    rows: np.ndarray  # [N] int64: the number of the sample in its source
    class_names: tuple[str, ...] | None
    excluded: tuple[tuple[str, str], ...] = ()  # key and reason of each bad image left out
    reused: int = 0  # rows taken from the cache of an earlier run

    def __len__(self) -> int:
        return len(self.rows)


@dataclass
class _Table:
    """Digests and sizes by source row while they are collected; `level` is 0 unknown, 1 header checked, 2 decoded."""

    digests: np.ndarray
    sizes: np.ndarray
    level: np.ndarray

    @classmethod
    def empty(cls, n: int) -> _Table:
        return cls(np.zeros((n, 32), np.uint8), np.zeros((n, 2), np.uint32), np.zeros(n, np.uint8))


def index_source(
    source: Source,
    *,
    workers: int | None = None,
    progress: IndexProgress | None = None,
    cache_dir: Path | None = None,
    on_bad_image: Literal["fail", "exclude"] = "fail",
    check: Check | None = None,
    fresh: bool = False,
) -> SourceIndex:
    """Key, label, digest and size of every sample of `source`.

    `workers` processes read (None: one per core where there is enough to read, 0: none; a script that uses processes
    needs the usual `if __name__ == "__main__":`). `progress(done, total)` is called as samples are done.
    `cache_dir` holds kept indices (None: `cache_folder()`). With `on_bad_image="exclude"`, bad images are left
    out and listed, and every image is decoded in full to find them, since an archive fixes its rows before it meets
    their pixels; `check` ("header" or "full") overrides that.
    """
    check = check or ("full" if on_bad_image == "exclude" else "header")
    wanted = 2 if check == "full" else 1
    directory = cache_folder() if cache_dir is None else cache_dir
    table = _Table.empty(len(source))
    stamps = None
    if isinstance(source, ListedSource):
        stamps = source.stamps()
        if not fresh:
            _load(directory, source, stamps, table)
    todo = np.flatnonzero(table.level < wanted)
    reused, started = len(source) - len(todo), time.time_ns()
    keys, labels, bad = _read_all(source, todo, table, check, _processes(workers, len(todo)), progress)
    if isinstance(source, ListedSource):
        keys, labels = source.keys, source.labels
        if stamps is not None and len(todo):
            _store(directory, source, stamps, table, started)
    if bad and on_bad_image == "fail":
        raise _refusal(bad, len(source))
    rows = np.setdiff1d(np.arange(len(source)), np.array(sorted(bad), np.int64), assume_unique=True)
    return SourceIndex(
        keys=keys if not bad else keys.take(rows),
        labels=labels[rows],
        digests=table.digests if not bad else table.digests[rows],
        sizes=table.sizes if not bad else table.sizes[rows],
        rows=rows,
        class_names=source.class_names,
        excluded=tuple(bad[i] for i in sorted(bad)),
        reused=reused,
    )


# -- reading ----------------------------------------------------------------------------------------------------------

_Chunk = tuple[np.ndarray, list[str], np.ndarray, np.ndarray, np.ndarray, list[tuple[int, str, str]]]


def _read_chunk(source: Source, rows: np.ndarray, check: Check) -> _Chunk:
    """Keys, labels, digests and sizes of some rows, and (row, key, reason) of the bad ones among them."""
    digests, sizes = np.zeros((len(rows), 32), np.uint8), np.zeros((len(rows), 2), np.uint32)
    keys, labels, bad = [], np.zeros(len(rows), np.int64), []
    for at, i in enumerate(rows.tolist()):
        key = f"sample {i}"
        try:
            sample = source.sample(i)
            key, labels[at] = sample.key, sample.label
            digests[at] = np.frombuffer(digest_of(sample.payload, name=key), np.uint8)
            if check == "full" and isinstance(sample.payload, bytes):
                decode_array(sample.payload, name=key)
            sizes[at] = image_size(sample.payload, name=key)
        except BadImage as error:
            key = error.name
            bad.append((i, key, error.reason))
        keys.append(key)
    return rows, keys, labels, digests, sizes, bad


_source_of_process: Source


def _start_process(source: Source) -> None:
    global _source_of_process  # a pool hands its processes state in no other way
    _source_of_process = source


def _read_chunk_in_process(rows: np.ndarray, check: Check) -> _Chunk:
    return _read_chunk(_source_of_process, rows, check)


def _processes(workers: int | None, todo: int) -> int:
    if workers is not None:
        return workers
    return usable_cores() if todo >= WORTH_PROCESSES else 0


def _chunks(source: Source, todo: np.ndarray, check: Check, processes: int) -> Iterator[_Chunk]:
    pieces = [todo[i : i + CHUNK] for i in range(0, len(todo), CHUNK)]
    if processes < 1:
        yield from (_read_chunk(source, rows, check) for rows in pieces)
        return
    # Not fork: a parent that has run torch holds locks of threads a forked child does not have.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_process, (source,)) as pool:
        ahead = [pool.submit(_read_chunk_in_process, rows, check) for rows in pieces[: 4 * processes]]
        upcoming = iter(pieces[4 * processes :])
        try:
            while ahead:
                yield ahead.pop(0).result()
                for rows in upcoming:
                    ahead.append(pool.submit(_read_chunk_in_process, rows, check))
                    break
        finally:
            for future in ahead:
                future.cancel()


def _read_all(
    source: Source, todo: np.ndarray, table: _Table, check: Check, processes: int, progress: IndexProgress | None
) -> tuple[PackedKeys, np.ndarray, dict[int, tuple[str, str]]]:
    labels, bad = np.zeros(len(source), np.int64), {}
    done = len(source) - len(todo)

    def keys() -> Iterator[str]:
        nonlocal done
        for rows, found, found_labels, digests, sizes, found_bad in _chunks(source, todo, check, processes):
            table.digests[rows], table.sizes[rows], labels[rows] = digests, sizes, found_labels
            table.level[rows] = 2 if check == "full" else 1
            for i, key, reason in found_bad:
                bad[i] = key, reason
                table.level[i] = 0
            done += len(rows)
            if progress is not None:
                progress(done, len(source))
            yield from found

    return pack_keys(keys()), labels, bad


def _refusal(bad: dict[int, tuple[str, str]], n: int) -> Refused:
    first = sorted(bad)[:3]
    if len(bad) == 1:
        return BadImage(*bad[first[0]])
    examples = "; ".join(f"{key!r}: {reason}" for key, reason in (bad[i] for i in first))
    return Refused(f"{len(bad)} of {n} images cannot be used ({examples}); mend or remove them, or exclude bad images")


# -- keeping ----------------------------------------------------------------------------------------------------------


def _cache_file(directory: Path, source: ListedSource) -> Path:
    return directory / "index" / f"{hashlib.sha256(source.location.encode()).hexdigest()[:32]}.npz"


def _load(directory: Path, source: ListedSource, stamps: np.ndarray, table: _Table) -> None:
    """Fill the rows of `table` whose file has not changed. A cache that cannot be read is as good as none."""
    kept = take_up(_cache_file(directory, source), KEPT)
    if kept is None or kept["version"].tolist() != CACHE_VERSION:
        return
    old_stamps, digests, sizes, level = (kept[name] for name in ("stamps", "digests", "sizes", "level"))
    try:
        old_keys = PackedKeys(kept["key_data"], kept["key_offsets"])
    except (Damaged, ValueError, TypeError):
        return
    n = len(old_keys)
    if [part.shape for part in (old_stamps, digests, sizes, level)] != [(n, 2), (n, 32), (n, 2), (n,)]:
        return
    rows, old = pair_up(source.keys.hashes(), old_keys.hashes())
    same = (stamps[rows] == old_stamps[old]).all(axis=1) & source.keys.equal_at(rows, old_keys, old)
    rows, old = rows[same], old[same]
    table.digests[rows], table.sizes[rows], table.level[rows] = digests[old], sizes[old], level[old]


def _store(directory: Path, source: ListedSource, stamps: np.ndarray, table: _Table, started_ns: int) -> None:
    """Keep the table for next time."""
    keep(
        _cache_file(directory, source),
        version=np.array(CACHE_VERSION),
        key_data=source.keys.data,
        key_offsets=source.keys.offsets,
        stamps=stamps,
        digests=table.digests,
        sizes=table.sizes,
        level=np.where(settled(stamps, started_ns), table.level, 0).astype(np.uint8),
    )
