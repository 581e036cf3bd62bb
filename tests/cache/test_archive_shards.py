"""Columns of a chunk become rows, for any number, type and alignment."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redistill_cache.layout import ArrayLayout
from redistill_cache.shards import Scratch, encode_shard, untranspose

DTYPES = ("uint8", "int8", "uint16", "float16", "int32", "float32", "int64")


@given(
    width=st.integers(1, 40), chunk=st.integers(1, 50), rows=st.integers(0, 50),
    dtype=st.sampled_from(DTYPES), shifted=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_columns_become_rows(width: int, chunk: int, rows: int, dtype: str, shifted: bool, seed: int):
    rows = min(rows, chunk)
    itemsize = np.dtype(dtype).itemsize
    columns = np.random.default_rng(seed).integers(0, 256, (width, chunk * itemsize), np.uint8).view(dtype)
    memory = np.zeros(rows * width * itemsize + itemsize, np.uint8)
    out = memory[itemsize * shifted :][: rows * width * itemsize].view(dtype).reshape(rows, width)
    scratch = Scratch()
    for _ in range(2):  # the second time with buffers that hold old data
        out.view(np.uint8)[...] = 0xAA
        untranspose(columns, out, scratch)
        assert np.array_equal(out.view(np.uint8), np.ascontiguousarray(columns.T[:rows]).view(np.uint8))


def test_rows_that_are_not_contiguous():
    columns = np.arange(20 * 8, dtype=np.uint8).reshape(20, 8)
    out = np.zeros((8, 40), np.uint8)
    untranspose(columns, out[:, ::2], Scratch())
    assert np.array_equal(out[:, ::2], columns.T)
    assert not out[:, 1::2].any()


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
@pytest.mark.parametrize("width", [1, 7, 500])
def test_honest_shards_are_within_their_bound(width: int, dtype: str, transpose: bool):
    """Also those of random bytes, which do not compress, with few rows in the last chunk."""
    for rows in (1, 2, 63, 64, 65, 190, 256):
        array = ArrayLayout("x", dtype, (1, rows, width), 1, 256, 64, transpose)
        size = rows * width * np.dtype(dtype).itemsize
        values = np.random.default_rng(rows).integers(0, 256, size, np.uint8).view(dtype).reshape(rows, width)
        assert len(encode_shard(array, values)) <= array.most_bytes(rows)


def test_a_padded_chunk_of_the_largest_size_is_within_its_bound():
    array = ArrayLayout("x", "uint8", (1, 1, 500), 1, 1 << 16, 1 << 16, transpose=True)
    size = len(encode_shard(array, np.random.default_rng(0).integers(0, 256, (1, 500), np.uint8)))
    assert size <= array.most_bytes(1) < 50_000
