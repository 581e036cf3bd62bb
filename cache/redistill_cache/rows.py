"""From row numbers to chunks: how all data of an archive is read.

No file stays open between calls, so an archive can be pickled, forked and shared by threads. A file is checked before
every use: it must have its committed size, and its SHA-256 must have been checked once on this machine.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from redistill_cache import layout
from redistill_cache.errors import Damaged, Incomplete, OutOfRange, UsageError
from redistill_cache.layout import ArrayLayout, Block
from redistill_cache.machine import require_memory
from redistill_cache.open_state import VERIFY_ADVICE, ArchiveState, committed_file
from redistill_cache.shards import Scratch, ShardReader

__all__ = ["Rows", "check_rows", "check_view", "count_rows", "opened_shard", "read_rows", "read_whole"]

Rows = np.ndarray | None
"""Row numbers, int64 [n]; None: every row."""


def check_view(state: ArchiveState, view: int) -> int:
    try:
        view = operator.index(view)
    except TypeError:
        raise UsageError(f"a view is an integer, found {view!a:.80}") from None
    if not 0 <= view < state.num_views:
        raise OutOfRange(f"{state.path} has views 0 to {state.num_views - 1}, requested view {view}")
    return view


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
    """Every chunk is decoded straight into its place."""
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
                wanted = rising[span]
                if order is None and len(wanted) == count and np.array_equal(wanted, np.arange(start, start + count)):
                    shard.read_chunk(chunk, scratch, out[span])  # a whole chunk to one place: no second copy
                    continue
                piece = scratch.take("piece", count * array.row_bytes).view(array.dtype)
                piece = piece.reshape(count, *array.row_shape)
                shard.read_chunk(chunk, scratch, piece)
                if order is None:
                    piece.take(wanted - start, axis=0, out=out[span], mode="clip")  # no other mode writes directly
                else:
                    out[order[span]] = piece.take(wanted - start, axis=0)


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
