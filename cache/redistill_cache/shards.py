"""One shard: encoded in memory by zarr, and read chunk by chunk without zarr.

zarr-python takes about a millisecond per call and trusts what it reads. Here, reading a chunk takes little longer than
decompressing it, and its size is checked first.
"""

from __future__ import annotations

import math
import os
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import zstd  # type: ignore[import-untyped]
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from redistill_cache.errors import Damaged
from redistill_cache.layout import CHECKSUM, ArrayLayout
from redistill_cache.strict_json import canonical

__all__ = ["Scratch", "ShardReader", "encode_shard", "untranspose"]


# -- writing ----------------------------------------------------------------------------------------------------------


def encode_shard(layout: ArrayLayout, rows: np.ndarray) -> bytes:
    """The file of one shard that holds `rows` [n, *row_shape], n <= shard_rows; later rows are padding."""
    assert rows.dtype == np.dtype(layout.dtype), "checked by the writer"
    assert rows.shape[1:] == layout.row_shape, "checked by the writer"
    lead = (1,) * layout.row_axis
    metadata = canonical(layout.metadata((*lead, *rows.shape)))
    store: dict[str, Any] = {"zarr.json": default_buffer_prototype().buffer.from_bytes(metadata)}
    array = zarr.open_array(MemoryStore(store), mode="r+", zarr_format=3)
    # By default zarr omits a chunk of zeros, which could then not be distinguished from a lost one.
    array = array.with_config({"write_empty_chunks": True})
    array[...] = rows.reshape(*lead, *rows.shape)
    del store["zarr.json"]
    (shard,) = store.values()
    data: bytes = shard.to_bytes()
    return data


# -- reading ----------------------------------------------------------------------------------------------------------

ABSENT = 2**64 - 1  # in the index: no chunk
WORD = 8


