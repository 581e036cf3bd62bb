"""What one per-row array of an archive looks like: the shared word of codecs, view recipes and the writer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["ArraySpec"]


@dataclass(frozen=True)
class ArraySpec:
    """An array of shape [views, samples, *row_shape], one row per view and sample.

    `chunk_rows` rows are compressed together (None: the writer picks about a mebibyte); with `transpose` the bytes
    of a chunk lie column by column, which is what makes columns of small integers compress; `level` is zstd's.
    """

    name: str
    dtype: str
    row_shape: tuple[int, ...] = ()
    chunk_rows: int | None = None
    transpose: bool = False
    level: int = 3

    @property
    def row_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.row_shape)
