"""From rows asked for to chunks read: the only way to the data of an archive.

Nothing is kept open between calls, so an archive can be pickled, forked and shared by threads. A file is looked at
before every use: it must still have the committed size, and on this machine its SHA-256 must have been checked once.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from redistill_cache.errors import Damaged, Incomplete, OutOfRange, UsageError
from redistill_cache.layout import ArrayLayout, Block
from redistill_cache.open_state import ArchiveState, require_memory
from redistill_cache.shards import Scratch, ShardReader
from redistill_cache.storage import file_sha256, open_regular

__all__ = ["check_rows", "check_view", "opened_shard", "read_rows", "read_whole", "row_block"]

Rows = np.ndarray

DAMAGED = "'redistill verify' lists everything that is damaged"


def check_view(contents: ArchiveState, view: int) -> int:
    try:
        view = operator.index(view)
    except TypeError:
        raise UsageError(f"a view is an integer, found {view!a:.80}") from None
    if not 0 <= view < contents.num_views:
        raise OutOfRange(f"{contents.path} has views 0 to {contents.num_views - 1}, asked for view {view}")
    return view


def check_rows(contents: ArchiveState, rows: object | None) -> Rows:
    """Row numbers as int64 [n]; None is all of them."""
    count = contents.spec.num_samples
    if rows is None:
        return np.arange(count)
    wanted = np.asarray(rows)
    if wanted.size == 0:
        return np.zeros(0, np.int64)
    if wanted.ndim != 1 or wanted.dtype.kind not in "iu":
        raise UsageError(f"rows must be a list of integers, found {wanted.dtype} of shape {list(wanted.shape)}")
    low, high = int(wanted.min()), int(wanted.max())
    if low < 0 or high >= count:
        raise OutOfRange(f"{contents.path} has rows 0 to {count - 1}, asked for row {low if low < 0 else high}")
    return wanted.astype(np.int64)


def row_block(contents: ArchiveState, part: str, view: int, index: int) -> Block:
    """Block number `index` of one view; `Incomplete` where it is not committed."""
    start = index * contents.spec.block_rows
    block = Block(part, view, index, start, min(start + contents.spec.block_rows, contents.spec.num_samples))
    if not contents.holds(block):
        raise Incomplete(
            f"{contents.path}: rows {block.start} to {block.stop - 1} of view {view} are not cached yet; "
            "run the command that writes the archive again, or ask for rows_available()"
        )
    return block


@contextmanager
def opened_shard(contents: ArchiveState, array: ArrayLayout, path: str, rows: int) -> Iterator[ShardReader]:
    """A shard whose bytes are known to be the committed ones; its first `rows` rows are data."""
    entry = contents.files.get(path)
    assert entry is not None, "the list of files was held against the specification"
    where = str(contents.path / path)
    try:
        fd = open_regular(contents.path / path)
    except FileNotFoundError:
        raise Damaged(f"{where} is gone; {DAMAGED}") from None
    try:
        found = os.fstat(fd)
        if found.st_size != entry.size:
            raise Damaged(f"{where} has {found.st_size} bytes, {entry.size} were committed; {DAMAGED}")
        if not contents.stamps.verified(path, entry, found.st_mtime_ns):
            if file_sha256(fd, entry.size, where) != entry.sha256:
                raise Damaged(f"{where} does not have the SHA-256 that was committed; {DAMAGED}")
            contents.stamps.remember([(path, entry, found.st_mtime_ns)])
        yield ShardReader(fd, entry.size, array, rows, where)
    finally:
        os.close(fd)


def read_rows(contents: ArchiveState, part: str, array: ArrayLayout, view: int, rows: Rows, out: np.ndarray) -> None:
    """out[i] = row rows[i] of one view of an array. Every chunk that is touched is decoded once."""
    if not len(rows):
        return
    order = None if np.all(rows[1:] >= rows[:-1]) else np.argsort(rows, kind="stable")
    rising = rows if order is None else rows[order]
    scratch = Scratch()
    for index, here in _runs(rising // contents.spec.block_rows):
        block = row_block(contents, part, view, index)
        path = array.shard_path(view, index)
        with opened_shard(contents, array, path, block.stop - block.start) as shard:
            for chunk, hits in _runs((rising[here] - block.start) // array.chunk_rows):
                start = block.start + chunk * array.chunk_rows
                count = min(array.chunk_rows, block.stop - start)
                which = slice(here.start + hits.start, here.start + hits.stop)
                wanted = rising[which]
                if order is None and len(wanted) == count and np.array_equal(wanted, np.arange(start, start + count)):
                    shard.read_chunk(chunk, scratch, out[which])  # a whole chunk to one place: no second copy
                    continue
                piece = scratch.take("piece", count * array.row_bytes).view(array.dtype)
                piece = piece.reshape(count, *array.row_shape)
                shard.read_chunk(chunk, scratch, piece)
                if order is None:
                    piece.take(wanted - start, axis=0, out=out[which], mode="clip")  # no other mode writes directly
                else:
                    out[order[which]] = piece.take(wanted - start, axis=0)


def _runs(numbers: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Each number of a rising array, and where it stands."""
    ends = [*(np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist(), len(numbers)]
    start = 0
    for end in ends:
        yield int(numbers[start]), slice(start, end)
        start = end


def read_whole(contents: ArchiveState, array: ArrayLayout) -> np.ndarray:
    """An array without views (the sample index, side data), which is one shard."""
    require_memory(array.nbytes, f"{contents.path}: {array.path}")
    out = np.empty(array.shape, array.dtype)
    scratch = Scratch()
    with opened_shard(contents, array, array.shard_path(0, 0), len(out)) as shard:
        for start in range(0, len(out), array.chunk_rows):
            shard.read_chunk(start // array.chunk_rows, scratch, out[start : start + array.chunk_rows])
    return out
