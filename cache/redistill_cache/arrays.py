"""What one array of an archive looks like: the shared word of codecs, view recipes and the writer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import numpy as np

from redistill_cache import limits
from redistill_cache.errors import UsageError
from redistill_cache.requirements import check_int, check_name, require
from redistill_cache.strict_json import Json

__all__ = ["CHUNK_BYTES", "ArraySpec", "SideArray", "check_array", "chunks_fit", "resolve_chunk"]

INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
DTYPES = (*INTEGERS, "float16", "float32", "float64")


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

    def to_json(self) -> dict[str, Json]:
        return asdict(self) | {"row_shape": list(self.row_shape)}


@dataclass(frozen=True)
class SideArray:
    """An array written once for a signal: the basis of a codec, an offset."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        check_name(self.name, "name of a side array")
        where = f"side array {self.name!r}:"
        require(self.dtype in DTYPES, f"{where} dtype", f"one of {', '.join(DTYPES)}", self.dtype)
        require(1 <= len(self.shape) <= 6, f"{where} shape", "of 1 to 6 dimensions", self.shape)
        for size in self.shape:
            check_int(size, f"{where} shape", 1, limits.MAX_SIDE_BYTES)
        require(self.nbytes <= limits.MAX_SIDE_BYTES, where, f"<= {limits.MAX_SIDE_BYTES} bytes", self.nbytes)

    @property
    def nbytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)

    def to_json(self) -> dict[str, Json]:
        return asdict(self) | {"shape": list(self.shape)}


def check_array(array: ArraySpec, where: str) -> None:
    """Refuse an ArraySpec that cannot be stored. Products are taken of checked factors only."""
    check_name(array.name, f"{where}: name of an array")
    where = f"{where}: array {array.name!r}:"
    require(array.dtype in DTYPES, f"{where} dtype", f"one of {', '.join(DTYPES)}", array.dtype)
    require(len(array.row_shape) <= 6, f"{where} row_shape", "of at most 6 dimensions", array.row_shape)
    for size in array.row_shape:
        check_int(size, f"{where} row_shape", 1, limits.MAX_ROW_BYTES)
    require(
        array.row_bytes <= limits.MAX_ROW_BYTES, f"{where} a row", f"<= {limits.MAX_ROW_BYTES} bytes", array.row_bytes
    )
    if array.chunk_rows is not None:
        check_int(array.chunk_rows, f"{where} chunk_rows", 1, limits.MAX_BLOCK_ROWS)
    check_int(array.level, f"{where} zstd level", 1, 22)
    require(isinstance(array.transpose, bool), f"{where} transpose", "true or false", array.transpose)
    require(bool(array.row_shape) or not array.transpose, f"{where} transpose", "false for rows of one value", True)


# -- chunk sizes ------------------------------------------------------------------------------------------------------

CHUNK_BYTES = 1 << 20


def resolve_chunk(array: ArraySpec, block_rows: int) -> ArraySpec:
    """Decide how many rows are compressed together: a divisor of `block_rows`, near the wish or near a mebibyte."""
    wish = array.chunk_rows or max(1, CHUNK_BYTES // array.row_bytes)
    wish = min(wish, block_rows, max(1, limits.MAX_CHUNK_BYTES // array.row_bytes))
    rows = min(_divisors(block_rows), key=lambda rows: (abs(math.log(rows / wish)), rows))
    if not chunks_fit(array, rows, block_rows):
        raise UsageError(
            f"array {array.name!r}: block_rows={block_rows} gives chunks of {rows * array.row_bytes} bytes, "
            f"{block_rows // rows} a block; expected at most {limits.MAX_CHUNK_BYTES} and {limits.MAX_CHUNKS}: "
            "choose fewer rows, and a power of two"
        )
    return replace(array, chunk_rows=rows, row_shape=tuple(array.row_shape))


def chunks_fit(array: ArraySpec, rows: int, block_rows: int) -> bool:
    return rows * array.row_bytes <= limits.MAX_CHUNK_BYTES and block_rows // rows <= limits.MAX_CHUNKS


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