class Scratch:
    """Buffers that are reused for every chunk: allocating some MiB takes longer than decoding into them."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}

    def take(self, purpose: str, nbytes: int) -> np.ndarray:
        buffer = self._buffers.get(purpose)
        if buffer is None or buffer.nbytes < nbytes:
            buffer = self._buffers[purpose] = np.empty(nbytes, np.uint8)
        return buffer[:nbytes]


class ShardReader:
    """Reads chunks of one open shard file. Not memory-mapped: truncating a mapped file kills the process."""

    def __init__(self, fd: int, size: int, layout: ArrayLayout, rows: int, where: str) -> None:
        """The first `rows` rows of the shard are data; `where` is its name in errors."""
        self._fd = fd
        self._layout = layout
        self._where = where
        self._rows = rows
        self._ends = self._read_index(size)

    def _damaged(self, reason: str) -> Damaged:
        return Damaged(f"{self._where}: {reason}; 'redistill verify --full' lists everything that is damaged")

    def _read(self, offset: int, into: np.ndarray) -> None:
        view, done = into.data, 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done:]], offset + done)
            if count == 0:
                raise self._damaged(f"the file ends at {offset + done} bytes, expected {offset + len(view)}")
            done += count

    def _read_index(self, size: int) -> np.ndarray:
        """The end of each chunk. Chunks are back to back from byte 0 to the index, so this locates all of them."""
        layout = self._layout
        data_bytes = size - layout.index_bytes
        if data_bytes < 0:
            raise self._damaged(f"{size} bytes, too short for its index of {layout.index_bytes}")
        raw = np.empty(layout.index_bytes, np.uint8)
        self._read(data_bytes, raw)
        body = raw[:-CHECKSUM]
        if google_crc32c.value(body.tobytes()) != int(raw[-CHECKSUM:].view("<u4")[0]):
            raise self._damaged("the checksum of its index does not match")
        entries = body.view("<u8").reshape(-1, 2)
        used = layout.used_chunks(self._rows)
        offsets, sizes = entries[:used].T
        ends = np.cumsum(sizes, dtype=np.uint64)
        back_to_back = np.all(sizes <= data_bytes) and np.array_equal(offsets[1:], ends[:-1]) and offsets[0] == 0
        if not (back_to_back and int(ends[-1]) == data_bytes and np.all(entries[used:] == ABSENT)):
            raise self._damaged("the chunks of its index are not back to back")
        if int(sizes.max()) > layout.most_chunk_bytes:
            raise self._damaged(
                f"a chunk of {int(sizes.max())} bytes, too many for the {layout.chunk_bytes} it decodes to"
            )
        return ends.astype(np.int64)

    def read_chunk(self, chunk: int, scratch: Scratch, out: np.ndarray) -> None:
        """Decode the first n rows of chunk number `chunk` into `out`, C-contiguous [n, *row_shape]."""
        layout = self._layout
        start = int(self._ends[chunk - 1]) if chunk else 0
        stored = scratch.take("stored", int(self._ends[chunk]) - start)
        self._read(start, stored)
        whole = len(out) == layout.chunk_rows
        if whole and not layout.transpose and out.flags.c_contiguous:
            self._decompress(chunk, stored, out.reshape(-1).view(np.uint8))
            return
        decoded = scratch.take("decoded", layout.chunk_bytes)
        self._decompress(chunk, stored, decoded)
        values = decoded.view(layout.dtype)
        if layout.transpose:
            columns = values.reshape(math.prod(layout.row_shape), layout.chunk_rows)
            untranspose(columns, out.reshape(len(out), -1), scratch)
        else:
            out[...] = values.reshape(layout.chunk_rows, *layout.row_shape)[: len(out)]

    def _decompress(self, chunk: int, stored: np.ndarray, out: np.ndarray) -> None:
        where = f"chunk {chunk}"
        if self._layout.level is None:
            body = stored[:-CHECKSUM]
            if len(body) != len(out):
                raise self._damaged(f"{where} has {len(stored)} bytes, expected {len(out) + CHECKSUM}")
            if google_crc32c.value(body.tobytes()) != int(stored[-CHECKSUM:].view("<u4")[0]):
                raise self._damaged(f"{where} does not match its checksum")
            out[:] = body
            return
        problem = check_frame(stored, len(out))
        if problem:
            raise self._damaged(f"{where} {problem}")
        try:
            zstd.decompress(stored, out)
        except (RuntimeError, ValueError) as error:  # libzstd: wrong checksum, block or size
            raise self._damaged(f"{where} does not decompress ({error})") from None


def untranspose(columns_WC: np.ndarray, rows_CW: np.ndarray, scratch: Scratch) -> None:
    """rows_CW[...] = columns_WC.T[:len(rows_CW)], for C-contiguous columns.

    Chunks of small integers compress best column by column, and are needed row by row. A strided copy of single bytes
    is slower than zstd, so this one goes through 64-bit words: columns are interleaved in groups that fill a word, and
    words are transposed instead of bytes, also into rows whose words are not aligned. Columns that do not fill a word
    are copied one by one.
    """
    width, chunk = columns_WC.shape
    rows, itemsize = len(rows_CW), columns_WC.itemsize
    group = WORD // itemsize
    words = width // group
    if group > 1 and words and rows and rows_CW.flags.c_contiguous:
        used = words * group
        interleaved = scratch.take("interleaved", words * chunk * WORD).view(columns_WC.dtype)
        interleaved = interleaved.reshape(words, chunk, group)
        grouped = columns_WC[:used].reshape(words, group, chunk)
        for i in range(group):
            interleaved[:, :, i] = grouped[:, i]
        target_NW = np.ndarray((rows, words), np.uint64, buffer=rows_CW, strides=(width * itemsize, WORD))
        target_NW[...] = interleaved.view(np.uint64)[:, :rows, 0].T
        columns_WC, rows_CW = columns_WC[used:], rows_CW[:, used:]
    rows_CW[...] = columns_WC[:, :rows].T


ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def check_frame(frame: np.ndarray, expected: int) -> str | None:
    """What is wrong with the header of a zstd frame that must hold `expected` bytes and a checksum; None if nothing.

    Checked before decompression: a frame of 8 KB may decode to gigabytes (RFC 8878, section 3.1.1).
    """
    head = frame[:18].tobytes()
    if len(head) < 6 or head[:4] != ZSTD_MAGIC:
        return "is not a zstd frame"
    descriptor = head[4]
    if not descriptor & 0b100:
        return "has no checksum"
    if descriptor & 0b1011:
        return "uses a dictionary or a reserved bit"
    single_segment = bool(descriptor & 0b100000)
    size_bytes = {0: 1 if single_segment else 0, 1: 2, 2: 4, 3: 8}[descriptor >> 6]
    at = 5 if single_segment else 6
    if not size_bytes or len(head) < at + size_bytes:
        return "does not state its size"
    stated = int.from_bytes(head[at : at + size_bytes], "little") + (256 if size_bytes == 2 else 0)
    return None if stated == expected else f"states {stated} bytes, expected {expected}"
