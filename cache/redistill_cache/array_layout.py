"""One zarr array of an archive: its folder, its shape, how it is cut into files and chunks, and its zarr.json."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from redistill_cache.strict_json import Json, canonical

__all__ = ["CHECKSUM", "ArrayLayout"]

INDEX_ENTRY = 16  # offset and length, little-endian uint64
CHECKSUM = 4  # CRC-32C, of the index and of chunks that are not compressed


@dataclass(frozen=True)
class ArrayLayout:
    """One zarr array: its folder, shape, and cut into shards (files) and inner chunks.

    `row_axis` is 1 for arrays [view, sample, ...] and 0 for arrays without views. Axes after it are never cut, and the
    axis before it is cut one by one, so a shard is `shard_rows` consecutive rows and a chunk is `chunk_rows` of them.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    row_axis: int
    shard_rows: int
    chunk_rows: int
    transpose: bool = False
    level: int | None = 3  # zstd's; None stores chunks as they are, with a CRC-32C

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.shape[self.row_axis + 1 :]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        return self.row_bytes * math.prod(self.shape[: self.row_axis + 1])

    @property
    def chunk_bytes(self) -> int:
        return self.chunk_rows * self.row_bytes

    @property
    def chunks_per_shard(self) -> int:
        return self.shard_rows // self.chunk_rows

    @property
    def index_bytes(self) -> int:
        return self.chunks_per_shard * INDEX_ENTRY + CHECKSUM

    @property
    def stored_bytes(self) -> int:
        """Size of the one shard of an array that is not compressed."""
        assert self.level is None
        used = self.used_chunks(self.shape[self.row_axis])
        return used * (self.chunk_bytes + CHECKSUM) + self.index_bytes

    def used_chunks(self, rows: int) -> int:
        """Chunks of a shard that hold at least one of its first `rows` rows."""
        return -(-rows // self.chunk_rows)

    @property
    def metadata_path(self) -> str:
        return f"{self.path}/zarr.json"

    def shard_path(self, view: int, index: int) -> str:
        coordinates = [view] * self.row_axis + [index] + [0] * len(self.row_shape)
        return f"{self.path}/c.{'.'.join(map(str, coordinates))}"

    def metadata(self, shape: tuple[int, ...] | None = None) -> dict[str, Json]:
        """The zarr.json of this array as a value; `shape` stands in for the array's own when one shard is encoded."""
        lead = [1] * self.row_axis
        names = [*["view"] * self.row_axis, "sample", *[None] * len(self.row_shape)]
        if self.row_axis == 0:
            names[0] = None  # offsets and side data have rows that are not samples
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape or self.shape),
            "data_type": self.dtype,
            "chunk_grid": _regular([*lead, self.shard_rows, *self.row_shape]),
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": 0.0 if np.dtype(self.dtype).kind == "f" else 0,
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": [*lead, self.chunk_rows, *self.row_shape],
                        "codecs": self._inner_codecs(),
                        "index_codecs": [_bytes_codec(8), {"name": "crc32c"}],
                        "index_location": "end",
                    },
                }
            ],
            "dimension_names": names,
            "attributes": {},
        }

    def _inner_codecs(self) -> list[dict[str, Json]]:
        codecs: list[dict[str, Json]] = []
        if self.transpose:
            axes = list(range(self.row_axis + 1 + len(self.row_shape)))
            order = [*axes[: self.row_axis], *axes[self.row_axis + 1 :], self.row_axis]
            codecs.append({"name": "transpose", "configuration": {"order": order}})
        codecs.append(_bytes_codec(np.dtype(self.dtype).itemsize))
        if self.level is None:
            return [*codecs, {"name": "crc32c"}]
        return [*codecs, {"name": "zstd", "configuration": {"level": self.level, "checksum": True}}]

    def metadata_bytes(self) -> bytes:
        return canonical(self.metadata())


def _regular(shape: list[int]) -> dict[str, Json]:
    return {"name": "regular", "configuration": {"chunk_shape": shape}}


def _bytes_codec(itemsize: int) -> dict[str, Json]:
    return {"name": "bytes", "configuration": {"endian": "little"}} if itemsize > 1 else {"name": "bytes"}
