"""The codec protocol, encoded rows, and sparse arrays: those that only a few rows need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from redistill_cache.codecs.backend import Array, Backend, backend_of, to_numpy
from redistill_cache.errors import Damaged
from redistill_cache.spec import ArraySpec
from redistill_cache.strict_json import Json

__all__ = ["Codec", "Encoded", "absent", "exact_rows", "is_absent", "join_encoded", "join_parts", "sparse_rows"]


@dataclass(frozen=True)
class Encoded:
    """Encoded rows, with the errors measured after decoding every one of them.

    `arrays` has one entry per ArraySpec of the codec. Sparse arrays (those in `Codec.sparse`) are on the host even if
    the rows were not, and take no memory if no row needs them.
    """

    arrays: Mapping[str, Array]
    errors: Mapping[str, np.ndarray]  # per row, float64: "kl_t1" and "kl_t4", or that of features
    exact: np.ndarray  # bool: rows stored bit for bit
    top1_kept: np.ndarray  # bool: the largest value is in the same position

    def __len__(self) -> int:
        return len(self.exact)


class Codec(Protocol):
    """Maps rows of a signal to integer arrays and back. Immutable; defined by width, config and side data."""

    @property
    def name(self) -> str: ...

    @property
    def width(self) -> int: ...

    @property
    def full_rows(self) -> bool:
        """Whether every value of a decoded row comes from the teacher; if not, the tail is filled in."""

    @property
    def keeps_shift(self) -> bool:
        """Whether decoded logits include the constant of each row that softmax does not depend on."""

    @property
    def sparse(self) -> frozenset[str]:
        """The sparse arrays. `decode` takes each of them whole, or only the rows of `rows_needing`, or not at all."""

    def config(self) -> dict[str, Json]:
        """Plain JSON; with `side`, all that `open_codec` needs."""

    def side(self) -> dict[str, np.ndarray]:
        """Arrays stored once per signal."""

    def arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays that hold the rows."""

    def rows_needing(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """For every sparse array, which of these rows need it (bool). Reads only arrays that are not sparse."""

    def encode(self, rows: Array) -> Encoded:
        """Encode float32 [n, width], numpy or torch on any device. Raises NotFinite."""

    def errors(self, exact: Array, decoded: Array) -> dict[str, np.ndarray]:
        """The errors of decoded rows by name, in the measure whose bound the codec states."""

    def decode(self, arrays: Mapping[str, Array]) -> Array:
        """float32 [n, width], of the same library and device as `arrays`."""


def join_encoded(parts: Sequence[Encoded]) -> Encoded:
    """Concatenate batches on the host."""
    host = [
        Encoded({name: to_numpy(array) for name, array in part.arrays.items()}, part.errors, part.exact, part.top1_kept)
        for part in parts
    ]
    return join_parts(host)


def join_parts(parts: Sequence[Encoded]) -> Encoded:
    """Concatenate batches; every array stays on its device."""
    if len(parts) == 1:
        return parts[0]
    return Encoded(
        arrays={name: _join([part.arrays[name] for part in parts]) for name in parts[0].arrays},
        errors={key: np.concatenate([part.errors[key] for part in parts]) for key in parts[0].errors},
        exact=np.concatenate([part.exact for part in parts]),
        top1_kept=np.concatenate([part.top1_kept for part in parts]),
    )


def _join(pieces: list[Array]) -> Array:
    first = pieces[0]
    if not any(isinstance(piece, np.ndarray) and is_absent(piece) for piece in pieces):
        return backend_of(first).concatenate(pieces)
    shape = (sum(len(piece) for piece in pieces), *first.shape[1:])
    if all(is_absent(piece) for piece in pieces):
        return absent(shape, first.dtype)
    joined = np.zeros(shape, first.dtype)  # pages that stay zero are never allocated
    start = 0
    for piece in pieces:
        if not is_absent(piece):
            joined[start : start + len(piece)] = piece
        start += len(piece)
    return joined


# -- sparse arrays ----------------------------------------------------------------------------------------------------


def absent(shape: tuple[int, ...], dtype: np.dtype[Any] | str) -> np.ndarray:
    """An array of zeros that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def is_absent(array: np.ndarray) -> bool:
    """Whether an array was made by `absent`."""
    return array.size == 0 or not any(array.strides)


def exact_rows(rows: Array, exact: np.ndarray) -> np.ndarray:
    """The sparse array of rows stored bit for bit: the flagged rows, and zeros for the others, on the host."""
    shape = (len(exact), int(rows.shape[1]))
    if not exact.any():
        return absent(shape, "float32")
    array = np.zeros(shape, np.float32)  # pages that stay zero are never allocated
    index = np.flatnonzero(exact)
    array[index] = to_numpy(rows[backend_of(rows).constant(index)])
    return array


def sparse_rows(
    backend: Backend, arrays: Mapping[str, Array], name: str, flags: Array, flag: int
) -> tuple[Array | None, Array | None]:
    """(indices of the flagged rows, their rows of array `name`), or (None, None) if there are none.

    On a device, rows need a sparse array only if it is passed: checking the flags would cost a synchronisation.
    """
    array = arrays.get(name)
    if array is None and not backend.on_host:
        return None, None
    index = backend.rows_where((flags & flag) != 0)
    if len(index) == 0:
        return None, None
    if array is None:
        raise Damaged(f"expected array {name!r} for {len(index)} rows that need it, found none")
    values = backend.constant(array) if isinstance(array, np.ndarray) and backend.torch is not None else array
    if len(values) == len(flags):
        return index, values[index]
    if len(values) == len(index):
        return index, values
    raise Damaged(f"expected {len(index)} or {len(flags)} rows of array {name!r}, found {len(values)}")
