"""Encoding rows where they are: all at once on a GPU, in threads on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from redistill_cache.codecs import Codec, Encoded, join_encoded
from redistill_cache.codecs.stats import check_finite
from redistill_cache.errors import Refused
from torch import Tensor

from redistill.devices import is_out_of_memory

__all__ = ["encode_on_gpu", "encode_rows", "max_piece_rows", "refuse_full_device"]

# Rows that are encoded together, and an upper bound on their values. A GPU is busy only with many rows; on a CPU, more
# rows mean a longer wait for the last ones. A piece is a function of its block, as a batch is, so that the bytes of an
# archive do not depend on the run.
PIECE_ROWS = {"cpu": 4096, "cuda": 16384}
MIN_PIECE_ROWS = 1024
MAX_PIECE_VALUES = 1 << 24
# Rows that a thread encodes at a time.
THREAD_ROWS = 512
# A GPU that has no room for this many rows is full.
FEWEST_ROWS = 64


@contextmanager
def refuse_full_device(rows: int, device: torch.device, batch_size: int) -> Iterator[None]:
    """As `refuse_out_of_memory`; a smaller batch leaves room only if it is the teacher that fills the device."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise Refused(
            f"{device} ran out of memory while it encoded {rows:,} rows beside the teacher; end other programs that "
            f"use its memory, or use a smaller --batch-size than {batch_size}"
        ) from error


def encode_rows(codec: Codec, rows: Tensor, encoders: ThreadPoolExecutor) -> list[Encoded]:
    """The bytes of a row depend on that row alone, so its thread does not matter. A GPU encodes all rows at once.

    Raises NotFinite with the positions in `rows`.
    """
    if rows.device.type == "cuda":
        return encode_on_gpu(codec, rows)
    check_finite(rows)  # all of them, before they are shared among threads
    host = rows.cpu().numpy()  # from MPS, which has no float64
    return list(encoders.map(codec.encode, (host[at : at + THREAD_ROWS] for at in range(0, len(host), THREAD_ROWS))))


def encode_on_gpu(codec: Codec, rows: Tensor) -> list[Encoded]:
    """Encoded rows on the host, so that all work on the GPU is done. With too little memory, fewer rows at a time."""
    try:
        return [join_encoded([codec.encode(rows)])]
    except RuntimeError as error:
        if not is_out_of_memory(error) or len(rows) <= FEWEST_ROWS:
            raise
    # Here, since the traceback of the error holds the tensors that are in the way.
    torch.cuda.empty_cache()
    check_finite(rows)
    half = len(rows) // 2
    return encode_on_gpu(codec, rows[:half]) + encode_on_gpu(codec, rows[half:])


def max_piece_rows(device: torch.device, width: int) -> int:
    rows = PIECE_ROWS.get(device.type, MIN_PIECE_ROWS)
    return max(MIN_PIECE_ROWS, min(rows, MAX_PIECE_VALUES // width))
