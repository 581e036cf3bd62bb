"""What a codec is, and what encoding returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from redistill_cache.codecs.space import Array, Space, space_of, to_numpy
from redistill_cache.errors import Damaged
from redistill_cache.spec import ArraySpec

__all__ = ["Codec", "Encoded", "Json", "absent", "exact_rows", "is_absent", "join_encoded", "join_parts", "rare_rows"]

Json = Any


@dataclass(frozen=True)
class Encoded:
    """Encoded rows, and what was measured on every one of them after decoding it again.

    `arrays` has one entry per ArraySpec of the codec. Rare arrays (those in `Codec.rare`) are on the host whatever the
    rows were, and take no memory where no row needed them.
    """

    arrays: Mapping[str, Array]
    errors: Mapping[str, np.ndarray]  # per row, float64: "kl_t1" and "kl_t4", or "relative" for features
    exact: np.ndarray  # bool: rows stored bit for bit
    top1_kept: np.ndarray  # bool: the largest value is where it was

    def __len__(self) -> int:
        return len(self.exact)

    @property
    def kl_t1(self) -> np.ndarray:
        return self.errors["kl_t1"]

    @property
    def kl_t4(self) -> np.ndarray:
        return self.errors["kl_t4"]


class Codec(Protocol):
    """Rows of a signal to integer arrays and back. Frozen: what it does is decided by width, config and side data."""

    @property
    def name(self) -> str: ...

    @property
    def width(self) -> int: ...

    @property
    def full_rows(self) -> bool:
        """Whether all values of a row are known. If not, `tail_rule` says what stands for the others."""

    @property
    def tail_rule(self) -> str: ...

    @property
    def rare(self) -> frozenset[str]:
        """Arrays that hardly any row needs. `decode` takes them whole, or only the rows of `rows_needing`, or not."""

    def config(self) -> dict[str, Json]:
        """Plain JSON; with `side`, all that `open_codec` needs."""

    def side(self) -> dict[str, np.ndarray]:
        """Arrays written once per signal."""

    def arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays of a row."""

    def rows_needing(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """For every rare array, which of these rows need it (bool). Looks only at arrays that are not rare."""

    def encode(self, rows: Array) -> Encoded:
        """float32 [n, width], numpy or torch on any device. Raises NotFinite."""

    def decode(self, arrays: Mapping[str, Array]) -> Array:
        """float32 [n, width], of the kind and on the device of what was given."""


def join_encoded(parts: Sequence[Encoded]) -> Encoded:
    """Batches as one, on the host."""
    host = [
        Encoded({name: to_numpy(array) for name, array in part.arrays.items()}, part.errors, part.exact, part.top1_kept)
        for part in parts
    ]
    return join_parts(host)


def join_parts(parts: Sequence[Encoded]) -> Encoded:
    """Batches as one, every array where it is."""
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
        return space_of(first).concatenate(pieces)
    shape = (sum(len(piece) for piece in pieces), *first.shape[1:])
    if all(is_absent(piece) for piece in pieces):
        return absent(shape, first.dtype)
    joined = np.zeros(shape, first.dtype)  # pages that stay zero are never touched
    start = 0
    for piece in pieces:
        if not is_absent(piece):
            joined[start : start + len(piece)] = piece
        start += len(piece)
    return joined


def absent(shape: tuple[int, ...], dtype: np.dtype[Any] | str) -> np.ndarray:
    """An array of zeros that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def is_absent(array: np.ndarray) -> bool:
    """Whether this is what `absent` returns."""
    return array.size == 0 or not any(array.strides)


def exact_rows(rows: Array, exact: np.ndarray) -> np.ndarray:
    """The flagged rows as they are and zeros for the others, on the host."""
    shape = (len(exact), int(rows.shape[1]))
    if not exact.any():
        return absent(shape, "float32")
    array = np.zeros(shape, np.float32)  # pages that stay zero are never touched
    index = np.flatnonzero(exact)
    array[index] = to_numpy(rows[space_of(rows).constant(index)])
    return array


# -- rare -------------------------------------------------------------------------------------------------------------
#
# Arrays that hardly any row needs, as decode may be given them: whole, only the rows that need them, or not at all.


def rare_rows(
    space: Space, arrays: Mapping[str, Array], name: str, flags: Array, flag: int
) -> tuple[Array | None, Array | None]:
    """(indices of the flagged rows, what `name` holds for them), or (None, None) where there are none.

    An array that is absent on the device means that no row needs it: looking would cost a synchronisation.
    """
    array = arrays.get(name)
    if array is None and not space.on_host:
        return None, None
    index = space.rows_where((flags & flag) != 0)
    if len(index) == 0:
        return None, None
    if array is None:
        raise Damaged(f"expected array {name!r} for {len(index)} rows that need it, found none")
    values = space.constant(array) if isinstance(array, np.ndarray) and space.torch is not None else array
    if len(values) == len(flags):
        return index, values[index]
    if len(values) == len(index):
        return index, values
    raise Damaged(f"expected {len(index)} or {len(flags)} rows of array {name!r}, found {len(values)}")
